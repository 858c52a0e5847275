"""The search for the cheapest guard of a hull."""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from wspace import _checks, _lift, geometry, tree
from wspace import _frames as frames
from wspace._numerics import unstacked
from wspace._records import Solution
from wspace.negative.hull import Guard, checked_guard, heights_of, is_blocked
from wspace.negative.nearest import HullMode, inverse_of, path_of
from wspace.typing import Allow, Coefficients, Layout, Scalar, ScalarLike, WeightsLike

__all__ = ["guard_normal"]


@_checks.of_points
def guard_normal(
    points: Sequence[WeightsLike],
    avoid: WeightsLike,
    radius: ScalarLike,
    *,
    mode: HullMode = "convex",
    costs: Coefficients | None = None,
    allow: Allow | None = None,
    layout: Layout = "in_out",
    start: WeightsLike | None = None,
    steps: int = 500,
    rtol: ScalarLike = 1e-4,
) -> Solution:
    r"""The normal for which a guard of the hull costs least.

    $$
    \min_{\lVert n \rVert = 1} f(n), \qquad
    f(n) = \sum_i c_i \frac{(h - h_i)_{(+)}^2}{\langle n, P_i n \rangle}
    $$

    with $h$ and $h_i$ as in [`guard_hull`][wspace.negative.guard_hull], by gradient descent on
    the sphere with Barzilai-Borwein steps, none of which raises the cost but for rounding. Whatever
    comes out, a guard along it holds: only its cost is searched.

    Without `allow` the cost is convex in $n$ on the unit *ball*, so a stationary normal with
    $\sum_i c_i (h - h_i)_{(+)} h_i \ge 0$ is the cheapest of all, and only such a one counts as
    converged. If `avoid` is the mean of the points by cost, such as the average that is to be
    kept away, the cheapest normals are those orthogonal to the differences of the points, and
    all of them cost the same: start from a direction that is no combination of the differences,
    such as the gradient of the average's loss. With `allow` a converged normal is stationary.
    A search has no derivatives; the guard along the normal that it finds has them.

    Without `allow` no step leaves the span of the gaps $x_i - b$ and of `start`, so the search runs
    on coordinates in an orthonormal basis of that span, one a point and one for `start`: a step
    reads no tree, and what is compiled for it does not grow with the leaves.

    Args:
        points: The $x_i$, trees of one layout, at least one.
        avoid: The center $b$ of the ball, of the same layout.
        radius: Its radius $\rho > 0$.
        mode: `"convex"` or `"affine"`, as in [`guard_hull`][wspace.negative.guard_hull].
        costs: The $c_i > 0$, one a point; equal if not given.
        allow: Where each point may move, as in [`retarget`][wspace.negative.retarget].
        layout: How the layers store their matrices, as there.
        start: The direction to start from, of any length; if not given, the normal that
            [`guard_hull`][wspace.negative.guard_hull] takes by default.
        steps: The largest number of steps.
        rtol: The residual to reach.

    Returns:
        A [`Solution`][wspace.average.Solution] with the unit normal as `weights`, in at least
            float32; as `residual` the norm of the gradient along the sphere, over $2 \rho \sqrt{f
            \sum_i c_i}$, $c_i$ with `allow` over the power of two nearest to the largest eigenvalue
            of $P_i$, and zero where the cost is; the `steps` taken; and whether it `converged`.

    Raises:
        ValueError: As [`guard_hull`][wspace.negative.guard_hull] does, with `start` in place of
            the normal; if `steps` is negative or `rtol` known and not positive.
        TypeError: If a leaf is not floating-point, or `steps` is not an integer.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import negative
        >>> points = [jnp.array([1.0, 0.0]), jnp.array([1.0, 5.0])]
        >>> solution = negative.guard_normal(points, jnp.zeros(2), 3.0)
        >>> bool(solution.converged)
        True

    References:
        J. Barzilai, J. Borwein, *Two-Point Step Size Gradient Methods*, IMA Journal of Numerical
        Analysis 8, 1988.
    """
    points = _checks.listed("points", points)
    steps = _checks.rank(steps, "steps")
    rtol = _checks.above_zero("rtol", rtol)
    guard = checked_guard(points, avoid, radius, "start", start, mode, costs, allow, layout)
    asked = heights_of(guard, guard.normal, guard.inverse, mode)
    undefined = guard.undefined + _checks.refuse(
        jnp.any(is_blocked(asked, guard.allowed, mode)),
        lambda: "allow leaves nothing of start at a point that would have to rise: give another",
    )
    guard = guard._replace(undefined=0.0)
    if guard.allowed is None:
        seen, frame = _in_span(guard, given=start is not None)
        unit, *search = _descend(seen, rtol, mode, steps)
        normal = frames.within(frame, unstacked((1 + undefined) * unit))
    else:
        normal, *search = _descend(guard._replace(path=None), rtol, mode, steps)
        normal = tree.combine((1 + undefined,), (normal,))
    residual, taken, converged = search
    residual = residual + undefined
    return Solution(normal, residual, taken, converged & ~jnp.isnan(residual))


