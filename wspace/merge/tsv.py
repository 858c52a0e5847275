r"""TSV-M: task singular vectors, cut to an equal share for each model and made orthogonal."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from wspace._numerics import matmul, singular_triples
from wspace.lowrank.factors import transposed
from wspace.merge.parts.spectra import (
    SpectralMerge,
    by_matrices,
    checked_least,
    cut_of,
    isometries,
)
from wspace.typing import ByLeaf, LeafCoefficients, Scalar, ScalarLike, WeightsLike

__all__ = ["tsv_m"]


def tsv_m(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: LeafCoefficients | None = None,
    *,
    scale: ByLeaf = 1.0,
    rtol: ScalarLike | None = None,
    least: ScalarLike | None = None,
) -> SpectralMerge:
    r"""Task singular vectors, cut to an equal share for each model and made orthogonal.

    Known as TSV-M.

    Of every matrix $\tau_i = U_i \Sigma_i V_i^\top$ of the $T$ task vectors the leading $r =
    \lfloor \min(m, n) / T \rfloor$ triples are kept, and the bases replaced by the nearest with
    orthonormal columns:

    $$
    D = \operatorname{polar}(U_1, \dots, U_T)\,
        \operatorname{diag}(c_1 \Sigma_1, \dots, c_T \Sigma_T)\,
        \operatorname{polar}(V_1, \dots, V_T)^\top
    $$

    Linear in the coefficients: negated ones negate the displacement exactly, and a coefficient of
    $0$ takes out what a model adds but keeps its directions occupied. One model comes back to
    rounding. Where the kept directions of the models are orthogonal on both sides, the sum of
    the cut task vectors is returned. A vector or a scalar is the mean of the terms $c_i\,\tau_i$.
    A row or column that no model moves, as of an input that is always zero or a unit that never
    acts, stays.

    Where directions of two models nearly coincide, a polar factor splits them along their
    difference, which is rounding: two equal models, one of them moved by $10^{-12}$, would change
    its product by more than half. Here directions of the joined bases whose singular value is at
    most `least` of the largest are left out, so that the factors are partial isometries: models
    that coincide in a direction share it, equal models give the mean of what is kept of them, and
    what no model moves is no direction. `left_out` counts them, and `trusted` is the least of those
    that stay. The merge jumps where a singular value crosses that bound, and where the $r$-th and
    the next one of a model meet, as every cut does.

    Args:
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        coefficients: The $c_i$, one a model or one for each of its
            [leaves][wspace.typing.ByLeaf], of any sign; ones if not given.
        scale: The number that multiplies the merged displacement, or one for each
            [leaf][wspace.typing.ByLeaf].
        rtol: Singular values up to this number in $(0, 1)$ times the largest of their matrix have
            no direction and are left out; $\max(m, n)\,\varepsilon$ if not given. A difference of
            weights that were rounded to half precision has full rank: give the rounding there.
        least: The share of the largest, in $[0, 1)$, up to which singular values of the joined
            bases are left out; $10^{-5}$ if not given, or $\sqrt\varepsilon$ of the arithmetic
            where that is less, and never below $\max(m, n)\,\varepsilon$. Joined bases that fill a
            square matrix have about $1/m$ by chance.

    Returns:
        A [`SpectralMerge`][wspace.merge.SpectralMerge] with the weights, each leaf in the dtype of
            that leaf of `base`, the smallest singular value of the joined bases that stayed, and
            how many directions were left out. Derivatives in the coefficients exist always, in
            the models where no singular values repeat but zeros and no direction comes in or goes.

    Raises:
        ValueError: If a leaf has fewer singular values than there are models, a number is known
            and out of its domain (NaN if traced), the counts differ or are zero, a known value is
            NaN or infinite, or the trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> x, y = jnp.diag(jnp.array([4.0, 1.0])), jnp.diag(jnp.array([0.0, 2.0]))
        >>> merge.tsv_m(jnp.zeros((2, 2)), [x, y])
        SpectralMerge(weights=<(2, 2) float32>, trusted=1.0, left_out=0)
        >>> merge.tsv_m(jnp.zeros((2, 2)), [x, y]).weights
        Array([[4., 0.],
               [0., 2.]], dtype=float32)

    References:
        A. Gargiulo et al., *Task Singular Vectors: Reducing Task Interference in Model Merging*,
        CVPR 2025, section 4, [arXiv:2412.00081](https://arxiv.org/abs/2412.00081).
    """
    least_in = checked_least(least)

    def on_matrices(path: str, c: Sequence[Any], taus: list[Array]) -> tuple[Array, Scalar, Array]:
        k = min(taus[0].shape[-2:])
        if k < len(taus):
            raise ValueError(
                f"leaf {path} has {k} singular values for {len(taus)} models, so that none is left "
                "for each: merge fewer models, or that leaf by merge.task_arithmetic"
            )
        return _made_orthogonal(c, taus, cut_of(rtol, taus[0]), least_in(taus[0].dtype))

    return by_matrices(on_matrices, base, tuned, coefficients, scale, rtol)


@jax.jit
def _made_orthogonal(
    c: Sequence[Any], taus: list[Array], cut: Scalar, least: Scalar
) -> tuple[Array, Scalar, Array]:
    rank = min(taus[0].shape[-2:]) // len(taus)
    triples = [singular_triples(x, cut, rank) for x in taus]
    values = [jnp.asarray(a).astype(cut.dtype) * s for a, (_, s, _) in zip(c, triples, strict=True)]
    left, right, trusted, left_out = isometries(triples, least)
    values = jnp.concatenate(values, -1)
    return matmul(left * values[..., None, :], transposed(right)), trusted, left_out
