"""Laws of `wspace.negative.offset`: offset, curve, rank_to_reach, route, gate.

Numbers such as (iv L1) are those of the laws in the docs page on the negative weight. Edits are
compared as products, never by their factors, which are not unique (iv L11).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import is_nan
from tests.strategies import FLOAT, UNIT, scales
from wspace import average, cone, geometry, lowrank, negative, tree
from wspace.testing import assert_close, matrices, size, vector, weights
from wspace.testing.comparison import eps

distance, curve = jax.jit(geometry.distance), jax.jit(negative.curve)
LAYOUT = {"w": (5, 4), "b": (3,), "s": (2, 3, 2), "k": (2, 1, 2, 3), "e": (0, 2), "c": ()}
RANKS = 5  # 0 to 4, the largest rank in LAYOUT


def offset(point, target, rank):
    return jax.jit(negative.offset, static_argnums=2)(point, target, rank)


@st.composite
def journeys(draw):
    """A point, and a target at a displacement with singular values of every kind."""
    point = draw(weights(LAYOUT))
    step = {
        "w": draw(matrices((5, 4))),
        "b": jnp.ones(3, FLOAT),
        "s": draw(matrices((2, 3, 2))),
        "k": draw(matrices((4, 3))).reshape(2, 1, 2, 3),
        "e": jnp.ones((0, 2), FLOAT),
        "c": jnp.ones((), FLOAT),
    }
    return point, jax.tree.map(jnp.add, point, step)


def slices(point, target):
    """The matrices of the displacement, one by one, and its vectors as columns."""
    for name in LAYOUT:
        gap = np.asarray(target[name], np.float64) - np.asarray(point[name], np.float64)
        if gap.ndim < 2:
            yield gap.reshape(-1, 1)
        elif gap.ndim == 3:
            yield from gap
        elif gap.size:
            yield gap.reshape(-1, gap.shape[-1])


def true_curve(point, target):
    tails = []
    for r in range(RANKS):
        squares = [np.linalg.svd(x, compute_uv=False)[r:] ** 2 for x in slices(point, target)]
        tails.append(np.sqrt(sum(map(np.sum, squares))))
    return np.array(tails)


@given(journey=journeys())
def test_curve_is_the_distance_left_after_each_rank(journey):  # (iv L1, L2)
    got, wanted = np.asarray(curve(*journey)), true_curve(*journey)
    assert got.shape == (RANKS,)
    scale = size(*journey)
    np.testing.assert_allclose(got, wanted, atol=64 * UNIT * scale)
    assert (np.diff(got) <= 0).all()
    assert (np.diff(np.diff(got**2)) >= -256 * UNIT * scale**2).all()
    assert got[-1] == 0
    assert abs(got[0] - distance(*journey)) <= 64 * UNIT * scale


@pytest.mark.parametrize("rank", range(RANKS + 1))
@given(journey=journeys())
def test_the_offset_lands_where_the_curve_says(rank, journey):  # (iv L1, L4)
    point, target = journey
    edit = offset(point, target, rank)
    left = distance(lowrank.apply(point, edit.factors), target)
    wanted = curve(point, target)[min(rank, RANKS - 1)]
    tolerance = 64 * 2 * UNIT * size(point, target)
    assert abs(left - wanted) <= tolerance
    assert abs(edit.tail - wanted) <= tolerance
    for name in ("w", "s", "k"):
        assert edit.factors[name].rank <= rank
    assert jnp.all(edit.factors["b"] == 0) == (rank == 0)


@given(journey=journeys(), seed=st.integers(0, 99))
def test_no_edit_of_that_rank_comes_nearer(journey, seed):  # (iv L3)
    point, target = journey
    edit, rng = offset(point, target, 1), np.random.default_rng(seed)
    for step in (1e-3, 1e-1, 1.0):
        other = jax.tree.map(
            lambda x, step=step: x + step * jnp.asarray(rng.normal(size=x.shape), x.dtype),
            edit.factors,
        )
        other |= {name: edit.factors[name] for name in ("b", "c")}
        left = distance(lowrank.apply(point, other), target)
        assert left >= edit.tail - 64 * UNIT * size(point, target)


@given(journey=journeys(), first=st.integers(0, 2), second=st.integers(0, 2))
def test_offsets_add(journey, first, second):  # (iv L7)
    point, target = journey
    halfway = lowrank.apply(point, offset(point, target, first).factors)
    left = offset(halfway, target, second).tail
    assert abs(left - curve(point, target)[first + second]) <= 256 * UNIT * size(point, target)


@given(journey=journeys(), a=st.sampled_from([0.5, 0.25, 2.0]))
def test_an_offset_of_the_average_is_an_edit_of_one_source(journey, a):  # (iv L6)
    point, target = journey
    other = tree.combine((0.5,), (target,))
    center = average.mean([point, other], (a, 1 - a))
    edit = jax.tree.map(
        lambda e: lowrank.materialize(e) if isinstance(e, lowrank.LowRank) else e,
        offset(center, target, 1).factors,
        is_leaf=lambda e: isinstance(e, lowrank.LowRank),
    )
    edit = jax.tree.map(lambda e, x: e.reshape(x.shape), edit, point)
    source = tree.combine((1, 1 / a), (point, edit))
    moved = average.mean([source, other], (a, 1 - a))
    scale = (1 + 1 / a) * size(point, target, edit)
    assert_close(moved, lowrank.apply(center, edit), units=32, scale=scale)


@given(journey=journeys(), seed=st.integers(0, 99), scale=scales)
def test_rotations_leave_the_curve_and_scaling_scales_it(journey, seed, scale):  # (iv L8)
    point, target = ({"w": x["w"]} for x in journey)
    rng = np.random.default_rng(seed)
    left, right = (jnp.asarray(np.linalg.qr(rng.normal(size=(k, k)))[0], FLOAT) for k in (5, 4))
    turned = [{"w": scale * (left @ x["w"] @ right)} for x in (point, target)]
    wanted = scale * np.asarray(curve(point, target))
    np.testing.assert_allclose(
        curve(*turned), wanted, atol=512 * UNIT * scale * size(point, target)
    )


@given(seed=st.integers(0, 2**16), rank=st.integers(0, 3))
def test_a_guard_of_rank_q_is_undone_by_rank_q(seed, rank):  # (iv L9)
    rng = np.random.default_rng(seed)
    step = rng.normal(size=(5, rank)) @ rng.normal(size=(rank, 4))
    point = jnp.asarray(rng.normal(size=(5, 4)), FLOAT)
    target = point + jnp.asarray(step, FLOAT)
    radius = 256 * UNIT * size(point, target)
    assert curve(point, target)[rank] <= radius
    assert negative.rank_to_reach(point, target, radius) == rank


@given(seed=st.integers(0, 2**16), rank=st.integers(1, 3))
def test_factors_are_balanced_and_any_gauge_is_the_same_edit(seed, rank):  # (iv L5)
    rng = np.random.default_rng(seed)
    start, target = (jnp.asarray(rng.normal(size=(5, 4)), FLOAT) for _ in range(2))
    u, v = (np.asarray(x, np.float64) for x in jax.tree.leaves(offset(start, target, rank).factors))
    assert abs(np.linalg.norm(u) - np.linalg.norm(v)) <= 64 * 2 * UNIT * np.linalg.norm(u)
    q, _ = np.linalg.qr(rng.normal(size=(rank, rank)))
    gauge = q * rng.uniform(0.5, 2, size=rank)
    other = lowrank.LowRank(
        jnp.asarray(u @ gauge, FLOAT), jnp.asarray(v @ np.linalg.inv(gauge).T, FLOAT)
    )
    landed = lowrank.apply(start, offset(start, target, rank).factors)
    assert_close(lowrank.apply(start, other), landed, units=64 * 2 * 4, scale=size(start, target))


@functools.partial(jax.jit, static_argnums=1)
def pooled_tail(gap, rank):
    return cone.project(cone.PooledRank(rank), gap).tail


@given(seed=st.integers(0, 2**16), total=st.integers(0, 8))
def test_no_split_of_a_pooled_rank_over_the_leaves_comes_nearer(seed, total):  # (iv L10)
    rng = np.random.default_rng(seed)
    gap = {"w": rng.normal(size=(5, 4)), "k": 2 * rng.normal(size=(4, 3)), "b": rng.normal(size=3)}
    gap = {k: jnp.asarray(v, FLOAT) for k, v in gap.items()}
    best = float(pooled_tail(gap, total))
    values = [np.linalg.svd(np.asarray(gap[k], np.float64), compute_uv=False) for k in "wk"]
    values.append(np.array([np.linalg.norm(gap["b"])]))
    splits = [(i, j, total - i - j) for i in range(total + 1) for j in range(total + 1 - i)]
    tails = [
        np.sqrt(sum(np.sum(s[r:] ** 2) for s, r in zip(values, split, strict=True)))
        for split in splits
    ]
    error = 64 * 2 * UNIT * size(gap)
    assert abs(best - min(tails)) <= error


@given(journey=journeys())
def test_rank_to_reach_is_where_the_curve_meets_the_radius(journey):
    distances = np.asarray(curve(*journey))
    reach = jax.jit(negative.rank_to_reach)
    for radius in (*distances, 1.5 * distances[0] + 1, 0.5 * (distances[0] + distances[1])):
        got = int(reach(*journey, float(radius)))
        assert got == np.nonzero(distances <= np.asarray(radius, distances.dtype))[0][0]


@given(journey=journeys(), rank=st.sampled_from([0, 1, 3, 99]))
def test_route_reads_the_curves(journey, rank):
    point, target = journey
    other = tree.combine((1, 1), (target, jax.tree.map(jnp.ones_like, target)))
    table = negative.route(point, {"T": target, "other": other}, rank, radius=1.0)
    assert sorted(table) == ["T", "other"]
    for name, goal in (("T", target), ("other", other)):
        distances = negative.curve(point, goal)
        assert table[name].residual == distances[min(rank, RANKS - 1)]
        assert table[name].rank_to_reach == negative.rank_to_reach(point, goal, 1.0)


@given(x=weights(LAYOUT), far=st.sampled_from([0.0, 0.5, 2.0]))
def test_the_gate_opens_within_the_radius_alone(x, far):  # (iv L12)
    where = x | {"c": x["c"] + far}
    edit = jax.tree.map(jnp.ones_like, x)
    got = jax.jit(negative.gate)(x, where, edit, 1.0)
    if far > 1:
        assert_close(got, x, units=0)
    else:
        assert_close(got, tree.combine((1, 1), (x, edit)), units=1, scale=size(x) + 1)


def test_gradient_of_the_curve_goes_through_values_alone():
    point, target = jnp.zeros((3, 3)), jnp.diag(jnp.array([2.0, 2.0, 1.0]))
    slope = jax.grad(lambda x: negative.curve(x, target)[2])(point)
    np.testing.assert_allclose(slope, np.diag([0.0, 0.0, -1.0]), atol=1e-5)
    whole = jax.grad(lambda x: negative.curve(x, target)[0])(point)
    np.testing.assert_allclose(whole, -np.diag([2.0, 2.0, 1.0]) / 3, atol=1e-5)


def test_points_without_leaves():
    assert negative.curve({}, {}).shape == (1,)
    assert negative.offset({}, {}, 3).tail == 0
    assert negative.rank_to_reach({}, {}, 0.0) == 0


def test_bad_arguments_are_refused(refuses):
    x, y = {"w": jnp.eye(2)}, {"w": jnp.ones((2, 2))}
    with refuses(ValueError, match="rank must be at least 0"):
        negative.offset(x, y, -1)
    with refuses(TypeError, match="rank must be a plain integer"):
        negative.route(x, {"y": y}, 0.5, radius=1.0)
    for radius in (-1.0, float("nan"), float("inf")):
        for function in (
            lambda radius: negative.rank_to_reach(x, y, radius),
            lambda radius: negative.route(x, {"y": y}, 1, radius=radius),
            lambda radius: negative.gate(x, y, y, radius),
        ):
            with refuses(ValueError, match="radius must be finite and at least 0"):
                function(radius)
    with refuses(ValueError, match="targets is empty"):
        negative.route(x, {}, 1, radius=1.0)
    with refuses(TypeError, match="targets must be a mapping"):
        negative.route(x, [y], 1, radius=1.0)
    with refuses(
        ValueError, match=r"leaf \['w'\] has shape \(2, 2\) in average, \(3, 3\) in targets"
    ):
        negative.route(x, {"y": {"w": jnp.eye(3)}}, 1, radius=1.0)
    with refuses(ValueError, match=r"leaf \['w'\] of target holds NaN"):
        negative.curve(x, {"w": jnp.full((2, 2), jnp.nan)})
    assert jax.jit(negative.rank_to_reach)(x, y, -1.0) == -1
    assert is_nan(jax.jit(negative.gate)(x, y, y, -1.0))
    assert is_nan(curve(x, {"w": jnp.full((2, 2), jnp.nan)}))


def test_the_scale_of_the_oracle_is_not_that_of_the_code():
    # One displacement with known singular values, by hand.
    point, target = {"w": jnp.zeros((2, 3))}, {"w": jnp.array([[3.0, 0, 0], [0, 4.0, 0]])}
    np.testing.assert_allclose(negative.curve(point, target), [5, 3, 0], atol=1e-6)
    assert vector(target).size == 6
    assert eps(negative.curve(point, target)) > 0


def test_the_curve_has_a_kink_only_where_equal_singular_values_meet_at_its_rank():
    def left(s):
        values = jnp.asarray([1.0, 1.0, 0.5], FLOAT) + s * jnp.asarray([1.0, 0.0, 0.0], FLOAT)
        return curve(jnp.zeros((3, 3), FLOAT), jnp.diag(values))

    h = 1e-2
    up, down = ((left(s) - left(0.0)) / s for s in (h, -h))
    np.testing.assert_allclose(up[:3], [1 / 1.5, 0, 0], atol=h)
    np.testing.assert_allclose(down[:3], [1 / 1.5, 1 / np.sqrt(1.25), 0], atol=h)
    slopes = jax.jacobian(left)(jnp.zeros((), FLOAT))
    np.testing.assert_allclose(slopes[np.array([0, 2])], [1 / 1.5, 0], atol=64 * UNIT)


@pytest.mark.parametrize("power", [-110, 110])
def test_the_curve_is_that_at_every_scale(power):
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    values = np.linalg.svd(x.astype(float), compute_uv=False)
    got = negative.curve(jnp.zeros((4, 3)), jnp.asarray(np.float32(2.0**power) * x))
    wanted = [np.linalg.norm(values[r:]) for r in range(4)]
    np.testing.assert_allclose(np.asarray(got, float) / 2.0**power, wanted, rtol=1e-5)


def test_how_near_nan_is_nothing_says(refuses):
    x, broken, edit = jnp.ones(2), jnp.array([1.0, jnp.nan]), jnp.ones(2)
    with refuses(ValueError, match=r"leaf \(root\) of where holds NaN"):
        negative.gate(x, broken, edit, 1.0)
    with refuses(ValueError, match=r"leaf \(root\) of point holds NaN"):
        negative.gate(broken, x, edit, 1.0)
    assert jnp.isnan(jax.jit(negative.gate)(x, broken, edit, 1.0)).all()
