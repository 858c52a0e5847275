"""Leaves that are no arrays: what stands in a tree for entries that are not in memory."""

import collections
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike

_LARGEST = 2**20
"""Entries of a piece of a lazy leaf: few enough for all that is made of them to stay in caches."""

_LEAST = 2**8
"""The shortest length of a piece."""

THREADS = max(2, min(os.cpu_count() or 2, 8))
"""Pieces that are computed at the same time."""


class Piece(NamedTuple):
    """Entries of a leaf from a flat index up to another, as a flat array of some length.

    Behind them the array goes on with the last one, so that pieces of many sizes are arrays of few
    lengths, for which few programs are compiled.
    """

    start: int
    stop: int
    length: int


class Runs(NamedTuple):
    """A sample: the same number of entries from each of some flat indices on, as one array."""

    starts: tuple[int, ...]
    length: int


Span: TypeAlias = Piece | Runs | None
"""Some entries of a leaf as a flat array, or all in the leaf's shape."""


class NotInMemory(ValueError):
    """Raised where a whole array is asked of a lazy leaf; no TypeError, which JAX would reword."""


class Lazy:
    """An array by what computes its entries, such as a tensor in a file.

    Functions of trees put off what treats every entry by itself, and read what they need where they
    measure; the others refuse it.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        inputs: The lazy leaves that it is computed from.
        compute: Takes a span and the entries that `inputs` have there; returns its own.
        in_pieces: Whether entries can be computed without all others of the leaf.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: DTypeLike,
        compute: Callable[[Span, Sequence[Any]], Any],
        inputs: Sequence["Lazy"] = (),
        in_pieces: bool = True,
    ) -> None:
        """Takes the attributes; an input that is not in pieces makes this one whole, too."""
        self.shape, self.dtype, self.compute = tuple(shape), jnp.dtype(dtype), compute
        self.inputs = tuple(inputs)
        self.in_pieces = in_pieces and all(x.in_pieces for x in inputs)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    def pieces(self) -> list[Piece | None]:
        """The spans in which it is computed; `None` for all at once."""
        if not self.size or not self.in_pieces:
            return [None]
        starts = range(0, self.size, _LARGEST)
        stops = [min(start + _LARGEST, self.size) for start in starts]
        return [
            Piece(start, stop, max(_LEAST, 1 << (stop - start - 1).bit_length()))
            for start, stop in zip(starts, stops, strict=True)
        ]

    def read(self, span: Span = None) -> np.ndarray:
        """The entries of a span, without what makes a piece longer."""
        (entries,) = computed([self], span)
        entries = np.asarray(entries)
        return entries[: span.stop - span.start] if isinstance(span, Piece) else entries

    def sample(self, starts: Sequence[int], length: int) -> np.ndarray:
        """`length` entries from each flat index in `starts` on, as one flat array."""
        return self.read(Runs(tuple(starts), length))

    @staticmethod
    def threads() -> ThreadPoolExecutor:
        """Threads that compute in the precision that is enabled where they are asked for."""
        enabled = jax.config.read("jax_enable_x64")
        return ThreadPoolExecutor(THREADS, initializer=lambda: jax.enable_x64(enabled).__enter__())

    @property
    def __jax_array__(self) -> Callable[[], Array]:
        # JAX asks for this attribute wherever a computation needs the whole array.
        raise NotInMemory(
            f"a lazy leaf of shape {self.shape} is not in memory, and this function takes whole "
            "arrays: give it the weights by checkpoint.load, or stream tensor by tensor, "
            "lazy=False"
        )

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.__jax_array__


def taken(leaf: Any, span: Span) -> Any:
    """The entries of a span of an array."""
    if span is None:
        return leaf
    flat = leaf.reshape(-1)
    if isinstance(span, Runs):
        return np.concatenate([flat[start : start + span.length] for start in span.starts])
    return lengthened(flat[span.start : span.stop], span)


def lengthened(entries: Any, piece: Piece) -> Any:
    """Flat entries of a piece, going on with the last one up to its length."""
    missing = piece.length - len(entries)
    return np.pad(np.asarray(entries), (0, missing), mode="edge") if missing else entries


def computed(leaves: Sequence[Any], span: Span = None) -> list[Any]:
    """The entries of a span of leaves, each lazy leaf that they depend on computed once."""
    order = _inputs_first(leaves)
    uses = collections.Counter(x for leaf in order for x in leaf.inputs)
    uses.update(leaf for leaf in leaves if isinstance(leaf, Lazy))
    found: dict[Lazy, Any] = {}

    def take(leaf: Lazy) -> Any:
        uses[leaf] -= 1
        return found[leaf] if uses[leaf] else found.pop(leaf)

    for leaf in order:
        found[leaf] = leaf.compute(span, [take(x) for x in leaf.inputs])
    return [take(leaf) if isinstance(leaf, Lazy) else taken(leaf, span) for leaf in leaves]


def _inputs_first(leaves: Sequence[Any]) -> list[Lazy]:
    """Lazy leaves and their inputs, every input before the leaves that need it."""
    order: dict[Lazy, None] = {}
    stack = [(leaf, False) for leaf in reversed(leaves) if isinstance(leaf, Lazy)]
    while stack:
        leaf, ready = stack.pop()
        if leaf in order:
            continue
        if ready:
            order[leaf] = None
        else:
            stack.append((leaf, True))
            stack.extend((x, False) for x in reversed(leaf.inputs))
    return list(order)
