"""Named tensors in memory, from files and to one file."""

import contextlib
import os
import secrets
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import all_leaves
from jaxtyping import Array, Float

from wspace import _checks
from wspace.checkpoint import header, stored

__all__ = ["load", "save"]


def save(
    file: str | os.PathLike[str], weights: Mapping[str, Float[Array | np.ndarray, "..."]]
) -> None:
    """Writes named tensors to a safetensors file.

    The file is written aside, flushed to disk and put in place at once: it is there whole, or as
    it was before. Every value comes back from [`load`][wspace.checkpoint.load] bit for bit,
    bfloat16 included, whatever the strides of the array.

    Args:
        file: Where to write, usually ending in `.safetensors`; replaced if it exists.
        weights: A flat mapping from names to floating-point arrays.

    Raises:
        TypeError: If `weights` is not a flat mapping from strings to arrays, or an array is not
            floating-point.
        ValueError: If a tensor has the name `__metadata__`, which the format keeps for itself.
        OSError: If the file cannot be written.

    Examples:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> from wspace import checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "model.safetensors")
        ...     checkpoint.save(file, {"1.weight": jnp.ones((1, 2), jnp.bfloat16)})
        ...     checkpoint.load(file)
        {'1.weight': Array([[1, 1]], dtype=bfloat16)}

    References:
        The [format](https://huggingface.co/docs/safetensors) of Hugging Face.
    """
    flat(weights=weights)
    write(file, packed(weights))


def load(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Reads the named tensors of a safetensors file, or of a folder of them.

    For weights that do not fit in memory, [`open`][wspace.checkpoint.open].

    Args:
        path: A file written by [`save`][wspace.checkpoint.save] or by any other program, or a
            folder with such files, as [`open`][wspace.checkpoint.open] takes it.

    Returns:
        The tensors by name, in the dtypes of the file.

    Raises:
        FileNotFoundError: If there is no such file, or the folder lacks one.
        ValueError: If a file cannot be read, is truncated or otherwise not a safetensors file, or
            holds a tensor that is not float64, float32, bfloat16 or float16; also if it holds
            float64 while JAX has 64-bit values disabled.

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
        return {name: _array(tensor) for name, tensor in checkpoint.items()}


def read(file: str | os.PathLike[str]) -> bytes:
    """The bytes of a file."""
    with header.opened(Path(file)) as stream:
        return stream.read()


def packed(
    weights: Mapping[str, Float[Array | np.ndarray, "..."]], metadata: dict[str, str] | None = None
) -> bytes:
    """The bytes of a safetensors file with these tensors."""
    arrays = {name: np.asarray(array) for name, array in weights.items()}
    start, entries = header.packed({x: (a.dtype, a.shape) for x, a in arrays.items()}, metadata)
    # tobytes writes the elements in order, whatever the strides.
    return b"".join([start, *(arrays[name].tobytes() for name in entries)])


def write(file: str | os.PathLike[str], data: bytes) -> None:
    """Puts a file with these bytes in place at once, or leaves everything as it was."""
    write_all({Path(file): data})


def write_all(files: Mapping[Path, bytes]) -> None:
    """Puts files with these bytes in place once all are on disk, or leaves all as they were."""
    asides = {file: file.parent / f".{file.name}.{secrets.token_hex(4)}" for file in files}
    try:
        for file, data in files.items():
            with writing(file), open(asides[file], "xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        for file, aside in asides.items():
            with writing(file):
                os.replace(aside, file)
    except BaseException:
        for aside in asides.values():
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def writing(file: Path) -> Generator[None]:
    """Says of an error of the system what could not be written, and how to mend it."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write {file} ({error.strerror}): give a path in a folder that exists, can be "
            "written and has space left"
        ) from error


def flat(**mappings: object) -> None:
    """Raises unless each mapping, by name, is a flat one from names to arrays of weights."""
    for what, mapping in mappings.items():
        leaves = named(what, mapping)
        if "__metadata__" in leaves:
            raise ValueError("__metadata__ names the metadata of the format: rename the tensor")
        _checks.floating_leaves(**{what: leaves})
        for name, leaf in leaves.items():
            if not all_leaves([leaf]):
                raise TypeError(
                    f"{what}[{name!r}] is a {type(leaf)}, but a file holds a flat mapping from "
                    "names to arrays: join the names of nested ones, as in '1.weight', and leave "
                    "out None"
                )


def named(what: str, mapping: object) -> dict[str, Any]:
    """The mapping as a dictionary, if it maps from names."""
    if not isinstance(mapping, Mapping):
        raise TypeError(f"{what} must be a mapping from names to arrays, got {type(mapping)}")
    for name in mapping:
        if not isinstance(name, str):
            raise TypeError(f"names of tensors are strings, got {name!r} of {type(name)}")
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise ValueError(f"{name!r} has half of a surrogate pair, which no file holds: rename")
    return dict(mapping)


def _array(tensor: stored.Stored) -> Array:
    where = f"tensor {tensor.name!r} of {tensor.file}"
    if tensor.dtype not in _checks.WEIGHT_DTYPES:
        raise ValueError(
            f"{where} has dtype {header.NAMES[tensor.dtype]}; weights are F64, F32, BF16 and F16: "
            "convert or leave out others where the file is written"
        )
    if jax.dtypes.canonicalize_dtype(tensor.dtype) != tensor.dtype:
        raise ValueError(
            f"{where} is float64, which JAX would round to float32 here: "
            'call jax.config.update("jax_enable_x64", True) first'
        )
    # Copied, so that no array keeps the map of the file open.
    return jnp.array(tensor.read())
