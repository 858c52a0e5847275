"""Laws of `wspace.checkpoint`."""

import json
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import VIEWS
from wspace import checkpoint, lowrank

DTYPES = [np.dtype(x) for x in (jnp.float32, jnp.bfloat16, jnp.float16)]
SHAPES = [(), (0,), (3,), (2, 3), (0, 2), (2, 1, 3)]
EITHER = [*VIEWS, jnp.asarray]


@st.composite
def tensors(draw):
    """An array of any bits, and of any strides."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SHAPES))
    count = int(np.prod(shape)) * dtype.itemsize
    bits = draw(st.binary(min_size=count, max_size=count))
    return draw(st.sampled_from(EITHER))(np.frombuffer(bits, dtype).reshape(shape))


def names():
    return st.text(st.characters(codec="utf-8"), max_size=4).filter(lambda x: x != "__metadata__")


def bits(x):
    return np.asarray(x).tobytes()


def packed(header, data=b""):
    """A file with this header, whether it tells the truth or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoint")


@given(weights=st.dictionaries(names(), tensors(), max_size=3))
def test_what_was_saved_comes_back_bit_for_bit(folder, weights):
    file = folder / "round.safetensors"
    checkpoint.save(file, weights)
    loaded = checkpoint.load(file)
    assert loaded.keys() == weights.keys()
    for name, x in weights.items():
        got = loaded[name]
        assert isinstance(got, jax.Array)
        assert (got.shape, got.dtype) == (x.shape, x.dtype)
        # NumPy writes the elements in order, whatever the strides.
        assert bits(got) == bits(x)
    assert os.listdir(folder) == [file.name]


def test_the_file_is_what_other_programs_read_and_write(folder):
    numpy = pytest.importorskip("safetensors.numpy")
    file, x = folder / "other.safetensors", np.arange(6, dtype=np.float32).reshape(2, 3)
    checkpoint.save(file, {"x": x.T})
    np.testing.assert_array_equal(numpy.load_file(file)["x"], x.T)
    numpy.save_file({"x": x}, file, metadata={"who": "another"})
    np.testing.assert_array_equal(checkpoint.load(file)["x"], x)
    file.unlink()


def test_double_precision_is_kept_or_refused_never_rounded(folder):
    file, x = folder / "double.safetensors", np.array([1 + 2**-40])
    checkpoint.save(file, {"x": x})
    if jax.config.jax_enable_x64:
        assert bits(checkpoint.load(file)["x"]) == bits(x)
    else:
        with pytest.raises(ValueError, match=r"'x' .* is float64.*jax_enable_x64"):
            checkpoint.load(file)
    file.unlink()


def test_saving_over_a_file_replaces_it_whole(folder):
    file = folder / "twice.safetensors"
    checkpoint.save(file, {"long": jnp.zeros(1000), "other": jnp.ones(3)})
    checkpoint.save(file, {"short": jnp.ones(1)})
    assert list(checkpoint.load(file)) == ["short"]
    file.unlink()


@pytest.mark.parametrize(
    ("weights", "error", "match"),
    [
        (3, TypeError, "mapping from names"),
        ([jnp.ones(1)], TypeError, "mapping from names"),
        ({1: jnp.ones(1)}, TypeError, "names of tensors are strings"),
        ({"x": {"y": jnp.ones(1)}}, TypeError, "flat mapping"),
        ({"x": [jnp.ones(1)]}, TypeError, "flat mapping"),
        ({"x": None}, TypeError, "flat mapping"),
        ({"x": 1.0}, TypeError, r"\['x'\]"),
        ({"x": jnp.ones(1, jnp.int32)}, TypeError, r"\['x'\].*int32"),
        ({"x": lowrank.LowRank(jnp.ones((2, 1)), jnp.ones((2, 1)))}, TypeError, "LowRank"),
        ({"__metadata__": jnp.ones(1)}, ValueError, "rename"),
    ],
)
def test_what_is_no_flat_mapping_of_weights_is_refused(tmp_path, refuses, weights, error, match):
    with refuses(error, match=match):
        checkpoint.save(tmp_path / "x.safetensors", weights)
    assert not list(tmp_path.iterdir())


