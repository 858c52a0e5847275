"""Few programs for leaves of many shapes: kernels that take arrays padded to a few lengths.

To compile a kernel takes ten to a hundred milliseconds, to run it on a small leaf less than one. In
a tree of very many shapes leaves are therefore made flat, and as long as the next power of two.
"""

import contextvars
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np
from jax.core import Tracer

P = ParamSpec("P")
T = TypeVar("T")

MANY = 64
"""Distinct shapes beyond which a tree has its leaves padded."""

LEAST = 2**8
"""The shortest length."""

LEAST_ROWS = 2**4
"""The least numbers of rows and columns."""

LARGEST = 2**20
"""Entries beyond which a leaf has a program of its own, as copies of it would take as long."""

_many: contextvars.ContextVar[bool] = contextvars.ContextVar("many", default=False)


def few_programs(function: Callable[P, T]) -> Callable[P, T]:
    """The function, in which kernels pad what they take if its arguments have many shapes."""

    @functools.wraps(function)
    def either(*args: P.args, **kwargs: P.kwargs) -> T:
        if _many.get() or not _has_many_shapes(args, kwargs):
            return function(*args, **kwargs)
        token = _many.set(True)
        try:
            return function(*args, **kwargs)
        finally:
            _many.reset(token)

    return either


def _has_many_shapes(*values: Any) -> bool:
    leaves = jax.tree.leaves(values)
    return len(leaves) > MANY and len({getattr(leaf, "shape", ()) for leaf in leaves}) > MANY


@few_programs
def mapped(kernel: Callable[..., Any], *trees: Any) -> Any:
    """A kernel on every leaf of trees of one structure."""
    return jax.tree.map(kernel, *trees)


def entrywise(
    *, zeros: bool = False, rows: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A kernel of arrays of one shape, other arguments aside, whose result has that shape.

    No entry of it may depend on how many follow, or, with `rows`, on anything outside its row, the
    last axis: arrays are matrices then. They go on with their last entry, or with zeros, with
    `rows` or where `zeros` are needed, as for sums.
    """

    def decorated(kernel: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(kernel)
        def either(*args: Any) -> Any:
            one, given = _padded_arrays(args, zeros, rows)
            result = kernel(*given)
            if one is None:
                return result
            # Known arrays may be part of a program that is traced. On the host no cut is compiled,
            # nor the copy that `jnp.asarray` makes.
            traced = isinstance(result, Tracer)
            entries = result if traced else np.asarray(result)
            cut = entries[tuple(map(slice, _flat_shape(one, rows)))].reshape(one.shape)
            device = one.sharding if getattr(one, "committed", False) else None
            return cut if traced else jax.device_put(cut, device)

        return either

    return decorated


def reading(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel of arrays of one shape, other arguments aside, whose result zeros do not change."""

    @functools.wraps(kernel)
    def either(*args: Any) -> Any:
        return kernel(*_padded_arrays(args)[1])

    return either


def lengthened(leaf: Any) -> Any:
    """The leaf, with zeros behind it if that is to be done."""
    return _padded_arrays(leaf)[1]


def many() -> bool:
    """Whether kernels pad what they take."""
    return _many.get()


def _padded_arrays(args: Any, zeros: bool = True, rows: bool = False) -> tuple[Any, Any]:
    """One of the arrays that are padded, if any, and the arguments with them."""
    if not _many.get():
        return None, args
    leaves, structure = jax.tree.flatten(args)
    arrays = [leaf for leaf in leaves if _has_entries(leaf)]
    traced = any(isinstance(leaf, Tracer) for leaf in leaves)
    if traced or not arrays or not all(map(_is_small, arrays)):
        return None, args
    one = arrays[0]

    def padded(leaf: Any) -> Any:
        alike = _has_entries(leaf) and leaf.shape == one.shape
        return _padded(leaf, zeros, rows) if alike else leaf

    return one, structure.unflatten(map(padded, leaves))


def _has_entries(leaf: Any) -> bool:
    """Whether it is an array of weights, or a mask of such, and no key or number."""
    is_array = isinstance(leaf, np.ndarray | jax.Array)
    return is_array and leaf.ndim > 0 and leaf.dtype.kind in "fVb"  # V: bfloat16


def _is_small(leaf: Any) -> bool:
    on_one_device = isinstance(leaf, np.ndarray) or len(leaf.sharding.device_set) == 1
    return on_one_device and 0 < leaf.size <= LARGEST


def _flat_shape(leaf: Any, rows: bool) -> tuple[int, ...]:
    return (leaf.size // leaf.shape[-1], leaf.shape[-1]) if rows else (leaf.size,)


def _padded(leaf: Any, zeros: bool, rows: bool) -> np.ndarray:
    shape = _flat_shape(leaf, rows)
    least = (LEAST_ROWS, LEAST_ROWS) if rows else (LEAST,)
    longer = [
        n if n == 1 else max(start, 1 << (n - 1).bit_length())
        for start, n in zip(least, shape, strict=True)
    ]
    flat = np.asarray(leaf).reshape(shape)
    result = np.full(longer, 0 if zeros or rows else flat[-1], flat.dtype)
    result[tuple(map(slice, shape))] = flat
    return result
