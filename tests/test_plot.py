"""Pictures hold the numbers that they are drawn from."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from wspace import negative, plot


def report(radius=2.0):
    rng = np.random.default_rng(0)
    trees = [
        {"w": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32), "b": jnp.ones(3) * i}
        for i in range(3)
    ]
    return negative.audit(trees[:2], (0.5, 0.5), trees[2], radius)


def test_an_audit_is_drawn_from_its_numbers():
    audited = report()
    left, middle, right = plot.audit(audited).axes
    leafwise, pooled = left.lines[:2]
    np.testing.assert_array_equal(leafwise.get_ydata(), audited.leafwise_curve)
    np.testing.assert_array_equal(pooled.get_ydata(), audited.tail_curve)
    np.testing.assert_array_equal(leafwise.get_xdata(), np.arange(5) / 4)
    assert [line.get_label() for line in left.lines[2:]] == [
        "radius",
        f"rank needed: {int(audited.rank_needed)}",
        f"ceiling: {int(audited.ceiling)}",
    ]
    ranks, budgets = middle.lines[0].get_data()
    assert ranks[0] == int(audited.pooled_rank_needed)
    np.testing.assert_array_equal(budgets, audited.frobenius_budget[int(ranks[0]) :])
    widths = [bar.get_width() for bar in right.patches]
    np.testing.assert_allclose(widths, [leaf.distance for leaf in audited.leaves])


@pytest.mark.parametrize("radius", [0.0, 100.0])
def test_the_ends_are_drawn_too(radius, tmp_path):
    figure = plot.audit(report(radius))
    figure.savefig(tmp_path / "audit.svg")
    assert (tmp_path / "audit.svg").stat().st_size > 0
    assert len(plot.audit(negative.audit([{}], (1,), {}, 1.0)).axes) == 3


def test_what_is_no_audit_is_refused(refuses):
    with refuses(TypeError, match="report must be an Audit"):
        plot.audit({"margin": 1.0})


def test_without_matplotlib_the_extra_is_named():
    code = (
        "import sys; sys.modules['matplotlib.figure'] = None\n"
        "import jax.numpy as jnp\n"
        "from wspace import negative, plot\n"
        "try: plot.audit(negative.audit([jnp.ones(2)], (1,), jnp.zeros(2), 1.0))\n"
        "except ImportError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "plot needs matplotlib: install wspace[plot]"
