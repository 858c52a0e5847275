r"""A matrix in two thin factors, and which matrix a leaf of weights is."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wspace import _checks, tree
from wspace._leaves import Factored
from wspace._numerics import accumulator, matmul, placed_like, replicated
from wspace._records import record
from wspace._words import described
from wspace.typing import Layout, Leaf

__all__ = ["LowRank", "as_matrix", "materialize"]


@record
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank(Factored):
    r"""A matrix, or a stack of them, as the product of two thin factors.

    $$
    W = U V^\top
    $$

    A frozen pytree that takes the place of one leaf. Only the product has a meaning: the
    factors $U G$ and $V G^{-\top}$ are the same matrix for every invertible $G$. Products with
    matrices and vectors, `edit @ x` and `x @ edit`, go through the factors.

    Args:
        left: The factor $U$, `(..., m, r)`.
        right: The factor $V$, `(..., n, r)`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace.lowrank import LowRank
        >>> edit = LowRank(left=jnp.ones((3, 1)), right=jnp.ones((2, 1)))
        >>> edit.shape
        (3, 2)
        >>> edit @ jnp.array([1.0, 2.0]), jnp.array([1.0, 2.0, 3.0]) @ edit
        (Array([3., 3., 3.], dtype=float32), Array([6., 6.], dtype=float32))
    """

    left: Float[Array | np.ndarray, "*batch m r"]
    right: Float[Array | np.ndarray, "*batch n r"]

    __array_ufunc__ = None  # a NumPy array then leaves `array @ edit` to `__rmatmul__`

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the product, `(..., m, n)`."""
        return (*self.left.shape[:-1], self.right.shape[-2])

    @property
    def rank(self) -> int:
        """Number of columns of the factors, which bounds the rank of the product."""
        return self.left.shape[-1]

    def __matmul__(self, x: Leaf) -> Array:
        """The product with a matrix `(..., n, k)` or a vector `(n,)`."""
        return product(self, x)

    def __rmatmul__(self, x: Leaf) -> Array:
        """The product of a matrix `(..., k, m)`, such as inputs, or of a vector `(m,)` with it."""
        return product(x, self)


def product(x: Leaf | LowRank, y: Leaf | LowRank) -> Array:
    """Product of matrices, dense or factored, or vectors, in the dtype of arithmetic."""
    if not isinstance(x, LowRank) and jnp.ndim(x) == 1:
        return product(jnp.asarray(x)[None, :], y)[..., 0, :]
    if not isinstance(y, LowRank) and jnp.ndim(y) == 1:
        return product(x, jnp.asarray(y)[:, None])[..., 0]
    if isinstance(x, LowRank):
        left, right = factors_of(x)
        return product(left, product(transposed(right), y))
    if isinstance(y, LowRank):
        left, right = factors_of(y)
        return product(product(x, left), transposed(right))
    _checks.floating_leaves(x=x, y=y)
    return matmul(*tree.widened(x, y))


def transposed(x: Float[Array, "... m n"]) -> Float[Array, "... n m"]:
    """The matrix, or every matrix of a stack, transposed."""
    return jnp.swapaxes(x, -1, -2)


def matrix_shape(shape: tuple[int, ...], layout: Layout = "in_out") -> tuple[int, ...]:
    """Shape of the matrix that a leaf of given shape is."""
    if len(shape) > 5:
        raise ValueError(
            f"a leaf of shape {shape} is no matrix, stack of matrices or convolution: "
            "reshape it to two or three dimensions first"
        )
    if layout == "out_in" and len(shape) > 3:
        return (math.prod(shape[1:]), shape[0])
    if len(shape) in (2, 3):
        return shape if layout == "in_out" else (*shape[:-2], shape[-1], shape[-2])
    columns = shape[-1:] if len(shape) > 3 else (1,)
    return (math.prod(shape[:-1] if len(shape) > 3 else shape), *columns)


