"""Laws of `wspace.negative.spread`: harden and split_rank.

Numbers such as (ii L11) are those of the laws in the docs page on the negative weight.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.helpers import is_nan
from tests.strategies import FLOAT, UNIT
from wspace import lowrank, negative, tree
from wspace.lowrank import LowRank
from wspace.testing import assert_close, matrices, size


@pytest.mark.parametrize("shape", [(6, 4), (3, 7), (2, 4, 3), (2, 2, 3)])
@given(data=st.data())
def test_harden_flattens_within_the_spaces_at_the_same_norm(shape, data):  # (ii L11)
    edit = data.draw(matrices(shape))
    flat_edit = jax.jit(negative.harden)(edit)
    stack = np.asarray(edit, np.float64).reshape(-1, *shape[-2:])
    flats = np.asarray(flat_edit, np.float64).reshape(-1, *shape[-2:])
    for before, after in zip(stack, flats, strict=True):
        norm = np.linalg.norm(before)
        u, values, vt = np.linalg.svd(before, full_matrices=False)
        kept = values > max(before.shape) * UNIT * values[0]
        assume(not (~kept & (values > UNIT / 8 * values[0])).any())
        assume(not (kept & (values < 1e3 * UNIT * values[0])).any())
        k = kept.sum()
        smallest = values[kept][-1] / values[0]
        wanted = norm / np.sqrt(k) * u[:, kept] @ vt[kept]
        np.testing.assert_allclose(after, wanted, atol=64 * UNIT * norm / smallest)
        assert abs(np.linalg.norm(after) - norm) <= 64 * UNIT * norm
        level = np.linalg.svd(after, compute_uv=False)
        for r in range(k + 1):
            tail = np.sqrt(np.sum(level[r:] ** 2))
            assert abs(tail - norm * np.sqrt(1 - r / k)) <= 64 * np.sqrt(k) * UNIT * norm
            assert tail >= np.sqrt(np.sum(values[r:] ** 2)) - 64 * np.sqrt(k) * UNIT * norm
    again = jax.jit(negative.harden)(flat_edit)
    assert_close(again, flat_edit, units=64, scale=float(np.linalg.norm(stack)))


def test_harden_leaves_vectors_and_zeros_alone(refuses):
    edit = {"b": jnp.ones(3), "s": jnp.ones(()), "z": jnp.zeros((2, 3)), "e": jnp.ones((0, 2))}
    assert_close(negative.harden(edit), edit, units=0)
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 3, 4)), FLOAT)
    wanted = negative.harden(kernel.reshape(12, 4)).reshape(2, 2, 3, 4)
    assert_close(negative.harden(kernel), wanted)
    for rtol in (0, 1, -1.0):
        with refuses(ValueError, match="rtol must be between 0 and 1"):
            negative.harden(edit, rtol=rtol)
    with refuses(ValueError, match=r"leaf \['b'\] of edit holds NaN"):
        negative.harden({"b": jnp.array([jnp.nan])})
    with refuses(ValueError, match="reshape it to two or three dimensions"):
        negative.harden(jnp.ones((1, 1, 1, 1, 2, 2)))


def test_harden_leaves_out_what_is_below_rtol():
    edit = jnp.diag(jnp.array([1.0, 0.5, 1e-3]))
    flat_edit = negative.harden(edit, rtol=1e-2)
    level = np.sqrt(1.25 + 1e-6) / np.sqrt(2)
    np.testing.assert_allclose(flat_edit, np.diag([level, level, 0]), atol=1e-6)


def test_every_matrix_of_a_stack_is_cut_by_its_own_largest_value_and_what_is_on_the_cut_goes():
    one = np.diag([4.0, 2.0, 1.0])
    stack = jnp.asarray([one, 2.0**-12 * one], FLOAT)
    for rtol, k in ((0.5, 1), (0.49, 2), (0.25, 2), (0.24, 3)):  # above the cut, not at it
        level = np.sqrt(21 / k) * np.diag(np.arange(3) < k)
        flat_edit = negative.harden(stack, rtol=rtol)
        np.testing.assert_allclose(flat_edit[0], level, rtol=64 * UNIT)
        np.testing.assert_allclose(flat_edit[1], 2.0**-12 * level, rtol=64 * UNIT)


def test_a_traced_threshold_out_of_its_domain_is_nan():
    x = jnp.diag(jnp.array([3.0, 1.0]))
    for rtol in (2.0, -1.0):
        assert is_nan(jax.jit(lambda t: negative.harden(x, rtol=t))(rtol))


@pytest.mark.parametrize("shape", [(64, 2), (2, 64)])
def test_by_default_what_is_left_out_is_rounding_of_the_longer_side(shape):
    for ratio, k in ((16 * UNIT, 1), (256 * UNIT, 2)):
        edit = jnp.zeros(shape, FLOAT).at[0, 0].set(1).at[1, 1].set(ratio)
        values = np.linalg.svd(np.asarray(negative.harden(edit), np.float64), compute_uv=False)
        np.testing.assert_allclose(values[:k], np.sqrt(1 / k), rtol=64 * UNIT)
        np.testing.assert_array_equal(values[k:], 0)
        (part,) = dense({"w": edit}, negative.split_rank({"w": edit}, (1,), (2,)))
        np.testing.assert_array_equal(part["w"][1, 1] > 0, k == 2)


# split_rank

SPLITS = [
    ((0.5, 0.5), (2, 1), None),
    ((0.7, -0.2, 0.5), (1, 2, 1), (1.0, 4.0, 0.5)),
    ((1.0, 3.0), (1, 2), None),
]


@st.composite
def shifts(draw, rank):
    """Shifts with matrices, stacks and convolutions of rank at most `rank`, and a vector."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    scale = draw(st.sampled_from([2.0**-20, 1.0, 2.0**20]))
    spectrum = draw(st.sampled_from([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0], [5.0, 0.5, 0.0], [0.0] * 3]))

    def matrix(*shape):
        *stack, m, n = shape
        left = np.linalg.qr(rng.normal(size=(*stack, m, rank)))[0]
        right = np.linalg.qr(rng.normal(size=(*stack, n, rank)))[0]
        values = scale * np.array(spectrum[:rank])
        return jnp.asarray((left * values) @ np.swapaxes(right, -1, -2), FLOAT)

    return {
        "w": matrix(6, 4),
        "s": matrix(2, 4, 3),
        "k": matrix(6, 4).reshape(3, 1, 2, 4),
        "b": jnp.asarray(scale * rng.normal(size=3), FLOAT),
        "e": jnp.zeros((0, 2), FLOAT),
    }


