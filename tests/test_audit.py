"""Laws of `wspace.negative.audit`, against numpy and against edits that it speaks of.

Numbers such as (vi L1) are those of the laws in the docs page on the negative weight.
"""

import dataclasses
import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from tests.helpers import is_nan
from tests.strategies import FLOAT, UNIT
from wspace import average, cone, geometry, lowrank, negative, tree
from wspace.testing import assert_close, coefficients, like, matrices, points, size, vector, weights

LAYOUT = {"w": (5, 4), "b": (3,), "s": (2, 3, 2), "k": (1, 2, 2, 3), "e": (0, 2), "t": ()}
STACKS = {"w": (1, 5, 4), "b": (1, 3, 1), "s": (2, 3, 2), "k": (1, 4, 3), "t": (1, 1, 1)}
audit = jax.jit(negative.audit)
ROOT = 64 * 2 * UNIT  # 64 sqrt(p) roundings, p = 4


def flat(x):
    return vector(x).astype(np.float64)


def normalized(a):
    return np.array(a, np.float64) / np.sum(np.array(a, np.float64))


def spectra(gap):
    """Singular values of every matrix by numpy: the oracle's view."""
    return {
        k: np.linalg.svd(np.asarray(gap[k], np.float64).reshape(s), compute_uv=False)
        for k, s in STACKS.items()
    }


@st.composite
def situations(draw, count=None):
    """Points, coefficients, a point to avoid, a radius in units of the distance, and the gap."""
    xs = draw(points(count=count, layout=LAYOUT))
    a, avoid = draw(coefficients(len(xs))), draw(weights(LAYOUT))
    gap = sum(w * flat(x) for w, x in zip(normalized(a), xs, strict=True)) - flat(avoid)
    far = np.linalg.norm(gap)
    assume(far > 1e-2 * (size(*xs) + size(avoid)))
    ratio = draw(st.sampled_from([0.1, 0.5, 0.9, 1.5]))
    return xs, a, avoid, ratio * far, like(gap, avoid)


def rounding(xs, a, avoid):
    return ROOT * (abs(normalized(a)) @ [size(x) for x in xs] + size(avoid))


def entry(values, r, radius):
    """The least norm of an edit of pooled rank r that reaches the radius, in float64."""
    kept, tail = np.linalg.norm(values[:r]), np.linalg.norm(values[r:])
    if np.linalg.norm(values) <= radius:
        return 0.0
    return kept - np.sqrt(radius**2 - tail**2) if tail <= radius else np.inf


@settings(max_examples=8)
@given(situation=situations())
def test_every_figure_is_that_of_numpy(situation):  # (vi L1)
    xs, a, avoid, radius, gap = situation
    report = audit(xs, a, avoid, radius)
    error, e = rounding(xs, a, avoid), np.linalg.norm(flat(gap))
    values = spectra(gap)
    pool = np.sort(np.concatenate([s.ravel() for s in values.values()]))[::-1]
    tails = np.array([np.linalg.norm(pool[r:]) for r in range(len(pool) + 1)])
    assert abs(report.distance - e) <= error
    assert abs(report.margin - max(e - radius, 0)) <= error
    np.testing.assert_allclose(report.tail_curve, tails, atol=error)
    leafwise = [np.sqrt(sum(np.sum(s[:, r:] ** 2) for s in values.values())) for r in range(5)]
    np.testing.assert_allclose(report.leafwise_curve, leafwise, atol=error)
    sure = min(abs(tails - radius)) > error and min(abs(np.array(leafwise) - radius)) > error
    if sure:
        assert report.pooled_rank_needed == int(np.sum(tails > radius))
        assert report.rank_needed == int(np.sum(np.array(leafwise) > radius))
        budgets = [entry(pool, r, radius) for r in range(len(pool) + 1)]
        assert ((report.frobenius_budget == np.inf) == (np.array(budgets) == np.inf)).all()
        for got, wanted in zip(report.frobenius_budget, budgets, strict=True):
            if np.isfinite(wanted):
                assert abs(got - wanted) <= error * (1 + e / radius) + np.sqrt(error * e)
        assert abs(report.frobenius_budget[-1] - max(e - radius, 0)) <= error * (1 + e / radius)
    for got, w in zip(report.source_budgets, normalized(a), strict=True):
        wanted = max(e - radius, 0) / abs(w) if w else (np.inf if e > radius else 0)
        assert got == wanted or abs(got - wanted) <= 4 * error / abs(w)
    flattest = [
        np.sqrt(sum(np.sum(s**2) * max(0, 1 - r / s.shape[-1]) for s in values.values()))
        for r in range(5)
    ]
    if min(abs(np.array(flattest) - radius)) > error:
        assert report.ceiling == int(np.sum(np.array(flattest) > radius))
    assert abs(report.amplification - np.sum(abs(normalized(a)))) <= 8 * UNIT * report.amplification
    mean = sum(w * flat(x) for w, x in zip(normalized(a), xs, strict=True))
    assert abs(report.average_norm - np.linalg.norm(mean)) <= error
    for leaf in report.leaves:
        name = leaf.path[2:-2]
        if name == "e":
            assert leaf.distance == 0
            continue
        s = values[name]
        own = np.asarray(leaf.singular_values).reshape(s.shape)
        np.testing.assert_allclose(own, s, atol=error)
        assert abs(leaf.distance - np.linalg.norm(s)) <= error
        rest = sum(np.sum(v**2) for k, v in values.items() if k != name)
        alone = np.sqrt([rest + np.sum(s[:, r:] ** 2) for r in range(s.shape[-1] + 1)])
        if min(abs(alone - radius)) > error:
            wanted = int(np.sum(alone > radius))
            assert leaf.rank_needed == (-1 if wanted == len(alone) else wanted)


