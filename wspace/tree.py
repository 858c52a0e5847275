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
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import (
    keystr,
    tree_flatten_with_path,
    tree_leaves_with_path,
    tree_map_with_path,
)
from jaxtyping import Array, Bool, DTypeLike, Key, PyTree, UInt32

from wspace import _checks, _lift, _pieces
from wspace._lazy import Lazy
from wspace._names import by_depth, by_name
from wspace._numerics import Wide, accumulator, in_jax, plus, safe_sqrt
from wspace._per_leaf import per_leaf
from wspace._words import described, layout_of, shortened
from wspace.typing import LeafCoefficients, Scalar, ScalarLike, Weights, WeightsLike

__all__ = [
    "by_depth",
    "by_name",
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

_Number: TypeAlias = (
    ScalarLike | Bool[Array, ""] | Key[Array, ""] | UInt32[Array | np.ndarray, " _"]
)
"""A number, a truth value, or a random key, also one of `jax.random.PRNGKey`."""


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
            several to the dtype of the i-th tree; else leaves stay in the dtype of the arithmetic,
            for what is computed on the way to a result.
        scope: What an entry of the result depends on: the same `"entry"` of the arrays alone, so
            that the formula may be given parts of leaves; or all of its `"leaf"`, which the formula
            is given whole.
        placed: Whether the formula takes, as a third argument, the flat index of every entry in
            its leaf, an array of unsigned integers.

    Returns:
        The same formula on trees. It takes a sequence of scalars and a sequence of trees of one
            layout, and as a third argument, if there are any, a sequence of trees with one scalar
            for each leaf, which follow the other scalars. It returns a tree, or a list of several.
            It raises `ValueError` if the trees differ in structure or in a leaf's shape, and
            `TypeError` if a leaf is neither floating-point nor boolean, or a scalar no number.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import tree
        >>> shrink = tree.elementwise(lambda scalars, arrays: arrays[0] / (1 + scalars[0]))
        >>> shrink([1.0], [{"w": jnp.array([4.0, 2.0])}])
        {'w': Array([2., 1.], dtype=float32)}
    """
    lifted = _lift.elementwise(formula, rounded=rounded, scope=scope, placed=placed)

    def on_trees(
        scalars: Sequence[_Number],
        trees: Sequence[PyTree],
        each: Sequence[PyTree] = (),
    ) -> Any:
        scalars, trees = _given(scalars, trees)
        return lifted(scalars, trees, _numbers_of_leaves(each, trees[0]))

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
        The same formula on trees. It takes a sequence of scalars and a sequence of trees of one
            layout, and returns one number, or an array of as many as there are sequences of terms,
            in at least float32; for trees without entries 0, or for the largest and the least term
            an infinity. With `by_leaf=True` it returns a list with the numbers of every leaf. It
            raises what a formula on entries does.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import tree
        >>> moments = tree.reduction(lambda _, arrays: (arrays[0], arrays[0] ** 2))
        >>> moments((), [{"w": jnp.array([3.0, 1.0]), "b": jnp.array(2.0)}])
        Array([ 6., 14.], dtype=float32)
    """
    lifted = _lift.reduction(formula, kind=kind)

    def on_trees(
        scalars: Sequence[_Number],
        trees: Sequence[PyTree],
        *,
        by_leaf: bool = False,
    ) -> Any:
        return lifted(*_given(scalars, trees), by_leaf=by_leaf)

    return on_trees


def _combination(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    terms = [c * x for c, x in zip(scalars, arrays, strict=True)]
    return functools.reduce(jnp.add, terms)


def _given(scalars: Sequence[Any], trees: Sequence[PyTree]) -> tuple[list[Any], list[PyTree]]:
    """The arguments of a lifted formula: numbers, and trees of weights or masks of one layout."""
    trees = _checks.listed("trees", trees)
    _checks.same_layout(_checks.WEIGHTS_AND_MASKS, **_checks.each("trees", trees))
    _checks.ordered("scalars", scalars)
    for i, c in enumerate(scalars):
        _checks.single(f"scalars[{i}]", c)
    return list(scalars), trees


def _numbers_of_leaves(each: Sequence[PyTree], like: PyTree) -> list[PyTree]:
    """Trees with one number at each leaf of `like`."""
    each = _checks.listed("each", each) if len(each) else []
    for name, numbers in _checks.each("each", each).items():
        for number, _, where in _checks.entries(name, numbers, like, "one number a leaf"):
            _checks.single(where, number)
    return each


weighted_sum = _lift.elementwise(_combination)
"""`combine` without checks, for scalars that are known to be right, or traced."""

_wide_sum = _lift.elementwise(_combination, rounded=False)


@_lift.elementwise
def displaced(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    """A point plus a multiple of a displacement, bit for bit the point where that is zero."""
    (c,), (x, way) = scalars, arrays
    return plus(x, c * way)


def combine(
    coefficients: LeafCoefficients, points: Sequence[WeightsLike], *, rounded: bool = True
) -> Weights:
    r"""Linear combination of points.

    $$
    \theta = \sum_i c_i\, \theta_i
    $$

    Linear in the points and in the coefficients; the sum is taken in the order given.

    Args:
        coefficients: The $c_i$, one a point or one for each of its [leaves][wspace.typing.ByLeaf],
            of any sign and any sum; never normalized.
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
    scalars = _checks.scalars("coefficients", coefficients, len(points), points[0])
    return (weighted_sum if _checks.flag("rounded", rounded) else _wide_sum)(scalars, points)


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
    leaf, dtype = _pieces.array(leaf), in_jax(dtype)
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


@_lift.reduction
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
        A scalar in at least float32. The sum and its terms must be in the range of its dtype. In
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


def partition(
    tree: PyTree, where: str | Sequence[str] | Callable[[str, Any], Any] | None = None
) -> tuple[PyTree, PyTree]:
    """Splits a tree into its weights and the rest.

    Weights are the arrays of dtype float64, float32, bfloat16 or float16; the rest is every
    other leaf, such as counters, keys, flags and functions. Weights that NumPy holds in the other
    byte order come in the order of the machine, which JAX takes.

    What is floating-point need not be a weight: statistics of batch norms and moments of an
    optimizer are set aside by `where`, which chooses among the arrays above.

    Args:
        tree: Any tree.
        where: Which of the arrays are weights: a function of the name and the array, or a glob or
            several, with `*`, `?` and `[...]`, one of which matches the name. A glob that begins
            with `!` sets aside what the rest of it matches; where all do, all else are weights. The
            name of a leaf is its keys, places and fields joined by dots, as in
            `"layers.0.weight"`. All if `None`.

    Returns:
        Two trees of the shape of `tree`, with `None` wherever a leaf is in the other one.

    Raises:
        ValueError: If a glob matches no leaf.
        TypeError: If `where` is neither a function nor globs, or its answer is not known when
            tracing, since it decides structure.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import tree
        >>> tree.partition({"w": jnp.ones(1), "step": 7})
        ({'step': None, 'w': Array([1.], dtype=float32)}, {'step': 7, 'w': None})
        >>> state = {"norm": {"mean": jnp.zeros(1), "scale": jnp.ones(1)}}
        >>> weights, rest = tree.partition(state, where="!*.mean")
        >>> weights, tree.join(weights, rest) == state
        ({'norm': {'mean': None, 'scale': Array([1.], dtype=float32)}}, True)
    """
    tree = jax.tree.map(_checks.native, tree)
    places, structure = tree_flatten_with_path(tree)
    names = [_checks.name_of(path) for path, _ in places]
    is_chosen = where if callable(where) else _by_globs(where, names)
    chosen = [
        _checks.is_weight(leaf) and _checks.known_answer("where", path, is_chosen(name, leaf))
        for name, (path, leaf) in zip(names, places, strict=True)
    ]
    first = [leaf if own else None for own, (_, leaf) in zip(chosen, places, strict=True)]
    second = [None if own else leaf for own, (_, leaf) in zip(chosen, places, strict=True)]
    return structure.unflatten(first), structure.unflatten(second)


def _by_globs(globs: Any, names: Sequence[str]) -> Callable[[str, Any], bool]:
    """Whether a name is chosen by globs, each of which has to match one of the names."""
    if globs is None:
        return lambda *_: True
    globs = [globs] if isinstance(globs, str) else globs
    if not isinstance(globs, Sequence) or not all(isinstance(glob, str) for glob in globs):
        raise TypeError(
            "where must be a function of name and leaf, a glob or a sequence of globs, such as "
            f"'!*.mean', got {described(globs)}"
        )
    for glob in globs:
        if not any(_checks.matches(name, [glob.removeprefix("!")]) for name in names):
            raise ValueError(
                f"where has the glob {shortened(repr(glob))}, which matches no leaf: names are "
                "keys, places and fields joined by dots, such as "
                f"{shortened(', '.join(map(repr, names[:3])), 160) or 'none here'}"
            )
    chosen = [glob for glob in globs if not glob.startswith("!")]
    aside = [glob.removeprefix("!") for glob in globs if glob.startswith("!")]
    return lambda name, _: (
        (not chosen or _checks.matches(name, chosen)) and not _checks.matches(name, aside)
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
            f"{layout_of(weights)} and {layout_of(rest)}"
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
    _checks.random_key(key)
    places = tree_leaves_with_path(x)
    digests = [hashlib.sha256(keystr(path).encode()).digest() for path, _ in places]
    words = np.array([np.frombuffer(digest, "<u4", 2) for digest in digests]).reshape(-1, 2)
    return jax.tree.structure(x).unflatten(_folded(key, words) if places else [])


@jax.jit
def _folded(key: Array, words: UInt32[Array | np.ndarray, "n 2"]) -> list[Array]:
    def fold(pair: Any) -> Array:
        return functools.reduce(jax.random.fold_in, pair, key)

    return list(jax.vmap(fold)(words))
