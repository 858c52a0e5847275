r"""KnOTS: merges in a basis of the outputs that all models share."""

import functools
from collections.abc import Sequence

from jaxtyping import PyTree

from wspace import _checks
from wspace.merge.parts.coordinates import Rule, in_coordinates, of_outputs
from wspace.merge.task import added, differences, siblings, task_arithmetic
from wspace.typing import ByLeaf, Layout, LeafCoefficients, Weights, WeightsLike

__all__ = ["in_shared_space", "knots"]


def knots(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: LeafCoefficients | None = None,
    *,
    method: Rule = task_arithmetic,
    scale: ByLeaf = 1.0,
    layout: Layout = "in_out",
) -> Weights:
    r"""A merge of models in a basis of outputs that their task vectors share.

    Known as KnOTS.

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
        scale: The number that multiplies the merged displacement, or one for each
            [leaf][wspace.typing.ByLeaf].
        layout: How the layers store their matrices: `"in_out"`, or `"out_in"` as torch and equinox
            do, as for [`in_shared_space`][wspace.merge.in_shared_space].

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
    _checks.function("method", method, "a merge of base, tuned models and coefficients")
    tuned, _ = siblings(base, tuned, coefficients)
    edit = in_shared_space(method, differences(base, tuned), coefficients, layout=layout)
    return added(base, edit, scale)


def in_shared_space(
    rule: Rule,
    edits: Sequence[PyTree],
    coefficients: LeafCoefficients | None = None,
    *,
    layout: Layout = "in_out",
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
        layout: How the layers store their matrices, and the factors their product: `"in_out"`, as
            in `x @ W`, or `"out_in"`, as torch and equinox do. Which sides are the outputs,
            [`as_matrix`][wspace.lowrank.as_matrix] says.

    Returns:
        The merged edit, a `LowRank` in at least float32 where all edits have one, of the rank of
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
    _checks.known_layout(layout)
    coordinates = functools.partial(of_outputs, layout=layout)
    return in_coordinates(coordinates, rule, edits, coefficients)