@settings(max_examples=8)
@given(situation=situations(count=2))
def test_the_spectral_and_the_nuclear_budget_reach_the_sphere_and_no_less_does(situation):
    xs, a, avoid, radius, gap = situation
    report = audit(xs, a, avoid, radius)
    error, e = rounding(xs, a, avoid), np.linalg.norm(flat(gap))
    values = np.concatenate([s.ravel() for s in spectra(gap).values()])
    cap, nuclear = float(report.spectral_budget), float(report.nuclear_budget)
    if e <= radius:
        assert cap == nuclear == 0
        return
    left = np.linalg.norm(np.maximum(values - cap, 0))
    assert abs(left - radius) <= 4 * error * np.sqrt(values.size)
    # A soft threshold t leaves min(sigma, t) at the price of sum max(sigma - t, 0).
    low, high = 0.0, values.max()
    for _ in range(100):
        t = (low + high) / 2
        low, high = (low, t) if np.linalg.norm(np.minimum(values, t)) > radius else (t, high)
    wanted = np.sum(np.maximum(values - low, 0))
    assert abs(nuclear - wanted) <= 8 * error * values.size * (1 + e / radius)


@settings(max_examples=8)
@given(situation=situations(count=2), pick=st.integers(0, 30))
def test_the_entry_edit_lands_on_the_sphere_and_less_of_it_stays_outside(situation, pick):
    xs, a, avoid, radius, gap = situation  # (vi L2)
    assume(radius < np.linalg.norm(flat(gap)))
    report = audit(xs, a, avoid, radius)
    least = int(report.pooled_rank_needed)
    r = min(least + pick % 4, report.tail_curve.size - 1)
    assume(report.tail_curve[r] < 0.999 * radius)
    mean = average.mean(xs, a)
    move = cone.entry(cone.PooledRank(r), tree.combine((1, -1), (mean, avoid)), radius)
    error = rounding(xs, a, avoid)
    slack = error * (1 + np.linalg.norm(flat(gap)) / radius) + np.sqrt(error * radius) * 1e-1
    assert abs(move.norm - report.frobenius_budget[r]) <= slack
    landed = lowrank.apply(mean, move.edit)
    assert abs(geometry.distance(landed, avoid) - radius) <= 4 * error
    assume(report.frobenius_budget[r] > 1e3 * error)
    short = lowrank.apply(mean, lowrank.scale(0.99, move.edit))
    assert geometry.distance(short, avoid) > radius


@settings(max_examples=8)
@given(situation=situations(count=2), seed=st.integers(0, 2**16), r=st.integers(0, 4))
def test_no_edit_of_that_rank_and_norm_comes_nearer(situation, seed, r):  # (vi L3)
    xs, a, avoid, radius, gap = situation
    report = audit(xs, a, avoid, radius)
    rng, error = np.random.default_rng(seed), rounding(xs, a, avoid)
    tail = float(report.tail_curve[min(2 * r, report.tail_curve.size - 1)])
    kept = np.sqrt(max(float(report.distance) ** 2 - tail**2, 0))
    for spread in (0.1, 1.0, 10.0):
        edit = {k: np.zeros(v.shape) for k, v in gap.items()}
        edit["w"] = spread * rng.normal(size=(5, r)) @ rng.normal(size=(r, 4))
        if r:
            edit["k"] = (rng.normal(size=(4, r)) @ rng.normal(size=(r, 3))).reshape(1, 2, 2, 3)
        d = np.sqrt(sum(np.sum(v**2) for v in edit.values()))
        left = np.sqrt(sum(np.sum((np.asarray(gap[k], np.float64) + edit[k]) ** 2) for k in gap))
        bound = np.hypot(tail, max(kept - d, 0))
        assert left >= bound - error - np.sqrt(UNIT) * 1e-3 * kept


def test_a_hardened_guard_needs_the_ceiling():  # (vi L4)
    rng = np.random.default_rng(0)
    base = {"w": jnp.asarray(rng.normal(size=(9, 6)), FLOAT)}
    for radius in (1.0, 3.0, 5.0):
        raw = rng.normal(size=(9, 6)) * 3.0 ** -np.arange(6)
        raw = {"w": jnp.asarray(8 * raw / np.linalg.norm(raw), FLOAT)}
        plain = tree.combine((1, 1), (base, raw))
        hard = tree.combine((1, 1), (base, negative.harden(raw)))
        reports = [negative.audit([x], (1,), base, radius) for x in (plain, hard)]
        assert reports[0].rank_needed < reports[0].ceiling
        assert reports[1].rank_needed == reports[1].ceiling
        assert reports[1].efficiency == 1
        assert reports[0].ceiling == reports[1].ceiling == int(np.ceil(6 * (1 - radius**2 / 64)))


