r"""Sums, inner products and norms of edits, in factors: nothing is multiplied out."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import PyTreeDef
from jaxtyping import Array, PyTree

from wspace import _checks, _lift, tree
from wspace._numerics import (
    exponent_of,
    length,
    placed_like,
    power_of_two,
    replicated,
)
from wspace.lowrank.factors import (
    LowRank,
    as_matrix,
    core_of,
    factors_of,
    materialize,
    matrix_shape,
    product,
    transposed,
)
from wspace.typing import Coefficients, Leaf, Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["add", "apply", "combine", "norm", "scale", "vdot"]


def side_by_side(**edits: PyTree) -> tuple[list[tuple[Leaf | LowRank, ...]], PyTreeDef]:
    """The leaves of edits of one layout, by name, and their structure."""
    flat = [jax.tree.flatten(x, is_leaf=_checks.is_factored) for x in edits.values()]
    rows = list(zip(*(leaves for leaves, _ in flat), strict=False))
    outlines = {
        name: structure.unflatten(map(_outline, leaves, [*rows, *[()] * len(leaves)]))
        for name, (leaves, structure) in zip(edits, flat, strict=True)
    }
    _checks.same_layout(**outlines)
    return rows, flat[0][1]


def _outline(leaf: Leaf | LowRank, row: Sequence[Leaf | LowRank]) -> object:
    """What the layout of a leaf is: factors fit every dense leaf that is their matrix."""
    if not isinstance(leaf, LowRank):
        return leaf
    shapes = [jnp.shape(x) for x in row if not isinstance(x, LowRank)]
    fitting = (shape for shape in shapes if matrix_shape(shape) == leaf.shape)
    return jax.ShapeDtypeStruct(next(fitting, leaf.shape), factors_of(leaf)[0].dtype)


def combine(coefficients: Coefficients, edits: Sequence[PyTree]) -> PyTree:
    r"""Linear combination of edits, exact in factors.

    Known as `add_weighted_adapter` of PEFT, here its `cat`; `truncate` of the result is its `svd`.

    $$
    \sum_i c_i\, U_i V_i^\top
        = \begin{pmatrix} c_1 U_1 & c_2 U_2 & \cdots \end{pmatrix}
          \begin{pmatrix} V_1 & V_2 & \cdots \end{pmatrix}^\top
    $$

    Nothing is approximated and nothing multiplied out: ranks add, different ranks are welcome,
    and the coefficients have any sign. [`truncate`][wspace.lowrank.truncate] the sum to a lower
    rank, with what that leaves out. The result is the same whatever the gauge of the factors,
    unlike a sum of the factors themselves, which holds products of one edit's $U$ with another
    one's $V$.

    Args:
        coefficients: The $c_i$, one an edit; never normalized.
        edits: Trees of one structure with a `LowRank` or a dense array at each leaf, at least one.

    Returns:
        The combination, a `LowRank` in at least float32 where all edits have one, and a dense
            array, in the dtype of the first edit's leaf, where one of them has.

    Raises:
        ValueError: If the counts differ or are zero, a known coefficient is not finite, or the
            edits differ in structure or in the shape of a matrix.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank
        >>> x = lowrank.LowRank(jnp.array([[1.0], [0.0]]), jnp.array([[1.0], [1.0]]))
        >>> y = lowrank.LowRank(jnp.array([[0.0], [1.0]]), jnp.array([[2.0], [0.0]]))
        >>> total = lowrank.combine((2.0, -1.0), (x, y))
        >>> total.rank, lowrank.materialize(total)
        (2, Array([[ 2.,  2.],
               [-2.,  0.]], dtype=float32))
    """
    edits = _checks.listed("edits", edits)
    scalars = _checks.scalars("coefficients", coefficients, len(edits))
    return _combined(scalars, **_checks.each("edits", edits))


def _combined(scalars: Sequence[ScalarLike], **edits: PyTree) -> PyTree:
    """A combination of edits by the names that errors call them."""
    rows, structure = side_by_side(**edits)
    return structure.unflatten(_combined_leaf(scalars, leaves) for leaves in rows)


def _combined_leaf(
    scalars: Sequence[ScalarLike], leaves: Sequence[Leaf | LowRank]
) -> Leaf | LowRank:
    like = next((leaf for leaf in leaves if not isinstance(leaf, LowRank)), None)
    if like is not None:
        return tree.combine(scalars, [_dense_like(leaf, like) for leaf in leaves])
    lefts, rights = zip(*(factors_of(x) for x in leaves if isinstance(x, LowRank)), strict=True)
    lefts, rights = (tree.widened(*factors) for factors in (lefts, rights))
    lefts = [tree.combine((c,), (left,)) for c, left in zip(scalars, lefts, strict=True)]
    return LowRank(jnp.concatenate(lefts, axis=-1), jnp.concatenate(rights, axis=-1))


def _dense_like(edit: Leaf | LowRank, like: Leaf) -> Leaf:
    """An edit multiplied out in the layout of a dense leaf."""
    if not isinstance(edit, LowRank):
        return edit
    like = jnp.asarray(like)
    return placed_like(materialize(edit).reshape(like.shape), like)


def add(x: PyTree, y: PyTree) -> PyTree:
    r"""Sum of two edits, exact in factors.

    $$
    U_1 V_1^\top + U_2 V_2^\top
        = \begin{pmatrix} U_1 & U_2 \end{pmatrix} \begin{pmatrix} V_1 & V_2 \end{pmatrix}^\top
    $$

    Args:
        x: An edit: a `LowRank`, or a tree with `LowRank` or dense leaves.
        y: Another, of the same layout; its ranks may differ.

    Returns:
        The sum, as [`combine`][wspace.lowrank.combine] with coefficients $1$ gives it.

    Raises:
        ValueError: If the edits differ in structure or in the shape of a matrix.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank
        >>> x = lowrank.LowRank(jnp.ones((3, 2)), jnp.ones((4, 2)))
        >>> y = lowrank.LowRank(jnp.ones((3, 5)), jnp.ones((4, 5)))
        >>> lowrank.add(x, y).rank
        7
    """
    return _combined((1, 1), x=x, y=y)


def scale(c: ScalarLike, x: PyTree) -> PyTree:
    r"""An edit times a number of any sign.

    $$
    c\, U V^\top = (c\, U)\, V^\top
    $$

    Args:
        c: The number. The negative of an edit has *one* factor negated.
        x: The edit: a `LowRank`, or a tree with `LowRank` or dense leaves.

    Returns:
        The edit times $c$, of the same ranks.

    Raises:
        ValueError: If `c` is known and not finite.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank
        >>> x = lowrank.LowRank(jnp.array([[1.0]]), jnp.array([[2.0]]))
        >>> lowrank.materialize(lowrank.scale(-3.0, x))
        Array([[-6.]], dtype=float32)
    """
    return _combined([_checks.scalar("c", c)], x=x)


def vdot(x: PyTree, y: PyTree) -> Scalar:
    r"""Inner product of two edits over all leaves, in factored form.

    $$
    \langle U_1 V_1^\top, U_2 V_2^\top \rangle
        = \operatorname{sum}\bigl((U_1^\top U_2) \circ (V_1^\top V_2)\bigr), \qquad
    \langle U V^\top, D \rangle = \operatorname{sum}\bigl(U \circ (D V)\bigr)
    $$

    Symmetric, bilinear and the same in every gauge, however unequal the factors are; it rounds at
    the size of the factors. The cosine of two edits needs nothing else.

    Args:
        x: An edit: a `LowRank`, or a tree with `LowRank` or dense leaves.
        y: Another, of the same layout; its ranks may differ.

    Returns:
        A scalar in at least float32.

    Raises:
        ValueError: If the edits differ in structure or in the shape of a matrix.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank
        >>> x = lowrank.LowRank(jnp.array([[1.0], [2.0]]), jnp.array([[3.0]]))
        >>> lowrank.vdot(x, jnp.array([[1.0], [1.0]]))
        Array(9., dtype=float32)
    """
    rows, _ = side_by_side(x=x, y=y)
    wide = tree.widened(*(_vdot(*leaves) for leaves in rows))
    return jax.tree.reduce_associative(jnp.add, wide) if wide else jnp.zeros(())


def _vdot(x: Leaf | LowRank, y: Leaf | LowRank) -> Scalar:
    if not isinstance(x, LowRank):
        x, y = y, x
    if not isinstance(x, LowRank):
        return tree.vdot(x, y)
    left, right = _balanced(x)
    if isinstance(y, LowRank):
        other_left, other_right = _balanced(y)
        return tree.vdot(
            product(transposed(left), other_left), product(transposed(right), other_right)
        )
    return tree.vdot(replicated(left), product(as_matrix(y), right))


def _gauge(left: Array, right: Array) -> tuple[Array, Array]:
    """What to multiply the columns of two factors by, so that each has its length from both.

    Powers of two, so that the product stays the same exactly. In another gauge the inner products
    of the columns of one factor may be out of range.
    """
    ours, theirs = (
        exponent_of(jnp.max(jnp.abs(factor), axis=-2, keepdims=True, initial=0))
        for factor in (left, right)
    )
    shift, one = (ours - theirs) // 2, jnp.ones((), left.dtype)
    return jnp.ldexp(one, -shift), jnp.ldexp(one, shift)


def _balanced(x: LowRank) -> tuple[Array, Array]:
    left, right = factors_of(x)
    ours, theirs = _gauge(left, right)
    return left * ours, right * theirs


def norm(x: PyTree) -> Scalar:
    r"""Frobenius norm of an edit over all leaves, in factored form.

    $$
    \lVert U V^\top \rVert_F = \lVert R_U R_V^\top \rVert_F,
    \qquad U = Q_U R_U, \quad V = Q_V R_V
    $$

    As accurate as the norm of the matrix: an edit minus itself in another gauge has norm zero to
    rounding, where $\sqrt{\langle x, x \rangle}$ keeps only half the digits.

    Args:
        x: The edit: a `LowRank`, or a tree with `LowRank` or dense leaves.

    Returns:
        A scalar in at least float32. Its derivatives exist for all factors, dependent columns
            included; at the zero edit the gradient is zero.

    Raises:
        ValueError: If the factors of a leaf do not match.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank
        >>> lowrank.norm(lowrank.LowRank(jnp.array([[3.0], [4.0]]), jnp.array([[2.0]])))
        Array(10., dtype=float32)
    """
    rows, _ = side_by_side(x=x)
    wide = tree.widened(*(_norm(leaf) for (leaf,) in rows))
    return length(jnp.stack(wide)) if wide else jnp.zeros(())


def _norm(x: Leaf | LowRank) -> Scalar:
    return _factored_norm(*factors_of(x)) if isinstance(x, LowRank) else tree.norm(x)


@jax.custom_jvp
def _factored_norm(left: Array, right: Array) -> Scalar:
    core, _ = core_of(LowRank(left, right))
    return length(core)


# By inner products of the factors: those of triangular cores ask for independent columns.
@_factored_norm.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (left, right), (d_left, d_right) = primals, tangents
    value = _factored_norm(left, right)
    unit, (ours, theirs) = power_of_two(value), _gauge(left, right)
    left, right = left * (ours / unit), right * theirs
    d_left, d_right = d_left * (ours / unit), d_right * theirs
    rate = tree.vdot(
        product(transposed(d_left), left), product(transposed(right), right)
    ) + tree.vdot(product(transposed(left), left), product(transposed(d_right), right))
    share = value / unit
    return value, unit * jnp.where(share == 0, 0, rate / jnp.where(share == 0, 1, share))


def apply(base: WeightsLike, edit: PyTree) -> Weights:
    r"""Adds an edit to the weights it was made for.

    Known as merging an adapter: `merge_and_unload` of PEFT.

    $$
    \theta'_\ell = \theta_\ell + U_\ell V_\ell^\top
    \quad\text{or}\quad \theta'_\ell = \theta_\ell + D_\ell
    $$

    Args:
        base: The weights $\theta$.
        edit: A tree of the structure of `base` with a [`LowRank`][wspace.lowrank.LowRank] or a
            dense array at each leaf. Where the rank is 0 the leaf of `base` comes back.

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
    rows, structure = side_by_side(base=base, edit=edit)
    dense = [(leaf, change) for leaf, change in rows if not isinstance(change, LowRank)]
    moved = iter(_sum((), list(map(list, zip(*dense, strict=True)))) if dense else [])
    return structure.unflatten(
        _edited(leaf, change) if isinstance(change, LowRank) else next(moved)
        for leaf, change in rows
    )


@_lift.elementwise
def _sum(_: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    base, edit = arrays
    return base + edit


def _edited(leaf: Any, edit: LowRank) -> Array:
    # One by one, so that no more than one product is held beside the result.
    if not edit.rank:
        return jnp.asarray(leaf)
    return _sum((), (leaf, _dense_like(edit, leaf)))
