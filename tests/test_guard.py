"""Laws of `wspace.fit`: the penalties that keep away, and guard, which trains points with them.

Labels such as (v L1) are those of the notes on the trained form of the guard.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import special

from tests.helpers import is_nan
from tests.strategies import FLOAT, UNIT
from wspace import average, cone, fit, geometry, negative, tree
from wspace.testing import assert_close, like, size, vector, weights

pytestmark = pytest.mark.trains

CLOSE = 1e-8 if np.dtype(FLOAT) == np.float64 else 1e-4
LAYOUT = {"w": (4, 3), "b": (3,)}
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
radii = st.sampled_from([2.0**-10, 0.5, 3.0, 100.0])


def drawn(*shape):
    return jnp.asarray(RNG.normal(size=shape), FLOAT)


def flat(x):
    return vector(x).astype(np.float64)


def value_and_slope(penalty):
    return jax.jit(jax.value_and_grad(penalty))


# Hinge

hinge = value_and_slope(lambda x, b, radius: fit.hinge(b, radius).loss(x))
hinge_along = value_and_slope(lambda x, b, radius, g: fit.hinge(b, radius, direction=g).loss(x))


@given(x=weights(LAYOUT), b=weights(LAYOUT), radius=radii)
def test_hinge_is_the_share_of_the_radius_that_is_missing(x, b, radius):  # (v L3, L6)
    value, slope = hinge(x, b, radius)
    gap = flat(x) - flat(b)
    far = np.linalg.norm(gap)
    atol = 16 * UNIT * size(x, b) / radius + 8 * UNIT
    assert abs(float(value) - max(0, radius - far) / radius) <= atol
    assert 0 <= value <= 1
    if far > radius * (1 + atol):
        assert value == 0
        np.testing.assert_array_equal(flat(slope), 0)
    elif 0 < far < radius * (1 - atol):
        np.testing.assert_allclose(flat(slope), -gap / far / radius, atol=4 * atol / far + atol)


@given(b=weights(LAYOUT), g=weights(LAYOUT), radius=radii)
def test_at_the_center_the_way_out_is_the_direction_or_none(b, g, radius):
    value, slope = hinge(b, b, radius)
    assert value == 1
    np.testing.assert_array_equal(flat(slope), 0)
    assume(size(g) > 0)
    value, slope = hinge_along(b, b, radius, g)
    assert value == 1
    np.testing.assert_allclose(
        flat(slope), -flat(g) / np.linalg.norm(flat(g)) / radius, atol=16 * UNIT / radius
    )


def test_a_direction_counts_within_the_rounding_of_the_center_alone():
    b, g = jnp.asarray([1.0, 0.0], FLOAT), jnp.asarray([0.0, 2.0], FLOAT)
    for away, way in ((16 * UNIT, [0, 1]), (256 * UNIT, [1, 0])):
        value, slope = hinge_along(b + jnp.asarray([away, 0], FLOAT), b, 0.5, g)
        np.testing.assert_allclose(value, 1, rtol=2048 * UNIT)
        np.testing.assert_allclose(slope, -2 * np.array(way), atol=16 * UNIT)
    # Exactly at a center without size, too, and nowhere else.
    zero = jnp.zeros(2, FLOAT)
    np.testing.assert_allclose(hinge_along(zero, zero, 0.5, g)[1], [0, -2], atol=16 * UNIT)
    tiny = jnp.asarray([1e-12, 0], FLOAT)
    np.testing.assert_allclose(hinge_along(tiny, zero, 0.5, g)[1], [-2, 0], atol=16 * UNIT)


def test_a_hinge_at_nan_is_nan():
    away = fit.hinge(jnp.zeros(2), 1.0, direction=jnp.ones(2))
    assert jnp.isnan(fit.hinge(jnp.zeros(2), 1.0).loss(jnp.array([jnp.nan, 0.0])))
    assert jnp.isnan(away.loss(jnp.array([jnp.nan, 0.0])))
    assert away.loss(jnp.array([jnp.inf, 0.0])) == 0


def test_a_masked_class_has_no_part_in_entropy():
    away = fit.entropy(lambda w: w)
    given = jnp.array([[0.0, -jnp.inf], [1.0, 2.0]])
    p = np.exp([1.0, 2.0]) / np.exp([1.0, 2.0]).sum()
    wanted = np.log(2) - (0 - np.sum(p * np.log(p))) / 2
    np.testing.assert_allclose(away.loss(given), wanted, rtol=1e-6)
    rate = jax.grad(away.loss)(given)
    assert jnp.isfinite(rate).all()
    assert jnp.isnan(away.loss(jnp.full((1, 2), -jnp.inf)))


def test_hinge_measures_half_precision_in_float32():
    x, b = jnp.asarray([1.0, 1 / 3], jnp.bfloat16), jnp.asarray([0.0, 0.25], jnp.bfloat16)
    value = fit.hinge(b, 2.0).loss(x)
    far = np.hypot(1, float(x[1]) - 0.25)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, 1 - far / 2, rtol=1e-6)


ONES = jnp.ones(3, FLOAT)


@pytest.mark.parametrize(
    ("error", "avoid", "radius", "direction", "words"),
    [
        (ValueError, ONES, 0.0, None, "radius must be finite and positive, got 0"),
        (ValueError, ONES, -1.0, None, "radius must be finite and positive, got -1"),
        (ValueError, ONES, float("nan"), None, "radius must be finite and positive"),
        (ValueError, ONES, 1.0, 0 * ONES, "direction is zero"),
        (ValueError, ONES, 1.0, {"w": ONES}, "direction"),
        (ValueError, ONES, 1.0, ONES[:2], "direction"),
        (TypeError, jnp.ones(3, jnp.int32), 1.0, None, "leaf .*of avoid has dtype int32"),
        (TypeError, ONES, 1.0, jnp.ones(3, jnp.int32), "leaf .*of direction has dtype int32"),
    ],
)
def test_hinge_refuses(error, avoid, radius, direction, words, refuses):
    with refuses(error, match=words):
        fit.hinge(avoid, radius, direction=direction)


def test_a_hinge_on_another_layout_is_refused(refuses):
    away = fit.hinge(ONES, 1.0)
    with refuses(ValueError, match="shape"):
        away.loss(ONES[:2])


def test_an_undefined_hinge_is_nan_where_traced():
    assert is_nan(hinge(ONES, ONES, -1.0)[0])
    assert is_nan(hinge_along(ONES, ONES, 1.0, 0 * ONES)[0])


# The other penalties

LOGITS = value_and_slope(fit.entropy(lambda x: x["w"]).loss)


@given(x=weights({"w": (4, 3)}), times=st.sampled_from([1.0, 1e-3, 100.0]))
def test_entropy_is_the_divergence_from_the_uniform(x, times):
    x = {"w": x["w"] * times}
    value, slope = LOGITS(x)
    z = np.asarray(x["w"], np.float64)
    p = special.softmax(z, axis=-1)
    wanted = special.rel_entr(p, 1 / 3).sum(-1).mean()
    np.testing.assert_allclose(value, wanted, atol=16 * UNIT * (1 + 2 * np.abs(z).max()))
    assert 0 <= value <= np.log(3) * (1 + 8 * UNIT)
    scores = np.log(3) + special.log_softmax(z, axis=-1)
    mine = p * (scores - (p * scores).sum(-1, keepdims=True)) / 4
    if wanted > 64 * UNIT * (1 + np.abs(z).max()):  # where rounding may not take it for zero
        np.testing.assert_allclose(slope["w"], mine, atol=32 * UNIT * (1 + np.abs(z).max()))
    assert np.isfinite(slope["w"]).all()


def test_rounding_takes_entropy_below_no_bound():
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(512, 1, 7)) * 1e-4, FLOAT)
    values = jax.vmap(fit.entropy(lambda x: x).loss)(rows)
    assert (values >= 0).all()


def test_entropy_is_the_mean_over_all_axes_but_the_last_and_zero_over_one_class():
    x = drawn(2, 3, 5)
    p = special.softmax(np.asarray(x, np.float64), axis=-1)
    wanted = np.mean(np.log(5) + special.xlogy(p, p).sum(-1))
    np.testing.assert_allclose(fit.entropy(lambda w: w).loss(x), wanted, rtol=64 * UNIT)
    assert fit.entropy(lambda w: w[..., :1]).loss(x) == 0
    half = fit.entropy(lambda w: w.astype(jnp.bfloat16)).loss(x)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, wanted, rtol=0.1)


def first_row(x):
    """Three losses."""
    return x["w"][0] ** 2


npo = value_and_slope(lambda x, ref, beta: fit.npo(first_row, ref, beta=beta).loss(x))


@given(x=weights(LAYOUT), ref=weights(LAYOUT), beta=st.sampled_from([0.125, 1.0, 8.0]))
def test_npo_is_its_formula(x, ref, beta):
    value, slope = npo(x, ref, beta)
    w, r = (np.asarray(t["w"], np.float64)[0] for t in (x, ref))
    likelier = r**2 - w**2  # log p / p_ref
    wanted = -2 / beta * special.log_expit(-beta * likelier).mean()
    scale = UNIT * (np.sum(w**2 + r**2) + 1 / beta)
    np.testing.assert_allclose(value, wanted, atol=32 * scale)
    assert value >= 0
    mine = np.zeros((4, 3))
    mine[0] = -2 * special.expit(beta * likelier) / 3 * 2 * w
    atol = 32 * UNIT * (np.abs(w).max() + 1) * (1 + beta * np.sum(w**2 + r**2))
    np.testing.assert_allclose(slope["w"], mine, atol=atol)


@given(ref=weights(LAYOUT), x=weights(LAYOUT))
def test_npo_is_ascent_at_the_reference_and_everywhere_when_blunt(ref, x):
    r, w = (np.asarray(t["w"], np.float64)[0] for t in (ref, x))
    value, slope = npo(ref, ref, 4.0)
    unit = 64 * UNIT * (1 + np.sum(r**2))
    np.testing.assert_allclose(value, np.log(2) / 2, atol=unit)
    np.testing.assert_allclose(slope["w"][0], -2 * r / 3, atol=unit * np.abs(r).max())
    _, slope = npo(x, ref, 1e-6)
    np.testing.assert_allclose(slope["w"][0], -2 * w / 3, atol=1e-3 * np.abs(w).max())
    far = jax.tree.map(lambda t: t + 99, ref)  # unlikely enough: it fades
    np.testing.assert_array_equal(flat(npo(far, ref, 1.0)[1]), 0)


def test_the_reference_of_npo_is_a_constant():
    slope = jax.grad(lambda r: fit.npo(lambda w: w**2, r, beta=1.0).loss(2 * ONES))(ONES)
    np.testing.assert_array_equal(slope, 0)
    half = fit.npo(lambda w: w**2, ONES.astype(jnp.bfloat16), beta=1.0)
    half = half.loss(ONES.astype(jnp.float32))
    np.testing.assert_allclose(half, 2 * np.log(2), rtol=1e-6)


def steep(x):
    """A loss with the slope 2 x."""
    return tree.vdot(x, x)


clipped = value_and_slope(fit.clipped(steep, 5.0).loss)
ascent = value_and_slope(fit.ascent(steep).loss)


@given(x=weights(LAYOUT), small=st.booleans())
def test_clipped_is_ascent_up_to_its_bound_and_flat_above(x, small):
    x = tree.combine((1 / 8 if small else 1,), (x,))
    loss = float(np.sum(flat(x) ** 2))
    value, slope = ascent(x)
    np.testing.assert_allclose(value, -loss, rtol=16 * UNIT)
    np.testing.assert_allclose(flat(slope), -2 * flat(x), rtol=4 * UNIT)
    assume(abs(loss - 5) > 64 * UNIT * loss)
    value, slope = clipped(x)
    np.testing.assert_allclose(value, -min(loss, 5), rtol=16 * UNIT)
    assert value >= -5
    np.testing.assert_allclose(flat(slope), -2 * flat(x) * (loss < 5), rtol=4 * UNIT)


def test_every_penalty_says_its_bound_and_name():
    aways = [
        fit.hinge(ONES, 1.0),
        fit.clipped(steep, 2.5),
        fit.clipped(steep, -1),
        fit.entropy(lambda w: w),
        fit.npo(lambda w: w, ONES, beta=1.0),
        fit.ascent(steep),
    ]
    assert [a.least for a in aways] == [0, -2.5, 1, 0, 0, -np.inf]
    names = ["hinge", "clipped", "clipped", "entropy", "npo", "ascent"]
    assert [a.name for a in aways] == names


@pytest.mark.parametrize(
    ("error", "make", "words"),
    [
        (ValueError, lambda: fit.clipped(steep, np.inf), "most must be finite, got inf"),
        (ValueError, lambda: fit.clipped(steep, np.nan), "most must be finite"),
        (TypeError, lambda: jax.jit(lambda m: fit.clipped(steep, m).loss(ONES))(1.0), "most must"),
        (ValueError, lambda: fit.npo(steep, ONES, beta=0.0), "beta must be finite and positive"),
        (ValueError, lambda: fit.npo(steep, ONES, beta=-1.0), "beta must be finite and positive"),
        (TypeError, lambda: fit.npo(steep, jnp.ones(3, jnp.int32), beta=1.0), "has dtype int32"),
    ],
)
def test_the_others_refuse(error, make, words, refuses):
    with refuses(error, match=words):
        make()


def tossed(x, key):
    """Three numbers that depend on a key."""
    return x + jax.random.normal(key, x.shape, x.dtype)


def test_losses_with_a_key_make_penalties_with_a_key():
    key = jax.random.key(7)
    noise = np.asarray(ONES + jax.random.normal(key, (3,), FLOAT), np.float64)

    def total(x, key):
        return jnp.sum(tossed(x, key))

    np.testing.assert_allclose(
        fit.ascent(total, keyed=True).loss(ONES, key), -noise.sum(), rtol=16 * UNIT
    )
    for most in (99.0, -99.0):
        wanted = -min(noise.sum(), most)
        value = fit.clipped(total, most, keyed=True).loss(ONES, key)
        np.testing.assert_allclose(value, wanted, rtol=16 * UNIT)
    p = special.softmax(noise)
    value = fit.entropy(tossed, keyed=True).loss(ONES, key)
    np.testing.assert_allclose(value, special.rel_entr(p, 1 / 3).sum(), atol=32 * UNIT)
    # Under one key the reference is as likely as itself.
    value = fit.npo(tossed, ONES, beta=2.0, keyed=True).loss(ONES, key)
    np.testing.assert_allclose(value, np.log(2), rtol=8 * UNIT)
    with pytest.raises(TypeError):
        fit.ascent(total, keyed=True).loss(ONES)


# Guard: losses, penalties and optimizers are made once, so that runs share compilations

COSTS = (0.5, 2.0, 1.0)
TARGET, *ANCHORS = ({name: drawn(*shape) for name, shape in LAYOUT.items()} for _ in range(4))


def half_square(x, y):
    y = jax.tree.map(lambda a, b: b.astype(a.dtype), x, y)
    return tree.norm(tree.combine((1, -1), (x, y))) ** 2 / 2


def kept(i):
    """A quadratic loss around an anchor."""
    return lambda x: COSTS[i] * half_square(x, ANCHORS[i])


LOSSES = [kept(i) for i in range(3)]


def near(x):
    """Half the squared distance from `TARGET`: its strength is the stiffness mu."""
    return half_square(x, TARGET)


def bend(x):
    """A penalty that is neither quadratic nor zero anywhere."""
    return sum(jnp.sum(jnp.cos(leaf + 1)) for leaf in jax.tree.leaves(x))


def bend_slope(x):
    return -np.sin(flat(x) + 1)


def nothing(x):
    """A loss that is indifferent."""
    return 0 * bend(x)


SGD, SLOW, UNITS, LBFGS = optax.sgd(0.1), optax.sgd(0.04), optax.sgd(1.0), optax.lbfgs()
TWO, THREE = LOSSES[:2], LOSSES


def optimum(a, costs, mu):
    """The closed form of the quadratic case."""
    a, costs = np.array(a) / np.sum(a), np.array(costs)
    anchors = [flat(x) for x in ANCHORS[: len(a)]]
    gap = flat(TARGET) - sum(w * x for w, x in zip(a, anchors, strict=True))
    shift = gap / (1 / mu + np.sum(a**2 / costs))
    return [x + w / c * shift for x, w, c in zip(anchors, a, costs, strict=True)]


@st.composite
def mixtures(draw, count):
    """Coefficients of either sign that do not cancel."""
    number = st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, -0.25, -0.5])
    c = draw(st.lists(number, min_size=count, max_size=count))
    assume(sum(c) >= 0.5)
    return c


@pytest.mark.parametrize("count", [2, 3])
@settings(max_examples=8)
@given(data=st.data(), mu=st.sampled_from([0.0, 0.25, 1.0, 3.0]))
def test_the_quadratic_case_has_its_closed_form(count, data, mu):  # (v L1)
    a, starts = data.draw(mixtures(count)), [data.draw(weights(LAYOUT)) for _ in range(count)]
    found, history = fit.guard(
        KEY, LOSSES[:count], starts, a, near, optimizer=SLOW, steps=1500, strength=mu
    )
    wanted = optimum(a, COSTS[:count], max(mu, 1e-300))
    scale = max(np.linalg.norm(x) for x in wanted)
    for x, best in zip(found, wanted, strict=True):
        np.testing.assert_allclose(flat(x), best, rtol=CLOSE, atol=CLOSE * scale)
    assert history.terms.shape == (1501, count + 1)
    values = [COSTS[i] / 2 * np.sum((x - flat(ANCHORS[i])) ** 2) for i, x in enumerate(wanted)]
    a = np.array(a) / np.sum(a)
    middle = sum(w * x for w, x in zip(a, wanted, strict=True))
    values.append(np.sum((middle - flat(TARGET)) ** 2) / 2)
    atol = 10 * CLOSE * (scale + size(TARGET)) ** 2
    np.testing.assert_allclose(history.terms[-1], values, atol=atol)
    total = np.dot([*np.ones(count), mu], values)
    np.testing.assert_allclose(history.loss[-1], total, rtol=10 * CLOSE, atol=atol)


def test_at_the_optimum_strength_and_stiffness_count_by_their_product():
    a, strength, mu = (1.0, 3.0), 4.0, 2.5
    best = [like(x, TARGET) for x in optimum(a, COSTS[:2], strength * mu)]
    stiff = functools.partial(_times, mu)
    found, _ = fit.guard(KEY, TWO, best, a, stiff, optimizer=UNITS, steps=1, strength=strength)
    for x, y in zip(found, best, strict=True):
        np.testing.assert_allclose(flat(x), flat(y), atol=CLOSE * size(*best, TARGET))


def _times(mu, x):
    return mu * near(x)


@settings(max_examples=8)
@given(a=mixtures(2))
def test_a_stiff_penalty_is_retarget(a):  # (v L1)
    mu = 2.0**14
    found, _ = fit.guard(KEY, TWO, ANCHORS[:2], a, near, optimizer=LBFGS, steps=40, strength=mu)
    wanted = negative.retarget(ANCHORS[:2], a, TARGET, costs=COSTS[:2])
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(flat(x), flat(y), atol=2e-3 * size(*wanted, TARGET))


@settings(max_examples=8)
@given(data=st.data(), a=mixtures(3), strength=st.sampled_from([0.5, 1.0, 3.0]))
def test_every_point_is_pushed_in_one_direction_by_its_coefficient(data, a, strength):  # (v L2)
    starts = [data.draw(weights(LAYOUT)) for _ in range(3)]
    c = np.array(a) / np.sum(a)
    options = {"optimizer": UNITS, "steps": 1, "strength": strength}
    run = functools.partial(fit.guard, KEY, [nothing] * 3, **options)
    moved, history = run(starts, a, bend)
    middle = like(sum(w * flat(x) for w, x in zip(c, starts, strict=True)), TARGET)
    slope = strength * bend_slope(middle)
    scale = 16 * UNIT * (size(*starts) * strength * np.abs(c).sum() + strength)
    for x, y, w in zip(starts, moved, c, strict=True):
        np.testing.assert_allclose(flat(y) - flat(x), -w * slope, atol=scale * (1 + abs(w)))
    np.testing.assert_allclose(
        history.gradient[0], np.linalg.norm(c) * np.linalg.norm(slope), rtol=1e-4, atol=4 * scale
    )
    # From zero nothing is lost to the points' rounding: proportional to the last bits.
    zero = jax.tree.map(jnp.zeros_like, TARGET)
    moved, _ = run([zero] * 3, a, bend)
    for y, w in zip(moved, c, strict=True):
        np.testing.assert_allclose(flat(y), -w * strength * bend_slope(zero), rtol=16 * UNIT)


@settings(max_examples=8)
@given(starts=st.tuples(weights(LAYOUT), weights(LAYOUT)))
def test_without_strength_every_point_is_trained_alone(starts):  # (v L4)
    joint, history = fit.guard(
        KEY, TWO, starts, (0.5, 0.5), bend, optimizer=SGD, steps=10, strength=0.0
    )
    for i, x in enumerate(starts):
        alone = fit.adapt(KEY, TWO[i], x, optimizer=SGD, steps=10)
        assert_close(joint[i], alone.weights, units=4, scale=size(x, ANCHORS[i]))
        np.testing.assert_allclose(history.terms[:, i], alone.history.loss, rtol=16 * UNIT)
    assert (history.terms[:, 2] != 0).all()  # measured, though it counts for nothing


@settings(max_examples=8)
@given(starts=st.tuples(weights(LAYOUT), weights(LAYOUT)))
def test_swapping_points_swaps_results(starts):  # (v L7)
    run = functools.partial(fit.guard, KEY, optimizer=SGD, steps=10, strength=2.0)
    found, history = run(TWO, starts, (0.75, 0.5), bend)
    swapped, other = run(TWO[::-1], starts[::-1], (0.5, 0.75), bend)
    assert_close(swapped[::-1], found, units=256, scale=size(*starts, *ANCHORS) + 1)
    np.testing.assert_allclose(other.terms[:, [1, 0, 2]], history.terms, rtol=1e-3, atol=1e-3)


def test_one_point_is_trained_against_its_penalty():
    (x,), history = fit.guard(
        KEY, [LOSSES[1]], [TARGET], [3.0], near, optimizer=SGD, steps=100, strength=2.0
    )
    np.testing.assert_allclose(flat(x), (flat(ANCHORS[1]) + flat(TARGET)) / 2, rtol=1e-3, atol=1e-4)
    assert history.terms.shape == (101, 2)


# Guard with a ball

CENTER = {name: jnp.full(shape, 2.0, FLOAT) for name, shape in LAYOUT.items()}
OUT = jax.tree.map(lambda x: jnp.zeros_like(x).at[(0,) * x.ndim].set(3), CENTER)
BALL, LED = fit.hinge(CENTER, 0.5), fit.hinge(CENTER, 0.5, direction=OUT)


@settings(max_examples=8)
@given(starts=st.tuples(weights(LAYOUT), weights(LAYOUT)))
def test_from_outside_the_ball_nothing_moves(starts):  # (v L3)
    assume(np.linalg.norm((flat(starts[0]) + flat(starts[1])) / 2 - flat(CENTER)) > 0.51)
    for away in (BALL, LED):
        found, history = fit.guard(
            KEY, [nothing] * 2, starts, (1, 1), away, optimizer=SGD, steps=3, strength=9.0
        )
        assert_close(found, list(starts), units=0)
        np.testing.assert_array_equal(history.gradient, 0)


def test_from_the_center_the_average_leaves_in_the_direction_given():
    starts = [tree.combine((1, s), (CENTER, OUT)) for s in (3.0, -1.0)]
    coefficients = (0.25, 0.75)
    stay, _ = fit.guard(
        KEY, [nothing] * 2, starts, coefficients, BALL, optimizer=SGD, steps=20, strength=1.0
    )
    assert_close(stay, starts, units=0)
    found, history = fit.guard(
        KEY, [nothing] * 2, starts, coefficients, LED, optimizer=SGD, steps=20, strength=1.0
    )
    # A step of sgd moves the average by 0.1 / 0.5 sum a^2 = 1/8: four steps.
    np.testing.assert_allclose(history.terms[:6, 2], [1, 0.75, 0.5, 0.25, 0, 0], atol=1e-4)
    wanted = negative.exit_ball(starts, coefficients, CENTER, 0.5, direction=OUT)
    for x, y in zip(found, wanted, strict=True):
        np.testing.assert_allclose(flat(x), flat(y), atol=1e-4)
    assert geometry.distance(average.mean(found, coefficients), CENTER) > 0.4999


# Several averages

ROWS = np.array([[1.0, 3.0], [2.0, 2.0], [-1.0, 3.0]])


def fixed_rows(key):
    del key
    return jnp.asarray(ROWS)


def fixed_row(key):
    del key
    return jnp.asarray([0.5, 1.5], FLOAT)


def dirichlet(key):
    return jax.random.dirichlet(key, jnp.ones(2, FLOAT), (4,))


def mean_bend(rows, points):
    """The mean penalty over rows, and its derivatives by the points."""
    value, slopes = 0, [0] * len(points)
    for row in np.atleast_2d(rows):
        a = row / row.sum()
        middle = sum(w * flat(x) for w, x in zip(a, points, strict=True))
        value += np.cos(middle + 1).sum() / len(np.atleast_2d(rows))
        for i, w in enumerate(a):
            slopes[i] = slopes[i] - w * np.sin(middle + 1) / len(np.atleast_2d(rows))
    return value, slopes


@pytest.mark.parametrize(
    ("given_", "rows"),
    [
        (ROWS, ROWS),
        ([list(map(float, row)) for row in ROWS], ROWS),
        (jnp.asarray(ROWS, FLOAT), ROWS),
        (fixed_rows, ROWS),
        (ROWS[:1], ROWS[:1]),
        (ROWS[0], ROWS[:1]),
        (fixed_row, np.array([[0.5, 1.5]])),
    ],
    ids=["numpy", "lists", "jax", "function", "one row", "vector", "function of a vector"],
)
def test_rows_of_coefficients_give_the_mean_penalty(given_, rows):
    points = ANCHORS[:2]
    found, history = fit.guard(
        KEY, [nothing] * 2, points, given_, bend, optimizer=UNITS, steps=1, strength=2.0
    )
    value, slopes = mean_bend(rows, points)
    np.testing.assert_allclose(history.terms[0, 2], value, atol=64 * UNIT * 15)
    np.testing.assert_allclose(history.loss[0], 2 * value, atol=128 * UNIT * 15)
    for x, y, slope in zip(points, found, slopes, strict=True):
        np.testing.assert_allclose(flat(y) - flat(x), -2 * slope, atol=64 * UNIT * size(*points))


def test_a_guard_of_several_averages_keeps_each():
    starts = [tree.combine((1, s), (CENTER, OUT)) for s in (0.03, -0.01)]
    rows = [(0.5, 0.5), (0.9, 0.1), (0.1, 0.9)]
    found, history = fit.guard(
        KEY, [nothing] * 2, starts, rows, LED, optimizer=SGD, steps=40, strength=3.0
    )
    assert history.terms[-1, 2] == 0
    for row in rows:
        assert geometry.distance(average.mean(found, row), CENTER) >= 0.5 * (1 - 8 * UNIT)


def first(x):
    """A linear penalty, which sees where the average is."""
    return x[0]


def test_coefficients_are_drawn_anew_at_every_step():
    points = [jnp.zeros(2, FLOAT), jnp.ones(2, FLOAT)]

    def run(seed, rows=dirichlet, **options):
        usual = {"optimizer": SGD, "steps": 20, "strength": 0.0}
        return fit.guard(jax.random.key(seed), [first] * 2, points, rows, first, **usual | options)

    seen = np.asarray(run(0).history.terms)
    seen = seen[:, 2] - np.minimum(seen[:, 0], seen[:, 1])
    assert len(set(seen.tolist())) == 21
    assert ((seen > 0) & (seen < 1)).all()  # both moved as one: a convex combination
    assert np.std(seen) < 0.29  # the mean of four
    assert_close(run(0), run(0), units=0)
    other = np.asarray(run(1).history.terms)[:, 2]
    assert np.abs(other - np.asarray(run(0).history.terms)[:, 2]).max() > 1e-3


def dice(x, key):
    """A loss that is its key's draw, whatever the weights."""
    return jax.random.uniform(key, (), x.dtype) + 0 * jnp.sum(x)


