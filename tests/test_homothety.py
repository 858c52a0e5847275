"""Laws of `wspace.negative.homothety`: repel, guide, remove_member, strength_of.

Numbers such as (i L1) are those of the laws in the docs page on the negative weight.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.helpers import is_nan
from tests.strategies import FLOAT, layouts, projectors, strengths
from wspace import average, geometry, negative, tree
from wspace.testing import (
    LAYOUTS,
    assert_close,
    check_half_precision,
    check_scale,
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

perpendicular = jax.jit(negative.guide_perpendicular)
repel, guide, mean = jax.jit(negative.repel), jax.jit(negative.guide), jax.jit(average.mean)
distance = jax.jit(geometry.distance)
negative_weights = st.floats(-4, 0.75, width=16)


@given(pair=pairs(), s=strengths)
def test_repel_is_its_formula(pair, s):
    x, b = map(vector, pair)
    scale = (1 + abs(s)) * size(*pair)
    assert_close(repel(*pair, s), like(x + s * (x - b), pair[0]), units=4, scale=scale)


@given(pair=pairs(), s=strengths)
def test_nothing_moves_at_strength_zero_or_at_the_avoided_point(pair, s):  # (i L1)
    x, b = pair
    assert_close(repel(x, b, 0), x, units=0)
    assert_close(repel(b, b, s), b, units=0)


@given(pair=pairs(), s=strengths)
def test_distance_scales_by_one_plus_the_strength(pair, s):  # (i L2)
    x, b = pair
    tolerance = 32 * eps(distance(x, b)) * (1 + abs(s)) * size(x, b)
    assert abs(distance(repel(x, b, s), b) - abs(1 + s) * distance(x, b)) <= tolerance


@given(pair=pairs(), s=strengths, t=strengths)
def test_strengths_compose_as_a_group(pair, s, t):  # (i L3)
    x, b = pair
    twice, once = repel(repel(x, b, s), b, t), repel(x, b, s + t + s * t)
    scale = (1 + abs(s)) * (1 + abs(t)) * size(x, b)
    assert_close(twice, once, units=32, scale=scale)


@given(pair=pairs(), s=strengths)
def test_every_strength_but_minus_one_has_an_inverse(pair, s):  # (i L4)
    assume(abs(1 + s) > 0.1)
    x, b = pair
    scale = (1 + abs(s)) * (1 + abs(s / (1 + s))) * size(x, b)
    assert_close(repel(repel(x, b, s), b, -s / (1 + s)), x, units=32, scale=scale)
    assert_close(repel(x, b, -1), b, units=4, scale=size(x, b))  # (i L12)


@given(data=st.data(), xs=points(count=3), bs=st.data(), s=strengths)
def test_repelling_commutes_with_averages(data, xs, bs, s):  # (i L5)
    c = data.draw(coefficients(3))
    avoided = [bs.draw(weights_like(xs[0])) for _ in xs]
    moved = mean([repel(x, b, s) for x, b in zip(xs, avoided, strict=True)], c)
    wanted = repel(mean(xs, c), mean(avoided, c), s)
    scale = (1 + abs(s)) * sum(map(abs, c)) / abs(sum(c)) * size(*xs, *avoided)
    assert_close(moved, wanted, units=32, scale=scale)


def weights_like(x):
    shapes = jax.tree.map(lambda leaf: leaf.shape, x)
    return weights(shapes)


@given(data=st.data(), xs=points(count=3), s=strengths)
def test_repelling_points_from_their_own_average_leaves_the_average(data, xs, s):  # (i L5)
    c = data.draw(coefficients(3))
    center = mean(xs, c)
    moved = mean([repel(x, center, s) for x in xs], c)
    scale = (1 + abs(s)) * sum(map(abs, c)) / abs(sum(c)) * (size(*xs) + size(center))
    assert_close(moved, center, units=32, scale=scale)


@given(pair=pairs(), s=strengths, t=strengths)
def test_distance_grows_with_the_strength(pair, s, t):  # (i L11)
    near, far = sorted((s, t))
    assume(near > -1)
    x, b = pair
    slack = 32 * eps(distance(x, b)) * (1 + abs(far)) * size(x, b)
    assert distance(repel(x, b, near), b) <= distance(repel(x, b, far), b) + slack


@given(data=st.data(), s=strengths)
def test_repelling_commutes_with_permutations_bit_for_bit(data, s):  # (i L6)
    x, b = data.draw(points(count=2, layout=LAYOUTS[1]))
    order = np.array(data.draw(st.permutations(range(4))))

    def permuted(point):
        return point | {"w": point["w"][order]}

    assert_close(repel(permuted(x), permuted(b), s), permuted(repel(x, b, s)), units=0)


@given(seed=st.integers(0, 2**16), xs=points(count=3, layout=LAYOUTS[1]), s=strengths)
def test_steering_commutes_with_rotations(seed, xs, s):  # (i L6)
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(15, 15)))[0]
    x, b, n = xs
    turned = [like(q @ vector(z), x) for z in xs]
    scale = (1 + abs(s)) * size(*xs)
    units = 64 * np.sqrt(len(q))
    wanted = like(q @ vector(repel(x, b, s)), x)
    assert_close(repel(*turned[:2], s), wanted, units=units, scale=scale)
    d_p, d_n = vector(b) - vector(x), vector(n) - vector(x)
    assume(np.linalg.norm(d_p) > 1e-3 * size(*xs))
    scale = (1 + abs(s)) * (size(*xs) + size(x, b) * np.linalg.norm(d_n) / np.linalg.norm(d_p))
    wanted = like(q @ vector(perpendicular(x, b, n, s, 0.5)), x)
    assert_close(perpendicular(*turned, s, 0.5), wanted, units=units, scale=scale)


@given(pair=pairs(), s=st.floats(-1, 0, width=16))
def test_strengths_from_minus_one_to_zero_stay_on_the_segment(pair, s):  # (i L12)
    x, b = pair
    y, slack = repel(x, b, s), 32 * eps(distance(x, b)) * size(x, b)
    assert distance(y, x) + distance(y, b) <= distance(x, b) + slack
    assert_close(y, like((1 + s) * vector(x) - s * vector(b), x), units=4, scale=size(x, b))


@given(pair=pairs(), v=negative_weights)
def test_strength_negative_weight_and_guidance_scale_are_one_map(pair, v):
    x, b = pair
    s = float(negative.strength_of(v))
    assert s == pytest.approx(v / (1 - v), rel=1e-6, abs=0)
    scale = (1 + abs(v)) / abs(1 - v) * size(x, b)
    assert_close(mean([x, b], [1, -v]), repel(x, b, s), units=16, scale=scale)
    assert_close(guide(b, x, b, 1 + s), repel(x, b, s), units=16, scale=scale + size(x, b))
    assert_close(guide(x, x, b, s), repel(x, b, s), units=0)


@given(xs=points(count=2), g=strengths)
def test_the_two_forms_of_guidance_agree(xs, g):  # (i L8)
    u, c = xs
    scale = (1 + abs(g)) * size(u, c)
    assert_close(guide(u, c, u, g), guide(c, c, u, g - 1), units=32, scale=scale)


@given(xs=points(count=3), g=strengths)
def test_guide_is_its_formula_and_exact_without_a_difference(xs, g):
    base, p, n = xs
    wanted = like(vector(base) + g * (vector(p) - vector(n)), base)
    assert_close(guide(base, p, n, g), wanted, units=4, scale=(1 + abs(g)) * size(*xs))
    assert_close(guide(base, p, p, g), base, units=0)
    assert_close(guide(base, p, n, 0), base, units=0)


@given(data=st.data(), xs=points(count=3))
def test_removing_a_member_gives_the_average_of_the_others(data, xs):  # (i L7)
    c = np.array(data.draw(coefficients(3)))
    a = c / c.sum()
    assume(abs(1 - a[0]) > 0.1)
    rest = jax.jit(negative.remove_member)(mean(xs, c), xs[0], float(a[0]))
    scale = abs(a).sum() / abs(1 - a[0]) * (1 + abs(a[0])) * size(*xs)
    assert_close(rest, mean(xs[1:], c[1:]), units=32, scale=scale)


ALLOWED = {"k": (1, 2, 2, 3), "s": (2, 3, 2), "v": (3,), "w": (4, 3)}
repel_within = jax.jit(lambda x, b, s, allow: negative.repel(x, b, s, allow=allow))


@st.composite
def within(draw):
    """Where the points of `ALLOWED` may move, and the same as a matrix on all their entries."""
    p = {
        "k": draw(projectors(4)),
        "s": draw(projectors(3)),
        "v": jnp.asarray(draw(st.sampled_from([0.0, 1.0])), FLOAT),
        "w": draw(projectors(4)),
    }
    k, s, v, w = (np.asarray(x, np.float64) for x in p.values())
    blocks = [np.kron(k, np.eye(3)), *[np.kron(s, np.eye(2))] * 2, v * np.eye(3)]
    blocks.append(np.kron(w, np.eye(3)))
    dense = np.zeros((sum(map(len, blocks)),) * 2)
    for stop, block in zip(np.cumsum([*map(len, blocks)]), blocks, strict=True):
        dense[stop - len(block) : stop, stop - len(block) : stop] = block
    return p, dense


@given(xs=points(count=2, layout=ALLOWED), allowed=within(), s=strengths)
def test_repelling_within_a_subspace_keeps_the_rest_and_scales_the_part(xs, allowed, s):  # (i L9)
    x, b = xs
    allow, p = allowed
    y = repel_within(x, b, s, allow)
    scale = (1 + abs(s)) * size(x, b)
    units = 64 * np.sqrt(len(p))
    apart, moved = (vector(z).astype(np.float64) - vector(b).astype(np.float64) for z in (x, y))
    wanted = vector(x).astype(np.float64) + s * p @ apart
    assert_close(y, like(wanted, x), units=units, scale=scale)
    tolerance = units * eps(x["w"]) * scale
    stays = np.eye(len(p)) - p
    assert np.linalg.norm(stays @ (moved - apart)) <= tolerance
    square = np.sum((stays @ apart) ** 2) + (1 + s) ** 2 * np.sum((p @ apart) ** 2)
    assert abs(np.sum(moved**2) - square) <= 4 * tolerance * scale
    assert_close(repel_within(x, b, 0, allow), x, units=0)
    assert_close(repel_within(b, b, s, allow), b, units=0)


@given(xs=points(count=2, layout=ALLOWED), s=strengths)
def test_free_leaves_move_as_without_allow_and_frozen_ones_not_at_all(xs, s):
    x, b = xs
    allow = {"k": 1.0, "s": 0.0, "v": 1.0, "w": jnp.zeros((4, 4), FLOAT)}
    y, free = repel_within(x, b, s, allow), repel(x, b, s)
    scale = (1 + abs(s)) * size(x, b)
    for name in ("k", "v"):
        assert_close(y[name], free[name], units=4, scale=scale)
    for name in ("s", "w"):
        assert_close(y[name], x[name], units=0)
    assert_close(negative.repel(x, b, s, allow=dict.fromkeys(ALLOWED, 0.0)), x, units=0)


def test_an_inverse_metric_weighs_the_directions():
    x, b = jnp.array([[2.0], [4.0]]), jnp.array([[1.0], [1.0]])
    y = negative.repel(x, b, 2.0, allow=jnp.diag(jnp.array([0.5, 0.25])))
    assert_close(y, jnp.array([[3.0], [5.5]]))


def test_half_precision_rounds_once_within_a_subspace():
    rng = np.random.default_rng(0)
    x, b = (jnp.asarray(rng.normal(size=(4, 3)), jnp.bfloat16) for _ in range(2))
    allow = jnp.diag(jnp.array([1.0, 1.0, 0.0, 0.0]))
    check_half_precision(negative.repel, x, b, strength=0.7, allow=allow)


def test_bad_allowances_are_refused(refuses):
    x, b = {"v": jnp.ones(2), "w": jnp.ones((2, 3))}, {"v": jnp.zeros(2), "w": jnp.zeros((2, 3))}

    def moved(**allow):
        return negative.repel(x, b, 1.0, allow=allow)

    with refuses(ValueError, match="must be a tree like the weights"):
        moved(w=1.0)
    with refuses(ValueError, match=r"leaf \['w'\] has shape \(3, 3\).* must be \(2, 2\)"):
        moved(v=1.0, w=jnp.eye(3))
    with refuses(ValueError, match=r"leaf \['v'\] must be finite and at least 0, got -1"):
        moved(v=-1.0, w=1.0)
    with refuses(ValueError, match="not symmetric"):
        moved(v=1.0, w=jnp.array([[1.0, 1.0], [0.0, 1.0]]))
    with refuses(ValueError, match="strength must be finite, got nan"):
        negative.repel(x, b, float("nan"), allow={"v": 1.0, "w": 1.0})
    skew = jax.jit(lambda p: moved(v=1.0, w=p))(jnp.array([[1.0, 1.0], [0.0, 1.0]]))
    assert is_nan(skew["w"])


def differences(u, p, n):
    """What the positive and the negative add to the base, and their sizes beside rounding."""
    u, p, n = (vector(x).astype(np.float64) for x in (u, p, n))
    return p - u, n - u


def perpendicular_scale(xs, g, w):
    """The size at which a perpendicular guide rounds: its share is only as good as d_p."""
    d_p, d_n = differences(*xs)
    share = np.linalg.norm(d_n) / np.linalg.norm(d_p) if d_p.any() else 0
    return size(*xs) * (1 + abs(g) * (1 + abs(w) * (1 + share)))


@given(xs=points(count=3), g=strengths, w=strengths)
def test_perpendicular_guidance_is_its_formula(xs, g, w):
    d_p, d_n = differences(*xs)
    across = d_n - (d_n @ d_p) / (d_p @ d_p) * d_p if d_p.any() else d_n
    wanted = vector(xs[0]).astype(np.float64) + g * (d_p - w * across)
    scale = perpendicular_scale(xs, g, w)
    assert_close(perpendicular(*xs, g, w), like(wanted, xs[0]), units=32, scale=scale)


@given(xs=points(count=3), g=strengths, w=strengths)
def test_a_perpendicular_negative_takes_nothing_from_the_positive(xs, g, w):  # (i L10)
    y = vector(perpendicular(*xs, g, w)).astype(np.float64)
    d_p, _ = differences(*xs)
    gained = (y - vector(xs[0]).astype(np.float64)) @ d_p
    slack = 32 * eps(jnp.zeros(1, FLOAT)) * perpendicular_scale(xs, g, w)
    assert abs(gained - g * (d_p @ d_p)) <= slack * np.linalg.norm(d_p)


@given(xs=points(count=2), g=strengths, w=strengths, k=st.sampled_from([-3.0, 0.5, 2.0]))
def test_a_parallel_negative_or_none_leaves_plain_guidance(xs, g, w, k):
    u, p = xs
    n = tree.combine((1, k, -k), (u, p, u))
    scale = perpendicular_scale((u, p, n), g, w)
    assert_close(perpendicular(u, p, n, g, w), guide(u, p, u, g), units=32, scale=scale)
    assert_close(perpendicular(u, p, n, g, 0), guide(u, p, u, g), units=4, scale=scale)
    assert_close(perpendicular(u, p, u, g, w), guide(u, p, u, g), units=4, scale=scale)


@given(xs=points(count=2), g=strengths, w=strengths)
def test_without_a_positive_the_whole_negative_is_perpendicular(xs, g, w):
    u, n = xs
    scale = size(u, n) * (1 + abs(g * w))
    assert_close(perpendicular(u, u, n, g, w), guide(u, u, n, g * w), units=8, scale=2 * scale)
    assert_close(perpendicular(u, u, u, g, w), u, units=0)
    assert_close(perpendicular(u, n, u, 0, w), u, units=0)


@given(xs=points(count=3, layout=(5, 1)), g=strengths, w=strengths)
def test_a_perpendicular_negative_is_repelling_within_a_hyperplane(xs, g, w):  # (i L10)
    u, p, n = xs
    d_p, _ = differences(*xs)
    assume(np.linalg.norm(d_p) > 1e-3 * size(*xs))
    across = jnp.asarray(np.eye(5) - np.outer(d_p, d_p) / (d_p @ d_p), FLOAT)
    within = negative.repel(u, n, g * w, allow=across)
    wanted = tree.combine((1, g, -g), (within, p, u))
    scale = perpendicular_scale(xs, g, w)
    assert_close(perpendicular(u, p, n, g, w), wanted, units=128, scale=scale)


@given(xs=points(count=4), g=strengths, c=st.tuples(strengths, strengths))
def test_several_perpendicular_negatives_are_one(xs, g, c):
    u, p, *ns = xs
    n = tree.combine((1 - sum(c), *c), (u, *ns))
    moves = [perpendicular(u, p, z, g, w) for z, w in zip(ns, c, strict=True)]
    wanted = tree.combine((1, 1, -1), (*moves, guide(u, p, u, g)))
    scale = sum(perpendicular_scale((u, p, z), g, 1 + abs(c[0]) + abs(c[1])) for z in (*ns, n))
    assert_close(perpendicular(u, p, n, g, 1), wanted, units=32, scale=scale)


def test_a_perpendicular_guide_has_derivatives_even_without_a_positive():
    u, n = jnp.array([1.0, 2.0]), jnp.array([3.0, -1.0])
    for p in (u, n):
        slopes = jax.grad(lambda *xs: negative.guide_perpendicular(*xs, 2.0, 0.5).sum(), (0, 1, 2))(
            u, p, n
        )
        assert all(bool(jnp.isfinite(x).all()) for x in slopes)


@given(x=layouts.flatmap(weights))
def test_scaling_everything_scales_perpendicular_guidance(x):
    p, n = (jax.tree.map(lambda leaf, k=k: leaf / 2 + k, x) for k in (1, -2))
    for k in (2.0**-40, 2.0**40):
        big = [tree.combine((k,), (z,)) for z in (x, p, n)]
        wanted = tree.combine((k,), (perpendicular(x, p, n, 0.7, 0.5),))
        assert_close(perpendicular(*big, 0.7, 0.5), wanted, units=0)


def test_poles_are_refused_and_nan_where_traced(refuses):
    x, b = {"w": jnp.ones(2)}, {"w": jnp.zeros(2)}
    for v in (1, 1.0, 1.5, float("inf"), float("nan")):
        with refuses(ValueError, match="weight must be finite and below 1"):
            negative.strength_of(v)
    assert jnp.isnan(jax.jit(negative.strength_of)(1.0))
    assert jnp.isnan(jax.jit(negative.strength_of)(2.0))
    for a in (1, 1.0, 1 - 1e-7):
        with refuses(ValueError, match="coefficient must be finite and not 1"):
            negative.remove_member(x, b, a)
    assert is_nan(jax.jit(negative.remove_member)(x, b, 1.0))
    assert_close(negative.remove_member(x, b, 1.5), {"w": jnp.array([-2.0, -2.0])})


def test_bad_arguments_are_refused(refuses):
    x = {"w": jnp.ones(2)}
    with refuses(ValueError, match="strength must be finite, got nan"):
        negative.repel(x, x, float("nan"))
    with refuses(ValueError, match="scale must be finite, got inf"):
        negative.guide(x, x, x, float("inf"))
    for at in ("scale", "weight"):
        numbers = {"scale": 1.0, "weight": 1.0} | {at: float("nan")}
        with refuses(ValueError, match=f"{at} must be finite, got nan"):
            negative.guide_perpendicular(x, x, x, **numbers)
    with refuses(ValueError, match=r"leaf \['w'\] .* in base, \(3,\) in positive"):
        negative.guide_perpendicular(x, {"w": jnp.ones(3)}, x, 1, 1)
    with refuses(ValueError, match=r"leaf \['w'\] has shape \(2,\) in point, \(3,\) in avoid"):
        negative.repel(x, {"w": jnp.ones(3)}, 1)
    with refuses(ValueError, match=r"leaf \['w'\] .* in base, \(3,\) in negative"):
        negative.guide(x, x, {"w": jnp.ones(3)}, 1)


@given(x=layouts.flatmap(weights))
def test_scaling_everything_scales_the_result(x):
    b = jax.tree.map(lambda leaf: leaf / 2 + 1, x)
    check_scale(repel, x, b, strength=0.7, factors=(2.0**-40, 2.0**40), units=0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_numbers_in_half_precision_are_computed_with_in_single(dtype):
    """Traced or known: the number itself is rounded, and no arithmetic on it."""
    number, xs = dtype(0.3), [jnp.asarray([1.0, 2.0], jnp.float32), jnp.zeros(2, jnp.float32)]
    value = float(number)
    for solve in (lambda f: f, jax.jit):
        got = solve(negative.strength_of)(number)
        np.testing.assert_allclose(got, value / (1 - value), rtol=1e-6)
        got = solve(negative.remove_member)(*xs, number)
        np.testing.assert_allclose(got, np.array([1.0, 2.0]) / (1 - value), rtol=1e-6)
    wrapped = jax.jit(negative.strength_of)(jnp.int8(-128))
    np.testing.assert_allclose(wrapped, negative.strength_of(np.int8(-128)))
    np.testing.assert_allclose(wrapped, -128 / 129, rtol=1e-6)
