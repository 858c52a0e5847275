"""Laws of `wspace.negative.retarget`: retarget and exit_ball.

Numbers such as (ii L1) are those of the laws in the docs page on the negative weight.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.helpers import is_nan
from tests.strategies import FLOAT, UNIT, costs, projectors, strengths
from wspace import average, cone, geometry, negative, tree
from wspace.lowrank import LowRank
from wspace.testing import assert_close, coefficients, like, points, size, vector, weights

mean, distance = jax.jit(average.mean), jax.jit(geometry.distance)
retarget, exit_ball = jax.jit(negative.retarget), jax.jit(negative.exit_ball)
LAYOUT = {"w": (4, 3), "b": (3,), "s": (2, 3, 2), "k": (1, 2, 2, 3)}


def normalized(c):
    return np.array(c, np.float64) / np.sum(np.array(c, np.float64))


def flat(x):
    return vector(x).astype(np.float64)


@st.composite
def problems(draw, count=None, layout=None):
    """Points, coefficients, costs and a target, of one layout."""
    xs = draw(points(count=count, layout=layout))
    shapes = jax.tree.map(lambda leaf: leaf.shape, xs[0])
    return xs, draw(coefficients(len(xs))), draw(costs(len(xs))), draw(weights(shapes))


@st.composite
def allowances(draw, count):
    """Per point where it may move: projectors of any rank, scalars, inverse metrics, or None."""
    trees = []
    for _ in range(count):
        metric = draw(projectors(4)) + draw(st.sampled_from([0.0, 0.25])) * jnp.eye(4, dtype=FLOAT)
        allow = {
            "w": draw(st.sampled_from([metric, 1.0, 0.0])),
            "b": draw(st.sampled_from([1.0, 0.0])),
            "s": draw(st.sampled_from([draw(projectors(3)), 1.0])),
            "k": draw(st.sampled_from([draw(projectors(4)), 1.0])),
        }
        trees.append(draw(st.sampled_from([allow, allow, None])))
    return trees


def dense(entries, x):
    """The matrix that an allowance is on the vector of all entries: the oracle's view."""
    if entries is None:
        entries = jax.tree.map(lambda _: 1.0, x)
    blocks = []
    for name in sorted(x):
        p, shape = np.asarray(entries[name], np.float64), x[name].shape
        if p.ndim == 0:
            blocks.append(p * np.eye(int(np.prod(shape))))
        elif name == "s":
            blocks += [np.kron(p, np.eye(shape[-1]))] * shape[0]
        else:
            blocks.append(np.kron(p, np.eye(shape[-1])))
    whole, start = np.zeros((sum(map(len, blocks)),) * 2), 0
    for block in blocks:
        whole[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    return whole


def edits(xs, moved):
    return [flat(y) - flat(x) for x, y in zip(xs, moved, strict=True)]


@given(problem=problems())
def test_the_average_lands_on_the_target(problem):  # (ii L1)
    xs, c, k, target = problem
    moved = retarget(xs, c, target, costs=k)
    scale = abs(normalized(c)) @ [size(x) + size(y) for x, y in zip(xs, moved, strict=True)]
    assert_close(mean(moved, c), target, units=32, scale=scale + size(target))


@given(problem=problems())
def test_edits_are_the_least_squares_solution_and_cost_what_the_formula_says(problem):  # (ii L2)
    xs, c, k, target = problem
    a, k = normalized(c), np.array(k)
    gap = flat(target) - sum(w * flat(x) for w, x in zip(a, xs, strict=True))
    # In units of sqrt(c_i) dx_i the cost is the squared norm: numpy's minimum-norm solution.
    solution = np.linalg.lstsq((a / np.sqrt(k))[None, :], gap[None, :], rcond=None)[0]
    wanted = solution / np.sqrt(k)[:, None]
    got = edits(xs, retarget(xs, c, target, costs=k))
    scale = UNIT * (size(target) + (1 + abs(a).sum()) * size(*xs)) / max(abs(a))
    for edit, best in zip(got, wanted, strict=True):
        np.testing.assert_allclose(edit, best, atol=32 * scale)
    cost, formula = sum(k * [e @ e for e in got]), gap @ gap / np.sum(a**2 / k)
    assert abs(cost - formula) <= 64 * scale * (np.sqrt(cost) + scale) * np.sum(np.sqrt(k))


@given(problem=problems(), noise=st.integers(0, 99))
def test_no_other_solution_costs_less(problem, noise):  # (ii L2)
    xs, c, k, target = problem
    a = normalized(c)
    z = np.random.default_rng(noise).normal(size=(len(xs), flat(xs[0]).size))
    z -= np.outer(a, a @ z) / (a @ a)  # sum a_i z_i = 0
    got = edits(xs, retarget(xs, c, target, costs=k))
    cost = sum(w * e @ e for w, e in zip(k, got, strict=True))
    for step in (1e-2, 1.0):
        other = sum(w * np.sum((e + step * d) ** 2) for w, e, d in zip(k, got, z, strict=True))
        assert other >= cost - 64 * UNIT * (size(*xs) + size(target)) * np.sqrt(sum(k) * cost + 1)


@given(problem=problems())
def test_two_equal_coefficients_move_each_point_by_the_whole_shift(problem):
    (x, *_), _, _, target = problem
    other = tree.combine((-0.5,), (x,))
    shift = flat(target) - (flat(x) + flat(other)) / 2
    for edit in edits([x, other], retarget([x, other], (0.5, 0.5), target)):
        np.testing.assert_allclose(edit, shift, atol=16 * UNIT * size(x, target))


@given(problem=problems())
def test_retargeting_twice_or_to_the_average_itself_changes_nothing(problem):  # (ii L3, L4)
    xs, c, k, target = problem
    once = retarget(xs, c, target, costs=k)
    scale = abs(normalized(c)).sum() * size(*xs, *once) / max(abs(normalized(c))) + size(target)
    assert_close(retarget(once, c, target, costs=k), once, units=64, scale=scale)
    assert_close(negative.retarget(xs[:1], (1,), xs[0]), xs[:1], units=0)


@given(problem=problems(count=3))
def test_a_point_without_a_coefficient_stays_and_a_dear_one_hardly_moves(problem):  # (ii L5)
    xs, _, _, target = problem
    moved = retarget(xs, (0.5, 0.0, 0.5), target)
    assert_close(moved[1], xs[1], units=0)
    moved = retarget(xs, (0.5, 0.25, 0.25), target, costs=(1, UNIT**-2, 1))
    assert_close(moved[1], xs[1], units=8, scale=size(*xs, target))


@given(problem=problems(), k=st.sampled_from([2.0, -0.5, 100.0]))
def test_only_the_ratios_of_coefficients_matter(problem, k):  # (ii L6)
    xs, c, _, target = problem
    wanted = retarget(xs, c, target)
    scale = abs(normalized(c)).sum() * size(*xs, *wanted) / max(abs(normalized(c))) + size(target)
    assert_close(retarget(xs, [k * w for w in c], target), wanted, units=32, scale=scale)


@given(problem=problems())
def test_retarget_is_equivariant(problem):
    xs, c, _, target = problem
    moved, a = retarget(xs, c, target), normalized(c)
    scale = abs(a).sum() * size(*xs, *moved) / max(abs(a)) + size(target)
    big = retarget([tree.combine((8.0,), (x,)) for x in xs], c, tree.combine((8.0,), (target,)))
    assert_close(big, [tree.combine((8.0,), (x,)) for x in moved], units=4, scale=8 * scale)
    # Of all coordinates by one rule: so also under permutations, and under translation of all.
    shift = jax.tree.map(lambda x: jnp.full_like(x, 3), target)
    both = [tree.combine((1, 1), (x, shift)) for x in (*xs, target)]
    wanted = [tree.combine((1, 1), (x, shift)) for x in moved]
    extra = (abs(a).sum() / max(abs(a)) + 1) * size(shift)
    assert_close(retarget(both[:-1], c, both[-1]), wanted, units=64, scale=scale + extra)
    swapped = retarget(xs[::-1], c[::-1], target)[::-1]
    assert_close(swapped, moved, units=16, scale=scale)


@given(problem=problems(), s=strengths)
def test_repelled_points_retarget_to_the_repelled_target(problem, s):
    xs, c, _, target = problem
    assume(abs(1 + s) > 0.1)
    avoid, a = xs[0], normalized(c)
    moved = [negative.repel(y, avoid, s) for y in retarget(xs, c, target)]
    wanted = retarget(
        [negative.repel(x, avoid, s) for x in xs], c, negative.repel(target, avoid, s)
    )
    scale = (1 + abs(s)) * (abs(a).sum() * size(*xs, *moved) / max(abs(a)) + size(target))
    assert_close(wanted, moved, units=64, scale=scale)


# With `allow`


def oracle_with_allow(xs, c, k, target, allow):
    """The least-cost solution by numpy's least squares on the vectorized problem."""
    a, shift = normalized(c), flat(target)
    shift = shift - sum(w * flat(x) for w, x in zip(a, xs, strict=True))
    roots = []
    for entries, x in zip(allow, xs, strict=True):
        values, vectors = np.linalg.eigh(dense(entries, x))
        roots.append(vectors * np.sqrt(np.where(values > 1e-6, values, 0)))
    blocks = [w / np.sqrt(p) * root for w, p, root in zip(a, k, roots, strict=True)]
    solution, *_ = np.linalg.lstsq(np.hstack(blocks), shift, rcond=1e-6)
    parts = np.split(solution, len(xs))
    return [root @ z / np.sqrt(p) for root, z, p in zip(roots, parts, k, strict=True)], shift


@settings(max_examples=8)
@given(data=st.data(), count=st.integers(1, 3))
def test_with_allow_the_edits_are_the_least_squares_solution(data, count):
    xs, c, k, target = data.draw(problems(count=count, layout=LAYOUT))
    allow = data.draw(allowances(count))
    best, shift = oracle_with_allow(xs, c, k, target, allow)
    a = normalized(c)
    missing = np.linalg.norm(shift - sum(w * e for w, e in zip(a, best, strict=True)))
    weight = max(w**2 / p for w, p in zip(a, k, strict=True))
    assume(all(w == 0 or w**2 / p > 1e-3 * weight for w, p in zip(a, k, strict=True)))
    if missing > 1e-2 * np.linalg.norm(shift) + 1e-3:
        with pytest.raises(ValueError, match=r"is out of reach, most of it .* in leaf \['"):
            negative.retarget(xs, c, target, costs=k, allow=allow)
        assert is_nan(jax.jit(negative.retarget)(xs, c, target, costs=k, allow=allow))
        return
    assume(missing < 1e-6 * np.linalg.norm(shift))
    moved = negative.retarget(xs, c, target, costs=k, allow=allow)
    scale = abs(a) @ [size(x) + size(y) for x, y in zip(xs, moved, strict=True)] + size(target)
    assert_close(mean(moved, c), target, units=64, scale=scale)
    # S is as badly conditioned as the subspaces are nearly parallel: compare the costs, which
    # are not.
    got = edits(xs, moved)
    cost, least = (
        sum(p * norm_in(e, q, x) for e, q, x, p in zip(z, allow, xs, k, strict=True))
        for z in (got, best)
    )
    assert cost <= least * (1 + 1e-3) + 1e-3 * UNIT**0.5 * (scale**2)


def norm_in(edit, entries, x):
    """The squared norm in the metric whose inverse is allowed, of the part that is."""
    return edit @ np.linalg.pinv(dense(entries, x), rcond=1e-6, hermitian=True) @ edit


@given(data=st.data())
def test_no_point_moves_where_it_may_not(data):
    xs, c, k, target = data.draw(problems(count=2, layout={"w": (4, 3)}))
    projector = [data.draw(projectors(4)), data.draw(projectors(4))]
    allow = [{"w": p} for p in projector]
    a = normalized(c)
    assume(min(abs(a)) > 0.05)
    # A target that is in reach: the average moved within the two subspaces.
    reach = [np.asarray(p, np.float64) @ np.asarray(target["w"], np.float64) for p in projector]
    shift = sum(reach) / 2
    goal = {"w": jnp.asarray(np.asarray(mean(xs, c)["w"], np.float64) + shift, FLOAT)}
    moved = negative.retarget(xs, c, goal, costs=k, allow=allow)
    for x, y, p in zip(xs, moved, projector, strict=True):
        p = np.asarray(p, np.float64)
        edit = np.asarray(y["w"], np.float64) - np.asarray(x["w"], np.float64)
        assert np.linalg.norm(edit - p @ edit) <= 64 * UNIT * (size(x) + np.linalg.norm(edit))


@pytest.mark.parametrize("turn", [1e-1, 1e-2])
@given(seed=st.integers(0, 2**16))
def test_nearly_parallel_spaces_still_land_and_keep(turn, seed):
    # What only the small angle between the spaces can reach asks for edits 1 / turn times as long.
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(4, 4)))[0].T
    lines = [q[0], np.cos(turn) * q[0] + np.sin(turn) * q[1]]
    projector = [jnp.asarray(np.outer(v, v), FLOAT) for v in lines]
    xs = [{"w": jnp.asarray(rng.normal(size=(4, 3)), FLOAT)} for _ in lines]
    goal = {"w": mean(xs)["w"] + jnp.asarray(np.outer(q[1], rng.normal(size=3)), FLOAT)}
    moved = negative.retarget(xs, (1, 1), goal, allow=[{"w": p} for p in projector])
    gap = np.linalg.norm(flat(mean(moved)) - flat(goal))
    assert gap <= 32 * UNIT * (size(*xs, *moved) / 2 + size(goal))
    for x, y, p in zip(xs, moved, projector, strict=True):
        edit = (flat(y) - flat(x)).reshape(4, 3)
        assert np.linalg.norm(edit) > 0.1 * np.linalg.norm(flat(goal) - flat(mean(xs))) / turn
        outside = edit - np.asarray(p, np.float64) @ edit
        assert np.linalg.norm(outside) <= 64 * UNIT * (size(x) + np.linalg.norm(edit))