@pytest.mark.parametrize("rows", [((1, 0), (0, 1)), dirichlet])
def test_every_loss_and_the_penalty_get_a_key_of_their_own_at_every_step(rows):
    _, history = fit.guard(
        KEY, [dice] * 2, [ONES, ONES], rows, dice, keyed=True, optimizer=SGD, steps=5
    )
    assert len(set(np.asarray(history.terms).ravel().tolist())) == 18


# Under the worst edit of a cone

D = 0.75
WORST = {"cone": cone.Rank(1), "budget": D}


def truncated(gap, rank):
    u, s, v = np.linalg.svd(gap["w"], full_matrices=False)
    return {"w": (u[:, :rank] * s[:rank]) @ v[:rank], "b": gap["b"] if rank else 0 * gap["b"]}


def pooled(gap):
    """The nearest edit of pooled rank two: the vector is one matrix of rank one."""
    u, s, v = np.linalg.svd(gap["w"], full_matrices=False)
    values = np.append(s, np.linalg.norm(gap["b"]))
    keep = np.argsort(-values)[:2]
    return {"w": (u * s * np.isin(range(3), keep)) @ v, "b": gap["b"] * (3 in keep)}


def sparse(gap):
    least = np.sort(np.abs(np.concatenate([gap["b"], gap["w"].ravel()])))[-4]
    return {k: np.where(np.abs(v) >= least, v, 0) for k, v in gap.items()}


