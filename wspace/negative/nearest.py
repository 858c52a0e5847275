"""The nearest of all averages of some points to another point."""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from wspace import _checks, _lift, tree
from wspace import _frames as frames
from wspace._numerics import rows_within, safe_sqrt, unstacked
from wspace.cone.spectra import ratio
from wspace.typing import Scalar, Weights, WeightsLike

HullMode: TypeAlias = Literal["convex", "affine"]


class Nearest(NamedTuple):
    """How near the averages of points come to another point, and from which side.

    `distance` is that of the nearest average and `normal` the unit vector to it, zero where the
    distance is below the rounding of the points. No average is nearer than `bound`.
    """

    normal: Weights
    distance: Scalar
    bound: Scalar


def nearest_average(
    points: Sequence[WeightsLike],
    center: WeightsLike,
    mode: HullMode,
    rounding: Scalar,
    path: "Path | None" = None,
) -> Nearest:
    """The nearest of all convex or of all affine averages of points, whose path may be known."""
    seen = seen_from(points, center, rounding, path)
    foot, distance = nearest_in(seen.columns, rounding, mode)
    unit = ratio(foot, distance)
    bound = jnp.min(_matvec(seen.columns.T, unit))
    *along, last = unstacked(unit)
    gap = last * seen.inverse
    coefficients = [c - gap * k for c, k in zip(along, seen.along, strict=True)]
    return Nearest(seen.normal(gap, coefficients), distance, bound)


class Seen(NamedTuple):
    """Points as seen from a center: in a frame of their differences, and across it.

    Attributes:
        columns: The points in an orthonormal basis, in an order of their own: the frame, and what
            the gap from the center to the nearest point leaves outside of what the points span.
        frame: The frame, if there is more than one point.
        gap: The nearest point and the center.
        along: The coefficients in the frame of the part of the gap in that span.
        inverse: One over the length of what is left of the gap, zero if that is nothing.
    """

    columns: Float[Array, "k k"]
    frame: frames.Frame | None
    gap: tuple[WeightsLike, WeightsLike]
    along: list[Scalar]
    inverse: Scalar

    def normal(self, gap: Scalar, coefficients: Sequence[Scalar]) -> Weights:
        """A multiple of the gap, and multiples of the vectors of the frame, added up."""
        if self.frame is None:
            return frames.gap_times(gap, self.gap)
        return frames.combination(gap, self.gap, coefficients, self.frame)


def nearest_in(
    columns: Float[Array, "k k"], rounding: Scalar, mode: HullMode
) -> tuple[Float[Array, " k"], Scalar]:
    """The average nearest to zero of points that are columns, and its norm; 0 up to `rounding`."""
    if mode == "affine":
        is_last = jnp.arange(columns.shape[-1]) == columns.shape[-1] - 1
        foot = jnp.where(is_last, columns[:, 0], 0)
    else:
        active = _active_set(jax.lax.stop_gradient(columns))
        foot = _matvec(columns, _foot(columns, active))
    distance = tree.norm(foot)
    within = distance <= rounding
    return jnp.where(within, 0, foot), jnp.where(within, 0, distance)


def rounding_of(sizes: Sequence[Scalar]) -> Scalar:
    """The distance below which averages of trees of some norms are not told apart."""
    largest = functools.reduce(jnp.maximum, sizes)
    return 64 * jnp.finfo(largest.dtype).eps * largest


@_lift.reduction
def _gaps_from_first(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    (over,), (first, *others) = scalars, arrays
    return [(over * x - over * first) ** 2 for x in others]


def _square_gaps(trees: Sequence[WeightsLike], over: Scalar | float) -> Float[Array, "m m"]:
    """The squared distances of all pairs, from each tree to half of the others, in a circle."""
    count = len(trees)
    half = count // 2
    circle = [*trees, *trees]
    rows = [_gaps_from_first((over,), circle[i : i + half + 1]) for i in range(count)]
    i, j = np.indices((count, half))
    j = (i + j + 1) % count
    gaps = jnp.stack(*tree.widened(rows))
    return jnp.zeros((count, count), gaps.dtype).at[(i, j), (j, i)].set(gaps)


@jax.jit
def _order(squares: Float[Array, "m m"]) -> tuple[UInt32[Array, " k"], Float[Array, " k"]]:
    """From the first on, each time to the nearest that is left: where that is, and how far."""
    gaps = safe_sqrt(squares)
    places, most = jnp.arange(len(gaps)), jnp.finfo(gaps.dtype).max

    def step(state: Any, _: None) -> Any:
        at, passed = state
        # Those that are left come before those passed, also where they are infinitely far.
        near = jnp.argmin(jnp.where(passed, jnp.inf, jnp.minimum(gaps[at], most)))
        return (near, passed | (places == near)), (near, gaps[at, near])

    start = (jnp.zeros((), places.dtype), places == 0)
    order, spans = jax.lax.scan(step, start, length=len(gaps) - 1)[1]
    return (order - 1).astype(jnp.uint32), spans


@functools.partial(_lift.elementwise, rounded=False)
def _ordered(order: Sequence[UInt32[Array, ""]], arrays: Sequence[Array]) -> list[Array]:
    return [jax.lax.select_n(i.astype(jnp.int32), *arrays) for i in order]


class Path(NamedTuple):
    """Points from the one nearest to a center on, each time to the nearest left.

    `spans` are the lengths of the steps, from the center on, and `order` which point is where.
    """

    points: list[WeightsLike]
    spans: list[Scalar]
    order: UInt32[Array, " k"]


def path_of(points: Sequence[WeightsLike], center: WeightsLike, over: Scalar | float = 1.0) -> Path:
    """The path from a center through points, squares summed of differences times `over`.

    The distances of all pairs are measured before any point is chosen, so that a traced order is
    a permutation of every leaf, made once.
    """
    order, spans = _order(jax.lax.stop_gradient(_square_gaps([center, *points], over)))
    if len(points) == 1:
        path = list(points)
    elif _checks.is_traced(order):
        path = _ordered(unstacked(order), points)
    else:
        path = [points[i] for i in np.asarray(order).tolist()]
    return Path(path, unstacked(spans / over), order)


def inverse_of(length: Scalar) -> Scalar:
    """One over a length, zero for zero."""
    return jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0)