@given(seed=st.integers(0, 2**16))
def test_a_direction_mostly_out_of_reach_does_not_leak(seed):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(4, 4)))[0][:, :2]
    projector = jnp.asarray(basis @ basis.T, FLOAT)
    p, z = np.asarray(projector, np.float64), rng.normal(size=(4, 3))
    direction = {"w": jnp.asarray(p @ z + 1e4 * (z - p @ z), FLOAT)}
    x = {"w": jnp.asarray(rng.normal(size=(4, 3)), FLOAT)}
    (y,) = negative.exit_ball([x], (1,), x, 9.0, direction=direction, allow=[{"w": projector}])
    edit = np.asarray(y["w"], np.float64) - np.asarray(x["w"], np.float64)
    assert np.linalg.norm(edit - p @ edit) <= 64 * UNIT * (size(x) + np.linalg.norm(edit))
    assert abs(np.linalg.norm(edit) - 9) <= 64 * UNIT * (9 + size(x))


@given(data=st.data())
def test_allow_everywhere_is_no_allow(data):
    xs, c, k, target = data.draw(problems(count=2, layout=LAYOUT))
    a = normalized(c)
    scale = abs(a).sum() * size(*xs) / max(abs(a)) + size(target) / max(abs(a))
    wanted = retarget(xs, c, target, costs=k)
    whole = {"w": jnp.eye(4), "b": 1.0, "s": jnp.eye(3), "k": 1}
    for allow in ([None, None], [whole, None], (whole, whole)):
        got = negative.retarget(xs, c, target, costs=k, allow=allow)
        assert_close(got, wanted, units=256, scale=scale)


