r"""One map: the homothety about a point to avoid.

Strength $s$, negative weight $v$ and guidance scale $g$ are three names of one number:

$$
x + s\,(x - b) = \frac{x - v\,b}{1 - v} = b + g\,(x - b),
\qquad s = \frac{v}{1 - v}, \quad g = 1 + s = \frac{1}{1 - v}
$$
"""

from collections.abc import Sequence

from jaxtyping import Array

from wspace import _checks, tree
from wspace.typing import Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["guide", "remove_member", "repel", "strength_of"]


@tree.elementwise
def _extrapolated(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (s,), (base, positive, negative) = scalars, arrays
    return base + s * (positive - negative)


def repel(point: WeightsLike, avoid: WeightsLike, strength: ScalarLike) -> Weights:
    r"""Moves a point away from another, along the line through both.

    $$
    y = x + s\,(x - b)
    $$

    The distance scales, $\lVert y - b \rVert = |1 + s|\,\lVert x - b \rVert$, and the maps form a
    group: strengths $s$ and then $t$ are strength $s + t + st$, with inverse $-s/(1 + s)$. They
    commute with averages, permutations and rotations. $s = 0$ and $x = b$ change nothing, bit
    for bit; $s \in (-1, 0)$ moves towards $b$, $s = -1$ lands on it, $s < -1$ beyond.

    Averages: points repelled from $b$ average to their average repelled from $b$. Repelling
    points from *their own average* therefore leaves the average where it is.

    Args:
        point: The weights $x$.
        avoid: The weights $b$ to move away from, of the same layout.
        strength: The strength $s$, any real number; of a negative weight,
            [`strength_of`][wspace.negative.strength_of] it.

    Returns:
        The weights $y$, each leaf in the dtype of that leaf of `point`.

    Raises:
        ValueError: If the trees differ in structure or in a leaf's shape, or `strength` is
            known and not finite.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import negative
        >>> negative.repel({"w": jnp.array([1.0, 2.0])}, {"w": jnp.zeros(2)}, 0.5)
        {'w': Array([1.5, 3. ], dtype=float32)}

    References:
        The map of task negation, G. Ilharco et al., *Editing Models with Task Arithmetic*,
        ICLR 2023, [arXiv:2212.04089](https://arxiv.org/abs/2212.04089), without a base.
    """
    _checks.same_layout(point=point, avoid=avoid)
    return _extrapolated((_checks.scalar("strength", strength),), (point, point, avoid))


def guide(
    base: WeightsLike, positive: WeightsLike, negative: WeightsLike, scale: ScalarLike
) -> Weights:
    r"""Moves a point along the difference of two others, as guidance does.

    $$
    y = \theta + g\,(p - n)
    $$

    Classifier-free guidance is `guide(n, p, n, g)`, or the same as `guide(p, p, n, g - 1)`; a
    negative prompt takes the place of $n$. `repel(x, b, s)` is `guide(x, x, b, s)`.

    Args:
        base: The weights $\theta$.
        positive: The weights $p$ to move towards, of the same layout.
        negative: The weights $n$ to move away from, of the same layout.
        scale: The scale $g$, any real number.

    Returns:
        The weights $y$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: If the trees differ in structure or in a leaf's shape, or `scale` is known
            and not finite.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import negative
        >>> negative.guide(jnp.array([0.0]), jnp.array([3.0]), jnp.array([1.0]), 2.0)
        Array([4.], dtype=float32)

    References:
        J. Ho, T. Salimans, *Classifier-Free Diffusion Guidance*, 2022,
        [arXiv:2207.12598](https://arxiv.org/abs/2207.12598).
    """
    _checks.same_layout(base=base, positive=positive, negative=negative)
    return _extrapolated((_checks.scalar("scale", scale),), (base, positive, negative))


def remove_member(average: WeightsLike, member: WeightsLike, coefficient: ScalarLike) -> Weights:
    r"""Takes one member out of an average, exactly.

    $$
    M_{-j} = \frac{M - a_j x_j}{1 - a_j} = M + \frac{a_j}{1 - a_j}\,(M - x_j)
    $$

    With $M = \sum_i a_i x_i$ and $\sum_i a_i = 1$ this is the average of the other members with
    their coefficients divided by their sum: the negative weight of an average *is* the
    removal of a member.

    Args:
        average: The average $M$, computed with normalized coefficients.
        member: The member $x_j$, of the same layout.
        coefficient: Its normalized coefficient $a_j$, of any sign.

    Returns:
        The average of the others, each leaf in the dtype of that leaf of `average`. Rounding in
            the average grows by $1 / |1 - a_j|$.

    Raises:
        ValueError: If $|1 - a_j| \le 10^{-6}\,(1 + |a_j|)$, where no other member is left (NaN if
            the coefficient is traced), or it is not finite; or if the trees differ in structure or
            in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import negative
        >>> negative.remove_member(jnp.array([2.0]), jnp.array([5.0]), 0.25)
        Array([1.], dtype=float32)

    References:
        The reference model of A. Halimi et al., *Federated Unlearning: How to Efficiently Erase
        a Client in FL?*, 2022, [arXiv:2207.05521](https://arxiv.org/abs/2207.05521).
    """
    weight = _checks.scalar(
        "coefficient", coefficient, lambda a: abs(1 - a) > 1e-6 * (1 + abs(a)), "finite and not 1"
    )
    return repel(average, member, weight / (1 - weight))


def strength_of(weight: ScalarLike) -> Scalar:
    r"""The strength of a negative weight.

    $$
    s = \frac{v}{1 - v}
    $$

    Averaging $x$ with weight $1$ and $b$ with weight $-v$, divided by their sum, is repelling
    $x$ from $b$ with this strength; the guidance scale is $1 + s$.

    Args:
        weight: The size $v < 1$ of the negative weight.

    Returns:
        The strength, greater than $-1$, in at least float32.

    Raises:
        ValueError: If `weight` is known and not below $1$, where the map has its pole; NaN if it
            is traced.

    Examples:
        >>> from wspace import negative
        >>> negative.strength_of(0.5)
        Array(1., dtype=float32)
    """
    weight = _checks.scalar("weight", weight, lambda v: v < 1, "finite and below 1")
    return _checks.floating(weight / (1 - weight))
