r"""Exact selection by magnitude: the k-th largest entry of a leaf or of a whole tree, in O(n).

Entries are ordered by magnitude and, where magnitudes are equal, by their place in the tree, leaf
by leaf and within a leaf by flat index; the first comes first. So there is exactly one set of the
k largest. Zero is the smallest magnitude, an infinity is larger than every finite one, and NaN
larger still, as NumPy sorts it, so that it is never dropped unseen.

Only small leaves are sorted. The bits of a magnitude are an integer of the same order, and the
k-th largest integer is found by counting: a pass counts how many entries reach each of seven
pivots, and the pivots of the next pass lie between the two that the k-th is between. Four or five
passes are usual, each at the speed of memory. Sharded leaves are counted where they lie, and only
counts travel. Counters hold $2^{48}$ entries, a leaf up to $2^{32}$.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, PyTree, UInt

from wspace import _checks, _lazy, _padding
from wspace import _counting as counting
from wspace._counting import PIVOTS, Count
from wspace._numerics import accumulator
from wspace._sifting import codes_of, last_of
from wspace.typing import Scalar, Weights, WeightsLike

__all__ = ["kth_magnitude", "top_mask"]

SAMPLE = 2**14  # entries whose quantiles are the first pivots
FEW = 2**14  # entries of a leaf up to which they are sorted
FEW_OF_LAZY = 2**24  # entries of lazy leaves that are taken into memory
SMALL = 2**22  # entries of a leaf up to which dispatching passes takes longer than the passes do


class Cut(NamedTuple):
    """The last entry selected, by its keys in order of precedence, if there is one."""

    keys: tuple[UInt[Array, ""], ...]
    nothing: Bool[Array, ""]


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
        The magnitude, in at least float32; NaN if $k$ entries or more are NaN. Its derivative is
            that of the entry, or the mean of those of several equal ones.

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
    leaves, size = _entries(x)
    need, below, above = _asked(k, 1, size)
    kth = _kth_value if _lazy.is_lazy(leaves) else _kth
    magnitude = kth(leaves, need)
    return jnp.where(below | above, jnp.nan, magnitude) if _checks.is_traced(k) else magnitude


def _kth_value(leaves: Sequence[Any], need: Count) -> Scalar:
    return _magnitude(*_last(leaves, need, exact=True), _wide(leaves))


@functools.partial(jax.jit, static_argnums=1)
def _magnitude(key: Array, wide: type) -> Scalar:
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
    return _each_leaf(_selected, x, cut_for(x, k))


def keep_top(x: WeightsLike, k: Any) -> Weights:
    """The k entries of largest magnitude, and zero everywhere else."""
    return _each_leaf(_kept, x, cut_for(x, k))


def keep_between(x: WeightsLike, start: int, stop: int) -> Weights:
    """The k entries of largest magnitude, k the stop, without those for k the start; zero else."""
    leaves, structure = jax.tree.flatten(x)
    if len(leaves) == 1 and _is_sorted(leaves[0]):
        return structure.unflatten([_kept_by_sorting(*leaves, np.uint32(start), np.uint32(stop))])
    if not start:
        return keep_top(x, stop)
    inside, above = top_mask(x, stop), top_mask(x, start)
    return _padding.mapped(_between, x, inside, above)


@_lazy.entrywise(lambda x, *_: x.dtype, in_pieces=False)
@_padding.entrywise(rows=True)
@jax.jit
def keep_in_rows(x: Array, start: Any, stop: Any) -> Array:
    """What `keep_between` keeps of every row of a leaf, which is its last axis."""
    place = lax.broadcasted_iota(
        jnp.uint32, x.shape, x.ndim - 1, out_sharding=jax.typeof(x).sharding
    )
    keys = _code(lax.stop_gradient(x), accumulator(x.dtype)), x.shape[-1] - 1 - place
    codes, places = lax.sort([~key for key in keys], num_keys=1, is_stable=True)

    def among_first(k: Array) -> Array:
        last = jnp.maximum(k, 1) - 1
        least = [~lax.dynamic_index_in_dim(key, last, -1) for key in (codes, places)]
        (code, after), (lowest, until) = keys, least
        return ((code > lowest) | ((code == lowest) & (after >= until))) & (k > 0)

    return jnp.where(among_first(jnp.asarray(stop)) & ~among_first(jnp.asarray(start)), x, 0)


@_padding.entrywise(zeros=True)
@jax.jit
def _kept_by_sorting(x: Array, start: Array, stop: Array) -> Array:
    return keep_in_rows(x.reshape(-1), start, stop).reshape(x.shape)


@_lazy.entrywise(lambda leaf, *_: leaf.dtype)
@_padding.entrywise()
@jax.jit
def _between(leaf: Array, inside: Array, above: Array) -> Array:
    return jnp.where(inside & ~above, leaf, 0)


def cut_for(x: WeightsLike, k: Any) -> Cut:
    """Where the order of the entries is to be cut for k of them to be selected."""
    leaves, size = _entries(x)
    need, nothing, _ = _asked(k, 0, size)
    return Cut(_last(leaves, need, exact=False), nothing)


def _entries(x: WeightsLike) -> tuple[list[Array], int]:
    _checks.same_layout(x=x)
    leaves = [_lazy.array(leaf) for leaf in jax.tree.leaves(x)]
    for leaf in leaves:
        if leaf.size >= 2**32:
            raise ValueError(
                f"x has a leaf of shape {leaf.shape}, with 2^32 entries or more: split it along "
                "its first axis into leaves that are counted one by one"
            )
    return leaves, sum(leaf.size for leaf in leaves)


def _asked(k: Any, least: int, size: int) -> tuple[Count, Any, Any]:
    """How many entries are asked for, from 1 to all, and whether that is too few or too many."""
    if not _checks.is_traced(k):
        try:
            known = operator.index(k)
        except TypeError as error:
            raise TypeError(f"k must be an integer, got {k!r}") from error
        if not least <= known <= size:
            raise ValueError(f"k must be from {least} to the {size} entries of x, got {known}")
        return counting.count_of(min(max(known, 1), size)), known < 1, False
    if not jnp.issubdtype(k.dtype, jnp.integer):
        raise TypeError(f"k must be an integer, got an array of dtype {k.dtype}")
    inside = jnp.clip(k, 1, min(size, jnp.iinfo(k.dtype).max))
    return counting.count_of(inside), k < 1, k > size


def _wide(leaves: Sequence[Any]) -> type:
    return accumulator(*(leaf.dtype for leaf in leaves))


@_padding.few_programs
def _last(leaves: Sequence[Array], need: Count, *, exact: bool) -> tuple[Array, ...]:
    """The keys of the last entry selected; if `exact`, that of its magnitude alone.

    Where values are known every pass is a program of its own, compiled once per shape of a leaf,
    and the number of passes is decided here. A small leaf has one program for all, and the least
    ones are sorted, which takes less time to compile.
    """
    size = leaves[0].size if len(leaves) == 1 else math.inf
    if _lazy.is_lazy(leaves):
        return _last_of_lazy(leaves, need)[: 1 if exact else 3]
    leaves = [lax.stop_gradient(leaf) for leaf in leaves]
    if len(leaves) == 1 and _is_sorted(leaves[0]):
        x, first = _entries_of(leaves[0], None), _first(leaves[0], None)
        return _last_by_sorting(x, first, need, _wide(leaves))[: 1 if exact else 3]
    if (size <= SMALL and not _padding.many()) or _checks.is_traced(leaves, need):
        return _last_in_one(leaves, need, exact)
    runs = _runs(leaves)
    keys = _levels([_joined(leaves, run) for run in runs], need, exact)
    return keys if exact or len(runs) == len(leaves) else _apart(keys, leaves, runs)


def _runs(leaves: Sequence[Array]) -> list[list[int]]:
    """The places of leaves that are counted as one: of neighbours that are small, or of one."""

    def is_small(leaf: Array) -> bool:
        return leaf.size <= FEW and len(leaf.sharding.device_set) == 1

    keys = [-1 if is_small(leaf) else i for i, leaf in enumerate(leaves)]
    return [list(run) for _, run in itertools.groupby(range(len(leaves)), keys.__getitem__)]


def _joined(leaves: Sequence[Array], run: Sequence[int]) -> Any:
    """A run of leaves as one, with zeros behind it, so that its length is one of few."""
    if len(run) == 1:
        return leaves[run[0]]
    wide, size = _wide(leaves), sum(leaves[i].size for i in run)
    length = min(1 << max(size - 1, 0).bit_length(), -(-size // _lazy.PIECE) * _lazy.PIECE)
    entries = np.zeros(max(length, 1), wide)
    np.concatenate([np.asarray(leaves[i]).reshape(-1) for i in run], out=entries[:size])
    pieces = jax.device_put([entries[i : i + _lazy.PIECE] for i in range(0, size, _lazy.PIECE)])

    def compute(span: Any, _: _lazy.Memo) -> Array:
        if span is None and len(pieces) != 1:
            return jax.device_put(entries)
        return pieces[span[0] // _lazy.PIECE if span else 0]

    return _lazy.Lazy((size,), wide, compute)


def _apart(
    keys: tuple[Array, ...], leaves: Sequence[Array], runs: Sequence[Sequence[int]]
) -> tuple[Array, ...]:
    """The keys of an entry of leaves, by those of the same entry of joined ones."""
    code, number, place = keys
    run = runs[len(runs) - 1 - int(number)]
    ends = np.cumsum([leaves[i].size for i in run])
    position = ends[-1] - 1 - int(place)
    which = int(np.searchsorted(ends, position, side="right"))
    return code, jnp.uint32(len(leaves) - 1 - run[which]), jnp.uint32(ends[which] - 1 - position)


def _is_sorted(leaf: Any) -> bool:
    """Whether entries of a leaf by itself are sorted."""
    return not isinstance(leaf, _lazy.Lazy) and 0 < leaf.size <= FEW and not _axes(leaf)


@functools.partial(jax.jit, static_argnums=3)
def _last_by_sorting(x: Array, first: Any, need: Count, wide: type) -> tuple[Array, ...]:
    return _at(_sorted(x, jnp.asarray(first), wide), need[1])  # its other part is zero


def _sorted(x: Array, first: Array, wide: type) -> tuple[Array, Array]:
    """The codes and places of all entries from the first to the last in order."""
    dtype, nan = codes_of(wide)
    below = jnp.asarray(nan, dtype) - _code(x.reshape(-1), wide)
    places = first - jnp.arange(x.size, dtype=jnp.uint32)
    below, places = lax.sort((below, places), num_keys=1, is_stable=True)
    return jnp.asarray(nan, dtype) - below, places


def _at(ordered: tuple[Array, Array], k: Array) -> tuple[Array, ...]:
    """The keys of the k-th entry of a leaf by itself."""
    codes, places = ordered
    return codes[k - 1], jnp.uint32(0), places[k - 1]


@functools.partial(jax.jit, static_argnames="exact")
def _last_in_one(leaves: Sequence[Array], need: Count, exact: bool) -> tuple[Array, ...]:
    return _levels(leaves, need, exact)


def _levels(leaves: Sequence[Any], need: Count, exact: bool) -> tuple[Array, ...]:
    """The keys of the last entry selected: of its magnitude, its leaf and its place in the leaf.

    Keys fall from the first entry to the last. On each level the entries are those that have the
    keys found before, and of them as many are needed as the entries above leave to be selected.
    """
    codes = codes_of(_wide(leaves))
    largest = max((leaf.size for leaf in leaves), default=0)
    heights = [codes.dtype(codes.nan + 1), np.uint32(len(leaves)), np.uint32(largest)]
    total = counting.count_of(sum(leaf.size for leaf in leaves))
    pivots = _quantiles(leaves, need)
    keys: tuple[Array, ...] = ()
    for level, height in enumerate(heights[:1] if exact else heights):
        state = counting.begun(height, total, need, pivots, exact)
        if level != 1 or len(leaves) > 1:
            counted = functools.partial(_counts, leaves, keys)
            state = counting.search(counted, state, need, exact)
        keys, pivots = (*keys, state.bracket.low), None
        need, total = counting.inside(state.bracket, need)
    return keys


def _last_of_lazy(leaves: Sequence[Any], need: Count) -> tuple[Array, ...]:
    """The keys of the last entry selected, for leaves that are to be read as seldom as possible."""
    codes = codes_of(_wide(leaves))

    def bounds() -> tuple[int, int]:
        total = counting.count_of(sum(leaf.size for leaf in leaves))
        state = counting.begun(codes.dtype(codes.nan + 1), total, need, None, True)
        while (
            state.unfinished
            and counting.known(counting.inside(state.bracket, need)[1]) > FEW_OF_LAZY
        ):
            state = counting.step(state, _counts(leaves, (), state.pivots), need, True)
        return int(state.bracket.low), int(state.bracket.high)

    if not any(leaf.size for leaf in leaves):
        return jnp.zeros((), codes.dtype), jnp.uint32(0), jnp.uint32(0)
    last = last_of(leaves, counting.known(need), bounds)
    number, place = len(leaves) - 1 - last.leaf, leaves[last.leaf].size - 1 - last.place
    return jnp.asarray(last.code, codes.dtype), jnp.uint32(number), jnp.uint32(place)


def _quantiles(leaves: Sequence[Any], need: Count) -> Array | None:
    """First pivots, from evenly spaced entries; none if there is nothing or leaves are sharded."""
    if any(map(_axes, leaves)):
        return None
    leaves = [_entries_of(leaf, None) for leaf in leaves]
    size = sum(leaf.size for leaf in leaves)
    if not size:
        return None
    # Odd, as a power of two would see few columns.
    stride, wide = max(size // SAMPLE, 1) | 1, _wide(leaves)
    parts = [_sample(leaf, stride, wide) for leaf in leaves if leaf.size]
    # NumPy joins a thousand arrays at once; for XLA every such list of shapes is a new program.
    joined = (jnp if _checks.is_traced(parts) else np).concatenate(parts)
    return counting.picked(joined, need, np.float32(size))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _sample(x: Array, stride: int, wide: type) -> UInt[Array, " sample"]:
    return _code(x.reshape(-1)[::stride], wide)


def _code(x: Array, wide: type) -> UInt[Array, "*s"]:
    """An integer of the order of the magnitudes, in which all NaN are one."""
    dtype, nan = codes_of(wide)
    bits = lax.bitcast_convert_type(x.astype(wide), dtype)
    return jnp.minimum(bits & jnp.asarray(jnp.iinfo(dtype).max >> 1, dtype), nan)


def _counts(leaves: Sequence[Any], keys: tuple[Array, ...], pivots: Array) -> Count:
    """How many entries that have the given keys reach each pivot with their next one."""
    wide, last = _wide(leaves), len(leaves) - 1
    total: Any = np.zeros((PIVOTS, 2), np.uint32)
    only = None if len(keys) < 2 or _checks.is_traced(leaves, keys) else int(keys[1])
    for i, leaf in enumerate(leaves):
        number = np.uint32(last - i)
        if only not in (None, number):
            continue
        for span in _lazy.spans(leaf) if leaf.size else ():
            x, first = _entries_of(leaf, span), _first(leaf, span)
            total = _leaf_counts(total, x, first, number, keys, pivots, wide)
    return jnp.asarray(total)


def _entries_of(leaf: Any, span: _lazy.Span) -> Any:
    """The entries of a span, and zeros behind them where programs are to be few."""
    return _padding.lengthened(_lazy.entries(leaf, span))


def _first(leaf: Any, span: _lazy.Span) -> np.uint32:
    """The key of the place of the first entry of a span."""
    return np.uint32(max(leaf.size, 1) - 1 - _lazy.start_of(span))


@functools.partial(jax.jit, static_argnums=6)
def _leaf_counts(
    others: Count,
    x: Array,
    first: Any,
    number: Any,
    keys: tuple[Array, ...],
    pivots: Array,
    wide: type,
) -> Count:
    """The counts of other leaves, and those of this one added."""

    def local(
        x: Array, starts: Sequence[Array], first: Array, number: Array, keys: Any, pivots: Array
    ) -> Array:
        # Zero in a way that XLA cannot see: it would write down, ahead of a loop, the keys of all.
        zero = pivots[0] >> (jnp.iinfo(pivots.dtype).bits - 1)
        own = _keys(x, starts, shape, first, number, wide, zero)
        among = functools.reduce(jnp.logical_and, map(jnp.equal, own, keys), True)
        if keys:  # without those of padding, which are no smaller than zeros
            among &= own[2] <= first
        reached = [(among & (own[len(keys)] >= p)).astype(jnp.uint32) for p in pivots]
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
    counts = _shardwise(local, x, *places, keys, pivots, summed=True)
    return counting.plus(others, jnp.stack([counts >> 16, counts & 0xFFFF], axis=-1))


def _keys(
    x: Array,
    starts: Sequence[Array],
    shape: Sequence[int],
    first: Array,
    number: Array,
    wide: type,
    zero: Any,
) -> tuple[Array, ...]:
    """The keys of entries, in order of precedence; all fall from the first entry to the last."""
    code = _code(jnp.where(zero == 0, x, 0), wide)
    place = jnp.broadcast_to(first, x.shape) + zero.astype(jnp.uint32)
    for axis, start in enumerate(starts):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]))
        place -= (lax.broadcasted_iota(jnp.uint32, x.shape, axis) + start) * stride
    return code, jnp.broadcast_to(number, x.shape), place


def _selected(x: Array, first: Array, number: Array, cut: Cut, wide: type) -> Bool[Array, "*s"]:
    def local(x: Array, starts: Sequence[Array], first: Array, number: Array, cut: Cut) -> Array:
        own = _keys(x, starts, shape, first, number, wide, jnp.uint32(0))
        inside = jnp.asarray(True)
        for key, least in reversed(list(zip(own, cut.keys, strict=True))):
            inside = (key > least) | ((key == least) & inside)
        return inside & ~cut.nothing

    shape = x.shape
    return _shardwise(local, x, jnp.asarray(first), number, cut)


def _kept(x: Array, first: Array, number: Array, cut: Cut, wide: type) -> Array:
    return jnp.where(_selected(x, first, number, cut, wide), x, 0)


@_padding.entrywise()
@functools.partial(jax.jit, static_argnums=(0, 5))
def _on_leaf(function: Any, x: Array, first: Any, number: Any, cut: Cut, wide: type) -> Array:
    return function(x, first, number, cut, wide)


@_padding.few_programs
def _each_leaf(function: Callable[..., Array], x: WeightsLike, cut: Cut) -> PyTree:
    leaves, structure = jax.tree.flatten(x)
    leaves, last = [_lazy.array(leaf) for leaf in leaves], len(leaves) - 1
    wide = _wide(leaves)

    def called(i: int, leaf: Any) -> Any:
        def on(span: _lazy.Span, memo: _lazy.Memo) -> Array:
            x = _lazy.entries(leaf, span, memo)
            return _on_leaf(function, x, _first(leaf, span), np.uint32(last - i), cut, wide)

        if not isinstance(leaf, _lazy.Lazy):
            return on(None, {})
        dtype = bool if function is _selected else leaf.dtype
        return _lazy.Lazy(leaf.shape, dtype, on, leaf.in_pieces)

    return structure.unflatten(called(i, leaf) for i, leaf in enumerate(leaves))


def _axes(x: Any) -> tuple[str, ...]:
    """The axes of the mesh that a leaf is spread over."""
    if isinstance(x, _lazy.Lazy):
        return ()
    names = (
        (name,) if isinstance(name, str) else name or () for name in jax.typeof(x).sharding.spec
    )
    return tuple(itertools.chain.from_iterable(names))


def _shardwise(
    function: Callable[..., Array], x: Array, *operands: Any, summed: bool = False
) -> Array:
    """A function of entries, and of where in the leaf they start, on every shard alone."""
    axes, sharding = _axes(x), jax.typeof(x).sharding
    if not axes:
        return function(x, [jnp.uint32(0)] * x.ndim, *operands)

    def local(x: Array, operands: Any) -> Array:
        starts = [
            lax.axis_index(names).astype(jnp.uint32) * size if names else jnp.uint32(0)
            for names, size in zip(sharding.spec, x.shape, strict=True)
        ]
        result = function(x, starts, *operands)
        return lax.psum(result, axes) if summed else result

    return jax.shard_map(
        local,
        mesh=sharding.mesh,
        in_specs=(sharding.spec, jax.P()),
        out_specs=jax.P() if summed else sharding.spec,
    )(x, operands)
