"""The bytes of arrays in the order of a file, wherever the arrays lie; ranges of them."""

from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import jax
import numpy as np

_PIECE = 2**20

Share: TypeAlias = int | list[list[int]]
"""What a process wrote of a tensor: so many bytes of a shared array, or ranges of its own."""


def runs(array: jax.Array | np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Runs of consecutive elements that this process writes, each with the index of its first.

    Of an array that is not spread over devices it is all. Else it is the rows, along the last axis
    that is cut, of those shards that no device before has, in this process or another.
    """
    if not isinstance(array, jax.Array) or (
        array.is_fully_addressable and len(array.sharding.device_set) == 1
    ):
        yield 0, np.asarray(array)
        return
    sizes = array.sharding.shard_shape(array.shape)
    cut = max((axis for axis, size in enumerate(sizes) if size < array.shape[axis]), default=0)
    shards = [
        (tuple(part.start or 0 for part in shard.index), shard.data)
        for shard in array.addressable_shards
        if shard.replica_id == 0 and shard.data.size
    ]
    for starts, neighbors in _adjacent(shards, cut):
        blocks = [np.asarray(shard) for shard in neighbors]
        block = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=cut)
        yield from _rows(block, starts, array.shape)


def _adjacent(
    shards: list[tuple[tuple[int, ...], jax.Array]], cut: int
) -> Iterator[tuple[tuple[int, ...], list[jax.Array]]]:
    """Groups shards that lie side by side along an axis, so that their rows are written as one.

    Along the first axis each is a group of its own: its rows are consecutive already.
    """
    shards = sorted(shards, key=lambda shard: (*shard[0][:cut], *shard[0][cut + 1 :], *shard[0]))
    while shards:
        (starts, first), *shards = shards
        group, end = [first], list(starts)
        while cut and shards:
            end[cut] += group[-1].shape[cut]
            if shards[0][0] != tuple(end):
                break
            group.append(shards.pop(0)[1])
        yield starts, group


def _rows(
    block: np.ndarray, starts: tuple[int, ...], shape: tuple[int, ...]
) -> Iterator[tuple[int, np.ndarray]]:
    """The runs of a block that begins at an index of a tensor."""
    steps = np.cumprod([1, *shape[:0:-1]], dtype=np.int64)[::-1]
    cut = max((axis for axis, size in enumerate(block.shape) if size < shape[axis]), default=0)
    first = np.array(sum(start * step for start, step in zip(starts, steps, strict=False)))
    for size, step in zip(block.shape[:cut], steps, strict=False):
        first = first[..., None] + step * np.arange(size)
    yield from zip(first.ravel().tolist(), block.reshape(first.size, -1), strict=True)


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
    """The ranges of parts in order, neighbors as one."""
    ranges: list[list[int]] = []
    for start, stop, _ in sorted(parts):
        if ranges and ranges[-1][1] == start:
            ranges[-1][1] = stop
        else:
            ranges.append([start, stop])
    return ranges


def is_whole(shares: list[Share], nbytes: int) -> bool:
    """Whether the processes together wrote every entry of a tensor exactly once."""
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
