"""Laws of `wspace.checkpoint`."""

import collections
import dataclasses
import json
import os
import struct
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import VIEWS
from wspace import checkpoint, lowrank, tree
from wspace.testing import assert_close

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
        (
            3,
            TypeError,
            "weights must be a mapping from names to arrays, or a tree of such, got .*i",
        ),
        (jnp.ones(1), TypeError, "weights must be a mapping from names to arrays, or a tree"),
        ({True: jnp.ones(1)}, TypeError, "names of tensors are strings, got True"),
        ({("a", "b"): jnp.ones(1)}, TypeError, "names of tensors are strings, got .'a', 'b'."),
        ({"x": {1.5: jnp.ones(1)}}, TypeError, "names of tensors are strings, got 1.5"),
        ({"x": {"\ud800": jnp.ones(1)}}, ValueError, "half of a surrogate pair"),
        ({"x": 1.0}, TypeError, r"\['x'\]"),
        ({"x": [jnp.ones(1), 1j]}, TypeError, r"leaf \['x'\]\[1\] of weights is a .*complex"),
        ({"x": np.ones(1, np.complex64)}, TypeError, r"\['x'\] of weights has dtype complex64"),
        ({"x": 2**63}, TypeError, r"\['x'\] of weights is a .*int"),
        ({"x": {"f": jnp.tanh}}, TypeError, r"\['x'\]\['f'\] of weights .*tree.partition"),
        ({"x": jax.random.key(0)}, TypeError, r"\['x'\] of weights has dtype key.*tree.partition"),
        (
            {"x": jax.ShapeDtypeStruct((2,), jnp.float32)},
            TypeError,
            r"leaf \['x'\] of weights is a .*ShapeDtypeStruct.*no array in memory",
        ),
        ({"x": ["text"]}, TypeError, r"\['x'\]\[0\] of weights is a .*str"),
        ({"x": lowrank.LowRank(jnp.ones((2, 1)), jnp.ones((2, 1)))}, TypeError, "LowRank"),
        ({"__metadata__": jnp.ones(1)}, ValueError, "rename"),
        (
            {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)},
            ValueError,
            r"leaves \['a'\]\['b'\] and \['a\.b'\] of weights are both named 'a\.b'.*rename one",
        ),
        (
            [{"0": jnp.ones(1)}, {"x": 1}, {"0": [], "x": None, "y": {"0.0": 1, "0": [1]}}],
            ValueError,
            r"\[2\]\['y'\].*both named '2\.y\.0\.0'",
        ),
    ],
)
def test_what_no_file_holds_by_name_is_refused(tmp_path, refuses, weights, error, match):
    with refuses(error, match=match):
        checkpoint.save(tmp_path / "x.safetensors", weights)
    assert not list(tmp_path.iterdir())


class Moments(NamedTuple):
    """A node with fields, as states of optimizers are."""

    count: object
    mu: object


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """A node with fields, as modules are."""

    weight: object
    bias: object


@dataclasses.dataclass
class Pair:
    """A node that says nothing of the names of its children."""

    children: tuple


jax.tree_util.register_pytree_node(
    Pair, lambda x: (x.children, None), lambda _, children: Pair(tuple(children))
)


def nested():
    """A tree of every kind of node and of every kind of leaf that a file holds."""
    rng = np.random.default_rng(0)
    x, y, z = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 3), (3,), ()))
    return {
        "step": 7,
        "done": True,
        "layers": [Layer(x, None), Layer(y.astype(jnp.bfloat16), (z, {}, []))],
        "adam": Moments(jnp.asarray(3, jnp.int32), collections.OrderedDict(b=y, a=z)),
        "ids": {0: np.arange(5), 10: jnp.zeros((0, 2), jnp.uint8), 2: np.array([True, False])},
        "": Pair((np.float32(2.5), np.float16([1.0]))),
        "none": None,
    }


NAMES = {
    *("step", "done", "layers.0.weight", "layers.1.weight", "layers.1.bias.0", "adam.count"),
    *("adam.mu.a", "adam.mu.b", "ids.0", "ids.2", "ids.10", ".0", ".1"),
}


