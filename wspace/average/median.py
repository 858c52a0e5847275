r"""The geometric median: an average that a minority of the points cannot move far."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wspace import _checks, geometry, tree
from wspace._numerics import safe_sqrt, with_nan_of
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
    the inner products of their differences from the one with the least sum of distances. Points
    on a line may have a whole segment of medians, as two points of equal coefficients have; then
    it is the middle of the segment, as for numbers.

    Derivatives exist to second order where the median is none of the points; there it moves with
    its point alone, and that is the derivative returned.

    Args:
        points: The $\theta_i$, trees of one layout, at least one.
        coefficients: The $c_i > 0$, one a point; equal if not given. Only their ratios matter. A
            negative one would leave the sum without a minimum, or with several local ones.
        tol: The residual to reach; if not given, 64 roundings.
        max_steps: The largest number of steps.

    Returns:
        A [`Solution`][wspace.average.Solution]: the `weights`, each leaf in the dtype of that leaf
            of the first point; as `residual` the norm of the shortest subgradient of the sum over
            $\sum_i c_i$, zero at a minimum and otherwise at most one; the `steps` taken; and
            whether it `converged`.

    Raises:
        ValueError: If a coefficient is not positive (NaN if it is traced), `tol` or `max_steps`
            is out of its domain, or the points differ in structure or in a leaf's shape.
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
    gaps = geometry.symmetric(geometry.gap_sums((), points), count)
    tol = 64 * jnp.finfo(gaps.dtype).eps if tol is None else _checks.above_zero("tol", tol)
    c, tol = (jnp.asarray(x).astype(gaps.dtype) for x in (c, tol))
    c = c / jnp.sum(c)
    # Differences from a far outlier would have lost what lies between the others.
    center = _center(gaps, c)
    if _checks.is_traced(center):
        places = [jnp.where(center == i, 1, 0) for i in range(count)]
        middle = tree.combine(places, points, rounded=False)
    else:
        middle = points[int(center)]
    sums = geometry.pair_sums_from_first((), [middle, *points])
    found = _median(geometry.symmetric(sums, count), gaps, center, c, tol, max_steps)
    return Solution(
        tree.weighted_sum(list(found.w), points), found.residual, found.steps, found.converged
    )


class _Median(NamedTuple):
    w: Float[Array, " k"]
    residual: Scalar
    steps: Int[Array, ""]
    converged: Bool[Array, ""]


@jax.jit
def _center(gaps: _Gram, c: _Numbers) -> Int[Array, ""]:
    """The point with the least sum of distances to the others, the first of several."""
    return jnp.argmin(jnp.sum(jnp.sqrt(gaps) * c[None, :], axis=1))


@jax.jit
def _median(
    gram: _Gram,
    gaps: _Gram,
    center: Int[Array, ""],
    c: _Numbers,
    tol: Scalar,
    max_steps: ScalarLike,
) -> _Median:
    """The coefficients of the median, from inner products of differences from one point."""
    eps = jnp.finfo(c.dtype).eps
    frozen = jax.lax.stop_gradient((gram, gaps, c))
    _, apart, shares = frozen
    spans = jnp.sqrt(apart)
    squares = jnp.diagonal(frozen[0])
    away = squares > 0
    pulls = jnp.where(away, shares / jnp.sqrt(jnp.where(away, squares, 1)), 0)
    pull = safe_sqrt(jnp.sum(pulls * _gram_times(frozen[0], pulls)))
    held = jnp.sum(jnp.where(away, 0, shares))
    at_point = ~(pull > held * (1 + 8 * eps))

    # Medians that are not unique are a segment, whose ends are points and balance exactly.
    costs = jnp.sum(spans * shares[None, :], axis=1)
    level = pull >= held * (1 - 8 * eps)
    first = jnp.arange(c.size) == center
    ends = first | (level & (costs <= (1 + 8 * eps) * costs[center]))
    ends = ends & (first | away)
    twins = jnp.sum(jnp.where(ends[None, :] & (apart == 0), 1, 0), axis=1)
    exact = jnp.where(ends, 1 / jnp.where(ends, twins, 1), 0).astype(c.dtype)
    exact = exact / jnp.sum(exact)

    # Away from the center on the way that the others pull: below the sum at every point.
    total = jnp.sum(pulls)
    part = jnp.where(at_point, 0, 1 - held / jnp.where(pull > 0, pull, 1))
    start = part * pulls / jnp.where(total > 0, total, 1)
    start = jnp.where(first, 1 - part, start)
    # At a point the sum has a kink, so there the search is one that ends at once: all distances 1.
    data = jnp.where(at_point, 0, gram), c, jnp.where(at_point, 1, 0).astype(c.dtype)
    w, residual, steps, _ = fixed_point.solved(
        _gap, _weiszfeld, _cost, _residual, start, data, tol, max_steps
    )
    excess = jnp.where(pull > held, pull - held, 0)
    residual = with_nan_of(jnp.where(at_point, excess, residual), c[0])
    return _Median(with_nan_of(jnp.where(at_point, exact, w), c), residual, steps, residual <= tol)


def _gram_times(matrix: _Gram, w: _Numbers) -> _Numbers:
    return jnp.sum(matrix * w[None, :], axis=1)


def _distances(w: _Numbers, gram: _Gram, lift: Scalar) -> _Numbers:
    along = _gram_times(gram, w)
    squares = jnp.sum(w * along) - 2 * along + jnp.diagonal(gram) + lift
    return jnp.sqrt(jnp.where(squares > 0, squares, jnp.nan))


def _weiszfeld(w: _Numbers, gram: _Gram, c: _Numbers, lift: Scalar) -> _Numbers:
    pulls = c / _distances(w, gram, lift)
    return pulls / jnp.sum(pulls)


def _cost(w: _Numbers, gram: _Gram, c: _Numbers, lift: Scalar) -> Scalar:
    return jnp.sum(c * _distances(w, gram, lift))


def _gap(w: _Numbers, gram: _Gram, c: _Numbers, lift: Scalar) -> _Numbers:
    """The coefficients of the gradient of the sum: its derivative in the point is the Hessian."""
    pulls = c / _distances(w, gram, lift)
    return jnp.sum(pulls) * w - pulls


def _residual(w: _Numbers, gram: _Gram, c: _Numbers, lift: Scalar) -> Scalar:
    t = _gap(w, gram, c, lift)
    return safe_sqrt(jnp.sum(t * _gram_times(gram, t)))
