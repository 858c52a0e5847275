r"""Core space: merges of adapters in the small cores that they are in common bases."""

from collections.abc import Sequence

from jaxtyping import PyTree

from wspace.merge.parts.coordinates import Rule, in_coordinates, of_cores
from wspace.typing import LeafCoefficients

__all__ = ["in_core_space"]


def in_core_space(
    rule: Rule, edits: Sequence[PyTree], coefficients: LeafCoefficients | None = None
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
        The merged edit, a `LowRank` in at least float32 where all edits have one. A leaf that is
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
    return in_coordinates(of_cores, rule, edits, coefficients)
