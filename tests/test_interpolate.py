"""Laws of `wspace.interpolate`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.helpers import is_nan
from tests.strategies import FLOAT, ratios, strengths
from tests.test_geometry import true_angle, turned
from wspace import geometry, interpolate, tree
from wspace.testing import (
    LAYOUTS,
    assert_close,
    check_affine_equivariant,
    check_exact_ends,
    check_scale,
    like,
    pairs,
    points,
    size,
    vector,
    weights,
)
from wspace.testing.comparison import eps

pytestmark = pytest.mark.exact

lerp, slerp = jax.jit(interpolate.lerp), jax.jit(interpolate.slerp)
bezier, polygonal_chain = jax.jit(interpolate.bezier), jax.jit(interpolate.polygonal_chain)
norm, angle, combine = jax.jit(tree.norm), jax.jit(geometry.angle), jax.jit(tree.combine)
each_path = pytest.mark.parametrize("path", [lerp, slerp], ids=["lerp", "slerp"])
each_curve = pytest.mark.parametrize("curve", [bezier, polygonal_chain], ids=["bezier", "chain"])
ANGLES = (1e-7, 1e-5, 1e-3, 0.1, 0.7, 1.0, 1.5, 1.6, 2.0, 3.0, np.pi - 1e-2, np.pi - 1e-3)


@each_path
@given(pair=pairs())
def test_starts_at_start_and_ends_at_end_exactly(path, pair):
    assume(angle(*pair) < 3.14)
    check_exact_ends(path, *pair)
    for t in (0, 1):  # integers are numbers
        assert_close(path(*pair, t), pair[t], units=0)


@each_path
@given(pair=pairs(), t=ratios)
def test_reversed_path_visits_the_same_points(path, pair, t):
    start, end = pair
    assume(angle(start, end) < 3.14)
    assert_close(path(start, end, t), path(end, start, 1 - t), units=32, scale=size(start, end))


@given(pair=pairs(), t=strengths)
def test_lerp_is_the_straight_line(pair, t):
    x, y = map(vector, pair)
    scale = (abs(t) + abs(1 - t)) * size(*pair)
    assert_close(lerp(*pair, t), like((1 - t) * x + t * y, pair[0]), units=4, scale=scale)


@pytest.mark.parametrize("radians", ANGLES)
@given(
    seed=st.integers(0, 2**16),
    entries=st.sampled_from([2, 3, 300]),
    stretch=st.sampled_from([1.0, 1.0, 0.3, 40.0]),
    t=st.sampled_from([0.5, 0.3, 0.01, 0.999, -0.5, 1.7]) | ratios,
)
def test_slerp_is_shoemakes_formula_at_every_angle(radians, seed, entries, stretch, t):
    x, y = turned(np.random.default_rng(seed), radians, entries, stretch)
    turn, t = true_angle(x, y), np.longdouble(np.asarray(t, FLOAT))
    start, end = vector(x), vector(y)
    wanted = (np.sin((1 - t) * turn) * start + np.sin(t * turn) * end) / np.sin(turn)
    scale = max(size(x), size(y), float(np.sqrt(np.dot(wanted, wanted))))
    assert_close(slerp(x, y, float(t)), like(wanted, x), units=16, scale=scale)


@pytest.mark.parametrize("radians", [1e-4, 1e-3, 0.1, 1.0, 2.0])
@pytest.mark.parametrize("t", [-1000.3, -3.0, 20.7, 1000.0, 1e5])
def test_slerp_far_beyond_its_ends_keeps_the_digits_of_the_angle(radians, t):
    for seed in range(3):
        x, y = turned(np.random.default_rng(seed), radians, 300, 1.0)
        turn, far = true_angle(x, y), np.longdouble(np.asarray(t, FLOAT))
        wanted = np.sin((1 - far) * turn) * vector(x) + np.sin(far * turn) * vector(y)
        wanted, scale = like(wanted / np.sin(turn), x), (abs(t) + abs(1 - t)) * size(x, y)
        assert_close(slerp(x, y, t), wanted, units=16, scale=scale)
        assert_close(interpolate.slerp(x, y, t), wanted, units=16, scale=scale)


@pytest.mark.parametrize("radians", [1e-3, 0.02])
def test_the_popular_switch_to_lerp_fails_this_law(radians):
    # cos(0.02) = 0.9998 > 0.9995, the threshold at which slerp implementations switch.
    x, y = (z.astype(jnp.float32) for z in turned(np.random.default_rng(0), radians, 300, 1.0))
    gap = norm(combine((1, -1), (slerp(x, y, 0.5), lerp(x, y, 0.5)))) / norm(x)
    assert 0.9 < gap / (radians**2 / 8) < 1.1  # four hundred roundings at 0.02


@given(pair=pairs(), t=ratios)
def test_slerp_between_equal_norms_keeps_the_norm_and_turns_steadily(pair, t):
    start, end = pair
    assume(norm(start) > 0 and norm(end) > 0 and angle(start, end) < 3)
    end = combine((norm(start) / norm(end),), (end,))
    point = slerp(start, end, t)
    assert_close(norm(point), norm(start), units=32)
    assert_close(angle(start, point), t * angle(start, end), units=32, scale=1)


@given(pair=pairs(), t=ratios)
def test_slerp_from_or_to_zero_is_lerp(pair, t):
    start, _ = pair
    zero = jax.tree.map(jnp.zeros_like, start)
    assert_close(slerp(start, zero, t), lerp(start, zero, t), units=4, scale=size(start))
    assert_close(slerp(zero, start, t), lerp(zero, start, t), units=4, scale=size(start))


@given(start=weights(LAYOUTS[1]), t=ratios, stretch=st.sampled_from([1.0, 0.5, 3.0]))
def test_slerp_has_the_gradient_of_lerp_where_the_ends_are_parallel(start, t, stretch):
    assume(size(start) > 0)
    end = jax.tree.map(lambda x: stretch * x, start)
    for path in (slerp, lerp):
        slope = jax.grad(lambda end, path=path: tree.vdot(path(start, end, t), start))(end)
        assert_close(slope, combine((t,), (start,)), units=64, scale=size(start))


def readout(end, start, t, v, *, flipped):
    ends = (end, start) if flipped else (start, end)
    return jnp.sum(interpolate.slerp(*ends, t) * v)


curvature = jax.jit(jax.hessian(readout), static_argnames="flipped")


@given(entries=st.lists(st.floats(0.5, 4, width=16), min_size=4, max_size=4), t=ratios)
def test_hessian_where_the_ends_coincide_is_the_true_one(entries, t):
    # c_0 = 1 - t + k_0 W^2 + ..., c_1 = t + k_1 W^2 + ..., and the Hessian of W^2 in either end
    # is 2 (I - x x^T / |x|^2) / |x|^2, so that of <slerp, v> is (k_0 + k_1) <x, v> times it.
    x, v = jnp.asarray(entries, FLOAT), jnp.asarray([1.0, -2.0, 0.5, 1.5], FLOAT)
    k = ((1 - t) * (1 - (1 - t) ** 2) + t * (1 - t**2)) / 6
    a, b = np.asarray(x, np.float64), np.asarray(v, np.float64)
    wanted = 2 * k * (a @ b) * (np.eye(4) - np.outer(a, a) / (a @ a)) / (a @ a)
    tolerance = 64 * eps(x) * np.linalg.norm(b) / np.linalg.norm(a)
    for flipped in (False, True):
        got = curvature(x, x, jnp.asarray(t, FLOAT), v, flipped=flipped)
        np.testing.assert_allclose(got, wanted, atol=tolerance)


def test_gradient_at_a_right_angle_is_the_limit_from_both_sides():
    x, y, v = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), jnp.array([0.3, 0.7])
    slope = jax.grad(lambda end: readout(end, x, 0.25, v, flipped=False))
    below, above = slope(y + jnp.array([1e-3, 0.0])), slope(y - jnp.array([1e-3, 0.0]))
    np.testing.assert_allclose(slope(y), (below + above) / 2, atol=1e-5)


@given(pair=pairs(), t=ratios)
def test_derivative_in_t_is_the_derivative_of_the_path(pair, t):
    assume(0.01 < angle(*pair) < 3)
    x, y, turn = vector(pair[0]), vector(pair[1]), true_angle(*pair)
    wanted = turn * (np.cos(t * turn) * y - np.cos((1 - t) * turn) * x) / np.sin(turn)
    _, speed = jax.jvp(lambda s: slerp(*pair, s), (jnp.asarray(t, FLOAT),), (jnp.ones((), FLOAT),))
    scale = size(*pair) / float(np.sin(turn))
    assert_close(speed, like(wanted, pair[0]), units=64, scale=scale)


@given(start=weights(LAYOUTS[1]), stretch=st.sampled_from([1.0, 0.25, 7.0]))
def test_slerp_between_antipodes_is_refused_and_nan_where_traced(start, stretch):
    assume(size(start) > 0)
    end = combine((-stretch,), (start,))
    assert is_nan(slerp(start, end, 0.5))
    for t in (0.5, 0.0, jnp.float32(2.0)):
        with pytest.raises(
            ValueError, match=r"start and end are antipodal, so no arc.*: take lerp"
        ):
            interpolate.slerp(start, end, t)


def test_of_leaves_the_one_whose_ends_are_antipodal_is_named():
    start = {"a": jnp.ones(2), "b": jnp.ones(3)}
    end = {"a": jnp.arange(2.0), "b": -2 * jnp.ones(3)}
    with pytest.raises(ValueError, match="antipodal") as caught:
        tree.per_leaf(interpolate.slerp)(start, end, 0.5)
    assert "['b']" in caught.value.__notes__[0]
    found = jax.jit(tree.per_leaf(interpolate.slerp))(start, end, 0.5)
    assert is_nan(found["b"])
    assert not is_nan(found["a"])


@each_path
def test_vmaps_over_t(path):
    x, y = {"w": jnp.arange(3.0)}, {"w": jnp.ones(3)}
    ts = jnp.linspace(-1, 2, 5)
    got = jax.vmap(lambda t: path(x, y, t))(ts)
    assert_close(got, {"w": jnp.stack([path(x, y, t)["w"] for t in ts])}, units=32)


def test_bad_arguments_are_refused(refuses):
    x = {"w": jnp.ones(2)}
    for path in (interpolate.lerp, interpolate.slerp):
        with refuses(ValueError, match=r"t must be one number, got shape \(2,\): use jax.vmap"):
            path(x, x, jnp.ones(2))
        with refuses(ValueError, match="t must be finite, got inf"):
            path(x, x, float("inf"))
        with refuses(ValueError, match=r"leaf \['w'\] has shape \(2,\) in start, \(3,\) in end"):
            path(x, {"w": jnp.ones(3)}, 0.5)


@given(pair=pairs(), t=ratios)
def test_scaling_the_ends_scales_the_path(pair, t):
    assume(angle(*pair) < 3)
    check_scale(slerp, *pair, t=t, factors=(2.0**30,), units=2)


def test_layouts_include_stacks_scalars_empty_leaves_and_convolutions():
    shapes = [
        s for x in LAYOUTS for s in jax.tree.leaves(x, is_leaf=lambda n: isinstance(n, tuple))
    ]
    assert {len(s) for s in shapes} == {0, 1, 2, 3, 4}
    assert any(0 in s for s in shapes)


def de_casteljau(rows, t):
    """The point of a Bezier curve, and that of one whose points have the sizes of these."""
    sizes = np.abs(rows).sum(axis=1)
    while len(rows) > 1:
        rows = (1 - t) * rows[:-1] + t * rows[1:]
        sizes = abs(1 - t) * sizes[:-1] + abs(t) * sizes[1:]
    return rows[0], float(sizes[0])


def chained(rows, t):
    last = len(rows) - 1
    first = int(min(max(np.floor(t * last), 0), last - 1)) if last else 0
    part = t * last - first
    end = rows[min(first + 1, last)]
    return (1 - part) * rows[first] + part * end, (1 + 2 * abs(part)) * np.abs(rows).sum()


@pytest.mark.parametrize(
    ("curve", "oracle"),
    [(bezier, de_casteljau), (polygonal_chain, chained)],
    ids=["bezier", "chain"],
)
@given(xs=points(), t=strengths)
def test_curve_is_that_of_the_textbook_for_every_t(curve, oracle, xs, t):
    wanted, scale = oracle(np.stack([vector(x) for x in xs]), np.longdouble(t))
    assert_close(curve(xs, t), like(wanted, xs[0]), units=16, scale=scale)


@each_curve
@given(xs=points(dtype=jnp.bfloat16))
def test_curve_starts_and_ends_exactly_and_rests_at_equal_points(curve, xs):
    check_exact_ends(curve, xs)
    for t in (0, 1):
        assert_close(curve(xs, t), xs[-t], units=0)
    same = [xs[0]] * 4
    for t in (0.3, -0.5, 2.0):
        assert_close(curve(xs[:1], t), xs[0], units=0)
        assert_close(curve(same, t), xs[0], units=1)


@each_curve
@given(pair=pairs(), t=strengths)
def test_curve_of_two_points_is_lerp(curve, pair, t):
    scale = (abs(t) + abs(1 - t)) * size(*pair)
    assert_close(curve(pair, t), lerp(*pair, t), units=2, scale=scale)


@each_curve
@given(xs=points(), t=ratios)
def test_curve_reversed_and_curve_of_an_affine_image(curve, xs, t):
    assert_close(curve(xs[::-1], 1 - t), curve(xs, t), units=32, scale=3 * size(*xs))
    check_affine_equivariant(curve, xs, t=t, factor=-3.0)
    check_affine_equivariant(curve, xs, t=t)


@given(xs=points(), t=strengths)
def test_bezier_of_raised_degree_is_the_same_curve(xs, t):
    n = len(xs)
    inner = [combine((i / n, 1 - i / n), (xs[i - 1], xs[i])) for i in range(1, n)]
    raised = [xs[0], *inner, xs[-1]]
    _, scale = de_casteljau(np.stack([vector(x) for x in raised]), np.longdouble(t))
    assert_close(bezier(raised, t), bezier(xs, t), units=32, scale=scale)


@given(xs=points())
def test_chain_passes_through_every_point(xs):
    last = max(len(xs) - 1, 1)
    for i, x in enumerate(xs):
        assert_close(polygonal_chain(xs, i / last), x, units=8, scale=size(*xs))


@pytest.mark.parametrize("t", [-1.0, 0.0, 0.25, 0.499, np.float32(0.25), jnp.float32(0.25)])
def test_at_a_known_place_a_chain_reads_the_two_ends_of_its_segment_alone(t):
    far = {"w": jnp.array([jnp.inf, 2.0], FLOAT)}
    xs = [{"w": jnp.array(x, FLOAT)} for x in ([0.0, 0.0], [1.0, 3.0])]
    for points_, place in (([*xs, far], float(t)), ([far, *xs[::-1]], 1 - float(t))):
        wanted = {"w": jnp.array([2 * float(t), 6 * float(t)], FLOAT)}
        assert_close(interpolate.polygonal_chain(points_, place), wanted, units=4, scale=6)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.7, 1.0])
def test_a_chain_through_points_of_several_dtypes_is_in_those_of_its_first(t):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3, 5))
    dtypes = (FLOAT, jnp.bfloat16, jnp.float16)
    xs = [{"w": jnp.asarray(x, dtype)} for x, dtype in zip(rows, dtypes, strict=True)]
    exact = np.stack([np.asarray(x["w"], np.float64) for x in xs])
    wanted, scale = chained(exact, t)
    for chain in (polygonal_chain, interpolate.polygonal_chain):
        assert_close(chain(xs, t), {"w": jnp.asarray(wanted, FLOAT)}, units=4, scale=scale)


@pytest.mark.parametrize("t", [-0.5, 0.0, 1 / 3, 0.6, 2.0])
def test_an_eager_curve_is_the_compiled_one(t):
    rng = np.random.default_rng(0)
    for count in (1, 2, 4):
        xs = [{"w": jnp.asarray(rng.normal(size=5), FLOAT)} for _ in range(count)]
        assert_close(interpolate.bezier(xs, t), bezier(xs, t), units=16 * 3**count)
        assert_close(interpolate.polygonal_chain(xs, t), polygonal_chain(xs, t), units=32)


def test_a_curve_of_very_many_points_is_that_of_the_textbook():
    # Of 200 points the middle binomials are 1e59, which float32 does not hold.
    rows = np.random.default_rng(0).normal(size=(200, 3))
    xs = list(jnp.asarray(rows, FLOAT))
    ts = np.array([0.0, 0.003, 0.3, 0.5, 1.0, -0.25, 1.1])
    wanted, scales = zip(*[de_casteljau(rows, np.longdouble(t)) for t in ts], strict=True)
    got, speeds = jax.jit(
        jax.vmap(lambda t: jax.jvp(lambda s: interpolate.bezier(xs, s), (t,), (jnp.ones_like(t),)))
    )(jnp.asarray(ts, FLOAT))
    for i, t in enumerate(ts):
        room = 64 if abs(t - 0.5) <= 0.5 else 200 * 8  # t and 1 - t are rounded, to the power 200
        assert_close(got[i], jnp.asarray(wanted[i], FLOAT), units=room, scale=scales[i])
        if i < 5:
            eager = interpolate.bezier(xs, float(t))
            assert_close(eager, jnp.asarray(wanted[i], FLOAT), units=16, scale=scales[i])
    edges = 199 * np.diff(rows, axis=0)
    speed, scale = de_casteljau(edges, np.longdouble(0.5))
    assert_close(speeds[3], jnp.asarray(speed, FLOAT), units=256, scale=scale)


def test_a_curve_that_leaves_all_bounds_is_refused():
    with pytest.raises(ValueError, match=r"coefficients\[0\] must be finite"):
        interpolate.bezier([jnp.ones(2)] * 4, 1e200)


@given(xs=points())
def test_curve_leaves_and_arrives_with_the_speed_of_its_first_and_last_edge(xs):
    last = len(xs) - 1
    for curve in (bezier, polygonal_chain):
        for t, i in ((0.0, 0), (1.0, last - 1)):
            at, one = jnp.asarray(t, FLOAT), jnp.ones((), FLOAT)
            _, speed = jax.jvp(lambda s, curve=curve: curve(xs, s), (at,), (one,))
            edge = combine((last, -last), (xs[i + 1], xs[i])) if last else combine((0,), (xs[0],))
            assert_close(speed, edge, units=16, scale=last * size(*xs))


@each_curve
def test_curve_vmaps_over_t_and_is_nan_where_a_traced_t_is(curve):
    xs = [{"w": jnp.arange(3.0)}, {"w": jnp.ones(3)}, {"w": -jnp.ones(3)}]
    ts = jnp.linspace(-1, 2, 7)
    got = jax.vmap(lambda t: curve(xs, t))(ts)
    assert_close(got, {"w": jnp.stack([curve(xs, t)["w"] for t in ts])}, units=32)
    assert is_nan(curve(xs, jnp.nan))
    per_leaf = tree.per_leaf(curve)(xs, 0.3)
    assert_close(per_leaf, curve(xs, 0.3), units=2)


def test_bad_curves_are_refused(refuses):
    x = {"w": jnp.ones(2)}
    for curve in (interpolate.bezier, interpolate.polygonal_chain):
        with refuses(ValueError, match="points is empty"):
            curve([], 0.5)
        with refuses(TypeError, match="points must be a sequence of trees"):
            curve(x, 0.5)
        with refuses(ValueError, match="t must be finite, got nan"):
            curve([x, x, x], float("nan"))
        with refuses(ValueError, match=r"t must be one number, got shape \(2,\): use jax.vmap"):
            curve([x, x], jnp.ones(2))
        with refuses(ValueError, match=r"leaf \['w'\] has shape \(2,\) in points\[0\], \(3,\) in"):
            curve([x, x, {"w": jnp.ones(3)}], 0.5)