def test_another_spectrum_can_attain_the_ceiling_too():  # section 10, F3
    x = jnp.diag(jnp.sqrt(jnp.asarray([1.1, 1.0, 0.9], FLOAT)))
    report = negative.audit([x], (1,), jnp.zeros((3, 3), FLOAT), float(np.sqrt(1.5)))
    assert (report.rank_needed, report.ceiling) == (2, 2)


@settings(max_examples=8)
@given(situation=situations(count=2), t=st.sampled_from([2.0**-10, 2.0**10]))
def test_scaling_scales_budgets_and_leaves_ranks(situation, t):  # (vi L5)
    xs, a, avoid, radius, _ = situation
    before = audit(xs, a, avoid, radius)
    scaled = functools.partial(jax.tree.map, lambda x: t * x)
    after = audit(scaled(xs), a, scaled(avoid), t * radius)
    for name in ("rank_needed", "pooled_rank_needed", "ceiling", "efficiency", "amplification"):
        assert getattr(before, name) == getattr(after, name)
    for name in ("margin", "tail_curve", "frobenius_budget", "spectral_budget", "nuclear_budget",
                 "segment_distance", "line_distance", "source_budgets"):  # fmt: skip
        wanted = np.asarray(getattr(before, name))
        got = np.asarray(getattr(after, name)) / t
        finite = np.isfinite(wanted)
        assert (np.isfinite(got) == finite).all()
        np.testing.assert_allclose(
            got[finite], wanted[finite], rtol=1e-3, atol=rounding(xs, a, avoid)
        )


@settings(max_examples=8)
@given(situation=situations(count=2), seed=st.integers(0, 2**16))
def test_rotations_permutations_and_translations_leave_the_report(situation, seed):  # (vi L6)
    xs, a, avoid, radius, _ = situation
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (5, 4))
    order, shift = rng.permutation(3), rng.normal(size=(5, 4))

    def turned(x):
        w = left @ np.asarray(x["w"], np.float64) @ right + shift
        return x | {"w": jnp.asarray(w, FLOAT), "b": x["b"][order]}

    before = audit(xs, a, avoid, radius)
    after = audit([turned(x) for x in xs], a, turned(avoid), radius)
    kappa = abs(normalized(a)).sum()
    error = 4 * (rounding(xs, a, avoid) + ROOT * (1 + kappa) * np.linalg.norm(shift))
    for name in ("distance", "tail_curve", "leafwise_curve", "segment_distance"):
        np.testing.assert_allclose(getattr(after, name), getattr(before, name), atol=error)


@settings(max_examples=8)
@given(situation=situations(count=2))
def test_a_larger_radius_raises_no_budget_and_no_rank(situation):  # (vi L7)
    xs, a, avoid, _, gap = situation
    e, error = np.linalg.norm(flat(gap)), rounding(xs, a, avoid)
    reports = [audit(xs, a, avoid, t * e) for t in (0.05, 0.4, 0.7, 0.95, 1.05)]
    for small, large in itertools.pairwise(reports):
        for name in ("rank_needed", "pooled_rank_needed", "ceiling"):
            assert getattr(large, name) <= getattr(small, name)
        for name in ("margin", "frobenius_budget", "spectral_budget", "nuclear_budget"):
            slack = error * (8 if name != "nuclear_budget" else 100)
            assert (getattr(large, name) <= getattr(small, name) + slack).all()
    inside = reports[-1]
    assert inside.rank_needed == inside.pooled_rank_needed == inside.ceiling == 0
    assert inside.margin == inside.efficiency == 0
    assert inside.spectral_budget == inside.nuclear_budget == 0
    assert (inside.frobenius_budget == 0).all()
    assert (inside.source_budgets == 0).all()


@given(edit=matrices((6, 4)))
def test_stable_and_effective_ranks_are_between_one_and_the_rank(edit):  # (vi L8)
    assume(float(jnp.abs(edit).max()) > 0)
    (leaf,) = audit([edit], (1.0,), jnp.zeros_like(edit), 1e-30).leaves
    values = np.linalg.svd(np.asarray(edit, np.float64), compute_uv=False)
    rank = np.sum(values > 64 * UNIT * values[0])
    assert 1 - ROOT <= leaf.stable_rank <= rank + 4 * ROOT
    assert 1 - ROOT <= leaf.effective_rank <= 4 + 4 * ROOT
    assert abs(leaf.stable_rank - np.sum(values**2) / values[0] ** 2) <= 4 * ROOT
    for flat_rank in (1, 4):
        edit = jnp.asarray(np.eye(6, 4) * (np.arange(4) < flat_rank), FLOAT)
        (leaf,) = audit([edit], (1.0,), jnp.zeros_like(edit), 0.1).leaves
        assert_close(leaf.stable_rank, jnp.asarray(flat_rank, FLOAT))
        assert_close(leaf.effective_rank, jnp.asarray(flat_rank, FLOAT))


