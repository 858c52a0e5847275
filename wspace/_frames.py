r"""Orthonormal bases of the differences of points, by Gram-Schmidt applied twice.

The first vector of a basis is a difference $(x_1 - x_0) / \lVert x_1 - x_0 \rVert$, which is made
of its points in every pass and never written; so two points need no memory beside their own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from wspace import _lift, tree
from wspace._numerics import safe_sqrt, unstacked
from wspace.typing import Scalar, Weights, WeightsLike


class Frame(NamedTuple):
    """The vector `inverse * (first - start)`, and further orthonormal ones.

    Differences are taken `over` times.
    """

    inverse: Scalar
    start: WeightsLike
    first: WeightsLike
    others: list[Weights]
    over: Scalar | float = 1.0

    @property
    def scalars(self) -> list[Scalar | float]:
        """What the first vector and differences are multiplied by."""
        return [self.inverse, self.over]

    @property
    def trees(self) -> list[WeightsLike]:
        """The trees that are read."""
        return [self.start, self.first, *self.others]


def of_differences(
    pairs: Sequence[tuple[WeightsLike, WeightsLike]],
    inverse: Callable[[int, Scalar], Scalar],
    over: Scalar | float = 1.0,
) -> tuple[Frame, list[list[Scalar]]]:
    """`over` times the differences of pairs of points as $D = Q R$, `R` by columns to the diagonal.

    `inverse` takes the index of a difference and what is left of its length outside the span of
    those before it, and returns what the rest is multiplied by.
    """
    (first, start), *others = pairs
    left = distance(first, start, over)
    frame = Frame(inverse(0, left), start, first, [], over)
    columns = [[left]]
    for i, (x, origin) in enumerate(others, 1):
        coefficients, rest = components(frame, x, origin)
        left = tree.norm(rest)
        frame.others.append(multiple((inverse(i, left),), (rest,)))
        columns.append([*coefficients, left])
    return frame, columns


def components(frame: Frame, x: WeightsLike, origin: WeightsLike) -> tuple[list[Scalar], Weights]:
    """The coefficients of a difference in a frame, and what is orthogonal to it."""
    first = _gap_along(frame.scalars, (x, origin, *frame.trees))
    rest = _gap_beyond([*frame.scalars, *unstacked(first)], (x, origin, *frame.trees))
    second, rest = parts(frame, rest)
    return unstacked(first + jnp.stack(second)), rest


def along(frame: Frame, x: WeightsLike) -> list[Scalar]:
    """The coefficients of a tree in a frame."""
    return unstacked(_along_frame(frame.scalars, (x, *frame.trees)))


def parts(frame: Frame, x: WeightsLike) -> tuple[list[Scalar], Weights]:
    """The coefficients of a tree in a frame, and the tree without these parts."""
    coefficients = along(frame, x)
    return coefficients, _beyond_frame([*frame.scalars, *coefficients], (x, *frame.trees))


def measured(
    frame: Frame, x: WeightsLike, origin: WeightsLike
) -> tuple[Float[Array, " k"], Scalar]:
    """The coefficients of a difference in a frame, and the length of what is left, unwritten."""
    trees = (x, origin, *frame.trees)
    first = _gap_along(frame.scalars, trees)
    coefficients = first + _rest_along([*frame.scalars, *unstacked(first)], trees)
    return coefficients, safe_sqrt(_rest_square([*frame.scalars, *unstacked(coefficients)], trees))


@_lift.reduction
def gap_square(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (over,), (x, y) = scalars, arrays
    return _gap(over, x, y) ** 2


def distance(x: WeightsLike, y: WeightsLike, over: Scalar | float = 1.0) -> Scalar:
    """`over` times `geometry.distance`, without checks."""
    return safe_sqrt(gap_square((over,), (x, y)))


def _gap(over: Scalar, x: Array, y: Array) -> Array:
    return over * x - over * y


def _vectors(inverse: Scalar, over: Scalar, arrays: Sequence[Array]) -> list[Array]:
    start, first, *others = arrays
    return [inverse * _gap(over, first, start), *others]


def _without(x: Array, coefficients: Sequence[Scalar], vectors: Sequence[Array]) -> Array:
    parts = [c * q for c, q in zip(coefficients, vectors, strict=True)]
    return x - functools.reduce(lambda a, b: a + b, parts)


@_lift.reduction
def _gap_along(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    (inverse, over), (x, origin, *frame) = scalars, arrays
    return [q * _gap(over, x, origin) for q in _vectors(inverse, over, frame)]


@functools.partial(_lift.elementwise, rounded=False)
def _gap_beyond(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (inverse, over, *c), (x, origin, *frame) = scalars, arrays
    return _without(_gap(over, x, origin), c, _vectors(inverse, over, frame))


@_lift.reduction
def _along_frame(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    (inverse, over), (x, *frame) = scalars, arrays
    return [q * x for q in _vectors(inverse, over, frame)]


@functools.partial(_lift.elementwise, rounded=False)
def _beyond_frame(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (inverse, over, *c), (x, *frame) = scalars, arrays
    return _without(x, c, _vectors(inverse, over, frame))


@_lift.reduction
def _rest_along(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    (inverse, over, *c), (x, origin, *frame) = scalars, arrays
    vectors = _vectors(inverse, over, frame)
    return [q * _without(_gap(over, x, origin), c, vectors) for q in vectors]


@_lift.reduction
def _rest_square(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (inverse, over, *c), (x, origin, *frame) = scalars, arrays
    return _without(_gap(over, x, origin), c, _vectors(inverse, over, frame)) ** 2


def gap_times(c: Scalar, gap: tuple[WeightsLike, WeightsLike]) -> Weights:
    """A multiple of a difference."""
    return _gap_times((c,), gap)


def combination(
    c: Scalar,
    gap: tuple[WeightsLike, WeightsLike],
    coefficients: Sequence[Scalar],
    frame: Frame,
) -> Weights:
    """A multiple of a difference, and multiples of the vectors of a frame, added up."""
    return _gap_and_frame([*frame.scalars, c, *coefficients], [*gap, *frame.trees])


def within(frame: Frame, coefficients: Sequence[Scalar]) -> Weights:
    """Multiples of the vectors of a frame, added up."""
    return _frame_sum([*frame.scalars, *coefficients], frame.trees)


@functools.partial(_lift.elementwise, rounded=False)
def _gap_times(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (c,), (x, origin) = scalars, arrays
    return c * (x - origin)


@functools.partial(_lift.elementwise, rounded=False)
def _gap_and_frame(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (inverse, over, c, *coefficients), (x, origin, *frame) = scalars, arrays
    vectors = _vectors(inverse, over, frame)
    return _without(c * _gap(over, x, origin), [-k for k in coefficients], vectors)


@functools.partial(_lift.elementwise, rounded=False)
def _frame_sum(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    inverse, over, *coefficients = scalars
    vectors = _vectors(inverse, over, arrays)
    return functools.reduce(jnp.add, [c * q for c, q in zip(coefficients, vectors, strict=True)])


@functools.partial(_lift.elementwise, rounded=False)
def multiple(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (c,), (x,) = scalars, arrays
    return c * x
