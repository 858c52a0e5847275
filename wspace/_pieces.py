"""How the entries of leaves are computed: in memory by groups of leaves, of lazy ones in pieces.

A program takes ten to a hundred milliseconds to compile and some ten microseconds to start, the
entries of a small leaf less to compute. So small leaves in memory whose shapes are rare share one
program, and small lazy leaves are flat arrays of few lengths.
"""

import collections
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from wspace._lazy import Lazy, Piece, Span, computed, taken

_SMALL = 2**16
"""Entries of a leaf up to which starting its program takes as long as running it."""

_RARE = 8
"""Leaves of one shape from which on it has a program of its own."""

_TOGETHER = 128
"""The most leaves that share a program."""


def array(leaf: Any) -> Any:
    """The leaf as an array, if it is not lazy."""
    return leaf if isinstance(leaf, Lazy | jax.Array) else jnp.asarray(leaf)


def is_lazy(leaves: Sequence[Any]) -> bool:
    """Whether a leaf is lazy."""
    return any(isinstance(leaf, Lazy) for leaf in leaves)


def groups(columns: Sequence[Sequence[Any]]) -> list[list[int]]:
    """Indices of leaves that share a program; a column holds the leaves of one of several trees.

    Large leaves have one of their own, and so have those of a shape that occurs often, that are
    spread over devices, or that are traced. The others share programs, those on one device each,
    and lazy ones no program with those in memory.
    """
    first = columns[0]
    if len(first) == 1:
        return [[0]]
    shapes = [leaf.shape for leaf in first]
    often = {shape for shape, count in collections.Counter(shapes).items() if count >= _RARE}
    free = _are_free(columns)
    places = [None] * len(first) if free else map(_place, zip(*columns, strict=True))
    alone, rare = [], collections.defaultdict(list)
    for i, (shape, place) in enumerate(zip(shapes, places, strict=True)):
        if place is _OF_ITS_OWN or shape in often or math.prod(shape) > _SMALL:
            alone.append([i])
        else:
            rare[place].append(i)
    for indices in rare.values():
        alone.extend(indices[i : i + _TOGETHER] for i in range(0, len(indices), _TOGETHER))
    return alone


def _are_free(columns: Sequence[Sequence[Any]]) -> bool:
    """Whether all leaves are arrays that no device was chosen for, as is usual."""
    kinds = {kind for column in columns for kind in set(map(type, column))}
    if not all(issubclass(kind, jax.Array) and not issubclass(kind, Tracer) for kind in kinds):
        return False
    return not any(leaf.committed for column in columns for leaf in column)


_OF_ITS_OWN = object()


def _place(row: Sequence[Any]) -> Any:
    """Where the leaves of a row are: a device, `None` if that is free, in files, or elsewhere."""
    place = None
    for leaf in row:
        if isinstance(leaf, Tracer):
            return _OF_ITS_OWN
        if isinstance(leaf, Lazy):
            return Lazy
        if isinstance(leaf, jax.Array) and leaf.committed:
            devices = leaf.sharding.device_set
            if len(devices) > 1:
                return _OF_ITS_OWN
            (place,) = devices
    return place


def put_off(
    kernel: Callable[[Sequence[Any], Any], Any],
    row: Sequence[Any],
    in_pieces: bool,
    traced: Callable[[Sequence[Any], Any], Any] | None = None,
) -> Any:
    """Lazy results of a kernel, which takes leaves' entries and the flat index of the first.

    Their shapes and dtypes are what `traced` gives of the leaves', or tracing the kernel does.
    """
    shape = row[0].shape
    # To learn the dtypes; one shape, where any will do, is traced once for leaves of many.
    asked = (1,) if in_pieces else shape
    alike = [jax.ShapeDtypeStruct(asked, leaf.dtype) for leaf in row]
    traced = traced or functools.partial(jax.eval_shape, kernel)
    like = traced(alike, np.uint32(0))
    inputs = [leaf if isinstance(leaf, Lazy) else _in_memory(leaf) for leaf in row]

    def compute(span: Span, given: Sequence[Any]) -> Any:
        return kernel(given, np.uint32(span.start if isinstance(span, Piece) else 0))

    if not isinstance(like, list):
        return Lazy(shape, like.dtype, compute, inputs, in_pieces)
    several = Lazy(shape, like[0].dtype, compute, inputs, in_pieces)
    return [
        Lazy(shape, x.dtype, lambda _, given, i=i: given[0][i], [several], in_pieces)
        for i, x in enumerate(like)
    ]


def _in_memory(leaf: Any) -> Lazy:
    """A leaf that is in memory as a lazy one."""
    return Lazy(leaf.shape, leaf.dtype, lambda span, _: jnp.asarray(taken(leaf, span)))


def whole(leaves: Sequence[Any]) -> list[Any]:
    """Leaves of one shape as arrays."""
    if not is_lazy(leaves):
        return list(leaves)
    first, *others = _pieces(leaves)
    if first is None or others:
        return computed(leaves)
    size, shape = leaves[0].size, leaves[0].shape
    return [np.asarray(x)[:size].reshape(shape) for x in computed(leaves, first)]


def entries(leaves: Sequence[Any]) -> Iterator[list[Any]]:
    """The entries of leaves of one shape, some of them lazy, piece by piece."""
    for piece in _pieces(leaves):
        parts = computed(leaves, piece)
        yield parts if piece is None else [np.asarray(x)[: piece.stop - piece.start] for x in parts]


def _pieces(leaves: Sequence[Any]) -> list[Piece | None]:
    lazy = [leaf for leaf in leaves if isinstance(leaf, Lazy)]
    return min((leaf.pieces() for leaf in lazy), key=lambda spans: spans[0] is not None)
