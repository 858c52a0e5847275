"""The degenerate cases of the negative weight, one by one, as the docs page lists them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import is_nan
from tests.strategies import FLOAT
from wspace import average, cone, geometry, lowrank, negative
from wspace.testing import assert_close

A, C = jnp.asarray([3.0, 4.0], FLOAT), jnp.asarray([1.0, -2.0], FLOAT)
ZERO = jnp.zeros(2, FLOAT)
EYE = jnp.eye(3, 2, dtype=FLOAT)


def number(x):
    return jnp.asarray(x, FLOAT)


def test_equal_points_have_equal_averages_and_one_distance():  # A = C
    report = negative.audit([A, A], (0.5, 0.5), ZERO, 1.0)
    assert_close(average.mean([A, A], (3.0, -1.0)), A)
    for distance in (report.distance, report.segment_distance, report.line_distance):
        assert_close(distance, number(5.0))
    for mode in ("convex", "affine"):
        assert_close(negative.guard_hull([A, A], ZERO, 10.0, mode=mode), [2 * A, 2 * A])


X = jnp.asarray([[-0.0, 1.0], [2.0, -0.0]], FLOAT)
B = jnp.asarray([[1.0, 0.0], [1.0, 3.0]], FLOAT)
FREE, AWAY, UNIT_B = jnp.eye(2, dtype=FLOAT), B - 100, B / jnp.sqrt(jnp.asarray(11.0, FLOAT))
UNCHANGED = {
    "repel, s = 0": lambda: negative.repel(X, B, 0.0),
    "repel, s = 0, traced": lambda: jax.jit(negative.repel)(X, B, 0.0),
    "repel from itself": lambda: negative.repel(X, X, 2.5),
    "repel, s = 0, allow": lambda: negative.repel(X, B, 0.0, allow=FREE),
    "repel, frozen": lambda: negative.repel(X, B, 2.0, allow=0.0),
    "guide, g = 0": lambda: negative.guide(X, B, X, 0.0),
    "guide, p = n": lambda: negative.guide(X, B, B, 2.0),
    "attenuate, g = 0": lambda: negative.attenuate(X, [UNIT_B], 0.0, center=B),
    "attenuate, g = 0, sides": lambda: negative.attenuate(X, negative.Sides(FREE[:, :1]), 0.0),
    "attenuate, frozen": lambda: negative.attenuate(X, negative.Sides(0.0), 1.0),
    "retarget, a = 0": lambda: negative.retarget([X, B], (0, 1), AWAY)[0],
    "retarget, a = 0, allow": lambda: negative.retarget([X, B], (0, 1), AWAY, allow=[FREE] * 2)[0],
    "retarget, frozen": lambda: negative.retarget([X, B], (1, 1), AWAY, allow=[0.0, FREE])[0],
    "exit_ball, outside": lambda: negative.exit_ball([X, B], (1, 1), AWAY, 9.0)[0],
    "exit_ball, outside, in a cone": lambda: negative.exit_ball(
        [X, B], (1, 1), AWAY, 9.0, cone=cone.Rank(1)
    )[0],
    "exit_ball, outside, allow": lambda: negative.exit_ball(
        [X, B], (1, 1), AWAY, 9.0, direction=B, allow=[FREE] * 2
    )[0],
    "exit_ball, a = 0": lambda: negative.exit_ball([X, B], (0, 1), B - 1, 9.0)[0],
    "guard_hull, high enough": lambda: negative.guard_hull([X, B], AWAY, 9.0)[0],
    "guard_hull, high enough, allow": lambda: negative.guard_hull(
        [X, B], AWAY, 9.0, allow=[FREE] * 2
    )[0],
    "gate, outside": lambda: negative.gate(X, AWAY, B, 1.0),
}


@pytest.mark.parametrize("unchanged", UNCHANGED.values(), ids=UNCHANGED)
def test_what_does_not_move_keeps_the_sign_of_zero(unchanged):
    got = np.asarray(unchanged())
    assert np.array_equal(got, X)
    assert np.array_equal(np.signbit(got), np.signbit(X))


def test_strength_zero_keeps_what_is_too_far_or_too_small_for_arithmetic():
    top, least = float(jnp.finfo(FLOAT).max), float(jnp.finfo(FLOAT).tiny)
    x = jnp.asarray([top, -top, 1.5 * least], FLOAT)
    assert np.array_equal(negative.repel(x, -x, 0.0), x)
    assert np.array_equal(negative.guide(x, x, -x, 0.0), x)
    assert_close(negative.repel(x, -x, -0.5)[:2], 0 * x[:2], units=0)
    rate = jax.grad(lambda s: negative.repel(X, B, s).sum())(jnp.zeros((), FLOAT))
    assert_close(rate, (X - B).sum(), units=8)


def test_at_the_average_repel_does_nothing_and_exit_needs_a_direction():  # B = average
    middle = average.mean([A, C])
    assert_close(negative.repel(middle, middle, 3.0), middle, units=0)
    with pytest.raises(ValueError, match="no way out is distinguished: give a direction"):
        negative.exit_ball([A, C], (1, 1), middle, 1.0)
    assert is_nan(jax.jit(negative.exit_ball)([A, C], (1, 1), middle, 1.0))
    moved = negative.exit_ball([A, C], (1, 1), middle, 1.0, direction=A)
    assert_close(geometry.distance(average.mean(moved), middle), number(1.0), units=32)


@pytest.mark.parametrize("coefficients", [(1.0, -1.0), (1.0, -1.0 + 1e-7), (0.0, 0.0)])
def test_coefficients_that_cancel_are_refused_and_never_replaced(coefficients):
    for function in (
        lambda a: average.mean([A, C], a),
        lambda a: negative.retarget([A, C], a, ZERO),
        lambda a: negative.exit_ball([A, C], a, ZERO, 9.0),
        lambda a: negative.audit([A, C], a, ZERO, 1.0).margin,
        lambda a: lowrank.apply(A, negative.split_rank(C, a, (1, 1))[0]),
    ):
        with pytest.raises(ValueError, match="make it differ from zero"):
            function(coefficients)
        assert is_nan(jax.jit(function)(jnp.asarray(coefficients)))


def test_the_pole_of_the_negative_weight_is_refused_and_every_strength_is_not():  # v -> 1
    for weight in (1.0, 1.5):
        with pytest.raises(ValueError, match="weight must be finite and below 1"):
            negative.strength_of(weight)
        assert is_nan(jax.jit(negative.strength_of)(weight))
    assert_close(negative.repel(A, C, -1.0), C)  # lands on it
    assert_close(negative.repel(A, C, -2.0), 2 * C - A)  # and beyond
    with pytest.raises(ValueError, match="coefficient must be finite and not 1"):
        negative.remove_member(A, C, 1.0)


def test_a_zero_leaf_has_no_tail_no_rank_and_no_angle():
    zero = {"w": jnp.zeros((3, 2), FLOAT), "b": ZERO}
    cut = lowrank.truncate(zero["w"], 1)
    assert cut.tail == 0
    assert lowrank.stable_rank(zero["w"]) == lowrank.effective_rank(zero["w"]) == 0
    assert geometry.angle(ZERO, A) == 0
    assert_close(negative.harden(zero), zero, units=0)
    assert_close(negative.erase_keeping(A, [ZERO], [C]), A, units=0)


def test_a_cone_orthogonal_to_the_displacement():  # e_K = 0 < e
    across, gap = cone.Mask(jnp.asarray([False, True])), jnp.asarray([3.0, 0.0], FLOAT)
    with pytest.raises(ValueError, match="no way out is distinguished"):
        cone.exit(across, gap, 9.0)
    assert cone.entry(across, gap, 2.0).norm == np.inf  # infeasible
    assert is_nan(cone.entry(across, gap, 2.0).edit)
    assert cone.entry(across, gap, 3.0).norm == 0  # feasible if and only if e <= radius


def test_a_radius_of_zero_asks_for_everything_and_a_large_one_for_nothing():
    assert cone.entry(cone.Rank(1), EYE, 0.0).norm == np.inf
    assert_close(cone.entry(cone.Rank(2), EYE, 0.0).norm, number(np.sqrt(2.0)))
    assert cone.entry(cone.Rank(1), EYE, 9.0).norm == 0
    report = negative.audit([EYE], (1,), jnp.zeros((3, 2), FLOAT), 9.0)
    assert (report.margin, report.rank_needed, report.ceiling, report.efficiency) == (0, 0, 0, 0)


def test_rank_zero_is_nothing_and_full_rank_everything_exactly():
    target = EYE * 3
    for rank in (2, 99):
        edit = negative.offset(EYE, target, rank)
        assert edit.tail == 0
        assert_close(lowrank.apply(EYE, edit.factors), target)
    nothing = negative.offset(EYE, target, 0)
    assert_close(lowrank.apply(EYE, nothing.factors), EYE, units=0)
    assert_close(nothing.tail, geometry.distance(EYE, target))
    with pytest.raises(ValueError, match="no edit of the cone is distinguished"):
        negative.exit_ball([EYE], (1,), -EYE, 99.0, cone=cone.Rank(0))


def test_repeated_singular_values_have_one_tail_and_a_gradient_by_values():
    tail = negative.offset(jnp.zeros((3, 2), FLOAT), EYE, 1).tail
    assert_close(tail, number(1.0))
    slope = jax.grad(lambda x: negative.curve(jnp.zeros((3, 2), FLOAT), x)[0])(EYE)
    assert_close(slope, EYE / float(np.sqrt(2.0)), units=32)


def test_a_vector_is_free_to_retarget_and_of_rank_one_to_audit():
    moved = negative.retarget([A, C], (0.5, 0.5), ZERO)
    assert_close(average.mean(moved), ZERO, scale=5)
    report = negative.audit([A], (1,), ZERO, 1.0)
    assert report.rank_needed == report.pooled_rank_needed == 1
    assert report.leaves[0].matrix_shape == (2, 1)
    assert negative.audit([jnp.asarray(5.0)], (1,), number(1.0), 1.0).rank_needed == 1


def test_a_convolution_is_audited_as_fan_in_by_outputs_and_says_so():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 2, 5)), FLOAT)
    (leaf,) = negative.audit([kernel], (1,), jnp.zeros_like(kernel), 1.0).leaves
    assert (leaf.shape, leaf.matrix_shape) == ((3, 3, 2, 5), (18, 5))
    values = np.linalg.svd(np.asarray(kernel).reshape(18, 5), compute_uv=False)
    np.testing.assert_allclose(leaf.singular_values, values, rtol=1e-5)
    assert "18 x 5" in str(negative.audit([kernel], (1,), jnp.zeros_like(kernel), 1.0))


def test_a_stack_is_audited_slice_by_slice():
    stack = jnp.stack([EYE, 2 * EYE])
    report = negative.audit([stack], (1,), jnp.zeros_like(stack), 2.3)
    assert report.leaves[0].singular_values.shape == (2, 2)
    np.testing.assert_allclose(report.leaves[0].stable_rank, [2, 2], rtol=1e-6)
    assert report.rank_needed == 1  # in each slice, where one flattening would have rank 2 in all
    assert report.pooled_rank_needed == 2


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_widened_rounded_last_and_reported(dtype):
    x = [jnp.asarray([1.0, 3.0], dtype), jnp.asarray([1.0 + 2**-7, 3.0 + 2**-6], dtype)]
    moved = negative.guard_hull(x, jnp.zeros(2, dtype), 9.0)
    wide = negative.guard_hull([y.astype(FLOAT) for y in x], ZERO, 9.0)
    assert_close(moved, [y.astype(dtype) for y in wide], units=0)
    report = negative.audit(x, (0.7, 0.3), jnp.zeros(2, dtype), 1.0)
    mean = np.array([1.0 + 0.3 * 2**-7, 3.0 + 0.3 * 2**-6])
    floor = np.linalg.norm(np.asarray(jnp.asarray(mean, dtype), float) - mean)
    np.testing.assert_allclose(report.dtype_floor, floor, rtol=1e-2)
    assert floor > 0


@pytest.mark.parametrize("leaf", [jnp.arange(2), jnp.ones(2, bool), jax.random.key(0)])
def test_leaves_that_are_no_weights_are_refused_by_name(leaf, refuses):
    tree = {"w": ZERO, "n": leaf}
    for function in (
        lambda: negative.audit([tree], (1,), tree, 1.0),
        lambda: negative.guard_hull([tree], tree, 1.0),
        lambda: negative.attenuate(tree, [tree], 1.0),
        lambda: negative.erase_keeping(tree, [tree], []),
        lambda: negative.guide_perpendicular(tree, tree, tree, 1.0, 1.0),
    ):
        with refuses(TypeError, match=r"leaf \['n'\] of .*tree.partition"):
            function()


def test_nan_passes_through_maps_and_is_refused_by_leaf_where_a_question_is_asked():
    bad = {"w": jnp.asarray([jnp.nan, 1.0])}
    good = {"w": A}
    assert jnp.isnan(negative.repel(bad, good, 1.0)["w"]).tolist() == [True, False]
    assert jnp.isnan(average.mean([bad, good])["w"]).tolist() == [True, False]
    for function in (
        lambda x: negative.audit([x], (1,), good, 1.0).margin,
        lambda x: negative.guard_hull([x], good, 1.0),
        lambda x: negative.retarget([x], (1,), good),
        lambda x: negative.exit_ball([x], (1,), good, 1.0),
        lambda x: negative.erase_keeping(x, [good], []),
    ):
        with pytest.raises(ValueError, match=r"leaf \['w'\] of .*holds NaN"):
            function(bad)
        leaves = jax.tree.leaves(jax.jit(function)(bad))
        assert all(bool(jnp.isnan(x).any()) for x in leaves)


def test_what_is_both_erased_and_kept_is_refused_with_the_share_that_would_stay():  # U meets K
    x, e = jnp.asarray([3.0, 4.0, 5.0], FLOAT), jnp.eye(3, dtype=FLOAT)
    with pytest.raises(ValueError, match=r"sine of .*cannot be both.* 0.8 of what point has"):
        negative.erase_keeping(x, [e[0], e[1]], [e[1]], mode="oblique")
    assert is_nan(jax.jit(lambda x: negative.erase_keeping(x, [e[0]], [e[0]], mode="oblique"))(x))
    left_out = negative.erase_keeping(x, [e[0], e[1]], [e[1]], mode="oblique", rtol=1e-3)
    assert_close(left_out, jnp.asarray([0.0, 4.0, 5.0], FLOAT))


def test_empty_trees_and_leaves_have_no_length_and_no_singular_values():
    empty = {"e": jnp.zeros((0, 3))}
    report = negative.audit([empty], (1,), empty, 0.0)
    assert (report.distance, report.rank_needed, report.tail_curve.tolist()) == (0, 0, [0.0])
    assert negative.offset(empty, empty, 2).tail == 0
    assert_close(negative.retarget([empty], (1,), empty), [empty], units=0)
    assert negative.audit([{}], (1,), {}, 1.0).segment_distance == 0