CONES = {
    "rank 1": (cone.Rank(1), lambda g: truncated(g, 1)),
    "rank 2": (cone.Rank(2), lambda g: truncated(g, 2)),
    "all": (cone.Rank(3), lambda g: g),
    "pooled": (cone.PooledRank(2), pooled),
    "sparse": (cone.Sparse(4), sparse),
    "mask": (cone.Mask({"w": True, "b": False}), lambda g: {"w": g["w"], "b": 0 * g["b"]}),
}


@pytest.mark.parametrize("name", CONES)
@settings(max_examples=8)
@given(starts=st.tuples(weights(LAYOUT), weights(LAYOUT)))
def test_the_inner_step_is_the_worst_edit_of_the_cone(name, starts):  # (v L5)
    kind, nearest = CONES[name]
    a = np.array([0.25, 0.75])
    middle = sum(w * flat(x) for w, x in zip(a, starts, strict=True))
    gap = {k: np.asarray(v, np.float64) for k, v in like64(middle - flat(TARGET)).items()}
    s = np.linalg.svd(gap["w"], compute_uv=False)
    assume((s[:-1] > 1.05 * s[1:]).all())
    worst = flat(nearest(gap))
    assume(np.linalg.norm(worst) > 0.1)
    entries = np.sort(np.abs(flat(gap)))
    assume(name != "sparse" or entries[-4] > entries[-5] * 1.01)
    worst *= D / np.linalg.norm(worst)
    found, history = fit.guard(
        KEY, [nothing] * 2, starts, a, near, optimizer=UNITS, steps=1, cone=kind, budget=D
    )
    scale = UNIT * (size(*starts, TARGET) + 1)
    wanted = np.sum((middle + worst - flat(TARGET)) ** 2) / 2
    np.testing.assert_allclose(history.terms[0, 2], wanted, atol=64 * scale**2 / UNIT)
    np.testing.assert_allclose(history.loss[0], wanted, atol=64 * scale**2 / UNIT)
    # The edit is a constant: the slope is that of the penalty where it leads.
    for x, y, w in zip(starts, found, a, strict=True):
        slope = middle + worst - flat(TARGET)
        np.testing.assert_allclose(flat(y) - flat(x), -w * slope, atol=4e4 * scale)


