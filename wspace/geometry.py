r"""Lengths, angles and projections in weight space, under the Euclidean inner product.

All leaves together are one vector. Nothing here needs more than inner products, so sharded
leaves are measured where they lie.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from wspace import _checks, _lift, tree
from wspace import _frames as frames
from wspace._numerics import accumulator, safe_sqrt, split, stored_rounding, unstacked
from wspace._records import record
from wspace.typing import Scalar, Weights, WeightsLike

__all__ = [
    "Coordinates",
    "angle",
    "coordinates",
    "cosine",
    "distance",
    "gram",
    "orthonormalize",
    "principal_angles",
    "project",
]


@record
class Coordinates(NamedTuple):
    """Affine coordinates of a point with respect to others, and how far off they leave it.

    Attributes:
        coefficients: One number a point; their sum is one.
        residual: The distance of the point from the combination that they make.
    """

    coefficients: Float[Array, " k"]
    residual: Scalar


def distance(x: WeightsLike, y: WeightsLike) -> Scalar:
    r"""Euclidean distance between two points.

    $$
    d(x, y) = \lVert x - y \rVert
    $$

    A metric: symmetric, zero only between equal points, and with the triangle inequality.

    Args:
        x: First tree.
        y: Second tree, of the same layout.

    Returns:
        The distance, in at least float32; its gradient between equal points is zero.

    Raises:
        ValueError: If the trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import geometry
        >>> geometry.distance({"w": jnp.array([4.0, 1.0])}, {"w": jnp.array([1.0, 5.0])})
        Array(5., dtype=float32)
    """
    _checks.same_layout(x=x, y=y)
    return frames.distance(x, y)


@_lift.reduction
def _chords(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    # The products of the high halves are exact, so x - ratio y and x + ratio y keep all digits
    # where they cancel.
    (ratio,), (x, y) = scalars, arrays
    (ratio_high, ratio_low), (y_high, y_low) = split(ratio), split(y)
    rest = ratio_high * y_low + ratio_low * y
    gap, total = (x - ratio_high * y_high) - rest, (x + ratio_high * y_high) + rest
    return [gap * gap, total * total, gap * total]


def half_angle(x: WeightsLike, y: WeightsLike) -> tuple[Scalar, Scalar]:
    r"""$\sin^2$ and $\cos^2$ of half the angle, both with small relative error; 0, 1 at zero."""
    squares = [tree.vdot(leaf, leaf) for leaf in (x, y)]
    ratio, undefined = _norm_ratio(*tree.widened(*squares))
    return _half_of(_chords((ratio,), (x, y)), undefined)


@jax.jit
def _norm_ratio(x_square: Scalar, y_square: Scalar) -> tuple[Scalar, Bool[Array, ""]]:
    """How much longer one point is than another, and whether one of them is zero."""
    x_norm, y_norm = safe_sqrt(x_square), safe_sqrt(y_square)
    nothing = y_norm == 0
    return x_norm / jnp.where(nothing, 1, y_norm), nothing | (x_norm == 0)


@jax.jit
def _half_of(sums: Float[Array, "3"], undefined: Bool[Array, ""]) -> tuple[Scalar, Scalar]:
    gap, total, cross = sums
    # gap and total are orthogonal but for the rounding of the ratio: take that part out of the
    # smaller one, where it would show. No minimum or maximum: they halve derivatives at ties.
    obtuse = ~undefined & (gap > total)
    large = jnp.where(undefined, 1, jnp.where(obtuse, gap, total))
    small = jnp.where(undefined, 0, jnp.where(obtuse, total, gap) - cross**2 / large)
    sine, cosine = small / (small + large), large / (small + large)
    return jnp.where(obtuse, cosine, sine), jnp.where(obtuse, sine, cosine)


def angle(x: WeightsLike, y: WeightsLike) -> Scalar:
    r"""Angle between two points as seen from the origin, in radians.

    $$
    \Omega = 2 \operatorname{atan2}\left(
        \left\lVert \frac{x}{\lVert x \rVert} - \frac{y}{\lVert y \rVert} \right\rVert,\;
        \left\lVert \frac{x}{\lVert x \rVert} + \frac{y}{\lVert y \rVert} \right\rVert \right)
    $$

    Accurate at every angle, where $\arccos$ of the cosine keeps only half the digits near $0$
    and $\pi$ and has no gradient at either. Fine-tunes of one base live exactly there.

    Args:
        x: First tree.
        y: Second tree, of the same layout.

    Returns:
        The angle in $[0, \pi]$; $0$ if either tree is zero. Its gradient at $0$ and $\pi$,
        where it has a kink, is zero.

    Raises:
        ValueError: If the trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import geometry
        >>> geometry.angle(jnp.array([1.0, 0.0]), jnp.array([0.0, 2.0]))
        Array(1.5707964, dtype=float32)

    References:
        W. Kahan, *How Futile are Mindless Assessments of Roundoff in Floating-Point
        Computation?*, 2006, section 12.
    """
    _checks.same_layout(x=x, y=y)
    sine, cosine = half_angle(x, y)
    return 2 * jnp.arctan2(safe_sqrt(sine), safe_sqrt(cosine))


def cosine(x: WeightsLike, y: WeightsLike) -> Scalar:
    r"""Cosine of the angle between two points as seen from the origin.

    $$
    \cos \Omega = \frac{\langle x, y \rangle}{\lVert x \rVert \lVert y \rVert}
    $$

    Formed as $\cos^2(\Omega/2) - \sin^2(\Omega/2)$ from the halves that
    [`angle`][wspace.geometry.angle] is made of: never outside $[-1, 1]$, and $1$ between parallel
    trees, whatever their lengths. Near $\pm 1$ a cosine cannot tell fine-tunes apart; the angle
    can.

    Args:
        x: First tree.
        y: Second tree, of the same layout.

    Returns:
        The cosine in $[-1, 1]$, in at least float32; $1$, as of the angle $0$, if either tree is
        zero.

    Raises:
        ValueError: If the trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import geometry
        >>> geometry.cosine(jnp.array([1.0, 0.0]), jnp.array([0.0, -3.0]))
        Array(0., dtype=float32)
        >>> geometry.cosine(jnp.array([1.0, 2.0]), jnp.array([-3.0, -6.0]))
        Array(-1., dtype=float32)
    """
    _checks.same_layout(x=x, y=y)
    sine, cosine = half_angle(x, y)
    return cosine - sine


@_checks.of_points
def gram(points: Sequence[WeightsLike]) -> Float[Array, "k k"]:
    r"""Matrix of inner products.

    $$
    G_{ij} = \langle \theta_i, \theta_j \rangle
    $$

    Symmetric and positive semidefinite but for rounding. All that averages, angles and
    projections of `k` points need to know of them.

    Args:
        points: The $\theta_i$, trees of one layout, at least one.

    Returns:
        The matrix, in at least float32.

    Raises:
        ValueError: If there is no point, or the points differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import geometry
        >>> geometry.gram([jnp.array([1.0, 1.0]), jnp.array([0.0, 2.0])])
        Array([[2., 2.],
               [2., 4.]], dtype=float32)
    """
    points = _checks.listed("points", points)
    _checks.same_layout(**_checks.each("points", points))
    return inner_products(points)


@_lift.reduction
def _sizes(_: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    return [jnp.abs(x) for x in arrays]


def lost_squares(squares: Float[Array, " k"], points: Sequence[WeightsLike]) -> Bool[Array, " k"]:
    """Which squared norms are not finite, or lost digits although their points are not zero."""
    entries = sum(leaf.size for leaf in jax.tree.leaves(points[0]))
    short = squares < least_square(entries, squares.dtype)
    if _checks.is_traced(short) or bool(jnp.any(short)):
        short = short & (_sizes((), points) > 0)
    return short | ~jnp.isfinite(squares)


def least_square(entries: int, dtype: Any) -> float:
    """The sum of squares beside which those that are lost below the range do not count."""
    return entries * 2.0**10 * float(jnp.finfo(dtype).tiny)


_MANY = 8
"""Points whose products with each other are summed in one pass."""


def inner_products(points: Sequence[WeightsLike]) -> Float[Array, "k k"]:
    """`gram` without checks: blocks of few rows and columns, each in one pass over its points."""
    count = len(points)
    if count <= _MANY:
        return symmetric(pair_sums((), points), count)
    parts = [points[i : i + _MANY] for i in range(0, count, _MANY)]
    upper = {
        (i, j): inner_products(one) if i == j else _crossed(len(one), len(two))((), (*one, *two))
        for i, one in enumerate(parts)
        for j, two in enumerate(parts)
        if i <= j
    }
    size = range(len(parts))

    def block(i: int, j: int) -> Array:
        found = upper[min(i, j), max(i, j)]
        found = found.reshape(len(parts[min(i, j)]), len(parts[max(i, j)]))
        return found if i <= j else found.T

    return jnp.block([[block(i, j) for j in size] for i in size])


@functools.cache
def _crossed(count: int, others: int) -> Callable[..., Array]:
    """The inner products of some points with others."""

    @_lift.reduction
    def crossed(_: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
        return [x * y for x in arrays[:count] for y in arrays[count : count + others]]

    return crossed


def pairs(_: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    """The products of all pairs, squares included, in the order that `symmetric` takes."""
    return [x * y for i, x in enumerate(arrays) for y in arrays[i:]]


def pairs_from_first(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    """The products of all pairs of differences from the first array."""
    first, *others = arrays
    return pairs(scalars, [x - first for x in others])


def squared_gaps(_: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    """The squared differences of all pairs, zeros included."""
    return [(x - y) ** 2 for i, x in enumerate(arrays) for y in arrays[i:]]


pair_sums = _lift.reduction(pairs)
pair_sums_from_first = _lift.reduction(pairs_from_first)


@jax.jit(static_argnums=1)
def symmetric(upper: Array, count: int) -> Array:
    """The symmetric matrices `(count, count, ...)` with given rows of their upper triangles."""
    places = iter(range(len(upper)))
    place = {(i, j): next(places) for i in range(count) for j in range(i, count)}
    rows = [[upper[place[min(i, j), max(i, j)]] for j in range(count)] for i in range(count)]
    return jnp.stack([jnp.stack(row) for row in rows])


@_lift.reduction
def _along_basis(_: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    x, *basis = arrays
    return [q * x for q in basis]


@functools.partial(_lift.elementwise, rounded=False)
def _beyond_basis(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    x, *basis = arrays
    return x - functools.reduce(jnp.add, [c * q for c, q in zip(scalars, basis, strict=True)])


@functools.partial(_lift.elementwise, rounded=False)
def _over(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (c,), (x,) = scalars, arrays
    return x / c


def components(
    x: WeightsLike, basis: Sequence[Weights]
) -> tuple[Float[Array, " k"] | list[Scalar], WeightsLike]:
    """The coefficients of `x` in an orthonormal basis, and what is orthogonal to the basis."""
    if not basis:
        return [], x
    first = _along_basis((), (x, *basis))
    rest = _beyond_basis(unstacked(first), (x, *basis))
    second = _along_basis((), (rest, *basis))
    return first + second, _beyond_basis(unstacked(second), (rest, *basis))


class _Dependent(NamedTuple):
    """What is left of a direction, as a share of its norm, where it is refused, and the words.

    The words are made of its index, its norm and what is left of it outside the span of those
    before it.
    """

    share: float
    words: Callable[[int, Scalar, Scalar], str]


def _share_of(trees: Sequence[WeightsLike]) -> float:
    """What directions are known to, in the dtypes that they are stored in."""
    leaves = jax.tree.leaves(trees)
    return stored_rounding(leaves, accumulator(*(leaf.dtype for leaf in leaves))).share


def _gram_schmidt(
    directions: Sequence[WeightsLike], dependent: _Dependent | None
) -> tuple[list[Weights], list[list[Scalar]]]:
    """The factors of $D = Q R$, with `R` by columns down to its diagonal.

    What is left of a direction is refused if it is `dependent`, and without that may be zero.
    """
    basis: list[Weights] = []
    columns = []
    for i, x in enumerate(directions):
        coefficients, rest = components(x, basis)
        left = tree.norm(rest)
        basis.append(_over((_divisor(i, tree.norm(x), left, dependent),), (rest,)))
        columns.append([*coefficients, left])
    return basis, columns


def _divisor(i: int, size: Scalar, left: Scalar, dependent: _Dependent | None) -> Scalar:
    """The length left of a direction, to divide by; NaN where it is no more than rounding."""
    length = jnp.where(left == 0, 1, left)
    if dependent is None:
        return length
    bad = ~((left > dependent.share * size) & jnp.isfinite(left))
    return _checks.poisoned(length, bad, lambda: dependent.words(i, size, left))


def _dependent(name: str, trees: Sequence[WeightsLike]) -> _Dependent:
    return _Dependent(
        _share_of(trees),
        lambda i, size, left: (
            f"{name}[{i}] has norm {size:.3g} and {left:.3g} outside the span of those "
            "before it: leave out directions that are zero, dependent or not finite"
        ),
    )


@_checks.of_points
def orthonormalize(directions: Sequence[WeightsLike]) -> list[Weights]:
    r"""Orthonormal basis of the span of some directions, by Gram-Schmidt applied twice.

    $$
    q_i = \frac{r_i}{\lVert r_i \rVert}, \qquad
    r_i = d_i - \sum_{j < i} \langle q_j, d_i \rangle\, q_j
    $$

    The first `i` results span the same space as the first `i` directions. Done twice, the
    basis is orthonormal to rounding however close to dependent the directions are.

    Args:
        directions: The $d_i$, trees of one layout, at least one.

    Returns:
        As many trees, each leaf in the dtype of that leaf of its direction. Half precision is
        orthonormal to half precision only, so pass directions through
        [`upcast`][wspace.tree.upcast] where that matters.

    Raises:
        ValueError: If a direction is in the span of those before it, to within
            $64\,\varepsilon$ of its norm, in half precision $\varepsilon$ of the dtype stored; NaN
            from there on if the values are traced. Also if
            there is no direction, or the trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import geometry
        >>> geometry.orthonormalize([jnp.array([2.0, 0.0]), jnp.array([1.0, 3.0])])
        [Array([1., 0.], dtype=float32), Array([0., 1.], dtype=float32)]

    References:
        L. Giraud, J. Langou, M. Rozloznik, *The loss of orthogonality in the Gram-Schmidt
        orthogonalization process*, Computers and Mathematics with Applications 50, 2005.
    """
    directions = _checks.listed("directions", directions)
    _checks.same_layout(**_checks.each("directions", directions))
    basis, _ = _gram_schmidt(tree.in_one_dtype(*directions), _dependent("directions", directions))
    return [tree.cast_like(q, x) for q, x in zip(basis, directions, strict=True)]


def project(x: WeightsLike, basis: Sequence[WeightsLike]) -> Weights:
    r"""Orthogonal projection onto the span of an orthonormal basis.

    $$
    P x = \sum_i \langle q_i, x \rangle\, q_i
    $$

    Linear, idempotent and never longer than `x`; `x` minus its projection is orthogonal to
    the basis.

    Args:
        x: The tree to project.
        basis: The $q_i$, orthonormal trees of the same layout, such as
            [`orthonormalize`][wspace.geometry.orthonormalize] returns.

    Returns:
        The projection, each leaf in the dtype of that leaf of `x`.

    Raises:
        ValueError: If the basis is empty, or the trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import geometry
        >>> geometry.project(jnp.array([3.0, 4.0]), [jnp.array([0.0, 1.0])])
        Array([0., 4.], dtype=float32)
    """
    basis = _checks.listed("basis", basis)
    _checks.same_layout(x=x, **_checks.each("basis", basis))
    return _in_span(unstacked(_along_basis((), (x, *basis))), (x, *basis))


@_lift.elementwise
def _in_span(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    _, *basis = arrays
    return functools.reduce(jnp.add, [c * q for c, q in zip(scalars, basis, strict=True)])


def coordinates(point: WeightsLike, points: Sequence[WeightsLike]) -> Coordinates:
    r"""Affine coordinates of a point with respect to others, and its distance from their span.

    $$
    c = \operatorname*{arg\,min}_{\sum_i c_i = 1}
        \Bigl\lVert \theta - \sum_i c_i\, \theta_i \Bigr\rVert
    $$

    The inverse of [`average.mean`][wspace.average.mean]: the coordinates of `mean(points, c)`
    are `c` divided by its sum, and the residual is zero. Moving or scaling all points together
    changes no coefficient. A negative coefficient says that the nearest point of the affine span
    is outside of the convex hull. What is left over is orthogonal to every difference of the
    points, and the residual is its norm, measured and not subtracted from another.

    The differences $\theta_i - \theta_0$ are reduced to a triangle by Gram-Schmidt applied
    twice: the error grows with their condition number where the residual is small, where that
    of the normal equations grows with its square.

    Args:
        point: The point $\theta$.
        points: The $\theta_i$, trees of the layout of `point`, at least one.

    Returns:
        [`Coordinates`][wspace.geometry.Coordinates] with `coefficients` $c_i$ and `residual`, in
            at least float32.

    Raises:
        ValueError: If the points are affinely dependent: one is within $64\,\varepsilon$ of
            its distance from the first of the affine span of those before it (NaN if the values
            are traced). Also if there is no point, or the trees differ in structure or in a
            leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import geometry
        >>> corners = [jnp.array([0.0, 0.0, 0.0]), jnp.array([4.0, 0.0, 0.0])]
        >>> geometry.coordinates(jnp.array([1.0, 0.0, 2.0]), corners)
        Coordinates(coefficients=[0.75, 0.25], residual=2.0)

    References:
        A. Bjorck, *Solving linear least squares problems by Gram-Schmidt orthogonalization*,
        BIT 7, 1967.
    """
    points = _checks.listed("points", points)
    _checks.same_layout(point=point, **_checks.each("points", points))
    start, *others = points
    if not others:
        residual = distance(point, start)
        return Coordinates(jnp.ones((1,), residual.dtype), residual)

    share = _share_of(points)

    def length_of(i: int, left: Scalar) -> Scalar:
        if not _checks.is_traced(left) and not bool(jnp.isfinite(left)):
            _checks.finite(**_checks.each("points", points))

        def dependent(_: int, size: Scalar, left: Scalar) -> str:
            return (
                f"points[{i + 1}] is {size:.3g} from points[0] and {left:.3g} from the affine span "
                "of those before it: leave out points that repeat, are dependent or are not finite"
            )

        known = _Dependent(share, dependent)
        return _divisor(i, distance(others[i], start), left, known)

    pairs = [(x, start) for x in others]
    frame, columns = frames.of_differences(pairs, lambda i, x: 1 / length_of(i, x))
    projections, residual = frames.measured(frame, point, start)
    solution: list[Scalar] = []
    for i in reversed(range(len(others))):
        known = sum(c * column[i] for c, column in zip(solution, columns[i + 1 :], strict=True))
        solution.insert(0, (projections[i] - known) / columns[i][i])
    return Coordinates(jnp.stack([jnp.ones_like(residual) - sum(solution), *solution]), residual)


@_checks.of_points
def principal_angles(
    left: Sequence[WeightsLike], right: Sequence[WeightsLike]
) -> Float[Array, " k"]:
    r"""Principal angles between the spans of two sets of directions, in radians.

    $$
    \cos \vartheta_i = \sigma_i(P^\top Q), \qquad
    \sin \vartheta_i = \sigma_{k+1-i}\bigl(Q - P P^\top Q\bigr)
    $$

    with $P$ an orthonormal basis of the larger span and $Q$ of the smaller one. The angles are
    symmetric in the two spans and do not depend on the directions chosen in them; all are zero
    if and only if one span contains the other. Sine and cosine meet in $\operatorname{atan2}$,
    so every angle has an error of a few $\varepsilon$ times the condition number of the
    directions, where $\arccos$ alone loses angles up to $\sqrt\varepsilon$.

    Derivatives exist, to second order, where the angles are distinct and strictly between $0$
    and $\pi/2$; at both ends they have a kink.

    The mean of their squared cosines is the subspace similarity of LoRA.

    Args:
        left: Directions that span one subspace, trees of one layout, at least one.
        right: Directions that span the other, of the same layout.

    Returns:
        The $k$ angles in $[0, \pi/2]$ in ascending order, as many as the smaller span has
        dimensions, in at least float32.

    Raises:
        ValueError: If a direction is in the span of those before it on its side, to within
            $64\,\varepsilon$ of its norm (NaN if the values are traced). Also if a side is
            empty, or the trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import geometry
        >>> x, y, z = jnp.eye(3)
        >>> geometry.principal_angles([x, y], [x + y, z])
        Array([0.       , 1.5707964], dtype=float32)

    References:
        A. Bjorck, G. Golub, *Numerical methods for computing angles between linear subspaces*,
        Mathematics of Computation 27, 1973.
    """
    left, right = _checks.listed("left", left), _checks.listed("right", right)
    _checks.same_layout(**_checks.each("left", left), **_checks.each("right", right))
    directions = tree.in_one_dtype(*left, *right)
    p, _ = _gram_schmidt(directions[: len(left)], _dependent("left", left))
    q, _ = _gram_schmidt(directions[len(left) :], _dependent("right", right))
    if len(p) < len(q):
        p, q = q, p
    products, rests = zip(*(components(x, p) for x in q), strict=True)
    _, columns = _gram_schmidt(rests, None)
    zero = jnp.zeros_like(columns[0][0])
    triangle = [jnp.stack(column + [zero] * (len(q) - len(column))) for column in columns]
    cosines, sines = (
        jnp.linalg.svd(jnp.stack(rows), compute_uv=False) for rows in (products, triangle)
    )
    return jnp.arctan2(sines[::-1], cosines)
