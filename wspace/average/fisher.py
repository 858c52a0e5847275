r"""The mean of points in the metric of the information that each of them has."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import tree_leaves_with_path
from jaxtyping import Array, Bool, Float, Int, PyTree

from wspace import _checks, _lift, lowrank, tree
from wspace._numerics import (
    accumulator,
    matmul,
    power_of_two,
    replicated,
    safe_sqrt,
    with_nan_of,
)
from wspace._records import Solution, record
from wspace.average.regression import (
    by_leaf,
    checked_gram,
    positive_shares,
    semidefinite,
    weighted_arrays,
)
from wspace.lowrank.factors import from_matrix
from wspace.typing import Coefficients, Layout, Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["Kronecker", "fisher_mean", "kronecker_mean"]


@record
class Kronecker(NamedTuple):
    r"""The Fisher information of one matrix `x @ W` as a Kronecker product, as K-FAC has it.

    $$
    \langle V, F V \rangle = \langle V, A V B \rangle
    $$

    Attributes:
        inputs: The $A$, `(in, in)`, such as the second moments of the inputs.
        outputs: The $B$, `(out, out)`, such as the second moments of the gradients in the outputs.
    """

    inputs: Float[Array, "... m m"]
    outputs: Float[Array, "... n n"]


@_lift.elementwise
def _fisher_mean(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    *c, level = scalars
    points, fishers = arrays[: len(c)], arrays[len(c) :]
    precisions = [
        k * (jnp.where(f < 0, jnp.nan, f) + level) for k, f in zip(c, fishers, strict=True)
    ]
    largest = jax.lax.stop_gradient(jnp.max(jnp.stack(precisions), axis=0))
    nothing = largest == 0
    shares = [
        jnp.where(nothing, k, p / jnp.where(nothing, 1, largest))
        for k, p in zip(c, precisions, strict=True)
    ]
    return weighted_arrays([s / sum(shares) for s in shares], points)


@_checks.of_points
def fisher_mean(
    points: Sequence[WeightsLike],
    fishers: Sequence[WeightsLike],
    coefficients: Coefficients | None = None,
    *,
    ridge: ScalarLike = 0.0,
) -> Weights:
    r"""Mean of points weighted, entry by entry, by how well each of them is determined.

    Known as Fisher merging.

    $$
    \theta_j = \frac{\sum_i c_i F_{ij}\, \theta_{ij}}{\sum_i c_i F_{ij}}
    $$

    The most likely point if each model's likelihood is a Gaussian around its weights with the
    diagonal $F_i$ of its Fisher information as precision: for linear models with orthogonal
    features it is the fit to all data together. Every entry lies between the entries of the points.
    Constant Fishers give the plain mean, and scaling all of them changes nothing. Where all
    vanish, the entry is the plain mean $\sum_i c_i \theta_{ij} / \sum_i c_i$.

    That is a jump: an entry of which one model knows a trifle and the others nothing is taken
    from that model. A ridge $\rho$ adds $\rho$ times the mean entry of the averaged Fisher,
    $\sum_i c_i F_i / \sum_i c_i$ over the whole tree, to every $F_{ij}$, and leads from the Fisher
    mean, $\rho \to 0$, to the plain mean, $\rho \to \infty$, without a jump on the way.

    Args:
        points: The $\theta_i$, trees of one layout, at least one.
        fishers: The $F_i \ge 0$, one a point, trees of the same layout: the mean over examples of
            squared gradients of the log-likelihood, each example by itself. The square of the
            gradient of a batch is something else.
        coefficients: The $c_i > 0$, one a point, such as numbers of examples; equal if not given.
            Only their ratios matter. They multiply precisions, which are not negative.
        ridge: The ridge $\rho \ge 0$.

    Returns:
        The mean, each leaf in the dtype of that leaf of the first point. An entry is NaN where a
            Fisher is NaN or infinite.

    Raises:
        ValueError: If an entry of a Fisher is negative (NaN there if traced), a coefficient is not
            positive or `ridge` is negative (all NaN if traced); or if the trees differ in number
            or layout.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import average
        >>> points = [jnp.array([0.0, 0.0]), jnp.array([4.0, 4.0])]
        >>> average.fisher_mean(points, [jnp.array([3.0, 0.0]), jnp.array([1.0, 0.0])])
        Array([1., 2.], dtype=float32)

    References:
        M. Matena, C. Raffel, *Merging Models with Fisher-Weighted Averaging*, NeurIPS 2022,
        [arXiv:2111.09832](https://arxiv.org/abs/2111.09832).
    """
    points, fishers = _checks.listed("points", points), _checks.listed("fishers", fishers)
    _checks.same_layout(**_checks.each("points", points), **_checks.each("fishers", fishers))
    if len(fishers) != len(points):
        raise ValueError(
            f"fishers has {len(fishers)} trees for {len(points)} points: give one tree a point"
        )
    c = positive_shares(coefficients, len(points))
    ridge = _checks.nonnegative("ridge", ridge)
    _refuse_negative(fishers)
    level: Any = 0.0
    if _checks.is_traced(ridge) or ridge != 0:
        level = ridge * _mean_entry(c, fishers)
    return _fisher_mean([*c, level], [*points, *fishers])


@functools.partial(_lift.reduction, kind="min")
def _least(_: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    return functools.reduce(jnp.minimum, [jnp.where(x < 0, x, 0) for x in arrays])


def _refuse_negative(fishers: Sequence[WeightsLike]) -> None:
    """Raises, naming the leaf, if an entry of a Fisher is known to be negative."""
    least = _least((), fishers)
    if _checks.is_traced(least) or not bool(least < 0):
        return
    for i, fisher in enumerate(fishers):
        paths = [_checks.path_of(path) for path, _ in tree_leaves_with_path(fisher)]
        for path, own in zip(paths, _least((), [fisher], by_leaf=True), strict=True):
            if own < 0:
                raise ValueError(
                    f"leaf {path} of fishers[{i}] has the entry {own:.3g}: a Fisher is a mean of "
                    "squares, so give squared gradients, and none may be negative"
                )


@_lift.reduction
def _weighted_entries(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    return functools.reduce(jnp.add, [c * x for c, x in zip(scalars, arrays, strict=True)])


def _mean_entry(c: Sequence[Any], fishers: Sequence[WeightsLike]) -> Scalar:
    count = sum(leaf.size for leaf in jax.tree.leaves(fishers[0]))
    return _weighted_entries(c, fishers) / max(count, 1)


@_checks.of_points
def kronecker_mean(
    points: Sequence[WeightsLike],
    factors: Sequence[PyTree],
    coefficients: Coefficients | None = None,
    *,
    ridge: ScalarLike = 0.0,
    rtol: ScalarLike | None = None,
    steps: int = 200,
    layout: Layout = "in_out",
) -> Solution:
    r"""Mean of points in the metric of Fishers that are Kronecker products, matrix by matrix.

    Known as Fisher merging with the Kronecker factors of K-FAC.

    With the plain mean $M = \sum_i c_i W_i / \sum_i c_i$ every leaf `x @ W` with factors becomes
    $W = M + D$, where

    $$
    \sum_i c_i\, A_i\, D\, B_i = \sum_i c_i\, A_i\, (W_i - M)\, B_i
    $$

    so that $\sum_i c_i A_i W B_i = \sum_i c_i A_i W_i B_i$. Equal factors give the plain mean, as
    does one point; with all $B_i$ equal it is the
    [`regression_mean`][wspace.average.regression_mean]. A ridge $\rho$ adds $\rho$ times the mean
    eigenvalue of $\sum_i c_i B_i \otimes A_i / \sum_i c_i$ to every point's Fisher.

    The equation is solved by conjugate gradients in the eigenvectors of the averaged factors
    $\sum_i c_i \operatorname{tr}(B_i)\, A_i$ and $\sum_i c_i \operatorname{tr}(A_i)\, B_i$, scaled
    there by the diagonal of the system. One step is exact where all $A_i$ have the same
    eigenvectors and all $B_i$ (and no eigenvalue of the averages repeats); else the number of
    steps grows with the root of the condition number of the scaled system. Directions of which
    the diagonal is at most $\max(m, n)\, \varepsilon$ of its largest entry count as unseen and
    keep the plain mean.

    Derivatives are taken of the solution, not of the steps, and exist to second order where no
    direction is unseen.

    Args:
        points: The $W_i$, trees of one layout, at least one.
        factors: One tree a point, like the weights, with at each leaf a
            [`Kronecker`][wspace.average.Kronecker] of symmetric positive semidefinite matrices,
            or `None` for the plain mean. A convolution is the matrix that
            [`as_matrix`][wspace.lowrank.as_matrix] makes of it; for a stack of matrices give one
            pair for all, or stacks. A leaf has factors for every point or for none.
        coefficients: The $c_i > 0$, one a point; equal if not given. Only their ratios matter.
        ridge: The ridge $\rho \ge 0$.
        rtol: The residual to reach; by default $\varepsilon^{3/4}$, $6 \cdot 10^{-6}$ in float32.
        steps: The largest number of steps.
        layout: How the layers store their matrices, `"in_out"`, as in `x @ W`, or `"out_in"`, as
            torch and equinox do: which inputs are meant,
            [`as_matrix`][wspace.lowrank.as_matrix] says.

    Returns:
        [`Solution`][wspace.average.Solution] with the `weights`, each leaf in the dtype of that
            leaf of the first point; the largest `residual` of a matrix, the norm of what is left
            of the scaled equation over the norm of its right side, 0 if that is zero; the largest
            number of `steps` taken; and whether it `converged`, which it has not if a point holds
            NaN.

    Raises:
        ValueError: If a factor is not symmetric, or their mean at a leaf not positive semidefinite
            (NaN if traced), or has a shape that does not fit its leaf; if only some points have
            factors; if a coefficient or `rtol` is not positive, or `ridge` is negative (NaN if
            traced); or if the trees differ in layout.
        TypeError: If a leaf or a factor is not floating-point, an entry is no pair of factors, or
            `steps` is not an integer.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import average
        >>> points = [jnp.zeros((2, 1)), jnp.full((2, 1), 4.0)]
        >>> sure, unsure = jnp.diag(jnp.array([3.0, 1.0])), jnp.eye(2)
        >>> factors = [average.Kronecker(a, jnp.eye(1)) for a in (sure, unsure)]
        >>> average.kronecker_mean(points, factors).weights
        Array([[1.],
               [2.]], dtype=float32)

    References:
        J. Martens, R. Grosse, *Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature*, ICML 2015, [arXiv:1503.05671](https://arxiv.org/abs/1503.05671).
    """
    points = _checks.listed("points", points)
    _checks.known_layout(layout)
    _checks.same_layout(**_checks.each("points", points))
    c = positive_shares(coefficients, len(points))
    ridge = _checks.nonnegative("ridge", ridge)
    if rtol is not None:
        rtol = _checks.above_zero("rtol", rtol)
    steps = _checks.rank(steps, "steps")
    weights = []
    residual, taken, converged = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), True
    for leaves, entries, where in by_leaf("factors", factors, points):
        if entries is None or not leaves[0].size:
            weights.append(tree.combine(c, leaves))
            unsound = jnp.isnan(_not_finite((), (weights[-1],)))
            residual = jnp.where(unsound, jnp.nan, residual)
            continue
        inputs, outputs = _sides(entries, leaves[0], where, layout)
        xs = [replicated(lowrank.as_matrix(leaf, layout=layout)) for leaf in leaves]
        x, spectra, left, count, good = _solve(c, xs, inputs, outputs, ridge, rtol, steps)
        for values, side in zip(spectra, ("inputs", "outputs"), strict=True):
            what = f"the mean over points of {where[0]}, {side},"
            undefined = semidefinite(values, entries, what)
            x, left = x + undefined, left + undefined
        weights.append(from_matrix(x.astype(leaves[0].dtype), leaves[0], layout))
        wide = accumulator(residual.dtype, left.dtype)
        residual = jnp.maximum(residual.astype(wide), left.astype(wide))
        taken, converged = jnp.maximum(taken, count), good & converged
    weights = jax.tree.structure(points[0]).unflatten(weights)
    return Solution(weights, residual, taken, jnp.isfinite(residual) & converged)


@_lift.reduction
def _not_finite(_: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    """NaN if an entry is not finite, else 0."""
    return 0 * arrays[0]


def _sides(
    entries: Sequence[Any], leaf: Array, where: Sequence[str], layout: Layout
) -> tuple[list[Array], list[Array]]:
    for entry, at in zip(entries, where, strict=True):
        if not isinstance(entry, Kronecker):
            raise TypeError(f"{at} is a {type(entry)}: give an average.Kronecker, or None")
    pairs = list(zip(entries, where, strict=True))
    return (
        [checked_gram(entry.inputs, leaf, f"inputs of {at}", layout) for entry, at in pairs],
        [
            checked_gram(entry.outputs, leaf, f"outputs of {at}", layout, axis=-1)
            for entry, at in pairs
        ],
    )


@jax.jit
def _solve(
    c: Sequence[Any],
    xs: Sequence[Array],
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    ridge: Any,
    rtol: Any,
    steps: ScalarLike,
) -> tuple[Array, tuple[Array, Array], Scalar, Int[Array, ""], Bool[Array, ""]]:
    wide = accumulator(*(x.dtype for x in (*xs, *inputs, *outputs)))
    *c, ridge = (jnp.asarray(number).astype(wide) for number in (*c, ridge))
    xs, inputs, outputs = ([x.astype(wide) for x in each] for each in (xs, inputs, outputs))
    inputs, outputs = _rescaled(inputs), _rescaled(outputs)
    m, n = xs[0].shape[-2:]
    mean = weighted_arrays(c, xs)
    spectra, (left, right) = zip(
        *(
            jnp.linalg.eigh(
                jax.lax.stop_gradient(
                    weighted_arrays(c, [_trace(b) * a for a, b in zip(ours, others, strict=True)])
                )
            )
            for ours, others in ((inputs, outputs), (outputs, inputs))
        ),
        strict=True,
    )
    # The bases are fixed, so that no derivative is taken of eigenvectors.
    gaps = [_in_eigenbases(left, x - mean, right) for x in xs]
    inputs = [_in_eigenbases(left, a, left) for a in inputs]
    outputs = [_in_eigenbases(right, b, right) for b in outputs]
    traces = [_trace(a) * _trace(b) for a, b in zip(inputs, outputs, strict=True)]
    level = ridge * weighted_arrays(c, traces) / (m * n)

    def image(ys: Sequence[Array]) -> Array:
        """The images of one matrix a point under its Fisher, summed."""
        triples = zip(inputs, ys, outputs, strict=True)
        return weighted_arrays(c, [matmul(matmul(a, y), b) for a, y, b in triples])

    diagonals = zip(map(_diagonal, inputs), map(_diagonal, outputs), strict=True)
    products = [a[..., :, None] * b[..., None, :] for a, b in diagonals]
    diagonal = jax.lax.stop_gradient(weighted_arrays(c, products) + level)
    share = max(m, n) * jnp.finfo(wide).eps
    zero = diagonal <= share * jnp.max(diagonal, axis=(-2, -1), keepdims=True)
    scale = jnp.where(zero, 0, 1 / jnp.sqrt(jnp.where(zero, 1, diagonal)))
    rtol = float(jnp.finfo(wide).eps) ** 0.75 if rtol is None else rtol
    rtol = jnp.asarray(rtol).astype(wide)

    def scaled(y: Array) -> Array:
        y = scale * y
        return scale * (image([y] * len(xs)) + level * y)

    pull = scale * image(gaps)
    # Brought to one, so that no square of it underflows and counts as solved.
    unit = power_of_two(jnp.max(jnp.abs(pull), axis=(-2, -1), keepdims=True))
    change, (residual, taken) = jax.lax.custom_linear_solve(
        scaled,
        pull / unit,
        lambda product, b: _conjugate_gradients(product, b, rtol, steps),
        symmetric=True,
        has_aux=True,
    )
    x = mean + matmul(left, matmul(scale * change * unit, jnp.swapaxes(right, -1, -2)))
    return x, spectra, residual, taken, residual <= rtol


def _rescaled(xs: Sequence[Float[Array, "... n n"]]) -> list[Array]:
    """The matrices over their largest entry together, so that no product of them underflows."""
    largest = functools.reduce(
        jnp.maximum, [jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True) for x in xs]
    )
    largest = jax.lax.stop_gradient(jnp.where(largest == 0, 1, largest))
    return [x / largest for x in xs]


def _trace(x: Float[Array, "... n n"]) -> Float[Array, "... 1 1"]:
    return jnp.trace(x, axis1=-2, axis2=-1)[..., None, None]


def _diagonal(x: Float[Array, "... n n"]) -> Float[Array, "... n"]:
    return jnp.diagonal(x, axis1=-2, axis2=-1)


def _in_eigenbases(
    left: Float[Array, "... m m"], x: Float[Array, "... m n"], right: Float[Array, "... n n"]
) -> Float[Array, "... m n"]:
    return matmul(matmul(jnp.swapaxes(left, -1, -2), x), right)


def _matrix_inner(
    x: Float[Array, "... m n"], y: Float[Array, "... m n"]
) -> Float[Array, "... 1 1"]:
    return jnp.sum(x * y, axis=(-2, -1), keepdims=True)


def _conjugate_gradients(
    product: Callable[[Array], Array], b: Float[Array, "... m n"], rtol: Scalar, steps: ScalarLike
) -> tuple[Array, tuple[Scalar, Array]]:
    """The solutions for a stack of right sides, the largest residual and the steps taken."""
    size = _matrix_inner(b, b)
    # Half of what is asked for, since the residual that is updated drifts from the true one.
    enough = (rtol / 2) ** 2 * size

    def unsolved(state: Any) -> Array:
        *_, rest, taken = state
        return (taken < steps) & jnp.any(rest > enough)

    def step(state: Any) -> Any:
        x, r, p, rest, taken = state
        q = product(p)
        curvature = _matrix_inner(p, q)
        moves = (rest > enough) & (curvature > 0)
        length = jnp.where(moves, rest / jnp.where(moves, curvature, 1), 0)
        x, r = x + length * p, r - length * q
        left = _matrix_inner(r, r)
        p = r + jnp.where(moves, left / jnp.where(moves, rest, 1), 0) * p
        return x, r, p, left, taken + 1

    x = with_nan_of(jnp.zeros_like(b), b, rtol)
    x, *_, taken = jax.lax.while_loop(unsolved, step, (x, b, b, size, jnp.zeros((), jnp.int32)))
    rest = b - product(x)
    residual = safe_sqrt(_matrix_inner(rest, rest) / jnp.where(size == 0, 1, size))
    return x, (jnp.max(residual), taken)
