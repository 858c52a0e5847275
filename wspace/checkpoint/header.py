"""The header of a safetensors file: read without trust, and written.

A file is, in this order:

    8 bytes     the length n of the header, unsigned, little-endian
    n bytes     JSON that may end in spaces: {name: {"dtype", "shape", "data_offsets"}}
    the rest    the tensors without holes, each from data_offsets[0] to data_offsets[1]
"""

import contextlib
import difflib
import json
import math
import os
import stat
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(jnp.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(jnp.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(jnp.float8_e8m0fnu),
    "C64": np.dtype(np.complex64),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

_NARROW = ("F4", "F6_E2M3", "F6_E3M2")
_LONGEST = 100_000_000
_LARGEST = 2**63
_MOST_AXES = 64
_METADATA = "__metadata__"
_ALIGNMENT = 64
_SHOWN = 120
_POINTER = b"version https://git-lfs"


class Unreadable(ValueError):
    """A path whose bytes cannot be had, whatever they are."""


class Entry(NamedTuple):
    """One tensor: its dtype and shape, and the bytes of the file that it takes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Header(NamedTuple):
    """A file's tensors in the order of their bytes, the header's text, and the file's state."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    text: bytes
    state: tuple[int, ...]


def read(file: Path) -> Header:
    """The header of a file, if every byte of the file is accounted for by it.

    No more is read than the header, and nothing is allocated by what it says.
    """
    with _sound(file), opened(file) as stream:
        state = state_of(stream.fileno())
        size, start = state[0], stream.read(8)
        length = int.from_bytes(start, "little")
        if start == _POINTER[:8] and start + stream.read(len(_POINTER) - 8) == _POINTER:
            raise ValueError("it is a pointer of Git LFS, without the content")
        if len(start) < 8 or length > size - 8:
            raise ValueError(f"its header should take {length} bytes, of {size} of the file")
        if length > _LONGEST:
            raise ValueError(f"its header takes {length} bytes, more than {_LONGEST}")
        text = stream.read(length)
        if not text.startswith(b"{"):
            raise ValueError("its header is no JSON object")
        said = mapping(text, _natural)
    _refuse_narrow(file, said)
    with _sound(file):
        metadata = _metadata(said.pop(_METADATA, None))
        entries = [(name, _entry(name, entry, 8 + length)) for name, entry in said.items()]
        entries.sort(key=lambda item: (item[1].offset, item[1].nbytes))
        _cover(entries, 8 + length, size)
    return Header(dict(entries), metadata, text, state)


def packed(
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, Entry]]:
    """The start of a file up to its tensors, and the bytes that each of them is to take.

    The tensors begin at a multiple of 64 bytes, those of wider dtypes first, so that each of them
    is aligned for its dtype in a memory map.
    """
    order = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
    said: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    sizes, end = {}, 0
    for name in order:
        dtype, shape = tensors[name]
        start, end = end, end + dtype.itemsize * math.prod(shape)
        said[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": (start, end)}
        sizes[name] = start, end
    text = json.dumps(said, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if len(text) > _LONGEST:
        raise ValueError(
            f"names, shapes and metadata take {len(text)} bytes, and the format allows {_LONGEST}: "
            "write fewer tensors to a file, or shorter metadata"
        )
    first = 8 + len(text)
    entries = {
        name: Entry(*tensors[name], first + start, end - start)
        for name, (start, end) in sizes.items()
    }
    return len(text).to_bytes(8, "little") + text, entries


def opened(file: Path) -> BinaryIO:
    """A stream of the bytes of a regular file, or an error that names the file."""
    try:
        # A pipe without a writer would keep a plain open waiting.
        number = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        mode = os.fstat(number).st_mode
        if stat.S_ISREG(mode):
            return os.fdopen(number, "rb")
        os.close(number)
    except FileNotFoundError as error:
        if os.path.islink(file):
            raise FileNotFoundError(
                f"{file} is a link to {os.path.realpath(file)}, where there is no file: download "
                "it, or mend the link"
            ) from error
        raise FileNotFoundError(f"there is no file {file}: check the path") from error
    except (OSError, ValueError) as error:
        raise Unreadable(
            f"{file} cannot be read ({getattr(error, 'strerror', error)}): check its path and "
            "permissions"
        ) from error
    what = "a folder: give a file in it" if stat.S_ISDIR(mode) else "no regular file: copy it"
    raise Unreadable(f"{file} is {what}")


def state_of(number: int) -> tuple[int, ...]:
    """Size, place and times of an open file: other ones mean another content.

    Last the time of change of the inode, which no program sets, but links and permissions do.
    """
    now = os.fstat(number)
    return now.st_size, now.st_dev, now.st_ino, now.st_mtime_ns, now.st_ctime_ns


def mapping(text: bytes, number: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """A JSON object in UTF-8, all of whose names differ; `number` makes the numbers of it."""
    said = json.loads(
        text.decode(),
        object_pairs_hook=_distinct,
        parse_int=number,
        parse_float=number,
        parse_constant=number,
    )
    if not isinstance(said, dict):
        raise ValueError(f"it holds a {type(said).__name__}, no JSON object")
    return said


def shown(value: Any) -> str:
    """A value that a file or a caller gives, as it stands in a message: the middle left out."""
    text = repr(value)
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]}...{text[-_SHOWN:]}"


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """The one of the names that is most like a name, if one is, of those that can be read."""
    short = [x for x in names if len(x) <= 2 * _SHOWN]
    return difflib.get_close_matches(name, short, 1, cutoff) if len(name) <= 2 * _SHOWN else []


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, _ in pairs:
        name.encode()  # refuses half of a surrogate pair
    said = dict(pairs)
    if len(said) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"it has the name {shown(twice)} twice")
    return said


def _natural(text: str) -> int:
    if not text.isdigit() or len(text) > 19 or int(text) >= _LARGEST:
        raise ValueError(f"it has the number {text[:32]}, which is no size")
    return int(text)


def _metadata(said: Any) -> dict[str, str]:
    if said is None:
        return {}
    if not isinstance(said, dict) or not all(isinstance(value, str) for value in said.values()):
        raise ValueError(f"{_METADATA} does not map from strings to strings")
    for value in said.values():
        value.encode()
    return said


def _entry(name: str, said: Any, first: int) -> Entry:
    """The tensor that a part of the header speaks of."""
    if not isinstance(said, dict) or not said.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown(name)} has not dtype, shape and data_offsets")
    code, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{shown(name)} has the unknown dtype {shown(code)}")
    dtype = DTYPES[code]
    # Axes of length 0 do not hide that the others are too long for any array.
    if (
        not _are_sizes(shape)
        or len(shape) > _MOST_AXES
        or dtype.itemsize * math.prod(max(n, 1) for n in shape) >= _LARGEST
    ):
        raise ValueError(f"{shown(name)} has the shape {shown(shape)}, which no array has")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{shown(name)} has the offsets {shown(offsets)}, not a begin and an end")
    begin, end = offsets
    if dtype.itemsize * math.prod(shape) != end - begin:
        raise ValueError(f"{shown(name)} is {code} of shape {shown(shape)} in {end - begin} bytes")
    return Entry(dtype, tuple(shape), first + begin, end - begin)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int for n in value)


def _cover(entries: list[tuple[str, Entry]], first: int, size: int) -> None:
    """Raises unless the tensors, in order, follow each other up to the end of the file."""
    for name, entry in entries:
        if entry.offset != first:
            raise ValueError(f"{shown(name)} starts at byte {entry.offset}, not {first}")
        first += entry.nbytes
    if first != size:
        raise ValueError(f"its tensors end at byte {first}, the file at {size}")


def _refuse_narrow(file: Path, said: dict[str, Any]) -> None:
    for name, entry in said.items():
        if isinstance(entry, dict) and entry.get("dtype") in _NARROW:
            raise ValueError(
                f"tensor {shown(name)} of {file} has dtype {entry['dtype']}, whose values are "
                "narrower than a byte: convert it to a dtype of NumPy where the file is written"
            )


@contextlib.contextmanager
def _sound(file: Path) -> Generator[None]:
    """Says of an error in the content of a file that the file is at fault."""
    try:
        yield
    except Unreadable:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is truncated or no safetensors file ({error}): copy or download it again"
        ) from error
