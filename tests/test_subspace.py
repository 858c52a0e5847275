"""Laws of `wspace.negative.subspace`: negative.attenuate, negative.erase_keeping, rewrite.

Numbers such as (iii L1) are those of the laws in the docs page on the negative weight.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from tests.helpers import is_nan
from tests.strategies import FLOAT, UNIT, strengths
from wspace import average, negative, tree
from wspace.testing import assert_close, like, size, vector, weights

LAYOUT = {"w": (4, 3), "b": (3,), "s": (2, 3, 2), "k": (1, 2, 2, 3), "empty": (0,)}
COUNT = 12 + 3 + 12 + 12
fast = settings(max_examples=8)
seeds = st.integers(0, 2**16)
removing = jax.jit(negative.attenuate)
erasing = jax.jit(negative.erase_keeping, static_argnames="mode")
each_mode = pytest.mark.parametrize("mode", ["orthogonal", "oblique"])


def flat(x):
    return vector(x).astype(np.float64)


def wide(x):
    return np.asarray(x, np.float64)


def array(x):
    return jnp.asarray(np.asarray(x), FLOAT)


def zeros():
    return jax.tree.map(lambda s: jnp.zeros(s, FLOAT), LAYOUT, is_leaf=lambda s: type(s) is tuple)


def as_tree(entries):
    return like(entries, zeros())


def trees(columns):
    return [as_tree(column) for column in np.asarray(columns).T]


def orthonormal(rng, n, k):
    return np.linalg.qr(rng.normal(size=(n, k)))[0]


def basis(rng, kind, k=2):
    """A basis of each kind, and its projection on the vector of all entries: the oracle's view."""
    if kind == "trees":
        q = orthonormal(rng, COUNT, k)
        given = trees(q)
        q = np.stack([flat(x) for x in given], 1)
        return given, q @ q.T
    spans = {
        (name, side): array(orthonormal(rng, n, k))
        for name, shape in {"w": (4, 3), "s": (3, 2), "k": (4, 3)}.items()
        for side, n in zip(("rows", "columns"), shape, strict=True)
    }
    rows = {"w": spans["w", "rows"], "b": 1.0, "s": 1.0, "k": spans["k", "rows"], "empty": 1.0}
    columns = {"w": 1.0, "b": 0.0, "s": spans["s", "columns"], "k": spans["k", "columns"]}
    columns["empty"] = 0
    sides = {
        "rows": negative.Sides(rows=rows),
        "columns": negative.Sides(columns=columns),
        "both": negative.Sides(rows, columns),
    }[kind]

    def dense(tree_, name, n):
        entry = 1.0 if tree_ is None else tree_[name]
        return np.eye(n) * entry if np.ndim(entry) == 0 else wide(entry) @ wide(entry).T

    def block(name, m, n):
        return np.kron(dense(sides.rows, name, m), dense(sides.columns, name, n))

    b = dense(sides.rows, "b", 3) @ dense(sides.columns, "b", 3)
    blocks = [b, block("k", 4, 3), *[block("s", 3, 2)] * 2, block("w", 4, 3)]
    projection, start = np.zeros((COUNT, COUNT)), 0
    for x in blocks:
        projection[start : start + len(x), start : start + len(x)] = x
        start += len(x)
    return sides, projection


kinds = st.sampled_from(["trees", "rows", "columns", "both"])
points = weights(LAYOUT)
TOLERANCE = 64 * np.sqrt(3)


@fast
@given(x=points, c=points, g=strengths, kind=kinds, seed=seeds)
def test_attenuate_is_the_formula(x, c, g, kind, seed):
    q, p = basis(np.random.default_rng(seed), kind)
    scale = (1 + abs(g)) * size(x, c)
    assert_close(
        removing(x, q, g, center=c), like(flat(x) - g * p @ (flat(x) - flat(c)), x),
        units=TOLERANCE, scale=scale,
    )  # fmt: skip
    assert_close(
        removing(x, q, g), like(flat(x) - g * p @ flat(x), x), units=TOLERANCE, scale=scale
    )


@fast
@given(x=points, c=points, kind=kinds, seed=seeds)
def test_removing_twice_is_removing_once(x, c, kind, seed):  # (iii L1)
    q, _ = basis(np.random.default_rng(seed), kind)
    once = removing(x, q, 1.0, center=c)
    assert_close(removing(once, q, 1.0, center=c), once, units=TOLERANCE, scale=size(x, c))


@fast
@given(x=points, c=points, kind=kinds, seed=seeds)
def test_reflecting_twice_changes_nothing(x, c, kind, seed):  # (iii L2)
    q, _ = basis(np.random.default_rng(seed), kind)
    twice = removing(removing(x, q, 2.0, center=c), q, 2.0, center=c)
    assert_close(twice, x, units=TOLERANCE, scale=3 * size(x, c))


@fast
@given(x=points, c=points, g=strengths, h=strengths, kind=kinds, seed=seeds)
def test_gains_compose_to_their_sum_less_their_product(x, c, g, h, kind, seed):  # (iii L3)
    q, _ = basis(np.random.default_rng(seed), kind)
    both = removing(removing(x, q, g, center=c), q, h, center=c)
    scale = (1 + abs(g)) * (1 + abs(h)) * size(x, c)
    wanted = removing(x, q, g + h - g * h, center=c)
    assert_close(both, wanted, units=TOLERANCE, scale=scale)


@fast
@given(x=points, y=points, c=points, g=strengths, kind=kinds, seed=seeds)
def test_attenuate_commutes_with_averages(x, y, c, g, kind, seed):  # (iii L4)
    q, _ = basis(np.random.default_rng(seed), kind)
    weight = (1.5, -0.5)
    of_mean = removing(average.mean([x, y], weight), q, g, center=c)
    mean_of = average.mean([removing(z, q, g, center=c) for z in (x, y)], weight)
    scale = 2 * (1 + abs(g)) * size(x, y, c)
    assert_close(of_mean, mean_of, units=TOLERANCE, scale=scale)


@fast
@given(x=points, c=points, g=strengths, kind=kinds, seed=seeds)
def test_the_norm_splits_and_grows_only_outside_0_to_2(x, c, g, kind, seed):  # (iii L5)
    q, p = basis(np.random.default_rng(seed), kind)
    gap = flat(x) - flat(c)
    after = np.linalg.norm(flat(removing(x, q, g, center=c)) - flat(c))
    error = TOLERANCE * UNIT * (1 + abs(g)) * size(x, c)
    wanted = np.sqrt(
        np.linalg.norm(gap - p @ gap) ** 2 + (1 - g) ** 2 * np.linalg.norm(p @ gap) ** 2
    )
    assert abs(after - wanted) <= error
    grown, inside = after - np.linalg.norm(gap), np.linalg.norm(p @ gap)
    if 0 <= g <= 2:
        assert grown <= error
    elif inside > 0.1 * np.linalg.norm(gap) and (abs(g - 1) > 1.1):
        assert grown > 0