def like64(entries):
    """A tree of `LAYOUT` in NumPy float64."""
    return {"b": entries[:3], "w": entries[3:].reshape(4, 3)}


@pytest.mark.parametrize("rank", [1, 3])
def test_the_worst_edit_is_a_constant_for_the_derivatives(rank):
    # Not so seen, it would turn with the points: on a quadratic that makes no difference.
    (x,) = points = ANCHORS[:1]
    (y,), history = fit.guard(
        KEY,
        [nothing],
        points,
        [1.0],
        bend,
        optimizer=UNITS,
        steps=1,
        cone=cone.Rank(rank),
        budget=D,
    )
    worst = flat(truncated(like64(bend_slope(x)), rank))
    there = like64(flat(x) + D * worst / np.linalg.norm(worst))
    np.testing.assert_allclose(history.terms[0, 1], np.cos(flat(there) + 1).sum(), rtol=1e-4)
    np.testing.assert_allclose(flat(y) - flat(x), -bend_slope(there), atol=1e-4)


def test_no_low_rank_edit_of_that_norm_raises_a_quadratic_more_to_first_order():  # (v L5)
    points, rng = ANCHORS[:2], np.random.default_rng(1)
    _, history = fit.guard(
        KEY, [nothing] * 2, points, (1, 1), near, optimizer=UNITS, steps=1, **WORST
    )
    gap = (flat(points[0]) + flat(points[1])) / 2 - flat(TARGET)
    first_order = float(history.terms[0, 2]) - gap @ gap / 2 - D**2 / 2
    for _ in range(200):
        matrix = np.outer(rng.normal(size=4), rng.normal(size=3))
        edit = np.append(rng.normal(size=3), matrix)
        assert gap @ edit * D / np.linalg.norm(edit) <= first_order + 1e-4 * np.linalg.norm(gap)