def dense(shift, edits):
    zero = jax.tree.map(jnp.zeros_like, shift)
    return [lowrank.apply(zero, edit) for edit in edits]


def ranks_of(edit, least):
    matrices = edit["w"], edit["s"], edit["k"].reshape(6, 4)
    values = [np.linalg.svd(np.asarray(m, np.float64), compute_uv=False) for m in matrices]
    return [np.max(np.sum(v > least, axis=-1)) for v in values]


@pytest.mark.parametrize(("a", "ranks", "costs"), SPLITS)
@settings(max_examples=8)
@given(data=st.data())
def test_ranks_that_add_up_split_a_shift_over_the_points(a, ranks, costs, data):  # (ii L12)
    shift = data.draw(shifts(min(sum(ranks), 3)))
    edits = negative.split_rank(shift, a, ranks, costs=costs, rtol=2.0**-16)
    parts = dense(shift, edits)
    norm = size(shift)
    share = np.array(a) / np.sum(a)
    error = (
        64 * np.sqrt(4) * UNIT * sum(abs(w) * size(p) for w, p in zip(share, parts, strict=True))
    )
    landed = tree.combine(list(map(float, share)), parts)
    assert size(tree.combine((1, -1), (landed, shift))) <= error
    for edit, part, r in zip(edits, parts, ranks, strict=True):
        assert max(ranks_of(part, 1e3 * UNIT * norm)) <= r
        assert edit["w"].rank == min(r, 4)
        assert edit["s"].rank == min(r, 3)


@settings(max_examples=8)
@given(data=st.data())
def test_ranks_of_the_whole_shift_are_retarget(data):  # (ii L12, ii L2)
    a, costs, shift = (0.7, -0.2, 0.5), (1.0, 4.0, 0.5), data.draw(shifts(3))
    zero = jax.tree.map(jnp.zeros_like, shift)
    wanted = negative.retarget([zero] * 3, a, shift, costs=costs)
    got = dense(shift, negative.split_rank(shift, a, (9, 9, 9), costs=costs, rtol=2.0**-16))
    assert_close(got, wanted, units=256, scale=size(*wanted))


