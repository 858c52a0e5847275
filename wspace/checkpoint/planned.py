"""Which files a checkpoint is to be written to, and where in them each tensor goes."""

import errno
import hashlib
import json
import math
import operator
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from wspace.checkpoint import header
from wspace.checkpoint.folder import is_index
from wspace.checkpoint.tensors import named, reading


class Place(NamedTuple):
    """Where a tensor goes."""

    file: str
    entry: header.Entry


class Files(NamedTuple):
    """The files to be written: how they start, how long they are, and where each tensor goes."""

    is_file: bool
    index: str
    starts: dict[str, bytes]
    sizes: dict[str, int]
    places: dict[str, Place]


def planned(
    target: Path,
    layout: Mapping[str, Any],
    shard_bytes: int | None,
    metadata: Mapping[str, str] | None,
    name: str,
) -> Files:
    """The files that hold the tensors of a layout, and how each of them starts."""
    tensors = {name: _described(name, leaf) for name, leaf in named("layout", layout).items()}
    if not name or not _is_plain(name):
        raise ValueError(f"name must be that of a file, without a folder, got {header.shown(name)}")
    is_file = target.suffix == ".safetensors"
    if is_file and shard_bytes is not None:
        raise ValueError(f"{target} is one file: give a folder to write shards of shard_bytes")
    if shard_bytes is not None and shard_bytes < 1:
        raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
    shards = [list(tensors)] if shard_bytes is None else _shards(tensors, shard_bytes)
    if is_file:
        names = [target.name]
    elif len(shards) == 1:
        names = [f"{name}.safetensors"]
    else:
        count = len(shards)
        names = [f"{name}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    texts = {} if metadata is None else named("metadata", metadata)
    if not all(isinstance(text, str) for text in texts.values()):
        raise TypeError("metadata must map from strings to strings: write other values as text")
    files = Files(is_file, _index_of(name), {}, {}, {})
    for file, shard in zip(names, shards, strict=True):
        files.starts[file], entries = header.packed({x: tensors[x] for x in shard}, texts)
        taken = sum(entry.nbytes for entry in entries.values())
        files.sizes[file] = len(files.starts[file]) + taken
        files.places.update({name: Place(file, entry) for name, entry in entries.items()})
    return files


def _index_of(name: str) -> str:
    """The name of an index, in which a variant stands last, as diffusers and transformers do it."""
    stem, dot, variant = name.rpartition(".")
    if stem and variant.isidentifier():
        return f"{stem}.safetensors.index{dot}{variant}.json"
    return f"{name}.safetensors.index.json"


def _described(name: str, leaf: Any) -> tuple[np.dtype, tuple[int, ...]]:
    if name == "__metadata__":
        raise ValueError("__metadata__ names the metadata of the format: rename the tensor")
    dtype, shape = getattr(leaf, "dtype", None), getattr(leaf, "shape", None)
    if shape is None or dtype not in header.NAMES:
        raise TypeError(
            f"layout[{header.shown(name)}] is {_kind(leaf)}, but a tensor has a shape and one of "
            f"the dtypes {', '.join(map(str, header.NAMES))}"
        )
    return np.dtype(dtype), tuple(map(operator.index, shape))


def _kind(leaf: Any) -> str:
    dtype = getattr(leaf, "dtype", None)
    return f"of type {type(leaf).__name__}" + ("" if dtype is None else f" and {dtype}")


def _shards(
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], shard_bytes: int
) -> list[list[str]]:
    """The names in order, cut where the next tensor would make a file too large."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, (dtype, shape) in tensors.items():
        nbytes = dtype.itemsize * math.prod(shape)
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def carried(files: Files, others: Iterable[str | os.PathLike[str]]) -> dict[str, Path]:
    """The files to be carried over by their names."""
    copies: dict[str, Path] = {}
    for other in map(Path, others):
        refuse_name(files, other.name)
        if other.name in copies:
            raise ValueError(f"{copies[other.name]} and {other} have one name: leave out one")
        if not other.is_file():
            raise FileNotFoundError(f"there is no file {other} to be carried over")
        with reading(other):
            if not os.access(other, os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        copies[other.name] = other
    return copies


def refuse_name(files: Files, name: str) -> None:
    """Raises unless a file of this name can be put beside the tensors."""
    if files.is_file:
        raise ValueError(f"{name} cannot be put beside the tensors in one file: write a folder")
    if not _is_plain(name) or name.endswith(".safetensors") or is_index(Path(name)):
        raise ValueError(
            f"{header.shown(name)} is no name for a file beside the tensors: give another"
        )


def _is_plain(name: str) -> bool:
    return name not in ("", ".", "..") and "\0" not in name and Path(name).name == name


def digest(files: Files, plan: str | None) -> str:
    """Tells jobs apart whose unfinished output must not be mixed."""
    state = hashlib.blake2b(json.dumps(["wspace 1", plan]).encode(), digest_size=8)
    for file, start in files.starts.items():
        state.update(json.dumps([file, files.sizes[file]]).encode() + start)
    return state.hexdigest()


def index(files: Files) -> bytes:
    """The index of several files."""
    said = {
        "metadata": {"total_size": sum(place.entry.nbytes for place in files.places.values())},
        "weight_map": {name: place.file for name, place in sorted(files.places.items())},
    }
    return (json.dumps(said, indent=2, ensure_ascii=False) + "\n").encode()
