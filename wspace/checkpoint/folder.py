"""Which files of a folder hold the tensors of a checkpoint, and which are carried over."""

import os
import re
from pathlib import Path
from typing import Any

from wspace.checkpoint import header
from wspace.checkpoint.header import shown
from wspace.checkpoint.tensors import reading

_TENSORS = ".safetensors"
_INDEX = re.compile(r"(.+)\.safetensors\.index(\.[^.]+)?\.json", re.DOTALL)
"""Of a folder's shards, or of a variant of them, such as model.safetensors.index.fp16.json."""

_ANY_INDEX = re.compile(r".*\.index(\.[^.]+)?\.json", re.DOTALL)
_ROLE = re.compile(r"(model|diffusion_pytorch_model|adapter_model)(\.[^.]+)?")
"""The names by which other programs look for the weights in a folder, and variants of these."""

_USUAL = f"model{_TENSORS}"
_SHARD = re.compile(r"-\d+-of-(\d+)\.safetensors$")
"""The name of one file of a checkpoint of so many."""
_SMALL = 2**26
_LONGEST = 100_000_000
_LONGEST_NAME = 255

_PICKLE = (
    "a pickle, which can run code and is never read: convert it where you trust it, by "
    "safetensors.torch.save_file(torch.load(file, weights_only=True), 'model.safetensors')"
)
_FOREIGN = {
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt", ".pkl"), _PICKLE),
    ".gguf": "GGUF, made from other weights: give the safetensors files it was made from, or "
    "convert it by AutoModel.from_pretrained(folder, gguf_file=name).save_pretrained(out)",
    ".h5": "HDF5: convert it, by safetensors.numpy.save_file({name: numpy.asarray(dataset)}, "
    "'model.safetensors') over the datasets that h5py finds in it",
    ".msgpack": "a file of Flax: convert it, by checkpoint.save('model.safetensors', tensors) of "
    "what flax.serialization.msgpack_restore reads",
}
_OTHERS = frozenset(
    {*_FOREIGN, _TENSORS, ".npz", ".npy", ".onnx", ".onnx_data", ".ot", ".pb", ".tflite", ".keras"}
)
"""The suffixes of files that hold weights, and so are not carried over."""


_ODD = (_OTHERS - {_TENSORS}) | {".safetensor", ".sft", ".st", ".pickle", ".hdf5", ".json", ".eqx"}
"""The suffixes that say that a file is wanted, of which none is written."""


def refuse_suffix(path: Path, *, is_folder: bool = False) -> None:
    """Raises if an output has the suffix of a file that is not what is written."""
    odd = path.suffix.lower()
    if odd in _ODD or (odd == _TENSORS and (is_folder or path.suffix != odd)):
        files = "" if is_folder else f"a file that ends in {_TENSORS}, or "
        better = path.with_suffix("" if is_folder else _TENSORS)
        raise ValueError(
            f"{path} ends in {path.suffix}, but what is written is {files}a folder, whose name "
            f"ends in no suffix of a file: give such as {better}"
        )


def found(path: Path) -> tuple[str, dict[Path, header.Header]]:
    """The headers of one file, or of those that an index names, and what they are called together.

    Raises as `open` does.
    """
    if not os.path.isdir(path):
        if path.suffix.lower() in _FOREIGN and os.path.isfile(path):
            raise ValueError(f"{path} is {_FOREIGN[path.suffix.lower()]}")
        if is_index(path):
            return _named(path.name), _sharded(path.parent, path.name, _index(path))
        # Of a file that is given alone, the name may say whose it is, and not what it is for.
        name = _named(path.name)
        return name if _ROLE.fullmatch(name) else "model", {path: header.read(path)}
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}): check its permissions"
        ) from error
    indices = [name for name in names if _INDEX.fullmatch(name)]
    if not indices:
        file = path / _only(path, names)
        return _named(file.name), {file: header.read(file)}
    if len(indices) > 1:
        raise ValueError(
            f"{path} has several indices, {', '.join(indices[:8])}: give the path of the one that "
            "is meant, or of one file"
        )
    shards = _index(path / indices[0])
    if _USUAL in names and _USUAL not in shards.values():
        raise ValueError(
            f"{path} has both {_USUAL} and {indices[0]}, which names other files: give "
            f"{path / _USUAL} or {path / indices[0]}, or remove what is not meant"
        )
    return _named(indices[0]), _sharded(path, indices[0], shards)


