"""Hypothesis strategies for weights: layouts from a short list, values drawn freely.

A new shape costs a compilation, a new value costs nothing. No strategy calls a function of wspace:
what is drawn by the code under test would hide its mistakes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from hypothesis.strategies import SearchStrategy
from jaxtyping import DTypeLike, PyTree

__all__ = [
    "LAYOUTS",
    "coefficients",
    "dtypes",
    "keys",
    "pairs",
    "points",
    "tuned",
    "weights",
]

LAYOUTS: tuple[PyTree, ...] = (
    (3,),
    {"w": (4, 3), "b": (3,)},
    [{"scale": (), "none": None}, {"stack": (2, 3, 2), "empty": (0,)}],
    {"conv": (2, 1, 2, 3), "w": (3, 5)},
)
"""The layouts that strategies draw from: trees of shapes. A bare array; matrix and bias; a scalar,
`None`, a stack of matrices and a leaf without entries in nested containers; a convolution."""

ENTRIES = st.just(0.0) | st.floats(2**-10, 8, width=32) | st.floats(-8, -(2**-10), width=32)
STRIDES: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    lambda x: x,
    lambda x: np.array(x, order="F"),
    lambda x: x[..., ::-1].copy()[..., ::-1] if x.ndim else x,
    lambda x: np.repeat(x, 2, axis=-1)[..., ::2] if x.ndim else x,
)


def dtypes() -> SearchStrategy[np.dtype]:
    """The dtypes that weights have: float32, bfloat16, float16 and, where JAX has it on, float64.

    Returns:
        A strategy for dtypes, to be given as `dtype` to the other strategies.

    Examples:
        >>> from hypothesis import given, settings
        >>> from wspace import testing
        >>> @settings(max_examples=3, deadline=None)
        ... @given(points=testing.points(layout=(3,), dtype=testing.dtypes()))
        ... def test_points_have_onecanonical(points):
        ...     assert len({x.dtype for x in points}) == 1
        >>> test_points_have_onecanonical()
    """
    half = (np.dtype(np.float32), np.dtype(jnp.bfloat16), np.dtype(np.float16))
    return st.deferred(lambda: st.sampled_from((*half, np.dtype(float)) if _wide() else half))


def weights(
    layout: PyTree | None = None,
    dtype: DTypeLike | SearchStrategy | None = None,
    *,
    entries: SearchStrategy[float] = ENTRIES,
    numpy: bool = False,
) -> SearchStrategy[PyTree]:
    """Trees of weights, of one layout.

    Args:
        layout: A tree of shapes, such as `{"w": (4, 3), "b": (3,)}`, or a tree of arrays or
            `jax.ShapeDtypeStruct`, such as your model. By default drawn from
            [`LAYOUTS`][wspace.testing.LAYOUTS].
        dtype: The dtype of all leaves, or a strategy for it. By default the one of the layout, or
            float32, float64 where JAX has it on.
        entries: A strategy for float32 numbers. By default zero and numbers of magnitudes from
            2**-10 to 8, whose squares and products are normal in float32.
        numpy: Whether leaves are NumPy arrays, of various strides, instead of JAX arrays.

    Returns:
        A strategy for trees.

    Raises:
        TypeError: If the layout has a leaf that is neither shape nor floating-point array.

    Examples:
        >>> from hypothesis import given, settings
        >>> from wspace import testing, tree
        >>> @settings(max_examples=3, deadline=None)
        ... @given(x=testing.weights({"w": (4, 3), "b": (3,)}))
        ... def test_norm_is_positive(x):
        ...     assert tree.norm(x) >= 0
        >>> test_norm_is_positive()
    """
    if layout is None:
        some = st.sampled_from(LAYOUTS)
        return some.flatmap(lambda one: weights(one, dtype, entries=entries, numpy=numpy))
    if isinstance(dtype, SearchStrategy):
        return dtype.flatmap(lambda one: weights(layout, one, entries=entries, numpy=numpy))
    shapes, own, structure = described(layout)
    leaves = st.tuples(*(arrays(np.float32, shape, elements=entries) for shape in shapes))
    if numpy:
        strides = st.tuples(*(st.sampled_from(STRIDES) for _ in shapes))
        return st.tuples(leaves, strides).map(
            lambda drawn: structure.unflatten(
                stride(x.astype(canonical(dtype, kind)))
                for x, stride, kind in zip(*drawn, own, strict=True)
            )
        )
    return leaves.map(
        lambda xs: structure.unflatten(
            jnp.asarray(x.astype(canonical(dtype, kind))) for x, kind in zip(xs, own, strict=True)
        )
    )


def points(
    count: int | None = None,
    *,
    layout: PyTree | None = None,
    dtype: DTypeLike | SearchStrategy | None = None,
    numpy: bool = False,
) -> SearchStrategy[list[PyTree]]:
    """Several trees of one layout and dtype: unrelated, or at some distance from the first.

    The distances of the others from the first are 1, 1e-2, 1e-4 and 0, relative to random weights.

    Args:
        count: The number of trees, by default 1 to 4.
        layout: As in [`weights`][wspace.testing.weights].
        dtype: As in `weights`.
        numpy: As in `weights`.

    Returns:
        A strategy for lists of trees.

    Examples:
        >>> from hypothesis import given, settings
        >>> from wspace import average, testing
        >>> @settings(max_examples=3, deadline=None)
        ... @given(points=testing.points(3))
        ... def test_mean_of_three(points):
        ...     testing.check_permutation_invariant(average.mean, points)
        >>> test_mean_of_three()
    """
    return _points(count, layout, dtype, numpy)


@st.composite
def _points(draw: Callable[..., Any], count: Any, layout: Any, dtype: Any, numpy: bool) -> list:
    layout = draw(st.sampled_from(LAYOUTS)) if layout is None else layout
    dtype = draw(dtype) if isinstance(dtype, SearchStrategy) else dtype
    count = draw(st.integers(1, 4)) if count is None else count
    near, far = draw(st.sampled_from([(0, 1), (0, 1), (1, 1), (1, 1e-2), (1, 1e-4), (1, 0)]))
    first, *others = (draw(weights(layout, dtype, numpy=numpy)) for _ in range(count))
    return [first, *(_combined(near, first, far, other) for other in others)]


def pairs(
    *,
    layout: PyTree | None = None,
    dtype: DTypeLike | SearchStrategy | None = None,
    numpy: bool = False,
) -> SearchStrategy[tuple[PyTree, PyTree]]:
    """Two trees of one layout: unrelated, parallel, equal or nearly parallel.

    Nearly parallel ones, as fine-tunes of one base are, differ by 1e-2, 1e-4 and 1e-6 of random
    weights.

    Args:
        layout: As in [`weights`][wspace.testing.weights].
        dtype: As in `weights`.
        numpy: As in `weights`.

    Returns:
        A strategy for pairs of trees.

    Examples:
        >>> from hypothesis import given, settings
        >>> from wspace import interpolate, testing
        >>> @settings(max_examples=3, deadline=None)
        ... @given(pair=testing.pairs())
        ... def test_lerp_starts_and_ends_exactly(pair):
        ...     testing.check_exact_ends(interpolate.lerp, *pair)
        >>> test_lerp_starts_and_ends_exactly()
    """
    return _pairs(layout, dtype, numpy)


@st.composite
def _pairs(draw: Callable[..., Any], layout: Any, dtype: Any, numpy: bool) -> tuple:
    layout = draw(st.sampled_from(LAYOUTS)) if layout is None else layout
    dtype = draw(dtype) if isinstance(dtype, SearchStrategy) else dtype
    start, other = (draw(weights(layout, dtype, numpy=numpy)) for _ in range(2))
    near, far = draw(st.sampled_from([(0, 1), (0.5, 0), (1, 0), (1, 1e-2), (1, 1e-4), (1, 1e-6)]))
    return start, _combined(near, start, far, other)


def tuned(
    count: int | None = None,
    *,
    layout: PyTree | None = None,
    dtype: DTypeLike | SearchStrategy | None = None,
    numpy: bool = False,
) -> SearchStrategy[tuple[PyTree, list[PyTree]]]:
    """A base and models tuned from it, each at a distance of its own.

    The distances from the base are 1, 1e-1, 1e-2, 1e-3 and 0, relative to random weights.

    Args:
        count: The number of tuned models, by default 1 to 4.
        layout: As in [`weights`][wspace.testing.weights].
        dtype: As in `weights`.
        numpy: As in `weights`.

    Returns:
        A strategy for pairs of a tree and a list of trees.

    Examples:
        >>> from hypothesis import given, settings
        >>> from wspace import merge, testing
        >>> @settings(max_examples=3, deadline=None)
        ... @given(models=testing.tuned(2))
        ... def test_ties_is_odd(models):
        ...     testing.check_odd(lambda base, tuned: merge.ties(base, tuned), *models)
        >>> test_ties_is_odd()
    """
    return _tuned(count, layout, dtype, numpy)


@st.composite
def _tuned(draw: Callable[..., Any], count: Any, layout: Any, dtype: Any, numpy: bool) -> tuple:
    layout = draw(st.sampled_from(LAYOUTS)) if layout is None else layout
    dtype = draw(dtype) if isinstance(dtype, SearchStrategy) else dtype
    count = draw(st.integers(1, 4)) if count is None else count
    far = [draw(st.sampled_from([1, 1e-1, 1e-2, 1e-3, 0])) for _ in range(count)]
    base, *edits = (draw(weights(layout, dtype, numpy=numpy)) for _ in range(count + 1))
    return base, [_combined(1, base, a, edit) for a, edit in zip(far, edits, strict=True)]


def coefficients(count: int, *, positive: bool = False) -> SearchStrategy[list[float]]:
    r"""Mixing numbers, one per point.

    Of either sign by default, with a sum that is not small beside them:
    $\lvert \sum_i c_i \rvert > 0.2 \max_i \lvert c_i \rvert$. So an average enlarges the roundings
    of its points by $\sum_i \lvert c_i \rvert / \lvert \sum_i c_i \rvert < 5\,n$ at most.

    Args:
        count: The number of points, $n$.
        positive: Whether all numbers are positive.

    Returns:
        A strategy for lists of numbers.

    Examples:
        >>> from hypothesis import given, settings
        >>> from wspace import testing
        >>> @settings(max_examples=3, deadline=None)
        ... @given(c=testing.coefficients(3))
        ... def test_sum_is_not_zero(c):
        ...     assert sum(c) != 0
        >>> test_sum_is_not_zero()
    """
    number = st.sampled_from([0.25, 1.0, 3.0, 10.0]) if positive else st.floats(-2, 2, width=16)
    numbers = st.lists(number, min_size=count, max_size=count)
    if positive:
        return numbers
    return numbers.filter(lambda c: abs(sum(c)) > 0.2 * max(map(abs, c), default=0))


def keys() -> SearchStrategy[jax.Array]:
    """Keys of `jax.random`.

    Returns:
        A strategy for keys.

    Examples:
        >>> from hypothesis import given, settings
        >>> from wspace import perturb, testing, tree
        >>> @settings(max_examples=3, deadline=None)
        ... @given(key=testing.keys(), x=testing.weights((3,)))
        ... def test_noise_has_its_norm(key, x):
        ...     noise = perturb.gaussian(key, x, norm=1.0)
        ...     assert abs(tree.norm(noise) - 1) < 1e-5
        >>> test_noise_has_its_norm()
    """
    return st.integers(0, 2**32 - 1).map(jax.random.key)


def _combined(near: Any, x: PyTree, far: Any, y: PyTree) -> PyTree:
    """`near * x + far * y`, by NumPy, each leaf of the dtype and kind of `y`'s."""

    def combined(a: Any, b: Any) -> Any:
        entries = near * np.asarray(a, np.float64) + far * np.asarray(b, np.float64)
        rounded = entries.astype(b.dtype)
        return rounded if isinstance(b, np.ndarray) else jnp.asarray(rounded)

    return jax.tree.map(combined, x, y)


