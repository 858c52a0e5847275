"""Points to be averaged, measured in one pass beside a point to avoid or to reach."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Int

from wspace import _checks, _lift, tree
from wspace._checks import Numbers
from wspace._numerics import Rounding, in_jax, power_of_two, safe_sqrt, unstacked
from wspace.typing import Coefficients, Scalar, WeightsLike


def finite_length(length: Scalar, points: Sequence[WeightsLike], **trees: WeightsLike) -> None:
    """Raises, naming the leaf, if a known length shows that a point holds NaN or an infinity."""
    if not _checks.is_traced(length) and not bool(jnp.isfinite(length)):
        _checks.finite(**_checks.each("points", points), **trees)


def upcast_or(known: Rounding) -> str:
    """The other way out for points that are stored in half precision, at the end of an error."""
    way = ", or pass all trees through tree.upcast, if all digits stored are meant"
    return way if known.by_storage else ""


def held(lengths: Sequence[Scalar], points: Sequence[WeightsLike], what: str) -> Scalar | float:
    """Refuses edits of points that are longer than the numbers that their dtypes hold."""
    dtypes = {in_jax(leaf.dtype) for leaf in jax.tree.leaves(points)}
    most = min((float(jnp.finfo(dtype).max) for dtype in dtypes), default=math.inf)
    longest = functools.reduce(jnp.maximum, lengths)
    return _checks.refuse(
        ~(longest <= most),
        lambda: (
            f"a point would have to move by {longest:.3g}, and its dtype holds numbers up to "
            f"{most:.3g}: give {what}, or weights of a smaller scale"
        ),
    )


class Pulls(NamedTuple):
    r"""What coefficients and costs ask of each point; of costs only the ratios count.

    With $s_i$ the `roots` $a_i / \sqrt{c_i}$ over the largest of them, and $q_i$ the `prices`
    $1 / \sqrt{c_i}$ over the same number, $\frac{a_i / c_i}{\sum_j a_j^2 / c_j} = s_i q_i /
    \sum_j s_j^2$: no square is taken of what may be far from one.
    """

    roots: Numbers
    prices: Numbers

    def moves(self, dtype: DTypeLike) -> list[Any]:
        """How far each point moves where all may move everywhere and the average by one."""
        return numbers_in(self.roots * self.prices / (self.roots**2).sum(), dtype)

    def shares(self, dtype: DTypeLike) -> list[Any]:
        """The part of the shift of the average that each point makes; they sum to one."""
        return numbers_in(self.roots**2 / (self.roots**2).sum(), dtype)


def allowing(pulls: Pulls, exponents: Int[Array, " k"], dtype: DTypeLike) -> Pulls:
    """The pulls where what each point is allowed is over a power of two of its own."""
    half = jnp.exp2((exponents - jnp.max(exponents)).astype(dtype) / 2)
    roots, prices = (jnp.asarray(x).astype(dtype) * half for x in pulls)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(roots)))
    largest = jnp.where(largest == 0, 1, largest)
    return Pulls(roots / largest, prices / largest)


def numbers_in(x: Numbers, dtype: DTypeLike) -> list[Any]:
    """The numbers one by one, traced ones in a dtype."""
    return _checks.unpacked(x if isinstance(x, np.ndarray) else x.astype(dtype))


def pulls_of(a: Numbers, costs: Coefficients | None, count: int) -> Pulls:
    """The pulls of coefficients that sum to one, and of costs, which are checked."""
    c = _checks.positive("costs", costs, count)
    if isinstance(a, np.ndarray) and isinstance(c, np.ndarray):
        roots, largest = a / np.sqrt(c), np.abs(a / np.sqrt(c)).max()
        with np.errstate(over="ignore"):
            return Pulls(roots / largest, np.where(a == 0, 0, 1 / np.sqrt(c) / largest))
    a, c = tree.widened([_checks.floating(a), _checks.floating(c)])[0]
    roots = a / jnp.sqrt(c)
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(roots)))
    return Pulls(roots / largest, jnp.where(a == 0, 0, 1 / jnp.sqrt(c) / largest))


class Sources(NamedTuple):
    """What is to be known of points, their average, another point, and a direction.

    Lengths are in a unit, of which the caller chooses a power of two.

    Attributes:
        a: The coefficients divided by their sum.
        square: The squared distance of the average from the other point.
        distance: Its root.
        size: The scale at which the average rounds, the sum of |a_i| times the norm of each point.
        center: The norm of the other point.
        turn: What the direction is multiplied by to have entries of about one, a power of two.
        speed: The norm of the direction times `turn`, zero if there is none.
        along: The inner product of that with the average less the other point.
    """

    a: Numbers
    square: Scalar
    distance: Scalar
    size: Scalar
    center: Scalar
    turn: Scalar | float
    speed: Scalar
    along: Scalar


def average_of(a: Sequence[Scalar], points: Sequence[Array]) -> Array:
    """The entries of the average."""
    terms = [k * x for k, x in zip(a, points, strict=True)]
    return sum(terms[1:], start=terms[0])


def apart_of(a: Sequence[Scalar], inverse: Scalar, arrays: Sequence[Array]) -> Array:
    """The entries of the average less another point, the last of the arrays, over a unit."""
    # Before the difference, which may be too small for the dtype where its terms are not.
    *points, center = [inverse * x for x in arrays]
    return average_of(a, points) - center


@_lift.reduction
def _squares_and_products(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    inverse, turn, *a = scalars
    trees, ways = arrays[: len(a) + 1], [turn * way for way in arrays[len(a) + 1 :]]
    apart, lengths = apart_of(a, inverse, trees), [inverse * x for x in trees]
    return [x * x for x in (apart, *lengths)] + [
        x for way in ways for x in (way * way, apart * way)
    ]


def _sizes(_: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    return [jnp.abs(x) for x in arrays]


_largest = _lift.reduction(_sizes, kind="max")


def unit_of(trees: Sequence[WeightsLike]) -> Scalar:
    """The power of two nearest to the largest entry of trees."""
    return power_of_two(jnp.max(_largest((), trees)))


def sources(
    points: Sequence[WeightsLike],
    center: WeightsLike,
    coefficients: Coefficients,
    direction: WeightsLike | None = None,
    unit: Scalar | float = 1.0,
) -> Sources:
    """Points measured beside a center, in a unit, and their coefficients normalized."""
    a = _checks.affine(coefficients, len(points))
    ways = [] if direction is None else [direction]
    turn = 1.0 if direction is None else 1 / unit_of(ways)
    scalars = [1 / unit, turn, *_checks.unpacked(a)]
    squares = _squares_and_products(scalars, [*points, center, *ways])
    a = a if isinstance(a, np.ndarray) else a.astype(squares.dtype)
    count = len(points) + 2
    distance, *norms, norm = unstacked(safe_sqrt(squares[:count]))
    sizes = [abs(k) * x for k, x in zip(_checks.unpacked(a), norms, strict=True)]
    speed, along = (0 * norm, 0 * norm) if direction is None else unstacked(squares[count:])
    size = sum(sizes[1:], sizes[0])
    return Sources(a, squares[0], distance, size, norm, turn, safe_sqrt(speed), along)
