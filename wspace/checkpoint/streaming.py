"""Functions of trees on checkpoints: tensor by tensor, in the memory of a few tensors."""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np

from wspace import _checks
from wspace._lazy import THREADS, Lazy, NotInMemory, Piece, Runs, Span, lengthened
from wspace._records import record
from wspace.checkpoint.chosen import Chosen, chosen
from wspace.checkpoint.header import shown
from wspace.checkpoint.hosts import share
from wspace.checkpoint.stored import Checkpoint, Stored
from wspace.checkpoint.trees import refuse_dtype
from wspace.checkpoint.writer import Writer

__all__ = ["Nonfinite", "stream"]

ALIGNMENT = 64
"""Bytes that the address of an array must be a multiple of for JAX to use it on a processor."""

WAITING = 4
"""Tensors that may be computed ahead of those written."""

_PART = 2**20
"""Entries that are counted at once of what was written before."""


@record
class Nonfinite(NamedTuple):
    """How many entries of a tensor were written that are infinite or NaN.

    Attributes:
        made: Those that are finite in all sources: of an overflow, or where nothing is defined.
        given: Those that are infinite or NaN in a source, too.

    Examples:
        >>> from wspace import checkpoint
        >>> checkpoint.Nonfinite(made=4, given=0)
        Nonfinite(made=4, given=0)
    """

    made: int
    given: int


def stream(
    function: Callable[[list[dict[str, Any]]], dict[str, Any]],
    sources: Sequence[Checkpoint],
    writer: Writer,
    *,
    lazy: bool = False,
    carry: Sequence[str] = (),
    skip: Sequence[str] = (),
    common_tensors: bool = False,
    allow_nonfinite: bool = False,
    advance: Callable[[int], None] | None = None,
    look: Callable[[int], None] | None = None,
) -> dict[str, Nonfinite]:
    r"""Writes what a function of trees makes of checkpoints, in the memory of a few tensors.

    $$
    \theta = f(\theta_1, \dots, \theta_k)
    $$

    The result is, bit for bit, what the function gives in memory. It is called in one of two ways.

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
    of integers, booleans or complex numbers, are taken from the first source; in the others they
    must be the same, unless each has one integer, as counters of steps do. `carry`, `skip` and
    `common_tensors` say what becomes of others.

    An output in which entries are infinite or NaN, though they are finite in all sources, is
    refused when all is written and before it is put in place.

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
        carry: Names or globs, such as `"*.running_var"`, of tensors that are taken from the first
            source, whatever the others have; the function does not get them.
        skip: Names or globs of tensors that are left out everywhere. The layout of the writer
            lacks them, too, as [`Checkpoint.without`][wspace.checkpoint.Checkpoint.without] does.
        common_tensors: Whether tensors that not all sources have are let pass: what the first has
            is carried over.
        allow_nonfinite: Whether an output is let pass in which entries are infinite or NaN that
            are finite in all sources.
        advance: Called with the number of bytes that were written, from several threads.
        look: So called with the number that were read, with `lazy`; sums and counts read before
            anything is written.

    Returns:
        For each tensor with entries that are infinite or NaN, by name, how many, in a `Nonfinite`.

    Raises:
        ValueError: If the sources differ in names or shapes, or in a tensor that is no weight; if
            a tensor is a factor of an adapter; if entries of the result are infinite or NaN that
            are finite in all sources; if a tensor is float64 while JAX has 64-bit values disabled;
            or as the function does.
        TypeError: If a tensor is of a dtype in which nothing is computed, such as float8, or holds
            the codes of quantized weights; with `lazy`, also if the function is no such function.

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
        ...         nonfinite = checkpoint.stream(average.mean, [a, c], writer, lazy=True)
        ...     checkpoint.load(folder / "b.safetensors"), nonfinite
        ({'w': Array([2., 3.], dtype=float32)}, {})
    """
    points = chosen(sources, carry=carry, skip=skip, common_tensors=common_tensors)
    for tensor in (x for i in range(len(points.sources)) for x in points.of_weights(i)):
        refuse_dtype(f"tensor {shown(tensor.name)} of {tensor.file}", tensor.dtype)
    found = streamed(function, points, writer, lazy=lazy, advance=advance, look=look)
    if not allow_nonfinite:
        refuse_nonfinite(found)
    return found


def streamed(
    function: Callable[[list[dict[str, Any]]], dict[str, Any]],
    points: Chosen,
    writer: Writer,
    *,
    lazy: bool,
    like: int = 0,
    whole: Mapping[str, Stored] | None = None,
    advance: Callable[[int], None] | None = None,
    look: Callable[[int], None] | None = None,
) -> dict[str, Nonfinite]:
    """As `stream`, for the output that is like one of the sources.

    With `whole`, that source before some tensors were cut to their first rows, the other rows are
    carried over.
    """
    before = writer.finished
    counts = _Counts(points, like)
    waiting: deque[Future[None]] = deque()

    def put(name: str, start: int, span: Piece | None, leaf: Any) -> None:
        # Here, not where it is called, the computation is waited for.
        array = leaf.read(span) if isinstance(leaf, Lazy) else np.asarray(leaf)
        array, start = array.reshape(-1), start + (span.start if span else 0)
        counts.add(name, start, array)
        writer.write_part(name, start, array)
        if advance is not None:
            advance(array.nbytes)

    with Lazy.threads() as pool:
        try:
            trees = [_lazily(points, i, look) for i in range(len(points.sources))] if lazy else None
            for name, start, leaf in _results(function, points, like, whole, before, trees):
                for span in leaf.pieces() if isinstance(leaf, Lazy) else [None]:
                    waiting.append(pool.submit(put, name, start, span, leaf))
                    if len(waiting) > (2 * THREADS if lazy else WAITING):
                        waiting.popleft().result()
            while waiting:
                waiting.popleft().result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for name in before:
        counts.add_written(name, writer)
    return counts.found()