def is_index(path: Path) -> bool:
    """Whether a path is that of an index, by its name."""
    return _INDEX.fullmatch(path.name) is not None


def _named(name: str) -> str:
    """What shards are called by the name of their index, and a single file by its own."""
    parts = _INDEX.fullmatch(name)
    return name.removesuffix(_TENSORS) if parts is None else parts[1] + (parts[2] or "")


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights, in any format, or is an index of such files."""
    return Path(name).suffix.lower() in _OTHERS or _ANY_INDEX.fullmatch(name) is not None


def others_of(folder: Path) -> tuple[Path, ...]:
    """The small files of a folder that hold no weights, as `Checkpoint.others` tells."""
    others = []
    with reading(folder):
        names = sorted(os.listdir(folder))
    for file in (folder / name for name in names):
        with reading(file):
            is_other = not file.name.startswith(".") and not is_weights(file.name)
            if is_other and file.is_file() and file.stat().st_size <= _SMALL:
                others.append(file)
    return tuple(others)


def files_with(name: str) -> int:
    """How many files a checkpoint has, by the name of one of them."""
    found = _SHARD.search(name)
    return 1 if found is None else int(found[1])


def _only(folder: Path, names: list[str]) -> str:
    """The one file with tensors of a folder that has no index."""
    files = [name for name in names if name.endswith(_TENSORS) and not name.startswith(".")]
    if _USUAL in files:
        return _USUAL
    for name in files:
        if files_with(name) > len(files):
            raise FileNotFoundError(
                f"{folder} has {len(files)} of the {files_with(name)} files that {name} is "
                f"one of, and no index: download the others, and the *{_INDEX} that they have"
            )
    if len(files) > 1:
        raise ValueError(
            f"{folder} has {len(files)} {_TENSORS} files and no index: give one of "
            f"{', '.join(files[:8])}, or restore the *{_TENSORS}.index.json that belongs to them"
        )
    if files:
        return files[0]
    for name in names:
        if foreign := _FOREIGN.get(Path(name).suffix.lower()):
            raise ValueError(f"{folder} has no {_TENSORS} file, and {name} is {foreign}")
    raise FileNotFoundError(f"{folder} has no {_TENSORS} file: check the path")


def _index(file: Path) -> dict[str, str]:
    """The file of each tensor, as an index says it; every name is of a file beside the index."""
    with header.opened(file) as stream:
        text = stream.read(_LONGEST + 1)
    try:
        if len(text) > _LONGEST:
            raise ValueError(f"it is longer than {_LONGEST} bytes")
        shards = header.mapping(text).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError("it has no weight_map")
        for name, shard in shards.items():
            if not _is_plain(shard):
                raise ValueError(
                    f"{shown(name)} is in {shown(shard)}, which names no {_TENSORS} file there"
                )
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is no index of the files beside it ({error}): copy or download it again"
        ) from error
    return shards


def _is_plain(name: Any) -> bool:
    """Whether a value is the name of a file with tensors, and of nothing outside of its folder."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and name.endswith(_TENSORS)
        and not {"/", "\\", ":"} & set(name)
        and len(name.encode()) <= _LONGEST_NAME
    )


def _sharded(folder: Path, index: str, shards: dict[str, str]) -> dict[Path, header.Header]:
    """The headers of the files of an index, if they hold what it says."""
    files = {shard: folder / shard for shard in sorted(set(shards.values()))}
    missing = [shard for shard, file in files.items() if not os.path.lexists(file)]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of the {len(files)} files that {index} names: "
            f"download {', '.join(missing[:8])}"
        )
    headers = {}
    for shard, file in files.items():
        headers[file] = header.read(file)
        for name in headers[file].entries:
            if shards.get(name) != shard:
                where = f"is in {shards[name]}" if name in shards else "does not exist"
                raise ValueError(
                    f"{file} has a tensor {shown(name)}, which {where} as {index} says: restore "
                    "the files and the index as they were saved together"
                )
    for name, shard in shards.items():
        if name not in headers[files[shard]].entries:
            raise ValueError(
                f"{files[shard]} lacks the tensor {shown(name)} that {index} says it has: restore "
                "the files and the index as they were saved together"
            )
    return headers
