r"""Low-rank edits: a matrix kept as two thin factors.

An edit $U V^\top$ of rank $r$ of an $(m, n)$ matrix is kept as $U$ `(m, r)` and $V$ `(n, r)`,
in float32, and multiplied out only where it is added to weights. Every edit is added:
`apply(base, edit)` is base plus edit.

One function, [`as_matrix`][wspace.lowrank.as_matrix], decides which matrix a leaf is. A leaf of
fewer than two dimensions is a matrix with one column: untouched at rank 0, whole from rank 1.

Singular values need all of a matrix in one place: a sharded leaf is replicated for the
factorization, one leaf at a time, and results that are weights are sharded again.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from wspace import _checks, tree
from wspace._numerics import accumulator, matmul, placed_like, replicated, safe_sqrt
from wspace.typing import Leaf, Scalar, Weights, WeightsLike

__all__ = [
    "LowRank",
    "Truncation",
    "apply",
    "as_matrix",
    "materialize",
    "singular_values",
    "truncate",
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(_checks.Factored):
    r"""A matrix, or a stack of them, as the product of two thin factors.

    $$
    W = U V^\top
    $$

    A frozen pytree that takes the place of one leaf. Only the product has a meaning: the
    factors $U G$ and $V G^{-\top}$ are the same matrix for every invertible $G$.

    Args:
        left: The factor $U$, `(..., m, r)`.
        right: The factor $V$, `(..., n, r)`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace.lowrank import LowRank
        >>> LowRank(left=jnp.ones((3, 1)), right=jnp.ones((2, 1))).shape
        (3, 2)
    """

    left: Float[Array, "*batch m r"]
    right: Float[Array, "*batch n r"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the product, `(..., m, n)`."""
        return (*self.left.shape[:-1], self.right.shape[-2])

    @property
    def rank(self) -> int:
        """Number of columns of the factors, which bounds the rank of the product."""
        return self.left.shape[-1]


class Truncation(NamedTuple):
    """A low-rank edit and how much of the original it leaves out.

    Attributes:
        factors: The edit: a `LowRank`, or a tree with `LowRank` or dense leaves.
        tail: The Frobenius distance between the edit and what it was cut from, over all leaves.
    """

    factors: LowRank | PyTree
    tail: Scalar


def as_matrix(leaf: Leaf) -> Float[Array, "... m n"]:
    """The matrix that a leaf of weights is.

    | dimensions of the leaf | its matrix |
    |---|---|
    | 0, 1 | one column: `(1, 1)`, `(n, 1)` |
    | 2 | itself: `(in, out)` |
    | 3 | a stack of matrices, as of layers: itself |
    | 4, 5 | a convolution `(..., cin, cout)`: `(prod(...) * cin, cout)` |

    Args:
        leaf: An array of at most five dimensions.

    Returns:
        The matrix or stack of matrices, in the leaf's dtype.

    Raises:
        ValueError: If the leaf has more than five dimensions.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank
        >>> lowrank.as_matrix(jnp.ones((3, 3, 16, 32))).shape
        (144, 32)
    """
    leaf = jnp.asarray(leaf)
    if leaf.ndim > 5:
        raise ValueError(
            f"a leaf of shape {leaf.shape} is no matrix, stack of matrices or convolution: "
            "reshape it to two or three dimensions first"
        )
    if leaf.ndim in (2, 3):
        return leaf
    columns = leaf.shape[-1] if leaf.ndim > 3 else 1
    return replicated(leaf).reshape(leaf.size // max(columns, 1), columns)


def materialize(x: LowRank) -> Float[Array, "... m n"]:
    r"""The matrix of a low-rank edit, multiplied out.

    $$
    W = U V^\top
    $$

    Args:
        x: The factors.

    Returns:
        The matrix `(..., m, n)`, in at least float32.

    Raises:
        ValueError: If the factors differ in rank or in stacking.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank
        >>> lowrank.materialize(lowrank.LowRank(jnp.array([[1.0], [2.0]]), jnp.array([[3.0]])))
        Array([[3.],
               [6.]], dtype=float32)
    """
    left, right = _factors(x)
    return matmul(left, jnp.swapaxes(right, -1, -2))


def _factors(x: LowRank) -> tuple[Array, Array]:
    _checks.floating_leaves(left=x.left, right=x.right)
    left, right = jnp.asarray(x.left), jnp.asarray(x.right)
    if min(left.ndim, right.ndim) < 2 or (
        (*left.shape[:-2], left.shape[-1]) != (*right.shape[:-2], right.shape[-1])
    ):
        raise ValueError(
            f"left {left.shape} and right {right.shape} are not the factors of one matrix: "
            "they must be (..., m, r) and (..., n, r)"
        )
    wide = accumulator(left.dtype, right.dtype)
    return left.astype(wide), right.astype(wide)


def apply(base: WeightsLike, edit: PyTree) -> Weights:
    r"""Adds an edit to the weights it was made for.

    $$
    \theta'_\ell = \theta_\ell + U_\ell V_\ell^\top
    \quad\text{or}\quad \theta'_\ell = \theta_\ell + D_\ell
    $$

    Args:
        base: The weights $\theta$.
        edit: A tree of the structure of `base` with a [`LowRank`][wspace.lowrank.LowRank] or a
            dense array at each leaf.

    Returns:
        The edited weights, each leaf in the dtype of that leaf of `base`, rounded once.

    Raises:
        ValueError: If `edit` is not a tree like `base`, or a leaf of it is not of the shape of
            that leaf of `base`, or of the matrix it is.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank
        >>> edit = {"w": lowrank.LowRank(jnp.ones((2, 1)), jnp.ones((2, 1)))}
        >>> lowrank.apply({"w": jnp.eye(2)}, edit)
        {'w': Array([[2., 1.],
               [1., 2.]], dtype=float32)}

    References:
        E. Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022, section 4,
        [arXiv:2106.09685](https://arxiv.org/abs/2106.09685).
    """
    _checks.same_layout(base=base)

    def dense(factors: object, leaf: Array) -> object:
        if not isinstance(factors, LowRank):
            return factors
        matrix = as_matrix(leaf)
        if factors.shape != matrix.shape:
            raise ValueError(
                f"edit has a LowRank of shape {factors.shape} for a leaf of shape {leaf.shape}, "
                f"the matrix {matrix.shape}: an edit fits only the layout it was made for"
            )
        return placed_like(materialize(factors).reshape(leaf.shape), jnp.asarray(leaf))

    leaves, structure = jax.tree.flatten(edit, is_leaf=_checks.is_factored)
    if structure != jax.tree.structure(base):
        raise ValueError(
            "edit must be a tree like base, with a LowRank or a dense array at each leaf: "
            f"got {structure} for {jax.tree.structure(base)}"
        )
    edits = structure.unflatten(map(dense, leaves, jax.tree.leaves(base)))
    _checks.same_layout(base=base, edit=edits)
    return tree.combine((1, 1), (base, edits))


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
    matrix, _ = _core(x)
    if not matrix.size:
        return jnp.zeros((*matrix.shape[:-2], min(matrix.shape[-2:])), matrix.dtype)
    return jnp.linalg.svd(matrix, compute_uv=False)


def _core(x: Leaf | LowRank) -> tuple[Array, tuple[Array, Array] | None]:
    """A matrix with the singular values of `x`; for factors a small one, and its two frames."""
    if not isinstance(x, LowRank):
        _checks.floating_leaves(x=x)
        return replicated(tree.upcast(as_matrix(x))), None
    left, right = (replicated(factor) for factor in _factors(x))
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
    matrix, frames = _core(x)
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
