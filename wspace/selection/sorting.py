"""Selection in few entries by a sort, one program for all that is to be done."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from wspace import _lift
from wspace._numerics import accumulator, where_kept
from wspace.selection.bracket import Count
from wspace.selection.keys import Keys, code

FEW = 2**14
"""Entries up to which a sort takes less time than counting does."""


@jax.jit
def last_by_sorting(codes: Array, first: Any, need: Count) -> Keys:
    """The last entry selected of a flat array of codes, `first` entries coming after its first."""
    nan = jnp.asarray(jnp.iinfo(codes.dtype).max, codes.dtype)
    places = jnp.asarray(first) - jnp.arange(codes.size, dtype=jnp.uint32)
    below, places = lax.sort((nan - codes, places), num_keys=1, is_stable=True)
    k = need[1] - 1  # its other part is zero
    return Keys(nan - below[k], jnp.uint32(0), places[k])


def _band_of_rows(x: Array, start: Array, stop: Array) -> Bool[Array, "*s n"]:
    """Whether the place of an entry in its row, by falling magnitude, is from start to stop."""
    place = lax.broadcasted_iota(
        jnp.uint32, x.shape, x.ndim - 1, out_sharding=jax.typeof(x).sharding
    )
    keys = code(lax.stop_gradient(x), accumulator(x.dtype)), x.shape[-1] - 1 - place
    codes, places = lax.sort([~key for key in keys], num_keys=1, is_stable=True)

    def among_first(k: Array) -> Array:
        last = jnp.maximum(k, 1) - 1
        least = [~lax.dynamic_index_in_dim(key, last, -1) for key in (codes, places)]
        (own, after), (lowest, until) = keys, least
        return ((own > lowest) | ((own == lowest) & (after >= until))) & (k > 0)

    return jnp.logical_and(among_first(stop), jnp.logical_not(among_first(start)))


@functools.partial(_lift.elementwise, scope="leaf")
def kept_in_rows(scalars: Sequence[Any], arrays: Sequence[Array]) -> Array:
    """Entries in a band of places of their row, the last axis; a leaf without axes is one row."""
    (start, stop), (x,) = scalars, arrays
    if not x.size:
        return x
    rows = x if x.ndim else x.reshape(1)
    return where_kept(_band_of_rows(rows, start, stop), rows).reshape(x.shape)


@functools.partial(_lift.elementwise, scope="leaf")
def kept_in_leaf(scalars: Sequence[Any], arrays: Sequence[Array]) -> Array:
    """Entries in a band of places of a whole leaf."""
    (start, stop), (x,) = scalars, arrays
    if not x.size:
        return x
    flat = x.reshape(-1)
    return where_kept(_band_of_rows(flat, start, stop), flat).reshape(x.shape)