@given(situation=situations(count=3), seed=st.integers(0, 2**16))
def test_reweighting_comes_no_nearer_than_the_hull_and_the_span(situation, seed):  # (vi L9)
    xs, a, avoid, radius, _ = situation
    report = audit(xs, a, avoid, radius)
    error = 64 * UNIT * max(size(x) for x in (*xs, avoid))
    rng = np.random.default_rng(seed)
    rows = np.stack([flat(x) for x in xs]) - flat(avoid)
    assert report.line_distance <= report.segment_distance + error
    assert report.line_distance <= report.distance + rounding(xs, a, avoid)
    mixes = rng.dirichlet(np.ones(3), size=200)
    assert report.segment_distance <= np.linalg.norm(mixes @ rows, axis=1).min() + error
    signed = rng.normal(size=(200, 3))
    signed[:, -1] = 1 - signed[:, :2].sum(axis=1)
    away = np.linalg.norm(signed @ rows, axis=1)
    assert (report.line_distance <= away + error * abs(signed).sum(axis=1)).all()


def exact_span_distance(rows, avoid):
    """The distance from the affine span of float32 rows, in fractions, rounded at the end."""

    def inner(x, y):
        return sum(a * b for a, b in zip(x, y, strict=True))

    def rest(x, origin):
        left = [Fraction(float(a)) - Fraction(float(b)) for a, b in zip(x, origin, strict=True)]
        for way in ways:
            share = inner(way, left) / inner(way, way)
            left = [a - share * b for a, b in zip(left, way, strict=True)]
        return left

    ways = []
    for x in rows[1:]:
        way = rest(x, rows[0])
        ways += [way] if any(way) else []
    left = rest(avoid, rows[0])
    return float(inner(left, left)) ** 0.5


@pytest.mark.parametrize("seed", [0, 3, 5, 8, 9, 11])
def test_the_line_of_nearly_collinear_points_is_that_of_every_order(seed):
    """A short step turns a span by much, and is no noise beside a long one."""
    rng = np.random.default_rng(seed)
    base, way = 10 * rng.normal(size=8), rng.normal(size=8)
    way /= np.linalg.norm(way)
    rows = [base + t * way for t in (0, 10 ** rng.uniform(-4, -1), 30)]
    rows, avoid = np.float32(rows), np.float32(base + rng.normal(size=8))
    wanted = exact_span_distance(rows, avoid)
    found = [
        audit([jnp.asarray(rows[i]) for i in order], (1, 1, 1), jnp.asarray(avoid), 0.5)
        for order in itertools.permutations(range(3))
    ]
    error = 64 * float(np.finfo(np.float32).eps) * np.linalg.norm(rows, axis=1).max()
    lines = np.array([one.line_distance for one in found])
    np.testing.assert_allclose(lines, wanted, rtol=0, atol=4 * error)
    assert np.ptp(lines) <= error
    assert np.ptp([one.segment_distance for one in found]) <= error


def test_the_segment_of_two_points_and_the_line():
    a, c = jnp.asarray([1.0, 1.0], FLOAT), jnp.asarray([3.0, 1.0], FLOAT)
    report = negative.audit([a, c], (0.5, 0.5), jnp.zeros(2, FLOAT), 0.5)
    np.testing.assert_allclose(report.segment_distance, np.sqrt(2), rtol=8 * UNIT)
    np.testing.assert_allclose(report.line_distance, 1.0, rtol=8 * UNIT)
    same = negative.audit([a, a], (0.5, 0.5), jnp.zeros(2, FLOAT), 0.5)  # A = C
    np.testing.assert_allclose(same.segment_distance, np.sqrt(2), rtol=8 * UNIT)
    np.testing.assert_allclose(same.line_distance, np.sqrt(2), rtol=8 * UNIT)


@settings(max_examples=8)
@given(seed=st.integers(0, 2**16))
def test_activations_weigh_the_displacement(seed):  # (vi L10)
    rng = np.random.default_rng(seed)
    xs = [{"w": jnp.asarray(rng.normal(size=(5, 4)), FLOAT), "none": None} for _ in range(2)]
    avoid = {"w": jnp.asarray(rng.normal(size=(5, 4)), FLOAT), "none": None}
    x = rng.normal(size=(7, 5))
    seen = jax.jit(lambda x: negative.audit(xs, (1, 1), avoid, 1.0, activations=x).leaves[0])
    plain = seen({"w": jnp.eye(5, dtype=FLOAT), "none": None})
    scale = size(*xs, avoid)
    np.testing.assert_allclose(plain.data_tail, audit(xs, (1, 1), avoid, 1.0).tail_curve,
                               atol=ROOT * scale)  # fmt: skip
    data = seen({"w": jnp.asarray(x, FLOAT), "none": None})
    first, second, third = (np.asarray(t["w"], np.float64) for t in (*xs, avoid))
    gap = (first + second) / 2 - third
    values = np.linalg.svd(x @ gap, compute_uv=False)
    wanted = [np.linalg.norm(values[r:]) for r in range(5)]
    error = ROOT * scale * np.linalg.norm(x, 2)
    np.testing.assert_allclose(data.data_tail, wanted, atol=error)
    bound = np.linalg.norm(x, 2) * np.asarray(plain.data_tail, np.float64)
    assert (np.asarray(data.data_tail) <= bound + error).all()