def refuse_nonfinite(found: Mapping[str, Nonfinite]) -> None:
    """Raises if entries were made that are infinite or NaN."""
    made = {name: counts.made for name, counts in found.items() if counts.made}
    if made:
        worst = sorted(made, key=lambda name: -made[name])
        listed = ", ".join(f"{made[name]} of {shown(name)}" for name in worst[:8])
        raise ValueError(
            f"entries of the result are infinite or NaN that are finite in all models, {listed}"
            f"{', ...' if len(made) > 8 else ''}, so nothing is put in place: "
            "they are out of the range of the dtype, as beyond 65504 in float16, or not defined "
            "there; give a model of a wider dtype first or other numbers, or write them by "
            "--allow-nonfinite (allow_nonfinite=True in Python)"
        )


class _Counts:
    """Counts what is infinite or NaN in what is written, from several threads."""

    def __init__(self, points: Chosen, like: int) -> None:
        self._combined, self._own = frozenset(points.combined), points.sources[like]
        self._sources = points.sources
        self._lock = threading.Lock()
        self._found: dict[str, Nonfinite] = {}

    def add(self, name: str, start: int, array: np.ndarray) -> None:
        """Counts entries of a tensor from a flat index on."""
        if array.dtype not in _checks.WEIGHT_DTYPES or not (bad := _nonfinite(array)).any():
            return
        is_computed = name in self._combined and start < self._own[name].size
        places = np.flatnonzero(bad)
        given = np.full(len(places), not is_computed)
        for source in self._sources if is_computed else ():
            given |= _nonfinite(source[name].rows(start, start + array.size)[places])
        with self._lock:
            made, kept = self._found.get(name, (0, 0))
            self._found[name] = Nonfinite(made + int((~given).sum()), kept + int(given.sum()))

    def add_written(self, name: str, writer: Writer) -> None:
        """Counts entries of a tensor that was written before an interruption."""
        array = writer._written(name)
        end = self._own[name].size if name in self._combined else 0
        edges = sorted({*range(0, array.size, _PART), array.size, min(end, array.size)})
        for start, stop in itertools.pairwise(edges):
            self.add(name, start, array[start:stop])

    def found(self) -> dict[str, Nonfinite]:
        """The counts by name, in the order of the files."""
        order = [*self._own, *self._found]
        return {name: self._found[name] for name in dict.fromkeys(order) if name in self._found}


def _nonfinite(array: np.ndarray) -> np.ndarray:
    """Which entries are infinite or NaN, by their exponents: of bfloat16, too, without a copy."""
    bits: Any = f"u{array.dtype.itemsize}"
    top: Any = np.asarray(np.inf, array.dtype).view(bits)
    return (np.ascontiguousarray(array).view(bits) & top) == top


def _results(
    function: Callable[..., Any],
    points: Chosen,
    like: int,
    whole: Mapping[str, Stored] | None,
    finished: frozenset[str],
    trees: list[dict[str, Any]] | None,
) -> Iterator[tuple[str, int, Any]]:
    """The tensors of the result by name, or parts from a flat index on, but for the finished."""
    sources, combined = points.sources, frozenset(points.combined)
    left = [x for x in list(sources[like].values())[share()] if x.name not in finished]
    computed: dict[str, Any] = {}
    if trees is not None and any(tensor.name in combined for tensor in left):
        try:
            computed = function(trees)
        except NotInMemory as error:
            raise TypeError(str(error)) from error
    for tensor in left:
        name = tensor.name
        if name not in combined:
            yield name, 0, tensor.read()
        elif trees is not None:
            yield name, 0, _shaped(computed.pop(name), tensor)
        else:
            arrays = [{name: jax.device_put(_for_jax(source[name].read()))} for source in sources]
            try:
                leaf = function(arrays)[name]
            except (TypeError, ValueError) as error:
                error.add_note(f"at tensor {shown(name)}")
                raise
            yield name, 0, _shaped(leaf, tensor)
        if whole is not None and whole[name].size > tensor.size:
            yield name, tensor.size, whole[name].rows(tensor.size, whole[name].size)


def _shaped(leaf: Any, tensor: Stored) -> Any:
    """A leaf of a result, if it has the shape of the tensor."""
    if leaf.shape != tensor.shape:
        raise ValueError(
            f"the function returned shape {leaf.shape} for tensor {shown(tensor.name)}, which has "
            f"shape {tensor.shape}: return an array of its shape"
        )
    return leaf


def _lazily(points: Chosen, index: int, look: Callable[[int], None] | None) -> dict[str, Any]:
    return {tensor.name: _leaf(tensor, look) for tensor in points.of_weights(index)}


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
