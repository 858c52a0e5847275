"""Laws of masks, of merges in which models compete for entries, and of what is taken away."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from tests import golden_arrays
from tests.helpers import is_nan
from tests.strategies import FLOAT, UNIT, scales
from wspace import cone, merge, tree
from wspace.testing import LAYOUTS, assert_close, like, points, size, vector, weights

pytestmark = pytest.mark.exact

LAYOUT = LAYOUTS[1]
GRID = st.integers(-24, 24).map(lambda n: n / 8)  # sums and differences of these are exact
families = st.lists(weights(LAYOUT, entries=GRID), min_size=4, max_size=4)
"""A base and three models tuned from it."""


def flat(xs):
    return np.stack([vector(x).astype(np.float64) for x in xs])


def edits_of(xs):
    return flat(xs[1:]) - flat(xs[:1])


# The same merges of rows of a NumPy matrix, one task vector a row.


def largest(t):
    return t[np.argmax(np.abs(t), axis=0), np.arange(t.shape[1])]


def selected(t, density):
    signs = np.sign(t.sum(0))
    if density < 1:
        variance = t.var(0)
        order = np.argsort(-variance, kind="stable")[: int(density * t.shape[1])]
        kept = np.isin(np.arange(t.shape[1]), order) & (variance > 0)
        t, signs = t * kept, signs * kept
    energies = (t**2).sum(1, keepdims=True)
    agree = energies * ((np.sign(t) == signs) & (signs != 0))
    by = agree.sum(0)
    return (agree * t).sum(0) / np.where(by == 0, 1, by)


def shared(t, threshold, boost, cap=0.2):
    changed = np.abs(t) > threshold * np.abs(t).max(1, keepdims=True)
    alone = changed.sum(0) == 1
    result = np.zeros(t.shape[1])
    for row, own in zip(t, changed, strict=True):
        single, other = (own & alone).sum(), (own & ~alone).sum()
        by = 1 + boost * min(other / single, cap) if single else 1.0
        result += np.where(own, np.where(alone, by * row, row), 0)
    return result / np.maximum(changed.sum(0), 1)


def balanced(t, density):
    peak = np.abs(t).max(1, keepdims=True)
    score = np.exp(len(t) * (t / np.where(peak == 0, 1, peak)) ** 2) * np.maximum(t * t.sum(0), 0)
    ordered = -np.sort(-score, axis=1)
    kept = int(density * t.shape[1])
    floor = ordered[:, kept : kept + 1] if kept < t.shape[1] else np.zeros((len(t), 1))
    room = ordered[:, :1] - floor
    share = np.maximum(score - floor, 0) / np.where(room == 0, 1, room)
    by = share.sum(0)
    return (share * t).sum(0) / np.where(by == 0, 1, by)


def consensual(t):
    return -0.75 * np.where((np.sign(t) == np.sign(t[0])).all(0), t.mean(0), 0)


def unified(t):
    signs = np.sign(t.sum(0))
    return signs * np.max(np.where(np.sign(t) == signs, np.abs(t), 0), axis=0)


METHODS = {
    "magmax": (merge.magmax, largest),
    "sce": (merge.sce, lambda t: selected(t, 1.0)),
    "ram": (merge.ram, lambda t: shared(t, 0.0, 0.0)),
    "ram, boosted": (
        functools.partial(merge.ram, threshold=0.3, boost=0.5),
        lambda t: shared(t, 0.3, 0.5),
    ),
    "pcb": (functools.partial(merge.pcb, density=1.0), lambda t: balanced(t, 1.0)),
    "pcb, few": (functools.partial(merge.pcb, density=0.4), lambda t: balanced(t, 0.4)),
    "negmerge": (functools.partial(merge.negmerge, strength=0.75), consensual),
    "emr": (
        lambda base, tuned: tree.combine((1, 1), (base, merge.emr(base, tuned).edit)),
        unified,
    ),
}
each_method = pytest.mark.parametrize(
    ("method", "oracle"), [(jax.jit(m), o) for m, o in METHODS.values()], ids=METHODS
)


@each_method
@given(xs=families, scale=scales, order=st.permutations(range(3)))
def test_merge_is_that_of_the_oracle_with_its_laws(method, oracle, xs, scale, order):
    base, *tuned = xs
    merged = method(base, tuned)
    wanted = vector(base) + oracle(edits_of(xs))
    assert_close(merged, like(wanted, base), units=32, scale=size(*xs))

    zero, edits = jax.tree.map(jnp.zeros_like, base), [merge.task_vector(base, x) for x in tuned]
    moved = method(zero, edits)
    for c in (-1.0, -scale):
        scaled = method(zero, [jax.tree.map(lambda x, c=c: c * x, e) for e in edits])
        assert_close(scaled, jax.tree.map(lambda x, c=c: c * x, moved), units=0)
    first, second, _ = np.sort(-np.abs(edits_of(xs)), axis=0)
    if oracle is not largest or (first < second).all():  # else the first of equal ones wins
        shuffled = method(base, [tuned[i] for i in order])
        assert_close(shuffled, merged, units=32, scale=size(*xs))


@given(xs=points(count=2, layout=LAYOUT))
def test_one_model_comes_back(xs):
    base, tuned = xs
    for name in ("magmax", "sce", "ram", "pcb", "emr"):
        got = METHODS[name][0](base, [tuned])
        assert_close(got, tree.combine((0, 1), (base, tuned)), units=4, scale=size(*xs))
    unified = merge.emr(base, [tuned])
    assert_close(unified.edit, merge.task_vector(base, tuned), units=0)
    assert float(unified.scales[0]) == bool((vector(unified.edit) != 0).any())


def test_sce_selects_by_variance():
    rng = np.random.default_rng(0)
    base, *tuned = (jnp.asarray(rng.normal(size=40), FLOAT) for _ in range(4))
    tuned = [x.at[:5].set(base[:5] + 9) for x in tuned]  # all agree, so nothing to select
    got = merge.sce(base, tuned, density=0.5)
    wanted = vector(base) + selected(edits_of([base, *tuned]), 0.5)
    assert_close(got, like(wanted, base), units=32)
    assert jnp.array_equal(got[:5], base[:5])
    assert jnp.array_equal(merge.sce(base, tuned[:1], density=0.5), base)


def input_of_peers():
    trees = [golden_arrays.tree("peers", f"input/{name}") for name in ("base", *TUNED)]
    base, *tuned = jax.tree.map(jnp.asarray, trees)
    return base, tuned


MERGEKIT = "mergekit-0.1.5"
TUNED = ("tuned0", "tuned1", "tuned2")
PARITY = {
    "sce?select_topk=1.0": functools.partial(merge.sce, **merge.presets.mergekit["sce"]),
    "sce?select_topk=0.5": functools.partial(
        merge.sce, **merge.presets.mergekit["sce"] | {"density": 0.5}
    ),
    "ram?": functools.partial(merge.ram, **merge.presets.mergekit["ram"]),
    "ramplus_tl?": functools.partial(merge.ram, **merge.presets.mergekit["ram"] | {"boost": 0.1}),
    "nearswap?t=0.02": lambda base, tuned: merge.nearswap(base, tuned[0], 0.02),
}


@pytest.mark.parametrize("case", PARITY)
def test_leaf_by_leaf_merges_are_those_of_mergekit(case):
    base, tuned = input_of_peers()
    got = {name: PARITY[case](base[name], [x[name] for x in tuned]) for name in base}
    wanted = jax.tree.map(jnp.asarray, golden_arrays.tree("peers", f"{MERGEKIT}/{case}"))
    assert_close(got, wanted, units=8)
    if case == "ram?":
        assert_close(tree.per_leaf(merge.ram)(base, tuned), wanted, units=8)


def test_an_absolute_threshold_would_see_no_change_in_small_task_vectors():
    base, edits = jnp.zeros(2), [jnp.array([1e-6, 0.0]), jnp.array([3e-6, 2e-6])]
    assert_close(merge.ram(base, edits), jnp.array([2e-6, 2e-6]), units=2)
    assert jnp.array_equal(merge.ram(base, edits, **merge.presets.mergekit["ram"]), base)


def test_of_equal_magnitudes_the_first_wins():
    a, b = jnp.array([2.0, -1.0]), jnp.array([-2.0, 1.0])
    assert jnp.array_equal(merge.magmax(jnp.zeros(2), [a, b]), a)
    assert jnp.array_equal(merge.magmax(jnp.zeros(2), [b, a]), b)
    assert jnp.array_equal(merge.magmax(jnp.zeros(2), [a, b], (1.0, -2.0)), -2 * b)


def test_a_product_with_tanh_would_depend_on_the_scale():
    t = np.array([[3.0, 1.0, 0.5, 0.1], [-1.0, 1.0, 2.0, 0.3]])

    def with_tanh(t):
        size = np.abs(t) / np.abs(t).max(1, keepdims=True)
        score = np.exp(len(t) * size**2) * np.tanh(np.maximum(t * t.sum(0), 0))
        share = score / score.max(1, keepdims=True)
        return (share * t).sum(0) / share.sum(0)

    assert np.abs(with_tanh(t) - 1e4 * with_tanh(1e-4 * t)).max() > 0.1
    got = merge.pcb(jnp.zeros(4), [jnp.asarray(x, FLOAT) for x in t], density=1.0)
    np.testing.assert_allclose(got, 1e4 * with_tanh(1e-4 * t), rtol=1e-4)


# Masks.


@given(xs=families, strengths=st.tuples(*[st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0])] * 2))
def test_tall_masks_and_their_consensus(xs, strengths):
    _, *edits = xs
    total = tree.combine([1.0] * 3, edits)
    low, high = sorted(strengths)
    masks = [merge.tall_mask(x, total, low) for x in edits]
    fewer = [merge.tall_mask(x, total, high) for x in edits]
    t = flat(edits)
    wanted = np.abs(t) > low * np.abs(t.sum(0) - t)
    got = flat(masks).astype(bool)
    np.testing.assert_array_equal(got, wanted)
    assert (got >= flat(fewer).astype(bool)).all()
    by = [flat([merge.consensus_mask(masks, k)])[0].astype(bool) for k in range(5)]
    np.testing.assert_array_equal(by, [wanted.sum(0) >= k for k in range(5)])
    alone = merge.tall_mask(edits[0], edits[0], high)
    np.testing.assert_array_equal(flat([alone])[0].astype(bool), t[0] != 0)
    kept = cone.project(cone.Mask(masks[0]), edits[0]).edit
    np.testing.assert_array_equal(flat([kept])[0], np.where(wanted[0], t[0], 0))


def test_comparing_with_the_base_weights_is_another_mask():
    rng = np.random.default_rng(0)
    base = rng.normal(size=200)
    edits = 0.1 * rng.normal(size=(3, 200))
    rest = edits.sum(0) - edits[0]
    right = np.asarray(merge.tall_mask(jnp.asarray(edits[0]), jnp.asarray(edits.sum(0))))
    np.testing.assert_array_equal(right, np.abs(edits[0]) > 0.4 * np.abs(rest))
    wrong = np.abs(edits[0]) > 0.4 * np.abs(base - edits[0])
    assert wrong.mean() < 0.4 * right.mean()


@given(xs=families)
def test_emr_gives_each_task_its_signs_and_its_size(xs):
    base, *tuned = xs
    unified = merge.emr(base, tuned)
    t, edit = edits_of(xs), flat([unified.edit])[0]
    masks = flat(unified.masks).astype(bool)
    np.testing.assert_array_equal(masks, t * edit > 0)
    assert (np.abs(edit)[None] >= np.abs(np.where(masks, t, 0))).all()
    for i, mask in enumerate(masks):
        model = merge.emr_model(base, unified, i)
        left = np.abs(edit[mask]).sum()
        s = np.abs(t[i]).sum() / left if left else 0.0
        wanted = vector(base) + s * np.where(mask, edit, 0)
        np.testing.assert_allclose(unified.scales[i], s, rtol=1e-5)
        assert_close(model, like(wanted, base), units=32, scale=size(*xs))


def test_means_of_leaves_added_up_would_not_keep_the_size_of_a_task():
    edits = [
        {"w": jnp.ones(100), "b": jnp.array([9.0])},
        {"w": jnp.full(100, 2.0), "b": jnp.ones(1)},
    ]
    base = jax.tree.map(jnp.zeros_like, edits[0])
    unified = merge.emr(base, edits)
    model = merge.emr_model(base, unified, 1)
    np.testing.assert_allclose(np.abs(flat([model])).sum(), 201, rtol=1e-6)
    by_means = (2 + 1) / (2 + 9) * (200 + 9)
    assert by_means < 60


# Part of an edit.


def projected(a, b, strength):
    """The row formula with the projector written out."""
    if not b.any():
        return a
    if not a.any():
        return a - strength / 2 * b
    c = a / np.linalg.norm(a) + b / np.linalg.norm(b)
    along = c / np.linalg.norm(c) if np.linalg.norm(c) > 1e-9 else np.zeros_like(c)
    return a - strength * (b - along * (along @ b))


ROWS = st.sampled_from([(1.0, 0.0), (1.0, 1.0), (-2.0, 0.0), (0.0, 0.0), (0.0, 1.0)])


@given(
    good=weights((4, 3), entries=GRID),
    other=weights((4, 3), entries=GRID),
    kinds=st.tuples(*[ROWS] * 4),
    strength=st.sampled_from([0.0, 1.0, -0.5]),
)
def test_ext_sub_takes_what_is_not_along_the_shared_direction(good, other, kinds, strength):
    kinds = np.array(kinds)
    bad = kinds[:, :1] * np.asarray(good, np.float64) + kinds[:, 1:] * np.asarray(other)
    base = jnp.ones((4, 3), FLOAT)
    got = merge.ext_sub(base, base + good, base + jnp.asarray(bad, FLOAT), strength)
    rows = zip(np.asarray(good, np.float64), bad, strict=True)
    wanted = 1 + np.stack([projected(a, b, strength) for a, b in rows])
    assert_close(got, jnp.asarray(wanted, FLOAT), units=64, scale=32)
    scalars = merge.ext_sub(jnp.zeros(()), jnp.asarray(2.0), jnp.asarray(-3.0))
    np.testing.assert_allclose(scalars, 2 + 3)  # opposite: all of it goes


@given(xs=families, t=st.sampled_from([0.0, 0.5, 2.0]), scale=scales)
def test_nearswap_moves_by_no_more_than_a_step(xs, t, scale):
    base, tuned, *_ = xs
    change = edits_of(xs)[0]
    wanted = vector(base) + np.sign(change) * np.minimum(np.abs(change), t)
    got = merge.nearswap(base, tuned, t)
    assert_close(got, like(wanted, base), units=0)
    scaled = [jax.tree.map(lambda x: scale * x, x) for x in (base, tuned, got)]
    assert_close(merge.nearswap(*scaled[:2], scale * t), scaled[2], units=0)


def outliers(base, tuned):
    """The importance of entries in units of the threshold, in float64."""
    p, q = (special.log_softmax(x, axis=-1) for x in (tuned, base))
    s = np.abs(tuned - base) * np.sum(np.exp(p) * (p - q), axis=-1, keepdims=True)
    least, middle, most = (np.sort(s, axis=None)[int(q * (s.size - 1))] for q in (0.25, 0.5, 0.75))
    return s / (middle + 1.5 * (most - least))


@given(seed=st.integers(0, 2**16), shape=st.sampled_from([(40,), (12, 8), (3, 3, 2, 4)]))
def test_arcee_fusion_takes_the_entries_that_moved_most_in_rows_that_did(seed, shape):
    rng = np.random.default_rng(seed)
    base, tuned = (jnp.asarray(rng.normal(size=shape), FLOAT) for _ in range(2))
    got = np.asarray(merge.arcee_fusion({"w": base}, {"w": tuned})["w"])
    wide = np.asarray(base, np.float64), np.asarray(tuned, np.float64)
    ratio = outliers(*wide)
    surely = np.abs(ratio - 1) > 1e-4
    assert 0 < np.sum(ratio > 1) < ratio.size / 3
    close = got == np.where(ratio > 1, tuned, base)
    near = np.abs(got - np.where(ratio > 1, *wide[::-1])) <= 4 * UNIT * np.abs(wide).sum(0)
    assert np.all((close | near)[surely])


def test_arcee_fusion_takes_whole_what_has_no_importance():
    base = {"c": jnp.zeros((5, 1)), "s": jnp.ones(()), "n": jnp.zeros((0, 3)), "w": jnp.zeros(8)}
    tuned = base | {"c": jnp.arange(5.0)[:, None], "s": jnp.asarray(3.0, FLOAT)}
    tuned["w"] = base["w"].at[:2].set(jnp.asarray([1.0, 0.5], FLOAT))
    assert_close(merge.arcee_fusion(base, tuned), tuned, units=0)
    assert_close(merge.arcee_fusion(base, base), base, units=0)
    broken = merge.arcee_fusion(base, tuned | {"w": tuned["w"].at[3].set(jnp.nan)})
    assert bool(jnp.isnan(broken["w"][3]))


def test_lines_scales_by_depth():
    edit = {"blocks": [jnp.ones(1), jnp.ones(1), jnp.ones(1)], "norm": jnp.ones(1)}
    tree_of_layers = {"blocks": [0, 1, 2], "norm": None}

    def by_path(path):
        return next((i for i in range(3) if f"[{i}]" in path), None)

    for layers in (tree_of_layers, by_path):
        got = merge.lines(edit, layers, start=0.5, rise=1.0)
        assert flat([got])[0].tolist() == [0.5, 1.0, 1.5, 0.5]
        deeper = merge.lines(edit, layers, start=0.5, rise=1.0, count=5)
        assert flat([deeper])[0].tolist() == [0.5, 0.75, 1.0, 0.5]
    one = merge.lines({"w": jnp.ones(1)}, {"w": 0}, start=0.5, rise=1.0)
    assert float(one["w"][0]) == 0.5
    half = jax.jit(lambda rise: merge.lines(edit, tree_of_layers, start=0.5, rise=rise))(1.0)
    assert_close(half, merge.lines(edit, by_path, start=0.5, rise=1.0), units=0)


def test_bad_arguments_are_refused(refuses):
    x, mask = {"w": jnp.ones(2)}, {"w": jnp.ones(2, bool)}
    for method in (merge.magmax, merge.sce, merge.ram, merge.pcb, merge.negmerge, merge.emr):
        with refuses(ValueError, match="tuned is empty"):
            method(x, [])
    for method in (merge.sce, merge.pcb):
        with refuses(ValueError, match="density must be above 0 and at most 1"):
            method(x, [x], density=0.0)
    with refuses(ValueError, match="no finite norm: base or tuned holds NaN"):
        merge.sce(x, [x, {"w": jnp.asarray([jnp.nan, 2.0])}])
    assert is_nan(jax.jit(lambda y: merge.sce(x, [x, y]))({"w": jnp.asarray([jnp.nan, 2.0])}))
    for option in ("threshold", "cap"):
        with refuses(ValueError, match=f"{option} must be at least 0"):
            merge.ram(x, [x], **{option: -1.0})
    with refuses(ValueError, match="strength must be at least 0"):
        merge.tall_mask(x, x, -1.0)
    with refuses(ValueError, match="threshold must be finite and at least 0"):
        merge.nearswap(x, x, -1.0)
    with refuses(TypeError, match=r"leaf \['w'\] of masks\[1\] has dtype float..: give booleans"):
        merge.consensus_mask([mask, x])
    with refuses(ValueError, match=r"has shape \(2,\) in masks\[0\], \(3,\) in masks\[1\]"):
        merge.consensus_mask([mask, {"w": jnp.ones(3, bool)}])
    with refuses(ValueError, match="at_least must be at least 0"):
        merge.consensus_mask([mask], -1)
    with pytest.raises(IndexError):
        merge.emr_model(x, merge.emr(x, [x]), 1)
    with refuses(ValueError, match="layers must be a tree like edit"):
        merge.lines(x, [0], start=1.0, rise=1.0)
    with refuses(ValueError, match=r"layers at leaf \['w'\] must be at least 0"):
        merge.lines(x, {"w": -1}, start=1.0, rise=1.0)
    with refuses(ValueError, match="a leaf is of layer 3, but count is 3"):
        merge.lines(x, {"w": 3}, start=1.0, rise=1.0, count=3)