def _in_span(guard: Guard, given: bool) -> tuple[Guard, frames.Frame]:
    """A guard without `allow` in coordinates, around zero, and the frame that they belong to.

    The frame is made of the steps of a path from the center on, each to the nearest point left,
    and of what is left of the start outside of these, if it was `given`. Lengths are over the
    unit, in which radii are about one.
    """
    over = 1 / guard.unit
    center, normal, *points = tree.in_one_dtype(guard.center, guard.normal, *guard.points)
    path = guard.path or path_of(points, center, over)
    least = [4 * jnp.finfo(over.dtype).eps * over * span for span in path.spans]

    def kept(i: int, left: Scalar) -> Scalar:
        return jnp.where(left > least[i], left, 0)

    pairs = list(zip(path.points, [center, *path.points[:-1]], strict=True))
    frame, steps = frames.of_differences(pairs, lambda i, left: inverse_of(kept(i, left)), over)
    rows = [[*row, kept(i, left)] for i, (*row, left) in enumerate(steps)]
    if given:
        along, rest = frames.parts(frame, frames.multiple((guard.inverse,), (normal,)))
        second, rest = frames.parts(frame, rest)
        left = tree.norm(rest)
        left = jnp.where(left > 4 * jnp.finfo(left.dtype).eps, left, 0)
        along = [*(a + b for a, b in zip(along, second, strict=True)), left]
        frame.others.append(frames.multiple((inverse_of(left),), (rest,)))
    else:
        along = frames.along(frame, normal)
    zero = jnp.zeros_like(along[0])
    columns = [jnp.stack([*row, *[zero] * (len(along) - len(row))]) for row in rows]
    small = guard._replace(
        points=list(itertools.accumulate(columns)),
        center=jnp.zeros_like(columns[0]),
        radius=guard.radius * over,
        costs=guard.costs[path.order],
        normal=jnp.stack(along),
        inverse=1 / tree.norm(along),
        unit=jnp.ones_like(guard.unit),
        path=None,
    )
    return small, frame


@jax.jit(static_argnames="mode")
def _descend(guard, rtol, mode, steps):
    radius = guard.radius
    wide = jax.tree.map(lambda x: x.astype(radius.dtype), guard.normal)
    start = tree.weighted_sum((guard.inverse,), (wide,))

    def asked_of(normal):
        # In units of the radius, since the squares of gradients are of the fourth degree.
        asked = heights_of(guard, normal, 1.0, mode)
        return asked._replace(heights=asked.heights / radius, needs=asked.needs / radius)

    level = asked_of(start).cost(guard.costs)
    costs = guard.costs / jnp.where(jnp.isfinite(level) & (level > 0), level, 1)

    def cost(normal):
        return asked_of(normal).cost(costs)

    def onto_sphere(x):
        return tree.combine((1 / tree.norm(x),), (x,))

    def scale_of(value):
        return 2 * jnp.sqrt(value * jnp.sum(costs))

    def measured(normal):
        value, gradient = jax.value_and_grad(lambda x: cost(onto_sphere(x)))(normal)
        scale = scale_of(value)
        return value, gradient, tree.norm(gradient) / jnp.where(scale > 0, scale, 1)

    def unfinished(state):
        _, _, _, residual, _, taken = state
        return (taken < 0) | ((residual > rtol) & (taken < steps))

    def step(state):
        normal, value, gradient, _, length, taken = state
        is_start = taken < 0
        moved = onto_sphere(tree.combine((1, -length), (normal, gradient)))
        other = measured(moved)
        s = tree.combine((1, -1), (moved, normal))
        y = tree.combine((1, -1), (other[1], gradient))
        slope, steep, curvature, secant = unstacked(_products((), (gradient, other[1], s, y)))
        slack = rounding * scale_of(value)
        good = is_start | (other[0] <= value - 1e-4 * length * slope + slack)
        secant = secant / jnp.where(curvature > 0, curvature, 1)
        longer = jnp.where(curvature > 0, secant, 4 * length)
        first = 0.1 / jnp.where(steep > 0, jnp.sqrt(steep), 1)
        length = jnp.where(is_start, first, jnp.where(good, longer, length / 4))
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), (moved, *other), state[:4])
        return (*kept, length, taken + 1)

    # The heights round at the size of the gaps, and the cost with them.
    gaps = [geometry.distance(x, guard.center) for x in guard.points]
    sizes = functools.reduce(jnp.maximum, [gap.astype(radius.dtype) for gap in gaps])
    rounding = 4 * jnp.finfo(radius.dtype).eps * (1 + sizes / radius)
    # The first round measures the start, so that a program has one gradient in it, not two.
    zero, most = jnp.zeros_like(radius), jnp.full_like(radius, jnp.inf)
    state = (start, most, jax.tree.map(jnp.zeros_like, start), most, zero, jnp.int32(-1))
    normal, _, _, residual, _, taken = jax.lax.while_loop(unfinished, step, state)
    asked = asked_of(normal)
    outward = 2 * jnp.sum(costs * asked.needs * asked.heights)
    least = outward >= -rtol * scale_of(asked.cost(costs)) if guard.allowed is None else True
    return normal, residual, taken, (residual <= rtol) & least


@_lift.reduction
def _products(_: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    gradient, other, s, y = arrays
    return [gradient**2, other**2, s * y, s**2]
