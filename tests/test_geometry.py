"""Laws of `wspace.geometry`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.helpers import assert_close, eps, is_nan, like, size, vector
from tests.strategies import FLOAT, LAYOUTS, pairs, points, scales, weights
from wspace import geometry, tree

distance, angle = jax.jit(geometry.distance), jax.jit(geometry.angle)
gram, project = jax.jit(geometry.gram), jax.jit(geometry.project)
orthonormalize = jax.jit(geometry.orthonormalize)
ANGLES = (1e-6, 1e-5, 1e-3, 0.1, 1.0, np.pi / 2, 2.0, 3.0, np.pi - 1e-3, np.pi - 1e-5)


@given(xs=points(count=3))
def test_distance_is_a_metric(xs):
    x, y, z = xs
    wanted = float(np.linalg.norm((vector(x) - vector(y)).astype(np.float64)))
    assert abs(distance(x, y) - wanted) <= 8 * eps(distance(x, y)) * size(x, y)
    assert distance(x, y) == distance(y, x)
    assert distance(x, x) == 0
    assert distance(x, z) <= (distance(x, y) + distance(y, z)) * (1 + 8 * eps(distance(x, y)))


def turned(rng, radians, entries, stretch):
    """A vector, and one turned from it by an angle and stretched, in the dtype under test."""
    x, other = rng.normal(size=(2, entries))
    side = other - other @ x / (x @ x) * x
    y = np.cos(radians) * x + np.sin(radians) * side * np.linalg.norm(x) / np.linalg.norm(side)
    return jnp.asarray(x, FLOAT), jnp.asarray(stretch * y, FLOAT)


def true_angle(x, y):
    u, v = (vector(z) / np.sqrt(np.dot(vector(z), vector(z))) for z in (x, y))
    gap, total = (np.sqrt(np.dot(w, w)) for w in (u - v, u + v))
    return 2 * np.arctan2(gap, total)


@pytest.mark.parametrize("radians", ANGLES)
@given(
    seed=st.integers(0, 2**16),
    entries=st.sampled_from([2, 3, 300]),
    stretch=st.sampled_from([1.0, 0.3, 1e5]),
    scale=scales,
)
def test_angle_keeps_its_digits_at_every_angle(radians, seed, entries, stretch, scale):
    x, y = turned(np.random.default_rng(seed), radians, entries, stretch)
    x, y = [scale * x], [scale * y]
    exact, got = float(true_angle(x, y)), float(angle(x, y))
    unit, oracle = eps(x[0]), float(np.finfo(np.longdouble).eps)
    assert abs(got - exact) <= 16 * unit * exact + 64 * unit**1.5 + 16 * oracle


def test_popular_angle_fails_this_law():
    x, y = turned(np.random.default_rng(0), 1e-4, 300, 1.0)
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    popular = jnp.arccos(jnp.clip(tree.vdot(x, y) / (tree.norm(x) * tree.norm(y)), -1, 1))
    exact = float(true_angle(x, y))
    assert abs(float(popular) / exact - 1) > 0.1
    assert abs(float(angle(x, y)) / exact - 1) < 1e-5


@given(pair=pairs())
def test_angle_is_symmetric_and_blind_to_lengths(pair):
    x, y = pair
    unit = eps(angle(x, y))
    assert abs(angle(x, y) - angle(y, x)) <= 16 * unit
    longer = jax.tree.map(lambda leaf: 8 * leaf, x)
    assert abs(angle(longer, y) - angle(x, y)) <= 16 * unit


@given(x=weights())
def test_angle_at_the_ends_of_its_range(x):
    zero = jax.tree.map(jnp.zeros_like, x)
    assert angle(x, zero) == 0
    assert angle(zero, zero) == 0
    assume(size(x) > 0)
    opposite = jax.tree.map(lambda leaf: -leaf, x)
    assert angle(x, x) <= 64 * eps(angle(x, x)) ** 1.5
    assert_close(angle(x, opposite), jnp.asarray(np.pi, FLOAT), units=1)
    for end in (x, opposite, zero):
        slope = jax.grad(angle)(x, end)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(slope))


@given(xs=points())
def test_gram_holds_the_inner_products(xs):
    rows = np.stack([vector(x) for x in xs])
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
    got = np.asarray(gram(xs))
    error = np.abs(got - (rows @ rows.T).astype(np.float64))
    assert (error <= 8 * np.finfo(got.dtype).eps * np.outer(lengths, lengths)).all()
    np.testing.assert_array_equal(got, got.T)


@pytest.mark.parametrize("closeness", [1.0, 1e-2, 1e-4])
@given(seed=st.integers(0, 2**16))
def test_orthonormal_basis_spans_the_directions_however_close(closeness, seed):
    rng = np.random.default_rng(seed)
    first, second, third = rng.normal(size=(3, 15))
    zero = {"w": jnp.zeros((4, 3), FLOAT), "b": jnp.zeros(3, FLOAT)}
    directions = [like(v, zero) for v in (first, first + closeness * second, 1e3 * third)]
    basis = orthonormalize(directions)
    q = np.stack([vector(x) for x in basis]).astype(np.float64)
    unit = np.finfo(np.dtype(FLOAT)).eps
    np.testing.assert_allclose(q @ q.T, np.eye(3), atol=32 * unit)
    for i, direction in enumerate(directions):
        d = vector(direction).astype(np.float64)
        assert np.linalg.norm(d - q[: i + 1].T @ (q[: i + 1] @ d)) <= 64 * unit * np.linalg.norm(d)
        assert q[i] @ d > 0


@given(x=weights(LAYOUTS[1]))
def test_dependent_directions_are_refused_and_nan_where_traced(x):
    assume(size(x) > 0)
    double = jax.tree.map(lambda leaf: 2 * leaf, x)
    zero = jax.tree.map(jnp.zeros_like, x)
    with pytest.raises(ValueError, match=r"directions\[1\] has norm .* leave out directions"):
        geometry.orthonormalize([x, double])
    with pytest.raises(ValueError, match=r"directions\[0\] has norm 0"):
        geometry.orthonormalize([zero])
    assert is_nan(orthonormalize([x, double])[1])


@given(xs=points(count=3, layout=LAYOUTS[1]))
def test_projection_is_the_nearest_point_of_the_span(xs):
    x, *directions = xs
    rows = np.stack([vector(d) for d in directions]).astype(np.float64)
    assume(np.linalg.matrix_rank(rows, tol=1e-3 * np.linalg.norm(rows)) == 2)
    basis = orthonormalize(directions)
    near = project(x, basis)
    solution = np.linalg.lstsq(rows.T, vector(x).astype(np.float64), rcond=None)[0]
    condition = np.linalg.cond(rows)
    assert_close(near, like(rows.T @ solution, x), units=64 * condition, scale=size(x))
    assert_close(project(near, basis), near, units=32, scale=size(x))
    assert size(near) <= size(x) * (1 + 32 * eps(distance(x, x)))


def test_sequences_of_trees_are_checked(refuses):
    with refuses(ValueError, match="points is empty"):
        geometry.gram([])
    with refuses(ValueError, match="basis is empty"):
        geometry.project(jnp.ones(2), [])
    with refuses(TypeError, match="directions must be a sequence of trees"):
        geometry.orthonormalize({"w": jnp.ones(2)})
