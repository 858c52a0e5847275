r"""Edits in factors: what a matrix is, and sums and products that never form it."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from wspace import _checks, tree
from wspace._numerics import accumulator, matmul, placed_like, replicated
from wspace.typing import Leaf, Weights, WeightsLike

__all__ = ["LowRank", "apply", "as_matrix", "materialize"]


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
    left, right = factors_of(x)
    return matmul(left, jnp.swapaxes(right, -1, -2))


def factors_of(x: LowRank) -> tuple[Array, Array]:
    """The two factors in the dtype of arithmetic, once they are seen to belong together."""
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