def test_dealing_the_triples_out_otherwise_costs_more():
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(rng.normal(size=(5, 3)))
    p, _ = np.linalg.qr(rng.normal(size=(4, 3)))
    values = np.array([4.0, 2.0, 1.0])
    shift = jnp.asarray(q * values @ p.T, FLOAT)
    a, c, ranks = np.array([0.2, 0.8]), np.array([1.0, 2.0]), (1, 2)
    edits = dense(shift, negative.split_rank(shift, tuple(a), ranks, costs=tuple(c)))
    cost = sum(k * size(e) ** 2 for k, e in zip(c, edits, strict=True))
    worth = a**2 / c
    others = [
        sum(values[j] ** 2 / worth[i] for j, i in enumerate(owner))
        for owner in itertools.permutations([0, 1, 1])
    ]
    assert abs(cost - min(others)) <= 1e3 * UNIT * cost
    assert max(others) > 1.5 * cost


@pytest.mark.parametrize(
    ("a", "ranks", "costs"),
    [
        ((0.7, -0.2, 0.5), (2, 2, 1), (1.0, 0.01, 0.5)),
        ((0.2, 0.9, -0.1), (1, 3, 2), (1.0, 4.0, 0.5)),
        ((0.5, 0.0, 0.5), (2, 7, 3), (1.0, 1.0, 8.0)),
        ((0.25, 0.75), (9, 1), (1.0, 2.0)),
    ],
)
def test_each_point_takes_its_triples_of_every_matrix_in_turn(a, ranks, costs):  # (ii L12)
    # In diagonal matrices the triples are the entries, so that the formula can be read off.
    diagonals = np.array([[8.0, 4.0, 2.0, 1.0], [5.0, 3.0, 0.0, 0.0], [6e-4, 5e-4, 4e-4, 0.0]])
    shift = jnp.asarray([np.diag(row) for row in diagonals], FLOAT)
    worth, taken = np.array(a) ** 2 / np.array(costs), np.zeros((len(a), *diagonals.shape), bool)
    for m, row in enumerate(diagonals):
        k, start = np.count_nonzero(row), 0
        for i in sorted(range(len(a)), key=lambda i: -worth[i]):
            if a[i]:
                taken[i, m, [(start + j) % k for j in range(min(ranks[i], k))]] = True
                start += ranks[i]
    total = np.sum(worth[:, None, None] * taken, axis=0)
    edits = negative.split_rank(shift, a, ranks, costs=costs, rtol=1e-3)
    for i, edit in enumerate(edits):
        wanted = np.where(taken[i], a[i] / costs[i] / np.where(total, total, 1), 0) * diagonals
        got = np.asarray(lowrank.materialize(edit), np.float64)
        for x, y in zip(got, wanted, strict=True):
            np.testing.assert_allclose(x, np.diag(y), atol=64 * UNIT * abs(y).max())


def test_what_is_on_the_cut_is_left_out_and_what_is_above_it_needs_a_rank():
    shift = jnp.diag(jnp.asarray([4.0, 2.0, 1.0], FLOAT))
    for rtol, k in ((0.5, 1), (0.25, 2)):
        (edit,) = negative.split_rank(shift, (1,), (k,), rtol=rtol)
        wanted = np.where(np.arange(3) < k, np.diag(shift), 0)
        np.testing.assert_allclose(lowrank.materialize(edit), np.diag(wanted), atol=64 * UNIT * 4)
        with pytest.raises(ValueError, match=f"has rank {k}, .* sum to {k - 1}"):
            negative.split_rank(shift, (1,), (k - 1,), rtol=rtol)


def test_a_shift_of_twice_the_rank_is_made_by_two_points_of_that_rank():
    # Why the cost of exit_ball in a cone of low rank is least only among edits sharing factors.
    shift = jnp.diag(jnp.asarray([2.0, 1.0], FLOAT))
    edits = dense(shift, negative.split_rank(shift, (0.5, 0.5), (1, 1)))
    for edit in edits:
        assert np.linalg.matrix_rank(np.asarray(edit)) == 1
    assert_close(tree.combine((0.5, 0.5), edits), shift)