@fast
@given(x=points, g=strengths, seed=seeds)
def test_only_the_span_matters(x, g, seed):  # (iii L6)
    rng = np.random.default_rng(seed)
    q, o = orthonormal(rng, COUNT, 3), orthonormal(rng, 3, 3)
    scale = (1 + abs(g)) * size(x)
    assert_close(
        removing(x, trees(q), g), removing(x, trees(q @ o), g), units=TOLERANCE, scale=scale
    )
    q, o = orthonormal(rng, 4, 2), orthonormal(rng, 2, 2)
    got, wanted = (removing(x["w"], negative.Sides(rows=array(z)), g) for z in (q, q @ o))
    assert_close(got, wanted, units=TOLERANCE, scale=scale)


@fast
@given(x=points, kind=kinds, seed=seeds)
def test_gain_0_changes_nothing_bit_for_bit(x, kind, seed):
    q, _ = basis(np.random.default_rng(seed), kind)
    for zero in (0, 0.0, jnp.float32(0)):
        assert_close(negative.attenuate(x, q, zero), x, units=0)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), x)
    assert_close(negative.attenuate(half, q, 0.0), half, units=0)
    assert_close(negative.attenuate(zeros(), q, 1.7), zeros(), units=0)
    assert_close(negative.attenuate(x, q, 1.7, center=x), x, units=0)


def test_direction_removal_leaves_no_output_along_the_direction_and_has_rank_1():  # (iii L11)
    rng = np.random.default_rng(0)
    w, d, inputs = array(rng.normal(size=(5, 4))), orthonormal(rng, 4, 1), rng.normal(size=(9, 5))
    new = negative.attenuate(w, negative.Sides(columns=array(d)), 1.0)
    assert np.abs(inputs @ wide(new) @ d).max() <= TOLERANCE * UNIT * np.linalg.norm(inputs)
    spectrum = np.linalg.svd(wide(w) - wide(new), compute_uv=False)
    assert spectrum[0] > 0.1
    assert spectrum[1] <= TOLERANCE * UNIT * np.linalg.norm(w)


def test_stacks_take_one_matrix_for_all_or_one_each():
    rng = np.random.default_rng(0)
    x = array(rng.normal(size=(2, 3, 2)))
    each = np.stack([orthonormal(rng, 3, 1) for _ in range(2)])
    got = negative.attenuate(x, negative.Sides(rows=array(each)), 1.0)
    rows = [negative.attenuate(x[i], negative.Sides(rows=array(each[i])), 1.0) for i in range(2)]
    assert_close(got, jnp.stack(rows), units=16)
    got = negative.attenuate(x, negative.Sides(rows=array(each[0])), 1.0)
    rows = [negative.attenuate(x[i], negative.Sides(rows=array(each[0])), 1.0) for i in range(2)]
    assert_close(got, jnp.stack(rows), units=16)
    assert_close(
        negative.attenuate(x, negative.Sides(rows=jnp.zeros((3, 0), FLOAT)), 1.0), x, units=0
    )


def test_the_map_of_safelora_is_no_projection():  # (iii L12), negative
    rng = np.random.default_rng(0)
    v = rng.normal(size=(5, 3))

    def c(v):
        return v @ v.T / np.linalg.norm(v)

    def p(v):
        return np.linalg.qr(v)[0] @ np.linalg.qr(v)[0].T

    def distance_after_both(f):
        return np.linalg.norm(f(v) @ f(v) - f(v)), np.linalg.norm(f(3 * v) - f(v))

    assert min(distance_after_both(c)) > 0.5
    assert max(distance_after_both(p)) < 1e-12
    # Attenuating by the same directions is one, which does not depend on the length of v.
    x = array(rng.normal(size=(5, 2)))
    got = [
        negative.attenuate(x, negative.Sides(rows=array(np.linalg.qr(t * v)[0])), 1.0)
        for t in (1, 3)
    ]
    assert_close(got[0], got[1], units=TOLERANCE)
    assert_close(got[0], array(wide(x) - p(v) @ wide(x)), units=TOLERANCE)


# erase_keeping


def span(columns):
    u, s, _ = np.linalg.svd(columns, full_matrices=False)
    return u[:, s > 1e-6 * max(s, default=0)]


def problem(seed, p=2, q=2, angle=None, extra=False):
    """Directions to erase and keep as columns, at a given smallest angle, and a point."""
    rng = np.random.default_rng(seed)
    u, k = rng.normal(size=(COUNT, p)), rng.normal(size=(COUNT, q))
    if angle is not None:
        inside, outside = span(k)[:, 0], rng.normal(size=COUNT)
        outside -= span(k) @ (span(k).T @ outside)
        u[:, 0] = np.cos(angle) * inside + np.sin(angle) * outside / np.linalg.norm(outside)
        u[:, 1:] += u[:, :1]
    if extra:  # of other lengths, and dependent
        u = np.hstack([1e3 * u, u @ rng.normal(size=(p, 1)), np.zeros((COUNT, 1))])
        k = np.hstack([1e-3 * k, k @ rng.normal(size=(q, 1))]) if q else k
    # As rounded to the dtype of the weights
    u, k = (wide(array(z)) for z in (u, k))
    return u, k, as_tree(rng.normal(size=COUNT))


def oracle(mode, u, k, x):
    """By numpy's orthonormal bases."""
    b, c = span(u), span(k)
    v = b - c @ (c.T @ b)
    if mode == "orthogonal":
        return x - span(v) @ (span(v).T @ x)
    return x - v @ np.linalg.solve(v.T @ v, b.T @ x)


def amplification(u, k):
    b, c = span(u), span(k)
    return 1 / np.linalg.svd(b - c @ (c.T @ b), compute_uv=False).min()


@each_mode
@pytest.mark.parametrize(("q", "extra"), [(2, False), (2, True), (0, False)])
@fast
@given(seed=seeds)
def test_erasing_is_the_formula(mode, q, extra, seed):
    u, k, x = problem(seed, q=q, extra=extra)
    got = negative.erase_keeping(x, trees(u), trees(k), mode=mode)
    wanted = like(oracle(mode, u, k, flat(x)), x)
    scale = amplification(u, k) ** 2 * size(x)
    assert_close(got, wanted, units=TOLERANCE, scale=scale)


