"""Laws of `wspace.negative.homothety`: repel, guide, remove_member, strength_of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.helpers import assert_close, eps, is_nan, like, size, vector
from tests.strategies import LAYOUTS, coefficients, layouts, pairs, points, strengths, weights
from wspace import average, geometry, negative, tree

repel, guide, mean = jax.jit(negative.repel), jax.jit(negative.guide), jax.jit(average.mean)
distance = jax.jit(geometry.distance)
negative_weights = st.floats(-4, 0.75, width=16)


@given(pair=pairs(), s=strengths)
def test_repel_is_its_formula(pair, s):
    x, b = map(vector, pair)
    scale = (1 + abs(s)) * size(*pair)
    assert_close(repel(*pair, s), like(x + s * (x - b), pair[0]), units=4, scale=scale)


@given(pair=pairs(), s=strengths)
def test_nothing_moves_at_strength_zero_or_at_the_avoided_point(pair, s):
    x, b = pair
    assert_close(repel(x, b, 0), x, units=0)
    assert_close(repel(b, b, s), b, units=0)


@given(pair=pairs(), s=strengths)
def test_distance_scales_by_one_plus_the_strength(pair, s):
    x, b = pair
    tolerance = 32 * eps(distance(x, b)) * (1 + abs(s)) * size(x, b)
    assert abs(distance(repel(x, b, s), b) - abs(1 + s) * distance(x, b)) <= tolerance


@given(pair=pairs(), s=strengths, t=strengths)
def test_strengths_compose_as_a_group(pair, s, t):
    x, b = pair
    twice, once = repel(repel(x, b, s), b, t), repel(x, b, s + t + s * t)
    scale = (1 + abs(s)) * (1 + abs(t)) * size(x, b)
    assert_close(twice, once, units=32, scale=scale)


@given(pair=pairs(), s=strengths)
def test_every_strength_but_minus_one_has_an_inverse(pair, s):
    assume(abs(1 + s) > 0.1)
    x, b = pair
    scale = (1 + abs(s)) * (1 + abs(s / (1 + s))) * size(x, b)
    assert_close(repel(repel(x, b, s), b, -s / (1 + s)), x, units=32, scale=scale)
    assert_close(repel(x, b, -1), b, units=4, scale=size(x, b))


@given(data=st.data(), xs=points(count=3), bs=st.data(), s=strengths)
def test_repelling_commutes_with_averages(data, xs, bs, s):
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
def test_repelling_points_from_their_own_average_leaves_the_average(data, xs, s):
    c = data.draw(coefficients(3))
    center = mean(xs, c)
    moved = mean([repel(x, center, s) for x in xs], c)
    scale = (1 + abs(s)) * sum(map(abs, c)) / abs(sum(c)) * (size(*xs) + size(center))
    assert_close(moved, center, units=32, scale=scale)


@given(pair=pairs(), s=strengths, t=strengths)
def test_distance_grows_with_the_strength(pair, s, t):
    near, far = sorted((s, t))
    assume(near > -1)
    x, b = pair
    slack = 32 * eps(distance(x, b)) * (1 + abs(far)) * size(x, b)
    assert distance(repel(x, b, near), b) <= distance(repel(x, b, far), b) + slack


@given(data=st.data(), s=strengths)
def test_repelling_commutes_with_permutations_bit_for_bit(data, s):
    x, b = data.draw(points(count=2, layout=LAYOUTS[1]))
    order = np.array(data.draw(st.permutations(range(4))))

    def permuted(point):
        return point | {"w": point["w"][order]}

    assert_close(repel(permuted(x), permuted(b), s), permuted(repel(x, b, s)), units=0)


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
def test_the_two_forms_of_guidance_agree(xs, g):
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
def test_removing_a_member_gives_the_average_of_the_others(data, xs):
    c = np.array(data.draw(coefficients(3)))
    a = c / c.sum()
    assume(abs(1 - a[0]) > 0.1)
    rest = jax.jit(negative.remove_member)(mean(xs, c), xs[0], float(a[0]))
    scale = abs(a).sum() / abs(1 - a[0]) * (1 + abs(a[0])) * size(*xs)
    assert_close(rest, mean(xs[1:], c[1:]), units=32, scale=scale)


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
    with refuses(ValueError, match=r"leaf \['w'\] has shape \(2,\) in point, \(3,\) in avoid"):
        negative.repel(x, {"w": jnp.ones(3)}, 1)
    with refuses(ValueError, match=r"leaf \['w'\] .* in base, \(3,\) in negative"):
        negative.guide(x, x, {"w": jnp.ones(3)}, 1)


@given(x=layouts.flatmap(weights))
def test_scaling_everything_scales_the_result(x):
    b = jax.tree.map(lambda leaf: leaf / 2 + 1, x)
    for k in (2.0**-40, 2.0**40):
        big = [tree.combine((k,), (z,)) for z in (x, b)]
        assert_close(repel(*big, 0.7), tree.combine((k,), (repel(x, b, 0.7),)), units=0)
