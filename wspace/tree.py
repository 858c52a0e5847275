r"""Vector-space operations on trees of weights.

A tree is one vector $\theta \in \mathbb{R}^n$, its leaves the coordinate blocks. The dtype
policy of the whole library lives here: arithmetic runs in float32 (float64 if a leaf is
float64), results are rounded once to the dtype of the first tree's leaf, and scalars never
widen a leaf. NaN and infinities pass through to the entries that depend on them.
"""

import functools
import hashlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path
from jaxtyping import Array, DTypeLike, PyTree, UInt32

from wspace import _checks, _lazy, _padding
from wspace._numerics import accumulator, safe_sqrt
from wspace.typing import Coefficients, Scalar, ScalarLike, Weights, WeightsLike

__all__ = [
    "cast_like",
    "combine",
    "elementwise",
    "join",
    "norm",
    "partition",
    "per_leaf",
    "split_key_like",
    "upcast",
    "vdot",
]


def elementwise(
    formula: Callable[[Sequence[Scalar], Sequence[Array]], Array],
    *,
    rounded: bool = True,
    scope: Literal["entry", "row", "leaf"] = "entry",
) -> Callable[[Sequence[ScalarLike], Sequence[WeightsLike]], Weights]:
    r"""Lifts a formula on the entries of arrays to trees, under the dtype policy of this module.

    $$
    \theta_j = \operatorname{round}\bigl(f(c;\, \theta_{1j}, \dots, \theta_{kj})\bigr)
    $$

    Every leaf is one fused kernel, compiled once per shape; new scalars compile nothing. Leaves of
    very many shapes share kernels of a few lengths, to which they are padded.

    Args:
        formula: Takes the scalars and the arrays, both as sequences and in the dtype of the
            arithmetic, and returns an array of the arrays' shape. It must be a pure function,
            defined once: each new one compiles anew.
        rounded: Whether the result is rounded to the dtype of the first tree; else a leaf stays in
            that of the arithmetic, for what is computed on the way to a result.
        scope: What an entry of the result depends on: that `"entry"` of the arrays alone, its
            `"row"`, those that differ in their last index alone, or all of its `"leaf"`. The
            formula is given parts of leaves, or matrices of rows, in which zeros may follow, or
            whole leaves.

    Returns:
        The same formula on sequences of scalars and of trees of one layout, which returns a
            tree, each leaf in the dtype of that leaf of the first tree.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import tree
        >>> shrink = tree.elementwise(lambda scalars, arrays: arrays[0] / (1 + scalars[0]))
        >>> shrink([1.0], [{"w": jnp.array([4.0, 2.0])}])
        {'w': Array([2., 1.], dtype=float32)}
    """

    def dtype(_: Any, leaves: Sequence[Any]) -> Any:
        return leaves[0].dtype if rounded else accumulator(*(leaf.dtype for leaf in leaves))

    @jax.jit
    def on_leaves(scalars: Sequence[Any], leaves: Sequence[Array]) -> Array:
        wide = accumulator(*(leaf.dtype for leaf in leaves))
        result = formula(
            [jnp.asarray(c).astype(wide) for c in scalars], [leaf.astype(wide) for leaf in leaves]
        )
        return result.astype(dtype(scalars, leaves))

    padded = _padding.entrywise(rows=scope == "row")(on_leaves)
    kernel = on_leaves if scope == "leaf" else padded
    lifted = _lazy.entrywise(dtype, in_pieces=scope == "entry")(kernel)

    @_padding.few_programs
    def on_trees(scalars: Sequence[ScalarLike], trees: Sequence[WeightsLike]) -> Weights:
        return jax.tree.map(lambda *leaves: lifted(scalars, leaves), *trees)

    return on_trees


