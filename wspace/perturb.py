r"""Random edits of weights, and directions to look at a loss along.

Every edit is to be added. What is random takes a `key`, first: the key of a leaf is folded from
its path, so that adding, removing or sharding a leaf changes the draw of no other, and a leaf in
half precision gets the draw of one in float32, rounded.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from wspace import _checks, _lift, lowrank, tree
from wspace._numerics import accumulator, safe_sqrt
from wspace.lowrank import LowRank
from wspace.lowrank.factors import matrix_shape
from wspace.typing import Layout, Leaf, Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["filter_normalize", "gaussian", "low_rank_gaussian"]


# The leaf says on which devices to draw, so it is kept although its values are not used.
@jax.jit(static_argnums=2, keep_unused=True)
def _normal(key: Array, leaf: Array, shape: tuple[int, ...] | None = None) -> Array:
    """Normal numbers in the shape and sharding of a leaf, or in another shape on its devices."""
    sharding = jax.typeof(leaf).sharding
    if shape is not None:
        sharding = jax.NamedSharding(sharding.mesh, jax.P(*(None for _ in shape)))
    else:
        shape = leaf.shape
    return jax.random.normal(key, shape, accumulator(leaf.dtype), out_sharding=sharding)


@_lift.elementwise
def _stretched(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (c,), (_, x) = scalars, arrays
    return c * x


def _stretch(norm: ScalarLike, edit: PyTree) -> Scalar:
    """The factor that gives an edit a norm."""
    given = _checks.nonnegative("norm", norm)
    if not any(leaf.size for leaf in jax.tree.leaves(edit)):
        raise ValueError("nothing is drawn for an empty tree or at rank 0: leave norm out")
    size = lowrank.norm(edit)
    return jnp.asarray(given).astype(size.dtype) / size


def gaussian(key: Array, like: WeightsLike, *, norm: ScalarLike | None = None) -> Weights:
    r"""Random edit with independent normal entries.

    $$
    D_j \sim \mathcal{N}(0, 1), \qquad\text{or}\qquad
    D = \rho\, \frac{Z}{\lVert Z \rVert}, \quad Z_j \sim \mathcal{N}(0, 1)
    $$

    The second form has exactly the norm $\rho$ over the whole tree, and every direction is as
    likely as every other. Multiply by a standard deviation with
    [`tree.combine`][wspace.tree.combine], or add the edit by the same function.

    Args:
        key: A random key.
        like: A tree of the layout to draw; its values are not used.
        norm: The norm $\rho \ge 0$. If not given, normal entries are left as they come: their norm
            is about the root of their count.

    Returns:
        The edit, each leaf in the dtype and sharding of that leaf of `like`, drawn in at least
        float32 and rounded once.

    Raises:
        ValueError: If `norm` is negative or not finite (NaN if it is traced), or is given for a
            tree without entries.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from wspace import perturb, tree
        >>> weights = {"w": jnp.zeros((100, 10)), "b": jnp.zeros(10)}
        >>> edit = perturb.gaussian(jax.random.key(0), weights, norm=2.0)
        >>> f"{tree.norm(edit):.5f}"
        '2.00000'
        >>> moved = tree.combine((1.0, 1.0), (weights, edit))
    """
    _checks.same_layout(like=like)
    noise = jax.tree.map(_normal, tree.split_key_like(key, like), like)
    return _stretched((1 if norm is None else _stretch(norm, noise),), (like, noise))


def low_rank_gaussian(
    key: Array, like: WeightsLike, rank: int, *, norm: ScalarLike | None = None
) -> PyTree:
    r"""Random edit of given rank in every matrix, in factors.

    $$
    D_\ell = \frac{1}{\sqrt r}\, U_\ell V_\ell^\top, \qquad U_{\ell j}, V_{\ell j} \sim
    \mathcal{N}(0, 1), \qquad\text{or}\qquad D = \rho\, \frac{D}{\lVert D \rVert}
    $$

    Entries have mean $0$ and variance $1$; they are uncorrelated but not independent, being
    products of far fewer numbers. Vectors and scalars are matrices with one column: they do not
    move at rank 0, and from rank 1 they get the draw of
    [`gaussian`][wspace.perturb.gaussian].

    Args:
        key: A random key.
        like: A tree of the layout to draw; its values are not used.
        rank: The rank $r \ge 0$ in every matrix, slice by slice in a stack; cut to what a matrix
            has.
        norm: The norm $\rho \ge 0$ of the whole edit; if not given, the draw is left as it comes.

    Returns:
        A tree with a [`LowRank`][wspace.lowrank.LowRank] for every matrix, stack or convolution
        and a dense array for every vector and scalar, all in at least float32, to be added by
        [`lowrank.apply`][wspace.lowrank.apply].

    Raises:
        ValueError: If `rank` is negative, a leaf has more than five dimensions, `norm` is
            negative or not finite (NaN if it is traced), or is given at rank 0 or for a tree
            without entries.
        TypeError: If `rank` is not an integer, or a leaf is not floating-point.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from wspace import lowrank, perturb
        >>> weights = {"w": jnp.zeros((100, 10)), "b": jnp.zeros(10)}
        >>> edit = perturb.low_rank_gaussian(jax.random.key(0), weights, 2, norm=3.0)
        >>> edit["w"].left.shape, edit["w"].right.shape, edit["b"].shape
        ((100, 2), (10, 2), (10,))
        >>> f"{lowrank.norm(edit):.5f}"
        '3.00000'
    """
    _checks.same_layout(like=like)
    rank = _checks.rank(rank)

    def draw(key: Array, leaf: Leaf) -> Array | LowRank:
        *stack, m, n = matrix_shape(leaf.shape)
        if leaf.ndim < 2:
            dense = _normal(key, leaf)
            return dense if rank else 0 * dense
        r = min(rank, m, n)
        sides = zip(jax.random.split(key), (m, n), strict=True)
        factors = [_normal(side_key, leaf, (*stack, side, r)) for side_key, side in sides]
        return LowRank(*(factor / max(r, 1) ** 0.25 for factor in factors))

    edit = jax.tree.map(draw, tree.split_key_like(key, like), like)
    if norm is None:
        return edit
    return lowrank.scale(_stretch(norm, edit if rank else ()), edit)


def _filters(layout: Layout, arrays: Sequence[Array]) -> Array:
    direction, like = arrays
    stack = len(matrix_shape(like.shape)) - 2
    if like.ndim < 2:
        return 0 * direction
    # The rows of its matrix, without forming it: a sharded leaf stays where it lies.
    first, last = (stack, like.ndim - 1) if layout == "in_out" else (stack + 1, like.ndim)
    rows = tuple(range(first, last))
    square, wanted = (jnp.sum(x * x, axis=rows, keepdims=True) for x in (direction, like))
    nothing = square == 0
    ratio = safe_sqrt(wanted) / jnp.sqrt(jnp.where(nothing, 1, square))
    return jnp.where(nothing, 0, ratio) * direction


@functools.partial(_lift.elementwise, scope="leaf")
def _filters_last(_: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    return _filters("in_out", arrays)


@functools.partial(_lift.elementwise, scope="leaf")
def _filters_first(_: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    return _filters("out_in", arrays)


def filter_normalize(
    direction: WeightsLike, like: WeightsLike, *, layout: Layout = "in_out"
) -> Weights:
    r"""Scales every filter of a direction to the norm of that filter of the weights.

    Known as filter normalization, of pictures of the loss landscape.

    $$
    d_{\ell j} \leftarrow \frac{\lVert \theta_{\ell j} \rVert}{\lVert d_{\ell j} \rVert}\,
    d_{\ell j}
    $$

    A filter $j$ is a column of the matrix that the leaf is
    ([`as_matrix`][wspace.lowrank.as_matrix]), the weights into one output: the last axis, or in the
    layout `"out_in"` the first, slice by slice in a stack. Vectors and scalars, such as biases and
    the weights of normalizations, are set to zero, as by Li et al.

    Rescaling a filter of the weights, which changes no output where a normalization follows,
    rescales the filter of the direction, so that pictures of a loss along such directions can be
    compared between models. The length of the direction does not matter, and matrices of
    weights are their own normalization.

    Args:
        direction: The direction $d$, such as [`gaussian`][wspace.perturb.gaussian] draws.
        like: The weights $\theta$, of the same layout.
        layout: How the layers store their matrices: `"in_out"`, or `"out_in"` as torch and equinox
            do.

    Returns:
        The direction, each leaf in the dtype and sharding of that leaf of `direction`. A zero
        filter stays zero, and its derivatives are zero. Squares neither overflow nor underflow
        in the range of [`tree.vdot`][wspace.tree.vdot].

    Raises:
        ValueError: If the trees differ in structure or in a leaf's shape, or a leaf has more than
            five dimensions.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import perturb
        >>> direction, weights = jnp.array([[3.0, 0.0], [4.0, 2.0]]), 10 * jnp.eye(2)
        >>> perturb.filter_normalize(direction, weights)
        Array([[ 6.,  0.],
               [ 8., 10.]], dtype=float32)

    References:
        H. Li et al., *Visualizing the Loss Landscape of Neural Nets*, NeurIPS 2018, section 4,
        [arXiv:1712.09913](https://arxiv.org/abs/1712.09913).
    """
    _checks.same_layout(direction=direction, like=like)
    _checks.known_layout(layout)
    filters = _filters_last if layout == "in_out" else _filters_first
    return filters((), (direction, like))
