"""Pictures hold the numbers that they are drawn from."""

import subprocess
import sys

import jax.numpy as jnp
import matplotlib.text
import numpy as np
import pytest
from matplotlib.figure import Figure

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
    left, middle, below = plot.audit(audited).axes
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
    widths = [bar.get_width() for bar in below.patches]
    np.testing.assert_allclose(widths, [leaf.distance for leaf in audited.leaves])


@pytest.mark.parametrize("radius", [0.0, 100.0])
def test_the_ends_are_drawn_too(radius, tmp_path):
    figure = plot.audit(report(radius))
    figure.savefig(tmp_path / "audit.svg")
    assert (tmp_path / "audit.svg").stat().st_size > 0
    assert len(plot.audit(negative.audit([{}], (1,), {}, 1.0)).axes) == 3


def test_of_many_leaves_those_farthest_away_are_drawn():
    sizes = np.random.default_rng(0).permutation(40).astype(np.float32) + 1
    points = {f"{i:02}": jnp.full(1, size) for i, size in enumerate(sizes)}
    nothing = {name: jnp.zeros(1) for name in points}
    below = plot.audit(negative.audit([points], (1,), nothing, 1.0)).axes[2]
    widths = [bar.get_width() for bar in below.patches]
    np.testing.assert_allclose(widths, sizes[sizes > 16], rtol=1e-6)
    names = [f"['{i:02}']" for i, size in enumerate(sizes) if size > 16]
    assert [text.get_text() for text in below.get_yticklabels()] == names
    assert "the 24 largest of 40" in below.get_xlabel()


T = np.linspace(-0.5, 1.5, 9)


def test_a_segment_is_drawn_from_its_numbers():
    curves = {"a": T**2, "b": jnp.asarray(T, jnp.float32)}
    axes = plot.segment(T, curves, {"A": 0, "C": 1}, label="error").axes[0]
    marks, lines = axes.lines[:2], axes.lines[2:]
    assert [x for line in marks for x in set(line.get_xdata())] == [0, 1]
    assert [text.get_text() for text in axes.texts] == ["A", "C"]
    for line, y in zip(lines, curves.values(), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), np.stack([T, y], axis=1))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 2
    assert axes.get_ylabel() == "error"


def test_what_is_not_finite_is_a_gap(tmp_path):
    y = [1, np.nan, np.inf, 4, -np.inf, 6, 7, 8, 9]
    figure = plot.segment(T, y)
    assert np.isfinite(figure.axes[0].lines[0].get_ydata()).tolist() == np.isfinite(y).tolist()
    assert figure.axes[0].get_legend() is None
    grid = np.outer(np.ones(2), y)
    image = plot.plane(T, [0, 1], grid).axes[0].collections[0]
    assert (~image.get_array().mask == np.isfinite(grid)).all()
    plot.plane(T, [0, 1], np.full((2, 9), np.nan)).savefig(tmp_path / "gaps.svg")


def test_a_plane_is_drawn_from_its_numbers():
    x, y = np.array([0.0, 1.0, 3.0]), np.array([-1.0, 1.0])
    values = np.arange(6.0).reshape(2, 3)
    points = {"A": (0, 0), "C": (3, 1)}
    axes, bar = plot.plane(x, y, values, points, hollow=["C"], label="error").axes
    (image,) = axes.collections
    np.testing.assert_array_equal(image.get_array(), values)
    # A cell is around its point: the edges are halfway to the neighbors.
    np.testing.assert_allclose(np.unique(image.get_coordinates()[..., 0]), [-0.5, 0.5, 2, 4])
    np.testing.assert_allclose(np.unique(image.get_coordinates()[..., 1]), [-2, 0, 2])
    assert [text.xy for text in axes.texts] == [(0, 0), (3, 1)]
    filled, hollow = axes.lines
    assert filled.get_markerfacecolor() == hollow.get_markeredgecolor() != "white"
    assert hollow.get_markerfacecolor() == "white"
    assert (axes.get_aspect(), bar.get_ylabel()) == (1.0, "error")


