"""Functions of trees on checkpoints: tensor by tensor, in the memory of a few tensors."""

import difflib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from wspace import _checks
from wspace._lazy import THREADS, Lazy, NotInMemory, Piece, Runs, Span, lengthened
from wspace.checkpoint.hosts import share
from wspace.checkpoint.stored import Checkpoint, Stored
from wspace.checkpoint.writer import Writer

__all__ = ["stream"]

ALIGNMENT = 64
"""Bytes that the address of an array must be a multiple of for JAX to use it on a processor."""

WAITING = 4
"""Tensors that may be computed ahead of those written."""


def stream(
    function: Callable[[list[dict[str, Any]]], dict[str, Any]],
    sources: Sequence[Checkpoint],
    writer: Writer,
    *,
    lazy: bool = False,
    advance: Callable[[int], None] | None = None,
    look: Callable[[int], None] | None = None,
) -> None:
    r"""Writes what a function of trees makes of checkpoints, in the memory of a few tensors.

    $$
    \theta = f(\theta_1, \dots, \theta_k)
    $$

    The result is, bit for bit, that of the function in memory. It is called in one of two ways.

    For every tensor alone, as a tree of one leaf under its own name: right for any function that
    treats each leaf by itself.

    With `lazy=True` once, with whole trees whose leaves are read from the files when their entries
    are needed, and are in no memory before and after. What the function returns is then computed
    and written in pieces, so that not even one large tensor need fit. The functions of the command
    line can be called so, but for those that it calls tensor by tensor; one of your own if it is
    made of them and of `tree.elementwise`, `tree.combine`, `tree.vdot` and `tree.norm`. Sums read a
    whole tensor at a time, and every sum and every count is one more reading of the files.

    Tensors are read as they are needed and written on threads while the next ones are computed.
    Those that the writer has from before an interruption are skipped. Tensors that are no weights,
    of integers or booleans, are those of the first source; in the others they must be the same.

    In a run of several processes, by `jax.distributed`, all of them call this, and each computes
    and writes its share of the tensors. Sums are computed by each, so the result does not depend
    on how many there are.

    Args:
        function: Takes a list of one tree a source and returns a tree, such as
            `lambda points: average.mean(points, (0.7, 0.3))`.
        sources: Open checkpoints with tensors of the same names and shapes, at least one.
        writer: Where the result goes; it has the names and dtypes of the first source, and its
            shapes, or more rows, which are left to be written.
        lazy: Whether the function is called once with whole trees.
        advance: Called with the number of bytes that were written, from several threads.
        look: So called with the number that were read, with `lazy`; sums and counts read before
            anything is written.

    Raises:
        ValueError: If the sources differ in names or shapes, or in a tensor that is no weight; or
            as the function does.
        TypeError: If a tensor is of a dtype in which nothing is computed, such as float8; with
            `lazy`, also if the function is no such function.

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
        ...         checkpoint.stream(average.mean, [a, c], writer, lazy=True)
        ...     checkpoint.load(folder / "b.safetensors")
        {'w': Array([2., 3.], dtype=float32)}
    """
    sources = _checks.listed("sources", sources)
    alike(sources)
    waiting: deque[Future[None]] = deque()

    def put(name: str, span: Piece | None, leaf: Any) -> None:
        # Here, not where it is called, the computation is waited for.
        array = leaf.read(span) if isinstance(leaf, Lazy) else np.asarray(leaf)
        writer.write_part(name, span.start if span else 0, array.reshape(-1))
        if advance is not None:
            advance(array.nbytes)

    with Lazy.threads() as pool:
        try:
            trees = [_lazily(source, look) for source in sources] if lazy else None
            for name, leaf in _results(function, sources, writer.finished, trees):
                if leaf.shape != sources[0][name].shape:
                    raise ValueError(
                        f"the function returned shape {leaf.shape} for tensor {name!r}, which has "
                        f"shape {sources[0][name].shape}: return an array of its shape"
                    )
                for span in leaf.pieces() if isinstance(leaf, Lazy) else [None]:
                    waiting.append(pool.submit(put, name, span, leaf))
                    if len(waiting) > (2 * THREADS if lazy else WAITING):
                        waiting.popleft().result()
            while waiting:
                waiting.popleft().result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _results(
    function: Callable[..., Any],
    sources: Sequence[Checkpoint],
    finished: frozenset[str],
    trees: list[dict[str, Any]] | None,
) -> Iterator[tuple[str, Any]]:
    """The tensors of the result by name, but for those that are finished."""
    own = list(sources[0].values())[share()]
    left = [tensor for tensor in own if tensor.name not in finished]
    weights = [tensor.name for tensor in left if _is_weight(tensor)]
    whole: dict[str, Any] = {}
    if trees is not None and weights:
        try:
            whole = function(trees)
        except NotInMemory as error:
            raise TypeError(str(error)) from error
    for tensor in left:
        name = tensor.name
        if not _is_weight(tensor):
            yield name, tensor.read()
        elif trees is not None:
            yield name, whole.pop(name)
        else:
            arrays = [{name: jax.device_put(_for_jax(source[name].read()))} for source in sources]
            try:
                yield name, function(arrays)[name]
            except (TypeError, ValueError) as error:
                error.add_note(f"at tensor {name!r}")
                raise


def _lazily(source: Checkpoint, look: Callable[[int], None] | None) -> dict[str, Any]:
    return {name: _leaf(tensor, look) for name, tensor in source.items() if _is_weight(tensor)}


def _leaf(tensor: Stored, look: Callable[[int], None] | None) -> Lazy:
    def read(span: Span, _: Any) -> jax.Array:
        if span is None:
            array = tensor.read()
        elif isinstance(span, Runs):
            rows = (tensor.rows(start, start + span.length) for start in span.starts)
            array = np.concatenate(list(rows))
        else:
            array = tensor.rows(span.start, span.stop)
        if look is not None:
            look(array.nbytes)
        if isinstance(span, Piece):
            array = lengthened(array, span)
        return jax.device_put(_for_jax(array))

    return Lazy(tensor.shape, tensor.dtype, read)


def _for_jax(array: np.ndarray) -> np.ndarray:
    """The array where JAX can use it as it is; its own copying takes several times as long."""
    start = -array.ctypes.data % ALIGNMENT
    if not start:
        return array
    room = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    np.copyto(copy, array)
    return copy


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
