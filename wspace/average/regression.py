r"""The mean of linear layers in the metric of the inputs that each of them saw."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from wspace import _checks, lowrank, tree
from wspace._numerics import accumulator, matmul, replicated, with_nan_of
from wspace._records import record
from wspace.lowrank.factors import from_matrix, matrix_shape
from wspace.typing import Coefficients, Layout, Scalar, ScalarLike, WeightsLike

__all__ = ["Regression", "regression_mean"]


@record
class Regression(NamedTuple):
    """A regression mean, and how well its data determine it.

    Attributes:
        weights: The mean.
        condition: The largest condition number of a summed Gram matrix, ridge included, among the
            directions that count as seen; 1 if there is none.
        unseen: How many input directions with a Gram no data see, over all leaves: there the
            weights are the plain mean.
    """

    weights: PyTree
    condition: Scalar
    unseen: Int[Array, ""]


@_checks.of_points
def regression_mean(
    points: Sequence[WeightsLike],
    grams: Sequence[PyTree],
    coefficients: Coefficients | None = None,
    *,
    ridge: ScalarLike = 0.0,
    shrink: ScalarLike = 1.0,
    rtol: ScalarLike | None = None,
    layout: Layout = "in_out",
) -> Regression:
    r"""Mean of linear layers that agrees best with each of them on its own inputs (RegMean).

    With inputs $X_i$ as rows, $G_i = X_i^\top X_i$ and the plain mean
    $M = \sum_i c_i W_i / \sum_i c_i$, every leaf `x @ W` with a Gram becomes

    $$
    W = M + \Bigl(\sum_i c_i G_i\Bigr)^{+} \sum_i c_i G_i\, (W_i - M)
      \;\in\; \operatorname*{arg\,min}_W \sum_i c_i\, \lVert X_i (W - W_i) \rVert^2
    $$

    Where the sum is regular this is $(\sum_i c_i G_i)^{-1} \sum_i c_i G_i W_i$; input directions
    that no data see keep the plain mean, so Grams of rank one, of few inputs, are welcome. Equal
    Grams give the plain mean, and scaling all Grams changes nothing. Leaves without a Gram get
    the plain mean.

    A ridge adds $\lambda_i = \rho\, \operatorname{tr}(\sum_j c_j G_j) / (n \sum_j c_j)$ to the
    diagonal of every Gram: it leads from the regression mean, $\rho = 0$, to the plain mean,
    $\rho \to \infty$.

    Derivatives exist to second order. Those in the Grams assume that no direction becomes seen or
    unseen, and are exact where all are seen; those in the points are exact always.

    Args:
        points: The $W_i$, trees of one layout, at least one.
        grams: One tree a point, like the weights, with the Gram at each leaf, `(in, in)`, or
            `None`. A convolution is the matrix that [`as_matrix`][wspace.lowrank.as_matrix] makes
            of it, with as many inputs as rows; for a stack of matrices give one Gram for all, or
            a stack. A vector may have one too, as a matrix with one column. A leaf has a Gram for
            every point or for none.
        coefficients: The $c_i > 0$, one a point; equal if not given. Only their ratios matter.
        ridge: The ridge $\rho \ge 0$, relative to the mean eigenvalue of the summed Gram.
        shrink: What the off-diagonal entries of every Gram are multiplied by, in $[0, 1]$: at 0
            the mean is weighted entry by entry, which noisy Grams may profit from.
        rtol: Eigenvalues of the summed Gram, ridge included, up to this share of the largest are
            zero; by default $n\, \varepsilon$.
        layout: How the layers store their matrices, `"in_out"`, as in `x @ W`, or `"out_in"`, as
            torch and equinox do: which inputs are meant,
            [`as_matrix`][wspace.lowrank.as_matrix] says.

    Returns:
        [`Regression`][wspace.average.Regression] with the `weights`, each leaf in the dtype of
            that leaf of the first point, the largest `condition` and the count `unseen`. Rounding
            in the Grams is amplified by the condition, so give them in float32 or wider.

    Raises:
        ValueError: If a Gram is not symmetric or the sum of a leaf not positive semidefinite (NaN
            if traced), or has another shape than its leaf's inputs; if only some points have one;
            if a coefficient is not positive, `ridge` or `rtol` is negative, or `shrink` is
            outside of $[0, 1]$ (NaN if traced); or if the trees differ in layout.
        TypeError: If a leaf or a Gram is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import average
        >>> left, right = jnp.array([[1.0], [1.0]]), jnp.array([[3.0], [3.0]])
        >>> grams = [jnp.diag(jnp.array([1.0, 0.0])), jnp.diag(jnp.array([3.0, 0.0]))]
        >>> found = average.regression_mean([left, right], grams)
        >>> found
        Regression(weights=<(2, 1) float32>, condition=1.0, unseen=1)
        >>> found.weights
        Array([[2.5],
               [2. ]], dtype=float32)

        Edits take the place of inputs where there are no data: the minimum over $W$ of
        $\sum_i \lVert \tau_i^\top (W - \tau_i) \rVert^2 / \lVert \tau_i \rVert^2$, which the merge
        WUDI descends to, is

        >>> edits = [jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([[0.0, 0.0], [0.0, 4.0]])]
        >>> grams = [edit @ edit.T / jnp.sum(edit**2) for edit in edits]
        >>> average.regression_mean(edits, grams).weights
        Array([[2., 0.],
               [0., 4.]], dtype=float32)

    References:
        X. Jin et al., *Dataless Knowledge Fusion by Merging Weights of Language Models*, ICLR
        2023, [arXiv:2212.09849](https://arxiv.org/abs/2212.09849).
        R. Cheng et al., *Whoever Started the Interference Should End It: Guiding Data-Free Model
        Merging via Task Vectors*, ICML 2025,
        [arXiv:2503.08099](https://arxiv.org/abs/2503.08099).
    """
    points = _checks.listed("points", points)
    _checks.known_layout(layout)
    _checks.same_layout(**_checks.each("points", points))
    c = positive_shares(coefficients, len(points))
    ridge = _checks.nonnegative("ridge", ridge)
    shrink = _checks.scalar("shrink", shrink, lambda a: (a >= 0) & (a <= 1), "in [0, 1]")
    if rtol is not None:
        rtol = _checks.nonnegative("rtol", rtol)
    weights, conditions, unseen = [], [jnp.ones((), jnp.float32)], jnp.zeros((), jnp.int32)
    for leaves, entries, where in by_leaf("grams", grams, points):
        if entries is None or not leaves[0].size:
            weights.append(tree.combine(c, leaves))
            continue
        given = [
            checked_gram(entry, leaves[0], at, layout)
            for entry, at in zip(entries, where, strict=True)
        ]
        xs = [replicated(lowrank.as_matrix(leaf, layout=layout)) for leaf in leaves]
        x, eigenvalues, condition, zeros = _fit(c, xs, given, ridge, shrink, rtol)
        fault = semidefinite(eigenvalues, entries, f"the sum of {where[0]} and the others")
        x, condition = x + fault, condition + fault
        weights.append(from_matrix(x.astype(leaves[0].dtype), leaves[0], layout))
        conditions.append(condition)
        unseen += zeros
    wide = accumulator(*(condition.dtype for condition in conditions))
    condition = jnp.max(jnp.stack([condition.astype(wide) for condition in conditions]))
    return Regression(jax.tree.structure(points[0]).unflatten(weights), condition, unseen)


@jax.jit
def _fit(
    c: Sequence[Any],
    xs: Sequence[Array],
    grams: Sequence[Array],
    ridge: Any,
    shrink: Any,
    rtol: Any,
) -> tuple[Array, Array, Scalar, Int[Array, ""]]:
    """The solution, the eigenvalues of its matrix, the condition, and how many count as zero."""
    wide = accumulator(*(x.dtype for x in (*xs, *grams)))
    *c, ridge, shrink = (jnp.asarray(number).astype(wide) for number in (*c, ridge, shrink))
    xs = [x.astype(wide) for x in xs]
    eye = jnp.broadcast_to(jnp.eye(xs[0].shape[-2], dtype=wide), grams[0].shape)
    grams = [g.astype(wide) * (shrink + (1 - shrink) * eye) for g in grams]
    mean = weighted_arrays(c, xs)
    total = weighted_arrays(c, grams)
    pull = weighted_arrays(c, [matmul(g, x - mean) for g, x in zip(grams, xs, strict=True)])
    size = total.shape[-1]
    level = ridge * jnp.trace(total, axis1=-2, axis2=-1)[..., None, None] / size
    eigenvalues, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(total))
    shifted = eigenvalues + jax.lax.stop_gradient(level[..., 0])
    share = size * jnp.finfo(wide).eps if rtol is None else jnp.asarray(rtol).astype(wide)
    zero = shifted <= share * jnp.maximum(shifted[..., -1:], 0)
    inverses = jnp.where(zero, 0, 1 / jnp.where(zero, 1, shifted))  # NaN stays
    # The derivative of the solution, not of eigenvectors, which have none where values repeat.
    change = jax.lax.custom_linear_solve(
        lambda x: matmul(total, x) + level * x,
        pull,
        lambda _, b: matmul(
            vectors, inverses[..., None] * matmul(jnp.swapaxes(vectors, -1, -2), b)
        ),
        symmetric=True,
    )
    least = jnp.min(jnp.where(zero, shifted[..., -1:], shifted), axis=-1)
    some = shifted[..., -1] > 0
    conditions = jnp.where(some, shifted[..., -1] / jnp.where(some, least, 1), 1)
    conditions = jnp.where(jnp.all(jnp.isfinite(shifted), axis=-1), conditions, jnp.nan)
    change = with_nan_of(change, share)
    return mean + change, eigenvalues, jnp.max(conditions), jnp.sum(zero, dtype=jnp.int32)


def weighted_arrays(c: Sequence[Any], xs: Sequence[Array]) -> Array:
    """The sum of arrays with one number for each, in the dtype of the arrays."""
    terms = [k * x for k, x in zip(c, xs, strict=True)]
    return sum(terms[1:], start=terms[0])


def positive_shares(coefficients: Coefficients | None, count: int) -> list[Any]:
    """Positive coefficients divided by their sum."""
    c = _checks.positive("coefficients", coefficients, count)
    return _checks.unpacked(c / c.sum())


def by_leaf(
    name: str, entries: Sequence[PyTree], points: Sequence[WeightsLike]
) -> Iterator[tuple[list[Array], list[Any] | None, list[str]]]:
    """Per leaf: the points' arrays, the points' entries, and the entries' names in errors."""
    entries = _checks.listed(name, entries)
    if len(entries) != len(points):
        raise ValueError(
            f"{name} has {len(entries)} trees for {len(points)} points: give one tree a point"
        )
    kinds = "a matrix or None at each leaf"
    rows = [
        _checks.entries(given, x, points[0], kinds, of="the points", is_leaf=lambda _: True)
        for given, x in _checks.each(name, entries).items()
    ]
    columns = zip(*map(jax.tree.leaves, points), strict=True)
    for leaves, *row in zip(columns, *rows, strict=True):
        given, where = [entry for entry, _, _ in row], [where for *_, where in row]
        missing = [place for entry, _, place in row if entry is None]
        if 0 < len(missing) < len(given):
            raise ValueError(
                f"{missing[0]} is None, where others have something: "
                "give something for every point, or None for all"
            )
        yield list(map(jnp.asarray, leaves)), None if missing else given, where


def checked_gram(
    entry: Any, leaf: Array, where: str, layout: Layout, axis: int = -2
) -> Float[Array, "... n n"]:
    """A symmetric matrix for one axis of a leaf's matrix, one for each of a stack of them."""
    if not _checks.is_weight(entry):
        dtype = getattr(entry, "dtype", None)
        what = f"is a {type(entry)}" if dtype is None else f"has dtype {dtype}"
        raise TypeError(f"{where} {what}: give a floating-point matrix, or None")
    *stack, rows, columns = matrix_shape(leaf.shape, layout)
    size, other = (rows, columns) if axis == -2 else (columns, rows)
    if entry.shape not in ((size, size), (*stack, size, size)):
        raise ValueError(
            f"{where} has shape {entry.shape} for a leaf of shape {leaf.shape}: it acts on the "
            f"{'inputs' if axis == -2 else 'outputs'} and must be ({size}, {size})"
            f"{_checks.in_other_layout(layout, entry.shape[-1:] == (other,))}"
        )
    matrix = replicated(jnp.asarray(entry))
    wide = matrix.astype(accumulator(matrix.dtype))
    flipped = jnp.swapaxes(wide, -1, -2)
    skew, largest = jnp.max(jnp.abs(wide - flipped)), jnp.max(jnp.abs(wide))
    sound = _checks.poisoned(
        (wide + flipped) / 2,
        ~(skew <= _checks.matrix_rounding([matrix.dtype], wide.dtype) * largest),
        lambda: (
            f"{where} is not symmetric or not finite, off by {skew:.3g} in entries up to "
            f"{largest:.3g}: give a Gram matrix X.T @ X"
        ),
    )
    return jnp.broadcast_to(sound, (*stack, size, size))


def semidefinite(
    values: Float[Array, "... n"], entries: Sequence[Any], what: str
) -> Scalar | float:
    """Refuses eigenvalues of a sum of matrices that are negative beyond the rounding of these."""
    least, largest = jnp.min(values), jnp.max(jnp.abs(values))
    dtypes = [jnp.asarray(entry).dtype for entry in jax.tree.leaves(entries)]
    slack = _checks.matrix_rounding(dtypes, values.dtype, values.shape[-1])
    return _checks.refuse(
        ~(least >= -slack * largest),
        lambda: (
            f"{what} has the eigenvalue {least:.3g} beside {largest:.3g}: "
            "give positive semidefinite matrices, such as X.T @ X"
        ),
    )
