r"""Merges in coordinates: rules for entries, applied where entries have a meaning.

A rule such as [`ties`][wspace.merge.ties] compares models entry by entry. Models tuned apart,
adapters above all, keep what they learned in different directions, and their entries say
little about each other. The functions here write all edits in bases that they share, apply a
rule to the coordinates and return to weights.

The bases are singular vectors of all edits side by side. They depend on the edits alone, not on
the factors that an adapter is kept in, and they hold every edit whole: a linear rule gives what
it gives without them. Where singular values of the edits side by side repeat, the basis is
not unique, and a rule for entries has no one result.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from wspace import _checks, lowrank, tree
from wspace._numerics import matmul, placed_like, replicated
from wspace.lowrank import LowRank
from wspace.lowrank.algebra import side_by_side
from wspace.lowrank.factors import factors_of, product, transposed
from wspace.merge.task import added, differences, siblings, task_arithmetic
from wspace.typing import Coefficients, Leaf, ScalarLike, Weights, WeightsLike

__all__ = ["in_core_space", "in_shared_space", "knots"]

Rule: TypeAlias = Callable[[PyTree, Sequence[PyTree], Coefficients | None], PyTree]
"""A merge: from base, tuned models and coefficients to weights."""

Coordinates: TypeAlias = tuple[Sequence[Array], Callable[[Array], Leaf | LowRank]]
"""One leaf of all edits in coordinates, and the way from merged coordinates back to it."""


def knots(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: Coefficients | None = None,
    *,
    method: Rule = task_arithmetic,
    scale: ScalarLike = 1.0,
) -> Weights:
    r"""A merge of models in a basis of outputs that their task vectors share.

    $$
    \begin{pmatrix} \tau_1 \\ \vdots \\ \tau_T \end{pmatrix}
        = \begin{pmatrix} B_1 \\ \vdots \\ B_T \end{pmatrix} W^\top, \qquad
    D = \operatorname{merge}(B_1, \dots, B_T)\, W^\top
    $$

    for matrices of `x @ W`, with $W$ the right singular vectors of the task vectors one above
    another. This is [`in_shared_space`][wspace.merge.in_shared_space] on weights. The method sees
    the coordinates $B_i$ of every model with its own coefficient. With task arithmetic the result
    is task arithmetic, and with one model and a method that returns one model as it is, that
    model.

    Args:
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        coefficients: The $c_i$, one a model, handed to the method; the basis knows nothing of
            them.
        method: Any merge of this package that returns weights, or a function like it: from a
            base, which is zero here, tuned models and coefficients to weights.
        scale: The number that multiplies the merged displacement.

    Returns:
        The weights, each leaf in the dtype of that leaf of `base`. Derivatives are not defined
            where singular values repeat.

    Raises:
        ValueError: If a number is known and not finite, the counts differ or are zero, a known
            value is NaN or infinite, the trees differ in structure or in a leaf's shape, or the
            method returns another layout.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> base, tuned = jnp.zeros((2, 2)), [jnp.array([[3.0, 4.0], [0.0, 0.0]]), jnp.eye(2)]
        >>> merge.knots(base, tuned, (1.0, 1.0)).round(2) + 0.0
        Array([[4., 4.],
               [0., 1.]], dtype=float32)

    References:
        G. Stoica et al., *Model merging with SVD to tie the Knots*, ICLR 2025,
        [arXiv:2410.19735](https://arxiv.org/abs/2410.19735).
    """
    tuned, _ = siblings(base, tuned, coefficients)
    edit = in_shared_space(method, differences(base, tuned), coefficients)
    return added(base, edit, scale)


def in_shared_space(
    rule: Rule, edits: Sequence[PyTree], coefficients: Coefficients | None = None
) -> PyTree:
    r"""A rule applied to edits in a basis of outputs that they share.

    $$
    D_i = B_i W^\top, \qquad
    D = \operatorname{rule}(B_1, \dots, B_T)\, W^\top
    $$

    $W$ are the right singular vectors of the edits one above another, so that $B_i$ keeps the
    inputs of a layer as they are, and describes its outputs by what the edits do together.
    Adapters are never multiplied out: with $U_i = Q_i R_i$, $W$ are the left singular vectors of
    $(V_1 R_1^\top \cdots V_T R_T^\top)$, and $B_i = U_i (V_i^\top W)$.

    Args:
        rule: A merge that returns weights, as for [`knots`][wspace.merge.knots].
        edits: The $D_i$, trees of one structure with a `LowRank` or a dense array at each leaf,
            at least one; ranks may differ.
        coefficients: One number an edit, handed to the rule.

    Returns:
        The merged edit: a `LowRank` in at least float32 where all edits have one, of the rank of
            all of them together or of the outputs at most; elsewhere a dense array in the dtype of
            the first edit's leaf. Vectors and scalars are given to the rule as they are.
            Derivatives are not defined where singular values repeat.

    Raises:
        ValueError: If there are no edits, they differ in structure or in the shape of a matrix, a
            known value is NaN or infinite, or the rule returns another layout.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank, merge
        >>> x = lowrank.LowRank(jnp.array([[1.0], [0.0]]), jnp.array([[1.0], [1.0]]))
        >>> y = lowrank.LowRank(jnp.array([[0.0], [1.0]]), jnp.array([[2.0], [0.0]]))
        >>> total = merge.in_shared_space(merge.task_arithmetic, [x, y], (1.0, -1.0))
        >>> wanted = lowrank.combine((1.0, -1.0), [x, y])
        >>> jnp.allclose(*map(lowrank.materialize, (total, wanted)), atol=1e-6)
        Array(True, dtype=bool)

    References:
        G. Stoica et al., *Model merging with SVD to tie the Knots*, ICLR 2025,
        [arXiv:2410.19735](https://arxiv.org/abs/2410.19735).
    """
    return _in_coordinates(_of_outputs, rule, edits, coefficients)


def in_core_space(
    rule: Rule, edits: Sequence[PyTree], coefficients: Coefficients | None = None
) -> PyTree:
    r"""A rule applied to the small cores of adapters of any ranks, without losing anything.

    $$
    D_i = U_i V_i^\top = Q_U\, C_i\, Q_V^\top, \qquad
    D = Q_U \operatorname{rule}(C_1, \dots, C_T)\, Q_V^\top
    $$

    $Q_U$ and $Q_V$ are the left singular vectors of the edits side by side, and the right ones of
    the edits one above another, $R = \sum_i r_i$ at most, so that every core $C_i = Q_U^\top U_i
    \, V_i^\top Q_V$ is $R \times R$ and nothing of the size of the weights is formed. The map to
    the cores is linear and keeps inner products. So a linear rule gives the exact
    [`lowrank.combine`][wspace.lowrank.combine], and a rule that does not care how a matrix is
    turned, such as [`iso_c`][wspace.merge.iso_c], what it gives on the edits multiplied out. The
    result is the same in every gauge of the factors, unlike rules applied to the factors
    themselves. [`truncate`][wspace.lowrank.truncate] it to a lower rank.

    Args:
        rule: A merge that returns weights, as for [`knots`][wspace.merge.knots].
        edits: The $D_i$, trees of one structure with a `LowRank` or a dense array at each leaf,
            at least one; ranks may differ.
        coefficients: One number an edit, handed to the rule.

    Returns:
        The merged edit: a `LowRank` in at least float32 where all edits have one. A leaf that is
            dense in one of the edits is its own core: dense, in the dtype of the first edit's
            leaf. Derivatives are not defined where singular values repeat.

    Raises:
        ValueError: If there are no edits, they differ in structure or in the shape of a matrix, a
            known value is NaN or infinite, or the rule returns another layout.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank, merge
        >>> x = lowrank.LowRank(jnp.ones((5, 1)), jnp.ones((4, 1)))
        >>> y = lowrank.LowRank(jnp.eye(5, 2), jnp.eye(4, 2))
        >>> total = merge.in_core_space(lambda *edits: merge.iso_c(*edits).weights, [x, y])
        >>> total.rank, lowrank.stable_rank(total).round()
        (3, Array(3., dtype=float32))

    References:
        A. Panariello et al., *Accurate and Efficient Low-Rank Model Merging in Core Space*,
        NeurIPS 2025, [arXiv:2509.17786](https://arxiv.org/abs/2509.17786). The bases there are
        singular vectors of the factors, which change with the gauge; these do not.
    """
    return _in_coordinates(_of_cores, rule, edits, coefficients)


def _in_coordinates(
    coordinates: Callable[[Sequence[Leaf | LowRank]], Coordinates],
    rule: Rule,
    edits: Sequence[PyTree],
    coefficients: Coefficients | None,
) -> PyTree:
    edits = _checks.listed("edits", edits)
    rows, structure = side_by_side(**_checks.each("edits", edits))
    _checks.finite(**_checks.each("edits", edits))
    # In one dtype from here on, so that no basis is coarser than the edits in it.
    spaces = [coordinates(tree.widened(*row)) for row in rows]
    seen, back = zip(*spaces, strict=True) if rows else ((), ())
    points = [structure.unflatten(leaves) for leaves in zip(*seen, strict=True)] or edits
    base = jax.tree.map(jnp.zeros_like, points[0])
    merged = rule(base, points, coefficients)
    _checks.same_layout(edits=base, merged=merged)
    edit = [return_(x) for return_, x in zip(back, jax.tree.leaves(merged), strict=True)]
    return structure.unflatten(
        x if isinstance(x, LowRank) or isinstance(row[0], LowRank) else x.astype(row[0].dtype)
        for x, row in zip(edit, rows, strict=True)
    )


def _of_outputs(row: Sequence[Leaf | LowRank]) -> Coordinates:
    if any(not isinstance(x, LowRank) and jnp.ndim(x) < 2 for x in row):
        return _dense(row)
    matrices = [x if isinstance(x, LowRank) else lowrank.as_matrix(x) for x in row]
    basis = _span([_turned(x) for x in matrices])
    seen = [product(_whole(x), basis) for x in matrices]
    if all(isinstance(x, LowRank) for x in row):
        return seen, lambda merged: LowRank(merged, basis)
    _, back = _dense(row)
    return seen, lambda merged: back(matmul(merged, transposed(basis)))


def _of_cores(row: Sequence[Leaf | LowRank]) -> Coordinates:
    edits = [x for x in row if isinstance(x, LowRank)]
    if len(edits) < len(row):
        return _dense(row)
    left, right = _span(edits), _span([_turned(x) for x in edits])
    seen = [product(product(transposed(left), x), right) for x in map(_whole, edits)]
    return seen, lambda merged: LowRank(matmul(left, merged), right)


def _dense(row: Sequence[Leaf | LowRank]) -> Coordinates:
    """A leaf that is dense in one of the edits, in all of them."""
    like = jnp.asarray(next(x for x in row if not isinstance(x, LowRank)))

    def shaped(matrix: Array) -> Array:
        return placed_like(matrix.reshape(like.shape), like)

    seen = [
        shaped(lowrank.materialize(x)) if isinstance(x, LowRank) else jnp.asarray(x) for x in row
    ]
    return seen, shaped


def _whole(x: Array | LowRank) -> Any:
    return jax.tree.map(replicated, x)


def _turned(x: Array | LowRank) -> Array | LowRank:
    return LowRank(x.right, x.left) if isinstance(x, LowRank) else transposed(x)


def _span(edits: Sequence[Array | LowRank]) -> Float[Array, "... m k"]:
    """Left singular vectors of edits side by side, zero where the singular value is."""
    wide = jnp.concatenate([_block(_whole(x)) for x in edits], axis=-1)
    *stack, m, n = wide.shape
    if not wide.size:
        return jnp.zeros((*stack, m, min(m, n)), wide.dtype)
    u, s, _ = jnp.linalg.svd(wide, full_matrices=False)
    nothing = s <= max(m, n) * float(jnp.finfo(s.dtype).eps) * s[..., :1]  # NaN stays
    return jnp.where(nothing[..., None, :], 0, u)


def _block(x: Array | LowRank) -> Array:
    r"""Something with the $x x^\top$ of an edit, no wider than its rank: $U R^\top$, $V = Q R$."""
    if not isinstance(x, LowRank):
        return x
    left, right = factors_of(x)
    if not right.size or right.shape[-2] <= right.shape[-1]:
        return matmul(left, transposed(right))
    return matmul(left, transposed(jnp.linalg.qr(right, mode="r")))
