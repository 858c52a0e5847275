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


@pytest.mark.parametrize("line", [(0, 1), (0, 0, 0, 1, 3), (0, 0, 1, 1, 1), (0, 0, 5, 7, 7)])
def test_on_a_line_it_is_the_median_of_numbers(line):
    xs = [jnp.asarray([x, 2.0 * x], FLOAT) for x in map(float, line)]
    wanted = jnp.asarray([np.median(line), 2 * np.median(line)], FLOAT)
    for order in (xs, xs[::-1]):
        assert_close(median(order).weights, wanted, units=4)


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