@pytest.mark.parametrize("as_matrix", [False, True])
def test_numbers_and_multiples_of_the_identity_are_prices(as_matrix):
    rng = np.random.default_rng(0)
    xs = [{"w": jnp.asarray(rng.normal(size=(4, 3)), FLOAT)} for _ in range(3)]
    goal = {"w": jnp.asarray(rng.normal(size=(4, 3)), FLOAT)}
    a, k, p = np.array([0.5, -0.25, 0.75]), np.array([1.0, 0.25, 3.0]), np.array([0.25, 3.0, 2.0])
    allow = [{"w": w * jnp.eye(4, dtype=FLOAT) if as_matrix else float(w)} for w in p]
    weight = a / k * p / np.sum(a**2 / k * p)
    shift = flat(goal) - sum(w * flat(x) for w, x in zip(a, xs, strict=True))
    moved = negative.retarget(xs, tuple(a), goal, costs=tuple(k), allow=allow)
    for edit, w in zip(edits(xs, moved), weight, strict=True):
        np.testing.assert_allclose(edit, w * shift, atol=64 * UNIT * size(*xs, goal))
    direction = like(shift, goal)
    away = negative.exit_ball(
        xs, tuple(a), mean(xs, tuple(a)), 9.0, direction=direction, costs=tuple(k), allow=allow
    )
    unit = shift / np.linalg.norm(shift)
    for edit, w in zip(edits(xs, away), weight, strict=True):
        np.testing.assert_allclose(edit, 9 * w * unit, atol=64 * UNIT * (size(*xs) + 9))


def test_with_allow_a_point_without_a_coefficient_stays_bit_for_bit():  # (ii L5)
    rng = np.random.default_rng(0)
    xs = [{"w": jnp.asarray(1e-3 * rng.normal(size=(4, 3)), FLOAT)} for _ in range(3)]
    goal = {"w": jnp.asarray(1e3 * rng.normal(size=(4, 3)), FLOAT)}
    metrics = [(q := rng.normal(size=(4, 4))) @ q.T for _ in xs]
    allow = [{"w": jnp.asarray(q, FLOAT)} for q in metrics]
    moved = negative.retarget(xs, (0.5, 0.0, 0.5), goal, allow=allow)
    assert_close(moved[1], xs[1], units=0)
    assert distance(moved[0], xs[0]) > 1


