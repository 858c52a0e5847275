"""The bytes of arrays in the order of a file, wherever the arrays lie; ranges of them."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import jax
import numpy as np

_PIECE = 2**20

Share: TypeAlias = int | list[list[int]]
"""What a process wrote of a tensor: so many bytes of a shared array, or ranges of its own."""


def runs(array: jax.Array | np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """What this process is to write of an array: consecutive elements, and the index of the first.

    A run of an array that is not spread over devices is all of it. Else those of a shard are its
    rows along the last axis that is cut, and each shard is that of one device in all processes.
    """
    if not isinstance(array, jax.Array) or (
        array.is_fully_addressable and len(array.sharding.device_set) == 1
    ):
        yield 0, np.asarray(array)
        return
    for shard in array.addressable_shards:
        if shard.replica_id == 0 and shard.data.size:
            yield from _rows(np.asarray(shard.data), shard.index, array.shape)


def _rows(
    block: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]
) -> Iterator[tuple[int, np.ndarray]]:
    """The runs of a block that lies at an index of a tensor."""
    steps = np.cumprod([1, *shape[:0:-1]], dtype=np.int64)[::-1]
    cut = max((axis for axis, size in enumerate(block.shape) if size < shape[axis]), default=0)
    first = sum((part.start or 0) * step for part, step in zip(index, steps, strict=False))
    starts = np.array(first, np.int64)
    for size, step in zip(block.shape[:cut], steps, strict=False):
        starts = starts[..., None] + step * np.arange(size)
    yield from zip(starts.ravel().tolist(), block.reshape(starts.size, -1), strict=True)


def pieces(array: np.ndarray) -> Iterator[memoryview]:
    """The bytes of an array in the order of its elements, whatever its strides, in pieces."""
    bits: Any = array.view(f"u{array.itemsize}")
    step = _PIECE // array.itemsize
    if bits.flags.c_contiguous:
        flat = bits.reshape(-1)
        for start in range(0, flat.size, step):
            yield memoryview(flat[start : start + step]).cast("B")
    else:
        in_order: Any = np.nditer
        flags = ["external_loop", "buffered"], ["readonly", "contig"]
        for piece in in_order(bits, *flags, order="C", buffersize=step):
            yield memoryview(piece).cast("B")


def joined(parts: Iterable[tuple[int, int, int]]) -> list[list[int]]:
    """The ranges of parts in order, neighbours as one."""
    ranges: list[list[int]] = []
    for start, stop, _ in sorted(parts):
        if ranges and ranges[-1][1] == start:
            ranges[-1][1] = stop
        else:
            ranges.append([start, stop])
    return ranges


def is_whole(shares: list[Share], nbytes: int) -> bool:
    """Whether what the processes wrote of a tensor is all of it, once."""
    shared = [share for share in shares if isinstance(share, int)]
    ranges = sorted(x for share in shares if not isinstance(share, int) for x in share)
    if shared:
        return not ranges and sum(shared) == nbytes
    end = 0
    for start, stop in ranges:
        if start != end:
            return False
        end = stop
    return end == nbytes