def test_activations_of_a_convolution_are_patches():  # (vi L10)
    rng = np.random.default_rng(0)
    kernel, avoid = (jnp.asarray(rng.normal(size=(1, 2, 2, 3)), FLOAT) for _ in range(2))
    x = rng.normal(size=(7, 4))
    (leaf,) = negative.audit([kernel], (1,), avoid, 1.0, activations=jnp.asarray(x, FLOAT)).leaves
    gap = np.asarray(kernel, np.float64) - np.asarray(avoid, np.float64)
    values = np.linalg.svd(x @ gap.reshape(4, 3), compute_uv=False)
    wanted = [np.linalg.norm(values[r:]) for r in range(4)]
    error = ROOT * size(kernel, avoid) * np.linalg.norm(x, 2)
    np.testing.assert_allclose(leaf.data_tail, wanted, atol=error)


@settings(max_examples=8)
@given(situation=situations(count=2))
def test_moving_one_point_by_its_budget_lands_on_the_sphere(situation):  # (vi L11)
    xs, a, avoid, radius, gap = situation
    e = np.linalg.norm(flat(gap))
    assume(radius < e)
    report = audit(xs, a, avoid, radius)
    for i, w in enumerate(normalized(a)):
        if abs(w) < 0.05:
            continue
        step = -np.sign(w) * float(report.source_budgets[i]) / e
        moved = [tree.combine((1, step), (x, gap)) if i == j else x for j, x in enumerate(xs)]
        landed = geometry.distance(average.mean(moved, a), avoid)
        assert abs(landed - radius) <= 4 * (rounding(xs, a, avoid) + rounding(moved, a, avoid))


@settings(max_examples=8)
@given(edit=matrices((6, 4)), r=st.integers(0, 4))
def test_the_distance_left_under_a_spectral_cap_falls_with_rank_and_cap(edit, r):  # (vi L12)
    norm = float(np.linalg.norm(np.asarray(edit)))
    left = [
        [float(PROJECT(edit, k, cap * norm)) for cap in (0.0, 0.1, 0.4, 1.0)] for k in (r, r + 1)
    ]
    slack = ROOT * norm
    for row in left:
        assert all(x >= y - slack for x, y in itertools.pairwise(row))
    assert all(x >= y - slack for x, y in zip(*left, strict=True))
    values = np.linalg.svd(np.asarray(edit, np.float64), compute_uv=False)
    assert abs(left[0][-1] - np.linalg.norm(values[r:])) <= slack


PROJECT = jax.jit(lambda x, k, cap: cone.project_capped(x, k, cap).tail, static_argnums=1)


# What the report says in words


def story():
    rng = np.random.default_rng(0)
    xs = [like(rng.normal(size=48), jax.tree.map(lambda s: jnp.zeros(s, FLOAT), LAYOUT,
          is_leaf=lambda n: isinstance(n, tuple))) for _ in range(2)]  # fmt: skip
    avoid = jax.tree.map(lambda x: jnp.ones_like(x), xs[0])
    middle = average.mean(xs)
    return xs, avoid | {"b": middle["b"], "t": middle["t"]}


def test_unmoved_leaves_are_named_and_empty_ones_are_not():
    xs, avoid = story()
    report = negative.audit(xs, (0.5, 0.5), avoid, 1.0)
    assert report.unmoved_leaves == ("['b']", "['t']")
    assert negative.audit([avoid], (1,), avoid, 0.0).unmoved_leaves == (
        "['b']", "['k']", "['s']", "['t']", "['w']",
    )  # fmt: skip


def test_the_table_says_what_was_audited_and_what_was_not():
    xs, avoid = story()
    report = negative.audit(xs, (0.5, 0.5), avoid, 1.0)
    text = " ".join(str(report).split())
    for words in (
        f"{float(report.distance):.6g} away from the point to avoid, radius 1",
        f"rank needed in every matrix {int(report.rank_needed)} of 4",
        "Unmoved leaves: ['b'], ['t']",
        "alignment of the points (no aligned points given)",
        "data-aware tails of 6 of 6 leaves",
        "what the model does; averaged outputs and merges that see data; training",
        "A margin certifies a distance, not safety.",
        "2 x 3 x 2",
        "4 x 3",
    ):
        assert words in text
    inputs = dict.fromkeys(xs[0]) | {"w": jnp.eye(5, dtype=FLOAT)}
    report = negative.audit(xs, (0.5, 0.5), avoid, 1.0, activations=inputs, aligned=xs)
    text = " ".join(str(report).split())
    assert "margin after alignment" in text
    assert "data-aware tails of 5 of 6 leaves" in text
    assert "no aligned points" not in text