def test_a_budget_of_zero_is_no_cone():
    run = functools.partial(fit.guard, KEY, TWO, ANCHORS[:2], (1, 1), bend, optimizer=SGD, steps=4)
    assert_close(run(cone=cone.Rank(1), budget=0.0), run(), units=64)


def linear(x, key):
    """A penalty whose slope is drawn."""
    return jnp.sum(jax.random.normal(key, x.shape, x.dtype) * x)


def test_the_worst_edit_is_that_of_the_batch_it_is_tried_on():
    zero = jnp.zeros((4, 3), FLOAT)
    _, history = fit.guard(
        KEY,
        [nothing],
        [zero],
        [1.0],
        fit.Away(linear, -np.inf, "mine", keyed=True),
        unbounded=True,
        optimizer=UNITS,
        steps=1,
        cone=cone.Rank(3),
        budget=D,
    )
    np.testing.assert_allclose(history.terms[0, 1], D * history.gradient[0], rtol=64 * UNIT)


def test_rows_of_coefficients_each_meet_their_own_worst_edit():
    points = ANCHORS[:2]
    rows = np.array([[0.5, 0.5], [0.25, 0.75]])
    _, history = fit.guard(
        KEY, [nothing] * 2, points, rows, near, optimizer=UNITS, steps=0, **WORST
    )
    wanted = []
    for row in rows:
        gap = sum(w * flat(x) for w, x in zip(row, points, strict=True)) - flat(TARGET)
        worst = flat(truncated(like64(gap), 1))
        wanted.append(np.sum((gap + D * worst / np.linalg.norm(worst)) ** 2) / 2)
    np.testing.assert_allclose(history.terms[0, 2], np.mean(wanted), rtol=1e-4)


