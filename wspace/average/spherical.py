r"""Means on the sphere and on other manifolds, where the mean is the point nearest to all.

The mean $\mu$ of points with coefficients $a_i$ of sum one is where the logarithms cancel,
$\sum_i a_i \log_\mu(u_i) = 0$, that is, where $\sum_i a_i\, d(\mu, u_i)^2$ has its minimum.
"""

import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from wspace import _checks, _lift, geometry, tree
from wspace._compiled import compiled
from wspace._numerics import (
    angle_over_sine,
    arcsin_of_root_squared,
    power_of_two,
    safe_sqrt,
    sinc_of_square,
    unstacked,
)
from wspace._per_leaf import in_passes, run_steps
from wspace._records import Solution
from wspace.average import fixed_point
from wspace.typing import Coefficients, Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["karcher_mean", "karcher_mean_on"]

_Numbers: TypeAlias = Float[Array, " k"]
_Gram: TypeAlias = Float[Array, "k k"]

REASONS = (
    "coefficients of the points that are not zero sum to nothing beside their size",
    "points have no mean direction: they are antipodal, lie all around the origin or cancel; "
    "take average.mean, or points in one half-space",
    "coefficients make the mean of the norms negative or zero: no point has it",
)
"""Why there is no mean, in the order of `_Mean.refused`."""


def _steps(
    points: Sequence[WeightsLike],
    coefficients: Coefficients | None = None,
    *,
    tol: ScalarLike | None = None,
    max_steps: int = 50,
) -> Generator[Any, Any, Solution]:
    points = _checks.listed("points", points)
    _checks.same_layout(**_checks.each("points", points))
    a, max_steps = _checks.affine(coefficients, len(points)), _checks.rank(max_steps, "max_steps")
    gram = geometry.inner_products(points)
    lost = jnp.any(geometry.lost_squares(jnp.diagonal(gram), points))
    gram = gram + _checks.measured(lost, points, gram.dtype)
    tol = 16 * float(jnp.finfo(gram.dtype).eps) if tol is None else _tolerance(tol)
    mean = yield _direction, (gram, a, tol, np.int32(max_steps))
    if not _checks.is_traced(mean.refused) and any(refused := np.asarray(mean.refused).tolist()):
        raise ValueError(REASONS[refused.index(True)])
    weights = tree.weighted_sum(unstacked(mean.scalars), points)
    return Solution(weights, mean.residual, mean.steps, mean.converged)


@_checks.of_points
@in_passes(_steps)
def karcher_mean(
    points: Sequence[WeightsLike],
    coefficients: Coefficients | None = None,
    *,
    tol: ScalarLike | None = None,
    max_steps: int = 50,
) -> Solution:
    r"""Karcher mean: the mean of the directions on the sphere, times the mean of the norms.

    Known as a spherical or Riemannian mean; the multislerp of merges is a step towards it.

    $$
    \theta = \Bigl(\sum_i a_i \lVert \theta_i \rVert\Bigr)\, \mu, \qquad
    \sum_i a_i \log_\mu(u_i) = 0, \quad
    u_i = \frac{\theta_i}{\lVert \theta_i \rVert}, \quad a_i = \frac{c_i}{\sum_j c_j}
    $$

    The mean of two points of one norm is [`slerp`][wspace.interpolate.slerp] between them. The
    mean turns with the points, and is $\mu$ at the same norm if all points are scaled to one.

    With all $c_i \ge 0$ it is the one direction with the least
    $\sum_i a_i \Omega_i^2$, $\Omega_i = \angle(\mu, u_i)$; it exists whenever the points lie in
    an open half-space, and is found from any start, since that sum is a convex function of the
    inner products $\langle \mu, u_i \rangle$ and the sphere may be replaced by its ball. With
    negative coefficients it is the direction where the logarithms cancel that is reached from
    $\sum_i a_i u_i$, as slerp is for $t$ outside $[0, 1]$.

    The points enter through their inner products alone, read in one pass, and one combination;
    between them is Newton's method on as many numbers as there are points. Derivatives are those
    of the mean, not of the iteration, to second order, with respect to points and coefficients.
    Near the end of its domain the mean keeps the digits that $\varepsilon / \lambda^2$ leaves,
    with $\lambda = \sum_i a_i \Omega_i \cot \Omega_i$, for two points half the angle left to the
    antipode.

    Args:
        points: The $\theta_i$, trees of one layout, at least one. A zero tree has no direction
            and counts for the length alone, so that with one of two the mean is
            [`lerp`][wspace.interpolate.lerp], as slerp is; the mean of zero trees is zero.
        coefficients: The $c_i$, one a point, of any sign; equal if not given. Only their ratios
            matter.
        tol: The residual to reach; if not given, sixteen roundings.
        max_steps: The largest number of steps; nearly parallel points need none.

    Returns:
        A [`Solution`][wspace.average.Solution] with the `weights`, each leaf in the dtype of that
            leaf of the first point; as `residual` $\lVert \sum_i a_i \log_\mu(u_i) \rVert /
            \sum_i |a_i|$ in radians; the `steps` taken; and whether it `converged`.

    Raises:
        ValueError: If there is no mean direction: $\lambda \le \varepsilon^{1/4} \sum_i |a_i|$
            where the iteration ends, as for antipodes, for points all around the origin, or if
            the directions cancel; or if the mean of the norms is not positive. NaN if this shows
            only in traced values. Also for coefficients as in
            [`average.mean`][wspace.average.mean], those of the points with a direction included,
            a `tol` or `max_steps` out of its domain, or trees of different layout.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import average
        >>> average.karcher_mean([jnp.array([2.0, 0.0]), jnp.array([0.0, 2.0])]).weights
        Array([1.4142135, 1.4142135], dtype=float32)

    References:
        H. Karcher, *Riemannian center of mass and mollifier smoothing*, Communications on Pure
        and Applied Mathematics 30, 1977. S. Buss, J. Fillmore, *Spherical averages and
        applications to spherical splines and interpolation*, ACM Transactions on Graphics 20,
        2001.
    """
    return run_steps(_steps(points, coefficients, tol=tol, max_steps=max_steps))


