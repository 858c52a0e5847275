"""Laws of `average.model_stock`."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import golden_arrays
from tests.helpers import is_nan
from tests.strategies import FLOAT
from wspace import average, merge
from wspace.testing import assert_close

pytestmark = pytest.mark.exact

stock = jax.jit(average.model_stock, static_argnames=("statistic", "scope"))
MERGEKIT = merge.presets.mergekit["model_stock"]
E = [jnp.asarray(row, FLOAT) for row in np.eye(3)]
ZERO = jnp.zeros(3, FLOAT)


@given(seed=st.integers(0, 2**16), size=st.sampled_from([1.0, 1e-4, 1e-9]))
def test_is_the_formula_of_the_paper_at_every_size(seed, size):
    rng = np.random.default_rng(seed)
    deltas = (size * (rng.normal(size=8) + rng.normal(size=(3, 8)))).astype(np.float32)
    rows = deltas.astype(np.float64)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = [units[i] @ units[j] for i, j in itertools.combinations(range(3), 2)]
    base, xs = jnp.zeros(8, FLOAT), [jnp.asarray(x, FLOAT) for x in deltas]
    for statistic, c in (
        ("angle", np.cos(np.mean(np.arccos(cosines)))),
        ("cosine", np.mean(cosines)),
    ):
        c = max(c, 0.0)
        wanted = jnp.asarray(3 * c / (1 + 2 * c) * rows.mean(axis=0), FLOAT)
        got = stock(base, xs, statistic=statistic)
        assert_close(got, wanted, units=64, scale=np.abs(rows).max())


def test_the_popular_absolute_bound_on_norms_fails_this_law():
    tiny = 1e-4 * np.eye(3)[0]
    assert tiny @ tiny / max(tiny @ tiny, 1e-6) < 0.011  # where the cosine is one
    x = jnp.asarray(tiny, FLOAT)
    assert_close(stock(ZERO, [x, x]), x)


@pytest.mark.parametrize(("options", "scope"), [("", "leaf"), ("filter_wise=True", "row")])
def test_agrees_with_another_system(options, scope):
    base = golden_arrays.tree("peers", "input/base")
    xs = [golden_arrays.tree("peers", f"input/tuned{i}") for i in range(3)]
    wanted = golden_arrays.tree("peers", f"mergekit-0.1.5/model_stock?{options}")
    got = average.model_stock(base, xs, **MERGEKIT | {"scope": scope})
    for name, leaf in wanted.items():
        np.testing.assert_allclose(got[name], leaf, atol=4e-6)


def test_degenerate_task_vectors(refuses):
    assert_close(stock(E[0], [E[0], E[0]]), E[0], units=0)
    assert_close(stock(ZERO, [E[0], ZERO]), ZERO, units=0)
    assert_close(stock(E[0], [E[1], E[1]]), E[1])
    assert_close(stock(ZERO, [E[0], -2 * E[0] + E[1]]), ZERO, units=0)  # the floor
    opposite = [E[0], -E[0]]
    with refuses(ValueError, match=r"t has its pole: take floor=0\.0"):
        average.model_stock(ZERO, opposite, floor=-1.0)
    assert is_nan(stock(ZERO, opposite, **MERGEKIT))
    with refuses(ValueError, match="give at least two"):
        average.model_stock(ZERO, E[:1])
    right = [E[0], E[1], E[1]]  # angles 90, 90, 0: the systems disagree
    mean = sum(right) / 3
    assert_close(stock(ZERO, right, **MERGEKIT), 0.6 * mean)
    assert_close(stock(ZERO, right, **merge.presets.fusionbench["model_stock"]), 0.75 * mean)