def test_what_is_out_of_reach_by_rounding_is_not_missed_and_half_the_digits_are():
    one = {"w": jnp.ones((2, 2), FLOAT), "b": jnp.zeros(2, FLOAT)}
    frozen = [{"w": 1.0, "b": 0.0}]
    # The points are known to their own rounding, though it is all of the shift.
    (y,) = negative.retarget([one], (1,), one | {"b": 16 * UNIT * jnp.ones(2, FLOAT)}, allow=frozen)
    assert_close(y, one, units=0)
    with pytest.raises(ValueError, match=r"all.w admits no edits .* in leaf \['b'\]"):
        negative.retarget([one], (1,), one | {"b": 512 * UNIT * jnp.ones(2, FLOAT)}, allow=frozen)
    zero = jax.tree.map(jnp.zeros_like, one)
    for times, reached in ((64, True), (512, False)):
        small = times * UNIT * jnp.ones(2, FLOAT)  # beside a target and an edit of norm 2
        if reached:
            (y,) = negative.retarget([zero], (1,), one | {"b": small}, allow=frozen)
            assert_close(y, one)
        else:
            with pytest.raises(ValueError, match="out of reach"):
                negative.retarget([zero], (1,), one | {"b": small}, allow=frozen)


def test_a_keeping_guard_is_invisible_to_gram_weighted_merging():  # (ii L13)
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(5, 8)), rng.normal(size=(6, 8))]
    xs = [{"w": jnp.asarray(rng.normal(size=(8, 3)), FLOAT)} for _ in inputs]
    allow = [{"w": negative.free_inputs(jnp.asarray(x, FLOAT), rtol=1e-6)} for x in inputs]
    direction = {"w": jnp.asarray(rng.normal(size=(8, 3)), FLOAT)}
    moved = negative.exit_ball(xs, (1, 1), mean(xs), 5.0, direction=direction, allow=allow)

    def gram_weighted(points):
        grams = [x.T @ x for x in inputs]
        products = [g @ np.asarray(p["w"], np.float64) for g, p in zip(grams, points, strict=True)]
        return np.linalg.solve(sum(grams), sum(products))

    np.testing.assert_allclose(gram_weighted(moved), gram_weighted(xs), atol=256 * UNIT * 5)
    assert distance(mean(moved), mean(xs)) > 4.99
    for x, before, after in zip(inputs, xs, moved, strict=True):  # nor do their own outputs change
        np.testing.assert_allclose(x @ after["w"], x @ before["w"], atol=256 * UNIT * 5)


# exit_ball


@st.composite
def balls(draw, count=None, layout=None):
    """A problem with a ball around the target, in units of the average's distance from it."""
    xs, c, k, avoid = draw(problems(count=count, layout=layout))
    a = normalized(c)
    gap = sum(w * flat(x) for w, x in zip(a, xs, strict=True)) - flat(avoid)
    far = np.linalg.norm(gap)
    assume(far > 1e-2 * abs(a) @ [size(x) for x in xs] and far > 1e-2)
    return xs, c, k, avoid, draw(st.sampled_from([0.5, 1.5, 3.0, 50.0])) * far, gap


def rounding(xs, moved, c, *others):
    terms = [size(x) + size(y) for x, y in zip(xs, moved, strict=True)]
    return UNIT * (abs(normalized(c)) @ terms + size(*others))


@given(ball=balls())
def test_the_average_leaves_the_ball_straight_out_or_stays(ball):  # (ii L7)
    xs, c, k, avoid, radius, gap = ball
    moved = exit_ball(xs, c, avoid, radius, costs=k)
    far = np.linalg.norm(gap)
    if far >= radius:
        return assert_close(moved, xs, units=0)
    error = 32 * rounding(xs, moved, c, avoid)
    assert abs(distance(mean(moved, c), avoid) - radius) <= error
    landing = flat(mean(moved, c)) - flat(avoid)
    np.testing.assert_allclose(landing, radius * gap / far, atol=error * (1 + radius / far))
    target = like(flat(avoid) + radius * gap / far, avoid)
    scale = rounding(xs, moved, c, avoid) / UNIT / max(abs(normalized(c))) * (1 + radius / far)
    return assert_close(moved, retarget(xs, c, target, costs=k), units=64, scale=scale)


@given(ball=balls())
def test_leaving_costs_the_least_and_leaving_twice_nothing(ball):  # (ii L7)
    xs, c, k, avoid, radius, gap = ball
    moved = exit_ball(xs, c, avoid, radius, costs=k)
    a, far = normalized(c), np.linalg.norm(gap)
    cost = sum(w * e @ e for w, e in zip(k, edits(xs, moved), strict=True))
    formula = max(radius - far, 0) ** 2 / np.sum(a**2 / np.array(k))
    slack = 64 * rounding(xs, moved, c, avoid) * (1 + radius / far) / max(abs(a)) * np.sqrt(sum(k))
    assert abs(np.sqrt(cost) - np.sqrt(formula)) <= slack
    again = exit_ball(moved, c, avoid, radius, costs=k)
    assert_close(again, moved, units=64, scale=slack / UNIT / 64)


@given(data=st.data(), ball=balls(count=2, layout=LAYOUT), inward=st.booleans())
def test_with_a_direction_it_is_retarget_along_the_direction(data, ball, inward):
    xs, c, k, avoid, radius, gap = ball
    a = normalized(c)
    direction = data.draw(weights(LAYOUT))
    assume(size(direction) > 0.1)
    if inward:  # <E, S g> < 0: through the ball and out on the other side
        direction = like(-gap, avoid)
    allow = data.draw(st.sampled_from([None, data.draw(allowances(2))]))
    moves = [
        dense(None if allow is None else p, x) @ flat(direction)
        for p, x in zip(allow or [None, None], xs, strict=True)
    ]
    shift = sum(w**2 / p * m for w, p, m in zip(a, k, moves, strict=True))
    speed = np.linalg.norm(shift)
    assume(speed > 1e-2 * size(direction) * max(a**2 / np.array(k)))
    moved = negative.exit_ball(xs, c, avoid, radius, costs=k, direction=direction, allow=allow)
    far = np.linalg.norm(gap)
    if far >= radius:
        return assert_close(moved, xs, units=0)
    t = max(np.roots([speed**2, 2 * gap @ shift, far**2 - radius**2]).real)
    error = 64 * rounding(xs, moved, c, avoid)
    assert abs(distance(mean(moved, c), avoid) - radius) <= error
    for x, y, m, w, p in zip(xs, moved, moves, a, k, strict=True):
        sensitivity = (
            1 + radius / far + radius / np.sqrt((gap @ shift / speed) ** 2 + radius**2 - far**2)
        )
        atol = 4 * error * sensitivity * np.linalg.norm(w / p * m) / speed + 16 * UNIT * size(x, y)
        np.testing.assert_allclose(flat(y) - flat(x), t * w / p * m, atol=atol)
    target = like(flat(avoid) + gap + t * shift, avoid)
    other = negative.retarget(xs, c, target, costs=k, allow=allow)
    return assert_close(mean(other, c), mean(moved, c), units=256, scale=error / UNIT)


