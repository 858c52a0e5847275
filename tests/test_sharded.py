"""Laws of `wspace.checkpoint` on many devices: what is loaded and saved in shards."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_writer import content, written
from wspace import checkpoint
from wspace.checkpoint import partial, pieces
from wspace.checkpoint.stored import Stored

RNG = np.random.default_rng(0)
MODEL = {
    "rows": RNG.normal(size=(8, 6)).astype(np.float32),
    "columns": RNG.normal(size=(3, 8)).astype(np.float32),
    "middle": RNG.normal(size=(2, 8, 3)).astype(np.float16),
    "grid": RNG.normal(size=(8, 6)).astype(np.float32),
    "far": RNG.normal(size=(3, 4, 2)).astype(np.float32),
    "half": RNG.normal(size=(16,)).astype(jnp.bfloat16),
    "replicated": RNG.normal(size=(5,)).astype(np.float32),
    "scalar": np.array(0.5, jnp.bfloat16),
    "empty": np.zeros((0, 8), np.float32),
    "one": RNG.normal(size=(3,)).astype(np.float32),
}
SPECS = {
    "rows": jax.P(("x", "y")),
    "columns": jax.P(None, ("y", "x")),
    "middle": jax.P(None, ("x", "y")),
    "grid": jax.P("x", "y"),
    "far": jax.P(None, "x", "y"),
    "half": jax.P("y"),
    "replicated": jax.P(),
    "scalar": jax.P(),
    "empty": jax.P(None, "x"),
    "one": None,
}


PT = {"format": "pt"}  # which `save` writes, too


@pytest.fixture(params=[jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def shardings(request):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(request.param,) * 2)
    return {
        name: None if spec is None else jax.NamedSharding(mesh, spec)
        for name, spec in SPECS.items()
    }


@pytest.fixture
def file(tmp_path):
    return written(tmp_path / "whole.safetensors", MODEL, metadata=PT)


def test_what_is_loaded_in_shards_is_what_is_loaded_whole(file, shardings, monkeypatch):
    read, part = dict.fromkeys(MODEL, 0), Stored.part

    def recorded(tensor, index):
        found = part(tensor, index)
        read[tensor.name] += found.nbytes
        return found

    monkeypatch.setattr(Stored, "part", recorded)
    loaded = checkpoint.load(file, shardings)
    for name, x in MODEL.items():
        got = loaded[name]
        assert (got.shape, got.dtype) == (x.shape, x.dtype)
        assert np.asarray(got).tobytes() == x.tobytes()
        assert shardings[name] is None or got.sharding == shardings[name]
    # Once, whatever the number of devices that hold it.
    assert read == {name: x.nbytes * (name != "one") for name, x in MODEL.items()}


def test_shards_are_saved_as_the_whole_is(file, shardings, tmp_path):
    weights = checkpoint.load(file, lambda name, _: shardings[name])
    checkpoint.save(tmp_path / "again.safetensors", weights)
    assert content(tmp_path / "again.safetensors") == content(file)
    checkpoint.save(tmp_path / "folder", weights)
    assert content(tmp_path / "folder") == {"model.safetensors": content(file)}
    many = written(tmp_path / "many", weights, shard_bytes=100)
    same = written(tmp_path / "same", {name: MODEL[name] for name in weights}, shard_bytes=100)
    assert content(many) == content(same)


def test_one_sharding_is_for_all(tmp_path):
    model = {"a": np.arange(16, dtype=np.float32), "b": np.ones((8, 3), np.float32)}
    checkpoint.save(tmp_path / "x.safetensors", model)
    sharding = jax.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P("x"))
    loaded = checkpoint.load(tmp_path / "x.safetensors", sharding)
    for name, x in model.items():
        assert loaded[name].sharding == sharding
        np.testing.assert_array_equal(loaded[name], x)


@pytest.mark.parametrize(
    ("sharding", "error", "match"),
    [
        ("x", ValueError, r"tensor 'replicated' of .*whole.* shape \(5,\), which .* not divide"),
        ({}, ValueError, r"sharding lacks tensor '\w+' of .*whole"),
        (
            dict.fromkeys([*MODEL, "other"]),
            ValueError,
            r"sharding has a name that is no tensor 'other' of .*whole",
        ),
        (dict.fromkeys(MODEL, jax.P()), TypeError, r"of tensor '\w+' is P.*NamedSharding\(mesh"),
        (lambda *_: "x", TypeError, r"of tensor '\w+' is 'x'"),
        (jax.P("x"), TypeError, r"of tensor '\w+' is P"),
    ],
)
def test_a_sharding_that_does_not_fit_is_refused_by_name(file, refuses, sharding, error, match):
    if sharding == "x":
        whole = jax.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P())
        sharding = dict.fromkeys(MODEL, whole) | {"replicated": whole.update(spec=jax.P("x"))}
    with refuses(error, match=match):
        checkpoint.load(file, sharding)


def test_a_part_is_the_slice_and_no_more_is_copied(tmp_path):
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    for pad in range(4):
        head = {
            "pad": {"dtype": "I8", "shape": [pad], "data_offsets": [0, pad]},
            "x": {"dtype": "F32", "shape": x.shape, "data_offsets": [pad, pad + x.nbytes]},
        }
        text = json.dumps(head).encode()
        file = tmp_path / f"{pad}.safetensors"
        file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(pad) + x.tobytes())
        with checkpoint.open(file) as opened:
            for index in [(), np.s_[1:3, :], np.s_[:, 2:5], np.s_[3:, 5:], np.s_[2:2, :]]:
                part = opened["x"].part(index)
                np.testing.assert_array_equal(part, x[index])
                assert part.flags.aligned
                assert not part.flags.writeable


def test_a_job_in_shards_goes_on(file, shardings, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "_PIECE", 16)
    monkeypatch.setattr(partial, "_PIECE", 20)
    weights, done = checkpoint.load(file, shardings), ["columns", "grid", "far", "half"]

    def interrupted():
        with checkpoint.create(
            tmp_path / "out.safetensors", weights, plan="x", metadata=PT
        ) as writer:
            for name in done:
                writer.write(name, weights[name])
                with pytest.raises(ValueError, match=f"'{name}' was written before"):
                    writer.write(name, weights[name])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with checkpoint.create(tmp_path / "out.safetensors", weights, plan="x", metadata=PT) as writer:
        assert writer.finished == {*done, "empty"}
        for name in weights.keys() - writer.finished:
            writer.write(name, weights[name])
    assert content(tmp_path / "out.safetensors") == content(file)


@pytest.mark.parametrize(
    ("shares", "whole"),
    [
        ([[[0, 12]], []], True),
        ([[[0, 4], [8, 12]], [[4, 8]]], True),
        ([4, 8], True),
        ([0, 12], True),
        ([[[0, 12]], [[0, 12]]], False),
        ([[[0, 6]], [[0, 6]]], False),
        ([[[0, 8]], [[4, 12]]], False),
        ([[[4, 8]], [[8, 12]]], False),
        ([[[0, 4]], [[4, 8]]], False),
        ([4, 4], False),
        ([12, 12], False),
        ([6, [[0, 6]]], False),
        ([12, [[0, 6]]], False),
        ([[], []], False),
    ],
)
def test_a_tensor_is_whole_if_processes_wrote_all_of_it_once(shares, whole):
    assert pieces.is_whole(shares, 12) == whole
    assert pieces.is_whole([[], []], 0)


def test_parts_that_adjoin_are_one_range():
    assert pieces.joined([(4, 8, 1), (0, 4, 2), (10, 12, 3)]) == [[0, 8], [10, 12]]
