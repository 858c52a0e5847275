r"""Singular values, and the ranks that they speak of."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wspace import _checks
from wspace._numerics import power_of_two, safe_sqrt
from wspace.lowrank.factors import LowRank, core_of
from wspace.typing import Leaf, ScalarLike

__all__ = ["effective_rank", "rank_for", "singular_values", "stable_rank"]


def singular_values(x: Leaf | LowRank) -> Float[Array, "... k"]:
    r"""Singular values in descending order, of a matrix or of a product of factors.

    $$
    \sigma_1 \ge \sigma_2 \ge \dots \ge \sigma_k \ge 0, \qquad k = \min(m, n)
    $$

    Of factors only the first $\min(m, n, r)$ are returned, the others are zero; the product is
    never formed: $U = Q_U R_U$ and $V = Q_V R_V$ leave the singular values of $R_U R_V^\top$.
    Derivatives exist wherever the value has one, repeated singular values included as long as
    they enter symmetrically; derivatives by factors ask for independent columns.

    Args:
        x: A matrix `(m, n)` or a stack of them `(..., m, n)`, dense or factored; dense leaves
            of other dimensions are the matrices of [`as_matrix`][wspace.lowrank.as_matrix].

    Returns:
        The singular values `(..., k)`, in at least float32; NaN for a matrix with NaN.

    Raises:
        ValueError: If the factors do not match, or a leaf has more than five dimensions.
        TypeError: If `x` is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank
        >>> lowrank.singular_values(jnp.array([[0.0, 2.0], [3.0, 0.0]]))
        Array([3., 2.], dtype=float32)
    """
    matrix, _ = core_of(x)
    if not matrix.size:
        return jnp.zeros((*matrix.shape[:-2], min(matrix.shape[-2:])), matrix.dtype)
    return jnp.linalg.svd(matrix, full_matrices=False, compute_uv=False)


def tail_curve(values: Float[Array, "... k"]) -> Float[Array, " k+1"]:
    r"""Squared distances left after rank 0, 1, ..., k: $\sum_{i > r} \sigma_i^2$ over the stack."""
    squares = jnp.sum(values**2, axis=tuple(range(values.ndim - 1)))
    # Summed from the smallest up, so that small tails keep their digits; 0, or NaN, at the end.
    tails = jnp.cumsum(squares[::-1])[::-1]
    return jnp.concatenate([tails, 0 * jnp.sum(squares, keepdims=True)])


def tails_of(values: Float[Array, "... k"]) -> Float[Array, " k+1"]:
    r"""Distances left after rank 0, 1, ..., k, of singular values of any size."""
    unit = power_of_two(jnp.max(values, initial=0))
    return unit * safe_sqrt(tail_curve(values / unit))


def rank_for(
    singular_values: Float[Array | np.ndarray, "... k"],
    *,
    energy: ScalarLike | None = None,
    tail: ScalarLike | None = None,
) -> Int[Array, ""]:
    r"""Smallest rank that keeps a share of the energy, or leaves no more than a tail.

    $$
    \min \Bigl\{ r : \sum_{i > r} \sigma_i^2 \le (1 - \eta) \sum_i \sigma_i^2 \Bigr\}
    \quad\text{or}\quad
    \min \Bigl\{ r : \Bigl(\sum_{i > r} \sigma_i^2\Bigr)^{1/2} \le \tau \Bigr\}
    $$

    What is left out is summed, from the smallest up, not subtracted from what is kept.

    Args:
        singular_values: The $\sigma_i$ of a matrix, `(k,)`, in descending order, or of a stack
            `(..., k)`, which is given one rank for all its matrices.
        energy: The share $\eta$ in $(0, 1]$ of the squared Frobenius norm to keep.
        tail: The Frobenius distance $\tau \ge 0$ that may be left, in the units of the matrix.

    Returns:
        The rank, from 0 to $k$; -1 if a traced value is NaN or out of its domain.

    Raises:
        ValueError: If not exactly one of `energy` and `tail` is given, it is known and out of its
            domain, or a known singular value is NaN or infinite.
        TypeError: If `singular_values` is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank
        >>> values = jnp.array([4.0, 2.0, 2.0, 1.0])
        >>> lowrank.rank_for(values, energy=0.8), lowrank.rank_for(values, tail=1.0)
        (Array(2, dtype=int32), Array(3, dtype=int32))
    """
    _checks.one_array(singular_values=singular_values)
    _checks.finite(singular_values=singular_values)
    if (energy is None) == (tail is None):
        raise ValueError("give exactly one of energy and tail")
    energy, tail = kept_or_left(energy, tail)
    values = _checks.floating(singular_values)
    unit = power_of_two(jnp.max(values, initial=0))
    squares = tail_curve(values / unit)
    if energy is not None:
        bound = jnp.asarray(1 - energy).astype(squares.dtype) * squares[0]
    else:
        bound = (jnp.asarray(tail).astype(squares.dtype) / unit) ** 2
    rank = jnp.sum(squares > bound, dtype=jnp.int32)
    return jnp.where(jnp.isnan(squares[0] + bound), jnp.int32(-1), rank)


def kept_or_left(
    energy: ScalarLike | None, tail: ScalarLike | None
) -> tuple[ScalarLike | None, ScalarLike | None]:
    """The energy or the tail that is given, in its domain."""
    if energy is not None:
        energy = _checks.scalar("energy", energy, lambda e: (e > 0) & (e <= 1), "in (0, 1]")
    if tail is not None:
        tail = _checks.nonnegative("tail", tail)
    return energy, tail


def stable_rank(x: Leaf | LowRank) -> Float[Array, "..."]:
    r"""Squared Frobenius norm over squared spectral norm.

    $$
    \frac{\lVert W \rVert_F^2}{\lVert W \rVert_2^2} = \sum_i \frac{\sigma_i^2}{\sigma_1^2}
    $$

    From $1$ for a matrix of rank one to the rank for a flat spectrum; never above the rank, and
    hardly moved by small singular values. Unchanged by scaling and rotations.

    Args:
        x: A matrix or a stack of them, dense or factored, as for
            [`singular_values`][wspace.lowrank.singular_values].

    Returns:
        One number a matrix, `(...)`, in at least float32; $0$ for a zero matrix.

    Raises:
        ValueError: If the factors do not match, or a leaf has more than five dimensions.
        TypeError: If `x` is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank
        >>> lowrank.stable_rank(jnp.diag(jnp.array([2.0, 1.0, 1.0])))
        Array(1.5, dtype=float32)

    References:
        M. Rudelson, R. Vershynin, *Sampling from large matrices: An approach through geometric
        functional analysis*, Journal of the ACM 54, 2007,
        [arXiv:math/0503442](https://arxiv.org/abs/math/0503442).
    """
    return stable_rank_of(singular_values(x))


def effective_rank(x: Leaf | LowRank) -> Float[Array, "..."]:
    r"""Exponential of the entropy of the singular values.

    $$
    \exp\Bigl(-\sum_i p_i \log p_i\Bigr), \qquad p_i = \frac{\sigma_i}{\sum_j \sigma_j}
    $$

    From $1$ for a matrix of rank one to the rank for a flat spectrum. Unchanged by scaling and
    rotations.

    Args:
        x: A matrix or a stack of them, dense or factored, as for
            [`singular_values`][wspace.lowrank.singular_values].

    Returns:
        One number a matrix, `(...)`, in at least float32; $0$ for a zero matrix.

    Raises:
        ValueError: If the factors do not match, or a leaf has more than five dimensions.
        TypeError: If `x` is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank
        >>> lowrank.effective_rank(jnp.eye(4))
        Array(4., dtype=float32)

    References:
        O. Roy, M. Vetterli, *The effective rank: A measure of effective dimensionality*,
        EUSIPCO 2007.
    """
    return effective_rank_of(singular_values(x))


def stable_rank_of(values: Float[Array, "... k"]) -> Float[Array, "..."]:
    """The stable rank, from the singular values."""
    return jnp.sum(_shares(values) ** 2, axis=-1)


def effective_rank_of(values: Float[Array, "... k"]) -> Float[Array, "..."]:
    """The effective rank, from the singular values."""
    shares = _shares(values)
    total = jnp.sum(shares, axis=-1, keepdims=True)
    p = shares / jnp.where(total == 0, 1, total)
    entropy = -jnp.sum(p * jnp.log(jnp.where(p == 0, 1, p)), axis=-1)
    return jnp.where(total[..., 0] == 0, 0, jnp.exp(entropy))


def _shares(values: Float[Array, "... k"]) -> Float[Array, "... k"]:
    """Singular values in units of the largest; zeros stay."""
    if not values.size:
        return values
    largest = values[..., :1]
    return values / jnp.where(largest == 0, 1, largest)