# Keys, dtypes, transformations, progress, divergence


NPO = fit.npo(tossed, ONES[:2], beta=1.0, keyed=True)


@pytest.mark.parametrize(
    ("away", "rows", "options"),
    [(linear, (1, 1), {}), (linear, dirichlet, WORST), (NPO, dirichlet, {}), (NPO, (1, 1), WORST)],
    ids=["plain", "drawn, cone", "npo, drawn", "npo, cone"],
)
def test_no_key_is_used_twice(away, rows, options):
    points = [jnp.zeros(2, FLOAT), jnp.ones(2, FLOAT)]

    def run():
        key = jax.random.key(3)
        return fit.guard(
            key, [linear] * 2, points, rows, away, keyed=True, optimizer=SGD, steps=2, **options
        )

    with jax.debug_key_reuse(True):
        found = run()
    assert_close(found, run(), units=64)


def test_a_key_given_to_two_guards_is_refused_where_jax_looks_for_that():
    key = jax.random.key(3)
    run = functools.partial(
        fit.guard, losses=[linear], points=[ONES], coefficients=[1.0], away=linear, keyed=True,
        optimizer=SGD, steps=2,
    )  # fmt: skip
    with jax.debug_key_reuse(True):
        run(key)
        with pytest.raises(jax.errors.KeyReuseError):
            run(key)