def test_the_table_gives_every_figure_at_its_name():
    xs, avoid = story()
    inputs = dict.fromkeys(xs[0]) | {"w": jnp.eye(5, dtype=FLOAT)}
    report = negative.audit(xs, (0.5, 0.5), avoid, 1.0, activations=inputs, aligned=xs)
    numbers = {
        "radius": 2.0, "distance": 5.0, "margin": 3.0, "average_norm": 4.0, "spectral_budget": 1.25,
        "nuclear_budget": 6.5, "efficiency": 0.75, "segment_distance": 2.5, "line_distance": 1.5,
        "dtype_floor": 1e-3, "amplification": 1.75, "aligned_distance": 2.25,
        "aligned_margin": 0.25, "tail_curve": np.arange(8.0, 0, -1),
        "leafwise_curve": np.arange(5.0, 0, -1),
        "frobenius_budget": [np.inf] * 6 + [4.5, 3.0], "source_budgets": [6.0, 7.0],
    }  # fmt: skip
    ranks = {"rank_needed": 3, "pooled_rank_needed": 6, "ceiling": 4}
    leaf = dataclasses.replace(
        next(x for x in report.leaves if x.path == "['w']"),
        distance=jnp.asarray(2.75, FLOAT), rank_needed=jnp.int32(0),
        stable_rank=jnp.asarray(1.5, FLOAT), effective_rank=jnp.asarray(1.75, FLOAT),
        data_tail=jnp.asarray([9.5, 8.5, 0.0], FLOAT),
    )  # fmt: skip
    stack = dataclasses.replace(
        next(x for x in report.leaves if x.path == "['s']"),
        distance=jnp.asarray(1.125, FLOAT), rank_needed=jnp.int32(-1),
        stable_rank=jnp.asarray([1.25, 1.0], FLOAT), effective_rank=jnp.asarray([1.5, 2.0], FLOAT),
    )  # fmt: skip
    figures = {k: jnp.asarray(v, FLOAT) for k, v in numbers.items()}
    figures |= {k: jnp.int32(v) for k, v in ranks.items()}
    lines = str(dataclasses.replace(report, leaves=(leaf, stack), **figures)).splitlines()
    assert lines[0] == "Audit of an average 5 away from the point to avoid, radius 2"
    rows = {line[:34].strip(): line[34:] for line in lines[2:13]}
    assert rows == {
        "margin": "3",
        "least edit back, any rank": "3, 0.75 of the average's norm",
        "its least spectral norm": "1.25",
        "its least nuclear norm": "6.5",
        "rank needed in every matrix": "3 of 4 (ceiling 4, efficiency 0.75)",
        "rank needed over all matrices": "6 of 7",
        "nearest convex average": "2.5",
        "nearest average of any sign": "1.5",
        "least edit back of one point": "6, 7",
        "rounding of the average": "0.001 (amplification 1.75)",
        "margin after alignment": "0.25 (distance 2.25)",
    }
    cells = [line.split("  ") for line in lines[14:17]]
    assert [[cell.strip() for cell in row if cell] for row in cells] == [
        ["leaf", "matrix", "distance", "stable rank", "effective rank", "rank alone", "on data"],
        ["['w']", "5 x 4", "2.75", "1.50", "1.75", "0", "9.5"],
        ["['s']", "2 x 3 x 2", "1.125", "1.00 to 1.25", "1.50 to 2.00", "never", "-"],
    ]


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(FLOAT, 2.0**-10), (FLOAT, 1.0), (FLOAT, 2.0**10), (jnp.bfloat16, 1.0), (jnp.float16, 1.0)],
)
def test_the_table_says_why_there_is_no_margin(dtype, scale):
    rng = np.random.default_rng(3)
    x, y, avoid = (
        {"w": jnp.asarray(scale * (5 + rng.normal(size=(8, 8))), dtype)} for _ in range(3)
    )
    radius = 12.0 * scale
    surface, inside = "on the surface of the ball", "inside the ball"
    for guarded in (
        negative.exit_ball([x, y], (0.5, 0.5), avoid, radius),
        negative.guard_hull([x, y], avoid, radius),
    ):
        at = functools.partial(negative.audit, guarded, (0.5, 0.5), avoid)
        own = float(at(radius).distance)
        assert surface in str(at(own))
        assert surface not in str(at(own / 2))
        assert inside not in str(at(own / 2))
        assert inside in str(at(own * 2))
    guarded = negative.exit_ball([x, y], (0.5, 0.5), avoid, radius)
    assert surface in str(negative.audit(guarded, (0.5, 0.5), avoid, radius))