# Results are not annotated in full: a checker of types that looks at one entry of a list picks it
# at random, which Hypothesis forbids inside a strategy.
def described(layout: PyTree) -> tuple:
    """Shapes, dtypes where the layout has them, and the structure."""
    if any(hasattr(x, "shape") for x in jax.tree.leaves(layout)):
        named, structure = jax.tree.flatten_with_path(layout)
        for path, x in named:
            if not (hasattr(x, "shape") and jnp.issubdtype(x.dtype, jnp.floating)):
                raise TypeError(
                    f"leaf {jax.tree_util.keystr(path)} of layout is no floating-point array: "
                    "take the weights by wspace.tree.partition"
                )
        return [x.shape for _, x in named], [x.dtype for _, x in named], structure
    named, structure = jax.tree.flatten_with_path(layout, is_leaf=_is_shape)
    for path, x in named:
        if not _is_shape(x):
            raise TypeError(f"leaf {jax.tree_util.keystr(path)} of layout is no shape, got {x!r}")
    return [x for _, x in named], [None] * len(named), structure


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple) and all(type(n) is int for n in node)


def _wide() -> bool:
    return jax.dtypes.canonicalize_dtype(float) == np.float64


def canonical(dtype: Any, own: Any) -> np.dtype:
    """The dtype asked for, or else the layout's, as far as JAX has it on."""
    chosen = float if dtype is None and own is None else own if dtype is None else dtype
    return np.dtype(jax.dtypes.canonicalize_dtype(chosen))
