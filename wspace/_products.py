"""Sums of products of entries: all that a mean or an arc needs to know of its points."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wspace import _lazy, _padding
from wspace._numerics import accumulator
from wspace.typing import WeightsLike

# XLA adds the entries of a row one after another if it adds several rows in one pass, so rows are
# cut into pieces, few enough entries for a float32 sum to keep its digits.
LONGEST = 64


@jax.custom_jvp
def row_sums(products: Sequence[Array]) -> list[Array]:
    """The sums over the last axis of several arrays of one shape, in one pass over them."""
    first = products[0]
    if not first.ndim:
        return list(products)
    *rows, length = first.shape
    spec = jax.typeof(first).sharding.spec
    spread = len(spec) == first.ndim and spec[-1] is not None
    piece = max(size for size in range(1, LONGEST + 1) if length % size == 0)
    if spread or piece < min(length, LONGEST // 8):
        return [jnp.sum(x, axis=-1) for x in products]
    zero = jnp.zeros((), first.dtype)
    sums = jax.lax.reduce(
        tuple(x.reshape(*rows, length // piece, piece) for x in products),
        (zero,) * len(products),
        lambda x, y: tuple(a + b for a, b in zip(x, y, strict=True)),
        (first.ndim,),
    )
    return [jnp.sum(x, axis=-1) for x in sums]


@row_sums.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (products,), (rates,) = primals, tangents
    return row_sums(products), [jnp.sum(x, axis=-1) if x.ndim else x for x in rates]


@_lazy.reading
@functools.partial(jax.jit, static_argnums=(0, 2))
def leaf_row_sums(
    formula: Callable[[Sequence[Array]], Sequence[Array]], leaves: Sequence[Array], wide: type
) -> list[Array]:
    """The sums over every row of a leaf of what the formula makes of the entries of points."""
    return row_sums(formula([leaf.astype(wide) for leaf in leaves]))


@_lazy.reading
@_padding.reading
@functools.partial(jax.jit, static_argnums=(0, 2))
def _leaf_sums(
    formula: Callable[[Sequence[Array]], Sequence[Array]], leaves: Sequence[Array], wide: type
) -> Array:
    return jnp.stack([jnp.sum(x) for x in leaf_row_sums(formula, leaves, wide)])


@_padding.few_programs
def sums(
    formula: Callable[[Sequence[Array]], Sequence[Array]], trees: Sequence[WeightsLike]
) -> Float[Array, " p"]:
    """The sums over all entries of trees of one layout, every leaf read in one pass.

    The formula must be zero for zeros, and be defined once: each new one compiles anew.
    """
    rows = [jax.tree.leaves(x) for x in trees]
    wide = accumulator(*(leaf.dtype for leaves in rows for leaf in leaves))
    parts = [_leaf_sums(formula, xs, wide) for xs in zip(*rows, strict=True) if xs[0].size]
    if not parts:
        return jnp.zeros(len(formula([jnp.zeros(0, wide)] * len(trees))), wide)
    return jax.tree.reduce_associative(jnp.add, parts)


@functools.partial(jax.jit, static_argnums=1)
def symmetric(upper: Sequence[Array] | Array, count: int) -> Array:
    """The symmetric matrices `(count, count, ...)` with given rows of their upper triangles."""
    places = iter(range(len(upper)))
    place = {(i, j): next(places) for i in range(count) for j in range(i, count)}
    return jnp.stack(
        [
            jnp.stack([upper[place[min(i, j), max(i, j)]] for j in range(count)])
            for i in range(count)
        ]
    )


def pairs(arrays: Sequence[Array]) -> list[Array]:
    """The products of all pairs, those of an array with itself included, as in `symmetric`."""
    return [x * y for i, x in enumerate(arrays) for y in arrays[i:]]


def pairs_from_first(arrays: Sequence[Array]) -> list[Array]:
    """The products of all pairs of differences from the first array."""
    first, *others = arrays
    return pairs([x - first for x in others])


def squared_gaps(arrays: Sequence[Array]) -> list[Array]:
    """The squared differences of all pairs, zeros included, as in `symmetric`."""
    return [(x - y) ** 2 for i, x in enumerate(arrays) for y in arrays[i:]]
