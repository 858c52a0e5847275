"""The search for the key of an entry, given how many reach the keys that it is asked for.

A pass over the entries counts for seven pivots at once; the key is then between two of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, UInt, UInt32

from wspace import _checks
from wspace.typing import Scalar

PIVOTS = 7  # as many counters as fuse into one pass over memory

Count: TypeAlias = UInt32[Array, "... 2"]
"""A number below $2^{48}$: its part from $2^{16}$ on, and the rest."""


class Bracket(NamedTuple):
    """Keys `low` < `high` with the one sought in between, and how many entries reach each."""

    low: UInt[Array, ""]
    high: UInt[Array, ""]
    low_count: Count
    high_count: Count


class State(NamedTuple):
    """A bracket, the pivots to count next, and whether that is still to be done."""

    bracket: Bracket
    pivots: UInt[Array, " pivots"]
    unfinished: Bool[Array, ""]


def count_of(k: Any) -> Count:
    """A number, known or traced, as a count."""
    if not _checks.is_traced(k):
        return jnp.asarray(np.array([k >> 16, k & 0xFFFF], np.uint32))
    return jnp.stack([jnp.asarray(part).astype(jnp.uint32) for part in (k >> 16, k & 0xFFFF)])


def plus(count: Count, other: Count) -> Count:
    """The sum of two counts."""
    high, low = count[..., 0] + other[..., 0], count[..., 1] + other[..., 1]
    return jnp.stack([high + (low >> 16), low & 0xFFFF], axis=-1)


def reaches(count: Count, need: Count) -> Bool[Array, "..."]:
    """Whether a count is as large as needed."""
    high, low = count[..., 0], count[..., 1]
    return (high > need[0]) | ((high == need[0]) & (low >= need[1]))


def less(count: Count, other: Count) -> Count:
    """The difference of two counts, the first one not the smaller."""
    borrow = (count[1] < other[1]).astype(jnp.uint32)
    return jnp.stack([count[0] - other[0] - borrow, (count[1] - other[1]) & 0xFFFF])


def number_of(count: Count) -> Scalar:
    """The count as a float32, rounded."""
    return count[..., 0].astype(jnp.float32) * 2**16 + count[..., 1].astype(jnp.float32)


def known(count: Count) -> int:
    """The count as an integer of Python."""
    high, low = np.asarray(count).tolist()
    return (high << 16) + low


def search(counted: Callable[[Array], Count], state: State, need: Count, exact: bool) -> State:
    """The bracket narrowed to one key, or if not `exact` until exactly `need` entries reach it."""
    if _checks.is_traced(state.unfinished):
        return lax.while_loop(
            lambda state: state.unfinished,
            lambda state: step(state, counted(state.pivots), need, exact),
            state,
        )
    while state.unfinished:
        state = step(state, counted(state.pivots), need, exact)
    return state


@jax.jit
def inside(found: Bracket, need: Count) -> tuple[Count, Count]:
    """How many entries with the key found are needed, and how many there are."""
    return less(need, found.high_count), less(found.low_count, found.high_count)


@jax.jit(static_argnames="exact")
def begun(height: Any, total: Count, need: Count, pivots: Array | None, exact: bool) -> State:
    """The state before any pass: all keys below a height, and first pivots if there are any."""
    whole = Bracket(jnp.zeros_like(height), jnp.asarray(height), total, jnp.zeros_like(total))
    return _aimed(whole, need, exact, pivots)


@jax.jit(static_argnames="exact")
def step(state: State, counts: Count, need: Count, exact: bool) -> State:
    """The state after a pass that counted how many entries reach each pivot."""
    low, high, low_count, high_count = state.bracket
    keys = jnp.concatenate([low[None], state.pivots, high[None]])
    counts = jnp.concatenate([low_count[None], counts, high_count[None]])
    last = jnp.sum(reaches(counts[1:-1], need), dtype=jnp.int32)
    return _aimed(
        Bracket(keys[last], keys[last + 1], counts[last], counts[last + 1]), need, exact, None
    )


def _aimed(bracket: Bracket, need: Count, exact: bool, pivots: Array | None) -> State:
    width = bracket.high - bracket.low
    open_ended = width > 1
    unfinished = open_ended if exact else open_ended & jnp.any(bracket.low_count != need)
    pivots = _pivots(bracket, need) if pivots is None else pivots
    return State(bracket, pivots, unfinished)


def _pivots(bracket: Bracket, need: Count) -> UInt[Array, " pivots"]:
    """Pivots about where the key would be if entries were spread evenly, and three that halve."""
    width = bracket.high - bracket.low
    inside = jnp.maximum(number_of(bracket.low_count) - number_of(bracket.high_count), 1)
    center = (number_of(bracket.low_count) - number_of(need)) / inside
    spread = jnp.maximum(1.5 / jnp.sqrt(inside), 1 / width.astype(jnp.float32))
    near = center + spread * jnp.array([-1, -0.3, 0.3, 1], jnp.float32)
    shares = jnp.concatenate([near, jnp.array([0.25, 0.5, 0.75], jnp.float32)])
    steps = (jnp.clip(shares, 0, 1) * width.astype(jnp.float32)).astype(width.dtype)
    every = jnp.arange(1, PIVOTS + 1, dtype=width.dtype)
    steps = jnp.where(width <= PIVOTS + 1, every, steps)
    # Sorted last: XLA would fuse all else into the next pass, and compute it for every entry.
    return jnp.sort(bracket.low + jnp.clip(steps, 1, jnp.maximum(width, 2) - 1))


@jax.jit
def picked(sample: UInt[Array, " sample"], need: Count, size: Scalar) -> UInt[Array, " pivots"]:
    """Pivots from a sample of as many entries, about where the one needed would be."""
    share, count = number_of(need) / size, sample.size
    rank, deviation = (1 - share) * count, jnp.sqrt(share * (1 - share) * count)
    places = rank + deviation * jnp.array([-4, -2, -0.7, 0, 0.7, 2, 4], jnp.float32)
    ordered = jnp.sort(sample)
    found = ordered[jnp.clip(jnp.round(places), 0, count - 1).astype(jnp.int32)]
    return jnp.maximum(found, 1)
