"""Points to be averaged, measured in one pass beside a point to avoid or to reach."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from wspace import _checks, tree
from wspace._checks import Numbers
from wspace._numerics import safe_sqrt, unstacked
from wspace.typing import Coefficients, Scalar, WeightsLike


def finite_length(length: Scalar, points: Sequence[WeightsLike], **trees: WeightsLike) -> None:
    """Raises, naming the leaf, if a known length shows that a point holds NaN or an infinity."""
    if not _checks.is_traced(length) and not bool(jnp.isfinite(length)):
        _checks.finite(**_checks.each("points", points), **trees)


class Sources(NamedTuple):
    """What is to be known of points, their average, another point, and a direction.

    Attributes:
        a: The coefficients divided by their sum.
        c: The costs.
        distance: That of the average from the other point.
        size: The scale at which the average rounds, the sum of |a_i| times the norm of each point.
        center: The norm of the other point.
        speed: The norm of the direction, zero if there is none.
        along: The inner product of the direction with the average less the other point.
    """

    a: Numbers
    c: Numbers
    distance: Scalar
    size: Scalar
    center: Scalar
    speed: Scalar
    along: Scalar


def average_of(a: Sequence[Scalar], points: Sequence[Array]) -> Array:
    """The entries of the average."""
    terms = [k * x for k, x in zip(a, points, strict=True)]
    return sum(terms[1:], start=terms[0])


@tree.reduction
def _squares_and_products(a: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    points, (center, *ways) = arrays[: len(a)], arrays[len(a) :]
    apart = average_of(a, points) - center
    products = [x * x for x in (apart, center, *points)]
    return products + [x for way in ways for x in (way * way, apart * way)]


def sources(
    points: Sequence[WeightsLike],
    center: WeightsLike,
    coefficients: Coefficients,
    costs: Coefficients | None,
    direction: WeightsLike | None = None,
) -> Sources:
    """Points measured beside a center, coefficients normalized and costs checked."""
    a = _checks.affine(coefficients, len(points))
    c = _checks.positive("costs", costs, len(points))
    ways = [] if direction is None else [direction]
    squares = _squares_and_products(_checks.unpacked(a), [*points, center, *ways])
    a, c = (x if isinstance(x, np.ndarray) else x.astype(squares.dtype) for x in (a, c))
    count = len(points) + 2
    distance, norm, *norms = unstacked(safe_sqrt(squares[:count]))
    sizes = [abs(k) * x for k, x in zip(_checks.unpacked(a), norms, strict=True)]
    speed, along = (0 * norm, 0 * norm) if direction is None else unstacked(squares[count:])
    return Sources(a, c, distance, sum(sizes[1:], sizes[0]), norm, safe_sqrt(speed), along)
