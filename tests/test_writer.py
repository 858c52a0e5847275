"""Laws of `wspace.checkpoint.create`: what is written."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import VIEWS
from tests.test_stored import arrays, names, same
from wspace import checkpoint
from wspace.checkpoint import header, pieces

safetensors = pytest.importorskip("safetensors")
library = pytest.importorskip("safetensors.numpy")

MODEL = {
    "b": np.arange(5, dtype=np.int8),
    "w": np.arange(12, dtype=np.float32).reshape(3, 4),
    "e": np.zeros((0, 2), np.float32),
    "s": np.array(0.5, jnp.bfloat16),
}


def tensors(**options):
    views = st.builds(lambda x, view: view(x), arrays(), st.sampled_from(VIEWS))
    return st.dictionaries(names(), views, **options)


def written(path, model, **options):
    with checkpoint.create(path, model, **options) as writer:
        for name, x in model.items():
            if name not in writer.finished:
                writer.write(name, x)
    return path


def stopped(path, names, model=MODEL, **options):
    """Writes some tensors and is interrupted; what was finished before."""
    try:
        with checkpoint.create(path, model, **options) as writer:
            finished = writer.finished
            for name in names:
                writer.write(name, model[name])
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        return finished


def content(path):
    """The bytes of a file, or of the files of a folder by their names."""
    if path.is_file():
        return path.read_bytes()
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("writer")


@given(
    model=tensors(max_size=5),
    shard_bytes=st.sampled_from([None, 1, 8, 40]),
    metadata=st.dictionaries(names(), names(), max_size=2),
)
def test_the_library_reads_what_was_written_bit_for_bit(folder, model, shard_bytes, metadata):
    out = folder / "out"
    written(out, model, shard_bytes=shard_bytes, metadata=metadata, force=True)
    files = sorted(out.glob("*.safetensors"))
    found = {}
    for file in files:
        with safetensors.safe_open(file, "numpy") as stream:
            assert (stream.metadata() or {}) == metadata
        shard = safetensors.deserialize(file.read_bytes())
        assert not found.keys() & {name for name, _ in shard}
        found |= dict(shard)
        sizes = [model[name].nbytes for name, _ in shard]
        assert shard_bytes is None or sum(sizes) <= shard_bytes or sizes.count(0) >= len(sizes) - 1
    assert found.keys() == model.keys()
    for name, x in model.items():
        assert bytes(found[name]["data"]) == x.tobytes()
        assert tuple(found[name]["shape"]) == x.shape
    with checkpoint.open(out) as opened:
        assert all(same(opened[name].read(), x) for name, x in model.items())
        assert all(stored.offset % stored.dtype.itemsize == 0 for stored in opened.values())
    assert all((8 + int.from_bytes(file.read_bytes()[:8], "little")) % 64 == 0 for file in files)
    assert len(files) == 1 or all(
        file.name == f"model-{i:05d}-of-{len(files):05d}.safetensors"
        for i, file in enumerate(files, 1)
    )
    assert [file.name for file in out.iterdir() if file not in files] == (
        ["model.safetensors.index.json"] if len(files) > 1 else []
    )
    assert os.listdir(folder) == ["out"]


@given(data=st.data(), model=tensors(min_size=1, max_size=3))
def test_parts_in_any_order_make_the_same_file_as_whole_tensors(folder, data, model):
    whole = written(folder / "whole.safetensors", model, force=True)
    parts = [
        (name, start, x.reshape(-1)[start : start + 2])
        for name, x in model.items()
        for start in range(0, x.size, 2)
    ]
    with checkpoint.create(folder / "parts.safetensors", model, force=True) as writer:
        for name, start, part in data.draw(st.permutations(parts)):
            assert name not in writer.finished
            writer.write_part(name, start, part)
        assert writer.finished == model.keys()
    assert content(folder / "parts.safetensors") == content(whole)
    whole.unlink()
    (folder / "parts.safetensors").unlink()


@pytest.mark.parametrize("dtype", [np.int8, jnp.bfloat16, np.float64])
@pytest.mark.parametrize("view", VIEWS)
def test_tensors_of_many_pieces_are_written_in_order(tmp_path, monkeypatch, dtype, view):
    monkeypatch.setattr(pieces, "_PIECE", 64)
    x = view(np.arange(7 * 11 * 3).reshape(7, 11, 3).astype(dtype))
    written(tmp_path / "x.safetensors", {"x": x}, plan="")
    assert same(library.load_file(tmp_path / "x.safetensors")["x"], np.ascontiguousarray(x))


def test_threads_write_what_one_writes(tmp_path):
    model = {str(i): np.random.default_rng(i).normal(size=4096) for i in range(12)}
    once = written(tmp_path / "once.safetensors", model)
    parts = [(name, i, x[i : i + 512]) for name, x in model.items() for i in range(0, 4096, 512)]
    with checkpoint.create(tmp_path / "many.safetensors", model, plan="x") as writer:
        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(writer.write_part, *part) for part in parts]:
                done.result()
        assert writer.finished == model.keys()
    assert content(tmp_path / "many.safetensors") == content(once)


def test_of_threads_that_write_one_tensor_one_does(tmp_path):
    barrier, refused = threading.Barrier(8), []
    with checkpoint.create(tmp_path / "x.safetensors", {"x": MODEL["w"]}) as writer:

        def write(_):
            barrier.wait()
            try:
                writer.write("x", MODEL["w"])
            except ValueError as error:
                refused.append(str(error))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, range(8)))
    assert len(refused) == 7
    assert same(library.load_file(tmp_path / "x.safetensors")["x"], MODEL["w"])


def test_a_checkpoint_and_shapes_of_jax_are_layouts(tmp_path):
    layout = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in MODEL.items()}
    with checkpoint.create(tmp_path / "a", layout, shard_bytes=20) as writer:
        for name, x in MODEL.items():
            writer.write(name, jnp.asarray(x))
    with checkpoint.open(tmp_path / "a") as a, checkpoint.create(tmp_path / "b", a) as writer:
        for name, stored in a.items():
            writer.write(name, stored.read())
    with checkpoint.open(tmp_path / "b") as b:
        assert all(same(b[name].read(), x) for name, x in MODEL.items())


def overlapping(writer, *starts):
    """Writes parts of four elements."""
    for start in starts:
        writer.write_part("w", start, MODEL["w"][0])


@pytest.mark.parametrize(
    ("write", "match"),
    [
        (lambda writer: writer.write("none", MODEL["w"]), "no tensor 'none'"),
        (lambda writer: writer.write("w", MODEL["w"].T), r"'w' .* shape \(4, 3\).* \(3, 4\)"),
        (lambda writer: writer.write("w", MODEL["w"].astype(np.float16)), "'w' .*float16.*float32"),
        (lambda writer: writer.write("w", MODEL["w"].astype(">f4")), "'w' .*float32"),
        (lambda writer: writer.write_part("w", 0, MODEL["w"]), "must be flat"),
        (lambda writer: writer.write_part("w", 9, np.zeros(4, np.float32)), "from element 9"),
        (lambda writer: writer.write_part("w", -1, np.zeros(4, np.float32)), "from element -1"),
        (lambda writer: writer.write("b", MODEL["b"]), "'b' was written before"),
        (lambda writer: writer.write_part("b", 4, MODEL["b"][:1]), "'b' was written before"),
        (lambda writer: writer.write_part("s", 0, MODEL["s"].reshape(1)), "'s' was written before"),
        (lambda writer: overlapping(writer, 4, 2), "'w' was written before"),
        (lambda writer: overlapping(writer, 2, 4), "'w' was written before"),
        (lambda writer: overlapping(writer, 0, 8, 4, 6), "'w' was written before"),
        (lambda _: None, r"1 of 4 tensors .* not written whole.*'w'"),
        (lambda writer: writer.write_part("w", 0, MODEL["w"][0]), r"1 of 4 tensors .*'w'"),
    ],
)
def test_what_is_not_the_layout_once_is_refused_and_leaves_nothing(tmp_path, refuses, write, match):
    with (
        refuses(ValueError, match=match),
        checkpoint.create(tmp_path / "out", MODEL) as writer,
    ):
        writer.write("b", MODEL["b"])
        writer.write("s", MODEL["s"])
        write(writer)
    assert not list(tmp_path.iterdir())


def test_a_writer_is_closed_with_its_block(tmp_path):
    with checkpoint.create(tmp_path / "out", MODEL) as writer:
        for name, x in MODEL.items():
            writer.write_part(name, 0, x.reshape(-1))
    before = content(tmp_path / "out")
    with pytest.raises(ValueError, match="'w' is written too late"):
        writer.write("w", MODEL["w"])
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"layout": [MODEL["w"]]}, TypeError, "mapping"),
        ({"layout": {1: MODEL["w"]}}, TypeError, "names of tensors are strings"),
        ({"layout": {"__metadata__": MODEL["w"]}}, ValueError, "rename"),
        ({"layout": {"\ud800": MODEL["w"]}}, ValueError, "surrogate"),
        ({"layout": {"w": 3}}, TypeError, r"layout\['w'\] is of type int"),
        ({"layout": {"w": np.zeros(1, np.complex128)}}, TypeError, r"layout\['w'\]"),
        ({"layout": {"w": np.zeros(1, ">f4")}}, TypeError, r"layout\['w'\]"),
        ({"path": "x.safetensors", "shard_bytes": 8}, ValueError, "give a folder"),
        ({"path": "x.safetensors", "others": ["config.json"]}, ValueError, "write a folder"),
        ({"shard_bytes": 0}, ValueError, "at least 1"),
        ({"metadata": {"a": 1}}, TypeError, "strings to strings"),
        ({"others": ["none.json"]}, FileNotFoundError, r"no file .*none\.json"),
        ({"others": ["config.json"] * 2}, ValueError, "one name"),
        ({"others": ["x.safetensors"]}, ValueError, "no name for a file beside"),
    ],
)
def test_bad_options_are_refused_before_anything_is_made(
    tmp_path, monkeypatch, refuses, options, error, match
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").touch()
    with (
        refuses(error, match=match),
        checkpoint.create(**{"path": "out", "layout": MODEL} | options),
    ):
        pass
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_header_that_no_reader_takes_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(header, "_LONGEST", 1000)
    with pytest.raises(ValueError, match="the format allows 1000: write fewer tensors"):
        written(tmp_path / "out", MODEL, metadata={"a": 1000 * "b"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model", "diffusion_pytorch_model.fp16", "ae.1", "ae"])
@pytest.mark.parametrize("shard_bytes", [None, 20])
def test_an_output_has_the_names_of_its_input(tmp_path, name, shard_bytes):
    for out in ("one", "two"):
        written(tmp_path / out, MODEL, shard_bytes=shard_bytes, name=name)
        with checkpoint.open(tmp_path / out) as opened:
            assert opened.name == name
            assert opened.keys() == MODEL.keys()
            name = opened.name
    assert content(tmp_path / "one") == content(tmp_path / "two")
    index = "diffusion_pytorch_model.safetensors.index.fp16.json"
    assert (tmp_path / "one" / index).exists() == bool(shard_bytes and "fp16" in name)


@pytest.mark.parametrize("name", ["", "..", "a/b"])
def test_a_name_with_a_folder_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="name must be that of a file"):
        written(tmp_path / "out", MODEL, name=name)


def test_other_files_are_carried_over_and_added(tmp_path):
    source = written(tmp_path / "source", MODEL)
    for name in ("config.json", "vocab.txt"):
        (source / name).write_text(name)
    with (
        checkpoint.open(source) as opened,
        checkpoint.create(tmp_path / "out", opened, others=opened.others) as writer,
    ):
        for name, stored in opened.items():
            writer.write(name, stored.read())
        writer.add("vocab.txt", b"another")
        writer.add("wspace.json", b"{}")
        for name in ("model.safetensors", "../x", "", "..", "a/b"):
            with pytest.raises(ValueError, match="no name for a file"):
                writer.add(name, b"")
    found = content(tmp_path / "out")
    assert found.pop("model.safetensors") == content(source)["model.safetensors"]
    assert found == {"config.json": b"config.json", "vocab.txt": b"another", "wspace.json": b"{}"}