def alike(got, wanted):
    """Asserts that trees are of one structure, with the same bits and the same types of leaves."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        if isinstance(y, int):
            assert (type(x), x) == (type(y), y)
        else:
            assert (np.shape(x), np.asarray(x).dtype) == (np.shape(y), np.asarray(y).dtype)
            assert bits(x) == bits(y)


def test_a_nested_tree_comes_back_in_the_structure_of_like(tmp_path):
    tree, file = nested(), tmp_path / "tree.safetensors"
    checkpoint.save(file, tree)
    alike(checkpoint.load(file, like=tree), tree)
    with checkpoint.open(file) as opened:
        assert set(opened) == NAMES
        assert opened.metadata == {"format": "pt"}
        assert opened["step"].dtype == np.int64
    loaded = checkpoint.load(file)
    assert set(loaded) == NAMES - {"step", "done", "adam.count", "ids.0", "ids.2", "ids.10"}
    shapes = jax.tree.map(lambda x: x if isinstance(x, int) else jax.typeof(jnp.asarray(x)), tree)
    shapes["ids"][0] = jax.ShapeDtypeStruct((5,), np.int64)
    alike(checkpoint.load(file, like=shapes), tree)
    checkpoint.save(tmp_path / "folder", tree)
    alike(checkpoint.load(tmp_path / "folder", like=tree), tree)
    mesh = jax.make_mesh((1,), ("x",))
    whole = jax.NamedSharding(mesh, jax.P())
    spread = checkpoint.load(file, whole, like=tree)
    assert spread["layers"][0].weight.sharding == whole
    alike(spread, tree)
    checkpoint.save(file, [jnp.ones(1), (jnp.ones(2),)])
    assert sorted(checkpoint.load(file)) == ["0", "1.0"]
    checkpoint.save(file, {"nothing": None, "empty": []})
    assert checkpoint.load(file, like={"nothing": None, "empty": []}) == {
        "nothing": None,
        "empty": [],
    }


def test_modules_of_other_libraries_come_back(tmp_path):
    equinox, nnx = pytest.importorskip("equinox"), pytest.importorskip("flax.nnx")
    core, optax = pytest.importorskip("flax.core"), pytest.importorskip("optax")
    module = equinox.nn.MLP(2, 2, 3, 1, key=jax.random.key(0))
    weights, rest = tree.partition(module)
    file = tmp_path / "model.safetensors"
    checkpoint.save(file, weights)
    assert sorted(checkpoint.load(file)) == [
        f"layers.{i}.{name}" for i in (0, 1) for name in ("bias", "weight")
    ]
    alike(tree.join(checkpoint.load(file, like=weights), rest), module)
    state = nnx.state(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    frozen = core.FrozenDict({"params": {"dense": {"kernel": jnp.ones((2, 2))}}})
    for one in (state, frozen, optax.adam(1e-3).init({"w": jnp.ones(2)})):
        checkpoint.save(file, one)
        alike(checkpoint.load(file, like=one), one)


ONES = np.ones(2, np.float32)


@pytest.mark.parametrize(
    ("like", "match"),
    [
        ({"a": [ONES]}, r"tensor 'b' that like has no leaf for, one of 1 left over.* skip"),
        (
            {"a": [ONES, ONES[:1]], "b": 1},
            r"no tensor 'a\.1' for leaf \['a'\]\[1\] of like, one of 1 that it lacks",
        ),
        (
            {"a": {"w": ONES}, "b": 1},
            r"no tensor 'a\.w' for leaf \['a'\]\['w'\] of like.*'a\.0' is left over",
        ),
        (
            {"a": [jnp.ones(3, jnp.float32)], "b": 1},
            r"'a\.0' of .* has shape \(2,\), but leaf \['a'\]\[0\] of like \(3,\)",
        ),
        (
            {"a": [ONES], "b": jnp.ones(1, jnp.int32)},
            r"'b' of .* has shape \(\), but leaf \['b'\] of like \(1,\)",
        ),
        (
            {"a": [jnp.ones(2, jnp.bfloat16)], "b": 1},
            r"'a\.0' of .* is float32, but leaf \['a'\]\[0\] of like bfloat16: .*cast_like",
        ),
        (
            {"a": [jnp.ones(2, jnp.int32)], "b": 1},
            r"'a\.0' of .* is float32, but leaf \['a'\]\[0\] of like int32",
        ),
        ({"a": [ONES], "b": True}, r"'b' of .* is int64, but leaf \['b'\] of like bool"),
        ({"a": [ONES], "b": jnp.float32(1)}, r"'b' of .* is int64, but .* like float32"),
        ({"a": [ONES], "a.0": ONES}, r"leaves .* of like are both named 'a\.0'"),
    ],
)
def test_a_tree_that_the_file_is_not_of_is_refused_by_leaf(folder, like, match):
    file = folder / "like.safetensors"
    checkpoint.save(file, {"a": [jnp.ones(2, jnp.float32)], "b": 1})
    with pytest.raises(ValueError, match=match):
        checkpoint.load(file, like=like)
    file.unlink()


def test_a_like_that_is_no_tree_of_arrays_is_refused(folder, refuses):
    file = folder / "like.safetensors"
    checkpoint.save(file, {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(1)})
    with refuses(TypeError, match=r"leaf \['a'\] of like is a .*function.*tree.partition"):
        checkpoint.load(file, like={"a": jax.vmap})
    with refuses(TypeError, match="like must be a mapping from names"):
        checkpoint.load(file, like=jnp.ones(2, jnp.float32))
    one = checkpoint.load(file, like={"a": np.ones(2, np.float32)}, skip=["b"])
    assert_close(one, {"a": jnp.ones(2, jnp.float32)}, units=0)
    file.unlink()


@pytest.mark.parametrize(
    "name", ["x.bin", "x.pt", "x.PTH", "x.ckpt", "x.npz", "x.h5", "x.msgpack", "x.gguf", "x.json"]
)
def test_a_path_with_the_suffix_of_another_file_makes_no_folder(tmp_path, name):
    weights, edit = {"w.weight": jnp.ones((2, 2))}, {"w.weight": lowrank.LowRank(*[jnp.eye(2)] * 2)}
    mend = r"a file that ends in \.safetensors, or a folder.*give such as .*x\.safetensors"
    with pytest.raises(ValueError, match=mend):
        checkpoint.save(tmp_path / name, weights)
    with (
        pytest.raises(ValueError, match=mend),
        checkpoint.create(tmp_path / name, weights, plan="a plan"),
    ):
        raise AssertionError("not reached")
    with pytest.raises(ValueError, match=r"but what is written is a folder"):
        checkpoint.save_adapter(tmp_path / name, edit)
    assert not list(tmp_path.iterdir())


def test_suffixes_of_safetensors_are_files_and_nothing_else(tmp_path):
    weights, edit = {"w.weight": jnp.ones((2, 2))}, {"w.weight": lowrank.LowRank(*[jnp.eye(2)] * 2)}
    for name in ("x.SAFETENSORS", "x.safetensor"):
        with pytest.raises(ValueError, match=r"give such as .*x\.safetensors"):
            checkpoint.save(tmp_path / name, weights)
    with pytest.raises(ValueError, match=r"what is written is a folder.*give such as .*/x$"):
        checkpoint.save_adapter(tmp_path / "x.safetensors", edit)
    assert not list(tmp_path.iterdir())
    for name in ("llama-3.1-8b", "model.fp16", "v1.0", "x.safetensors"):
        checkpoint.save(tmp_path / name, weights)
        assert (tmp_path / name).is_dir() == (name != "x.safetensors")


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
    more = {"format": "np", "who": "me"}
    for metadata, wanted in ((None, {"format": "pt"}), (more, more)):
        checkpoint.save(tmp_path / "a.safetensors", {"w": np.ones(2)}, metadata=metadata)
        with checkpoint.open(tmp_path / "a.safetensors") as opened:
            assert opened.metadata == wanted


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
