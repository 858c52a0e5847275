"""Trees of named tensors in memory: from files, and to files, on one device or on many."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.tree_util import tree_map_with_path
from jaxtyping import Array, PyTree

from wspace import _checks
from wspace._checks import is_weight
from wspace._numerics import in_jax
from wspace.checkpoint import header, stored
from wspace.checkpoint.chosen import codes
from wspace.checkpoint.hosts import leads
from wspace.checkpoint.stored import Checkpoint, Stored
from wspace.checkpoint.tensors import Named, by_name, named, plain
from wspace.checkpoint.writer import create

__all__ = ["load", "save"]


def save(
    path: str | os.PathLike[str],
    weights: PyTree,
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a tree of arrays to a safetensors file, or to a folder with one.

    A tensor has the name of its leaf: keys, places and fields joined by dots, as in
    `"layers.0.weight"`. A flat mapping from names keeps its names. The file does not say what the
    tree is made of: `load(path, like=tree)` gives the leaves back in the structure of a tree. What
    is `None` is structure, and in no file.

    The output is written aside, flushed to disk and put in place at once: it is there whole, or as
    it was before. Every value comes back from [`load`][wspace.checkpoint.load] bit for bit,
    bfloat16 included, whatever the strides of the array. Float64 arrays of NumPy are written as
    float64, whether JAX has 64-bit values enabled or not.

    Arrays that are spread over devices are written shard by shard, and never gathered. In a run of
    several processes, by `jax.distributed`, all of them call this; each writes its shards of
    global arrays, and the first one all others.

    For more files, or other options, [`create`][wspace.checkpoint.create].

    Args:
        path: A file if it ends in `.safetensors`, replaced if it exists; else a folder, which must
            not exist, for `model.safetensors`. Suffixes of other files, as `.bin`, are refused.
        weights: A tree of floating-point arrays: nested dictionaries, lists, tuples, and whatever
            else JAX takes for a tree, such as a module of Equinox or a state of Flax. Integers and
            booleans, such as counters, are written too.
        metadata: Strings by name for the `__metadata__` of the file, beside `"format": "pt"`,
            without which some versions of transformers load no file.

    Raises:
        TypeError: If a leaf is neither floating-point nor an integer or a boolean, a key is neither
            a string nor an integer, or `weights` is a leaf itself; if `metadata` does not map from
            strings to strings.
        ValueError: If two leaves have one name once their keys are joined; if a tensor has the name
            `__metadata__`, which the format keeps for itself; if the suffix is of another file.
        FileExistsError: If the folder exists; `create` replaces one by `force`.
        OSError: If the output cannot be written.
        RuntimeError: If another process of the run failed.

    Examples:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> from wspace import checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "model.safetensors")
        ...     checkpoint.save(file, {"1.weight": jnp.ones((1, 2), jnp.bfloat16)})
        ...     checkpoint.load(file)
        {'1.weight': Array([[1, 1]], dtype=bfloat16)}
        >>> nested = {"layers": [jnp.ones(2), jnp.zeros(1)], "step": 7}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "model.safetensors")
        ...     checkpoint.save(file, nested)
        ...     sorted(checkpoint.load(file)), checkpoint.load(file, like=nested)["step"]
        (['layers.0', 'layers.1'], 7)

    References:
        The [format](https://huggingface.co/docs/safetensors) of Hugging Face.
    """
    arrays = {}
    for name, leaf in by_name("weights", weights).items():
        if not isinstance(leaf.array, jax.Array | np.ndarray):
            raise TypeError(
                f"leaf {leaf.path} of weights is a {type(leaf.leaf)}, which is no array in memory: "
                "give its values, as read() of a stored tensor does"
            )
        arrays[name] = leaf.array
    texts = {"format": "pt"} | ({} if metadata is None else named("metadata", metadata))
    is_file = Path(path).suffix == ".safetensors"
    try:
        with create(path, arrays, metadata=texts, force=is_file) as writer:
            for name, array in arrays.items():
                is_shared = isinstance(array, jax.Array) and not array.is_fully_addressable
                if is_shared or leads():
                    writer.write(name, array)
    except FileExistsError as error:
        raise FileExistsError(
            str(error).replace("force=True", "create(..., force=True)")
        ) from error


