"""Laws of `wspace.checkpoint` for folders of Orbax."""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wspace import checkpoint

orbax = pytest.importorskip("orbax.checkpoint")

RNG = np.random.default_rng(0)
TREE = {
    "layers": {
        "0": {"weight": RNG.normal(size=(8, 3)).astype(np.float32), "scale": np.float32(0.5)},
        "1": {"weight": RNG.normal(size=(3, 8)).astype(jnp.bfloat16)},
    },
    "bias": RNG.normal(size=5).astype(np.float16),
}


def same(x, y):
    assert jax.tree.structure(x) == jax.tree.structure(y)
    for got, wanted in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        assert np.asarray(got).tobytes() == np.asarray(wanted).tobytes()


@pytest.fixture
def folder(tmp_path):
    checkpoint.save_orbax(tmp_path / "tree", TREE)
    return tmp_path / "tree"


def test_what_was_saved_comes_back_bit_for_bit_and_orbax_reads_it(folder):
    loaded = checkpoint.load_orbax(folder)
    same(loaded, TREE)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))
    whole = jax.tree.map(lambda _: orbax.RestoreArgs(restore_type=np.ndarray), TREE)
    with orbax.PyTreeCheckpointer() as checkpointer:
        same(checkpointer.restore(folder, args=orbax.args.PyTreeRestore(restore_args=whole)), TREE)


def test_a_path_with_the_suffix_of_a_file_makes_no_folder(tmp_path):
    for name in ("x.msgpack", "x.safetensors"):
        with pytest.raises(ValueError, match=r"what is written is a folder.*give such as .*/x$"):
            checkpoint.save_orbax(tmp_path / name, TREE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_shards_are_saved_and_loaded_on_any_mesh(tmp_path, kind):
    for count in (8, 4):
        mesh = jax.make_mesh((count,), ("x",), devices=jax.devices()[:count], axis_types=(kind,))

        def spread(_, tensor, mesh=mesh):
            axis = next((i for i, size in enumerate(tensor.shape) if size == 8), None)
            spec = ["x" if i == axis else None for i in range(len(tensor.shape))]
            return jax.NamedSharding(mesh, jax.P(*spec))

        if count == 8:
            weights = jax.tree.map(lambda x, f=spread: jax.device_put(x, f("", x)), TREE)
            checkpoint.save_orbax(tmp_path / "tree", weights)
        loaded = checkpoint.load_orbax(tmp_path / "tree", spread)
        same(loaded, TREE)
        assert all(x.sharding == spread("", x) for x in jax.tree.leaves(loaded))


def test_weights_are_taken_out_of_what_another_program_wrote(tmp_path):
    state = {
        "params": {"layers": [{"w": jnp.ones(2)}, {"w": jnp.zeros(3)}], "scale": np.float32(2)},
        "opt_state": ({"mu": jnp.full(2, 4.0), "count": jnp.int32(9)}, None, {}),
        "step": jnp.int32(3),
        "rate": 1e-3,
        "epoch": 4,
        "run": "third",
        "mask": np.array([True]),
        "table": jnp.ones(2, jnp.complex64),
        "ema": None,
    }
    with orbax.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.save(tmp_path / "double", {"w": np.ones(2)})
        checkpointer.save(tmp_path / "none", {"step": jnp.int32(3)})
        checkpointer.save(tmp_path / "narrow", {"w": jnp.ones(2, jnp.float8_e4m3fn)})
    params = jax.tree.map(jnp.asarray, state["params"])
    same(checkpoint.load_orbax(tmp_path / "state", skip=["opt_state.*"]), {"params": params})
    loaded = checkpoint.load_orbax(tmp_path / "state")
    same(loaded, {"params": params, "opt_state": [{"mu": jnp.full(2, 4.0)}, None, None]})
    with pytest.raises(ValueError, match=r"holds no weights.*'step' has dtype I32"):
        checkpoint.load_orbax(tmp_path / "none")
    with pytest.raises(ValueError, match=r"'w' of .*narrow is float8_e4m3fn.*convert it"):
        checkpoint.load_orbax(tmp_path / "narrow")
    if jax.config.jax_enable_x64:
        same(checkpoint.load_orbax(tmp_path / "double"), {"w": np.ones(2)})
    else:
        with pytest.raises(ValueError, match=r"'w' of .*double is float64.*jax_enable_x64"):
            checkpoint.load_orbax(tmp_path / "double")


def test_what_does_not_fit_is_refused_by_name(folder, refuses):
    sharding = jax.NamedSharding(jax.make_mesh((8,), ("x",)), jax.P("x"))
    with refuses(ValueError, match=r"'bias' of .*tree has shape \(5,\), which .* not divide"):
        checkpoint.load_orbax(folder, lambda name, _: sharding if name == "bias" else None)
    with refuses(ValueError, match=r"lacks tensor 'layers\.0\.scale' of .*tree"):
        checkpoint.load_orbax(folder, {"bias": None})
    with refuses(TypeError, match=r"sharding of tensor 'bias' is P"):
        checkpoint.load_orbax(folder, jax.P())
    with pytest.raises(FileNotFoundError, match=r"no folder .*none"):
        checkpoint.load_orbax(folder.parent / "none")
    with pytest.raises(ValueError, match=r"holds no tree of Orbax: give the folder of one"):
        checkpoint.load_orbax(folder.parent)
    with pytest.raises(FileExistsError, match="tree exists: give another path"):
        checkpoint.save_orbax(folder, TREE)


@pytest.mark.parametrize(
    ("weights", "error", "match"),
    [
        ({}, ValueError, "no arrays"),
        ({"a": {"b": jnp.ones((0, 2))}}, ValueError, r"no elements at 'a\.b'"),
        ({"a": [jnp.ones(2)]}, TypeError, r"\['a'\]\[0\] is of ArrayImpl, .*: name what is in"),
        ({"a": None}, TypeError, r"\['a'\] is of NoneType"),
        ({"a": {1: jnp.ones(2)}}, TypeError, r"\['a'\]\[1\]"),
        (jnp.ones(2), TypeError, "the tree is of"),
        ({"a": 1.0}, TypeError, r"\['a'\] is of float"),
        ({"a": jnp.ones(2, jnp.int32)}, TypeError, r"\['a'\].*int32"),
        ({"a.b": jnp.ones(2), "a": {"b": jnp.ones(2)}}, ValueError, r"two leaves .* 'a\.b'"),
    ],
)
def test_what_is_no_tree_of_weights_is_refused(tmp_path, refuses, weights, error, match):
    with refuses(error, match=match):
        checkpoint.save_orbax(tmp_path / "tree", weights)
    assert os.listdir(tmp_path) == []


def test_a_missing_orbax_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ImportError, match=r"install wspace\[orbax\]"):
        checkpoint.load_orbax(folder)
