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
from jaxtyping import Array

from wspace import _checks, lowrank, tree
from wspace._checks import Numbers
from wspace._numerics import matmul, placed_like, plus, replicated
from wspace.cone.cones import Cone, project
from wspace.negative.allowance import Allowed, each_allowance, moved_by, without_rounding
from wspace.negative.sources import average_of, finite_length, sources
from wspace.typing import Allow, Coefficients, Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["exit_ball", "retarget"]


def _least_edits(a: Numbers, c: Numbers, allowed: Sequence[Allowed], d: Array) -> list[Array]:
    r"""The edits of one leaf that shift the average by `d` at least cost.

    With $P_i = F_i F_i^\top$ they are $F_i y_i / \sqrt{c_i}$ for the $y$ of least norm with
    $\sum_i a_i / \sqrt{c_i}\, F_i y_i = D$. Of this problem $S L = D$ are the normal equations,
    whose condition number is the square.
    """
    rows = list(zip(_checks.unpacked(a), _checks.unpacked(c), allowed, strict=True))
    if all(p.root is None for p in allowed):
        total = sum((k**2 / cost * p.scale for k, cost, p in rows), jnp.zeros((), d.dtype))
        least = d / jnp.where(total == 0, jnp.inf, total)
        return [k / cost * p.scale * least for k, cost, p in rows]
    matrix = replicated(lowrank.as_matrix(d))
    factors = [p.factor(matrix.shape) / cost**0.5 for _, cost, p in rows]
    blocks = [k * factor for (k, _, _), factor in zip(rows, factors, strict=True)]
    u, values, vt = jnp.linalg.svd(jnp.concatenate(blocks, axis=-1), full_matrices=False)
    squares = without_rounding(values**2)
    inverse = jnp.where(squares > 0, values / jnp.where(squares > 0, squares, 1), 0)[..., None]
    y = matmul(jnp.swapaxes(vt, -1, -2), inverse * matmul(jnp.swapaxes(u, -1, -2), matrix))
    parts = jnp.split(y, len(rows), axis=-2)
    return [
        placed_like(jnp.where(k == 0, 0, matmul(factor, part)).reshape(d.shape), d)
        for (k, _, _), factor, part in zip(rows, factors, parts, strict=True)
    ]


