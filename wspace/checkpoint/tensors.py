"""Named tensors as the bytes of a file, and files put in place at once."""

import contextlib
import errno
import os
import secrets
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, KeyPath, all_leaves, tree_leaves_with_path
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


class Named(NamedTuple):
    """A leaf of a tree that a file holds, and its path as errors print it."""

    leaf: Any
    path: str

    @property
    def array(self) -> Any:
        """The leaf, a number of Python as an array."""
        return np.asarray(self.leaf) if np.isscalar(self.leaf) else self.leaf


_COUNTS = frozenset(x for x in header.NAMES if x.kind in "iub")


def is_count(leaf: object) -> bool:
    """Whether a leaf is an integer or a boolean, or an array of them, as a file holds them."""
    if isinstance(leaf, int):
        return isinstance(leaf, bool) or -(2**63) <= leaf < 2**63
    return getattr(leaf, "dtype", None) in _COUNTS and hasattr(leaf, "shape")


def plain(tree: Any) -> Any:
    """A tree, and a mapping that JAX takes for a leaf as a dictionary."""
    return dict(tree) if isinstance(tree, Mapping) and all_leaves([tree]) else tree


def by_name(what: str, tree: Any) -> dict[str, Named]:
    """The leaves of a tree by their keys, places and fields joined by dots, each once.

    Leaves are weights, integers or booleans. Those of a dictionary are in its order.
    """
    tree = plain(tree)
    parts = tree.items() if isinstance(tree, dict) else [(None, tree)]
    rows = [
        ((DictKey(key), *path) if isinstance(tree, dict) else path, leaf)
        for key, part in parts
        for path, leaf in tree_leaves_with_path(part, is_leaf=_checks.is_factored)
    ]
    found: dict[str, Named] = {}
    for path, leaf in rows:
        name, where = _name(what, path, leaf), _checks.path_of(path)
        if name in found:
            raise ValueError(
                f"leaves {found[name].path} and {where} of {what} are both named "
                f"{header.shown(name)} in a file: rename one"
            )
        if _checks.is_factored(leaf) or not (_checks.is_weight(leaf) or is_count(leaf)):
            raise _checks.no_weight(f"leaf {where} of {what}", leaf)
        found[name] = Named(leaf, where)
    return found


def _name(what: str, path: KeyPath, leaf: Any) -> str:
    if not path:
        raise TypeError(
            f"{what} must be a mapping from names to arrays, or a tree of such, got {type(leaf)}"
        )
    keys = [part.key for part in path if isinstance(part, DictKey | FlattenedIndexKey)]
    name = _checks.name_of(path)
    named(what, dict.fromkeys([*(str(key) if type(key) is int else key for key in keys), name]))
    if name == "__metadata__":
        raise ValueError("__metadata__ names the metadata of the format: rename the tensor")
    return name


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
