r"""Singular values of dense and factored matrices, and the ranks they speak of."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from wspace import _checks, tree
from wspace._numerics import matmul, replicated
from wspace.lowrank.algebra import LowRank, as_matrix, factors_of
from wspace.typing import Leaf

__all__ = ["singular_values"]


def singular_values(x: Leaf | LowRank) -> Float[Array, "... k"]:
    r"""Singular values in descending order, of a matrix or of a product of factors.

    $$
    \sigma_1 \ge \sigma_2 \ge \dots \ge \sigma_k \ge 0, \qquad k = \min(m, n)
    $$

    Of factors only the first $\min(m, n, r)$ are returned, the others are zero; the product is
    never formed: $U = Q_U R_U$ and $V = Q_V R_V$ leave the singular values of $R_U R_V^\top$.
    Derivatives exist wherever the value has one, repeated singular values included as long as
    they enter symmetrically.

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
    return jnp.linalg.svd(matrix, compute_uv=False)


def core_of(x: Leaf | LowRank) -> tuple[Array, tuple[Array, Array] | None]:
    """A matrix with the singular values of `x`; for factors a small one, and its two frames."""
    if not isinstance(x, LowRank):
        _checks.floating_leaves(x=x)
        return replicated(tree.upcast(as_matrix(x))), None
    left, right = (replicated(factor) for factor in factors_of(x))
    if not left.size or not right.size:
        return jnp.zeros((*x.shape[:-2], 0, 0), left.dtype), (left, right)
    (left, left_core), (right, right_core) = jnp.linalg.qr(left), jnp.linalg.qr(right)
    return matmul(left_core, jnp.swapaxes(right_core, -1, -2)), (left, right)


def tail_curve(values: Float[Array, "... k"]) -> Float[Array, " k+1"]:
    r"""Squared distances left after rank 0, 1, ..., k: $\sum_{i > r} \sigma_i^2$ over the stack."""
    squares = jnp.sum(values**2, axis=tuple(range(values.ndim - 1)))
    # Summed from the smallest up, so that small tails keep their digits; 0, or NaN, at the end.
    tails = jnp.cumsum(squares[::-1])[::-1]
    return jnp.concatenate([tails, 0 * jnp.sum(squares, keepdims=True)])