@elementwise
def _combination(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    terms = [c * x for c, x in zip(scalars, arrays, strict=True)]
    return functools.reduce(jnp.add, terms)


def combine(coefficients: Coefficients, points: Sequence[WeightsLike]) -> Weights:
    r"""Linear combination of points.

    $$
    \theta = \sum_i c_i\, \theta_i
    $$

    Linear in the points and in the coefficients; the sum is taken in the order given.

    Args:
        coefficients: The $c_i$, one a point, of any sign and any sum; never normalized.
        points: The $\theta_i$, trees of one layout, at least one.

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
    return _combination(_checks.scalars("coefficients", coefficients, len(points)), points)


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
    return _padding.mapped(lambda leaf: _cast(leaf, accumulator(leaf.dtype)), x)


def widened(*trees: PyTree) -> list[Any]:
    """Trees of any layouts in one dtype, that of arithmetic on all their leaves together."""
    leaves = [_lazy.array(leaf) for leaf in jax.tree.leaves(trees)]
    wide = accumulator(*(leaf.dtype for leaf in leaves))
    return [_padding.mapped(lambda leaf: _cast(leaf, wide), x) for x in trees]


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
    return _padding.mapped(lambda leaf, other: _cast(leaf, other.dtype), x, like)


def _cast(leaf: Any, dtype: DTypeLike) -> Any:
    leaf = _lazy.array(leaf)
    is_done = leaf.dtype == dtype or isinstance(leaf, _lazy.Lazy)
    return leaf.astype(dtype) if is_done else _cast_array(leaf, jnp.dtype(dtype))


@_padding.entrywise()
@functools.partial(jax.jit, static_argnums=1)
def _cast_array(x: Array, dtype: Any) -> Array:
    return x.astype(dtype)


@_lazy.reading
@_padding.reading
@functools.partial(jax.jit, static_argnums=2)
def _dot(x: Array, y: Array, wide: type) -> Scalar:
    return jnp.sum(x.astype(wide) * y.astype(wide))


@_padding.few_programs
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
        A scalar in at least float32. Products beyond its range are infinite or zero; entries
        between $10^{-18}$ and $10^{18}$ in size are safe.

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
    leaves, others = jax.tree.leaves(x), jax.tree.leaves(y)
    wide = accumulator(*(_lazy.array(leaf).dtype for leaf in (*leaves, *others)))
    sums = [_dot(a, b, wide) for a, b in zip(leaves, others, strict=True) if a.size]
    return jax.tree.reduce_associative(jnp.add, sums) if sums else jnp.zeros((), wide)


def norm(x: WeightsLike) -> Scalar:
    r"""Euclidean norm of a point over all leaves.

    $$
    \lVert x \rVert = \sqrt{\langle x, x \rangle}
    $$

    Args:
        x: The tree to measure.

    Returns:
        A scalar in at least float32, $0$ for a tree without entries; its gradient at the zero
        tree is zero. The range is that of [`vdot`][wspace.tree.vdot].

    Raises:
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import tree
        >>> tree.norm({"w": jnp.array([3.0]), "b": jnp.array(4.0)})
        Array(5., dtype=float32)
    """
    return safe_sqrt(vdot(x, x))


def partition(tree: PyTree) -> tuple[PyTree, PyTree]:
    """Splits a tree into its weights and the rest.

    Weights are the arrays of dtype float64, float32, bfloat16 or float16; the rest is every
    other leaf, such as counters, keys, flags and functions.

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
            raise ValueError(f"both weights and rest hold a leaf at {keystr(path) or '(root)'}")
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


class Passes(NamedTuple):
    """A function of trees as two passes over entries, with a solve of few numbers in between."""

    measure: Callable[..., tuple[Any, Any]]
    """Takes what the function takes; returns arrays for `solve`, and anything for `finish`."""
    solve: Callable[..., Any]
    finish: Callable[..., Any]
    """Takes what `solve` and `measure` returned, and returns what the function returns."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns."""
        numbers, rest = self.measure(*args, **kwargs)
        return self.finish(self.solve(*numbers), rest)


PASSES: dict[Callable[..., Any], Passes] = {}
"""For `per_leaf`: functions whose solve would be compiled for every leaf of a traced tree."""


def per_leaf(function: Callable[..., Any]) -> Callable[..., Any]:
    r"""The form of a function that treats every leaf as a point of its own.

    An array is a tree, so `per_leaf(slerp)` turns each tensor by its own angle, where `slerp`
    turns the whole model by one.

    Args:
        function: A function of trees. Its first argument is a tree, or, if annotated as a
            sequence as in [`average.mean`][wspace.average.mean], a sequence of trees.

    Returns:
        A function of the same arguments. Those with the structure of the first one's tree are
        taken apart, alone or in lists; others, such as scalars, are passed on. What `function`
        returns for a leaf comes back with a tree in place of each array.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import tree
        >>> tree.per_leaf(tree.norm)({"w": jnp.array([3.0, 4.0]), "b": jnp.array([2.0])})
        {'b': Array(2., dtype=float32), 'w': Array(5., dtype=float32)}
    """
    parameter = next(iter(inspect.signature(function).parameters.values()))
    takes_sequence = getattr(parameter.annotation, "__origin__", None) is Sequence

    @_padding.few_programs
    @functools.wraps(function)
    def leafwise(first: Any, *args: Any, **kwargs: Any) -> Any:
        one = first[0] if takes_sequence else first
        structure = jax.tree.structure(one)
        paths = [keystr(path) or "(root)" for path, _ in tree_leaves_with_path(one)]

        def leaves_of(argument: Any) -> list[Any]:
            if jax.tree.structure(argument) == structure:
                return jax.tree.leaves(argument)
            is_list = isinstance(argument, list | tuple) and len(argument) > 0
            if is_list and all(jax.tree.structure(x) == structure for x in argument):
                return [list(xs) for xs in zip(*map(jax.tree.leaves, argument), strict=True)]
            return [argument] * structure.num_leaves

        if takes_sequence:
            firsts = [list(xs) for xs in zip(*map(jax.tree.leaves, first), strict=True)]
        else:
            firsts = jax.tree.leaves(first)
        rows = zip(*map(leaves_of, args), strict=True) if args else [()] * structure.num_leaves
        options = {name: leaves_of(value) for name, value in kwargs.items()}
        if not firsts:
            return first
        passes = PASSES.get(function) if _checks.is_traced(first, args, kwargs) else None
        called = passes.measure if passes else function
        results = []
        for i, (x, row) in enumerate(zip(firsts, rows, strict=True)):
            try:
                results.append(called(x, *row, **{k: values[i] for k, values in options.items()}))
            except (TypeError, ValueError) as error:
                error.add_note(f"where (root) is leaf {paths[i]}, taken by itself")
                raise
        if passes:
            numbers, rests = zip(*results, strict=True)
            solved = jax.vmap(passes.solve)(*jax.tree.map(lambda *xs: jnp.stack(xs), *numbers))
            results = [
                passes.finish(jax.tree.map(lambda x, i=i: x[i], solved), rest)
                for i, rest in enumerate(rests)
            ]
        inner = jax.tree.structure(results[0])
        return jax.tree.transpose(structure, inner, structure.unflatten(results))

    return leafwise


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

    def fold(path: Any, _: Any) -> Array:
        digest = hashlib.sha256(keystr(path).encode()).digest()
        return _folded(key, np.frombuffer(digest, "<u4", 2))

    return tree_map_with_path(fold, x)


@jax.jit
def _folded(key: Array, words: UInt32[Array | np.ndarray, "2"]) -> Array:
    return functools.reduce(jax.random.fold_in, words, key)
