"""What an output says of how it was made, and the output that may not be where an input is."""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wspace._cli.words import Misuse
from wspace.checkpoint import Checkpoint
from wspace.checkpoint.folder import is_index

NAME = "wspace.json"
_PIECE = 2**24


def record(recipe: Mapping[str, Any], sources: Sequence[Checkpoint], full: bool) -> dict[str, Any]:
    """The recipe, the versions and the inputs; `plan` is the hash of these."""
    said: dict[str, Any] = {
        "recipe": dict(recipe),
        "versions": {
            **{name: importlib.metadata.version(name) for name in ("jax", "numpy")},
            "python": platform.python_version(),
            "wspace": _version(),
        },
        "inputs": [_input(source, full) for source in sources],
    }
    plan = hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16)
    return said | {"plan": plan.hexdigest()}


def _version() -> str:
    try:
        return importlib.metadata.version("wspace")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _input(source: Checkpoint, full: bool) -> dict[str, Any]:
    said = {"path": str(source.path)}
    if not full:
        return said | {"blake2b_of_headers_sizes_and_times": source.fingerprint()}
    state = hashlib.blake2b(digest_size=16)
    for file in source.files:
        with open(file, "rb") as stream:
            while piece := stream.read(_PIECE):
                state.update(piece)
    return said | {"blake2b_of_files": state.hexdigest()}


def called(path: Path) -> str:
    """What a model is called that a path leads to: by the path, not by where links lead from it."""
    path = Path(os.path.abspath(path))
    return (path.parent if is_index(path) else path).name.removesuffix(".safetensors")


def refuse_overlap(output: Path, sources: Sequence[Path], files: Iterable[Path] = ()) -> None:
    """Raises if the output is an input, in one, or around one or a file that is read by links."""
    out = output.resolve()
    for source in (*sources, *files):
        path = source.resolve()
        if out == path or out in path.parents or (source in sources and path in out.parents):
            raise Misuse(
                f"the output {output} and the input {source} overlap: give an output that is "
                "neither an input, nor inside or around one"
            )
