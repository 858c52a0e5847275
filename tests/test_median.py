"""Laws of `average.geometric_median`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import is_nan
from tests.strategies import FLOAT, costs
from wspace import average
from wspace.testing import assert_close, check_affine_equivariant, check_permutation_invariant
from wspace.testing.comparison import eps

median, traced = average.geometric_median, jax.jit(average.geometric_median)


def drawn(seed, count=5, entries=6):
    return np.random.default_rng(seed).normal(size=(count, entries)).astype(np.float32)


def trees(rows):
    return [jnp.asarray(x, FLOAT) for x in rows]


def at_median(points, coefficients):
    return median(points, coefficients).weights


def least_subgradient(at, rows, c):
    gaps = at - rows
    size = np.linalg.norm(gaps, axis=1)
    pull = np.linalg.norm((c / np.where(size == 0, 1, size)) @ gaps)
    return max(0.0, pull - c[size == 0].sum()) / c.sum()


@given(seed=st.integers(0, 2**16), c=costs(5), shift=st.sampled_from([0.0, 4.0]))
def test_a_subgradient_at_the_median_vanishes(seed, c, shift):
    rows, c = drawn(seed) + np.float32(shift), np.array(c)
    found = median(trees(rows), c)
    at = np.asarray(found.weights, np.float64)
    assert found.converged
    assert least_subgradient(at, rows.astype(np.float64), c) < 2e4 * eps(found.weights)
    check_permutation_invariant(at_median, trees(rows), coefficients=c, units=500)
    check_affine_equivariant(at_median, trees(rows), coefficients=c, factor=4.0, units=500)


@given(seed=st.integers(0, 2**16), k=st.integers(0, 4))
def test_the_majority_is_the_median_exactly_however_far_the_others_go(seed, k):
    rows = drawn(seed)
    c = np.where(np.arange(5) == k, 4.5, 1.0)
    assert_close(median(trees(rows), c).weights, trees(rows)[k], units=0)
    rows[:2] *= 1e6
    spread = np.abs(rows[2:]).max()
    got = median(trees(rows)).weights
    assert np.linalg.norm(got) < 20 * spread
    assert np.linalg.norm(average.mean(trees(rows))) > 20 * spread


def exact_median(rows, c):
    """In long doubles: the point where the test of a minimum holds, or the limit of steps."""
    rows, c = rows.astype(np.longdouble), np.asarray(c, np.longdouble)
    spans = np.linalg.norm(rows[:, None] - rows, axis=-1)
    for at, span in zip(rows, spans, strict=True):
        pulls = np.where(span > 0, c / np.where(span > 0, span, 1), 0)
        if np.linalg.norm(pulls @ (rows - at)) <= c[span == 0].sum() * (1 + 1e-15):
            return at
    at = rows[np.argmin([np.median(span) for span in spans])] + 1e-3 * np.median(spans, axis=0)[0]
    for _ in range(5000):
        pulls = c / np.linalg.norm(rows - at, axis=1)
        at, old = pulls @ rows / pulls.sum(), at
        if np.abs(at - old).max() < 1e-14 * np.abs(at).max():
            break
    return at


@pytest.mark.parametrize("kind", ["far", "two far", "repeated", "near", "tiny", "huge", "unequal"])
def test_a_certified_median_is_that_of_long_doubles(kind):
    """No point is so far that steps among the others are not seen beside its distance."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        rows, c = rng.normal(size=(5, 6)), np.ones(5)
        if kind == "far":
            rows[-1] *= 10.0 ** (2 * seed + 3)
        if kind == "two far":
            rows[-2:] *= 10.0 ** rng.uniform(3, 17, (2, 1))
        if kind == "repeated":
            rows[1] = rows[0]
        if kind == "near":
            rows[1] = rows[0] + 1e-3 * rng.normal(size=6)
        if kind == "unequal":
            c = 10.0 ** rng.uniform(-4, 1, 5)
        rows = (rows * {"tiny": 2.0**-55, "huge": 2.0**55}.get(kind, 1)).astype(np.float32)
        solve = traced if seed % 2 else median
        found = solve([jnp.asarray(x) for x in rows], jnp.asarray(c, jnp.float32))
        wanted = exact_median(rows, c)
        size = np.median(np.linalg.norm(rows - wanted, axis=1))
        off = np.linalg.norm(np.asarray(found.weights, np.longdouble) - wanted)
        assert bool(found.converged)
        assert off < 1e-3 * size, (seed, off, size)