@given(data=st.data())
def test_the_average_itself_is_left_in_the_direction_given(data):
    xs, c, k, direction = data.draw(problems(count=2))
    assume(size(direction) > 0.1)
    center, size_ = mean(xs, c), size(*xs)
    radius = 1 + 2 * size_
    with pytest.raises(ValueError, match="no way out is distinguished: give a direction"):
        negative.exit_ball(xs, c, center, radius, costs=k)
    assert is_nan(exit_ball(xs, c, center, radius, costs=k))
    moved = exit_ball(xs, c, center, radius, costs=k, direction=direction)
    landing = flat(mean(moved, c)) - flat(center)
    unit = flat(direction) / np.linalg.norm(flat(direction))
    np.testing.assert_allclose(landing, radius * unit, atol=64 * rounding(xs, moved, c, center))


TWO = [{"w": jnp.eye(2), "b": jnp.ones(2)}, {"w": -jnp.eye(2), "b": jnp.zeros(2)}]
ZERO = jax.tree.map(jnp.zeros_like, TWO[0])
ONES = jax.tree.map(jnp.ones_like, TWO[0])
FROZEN = [{"w": 0.0, "b": 0.0}] * 2


def leave(**options):
    """`exit_ball` on a small problem, with some arguments replaced."""
    usual = {"points": TWO, "coefficients": (1, 1), "avoid": ONES, "radius": 9.0}
    return negative.exit_ball(**(usual | options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"radius": -1.0}, "radius must be finite and positive, got -1"),
        ({"radius": 0.0}, "radius must be finite and positive, got 0"),
        ({"radius": float("nan")}, "radius must be finite and positive"),
        ({"radius": UNIT}, "radius .* is below the rounding of the points"),
        ({"coefficients": (0, 0)}, "make it differ from zero"),
        ({"coefficients": (1, -1)}, "make it differ from zero"),
        ({"coefficients": (1,)}, "coefficients has 1 numbers for 2 points"),
        ({"costs": (1, 0)}, "costs must be positive"),
        ({"costs": (1, -2)}, "costs must be positive"),
        ({"costs": (1, 1, 1)}, "costs has 3 numbers for 2 points"),
        ({"direction": ZERO}, "direction has norm 0, .* a direction that is not zero"),
        ({"direction": ONES, "allow": FROZEN}, "direction has norm .* 0 is left of it"),
        ({"allow": [None, None]}, "allow needs a direction"),
        ({"direction": {"w": jnp.eye(2)}}, r"has a leaf \['b'\] that direction lacks"),
        ({"avoid": {"w": jnp.eye(3), "b": jnp.ones(2)}}, r"leaf \['w'\] has shape .* in avoid"),
        ({"avoid": ONES | {"w": jnp.full((2, 2), jnp.nan)}}, r"leaf \['w'\] of avoid holds NaN"),
        ({"points": [TWO[0], TWO[1] | {"b": jnp.array([1.0, jnp.inf])}]},
         r"leaf \['b'\] of points\[1\] holds NaN or an infinity"),
        ({"direction": ONES | {"b": jnp.array([1.0, jnp.nan])}}, r"leaf \['b'\] of direction"),
        ({"points": []}, "points is empty"),
    ],
)  # fmt: skip
def test_exit_ball_refuses(options, words, refuses):
    with refuses(ValueError, match=words):
        leave(**options)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"w": jnp.array([[1.0, 2.0], [0.0, 1.0]]), "b": 1.0}, r"\['w'\] is not symmetric, by 2"),
        ({"w": jnp.eye(3), "b": 1.0}, r"\['w'\] has shape \(3, 3\) for a leaf of shape \(2, 2\)"),
        ({"w": 1.0, "b": jnp.eye(2)}, r"\['b'\] is a matrix, but the leaf of shape \(2,\) is none"),
        ({"w": -jnp.eye(2), "b": 1.0}, r"\['w'\] has the eigenvalue -1 beside 0"),
        ({"w": -1.0, "b": 1.0}, r"\['w'\] must be finite and at least 0, got -1"),
        ({"w": jnp.full((2, 2), jnp.nan), "b": 1.0}, r"\['w'\] holds NaN"),
        ({"w": 1.0}, r"allow\[1\] must be a tree like the weights"),
    ],
)
def test_bad_allowances_are_refused(entry, words, refuses):
    with refuses(ValueError, match=words):
        leave(direction=ONES, allow=[None, entry])
    with refuses(ValueError, match=words):
        negative.retarget(TWO, (1, 1), ONES, allow=[None, entry])


def test_allowances_of_wrong_kind_or_count_are_refused(refuses):
    with refuses(ValueError, match="allow must have one entry for each of 2 points"):
        leave(direction=ONES, allow=[None])
    with refuses(TypeError, match=r"allow\[0\] at leaf \['w'\] is 'all': give 1.0"):
        leave(direction=ONES, allow=[{"w": "all", "b": 1.0}, None])
    with refuses(ValueError, match=r"of a shift of norm .*out of reach, most of it"):
        negative.retarget(TWO, (1, 1), ONES, allow=FROZEN)
    with refuses(ValueError, match="costs must be positive"):
        negative.retarget(TWO, (1, 1), ONES, costs=(0, 1))
    with refuses(ValueError, match=r"leaf \['w'\] of target holds NaN"):
        negative.retarget(TWO, (1, 1), ONES | {"w": jnp.full((2, 2), jnp.nan)})
    with refuses(TypeError, match="is a LowRank edit, not weights: add it to a base"):
        low = LowRank(jnp.ones((2, 1)), jnp.ones((2, 1)))
        negative.retarget(TWO, (1, 1), {"w": low, "b": jnp.ones(2)})