def test_more_rank_than_the_points_have_is_refused(refuses):
    shift = {"w": jnp.diag(jnp.asarray([3.0, 4.0, 5.0], FLOAT)), "b": jnp.ones(2, FLOAT)}
    words = r"leaf \['w'\] of shift has rank 3, .* sum to 2: 3 of the shift would be left"
    with pytest.raises(ValueError, match=words):
        negative.split_rank(shift, (0.5, 0.5), (1, 1))
    with pytest.raises(ValueError, match=r"sum to 1: 5 of the shift"):
        negative.split_rank(shift, (1.0, 0.0), (1, 7))  # the second cannot move the average
    with pytest.raises(ValueError, match=r"leaf \['b'\] of shift has rank 1, .* sum to 0"):
        negative.split_rank({"b": shift["b"]}, (0.5, 0.5), (0, 0))
    split = jax.jit(lambda x: dense(x, negative.split_rank(x, (0.5, 0.5), (1, 1))))
    assert is_nan([x["w"] for x in split(shift)])
    with refuses(ValueError, match=r"ranks\[1\] must be at least 0"):
        negative.split_rank(shift, (0.5, 0.5), (3, -1))
    with refuses(ValueError, match="ranks has 1 numbers for 2 coefficients"):
        negative.split_rank(shift, (0.5, 0.5), (3,))
    with refuses(ValueError, match="make it differ from zero"):
        negative.split_rank(shift, (1, -1), (3, 3))
    with refuses(ValueError, match="costs must be positive"):
        negative.split_rank(shift, (1, 1), (3, 3), costs=(1, 0))
    with refuses(ValueError, match="rtol must be between 0 and 1"):
        negative.split_rank(shift, (1, 1), (3, 3), rtol=2.0)
    with refuses(ValueError, match=r"leaf \['w'\] of shift holds NaN"):
        negative.split_rank({"w": jnp.full((2, 2), jnp.nan)}, (1, 1), (3, 3))
    with refuses(TypeError, match="ranks.0. must be a plain integer"):
        negative.split_rank(shift, (1, 1), (1.5, 3))


def test_rank_below_rtol_is_rounding_and_left_out():
    shift = jnp.diag(jnp.asarray([1.0, 0.5, 1e-4], FLOAT))
    edits = dense(shift, negative.split_rank(shift, (0.5, 0.5), (1, 1), rtol=1e-3))
    landed = tree.combine((0.5, 0.5), edits)
    np.testing.assert_allclose(landed, np.diag([1.0, 0.5, 0.0]), atol=8 * UNIT)


def test_factors_are_split_without_their_product():
    shift = LowRank(
        jnp.asarray([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]], FLOAT), jnp.eye(2, dtype=FLOAT)
    )
    edits = negative.split_rank(shift, (0.5, 0.5), (1, 1))
    landed = tree.combine((0.5, 0.5), [lowrank.materialize(e) for e in edits])
    assert_close(landed, lowrank.materialize(shift), units=16)


@pytest.mark.parametrize("price", [1e-50, 1e-20, 1.0, 1e20, 1e50])
def test_edits_depend_on_the_ratios_of_costs_alone(price):
    shift = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
    a, ranks = np.array([0.5, 0.3, 0.2]), (2, 2, 1)
    for ratios in ((1.0, 2.0, 3.0), (1.0, 1e12, 1e24)):
        given = [price * c for c in ratios]
        edits = negative.split_rank(shift, a, ranks, costs=given)
        total = sum(
            k * lowrank.materialize(edit) for k, edit in zip(a.tolist(), edits, strict=True)
        )
        np.testing.assert_allclose(total, shift, atol=1e-5)


@pytest.mark.parametrize("power", [-100, 100])
def test_a_hardened_edit_keeps_its_norm_at_every_scale(power):
    edit = jnp.asarray(np.diag([4.0, 3.0, 1.0]).astype(np.float32) * np.float32(2.0**power))
    flat = np.asarray(negative.harden(edit), float) / 2.0**power
    np.testing.assert_allclose(np.linalg.svd(flat)[1], np.sqrt(26 / 3), rtol=1e-5)


@pytest.mark.parametrize("k", [1e-50, 2.0**-120, 2.0**120, 1e50])
def test_the_costs_of_a_split_count_by_ratio(k):
    shift = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), FLOAT)
    c = np.array([1.0, 3.0])
    for ranks in ((2, 1), (3, 3), (2, 2)):
        wanted = negative.split_rank(shift, (0.3, 0.7), ranks, costs=c)
        got = negative.split_rank(shift, (0.3, 0.7), ranks, costs=k * c)
        for x, y in zip(wanted, got, strict=True):
            scale = np.linalg.norm(lowrank.materialize(x))
            np.testing.assert_allclose(
                lowrank.materialize(y), lowrank.materialize(x), atol=64 * UNIT * scale
            )
