"""The public functions, and the entry at which a selection ends."""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, PyTree

from wspace import _checks, _lift
from wspace._numerics import Wide, accumulator, where_kept
from wspace._words import described
from wspace.selection import bracket
from wspace.selection.bracket import Count
from wspace.selection.counting import axes, last_by_counting
from wspace.selection.keys import Keys, code, codes_of, first_place, numbers
from wspace.selection.sifting import last_by_sifting
from wspace.selection.sorting import FEW, kept_in_leaf, kept_in_rows, last_by_sorting
from wspace.typing import Lazy, Scalar, Weights, WeightsLike

SMALL = 2**22  # entries up to which starting passes takes longer than the passes do


def kth_magnitude(x: WeightsLike, k: Any) -> Scalar:
    r"""The k-th largest magnitude of an array or of a whole tree, exactly.

    $$
    m_k = \max \bigl\{ m : \#\{ j : |x_j| \ge m \} \ge k \bigr\}
    $$

    Every entry counts as often as it occurs: $m_1$ is the largest magnitude and $m_n$ the least.
    The order of leaves and their sharding do not change it.

    Args:
        x: A tree of $n$ entries.
        k: Which one, from 1 to $n$. It may be traced; a new one compiles nothing.

    Returns:
        The magnitude, in at least float32; NaN if $k$ entries or more are NaN. It has the
            derivative of that entry, or the mean of the derivatives of several equal ones.

    Raises:
        ValueError: If `k` is known and not from 1 to $n$ (NaN if traced), or a leaf has $2^{32}$
            entries or more.
        TypeError: If `k` is not an integer, or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import selection
        >>> selection.kth_magnitude({"w": jnp.array([3.0, -5.0]), "b": jnp.array([4.0])}, 2)
        Array(4., dtype=float32)
    """
    leaves, size = _counted_leaves(x)
    need, below, above = _asked(k, 1, size)
    kth = _kth_value if any(isinstance(leaf, Lazy) for leaf in leaves) else _kth
    magnitude = kth(leaves, need)
    return jnp.where(below | above, jnp.nan, magnitude) if _checks.is_traced(k) else magnitude


def _kth_value(leaves: Sequence[Any], need: Count) -> Scalar:
    return _magnitude(_last(leaves, need, exact=True).code, _wide(leaves))


@jax.jit(static_argnums=1)
def _magnitude(key: Array, wide: Wide) -> Scalar:
    magnitude = lax.bitcast_convert_type(key, wide)
    return jnp.where(jnp.isnan(magnitude), jnp.nan, magnitude)  # the quiet one


_kth = jax.custom_jvp(_kth_value)


@_kth.defjvp
def _kth_derivative(primals: Any, tangents: Any) -> tuple[Scalar, Scalar]:
    (leaves, need), (changes, _) = primals, tangents
    value = _kth(leaves, need)
    wide = [leaf.astype(value.dtype) for leaf in leaves]
    signs = [jnp.where(jnp.abs(x) == value, jnp.sign(x), 0) for x in wide]
    ties = jax.tree.reduce_associative(jnp.add, [jnp.sum(jnp.abs(sign)) for sign in signs])
    moved = [
        jnp.sum(sign * change.astype(value.dtype))
        for sign, change in zip(signs, changes, strict=True)
    ]
    return value, jax.tree.reduce_associative(jnp.add, moved) / jnp.maximum(ties, 1)


def top_mask(x: WeightsLike, k: Any) -> PyTree:
    r"""Which entries are the k of largest magnitude, exactly k of them.

    $$
    \operatorname{mask}_j = \bigl[\, (|x_j|, -j) \text{ is among the } k \text{ largest} \,\bigr]
    $$

    Among equal magnitudes the first ones in the tree are taken, so masks of rising $k$ are nested.
    `tree.per_leaf(selection.top_mask)` selects in every leaf alone.

    The mask of magnitude pruning.

    Args:
        x: A tree of $n$ entries.
        k: How many, from 0 to $n$. It may be traced; a new one compiles nothing.

    Returns:
        A tree of boolean arrays of the layout and sharding of `x`.

    Raises:
        ValueError: If `k` is known and not from 0 to $n$ (if traced, below 0 nothing is selected
            and above $n$ everything), or a leaf has $2^{32}$ entries or more.
        TypeError: If `k` is not an integer, or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import selection
        >>> selection.top_mask(jnp.array([1.0, -2.0, 2.0, 2.0]), 2)
        Array([False,  True,  True, False], dtype=bool)
    """
    return _selected(*_compared(x, k))