def test_a_gram_is_drawn_as_cosines_and_norms():
    a, b = np.float32([3, 0, 0]), np.float32([-2, 2, 0])
    points = np.stack([a, b, 0 * a])
    axes = plot.gram(points @ points.T, ["a", "b", "none"]).axes[0]
    (image,) = axes.images
    wanted = np.array([[1, -(0.5**0.5)], [-(0.5**0.5), 1]])
    np.testing.assert_allclose(image.get_array()[:2, :2], wanted, rtol=1e-6)
    assert image.get_array().mask.sum() == 5
    assert [text.get_text() for text in axes.texts] == ["1.00", "-0.71", "-0.71", "1.00"]
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == ["a: 3", "b: 2.83", "none: 0"]
    assert not plot.gram(np.eye(13)).axes[0].texts


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_a_spectrum_is_drawn_from_its_numbers(scale):
    sigma = np.array([0, 3, 4, 12.0])
    left, right = plot.spectrum({"edit": scale * sigma, "none": np.zeros(2)}).axes
    np.testing.assert_array_equal(left.lines[0].get_xdata(), [1, 2, 3])
    np.testing.assert_array_equal(left.lines[0].get_ydata(), scale * np.array([12, 4, 3.0]))
    tails = np.sqrt([169, 25, 9, 0, 0]) / 13
    np.testing.assert_allclose(right.lines[0].get_ydata(), tails, rtol=1e-12)
    np.testing.assert_array_equal(right.lines[1].get_ydata(), [0, 0, 0])
    assert (left.get_yscale(), len(left.lines[1].get_xdata())) == ("log", 0)


def test_pictures_stand_side_by_side():
    whole = Figure()
    panels = whole.subplots(1, 3)
    assert plot.segment(T, T, axes=panels[0]) is whole
    assert plot.plane(T, T, np.zeros((9, 9)), axes=panels[1]) is whole
    assert plot.gram(np.eye(2), axes=panels[2]) is whole
    assert all(axes.has_data() for axes in panels)


def test_words_are_legible_where_a_page_shows_them():
    """At least nine pixels where a picture is 688 pixels wide, the column of a page."""
    pictures = [
        plot.audit(report()),
        plot.segment(T, {"a": T}, {"A": 0}),
        plot.plane(T, T, np.zeros((9, 9)), {"A": (0, 0)}),
        plot.gram(np.eye(12)),
        plot.spectrum({"a": np.ones(3)}),
    ]
    for figure in pictures:
        figure.draw_without_rendering()
        pixels = 688 / (72 * figure.get_size_inches()[0])
        words = figure.findobj(matplotlib.text.Text)
        assert min(x.get_fontsize() for x in words if x.get_text()) * pixels >= 9


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plot.segment([0, 0, 1], np.ones(3)), "positions must be in increasing order"),
        (lambda: plot.segment([0, np.nan], np.ones(2)), "positions must be finite"),
        (lambda: plot.segment(0.5, 1.0), r"positions must be .* got \(\)"),
        (lambda: plot.segment([0, 1], {"a": np.ones(3)}), r"values 'a' .* 2 positions.*\(3,\)"),
        (lambda: plot.plane([0], [0, 1], np.ones((2, 1))), "xs must be .* 2 or more"),
        (lambda: plot.plane([0, 1, 2], [0, 1], np.ones((3, 2))), r"shape \(2, 3\), .*\(3, 2\)"),
        (lambda: plot.plane([0, 1], [0, 1], np.eye(2), hollow=["A"]), "hollow names 'A'"),
        (lambda: plot.gram(np.ones((2, 3))), "values must be a square matrix"),
        (lambda: plot.gram(np.ones((0, 0))), "values must be a square matrix"),
        (lambda: plot.gram(np.eye(2), ["a"]), "names must be 2"),
        (lambda: plot.spectrum([1, -1]), "values must be one-dimensional"),
        (lambda: plot.spectrum({"x": [1, np.nan]}), "values 'x' must be one-dimensional"),
        (lambda: plot.spectrum(np.eye(2)), "values must be one-dimensional"),
    ],
)
def test_numbers_that_cannot_be_drawn_are_refused(call, words, refuses):
    with refuses(ValueError, match=words):
        call()


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


def test_complex_values_are_refused():
    with pytest.raises(TypeError, match="values must be an array of numbers, got an array"):
        plot.segment([0.0, 1.0], np.array([1.0, 2.0 + 1.0j]))
