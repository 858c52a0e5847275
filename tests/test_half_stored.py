"""What is told apart is told by the dtypes in which points are stored: a law for each threshold.

What differs by the rounding of bfloat16 or float16 alone is one point to every threshold, known and
traced; what differs by some units more is not, and neither is anything once it is upcast.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wspace import average, cone, fit, geometry, interpolate, negative, tree
from wspace.testing import vector

HALVES = [jnp.bfloat16, jnp.float16]
RNG = np.random.default_rng(0)
LAYOUT = {"b": (6,), "w": (8, 6)}
NORMALS = [{name: RNG.normal(size=shape) for name, shape in LAYOUT.items()} for _ in range(6)]


def stored(x, dtype):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float32)).astype(dtype), x)


def flat(x):
    return vector(x).astype(np.float64)


def moved(x, times, way):
    """The point `x` and a multiple of a way, in float64."""
    return jax.tree.map(lambda a, b: np.asarray(a, np.float64) + times * b, x, way)


def eps_of(dtype):
    return float(jnp.finfo(dtype).eps)


def assert_refused(call, *trees, match):
    with pytest.raises(ValueError, match=match):
        call(*trees)
    assert np.isnan(flat(jax.jit(call)(*trees))).any()


def assert_defined(call, *trees):
    assert np.isfinite(flat(call(*trees))).all()


@pytest.fixture(params=HALVES, ids=["bfloat16", "float16"])
def dtype(request):
    return request.param


@pytest.fixture
def pair(dtype):
    return [stored(x, dtype) for x in NORMALS[:2]]


def mean_of(pair):
    return tree.combine((0.5, 0.5), pair, rounded=False)


def centers_of(pair, dtype):
    """The mean, stored like the points and as it is, and that of what the points were made of."""
    exact = mean_of(pair)
    source = jax.tree.map(lambda x, y: (x + y) / 2, *NORMALS[:2])
    return [stored(exact, dtype), exact, stored(source, dtype), stored(source, jnp.float32)]


def out(cone=None):
    return lambda xs, b: negative.exit_ball(xs, (0.5, 0.5), b, 20.0, cone=cone)


def test_a_mean_that_is_stored_is_no_way_out_of_itself(dtype, pair):
    for center in centers_of(pair, dtype):
        assert_refused(out(), pair, center, match="no way out is distinguished.*tree.upcast")
        assert_defined(
            lambda xs, b, g: negative.exit_ball(xs, (0.5, 0.5), b, 20.0, direction=g),
            *(pair, center, stored(NORMALS[2], dtype)),
        )
    size = np.mean([np.linalg.norm(flat(x)) for x in pair])
    away = 4 * eps_of(dtype) * size / np.linalg.norm(flat(NORMALS[2]))
    assert_defined(out(), pair, stored(moved(mean_of(pair), away, NORMALS[2]), dtype))
    if dtype == jnp.bfloat16:
        assert_defined(out(), *map(tree.upcast, (pair, centers_of(pair, dtype)[0])))


def test_a_radius_is_above_the_rounding_of_what_is_stored(dtype, pair):
    size = np.mean([np.linalg.norm(flat(x)) for x in pair])
    center = stored(NORMALS[3], dtype)
    for times, fine in ((0.5, False), (2.0, True)):
        radius = times * eps_of(dtype) * size

        def guarded(xs, b, radius=radius):
            return negative.exit_ball(xs, (0.5, 0.5), b, radius)

        def above(xs, b, radius=radius):
            return negative.guard_hull(xs, b, radius, normal=b)

        if fine:
            assert_defined(guarded, pair, center)
        else:
            assert_refused(guarded, pair, center, match="below the rounding of the points")
            assert_refused(above, pair, center, match="below the rounding of the points")
    assert_defined(
        lambda xs, b: negative.guard_hull(xs, b, 2 * eps_of(dtype) * 9, normal=b), pair, center
    )


def test_what_a_cone_holds_of_a_displacement_is_more_than_what_is_stored(dtype, pair):
    only = cone.Mask({"b": False, "w": True})
    exact = mean_of(pair)
    away = exact | {"b": exact["b"] + 3}
    match = "no edit of the cone is distinguished"
    assert_refused(out(only), pair, stored(away, dtype), match=match)
    assert_defined(out(cone.Mask({"b": True, "w": False})), pair, stored(away, dtype))


@pytest.mark.parametrize("mode", ["convex", "affine"])
def test_an_average_that_is_stored_lies_in_the_hull(mode, dtype, pair):
    def guarded(xs, b, normal=None):
        return negative.guard_hull(xs, b, 20.0, normal=normal, mode=mode)

    def cheapest(xs, b):
        return negative.guard_normal(xs, b, 20.0, mode=mode, steps=0)[:2]

    for center in centers_of(pair, dtype):
        assert_refused(guarded, pair, center, match="avoid lies in the .* of points.*tree.upcast")
        assert_defined(guarded, pair, center, stored(NORMALS[2], dtype))
    assert_refused(cheapest, pair, centers_of(pair, dtype)[0], match="give start")
    assert_defined(guarded, pair, stored(NORMALS[3], dtype))


def test_what_is_out_of_reach_by_what_is_stored_is_reached(dtype, pair):
    frozen = [{"b": 0.0, "w": 1.0}] * 2

    def retargeted(xs, target):
        return negative.retarget(xs, (0.5, 0.5), target, allow=frozen)

    exact = mean_of(pair)
    goal = exact | {"w": exact["w"] + 1}
    assert_defined(retargeted, pair, stored(goal, dtype))
    off = goal | {"b": goal["b"] + 16 * eps_of(dtype)}
    assert_refused(retargeted, pair, stored(off, jnp.float32), match="out of reach.*'b'")
    # The rounding is that of the target too, where the points are small beside it.
    nothing = [jax.tree.map(jnp.zeros_like, x) for x in pair]
    far = jax.tree.map(jnp.ones_like, exact)
    near = far | {"b": jnp.full_like(far["b"], eps_of(dtype) / 4)}
    assert_defined(retargeted, nothing, stored(near, dtype))


def test_a_direction_made_of_others_is_dependent_once_it_is_stored(dtype):
    x, y = (stored(v, dtype) for v in NORMALS[:2])
    both = moved(x, 0.7, wide(y))
    z = stored(both, dtype)
    match = "outside the span of those"
    assert_refused(lambda *xs: geometry.orthonormalize(xs), x, y, z, match=match)
    assert_refused(lambda *xs: geometry.principal_angles(xs, [x]), x, y, z, match=match)
    assert_refused(
        lambda p, *xs: geometry.coordinates(p, xs),
        x,
        x,
        y,
        stored(mean_of([x, y]), dtype),
        match="from the affine span",
    )
    free = stored(moved(both, 8 * eps_of(dtype), NORMALS[3]), dtype)
    assert_defined(lambda *xs: geometry.orthonormalize(xs), x, y, free)
    assert_defined(lambda *xs: geometry.orthonormalize(xs), *map(tree.upcast, (x, y, z)))


def wide(x):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), x)


def test_ends_that_are_antipodal_once_they_are_stored(dtype):
    x = stored(NORMALS[0], dtype)
    opposite = stored(jax.tree.map(lambda leaf: -1.7 * leaf, wide(x)), dtype)

    def halfway(x, y):
        return interpolate.slerp(x, y, 0.5)

    assert_refused(halfway, x, opposite, match="antipodal")
    beside = stored(moved(wide(opposite), 8 * eps_of(dtype), NORMALS[1]), dtype)
    assert_defined(halfway, x, beside)


def test_an_exit_has_a_part_in_the_cone_beyond_what_is_stored(dtype):
    line = stored(NORMALS[0], jnp.float32)
    basis = geometry.orthonormalize([line])
    x = moved(NORMALS[1], -flat(NORMALS[1]) @ flat(basis[0]), wide(basis[0]))

    def leave(edit):
        return cone.exit(cone.Subspace(basis), edit, 99.0)

    assert_refused(leave, stored(x, dtype), match="no way out is distinguished")
    more = moved(x, 4 * eps_of(dtype) * np.linalg.norm(flat(x)), wide(basis[0]))
    assert_defined(leave, stored(more, dtype))


def test_the_way_out_of_a_center_that_is_stored_is_the_direction(dtype):
    center, way = stored(NORMALS[0], dtype), stored(NORMALS[1], jnp.float32)
    unit = flat(way) / np.linalg.norm(flat(way))
    exact = stored(NORMALS[0], jnp.float32)
    slope = jax.grad(fit.hinge(center, 9.0, direction=way).loss)(exact)
    np.testing.assert_allclose(flat(slope), -unit / 9, rtol=1e-4, atol=1e-6)


def test_a_direction_that_is_kept_is_not_erased_as_it_is_stored(dtype):
    point, keep = stored(NORMALS[2], jnp.float32), stored(NORMALS[0], dtype)
    erase = stored(NORMALS[0], jnp.float32)

    def erased(x, e, k):
        return negative.erase_keeping(x, [e], [k], mode="oblique")

    assert_refused(erased, point, erase, keep, match="both erased and kept")
    assert_defined(erased, point, stored(NORMALS[1], dtype), keep)


# Matrices: a bound of their own


def test_a_basis_is_as_orthonormal_as_it_is_stored(dtype):
    x = stored(NORMALS[0], jnp.float32)
    basis = [
        stored(q, dtype) for q in geometry.orthonormalize([x, stored(NORMALS[1], jnp.float32)])
    ]
    q = np.linalg.qr(NORMALS[0]["w"])[0][:, :3]
    sides = {"b": 1.0, "w": stored(q, dtype)}

    def attenuated(times, *basis):
        return negative.attenuate(x, [tree.combine((times,), (q,)) for q in basis], 1.0)

    def projected(times, *basis):
        return cone.project(cone.Subspace([tree.combine((times,), (q,)) for q in basis]), x).edit

    def by_side(times, q):
        return negative.attenuate(x, negative.Sides(rows=sides | {"w": times * q}), 1.0)

    one, more = jnp.ones((), dtype), jnp.asarray(1 + 4 * eps_of(dtype), dtype)
    for call, given in ((attenuated, basis), (projected, basis), (by_side, [sides["w"]])):
        assert_defined(call, one, *given)
        assert_refused(call, more, *given, match="not orthonormal")


def test_a_matrix_is_as_symmetric_and_definite_as_it_is_stored(dtype):
    xs, goal = [stored(NORMALS[0], jnp.float32)], stored(NORMALS[1], jnp.float32)
    q = np.linalg.qr(NORMALS[2]["w"])[0][:, :5]
    projector = q @ q.T

    def allowed(p):
        way = goal | {"b": 0 * goal["b"]}
        allow = [{"b": 1.0, "w": p}]
        return negative.exit_ball(xs, (1.0,), goal, 50.0, direction=way, allow=allow)

    def regressed(g):
        grams = [{"b": None, "w": g}] * 2
        return average.regression_mean([xs[0], goal], grams).weights["w"]

    for call in (allowed, regressed):
        assert_defined(call, stored(projector, dtype))
        skew = stored(projector + np.eye(8), dtype).at[0, 1].add(8 * eps_of(dtype))
        assert_refused(call, skew, match="not symmetric")
        least = np.eye(8)
        least[3, 3] = -4 * eps_of(dtype)
        assert_refused(call, stored(least, dtype), match="has the eigenvalue -")


def test_a_radius_is_above_the_least_step_of_float16():
    zero = jnp.zeros(4, jnp.float16)
    way = jnp.ones(4, jnp.float16)
    for call in (
        lambda radius: negative.exit_ball([zero], [1.0], zero, radius, direction=way),
        lambda radius: negative.guard_hull([zero], zero, radius, normal=way),
    ):
        (moved,) = call(1e-5)
        np.testing.assert_allclose(np.linalg.norm(np.asarray(moved, np.float64)), 1e-5, rtol=0.05)
        with pytest.raises(ValueError, match="is below the rounding of the points"):
            call(1e-7)