@_checks.of_points
def retarget(
    points: Sequence[WeightsLike],
    coefficients: Coefficients,
    target: WeightsLike,
    *,
    costs: Coefficients | None = None,
    allow: Allow | None = None,
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

    Returns:
        The moved points, each leaf in the dtype of that leaf of its point.

    Raises:
        ValueError: If `allow` admits no such edits: if the part of $T - M$ out of reach exceeds
            $\sqrt\varepsilon$ of it and the rounding of the points, $64\,\varepsilon$ of their size
            (NaN if traced). Also if coefficients or costs are out of their domain or not as many
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
    _checks.same_layout(**_checks.each("points", points), target=target)
    seen = sources(points, target, coefficients, costs)
    finite_length(seen.distance, points, target=target)
    a = _checks.unpacked(seen.a)
    if allow is None:
        pulls = _checks.unpacked(seen.a / seen.c / (seen.a**2 / seen.c).sum())
        return _shifted([*a, *pulls], [*points, target])
    allowed = each_allowance(allow, points, target)
    leaves, structure = jax.tree.flatten(target)
    rows = list(zip(*map(jax.tree.leaves, points), strict=True))
    moves, left = [], []
    for row, goal, column in zip(rows, leaves, zip(*allowed, strict=True), strict=True):
        shift = _shift(a, [*row, goal]).astype(seen.distance.dtype)
        edits = _least_edits(seen.a, seen.c, column, shift)
        left.append(tree.norm(_unreached(a, [shift, *edits])))
        moves.append(edits)
    missing = tree.norm(left)
    eps = jnp.finfo(seen.distance.dtype).eps
    bound = jnp.sqrt(eps) * seen.distance + 64 * eps * (seen.size + seen.center)

    def message() -> str:
        worst = max(range(len(left)), key=lambda i: float(left[i]))
        path, _ = tree_leaves_with_path(target)[worst]
        return (
            f"allow admits no edits whose average is target: of a shift of norm "
            f"{seen.distance:.3g}, {missing:.3g} is out of reach, most of it ({left[worst]:.3g}) "
            f"in leaf {_checks.path_of(path)}: allow more there, or move target"
        )

    undefined = _checks.refuse(~(missing <= bound), message)
    return [
        tree.displaced((1 + undefined,), (x, structure.unflatten(leaf[i] for leaf in moves)))
        for i, x in enumerate(points)
    ]


@tree.elementwise
def _shifted(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    *points, target = arrays
    a, pulls = scalars[: len(points)], scalars[len(points) :]
    shift = target - average_of(a, points)
    return [plus(x, k * shift) for k, x in zip(pulls, points, strict=True)]


@functools.partial(tree.elementwise, rounded=False)
def _shift(a: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    *points, target = arrays
    return target - average_of(a, points)


@functools.partial(tree.elementwise, rounded=False)
def _unreached(a: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    shift, *edits = arrays
    return shift - average_of(a, edits)


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

    Returns:
        The moved points, each leaf in the dtype of that leaf of its point.

    Raises:
        ValueError: If the average is within $64\,\varepsilon \sum_i |a_i| \lVert x_i \rVert$ of
            `avoid`, where no way out is distinguished, and there is no direction; if $E$ is
            orthogonal to the cone, $\lVert P_K E \rVert \le 64\,\varepsilon \lVert E \rVert$; if
            the direction is zero or `allow` leaves nothing of it, $\lVert S g \rVert \le
            64\,\varepsilon \lVert S \rVert \lVert g \rVert$; if the radius is not positive or
            below the same rounding of the points; if `allow` is given without a direction, or a
            cone with one. Where these are traced the result is NaN. Also for the arguments that
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
    seen = sources(points, avoid, coefficients, costs, direction)
    finite_length(seen.distance, points, avoid=avoid)
    distance = seen.distance
    radius = jnp.asarray(radius).astype(distance.dtype)
    eps = jnp.finfo(distance.dtype).eps
    rounding = 64 * eps * seen.size
    undefined = _checks.refuse(
        ~(radius > rounding),
        lambda: (
            f"radius {radius:.3g} is below the rounding of the points, {rounding:.3g}: "
            "no average of them can be placed that finely"
        ),
    )
    if direction is None:
        undefined += _checks.refuse(
            ~(distance > rounding),
            lambda: (
                f"the average of points is avoid, to rounding ({distance:.3g} apart), so no way "
                "out is distinguished: give a direction"
            ),
        )
    outside = distance >= radius
    a, pulls = _checks.unpacked(seen.a), _checks.unpacked(seen.a / seen.c)
    share = jnp.asarray((seen.a**2 / seen.c).sum()).astype(distance.dtype)
    if direction is None and cone is None:
        # S g = share E, so that the way is never written.
        step = share * distance
        t = _step(radius, distance, step, step * distance) + undefined
        return _moved_apart([*a, *(t * k for k in pulls)], [*points, avoid])
    if cone is not None:
        apart = _apart(a, [*points, avoid])
        nothing = jax.tree.map(jnp.zeros_like, apart)
        way = lowrank.apply(nothing, project(cone, apart).edit)
        speed, along = tree.norm(way), tree.vdot(apart, way)
        undefined += _checks.refuse(
            ~outside & ~(speed > 64 * eps * distance),
            lambda: (
                f"the average is {distance:.3g} from avoid, {speed:.3g} of it in {cone}: no edit "
                "of the cone is distinguished as the way out; give a larger cone, or a direction"
            ),
        )
    else:
        way, speed, along = direction, seen.speed, seen.along
        finite_length(speed, points, direction=direction)
    if allow is None:
        moves, step, along, largest = [way] * len(points), share * speed, share * along, share
    else:
        allowed = each_allowance(allow, points, avoid, way)
        moves = [moved_by(row, way) for row in allowed]
        shares = _checks.unpacked(seen.a**2 / seen.c)
        moved = _average(shares, moves)
        step = tree.norm(moved)
        along = _shift_along(a, [*points, avoid, moved])
        zero = jnp.zeros((), step.dtype)
        sizes = [functools.reduce(jnp.maximum, [p.scale for p in row], zero) for row in allowed]
        largest = sum(w * p for w, p in zip(shares, sizes, strict=True))
    undefined += _checks.refuse(
        ~outside & ~(step > 64 * eps * largest * speed),
        lambda: (
            f"direction has norm {speed:.3g}, and where the points may move {step:.3g} is left of "
            "it: give a direction that is not zero and that allow does not annihilate"
        ),
    )
    t = _step(radius, distance, step, along) + undefined
    return [
        tree.displaced((t * k,), (x, move)) for k, x, move in zip(pulls, points, moves, strict=True)
    ]


@jax.jit
def _step(radius: Scalar, distance: Scalar, step: Scalar, along: Scalar) -> Scalar:
    r"""The positive root $t$ of $\lVert E + t S g \rVert = \rho$; zero from outside.

    `step` is the norm of $S g$ and `along` its inner product with $E$.
    """
    outside, safe = distance >= radius, jnp.where(step == 0, 1, step)
    gap = jnp.where(outside, 1, (radius - distance) * (radius + distance))
    slope = along / safe
    root = jnp.sqrt(slope**2 + gap)
    reach = jnp.where(slope > 0, gap / (root + jnp.abs(slope)), root - slope)
    return jnp.where(outside, 0, reach / safe)


@tree.elementwise
def _moved_apart(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    *points, avoid = arrays
    a, pulls = scalars[: len(points)], scalars[len(points) :]
    apart = average_of(a, points) - avoid
    return [plus(x, k * apart) for k, x in zip(pulls, points, strict=True)]


@functools.partial(tree.elementwise, rounded=False)
def _apart(a: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    *points, avoid = arrays
    return average_of(a, points) - avoid


@functools.partial(tree.elementwise, rounded=False)
def _average(shares: Sequence[Scalar], moves: Sequence[Array]) -> Array:
    return average_of(shares, moves)


@tree.reduction
def _shift_along(a: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    *points, avoid, moved = arrays
    return (average_of(a, points) - avoid) * moved