def test_points_in_half_precision_come_back_in_their_own_dtypes_rounded_once():
    halves = [
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), ANCHORS[2]),
        jax.tree.map(lambda x: x.astype(jnp.float32), ANCHORS[1]),
    ]
    run = functools.partial(fit.guard, KEY, TWO, optimizer=SGD, steps=5)
    found, history = run(halves, (0.5, 0.5), near)
    whole, _ = run([tree.upcast(x) for x in halves], (0.5, 0.5), near)
    wanted = [tree.cast_like(x, y) for x, y in zip(whole, halves, strict=True)]
    assert_close(found, wanted, units=0)
    assert history.loss.dtype == jnp.float32
    assert isinstance(found, list)


def test_guards_are_compiled_and_batched():
    keys = jax.random.split(KEY, 2)
    starts = [jnp.stack([ONES, 2 * ONES]), jnp.stack([0 * ONES, ONES])]
    coefficients = jnp.asarray([[1.0, 1.0], [0.25, 0.75]], FLOAT)
    strengths = jnp.asarray([0.5, 2.0], FLOAT)

    def run(key, points, c, strength):
        return fit.guard(
            key,
            [linear, dice],
            points,
            c,
            linear,
            keyed=True,
            optimizer=SGD,
            steps=3,
            strength=strength,
        )

    batched = jax.jit(jax.vmap(run))(keys, starts, coefficients, strengths)
    for i in range(2):
        one = run(keys[i], [x[i] for x in starts], coefficients[i], strengths[i])
        assert_close(jax.tree.map(lambda x, i=i: x[i], batched), one, units=64)


def test_what_is_undefined_is_nan_where_traced():
    def run(c=(1.0, 1.0), strength=1.0, budget=1.0):
        return fit.guard(
            KEY, [nothing] * 2, [ONES, 2 * ONES], c, bend, optimizer=SGD, steps=1,
            strength=strength, cone=cone.Rank(1), budget=budget,
        ).weights  # fmt: skip

    assert not is_nan(jax.jit(run)())
    assert is_nan(jax.jit(run)(jnp.asarray([1.0, -1.0])))
    assert is_nan(jax.jit(run)(strength=-1.0))
    assert is_nan(jax.jit(run)(budget=-1.0))