@pytest.mark.parametrize("light", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("shift", [0.0, 1e-3, 4.0])
def test_a_light_point_is_the_median_where_the_others_pull_less_than_it_holds(light, shift):
    """A pull that cancels is measured, since of its square only half of the digits are left."""
    ends = np.eye(5, 6, dtype=np.float32)[:2]
    rows = np.concatenate([ends, -ends, np.float32(shift * light) * ends[:1]])
    c = np.array([1, 1, 1, 1, light], np.float32)
    for solve in (median, traced):
        found = solve([jnp.asarray(x) for x in rows], jnp.asarray(c))
        wanted = exact_median(rows, c)
        assert found.converged
        np.testing.assert_allclose(found.weights, wanted, atol=1e-6)


def test_what_has_no_median_is_never_certified(refuses):
    rows = drawn(0)
    for bad in (np.nan, np.inf):
        broken = [{"w": jnp.asarray(x)} for x in rows]
        broken[3]["w"] = broken[3]["w"].at[2].set(bad)
        with refuses(ValueError, match=r"leaf \['w'\] of points\[3\] holds NaN or an infinity"):
            median(broken)
        found = traced([x["w"] for x in broken])
        assert is_nan(found.weights)
        assert jnp.isnan(found.residual)
        assert not found.converged
    for scale in (2.0**-80, 2.0**-62, 2.0**-58, 2.0**80):
        scaled = [jnp.asarray(np.float32(scale) * x) for x in rows]
        with refuses(ValueError, match="squares of their entries leave the range of float32"):
            median(scaled)
        found = traced(scaled)
        assert is_nan(found.weights)
        assert not found.converged


@pytest.mark.parametrize("line", [(0, 1), (0, 0, 0, 1, 3), (0, 0, 1, 1, 1), (0, 0, 5, 7, 7)])
def test_on_a_line_it_is_the_median_of_numbers(line):
    xs = [jnp.asarray([x, 2.0 * x], FLOAT) for x in map(float, line)]
    wanted = jnp.asarray([np.median(line), 2 * np.median(line)], FLOAT)
    for order in (xs, xs[::-1]):
        assert_close(median(order).weights, wanted, units=4)


@pytest.mark.parametrize(
    ("line", "c", "middle"),
    [(np.arange(14) ** 2, None, (36 + 49) / 2), ((0, 1, 1), (1.0, 0.5, 0.5), 0.5)],
    ids=["many", "an end twice"],
)
def test_the_middle_of_a_segment_does_not_depend_on_how_its_ends_are_counted(line, c, middle):
    xs = [jnp.asarray([x, 2.0 * x], FLOAT) for x in map(float, line)]
    assert_close(median(xs, c).weights, jnp.asarray([middle, 2 * middle], FLOAT), units=4)


@pytest.mark.parametrize("excess", [-100, 4, 200])
def test_a_pull_is_compared_with_what_a_point_holds_to_its_rounding(excess):
    # Two points at an angle pull at the third with 2 cos(angle), which holds a little more or less.
    unit = float(jnp.finfo(FLOAT).eps)
    rows = np.array([[0, 0], [0.6, 0.8], [0.6, -0.8]])
    found = median(trees(rows), [1.2 / (1 + excess * unit), 1.0, 1.0])
    assert found.converged
    assert found.residual >= max(excess, 0) * unit * (1.2 / 3.2 / 2 if excess < 8 else 0)
    # Off the point the pull falls by 2 sin(angle)^2 of the way.
    way = max(1.2 * excess * unit / 1.28, 0)
    np.testing.assert_allclose(found.weights, [way, 0], rtol=0.1, atol=16 * unit)


def test_bad_coefficients_are_refused_and_a_median_at_a_point_moves_with_it(refuses):
    xs = trees(drawn(0, 3))
    with refuses(ValueError, match="coefficients must be positive"):
        average.geometric_median(xs, (1.0, 0.0, 1.0))
    assert is_nan(traced(xs, jnp.asarray([1.0, -1.0, 1.0])).weights)
    slopes = jax.jacrev(lambda *xs: median(xs, (1.0, 1.0, 3.0)).weights, argnums=(0, 2))(*xs)
    np.testing.assert_array_equal(slopes[0], 0 * slopes[0])
    np.testing.assert_array_equal(slopes[1], np.eye(6))


def test_derivatives_are_those_of_the_minimum():
    rows, c = drawn(3).astype(np.float64), np.array([1.0, 2.0, 1.5, 1.0, 1.0])
    xs = trees(rows)
    at = np.asarray(median(xs, c).weights, np.float64)
    gaps = at - rows
    size = np.linalg.norm(gaps, axis=1)
    units = gaps / size[:, None]
    curvatures = (np.eye(6) - units[:, :, None] * units[:, None, :]) * (c / size)[:, None, None]
    inverse = np.linalg.inv(curvatures.sum(axis=0))
    tol = 1e4 * eps(xs[0])
    slopes = jax.jacrev(lambda c: median(xs, c).weights)(jnp.asarray(c, FLOAT))
    np.testing.assert_allclose(slopes, -inverse @ units.T, rtol=0, atol=tol)
    slope = jax.jacrev(lambda x: median([x, *xs[1:]], c).weights)(xs[0])
    np.testing.assert_allclose(slope, inverse @ curvatures[0], rtol=0, atol=tol)
