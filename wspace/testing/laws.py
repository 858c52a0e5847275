"""Laws of operators on weights, each tried on given weights.

All checkers are called alike. Behind the operator come, by position, the weights that it is called
with: trees or sequences of trees. What is given by keyword is passed on as it is.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from wspace.testing.comparison import compare, largest, norm, stored, vector
from wspace.typing import ScalarLike

__all__ = [
    "check_affine_equivariant",
    "check_exact_ends",
    "check_half_precision",
    "check_idempotent",
    "check_odd",
    "check_permutation_invariant",
    "check_scale",
]

Operator = Callable[..., Any]


def check_affine_equivariant(
    operator: Operator,
    *weights: PyTree,
    factor: float | None = None,
    units: ScalarLike = 16,
    **options: Any,
) -> None:
    r"""Asserts that an affine map of all points maps the result in the same way.

    $$
    f(A x_1 + b, \dots, A x_n + b) = A f(x_1, \dots, x_n) + b
    $$

    Means with coefficients that are divided by their sum, segments and Bezier curves have this law.
    $A$ has one factor per entry and $b$ one shift, of the size of the weights; both are the same in
    every call.

    Args:
        operator: The function $f$ from points to a tree of their layout.
        *weights: What it is called with: trees, or sequences of trees.
        factor: One factor for all entries: with 1, a translation. What depends on distances, such
            as a geometric median, has the law only for such maps.
        units: The number of roundings allowed, at the size of the points and their images. An
            average with coefficients of either sign enlarges roundings by `sum|c| / |sum c|`.
        **options: Passed on to the operator.

    Raises:
        AssertionError: If the law is broken, with the leaf and the roundings.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import average, testing
        >>> points = [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([4.0, 3.0])}]
        >>> testing.check_affine_equivariant(average.mean, points, coefficients=(0.7, 0.3))
        >>> doubled = lambda xs: {"w": 2 * xs[0]["w"]}
        >>> testing.check_affine_equivariant(doubled, points)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        AssertionError: affine equivariance: leaf ['w'] differs by 2.78e+06 roundings, ...
    """
    result = operator(*weights, **options)
    entries, rng = vector(weights), np.random.default_rng(0)
    width = float(np.sqrt(np.mean(np.square(entries)))) if entries.any() else 1.0

    def drawn(low: float, high: float) -> PyTree:
        sign = [-1.0, 1.0] if low > 0 else [1.0]
        return jax.tree.map(
            lambda x: rng.uniform(low, high, x.shape) * rng.choice(sign, x.shape), result
        )

    shifts = drawn(-2 * width, 2 * width)
    factors = drawn(0.5, 2.0) if factor is None else jax.tree.map(lambda _: factor, result)

    def image(x: PyTree) -> PyTree:
        return jax.tree.map(lambda a, y, b: a * _wide(y) + b, factors, x, shifts)

    images = each_point(lambda x: _rounded(image(x), x), weights, result)
    compare(
        "affine equivariance",
        operator(*images, **options),
        image(result),
        types=result,
        units=units,
        scale=norm(weights) + norm(images),
        rounding=stored(weights),
    )


def check_permutation_invariant(
    operator: Operator,
    points: Sequence[PyTree],
    *,
    order: Sequence[int] | None = None,
    units: ScalarLike = 8,
    **options: Any,
) -> None:
    r"""Asserts that the order of the points changes nothing but rounding.

    $$
    f(x_{\pi(1)}, \dots, x_{\pi(n)}) = f(x_1, \dots, x_n)
    $$

    Args:
        operator: A function of a sequence of points of one dtype.
        points: The points.
        order: The order $\pi$ to try, by default the reversed one and all rotations.
        units: The number of roundings allowed, at the size of the points.
        **options: Passed on to the operator. Lists, tuples and arrays that have as many entries as
            there are points, such as coefficients, are reordered along with them.

    Raises:
        AssertionError: If the law is broken, with the order, the leaf and the roundings.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import average, testing
        >>> points = [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([4.0, 3.0])}]
        >>> mean = average.mean
        >>> testing.check_permutation_invariant(mean, points, coefficients=(0.7, 0.3))
        >>> testing.check_permutation_invariant(lambda xs: xs[0], points)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        AssertionError: permutation invariance, order (1, 0): leaf ['w'] differs by ...
    """
    count = len(points)
    rotations = [(*range(i, count), *range(i)) for i in range(1, count)]
    orders = [tuple(range(count)[::-1]), *rotations] if order is None else [tuple(order)]
    result = operator(points, **options)
    for order in dict.fromkeys(orders):
        along = {name: _reordered(value, order) for name, value in options.items()}
        compare(
            f"permutation invariance, order {order}",
            operator([points[i] for i in order], **along),
            result,
            units=units,
            scale=norm(points),
        )


def check_odd(operator: Operator, *weights: PyTree, units: ScalarLike = 8, **options: Any) -> None:
    r"""Asserts that negative weights give the negative result.

    $$
    f(-x) = -f(x)
    $$

    Args:
        operator: The function $f$.
        *weights: What it is called with: trees, or sequences of trees.
        units: The number of roundings allowed, at the size of the weights.
        **options: Passed on to the operator.

    Raises:
        AssertionError: If the law is broken, with the leaf and the roundings.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import negative, testing
        >>> edit = jnp.array([[3.0, 0.0], [0.0, 1.0]])
        >>> testing.check_odd(negative.harden, edit)
        >>> testing.check_odd(jnp.abs, edit)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        AssertionError: oddness: the array differs by 1.59e+07 roundings, ...
    """
    result = operator(*weights, **options)
    got = operator(*jax.tree.map(lambda x: -x, weights), **options)
    wanted = jax.tree.map(lambda x: -_wide(x), result)
    compare("oddness", got, wanted, types=result, units=units, scale=norm(weights))


def check_idempotent(
    operator: Operator, *weights: PyTree, units: ScalarLike = 8, **options: Any
) -> None:
    r"""Asserts that the result, in place of every point, gives the result again.

    $$
    f(y, \dots, y) = y, \qquad y = f(x_1, \dots, x_n)
    $$

    Of one tree, this is what makes a projection, $f(f(x)) = f(x)$; of several, what makes a mean.

    Args:
        operator: The function $f$ from points to a tree of their layout.
        *weights: What it is called with: trees, or sequences of trees.
        units: The number of roundings allowed, at the size of the result.
        **options: Passed on to the operator.

    Raises:
        AssertionError: If the law is broken, with the leaf and the roundings.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import average, testing
        >>> points = [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([4.0, 3.0])}]
        >>> testing.check_idempotent(average.mean, points, coefficients=(0.7, 0.3))
        >>> testing.check_idempotent(lambda x: jnp.maximum(x, 0), jnp.array([1.0, -2.0]))
        >>> testing.check_idempotent(lambda x: x / 2, jnp.array([1.0, -2.0]))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        AssertionError: idempotence: the array differs by 3.75e+06 roundings, ...
    """
    result = operator(*weights, **options)
    got = operator(*each_point(lambda _: result, weights, result), **options)
    compare("idempotence", got, result, units=units, scale=norm(result))


def check_exact_ends(
    path: Operator, *weights: PyTree, units: ScalarLike = 0, **options: Any
) -> None:
    r"""Asserts that a path starts at its first point and ends at its last.

    $$
    f(x_1, \dots, x_n, 0) = x_1, \qquad f(x_1, \dots, x_n, 1) = x_n
    $$

    Args:
        path: A function that is called as `path(*weights, t)`.
        *weights: Start and end, or one sequence of points.
        units: The number of roundings allowed, at the size of the points: by default none.
        **options: Passed on to the path.

    Raises:
        AssertionError: If the law is broken, with the end, the leaf and the roundings.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import interpolate, testing
        >>> points = [jnp.array([0.1, 2.0]), jnp.array([0.7, 3.0])]
        >>> testing.check_exact_ends(interpolate.slerp, *points)
        >>> testing.check_exact_ends(interpolate.bezier, points)
        >>> path = lambda x, y, t: x + 1.001 * t * (y - x)
        >>> testing.check_exact_ends(path, *points)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        AssertionError: exact ends, t = 1.0: the array differs by 2.28e+03 roundings, ...
    """
    points = weights[0] if len(weights) == 1 else weights
    for t, end in ((0.0, points[0]), (1.0, points[-1])):
        got = path(*weights, t, **options)
        law = f"exact ends, t = {t}"
        # Float64 of NumPy may count as float32.
        compare(law, got, jax.tree.map(jnp.asarray, end), units=units, scale=norm(weights))


def check_scale(
    operator: Operator,
    *weights: PyTree,
    factors: Sequence[float] | None = None,
    degree: int = 1,
    units: ScalarLike = 8,
    **options: Any,
) -> None:
    r"""Asserts that scaling all weights scales the result: no number in the operator has a unit.

    $$
    f(k x) = k^d f(x), \qquad k > 0
    $$

    A constant that is added to a norm, or a threshold, breaks this law.

    Args:
        operator: The function $f$.
        *weights: What it is called with: trees, or sequences of trees.
        factors: The factors $k$ to try, by default 3, 1e-3, 2**30 and 2**-30; for weights in
            float16 2**4 and 2**-4.
        degree: The degree $d$: 1 for what returns weights, 0 for masks and angles.
        units: The number of roundings allowed, at the size of the weights to the power $d$; for
            $d = 0$ at the largest entry of the result, or 1. Powers of two are exact, and for them
            most operators pass with `units=0`.
        **options: Passed on to the operator.

    Raises:
        AssertionError: If the law is broken, with the factor, the leaf and the roundings.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import geometry, testing, tree
        >>> x, y = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([4.0, 3.0])}
        >>> testing.check_scale(tree.norm, x)
        >>> testing.check_scale(geometry.angle, x, y, degree=0)
        >>> unit = lambda x: x["w"] / (tree.norm(x) + 1e-8)
        >>> testing.check_scale(unit, x, degree=0)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        AssertionError: scale, factor 0.001: the array differs by ...
    """
    narrow = any(x.dtype == np.float16 for x in map(jax.typeof, jax.tree.leaves(weights)))
    default = (2.0**4, 2.0**-4) if narrow else (3.0, 1e-3, 2.0**30, 2.0**-30)
    result = operator(*weights, **options)
    for k in default if factors is None else factors:
        image = jax.tree.map(lambda x, k=k: k * _wide(x), weights)
        compare(
            f"scale, factor {k:.3g}",
            operator(*_rounded(image, weights), **options),
            jax.tree.map(lambda x, k=k: k**degree * _wide(x), result),
            types=result,
            units=units,
            scale=(k * norm(weights)) ** degree if degree else max(1.0, largest(result)),
            rounding=0.0 if math.frexp(k)[0] == 0.5 else stored(weights),
        )


def check_half_precision(
    operator: Operator, *weights: PyTree, units: ScalarLike = 0, **options: Any
) -> None:
    """Asserts that the result in half precision is the float32 result, rounded once.

    So sums are in float32 at least. The weights are rounded to bfloat16 and to float16, and the
    same numbers are given in float32; weights that are in half precision are tried in it alone. A
    result with the layout of a point must have its dtypes; others, such as norms, may be wider.

    Args:
        operator: The function.
        *weights: What it is called with: trees, or sequences of trees.
        units: The number of roundings allowed, at the largest entry of the result: by default none.
        **options: Passed on to the operator.

    Raises:
        AssertionError: If the law is broken, with the dtype, the leaf and the roundings.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import average, testing
        >>> points = [jnp.array([1.0, 0.3]), jnp.array([0.01, 0.2]), jnp.array([0.01, 0.7])]
        >>> testing.check_half_precision(average.mean, points)
        >>> testing.check_half_precision(lambda xs: sum(xs) / len(xs), points)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        AssertionError: half precision, bfloat16: the array differs by 0.624 roundings, ...
    """
    given = {np.dtype(x.dtype) for x in map(jax.typeof, jax.tree.leaves(weights))}
    halves = [np.dtype(jnp.bfloat16), np.dtype(np.float16)]
    for half in halves if given.isdisjoint(halves) else [h for h in halves if h in given]:
        narrow = jax.tree.map(lambda x, half=half: jnp.asarray(x).astype(half), weights)
        got = operator(*narrow, **options)
        wide = operator(*jax.tree.map(lambda x: x.astype(jnp.float32), narrow), **options)
        if has_point(weights, got):
            types = jax.tree.map(lambda x, half=half: x.astype(half), wide)
        else:
            types = jax.tree.map(lambda x, y: x.astype(jax.typeof(y).dtype), wide, got)
        law = f"half precision, {half.name}"
        compare(law, got, types, units=units, scale=largest(types))


def each_point(function: Callable[[PyTree], PyTree], weights: PyTree, result: PyTree) -> PyTree:
    """Weights with every point, a subtree of the structure of the result, put through."""
    if not has_point(weights, result):
        raise AssertionError(
            f"the operator returns {jax.tree.structure(result)}, which is the layout of no point"
        )
    structure = jax.tree.structure(result)
    return jax.tree.map(
        lambda x: function(x) if jax.tree.structure(x) == structure else x,
        weights,
        is_leaf=lambda node: jax.tree.structure(node) == structure,
    )


def has_point(weights: PyTree, result: PyTree) -> bool:
    """Whether a subtree of the weights has the structure and the shapes of the result."""
    structure = jax.tree.structure(result)
    parts = jax.tree.leaves(weights, is_leaf=lambda x: jax.tree.structure(x) == structure)
    return any(
        jax.tree.structure(x) == structure
        and jax.tree.map(jnp.shape, x) == jax.tree.map(jnp.shape, result)
        for x in parts
    )


def _wide(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.longdouble)


def _rounded(image: PyTree, weights: PyTree) -> PyTree:
    """Entries in extended precision, rounded to the dtypes of weights."""
    return jax.tree.map(
        lambda x, y: jnp.asarray(x.astype(np.float64).astype(jax.typeof(y).dtype)), image, weights
    )


def _reordered(value: Any, order: tuple[int, ...]) -> Any:
    """One entry per point, reordered; anything else as it is."""
    if isinstance(value, list | tuple) and len(value) == len(order):
        return type(value)(value[i] for i in order)
    if isinstance(value, np.ndarray | jax.Array) and value.shape[:1] == (len(order),):
        return value[np.array(order)]
    return value
