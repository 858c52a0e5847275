r"""Guards that hold at every average of the points, whatever the coefficients.

Points beyond a hyperplane average beyond it. With $h_i = \langle x_i - b, n \rangle$, the heights
of the points over the point to avoid along a unit normal $n$, any coefficients that sum to one give

$$
\Bigl\lVert \sum_i t_i x_i - b \Bigr\rVert \ge \sum_i t_i h_i
$$

which is at least $\rho$ for convex coefficients if every $h_i$ is, and for coefficients of any
sign if all $h_i$ are one number of at least $\rho$.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.tree_util import tree_leaves_with_path
from jaxtyping import Array, Bool, Float

from wspace import _checks, _lift, tree
from wspace._numerics import (
    accumulator,
    plus,
    power_of_two,
    safe_sqrt,
    stored_rounding,
    unstacked,
    with_nan_of,
)
from wspace.negative.allowance import NOTHING, Allowed, each_allowance, moved_by, relative
from wspace.negative.nearest import HullMode, Path, nearest_average, path_of, rounding_of
from wspace.negative.sources import finite_length, held, unit_of, upcast_or
from wspace.typing import Allow, Coefficients, Layout, Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["guard_hull"]


class Heights(NamedTuple):
    """What a normal asks of each point: to rise by `needs`; rising by one costs `1 / reaches`."""

    heights: Float[Array, " k"]
    reaches: Float[Array, " k"]
    needs: Float[Array, " k"]

    def cost(self, costs: Float[Array, " k"]) -> Scalar:
        reaches = jnp.where(self.reaches == 0, 1, self.reaches)
        return jnp.sum(costs * self.needs**2 / reaches)


@_lift.reduction
def _heights(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    (inverse, over), (*points, center, normal) = scalars, arrays
    normal = inverse * normal
    return [(over * x - over * center) * normal for x in points]


def heights_of(
    guard: "Guard", normal: WeightsLike, inverse: Scalar | float, mode: HullMode
) -> Heights:
    """The heights of points along `inverse` times a normal, and what a guard asks of them."""
    radius, costs, unit = guard.radius, guard.costs, guard.unit
    scalars = (inverse, 1 / unit)
    heights = unit * _heights(scalars, [*guard.points, guard.center, normal])
    if guard.allowed is None:
        reaches = jnp.ones_like(heights)
    else:
        leaves = [inverse * jnp.asarray(x).astype(heights.dtype) for x in jax.tree.leaves(normal)]
        squares = [[p.square(x) for p, x in zip(row, leaves, strict=True)] for row in guard.allowed]
        zero = jnp.zeros((), heights.dtype)
        reaches = jnp.stack([functools.reduce(jnp.add, row, zero) for row in squares])
    if mode == "convex":
        needs = jnp.where(heights < radius, radius - heights, 0)
    else:
        stiff = costs / jnp.where(reaches == 0, 1, reaches)
        middle = jnp.sum(stiff / jnp.sum(stiff) * heights)
        needs = jnp.where(middle < radius, radius, middle) - heights
    return Heights(heights, reaches, with_nan_of(needs, radius, heights))


class Guard(NamedTuple):
    """The arguments of a guard of the hull, checked, and the normal, `inverse` times a tree.

    What each point is allowed is over a power of two of its own, which is taken into its cost, and
    costs are over the power of two of the largest. Heights are summed over the unit. The path
    through the points is known where the normal was not given.
    """

    points: list[WeightsLike]
    center: WeightsLike
    radius: Scalar
    costs: Float[Array, " k"]
    allowed: list[list[Allowed]] | None
    normal: WeightsLike
    inverse: Scalar
    undefined: Scalar | float
    unit: Scalar
    path: Path | None


@_lift.reduction
def _squares(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    (over,) = scalars
    return [(over * x) ** 2 for x in arrays]


def checked_guard(
    points: Sequence[WeightsLike],
    avoid: WeightsLike,
    radius: ScalarLike,
    name: str,
    normal: WeightsLike | None,
    mode: HullMode,
    costs: Coefficients | None,
    allow: Allow | None,
    layout: Layout,
) -> Guard:
    """The arguments, refused where they are bad; errors call the direction by `name`."""
    _checks.one_of("mode", mode, get_args(HullMode))
    _checks.known_layout(layout)
    given = {} if normal is None else {name: normal}
    _checks.same_layout(**_checks.each("points", points), avoid=avoid, **given)
    radius = _checks.above_zero("radius", radius)
    c = _checks.positive("costs", costs, len(points))
    dtype = accumulator(*(leaf.dtype for leaf in jax.tree.leaves((points, avoid, given))))
    radius = jnp.asarray(radius).astype(dtype)
    unit = power_of_two(radius)
    sizes = unstacked(safe_sqrt(_squares((1 / unit,), [*points, avoid]).astype(dtype)))
    largest = functools.reduce(jnp.maximum, sizes)
    finite_length(largest, points, avoid=avoid)
    known = stored_rounding(jax.tree.leaves((points, avoid)), dtype)
    rounding = (known.share * largest + known.length / unit) * unit
    undefined = _checks.refuse(
        ~((radius > rounding) & jnp.isfinite(radius)),
        lambda: (
            f"radius {radius:.3g} is below the rounding of the points, {rounding:.3g}: no "
            f"average of them can be placed that finely: enlarge it{upcast_or(known)}"
        ),
    )
    turn, path = 1.0, None
    if normal is None:
        path = path_of(points, avoid, 1 / unit)
        nearest = nearest_average(points, avoid, mode, rounding_of(sizes) * unit, path)
        normal = nearest.normal
        where = "convex hull" if mode == "convex" else "affine span"
        undefined += _checks.refuse(
            ~((nearest.distance > rounding) & jnp.isfinite(nearest.distance)),
            lambda: (
                f"avoid lies in the {where} of points, to their rounding {rounding:.3g}, so no "
                f"side of it is distinguished: give {name}, such as the direction in which the "
                f"loss of an average rises{upcast_or(known)}"
            ),
        )
    else:
        turn = (1 / unit_of([normal])).astype(dtype)
    way = tree.in_one_dtype(normal, avoid, *points)[0]  # its norm is known in the widest dtype
    length = safe_sqrt(_squares((turn,), [way])[0]).astype(dtype) / turn
    finite_length(length, points, **given)
    undefined += _checks.refuse(
        ~((length > 0) & jnp.isfinite(length)),
        lambda: f"{name} is zero: give a direction to keep the points on",
    )
    inverse = 1 / jnp.where(length == 0, 1, length)
    allowed, weights = None, jnp.asarray(c).astype(dtype)
    if allow is not None:
        rows = [relative(row) for row in each_allowance(allow, layout, points, avoid, normal)]
        allowed = [row for row, _ in rows]
        tops = jnp.stack([top for _, top in rows])
        tops = jnp.where(tops == NOTHING, jnp.max(tops), tops)
        weights = jnp.ldexp(weights, jnp.min(tops) - tops)
        weights = weights / power_of_two(jnp.max(weights))
    return Guard(
        list(points), avoid, radius, weights, allowed, normal, inverse, undefined, unit, path
    )


@_checks.of_points
def guard_hull(
    points: Sequence[WeightsLike],
    avoid: WeightsLike,
    radius: ScalarLike,
    *,
    normal: WeightsLike | None = None,
    mode: HullMode = "convex",
    costs: Coefficients | None = None,
    allow: Allow | None = None,
    layout: Layout = "in_out",
) -> list[Weights]:
    r"""Moves points so that every average of them stays out of a ball around a point to avoid.

    With the unit normal $n$ and the heights $h_i = \langle x_i - b, n \rangle$,

    $$
    dx_i = (h - h_i)_{(+)}\, \frac{P_i n}{\langle n, P_i n \rangle}, \qquad
    h = \begin{cases}
        \rho & \text{convex} \\
        \max(\rho,\ \sum_i w_i h_i / \sum_i w_i), \quad w_i = c_i / \langle n, P_i n \rangle
             & \text{affine}
    \end{cases}
    $$

    Convex: every point rises to height $\rho$ at least (the difference is cut at zero), so that
    no average with coefficients $t_i \ge 0$ is nearer than $\rho$. Affine: all points come to one
    height, so that no average is, with coefficients of either sign. With `allow` both hold and
    each point moves only where it may. Any normal guarantees this; only the cost
    $\sum_i c_i (h - h_i)_{(+)}^2 / \langle n, P_i n \rangle$ depends on it, and for the normal
    given no edits with the guarantee of its half-space cost less. The best normal is searched by
    [`guard_normal`][wspace.negative.guard_normal].

    Moving twice with one normal changes nothing, and without `allow` the convex guard does not
    increase the distance between points. Both hold, as every guard, up to rounding: no average
    is nearer than $\rho - 64\,\varepsilon\, (\max_i \lVert x_i' \rVert + \lVert b \rVert)
    \sum_i |t_i|$, and points in half precision round at their own size besides. A margin certifies
    a distance, not safety.

    Args:
        points: The $x_i$, trees of one layout, at least one.
        avoid: The center $b$ of the ball, of the same layout.
        radius: Its radius $\rho > 0$.
        normal: The direction $n$, of any length, to keep the points on. If not given, that from
            `avoid` to the nearest average of the points, convex or affine.
        mode: `"convex"` for averages with coefficients of at least zero, `"affine"` for all.
        costs: The $c_i > 0$, one a point; equal if not given. They decide the common height, so
            a convex guard does not depend on them.
        allow: Where each point may move, as in [`retarget`][wspace.negative.retarget].
        layout: How the layers store their matrices, as there.

    Returns:
        The moved points, each leaf in the dtype of that leaf of its point. A point that is high
            enough for a convex guard comes back unchanged.

    Raises:
        ValueError: If `avoid` is one of the averages, to the rounding of the points, and there is
            no normal; if the normal is zero; if a point has to rise but `allow` leaves nothing of
            the normal, $\langle n, P_i n \rangle \le (64\,\varepsilon)^2 \lVert P_i \rVert$ (for an
            affine guard if it leaves nothing at any point), which names the point and the leaf;
            if the radius is not positive or below the rounding of the points, $64\,\varepsilon$ of
            the largest norm or the machine epsilon of the dtype stored; if a point would have to
            move by more than its dtype holds. Where these are traced the result is NaN. Also for an
            unknown mode, costs out of their domain, an `allow` that does not fit, a known NaN or
            infinity, or trees of different layout.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import negative
        >>> points = [jnp.array([1.0, 0.0]), jnp.array([1.0, 5.0])]
        >>> negative.guard_hull(points, jnp.zeros(2), 3.0)
        [Array([3., 0.], dtype=float32), Array([3., 5.], dtype=float32)]

    References:
        Half-spaces through the nearest point: S. Boyd, L. Vandenberghe, *Convex Optimization*,
        2004, section 2.5.1. The nearest point of a hull: P. Wolfe, *Finding the nearest point in
        a polytope*, Mathematical Programming 11, 1976.
    """
    points = _checks.listed("points", points)
    guard = checked_guard(points, avoid, radius, "normal", normal, mode, costs, allow, layout)
    normal, allowed = guard.normal, guard.allowed
    asked = heights_of(guard, normal, guard.inverse, mode)
    blocked = is_blocked(asked, allowed, mode)

    def message() -> str:
        i = int(jnp.argmax(blocked))
        leaves = tree_leaves_with_path(normal)
        path, _ = max(leaves, key=lambda leaf: float(tree.norm(leaf[1])))
        return (
            f"points[{i}] would have to rise by {asked.needs[i]:.3g} along normal, but allow[{i}] "
            f"leaves nothing of it, the most of which is in leaf {_checks.path_of(path)}: "
            "allow more there, or give another normal"
        )

    undefined = guard.undefined + _checks.refuse(jnp.any(blocked), message)
    steps = asked.needs / jnp.where(asked.reaches == 0, 1, asked.reaches)
    # |P n|^2 <= |P| <n, P n>, and |P| is about one.
    most = 1 if allowed is None else 2
    lengths = unstacked(most * jnp.abs(steps) * safe_sqrt(jnp.minimum(asked.reaches, 1)))
    undefined += held(lengths, points, "a normal along which more is allowed")
    steps = unstacked(steps + undefined)
    if allowed is None:
        return _raised([guard.inverse, *steps], [*points, normal])
    moves = [moved_by(row, normal, guard.inverse) for row in allowed]
    return [
        tree.displaced((step,), (x, move))
        for step, x, move in zip(steps, points, moves, strict=True)
    ]


@_lift.elementwise
def _raised(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    (inverse, *steps), (*points, normal) = scalars, arrays
    return [plus(x, step * (inverse * normal)) for step, x in zip(steps, points, strict=True)]


def is_blocked(
    asked: Heights, allowed: list[list[Allowed]] | None, mode: HullMode
) -> Bool[Array, " k"]:
    """Which points have to move although their allowance leaves nothing of the normal."""
    if allowed is None:
        return jnp.zeros(asked.needs.shape, bool)
    zero = jnp.zeros((), asked.reaches.dtype)
    sizes = [functools.reduce(jnp.maximum, [p.scale for p in row], zero) for row in allowed]
    least = (64 * jnp.finfo(asked.reaches.dtype).eps) ** 2 * jnp.stack(sizes)
    return ~(asked.reaches > least) & ((asked.needs != 0) | (mode == "affine"))
