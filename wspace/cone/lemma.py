"""What the norm and the tail of a projection say: support, reach, entry and exit."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from wspace import _checks, lowrank, tree
from wspace._numerics import safe_sqrt, stored_rounding, with_nan_of
from wspace._records import record
from wspace.cone.cones import Cone, Projection, holds_only_zero, projected, sizes_of
from wspace.cone.spectra import finite_edit, ratio
from wspace.lowrank import LowRank
from wspace.typing import Scalar, ScalarLike

__all__ = ["Move", "entry", "exit", "reach", "support"]


@record
class Move(NamedTuple):
    """The least edit that brings a displacement to a radius.

    Attributes:
        edit: The edit, to be added; NaN if there is none.
        norm: Its norm; infinite if there is none.
    """

    edit: PyTree
    norm: Scalar


def support(cone: Cone, displacement: PyTree, budget: ScalarLike) -> Scalar:
    r"""The largest inner product with a displacement that edits of given norm can have.

    $$
    \max \{ \langle E, D \rangle : D \in K,\ \lVert D \rVert \le d \} = d\, \lVert P E \rVert
    $$

    Attained by the multiple of $P E$ with norm $d$. With $E$ the gradient of a loss it is the most
    that an edit of that size can change the loss, to first order.

    Args:
        cone: The cone $K$ of edits.
        displacement: The displacement $E$, a tree with dense or `LowRank` leaves.
        budget: The norm $d \ge 0$.

    Returns:
        The largest inner product, in at least float32.

    Raises:
        ValueError: If `budget` is known and negative or not finite (NaN if traced), and as
            [`project`][wspace.cone.project] does.
        TypeError: As [`project`][wspace.cone.project] does.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import cone
        >>> cone.support(cone.Sparse(1), jnp.array([3.0, -4.0]), 0.5)
        Array(2., dtype=float32)
    """
    budget = _checks.nonnegative("budget", budget)
    norm, _ = sizes_of(cone, displacement)
    return jnp.asarray(budget).astype(norm.dtype) * norm


def reach(cone: Cone, displacement: PyTree, budget: ScalarLike) -> Scalar:
    r"""The distance that the best edit of given norm leaves of a displacement.

    $$
    \min \{ \lVert E - D \rVert : D \in K,\ \lVert D \rVert \le d \}
        = \sqrt{\operatorname{tail}^2 + \max(\lVert P E \rVert - d, 0)^2}
    $$

    Args:
        cone: The cone $K$ of edits.
        displacement: The displacement $E$, a tree with dense or `LowRank` leaves.
        budget: The norm $d \ge 0$.

    Returns:
        The distance left, in at least float32.

    Raises:
        ValueError: If `budget` is known and negative or not finite (NaN if traced), and as
            [`project`][wspace.cone.project] does.
        TypeError: As [`project`][wspace.cone.project] does.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import cone
        >>> cone.reach(cone.Rank(1), jnp.diag(jnp.array([9.0, 3.0])), 5.0)
        Array(5., dtype=float32)
    """
    budget = _checks.nonnegative("budget", budget)
    norm, tail = tree.widened(*sizes_of(cone, displacement))
    left = norm - jnp.asarray(budget).astype(norm.dtype)
    return safe_sqrt(tail**2 + _curving(displacement, norm, tail) + jnp.where(left < 0, 0, left**2))


def _curving(displacement: PyTree, norm: Scalar, tail: Scalar) -> Scalar:
    r"""Zero, with the derivatives of $\operatorname{tail}^2$ where the tail is zero.

    There the tail has a kink, and its square none: it is what the square of the norm of the
    projection leaves of the square of the norm.
    """
    rest = lowrank.vdot(displacement, displacement).astype(norm.dtype) - norm**2
    return jnp.where(tail == 0, rest - jax.lax.stop_gradient(rest), 0)


def entry(cone: Cone, displacement: PyTree, radius: ScalarLike) -> Move:
    r"""The least edit in a cone that brings a displacement into a ball about zero.

    $$
    \min \{ \lVert D \rVert : D \in K,\ \lVert E + D \rVert \le \rho \}
        = \lVert P E \rVert - \sqrt{\rho^2 - \operatorname{tail}^2}
        = \frac{(e - \rho)(e + \rho)}
               {\lVert P E \rVert + \sqrt{(\rho - \operatorname{tail})(\rho + \operatorname{tail})}}
    $$

    with $e = \lVert E \rVert$. The edit is a negative multiple of $P E$ and lands on the sphere,
    computed in the second form, in which nothing cancels. In a cone that does not hold $-D$ with
    $D$, norm and tail belong to $-E$, and the edit is a positive multiple of $P(-E)$. For the
    displacement of an average from a point to avoid, the norm is what an edit in the cone needs at
    least to undo a guard. Within the ball, $\rho \ge e$, nothing has to move.

    Args:
        cone: The cone $K$ of edits.
        displacement: The displacement $E$, a tree with dense or `LowRank` leaves.
        radius: The radius $\rho \ge 0$.

    Returns:
        A [`Move`][wspace.cone.Move] with the `edit`, as [`project`][wspace.cone.project] returns
            it, and its `norm`; an infinite norm and an edit of NaN if $\operatorname{tail} > \rho$,
            where no edit of the cone gets there.

    Raises:
        ValueError: If `radius` is known and negative or not finite (NaN if traced), and as
            [`project`][wspace.cone.project] does.
        TypeError: As [`project`][wspace.cone.project] does.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import cone
        >>> move = cone.entry(cone.Sparse(1), jnp.array([3.0, -9.0]), 5.0)
        >>> round(float(move.norm), 4), jnp.round(move.edit[1], 4)
        (5.0, Array(5., dtype=float32))
        >>> cone.entry(cone.Sparse(1), jnp.array([3.0, -9.0]), 2.0).norm
        Array(inf, dtype=float32)
    """
    radius = _checks.nonnegative("radius", radius)
    finite_edit(displacement=displacement)
    nearest = projected(cone, lowrank.scale(-1, displacement))
    norm, tail = tree.widened(nearest.norm, nearest.tail)
    curving = _curving(displacement, norm, tail)
    size = safe_sqrt(norm**2 + tail**2 + curving)
    radius = jnp.asarray(radius).astype(size.dtype)
    outside, feasible = size > radius, tail <= radius
    root = safe_sqrt(jnp.where(feasible, (radius - tail) * (radius + tail) - curving, 0))
    step = ratio((size - radius) * (size + radius), norm + root)
    step = jnp.where(outside, jnp.where(feasible, step, jnp.inf), 0)
    step = with_nan_of(step, radius, size)
    return Move(_of_length(nearest, step), step)


def exit(cone: Cone, displacement: PyTree, radius: ScalarLike) -> Move:
    r"""The least edit in a cone that brings a displacement out of a ball about zero.

    $$
    \begin{aligned}
    \min \{ \lVert D \rVert : D \in K,\ \lVert E + D \rVert \ge \rho \}
        &= -\lVert P E \rVert + \sqrt{\lVert P E \rVert^2 + \rho^2 - e^2} \\
        &= \frac{(\rho - e)(\rho + e)}
               {\lVert P E \rVert + \sqrt{\lVert P E \rVert^2 + (\rho - e)(\rho + e)}}
    \end{aligned}
    $$

    with $e = \lVert E \rVert$. The edit is a positive multiple of $P E$ and lands on the sphere.
    Outside the ball, $e \ge \rho$, nothing has to move.

    Args:
        cone: The cone $K$ of edits.
        displacement: The displacement $E$, a tree with dense or `LowRank` leaves.
        radius: The radius $\rho \ge 0$.

    Returns:
        A [`Move`][wspace.cone.Move] with the `edit`, as [`project`][wspace.cone.project] returns
            it, and its `norm`; an infinite norm and an edit of NaN if the cone holds nothing but
            zero.

    Raises:
        ValueError: If the displacement is zero or has no part in the cone, $\lVert P E \rVert \le
            64\,\varepsilon\, e < \rho$, where all ways out are equally long and none is
            distinguished, $\varepsilon$ of the dtype stored if that is half precision (NaN if
            traced); if `radius` is known and negative or not finite (NaN if
            traced); and as [`project`][wspace.cone.project] does.
        TypeError: As [`project`][wspace.cone.project] does.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import cone
        >>> move = cone.exit(cone.Rank(1), jnp.array([3.0, 4.0]), 10.0)
        >>> move.edit, move.norm
        (Array([3., 4.], dtype=float32), Array(5., dtype=float32))
    """
    radius = _checks.nonnegative("radius", radius)
    finite_edit(displacement=displacement)
    nearest = projected(cone, displacement)
    norm, tail = tree.widened(nearest.norm, nearest.tail)
    size = safe_sqrt(norm**2 + tail**2 + _curving(displacement, norm, tail))
    radius = jnp.asarray(radius).astype(size.dtype)
    inside, nothing = size < radius, holds_only_zero(cone)
    share = stored_rounding(jax.tree.leaves(displacement), size.dtype).share
    gap = jnp.where(inside, (radius - size) * (radius + size), 0)
    step = ratio(gap, norm + safe_sqrt(norm**2 + gap))
    step = _checks.poisoned(
        with_nan_of(jnp.where(inside & nothing, jnp.inf, step), radius, size),
        ~jnp.isfinite(size) | (inside & ~nothing & ~(norm > share * size)),
        lambda: (
            f"displacement, of norm {size:.3g}, has a part of norm {norm:.3g} in the cone, so no "
            "way out is distinguished: give a displacement that is not orthogonal to the cone"
        ),
    )
    return Move(_of_length(nearest, step), step)


def _of_length(nearest: Projection, step: Scalar) -> PyTree:
    """The edit of length `step` along a projection; NaN where that is infinite."""
    factor = jnp.where(jnp.isinf(step), jnp.nan, ratio(step, nearest.norm))
    return jax.tree.map(
        lambda x: (
            LowRank(factor.astype(x.left.dtype) * x.left, x.right)
            if isinstance(x, LowRank)
            else factor.astype(x.dtype) * x
        ),
        nearest.edit,
        is_leaf=_checks.is_factored,
    )
