"""What an output says of how it was made, and the output that may not be where an input is."""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from wspace._cli.words import Misuse, in_bytes, printable
from wspace.checkpoint import Checkpoint, partial, places
from wspace.checkpoint.folder import is_index
from wspace.checkpoint.tensors import reading

NAME = "wspace.json"
_PIECE = 2**24
_MOST = 16


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
        return said | {"blake2b_of_headers_states_and_samples": source.fingerprint()}
    state = hashlib.blake2b(digest_size=16)
    for file in source.files:
        with reading(file), open(file, "rb") as stream:
            while piece := stream.read(_PIECE):
                state.update(piece)
    return said | {"blake2b_of_files": state.hexdigest()}


def text(said: Any) -> str:
    """JSON, which has no infinity and no NaN: what is one is null."""
    return json.dumps(_plain(said), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def of_targets(targets: Iterable[Path], others: Sequence[Path]) -> dict[str, str]:
    """What outputs replace, what stays in them, and what earlier runs left of them, in words."""
    gone, kept, left = [], [], []
    for target in targets:
        goes, stays = places.replaced(target, [NAME, *(other.name for other in others)])
        whole = os.path.isfile(target) or os.path.islink(target)
        gone += [str(target)] if whole else [str(target / x) for x in goes]
        kept += [str(target / x) for x in stays]
        left += [f"{x} ({in_bytes(partial.held(x))})" for x in partial.leftovers(target)]
    mend = "; give their commands again to go on, or --remove-partial to remove them"
    said = {
        "replaces": listed(gone) + (f", and keeps {listed(kept)}" if kept else ""),
        "left": listed(left) + mend if left else "",
    }
    return {key: value for key, value in said.items() if value}


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(map(printable, names[:_MOST])) + more


def called(path: Path) -> str:
    """What a model is called that a path leads to: by the path, not by where links lead from it."""
    path = Path(os.path.abspath(path))
    return (path.parent if is_index(path) else path).name.removesuffix(".safetensors")


def refuse_overlap(output: Path, sources: Sequence[Path], files: Iterable[Path] = ()) -> None:
    """Raises if the output is an input, in one, or around one or a file that is read by links."""
    out = Path(os.path.realpath(output))
    for source in (*sources, *files):
        path = Path(os.path.realpath(source))
        if out == path or out in path.parents or (source in sources and path in out.parents):
            raise Misuse(
                f"the output {output} and the input {source} overlap: give an output that is "
                "neither an input, nor inside or around one"
            )