def test_what_is_undefined_is_nan_where_traced():
    assert is_nan(exit_ball(TWO, jnp.zeros(2), ONES, 9.0))
    assert is_nan(exit_ball(TWO, (1, 1), ONES, -1.0))
    assert is_nan(exit_ball(TWO, (1, 1), ONES, UNIT))
    assert is_nan(exit_ball(TWO, (1, 1), ONES, 9.0, costs=jnp.array([1.0, 0.0])))
    assert is_nan(exit_ball(TWO, (1, 1), ONES, 9.0, direction=ZERO))
    assert is_nan(jax.jit(lambda g: leave(direction=g, allow=FROZEN))(ONES))
    skew = jnp.array([[1.0, 2.0], [0.0, 1.0]])
    skewed = jax.jit(lambda p: leave(direction=ONES, allow=[None, {"w": p, "b": 1.0}]))(skew)
    assert is_nan(skewed[1]["w"])


def test_outside_the_ball_nothing_moves_whatever_the_direction():
    for direction in (None, ONES, ZERO):
        for leaving in (leave, jax.jit(leave)):
            assert_close(leaving(radius=0.5, direction=direction), TWO, units=0)


def test_on_the_sphere_nothing_moves_even_where_the_direction_leads_inward():
    x, zero = jnp.asarray([3.0, 4.0], FLOAT), jnp.zeros(2, FLOAT)
    for options in ({}, {"direction": -x}, {"direction": zero}, {"cone": cone.Sparse(1)}):
        moved = negative.exit_ball([x, x], (1, 1), zero, 5.0, **options)
        assert_close(moved, [x, x], units=0)


def test_a_short_way_out_keeps_its_digits():
    # (rho - e)(rho + e) / (slope + root), where root - slope would cancel.
    x, avoid = jnp.zeros(2, FLOAT), jnp.asarray([-3.0, 0.0], FLOAT)
    radius = float(jnp.asarray(3 + UNIT**0.75, FLOAT))
    for options in ({}, {"cone": cone.Sparse(1)}, {"direction": jnp.ones(2, FLOAT)}):
        (y,) = negative.exit_ball([x], (1,), avoid, radius, **options)
        way = np.ones(2) / np.sqrt(2) if "direction" in options else np.array([1.0, 0.0])
        gap, slope = (radius - 3) * (radius + 3), 3 * way[0]
        np.testing.assert_allclose(y, gap / (slope + np.sqrt(slope**2 + gap)) * way, rtol=64 * UNIT)


def test_the_rounding_of_the_average_is_that_of_its_terms_of_either_sign(refuses):
    big, zero = jnp.asarray([1.0, 0.0], FLOAT), jnp.zeros(2, FLOAT)
    with refuses(ValueError, match="is below the rounding of the points"):
        negative.exit_ball([big, big], (2, -1), zero, 150 * UNIT)  # 64 (2 + 1) roundings
    with refuses(ValueError, match="no way out is distinguished"):
        within = big + jnp.asarray([0.0, 150 * UNIT], FLOAT)
        negative.exit_ball([big, big], (2, -1), within, 1.0)
    near = big + jnp.asarray([0.0, 256 * UNIT], FLOAT)
    moved = negative.exit_ball([big, big], (2, -1), near, 1.0)
    assert abs(distance(mean(moved, (2, -1)), near) - 1) <= 256 * UNIT


@pytest.mark.parametrize("scale", [2.0**-20, 1.0, 2.0**20])
def test_a_direction_is_annihilated_below_the_sine_of_rounding_whatever_the_metric(scale):
    x = jnp.zeros((2, 1), FLOAT)
    line = scale * jnp.diag(jnp.asarray([1.0, 0.0], FLOAT))
    for frozen in (0.0, jnp.zeros((2, 2), FLOAT)):  # which both have the norm zero
        leave = functools.partial(negative.exit_ball, [x, x], (1, 1), x, 1.0, allow=[line, frozen])
        moved = leave(direction=jnp.asarray([[256 * UNIT], [1.0]], FLOAT))
        assert_close(moved, [jnp.asarray([[2.0], [0.0]], FLOAT), x], units=64)
        with pytest.raises(ValueError, match="that allow does not annihilate"):
            leave(direction=jnp.asarray([[16 * UNIT], [1.0]], FLOAT))


def test_a_frozen_leaf_stays_bit_for_bit():
    moved = leave(direction=ONES, allow=[{"w": 1.0, "b": 0.0}] * 2)
    for x, y in zip(TWO, moved, strict=True):
        assert_close(y["b"], x["b"], units=0)
        assert distance(x["w"], y["w"]) > 1


# exit_ball in a cone

CONES = {
    "rank": cone.Rank(1),
    "pooled": cone.PooledRank(2),
    "sparse": cone.Sparse(3),
    "mask": cone.Mask({"w": True, "b": False, "s": True, "k": False}),
}


EXITS = {
    name: jax.jit(
        lambda xs, c, avoid, radius, k, kind=kind: negative.exit_ball(
            xs, c, avoid, radius, cone=kind, costs=k
        )
    )
    for name, kind in CONES.items()
}


def norm_in_cone(name, gap):
    """The norm of the nearest edit in a cone, by numpy, of a tree of `LAYOUT`."""
    x = {k: np.asarray(v, np.float64) for k, v in gap.items()}
    if name == "mask":
        return np.linalg.norm([*x["w"].ravel(), *x["s"].ravel()])
    if name == "sparse":
        return np.linalg.norm(np.sort([abs(v) for leaf in x.values() for v in leaf.ravel()])[-3:])
    stacks = {"w": (1, 4, 3), "b": (1, 3, 1), "s": (2, 3, 2), "k": (1, 4, 3)}
    values = [np.linalg.svd(x[k].reshape(stacks[k]), compute_uv=False) for k in x]
    if name == "rank":
        return np.linalg.norm(np.concatenate([s[:, 0] for s in values]))
    return np.linalg.norm(np.sort(np.concatenate([s.ravel() for s in values]))[-2:])