@pytest.mark.parametrize("angle", [None, 0.3, 2e-2])
@fast
@given(seed=seeds)
def test_oblique_erases_and_keeps_and_is_idempotent(angle, seed):  # (iii L7)
    u, k, x = problem(seed, angle=angle)
    y = negative.erase_keeping(x, trees(u), trees(k), mode="oblique")
    amp = amplification(u, k)
    error = TOLERANCE * UNIT * amp * size(x)
    assert np.abs(span(u).T @ flat(y)).max() <= error
    assert np.abs(u.T @ flat(y)).max() <= error * np.linalg.norm(u)
    assert np.abs(span(k).T @ (flat(y) - flat(x))).max() <= error
    assert_close(
        negative.erase_keeping(y, trees(u), trees(k), mode="oblique"),
        y,
        units=TOLERANCE,
        scale=amp**2 * size(x),
    )


@pytest.mark.parametrize("angle", [None, 0.3, 2e-2, 6e-4])
@fast
@given(seed=seeds)
def test_orthogonal_keeps_exactly_erases_what_is_outside_and_is_idempotent(angle, seed):
    u, k, x = problem(seed, angle=angle)
    y = negative.erase_keeping(x, trees(u), trees(k), mode="orthogonal")
    assert np.abs(span(k).T @ (flat(y) - flat(x))).max() <= TOLERANCE * UNIT * size(x)
    assert size(y) <= size(x) * (1 + TOLERANCE * UNIT)
    v = u - span(k) @ (span(k).T @ u)
    error = TOLERANCE * UNIT * amplification(u, k) * size(x)
    assert np.abs(span(v).T @ flat(y)).max() <= error
    again = negative.erase_keeping(y, trees(u), trees(k), mode="orthogonal")
    assert np.linalg.norm(flat(again) - flat(y)) <= error


@pytest.mark.parametrize("angle", [None, 0.3, 2e-2])
@fast
@given(seed=seeds)
def test_oblique_changes_the_least_of_all_that_do_both(angle, seed):  # (iii L8)
    u, k, x = problem(seed, angle=angle)
    y = negative.erase_keeping(x, trees(u), trees(k), mode="oblique")
    # Numpy's minimum-norm solution of U^T dx = -U^T x, K^T dx = 0
    constraints = np.hstack([span(u), span(k)]).T
    wanted = np.concatenate([-(span(u).T @ flat(x)), np.zeros(k.shape[1])])
    least = np.linalg.lstsq(constraints, wanted, rcond=None)[0]
    change, amp = flat(y) - flat(x), amplification(u, k)
    np.testing.assert_allclose(change, least, atol=TOLERANCE * UNIT * amp**2 * size(x))
    free = np.random.default_rng(seed).normal(size=COUNT)
    free -= span(constraints.T) @ (span(constraints.T).T @ free)
    for step in (1e-2, -1.0):
        other = np.linalg.norm(change + step * free)
        assert other >= np.linalg.norm(change) - TOLERANCE * UNIT * amp**2 * size(x)


@fast
@given(seed=seeds)
def test_where_nothing_is_shared_both_modes_attenuate(seed):  # (iii L9)
    q = orthonormal(np.random.default_rng(seed), COUNT, 4)
    x = as_tree(np.random.default_rng(seed).normal(size=COUNT))
    u, k = trees(q[:, :2]), trees(q[:, 2:])
    wanted = removing(x, u, 1.0)
    for mode in ("orthogonal", "oblique"):
        assert_close(
            negative.erase_keeping(x, u, k, mode=mode), wanted, units=TOLERANCE, scale=size(x)
        )
        assert_close(
            negative.erase_keeping(x, u, [], mode=mode), wanted, units=TOLERANCE, scale=size(x)
        )


@each_mode
@fast
@given(seed=seeds)
def test_erasing_is_linear_and_sees_the_spans_alone(mode, seed):
    u, k, x = problem(seed)
    rng = np.random.default_rng(seed)
    y = as_tree(rng.normal(size=COUNT))
    scale = amplification(u, k) ** 2 * size(x, y)
    erased = [negative.erase_keeping(z, trees(u), trees(k), mode=mode) for z in (x, y)]
    mean = negative.erase_keeping(average.mean([x, y], (1.5, -0.5)), trees(u), trees(k), mode=mode)
    assert_close(mean, average.mean(erased, (1.5, -0.5)), units=2 * TOLERANCE, scale=scale)
    turn = np.array([[2.0, 1.0], [-1.0, 3.0]])
    other = negative.erase_keeping(x, trees(u @ turn), trees(k @ turn), mode=mode)
    assert_close(other, erased[0], units=8 * TOLERANCE, scale=scale)


def test_differences_of_near_directions_span_what_they_span():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, COUNT))
    near = 10 * UNIT**0.5
    k = np.stack([a, a + near * b, near * b], 1)
    u, x = rng.normal(size=(COUNT, 1)), as_tree(rng.normal(size=COUNT))
    ab = np.stack([a, b], 1)
    for mode in ("orthogonal", "oblique"):
        got = negative.erase_keeping(x, trees(u), trees(k), mode=mode)
        wanted = like(oracle(mode, u, ab, flat(x)), x)
        assert_close(got, wanted, units=8 * TOLERANCE, scale=size(x) * 100)
        got = negative.erase_keeping(x, trees(k), trees(u), mode=mode)
        wanted = like(oracle(mode, ab, u, flat(x)), x)
        assert_close(got, wanted, units=8 * TOLERANCE, scale=size(x) * 100)


def test_what_is_both_erased_and_kept_is_refused_or_left_out():
    q = orthonormal(np.random.default_rng(0), COUNT, 3)
    u, k, x = trees(q[:, :2]), trees(q[:, 1:]), as_tree(q @ np.array([3.0, 4.0, 5.0]))
    words = (
        r"within the span of keep, to a sine of .*; without it 0.8 of what .* would stay: "
        r'leave out that direction, give rtol .*, or use mode="orthogonal"'
    )
    with pytest.raises(ValueError, match=words):
        negative.erase_keeping(x, u, k, mode="oblique")
    assert is_nan(erasing(x, u, k, mode="oblique") | {"empty": jnp.full(1, jnp.nan)})
    wanted = like(q @ np.array([0.0, 4.0, 5.0]), x)
    scale = size(x)
    for options in ({"mode": "orthogonal"}, {"mode": "oblique", "rtol": 1e-2}):
        assert_close(
            negative.erase_keeping(x, u, k, **options), wanted, units=TOLERANCE, scale=scale
        )
    # All of it, and what depends on it
    for options in ({"mode": "orthogonal"}, {"mode": "oblique", "rtol": 1e-2}):
        same = negative.erase_keeping(x, [*k, tree.combine((1, 2), k)], k, **options)
        assert_close(same, x, units=TOLERANCE, scale=scale)
    with pytest.raises(ValueError, match="within the span of keep"):
        negative.erase_keeping(x, k, k, mode="oblique")


