r"""The nearest edit of given rank, with its certificate."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import PyTree

from wspace import _checks
from wspace._numerics import matmul, safe_sqrt
from wspace.lowrank.algebra import LowRank
from wspace.lowrank.spectrum import core_of, tail_curve
from wspace.typing import Leaf, Scalar

__all__ = ["Truncation", "truncate"]


class Truncation(NamedTuple):
    """A low-rank edit and how much of the original it leaves out.

    Attributes:
        factors: The edit: a `LowRank`, or a tree with `LowRank` or dense leaves.
        tail: The Frobenius distance between the edit and what it was cut from, over all leaves.
    """

    factors: LowRank | PyTree
    tail: Scalar


def truncate(x: Leaf | LowRank, rank: int) -> Truncation:
    r"""The nearest matrix of given rank, in factors, and its distance.

    $$
    X_r = \sum_{i \le r} \sigma_i\, u_i v_i^\top, \qquad
    \lVert X - X_r \rVert_F = \sqrt{\textstyle\sum_{i > r} \sigma_i^2}
    $$

    No matrix of that rank is nearer in the Frobenius, spectral or any other unitarily
    invariant norm; the nearest is unique if and only if $\sigma_r > \sigma_{r+1}$. The factors
    are balanced, $U \sqrt\Sigma$ and $V \sqrt\Sigma$, of equal norm. A stack is cut slice by
    slice. Derivatives of the tail exist as those of
    [`singular_values`][wspace.lowrank.singular_values]; derivatives of the factors are not
    defined where singular values repeat.

    Args:
        x: A matrix or a stack of them, dense or factored.
        rank: The rank, at least 0; above $\min(m, n)$ it is cut to that, where the tail is $0$.

    Returns:
        A [`Truncation`][wspace.lowrank.Truncation] with `factors` a `LowRank` in at least float32,
            and the `tail` over the whole stack.

    Raises:
        ValueError: If `rank` is negative, the factors do not match, or a value known is NaN or
            infinite (traced, the result is NaN).
        TypeError: If `rank` is not an integer, or `x` is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank
        >>> cut = lowrank.truncate(jnp.array([[4.0, 0.0], [0.0, 3.0]]), 1)
        >>> lowrank.materialize(cut.factors), cut.tail
        (Array([[4., 0.],
               [0., 0.]], dtype=float32), Array(3., dtype=float32))

    References:
        C. Eckart, G. Young, *The approximation of one matrix by another of lower rank*,
        Psychometrika 1, 1936; L. Mirsky, *Symmetric gauge functions and unitarily invariant
        norms*, Quarterly Journal of Mathematics 11, 1960.
    """
    rank = _checks.rank(rank)
    matrix, frames = core_of(x)
    _checks.finite(x=x)
    if not matrix.size:
        shape = matrix.shape if frames is None else x.shape
        empty = [jnp.zeros((*shape[:-2], size, 0), matrix.dtype) for size in shape[-2:]]
        return Truncation(LowRank(*empty), jnp.zeros((), matrix.dtype))
    u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
    rank = min(rank, s.shape[-1])
    root = jnp.expand_dims(jnp.sqrt(s[..., :rank]), -2)
    left, right = u[..., :rank] * root, jnp.swapaxes(vt, -1, -2)[..., :rank] * root
    if frames is not None:
        left, right = matmul(frames[0], left), matmul(frames[1], right)
    return Truncation(LowRank(left, right), safe_sqrt(tail_curve(s)[rank]))
