r"""The geometric median: an average that a minority of the points cannot move far."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wspace import _checks, _lift, geometry, tree
from wspace._numerics import safe_sqrt, unstacked, with_nan_of
from wspace._records import Solution
from wspace.average import fixed_point
from wspace.typing import Coefficients, Scalar, ScalarLike, WeightsLike

__all__ = ["geometric_median"]

_Numbers: TypeAlias = Float[Array, " k"]
_Gram: TypeAlias = Float[Array, "k k"]


@_checks.of_points
def geometric_median(
    points: Sequence[WeightsLike],
    coefficients: Coefficients | None = None,
    *,
    tol: ScalarLike | None = None,
    max_steps: int = 100,
) -> Solution:
    r"""Geometric median: the point with the least sum of distances.

    $$
    \theta = \operatorname*{arg\,min}_{x} \sum_i c_i\, \lVert x - \theta_i \rVert
    $$

    Translating, turning or scaling the points does so to the median. However far points with less
    than half of the coefficients move, it stays within a bounded distance of the others, where
    one point is enough to carry [`average.mean`][wspace.average.mean] away. With more than half
    of the coefficients at one point, it is that point.

    A median that is one of the points is found by the test for it, and returned exactly. Else
    Newton's method, guarded by Weiszfeld's step, which never raises the sum, runs on one number
    a point. Two passes over the leaves give what it needs: the distances between the points, and
    the inner products of their differences from the one with the least sum of distances; one more
    if points are so far off that this one does not show in rounded sums, and one if its coefficient
    is small, for the pull of the others. Sums of distances are
    compared by the differences of their terms, beside which no far point is large. Points on a
    line may have a whole segment of medians, as two points of equal coefficients have; then it is
    the middle of the segment, as for numbers.

    Derivatives exist to second order where the median is none of the points; there it moves with
    its point alone, and that is the derivative returned.

    Known in federated learning as robust aggregation.

    Args:
        points: The $\theta_i$, trees of one layout, at least one.
        coefficients: The $c_i > 0$, one a point; equal if not given. Only their ratios matter. A
            negative one would leave the sum without a minimum, or with several local ones.
        tol: The residual to reach; if not given, 64 roundings.
        max_steps: The largest number of steps.

    Returns:
        A [`Solution`][wspace.average.Solution] with the `weights`, each leaf in the dtype of that
            leaf of the first point; as `residual` the norm of the shortest subgradient of the sum
            over $\sum_i c_i$, zero at a minimum and otherwise at most one; the `steps` taken; and
            whether it `converged`.

    Raises:
        ValueError: If a coefficient is not positive, a point holds NaN or an infinity, which names
            the leaf, or the points are so near or far that squares of their distances leave the
            range of the dtype (NaN, and not converged, if this is traced). Also if `tol` or
            `max_steps` is out of its domain, or the points differ in structure or in a leaf's
            shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import average
        >>> points = [jnp.array([0.0, 0.0]), jnp.array([-1.0, 1.0]), jnp.array([1e6, 0.0])]
        >>> average.geometric_median(points).weights
        Array([0., 0.], dtype=float32)

    References:
        Y. Vardi, C.-H. Zhang, *The multivariate L1-median and associated data depth*, PNAS 97,
        2000. H. Lopuhaa, P. Rousseeuw, *Breakdown points of affine equivariant estimators of
        multivariate location and covariance matrices*, Annals of Statistics 19, 1991.
    """
    points = _checks.listed("points", points)
    _checks.same_layout(**_checks.each("points", points))
    count, max_steps = len(points), _checks.rank(max_steps, "max_steps")
    c = _checks.positive("coefficients", coefficients, count)
    sums = _gaps_and_reach((), points)
    gaps, reach = geometry.symmetric(sums[:-1], count), sums[-1]
    tol = 64 * jnp.finfo(gaps.dtype).eps if tol is None else _checks.above_zero("tol", tol)
    c, tol = (jnp.asarray(x).astype(gaps.dtype) for x in (c, tol))
    c = c / jnp.sum(c)
    middle, near = _middle(gaps, c)
    entries = sum(leaf.size for leaf in jax.tree.leaves(points[0]))
    undefined = _refuse_lost(gaps, reach, near, entries, points)
    # Differences from a far outlier would have lost what lies between the others.
    start, gram = _seen_from(points, middle)
    if _checks.is_traced(gram) or int(_center(gram, gaps, middle, c)) != int(middle):
        middle = _center(gram, gaps, middle, c)
        start, gram = _seen_from(points, middle)
    shares, pull = _shares_of_pull(gram, c), None
    if _checks.is_traced(shares) or bool(shares.held < _LIGHT):
        pull = safe_sqrt(_pull_square(unstacked(shares.pulls), [start, *points]))
    found = _median(gram, gaps, middle, c, pull, tol + undefined, max_steps)
    return Solution(
        tree.weighted_sum(list(found.w), points), found.residual, found.steps, found.converged
    )


@_lift.reduction
def _gaps_and_reach(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    """The squared differences of all pairs, and how far all are from the first, unsquared."""
    first, *others = arrays
    reach = sum((jnp.abs(x - first) for x in others), jnp.zeros_like(first))
    return [*geometry.squared_gaps(scalars, arrays), reach]


def _refuse_lost(
    gaps: _Gram, reach: Scalar, near: Scalar, entries: int, points: Sequence[WeightsLike]
) -> Scalar | float:
    """Raises, or is NaN, where squares of distances are not finite, or lost their digits."""
    largest, least = jnp.max(gaps), geometry.least_square(entries, gaps.dtype)
    lost = jnp.where(largest == 0, reach > 0, (near > 0) & (near**2 < least))
    return _checks.measured(~jnp.isfinite(largest) | lost, points, gaps.dtype)


def _seen_from(points: Sequence[WeightsLike], middle: Int[Array, ""]) -> tuple[WeightsLike, _Gram]:
    """One of the points, and the inner products of the differences of all from it."""
    count = len(points)
    if _checks.is_traced(middle):
        places = [jnp.where(middle == i, 1, 0) for i in range(count)]
        start = tree.combine(places, points, rounded=False)
    else:
        start = points[int(middle)]
    return start, geometry.symmetric(geometry.pair_sums_from_first((), [start, *points]), count)


class _Shares(NamedTuple):
    """What each point away from the center pulls with, and what holds at the center."""

    pulls: Float[Array, " k"]
    held: Scalar


_LIGHT = 2.0**-8
"""Coefficients of a center so small that the root of a rounded square may be as large."""


@jax.jit
def _shares_of_pull(gram: _Gram, c: _Numbers) -> _Shares:
    gram, c = jax.lax.stop_gradient((gram, c))
    lengths = safe_sqrt(jnp.diagonal(gram))
    away = lengths > 0
    pulls = jnp.where(away, c / jnp.where(away, lengths, 1), 0)
    return _Shares(pulls, jnp.sum(jnp.where(away, 0, c)))


@_lift.reduction
def _pull_square(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    start, *points = arrays
    terms = [c * (x - start) for c, x in zip(scalars, points, strict=True)]
    return sum(terms[1:], terms[0]) ** 2


class _Median(NamedTuple):
    w: Float[Array, " k"]
    residual: Scalar
    steps: Int[Array, ""]
    converged: Bool[Array, ""]


_FAR = 2.0**10
"""Distances above this multiple of the median distance all count the same at first."""


@jax.jit
def _middle(gaps: _Gram, c: _Numbers) -> tuple[Int[Array, ""], Scalar]:
    """A point near the median, and the least distance within which half of the coefficients are.

    It has the least sum of distances to the others, those of far points cut off.
    """
    spans = jnp.sqrt(gaps)
    order = jnp.argsort(spans, axis=1)
    inside = jnp.cumsum(c[order], axis=1) >= 0.5
    sorted_spans = jnp.take_along_axis(spans, order, axis=1)
    half = jnp.min(jnp.where(inside, sorted_spans, jnp.inf), axis=1)
    # All coefficients together, should the halves round to less.
    half = jnp.minimum(half, sorted_spans[:, -1])
    near = jnp.min(half)
    sums = jnp.sum(jnp.minimum(spans, _FAR * near) * c[None, :], axis=1)
    return jnp.argmin(jnp.where(half <= 4 * near, sums, jnp.inf)), near


def _risen(gram: _Gram, gaps: _Gram, middle: Int[Array, ""], c: _Numbers) -> tuple[_Numbers, ...]:
    """How much more the sum of distances is at each point than at the middle, and its rounding."""
    squares = jnp.diagonal(gram)
    spans = jnp.sqrt(gaps)
    total = spans + jnp.sqrt(squares)[None, :]
    change = (squares[:, None] - 2 * gram) / jnp.where(total == 0, 1, total)
    slack = 8 * jnp.finfo(c.dtype).eps * jnp.sqrt(squares)
    at_middle = jnp.arange(c.size) == middle
    return jnp.where(at_middle, 0, jnp.sum(change * c[None, :], axis=1)), slack


@jax.jit
def _center(gram: _Gram, gaps: _Gram, middle: Int[Array, ""], c: _Numbers) -> Int[Array, ""]:
    """The point with the least sum of distances to the others, the first of several."""
    risen, slack = _risen(gram, gaps, middle, c)
    least = jnp.argmin(risen)
    return jnp.where(risen[least] < -slack[least], least, middle)


@jax.jit
def _median(
    gram: _Gram,
    gaps: _Gram,
    center: Int[Array, ""],
    c: _Numbers,
    measured: Scalar | None,
    tol: Scalar,
    max_steps: ScalarLike,
) -> _Median:
    """The coefficients of the median, from inner products of differences from one point.

    The pull of the others at that point may be measured; else it is found from them too.
    """
    eps = jnp.finfo(c.dtype).eps
    far, apart, shares = jax.lax.stop_gradient((gram, gaps, c))
    lengths = safe_sqrt(jnp.diagonal(far))
    away = lengths > 0
    # The differences at length one, so that no far point outweighs the others, and their lengths
    # beside the least, so that no square of one leaves the range.
    farthest, nearest = jnp.max(lengths), jnp.min(jnp.where(away, lengths, jnp.inf))
    unit = jnp.where(farthest > 0, jnp.maximum(nearest, farthest / 2.0**60), 1)
    sizes = jnp.where(away, lengths, unit)
    scaled = gram / sizes[:, None] / sizes[None, :]
    pulls = jnp.where(away, shares, 0)
    if measured is None:
        pull, most = fixed_point.length(pulls, jax.lax.stop_gradient(scaled))
    else:
        pull = jax.lax.stop_gradient(measured)
        most = pull + 4 * eps
    held = jnp.sum(jnp.where(away, 0, shares))
    at_point = ~(pull > held * (1 + 8 * eps))

    # Medians that are not unique are a segment, whose ends are points and balance exactly.
    risen, slack = _risen(far, apart, center, shares)
    level = pull >= held * (1 - 8 * eps)
    first = jnp.arange(c.size) == center
    ends = first | (level & (risen <= slack))
    ends = ends & (first | away)
    twins = jnp.sum(jnp.where(ends[None, :] & (apart == 0), 1, 0), axis=1)
    exact = jnp.where(ends, 1 / jnp.where(ends, twins, 1), 0).astype(c.dtype)
    exact = exact / jnp.sum(exact)

    # Away from the center on the way that the others pull: below the sum at every point.
    sizes = sizes / unit
    total = jnp.sum(pulls / sizes)
    part = jnp.where(at_point, 0, 1 - held / jnp.where(pull > 0, pull, 1))
    start = jnp.where(first, (1 - part) * sizes, part * pulls / jnp.where(total > 0, total, 1))
    # At a point the sum has a kink, so there the search is one that ends at once: all distances 1.
    data = jnp.where(at_point, 0, scaled), c, sizes, jnp.where(at_point, 1, 0).astype(c.dtype)
    v, residual, steps, _ = fixed_point.solved(
        _gap, _weiszfeld, _rise, _residual, start, data, tol, max_steps
    )
    w = v / sizes
    w = jnp.where(first, w + (1 - jnp.sum(w)), w)
    excess = jnp.where(most > held, most - held, 0)
    residual = with_nan_of(jnp.where(at_point, excess, residual), c[0], tol)
    w = with_nan_of(jnp.where(at_point, exact, w), c, residual)
    return _Median(w, residual, steps, residual <= tol)


# Below, a point is the center plus `sum_i v_i (x_i - center) / sizes_i`, in units in which the
# differences have the lengths `sizes`; `gram` holds their inner products at length one.


def _gram_times(matrix: _Gram, v: _Numbers) -> _Numbers:
    return jnp.sum(matrix * v[None, :], axis=1)


def _distances(v: _Numbers, gram: _Gram, sizes: _Numbers, lift: Scalar) -> _Numbers:
    along = _gram_times(gram, v)
    ends = sizes * jnp.diagonal(gram) * sizes
    squares = jnp.sum(v * along) - 2 * sizes * along + ends + lift
    return jnp.sqrt(jnp.where(squares > 0, squares, jnp.nan))


def _pulls(v: _Numbers, gram: _Gram, c: _Numbers, sizes: _Numbers, lift: Scalar) -> _Numbers:
    return c / _distances(v, gram, sizes, lift)


def _weiszfeld(v: _Numbers, *data: Any) -> _Numbers:
    pulls, (_, _, sizes, _) = _pulls(v, *data), data
    return pulls * sizes / jnp.sum(pulls)


def _rise(
    v: _Numbers, old: _Numbers, gram: _Gram, c: _Numbers, sizes: _Numbers, lift: Scalar
) -> tuple[Scalar, Scalar]:
    """How much larger the sum of distances is than at another place, and its rounding."""
    step = v - old
    along = _gram_times(gram, step)
    squares = jnp.sum(along * (v + old)) - 2 * sizes * along
    total = _distances(v, gram, sizes, lift) + _distances(old, gram, sizes, lift)
    way = jnp.sum(jnp.abs(step) * jnp.sqrt(jnp.diagonal(gram)))
    return jnp.sum(c * squares / total), 8 * jnp.finfo(v.dtype).eps * way


def _gap(v: _Numbers, gram: _Gram, c: _Numbers, sizes: _Numbers, lift: Scalar) -> _Numbers:
    """The coefficients of the gradient of the sum: its derivative in the point is the Hessian."""
    pulls = _pulls(v, gram, c, sizes, lift)
    return jnp.sum(pulls) * v - pulls * sizes


def _residual(v: _Numbers, gram: _Gram, *data: Any) -> Scalar:
    return fixed_point.length(_gap(v, gram, *data), gram)[1]