def test_the_aligned_margin_is_that_of_the_aligned_average():
    x = {"in": jnp.asarray([[1.0, 0.0], [0.0, 3.0]], FLOAT)}
    swapped = {"in": x["in"][:, ::-1]}
    report = negative.audit([x, swapped], (0.5, 0.5), x, 0.5, aligned=[x, x])
    assert report.margin > 0.5
    assert report.aligned_distance == 0
    assert report.aligned_margin == 0


def test_rounding_to_bfloat16_is_the_floor():
    xs = [jnp.asarray([1.0, 3.0], jnp.bfloat16), jnp.asarray([1.0078125, 3.0], jnp.bfloat16)]
    report = negative.audit(xs, (0.5, 0.5), jnp.zeros(2, jnp.bfloat16), 0.5)
    wanted = abs(1.00390625 - float(jnp.asarray(1.00390625, jnp.bfloat16)))
    assert wanted > 0
    np.testing.assert_allclose(float(report.dtype_floor), wanted)
    assert negative.audit([jnp.ones(2)], (1,), jnp.zeros(2), 0.5).dtype_floor == 0


def test_the_aligned_average_has_the_coefficients_of_the_average():
    a, c = jnp.asarray([8.0, 0.0], FLOAT), jnp.asarray([0.0, 24.0], FLOAT)
    report = negative.audit([a, a], (3.0, 1.0), jnp.zeros(2, FLOAT), 1.0, aligned=[a, c])
    assert (report.distance, report.margin) == (8, 7)
    np.testing.assert_allclose(report.aligned_distance, 6 * np.sqrt(2), rtol=8 * UNIT)
    np.testing.assert_allclose(report.aligned_margin, 6 * np.sqrt(2) - 1, rtol=8 * UNIT)


def test_efficiency_is_the_rank_needed_over_the_ceiling():
    x, zero = jnp.diag(jnp.asarray([8.0, 4.0, 1.0, 0.0], FLOAT)), jnp.zeros((4, 4), FLOAT)
    report = negative.audit([x], (1,), zero, 3.0)  # 81 (1 - r/4) <= 9 from r = 4 on
    assert (report.rank_needed, report.ceiling, report.efficiency) == (2, 4, 0.5)


def test_the_floor_is_that_of_the_dtype_of_the_first_point():
    x, zero = jnp.asarray([1.00390625, 3.0], jnp.float32), jnp.zeros(2, jnp.float32)
    half = x.astype(jnp.bfloat16)
    average_ = (float(x[0]) + float(half[0])) / 2
    wanted = abs(average_ - float(jnp.asarray(average_, jnp.bfloat16)))
    assert wanted > 0
    assert negative.audit([half, x], (1, 1), zero, 0.5).dtype_floor == wanted
    assert negative.audit([x, half], (1, 1), zero, 0.5).dtype_floor == 0


def test_on_the_sphere_nothing_has_to_move():
    x, zero = jnp.asarray([[3.0, 0.0], [0.0, 4.0]], FLOAT), jnp.zeros((2, 2), FLOAT)
    report = negative.audit([x, 9 * x], (1, 0), zero, 5.0)
    assert report.distance == report.radius
    for name in ("margin", "rank_needed", "pooled_rank_needed", "ceiling", "efficiency"):
        assert getattr(report, name) == 0
    for name in ("frobenius_budget", "spectral_budget", "nuclear_budget", "source_budgets"):
        assert not np.any(np.asarray(getattr(report, name)))


def test_a_zero_displacement_and_a_zero_radius():
    zero = {"w": jnp.zeros((3, 2), FLOAT)}
    report = negative.audit([zero], (1,), zero, 0.0)
    assert (report.margin, report.rank_needed, report.efficiency) == (0, 0, 0)
    assert (report.leaves[0].stable_rank, report.leaves[0].effective_rank) == (0, 0)
    one = {"w": jnp.eye(3, 2, dtype=FLOAT)}
    report = negative.audit([one], (1,), zero, 0.0)
    assert report.rank_needed == report.ceiling == 2
    np.testing.assert_allclose(report.frobenius_budget, [np.inf, np.inf, np.sqrt(2)], rtol=8 * UNIT)
    np.testing.assert_allclose(report.spectral_budget, 1.0, rtol=8 * UNIT)
    np.testing.assert_allclose(report.nuclear_budget, 2.0, rtol=8 * UNIT)
    assert negative.audit([{}], (1,), {}, 1.0).distance == 0  # the empty tree
    assert "Unmoved leaves: none" in str(negative.audit([{}], (1,), {}, 1.0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"points": [{"w": jnp.full((2, 2), jnp.nan)}]}, r"leaf \['w'\] of points\[0\] holds NaN"),
        ({"avoid": {"w": jnp.full((2, 2), jnp.inf)}}, r"leaf \['w'\] of avoid holds NaN"),
        ({"radius": -1.0}, "radius must be finite and at least 0"),
        ({"coefficients": (1, 1)}, "coefficients has 2 numbers for 1 points"),
        ({"aligned": [{"w": jnp.eye(2)}] * 2}, "aligned has 2 trees for 1 points"),
        ({"aligned": [{"w": jnp.full((2, 2), jnp.nan)}]}, r"of aligned\[0\] holds NaN"),
        ({"activations": {"x": None}}, "activations must be a tree like the weights"),
        ({"activations": {"w": jnp.ones((3, 5))}}, r"has shape \(3, 5\) for a leaf of shape"),
        ({"activations": {"w": jnp.ones(2)}}, r"has shape \(2,\) for a leaf of shape"),
        ({"activations": {"w": jnp.full((1, 2), jnp.nan)}}, "activations at leaf .* holds NaN"),
        (
            {
                "points": [{"w": jnp.ones((2, 2, 3))}],
                "avoid": {"w": jnp.ones((2, 2, 3))},
                "activations": {"w": jnp.ones((5, 2))},
            },
            r"for a leaf of shape \(2, 2, 3\): give the inputs of one matrix",
        ),
    ],
)
def test_audit_refuses(options, words, refuses):
    usual = {"points": [{"w": jnp.eye(2)}], "coefficients": (1,), "avoid": {"w": jnp.zeros((2, 2))}}
    with refuses(ValueError, match=words):
        negative.audit(**(usual | {"radius": 1.0} | options))