def seen_from(
    points: Sequence[WeightsLike],
    center: WeightsLike,
    rounding: Scalar,
    path: Path | None = None,
) -> Seen:
    """Points as seen from a center, in whatever order they are given.

    The frame is made of the steps of a path that goes on to the nearest point that is left: the
    difference of points that are near each other is as exact as they are. Which directions the
    steps span is decided of all of them, each at length one: of two that are nearly dependent the
    first may be short, and what the other leaves beside it large.
    """
    if len(points) == 1:
        (start,) = points
        left = frames.distance(start, center)
        left = jnp.where(left > rounding, left, 0)
        return Seen(left[None, None], None, (start, center), [], inverse_of(left))
    path = path or path_of(points, center)
    center, start, *others = tree.in_one_dtype(center, *path.points)
    _, *spans = path.spans
    eps = jnp.finfo(rounding.dtype).eps

    def kept(i: int, left: Scalar) -> Scalar:
        return jnp.where((spans[i] > rounding) & (left > 4 * eps * spans[i]), left, 0)

    pairs = list(zip(others, [start, *others[:-1]], strict=True))
    frame, rows = frames.of_differences(pairs, lambda i, left: inverse_of(kept(i, left)))
    zero = jnp.zeros_like(rows[0][0])
    steps = jnp.stack(
        [
            jnp.stack([*row, kept(i, own), *[zero] * (len(others) - i - 1)])
            for i, (*row, own) in enumerate(rows)
        ]
    )
    along, left = frames.measured(frame, start, center)
    sizes = jnp.stack(spans)[:, None]
    units = jnp.where(sizes > rounding, steps / jnp.where(sizes > 0, sizes, 1), 0)
    *steps, inside = unstacked(rows_within(jnp.concatenate([steps, along[None]]), units, 64 * eps))
    left = tree.norm([left, along - inside])
    left = jnp.where(left > rounding, left, 0)
    columns = [jnp.concatenate([inside, left[None]])]
    for step in steps:
        columns.append(columns[-1] + jnp.concatenate([step, zero[None]]))
    gap = start, center
    return Seen(jnp.stack(columns, axis=-1), frame, gap, unstacked(inside), inverse_of(left))


def _matvec(matrix: Float[Array, "m n"], x: Float[Array, " n"]) -> Float[Array, " m"]:
    return jnp.matmul(matrix, x, precision=jax.lax.Precision.HIGHEST)


def _foot(columns: Float[Array, "k k"], active: Bool[Array, " k"]) -> Float[Array, " k"]:
    """Affine coefficients of the point nearest to zero of the span of the active columns."""
    count = columns.shape[-1]
    is_first = jnp.arange(count) == jnp.argmax(active)
    others = active & ~is_first
    first = _matvec(columns, jnp.where(is_first, 1, 0).astype(columns.dtype))
    edges = jnp.where(others, columns - first[:, None], 0)
    # A unit row for every column that takes no part makes the least squares problem regular.
    system = jnp.concatenate([edges, jnp.diag(jnp.where(others, 0, 1).astype(columns.dtype))])
    q, r = jnp.linalg.qr(system)
    right = -_matvec(q[:count].T, first)
    solution = jax.scipy.linalg.solve_triangular(r, right[:, None])[:, 0]
    return jnp.where(is_first, 1 - jnp.sum(jnp.where(is_first, 0, solution)), solution)


@jax.jit
def _active_set(columns: Float[Array, "k k"]) -> Bool[Array, " k"]:
    """The columns whose convex combination is nearest to zero, by Wolfe's method."""
    count = columns.shape[-1]
    indices = jnp.arange(count)
    norms = jnp.sqrt(jnp.sum(columns**2, axis=0))
    unit = 16 * count * jnp.finfo(columns.dtype).eps * jnp.max(norms)

    def unfinished(state):
        *_, done, steps = state
        return ~done & (steps < 16 * (count + 1))

    def step(state):
        coefficients, active, _, steps = state
        foot = _foot(columns, active)
        inside = jnp.all(~active | (foot > 0))
        # Inside, the column that points back the most comes in; else the first to vanish goes.
        nearest = _matvec(columns, foot)
        heights = _matvec(columns.T, nearest)
        lowest = jnp.argmin(jnp.where(active, jnp.inf, heights))
        size = jnp.sum(nearest**2)
        better = ~active[lowest] & (size - heights[lowest] > unit * jnp.sqrt(size))
        shrink = active & (foot <= 0)
        drop = jnp.where(shrink, coefficients - foot, 1)
        ratios = jnp.where(shrink, coefficients / drop, jnp.inf)
        vanishing = jnp.argmin(ratios)
        part = jnp.where(inside, 1, jnp.minimum(ratios[vanishing], 1))
        coefficients = coefficients + part * (foot - coefficients)
        active = jnp.where(
            inside, active | (better & (indices == lowest)), active & (indices != vanishing)
        )
        return jnp.where(active, coefficients, 0), active, inside & ~better, steps + 1

    start = indices == jnp.argmin(norms)
    state = (start.astype(columns.dtype), start, jnp.asarray(False), jnp.int32(0))
    return jax.lax.while_loop(unfinished, step, state)[1]
