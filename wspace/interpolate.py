r"""Paths between points of weight space.

A path is a function of $t$ that is its first point at $t = 0$ and its last one at $t = 1$, both
exactly. Any real $t$ is allowed: outside $[0, 1]$ the path extrapolates, and $t < 0$ moves away
from the end.

A tree is one vector. For a path per tensor use
[`tree.per_leaf`][wspace.tree.per_leaf], for many $t$ at once `jax.vmap`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from wspace import _checks, _lift, geometry, tree
from wspace._checks import OneOrEach
from wspace._numerics import (
    accumulator,
    arcsin_of_root_squared,
    coarsest_eps,
    safe_sqrt,
    sinc_of_square,
    unstacked,
)
from wspace.typing import ByLeaf, Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["bezier", "lerp", "polygonal_chain", "slerp"]


@_lift.elementwise
def _segment(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (t,), (x, y) = scalars, arrays
    return (1 - t) * x + t * y


def lerp(start: WeightsLike, end: WeightsLike, t: ByLeaf) -> Weights:
    r"""Linear interpolation, the straight segment between two points.

    Known as LERP; between a base and a model tuned from it, as WiSE-FT; from slow weights to fast
    ones, as a step of Lookahead.

    $$
    \theta(t) = (1 - t)\,\theta_0 + t\,\theta_1
    $$

    Args:
        start: The weights $\theta_0$.
        end: The weights $\theta_1$, of the same layout.
        t: Position along the path, or one for each [leaf][wspace.typing.ByLeaf].

    Returns:
        The weights $\theta(t)$, each leaf in the dtype of that leaf of `start`.

    Raises:
        ValueError: If the trees differ in structure or in a leaf's shape, or `t` is known and
            not finite.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import interpolate
        >>> interpolate.lerp({"w": jnp.zeros(2)}, {"w": jnp.ones(2)}, 0.25)
        {'w': Array([0.25, 0.25], dtype=float32)}

    References:
        J. Frankle et al., *Linear Mode Connectivity and the Lottery Ticket Hypothesis*,
        ICML 2020, [arXiv:1912.05671](https://arxiv.org/abs/1912.05671).
    """
    _checks.same_layout(start=start, end=end)
    return _segment((_checks.by_leaf("t", t, start),), (start, end))


@_lift.elementwise
def _arc(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (a, b, c), (x, y) = scalars, arrays
    return a * x + b * y + c * (x + y)


def slerp(start: WeightsLike, end: WeightsLike, t: ByLeaf) -> Weights:
    r"""Spherical linear interpolation, an arc turning at constant angular speed.

    Known as SLERP.

    $$
    \theta(t) = \frac{\sin((1 - t)\,\Omega)}{\sin \Omega}\,\theta_0
              + \frac{\sin(t\,\Omega)}{\sin \Omega}\,\theta_1,
    \qquad \Omega = \angle(\theta_0, \theta_1)
    $$

    The norm is constant along the path if both ends have the same norm; otherwise they are
    used as they are, not normalized. As $\Omega \to 0$ the path tends to
    [`lerp`][wspace.interpolate.lerp] smoothly, with the true derivatives of every order,
    since the coefficients are functions of $\Omega^2$; there is no switch to `lerp`. If
    either end is the zero tree the path is `lerp`.

    With a position for each leaf, the angle is still the one between the whole trees.

    Args:
        start: The weights $\theta_0$.
        end: The weights $\theta_1$, of the same layout.
        t: Position along the path, or one for each [leaf][wspace.typing.ByLeaf].

    Returns:
        The weights $\theta(t)$, each leaf in the dtype of that leaf of `start`.

    Raises:
        ValueError: If the ends are antipodal, where no arc is distinguished: within
            $\sqrt{\varepsilon}$ of $\Omega = \pi$, where the rounding of the ends alone turns
            half the digits of the arc, or within the $\varepsilon$ of ends in half precision (all
            leaves NaN if traced), as two numbers of different sign are by themselves. Also if the
            trees differ in structure or in a leaf's shape, or
            `t` is known and not finite.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import interpolate
        >>> interpolate.slerp(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), 1 / 3)
        Array([0.8660254, 0.5      ], dtype=float32)

    References:
        K. Shoemake, *Animating Rotation with Quaternion Curves*, SIGGRAPH 1985.
    """
    _checks.same_layout(start=start, end=end)
    t = _checks.by_leaf("t", t, start)
    return _turned(start, end, t, _half_angle(start, end, t))


def slerp_unless_aligned(
    start: WeightsLike, end: WeightsLike, t: ByLeaf, *, cosine: float
) -> Weights:
    """`slerp`, but `lerp` where the cosine of the angle is larger in size, as some systems do it.

    So do ends that are opposite, such as two numbers of different sign, have a path. Not traced.
    """
    _checks.same_layout(start=start, end=end)
    t = _checks.by_leaf("t", t, start)
    half = _half_angle(start, end, t)
    apart = half[1] - half[0]
    if not _checks.is_traced(apart) and abs(float(apart)) > cosine:
        return _segment((t,), (start, end))
    return _turned(start, end, t, half)


def _turned(
    start: WeightsLike, end: WeightsLike, t: OneOrEach, half: tuple[Scalar, Scalar]
) -> Weights:
    """The point of an arc between ends, given the squared sine and cosine of half the angle."""
    sine, cosine = half
    stored = coarsest_eps(leaf.dtype for leaf in jax.tree.leaves((start, end)))
    least = max(stored, float(jnp.finfo(sine.dtype).eps) ** 0.5)
    scalars, antipodal = _weights(sine, cosine, t, least)
    _checks.refuse(
        antipodal,
        lambda: (
            "start and end are antipodal, so no arc between them is distinguished: "
            "take lerp, or two arcs by way of a point beside them"
        ),
    )
    return _arc(scalars, (start, end))


def _half_angle(x: WeightsLike, y: WeightsLike, t: OneOrEach) -> tuple[Scalar, Scalar]:
    r"""$\sin^2$ and $\cos^2$ of half the angle, as accurate as the coefficients of an arc ask for.

    These are functions of the angle squared, so that between the ends inner products will do up to
    a right angle, in which a small angle would lose half of its digits. Towards the antipode they
    would not, nor far beyond the ends, where $t$ multiplies the angle.
    """
    sine, cosine, precise = _acute(geometry.pair_sums((), (x, y)), t)
    if not _checks.is_traced(precise):
        return geometry.half_angle(x, y) if precise else (sine, cosine)
    return jax.lax.cond(precise, geometry.half_angle, lambda *_: (sine, cosine), x, y)


@jax.jit
def _acute(sums: Array, t: OneOrEach) -> tuple[Scalar, Scalar, Bool[Array, ""]]:
    """The halves from inner products, and whether more digits are asked for."""
    square, product, other = sums
    size = safe_sqrt(square) * safe_sqrt(other)
    cosine = jnp.where(size == 0, 1, product / jnp.where(size == 0, 1, size))
    far = jnp.any(jnp.abs(jnp.asarray(t).astype(cosine.dtype) - 0.5) > 1)
    return (1 - cosine) / 2, (1 + cosine) / 2, far | (cosine < 0)


@jax.jit
def _weights(
    sine: Scalar, cosine: Scalar, t: OneOrEach, least: OneOrEach
) -> tuple[tuple[Array, Array, Array], Bool[Array, ""]]:
    """The coefficients of the start, of the end, and of their sum; whether there are none.

    There are none where the angle left to the antipode is below the `least`.
    """
    t = jnp.asarray(t).astype(sine.dtype)
    # Beyond a right angle work with the angle left to the antipode, pi - Omega = `short`.
    wide = sine > cosine
    root = safe_sqrt(jnp.where(wide, cosine, 0.25))
    short = 2 * jnp.arcsin(root)
    square = jnp.where(
        wide, (jnp.pi - short) ** 2, 4 * arcsin_of_root_squared(jnp.where(wide, 0, sine))
    )

    def coefficient(s: Array) -> Array:
        return s * sinc_of_square(s**2 * square) / sinc_of_square(square)

    # There the ends nearly cancel: separate their sum from their difference, except at the ends.
    inner = jnp.where(t < 0.5, t, 1 - t)
    along = jnp.sin(jnp.pi * inner + (0.5 - inner) * short) / (2 * root)
    across = jnp.sin((t - 0.5) * (jnp.pi - short)) / (2 * jnp.cos(short / 2))
    parted = wide & (inner != 0)
    antipodal = wide & (short < least)
    coefficients = (
        jnp.where(parted, -across, coefficient(1 - t)),
        jnp.where(parted, across, coefficient(t)),
        jnp.where(antipodal, jnp.nan, jnp.where(parted, along, 0)),
    )
    return coefficients, antipodal


@_checks.of_points
def bezier(points: Sequence[WeightsLike], t: ScalarLike) -> Weights:
    r"""Bezier curve, which leaves its first point and arrives at its last one, bent by the rest.

    Known from mode connectivity, where its bends are trained to a path of low loss.

    $$
    \theta(t) = \sum_{i=0}^{n} \binom{n}{i}\, t^i (1 - t)^{n - i}\, \theta_i
    $$

    For $0 \le t \le 1$ an average, so the curve stays in the convex hull of its points; for
    other $t$ the polynomial goes on. Commutes with every affine map of weight space. It sets out
    with speed $n\,(\theta_1 - \theta_0)$ and arrives with $n\,(\theta_n - \theta_{n-1})$. One
    point is a path that rests; with two the curve is [`lerp`][wspace.interpolate.lerp].

    The coefficients come by de Casteljau's recurrence from a degree to the next, in which terms of
    one sign are added for every $t$, so that no binomial overflows, however many points there are.

    Args:
        points: The $\theta_i$, trees of one layout, at least one: the ends, and between them the
            bends, which the curve does not pass through.
        t: Position along the curve.

    Returns:
        The weights $\theta(t)$, each leaf in the dtype of that leaf of the first point.

    Raises:
        ValueError: If there is no point, the points differ in structure or in a leaf's shape, or
            `t` is known and not finite.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import interpolate
        >>> start, bend, end = jnp.array([0.0, 0.0]), jnp.array([1.0, 2.0]), jnp.array([2.0, 0.0])
        >>> interpolate.bezier([start, bend, end], 0.5)
        Array([1., 1.], dtype=float32)

    References:
        T. Garipov et al., *Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs*,
        NeurIPS 2018, section 3, [arXiv:1802.10026](https://arxiv.org/abs/1802.10026).
    """
    points, t, last = _path(points, t)
    if isinstance(t, float):
        each = np.eye(1, last + 1)[0]
        with np.errstate(over="ignore", invalid="ignore"):  # combine refuses what is not finite
            for _ in range(last):
                each = (1 - t) * each + t * np.roll(each, 1)
        return tree.combine(each, points)
    place = jnp.asarray(t)
    each = jnp.eye(1, last + 1, dtype=place.dtype)[0]
    each = jax.lax.fori_loop(0, last, lambda _, c: (1 - place) * c + place * jnp.roll(c, 1), each)
    return tree.combine(unstacked(each), points)


@_checks.of_points
def polygonal_chain(points: Sequence[WeightsLike], t: ScalarLike) -> Weights:
    r"""Chain of segments through all points, each of them taking the same share of $t$.

    $$
    \theta(t) = (1 - u)\,\theta_i + u\,\theta_{i+1}, \qquad
    i = \min(\max(\lfloor n t \rfloor, 0), n - 1), \quad u = n t - i
    $$

    Passes through $\theta_i$ at $t = i/n$. Outside $[0, 1]$ the first and the last segment go
    on. Commutes with every affine map of weight space. One point is a path that rests; with two
    the chain is [`lerp`][wspace.interpolate.lerp].

    Args:
        points: The $\theta_i$, trees of one layout, at least one.
        t: Position along the chain. The derivative at a bend is the slope of the segment which
            begins there.

    Returns:
        The weights $\theta(t)$, each leaf in the dtype of that leaf of the first point.

    Raises:
        ValueError: If there is no point, the points differ in structure or in a leaf's shape, or
            `t` is known and not finite.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import interpolate
        >>> start, bend, end = jnp.array([0.0, 0.0]), jnp.array([1.0, 2.0]), jnp.array([2.0, 0.0])
        >>> interpolate.polygonal_chain([start, bend, end], 0.75)
        Array([1.5, 1. ], dtype=float32)

    References:
        T. Garipov et al., *Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs*,
        NeurIPS 2018, section 3, [arXiv:1802.10026](https://arxiv.org/abs/1802.10026).
    """
    points, t, last = _path(points, t)
    if isinstance(t, float):
        first = min(max(math.floor(last * t), 0), max(last - 1, 0))
        return _on_segment(points[0], points[first : first + 2], float(last * t - first))
    first = jnp.minimum(jnp.maximum(jnp.floor(last * t), 0), last - 1)
    part = last * t - first
    return tree.combine(
        [
            # Nothing is 0 * part, so that a traced t that is not finite gives NaN, not zero.
            jnp.where(i == first, 1 - part, jnp.where(i == first + 1, part, 0 * part))
            for i in range(last + 1)
        ],
        points,
    )


def _on_segment(first: WeightsLike, ends: Sequence[WeightsLike], part: float) -> Weights:
    """A point of a segment, or its one end, in the dtypes of the first point of a chain."""
    c = (1 - part, part)[: len(ends)]
    dtypes = [[leaf.dtype for leaf in jax.tree.leaves(x)] for x in (first, ends[0])]
    # Where dtypes are the same, the first point is not read.
    return tree.combine(c, ends) if dtypes[0] == dtypes[1] else _like(c, (first, *ends))


@_lift.elementwise
def _like(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    _, *ends = arrays
    terms = [c * x for c, x in zip(scalars, ends, strict=True)]
    return functools.reduce(jnp.add, terms)


def _path(
    points: Sequence[WeightsLike], t: ScalarLike
) -> tuple[list[WeightsLike], Scalar | float, int]:
    """The points, `t`, in the dtype of the arithmetic where it is traced, and the last index."""
    points = _checks.listed("points", points)
    _checks.same_layout(**_checks.each("points", points))
    place: Any = _checks.scalar("t", t)
    if not _checks.is_traced(place):
        return points, np.float64(float(place)), len(points) - 1
    wide = accumulator(*(leaf.dtype for leaf in jax.tree.leaves(points)))
    return points, jnp.asarray(place).astype(wide), len(points) - 1
