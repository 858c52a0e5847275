r"""Iso-C and Iso-CTS: merges whose matrices have a flat spectrum."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from wspace import _checks, lowrank, tree
from wspace._numerics import matmul, polar, singular_triples
from wspace.lowrank.factors import transposed
from wspace.merge.parts.spectra import (
    SpectralMerge,
    by_matrices,
    checked_least,
    count_of,
    cut_of,
    isometries,
    least_of,
)
from wspace.typing import ByLeaf, LeafCoefficients, Scalar, ScalarLike, WeightsLike

__all__ = ["iso_c", "iso_cts"]


def iso_c(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: LeafCoefficients | None = None,
    *,
    scale: ByLeaf = 1.0,
    rtol: ScalarLike | None = None,
) -> SpectralMerge:
    r"""Task arithmetic with a flat spectrum: every singular value becomes their mean.

    Known as Iso-C.

    $$
    D = \frac{\sigma_1 + \dots + \sigma_k}{k}\, U_k V_k^\top, \qquad
    \sum_i c_i\,\tau_i = U \Sigma V^\top, \qquad k = \#\{j : \sigma_j > \rho\, \sigma_1\}
    $$

    The nuclear norm of every matrix stays. Not the identity for one model, whose spectrum it
    flattens too; applied twice it is applied once. A vector or a scalar is the mean of the terms.
    Zero singular values have no directions that could be raised to the mean, so both the mean and
    the result are taken over the $k$ others: the sum of two adapters stays within their ranks.
    `trusted` is $\sigma_k / \sigma_1$, and `left_out` counts the others.

    The same spectrum at the Frobenius norm of the edit, not the nuclear one, is
    [`negative.harden`][wspace.negative.harden].

    Args:
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        coefficients: The $c_i$, one a model or one for each of its
            [leaves][wspace.typing.ByLeaf], of any sign; ones if not given.
        scale: The number that multiplies the merged displacement, or one for each
            [leaf][wspace.typing.ByLeaf].
        rtol: The threshold $\rho$ in $(0, 1)$; $\max(m, n)\,\varepsilon$ if not given. A difference
            of weights that were rounded to half precision has full rank: give the rounding there.

    Returns:
        A [`SpectralMerge`][wspace.merge.SpectralMerge] with the weights, each leaf in the dtype of
            that leaf of `base`, the smallest singular value that was raised, and how many were left
            out. Derivatives exist where $k$ stays, also where singular values repeat: those of
            matrices with the same rank, so that a direction that is zero stays so.

    Raises:
        ValueError: If a number is known and out of its domain, the counts differ or are zero, a
            known value is NaN or infinite, or the trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> x, y = jnp.diag(jnp.array([4.0, 1.0])), jnp.diag(jnp.array([1.0, 0.0]))
        >>> merge.iso_c(jnp.zeros((2, 2)), [x, y]).weights
        Array([[3., 0.],
               [0., 3.]], dtype=float32)

    References:
        D. Marczak et al., *No Task Left Behind: Isotropic Model Merging with Common and
        Task-Specific Subspaces*, ICML 2025, section 4,
        [arXiv:2502.04959](https://arxiv.org/abs/2502.04959).
    """

    def on_matrices(_: str, c: Sequence[Any], taus: list[Array]) -> tuple[Array, Scalar, Array]:
        return _flattened(tree.combine(c, taus), cut_of(rtol, taus[0]))

    return by_matrices(on_matrices, base, tuned, coefficients, scale, rtol)


@jax.jit
def _flattened(x: Array, cut: Scalar) -> tuple[Array, Scalar, Array]:
    factor, s = polar(x, cut)
    count = count_of(s)
    level = jnp.sum(s, axis=-1) / jnp.maximum(count, 1).astype(s.dtype)
    left_out = jnp.sum(s.shape[-1] - count, dtype=jnp.int32)
    return level[..., None, None] * factor, least_of(s), left_out


def iso_cts(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: LeafCoefficients | None = None,
    *,
    common: ScalarLike = 0.8,
    scale: ByLeaf = 1.0,
    rtol: ScalarLike | None = None,
    least: ScalarLike | None = None,
) -> SpectralMerge:
    r"""A flat spectrum over directions that the models share, and some that each has alone.

    Known as Iso-CTS.

    Of the sum of the terms $c_i\,\tau_i$ the leading $c$ triples $U_0 \Sigma_0 V_0^\top$ are
    kept, and of every term the leading $s$ of what they leave, $(I - U_0 U_0^\top)\, c_i\,\tau_i =
    U_i \Sigma_i V_i^\top$. With $\bar\sigma$ the mean of all $c + T s$ singular values kept,

    $$
    D = \bar\sigma \operatorname{polar}(U_0, U_1, \dots, U_T)\,
        \operatorname{polar}(V_0, V_1, \dots, V_T)^\top
    $$

    For $f$, the common share, and $k = \min(m, n)$, the $s$ of each model is
    $(k - \lfloor f k \rfloor) / T$ rounded to the nearest integer, but at most $\lfloor k / T
    \rfloor$, and $c = k - T s$. With $f = 1$, with one model, and where a matrix has too few
    directions to give each model one, it is [`iso_c`][wspace.merge.iso_c]. A vector or a scalar is
    the mean of the terms. Rows and columns that no model moves stay, and directions that coincide
    are left out and counted, as in [`tsv_m`][wspace.merge.tsv_m].

    Args:
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        coefficients: The $c_i$, one a model or one for each of its
            [leaves][wspace.typing.ByLeaf], of any sign; ones if not given.
        common: The share $f$ of common directions, in $[0, 1]$.
        scale: The number that multiplies the merged displacement, or one for each
            [leaf][wspace.typing.ByLeaf].
        rtol: Singular values up to this number in $(0, 1)$ times the largest of the sum, or of the
            term, have no direction and are left out, of the mean too; $\max(m, n)\,\varepsilon$
            if not given.
        least: The share of the largest, in $[0, 1)$, up to which singular values of the joined
            bases are left out, as for [`tsv_m`][wspace.merge.tsv_m]; $10^{-5}$ or
            $\sqrt\varepsilon$ of the arithmetic if not given.

    Returns:
        A [`SpectralMerge`][wspace.merge.SpectralMerge] with the weights, each leaf in the dtype of
            that leaf of `base`, the smallest singular value of the joined bases that stayed, and
            how many directions were left out. Derivatives exist where no singular values repeat but
            zeros and no direction comes in or goes.

    Raises:
        ValueError: If a number is known and out of its domain (NaN if traced), the counts differ
            or are zero, a known value is NaN or infinite, or the trees differ in structure or in a
            leaf's shape.
        TypeError: If `common` is traced, since it decides shapes, or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> x, y = jnp.diag(jnp.array([4.0, 1.0, 0.0])), jnp.diag(jnp.array([4.0, 0.0, 3.0]))
        >>> merge.iso_cts(jnp.zeros((3, 3)), [x, y], common=0.4).weights.diagonal()
        Array([4., 4., 4.], dtype=float32)

    References:
        D. Marczak et al., *No Task Left Behind: Isotropic Model Merging with Common and
        Task-Specific Subspaces*, ICML 2025, section 4,
        [arXiv:2502.04959](https://arxiv.org/abs/2502.04959).
    """
    if _checks.is_traced(common):
        raise TypeError("common decides shapes, so it must be a plain number, not a traced one")
    share: Any = _checks.scalar("common", common, lambda f: 0 <= f <= 1, "from 0 to 1")
    least_in = checked_least(least)

    def on_matrices(_: str, c: Sequence[Any], taus: list[Array]) -> tuple[Array, Scalar, Array]:
        k, count = min(taus[0].shape[-2:]), len(taus)
        own = min(round((k - math.floor(float(share) * k)) / count), k // count)
        terms = [tree.combine((a,), (x,)) for a, x in zip(c, taus, strict=True)]
        cuts = cut_of(rtol, taus[0]), least_in(taus[0].dtype)
        return _shared_and_own(terms, tree.combine(c, taus), *cuts, own)

    return by_matrices(on_matrices, base, tuned, coefficients, scale, rtol)


@jax.jit(static_argnames="own")
def _shared_and_own(
    terms: list[Array], total: Array, cut: Scalar, least: Scalar, own: int
) -> tuple[Array, Scalar, Array]:
    shared = min(total.shape[-2:]) - own * len(terms)
    triples = [singular_triples(total, cut, shared)]
    u, _, _ = triples[0]
    for term in terms:
        rest = term - matmul(u, matmul(transposed(u), term))
        largest = lowrank.singular_values(term)[..., :1]
        triples.append(singular_triples(rest, cut, own, largest))
    values = jnp.concatenate([s for _, s, _ in triples], -1)
    level = jnp.sum(values, axis=-1) / jnp.maximum(count_of(values), 1).astype(values.dtype)
    left, right, trusted, left_out = isometries(triples, least)
    return level[..., None, None] * matmul(left, transposed(right)), trusted, left_out