def _tolerance(tol: ScalarLike) -> ScalarLike:
    return _checks.above_zero("tol", tol)


class _Mean(NamedTuple):
    scalars: Float[Array, " k"]
    residual: Scalar
    steps: Int[Array, ""]
    converged: Bool[Array, ""]
    refused: Bool[Array, "3"]
    """Whether coefficients cancel, there is no mean direction, and no mean of the norms."""


@jax.jit
def _direction(
    gram: Array, a: _Numbers | np.ndarray, tol: ScalarLike, max_steps: ScalarLike
) -> _Mean:
    """The scalars that make the mean, from the inner products of points.

    A direction is `sum_i w_i u_i`, of unit length once divided by `sqrt(w U w)`. The functions of
    the angles below are smooth functions of their cosines, so inner products will do.
    """
    a, tol = a.astype(gram.dtype), jnp.asarray(tol).astype(gram.dtype)
    squares = jnp.diagonal(gram)
    directed = squares > 0
    norms = safe_sqrt(squares)
    safe = jnp.where(directed, norms, 1)
    none = ~jnp.any(squares != 0)
    eye = jnp.eye(a.size, dtype=bool)
    # Exact ones, so that a point is its own mean.
    cosines = jnp.where(eye | none, 1, gram / (safe[:, None] * safe[None, :]))
    shares = jnp.where(none, 1 / a.size, jnp.where(directed, a, 0))
    total, size = jnp.sum(shares), jnp.sum(jnp.abs(shares))
    cancels = ~(jnp.abs(total) >= 1e-6 * size)
    shares = shares / jnp.where(cancels, 1, total)

    w, residual, steps, _ = fixed_point.solved(
        _gap, _stepped, _risen, _left_over, shares, (cosines, shares), tol, max_steps
    )
    w = _unit(w, cosines)
    d = _dot(cosines, w)
    curvature = jnp.sum(shares * _pull(d) * d)
    curved = curvature > jnp.finfo(gram.dtype).eps ** 0.25 * jnp.sum(jnp.abs(shares))
    length = jnp.sum(a * norms)
    scalars = length * w / safe
    lost, short = ~cancels & ~curved, ~((length > 0) | none)
    unknown = ~jnp.all(jnp.isfinite(gram))
    undefined = jnp.where(unknown | cancels | lost | short, jnp.nan, 0).astype(gram.dtype)
    refused = jnp.stack([cancels, lost, short])
    residual = residual + undefined
    return _Mean(scalars + undefined, residual, steps, residual <= tol, refused)


def _dot(matrix: _Gram, w: _Numbers) -> _Numbers:
    return jnp.sum(matrix * w[None, :], axis=1)


def _unit(w: _Numbers, cosines: _Gram) -> _Numbers:
    return w / jnp.sqrt(jnp.sum(w * _dot(cosines, w)))


