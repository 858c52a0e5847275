"""Laws of `average.karcher_mean` and `average.karcher_mean_on`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests import golden_arrays
from tests.helpers import is_nan
from tests.spheres import exp_on_sphere, log_on_sphere
from tests.strategies import FLOAT, ratios
from tests.test_geometry import true_angle, turned
from wspace import average, interpolate, tree
from wspace.testing import (
    LAYOUTS,
    assert_close,
    check_permutation_invariant,
    check_scale,
    pairs,
    points,
    size,
)
from wspace.testing.comparison import eps

pytestmark = pytest.mark.exact

mean, traced = average.karcher_mean, jax.jit(average.karcher_mean)
LAYOUT = LAYOUTS[1]


def found(points, coefficients):
    return mean(points, coefficients).weights


def logs(rows, at):
    """The logarithms at a unit vector of the directions of rows, in NumPy float64."""
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    across = units - (units @ at)[:, None] * at
    size = np.linalg.norm(across, axis=1)
    angles = np.arctan2(size, units @ at)
    return across * (angles / np.where(size == 0, 1, size))[:, None]


@given(data=st.data(), seed=st.integers(0, 2**16), spread=st.sampled_from([1.0, 0.1, 1e-3]))
def test_logarithms_at_the_mean_cancel_and_its_norm_is_the_mean_of_the_norms(data, seed, spread):
    rng = np.random.default_rng(seed)
    rows = (rng.normal(size=12) + spread * rng.normal(size=(4, 12))).astype(np.float32)
    rows = rows.astype(np.float64)
    c = np.array(data.draw(st.lists(st.sampled_from([0.25, 1.0, 3.0]), min_size=4, max_size=4)))
    a = c / c.sum()
    found = mean([jnp.asarray(x, FLOAT) for x in rows], c)
    got = np.asarray(found.weights, np.float64)
    rounding = eps(found.weights)
    np.testing.assert_allclose(
        np.linalg.norm(got), a @ np.linalg.norm(rows, axis=1), rtol=16 * rounding
    )
    assert np.linalg.norm(a @ logs(rows, got / np.linalg.norm(got))) < 64 * rounding
    assert found.converged
    assert found.residual < 16 * rounding


@pytest.mark.parametrize("radians", [1e-5, 0.1, 1.0, 2.0, 3.0])
@given(seed=st.integers(0, 2**16), t=ratios)
def test_mean_of_two_points_is_slerp(radians, seed, t):
    x, y = turned(np.random.default_rng(seed), radians, 300, 1.0)
    x, y = (tree.combine((1 / tree.norm(z),), (z,)) for z in (x, y))
    gap = np.pi - float(true_angle(x, y))
    wanted = interpolate.slerp(x, y, t)
    assert_close(mean([x, y], [1 - t, t]).weights, wanted, units=16 / gap**2 + 16, scale=1)


@given(xs=points(layout=LAYOUT, count=1))
def test_one_point_is_its_mean_exactly_and_a_zero_tree_counts_for_the_length(xs):
    (x,) = xs
    assert_close(mean(xs).weights, x, units=0)
    zero = jax.tree.map(jnp.zeros_like, x)
    assert_close(mean([zero, x], [3.0, 1.0]).weights, interpolate.lerp(zero, x, 0.25), units=8)
    assert_close(mean([zero, zero]).weights, zero, units=0)


@given(pair=pairs(), t=ratios)
def test_scaling_and_reordering_points(pair, t):
    assume(size(pair[0]) > 0 and size(pair[1]) > 0 and true_angle(*pair) < 2)
    c = [1 - t, t]
    check_scale(found, pair, coefficients=c, factors=(2.0**20,), units=64)
    check_permutation_invariant(found, pair, coefficients=c, units=64)


def test_a_signed_mean_goes_on_along_the_arc():
    x, y = jnp.asarray([1.0, 0.0], FLOAT), jnp.asarray([np.cos(1.0), np.sin(1.0)], FLOAT)
    for t in (-0.5, 1.3, 1.9):
        wanted = jnp.asarray([np.cos(t), np.sin(t)], FLOAT)
        assert_close(mean([x, y], [1 - t, t]).weights, wanted, units=32, scale=1)


@pytest.mark.parametrize(
    "angles", [(0.0, np.pi), (0.0, 2 * np.pi / 3, 4 * np.pi / 3), (0.0, 2.0, 4.2)]
)
def test_points_all_around_have_no_mean(angles):
    xs = [jnp.asarray([np.cos(o), np.sin(o)], FLOAT) for o in angles]
    with pytest.raises(ValueError, match="points have no mean direction"):
        average.karcher_mean(xs)
    assert is_nan(traced(xs).weights)


def test_agrees_with_another_system_per_tensor():
    xs = [golden_arrays.tree("peers", f"input/tuned{i}") for i in range(3)]
    got = tree.per_leaf(average.karcher_mean)(xs).weights
    wanted = golden_arrays.tree("peers", "mergekit-0.1.5/karcher?max_iter=50,tol=1e-7")
    for name, leaf in wanted.items():
        assert np.linalg.norm(got[name] - leaf) < 1e-6 * np.linalg.norm(leaf)


def test_what_has_no_mean_is_never_certified(refuses):
    rows = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    broken = [{"w": jnp.asarray(x)} for x in rows]
    broken[1]["w"] = broken[1]["w"].at[2].set(jnp.nan)
    with refuses(ValueError, match=r"leaf \['w'\] of points\[1\] holds NaN or an infinity"):
        mean(broken)
    lost = [[jnp.asarray(np.float32(2.0**power) * x) for x in rows] for power in (-80, 80)]
    for xs in lost:
        with refuses(ValueError, match="squares of their entries leave the range of float32"):
            mean(xs)
    for xs in ([x["w"] for x in broken], *lost):
        got = traced(xs)
        assert is_nan(got.weights)
        assert not got.converged


@pytest.mark.parametrize("power", [-100, 0, 100])
def test_the_mean_on_a_manifold_is_certified_at_every_scale(power):
    rows = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    points = [jnp.asarray(np.float32(2.0**power) * x) for x in rows]
    got = average.karcher_mean_on(jnp.add, lambda x, y: y - x, points)
    wanted = np.mean(rows.astype(np.longdouble), axis=0)
    np.testing.assert_allclose(np.asarray(got.weights) / np.float32(2.0**power), wanted, rtol=1e-5)
    assert got.converged


def test_on_a_given_manifold():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3, 5)) + 1
    xs = [jnp.asarray(x / np.linalg.norm(x), FLOAT) for x in rows]
    c = (2.0, 1.0, 0.5)
    got = average.karcher_mean_on(exp_on_sphere, log_on_sphere, xs, c)
    assert got.converged
    assert_close(got.weights, mean(xs, c).weights, units=128)
    flat = average.karcher_mean_on(lambda x, v: x + v, lambda x, y: y - x, xs, c)
    assert_close(flat.weights, average.mean(xs, c), units=16)
    # Positive numbers under the metric dx^2 / x^2: the mean is the geometric one.
    ys = [jnp.asarray([0.1, 4.0], FLOAT), jnp.asarray([10.0, 1.0], FLOAT)]
    exp, log = lambda x, v: x * jnp.exp(v / x), lambda x, y: x * jnp.log(y / x)
    got = jax.jit(lambda *ys: average.karcher_mean_on(exp, log, ys))(*ys)
    assert_close(got.weights, jnp.asarray([1.0, 2.0], FLOAT), units=128)


def test_bad_arguments_are_refused(refuses):
    x = jnp.ones(2)
    with refuses(ValueError, match="tol must be finite and positive"):
        average.karcher_mean([x, x], tol=0.0)
    with refuses(ValueError, match="mean of the norms negative or zero"):
        average.karcher_mean([x, 3 * x], (2.0, -1.0))


def test_derivatives_are_those_of_the_mean_to_second_order():
    angle = 1.1
    x, y = jnp.asarray([1.0, 0.0], FLOAT), jnp.asarray([np.cos(angle), np.sin(angle)], FLOAT)

    def at(t):
        return mean([x, y], [1 - t, t]).weights

    t = jnp.asarray(0.3, FLOAT)
    turn = 0.3 * angle
    tangent = jnp.asarray([-np.sin(turn), np.cos(turn)], FLOAT)
    assert_close(jax.jit(jax.jacrev(at))(t), angle * tangent, units=64)
    inward = jnp.asarray([-np.cos(turn), -np.sin(turn)], FLOAT)
    assert_close(jax.jit(jax.jacfwd(jax.jacrev(at)))(t), angle**2 * inward, units=512)
    quarter = jnp.asarray([[0.0, -1.0], [1.0, 0.0]], FLOAT)
    _, moved = jax.jvp(lambda *xs: mean(xs, [0.7, 0.3]).weights, (x, y), (quarter @ x, quarter @ y))
    assert_close(moved, tangent, units=64)  # turning the points turns their mean


def test_derivatives_reach_what_the_manifold_is_made_of():
    ys = [jnp.asarray([2.0, 3.0], FLOAT), jnp.asarray([8.0, 0.5], FLOAT)]

    def power_mean(power):
        """The mean where powers are the coordinates of a flat space."""

        def exp(x, v):
            return (x**power + power * x ** (power - 1) * v) ** (1 / power)

        def log(x, y):
            return (y**power - x**power) / (power * x ** (power - 1))

        return average.karcher_mean_on(exp, log, ys).weights

    def wanted(power):
        return ((ys[0] ** power + ys[1] ** power) / 2) ** (1 / power)

    power = jnp.asarray(1.5, FLOAT)
    got, slope = jax.jit(lambda p: jax.jvp(power_mean, (p,), (jnp.ones_like(p),)))(power)
    assert_close(got, wanted(power), units=128)
    assert_close(slope, jax.jacfwd(wanted)(power), units=512)
