r"""Moving points so that their average is another one.

Points $x_i$ with coefficients $a_i$ (divided by their sum) average to $M = \sum_i a_i x_i$. The
edits $dx_i$ of least cost $\sum_i c_i \lVert dx_i \rVert^2$ that move the average by $D$ are

$$
dx_i = \frac{a_i / c_i}{S}\, D, \qquad S = \sum_j \frac{a_j^2}{c_j}, \qquad
\text{at the cost } \frac{\lVert D \rVert^2}{S}
$$

Where a point may move only within a subspace, $P_i$ its projector, or at a price, $P_i$ an
inverse metric, $S$ becomes the matrix $\sum_j \frac{a_j^2}{c_j} P_j$ and
$dx_i = \frac{a_i}{c_i} P_i L$ with $S L = D$.

Points round at their own size: in bfloat16 an average lands within bfloat16 of where it should.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.tree_util import tree_leaves_with_path
from jaxtyping import Array, Float

from wspace import _checks, _lift, lowrank, tree
from wspace._numerics import (
    accumulator,
    matmul,
    plus,
    power_of_two,
    replicated,
    safe_sqrt,
    stored_rounding,
    unstacked,
)
from wspace.cone.cones import Cone, project
from wspace.negative.allowance import (
    Allowed,
    each_allowance,
    moved_by,
    relative,
    rounding_share,
)
from wspace.negative.sources import (
    Pulls,
    allowing,
    apart_of,
    average_of,
    finite_length,
    held,
    pulls_of,
    sources,
    unit_of,
    upcast_or,
)
from wspace.typing import Allow, Coefficients, Layout, Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["exit_ball", "retarget"]


def _least_edits(
    pulls: Pulls, allowed: Sequence[Allowed], d: Array, rounding: Scalar
) -> list[Array]:
    r"""The edits of one leaf that shift the average by `d` at least cost, to rounding.

    With $P_i = F_i F_i^\top$ they are $F_i y_i / \sqrt{c_i}$ for the $y$ of least norm with
    $\sum_i a_i / \sqrt{c_i}\, F_i y_i = D$. Of this problem $S L = D$ are the normal equations,
    whose condition number is the square.
    """
    alone = [relative([p]) for p in allowed]
    allowed = [p for (p,), _ in alone]
    pulls = allowing(pulls, jnp.stack([top for _, top in alone]), d.dtype)
    roots, prices = map(unstacked, pulls)
    rows = list(zip(roots, prices, allowed, strict=True))
    if all(p.root is None for p in allowed):
        total = sum((s**2 * p.scale for s, _, p in rows), jnp.zeros((), d.dtype))
        least = d / jnp.where(total == 0, jnp.inf, total)
        return [s * q * p.scale * least for s, q, p in rows]
    seen = next(p for p in allowed if p.root is not None)
    matrix = replicated(seen.matrix(d))
    factors = [safe_sqrt(p.scale) * p.whole_root(matrix.shape) for p in allowed]
    blocks = [s * factor for s, factor in zip(roots, factors, strict=True)]
    y = _least_solution(jnp.concatenate(blocks, axis=-1), matrix, rounding)
    parts = jnp.split(y, len(rows), axis=-2)
    return [
        seen.leaf(jnp.where(s == 0, 0, q * matmul(factor, part)), d)
        for (s, q, _), factor, part in zip(rows, factors, parts, strict=True)
    ]


def _least_solution(
    b: Float[Array, "... m k"], d: Float[Array, "... m n"], rounding: Scalar
) -> Float[Array, "... k n"]:
    """The `y` of least norm for which `b @ y` is `d`, to a rounding where it can be.

    Directions that only small singular values reach ask for long edits: they are taken where what
    the others leave is more than rounding, and then the solution is refined.
    """
    u, values, vt = jnp.linalg.svd(b, full_matrices=False)
    noise = rounding_share(b.shape[-2], b.dtype)

    def refined(share: float, times: int) -> Array:
        kept = values > share * values[..., :1]
        inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)[..., None]
        y = jnp.zeros((*b.shape[:-2], b.shape[-1], d.shape[-1]), d.dtype)
        for _ in range(times):
            left = d - matmul(b, y)
            y += matmul(jnp.swapaxes(vt, -1, -2), inverse * matmul(jnp.swapaxes(u, -1, -2), left))
        return y

    short = refined(noise**0.5, 2)
    left = tree.norm(d - matmul(b, short))
    return jnp.where(left <= rounding, short, refined(noise, 4))


@_checks.of_points
def retarget(
    points: Sequence[WeightsLike],
    coefficients: Coefficients,
    target: WeightsLike,
    *,
    costs: Coefficients | None = None,
    allow: Allow | None = None,
    layout: Layout = "in_out",
) -> list[Weights]:
    r"""Moves points, at least cost, so that their average is a given one.

    $$
    dx_i = \frac{a_i}{c_i} P_i L, \qquad
    \Bigl(\sum_j \frac{a_j^2}{c_j} P_j\Bigr) L = T - \sum_j a_j x_j
    $$

    The edits have the least $\sum_i c_i \lVert dx_i \rVert^2$ of all whose average is $T$ and
    which stay where they may go; with projectors $P_i$ (or none) it is unique. Without `allow`
    every point moves along $T - M$, at the cost $\lVert T - M \rVert^2 / S$: with two equal
    coefficients each by the whole of it. A point with coefficient $0$ does not move. Doing it
    twice changes nothing; it commutes with translations, rotations and scalings of all.

    Args:
        points: The $x_i$, trees of one layout, at least one.
        coefficients: The $a_i$, one a point, of any sign; divided by their sum. No default: what
            is found holds for the average with these alone.
        target: The average $T$ to have, of the same layout.
        costs: The $c_i > 0$, one a point; equal if not given.
        allow: Where each point may move; everywhere if not given. Per point `None` (everywhere),
            or a tree like the weights with, at each leaf, `1.0` (free), `0.0` (frozen), or for a
            matrix `x @ W` a projector `(in, in)` onto the inputs whose rows may change, such as
            [`free_inputs`][wspace.negative.free_inputs] gives. Any symmetric positive
            semidefinite matrix will do: then the cost is $c_i \langle dx_i, P_i^+ dx_i \rangle$.
        layout: How the layers store their matrices, `"in_out"`, as in `x @ W`, or `"out_in"`, as
            torch and equinox do: which inputs are meant,
            [`as_matrix`][wspace.lowrank.as_matrix] says.

    Returns:
        The moved points, each leaf in the dtype of that leaf of its point.

    Raises:
        ValueError: If `allow` admits no such edits: if the part of $T - M$ out of reach exceeds
            the rounding of the points and of the edits, $\delta\,(\sum_i |a_i| \lVert x_i \rVert +
            \lVert T \rVert) + 64\,\varepsilon \sum_i |a_i| \lVert dx_i \rVert$, with $\delta$ being
            $64\,\varepsilon$ or the machine epsilon of the dtype stored if that is more (NaN if
            traced). Also if coefficients or costs are out of their domain or not as many
            as the points, an entry of `allow` is not symmetric positive semidefinite or does not
            fit its leaf, a known value is NaN or infinite, or the trees differ in layout.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import average, negative
        >>> a, c = {"w": jnp.array([0.0])}, {"w": jnp.array([2.0])}
        >>> moved = negative.retarget([a, c], [0.5, 0.5], {"w": jnp.array([5.0])})
        >>> moved, average.mean(moved)
        ([{'w': Array([4.], dtype=float32)}, {'w': Array([6.], dtype=float32)}],
         {'w': Array([5.], dtype=float32)})

    References:
        The minimum-norm solution of a linear constraint; G. Golub, C. Van Loan, *Matrix
        Computations*, 4th edition, section 5.6.
    """
    points = _checks.listed("points", points)
    _checks.known_layout(layout)
    _checks.same_layout(**_checks.each("points", points), target=target)
    # Squares are summed of what may be refused alone.
    unit = jnp.ones((), jnp.float32) if allow is None else unit_of([*points, target])
    seen = sources(points, target, coefficients, unit=unit)
    pulls = pulls_of(seen.a, costs, len(points))
    finite_length(seen.distance, points, target=target)
    dtype, a = seen.distance.dtype, _checks.unpacked(seen.a)
    if allow is None:
        return _shifted([*a, *pulls.moves(dtype)], [*points, target])
    allowed = each_allowance(allow, layout, points, target)
    leaves, structure = jax.tree.flatten(target)
    rows = list(zip(*map(jax.tree.leaves, points), strict=True))
    known = stored_rounding(jax.tree.leaves((points, target)), dtype)
    rounding = known.share * (seen.size + seen.center) + known.length / unit
    moves, left, lengths = [], [], []
    for row, goal, column in zip(rows, leaves, zip(*allowed, strict=True), strict=True):
        shift = _shift([1 / unit, *a], [*row, goal]).astype(dtype)
        edits = _least_edits(pulls, column, shift, rounding / (2 * len(leaves) ** 0.5))
        unreached, *squares = unstacked(_edit_squares(a, [shift, *edits]))
        left.append(safe_sqrt(unreached))
        lengths.append(squares)
        moves.append(edits)
    missing = tree.norm(left)
    norms = [tree.norm([safe_sqrt(x) for x in column]) for column in zip(*lengths, strict=True)]
    moved = sum(abs(k) * x for k, x in zip(a, norms, strict=True))
    bound = rounding + 64 * jnp.finfo(dtype).eps * moved

    def message() -> str:
        worst = max(range(len(left)), key=lambda i: float(left[i]))
        path, _ = tree_leaves_with_path(target)[worst]
        whole, lost, most = (float(x * unit) for x in (seen.distance, missing, left[worst]))
        return (
            f"allow admits no edits whose average is target: of a shift of norm "
            f"{whole:.3g}, {lost:.3g} is out of reach, most of it ({most:.3g}) "
            f"in leaf {_checks.path_of(path)}: allow more there, or move target"
        )

    undefined = _checks.refuse(~((missing <= bound) & jnp.isfinite(bound)), message)
    return [
        tree.displaced((unit + undefined,), (x, structure.unflatten(y[i] for y in moves)))
        for i, x in enumerate(points)
    ]


@_lift.elementwise
def _shifted(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    *points, target = arrays
    a, pulls = scalars[: len(points)], scalars[len(points) :]
    shift = target - average_of(a, points)
    return [plus(x, k * shift) for k, x in zip(pulls, points, strict=True)]


@functools.partial(_lift.elementwise, rounded=False)
def _shift(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    inverse, *a = scalars
    return -apart_of(a, inverse, arrays)


@_lift.reduction
def _edit_squares(a: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    shift, *edits = arrays
    return [x * x for x in (shift - average_of(a, edits), *edits)]


@_checks.of_points
def exit_ball(
    points: Sequence[WeightsLike],
    coefficients: Coefficients,
    avoid: WeightsLike,
    radius: ScalarLike,
    *,
    cone: Cone | None = None,
    costs: Coefficients | None = None,
    direction: WeightsLike | None = None,
    allow: Allow | None = None,
    layout: Layout = "in_out",
) -> list[Weights]:
    r"""Moves points so that their average leaves a ball around a point to avoid.

    With $E = M - b$, and $g$ the direction, or the part $P_K E$ of $E$ in the cone, or $E$ itself,

    $$
    dx_i = t\,\frac{a_i}{c_i} P_i\, g, \qquad
    \lVert E + t\, S g \rVert = \rho, \quad t > 0, \qquad S = \sum_j \frac{a_j^2}{c_j} P_j
    $$

    If $\lVert E \rVert \ge \rho$ already, the points come back unchanged, direction or not.
    Without a direction the average moves straight out to $b + \rho\, E / \lVert E \rVert$, the
    least shift there is, at the least cost $(\rho - \lVert E \rVert)^2 / \sum_j a_j^2 / c_j$.
    In a cone the average moves by the least edit of the cone that gets out,
    [`cone.exit`][wspace.cone.exit], of norm
    $-\lVert P_K E \rVert + \sqrt{\lVert P_K E \rVert^2 + \rho^2 - \lVert E \rVert^2}$: every point
    moves by a multiple of one edit in the cone. With a direction, it moves along $S g$ until it
    meets the sphere, which is [`retarget`][wspace.negative.retarget] to $M + t\, S g$. Doing it
    twice changes nothing.

    The cost is the least where the cone is a subspace or a mask. Of a cone of low rank it is the
    least among edits that share their factors: the points could move by different edits of rank
    $r$, whose sum is of higher rank ([`split_rank`][wspace.negative.split_rank]).

    The average *at these coefficients* is kept away, and no other. A margin certifies a
    distance, not safety.

    Args:
        points: The $x_i$, trees of one layout, at least one.
        coefficients: The $a_i$, one a point, of any sign; divided by their sum. No default: what
            is found holds for the average with these alone.
        avoid: The center $b$ of the ball, of the same layout.
        radius: Its radius $\rho > 0$.
        cone: The edits that the shift of the average may be, such as
            [`cone.Rank(4)`][wspace.cone.Rank]; any if not given. Excludes a direction.
        costs: The $c_i > 0$, one a point; equal if not given.
        direction: The direction $g$ to move the average in, such as the gradient of its loss.
            Needed where the average *is* the point to avoid, and with `allow`.
        allow: Where each point may move, as in [`retarget`][wspace.negative.retarget].
        layout: How the layers store their matrices, as there.

    Returns:
        The moved points, each leaf in the dtype of that leaf of its point.

    Raises:
        ValueError: If the average is within $\delta \sum_i |a_i| \lVert x_i \rVert$ of `avoid`,
            with $\delta$ being $64\,\varepsilon$ or the machine epsilon of the dtype stored if that
            is more, or so near beside the radius that its squares are lost, so that no way out is
            distinguished, and there is no direction; if $E$ has no more than that in the cone; if
            the direction is zero or `allow` leaves nothing of it, $\lVert S g \rVert \le
            64\,\varepsilon \lVert S \rVert \lVert g \rVert$; if the radius is not positive or
            below the same rounding of the points; if a point would have to move by more than its
            dtype holds; if `allow` is given without a direction, or a cone with one. Where these
            are traced the result is NaN. Also for the arguments that
            [`retarget`][wspace.negative.retarget] and [`cone.project`][wspace.cone.project] refuse.
        TypeError: If a leaf is not floating-point, or `cone` is no cone.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import average, negative
        >>> points = [jnp.array([1.0, 0.0]), jnp.array([5.0, 0.0])]
        >>> moved = negative.exit_ball(points, [0.5, 0.5], jnp.zeros(2), 4.0)
        >>> average.mean(moved)
        Array([4., 0.], dtype=float32)
    """
    points = _checks.listed("points", points)
    _checks.known_layout(layout)
    given = {} if direction is None else {"direction": direction}
    _checks.same_layout(**_checks.each("points", points), avoid=avoid, **given)
    if allow is not None and direction is None:
        raise ValueError("allow needs a direction: give the direction to move the average in")
    if cone is not None and direction is not None:
        raise ValueError(
            "direction excludes cone, since the average moves along it: give one of the two, such "
            "as the direction cone.project(cone, direction).edit"
        )
    radius = _checks.above_zero("radius", radius)
    stored = jax.tree.leaves((points, avoid))
    dtype = accumulator(*(leaf.dtype for leaf in jax.tree.leaves((points, avoid, given))))
    radius = jnp.asarray(radius).astype(dtype)
    # All lengths are over the unit: what their squares cannot hold is nothing beside the radius,
    # or so far away that the radius is nothing beside it.
    unit = power_of_two(radius)
    seen = sources(points, avoid, coefficients, direction, unit)
    pulls = pulls_of(seen.a, costs, len(points))
    distance = seen.distance
    finite_length(distance, points, avoid=avoid)
    radius = radius / unit
    known = stored_rounding(stored, dtype)
    rounding = known.share * seen.size + known.length / unit
    # Of a length below this, squares of entries are lost that are more than rounding.
    least = jnp.finfo(dtype).tiny ** 0.5 / jnp.finfo(dtype).eps
    undefined = _checks.refuse(
        ~((radius > rounding) & jnp.isfinite(radius)),
        lambda: (
            f"radius {radius * unit:.3g} is below the rounding of the points, "
            f"{rounding * unit:.3g}: no average of them can be placed that finely: "
            f"enlarge it{upcast_or(known)}"
        ),
    )
    if direction is None:
        undefined += _checks.refuse(
            ~(distance > jnp.maximum(rounding, least * radius)),
            lambda: (
                f"the average of points is avoid, to rounding ({distance * unit:.3g} apart), so no "
                f"way out is distinguished: give a direction{upcast_or(known)}"
            ),
        )
    outside = distance >= radius
    a, moves = _checks.unpacked(seen.a), pulls.moves(dtype)
    if direction is None and cone is None:
        near = jnp.where(outside, 1, distance)
        t = jnp.where(outside, 0, (radius - near) / near)
        lengths = [jnp.abs(t * k) * near * unit for k in moves]
        t += undefined + held(lengths, points, "costs or coefficients that share the way")
        return _moved_apart([*a, *(t * k for k in moves)], [*points, avoid])
    if cone is not None:
        apart = _apart([1 / unit, *a], [*points, avoid])
        nothing = jax.tree.map(jnp.zeros_like, apart)
        way, turn = lowrank.apply(nothing, project(cone, apart).edit), 1.0
        speed, along = tree.norm(way), tree.vdot(apart, way)
        undefined += _checks.refuse(
            ~outside & ~(speed > jnp.maximum(least, jnp.maximum(known.share * distance, rounding))),
            lambda: (
                f"the average is {distance * unit:.3g} from avoid, {speed * unit:.3g} of it in "
                f"{cone}: no edit of the cone is distinguished as the way out; give a larger cone, "
                "or a direction"
            ),
        )
    else:
        way, turn, speed, along = direction, seen.turn, seen.speed, seen.along
        finite_length(speed, points, direction=direction)
    if allow is None:
        step, largest, ways = speed, 1.0, None
    else:
        alone = [relative(row) for row in each_allowance(allow, layout, points, avoid, way)]
        allowed = [row for row, _ in alone]
        pulls = allowing(pulls, jnp.stack([top for _, top in alone]), dtype)
        moves = pulls.moves(dtype)
        ways = [moved_by(row, way, turn) for row in allowed]
        shares = pulls.shares(dtype)
        moved = _average(shares, ways)
        step = tree.norm(moved)
        along = _apart_along([1 / unit, *a], [*points, avoid, moved])
        zero = jnp.zeros((), dtype)
        most = [functools.reduce(jnp.maximum, [p.scale for p in row], zero) for row in allowed]
        largest = sum(w * p for w, p in zip(shares, most, strict=True))
    undefined += _checks.refuse(
        ~outside & ~((step > 64 * jnp.finfo(dtype).eps * largest * speed) & jnp.isfinite(step)),
        lambda: (
            f"direction has norm {speed / turn:.3g}, and where the points may move "
            f"{step / turn:.3g} is left of it: give a direction that is not zero and that allow "
            "does not annihilate"
        ),
    )
    t = _step(radius, distance, seen.square, step, along) * unit
    sizes = [speed] * len(points) if ways is None else [tree.norm(x) for x in ways]
    lengths = [jnp.abs(t * k) * size for k, size in zip(moves, sizes, strict=True)]
    t += undefined + held(lengths, points, "a direction in which points may move")
    if ways is None:
        return _moved_along([turn, *(t * k for k in moves)], [*points, way])
    return [
        tree.displaced((t * k,), (x, move)) for k, x, move in zip(moves, points, ways, strict=True)
    ]


@jax.jit
def _step(radius: Scalar, distance: Scalar, square: Scalar, step: Scalar, along: Scalar) -> Scalar:
    r"""The positive root $t$ of $\lVert E + t S g \rVert = \rho$; zero from outside.

    `distance` is the norm of $E$ and `square` its square, which has derivatives at zero, `step` the
    norm of $S g$ and `along` its inner product with $E$.
    """
    outside = distance >= radius
    safe = jnp.where(step == 0, 1, step)
    gap = radius**2 - square
    short = (radius - distance) * (radius + distance)  # the same without cancellation
    gap = jnp.where(outside, 1, gap + jax.lax.stop_gradient(short - gap))
    slope = jnp.where(outside, 0, along / safe)
    root = jnp.sqrt(slope**2 + gap)
    reach = jnp.where(slope > 0, gap / (root + jnp.abs(slope)), root - slope)
    return jnp.where(outside, 0, reach / safe)


@_lift.elementwise
def _moved_apart(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    *points, avoid = arrays
    a, pulls = scalars[: len(points)], scalars[len(points) :]
    apart = average_of(a, points) - avoid
    return [plus(x, k * apart) for k, x in zip(pulls, points, strict=True)]


@_lift.elementwise
def _moved_along(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    (turn, *steps), (*points, way) = scalars, arrays
    return [plus(x, step * (turn * way)) for step, x in zip(steps, points, strict=True)]


@functools.partial(_lift.elementwise, rounded=False)
def _apart(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    inverse, *a = scalars
    return apart_of(a, inverse, arrays)


@functools.partial(_lift.elementwise, rounded=False)
def _average(shares: Sequence[Scalar], moves: Sequence[Array]) -> Array:
    return average_of(shares, moves)


@_lift.reduction
def _apart_along(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (inverse, *a), (*trees, moved) = scalars, arrays
    return apart_of(a, inverse, trees) * moved