def _angles_squared(d: _Numbers) -> _Numbers:
    return 4 * arcsin_of_root_squared((1 - d) / 2)


def _pull(d: _Numbers) -> _Numbers:
    r"""$\Omega / \sin\Omega$: the logarithm of u_i is this times its part across the mean."""
    return angle_over_sine((1 - d) / 2)


def _gap(w: _Numbers, cosines: _Gram, a: _Numbers) -> _Numbers:
    """How far w is from proportional to the pulls: zero at the mean, where logarithms cancel."""
    return w - _unit(a * _pull(_dot(cosines, _unit(w, cosines))), cosines)


def _logarithm(w: _Numbers, cosines: _Gram, a: _Numbers) -> tuple[_Numbers, _Numbers]:
    """A direction as a unit vector, and the sum of logarithms there."""
    w = _unit(w, cosines)
    d = _dot(cosines, w)
    pulls = a * _pull(d)
    return w, pulls - jnp.sum(pulls * d) * w


def _left_over(w: _Numbers, cosines: _Gram, a: _Numbers) -> Scalar:
    _, t = _logarithm(w, cosines, a)
    return fixed_point.length(t, cosines)[1] / jnp.sum(jnp.abs(a))


def _stepped(w: _Numbers, cosines: _Gram, a: _Numbers) -> _Numbers:
    # The curvature of squared distances on a sphere is at most one: the step never overshoots.
    w, t = _logarithm(w, cosines, a)
    turn = fixed_point.length(t, cosines)[0] / jnp.sum(jnp.abs(a))
    return jnp.cos(turn) * w + sinc_of_square(turn**2) / jnp.sum(jnp.abs(a)) * t


def _risen(w: _Numbers, old: _Numbers, cosines: _Gram, a: _Numbers) -> tuple[Scalar, Scalar]:
    """How much larger the sum of squared angles is than at another direction, and its rounding."""
    new, before = (a * _angles_squared(_dot(cosines, _unit(x, cosines))) for x in (w, old))
    slack = 8 * jnp.finfo(w.dtype).eps * jnp.abs(jnp.sum(new))
    return jnp.sum(new - before), slack


def karcher_mean_on(
    exp: Callable[[Any, Any], Any],
    log: Callable[[Any, Any], Any],
    points: Sequence[WeightsLike],
    coefficients: Coefficients | None = None,
    *,
    tol: ScalarLike | None = None,
    max_steps: int = 200,
) -> Solution:
    r"""Karcher mean on a manifold given by its exponential and logarithm.

    $$
    \mu \leftarrow \exp_\mu\Bigl(h \sum_i a_i \log_\mu(\theta_i)\Bigr), \qquad
    a_i = \frac{c_i}{\sum_j c_j}
    $$

    The step $h$ is one, right where curvature is not negative, and is halved where the sum of
    logarithms grows or turns round. With $\exp_x(v) = x + v$ and $\log_x(y) = y - x$ the mean is
    [`average.mean`][wspace.average.mean]; on the sphere it is
    [`karcher_mean`][wspace.average.karcher_mean], which is faster. This iteration converges
    linearly, and is compiled once for the same two functions. Derivatives are taken of the mean,
    not of the iteration, of every order, with respect to points, coefficients and what `exp` and
    `log` close over: a linear system in the derivative of the sum of logarithms, solved by GMRES.

    Args:
        exp: Takes a point and a tangent there, trees of the layout of the points, and returns the
            point that the geodesic reaches.
        log: Takes a point and another, and returns the tangent whose exponential is the other.
        points: The $\theta_i$ on the manifold, trees of one layout, at least one; the iteration
            starts from the first.
        coefficients: The $c_i$, one a point, of any sign; equal if not given. Only their ratios
            matter.
        tol: The residual to reach; if not given, 64 roundings.
        max_steps: The largest number of steps.

    Returns:
        A [`Solution`][wspace.average.Solution] with the `weights`, each leaf in the dtype of that
            leaf of the first point; as `residual` $\lVert \sum_i a_i \log_\mu(\theta_i) \rVert$
            over $\lVert \mu \rVert + \sum_i |a_i| \lVert \log_\mu(\theta_i) \rVert$, Euclidean
            norms; the `steps` taken; and whether it `converged`. Whether the mean is the only
            one is up to the manifold.

    Raises:
        ValueError: For coefficients as in [`average.mean`][wspace.average.mean], a `tol` or
            `max_steps` out of its domain, or trees of different layout.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import average
        >>> exp, log = lambda x, v: x * jnp.exp(v / x), lambda x, y: x * jnp.log(y / x)
        >>> average.karcher_mean_on(exp, log, [jnp.array([2.0]), jnp.array([8.0])]).weights
        Array([4.], dtype=float32)

    References:
        B. Afsari, R. Tron, R. Vidal, *On the convergence of gradient descent for finding the
        Riemannian center of mass*, SIAM Journal on Control and Optimization 51, 2013,
        [arXiv:1201.0925](https://arxiv.org/abs/1201.0925).
    """
    _checks.function("exp", exp, "a function of a point and a direction")
    _checks.function("log", log, "a function of two points")
    points = _checks.listed("points", points)
    _checks.same_layout(**_checks.each("points", points))
    max_steps = _checks.rank(max_steps, "max_steps")
    a = _checks.unpacked(_checks.affine(coefficients, len(points)))
    wide = tree.widened(*points)
    at, residual, steps, converged = compiled(
        _mean_on, (exp, log), (), wide, a, None if tol is None else _tolerance(tol), max_steps
    )
    return Solution(tree.cast_like(at, points[0]), residual, steps, converged)