@each_mode
@pytest.mark.parametrize("sine", [1e-2, 0.3])
def test_rtol_is_the_sine_up_to_which_directions_count_as_kept(mode, sine):
    q = orthonormal(np.random.default_rng(0), COUNT, 3)
    turned = np.sqrt(1 - sine**2) * q[:, 1] + sine * q[:, 2]
    # Whatever their lengths
    u, k = trees(np.stack([5 * q[:, 0], 0.1 * turned], 1)), trees(7 * q[:, 1:2])
    x = as_tree(q @ np.array([3.0, 4.0, 5.0]))
    left_out = negative.erase_keeping(x, u, k, mode=mode, rtol=1.1 * sine)
    assert_close(
        left_out, negative.erase_keeping(x, u[:1], k), units=TOLERANCE, scale=size(x) / sine
    )
    erased = negative.erase_keeping(x, u, k, mode=mode, rtol=0.9 * sine)
    default = negative.erase_keeping(x, u, k, mode=mode)
    assert_close(erased, default, units=0)
    c = 5 if mode == "orthogonal" else 5 + 4 * np.sqrt(1 - sine**2) / sine
    wanted = like(q @ np.array([0.0, 4.0, 5.0 - c]), x)
    assert_close(erased, wanted, units=TOLERANCE, scale=size(x) / sine**2)


def test_the_default_cut_is_the_root_of_rounding():
    q = orthonormal(np.random.default_rng(0), COUNT, 2)
    x = as_tree(q @ np.array([3.0, 4.0]))
    for times in (0.25, 4):
        u = trees(q[:, :1] + times * UNIT**0.5 * q[:, 1:])
        if times < 1:
            with pytest.raises(ValueError, match="within the span of keep, to a sine of"):
                negative.erase_keeping(x, u, trees(q[:, :1]), mode="oblique")
            assert_close(negative.erase_keeping(x, u, trees(q[:, :1])), x, units=8)
        else:
            y = negative.erase_keeping(x, u, trees(q[:, :1]), mode="oblique")
            assert size(y) > 0.01 / UNIT**0.5
            assert abs(flat(u[0]) @ flat(y)) <= TOLERANCE * size(y) * UNIT


def test_degenerate_points_and_directions():
    u, k, x = problem(0)
    for mode in ("orthogonal", "oblique"):
        assert_close(
            negative.erase_keeping(zeros(), trees(u), trees(k), mode=mode), zeros(), units=0
        )
        assert_close(negative.erase_keeping(x, [zeros()], trees(k), mode=mode), x, units=0)
        got = negative.erase_keeping(x, trees(u), [zeros()], mode=mode)
        assert_close(got, negative.erase_keeping(x, trees(u), [], mode=mode), units=TOLERANCE)
        # More directions than there are entries
        some = [jnp.array([1.0, 2.0]), jnp.array([3.0, 1.0]), jnp.array([1.0, 1.0])]
        assert_close(
            negative.erase_keeping(some[0], some, [], mode=mode), jnp.zeros(2), units=64, scale=9
        )


@each_mode
@fast
@given(seed=seeds)
def test_more_directions_than_entries_span_what_they_span(mode, seed):
    rng = np.random.default_rng(seed)
    x, k = wide(array(rng.normal(size=3))), wide(array(rng.normal(size=(3, 1))))
    u = wide(array(rng.normal(size=(3, 2)) @ rng.normal(size=(2, 5))))
    keep = k if mode == "oblique" else u[:, :1]
    got = negative.erase_keeping(array(x), list(array(u.T)), list(array(keep.T)), mode=mode)
    wanted = array(oracle(mode, u, keep, x))
    scale = np.linalg.norm(x) / np.linalg.svd(u, compute_uv=False)[1] * np.linalg.norm(u)
    if mode == "oblique":
        scale *= amplification(u, keep) ** 2
    assert_close(got, wanted, units=TOLERANCE, scale=scale)


@each_mode
def test_half_precision_is_rounded_once(mode):
    u, k, x = problem(0)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), x)
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    got = negative.erase_keeping(half, trees(u), trees(k), mode=mode)
    wanted = negative.erase_keeping(single, trees(u), trees(k), mode=mode)
    assert_close(got, tree.cast_like(wanted, half), units=0)


# In a metric


def spd(rng, n):
    return wide(array((lambda z: z @ z.T + 0.3 * np.eye(n))(rng.normal(size=(n, n)))))


def metric(seed):
    """An inverse metric, and the matrix that it is on the vector of all entries."""
    rng = np.random.default_rng(seed)
    w, s, k = spd(rng, 4), spd(rng, 3), spd(rng, 4)
    entries = {"w": array(w), "b": 2.0, "s": array(s), "k": array(k), "empty": 1.0}
    blocks = [2 * np.eye(3), np.kron(k, np.eye(3)), *[np.kron(s, np.eye(2))] * 2]
    blocks.append(np.kron(w, np.eye(3)))
    dense, start = np.zeros((COUNT, COUNT)), 0
    for x in blocks:
        dense[start : start + len(x), start : start + len(x)] = x
        start += len(x)
    return entries, dense


@each_mode
@pytest.mark.parametrize("q", [0, 2])
@fast
@given(seed=seeds)
def test_in_a_metric_it_erases_and_keeps_at_least_cost(mode, q, seed):
    u, k, x = problem(seed, q=q)
    entries, inverse = metric(seed)
    f = np.linalg.cholesky(inverse)
    y = negative.erase_keeping(x, trees(u), trees(k), mode=mode, inverse_metric=entries)
    amp, spread = amplification(f.T @ u, f.T @ k), np.linalg.cond(f)
    scale = amp**2 * spread * size(x)
    wanted = f @ oracle(mode, f.T @ u, f.T @ k, np.linalg.solve(f, flat(x)))
    assert_close(y, like(wanted, x), units=TOLERANCE, scale=scale)
    error = TOLERANCE * UNIT * amp * spread * size(x)
    if q:
        assert np.abs(span(k).T @ (flat(y) - flat(x))).max() <= error
    if mode == "oblique" or not q:
        assert np.abs(span(u).T @ flat(y)).max() <= error
    if not q:  # the closed form
        closed = np.linalg.solve(u.T @ inverse @ u, u.T @ flat(x))
        assert_close(y, like(flat(x) - inverse @ u @ closed, x), units=TOLERANCE, scale=scale)
    if mode == "oblique":
        h, change = np.linalg.inv(inverse), flat(y) - flat(x)
        both = np.hstack([u, k])
        other = np.random.default_rng(seed + 1).normal(size=COUNT)
        other -= span(both) @ (span(both).T @ other)
        cost = change @ h @ change
        assert abs(other @ h @ change) <= error * np.linalg.norm(h @ other) * 10
        assert (change + other) @ h @ (change + other) >= cost