def test_every_truncated_file_is_refused(tmp_path):
    file = tmp_path / "cut.safetensors"
    checkpoint.save(file, {"a": jnp.ones(3), "b": jnp.ones((2, 2), jnp.bfloat16)})
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.safetensors is truncated .* again"):
            checkpoint.load(file)


@pytest.mark.parametrize(
    "data",
    [
        b"no tensors at all",
        packed(b"\xff\xfe"),
        packed(b"[]"),
        packed({}, b"more"),
        struct.pack("<Q", 2**62) + b"{}",
        packed({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
        packed({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"),
        packed({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12341234"),
        packed({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
        packed({"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"1234"),
        packed({"x": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        packed(
            {
                "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "y": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            },
            b"1234",
        ),
    ],
)
def test_a_file_that_lies_is_refused(tmp_path, data):
    file = tmp_path / "lie.safetensors"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"lie\.safetensors is truncated or no safetensors file"):
        checkpoint.load(file)


@pytest.mark.parametrize(("dtype", "size"), [("I32", 4), ("BOOL", 1), ("F8_E4M3", 1), ("C64", 8)])
def test_weights_are_taken_out_of_a_file_that_holds_other_tensors(tmp_path, dtype, size):
    file = tmp_path / "other.safetensors"
    own = {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}
    file.write_bytes(packed({"x": own}, bytes(size)))
    with pytest.raises(
        ValueError, match=rf"other\.safetensors (holds no weights.*'x' has dtype {dtype}|is float8)"
    ):
        checkpoint.load(file)
    weight = {"dtype": "F32", "shape": [], "data_offsets": [size, size + 4]}
    file.write_bytes(packed({"x": own, "w": weight}, bytes(size + 4)))
    skip = ["x*"] if dtype == "F8_E4M3" else []
    assert checkpoint.load(file, skip=skip) == {"w": 0}
    assert checkpoint.load(file, {"w": None}, skip=skip) == {"w": 0}


def test_codes_of_quantized_weights_are_not_left_out_unsaid(tmp_path):
    file = tmp_path / "model.safetensors"
    with checkpoint.create(
        file, {"q.qweight": np.ones(2, np.int32), "q.scales": np.ones(2, np.float16)}
    ) as writer:
        writer.write("q.qweight", np.ones(2, np.int32))
        writer.write("q.scales", np.ones(2, np.float16))
    with pytest.raises(ValueError, match=r"'q\.qweight' of .* is int32, quantized as AWQ or GPTQ"):
        checkpoint.load(file)
    assert list(checkpoint.load(file, skip=["*.qweight"])) == ["q.scales"]


def test_save_writes_the_metadata_that_loaders_ask_for(tmp_path):
    checkpoint.save(
        tmp_path / "a.safetensors", {"w": np.ones(2, np.float32)}, metadata={"format": "pt"}
    )
    with checkpoint.open(tmp_path / "a.safetensors") as opened:
        assert opened.metadata == {"format": "pt"}


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.safetensors"):
        checkpoint.load(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"has no \.safetensors file"):
        checkpoint.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(tmp_path / "file" / "x.safetensors")


@pytest.mark.parametrize(
    ("where", "match"),
    [
        ("file/x.safetensors", r"cannot write .*give a path in a folder that exists"),
        ("none/x.safetensors", r"cannot write .*give a path in a folder that exists"),
        ("folder", r"folder exists: give another path, or create\(\.\.\., force=True\)"),
    ],
)
def test_where_nothing_can_be_written_nothing_is_left(tmp_path, where, match):
    (tmp_path / "file").write_bytes(b"as it was")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=match):
        checkpoint.save(tmp_path / where, {"x": jnp.ones(1)})
    assert sorted(x.name for x in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_bytes() == b"as it was"


def test_a_failure_while_writing_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    checkpoint.save(file, {"x": jnp.ones(1)})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*x\.safetensors \(No space left"):
        checkpoint.save(file, {"x": jnp.zeros(1)})
    assert os.listdir(tmp_path) == [file.name]
    assert checkpoint.load(file)["x"] == 1
