r"""Lengths, angles and projections in weight space, under the Euclidean inner product.

All leaves together are one vector. Nothing here needs more than inner products, so sharded
leaves are measured where they lie.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from wspace import _checks, tree
from wspace._numerics import accumulator, safe_sqrt, split
from wspace.typing import Scalar, Weights, WeightsLike

__all__ = ["angle", "distance", "gram", "orthonormalize", "project"]


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
    return tree.norm(tree.combine((1, -1), tree.widened(x, y)))


@jax.jit
def _chord_sums(ratio: Scalar, x: Array, y: Array) -> Float[Array, "3"]:
    # The products of the high halves are exact, so x - ratio y and x + ratio y keep all digits
    # where they cancel.
    wide = ratio.dtype
    x, y = x.astype(wide), y.astype(wide)
    (ratio_high, ratio_low), (y_high, y_low) = split(ratio), split(y)
    rest = ratio_high * y_low + ratio_low * y
    gap, total = (x - ratio_high * y_high) - rest, (x + ratio_high * y_high) + rest
    return jnp.stack([jnp.sum(gap * gap), jnp.sum(total * total), jnp.sum(gap * total)])


def half_angle(x: WeightsLike, y: WeightsLike) -> tuple[Scalar, Scalar]:
    r"""$\sin^2$ and $\cos^2$ of half the angle, both with small relative error; 0, 1 at zero."""
    wide = accumulator(*(jnp.asarray(leaf).dtype for leaf in jax.tree.leaves((x, y))))
    x_norm, y_norm = tree.norm(x).astype(wide), tree.norm(y).astype(wide)
    undefined = (x_norm == 0) | (y_norm == 0)
    ratio = x_norm / jnp.where(undefined, 1, y_norm)
    sums = [
        _chord_sums(ratio, a, b)
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
        if a.size
    ]
    if not sums:
        return jnp.zeros((), wide), jnp.ones((), wide)
    gap, total, cross = jax.tree.reduce_associative(jnp.add, sums)
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
    wide = tree.widened(*points)
    upper = {
        (i, j): tree.vdot(x, y) for i, x in enumerate(wide) for j, y in enumerate(wide) if i <= j
    }
    count = range(len(points))
    return jnp.stack([jnp.stack([upper[min(i, j), max(i, j)] for j in count]) for i in count])


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
            $64\,\varepsilon$ of its norm; NaN from there on if the values are traced. Also if
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
    basis: list[Weights] = []
    for i, rest in enumerate(tree.widened(*directions)):
        size = tree.norm(rest)
        for _ in range(2):
            for q in basis:
                rest = tree.combine((1, -tree.vdot(q, rest)), (rest, q))
        left = tree.norm(rest)
        undefined = _checks.refuse(
            ~(left > 64 * jnp.finfo(left.dtype).eps * size),
            lambda i=i, left=left, size=size: (
                f"directions[{i}] has norm {size:.3g} and {left:.3g} outside the span of those "
                "before it: leave out directions that are zero, dependent or not finite"
            ),
        )
        basis.append(tree.combine((1 / left + undefined,), (rest,)))
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
    point, *wide = tree.widened(x, *basis)
    return tree.cast_like(tree.combine([tree.vdot(q, point) for q in wide], wide), x)
