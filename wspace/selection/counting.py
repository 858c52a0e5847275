"""Passes over the entries of arrays that count how many reach some pivots, where they lie."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt

from wspace import _checks
from wspace._numerics import Wide, accumulator
from wspace.selection import bracket
from wspace.selection.bracket import PIVOTS, Count
from wspace.selection.keys import Keys, code, codes_of, first_place

SAMPLE = 2**14  # entries whose quantiles are the first pivots


def wide_of(leaves: Sequence[Array]) -> Wide:
    """The dtype of arithmetic on leaves, or the dtype whose codes the leaves hold."""
    double = [jnp.float64 if x.dtype == np.uint64 else x.dtype for x in leaves]
    return accumulator(*double)


def last_by_counting(
    leaves: Sequence[Array], sizes: Sequence[int], need: Count, exact: bool
) -> Keys:
    """The last entry selected, or if `exact` its magnitude and anything as its place.

    Leaves may be codes, longer than their sizes by zeros. First its code is searched for; then, of
    the entries that have it, as many are needed as those above leave to be selected.
    """
    codes = codes_of(wide_of(leaves))
    pivots, total = _quantiles(leaves, need), bracket.count_of(sum(sizes))
    state = bracket.begun(codes.dtype(codes.nan + 1), total, need, pivots, exact)
    state = bracket.search(functools.partial(_counts, leaves, sizes, ()), state, need, exact)
    found, zero = state.bracket.low, jnp.uint32(0)
    if exact:
        return Keys(found, zero, zero)
    need, total = bracket.inside(state.bracket, need)
    number = zero
    if len(leaves) > 1:
        number, need, total = _in_leaf(_of_each(leaves, sizes, found), need)
    state = bracket.begun(np.uint32(max(sizes, default=0)), total, need, None, exact)
    counted = functools.partial(_counts, leaves, sizes, (found, number))
    place = bracket.search(counted, state, need, exact).bracket.low
    return Keys(found, number, place)


def _quantiles(leaves: Sequence[Array], need: Count) -> Array | None:
    """First pivots, from evenly spaced entries; none if there is nothing or leaves are sharded."""
    size = sum(leaf.size for leaf in leaves)
    if not size or any(map(axes, leaves)):
        return None
    # Odd, as a power of two would see few columns.
    stride, wide = max(size // SAMPLE, 1) | 1, wide_of(leaves)
    parts = [_sample(leaf, stride, wide) for leaf in leaves if leaf.size]
    if len(parts) > 1:
        # NumPy joins a thousand samples at once; for XLA every list of shapes is a new program.
        parts = [(jnp if _checks.is_traced(parts) else np).concatenate(parts)]
    return bracket.picked(parts[0], need, np.float32(size))


@jax.jit(static_argnums=(1, 2))
def _sample(x: Array, stride: int, wide: Wide) -> UInt[Array, " sample"]:
    return code(x.reshape(-1)[::stride], wide)


def _counts(
    leaves: Sequence[Array], sizes: Sequence[int], keys: tuple[Array, ...], pivots: Array
) -> Count:
    """For each pivot, how many entries have a code that reaches it.

    Given the keys of a code and a leaf, those entries count that have both, by their place.
    """
    wide, last = wide_of(leaves), len(leaves) - 1
    only = None if not keys or _checks.is_traced(leaves, keys) else last - int(keys[1])
    counts = [
        _leaf_counts(leaf, first_place(size), np.uint32(last - i), keys, pivots, wide)
        for i, (leaf, size) in enumerate(zip(leaves, sizes, strict=True))
        if size and only in (None, i)
    ]
    return _sum_of(counts) if counts else jnp.zeros((PIVOTS, 2), jnp.uint32)


def _of_each(leaves: Sequence[Array], sizes: Sequence[int], found: Array) -> list[Any]:
    """For each leaf, how many entries have a code."""
    wide, zero = wide_of(leaves), np.uint32(0)
    return [
        _leaf_counts(leaf, first_place(size), zero, (found,), None, wide)[0] if size else zero
        for leaf, size in zip(leaves, sizes, strict=True)
    ]


@jax.jit
def _sum_of(counts: Sequence[Array]) -> Count:
    rows = jnp.stack(counts)
    low = jnp.sum(rows & 0xFFFF, axis=0, dtype=jnp.uint32)
    high = jnp.sum(rows >> 16, axis=0, dtype=jnp.uint32)
    return jnp.stack([high + (low >> 16), low & 0xFFFF], axis=-1)


@jax.jit
def _in_leaf(counts: Sequence[Array], need: Count) -> tuple[Array, Count, Count]:
    """The leaf in which as many entries as needed are reached: how many leaves come after it.

    Also how many entries are needed of this leaf, and how many it has.
    """
    own = jnp.stack([jnp.asarray(count) for count in counts])
    low, high = jnp.cumsum(own & 0xFFFF), jnp.cumsum(own >> 16)
    until = jnp.stack([high + (low >> 16), low & 0xFFFF], axis=-1)
    # A search that ended as exactly the entries needed reach a code counts larger codes too: then
    # all entries that have the code are selected, up to the last leaf.
    reached = bracket.reaches(until, need)
    all_of_them = ~reached[-1]
    leaf = jnp.where(all_of_them, len(counts) - 1, jnp.argmax(reached))
    before = jnp.where(leaf > 0, until[jnp.maximum(leaf - 1, 0)], 0)
    number = jnp.uint32(len(counts) - 1) - leaf.astype(jnp.uint32)
    total = jnp.stack([own[leaf] >> 16, own[leaf] & 0xFFFF])
    return number, jnp.where(all_of_them, total, bracket.less(need, before)), total


@jax.jit(static_argnums=5)
def _leaf_counts(
    x: Array,
    first: Any,
    number: Any,
    keys: tuple[Array, ...],
    pivots: Array | None,
    wide: Wide,
) -> Array:
    """How many entries with the given keys have a next key that reaches each pivot, or any."""

    def local(
        x: Array, starts: Sequence[Array], first: Array, number: Array, keys: Any, pivots: Any
    ) -> Array:
        # Zero in a way that XLA cannot see: it would write down, ahead of a loop, the keys of all.
        zero = jnp.uint32(0) if pivots is None else pivots[0] >> jnp.iinfo(pivots.dtype).bits - 1
        own = _keys(x, starts, shape, first, number, wide, zero)
        among = functools.reduce(jnp.logical_and, map(jnp.equal, own, keys), True)
        if keys:  # without those behind a leaf of codes, which are no smaller than zero
            among &= own[2] <= first
        if pivots is None:
            return jnp.sum(among, dtype=jnp.uint32)[None]
        reached = [(among & (own[2 if keys else 0] >= p)).astype(jnp.uint32) for p in pivots]
        # One variadic reduction reads the entries once; seven sums would write them first.
        counts = lax.reduce(
            reached,
            [jnp.uint32(0)] * PIVOTS,
            lambda x, y: list(map(jnp.add, x, y)),
            range(x.ndim),
        )
        return jnp.stack(counts)

    shape = x.shape
    places = jnp.asarray(first), jnp.asarray(number)
    return _shardwise(local, x, *places, keys, pivots)


def _keys(
    x: Array,
    starts: Sequence[Array],
    shape: Sequence[int],
    first: Array,
    number: Array,
    wide: Wide,
    zero: Any,
) -> tuple[Array, ...]:
    """The keys of entries, in order of precedence; all fall from the first entry to the last."""
    own = code(jnp.where(zero == 0, x, jnp.zeros((), x.dtype)), wide)
    place = jnp.broadcast_to(first, x.shape) + zero.astype(jnp.uint32)
    for axis, start in enumerate(starts):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]))
        place -= (lax.broadcasted_iota(jnp.uint32, x.shape, axis) + start) * stride
    return own, jnp.broadcast_to(number, x.shape), place


def axes(x: Any) -> tuple[str, ...]:
    """The axes of the mesh that a leaf is spread over."""
    if isinstance(getattr(x, "sharding", None), jax.sharding.SingleDeviceSharding):
        return ()  # without the type of the leaf, which takes longer than all else of a selection
    names = (
        (name,) if isinstance(name, str) else name or () for name in jax.typeof(x).sharding.spec
    )
    return tuple(itertools.chain.from_iterable(names))


def _shardwise(function: Callable[..., Array], x: Array, *operands: Any) -> Array:
    """Numbers counted among entries, which start somewhere in the leaf, on all shards."""
    names, sharding = axes(x), jax.typeof(x).sharding
    if not names:
        return function(x, [jnp.uint32(0)] * x.ndim, *operands)

    def local(x: Array, operands: Any) -> Array:
        starts = [
            lax.axis_index(along).astype(jnp.uint32) * size if along else jnp.uint32(0)
            for along, size in zip(sharding.spec, x.shape, strict=True)
        ]
        return lax.psum(function(x, starts, *operands), names)

    return jax.shard_map(
        local, mesh=sharding.mesh, in_specs=(sharding.spec, jax.P()), out_specs=jax.P()
    )(x, operands)
