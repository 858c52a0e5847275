r"""One map: the homothety about a point to avoid.

Strength $s$, negative weight $v$ and guidance scale $g$ are three names of one number:

$$
x + s\,(x - b) = \frac{x - v\,b}{1 - v} = b + g\,(x - b),
\qquad s = \frac{v}{1 - v}, \quad g = 1 + s = \frac{1}{1 - v}
$$
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from wspace import _checks, _lift, tree
from wspace._numerics import gap_times, plus, unstacked
from wspace.negative.allowance import allowances, moved_by
from wspace.typing import ByLeaf, Layout, Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["guide", "guide_perpendicular", "remove_member", "repel", "strength_of"]


@_lift.elementwise
def _extrapolated(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (s,), (base, positive, negative) = scalars, arrays
    return plus(base, gap_times(s, positive, negative))


def repel(
    point: WeightsLike,
    avoid: WeightsLike,
    strength: ByLeaf,
    *,
    allow: PyTree | None = None,
    layout: Layout = "in_out",
) -> Weights:
    r"""Moves a point away from another, along the line through both.

    Known as task negation, where `avoid` is the tuned model and `point` its base.

    $$
    y = x + s\,(x - b), \qquad \text{or} \quad y = x + s\, P (x - b) \quad
    \text{where only the range of } P \text{ is allowed}
    $$

    The distance scales, $\lVert y - b \rVert = |1 + s|\,\lVert x - b \rVert$, and strengths $s$ and
    then $t$ are strength $s + t + st$: those with $s \ne -1$ form a group, the inverse of $s$ being
    $-s/(1 + s)$. They commute with averages, permutations and rotations. $s = 0$ and $x = b$ change
    nothing, bit for bit; $s \in (-1, 0)$ moves towards $b$, $s = -1$ lands on it, $s < -1$ beyond.
    Of one model stored in two dtypes the difference is rounding, and the map enlarges that.

    Averages: points repelled from $b$ average to their average repelled from $b$. Repelling
    points from *their own average* therefore leaves the average where it is.

    With a projector $P$ the same holds of what may move, and the rest stays:
    $(I - P)\, y = (I - P)\, x$ and $\lVert y - b \rVert^2 = \lVert (I - P)(x - b) \rVert^2
    + (1 + s)^2\, \lVert P (x - b) \rVert^2$. A frozen leaf comes back bit for bit.

    Args:
        point: The weights $x$.
        avoid: The weights $b$ to move away from, of the same layout.
        strength: The strength $s$, any real number, or one for each [leaf][wspace.typing.ByLeaf];
            of a negative weight, [`strength_of`][wspace.negative.strength_of] it.
        allow: Where the point may move; everywhere if not given. A tree like the weights with,
            at each leaf, `1.0` (free), `0.0` (frozen), or for a matrix `x @ W` a projector
            `(in, in)` onto the inputs whose rows may change, such as
            [`free_inputs`][wspace.negative.free_inputs] gives, or another symmetric positive
            semidefinite matrix: one entry of the `allow` of
            [`retarget`][wspace.negative.retarget].
        layout: How the layers store their matrices, as there.

    Returns:
        The weights $y$, each leaf in the dtype of that leaf of `point`.

    Raises:
        ValueError: If the trees differ in structure or in a leaf's shape, `strength` is known and
            not finite, or an entry of `allow` is not symmetric positive semidefinite (NaN if
            traced) or does not fit its leaf.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import negative
        >>> negative.repel({"w": jnp.array([1.0, 2.0])}, {"w": jnp.zeros(2)}, 0.5)
        {'w': Array([1.5, 3. ], dtype=float32)}
        >>> point = {"w": jnp.array([1.0]), "b": jnp.array([2.0])}
        >>> avoid = {"w": jnp.array([0.0]), "b": jnp.array([0.0])}
        >>> moved = negative.repel(point, avoid, 0.5, allow={"w": 1.0, "b": 0.0})
        >>> moved["w"].tolist(), moved["b"].tolist()
        ([1.5], [2.0])

    References:
        The map of task negation, G. Ilharco et al., *Editing Models with Task Arithmetic*,
        ICLR 2023, [arXiv:2212.04089](https://arxiv.org/abs/2212.04089), without a base.
    """
    _checks.known_layout(layout)
    _checks.same_layout(point=point, avoid=avoid)
    strength = _checks.by_leaf("strength", strength, point)
    if allow is None:
        return _extrapolated((strength,), (point, point, avoid))
    (allowed,) = allowances({"allow": allow}, layout, [point], avoid)
    away = tree.combine((1, -1), (point, avoid), rounded=False)
    return tree.displaced((strength,), (point, moved_by(allowed, away)))


def guide(
    base: WeightsLike, positive: WeightsLike, negative: WeightsLike, scale: ScalarLike
) -> Weights:
    r"""Moves a point along the difference of two others, as guidance does.

    Known from outputs as classifier-free guidance and as a negative prompt; here it is of weights.

    $$
    y = \theta + g\,(p - n)
    $$

    The coefficients $1, g, -g$ sum to one, so the map is affine, and its uses are cases of it:

    | map | formula | call |
    |---|---|---|
    | classifier-free guidance, native | $u + g\,(c - u)$ | `guide(u, c, u, g)` |
    | the same, original, with $g = 1 + s$ | $c + s\,(c - u)$ | `guide(c, c, u, s)` |
    | a negative prompt $n$ in place of $u$ | $n + g\,(c - n)$ | `guide(n, c, n, g)` |
    | [`repel`][wspace.negative.repel] | $x + s\,(x - b)$ | `guide(x, x, b, s)` |

    A negative takes away from the positive whatever the two have in common;
    [`guide_perpendicular`][wspace.negative.guide_perpendicular] leaves that.

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


@_lift.elementwise
def _perpendicular(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (g, w, share), (base, positive, negative) = scalars, arrays
    p, n = positive - base, negative - base
    return base + g * (p - w * (n - share * p))


@_lift.reduction
def _along_positive(_: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    base, positive, negative = arrays
    return [(positive - base) ** 2, (positive - base) * (negative - base)]


def guide_perpendicular(
    base: WeightsLike,
    positive: WeightsLike,
    negative: WeightsLike,
    scale: ScalarLike,
    weight: ScalarLike,
) -> Weights:
    r"""Guides by a positive, and away from what of a negative is perpendicular to it.

    Known from outputs as Perp-Neg; here it is of weights.

    $$
    y = u + g\,\Bigl( d_p - w \Bigl( d_n
        - \frac{\langle d_n, d_p \rangle}{\lVert d_p \rVert^2}\, d_p \Bigr) \Bigr),
    \qquad d_p = p - u, \quad d_n = n - u
    $$

    The negative takes nothing away from the positive: $\langle y - u, d_p \rangle =
    g\, \lVert d_p \rVert^2$ for every $w$. At $w = 0$, or for $d_n$ parallel to $d_p$, this is
    `guide(u, p, u, g)`, classifier-free guidance. Where that and a plain negative prompt are
    affine maps, the same for all points, this one holds a projection, which depends on $d_p$; it
    commutes with translations, rotations and scalings of all. In $n$ it is affine, so several
    negatives are one: $u + \sum_i w_i\,(n_i - u)$ with weight $1$.

    Args:
        base: The weights $u$, such as the unconditional ones.
        positive: The weights $p$ to move towards, of the same layout. If they are `base`, there is
            nothing to be perpendicular to: $y = u - g\,w\,d_n$.
        negative: The weights $n$ to move away from, of the same layout.
        scale: The scale $g$, any real number.
        weight: The size $w$ of the negative weight, any real number: positive moves away from
            `negative`; the weight of a negative prompt has the opposite sign.

    Returns:
        The weights $y$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: If the trees differ in structure or in a leaf's shape, or `scale` or `weight`
            is known and not finite.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import negative
        >>> p, n = jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0])
        >>> negative.guide_perpendicular(jnp.zeros(2), p, n, 2.0, 0.5).tolist()
        [2.0, -1.0]

    References:
        M. Armandpour et al., *Re-imagine the Negative Prompt Algorithm: Transform 2D Diffusion
        into 3D, alleviate Janus problem and Beyond*, 2023,
        [arXiv:2304.04968](https://arxiv.org/abs/2304.04968).
    """
    _checks.same_layout(base=base, positive=positive, negative=negative)
    g, w = _checks.scalar("scale", scale), _checks.scalar("weight", weight)
    square, product = unstacked(_along_positive((), (base, positive, negative)))
    share = product / jnp.where(square == 0, 1, square)
    return _perpendicular((g, w, share), (base, positive, negative))


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
    _checks.same_layout(average=average, member=member)
    return _extrapolated((weight / (1 - weight),), (average, average, member))


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
