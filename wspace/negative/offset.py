r"""Moving a point on by a low-rank term, and the distance that this leaves.

With the displacement $E = T - R$ from a point $R$ to a target $T$, the nearest that an edit of
rank $r$ in every matrix can bring $R$ to $T$ is

$$
\min_{\operatorname{rank} D_\ell \le r} \lVert R + D - T \rVert
    = \Bigl(\sum_\ell \sum_{i > r} \sigma_i(E_\ell)^2\Bigr)^{1/2}
$$

An edit $L$ of an average is an edit of one source: $\operatorname{avg}(A + L/a, C) =
\operatorname{avg}(A, C) + L$. It needs no layer and no access to $A$ or $C$.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from wspace import _checks, _lift, geometry, lowrank, tree
from wspace._numerics import power_of_two, safe_sqrt, settled
from wspace._records import record
from wspace._words import described
from wspace.cone.spectra import Spectra, spectra_of
from wspace.lowrank import Truncation
from wspace.lowrank.spectrum import tail_curve
from wspace.lowrank.truncation import cut_by, displacement, truncate_leaves
from wspace.typing import Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["Route", "curve", "gate", "offset", "rank_to_reach", "route"]


@record
class Route(NamedTuple):
    """How near a low-rank edit brings a point to a target.

    Attributes:
        residual: The distance left after the rank asked for.
        rank_to_reach: The smallest rank that brings it within the radius.
    """

    residual: Scalar
    rank_to_reach: Int[Array, ""]


def offset(
    average: WeightsLike,
    target: WeightsLike,
    rank: int | None = None,
    *,
    energy: ScalarLike | None = None,
    tail: ScalarLike | None = None,
) -> Truncation:
    r"""The edit of given rank that brings a point nearest to a target.

    $$
    D = \arg\min_{\operatorname{rank} D_\ell \le r} \lVert R + D - T \rVert
    $$

    To be added: `lowrank.apply(average, offset(average, target, r).factors)` is the nearest
    that rank $r$ in every matrix can reach, and `tail` its distance from the target. Vectors
    and scalars are matrices with one column: untouched at rank 0, corrected whole from rank 1.
    Offsets add: the best of rank $r_2$ after the best of rank $r_1$ reaches what rank
    $r_1 + r_2$ reaches. By `energy` or `tail` every matrix gets the least rank that keeps this
    share of its own squared displacement, or leaves no more than this distance in it, as in
    [`lowrank.extract`][wspace.lowrank.extract].

    Args:
        average: The point $R$.
        target: The point $T$, of the same layout.
        rank: The rank $r \ge 0$ for every matrix; cut to what a matrix has.
        energy: In place of a rank, the share in $(0, 1]$ of the squared displacement of each matrix
            that its least rank must keep.
        tail: In place of a rank, the distance, at least 0, that the least rank of each matrix may
            leave.

    Returns:
        A [`Truncation`][wspace.lowrank.Truncation] with `factors` a tree of `LowRank` leaves for
            matrices, stacks and convolutions and dense leaves for vectors, all in at least
            float32, and the `tail` over the whole tree.

    Raises:
        ValueError: If not exactly one of rank, energy and tail is given, or one is out of its
            domain; the trees differ in structure or in a leaf's shape; or a known value is NaN or
            infinite.
        TypeError: If `rank` is not an integer, `energy` or `tail` asks for a rank that depends on
            traced values, or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank, negative
        >>> start, target = {"w": jnp.zeros((2, 2))}, {"w": jnp.array([[5.0, 0.0], [0.0, 1.0]])}
        >>> edit = negative.offset(start, target, 1)
        >>> lowrank.apply(start, edit.factors), edit.tail
        ({'w': Array([[5., 0.],
               [0., 0.]], dtype=float32)}, Array(1., dtype=float32))

    References:
        C. Eckart, G. Young, *The approximation of one matrix by another of lower rank*,
        Psychometrika 1, 1936.
    """
    cut = cut_by(rank, energy, tail)
    return truncate_leaves(displacement(average=average, target=target), cut)


def curve(average: WeightsLike, target: WeightsLike) -> Float[Array, " ranks"]:
    r"""Distance left to a target after the best edit of rank 0, 1, 2, ...

    $$
    t_r = \Bigl(\sum_\ell \sum_{i > r} \sigma_i(T_\ell - R_\ell)^2\Bigr)^{1/2}
    $$

    Starts at the distance itself, never rises, its square is convex in $r$, and it ends at $0$,
    exactly, at the largest $\min(m, n)$ of any leaf. Unchanged by rotations of rows and columns.

    Args:
        average: The point $R$.
        target: The point $T$, of the same layout.

    Returns:
        The distances `(p + 1,)` in at least float32, with $p$ the largest rank that a leaf can
            have. Differentiable through the singular values, but for a kink at rank $r$ where
            $\sigma_r = \sigma_{r+1} > 0$ in a leaf; values repeated on one side of $r$ make none.

    Raises:
        ValueError: If the trees differ in structure or in a leaf's shape, or a known value is NaN
            or infinite.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import negative
        >>> negative.curve(jnp.zeros((2, 2)), jnp.array([[4.0, 0.0], [0.0, 3.0]]))
        Array([5., 3., 0.], dtype=float32)
    """
    return curve_of(spectra_of(displacement(average=average, target=target)))


def curve_of(spectra: Spectra) -> Float[Array, " ranks"]:
    """Distance left after rank 0, 1, 2, ... in every matrix, from the singular values."""
    values = tree.widened(spectra)[0]
    if not values:
        return jnp.zeros(1)
    (unit,) = settled([power_of_two(jnp.max(jnp.stack([jnp.max(x, initial=0) for x in values])))])
    tails = [tail_curve(x / unit) for x in values]
    longest = max(x.size for x in tails)
    squares = [jnp.pad(x, (0, longest - x.size)) for x in tails]
    return unit * safe_sqrt(jax.tree.reduce_associative(jnp.add, squares))


def rank_to_reach(average: WeightsLike, target: WeightsLike, radius: ScalarLike) -> Int[Array, ""]:
    r"""Smallest rank of an edit that brings a point within a radius of a target.

    $$
    \min \{ r : t_r \le \rho \}
    $$

    A guard that moved a point by a displacement of rank $q$ is undone by rank $q$; give a
    radius above the rounding of the weights, since numerically almost every matrix has full
    rank.

    Args:
        average: The point $R$.
        target: The point $T$, of the same layout.
        radius: The radius $\rho \ge 0$.

    Returns:
        The rank, at most the largest that a leaf can have, where $t_r = 0$.

    Raises:
        ValueError: If `radius` is known and negative or not finite, the trees differ in structure
            or in a leaf's shape, or a known value is NaN or infinite. If a traced radius or
            weight is not in its domain the result is $-1$.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import negative
        >>> negative.rank_to_reach(jnp.zeros((2, 2)), jnp.array([[4.0, 0.0], [0.0, 3.0]]), 3.5)
        Array(1, dtype=int32)
    """
    radius = _checks.nonnegative("radius", radius)
    return first_within(curve(average, target), radius)


def first_within(distances: Float[Array, " ranks"], radius: ScalarLike) -> Int[Array, ""]:
    """How many of the descending distances are above a radius; -1 where one of them is NaN."""
    radius = jnp.asarray(radius).astype(distances.dtype)
    defined = ~jnp.isnan(distances[0] + radius)
    return jnp.where(defined, jnp.sum(distances > radius, dtype=jnp.int32), jnp.int32(-1))


def route(
    average: WeightsLike,
    targets: Mapping[str, WeightsLike],
    rank: int,
    *,
    radius: ScalarLike,
) -> dict[str, Route]:
    """How near an edit of given rank brings a point to each of several targets.

    Args:
        average: The point to start from.
        targets: The targets by name, of the same layout.
        rank: The rank for every matrix, at least 0.
        radius: The distance, at least 0, that counts as having reached a target.

    Returns:
        A [`Route`][wspace.negative.Route] by name, with the entry of
            [`curve`][wspace.negative.curve] at `rank` and the
            [`rank_to_reach`][wspace.negative.rank_to_reach].

    Raises:
        ValueError: As the two functions do, or if there is no target.
        TypeError: As the two functions do, or if `targets` is not a mapping.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import negative
        >>> target = jnp.array([[4.0, 0.0], [0.0, 3.0]])
        >>> negative.route(jnp.zeros((2, 2)), {"T": target}, 1, radius=0.5)["T"].residual
        Array(3., dtype=float32)
    """
    rank = _checks.rank(rank)
    radius = _checks.nonnegative("radius", radius)
    if not isinstance(targets, Mapping):
        raise TypeError(f"targets must be a mapping from names to trees, got {described(targets)}")
    if not targets:
        raise ValueError("targets is empty: give at least one target by name")
    _checks.same_layout(average=average, **{f"targets[{name!r}]": x for name, x in targets.items()})
    curves = {name: curve(average, target) for name, target in targets.items()}
    return {
        name: Route(distances[min(rank, distances.size - 1)], first_within(distances, radius))
        for name, distances in curves.items()
    }


def gate(point: WeightsLike, where: WeightsLike, edit: PyTree[Any], radius: ScalarLike) -> Weights:
    r"""Applies an edit only near the point it was made for.

    $$
    y = \begin{cases} x + D & \lVert x - w \rVert \le \rho \\ x & \text{otherwise} \end{cases}
    $$

    Args:
        point: The weights $x$.
        where: The weights $w$ that the edit was made for, of the same layout.
        edit: The edit $D$, as in [`lowrank.apply`][wspace.lowrank.apply].
        radius: The radius $\rho \ge 0$.

    Returns:
        The weights $y$, each leaf in the dtype of that leaf of `point`; outside the radius `point`
            itself, bit for bit.

    Raises:
        ValueError: If `radius` is negative or not finite, or `point` or `where` holds NaN, which
            is neither near nor far (NaN weights if this is traced); or if the trees differ in
            structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import negative
        >>> negative.gate(jnp.array([1.0]), jnp.array([1.5]), jnp.array([10.0]), 1.0)
        Array([11.], dtype=float32)
        >>> negative.gate(jnp.array([3.0]), jnp.array([1.5]), jnp.array([10.0]), 1.0)
        Array([3.], dtype=float32)
    """
    radius = _checks.nonnegative("radius", radius)
    _checks.same_layout(point=point, where=where)
    far = geometry.distance(point, where)
    if not _checks.is_traced(far) and bool(jnp.isnan(far)):
        _checks.finite(point=point, where=where)
    radius = jnp.asarray(radius).astype(far.dtype)
    inside, undefined = far <= radius, jnp.isnan(radius + far)
    return _gated((inside, undefined), (lowrank.apply(point, edit), point))


@_lift.elementwise
def _gated(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (inside, undefined), (moved, x) = scalars, arrays
    return jnp.where(undefined != 0, jnp.nan, jnp.where(inside != 0, moved, x))