@each_mode
def test_the_identity_is_no_metric(mode):
    u, k, x = problem(0)
    whole = {"w": jnp.eye(4, dtype=FLOAT), "b": 1.0, "s": 1, "k": 1.0, "empty": 1.0}
    got = negative.erase_keeping(x, trees(u), trees(k), mode=mode, inverse_metric=whole)
    wanted = negative.erase_keeping(x, trees(u), trees(k), mode=mode)
    assert_close(got, wanted, units=TOLERANCE, scale=size(x) * amplification(u, k) ** 2)
    # Nor does its scale matter
    entries, _ = metric(1)
    twice = jax.tree.map(lambda p: 4 * p, entries)
    got, wanted = (
        negative.erase_keeping(x, trees(u), trees(k), mode=mode, inverse_metric=h)
        for h in (entries, twice)
    )
    assert_close(got, wanted, units=8 * TOLERANCE, scale=size(x) * amplification(u, k) ** 2)


# LEACE


def concept(seed, n=60, d=5, classes=3):
    rng = np.random.default_rng(seed)
    z = np.eye(classes)[rng.integers(0, classes, n)]
    x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + z @ rng.normal(size=(classes, d))
    return wide(array(x)), z


def leace(x, z):
    """The linear part of LEACE, from its definition in whitened coordinates."""
    xc, zc = x - x.mean(0), z - z.mean(0)
    cov, cross = xc.T @ xc / len(x), xc.T @ zc / len(x)
    values, vectors = np.linalg.eigh(cov)
    w = vectors @ np.diag(values**-0.5) @ vectors.T
    u, s, _ = np.linalg.svd(w @ cross, full_matrices=False)
    u = u[:, s > 1e-8 * s[0]]
    return np.eye(len(cov)) - np.linalg.inv(w) @ u @ u.T @ w, cov, cross


def erased_concept(x, z):
    _, cov, cross = leace(x, z)
    u = [array(column)[:, None] for column in np.linalg.solve(cov, cross).T]
    centered = array(x - x.mean(0))[:, :, None]
    erase = jax.vmap(
        lambda one: negative.erase_keeping(one, u, [], mode="oblique", inverse_metric=array(cov))
    )
    return wide(erase(centered))[:, :, 0] + x.mean(0)


@settings(max_examples=4)
@given(seed=seeds)
def test_leace_is_erasing_in_the_metric_of_the_covariance(seed):
    x, z = concept(seed)
    p, cov, cross = leace(x, z)
    got, wanted = erased_concept(x, z), (x - x.mean(0)) @ p.T + x.mean(0)
    spread = np.sqrt(np.linalg.cond(cov))
    scale = UNIT * spread**2 * np.linalg.norm(x)
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE * scale)
    # The guarantees: no linear trace, the same mean, and nothing left to erase
    left = (got - got.mean(0)).T @ (z - z.mean(0)) / len(x)
    assert np.abs(left).max() <= TOLERANCE * scale
    assert np.linalg.norm(cross) > 1e-2 * np.linalg.norm(x) / len(x)
    np.testing.assert_allclose(got.mean(0), x.mean(0), atol=TOLERANCE * scale)
    # Nothing is left to erase, so the same map, whose directions are those of x, does nothing.
    np.testing.assert_allclose((got - x.mean(0)) @ p.T + x.mean(0), got, atol=TOLERANCE * scale)


@settings(max_examples=4)
@given(seed=seeds)
def test_leace_changes_representations_the_least(seed):
    x, z = concept(seed)
    _, cov, cross = leace(x, z)
    rng = np.random.default_rng(seed)
    xc = x - x.mean(0)
    root = np.linalg.qr(rng.normal(size=(5, 5)))[0] * np.geomspace(1, 3, 5)
    for m in (np.eye(5), root @ root.T):  # in any metric
        change = erased_concept(x, z) - x
        least = np.einsum("ni,ij,nj->", change, m, change)
        u = np.linalg.solve(cov, cross)[:, :2]
        for _ in range(5):
            # Every other linear eraser A with A cross = 0: A is I - B u^T plus what ends on cross.
            free = rng.normal(size=(5, 5)) * rng.choice([1e-2, 1.0])
            q = np.linalg.qr(cross[:, :2])[0]
            a = np.eye(5) - cov @ u @ np.linalg.solve(u.T @ cov @ u, u.T)
            a = a + free @ (np.eye(5) - q @ q.T)
            assert np.abs(a @ cross).max() < 1e-6 * np.abs(cross).max() * np.linalg.cond(cov)
            other = xc @ a.T - xc
            assert np.einsum("ni,ij,nj->", other, m, other) >= least * (1 - 1e-4)


# rewrite


def memories(seed, k=2, n=3, shape=(8, 4)):
    rng = np.random.default_rng(seed)
    sizes = (shape, (k, shape[0]), (k, shape[1]), (n, shape[0]))
    return [array(rng.normal(size=s)) for s in sizes]


def condition(keys, keep):
    keys, keep = wide(keys), wide(keep)
    c = span(keep.T)
    s = np.linalg.svd(keys - (keys @ c) @ c.T, compute_uv=False)
    return np.linalg.norm(keys) / s.min()


@pytest.mark.parametrize("n", [0, 3])
@fast
@given(seed=seeds)
def test_rewriting_takes_and_keeps_at_least_norm(n, seed):  # (iii L10)
    w, keys, values, keep = memories(seed, n=n)
    new = negative.rewrite(w, keys, values, keep=keep)
    cond, edit = condition(keys, keep), wide(new) - wide(w)
    scale = np.linalg.norm(wide(keys)) * np.linalg.norm(wide(w)) + np.linalg.norm(wide(values))
    error = TOLERANCE * UNIT * cond * scale
    np.testing.assert_allclose(wide(keys) @ wide(new), wide(values), atol=error)
    kept = np.linalg.norm(keep) * (np.linalg.norm(edit) + np.linalg.norm(wide(w)))
    np.testing.assert_allclose(wide(keep) @ edit, 0 * wide(keep @ w), atol=TOLERANCE * UNIT * kept)
    residual = wide(values) - wide(keys) @ wide(w)
    both = np.vstack([wide(keys), wide(keep)])
    wanted = np.linalg.lstsq(both, np.vstack([residual, np.zeros((n, 4))]), rcond=None)[0]
    error = TOLERANCE * UNIT * cond**2 * scale / np.linalg.norm(keys)
    np.testing.assert_allclose(edit, wanted, atol=error + 4 * UNIT * np.linalg.norm(w))
    if not n:
        assert_close(negative.rewrite(w, keys, values), new, units=0)


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("ridge", [1e-3, 0.5, 10.0])
@fast
@given(seed=seeds)
def test_with_a_ridge_it_is_the_solve_of_alphaedit(n, ridge, seed):  # (iii L10)
    w, keys, values, keep = memories(seed, n=n)
    new = negative.rewrite(w, keys, values, keep=keep, ridge=ridge)
    k, c = wide(keys), span(wide(keep).T)
    p, residual = np.eye(8) - c @ c.T, wide(values) - wide(keys) @ wide(w)
    # Its columns are our rows: D = R^T K P (K^T K P + ridge I)^-1, a system of 8 x 8
    wanted = np.linalg.solve((k.T @ k @ p + ridge * np.eye(8)).T, (residual.T @ k @ p).T)
    cond = np.linalg.norm(k) / np.sqrt(np.linalg.norm(k) ** 2 / condition(keys, keep) ** 2 + ridge)
    scale = np.linalg.norm(w) + np.linalg.norm(values) / np.linalg.norm(k)
    error = TOLERANCE * UNIT * cond**2 * scale
    np.testing.assert_allclose(wide(new) - wide(w), wanted, atol=error)
    edit = wide(new) - wide(w)
    kept = np.linalg.norm(keep) * (np.linalg.norm(edit) + np.linalg.norm(wide(w)))
    np.testing.assert_allclose(wide(keep) @ edit, 0 * wide(keep @ w), atol=TOLERANCE * UNIT * kept)


