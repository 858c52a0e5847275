"""Functions of trees on files give what they give in memory, in the memory of a few tensors."""

import threading
import time

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wspace import _lazy, average, checkpoint, interpolate, merge, tree
from wspace.checkpoint.streaming import stream

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)


def saved(path, tensors):
    with checkpoint.create(path, tensors) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
    return checkpoint.open(path)


def models(count, folder, seed=0):
    random = np.random.default_rng(seed)
    shapes = {"a": (3, 4), "b": (7,), "c": (), "d": (0, 2), "e": (2, 3, 2)}
    found = []
    for i in range(count):
        tensors = {
            name: random.normal(size=shape).astype(DTYPES[j % 3])
            for j, (name, shape) in enumerate(shapes.items())
        }
        found.append(saved(folder / f"{i}", tensors | {"ids": np.arange(3)}))
    return found


def loaded(source):
    return {k: jnp.array(x.read()) for k, x in source.items() if k != "ids"}


def streamed(function, sources, out, **options):
    with checkpoint.create(out, sources[0]) as writer:
        stream(function, sources, writer, **options)
    return checkpoint.open(out)


def assert_same(found, wanted):
    for name, x in wanted.items():
        assert found[name].read().tobytes() == np.asarray(x).tobytes(), name
    assert found["ids"].read().tolist() == [0, 1, 2]


@given(
    st.lists(st.floats(0.125, 2), min_size=2, max_size=3),
    st.sampled_from([1, 4, 5, 12, 100]),
    st.integers(0, 99),
)
def test_a_lazy_function_in_pieces_is_that_of_trees(tmp_path_factory, c, piece, seed):
    folder = tmp_path_factory.mktemp("pieces")
    sources = models(len(c), folder, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_lazy, "_LARGEST", piece)
        out = streamed(lambda xs: average.mean(xs, c), sources, folder / "out", lazy=True)
    assert_same(out, average.mean([loaded(x) for x in sources], c))


def test_a_leafwise_function_is_that_of_trees(tmp_path):
    sources = models(2, tmp_path, seed=1)  # no leaf has antipodal ends
    out = streamed(lambda xs: interpolate.slerp(*xs, 0.3), sources, tmp_path / "slerp")
    assert_same(out, tree.per_leaf(interpolate.slerp)(*map(loaded, sources), 0.3))

    def ties(points):
        return merge.ties(points[0], points[1:], density=0.5, scope="leaf")

    assert_same(streamed(ties, sources, tmp_path / "ties"), ties([loaded(x) for x in sources]))


def test_a_lazy_function_is_called_once_and_its_leaves_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(_lazy, "_LARGEST", 5)
    sources = models(2, tmp_path)
    spans, calls = [], []
    kind = type(sources[0]["a"])
    rows = kind.rows

    def seen(tensor, start, stop):
        spans.append((tensor.name, start, stop))
        return rows(tensor, start, stop)

    monkeypatch.setattr(kind, "rows", seen)

    def mean(points):
        calls.append(len(points))
        return average.mean(points)

    streamed(mean, sources, tmp_path / "out", lazy=True)
    assert calls == [2]
    assert sorted(x for x in spans if x[0] == "a") == [
        ("a", start, stop) for start, stop in ((0, 5), (5, 10), (10, 12)) for _ in sources
    ]


def test_progress_adds_up_to_the_bytes_that_are_written(tmp_path):
    sources = models(2, tmp_path)
    counts, lock = [], threading.Lock()

    def advance(nbytes):
        with lock:
            counts.append(nbytes)

    streamed(average.mean, sources, tmp_path / "out", advance=advance)
    assert sum(counts) == sum(x.nbytes for x in sources[0].values())


def test_what_is_finished_is_not_computed_again(tmp_path):
    sources = models(2, tmp_path)

    def run(calls, stop):
        with checkpoint.create(tmp_path / "out", sources[0], plan="mean") as writer:
            before = writer.finished

            def mean(points):
                calls.extend(points[0])
                if stop and len(calls) == 3:
                    while not set(calls[:2]) <= writer.finished:
                        time.sleep(0.01)
                    raise KeyboardInterrupt
                return average.mean(points)

            stream(mean, sources, writer)
        return before

    first, second = [], []
    with pytest.raises(KeyboardInterrupt):
        run(first, True)
    before = run(second, False)
    assert set(first[:2]) <= before
    assert not before & set(second)
    assert_same(checkpoint.open(tmp_path / "out"), average.mean([loaded(x) for x in sources]))


def test_an_error_names_the_tensor_and_leaves_nothing(tmp_path):
    sources = models(2, tmp_path)

    def refuse(points):
        if "b" in points[0]:
            raise ValueError("no")
        return average.mean(points)

    with pytest.raises(ValueError, match="no") as caught:
        streamed(refuse, sources, tmp_path / "out")
    assert caught.value.__notes__ == ["at tensor 'b'"]
    assert sorted(x.name for x in tmp_path.iterdir()) == ["0", "1"]


BASE = {"model.up": np.ones((2, 3), np.float32), "ids": np.arange(3)}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"model.ups": BASE["model.up"], "ids": BASE["ids"]}, "nearest name there is 'model.ups'"),
        (BASE | {"extra": BASE["ids"]}, "has a tensor 'extra'"),
        (BASE | {"model.up": np.ones((3, 2), np.float32)}, r"\(2, 3\) in .* and \(3, 2\)"),
        (BASE | {"ids": np.arange(3) + 1}, "is carried over, but differs"),
        (BASE | {"ids": np.ones(3, np.float32)}, "only weights are merged"),
    ],
)
def test_points_of_different_spaces_are_refused(other, message, tmp_path):
    sources = [saved(tmp_path / "x", BASE), saved(tmp_path / "y", other)]
    for pair in (sources, sources[::-1]):
        with pytest.raises(ValueError, match=message if pair is sources else None):
            streamed(average.mean, pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_float8_is_refused_and_none_is_no_source(tmp_path):
    source = saved(tmp_path / "x", {"w": np.ones(2, ml_dtypes.float8_e4m3fn)})
    with pytest.raises(TypeError, match=r"'w' of .* is float8_e4m3fn"):
        streamed(average.mean, [source], tmp_path / "out")
    with (
        pytest.raises(ValueError, match="sources is empty"),
        checkpoint.create(tmp_path / "out", source) as writer,
    ):
        stream(average.mean, [], writer)


def test_dtypes_of_the_others_may_differ(tmp_path):
    x = saved(tmp_path / "x", BASE)
    y = saved(tmp_path / "y", BASE | {"model.up": np.full((2, 3), 2, np.float16)})
    out = streamed(average.mean, [x, y], tmp_path / "out")
    assert out["model.up"].dtype == np.float32
    assert (out["model.up"].read() == 1.5).all()
