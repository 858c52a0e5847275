r"""Orthonormal bases of the differences of points, by Gram-Schmidt applied twice.

The first vector of a basis is a difference $(x_1 - x_0) / \lVert x_1 - x_0 \rVert$, which is made
of its points in every pass and never written; so two points need no memory beside their own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxtyping import Array, Float

from wspace import tree
from wspace._numerics import safe_sqrt, unstacked
from wspace.typing import Scalar, Weights, WeightsLike


class Frame(NamedTuple):
    """The vector `inverse * (first - start)`, and further orthonormal ones."""

    inverse: Scalar
    start: WeightsLike
    first: WeightsLike
    others: list[Weights]

    @property
    def trees(self) -> list[WeightsLike]:
        """The trees that are read."""
        return [self.start, self.first, *self.others]


def of_differences(
    pairs: Sequence[tuple[WeightsLike, WeightsLike]],
    inverse: Callable[[int, Scalar], Scalar],
) -> tuple[Frame, list[list[Scalar]]]:
    """The differences of pairs of points as $D = Q R$, `R` by columns to the diagonal.

    `inverse` takes the index of a difference and what is left of its length outside the span of
    those before it, and returns what the rest is multiplied by.
    """
    (first, start), *others = pairs
    left = distance(first, start)
    frame = Frame(inverse(0, left), start, first, [])
    columns = [[left]]
    for i, (x, origin) in enumerate(others, 1):
        coefficients, rest = components(frame, x, origin)
        left = tree.norm(rest)
        frame.others.append(_multiple((inverse(i, left),), (rest,)))
        columns.append([*coefficients, left])
    return frame, columns


def components(frame: Frame, x: WeightsLike, origin: WeightsLike) -> tuple[list[Scalar], Weights]:
    """The coefficients of a difference in a frame, and what is orthogonal to it."""
    first = _gap_along((frame.inverse,), (x, origin, *frame.trees))
    rest = _gap_beyond([frame.inverse, *unstacked(first)], (x, origin, *frame.trees))
    second = _along_frame((frame.inverse,), (rest, *frame.trees))
    rest = _beyond_frame([frame.inverse, *unstacked(second)], (rest, *frame.trees))
    return unstacked(first + second), rest


def measured(
    frame: Frame, x: WeightsLike, origin: WeightsLike
) -> tuple[Float[Array, " k"], Scalar]:
    """The coefficients of a difference in a frame, and the length of what is left, unwritten."""
    trees = (x, origin, *frame.trees)
    first = _gap_along((frame.inverse,), trees)
    coefficients = first + _rest_along([frame.inverse, *unstacked(first)], trees)
    return coefficients, safe_sqrt(_rest_square([frame.inverse, *unstacked(coefficients)], trees))


@tree.reduction
def gap_square(_: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    x, y = arrays
    return (x - y) ** 2


def distance(x: WeightsLike, y: WeightsLike) -> Scalar:
    """`geometry.distance` without checks."""
    return safe_sqrt(gap_square((), (x, y)))


def _vectors(inverse: Scalar, arrays: Sequence[Array]) -> list[Array]:
    start, first, *others = arrays
    return [inverse * (first - start), *others]


def _without(x: Array, coefficients: Sequence[Scalar], vectors: Sequence[Array]) -> Array:
    parts = [c * q for c, q in zip(coefficients, vectors, strict=True)]
    return x - functools.reduce(lambda a, b: a + b, parts)


@tree.reduction
def _gap_along(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    (inverse,), (x, origin, *frame) = scalars, arrays
    return [q * (x - origin) for q in _vectors(inverse, frame)]


@functools.partial(tree.elementwise, rounded=False)
def _gap_beyond(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (inverse, *c), (x, origin, *frame) = scalars, arrays
    return _without(x - origin, c, _vectors(inverse, frame))


@tree.reduction
def _along_frame(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    (inverse,), (x, *frame) = scalars, arrays
    return [q * x for q in _vectors(inverse, frame)]


@functools.partial(tree.elementwise, rounded=False)
def _beyond_frame(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (inverse, *c), (x, *frame) = scalars, arrays
    return _without(x, c, _vectors(inverse, frame))


@tree.reduction
def _rest_along(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    (inverse, *c), (x, origin, *frame) = scalars, arrays
    vectors = _vectors(inverse, frame)
    return [q * _without(x - origin, c, vectors) for q in vectors]


@tree.reduction
def _rest_square(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (inverse, *c), (x, origin, *frame) = scalars, arrays
    return _without(x - origin, c, _vectors(inverse, frame)) ** 2


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
    return _gap_and_frame([frame.inverse, c, *coefficients], [*gap, *frame.trees])


@functools.partial(tree.elementwise, rounded=False)
def _gap_times(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (c,), (x, origin) = scalars, arrays
    return c * (x - origin)


@functools.partial(tree.elementwise, rounded=False)
def _gap_and_frame(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (inverse, c, *coefficients), (x, origin, *frame) = scalars, arrays
    vectors = _vectors(inverse, frame)
    return _without(c * (x - origin), [-k for k in coefficients], vectors)


@functools.partial(tree.elementwise, rounded=False)
def _multiple(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (c,), (x,) = scalars, arrays
    return c * x