def test_what_is_undefined_is_nan_where_traced():
    x, zero = jnp.eye(2, dtype=FLOAT), jnp.zeros((2, 2), FLOAT)
    for report in (audit([x], (1,), zero, -1.0), audit([x * jnp.nan], (1,), zero, 1.0)):
        assert is_nan([report.margin, report.frobenius_budget, report.spectral_budget])
        assert is_nan([report.nuclear_budget, report.efficiency])
        assert report.rank_needed == report.pooled_rank_needed == report.ceiling == -1


# Transformations, on a small tree: a report has many figures to compile


def figures(x, y, avoid):
    report = negative.audit([x, y], (0.6, 0.4), avoid, 2.0)
    names = ("margin", "tail_curve", "spectral_budget", "nuclear_budget", "segment_distance")
    figures_ = [getattr(report, name) for name in (*names, "line_distance")]
    return [*figures_, report.frobenius_budget[-1]]


def small(dtype=FLOAT, batch=()):
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 3), "b": (8,)}
    return [{k: jnp.asarray(rng.normal(size=(*batch, *s)), dtype) for k, s in shapes.items()}
            for _ in range(3)]  # fmt: skip


@pytest.mark.parametrize("dtype", [FLOAT, jnp.bfloat16])
def test_a_report_under_jit_is_that_in_eager_code(dtype):
    assert_close(jax.jit(figures)(*small(dtype)), figures(*small(dtype)), units=256)


def test_reports_are_mapped_over_stacked_trees():
    batch = small(batch=(3,))
    rows = [figures(*jax.tree.map(lambda x, i=i: x[i], batch)) for i in range(3)]
    looped = jax.tree.map(lambda *xs: jnp.stack(xs), *rows)
    assert_close(jax.vmap(figures)(*batch), looped, units=256)


def test_sharded_points_are_audited_where_they_lie():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        spread = jax.tree.map(lambda x: jax.device_put(x, jax.P("x")), small())
        got = jax.jit(figures)(*spread)
    got = jax.tree.map(np.asarray, (got, figures(*spread)))
    wanted = jax.tree.map(np.asarray, figures(*small()))
    for figures_ in got:
        for a, b in zip(figures_, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=256 * UNIT * 10)


def test_figures_have_the_derivatives_of_finite_differences():
    with jax.enable_x64(True):
        x, y, avoid = small(jnp.float64)
        smooth = jax.jit(lambda x: [f for f in figures(x, y, avoid) if f.ndim == 0])
        check_grads(smooth, (x,), order=1, modes=["rev"], rtol=1e-4)


def test_integer_leaves_and_other_layouts_are_refused_by_path(refuses):
    x, y, avoid = small()
    with refuses(TypeError, match=r"leaf \['w'\] of avoid has dtype int32.*tree.partition"):
        negative.audit([x, y], (1, 1), avoid | {"w": jnp.ones((8, 3), jnp.int32)}, 1.0)
    with refuses(ValueError, match=r"leaf \['w'\] has shape \(8, 3\) in .*, \(3, 8\) in avoid"):
        negative.audit([x, y], (1, 1), avoid | {"w": jnp.ones((3, 8))}, 1.0)


@pytest.mark.parametrize("power", [-80, 80])
def test_what_is_out_of_range_has_no_report(power, refuses):
    scale = np.float32(2.0**power)
    points = [jnp.asarray(scale * x) for x in np.ones((2, 3), np.float32)]
    words = "squares of their entries leave the range of float32"
    with refuses(ValueError, match=words):
        negative.audit(points, (0.5, 0.5), 0 * points[0], scale)
    report = audit(points, (0.5, 0.5), 0 * points[0], scale)
    assert jnp.isnan(report.margin)
    assert jnp.isnan(report.line_distance)
    assert report.rank_needed == -1
    nothing = negative.audit([0 * x for x in points], (0.5, 0.5), 0 * points[0], 1.0)
    assert nothing.distance == nothing.margin == 0
