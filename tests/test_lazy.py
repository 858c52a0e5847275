"""Lazy leaves give the bits of arrays, and their selection is that of a stable sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.catalog import CASES, Case
from wspace import _lazy, merge, perturb, selection, tree
from wspace._lazy import Lazy, Runs
from wspace.selection import sifting

PIECE = 7
VOTED = Case(
    "merge.ties, voted",
    3,
    lambda x, *ys: merge.ties(x, ys, scope="leaf", election=merge.Election(zero="majority")),
    peak=9.3,
)


def lazily(x, spans=None):
    """The array as a lazy leaf, which notes the spans that are read."""

    def read(span, _):
        if spans is not None:
            spans.append(span)
        return jnp.asarray(_lazy.taken(x, span))

    return Lazy(x.shape, x.dtype, read)


@pytest.fixture
def small(monkeypatch):
    """Sizes at which few entries are many."""
    monkeypatch.setattr(_lazy, "_LARGEST", PIECE)
    sizes = {"FEW": 5, "HELD": 0, "SAMPLE": 10, "RUN": 2, "RUNS": 3, "APART": 9}
    for name, value in sizes.items():
        monkeypatch.setattr(sifting, name, value)


def drawn(seed, kind):
    random = np.random.default_rng(seed)
    for shape in ((3, 5), (0, 2), (), (41,), (2, 3, 4)):
        x = random.normal(size=shape)
        if kind == "few":
            x = np.round(x)
        if kind == "zero":
            x = np.where(random.uniform(size=shape) < 0.1, x, 0)
        if kind == "rows":  # one run does not tell what the others are
            x = x * 10.0 ** random.integers(-9, 9)
        if kind == "nan":
            x = np.where(random.uniform(size=shape) < 0.3, np.nan, x)
        yield np.asarray(x, np.float32)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["normal", "few", "zero", "rows", "nan"])
@pytest.mark.parametrize(
    ("held", "deviations"), [(0, 4), (0, 0), (1000, 4), (1000, 0)]
)  # with no deviation allowed, most guesses fail
def test_the_selection_of_lazy_leaves_is_that_of_a_stable_sort(kind, held, deviations, monkeypatch):
    monkeypatch.setattr(sifting, "HELD", held)
    monkeypatch.setattr(sifting, "DEVIATIONS", deviations)
    for seed in range(4):
        arrays = list(drawn(seed, kind))
        flat = np.abs(np.concatenate([x.reshape(-1) for x in arrays]))
        order = np.argsort(-np.where(np.isnan(flat), np.inf, flat), kind="stable")
        for k in (0, 1, 2, 17, 40, 63, len(flat) - 1, len(flat)):
            masks = selection.top_mask(list(map(lazily, arrays)), k)
            found = np.concatenate([np.asarray(x.read()).reshape(-1) for x in masks])
            wanted = np.zeros(len(flat), bool)
            wanted[order[:k]] = True
            np.testing.assert_array_equal(found, wanted)
            if k:
                kth = selection.kth_magnitude(list(map(lazily, arrays)), k)
                np.testing.assert_array_equal(kth, flat[order[k - 1]])


@pytest.mark.usefixtures("small")
def test_common_entries_are_not_taken_out_of_the_leaves(monkeypatch):
    taken = []
    partition = np.partition
    monkeypatch.setattr(np, "partition", lambda x, k: taken.append(len(x)) or partition(x, k))
    x = np.zeros(1000, np.float32)
    x[::100] = 1
    mask = selection.top_mask(lazily(x), 12)
    assert np.flatnonzero(np.asarray(mask.read())).tolist() == [0, 1, 2, *range(100, 1000, 100)]
    assert not taken


@pytest.mark.usefixtures("small")
def test_a_selection_reads_little_more_than_all_entries_once():
    spans = []
    x = np.random.default_rng(0).normal(size=900).astype(np.float32)
    selection.top_mask([lazily(x[:400], spans), lazily(x[400:], spans)], 180)
    runs = [span for span in spans if isinstance(span, Runs)]
    assert sum(len(x.starts) * x.length for x in runs) <= 2 * 104
    assert sum(x.stop - x.start for x in spans if x not in runs) == 900


@pytest.mark.parametrize("piece", [5, 100])
@pytest.mark.parametrize("case", [*(case for case in CASES if case.lazy), VOTED], ids=str)
def test_functions_of_lazy_trees_give_the_bits_of_arrays(case, piece, monkeypatch):
    monkeypatch.setattr(_lazy, "_LARGEST", piece)
    points = [
        {f"{i}": jnp.asarray(x, [jnp.float32, jnp.bfloat16][i % 2]) for i, x in enumerate(xs)}
        for xs in (drawn(seed, "normal") for seed in range(case.trees))
    ]
    lazy = [jax.tree.map(lambda x: lazily(np.asarray(x)), x) for x in points]
    wanted = case.function(*points)
    for key, leaf in case.function(*lazy).items():
        whole, parts = leaf.read(), [leaf.read(span) for span in leaf.pieces()]
        assert (leaf.dtype, leaf.shape) == (whole.dtype, whole.shape)
        joined = np.concatenate([np.asarray(x).reshape(-1) for x in parts])
        assert whole.tobytes() == np.asarray(wanted[key]).tobytes()
        assert joined.tobytes() == np.asarray(wanted[key]).tobytes()


def test_arrays_beside_lazy_leaves_are_taken_in_the_same_pieces(monkeypatch):
    monkeypatch.setattr(_lazy, "_LARGEST", PIECE)
    x, y = (np.arange(20, dtype=np.float32).reshape(4, 5) * c for c in (1, 2))
    (leaf,) = jax.tree.leaves(tree.combine((1, 1), (lazily(x), jnp.asarray(y))))
    found = np.concatenate([leaf.read(span) for span in leaf.pieces()])
    np.testing.assert_array_equal(found, (x + y).reshape(-1))


def test_what_several_leaves_depend_on_is_computed_once():
    spans = []
    x = lazily(np.ones(3, np.float32), spans)
    (double,) = jax.tree.leaves(tree.combine((1, 1), (x, x)))
    (sum_,) = jax.tree.leaves(tree.combine((1, 1), (double, x)))
    np.testing.assert_array_equal(sum_.read(), 3 * np.ones(3))
    assert spans == [None]


@pytest.mark.usefixtures("small")
def test_formulas_of_rows_and_of_leaves_take_them_whole():
    base, tuned, avoid = ({"w": x} for x in np.random.default_rng(0).normal(size=(3, 4, 5)))
    base, tuned, avoid = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (base, tuned, avoid))
    for function in (merge.ext_sub, lambda _, x, y: perturb.filter_normalize(x, y)):
        wanted = function(base, tuned, avoid)["w"]
        lazy = function(*jax.tree.map(lazily, (base, tuned, avoid)))["w"]
        assert isinstance(lazy, Lazy)
        np.testing.assert_array_equal(lazy.read(), wanted)