def _mean_on(
    functions: Sequence[Callable[[Any, Any], Any]],
    _: tuple[()],
    wide: Sequence[Weights],
    a: Sequence[Any],
    tol: ScalarLike | None,
    max_steps: ScalarLike,
) -> tuple[Weights, Scalar, Int[Array, ""], Bool[Array, ""]]:
    """The mean in the dtype of arithmetic, its residual, the steps taken, and whether it is one."""
    exp, log = functions
    size = tree.norm(wide[0])
    bound = 64 * jnp.finfo(size.dtype).eps if tol is None else tol
    bound = jnp.asarray(bound).astype(size.dtype)

    def pull(at):
        return tree.combine(a, [log(at, x) for x in wide])

    def measured(at):
        logs = [log(at, x) for x in wide]
        total = tree.combine(a, logs)
        parts = [abs(c) * _length(v) for c, v in zip(a, logs, strict=True)]
        whole = _length(at) + sum(parts[1:], start=parts[0])
        residual = _length(total) / jnp.where(whole == 0, 1, whole)
        return at, total, residual.astype(size.dtype)

    def unfinished(state):
        (_, _, residual), _, taken = state
        return (residual > bound) & (taken < max_steps)

    def step(state):
        old, length, taken = state
        new = measured(exp(old[0], tree.combine((length,), (old[1],))))
        unit = _unit_of(old[1])
        now, before = (_over((unit,), (x,)) for x in (new[1], old[1]))
        better = tree.norm(now) < tree.norm(before)
        overshot = 2 * tree.vdot(now, before) < -tree.vdot(before, before) / 2
        kept = jax.tree.map(lambda x, y: jnp.where(better, x, y), new, old)
        return kept, jnp.where(better & ~overshot, length, length / 2), taken + 1

    def found(_, start):
        state = measured(start), jnp.ones_like(size), jnp.int32(0)
        (at, _, residual), _, taken = jax.lax.while_loop(unfinished, step, state)
        return at, (residual, taken.astype(residual.dtype))  # derivatives want no integers

    at, (residual, taken) = jax.lax.custom_root(pull, wide[0], found, _solved, has_aux=True)
    return at, residual, taken.astype(jnp.int32), residual <= bound


@functools.partial(_lift.reduction, kind="max")
def _largest(_: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    return jnp.abs(arrays[0])


@functools.partial(_lift.elementwise, rounded=False)
def _over(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    return arrays[0] / scalars[0]


def _unit_of(x: Weights) -> Scalar:
    """A power of two beside which no square of an entry leaves the range of the dtype."""
    return power_of_two(_largest((), (x,)))


def _length(x: Weights) -> Scalar:
    """The norm of a tangent, however short or long."""
    unit = _unit_of(x)
    return unit * tree.norm(_over((unit,), (x,)))


def _solved(linear: Callable[[Any], Any], rates: Any) -> Any:
    """The tangent that a linear function maps to a value, from the Krylov space of the value.

    Normal directions, in which it may be singular, are not in that span.
    """

    def solve(linear: Callable[[Any], Any], rates: Any) -> Any:
        tol = 16 * float(jnp.finfo(tree.norm(rates).dtype).eps)
        return jax.scipy.sparse.linalg.gmres(linear, rates, tol=tol, maxiter=10)[0]

    # Around it, as it is not linear in the rates by itself: its tolerance depends on them.
    return jax.lax.custom_linear_solve(linear, rates, solve, transpose_solve=solve)