def _is_selected(scalars: Sequence[Any], arrays: Sequence[Array], index: Array) -> Any:
    last, own_number, own_first = Keys(*scalars[:3]), *scalars[3:]
    wide = jnp.float64 if last.code.dtype == np.uint64 else jnp.float32
    own = code(arrays[0].astype(wide), wide)
    # Of the entries that have the last one's magnitude, how many of this leaf are not after it.
    until = jnp.where(own_number > last.number, np.uint32(2**32 - 1), np.uint32(0))
    until = jnp.where(own_number == last.number, own_first - last.place + 1, until)
    return (own > last.code) | ((own == last.code) & (index < until))


_selected = _lift.elementwise(_is_selected, placed=True)


@functools.partial(_lift.elementwise, placed=True)
def _kept(scalars: Sequence[Any], arrays: Sequence[Array], index: Array) -> Array:
    return where_kept(_is_selected(scalars, arrays, index), arrays[0])


def _compared(x: WeightsLike, k: Any) -> tuple[Keys, tuple[WeightsLike], list[PyTree]]:
    """What entries are compared with to tell whether they are among the k of largest magnitude."""
    leaves, size = _counted_leaves(x)
    need, nothing, _ = _asked(k, 0, size)
    above = np.asarray(-1).astype(codes_of(_wide(leaves)).dtype)  # all codes
    if _checks.is_traced(nothing):
        last = _last(leaves, need)
        last = last._replace(code=jnp.where(nothing, above, last.code))
    else:
        last = Keys(above, np.uint32(0), np.uint32(0)) if nothing else _last(leaves, need)
    structure = jax.tree.structure(x)
    places = numbers(leaves), [first_place(leaf.size) for leaf in leaves]
    return last, (x,), [structure.unflatten(row) for row in places]


def keep_top(x: WeightsLike, k: Any) -> Weights:
    """The k entries of largest magnitude, and zero everywhere else but where NaN is."""
    return _kept(*_compared(x, k))


def keep_between(x: WeightsLike, start: int, stop: int) -> Weights:
    """The `stop` entries of largest magnitude without the `start` largest, as `keep_top` does."""
    if not start:
        return keep_top(x, stop)
    return _between((), (x, top_mask(x, stop), top_mask(x, start)))


