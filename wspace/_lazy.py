"""Leaves that are not in memory: computed when their entries are needed, piece by piece.

A lazy leaf stands for an array in a tree. A kernel that treats every entry by itself makes another
lazy leaf of it; one that reads a sum, a count or an order computes the entries, and forgets them.
So a function of trees that is made of such kernels runs on weights larger than memory, as it is.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike

PIECE = 2**20
"""Entries of a piece of a leaf: few enough for all that is computed of them to stay in caches."""

THREADS = max(2, min(os.cpu_count() or 2, 8))
"""Pieces that are computed at the same time."""


class Runs(NamedTuple):
    """Entries of a sample: as many from each of some flat indices on, as one flat array."""

    starts: tuple[int, ...]
    length: int


Span: TypeAlias = tuple[int, int] | Runs | None
"""The entries from a flat index up to another, as a flat array, or all in the leaf's shape."""

Memo: TypeAlias = dict[int, Array]
"""What was computed of one span, by the identity of the leaf."""


class Lazy:
    """An array by what computes its entries.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        in_pieces: Whether entries can be computed without all others of the leaf.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: DTypeLike,
        compute: Callable[[Span, Memo], Array],
        in_pieces: bool = True,
    ) -> None:
        """Takes what computes a span, with what was computed of it so far."""
        self.shape, self.dtype, self.in_pieces = tuple(shape), jnp.dtype(dtype), in_pieces
        self._compute = compute

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of entries."""
        return math.prod(self.shape)

    def entries(self, span: Span = None, memo: Memo | None = None) -> Array:
        """The entries of a span, each leaf that they depend on computed once."""
        memo = {} if memo is None else memo
        if id(self) not in memo:
            memo[id(self)] = self._compute(span, memo)
        return memo[id(self)]

    def astype(self, dtype: DTypeLike) -> "Lazy":
        """The same entries in another dtype."""
        if self.dtype == dtype:
            return self
        return _mapped(_cast, (self, jnp.dtype(dtype)), dtype, True)

    def __jax_array__(self) -> Array:
        return self.entries()


@functools.partial(jax.jit, static_argnums=1)
def _cast(x: Array, dtype: Any) -> Array:
    return x.astype(dtype)


def array(leaf: Any) -> Any:
    """The leaf as an array, if it is not lazy."""
    return leaf if isinstance(leaf, Lazy) else jnp.asarray(leaf)


def is_lazy(*values: object) -> bool:
    """Whether a leaf of the values is lazy."""
    return any(isinstance(leaf, Lazy) for leaf in jax.tree.leaves(values))


def entrywise(
    dtype: Callable[..., DTypeLike], *, in_pieces: bool = True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A kernel of arrays of one shape, other arguments aside, whose result has that shape.

    On lazy arrays it is put off. `dtype` takes the arguments and says the dtype of the result;
    with `in_pieces=False` an entry of it depends on all others of the leaf.
    """

    def decorated(kernel: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(kernel)
        def either(*args: Any) -> Any:
            if not is_lazy(args):
                return kernel(*args)
            return _mapped(kernel, args, dtype(*args), in_pieces)

        return either

    return decorated


def _mapped(kernel: Callable[..., Any], args: Any, dtype: DTypeLike, in_pieces: bool) -> Lazy:
    leaves, structure = jax.tree.flatten(args)
    first = next(leaf for leaf in leaves if isinstance(leaf, Lazy))
    leaves = [_alike(leaf, first.shape) for leaf in leaves]
    lazy = [leaf for leaf in leaves if isinstance(leaf, Lazy)]

    def compute(span: Span, memo: Memo) -> Array:
        given = [entries(leaf, span, memo) for leaf in leaves]
        return kernel(*structure.unflatten(given))

    return Lazy(first.shape, dtype, compute, in_pieces and all(x.in_pieces for x in lazy))


def _alike(leaf: Any, shape: Sequence[int]) -> Any:
    """A leaf of this shape as a lazy one; others, such as scalars, as they are."""
    if isinstance(leaf, Lazy) or not shape or getattr(leaf, "shape", None) != shape:
        return leaf

    def compute(span: Span, _: Memo) -> Array:
        return jnp.asarray(leaf if span is None else taken(leaf.reshape(-1), span))

    return Lazy(shape, leaf.dtype, compute)


def taken(flat: Any, span: tuple[int, int] | Runs) -> Any:
    """The entries of a span of a flat array."""
    if isinstance(span, Runs):
        return np.concatenate([flat[start : start + span.length] for start in span.starts])
    return flat[slice(*span)]


def start_of(span: Span) -> int:
    """The flat index of the first entry; of a sample, whose places do not count, 0."""
    return 0 if span is None or isinstance(span, Runs) else span[0]


def reading(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that computes the entries of lazy arrays among its arguments, a leaf at a time."""

    @functools.wraps(kernel)
    def either(*args: Any) -> Any:
        return kernel(*computed(args)) if is_lazy(args) else kernel(*args)

    return either


def computed(values: Any) -> Any:
    """The values with arrays in place of lazy leaves."""
    memo: Memo = {}
    return jax.tree.map(lambda x: entries(x, None, memo), values)


def threads() -> ThreadPoolExecutor:
    """Threads that compute in the precision that is enabled where they are asked for."""
    enabled = jax.config.read("jax_enable_x64")
    return ThreadPoolExecutor(THREADS, initializer=lambda: jax.enable_x64(enabled).__enter__())


def spans(*leaves: Any) -> list[Span]:
    """The spans to compute lazy leaves of one shape in; arrays have one, of all entries.

    Small leaves are flat too, so that all of one size share their programs.
    """
    lazy, size = [x for x in leaves if isinstance(x, Lazy)], leaves[0].size
    if not lazy or not all(leaf.in_pieces for leaf in lazy):
        return [None]
    return [(i, min(i + PIECE, size)) for i in range(0, max(size, 1), PIECE)]


def entries(leaf: Any, span: Span, memo: Memo | None = None) -> Any:
    """The entries of a span of a lazy leaf, or an array, which has no span but all."""
    return leaf.entries(span, memo) if isinstance(leaf, Lazy) else leaf


def parts(leaves: Sequence[Any]) -> Iterator[list[Any]]:
    """The entries of leaves of one shape: of arrays all at once, of lazy ones span by span."""
    if is_lazy(leaves):
        leaves = [_alike(leaf, leaf.shape) for leaf in leaves]
    for span in spans(*leaves):
        memo: Memo = {}
        yield [entries(leaf, span, memo) for leaf in leaves]
