"""The nearest of all averages of some points to another point."""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from wspace import _frames as frames
from wspace import tree
from wspace._numerics import unstacked
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
    points: Sequence[WeightsLike], center: WeightsLike, mode: HullMode, rounding: Scalar
) -> Nearest:
    """The nearest of all convex or of all affine averages of points."""
    seen = seen_from(points, center, rounding)
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
        columns: The points in an orthonormal basis: the frame, and what the gap from the center
            to the first point leaves outside of it. A vector that is dependent is zero.
        frame: The frame, if there is more than one point.
        gap: The first point and the center.
        along: The coefficients of the gap in the frame.
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


def seen_from(points: Sequence[WeightsLike], center: WeightsLike, rounding: Scalar) -> Seen:
    """Points as seen from a center."""
    start, *others = points

    def inverse(_: int, left: Scalar) -> Scalar:
        kept = left > rounding
        return jnp.where(kept, 1 / jnp.where(kept, left, 1), 0)

    frame, rows, along = None, [], []
    if others:
        frame, rows = frames.of_differences(start, others, inverse)
        coefficients, left = frames.measured(frame, start, center)
        along = unstacked(coefficients)
    else:
        left = frames.distance(start, center)

    def column(*along: Scalar, left: Scalar) -> Float[Array, " k"]:
        padding = [jnp.zeros_like(left)] * (len(others) - len(along))
        return jnp.stack([*along, jnp.where(left > rounding, left, 0), *padding])

    first = column(*along, left=left)
    columns = [first, *(first + column(*row, left=own) for *row, own in rows)]
    return Seen(jnp.stack(columns, axis=-1), frame, (start, center), along, inverse(0, left))


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
