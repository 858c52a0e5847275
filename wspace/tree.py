r"""Vector-space operations on trees of weights.

A tree is one vector $\theta \in \mathbb{R}^n$, its leaves the coordinate blocks. All that is
computed of entries goes through two functions, [`elementwise`][wspace.tree.elementwise] and
[`reduction`][wspace.tree.reduction], with one policy: arithmetic runs in float32 (float64 if a leaf
is float64), results are rounded once to the dtype of the first tree's leaf, and scalars never widen
a leaf. NaN and infinities pass through to the entries that depend on them.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path
from jaxtyping import Array, Bool, DTypeLike, Key, PyTree, UInt32

from wspace import _checks, _pieces
from wspace._lazy import Lazy
from wspace._numerics import Wide, accumulator, plus, row_sums, safe_sqrt, settled
from wspace._per_leaf import per_leaf
from wspace.typing import Coefficients, Scalar, ScalarLike, Weights, WeightsLike

__all__ = [
    "cast_like",
    "combine",
    "elementwise",
    "join",
    "norm",
    "partition",
    "per_leaf",
    "reduction",
    "split_key_like",
    "upcast",
    "vdot",
]


def elementwise(
    formula: Callable[..., Any],
    *,
    rounded: bool = True,
    scope: Literal["entry", "leaf"] = "entry",
    placed: bool = False,
) -> Callable[..., Any]:
    r"""Lifts a formula on the entries of arrays to trees, under the dtype policy of this module.

    $$
    \theta_j = \operatorname{round}\bigl(f(c;\, \theta_{1j}, \dots, \theta_{kj})\bigr)
    $$

    A leaf is one fused pass over memory, compiled once per shape; new scalars compile nothing.
    Small leaves of rare shapes share a program. Leaves keep their device and sharding. Where a
    leaf is lazy, as in [`checkpoint.stream`][wspace.checkpoint.stream], so is the result: it is
    computed when it is read, piece by piece.

    Args:
        formula: Takes the scalars and the arrays, both as sequences and in the dtype of the
            arithmetic, and returns an array of the arrays' shape, or a sequence of such arrays, for
            several trees made in one pass. It must be a pure function, defined once: each new one
            compiles anew. Its name is the program's in profiles. Boolean arrays and results, which
            are masks, stay boolean; keys and unsigned integers among the scalars stay what they
            are.
        rounded: Whether the result is rounded to the dtype of the first tree, and the i-th of
            several to that of the i-th tree; else leaves stay in the dtype of the arithmetic, for
            what is computed on the way to a result.
        scope: What an entry of the result depends on: the same `"entry"` of the arrays alone, so
            that the formula may be given parts of leaves; or all of its `"leaf"`, which the formula
            is given whole.
        placed: Whether the formula takes, as a third argument, the flat index of every entry in
            its leaf, an array of unsigned integers.

    Returns:
        The same formula on trees: it takes a sequence of scalars and a sequence of trees of one
            layout, and as a third argument, if there are any, a sequence of trees with one scalar
            for each leaf, which follow the other scalars. It returns a tree, or a list of several.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import tree
        >>> shrink = tree.elementwise(lambda scalars, arrays: arrays[0] / (1 + scalars[0]))
        >>> shrink([1.0], [{"w": jnp.array([4.0, 2.0])}])
        {'w': Array([2., 1.], dtype=float32)}
    """

    def cast(x: Array, like: Array, wide: Wide) -> Array:
        return x if x.dtype == bool else x.astype(like.dtype if rounded else wide)

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
        numbers = zip(*own, strict=True) if own else [()] * len(rows)
        return [
            on_leaf([*scalars, *row_numbers], leaves, start)
            for row_numbers, leaves in zip(numbers, rows, strict=True)
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
        scalars: Sequence[ScalarLike | Bool[Array, ""] | Key[Array, ""]],
        trees: Sequence[PyTree],
        each: Sequence[PyTree] = (),
    ) -> Any:
        scalars = _settled([_as_one_dtype(c) for c in scalars])
        first, *others = trees
        leaves, structure = jax.tree.flatten(first)
        columns = [leaves, *map(structure.flatten_up_to, others)]
        own = list(map(structure.flatten_up_to, each))
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
    r"""Lifts a formula on the entries of arrays to a sum over all entries of trees.

    $$
    s = \sum_j f(c;\, \theta_{1j}, \dots, \theta_{kj})
    $$

    A leaf is read once, in one fused pass, for all the sums that the formula asks for; no tree of
    terms is written. Sums run in the dtype of arithmetic on all leaves together, short rows first,
    and the sums of leaves are added in pairs, so that neither large nor many leaves lose digits.
    No leaf is reshaped across devices: sharded leaves are reduced where they lie. Lazy leaves are
    read one by one.

    Args:
        formula: Takes the scalars and the arrays, as in
            [`elementwise`][wspace.tree.elementwise], and returns an array of terms of the arrays'
            shape, or a sequence of such arrays. Booleans and integers are counted exactly in each
            leaf of fewer than $2^{31}$ entries.
        kind: Whether terms are added, or the largest or the least one is taken.

    Returns:
        The same formula on trees: it takes a sequence of scalars and a sequence of trees of one
            layout, and returns one number, or an array of as many as there are sequences of terms,
            in at least float32; for trees without entries 0, or for the largest and the least term
            an infinity. With `by_leaf=True` it returns a list with the numbers of every leaf.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import tree
        >>> moments = tree.reduction(lambda _, arrays: (arrays[0], arrays[0] ** 2))
        >>> moments((), [{"w": jnp.array([3.0, 1.0]), "b": jnp.array(2.0)}])
        Array([ 6., 14.], dtype=float32)
    """

    def on_leaf(scalars: Sequence[Any], leaves: Sequence[Array], wide: Any) -> Array:
        terms = formula([_number(c, wide) for c in scalars], _widened(leaves, wide))
        return _reduced(terms, kind, wide)

    def on_leaves(scalars: Sequence[Any], columns: Sequence[Any], wide: Any) -> list[Array]:
        return [on_leaf(scalars, leaves, wide) for leaves in zip(*columns, strict=True)]

    kernel = _named(on_leaves, formula, static_argnums=2)

    def of_row(scalars: Sequence[Any], row: Sequence[Any], wide: Any) -> Array:
        """The numbers of a leaf that is lazy, in pieces where it does not matter how they meet."""
        like = [jax.ShapeDtypeStruct((), leaf.dtype) for leaf in row]
        (terms,) = jax.eval_shape(kernel, scalars, _as_columns(like), wide)
        exact = jnp.issubdtype(terms.dtype, jnp.integer)
        if not exact and kind == "sum":
            return kernel(scalars, _as_columns(_pieces.whole(row)), wide)[0]
        parts = [kernel(scalars, _as_columns(part), wide)[0] for part in _pieces.entries(row)]
        return functools.reduce(_MEETING[kind], parts)

    def on_trees(
        scalars: Sequence[ScalarLike | Bool[Array, ""] | Key[Array, ""]],
        trees: Sequence[PyTree],
        *,
        by_leaf: bool = False,
    ) -> Any:
        scalars = _settled([_as_one_dtype(c) for c in scalars])
        first, *others = trees
        leaves, structure = jax.tree.flatten(first)
        columns = [leaves, *map(structure.flatten_up_to, others)]
        wide = accumulator(*{leaf.dtype for column in columns for leaf in column})
        results: list[Any] = [None] * len(leaves)
        for group in _pieces.groups(columns):
            if not _pieces.is_lazy(_row(columns, group[0])):
                found = kernel(scalars, _rows(columns, group), wide)
            elif len(group) == 1:
                found = [of_row(scalars, _row(columns, group[0]), wide)]
            else:
                rows = [_pieces.whole(_row(columns, i)) for i in group]
                found = kernel(scalars, list(map(list, zip(*rows, strict=True))), wide)
            for i, result in zip(group, found, strict=True):
                results[i] = result
        if by_leaf:
            return results
        results = [x for x, leaf in zip(results, leaves, strict=True) if leaf.size]
        if not results:
            empty = [jnp.zeros(0, wide)] * len(trees)
            return kernel(scalars, _as_columns(empty), wide)[0].astype(wide)
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


def _combination(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    terms = [c * x for c, x in zip(scalars, arrays, strict=True)]
    return functools.reduce(jnp.add, terms)


weighted_sum = elementwise(_combination)
"""`combine` without checks, for scalars that are known to be right, or traced."""

_wide_sum = elementwise(_combination, rounded=False)


@elementwise
def displaced(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    """A point plus a multiple of a displacement, bit for bit the point where that is zero."""
    (c,), (x, way) = scalars, arrays
    return plus(x, c * way)


def combine(
    coefficients: Coefficients, points: Sequence[WeightsLike], *, rounded: bool = True
) -> Weights:
    r"""Linear combination of points.

    $$
    \theta = \sum_i c_i\, \theta_i
    $$

    Linear in the points and in the coefficients; the sum is taken in the order given.

    Args:
        coefficients: The $c_i$, one a point, of any sign and any sum; never normalized.
        points: The $\theta_i$, trees of one layout, at least one.
        rounded: Whether the result is rounded to the dtypes of the first point; else it stays in
            the dtype of the arithmetic, for differences that half precision would round away.

    Returns:
        The combination, each leaf in the dtype of that leaf of the first point.

    Raises:
        ValueError: If the counts differ or are zero, a known coefficient is not finite, or the
            points differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import tree
        >>> tree.combine((1.0, -1.0), ({"w": jnp.array([3.0])}, {"w": jnp.array([1.0])}))
        {'w': Array([2.], dtype=float32)}
    """
    points = _checks.listed("points", points)
    _checks.same_layout(**_checks.each("points", points))
    scalars = _checks.scalars("coefficients", coefficients, len(points))
    return (weighted_sum if rounded else _wide_sum)(scalars, points)


def upcast(x: WeightsLike) -> Weights:
    """The same weights in the dtype that arithmetic runs in.

    Args:
        x: The tree to cast.

    Returns:
        Float64 leaves unchanged, all others as float32.

    Raises:
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import tree
        >>> tree.upcast({"w": jnp.ones(2, jnp.bfloat16)})
        {'w': Array([1., 1.], dtype=float32)}
    """
    _checks.same_layout(x=x)
    return jax.tree.map(lambda leaf: _cast(leaf, accumulator(leaf.dtype)), x)


def widened(*trees: PyTree) -> list[Any]:
    """Trees of any layouts in one dtype, in which arithmetic on all of them runs."""
    leaves = jax.tree.leaves(trees)
    wide = accumulator(*(leaf.dtype for leaf in leaves))
    return [jax.tree.map(lambda leaf: _cast(leaf, wide), x) for x in trees]


def in_one_dtype(*trees: WeightsLike) -> list[Any]:
    """Trees for several passes: as they are, or widened if arithmetic on them is in two dtypes."""
    dtypes = {accumulator(leaf.dtype) for leaf in jax.tree.leaves(trees)}
    return widened(*trees) if len(dtypes) > 1 else list(trees)


def cast_like(x: WeightsLike, like: WeightsLike) -> Weights:
    """The weights `x`, each leaf rounded to the dtype of that leaf of `like`.

    Args:
        x: The tree to cast.
        like: A tree of the same layout.

    Returns:
        The values of `x` in the dtypes of `like`.

    Raises:
        ValueError: If the trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import tree
        >>> tree.cast_like(jnp.ones(2), jnp.zeros(2, jnp.bfloat16))
        Array([1, 1], dtype=bfloat16)
    """
    _checks.same_layout(x=x, like=like)
    return jax.tree.map(lambda leaf, other: _cast(leaf, other.dtype), x, like)


def _cast(leaf: Any, dtype: DTypeLike) -> Any:
    leaf, dtype = _pieces.array(leaf), jax.dtypes.canonicalize_dtype(dtype)
    if leaf.dtype == dtype:
        return leaf
    if isinstance(leaf, Lazy):
        return _pieces.put_off(lambda given, _: _cast_array(given[0], dtype), [leaf], True)
    return _cast_array(leaf, dtype)


def lazily(leaf: Any, wide: Wide) -> Lazy:
    """A leaf as a lazy one in a dtype of arithmetic."""
    if isinstance(leaf, Lazy) and leaf.dtype == wide:
        return leaf
    return _pieces.put_off(lambda given, _: _cast_array(given[0], jnp.dtype(wide)), [leaf], True)


@jax.jit(static_argnums=1)
def _cast_array(x: Array, dtype: Any) -> Array:
    return x.astype(dtype)


@reduction
def _products(_: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    x, y = arrays
    return x * y


def vdot(x: WeightsLike, y: WeightsLike) -> Scalar:
    r"""Inner product of two points over all leaves.

    $$
    \langle x, y \rangle = \sum_j x_j\, y_j
    $$

    Symmetric and bilinear. No leaf is reshaped, so sharded leaves are reduced where they lie;
    the sums of the leaves are added in pairs, so that thousands of leaves lose no digits.

    Args:
        x: First tree.
        y: Second tree, of the same layout.

    Returns:
        A scalar in at least float32. The sum and its terms must be in the range of its dtype: in
        float32, norms up to $1.8 \cdot 10^{19}$ however many entries there are, beyond which it
        is infinite, and entries from $10^{-18}$ on, since squares of less than $10^{-38}$ count as
        zero.

    Raises:
        ValueError: If the trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import tree
        >>> tree.vdot({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 4.0])})
        Array(11., dtype=float32)
    """
    _checks.same_layout(x=x, y=y)
    return _products((), (x, y))


def norm(x: WeightsLike) -> Scalar:
    r"""Euclidean norm of a point over all leaves.

    $$
    \lVert x \rVert = \sqrt{\langle x, x \rangle}
    $$

    Args:
        x: The tree to measure.

    Returns:
        A scalar in at least float32, $0$ for a tree without entries; its gradient at the zero
        tree is zero. The range is the same as for [`vdot`][wspace.tree.vdot].

    Raises:
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import tree
        >>> tree.norm({"w": jnp.array([3.0]), "b": jnp.array(4.0)})
        Array(5., dtype=float32)
    """
    _checks.floating_leaves(x=x)
    return safe_sqrt(_products((), (x, x)))


def partition(tree: PyTree) -> tuple[PyTree, PyTree]:
    """Splits a tree into its weights and the rest.

    Weights are the arrays of dtype float64, float32, bfloat16 or float16; the rest is every
    other leaf, such as counters, keys, flags and functions. Weights that NumPy holds in the other
    byte order come in the order of the machine, which JAX takes.

    Args:
        tree: Any tree.

    Returns:
        Two trees of the shape of `tree`, with `None` wherever a leaf is in the other one.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import tree
        >>> tree.partition({"w": jnp.ones(1), "step": 7})
        ({'step': None, 'w': Array([1.], dtype=float32)}, {'step': 7, 'w': None})
    """
    tree = jax.tree.map(_checks.native, tree)
    return (
        jax.tree.map(lambda leaf: leaf if _checks.is_weight(leaf) else None, tree),
        jax.tree.map(lambda leaf: None if _checks.is_weight(leaf) else leaf, tree),
    )


def join(weights: PyTree, rest: PyTree) -> PyTree:
    """Puts a partitioned tree together again.

    `join(*partition(tree))` is `tree`.

    Args:
        weights: The first result of [`partition`][wspace.tree.partition], or a tree like it.
        rest: The second result.

    Returns:
        The tree with the leaves of both.

    Raises:
        ValueError: If the trees differ in structure, or both hold a leaf at one place.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import tree
        >>> tree.join({"w": jnp.ones(1), "step": None}, {"w": None, "step": 7})
        {'step': 7, 'w': Array([1.], dtype=float32)}
    """

    def pick(path: Any, leaf: Any, other: Any) -> Any:
        if leaf is not None and other is not None:
            raise ValueError(f"both weights and rest hold a leaf at {_checks.path_of(path)}")
        return other if leaf is None else leaf

    def is_none(node: Any) -> bool:
        return node is None

    structures = [jax.tree.structure(x, is_leaf=is_none) for x in (weights, rest)]
    if structures[0] != structures[1]:
        raise ValueError(
            "weights and rest differ in structure, so they are not of one partition: "
            f"{structures[0]} and {structures[1]}"
        )
    return tree_map_with_path(pick, weights, rest, is_leaf=is_none)


def split_key_like(key: Array, x: PyTree) -> PyTree:
    """An independent random key for every leaf of a tree, derived from the leaf's path.

    The key of a leaf depends on `key` and on the path of the leaf alone, so that adding,
    removing or sharding one leaf changes the key of no other.

    Args:
        key: A random key.
        x: Any tree.

    Returns:
        A tree of keys with the structure of `x`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from wspace import tree
        >>> keys = tree.split_key_like(jax.random.key(0), {"w": jnp.ones(1)})
        >>> more = tree.split_key_like(jax.random.key(0), {"w": jnp.ones(1), "b": jnp.ones(1)})
        >>> bool(keys["w"] == more["w"])
        True
    """
    places = tree_leaves_with_path(x)
    digests = [hashlib.sha256(keystr(path).encode()).digest() for path, _ in places]
    words = np.array([np.frombuffer(digest, "<u4", 2) for digest in digests]).reshape(-1, 2)
    return jax.tree.structure(x).unflatten(_folded(key, words) if places else [])


@jax.jit
def _folded(key: Array, words: UInt32[Array | np.ndarray, "n 2"]) -> list[Array]:
    def fold(pair: Any) -> Array:
        return functools.reduce(jax.random.fold_in, pair, key)

    return list(jax.vmap(fold)(words))