@pytest.mark.parametrize("name", CONES)
@settings(max_examples=8)
@given(ball=balls(count=2, layout=LAYOUT))
def test_in_a_cone_the_average_leaves_by_the_least_edit_of_the_cone(name, ball):  # (ii L7, L8)
    xs, c, k, avoid, radius, gap = ball
    e, inside = np.linalg.norm(gap), norm_in_cone(name, like(gap, avoid))
    assume(inside > 1e-2 * e)
    moved = EXITS[name](xs, c, avoid, radius, k)
    if e >= radius:
        return assert_close(moved, xs, units=0)
    error = 64 * 2 * rounding(xs, moved, c, avoid)
    assert abs(distance(mean(moved, c), avoid) - radius) <= error
    shift = flat(mean(moved, c)) - flat(mean(xs, c))
    least = -inside + np.sqrt(inside**2 + radius**2 - e**2)
    assert abs(np.linalg.norm(shift) - least) <= error * (1 + radius / inside)
    changed = like(shift, avoid)
    if name == "mask":
        np.testing.assert_allclose([*changed["b"], *changed["k"].ravel()], 0, atol=error)
    elif name == "rank":
        for leaf in (changed["w"], *changed["s"], changed["k"].reshape(4, 3)):
            assert np.linalg.svd(np.asarray(leaf), compute_uv=False)[1] <= error
    else:
        limit = 3 if name == "sparse" else 100
        assert np.sum(np.abs(shift) > error) <= limit
    return None


def test_a_larger_rank_leaves_by_a_shorter_edit_and_full_rank_straight_out():  # (ii L8)
    rng = np.random.default_rng(0)
    x, y, avoid = (jnp.asarray(rng.normal(size=(5, 4)), FLOAT) for _ in range(3))
    far = float(distance(mean([x, y]), avoid))
    lengths = []
    for rank in (1, 2, 3, 4, 9):
        moved = negative.exit_ball([x, y], (1, 1), avoid, 2 * far, cone=cone.Rank(rank))
        shift = np.asarray(mean(moved), np.float64) - np.asarray(mean([x, y]), np.float64)
        values = np.linalg.svd(shift, compute_uv=False)
        assert (values[rank:] <= 64 * 2 * UNIT * size(*moved)).all()
        lengths.append(np.linalg.norm(shift))
    assert all(a > b for a, b in itertools.pairwise(lengths[:4]))
    assert abs(lengths[3] - far) <= 256 * UNIT * size(x, y, avoid)
    assert abs(lengths[4] - lengths[3]) <= 256 * UNIT * size(x, y, avoid)
    straight = negative.exit_ball([x, y], (1, 1), avoid, 2 * far)
    assert_close(moved, straight, units=256, scale=size(x, y, avoid))


def test_a_cone_that_says_nothing_of_the_way_out_is_refused():  # e_K = 0 < e
    xs = [jnp.asarray([3.0, 0.0], FLOAT), jnp.asarray([1.0, 0.0], FLOAT)]
    zero = jnp.zeros(2, FLOAT)
    across = cone.Mask(jnp.asarray([False, True]))
    for kind in (across, cone.Rank(0), cone.Sparse(0)):
        with pytest.raises(ValueError, match=r"2 from avoid, 0 of it in .* give a larger cone"):
            negative.exit_ball(xs, (1, 1), zero, 9.0, cone=kind)
        leaving = jax.jit(lambda x, kind=kind: negative.exit_ball(x, (1, 1), zero, 9.0, cone=kind))
        assert is_nan(leaving(xs))
        assert_close(negative.exit_ball(xs, (1, 1), zero, 1.0, cone=kind), xs, units=0)
    with pytest.raises(ValueError, match="direction excludes cone"):
        negative.exit_ball(xs, (1, 1), zero, 9.0, cone=cone.Rank(1), direction=xs[0])
    with pytest.raises(ValueError, match="allow needs a direction"):
        negative.exit_ball(xs, (1, 1), zero, 9.0, cone=cone.Rank(1), allow=[None, None])
    with pytest.raises(ValueError, match="no way out is distinguished: give a direction"):
        negative.exit_ball(xs, (1, 1), mean(xs), 9.0, cone=cone.Rank(1))


def test_a_displacement_is_in_the_cone_from_the_sine_of_rounding_on():  # e_K > 64 eps e
    zero, first = jnp.zeros(2, FLOAT), cone.Mask(jnp.asarray([True, False]))
    x = jnp.asarray([256 * UNIT, 1.0], FLOAT)
    (y,) = negative.exit_ball([x], (1,), zero, 2.0, cone=first)
    assert_close(y, jnp.asarray([np.sqrt(3), 1.0], FLOAT), units=64)
    with pytest.raises(ValueError, match="give a larger cone, or a direction"):
        negative.exit_ball([x.at[0].set(16 * UNIT)], (1,), zero, 2.0, cone=first)


# Scales


@pytest.mark.parametrize("k", [2.0**-120, 2.0**-60, 2.0**60, 2.0**120])
def test_costs_allowances_and_directions_count_by_ratio_and_where_they_point(k):
    rng = np.random.default_rng(0)
    x, y, avoid, way = ({"w": jnp.asarray(rng.normal(size=(4, 3)), FLOAT)} for _ in range(4))
    metric = jnp.asarray(np.diag([1.0, 0.5, 0.25, 0.0]), FLOAT)
    a, c, times = (0.3, 0.7), (0.3, 0.7), jnp.asarray(k, FLOAT)
    scaled = tuple(k * w for w in c)
    pairs = [
        ({"costs": c}, {"costs": scaled}),
        ({"costs": c, "cone": cone.Rank(1)}, {"costs": scaled, "cone": cone.Rank(1)}),
        ({"direction": way}, {"direction": tree.combine((k,), (way,))}),
        (
            {"direction": way, "allow": [{"w": metric}, {"w": 1.0}]},
            {"direction": way, "allow": [{"w": times * metric}, {"w": k}]},
        ),
    ]
    for options, others in pairs:
        wanted = negative.exit_ball([x, y], a, avoid, 20.0, **options)
        got = negative.exit_ball([x, y], a, avoid, 20.0, **others)
        assert_close(got, wanted, units=16, scale=size(*wanted))
        assert abs(distance(mean(got, a), avoid) - 20) <= 64 * UNIT * size(*got, avoid)
    goal = {"w": jnp.asarray(np.diag([1, 1, 1, 0]) @ np.asarray(way["w"]), FLOAT)}
    allow = [{"w": metric}, None]
    wanted = negative.retarget([x, y], a, goal, costs=c, allow=allow)
    scaled_allow = [{"w": times * metric}, {"w": k}]
    got = negative.retarget([x, y], a, goal, costs=scaled, allow=scaled_allow)
    assert_close(got, wanted, units=256, scale=size(*wanted, goal))