def as_matrix(leaf: Leaf, *, layout: Layout = "in_out") -> Float[Array, "... m n"]:
    """The matrix that a leaf of weights is.

    | dimensions of the leaf | its matrix | of the layout `"out_in"` |
    |---|---|---|
    | 0, 1 | one column: `(1, 1)`, `(n, 1)` | the same |
    | 2 | itself: `(in, out)` | its transpose |
    | 3 | a stack of matrices, as of layers: itself | a stack of transposes |
    | 4, 5 | a convolution: `(prod(...) * cin, cout)` | a convolution: `(cin * prod(...), cout)` |

    A convolution is stored as `(..., cin, cout)`, in the layout `"out_in"` as `(cout, cin, ...)`.
    The rows of its matrix are the entries of a patch: in the layout `"out_in"` with the entries of
    a channel together, as `torch.nn.Unfold` and `jax.lax.conv_general_dilated_patches` have them.

    Args:
        leaf: An array of at most five dimensions.
        layout: How the layer stores it: `"in_out"`, or `"out_in"` as torch and equinox do.

    Returns:
        The matrix or stack of matrices, in the leaf's dtype.

    Raises:
        ValueError: If the leaf has more than five dimensions, or `layout` is unknown.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank
        >>> lowrank.as_matrix(jnp.ones((3, 3, 16, 32))).shape
        (144, 32)
        >>> lowrank.as_matrix(jnp.ones((32, 16, 3, 3)), layout="out_in").shape
        (144, 32)
    """
    _checks.no_tree(leaf=leaf)
    _checks.known_layout(layout)
    leaf = jnp.asarray(leaf)
    if layout == "out_in" and leaf.ndim > 1:
        *stack, m, n = matrix_shape(leaf.shape, layout)
        return transposed(_reshaped(leaf, (*stack, n, m)))
    return _reshaped(leaf, matrix_shape(leaf.shape))


def _reshaped(x: Array, shape: tuple[int, ...]) -> Array:
    return x if x.shape == shape else replicated(x).reshape(shape)


def from_matrix(matrix: Array, like: Array, layout: Layout) -> Array:
    """The leaf that a matrix is of, in the shape and the place of `like`."""
    stored = transposed(matrix) if layout == "out_in" and like.ndim > 1 else matrix
    return placed_like(stored.reshape(like.shape), like)


def turned(x: LowRank, layout: Layout) -> LowRank:
    """The factors of a matrix for those of the matrix as it is stored, and the other way round."""
    return x if layout == "in_out" else LowRank(x.right, x.left)


def other_side(side: tuple[int, ...], shape: tuple[int, ...], layout: Layout) -> str:
    """What to do about a matrix for the inputs of a leaf that is one for its outputs, if it is."""
    other = "out_in" if layout == "in_out" else "in_out"
    fits = len(shape) > 1 and side[-1:] == matrix_shape(shape, other)[-2:-1]
    return _checks.in_other_layout(layout, fits)


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
    return matmul(left, transposed(right))


def factors_of(x: LowRank, name: str = "x") -> tuple[Array, Array]:
    """The two factors, in one dtype, once they are seen to belong together."""
    if not isinstance(x, LowRank):
        raise TypeError(
            f"{name} must be one edit in factors, a lowrank.LowRank, got {described(x)}: give one "
            "leaf, or add a tree of edits to its base by lowrank.apply"
        )
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


def core_of(x: Leaf | LowRank) -> tuple[Array, tuple[Array | None, Array | None]]:
    r"""A matrix with the singular values of `x`, small for factors, and the frames it is seen in.

    $U = Q_U R_U$ and $V = Q_V R_V$ leave $R_U R_V^\top$. A factor that is not taller than wide is
    its own core, in no frame; so is a dense matrix.
    """
    if not isinstance(x, LowRank):
        _checks.one_array(x=x)
        return replicated(tree.upcast(as_matrix(x))), (None, None)
    (left, frame), (right, other) = map(_triangular, factors_of(x))
    return matmul(left, transposed(right)), (frame, other)


def _triangular(factor: Array) -> tuple[Array, Array | None]:
    factor = replicated(factor)
    *stack, rows, rank = factor.shape
    if rows <= rank:
        return factor, None
    if not factor.size:
        return jnp.zeros((*stack, rank, rank), factor.dtype), factor
    frame, core = jnp.linalg.qr(factor)
    return core, frame
