"""Trees of weights in folders of Orbax, read and written on one device or on many."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.tree_util import DictKey, keystr, tree_leaves_with_path

from wspace import _checks
from wspace._checks import matches
from wspace.checkpoint.folder import refuse_suffix
from wspace.checkpoint.trees import (
    refuse_cut,
    refuse_dtype,
    refuse_float8,
    refuse_nothing,
    shardings,
)

__all__ = ["load_orbax", "save_orbax"]


def save_orbax(path: str | os.PathLike[str], weights: Mapping[str, Any]) -> None:
    """Writes nested mappings of arrays to a folder of Orbax.

    Arrays that are spread over devices are written shard by shard. In a run of several processes,
    by `jax.distributed`, all of them call this with the same tree.

    Args:
        path: The folder, which must not exist; or a URL that Orbax can write to.
        weights: Nested mappings from names to floating-point arrays.

    Raises:
        ImportError: If Orbax is not installed.
        FileExistsError: If the folder exists.
        TypeError: If `weights` is not nested mappings from strings to floating-point arrays.
        ValueError: If an array has no elements, or `weights` has no arrays: Orbax writes neither;
            if the folder's name ends in the suffix of a file.

    Examples:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> from wspace import checkpoint
        >>> with tempfile.TemporaryDirectory() as name:
        ...     folder = pathlib.Path(name, "weights")
        ...     checkpoint.save_orbax(folder, {"mlp": {"bias": jnp.ones(2, jnp.bfloat16)}})
        ...     checkpoint.load_orbax(folder)
        {'mlp': {'bias': Array([1, 1], dtype=bfloat16)}}

    References:
        [Orbax](https://orbax.readthedocs.io).
    """
    leaves = _named(weights)
    _checks.floating_leaves(weights=weights)
    if not leaves or not all(leaf.size for leaf in leaves.values()):
        name = next((name for name, leaf in leaves.items() if not leaf.size), None)
        raise ValueError(
            f"weights {'have no arrays' if name is None else f'have no elements at {name!r}'}, "
            "which Orbax does not write: leave them out"
        )
    where = _absolute(path)
    if isinstance(where, Path):
        refuse_suffix(where, is_folder=True)
    if os.path.lexists(where):
        raise FileExistsError(f"{where} exists: give another path, or remove it yourself")
    orbax = _orbax()
    with orbax.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(where, weights)


def load_orbax(
    path: str | os.PathLike[str],
    sharding: Sharding
    | Mapping[str, Sharding | None]
    | Callable[[str, jax.ShapeDtypeStruct], Sharding | None]
    | None = None,
    *,
    skip: Sequence[str] = (),
) -> Any:
    """Reads the weights of a tree in a folder of Orbax.

    Weights are arrays of floating-point numbers. All else in a state of training, such as steps,
    numbers, text, random keys and `None`, is not read and is left out. `skip` leaves out more,
    such as the state of an optimizer.

    With a `sharding`, each process of a run reads only what its devices hold, whatever the devices
    that the folder was written from.

    Args:
        path: The folder with one tree, such as `<step>/default` of a manager of Orbax; or a URL
            that Orbax can read.
        sharding: As for [`load`][wspace.checkpoint.load]; in names, keys and the places in
            lists are joined by dots, as in `"params.layers.0.bias"`.
        skip: Names or globs, such as `"opt_state.*"`, of arrays that are not read.

    Returns:
        Nested dictionaries and lists of the weights, in the dtypes of the folder. Dictionaries
            lack what is left out; lists have `None` in its place.

    Raises:
        ImportError: If Orbax is not installed.
        FileNotFoundError: If there is no such folder.
        ValueError: If the folder holds no tree of Orbax, or no weights; if it holds float8; if a
            sharding does not fit; also if it holds float64 while JAX has 64-bit values disabled.
        TypeError: If what is given as a sharding is none.

    Examples:
        >>> import pathlib, tempfile
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from wspace import checkpoint
        >>> mesh = jax.make_mesh((jax.device_count(),), ("x",))
        >>> whole = jax.NamedSharding(mesh, jax.P())
        >>> with tempfile.TemporaryDirectory() as name:
        ...     folder = pathlib.Path(name, "weights")
        ...     checkpoint.save_orbax(folder, {"mlp": {"bias": jnp.ones(2)}})
        ...     checkpoint.load_orbax(folder, {"mlp.bias": whole})["mlp"]["bias"].sharding == whole
        True

    References:
        [Orbax](https://orbax.readthedocs.io).
    """
    orbax, where = _orbax(), _absolute(path)
    if isinstance(where, Path) and not where.exists():
        raise FileNotFoundError(f"there is no folder {where}: check the path")
    with orbax.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(where).item_metadata
        if metadata is None:
            raise ValueError(
                f"{where} holds no tree of Orbax: give the folder of one, such as <step>/default"
            )
        leaves = {
            name: leaf
            for name, leaf in _by_name(metadata.tree).items()
            if _is_array(leaf) and not matches(name, skip)
        }
        tensors = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for name, leaf in leaves.items()
            if np.dtype(leaf.dtype).kind not in "iubc"
        }
        refuse_nothing(tensors, leaves, where)
        chosen = shardings(sharding, tensors, where)
        for name, tensor in tensors.items():
            what = f"tensor {name!r} of {where}"
            refuse_float8(what, np.dtype(tensor.dtype))
            refuse_dtype(what, np.dtype(tensor.dtype))
            refuse_cut(what, tensor.shape, chosen[name])
        wanted, arguments = [], []
        for name in _by_name(metadata.tree):
            is_own = chosen.get(name) is not None
            wanted.append(0 if name in tensors else orbax.PLACEHOLDER)
            arguments.append(
                orbax.ArrayRestoreArgs(sharding=chosen[name])
                if is_own
                else orbax.RestoreArgs(restore_type=np.ndarray)
            )
        structure = jax.tree.structure(metadata.tree)
        restored = checkpointer.restore(
            where,
            args=orbax.args.PyTreeRestore(
                item=structure.unflatten(wanted), restore_args=structure.unflatten(arguments)
            ),
        )
    return _weights_alone(restored, orbax.PLACEHOLDER)


def _is_array(leaf: Any) -> bool:
    """Whether an array is stored; a number of Python is one of float64 or int64 without storage."""
    if not hasattr(leaf, "dtype"):
        return False
    return leaf.storage is not None or np.dtype(leaf.dtype).itemsize < 8


def _by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree, by their keys and places joined by dots."""
    return {
        keystr(path, simple=True, separator="."): leaf for path, leaf in tree_leaves_with_path(tree)
    }


def _weights_alone(tree: Any, left_out: Any) -> Any:
    """A tree of arrays without what was left out, and without what has nothing in it then."""
    if isinstance(tree, Mapping):
        parts = {key: _weights_alone(part, left_out) for key, part in tree.items()}
        return {key: part for key, part in parts.items() if part is not None} or None
    if isinstance(tree, list | tuple):
        several = [_weights_alone(part, left_out) for part in tree]
        return several if any(part is not None for part in several) else None
    return None if tree is None or tree is left_out else jnp.asarray(tree)


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of nested mappings, by their keys joined by dots."""
    leaves = {}
    for path, leaf in tree_leaves_with_path(tree, is_leaf=lambda node: node is None):
        name = keystr(path, simple=True, separator=".")
        is_nested = path and all(isinstance(x, DictKey) and isinstance(x.key, str) for x in path)
        if not is_nested or not hasattr(leaf, "shape"):
            raise TypeError(
                f"{keystr(path) or 'the tree'} is of {type(leaf).__name__}, but weights are "
                "nested mappings from names to arrays: name what is in sequences, leave out None"
            )
        if name in leaves:
            raise ValueError(f"two leaves have the name {name!r}: rename one")
        leaves[name] = leaf
    return leaves


def _absolute(path: str | os.PathLike[str]) -> Path | str:
    return os.fspath(path) if "://" in os.fspath(path) else Path(os.path.abspath(path))


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError("this needs Orbax: install wspace[orbax]") from error
    return orbax.checkpoint
