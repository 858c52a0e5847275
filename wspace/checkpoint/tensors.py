"""Named tensors as the bytes of a file, and files put in place at once."""

import contextlib
import errno
import fnmatch
import os
import secrets
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.tree_util import all_leaves
from jaxtyping import Array, Float

from wspace import _checks
from wspace.checkpoint import header


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


_MENDS = {
    errno.EFBIG: "write smaller files, or to another file system, with space left",
    errno.EIO: "see to its disk, or give a path on another",
    errno.ENAMETOOLONG: "give a shorter name",
}


def writing(file: Path) -> contextlib.AbstractContextManager[None]:
    """Says of an error of the system what could not be written, and how to mend it."""
    mend = "give a path in a folder that exists, can be written and has space left"
    return _named(f"cannot write {file}", _MENDS, mend)


def reading(file: Path) -> contextlib.AbstractContextManager[None]:
    """Says of an error of the system what could not be read, and how to mend it."""
    return _named(f"cannot read {file}", {}, "check its path and its permissions, or leave it out")


@contextlib.contextmanager
def _named(what: str, mends: Mapping[int, str], mend: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # it has been said what failed
            raise
        said = f"{what} ({error.strerror}): {mends.get(error.errno or 0, mend)}"
        raise type(error)(said) from error


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
                    f"{what}[{header.shown(name)}] is a {type(leaf)}, but a file holds a flat "
                    "mapping from names to arrays: join the names of nested ones, as in "
                    "'1.weight', and leave out None"
                )


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether one of the globs matches a name, or is the name."""
    return any(name == glob or fnmatch.fnmatchcase(name, glob) for glob in globs)


def named(what: str, mapping: object) -> dict[str, Any]:
    """The mapping as a dictionary, if it maps from names."""
    if not isinstance(mapping, Mapping):
        raise TypeError(f"{what} must be a mapping from names to arrays, got {type(mapping)}")
    for name in mapping:
        if not isinstance(name, str):
            raise TypeError(
                f"names of tensors are strings, got {header.shown(name)} of {type(name)}"
            )
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise ValueError(
                f"{header.shown(name)} has half of a surrogate pair, which no file holds: rename"
            )
    return dict(mapping)
