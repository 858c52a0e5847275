r"""Paths between two points of weight space.

A path is a function of $t$ that is $\theta_0$ (`start`) at $t = 0$ and $\theta_1$ (`end`) at
$t = 1$, both exactly. Any real $t$ is allowed: outside $[0, 1]$ the path extrapolates, and
$t < 0$ moves away from `end`.

A tree is one vector. For a path per tensor use
[`tree.per_leaf`][wspace.tree.per_leaf], for many $t$ at once `jax.vmap`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

from wspace import _checks, geometry, tree
from wspace._numerics import arcsin_of_root_squared, safe_sqrt, sinc_of_square
from wspace.typing import Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["lerp", "slerp"]


@tree.elementwise
def _segment(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (t,), (x, y) = scalars, arrays
    return (1 - t) * x + t * y


def lerp(start: WeightsLike, end: WeightsLike, t: ScalarLike) -> Weights:
    r"""Linear interpolation, the straight segment between two points.

    $$
    \theta(t) = (1 - t)\,\theta_0 + t\,\theta_1
    $$

    Args:
        start: The weights $\theta_0$.
        end: The weights $\theta_1$, of the same layout.
        t: Position along the path.

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
    return _segment((_checks.scalar("t", t),), (start, end))


@tree.elementwise
def _arc(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (a, b, c), (x, y) = scalars, arrays
    return a * x + b * y + c * (x + y)


def slerp(start: WeightsLike, end: WeightsLike, t: ScalarLike) -> Weights:
    r"""Spherical linear interpolation, an arc turning at constant angular speed.

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

    Args:
        start: The weights $\theta_0$.
        end: The weights $\theta_1$, of the same layout.
        t: Position along the path.

    Returns:
        The weights $\theta(t)$, each leaf in the dtype of that leaf of `start`. All leaves
        are NaN if the ends are antipodal, where no arc is distinguished: within
        $\sqrt{\varepsilon}$ of $\Omega = \pi$, where the rounding of the ends alone turns
        half the digits of the arc.

    Raises:
        ValueError: If the trees differ in structure or in a leaf's shape, or `t` is known and
            not finite.
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
    sine, cosine = geometry.half_angle(start, end)
    t = jnp.asarray(_checks.scalar("t", t)).astype(sine.dtype)

    # Beyond a right angle work with the angle left to the antipode, pi - Omega = `short`.
    wide = sine > cosine
    root = safe_sqrt(jnp.where(wide, cosine, 0.25))
    short = 2 * jnp.arcsin(root)
    square = jnp.where(
        wide, (jnp.pi - short) ** 2, 4 * arcsin_of_root_squared(jnp.where(wide, 0, sine))
    )

    def coefficient(s: Scalar) -> Scalar:
        return s * sinc_of_square(s**2 * square) / sinc_of_square(square)

    # There the ends nearly cancel: separate their sum from their difference, except at the ends.
    inner = jnp.where(t < 0.5, t, 1 - t)
    along = jnp.sin(jnp.pi * inner + (0.5 - inner) * short) / (2 * root)
    across = jnp.sin((t - 0.5) * (jnp.pi - short)) / (2 * jnp.cos(short / 2))
    parted = wide & (inner != 0)
    antipodal = wide & (short < jnp.sqrt(jnp.finfo(sine.dtype).eps))
    scalars = (
        jnp.where(parted, -across, coefficient(1 - t)),
        jnp.where(parted, across, coefficient(t)),
        jnp.where(antipodal, jnp.nan, jnp.where(parted, along, 0)),
    )
    return _arc(scalars, (start, end))
