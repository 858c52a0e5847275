"""Laws of `wspace.merge.report`, against counts by numpy and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import FLOAT, UNIT
from wspace import lowrank, merge, tree
from wspace.testing import points, vector

LAYOUT = {"w": (4, 3), "empty": (0, 2), "t": (), "b": [(3,), None]}
signs = st.lists(st.sampled_from([-2.0, 0.0, 0.5, 1.0]), min_size=3, max_size=3)
cuts = st.sampled_from([None, 0.5, 3.0])
COUNTS = ("entries", "moved", "kept", "agreed", "flipped", "overruled", "disputed")
NORMS = ("norms", "trimmed", "outvoted", "displacement")


def flat(x):
    return vector(x).astype(np.float64)


@jax.jit
def agreed(base, edits, c):
    """What TIES makes of edits."""
    edit = merge.disjoint_merge(edits, merge.elect(edits, c), c)
    return tree.combine((1.0, 1.0), (base, edit))


def by_hand(base, tuned, merged, c, edits):
    """Every figure of a tally, entry by entry."""
    taus = np.array([flat(x) - flat(base) for x in tuned])
    made = taus if edits is None else np.array([flat(x) for x in edits])
    move = flat(merged) - flat(base)
    votes = np.sign(made) * np.sign(np.array(c))[:, None]
    moves = np.sign(move)
    agreed, flipped = votes * moves > 0, votes * moves < 0
    return {
        "entries": move.size,
        "moved": (taus != 0).sum(1),
        "kept": (made != 0).sum(1),
        "agreed": agreed.sum(1),
        "flipped": flipped.sum(1),
        "overruled": np.array([[(f & a).sum() for a in agreed] for f in flipped]),
        "disputed": sum(1 in column and -1 in column for column in votes.T),
        "norms": np.linalg.norm(taus, axis=1),
        "trimmed": np.linalg.norm(np.where(made == 0, taus, 0), axis=1),
        "outvoted": np.linalg.norm(np.where(agreed, 0, made), axis=1),
        "displacement": np.linalg.norm(move),
        "products": taus @ move,
    }


def assert_tally(tally, wanted, scale):
    for name in COUNTS:
        np.testing.assert_array_equal(getattr(tally, name), wanted[name], err_msg=name)
    for name in NORMS:
        np.testing.assert_allclose(
            getattr(tally, name), wanted[name], atol=64 * UNIT * scale, err_msg=name
        )
    sizes = wanted["norms"] * wanted["displacement"]
    assert (np.isnan(tally.cosines) == (sizes == 0)).all()
    known = sizes > 0
    np.testing.assert_allclose(
        (tally.cosines * sizes)[known], wanted["products"][known], atol=64 * UNIT * scale**2
    )
    assert (np.abs(tally.cosines[known]) <= 1).all()


@given(trees=points(count=4, layout=LAYOUT), c=signs, cut=cuts)
def test_every_figure_is_that_of_numpy(trees, c, cut):
    base, *tuned = trees
    taus = [merge.task_vector(base, x) for x in tuned]
    edits = None if cut is None else jax.tree.map(lambda x: jnp.where(abs(x) < cut, 0, x), taus)
    merged = agreed(base, taus if edits is None else edits, c)
    told = merge.report(base, tuned, merged, c, edits=edits)
    scale = sum(np.linalg.norm(flat(x)) for x in trees) * (1 + np.abs(c).sum())
    assert_tally(told.total, by_hand(base, tuned, merged, c, edits), scale)
    paths = ["['b'][0]", "['empty']", "['t']", "['w']"]
    assert [leaf.path for leaf in told.leaves] == paths
    for i, leaf in enumerate(told.leaves):
        own = [jax.tree.leaves(x)[i] for x in (base, merged)]
        models = [jax.tree.leaves(x)[i] for x in tuned]
        thin = None if edits is None else [jax.tree.leaves(x)[i] for x in edits]
        assert_tally(leaf, by_hand(own[0], models, own[1], c, thin), scale)
    # An election is won by someone, so whoever is flipped is by a model, in a disputed entry.
    total = told.total
    assert (total.overruled.max(1) <= total.flipped).all()
    assert (total.flipped <= total.overruled.sum(1)).all()
    assert (total.flipped <= total.disputed).all()
    assert (total.agreed + total.flipped <= total.kept).all()
    # Counts depend on signs alone.
    again = merge.report(
        *jax.tree.map(lambda x: x / 4, (base, tuned, merged)),
        [3 * x for x in c],
        edits=None if edits is None else jax.tree.map(lambda x: x / 4, edits),
    )
    for name in COUNTS:
        np.testing.assert_array_equal(getattr(again.total, name), getattr(total, name))


def test_two_models_by_hand():
    base = {"w": jnp.ones((2, 3), FLOAT), "e": jnp.ones((0,), FLOAT), "t": jnp.zeros((), FLOAT)}
    first = base | {"w": base["w"] + jnp.asarray([[4, -3, 1], [0, 2, 0]], FLOAT)}
    second = base | {"w": base["w"] + jnp.asarray([[2, 5, 0], [-1, -2, 0]], FLOAT)}
    zero = jax.tree.map(jnp.zeros_like, base)
    thin = ([[4, -3, 0], [0, 2, 0]], [[2, 5, 0], [0, -2, 0]])
    edits = [zero | {"w": jnp.asarray(x, FLOAT)} for x in thin]
    merged = base | {"w": base["w"] + jnp.asarray([[3, 5, 0], [0, 0, 0]], FLOAT)}
    told = merge.report(base, (first, second), merged, edits=edits)
    total = told.total
    assert total.entries == 7
    assert total.moved.tolist() == [4, 4]
    assert total.kept.tolist() == [3, 3]
    assert total.agreed.tolist() == [1, 2]
    assert total.flipped.tolist() == [1, 0]
    assert total.overruled.tolist() == [[0, 1], [0, 0]]
    assert total.disputed == 2
    np.testing.assert_allclose(total.trimmed, [1, 1], rtol=8 * UNIT)
    np.testing.assert_allclose(total.outvoted, [np.sqrt(9 + 4), 2], rtol=8 * UNIT)
    np.testing.assert_allclose(total.displacement, np.sqrt(34), rtol=8 * UNIT)
    np.testing.assert_allclose(total.cosines, [-3 / np.sqrt(30 * 34), 31 / 34], rtol=64 * UNIT)
    text = str(told)
    assert (
        text.splitlines()[0] == "Merge of 2 models: displacement 5.83095, 2 of 7 entries disputed"
    )
    _, models, leaves = (part.splitlines() for part in text.split("\n\n"))
    header = "model coefficient norm kept agreed flipped flipped by each trimmed outvoted cosine"
    assert models[0].split() == header.split()
    row = "0 1 5.477 3 (42.9%) 1 (33.3%) 1 (33.3%) - 1 1 3.606 -0.094"
    assert " ".join(models[1].split()) == row
    assert models[2].endswith("0.912")
    assert [line.split()[0] for line in leaves] == ["leaf", "['e']", "['t']", "['w']"]
    assert leaves[1].split() == ["['e']", "0", "0", "-", "-", "-", "-", "-", "-", "-"]
    assert leaves[2].split()[:4] == ["['t']", "1", "0", "0.0%"]
    starts = {line.index(word) for line, word in zip(leaves, ("ent", "0", "1", "6"), strict=True)}
    assert len(starts) == 1  # a column


def test_what_was_trimmed_is_not_made_up():
    rng = np.random.default_rng(0)
    base, x, y = (jnp.asarray(rng.normal(size=40), FLOAT) for _ in range(3))
    merged = merge.ties(base, [x, y], density=0.3)
    told = merge.report(base, [x, y], merged)
    assert not told.knows_edits
    assert "trimmed: not known (give edits)" in str(told)
    _, models, leaves = (part.splitlines() for part in str(told).split("\n\n"))
    header = "model coefficient norm moved agreed flipped flipped by each not agreed cosine"
    assert models[0].split() == header.split()
    assert " ".join(leaves[0].split()) == "leaf entries displacement disputed moved flipped cosine"
    taus, move = [flat(z) - flat(base) for z in (x, y)], flat(merged) - flat(base)
    lost = [np.linalg.norm(tau[tau * move <= 0]) for tau in taus]
    np.testing.assert_allclose(told.total.outvoted, lost, rtol=64 * UNIT)
    edits = [merge.trim(merge.task_vector(base, each), 0.3) for each in (x, y)]
    known = merge.report(base, [x, y], merged, edits=edits)
    assert known.knows_edits
    assert "not known" not in str(known)


def test_one_model_alone_is_whole_and_one_that_is_turned_away_agrees_with_itself():
    base, x = jnp.zeros(5, FLOAT), jnp.asarray([1.0, -2.0, 3.0, 0.0, 4.0], FLOAT)
    for c in (1.0, -0.5):
        told = merge.report(base, [x], merge.task_arithmetic(base, [x], [c]), [c])
        total = told.total
        assert (total.agreed, total.flipped, total.disputed) == ([4], [0], 0)
        assert (total.trimmed, total.outvoted) == ([0], [0])
        np.testing.assert_allclose(total.cosines, [np.sign(c)], rtol=8 * UNIT)
    # Read with the wrong sign, all of it is flipped, by nobody.
    wrong = merge.report(base, [x], merge.task_arithmetic(base, [x], [-1.0])).total
    assert (wrong.flipped, wrong.overruled) == ([4], [[0]])
    assert str(told).startswith("Merge of 1 model: displacement 2.73861, 0 of 5 entries disputed")


def test_a_coefficient_of_zero_and_a_merge_that_goes_nowhere_have_no_sign():
    base, x = jnp.zeros(3, FLOAT), jnp.asarray([1.0, -2.0, 0.0], FLOAT)
    for merged, c in ((x, 0.0), (base, 1.0)):
        total = merge.report(base, [x], merged, [c]).total
        assert (total.kept, total.agreed, total.flipped) == ([2], [0], [0])
        np.testing.assert_allclose(total.outvoted, np.sqrt(5), rtol=8 * UNIT)
    assert np.isnan(total.cosines).all()


def test_half_precision_has_the_signs_of_single_precision_or_none():
    rng = np.random.default_rng(0)
    base = jnp.asarray(rng.normal(size=(64,)), jnp.bfloat16)
    tuned = [
        base.astype(jnp.float32) + 0.002 * rng.normal(size=64).astype(np.float32) for _ in "ab"
    ]
    narrow = merge.report(base, tuned, merge.task_arithmetic(base, tuned))
    wide = tree.upcast(base)
    whole = merge.report(wide, tuned, merge.task_arithmetic(wide, tuned))
    assert narrow.total.norms == pytest.approx(whole.total.norms, rel=1e-6)
    for name in ("agreed", "flipped"):
        assert (getattr(narrow.total, name) <= getattr(whole.total, name)).all()
    assert narrow.total.agreed.sum() < whole.total.agreed.sum()
    assert narrow.total.disputed == whole.total.disputed


def test_dropped_edits_are_counted_and_their_key_is_kept():
    key, base = jax.random.key(7), jnp.zeros(100, FLOAT)
    tuned = [jnp.ones(100, FLOAT), -2 * jnp.ones(100, FLOAT)]
    edits = [merge.drop(jax.random.fold_in(key, i), x, 0.3) for i, x in enumerate(tuned)]
    told = merge.report(
        base, tuned, merge.dare(key, base, tuned, density=0.3), edits=edits, key=key
    )
    kept = np.array([np.count_nonzero(x) for x in edits])
    np.testing.assert_array_equal(told.total.kept, kept)
    np.testing.assert_allclose(told.total.trimmed, np.sqrt(100 - kept) * [1, 2], rtol=16 * UNIT)
    # These are the edits that the merge made: where only one was kept, it decides.
    both = np.count_nonzero(np.asarray(edits[0]) * np.asarray(edits[1]))
    assert told.total.disputed == both
    assert told.total.flipped.tolist() == [both, 0]
    assert told.total.agreed.tolist() == [kept[0] - both, kept[1]]
    assert told.seed == (0, 7)
    assert "key [0, 7]" in str(told)
    assert merge.report(base, tuned, base).seed is None


def test_sharded_leaves_are_counted_where_they_lie():
    rng = np.random.default_rng(1)
    base, x, y = (
        {"w": jnp.asarray(rng.normal(size=(8, 3)), FLOAT), "t": jnp.asarray(rng.normal(), FLOAT)}
        for _ in range(3)
    )
    merged = merge.task_arithmetic(base, [x, y])
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        put = functools.partial(
            jax.tree.map, lambda a: jax.device_put(a, jax.P("x") if a.ndim else jax.P())
        )
        spread = merge.report(put(base), [put(x), put(y)], put(merged))
    assert str(spread) == str(merge.report(base, [x, y], merged))


THREE = {"w": jnp.ones(3, FLOAT)}


@pytest.mark.parametrize(
    ("error", "options", "words"),
    [
        (ValueError, {"tuned": []}, "tuned is empty"),
        (ValueError, {"merged": {"w": jnp.ones(2, FLOAT)}}, r"leaf \['w'\] has shape .* in merged"),
        (ValueError, {"coefficients": [1.0, 2.0]}, "2 numbers for 1 points"),
        (ValueError, {"coefficients": [np.nan]}, r"coefficients\[0\] must be finite"),
        (ValueError, {"edits": [THREE, THREE]}, "edits has 2 trees for 1 model"),
        (ValueError, {"edits": [{"v": THREE["w"]}]}, r"edits\[0\]"),
        (TypeError, {"merged": {"w": jnp.ones(3, jnp.int32)}}, "of merged has dtype int32"),
        (ValueError, {"base": {}, "tuned": [{}], "merged": {}}, "base has no leaves"),
    ],
)
def test_report_refuses(error, options, words, refuses):
    usual = {"base": THREE, "tuned": [THREE], "merged": THREE}
    with refuses(error, match=words):
        merge.report(**(usual | options))


def test_a_traced_report_is_refused():
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda x: merge.report(x, [THREE], THREE).total.norms)(THREE)
    edit = lowrank.LowRank(jnp.ones((3, 1), FLOAT), jnp.ones((2, 1), FLOAT))
    with pytest.raises(TypeError):
        merge.report(jnp.ones((3, 2), FLOAT), [edit], jnp.ones((3, 2), FLOAT))