def load(
    path: str | os.PathLike[str],
    sharding: Sharding
    | Mapping[str, Sharding | None]
    | Callable[[str, Stored], Sharding | None]
    | None = None,
    *,
    skip: Sequence[str] = (),
    like: PyTree | None = None,
) -> Any:
    """Reads the weights in a safetensors file, or in a folder of them, by name.

    Weights are tensors of floating-point numbers. Those of integers, booleans and complex numbers,
    such as position ids, counters and tables, are left out: `open` and `stream` keep them.

    With `like`, the tensors come back as the leaves of such a tree, by the names that
    [`save`][wspace.checkpoint.save] gives them, integers and booleans included. Every leaf must
    have its tensor, every tensor its leaf, and both the same shape and dtype.

    With a `sharding`, each tensor becomes one array over the devices of that, and each process of
    a run reads only what its devices hold. So a model loads that fits no single device or machine.
    For weights that fit nowhere, [`open`][wspace.checkpoint.open].

    Args:
        path: A file written by [`save`][wspace.checkpoint.save] or by any other program, or a
            folder with such files, as [`open`][wspace.checkpoint.open] takes it.
        sharding: How the tensors lie on devices: one for all, or one for each, by name or as a
            function of the name and the tensor, of which dtype and shape are known. `None`, for all
            or for one, is the default device.
        skip: Names or globs, such as `"optimizer.*"`, of tensors that are left out, too.
        like: A tree of arrays, or of the shapes that `jax.eval_shape` gives, of which structure,
            shapes and dtypes are used. A float64 array of NumPy counts as float32 where JAX has
            64-bit values disabled.

    Returns:
        The weights by name, in the dtypes of the file; with `like`, a tree of its structure. There
            numbers of Python come back as such, and integers that JAX has no dtype for now, such as
            int64, as arrays of NumPy.

    Raises:
        FileNotFoundError: If there is no such file, or the folder lacks one.
        ValueError: If a file cannot be read, is truncated or otherwise not a safetensors file; if
            it holds codes of quantized weights, float8, or no weights; also if it holds float64
            while JAX has 64-bit values disabled; if a sharding does not fit the shape of its
            tensor, or the names of `sharding` differ from the names of the weights; with `like`,
            if a tensor is missing or left over, or differs in shape or dtype from its leaf.
        TypeError: If what is given as a sharding is none, or `like` is not such a tree.

    Examples:
        >>> import pathlib, tempfile
        >>> import numpy as np
        >>> from wspace import checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "model.safetensors")
        ...     checkpoint.save(file, {"bias": np.zeros(2, np.float32)})
        ...     _ = file.write_bytes(file.read_bytes()[:-1])
        ...     try:
        ...         checkpoint.load(file)
        ...     except ValueError as error:
        ...         print(str(error).partition(" is ")[2].partition(" (")[0])
        truncated or no safetensors file

    References:
        The [format](https://huggingface.co/docs/safetensors) of Hugging Face.
    """
    with stored.open(path) as checkpoint:
        left = checkpoint.without(skip)
        if like is not None:
            return _in_structure(plain(like), left, sharding)
        if (wrong := codes(left)) is not None:
            name, what = wrong
            raise ValueError(
                f"tensor {header.shown(name)} of {left[name].file} {what}; or leave it out by skip"
            )
        tensors = {name: tensor for name, tensor in left.items() if is_weight(tensor)}
        refuse_nothing(tensors, left, checkpoint.path)
        where = shardings(sharding, tensors, checkpoint.path)
        return {name: _array(tensor, where[name]) for name, tensor in tensors.items()}


def _in_structure(like: PyTree, tensors: Checkpoint, sharding: Any) -> PyTree:
    """The tensors as the leaves of a tree, each of which has one, of its shape and dtype."""
    leaves = by_name("like", like)
    for name, leaf in leaves.items():
        if name not in tensors:
            missing = len(leaves.keys() - tensors.keys())
            near = header.nearest(name, tensors.keys() - leaves.keys(), 0.0)
            raise ValueError(
                f"{tensors.path} has no tensor {header.shown(name)} for leaf {leaf.path} of like, "
                f"one of {missing} that it lacks: give the tree that was saved"
                + (f"; {header.shown(near[0])} is left over" if near else "")
            )
        _refuse_unlike(tensors[name], leaf)
    for name in tensors:
        if name not in leaves:
            left = len(tensors.keys() - leaves.keys())
            raise ValueError(
                f"{tensors.path} has a tensor {header.shown(name)} that like has no leaf for, one "
                f"of {left} left over: give the tree that was saved, or leave it out by skip"
            )
    where = shardings(sharding, tensors, tensors.path)
    found = {
        name: _array(tensor, where[name])
        if is_weight(tensor)
        else _count(tensor, where[name], leaves[name].leaf)
        for name, tensor in tensors.items()
    }
    return tree_map_with_path(lambda path, _: found[_checks.name_of(path)], like)