def test_with_a_ridge_it_is_not_exact():  # (iii L10), negative
    w, keys, values, keep = memories(0)
    gaps = [
        np.linalg.norm(keys @ negative.rewrite(w, keys, values, keep=keep, ridge=r) - values)
        for r in (0.0, 1e-2, 1.0, 100.0)
    ]
    assert gaps[0] < 1e-4
    assert gaps[1] > 1e-3
    assert gaps == sorted(gaps)
    assert gaps[3] < np.linalg.norm(values - keys @ w)


@pytest.mark.parametrize("ridge", [0.0, 0.5])
@pytest.mark.parametrize("k", [1, 2])
@fast
@given(seed=seeds)
def test_the_edit_has_the_rank_of_the_keys(ridge, k, seed):  # (iii L11)
    w, keys, values, keep = memories(seed, k=k)
    edit = wide(negative.rewrite(w, keys, values, keep=keep, ridge=ridge)) - wide(w)
    spectrum = np.linalg.svd(edit, compute_uv=False)
    assert spectrum[0] > 1e-3
    assert spectrum[k] <= TOLERANCE * UNIT * (np.linalg.norm(w) + spectrum[0])


def test_nearly_dependent_keys_lose_the_condition_and_not_its_square():
    w, keys, values, keep = memories(0)
    near = 30 * UNIT**0.5
    turned = keys[0] + near * keys[1]
    keys = jnp.stack([keys[0], turned])
    new = negative.rewrite(w, keys, values, keep=keep)
    gap = np.abs(wide(keys) @ wide(new) - wide(values)).max()
    assert gap <= TOLERANCE * UNIT * np.linalg.norm(keys) * np.linalg.norm(new)
    edit = wide(new) - wide(w)
    assert np.abs(wide(keep) @ edit).max() <= TOLERANCE * UNIT * (
        np.linalg.norm(keep) * np.linalg.norm(edit)
    )
    # Nor does it leak into what is kept where keys are nearly within its span.
    for turn in (1e-2, 1e-3):
        close = jnp.stack([keep[0] + turn * keys[0], keep[1] - turn * keep[2]])
        close = close.at[1].add(turn * w[:, 0])
        leak = wide(negative.rewrite(w, close, values, keep=keep)) - wide(w)
        scale = np.linalg.norm(keep) * (np.linalg.norm(leak) + np.linalg.norm(w))
        assert np.linalg.norm(leak) > 1 / turn / 10
        assert np.abs(wide(keep) @ leak).max() <= 8 * UNIT * scale
    # Nearly dependent inputs that are to be kept are kept all the same.
    keys, keep = keep[:2], jnp.stack([keys[0], turned])
    edit = wide(negative.rewrite(w, keys, values, keep=keep)) - wide(w)
    scale = np.linalg.norm(keep) * (np.linalg.norm(edit) + np.linalg.norm(w))
    assert np.abs(wide(keep) @ edit).max() <= TOLERANCE * UNIT * scale


def test_keys_that_cannot_take_the_values_are_refused():
    w, keys, values, keep = memories(0)
    inside = jnp.stack([keys[0], keep[0] + 2 * keep[1]])
    words = r"keys cannot take the values: of a change of norm .*, .* at keys\[1\], which depends"
    with pytest.raises(ValueError, match=words):
        negative.rewrite(w, inside, values, keep=keep)
    assert is_nan(jax.jit(negative.rewrite)(w, inside, values, keep=keep))
    # Values that it has already can be taken.
    had = jnp.stack([values[0], (inside @ w)[1]])
    new = negative.rewrite(w, inside, had, keep=keep)
    np.testing.assert_allclose(inside @ new, had, atol=256 * UNIT * 30)
    # Repeated keys take equal values, and the amount that is said is the distance.
    twice = jnp.stack([keys[0], keys[0]])
    same = jnp.stack([values[0], values[0]])
    np.testing.assert_allclose(twice @ negative.rewrite(w, twice, same), same, atol=256 * UNIT * 30)
    other = same.at[1, 0].add(2.0)
    with pytest.raises(ValueError, match=r"1.41 is out of reach, most of it \(1\) at"):
        negative.rewrite(w, twice, other)
    # With a ridge all is defined.
    new = negative.rewrite(w, inside, values, keep=keep, ridge=0.1)
    np.testing.assert_allclose(keep @ new, keep @ w, atol=256 * UNIT * 30)
    assert not is_nan(jax.jit(negative.rewrite)(w, inside, values, keep=keep, ridge=0.1))


def test_what_is_lost_in_rounding_or_half_its_digits_is_not_refused():
    w, keys, values, keep = memories(0)
    # Nothing but rounding is asked for.
    had = array(wide(keep) @ wide(w) * (1 + 4 * UNIT))
    assert_close(negative.rewrite(w, keep, had, keep=keep), w, units=64)
    twice = jnp.stack([keys[0], keys[0]])
    change = np.linalg.norm(wide(values) - wide(keys @ w))
    for times in (0.5, 8):
        off = jnp.stack([values[0], values[0].at[0].add(times * UNIT**0.5 * change)])
        if times < 1:
            assert np.isfinite(wide(negative.rewrite(w, twice, off))).all()
        else:
            with pytest.raises(ValueError, match="keys cannot take the values"):
                negative.rewrite(w, twice, off)