@_lift.elementwise
def _between(_: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    x, inside, above = arrays
    return where_kept(inside & jnp.logical_not(above), x)


def keep_in_leaves(x: WeightsLike, bands: Sequence[Callable[[int], tuple[int, int]]]) -> Weights:
    """Of every leaf what `keep_between` keeps, for the start and stop that its size asks for."""
    return _each_alone(kept_in_leaf, x, bands, lambda leaf: leaf.size)


def keep_in_rows(x: WeightsLike, bands: Sequence[Callable[[int], tuple[int, int]]]) -> Weights:
    """The same of every row, which is the last axis of a leaf."""
    return _each_alone(
        kept_in_rows, x, bands, lambda leaf: leaf.shape[-1] if leaf.ndim > 1 else leaf.size
    )


def _each_alone(
    kept: Callable[..., Weights],
    x: WeightsLike,
    bands: Sequence[Callable[[int], tuple[int, int]]],
    length: Callable[[Any], int],
) -> Weights:
    """What is kept of leaves one by one: all those together that are sorted, the others counted."""
    leaves, structure = jax.tree.flatten(x)
    is_sorted = [length(leaf) < leaf.size or _is_sorted(leaf) for leaf in leaves]
    together = [leaf for leaf, yes in zip(leaves, is_sorted, strict=True) if yes]
    rows = zip(leaves, bands, is_sorted, strict=True)
    spans = [list(map(np.uint32, band(length(leaf)))) for leaf, band, yes in rows if yes]
    each = [[start for start, _ in spans], [stop for _, stop in spans]]
    found = iter(kept((), (together,), each))
    return structure.unflatten(
        next(found) if yes else keep_between(leaf, *band(leaf.size))
        for leaf, band, yes in zip(leaves, bands, is_sorted, strict=True)
    )


def _is_sorted(leaf: Any) -> bool:
    """Whether entries of a leaf by itself are sorted."""
    return not isinstance(leaf, Lazy) and leaf.size <= FEW and not axes(jnp.asarray(leaf))


def _counted_leaves(x: WeightsLike) -> tuple[list[Any], int]:
    _checks.same_layout(x=x)
    leaves = jax.tree.leaves(x)
    for leaf in leaves:
        if leaf.size >= 2**32:
            raise ValueError(
                f"x has a leaf of shape {leaf.shape}, with 2^32 entries or more: split it along "
                "its first axis into leaves that are counted one by one"
            )
    return leaves, sum(leaf.size for leaf in leaves)


def _asked(k: Any, least: int, size: int) -> tuple[Count, Any, Any]:
    """How many entries are asked for, from 1 to all, and whether that is too few or too many."""
    if not (_checks.is_traced(k) and hasattr(k, "dtype")):
        try:
            known = operator.index(k)
        except TypeError as error:
            raise TypeError(f"k must be an integer, got {described(k)}") from error
        if not least <= known <= size:
            raise ValueError(f"k must be from {least} to the {size} entries of x, got {known}")
        return bracket.count_of(min(max(known, 1), size)), known < 1, False
    if not jnp.issubdtype(k.dtype, jnp.integer):
        raise TypeError(f"k must be an integer, got an array of dtype {k.dtype}")
    inside = jnp.clip(k, 1, min(size, jnp.iinfo(k.dtype).max))
    return bracket.count_of(inside), k < 1, k > size


def _wide(leaves: Sequence[Any]) -> Wide:
    return accumulator(*(leaf.dtype for leaf in leaves))


def _last(leaves: Sequence[Any], need: Count, *, exact: bool = False) -> Keys:
    """The last entry selected; if `exact`, its magnitude alone is right.

    Where values are known every pass over a large leaf is a program of its own, compiled once per
    shape, and the number of passes is decided here. Small neighbors are joined before.
    """
    if any(isinstance(leaf, Lazy) for leaf in leaves):
        return last_by_sifting(leaves, need)
    leaves = [leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for leaf in leaves]
    wide, traced = _wide(leaves), _checks.is_traced(leaves, need)
    if traced:
        leaves = list(map(lax.stop_gradient, leaves))
    counts = [leaf.size for leaf in leaves]
    small = [count <= FEW and not axes(x) for count, x in zip(counts, leaves, strict=True)]
    runs = _neighbors(leaves, small)
    sizes = [sum(counts[i] for i in run) for run in runs]
    blocks = [
        _joined([leaves[i] for i in run], wide, size if traced else _length(size))
        if small[run[0]]
        else leaves[run[0]]
        for run, size in zip(runs, sizes, strict=True)
    ]
    coded = len(blocks) == 1 and small[runs[0][0]]  # others keep their place
    if coded and blocks[0].size <= FEW and sizes[0]:
        last = last_by_sorting(blocks[0], first_place(sizes[0]), need)
    elif traced or (len(blocks) == 1 and sizes[0] <= SMALL):
        last = _in_one_program(blocks, tuple(sizes), need, exact)
    else:
        last = last_by_counting(blocks, sizes, need, exact)
    return last if exact or len(runs) == len(leaves) else _unjoined(last, *_ranges(counts, runs))


def _length(size: int) -> int:
    """One of few lengths, so that few programs serve all."""
    return 1 << (size - 1).bit_length() if size else 1


def _neighbors(leaves: Sequence[Array], small: Sequence[bool]) -> list[list[int]]:
    """The indices of leaves that are joined: neighbors small enough for a sort, or one alone."""

    def key(i: int) -> Any:
        if not small[i] or isinstance(leaves[i], Tracer):
            return -1 if small[i] else i
        devices = leaves[i].sharding.device_set
        return devices if len(devices) == 1 else i

    return [list(run) for _, run in itertools.groupby(range(len(leaves)), key)]


@jax.jit(static_argnums=(1, 2))
def _joined(leaves: Sequence[Array], wide: Wide, length: int) -> Array:
    """The codes of leaves as one flat array, with zeros behind it."""
    codes = [code(leaf.reshape(-1), wide) for leaf in leaves]
    missing = length - sum(x.size for x in codes)
    return jnp.concatenate([*codes, jnp.zeros(missing, codes[0].dtype)])


@jax.jit(static_argnums=(1, 3))
def _in_one_program(
    leaves: Sequence[Array], sizes: tuple[int, ...], need: Count, exact: bool
) -> Keys:
    return last_by_counting(leaves, sizes, need, exact)


def _ranges(
    counts: Sequence[int], runs: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each leaf how many runs come after its own, and its first entry and its end there."""
    after = np.repeat(np.arange(len(runs), dtype=np.uint32)[::-1], list(map(len, runs)))
    sizes = [np.array([counts[i] for i in run]) for run in runs]
    ends = np.concatenate([np.cumsum(row) for row in sizes])
    return after, (ends - np.concatenate(sizes)).astype(np.uint32), ends.astype(np.uint32)


@jax.jit
def _unjoined(last: Keys, after: Array, starts: Array, ends: Array) -> Keys:
    """The keys of an entry among the leaves, from its keys among the joined runs."""
    length = jnp.max(jnp.where(after == last.number, ends, 0))
    position = length - 1 - last.place
    is_there = (after == last.number) & (starts <= position) & (position < ends)
    leaf = jnp.argmax(is_there)
    number = jnp.uint32(len(ends) - 1) - leaf.astype(jnp.uint32)
    return Keys(last.code, number, ends[leaf] - 1 - position)
