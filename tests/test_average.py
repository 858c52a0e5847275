"""Laws of `wspace.average`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import is_nan
from tests.strategies import FLOAT, layouts, ratios
from wspace import average, interpolate
from wspace.testing import (
    assert_close,
    check_affine_equivariant,
    check_idempotent,
    check_odd,
    check_permutation_invariant,
    check_scale,
    coefficients,
    like,
    pairs,
    points,
    size,
    vector,
    weights,
)

pytestmark = pytest.mark.exact

mean = jax.jit(average.mean)


def amplification(c):
    return sum(map(abs, c)) / abs(sum(c))


@given(data=st.data(), xs=points())
def test_mean_is_the_weighted_sum_over_the_sum_of_the_weights(data, xs):
    c = data.draw(coefficients(len(xs)))
    wanted = sum(k * vector(x) for k, x in zip(c, xs, strict=True)) / sum(np.longdouble(c))
    scale = amplification(c) * size(*xs)
    for coefs in (c, tuple(c), np.array(c), jnp.asarray(c, FLOAT)):
        assert_close(mean(xs, coefs), like(wanted, xs[0]), units=8, scale=scale)
    assert_close(average.mean(xs, c), like(wanted, xs[0]), units=8, scale=scale)


@given(xs=points())
def test_mean_without_coefficients_is_the_mean(xs):
    wanted = sum(map(vector, xs)) / len(xs)
    assert_close(mean(xs), like(wanted, xs[0]), units=4, scale=size(*xs))


@given(data=st.data(), xs=points(), k=st.sampled_from([2.0, -3.0, 1e-3, 1e4]))
def test_only_the_ratios_of_coefficients_matter(data, xs, k):
    c = data.draw(coefficients(len(xs)))
    scale = amplification(c) * size(*xs)
    assert_close(mean(xs, [k * x for x in c]), mean(xs, c), units=8, scale=scale)


@given(data=st.data(), xs=points())
def test_order_of_the_points_does_not_matter(data, xs):
    c = data.draw(coefficients(len(xs)))
    order = data.draw(st.permutations(range(len(xs))))
    units = 8 * amplification(c)
    check_permutation_invariant(mean, xs, coefficients=c, order=order, units=units)


@given(data=st.data(), xs=points())
def test_moving_the_points_moves_the_mean_along(data, xs):
    c = data.draw(coefficients(len(xs)))
    check_affine_equivariant(mean, xs, coefficients=c, factor=1.0, units=8 * amplification(c))


@given(data=st.data(), xs=points())
def test_an_affine_map_of_the_points_maps_the_mean(data, xs):
    c = data.draw(coefficients(len(xs)))
    check_affine_equivariant(mean, xs, coefficients=c, units=8 * amplification(c))


@given(data=st.data(), xs=points())
def test_mean_has_no_unit_and_rests_at_equal_points(data, xs):
    c = data.draw(coefficients(len(xs)))
    check_scale(mean, xs, coefficients=c, factors=(2.0**-30, 2.0**30), units=0)
    check_odd(mean, xs, coefficients=c, units=0)
    check_idempotent(mean, xs, coefficients=c, units=4 * amplification(c))


@given(pair=pairs(), t=ratios)
def test_mean_of_two_is_lerp(pair, t):
    wanted = interpolate.lerp(*pair, t)
    assert_close(average.mean(pair, (1 - t, t)), wanted, units=2, scale=size(*pair))


@given(x=layouts.flatmap(weights))
def test_mean_of_one_point_is_the_point(x):
    assert_close(mean([x]), x, units=0)
    assert_close(mean([x], [-0.3]), x, units=0)


def test_coefficients_near_zero_in_sum_are_refused_and_nan_where_traced(refuses):
    xs = [{"w": jnp.ones(2)}, {"w": jnp.zeros(2)}]
    for c in ((1.0, -1.0), (1.0, -1.0 + 1e-7), (0.0, 0.0), np.zeros(2), jnp.array([2.0, -2.0])):
        with refuses(ValueError, match=r"coefficients \[.*\] sum to .* make it differ from zero"):
            average.mean(xs, c)
        assert is_nan(mean(xs, jnp.asarray(c, jnp.float32)))
    assert_close(average.mean(xs, (1.0, -1.0 + 1e-4)), {"w": jnp.array([1e4, 1e4])}, units=1e4)


def test_bad_arguments_are_refused(refuses):
    xs = [{"w": jnp.ones(2)}, {"w": jnp.zeros(2)}]
    with refuses(ValueError, match="points is empty: give at least one tree"):
        average.mean([])
    with refuses(ValueError, match="coefficients has 3 numbers for 2 points"):
        average.mean(xs, (1, 1, 1))
    with refuses(ValueError, match="coefficients has 3 numbers for 2 points"):
        average.mean(xs, jnp.ones(3))
    with refuses(ValueError, match=r"coefficients\[1\] must be finite, got nan"):
        average.mean(xs, (1, np.nan))
    with refuses(TypeError, match="coefficients must be a sequence of numbers"):
        average.mean(xs, 0.5)
    with refuses(TypeError, match="points must be a sequence of trees"):
        average.mean(xs[0])


def test_gradient_in_the_coefficients_is_that_of_a_quotient():
    xs = [jnp.array([1.0, 0.0]), jnp.array([0.0, 4.0])]
    slope = jax.jacobian(lambda c: average.mean(xs, c))(jnp.array([1.0, 3.0]))
    center = np.array([0.25, 3.0])
    wanted = (np.array([[1.0, 0.0], [0.0, 4.0]]) - center).T / 4
    np.testing.assert_allclose(slope, wanted, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_mean_of_half_precision_is_rounded_once(dtype):
    rng = np.random.default_rng(0)
    xs = [jnp.asarray(rng.normal(size=500), dtype) for _ in range(7)]
    exact = jnp.asarray((sum(map(vector, xs)) / 7).astype(np.float64).astype(np.float32))
    differs = average.mean(xs) != exact.astype(dtype)
    assert differs.mean() < 0.01  # where f32 and f64 round to different sides of a tie