def test_progress_is_told():
    lines = []
    _, history = fit.guard(
        KEY, TWO, ANCHORS[:2], (1, 1), near, optimizer=SGD, steps=3,
        progress=lambda i, loss: lines.append((i, loss)),
    )  # fmt: skip
    assert lines == list(enumerate(np.asarray(history.loss).tolist()))


def cliff(x):
    """A slope of one in every entry that ends, in NaN, at zero."""
    return jnp.sum(x) + 0 * jnp.sum(jnp.log(x))


HALF = optax.sgd(0.5)


def test_a_guard_that_diverges_says_where_and_returns_all_points_of_before():
    points = [jnp.asarray([9.0], FLOAT), jnp.asarray([2.25], FLOAT)]
    with pytest.warns(RuntimeWarning, match="step 5 of 9 led to where"):
        found, history = fit.guard(
            KEY, [cliff] * 2, points, (1, 1), cliff, optimizer=HALF, steps=9, strength=0.0
        )
    np.testing.assert_array_equal(found, [[7.0], [0.25]])
    assert int(history.steps) == 4
    np.testing.assert_array_equal(history.terms[:5, 0], 9 - np.arange(5.0) / 2)
    assert is_nan(history.loss[6:])


# Refusals


def nan_at_start(x):
    return jnp.sum(x) / 0


def guarded(**options):
    """`guard` on a small problem, with some arguments replaced."""
    usual = {
        "key": KEY, "losses": [first] * 2, "points": [ONES, 2 * ONES], "coefficients": (1, 1),
        "away": first, "optimizer": SGD, "steps": 1,
    }  # fmt: skip
    return fit.guard(**(usual | options))


@pytest.mark.parametrize(
    ("error", "options", "words"),
    [
        (ValueError, {"away": fit.ascent(first)}, "away is ascent, which has no lower bound"),
        (ValueError, {"cone": cone.Rank(1)}, "cone and budget belong together"),
        (ValueError, {"budget": 1.0}, "cone and budget belong together"),
        (ValueError, {"cone": cone.Rank(1), "budget": -1.0}, "budget must be .* at least 0"),
        (ValueError, {"cone": cone.Rank(1), "budget": np.inf}, "budget must be finite"),
        (ValueError, {"strength": -1.0}, "strength must be finite and at least 0, got -1"),
        (ValueError, {"strength": np.nan}, "strength must be finite"),
        (ValueError, {"losses": [first]}, "losses has 1 functions for 2 points"),
        (ValueError, {"losses": [first] * 3}, "losses has 3 functions for 2 points"),
        (ValueError, {"coefficients": (1, -1)}, "make it differ from zero"),
        (ValueError, {"coefficients": [(1, 1), (0, 0)]}, "make it differ from zero"),
        (ValueError, {"coefficients": (1,)}, "coefficients has 1 numbers for 2 points"),
        (ValueError, {"coefficients": [(1, 1, 1)]}, "coefficients has 3 numbers for 2 points"),
        (ValueError, {"coefficients": (1, np.nan)}, r"coefficients\[1\] must be finite"),
        (ValueError, {"coefficients": np.ones((1, 1, 2))}, r"coefficients must be \(k,\)"),
        (ValueError, {"coefficients": np.ones((0, 2))}, r"coefficients must be \(k,\)"),
        (ValueError, {"coefficients": lambda _: jnp.ones(3)}, "has 3 numbers for 2 points"),
        (ValueError, {"points": [], "losses": []}, "points is empty"),
        (ValueError, {"points": [ONES, ONES[:2]]}, r"has shape .* in points\[1\]"),
        (ValueError, {"points": [ONES, {"w": ONES}]}, "points"),
        (TypeError, {"points": [ONES, jnp.ones(3, jnp.int32)]}, r"points\[1\] has dtype int32"),
        (TypeError, {"losses": [first, lambda x: x]}, r"losses\[1\] must return one"),
        (TypeError, {"losses": [first, 3]}, r"losses\[1\] must be a function"),
        (TypeError, {"away": lambda x: x}, "away must return one"),
        (TypeError, {"away": 3}, "away must be a function"),
        (TypeError, {"away": fit.Away(lambda x: x, 0.0, "mine")}, "away must return one"),
        (TypeError, {"key": 0}, "key must be one random key"),
        (TypeError, {"key": jax.random.split(KEY)}, "key must be one random key"),
        (TypeError, {"optimizer": None}, "optimizer must be one of optax"),
        (TypeError, {"steps": 1.0}, "steps must be a plain integer"),
        (ValueError, {"steps": -1}, "steps must be at least 0"),
        (ValueError, {"losses": [first, nan_at_start]}, r"losses\[1\].* start"),
        (ValueError, {"away": nan_at_start}, r"away.* start"),
    ],
)
def test_guard_refuses(error, options, words, refuses):
    with refuses(error, match=words):
        guarded(**options)


def test_ascent_is_taken_if_asked_for():
    found, history = guarded(away=fit.ascent(first), unbounded=True, losses=[nothing] * 2)
    np.testing.assert_allclose([x[0] for x in found], [1.05, 2.05], rtol=8 * UNIT)
    np.testing.assert_allclose(history.terms[:, 2], [-1.5, -1.55], rtol=8 * UNIT)


def test_penalties_of_all_kinds_are_taken():
    aways = [
        fit.entropy(lambda x: x),
        fit.npo(lambda x: x, ONES, beta=1.0),
        fit.Away(first, -1.0, "mine"),
        fit.clipped(dice, 0.0, keyed=True),
    ]
    for away in aways:
        found, history = guarded(away=away, losses=[nothing] * 2)
        assert np.isfinite(found).all()
        assert (history.terms[:, 2] >= away.least).all()
