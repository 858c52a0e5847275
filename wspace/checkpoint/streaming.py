"""Functions of trees on checkpoints: tensor by tensor, in the memory of a few tensors."""

import difflib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from wspace import _checks
from wspace.checkpoint.stored import Checkpoint, Stored
from wspace.checkpoint.writer import Writer

__all__ = ["stream"]

CHUNK = 2**22
"""Elements of a piece of a tensor, all of which are compiled for once."""

WAITING = 4
"""Pieces that may be computed ahead of those written."""


class _Piece(NamedTuple):
    """A range of elements of a tensor, computed from a start that may lie before it."""

    name: str
    start: int
    stop: int
    whole: bool


def stream(
    function: Callable[[list[dict[str, Array]]], dict[str, Array]],
    sources: Sequence[Checkpoint],
    writer: Writer,
    *,
    entrywise: bool = False,
    advance: Callable[[int], None] | None = None,
) -> None:
    r"""Writes what a function of trees makes of checkpoints, one tensor after another.

    $$
    \theta_\ell = f(\theta_{1\ell}, \dots, \theta_{k\ell})_\ell
    $$

    The function is called with trees of one leaf, under its own name, so that the result is, bit
    for bit, that of the function on whole trees if it treats every leaf by itself. Tensors are
    read as they are needed and written on threads while the next ones are computed; no more than
    a few are in memory at once. Those that the writer has from before an interruption are skipped.

    Tensors that are no weights, of integers or booleans, are those of the first source; in the
    others they must be the same.

    Args:
        function: Takes a list of one tree a source and returns a tree, such as
            `lambda points: average.mean(points, (0.7, 0.3))`.
        sources: Open checkpoints with tensors of the same names and shapes, at least one.
        writer: Where the result goes; it has the names, shapes and dtypes of the first source.
        entrywise: Whether an entry of the result depends only on the entries at its place, as in
            linear combinations. Large tensors are then taken in pieces, as flat arrays of one
            length, so that memory does not grow with them.
        advance: Called with the number of bytes that were written, from several threads.

    Raises:
        ValueError: If the sources differ in names or shapes, or in a tensor that is no weight; or
            as the function does.
        TypeError: If a tensor is of a dtype in which nothing is computed, such as float8.

    Examples:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> from wspace import average, checkpoint
        >>> with tempfile.TemporaryDirectory() as name:
        ...     folder = pathlib.Path(name)
        ...     checkpoint.save(folder / "a.safetensors", {"w": jnp.array([1.0, 2.0])})
        ...     checkpoint.save(folder / "c.safetensors", {"w": jnp.array([3.0, 4.0])})
        ...     a, c = (checkpoint.open(folder / f"{x}.safetensors") for x in "ac")
        ...     with checkpoint.create(folder / "b.safetensors", a) as writer:
        ...         checkpoint.stream(average.mean, [a, c], writer)
        ...     checkpoint.load(folder / "b.safetensors")
        {'w': Array([2., 3.], dtype=float32)}
    """
    sources = _checks.listed("sources", sources)
    alike(sources)
    first = sources[0]
    finished = writer.finished
    waiting: deque[Future[None]] = deque()

    def put(piece: _Piece, array: Any) -> None:
        # Here, not where it is called, the computation is waited for.
        array = np.asarray(array)
        if piece.whole:
            writer.write(piece.name, array)
        else:
            array = array[len(array) - (piece.stop - piece.start) :]
            writer.write_part(piece.name, piece.start, array)
        if advance is not None:
            advance(array.nbytes)

    with ThreadPoolExecutor(2) as pool:
        try:
            for piece in _pieces(first, finished, entrywise):
                waiting.append(pool.submit(put, piece, _computed(function, sources, piece)))
                if len(waiting) > WAITING:
                    waiting.popleft().result()
            while waiting:
                waiting.popleft().result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _pieces(source: Checkpoint, finished: frozenset[str], entrywise: bool) -> Iterator[_Piece]:
    for name, tensor in source.items():
        if name in finished:
            continue
        if not entrywise or tensor.size <= CHUNK or not _is_weight(tensor):
            yield _Piece(name, 0, tensor.size, True)
            continue
        for start in range(0, tensor.size, CHUNK):
            yield _Piece(name, start, min(start + CHUNK, tensor.size), False)


def _computed(function: Any, sources: Sequence[Checkpoint], piece: _Piece) -> Any:
    name = piece.name
    if not _is_weight(sources[0][name]):
        return sources[0][name].read()
    if piece.whole:
        arrays = [source[name].read() for source in sources]
    else:
        # The last piece reaches back, so that all have one length.
        start = piece.stop - min(CHUNK, piece.stop)
        arrays = [source[name].rows(start, piece.stop) for source in sources]
    try:
        return function([{name: jax.device_put(array)} for array in arrays])[name]
    except (TypeError, ValueError) as error:
        error.add_note(f"at tensor {name!r}")
        raise


def _is_weight(tensor: Stored) -> bool:
    return tensor.dtype in _checks.WEIGHT_DTYPES


def alike(sources: Sequence[Checkpoint]) -> None:
    """Raises unless checkpoints have the same names and shapes, and others than weights agree."""
    first, *rest = sources
    for tensor in first.values():
        if not _is_weight(tensor) and tensor.dtype.kind not in "iub":
            raise TypeError(
                f"tensor {tensor.name!r} of {first.path} is {tensor.dtype}, in which nothing is "
                "computed: convert it to bfloat16 or float32 where the file is written"
            )
    for source in rest:
        _same_names(first, source)
        for name, tensor in first.items():
            other = source[name]
            if other.shape != tensor.shape:
                raise ValueError(
                    f"tensor {name!r} has shape {tensor.shape} in {first.path} and {other.shape} "
                    f"in {source.path}: both must be points of one weight space"
                )
            if _is_weight(tensor) != _is_weight(other):
                raise ValueError(
                    f"tensor {name!r} is {tensor.dtype} in {first.path} and {other.dtype} in "
                    f"{source.path}: only weights are merged"
                )
            if not _is_weight(tensor) and not np.array_equal(tensor.read(), other.read()):
                raise ValueError(
                    f"tensor {name!r} is of {tensor.dtype}, so it is carried over, but differs "
                    f"between {first.path} and {source.path}: make them agree"
                )


def _same_names(first: Checkpoint, other: Checkpoint) -> None:
    for one, two in ((first, other), (other, first)):
        for name in one:
            if name not in two:
                near = difflib.get_close_matches(name, list(two), 1)
                hint = f"; the nearest name there is {near[0]!r}" if near else ""
                raise ValueError(f"{one.path} has a tensor {name!r} that {two.path} lacks{hint}")
