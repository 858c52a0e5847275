"""Formulas on the entries of arrays, lifted to trees that are known to be of one layout.

`tree.elementwise` and `tree.reduction` are these with their arguments checked. Functions of this
library have checked theirs, by the names that their callers know.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Key, PyTree

from wspace import _checks, _pieces
from wspace._checks import OneOrEach
from wspace._numerics import Wide, accumulator, row_sums, settled


def elementwise(
    formula: Callable[..., Any],
    *,
    rounded: bool = True,
    scope: Literal["entry", "leaf"] = "entry",
    placed: bool = False,
) -> Callable[..., Any]:
    """`tree.elementwise` without checks."""

    def cast(x: Any, like: Array, wide: Wide) -> Array:
        x = _of_shape(x, like)
        if x.dtype == bool:
            return x
        if rounded and like.dtype == bool:
            raise ValueError(
                f"the formula returns {x.dtype} where the tree whose dtype it is rounded to holds "
                "masks: put a tree of weights first, or lift it with rounded=False"
            )
        return x.astype(like.dtype if rounded else wide)

    def on_leaf(scalars: Sequence[Any], leaves: Sequence[Array], start: Any) -> Any:
        wide = accumulator(*(leaf.dtype for leaf in leaves))
        places = [_places(leaves[0], start)] if placed else []
        result = formula([_number(c, wide) for c in scalars], _widened(leaves, wide), *places)
        if isinstance(result, list | tuple):
            if len(result) > len(leaves):
                raise ValueError(
                    f"the formula returns {len(result)} arrays for {len(leaves)} trees, and each "
                    "is rounded to the dtype of a tree: give as many trees, or take fewer"
                )
            return [cast(x, like, wide) for x, like in zip(result, leaves, strict=False)]
        return cast(result, leaves[0], wide)

    def on_leaves(
        scalars: Sequence[Any], own: Sequence[Any], columns: Sequence[Any], start: Any
    ) -> list[Any]:
        rows = list(zip(*columns, strict=True))
        return [
            on_leaf(numbers, leaves, start)
            for numbers, leaves in zip(_filled(scalars, own, len(rows)), rows, strict=True)
        ]

    kernel = _named(on_leaves, formula)

    def put_off(scalars: Sequence[Any], own: Sequence[Any], leaves: Sequence[Any]) -> Any:
        def on_span(leaves: Sequence[Any], start: Any) -> Any:
            return kernel(scalars, _as_columns(own), _as_columns(leaves), start)[0]

        # Of the kernel itself, which is traced once for leaves of the same kind.
        def traced(leaves: Sequence[Any], start: Any) -> Any:
            row = _as_columns(own), _as_columns(leaves)
            return jax.eval_shape(kernel, scalars, *row, start)[0]

        return _pieces.put_off(on_span, leaves, scope == "entry", traced)

    def on_trees(
        scalars: Sequence[OneOrEach | Bool[Array, ""] | Key[Array, ""]],
        trees: Sequence[PyTree],
        each: Sequence[PyTree] = (),
    ) -> Any:
        first, *others = trees
        leaves, structure = jax.tree.flatten(first)
        columns = [leaves, *map(structure.flatten_up_to, others)]
        scalars, own = _parted(scalars, len(leaves))
        own += map(structure.flatten_up_to, each)
        results: list[Any] = [None] * len(leaves)
        for group in _pieces.groups(columns):
            if _pieces.is_lazy(_row(columns, group[0])):
                for i in group:
                    results[i] = put_off(scalars, _row(own, i), _row(columns, i))
            else:
                numbers = [_as_one_array(column) for column in _rows(own, group)]
                found = kernel(scalars, numbers, _rows(columns, group), np.uint32(0))
                for i, result in zip(group, found, strict=True):
                    results[i] = result
        if not leaves and not each:
            results = [jax.eval_shape(on_leaf, scalars, [jnp.zeros(0)] * len(trees), np.uint32(0))]
        if results and isinstance(results[0], list):
            return [structure.unflatten(xs if leaves else ()) for xs in zip(*results, strict=True)]
        return structure.unflatten(results if leaves else ())

    return on_trees


def reduction(
    formula: Callable[..., Any], *, kind: Literal["sum", "max", "min"] = "sum"
) -> Callable[..., Array]:
    """`tree.reduction` without checks."""

    def on_leaf(scalars: Sequence[Any], leaves: Sequence[Array], wide: Any) -> Array:
        terms = formula([_number(c, wide) for c in scalars], _widened(leaves, wide))
        several = isinstance(terms, list | tuple)
        arrays = [_of_shape(x, leaves[0]) for x in (terms if several else [terms])]
        return _reduced(arrays if several else arrays[0], kind, wide)

    def on_leaves(
        scalars: Sequence[Any], own: Sequence[Any], columns: Sequence[Any], wide: Any
    ) -> list[Array]:
        rows = list(zip(*columns, strict=True))
        return [
            on_leaf(numbers, leaves, wide)
            for numbers, leaves in zip(_filled(scalars, own, len(rows)), rows, strict=True)
        ]

    kernel = _named(on_leaves, formula, static_argnums=3)

    def of_row(scalars: Sequence[Any], own: Any, row: Sequence[Any], wide: Any) -> Array:
        """The numbers of a leaf that is lazy, in pieces where it does not matter how they meet."""
        like = [jax.ShapeDtypeStruct((), leaf.dtype) for leaf in row]
        (terms,) = jax.eval_shape(kernel, scalars, own, _as_columns(like), wide)
        exact = jnp.issubdtype(terms.dtype, jnp.integer)
        if not exact and kind == "sum":
            return kernel(scalars, own, _as_columns(_pieces.whole(row)), wide)[0]
        parts = [kernel(scalars, own, _as_columns(part), wide)[0] for part in _pieces.entries(row)]
        return functools.reduce(_MEETING[kind], parts)

    def on_trees(
        scalars: Sequence[OneOrEach | Bool[Array, ""] | Key[Array, ""]],
        trees: Sequence[PyTree],
        *,
        by_leaf: bool = False,
    ) -> Any:
        first, *others = trees
        leaves, structure = jax.tree.flatten(first)
        columns = [leaves, *map(structure.flatten_up_to, others)]
        scalars, own = _parted(scalars, len(leaves))
        wide = accumulator(*{leaf.dtype for column in columns for leaf in column})
        results: list[Any] = [None] * len(leaves)
        for group in _pieces.groups(columns):
            numbers = [_as_one_array(column) for column in _rows(own, group)]
            if not _pieces.is_lazy(_row(columns, group[0])):
                found = kernel(scalars, numbers, _rows(columns, group), wide)
            elif len(group) == 1:
                found = [of_row(scalars, numbers, _row(columns, group[0]), wide)]
            else:
                rows = [_pieces.whole(_row(columns, i)) for i in group]
                found = kernel(scalars, numbers, list(map(list, zip(*rows, strict=True))), wide)
            for i, result in zip(group, found, strict=True):
                results[i] = result
        if by_leaf:
            return results
        results = [x for x, leaf in zip(results, leaves, strict=True) if leaf.size]
        if not results:
            empty = [jnp.zeros(0, wide)] * len(trees)
            own = [[jnp.zeros((), wide)] for _ in own]
            return kernel(scalars, own, _as_columns(empty), wide)[0].astype(wide)
        try:
            return _together(results, kind, wide)
        except ValueError:  # leaves lie on several devices: their numbers meet on the first
            if _checks.is_traced(results):
                raise
            home = results[0].sharding
            return _together([jax.device_put(x, home) for x in results], kind, wide)

    return on_trees


_MEETING = {"sum": jnp.add, "max": jnp.maximum, "min": jnp.minimum}


def _named(function: Any, formula: Callable[..., Any], **options: Any) -> Any:
    """The function compiled under the name of a formula."""
    name = getattr(getattr(formula, "func", formula), "__name__", "<lambda>")
    function.__name__ = function.__qualname__ = "formula" if name == "<lambda>" else name
    return jax.jit(function, **options)


def _row(columns: Sequence[Sequence[Any]], i: int) -> list[Any]:
    return [column[i] for column in columns]


def _rows(columns: Sequence[list[Any]], indices: Sequence[int]) -> list[list[Any]]:
    """Some rows, as columns."""
    if all(len(column) == len(indices) for column in columns):
        return list(columns)
    return [[column[i] for i in indices] for column in columns]


def _parted(scalars: Sequence[Any], count: int) -> tuple[list[Any], list[list[Any]]]:
    """The numbers that all leaves share, None where each has one, and columns of these.

    A number for each of `count` leaves is a floating array with one axis, as `_checks.by_leaf`
    makes it; a random key may be an array of integers.
    """
    shared: list[Any] = [_as_one_dtype(c) for c in scalars]
    columns = []
    for i, c in enumerate(shared):
        is_array = isinstance(c, np.ndarray | jax.Array) and c.ndim == 1
        if is_array and jnp.issubdtype(c.dtype, jnp.floating):
            if len(c) != count:
                raise ValueError(f"{len(c)} numbers for {count} leaves: give one for each")
            columns.append([_as_one_dtype(x) for x in c] if isinstance(c, np.ndarray) else list(c))
            shared[i] = None
    return _settled(shared), columns


def _filled(shared: Sequence[Any], own: Sequence[Any], count: int) -> list[list[Any]]:
    """The numbers of each leaf: its own where those that are shared have a gap, and after them."""
    rows = zip(*own, strict=True) if own else [()] * count
    found = []
    for row in rows:
        numbers = iter(row)
        found.append([next(numbers) if c is None else c for c in shared] + list(numbers))
    return found


def _as_columns(row: Sequence[Any]) -> list[list[Any]]:
    return [[x] for x in row]


def _as_one_array(numbers: Sequence[Any]) -> Any:
    """Known numbers of one dtype as an array, which is one argument of a program, not many."""
    alike = len(numbers) > 1 and isinstance(numbers[0], np.generic)
    return np.array(numbers) if alike and len(set(map(type, numbers))) == 1 else numbers


def _as_one_dtype(c: Any) -> Any:
    """A plain number in a fixed dtype, so that all plain numbers share one program."""
    if not isinstance(c, int | float | np.floating | np.signedinteger):
        return c
    with np.errstate(over="ignore"):
        return np.float64(c) if jax.config.read("jax_enable_x64") else np.float32(c)


def _settled(scalars: list[Any]) -> list[Any]:
    """Traced numbers as parts of one array, which is computed once, not for every leaf."""
    together: dict[Any, list[int]] = {}
    for i, c in enumerate(scalars):
        if _checks.is_traced(c) and jnp.issubdtype(c.dtype, jnp.floating) and jnp.ndim(c) == 0:
            together.setdefault(c.dtype, []).append(i)
    for places in together.values():
        found = settled([scalars[i] for i in places])
        for i, c in zip(places, found, strict=True):
            scalars[i] = c
    return scalars


def _number(c: Any, wide: Any) -> Any:
    """A scalar in the dtype of arithmetic; a key or an unsigned integer as it is."""
    array = jnp.asarray(c)
    is_other = jnp.issubdtype(array.dtype, jnp.unsignedinteger) or jnp.issubdtype(
        array.dtype, jax.dtypes.prng_key
    )
    return array if is_other else array.astype(wide)


def _widened(leaves: Sequence[Array], wide: Any) -> list[Array]:
    return [leaf if leaf.dtype == bool else leaf.astype(wide) for leaf in leaves]


def _of_shape(x: Any, like: Array) -> Array:
    """What a formula returns, refused unless it is real and has a number for every entry."""
    x = jnp.asarray(x)
    if x.shape != like.shape:
        raise ValueError(
            f"the formula returns an array of shape {x.shape} for arrays of shape {like.shape}: it "
            "must return one number for every entry"
        )
    if _checks.is_complex(x):
        raise TypeError(f"the formula returns {x.dtype}, and weights are real numbers")
    return x


def _places(x: Array, start: Any) -> Array:
    """The flat indices of entries, where they lie."""
    places, stride = jnp.asarray(start), 1
    for axis in reversed(range(x.ndim)):
        along = jax.lax.broadcasted_iota(
            jnp.uint32, x.shape, axis, out_sharding=jax.typeof(x).sharding
        )
        places, stride = places + along * jnp.uint32(stride), stride * x.shape[axis]
    return places


def _reduced(terms: Any, kind: str, wide: Any) -> Array:
    """One number of an array of terms, or one of each of several arrays."""
    if isinstance(terms, list | tuple):
        if kind == "sum" and all(x.dtype == wide for x in terms):
            return jnp.stack([jnp.sum(x) for x in row_sums(terms)])
        numbers = [_reduced(x, kind, wide) for x in terms]
        alike = len({x.dtype for x in numbers}) == 1
        return jnp.stack(numbers if alike else [x.astype(wide) for x in numbers])
    if kind == "sum":
        counted = terms.dtype == bool or jnp.issubdtype(terms.dtype, jnp.integer)
        return jnp.sum(terms, dtype=jnp.int32 if counted else wide)
    initial = -jnp.inf if kind == "max" else jnp.inf
    return (jnp.max if kind == "max" else jnp.min)(terms.astype(wide), initial=initial)


@jax.jit(static_argnums=(1, 2))
def _together(parts: Sequence[Array], kind: str, wide: Any) -> Array:
    """The numbers of each leaf, combined in pairs into the numbers of all."""
    rows = jnp.stack([part.astype(wide) for part in parts])
    while len(rows) > 1:
        even = len(rows) // 2 * 2
        met = _MEETING[kind](rows[0:even:2], rows[1:even:2])
        rows = jnp.concatenate([met, rows[even:]])
    return rows[0]
