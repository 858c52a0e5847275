"""Closed forms for other prices of an edit: spectral norm, nuclear norm, rank."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from wspace import _checks, lowrank
from wspace._numerics import safe_sqrt, with_nan_of
from wspace._records import record
from wspace.cone.cones import Projection
from wspace.cone.lemma import Move
from wspace.cone.spectra import Spectra, finite_edit, largest, norm_and_tail, pooled, refitted
from wspace.lowrank.spectrum import tail_curve
from wspace.typing import Scalar, ScalarLike

__all__ = ["SpectralMove", "nuclear_entry", "project_capped", "spectral_entry"]


@record
class SpectralMove(NamedTuple):
    """The least edit that brings every matrix of a displacement to a spectral radius.

    Attributes:
        edit: The edit, to be added.
        norm: Its largest spectral norm.
        rank: Its largest rank.
    """

    edit: PyTree
    norm: Scalar
    rank: Int[Array, ""]


def project_capped(edit: PyTree, rank: int, cap: ScalarLike) -> Projection:
    r"""The nearest edit of given rank and spectral norm.

    $$
    D = \sum_{i \le r} \min(\sigma_i, s)\, u_i v_i^\top, \qquad
    \lVert E - D \rVert^2 = \sum_{i \le r} \max(\sigma_i - s, 0)^2 + \sum_{i > r} \sigma_i^2
    $$

    in every matrix, by von Neumann's trace inequality. Not a cone: twice an edit may be too large.
    From $s = \sigma_1$ on it is [`project`][wspace.cone.project] on [`Rank`][wspace.cone.Rank].

    Args:
        edit: The edit $E$, a tree with dense or `LowRank` leaves; a vector is one column.
        rank: The rank $r \ge 0$ of every matrix.
        cap: The largest spectral norm $s \ge 0$ of every matrix.

    Returns:
        A [`Projection`][wspace.cone.Projection] with the `edit`, its `norm` and the `tail`.

    Raises:
        ValueError: If `rank` is negative, `cap` is known and negative or not finite (NaN if
            traced), or a known value is NaN or infinite.
        TypeError: If `rank` is not an integer, or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import cone
        >>> cone.project_capped(jnp.diag(jnp.array([8.0, 4.0])), 1, 5.0).tail
        Array(5., dtype=float32)

    References:
        L. Mirsky, *A trace inequality of John von Neumann*, Monatshefte für Mathematik 79, 1975.
    """
    cap = _checks.nonnegative("cap", cap)
    finite_edit(edit=edit)

    rank = _checks.rank(rank)

    def capped(spectra: Spectra) -> Spectra:
        return [jnp.minimum(s, jnp.asarray(cap).astype(s.dtype)) for s in largest(spectra, rank)]

    nearest, spectra, kept = refitted(edit, capped, rank)
    return Projection(nearest, *norm_and_tail(spectra, kept))


def nuclear_entry(displacement: PyTree, radius: ScalarLike) -> Move:
    r"""The edit of least nuclear norm that brings a displacement into a ball about zero.

    $$
    D = -\sum_i \max(\sigma_i - t, 0)\, u_i v_i^\top, \qquad
    \sum_i \min(\sigma_i, t)^2 = \rho^2, \qquad
    \lVert D \rVert_* = \sum_i \max(\sigma_i - t, 0)
    $$

    over all matrices, with one threshold $t$ found exactly from the sorted singular values. The
    nuclear norm, summed over the leaves, is the price of an edit that pays for rank and size.

    Args:
        displacement: The displacement $E$, a tree with dense or `LowRank` leaves; a vector is one
            column.
        radius: The radius $\rho \ge 0$, of the Frobenius norm over all leaves.

    Returns:
        A [`Move`][wspace.cone.Move] with the `edit` and its nuclear `norm`.

    Raises:
        ValueError: If `radius` is known and negative or not finite (NaN if traced), or a known
            value is NaN or infinite.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import cone
        >>> cone.nuclear_entry(jnp.diag(jnp.array([9.0, 3.0])), 5.0).norm
        Array(5., dtype=float32)

    References:
        J. Cai, E. Candès, Z. Shen, *A Singular Value Thresholding Algorithm for Matrix
        Completion*, SIAM Journal on Optimization 20, 2010,
        [arXiv:0810.3286](https://arxiv.org/abs/0810.3286).
    """
    radius = _checks.nonnegative("radius", radius)
    finite_edit(displacement=displacement)

    def over(spectra: Spectra) -> Spectra:
        t = threshold(spectra, radius)
        return [_positive(s - t.astype(s.dtype)) for s in spectra]

    edit, _, taken = refitted(displacement, over)
    return Move(lowrank.scale(-1, edit), jnp.sum(pooled(taken)))


def spectral_entry(displacement: PyTree, radius: ScalarLike) -> SpectralMove:
    r"""The least edit that brings every matrix of a displacement to a spectral radius.

    $$
    D = -\sum_i \max(\sigma_i - \rho, 0)\, u_i v_i^\top, \qquad
    \lVert D \rVert_2 = \max(\sigma_1 - \rho, 0), \qquad
    \operatorname{rank} D = \#\{ i : \sigma_i > \rho \}
    $$

    No edit with $\lVert E + D \rVert_2 \le \rho$ in every matrix has a smaller spectral norm or a
    smaller rank, by Weyl's inequality.

    Args:
        displacement: The displacement $E$, a tree with dense or `LowRank` leaves; a vector is one
            column.
        radius: The radius $\rho \ge 0$.

    Returns:
        A [`SpectralMove`][wspace.cone.SpectralMove] with the `edit`, its largest spectral `norm`
            and its largest `rank`.

    Raises:
        ValueError: If `radius` is known and negative or not finite (NaN if traced), or a known
            value is NaN or infinite.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import cone
        >>> move = cone.spectral_entry(jnp.diag(jnp.array([9.0, 3.0])), 5.0)
        >>> move.norm, move.rank
        (Array(4., dtype=float32), Array(1, dtype=int32))
    """
    radius = _checks.nonnegative("radius", radius)
    finite_edit(displacement=displacement)

    def over(spectra: Spectra) -> Spectra:
        return [_positive(s - jnp.asarray(radius).astype(s.dtype)) for s in spectra]

    edit, _, taken = refitted(displacement, over)
    ranks = [jnp.max(jnp.sum(s > 0, axis=-1, dtype=jnp.int32), initial=0) for s in taken]
    rank = jax.tree.reduce_associative(jnp.maximum, ranks) if ranks else jnp.int32(0)
    return SpectralMove(lowrank.scale(-1, edit), jnp.max(pooled(taken), initial=0), rank)


def threshold(spectra: Spectra, radius: ScalarLike) -> Scalar:
    r"""The $t$ with $\sum_i \min(\sigma_i, t)^2 = \rho^2$, the largest $\sigma$ if all is inside.

    With $j$ values above $t$ it is $j t^2 + \sum_{i > j} \sigma_i^2$.
    """
    values = jnp.sort(pooled(spectra), descending=True)
    if not values.size:
        return jnp.zeros((), values.dtype)
    radius = jnp.asarray(radius).astype(values.dtype)
    rest = tail_curve(values)[1:]
    counts = jnp.arange(1, values.size + 1, dtype=values.dtype)
    j = jnp.sum(counts * values**2 + rest > radius**2)
    last = jnp.maximum(j, 1) - 1
    tail = safe_sqrt(rest[last])
    t = safe_sqrt((radius - tail) * (radius + tail) / counts[last])
    return with_nan_of(jnp.where(j == 0, values[0], t), radius)


def _positive(x: Array) -> Array:
    return jnp.where(x <= 0, 0, x)  # NaN stays