@pytest.mark.parametrize("k", [2.0**-110, 2.0**-70, 2.0**70, 2.0**110])
def test_all_lengths_may_be_of_any_scale(k):
    rng = np.random.default_rng(1)
    xs = [{"w": jnp.asarray(rng.normal(size=(4, 3)), FLOAT)} for _ in range(2)]
    avoid, way = ({"w": jnp.asarray(rng.normal(size=(4, 3)), FLOAT)} for _ in range(2))

    def grown(x):
        return jax.tree.map(lambda leaf: leaf * jnp.asarray(k, leaf.dtype), x)

    for options in ({}, {"direction": way}, {"cone": cone.Rank(1)}):
        wanted = negative.exit_ball(xs, (1, 2), avoid, 20.0, **options)
        got = negative.exit_ball(list(map(grown, xs)), (1, 2), grown(avoid), 20 * k, **options)
        assert_close(got, list(map(grown, wanted)), units=4)
    with pytest.raises(ValueError, match="out of reach"):
        negative.retarget(list(map(grown, xs)), (1, 2), grown(avoid), allow=[{"w": 0.0}] * 2)
    raised = negative.guard_hull(list(map(grown, xs)), grown(avoid), 20 * k, normal=way)
    wanted = negative.guard_hull(xs, avoid, 20.0, normal=grown(way))
    assert_close(raised, list(map(grown, wanted)), units=4)


def test_a_radius_that_no_arithmetic_holds_is_refused(refuses):
    x = jnp.ones(2, jnp.float32)
    for radius in (1e300, 1e-300):
        with refuses(ValueError, match="radius .* is below the rounding of the points|out"):
            negative.exit_ball([x], (1,), 2 * x, radius)
    for bad in (jnp.inf, jnp.nan, -1.0):
        call = jax.jit(lambda r: negative.exit_ball([x], (1,), 2 * x, r))
        assert is_nan(call(jnp.asarray(bad)))
        assert is_nan(jax.jit(lambda c: negative.retarget([x], (1,), x, costs=c))(jnp.array([bad])))


@pytest.mark.parametrize(
    ("a", "c"),
    [
        ((0.9999, 1e-4), (1, 1)),
        ((1e-4, 0.9999), (1, 1)),
        ((0.5, 0.5), (1, 1e7)),
        ((0.5, 0.5), (1e-9, 1)),
        ((1.001, -1e-3), (1, 100)),
    ],
)
def test_what_the_spaces_span_together_is_reached_whatever_the_weights(a, c):
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    allow = [{"w": jnp.asarray(v @ v.T, FLOAT)} for v in (q[:, :4], q[:, 4:])]
    xs = [{"w": jnp.asarray(rng.normal(size=(8, 3)), FLOAT)} for _ in allow]
    goal = {"w": jnp.asarray(rng.normal(size=(8, 3)), FLOAT)}
    for function in (negative.retarget, retarget):
        moved = function(xs, a, goal, costs=c, allow=allow)
        scale = abs(normalized(a)) @ [size(x) + size(y) for x, y in zip(xs, moved, strict=True)]
        off = flat(goal) - normalized(a) @ [flat(y) for y in moved]
        assert np.linalg.norm(off) <= 64 * UNIT * (scale + size(goal))


def test_the_step_along_a_direction_has_its_second_derivative_at_the_center():
    # rho - s d^2 / 2 with the slope of E along the way: from t = sqrt(s^2 + rho^2 - |E|^2) - s.
    rng = np.random.default_rng(0)
    z, y, g = (rng.normal(size=6) for _ in range(3))
    unit = g / np.linalg.norm(g)
    along, square = y @ unit / 2, y @ y / 4
    center, other, way = (jnp.asarray(v, FLOAT) for v in (z, y, g))

    def length(s):
        xs = [center + s * other, center]
        moved = negative.exit_ball(xs, (0.5, 0.5), center, 2.0, direction=way)
        return (moved[1] - center) @ jnp.asarray(unit, FLOAT)

    second = jax.jit(jax.grad(jax.grad(length)))(jnp.zeros((), FLOAT))
    np.testing.assert_allclose(second, (along**2 - square) / 2.0, rtol=1e3 * UNIT)


@pytest.mark.parametrize("k", [1e-60, 1e60])
def test_allowances_of_numpy_that_float32_does_not_hold_count_by_ratio(k):
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(4, 3)))[0]
    *xs, way = [jnp.asarray(x, FLOAT) for x in rng.normal(size=(3, 4, 2))]
    for allow in ([2.0, 1.0], [basis @ basis.T, 1.0]):
        scaled = [k * entry for entry in allow]
        for guard in (
            lambda allow: negative.retarget(xs, [0.5, 0.5], way, allow=allow),
            lambda allow: negative.guard_hull(xs, 0 * way, 9.0, normal=way, allow=allow),
        ):
            for got, wanted in zip(guard(scaled), guard(allow), strict=True):
                assert_close(got, wanted, units=64)


def test_a_way_out_whose_squares_are_lost_beside_the_radius_is_none(refuses):
    zero = jnp.zeros(2, jnp.float32)
    for length in (1e-11, 1e-15, 1e-19):
        # The square of 0.9e-19 is zero, that of 1.2e-19 is not.
        x = length * jnp.array([1.2, 0.9], jnp.float32)
        if length > 1e-12:
            (moved,) = negative.exit_ball([x], [1.0], zero, 1.0)
            np.testing.assert_allclose(moved, [0.8, 0.6], rtol=1e-6)
            continue
        with refuses(ValueError, match="no way out is distinguished"):
            negative.exit_ball([x], [1.0], zero, 1.0)
        assert is_nan(exit_ball([x], [1.0], zero, 1.0))
