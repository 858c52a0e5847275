"""Lazy leaves of files: what is computed of them in few programs, and what is refused."""

import functools
import inspect
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wspace import (
    _lazy,
    average,
    checkpoint,
    cone,
    geometry,
    merge,
    negative,
    perturb,
    tree,
)
from wspace.__main__ import main
from wspace._lazy import Lazy, Piece, taken
from wspace.testing import assert_close


def lazily(x):
    return Lazy(x.shape, x.dtype, lambda span, _: jnp.asarray(taken(x, span)))


def constant(number, *inputs):
    """A lazy leaf of ones times a number, or of what a number and its inputs come to."""
    return Lazy((3,), np.float32, lambda _, given: sum(given, np.full(3, number, np.float32)),
                inputs)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models in memory, and their files."""
    folder, random = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
    points = [
        {
            k: jnp.asarray(random.normal(size=s), jnp.float32)
            for k, s in (("w", (8, 6)), ("b", (6,)))
        }
        for _ in range(3)
    ]
    for i, x in enumerate(points):
        checkpoint.save(folder / f"{i}.safetensors", x)
    return points, [checkpoint.open(folder / f"{i}.safetensors") for i in range(3)]


def streamed(function, sources, out):
    with checkpoint.create(out, sources[0]) as writer:
        checkpoint.stream(function, sources, writer, lazy=True)
    return checkpoint.load(out)


def window(points):
    last = average.window(2)
    state = last.init(points[0])
    for x in points:
        state = last.update(state, x)
    return last.value(state)


WHOLE = {
    "gaussian": lambda p: perturb.gaussian(jax.random.key(0), p[0]),
    "sparse": lambda p: cone.project(cone.Sparse(20), p[0]).edit,
    "mask": lambda p: cone.project(cone.Mask({"w": True, "b": False}), p[0]).edit,
    "attenuate": lambda p: negative.attenuate(p[0], geometry.orthonormalize([p[1]]), 1.0),
    "window": window,
    "harden": lambda p: negative.harden(p[0]),
    "tsv": lambda p: merge.tsv_m(p[0], p[1:]).weights,
    "jax": lambda p: {k: jnp.where(jnp.isfinite(x), x, 0) for k, x in p[0].items()},
    "numpy": lambda p: {k: np.abs(x) for k, x in p[0].items()},
}
IN_PIECES = {
    "mean": average.mean,
    "emr": lambda p: merge.emr_model(p[0], merge.emr(p[0], p[1:]), 0),
    "lines": lambda p: merge.lines(p[0], {"w": 0, "b": 1}, start=0.5, rise=1.0),
    "filters": lambda p: perturb.filter_normalize(p[0], p[1]),
    "guide": lambda p: negative.guide_perpendicular(*p, 2.0, 0.5),
    "retarget": lambda p: negative.retarget(p[:2], (0.5, 0.5), p[2])[0],
    "exit ball": lambda p: negative.exit_ball(p[:2], (0.5, 0.5), p[2], 100.0)[0],
    "distance": lambda p: tree.combine((geometry.distance(p[0], p[1]),), (p[0],)),
    "gram": lambda p: tree.combine((geometry.gram(p)[0, 1],), (p[0],)),
    "cancellation": lambda p: tree.combine((merge.cancellation(p),), (p[0],)),
    "sign conflict": lambda p: tree.combine((merge.sign_conflict(p)[0, 1],), (p[0],)),
    "norm of one leaf": lambda p: p[0] | {
        "w": tree.combine((tree.norm(p[1]["w"]),), (p[0]["w"],))
    },
}  # fmt: skip


def square(_, arrays):
    return arrays[0] ** 2


@pytest.mark.parametrize("name", WHOLE)
def test_functions_of_whole_arrays_are_refused_by_an_error_of_ours(name, models, tmp_path, refuses):
    _, files = models
    with refuses(TypeError, match=r"a lazy leaf of shape .* is not in memory.*checkpoint\.load"):
        streamed(WHOLE[name], files, tmp_path / "out.safetensors")


@pytest.mark.exact
@pytest.mark.parametrize("name", IN_PIECES)
def test_functions_of_entries_and_sums_give_the_bits_of_memory(name, models, tmp_path):
    points, files = models
    found = streamed(IN_PIECES[name], files, tmp_path / "out.safetensors")
    for key, wanted in IN_PIECES[name](points).items():
        assert np.asarray(found[key]).tobytes() == np.asarray(wanted).tobytes()


def test_a_quotient_of_sums_is_that_of_memory_to_a_rounding(models, tmp_path):
    # Which products a compiler fuses with a sum may depend on the shape of what it compiles.
    points, files = models

    def mean(p):
        return average.fisher_mean(p, [tree.elementwise(square)((), (x,)) for x in p])

    found = streamed(mean, files, tmp_path / "out.safetensors")
    assert_close(found, dict(mean(points)), units=2)


@pytest.mark.parametrize("size", [4, 2**16, 2**16 + 1])
def test_sums_of_one_lazy_leaf(size):
    x = np.random.default_rng(0).normal(size=size).astype(np.float32)
    exact = np.sqrt((np.longdouble(x) ** 2).sum())
    for lazy in ({"w": lazily(x)}, {"w": lazily(x), "b": lazily(x[:0])}, [lazily(x[:, None])]):
        np.testing.assert_allclose(tree.norm(lazy), np.float64(exact), rtol=1e-6)
    largest = tree.reduction(lambda _, arrays: arrays[0], kind="max")
    assert largest((), ([lazily(x)],)) == x.max()


def test_counts_and_peaks_of_lazy_leaves_are_read_in_pieces_and_sums_whole(monkeypatch):
    monkeypatch.setattr(_lazy, "_LARGEST", 7)
    x, spans = np.arange(-20, 20, dtype=np.float32), []

    def read(span, _):
        spans.append(span)
        return jnp.asarray(taken(x, span))

    leaf = Lazy(x.shape, x.dtype, read)
    count = tree.reduction(lambda _, arrays: [arrays[0] > 3, arrays[0] < 0])
    assert count((), (leaf,)).tolist() == [16, 20]
    assert [(s.start, s.stop) for s in spans] == [(i, min(i + 7, 40)) for i in range(0, 40, 7)]
    for kind, wanted in (("max", 19), ("min", -20)):
        spans.clear()
        best = tree.reduction(lambda _, arrays: arrays[0], kind=kind)
        assert best((), (leaf,)) == wanted
        assert len(spans) == 6
    spans.clear()
    assert tree.reduction(lambda _, arrays: arrays[0])((), (leaf,)) == -20
    assert spans == [None]


def test_pieces_are_of_few_lengths_and_say_their_own_entries(monkeypatch):
    lengths = set()
    for size in range(1, 3000):
        (piece,) = lazily(np.zeros(size, np.float32)).pieces()
        assert (piece.start, piece.stop) == (0, size)
        assert size <= piece.length < max(2 * size, 257)
        lengths.add(piece.length)
    assert lengths == {256, 512, 1024, 2048, 4096}
    monkeypatch.setattr(_lazy, "_LARGEST", 1000)
    x = np.arange(2500, dtype=np.float32)
    double = tree.combine((2.0,), (lazily(x),))
    pieces = double.pieces()
    assert pieces == [Piece(0, 1000, 1024), Piece(1000, 2000, 1024), Piece(2000, 2500, 512)]
    for piece in pieces:
        np.testing.assert_array_equal(double.read(piece), 2 * x[piece.start : piece.stop])
        (longer,) = _lazy.computed([double], piece)
        assert longer.shape == (piece.length,)
        assert (longer[piece.stop - piece.start :] == 2 * x[piece.stop - 1]).all()
    assert lazily(np.zeros((0, 3))).pieces() == [None]
    assert Lazy((4,), np.float32, len, in_pieces=False).pieces() == [None]
    inner = Lazy((4,), np.float32, len, in_pieces=False)
    assert Lazy((4,), np.float32, len, [lazily(x[:4]), inner]).pieces() == [None]


def test_formulas_of_leaves_are_given_them_whole(monkeypatch):
    monkeypatch.setattr(_lazy, "_LARGEST", 7)
    x = np.arange(20, dtype=np.float32)

    @functools.partial(tree.elementwise, scope="leaf")
    def centered(_, arrays):
        return arrays[0] - jnp.mean(arrays[0])

    leaf = centered((), (lazily(x),))
    for found, wanted in ((leaf, x - 9.5), (tree.combine((2.0,), (leaf,)), 2 * x - 19)):
        assert found.pieces() == [None]
        np.testing.assert_array_equal(found.read(*found.pieces()), wanted)


def test_indices_of_lazy_entries_are_those_of_the_leaf(monkeypatch):
    monkeypatch.setattr(_lazy, "_LARGEST", 7)

    @functools.partial(tree.elementwise, placed=True)
    def both(_, arrays, index):
        return [index.astype(arrays[0].dtype), index % 3 == 0]

    x = lazily(np.zeros((4, 5), np.float32))
    places, thirds = both((), (x, x))
    for leaf, wanted in ((places, np.arange(20)), (thirds, np.arange(20) % 3 == 0)):
        found = np.concatenate([leaf.read(span) for span in leaf.pieces()])
        np.testing.assert_array_equal(found, wanted)
        np.testing.assert_array_equal(leaf.read(), wanted.reshape(4, 5))
        assert leaf.dtype == wanted.dtype or leaf.dtype == np.float32


def test_a_computation_that_makes_lazy_leaves_is_told_them_apart():
    def compute(span, _):
        # Each is gone when the next one is made, and may take its place in memory.
        return sum(_lazy.computed([constant(number)], span)[0] for number in (1, 2, 3))

    np.testing.assert_array_equal(Lazy((3,), np.float32, compute).read(), np.full(3, 6))


def test_every_leaf_is_computed_once_and_held_no_longer_than_needed():
    calls = []

    def counted(name, *inputs):
        def compute(_, given):
            calls.append(name)
            return sum(given, np.ones(3, np.float32))

        return Lazy((3,), np.float32, compute, inputs)

    first = counted("first")
    second, third = counted("second", first), counted("third", first, first)
    last = counted("last", second, third, first)
    wanted = np.full(3, 1 + 2 + 3 + 1)
    for found in _lazy.computed([last, second, last, np.ones(3)])[::2]:
        np.testing.assert_array_equal(found, wanted)
    assert sorted(calls) == sorted(["first", "second", "third", "last"])
    assert calls.index("first") == 0
    assert calls[-1] == "last"


def test_what_is_computed_on_the_way_is_let_go():
    made, alive = [], []

    def compute(_, given):
        alive.append(sum(ref() is not None for ref in made))
        array = np.ones(3) + sum(given)
        made.append(weakref.ref(array))
        return array

    leaf = Lazy((3,), np.float64, compute)
    for _ in range(9):
        leaf = Lazy((3,), np.float64, compute, [leaf])
    _lazy.computed([leaf])
    assert max(alive) <= 1


def test_a_leaf_that_two_depend_on_again_and_again_is_visited_once():
    leaf = constant(1)
    for _ in range(40):  # of which there are 2^40 ways to the first
        leaf = constant(0, leaf, leaf)
    np.testing.assert_array_equal(leaf.read(), np.full(3, 2.0**40))


def test_a_chain_of_a_thousand_combinations_is_computed():
    x = leaf = lazily(np.ones(3, np.float32))
    for _ in range(1000):
        leaf = tree.combine((1.0, 1.0), (leaf, x))
    np.testing.assert_array_equal(leaf.read(), np.full(3, 1001))
    for _ in range(2000):
        leaf = constant(0, leaf)
    np.testing.assert_array_equal(leaf.read(), np.full(3, 1001))


def test_files_of_many_shapes_are_merged_by_few_programs(tmp_path, programs):
    random = np.random.default_rng(0)
    shapes = [(65 + i,) if i % 2 else (9 + i, 17) for i in range(128)]
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in "BACO"}
    points = {}
    for name in "BAC":
        points[name] = {
            f"t{i}": random.normal(size=shape).astype(np.float32) for i, shape in enumerate(shapes)
        }
        checkpoint.save(paths[name], points[name])
    jax.clear_caches()
    before = programs()
    words = ["merge", "ties", paths["A"], paths["C"], "--base", paths["B"], "-o", paths["O"]]
    assert main([*words, "--quiet"]) == 0
    assert 0 < programs() - before <= 30
    wanted, found = merge.ties(points["B"], [points["A"], points["C"]]), checkpoint.load(paths["O"])
    for key, leaf in wanted.items():
        np.testing.assert_array_equal(found[key], leaf)


def test_leaves_of_one_kind_are_traced_once_however_many_there_are():
    traced = []

    @tree.reduction
    def size(_, arrays):
        traced.append("sum")
        return arrays[0] ** 2

    @tree.elementwise
    def twice(_, arrays):
        traced.append("entries")
        return 2 * arrays[0]

    leaves = {str(i): lazily(np.full((2, 3), i, np.float32)) for i in range(20)}
    for name, leaf in leaves.items():
        assert float(size((), [{name: leaf}])) == 6 * int(name) ** 2
        assert float(twice((), [{name: leaf}])[name].read()[0, 0]) == 2 * int(name)
    # Once for what they will hold, and once for the program.
    assert traced.count("sum") <= 2
    assert traced.count("entries") <= 3


def test_what_a_lazy_leaf_says_of_itself():
    x = lazily(np.zeros((2, 3), np.float32))
    assert (x.shape, x.ndim, x.size, x.dtype) == ((2, 3), 2, 6, jnp.float32)
    assert isinstance(inspect.getattr_static(Lazy, "__jax_array__"), property)
    for whole in (jnp.sum, np.asarray, jnp.asarray, jax.jit(lambda x: x + 1)):
        with pytest.raises((ValueError, TypeError), match="not in memory"):
            whole(x)