def _refuse_unlike(tensor: Stored, like: Named) -> None:
    """Raises unless a tensor has the shape and the dtype of a leaf, as it is or as JAX takes it."""
    dtype, shape = np.dtype(like.array.dtype), like.array.shape
    dtypes = {dtype, in_jax(dtype)}
    if isinstance(like.leaf, int) and not isinstance(like.leaf, bool):
        dtypes = {x for x in header.NAMES if np.issubdtype(x, np.integer)}
    what = f"tensor {header.shown(tensor.name)} of {tensor.file}"
    if tensor.shape != shape:
        raise ValueError(
            f"{what} has shape {tensor.shape}, but leaf {like.path} of like {shape}: give the tree "
            "that was saved"
        )
    if is_weight(tensor):
        refuse_dtype(what, tensor.dtype)
    if tensor.dtype not in dtypes:
        raise ValueError(
            f"{what} is {tensor.dtype}, but leaf {like.path} of like {dtype}: give like in the "
            "dtypes of the file, and convert what is loaded, such as by tree.cast_like"
        )


def _count(tensor: Stored, sharding: Sharding | None, like: Any) -> Any:
    """An integer or a boolean as a leaf like this one."""
    if isinstance(like, int):
        return type(like)(tensor.read())
    is_known = in_jax(tensor.dtype) == tensor.dtype
    return _array(tensor, sharding) if is_known else np.array(tensor.read())


def _array(tensor: Stored, sharding: Sharding | None) -> Array:
    where = f"tensor {header.shown(tensor.name)} of {tensor.file}"
    refuse_dtype(where, tensor.dtype)
    refuse_cut(where, tensor.shape, sharding)
    # Copied, so that no array keeps the map of the file open.
    if sharding is None:
        return jnp.array(tensor.read())
    read: dict[str, np.ndarray] = {}

    def shard(index: Any) -> np.ndarray:
        # Once for all devices that hold it; slices are not hashable.
        key = str(index)
        if key not in read:
            read[key] = np.array(tensor.part(index))
        return read[key]

    return jax.make_array_from_callback(tensor.shape, sharding, shard, tensor.dtype)


def shardings(
    sharding: Any, tensors: Mapping[str, Any], where: Path | str
) -> dict[str, Sharding | None]:
    """The sharding of each tensor, none of which is missing or meant for no tensor."""
    if isinstance(sharding, Mapping):
        for name in sorted(tensors.keys() ^ sharding.keys()):
            which = "lacks tensor" if name in tensors else "has a name that is no tensor"
            raise ValueError(
                f"sharding {which} {header.shown(name)} of {where}: give one for each tensor, "
                "or None"
            )
        chosen = {name: sharding[name] for name in tensors}
    elif callable(sharding):
        chosen = {name: sharding(name, tensor) for name, tensor in tensors.items()}
    else:
        chosen = dict.fromkeys(tensors, sharding)
    for name, one in chosen.items():
        if one is not None and not isinstance(one, Sharding):
            raise TypeError(
                f"sharding of tensor {header.shown(name)} is {header.shown(one)}, but must be a "
                "Sharding of jax.sharding, or None: give such as "
                "jax.sharding.NamedSharding(mesh, spec)"
            )
    return chosen


def refuse_nothing(weights: Mapping[str, Any], tensors: Mapping[str, Any], where: Any) -> None:
    """Raises if there are tensors, and no weights among them."""
    if tensors and not weights:
        name, tensor = next(iter(tensors.items()))
        dtype = np.dtype(tensor.dtype)
        raise ValueError(
            f"{where} holds no weights, which are F64, F32, BF16 and F16: tensor "
            f"{header.shown(name)} has dtype {header.NAMES.get(dtype, dtype)}; read it by "
            "checkpoint.open"
        )


def refuse_float8(where: str, dtype: np.dtype) -> None:
    """Raises if a tensor is of a dtype in which nothing is computed."""
    if dtype not in _checks.WEIGHT_DTYPES:
        raise ValueError(
            f"{where} is {dtype}, in which nothing is computed: convert it to bfloat16 or float32 "
            "where it is written, or leave it out by skip"
        )


def refuse_dtype(where: str, dtype: np.dtype) -> None:
    """Raises unless JAX has arrays of this dtype now."""
    if in_jax(dtype) != dtype:
        raise ValueError(
            f"{where} is float64, which JAX would round to float32 here: "
            'call jax.config.update("jax_enable_x64", True) first'
        )


def refuse_cut(where: str, shape: tuple[int, ...], sharding: Sharding | None) -> None:
    """Raises if a tensor of this shape cannot be cut into the shards."""
    try:
        if sharding is not None:
            sharding.shard_shape(shape)
    except ValueError as error:
        raise ValueError(
            f"{where} has shape {shape}, which {sharding} does not divide into shards: give a "
            "function (name, tensor) as sharding, with one that does, such as that of jax.P()"
        ) from error
