"""The nearest of all averages of some points to another point."""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from wspace import geometry, tree
from wspace._numerics import unstacked
from wspace.cone.spectra import ratio
from wspace.typing import Scalar, Weights, WeightsLike

Mode: TypeAlias = Literal["convex", "affine"]


class Nearest(NamedTuple):
    """How near the averages of points come to another point, and from which side.

    `distance` is that of the nearest average and `normal` the unit vector to it, zero where the
    distance is below the rounding of the points. No average is nearer than `bound`.
    """

    normal: Weights
    distance: Scalar
    bound: Scalar


def nearest_average(
    points: Sequence[WeightsLike], center: WeightsLike, mode: Mode, rounding: Scalar
) -> Nearest:
    """The nearest of all convex or of all affine averages of points."""
    basis, columns = seen_from(points, center, rounding)
    foot, distance = nearest_in(columns, rounding, mode)
    unit = ratio(foot, distance)
    return Nearest(_in_span(unstacked(unit), basis), distance, jnp.min(_times(columns.T, unit)))


@functools.partial(tree.elementwise, rounded=False)
def _in_span(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    return functools.reduce(jnp.add, [c * q for c, q in zip(scalars, arrays, strict=True)])


def nearest_in(
    columns: Float[Array, "k k"], rounding: Scalar, mode: Mode
) -> tuple[Float[Array, " k"], Scalar]:
    """The average nearest to zero of points that are columns, and its norm; 0 up to `rounding`."""
    if mode == "affine":
        is_last = jnp.arange(columns.shape[-1]) == columns.shape[-1] - 1
        foot = jnp.where(is_last, columns[:, 0], 0)
    else:
        active = _active_set(jax.lax.stop_gradient(columns))
        foot = _times(columns, _foot(columns, active))
    distance = tree.norm(foot)
    within = distance <= rounding
    return jnp.where(within, 0, foot), jnp.where(within, 0, distance)


def rounding_of(sizes: Sequence[Scalar]) -> Scalar:
    """The distance below which averages of trees of some norms are not told apart."""
    largest = functools.reduce(jnp.maximum, sizes)
    return 64 * jnp.finfo(largest.dtype).eps * largest


def seen_from(
    points: Sequence[WeightsLike], center: WeightsLike, rounding: Scalar
) -> tuple[list[Weights], Float[Array, "k k"]]:
    """An orthonormal basis, and the points as seen from the center in it, one a column.

    All but the last vector span the differences of the points; one that is dependent is zero.
    """
    start, *others = points
    basis: list[Weights] = []
    columns = []
    for x, origin in (*((x, start) for x in others), (start, center)):
        along, left, direction = _next(x, origin, basis, rounding)
        basis.append(direction)
        padding = [jnp.zeros_like(left)] * (len(others) - len(along))
        columns.append(jnp.stack([*along, left, *padding]))
    *edges, first = columns
    return basis, jnp.stack([first, *(first + edge for edge in edges)], axis=-1)


def _next(
    x: WeightsLike, origin: WeightsLike, basis: Sequence[Weights], rounding: Scalar
) -> tuple[list[Scalar], Scalar, Weights]:
    """A difference: what it has along the basis, the length of the rest, and its direction."""
    along, rest = geometry.components(tree.combine((1, -1), (x, origin), rounded=False), basis)
    left = tree.norm(rest)
    kept = left > rounding
    inverse = jnp.where(kept, 1 / jnp.where(kept, left, 1), 0)
    return list(along), jnp.where(kept, left, 0), _in_span((inverse,), (rest,))


def _times(matrix: Float[Array, "m n"], x: Float[Array, " n"]) -> Float[Array, " m"]:
    return jnp.matmul(matrix, x, precision=jax.lax.Precision.HIGHEST)


def _foot(columns: Float[Array, "k k"], active: Bool[Array, " k"]) -> Float[Array, " k"]:
    """Affine coefficients of the point nearest to zero of the span of the active columns."""
    count = columns.shape[-1]
    is_first = jnp.arange(count) == jnp.argmax(active)
    others = active & ~is_first
    first = _times(columns, jnp.where(is_first, 1, 0).astype(columns.dtype))
    edges = jnp.where(others, columns - first[:, None], 0)
    # A unit row for every column that takes no part makes the least squares problem regular.
    system = jnp.concatenate([edges, jnp.diag(jnp.where(others, 0, 1).astype(columns.dtype))])
    q, r = jnp.linalg.qr(system)
    right = -_times(q[:count].T, first)
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
        nearest = _times(columns, foot)
        heights = _times(columns.T, nearest)
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