@pytest.mark.parametrize("ridge", [0.0, 0.5])
@pytest.mark.parametrize("t", [2.0**-20, 2.0**20])
def test_units_of_keys_and_of_what_is_kept_do_not_matter(t, ridge):
    w, keys, values, keep = memories(0)
    keys = jnp.stack([*keys, keys[0]])  # of which one is repeated
    values = jnp.stack([*values, values[0]])
    wanted = negative.rewrite(w, keys, values, keep=keep, ridge=ridge)
    # Nor does it matter how often something is to be kept, or as what sum.
    more = jnp.stack([*keep, keep[0] + keep[1], keep[2]])
    for other in (keep, t * keep, more, more / t):
        got = negative.rewrite(w, keys, values, keep=other, ridge=ridge)
        assert_close(got, wanted, units=8 * TOLERANCE)
    small = negative.rewrite(t * w, t * keys, t**2 * values, keep=keep, ridge=t**2 * ridge)
    assert_close(small, t * wanted, units=64)
    got = negative.rewrite(w / t, t * keys, values, keep=keep, ridge=t**2 * ridge)
    assert_close(got, wanted / t, units=64)


def test_degenerate_rewrites():
    w, keys, values, keep = memories(0)
    assert_close(negative.rewrite(w, keys[:0], values[:0], keep=keep), w, units=0)
    assert_close(negative.rewrite(w, keys, keys @ w, keep=keep), w, units=64)
    assert_close(negative.rewrite(w[:, :0], keys, values[:, :0], keep=keep), w[:, :0], units=0)
    zero = jnp.zeros_like(w)
    assert_close(negative.rewrite(zero, keys, keys @ zero, keep=keep), zero, units=0)
    assert_close(negative.rewrite(zero, 0 * keys, 0 * values), zero, units=0)
    assert_close(negative.rewrite(w, 0 * keys, 0 * values, keep=keep, ridge=1.0), w, units=0)
    half = negative.rewrite(w.astype(jnp.bfloat16), keys, values, keep=keep)
    single = negative.rewrite(w.astype(jnp.bfloat16).astype(FLOAT), keys, values, keep=keep)
    assert_close(half, single.astype(jnp.bfloat16), units=0)
    got = jax.vmap(negative.rewrite)(*(jnp.stack([x, 2 * x]) for x in (w, keys, values)))
    assert_close(got[1], negative.rewrite(2 * w, 2 * keys, 2 * values), units=256)


# Retargeting that preserves behavior


def constrained(seed, shared=0):
    """Two points with inputs whose outputs must not change, and a target."""
    rng = np.random.default_rng(seed)
    inputs = [rng.normal(size=(3, 8)), rng.normal(size=(2, 8))]
    if shared:
        inputs[1] = np.vstack([inputs[0][:shared], inputs[1]])
    inputs = [wide(array(x)) for x in inputs]
    xs = [{"w": array(rng.normal(size=(8, 3)))} for _ in inputs]
    allow = [{"w": negative.free_inputs(array(x), rtol=1e-4)} for x in inputs]
    return inputs, xs, allow, {"w": array(rng.normal(size=(8, 3)))}


@fast
@given(seed=seeds)
def test_retargeting_within_free_inputs_preserves_every_endpoint(seed):
    inputs, xs, allow, target = constrained(seed)
    c, a = (2.0, 1.0), np.array([2 / 3, 1 / 3])
    moved = negative.retarget(xs, c, target, allow=allow)
    scale = size(*xs, *moved, target)
    assert_close(average.mean(moved, c), target, units=TOLERANCE, scale=scale)
    edits = [wide(y["w"]) - wide(x["w"]) for x, y in zip(xs, moved, strict=True)]
    for x, edit in zip(inputs, edits, strict=True):
        assert np.abs(x @ edit).max() <= TOLERANCE * UNIT * np.linalg.norm(x) * scale
    # Numpy's minimum-norm edits under all constraints: the average, and X_i dW_i = 0
    eye = np.eye(8)
    rows = [np.hstack([a[0] * eye, a[1] * eye])]
    rows += [np.hstack([inputs[0], np.zeros((3, 8))]), np.hstack([np.zeros((2, 8)), inputs[1]])]
    shift = wide(target["w"]) - sum(w * wide(x["w"]) for w, x in zip(a, xs, strict=True))
    best = np.linalg.lstsq(np.vstack(rows), np.vstack([shift, np.zeros((5, 3))]), rcond=None)[0]
    frees = [wide(p["w"]) for p in allow]
    blocks = np.hstack([w * p for w, p in zip(a, frees, strict=True)])
    amp = 1 / np.linalg.svd(blocks, compute_uv=False).min()
    np.testing.assert_allclose(np.vstack(edits), best, atol=TOLERANCE * UNIT * amp**2 * scale)


@fast
@given(seed=seeds)
def test_targets_that_would_change_what_all_must_preserve_are_refused(seed):
    inputs, xs, allow, target = constrained(seed, shared=2)
    # What all share cannot move, so the shift's part there is out of reach.
    shift = wide(target["w"]) - (wide(xs[0]["w"]) + wide(xs[1]["w"])) / 2
    c = span(inputs[0][:2].T)
    missing = np.linalg.norm(c.T @ shift)
    with pytest.raises(ValueError, match=r"of a shift of norm .*, .* is out of reach") as refused:
        negative.retarget(xs, (1, 1), target, allow=allow)
    said = float(str(refused.value).split("norm ")[1].split(", ")[1].split(" ")[0])
    assert abs(said - missing) <= 1e-2 * missing
    # Less that part it is reached.
    goal = {"w": array(wide(target["w"]) - c @ (c.T @ shift))}
    moved = negative.retarget(xs, (1, 1), goal, allow=allow)
    assert_close(average.mean(moved), goal, units=TOLERANCE, scale=size(*xs, *moved, goal))


# Derivatives, and refusals


def test_derivatives_are_true_where_singular_values_repeat():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        q = list(jnp.asarray(np.linalg.qr(rng.normal(size=(6, 6)))[0].T))
        x, w, y = (jnp.asarray(rng.normal(size=s)) for s in (6, (6, 2), (2, 2)))
        keep, keys = jnp.stack(q[:2]), jnp.stack([q[2] + q[0], q[3]])
        for mode in ("orthogonal", "oblique"):
            erase = jax.jit(lambda x, u, k, mode=mode: negative.erase_keeping(x, u, k, mode=mode))
            check_grads(erase, (x, q[:1], [q[2] + q[0], q[3]]), order=1, modes=["rev"])
        write = jax.jit(
            lambda w, k, y, keep, ridge: negative.rewrite(w, k, y, keep=keep, ridge=ridge)
        )
        check_grads(write, (w, keys, y, keep, 0.3), order=1, modes=["rev"])


X = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
FLAT = [jax.tree.map(lambda x: x / 8**0.5, X)]
NAN = X | {"b": jnp.array([1.0, jnp.nan])}


