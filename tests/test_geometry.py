"""Laws of `wspace.geometry`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import assume, given
from hypothesis import strategies as st
from jax.test_util import check_grads

from tests.helpers import is_nan
from tests.strategies import FLOAT, scales
from wspace import geometry, tree
from wspace.testing import (
    LAYOUTS,
    assert_close,
    coefficients,
    like,
    pairs,
    points,
    size,
    vector,
    weights,
)
from wspace.testing.comparison import eps

pytestmark = pytest.mark.exact

distance, angle = jax.jit(geometry.distance), jax.jit(geometry.angle)
gram, project = jax.jit(geometry.gram), jax.jit(geometry.project)
orthonormalize = jax.jit(geometry.orthonormalize)
cosine, coordinates = jax.jit(geometry.cosine), jax.jit(geometry.coordinates)
principal_angles = jax.jit(geometry.principal_angles)
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


@given(x=weights(LAYOUTS[1]))
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


@pytest.mark.parametrize("radians", ANGLES)
@given(seed=st.integers(0, 2**16), stretch=st.sampled_from([1.0, 0.3, 1e5]), scale=scales)
def test_cosine_is_that_of_the_angle_and_stays_in_its_range(radians, seed, stretch, scale):
    x, y = turned(np.random.default_rng(seed), radians, 300, stretch)
    got = cosine(scale * x, scale * y)
    assert abs(float(got) - float(np.cos(true_angle(x, y)))) <= 8 * eps(got)
    assert -1 <= got <= 1


@given(x=weights(LAYOUTS[1]), stretch=st.sampled_from([1.0, 0.3, 1e5]))
def test_cosine_at_the_ends_of_its_range(x, stretch):
    zero = jax.tree.map(jnp.zeros_like, x)
    assert cosine(x, zero) == cosine(zero, x) == cosine(zero, zero) == 1
    assume(size(x) > 0)
    for sign in (1, -1):
        y = jax.tree.map(lambda leaf, sign=sign: sign * stretch * leaf, x)
        assert cosine(x, y) == sign
        slope = jax.grad(cosine)(x, y)
        assert size(slope) <= 64 * eps(cosine(x, y)) / size(x)


def test_popular_cosine_leaves_its_range():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(200, 30)), jnp.float32)
    popular = [float(tree.vdot(v, v) / (tree.norm(v) * tree.norm(v))) for v in x]
    assert max(popular) > 1
    assert all(cosine(v, v) == 1 for v in x)


def spread(rng, count, closeness=1.0, entries=15):
    """Points whose differences are as close to dependent as asked, as rows in float64."""
    rows = rng.normal(size=(count, entries))
    if count > 2:
        rows[2] = rows[0] + (rows[1] - rows[0]) * 1.5 + closeness * rows[2]
    return rows


ROOM = {"w": jnp.zeros((4, 3), FLOAT), "b": jnp.zeros(3, FLOAT)}


def placed(rows):
    """Rows as trees in the dtype under test, and what is left of them after rounding."""
    trees = [like(row, ROOM) for row in rows]
    return trees, np.stack([vector(x) for x in trees]).astype(np.float64)


def solved(x, rows):
    """Coordinates by NumPy, the residual, and the condition number of the differences."""
    edges = (rows[1:] - rows[0]).T
    rest = np.linalg.lstsq(edges, x - rows[0], rcond=None)[0]
    c = np.array([1 - rest.sum(), *rest])
    return c, np.linalg.norm(x - c @ rows), np.linalg.cond(edges)


@pytest.mark.parametrize("closeness", [1.0, 1e-2, 1e-3])
@given(seed=st.integers(0, 2**16), c=coefficients(3))
def test_coordinates_of_a_mean_are_its_coefficients(closeness, seed, c):
    trees, rows = placed(spread(np.random.default_rng(seed), 3, closeness))
    c = np.array(c) / sum(c)
    (point,), (x,) = placed([c @ rows])
    got = coordinates(point, trees)
    wanted, _, condition = solved(x, rows)
    unit = eps(got.residual)
    scale = np.linalg.norm(x - rows[0]) + np.linalg.norm(rows[1] - rows[0])
    shortest = np.linalg.svd(rows[1:] - rows[0], compute_uv=False)[-1]
    assert got.residual.dtype == got.coefficients.dtype == FLOAT
    assert got.residual <= 64 * unit * (scale + size(point))
    # The mean itself was rounded, which moves its coordinates by the second of these.
    tolerance = 64 * unit * condition * np.abs(wanted).max()
    np.testing.assert_allclose(got.coefficients, wanted, atol=tolerance)
    rounding = unit * size(point) / shortest
    np.testing.assert_allclose(got.coefficients, c, atol=tolerance + 2 * rounding)
    assert abs(float(jnp.sum(got.coefficients)) - 1) <= 8 * unit * np.abs(wanted).sum()


def test_coordinates_by_normal_equations_fail_this_law():
    rng = np.random.default_rng(0)
    rows = spread(rng, 3, 1e-3).astype(np.float32)
    c = np.array([0.5, 0.3, 0.2])
    x = (c @ rows.astype(np.float64)).astype(np.float32)
    edges = jnp.asarray(rows[1:] - rows[0])
    normal = jnp.linalg.solve(edges @ edges.T, edges @ (x - rows[0]))
    got = coordinates(jnp.asarray(x), list(jnp.asarray(rows)))
    wanted, _, _ = solved(x.astype(np.float64), rows.astype(np.float64))
    assert np.abs(np.asarray(normal) - wanted[1:]).max() > 0.02
    assert np.abs(np.asarray(got.coefficients) - wanted).max() < 2e-3


@pytest.mark.parametrize("count", [1, 2, 5])
@given(seed=st.integers(0, 2**16), offset=st.sampled_from([1.0, 1e-5]))
def test_coordinates_are_the_nearest_point_of_the_affine_span(count, seed, offset):
    rng = np.random.default_rng(seed)
    trees, rows = placed(spread(rng, count))
    inside = rng.normal(size=count)
    near = (inside / inside.sum() if abs(inside.sum()) > 0.3 else np.eye(count)[0]) @ rows
    (point,), (x,) = placed([near + offset * rng.normal(size=15)])
    got = coordinates(point, trees)
    wanted, residual, condition = (
        solved(x, rows) if count > 1 else (np.ones(1), np.linalg.norm(x - rows[0]), 1.0)
    )
    scale = np.linalg.norm(x - rows[0]) + np.linalg.norm(rows, axis=1).max()
    unit = eps(got.residual)
    np.testing.assert_allclose(
        got.coefficients, wanted, atol=64 * unit * condition**2 * (1 + np.abs(wanted).max())
    )
    assert abs(float(got.residual) - residual) <= 16 * unit * scale
    c = np.asarray(got.coefficients, np.float64)
    rest = x - c @ rows / c.sum()
    for edge in rows[1:] - rows[0]:
        assert abs(rest @ edge) <= 64 * unit * condition * scale * np.linalg.norm(edge)


@given(seed=st.integers(0, 2**16), scale=scales, order=st.permutations(range(3)))
def test_coordinates_do_not_depend_on_origin_scale_or_order(seed, scale, order):
    rng = np.random.default_rng(seed)
    rows = rng.integers(-9, 10, size=(4, 15))
    rows[:3, :3] += 20 * np.eye(3, dtype=int)
    shift = rng.integers(-999, 1000, size=15)
    (point, *trees), _ = placed(rows[[3, 0, 1, 2]])
    (moved, *others), _ = placed(scale * (rows[[3, 0, 1, 2]] + shift))
    got, again = coordinates(point, trees), coordinates(moved, others)
    assert_close(again.coefficients, got.coefficients, units=8)
    assert_close(again.residual, scale * got.residual, units=8)
    turned_round = coordinates(point, [trees[i] for i in order])
    wanted = got.coefficients[np.array(order)]
    assert_close(turned_round.coefficients, wanted, units=128, scale=1)
    assert_close(turned_round.residual, got.residual, units=32)


def test_points_that_are_affinely_dependent_are_refused_and_nan_where_traced():
    x, y = jnp.asarray([1.0, 0.0, 2.0], FLOAT), jnp.asarray([0.0, 3.0, 1.0], FLOAT)
    for corners, i in (([x, x], 1), ([x, y, y], 2), ([x, y, 2 * y - x], 2)):
        with pytest.raises(ValueError, match=rf"points\[{i}\] is .* from points\[0\] and .* leave"):
            geometry.coordinates(y, corners)
        got = coordinates(y, corners)
        assert is_nan(got.coefficients)
        assert is_nan(got.residual)
    with pytest.raises(ValueError, match=r"leaf \(root\) of points\[1\] holds NaN"):
        geometry.coordinates(y, [x, jnp.nan * y])
    with pytest.raises(ValueError, match=r"directions\[1\] has norm nan .* or not finite"):
        geometry.orthonormalize([x, jnp.nan * y])
    assert is_nan(geometry.coordinates(jnp.nan * y, [x, y]).coefficients)


def test_coordinates_is_a_record_per_leaf():
    points = [{"w": jnp.asarray([0.0, 1.0]), "b": jnp.zeros(())}] * 1
    got = tree.per_leaf(geometry.coordinates)(points[0], points)
    assert got.coefficients["w"].tolist() == [1.0]
    assert got.residual["b"] == 0


def subspaces(rng, radians, counts, entries=15):
    """Directions spanning two subspaces at given angles, in bases of condition about ten."""
    k, (p, q) = len(radians), counts
    frame = np.linalg.qr(rng.normal(size=(entries, p + q)))[0].T
    left, right = frame[:p], frame[p:].copy()
    right[:k] = np.cos(radians)[:, None] * left[:k] + np.sin(radians)[:, None] * right[:k]
    mixed = [np.linalg.qr(rng.normal(size=(n, n)))[0] * np.geomspace(1, 10, n) for n in counts]
    return [placed(mix @ side) for mix, side in zip(mixed, (left, right), strict=True)]


RIGHT = np.pi / 2
PRINCIPAL = [
    (0.3, 1.0),
    (1e-6, 1e-3, RIGHT),
    (1e-6, 1e-6, 1e-5),
    (0.0, 0.0, 0.7),
    (0.7, 0.7, 0.7),
    (RIGHT - 1e-6, RIGHT, RIGHT),
    (0.0,),
    (RIGHT,),
]


@pytest.mark.parametrize("radians", PRINCIPAL)
@pytest.mark.parametrize("more", [0, 2])
@given(seed=st.integers(0, 2**16))
def test_principal_angles_keep_their_digits_at_every_angle(radians, more, seed):
    k = len(radians)
    (left, p), (right, q) = subspaces(np.random.default_rng(seed), np.array(radians), (k + more, k))
    got = principal_angles(left, right)
    unit = 64 * eps(got)
    np.testing.assert_allclose(got, radians, rtol=0, atol=unit)
    oracle = np.sort(scipy.linalg.subspace_angles(p.T, q.T))
    # SciPy keeps half the digits of small angles beside large ones, so it speaks to those only.
    np.testing.assert_allclose(got, oracle, rtol=0, atol=max(unit, 1e-7))
    assert bool(jnp.all(got[1:] >= got[:-1] - eps(got)))
    assert got.shape == (k,)
    swapped = principal_angles(right, left)
    np.testing.assert_allclose(swapped, got, rtol=0, atol=unit)
    again = principal_angles(left[::-1], [jax.tree.map(lambda x: -8 * x, x) for x in right])
    np.testing.assert_allclose(again, got, rtol=0, atol=unit)


def test_principal_angles_are_exact_where_a_direction_is_in_both_spans():
    x, y, z = jnp.eye(3, dtype=FLOAT)
    got = principal_angles([x, y], [x, y + z])
    assert_close(got, jnp.asarray([0, np.pi / 4], FLOAT), units=2)
    assert principal_angles([x, y], [y, x]).tolist() == [0, 0]


def test_popular_principal_angles_fail_this_law():
    rng = np.random.default_rng(0)
    (_, p), (_, q) = subspaces(rng, np.array([1e-4, 2e-4]), (2, 2))
    left, right = (list(jnp.asarray(rows, jnp.float32)) for rows in (p, q))
    bases = [jnp.stack(geometry.orthonormalize(side)) for side in (left, right)]
    product = jnp.matmul(bases[0], bases[1].T, precision="highest")
    popular = jnp.arccos(jnp.clip(jnp.linalg.svd(product, compute_uv=False), 0, 1))
    assert np.abs(np.asarray(popular) / [1e-4, 2e-4] - 1).max() > 0.1
    np.testing.assert_allclose(principal_angles(left, right), [1e-4, 2e-4], rtol=0, atol=2e-6)


@given(pair=pairs())
def test_principal_angle_of_two_lines_is_the_angle_or_its_supplement(pair):
    x, y = pair
    assume(size(x) > 0 and size(y) > 0)
    turn = float(angle(x, y))
    (got,) = principal_angles([x], [y])
    assert abs(float(got) - min(turn, np.pi - turn)) <= 16 * eps(got)


def test_derivatives_of_distinct_principal_angles_are_true():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        (left, _), (right, _) = subspaces(rng, np.array([0.1, 0.6, 1.3]), (4, 3))
        sides = jax.tree.map(lambda x: x.astype(jnp.float64), (left, right))
        check_grads(jax.jit(geometry.principal_angles), sides, order=2, modes=["rev"], rtol=1e-4)


def test_directions_of_subspaces_are_refused_by_their_names(refuses):
    x, y = jnp.asarray([1.0, 0.0], FLOAT), jnp.asarray([1.0, 1.0], FLOAT)
    with pytest.raises(ValueError, match=r"right\[1\] has norm .* leave out directions"):
        geometry.principal_angles([x], [y, 2 * y])
    with pytest.raises(ValueError, match=r"left\[0\] has norm 0"):
        geometry.principal_angles([0 * x], [y])
    assert is_nan(principal_angles([x, y, y], [y]))
    with refuses(ValueError, match="left is empty"):
        geometry.principal_angles([], [x])
    with refuses(ValueError, match="right is empty"):
        geometry.principal_angles([x], [])
    with refuses(ValueError, match="points is empty"):
        geometry.coordinates(x, [])
    with refuses(TypeError, match="points must be a sequence of trees"):
        geometry.coordinates(x, {"w": x})


def test_coordinates_name_the_leaf_that_is_not_finite(refuses):
    sound = {"w": jnp.ones(2), "b": jnp.zeros(2)}
    broken = {"w": jnp.array([1.0, jnp.nan]), "b": jnp.ones(2)}
    for corners, i in (([broken, sound], 0), ([sound, broken], 1)):
        with refuses(ValueError, match=rf"leaf \['w'\] of points\[{i}\] holds NaN"):
            geometry.coordinates(sound, corners)