@pytest.mark.parametrize(
    ("basis", "options", "words"),
    [
        ([X], {}, r"basis is not orthonormal: .* off by up to 7: orthonormalize it first"),
        ([FLAT[0], FLAT[0]], {}, "off by up to 1: "),
        ([], {}, "basis is empty"),
        ([{"w": jnp.ones((3, 2))}], {}, r"has a leaf \['b'\] that basis\[0\] lacks"),
        (FLAT, {"gain": float("nan")}, "gain must be finite"),
        (FLAT, {"gain": jnp.ones(2)}, "gain must be one number"),
        (FLAT, {"center": {"w": jnp.ones((3, 2))}}, r"has a leaf \['b'\] that center lacks"),
        (FLAT, {"center": NAN}, r"leaf \['b'\] of center holds NaN"),
        (FLAT, {"point": NAN}, r"leaf \['b'\] of point holds NaN"),
        (negative.Sides(), {}, "basis has neither rows nor columns"),
        (negative.Sides(rows=1.0), {}, "basis.rows must be a tree like the weights"),
        (negative.Sides(columns={"w": 1.0}), {}, "basis.columns must be a tree like the weights"),
        (negative.Sides(rows={"w": 0.5, "b": 1.0}), {},
         r"basis.rows at leaf \['w'\] must be 1 \(all\)"),
        (negative.Sides(rows={"w": jnp.eye(2), "b": 1.0}), {},
         r"\['w'\] has shape \(2, 2\) for a leaf of shape \(3, 2\): .* inputs .* \(3, k\)"),
        (negative.Sides(rows={"w": jnp.ones(3), "b": 1.0}), {},
         r"\['w'\] has shape \(3,\) for a leaf of shape \(3, 2\): .* must be \(3, k\)$"),
        (negative.Sides(columns={"w": jnp.eye(3), "b": 1.0}), {},
         r"outputs of .* must be \(2, k\); if your layers store \(out, in\)"),
        (negative.Sides(rows={"w": 2 * jnp.eye(3), "b": 1.0}), {},
         r"\['w'\] is not orthonormal: .* to 3"),
        (negative.Sides(rows={"w": 1.0, "b": jnp.eye(2)}), {},
         r"\['b'\] is a matrix, but .* is none"),
    ],
)  # fmt: skip
def test_attenuate_refuses(basis, options, words, refuses):
    with refuses(ValueError, match=words):
        negative.attenuate(**({"point": X, "basis": basis, "gain": 1.0} | options))


def test_attenuate_refuses_what_is_no_side(refuses):
    with refuses(TypeError, match=r"basis.rows at leaf \['w'\] is 'all': give 1.0"):
        negative.attenuate(X, negative.Sides(rows={"w": "all", "b": 1.0}), 1.0)
    with refuses(TypeError, match="has dtype int32; weights are"):
        negative.attenuate(X | {"b": jnp.ones(2, jnp.int32)}, FLAT, 1.0)
    assert is_nan(removing(X, [X], 1.0))
    assert is_nan(removing(X, negative.Sides(rows={"w": 2 * jnp.eye(3), "b": 1.0}), 1.0)["w"])
    assert is_nan(removing(X, negative.Sides(rows={"w": 0.5, "b": 1.0}), 1.0)["w"])
    assert is_nan(removing(NAN, FLAT, 1.0)["w"])


def test_numpy_bases_are_as_orthonormal_as_they_are_seen():
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    negative.attenuate(jnp.ones(3), list(q), 1.0)
    negative.attenuate(jnp.ones((3, 3)), negative.Sides(rows=q), 1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"erase": []}, "erase is empty"),
        ({"mode": "diagonal"}, "mode must be one of 'orthogonal', 'oblique', got 'diagonal'"),
        ({"rtol": 0.0}, "rtol must be between 0 and 1"),
        ({"rtol": 1.0}, "rtol must be between 0 and 1"),
        ({"keep": [{"w": jnp.ones((3, 2))}]}, r"has a leaf \['b'\] that keep\[0\] lacks"),
        ({"erase": [NAN]}, r"leaf \['b'\] of erase\[0\] holds NaN"),
        ({"keep": [NAN]}, r"leaf \['b'\] of keep\[0\] holds NaN"),
        ({"point": NAN}, r"leaf \['b'\] of point holds NaN"),
        ({"inverse_metric": {"w": 1.0}}, "inverse_metric must be a tree like the weights"),
        ({"inverse_metric": {"w": 0.0, "b": 1.0}}, r"\['w'\] is not positive definite"),
        ({"inverse_metric": {"w": jnp.diag(jnp.array([1.0, 2, 0])), "b": 1.0}},
         r"inverse_metric at leaf \['w'\] is not positive definite"),
        ({"inverse_metric": {"w": jnp.eye(2), "b": 1.0}}, r"has shape \(2, 2\) for a leaf of"),
        ({"inverse_metric": {"w": -jnp.eye(3), "b": 1.0}}, r"\['w'\] has the eigenvalue -1"),
        ({"inverse_metric": {"w": jnp.eye(3) + jnp.eye(3, k=1), "b": 1.0}}, "is not symmetric"),
    ],
)  # fmt: skip
def test_erase_keeping_refuses(options, words, refuses):
    with refuses(ValueError, match=words):
        negative.erase_keeping(**({"point": X, "erase": [X], "keep": []} | options))


def test_what_is_undefined_is_nan_where_traced():
    singular = {"w": jnp.diag(jnp.array([1.0, 2, 0])), "b": 1.0}
    assert is_nan(erasing(X, [X], [], inverse_metric=singular)["w"])
    assert is_nan(erasing(NAN, [X], []))
    assert is_nan(erasing(X, [NAN], []))
    assert is_nan(erasing(X, [X], [NAN]))
    assert is_nan(jax.jit(lambda t: negative.erase_keeping(X, [X], [], rtol=t))(2.0))
    w, keys, values, keep = memories(0)
    assert is_nan(jax.jit(lambda r: negative.rewrite(w, keys, values, ridge=r))(-1.0))
    assert is_nan(jax.jit(negative.rewrite)(w, keys, values, keep=keep.at[0, 0].set(jnp.nan)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ridge": -1.0}, "ridge must be finite and at least 0, got -1"),
        ({"keys": jnp.ones((2, 3))}, r"matrix must be \(in, out\), keys \(k, in\)"),
        ({"values": jnp.ones((1, 4))}, r"values \(k, out\)"),
        ({"values": jnp.ones((2, 3))}, r"values \(k, out\)"),
        ({"keep": jnp.ones((2, 3))}, r"keep \(n, in\), got"),
        ({"keep": jnp.full((2, 8), jnp.nan)}, "of keep holds NaN"),
        ({"matrix": jnp.full((8, 4), jnp.inf)}, "of matrix holds NaN or an infinity"),
    ],
)
def test_rewrite_refuses(options, words, refuses):
    w, keys, values, keep = memories(0)
    usual = {"matrix": w, "keys": keys, "values": values, "keep": keep}
    with refuses(ValueError, match=words):
        negative.rewrite(**(usual | options))
    with refuses(TypeError, match="has dtype int32; weights are"):
        negative.rewrite(w, jnp.ones((2, 8), jnp.int32), values)
