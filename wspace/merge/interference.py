r"""How much task vectors interfere: what to know of edits before they are merged.

Edits are displacements from one base: task vectors $\tau_i = \theta_i - \theta_0$, or adapters
with [`LowRank`][wspace.lowrank.LowRank] leaves where the function says so. Entries interfere by
sign, supports by overlap, directions by cosine, and matrices by the singular vectors they share.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from wspace import _checks, _lift, geometry, lowrank, tree
from wspace._numerics import accumulator, matmul
from wspace.lowrank import LowRank
from wspace.lowrank.algebra import side_by_side
from wspace.lowrank.factors import transposed
from wspace.lowrank.truncation import decomposed
from wspace.typing import Leaf, Scalar, WeightsLike

__all__ = [
    "cancellation",
    "cosines",
    "gram",
    "overlap",
    "sign_conflict",
    "sign_disagreement",
    "singular_interference",
]


def sign_conflict(edits: Sequence[WeightsLike]) -> Float[Array, "k k"]:
    r"""Share of the entries that two edits both change which they move in opposite directions.

    $$
    C_{ij} = \frac{\#\{e : \tau_{ie}\, \tau_{je} < 0\}}
                  {\#\{e : \tau_{ie} \ne 0 \ne \tau_{je}\}}
           = \frac12 \left(1 - \frac{\langle s_i, s_j \rangle}
                  {\langle \lvert s_i \rvert, \lvert s_j \rvert \rangle}\right),
    \qquad s = \operatorname{sign} \tau
    $$

    Symmetric, with a zero diagonal, and $1/2$ in expectation for independent edits with signs
    that are fair coins. Scaling an edit by a positive number changes nothing; by a negative one
    it turns $C_{ij}$ into $1 - C_{ij}$.

    Args:
        edits: The $\tau_i$, dense trees of one layout, at least one.

    Returns:
        The matrix, in $[0, 1]$ and at least float32; $0$ for two edits that share no entry.

    Raises:
        ValueError: If there is no edit, or the edits differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> edits = [jnp.array([1.0, -2.0, 3.0, 0.0]), jnp.array([4.0, 5.0, 0.0, 6.0])]
        >>> merge.sign_conflict(edits)
        Array([[0. , 0.5],
               [0.5, 0. ]], dtype=float32)

    References:
        P. Yadav et al., *TIES-Merging: Resolving Interference When Merging Models*, NeurIPS 2023,
        section 3, [arXiv:2306.01708](https://arxiv.org/abs/2306.01708).
    """
    edits = _listed_edits(edits)
    net, both = (_pair_matrix(functools.partial(_total, f), edits) for f in (_net_sign, _both))
    return _fraction(both - net, 2 * both)


def overlap(edits: Sequence[WeightsLike]) -> Float[Array, "k k"]:
    r"""Share of the entries that either of two edits changes which both change.

    $$
    J_{ij} = \frac{\lvert S_i \cap S_j \rvert}{\lvert S_i \cup S_j \rvert},
    \qquad S_i = \{e : \tau_{ie} \ne 0\}
    $$

    The Jaccard index of the supports: symmetric, $1$ between equal supports, $0$ between
    disjoint ones, and $1 - J$ is a metric. For sparse edits, such as trimmed ones; of dense
    task vectors almost every entry differs from zero. Independent random supports of density
    $d$ overlap in about $d / (2 - d)$.

    Args:
        edits: The $\tau_i$, dense trees of one layout, at least one.

    Returns:
        The matrix, in $[0, 1]$ and at least float32; $0$ between two zero edits, also on the
        diagonal.

    Raises:
        ValueError: If there is no edit, or the edits differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.overlap([jnp.array([1.0, 2.0, 0.0, 0.0]), jnp.array([0.0, -3.0, 0.0, 0.0])])
        Array([[1. , 0.5],
               [0.5, 1. ]], dtype=float32)
    """
    both = _pair_matrix(functools.partial(_total, _both), _listed_edits(edits))
    own = jnp.diagonal(both)
    return _fraction(both, own[:, None] + own[None, :] - both)


def sign_disagreement(edits: Sequence[WeightsLike]) -> Scalar:
    r"""Share of the entries that edits change on whose sign they are not unanimous.

    $$
    \frac{\#\{e : \exists\, i, j:\ \tau_{ie}\, \tau_{je} < 0\}}
         {\#\{e : \exists\, i:\ \tau_{ie} \ne 0\}}
    $$

    What an election of signs decides on. It never falls when an edit with no support of its own
    is added. Entries count alike whatever their size, noise included;
    [`cancellation`][wspace.merge.cancellation] weighs them by magnitude.

    Args:
        edits: The $\tau_i$, dense trees of one layout, at least one.

    Returns:
        The share, in $[0, 1]$ and at least float32; $0$ for one edit, or if all are zero.

    Raises:
        ValueError: If there is no edit, or the edits differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> edits = [jnp.array([1.0, -2.0, 3.0, 0.0]), jnp.array([4.0, 5.0, 0.0, 0.0])]
        >>> merge.sign_disagreement(edits)
        Array(0.33333334, dtype=float32)
    """
    edits = _listed_edits(edits)
    return _fraction(_total(_disputed, edits), _total(_changed, edits))


def cancellation(edits: Sequence[WeightsLike]) -> Scalar:
    r"""Share of the mass of edits that their sum loses to opposite signs.

    $$
    1 - \frac{\bigl\lVert \sum_i \tau_i \bigr\rVert_1}{\sum_i \lVert \tau_i \rVert_1}
    $$

    Zero if and only if the edits agree in sign at every entry, one if and only if their sum is
    zero. Scaling all edits together changes nothing; scale each by its coefficient first to see
    what a merge with these coefficients cancels, negative ones included.

    Args:
        edits: The $\tau_i$, dense trees of one layout, at least one.

    Returns:
        The share, in $[0, 1]$ and at least float32; $0$ if all edits are zero.

    Raises:
        ValueError: If there is no edit, or the edits differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.cancellation([jnp.array([3.0, 1.0]), jnp.array([-1.0, 3.0])])
        Array(0.25, dtype=float32)
    """
    edits = _listed_edits(edits)
    return _fraction(_total(_lost, edits), _total(_mass, edits))


def gram(edits: Sequence[PyTree]) -> Float[Array, "k k"]:
    r"""Matrix of inner products of edits, in factored form.

    $$
    G_{ij} = \langle \tau_i, \tau_j \rangle, \qquad
    \langle U_1 V_1^\top, U_2 V_2^\top \rangle
        = \operatorname{tr}\bigl(V_1 U_1^\top U_2 V_2^\top\bigr)
    $$

    What [`geometry.gram`][wspace.geometry.gram] is to points, for edits with factors: nothing is
    multiplied out, ranks may differ, and the matrix is the same in every gauge of the factors.
    The inner product of the factors themselves, laid out as vectors, is not.

    Args:
        edits: The $\tau_i$, trees of one structure with a `LowRank` or a dense array at each
            leaf, at least one.

    Returns:
        The symmetric matrix, in at least float32.

    Raises:
        ValueError: If there is no edit, or the edits differ in structure or in the shape of a
            matrix.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank, merge
        >>> u, v = jnp.array([[3.0], [4.0]]), jnp.array([[1.0]])
        >>> merge.gram([lowrank.LowRank(u, v), lowrank.LowRank(-u / 2, 2 * v)])
        Array([[ 25., -25.],
               [-25.,  25.]], dtype=float32)
    """
    edits = _edits(edits)
    if _are_dense(edits):
        return geometry.inner_products(edits)
    return _pair_matrix(lambda pair: lowrank.vdot(*pair), tree.widened(*edits))


def cosines(edits: Sequence[PyTree]) -> Float[Array, "k k"]:
    r"""Matrix of the cosines of the angles between edits, in factored form.

    $$
    \cos_{ij} = \frac{\langle \tau_i, \tau_j \rangle}{\lVert \tau_i \rVert \lVert \tau_j \rVert}
    $$

    Formed, like [`geometry.cosine`][wspace.geometry.cosine], from sine and cosine of half the
    angle, so that no entry is outside of $[-1, 1]$ and parallel edits have the cosine $\pm 1$.
    The same in every gauge of the factors: the cosine of the factors themselves, laid out as
    vectors, is any number for one pair of matrices.

    Args:
        edits: The $\tau_i$, trees of one structure with a `LowRank` or a dense array at each
            leaf, at least one.

    Returns:
        The symmetric matrix with a diagonal of ones, in at least float32; $1$, as of the angle
        $0$, where either edit is zero.

    Raises:
        ValueError: If there is no edit, or the edits differ in structure or in the shape of a
            matrix.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank, merge
        >>> u, v = jnp.array([[3.0], [4.0]]), jnp.array([[1.0]])
        >>> merge.cosines([lowrank.LowRank(u, v), lowrank.LowRank(-u / 2, 2 * v)])
        Array([[ 1., -1.],
               [-1.,  1.]], dtype=float32)
    """
    edits = _edits(edits)
    if _are_dense(edits):
        return _pair_matrix(lambda pair: geometry.cosine(*pair), edits)
    return _pair_matrix(_edit_cosine, tree.widened(*edits))


def singular_interference(edits: Sequence[PyTree], *, rank: int | None = None) -> Scalar:
    r"""Interference of the singular vectors of edits, summed over their matrices.

    $$
    \begin{gathered}
    \sum_\ell \bigl\lVert (U^\top U - I)\, \Sigma\, (V^\top V - I) \bigr\rVert_1, \\
    U = (U_1 \cdots U_k), \quad V = (V_1 \cdots V_k), \quad
    \Sigma = \operatorname{diag}(\Sigma_1, \dots, \Sigma_k)
    \end{gathered}
    $$

    with $U_i \Sigma_i V_i^\top$ the singular value decomposition of edit $i$ at leaf $\ell$, cut
    to the rank, and $\lVert \cdot \rVert_1$ the sum of absolute entries. Zero for one edit, and
    for edits whose column spaces, or whose row spaces, are orthogonal. It scales with the edits,
    and rotating the rows or the columns of all edits together changes nothing.

    Singular vectors of zero singular values are no part of the edit and are left out, with
    values up to $\max(m, n)\, \varepsilon\, \sigma_1$. All others count fully, however small their
    values, so give the rank that carries the edit. Where singular values repeat, or two of them
    are equal at the cut, the vectors are not unique and neither is the number. Stacks of matrices
    count matrix by matrix; vectors and scalars are left out. No derivative is defined.

    Each matrix is factorized whole; for large ones, pass edits cut by
    [`lowrank.truncate`][wspace.lowrank.truncate] with `method="randomized"`.

    Args:
        edits: The $\tau_i$, trees of one structure with a `LowRank` or a dense array at each
            leaf, at least one. Their ranks may differ.
        rank: How many singular triplets of each matrix count, the largest; all if not given.

    Returns:
        The interference in the units of the edits, in at least float32.
        `tree.per_leaf(singular_interference)` gives the parts, of dense edits.

    Raises:
        ValueError: If there is no edit, `rank` is negative, or the edits differ in structure or
            in the shape of a matrix.
        TypeError: If `rank` is not an integer, or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> x, y = jnp.diag(jnp.array([3.0, 0.0])), jnp.diag(jnp.array([0.0, 2.0]))
        >>> merge.singular_interference([x, y]), merge.singular_interference([x, 2 * x])
        (Array(0., dtype=float32), Array(9., dtype=float32))

    References:
        A. Gargiulo et al., *Task Singular Vectors: Reducing Task Interference in Model Merging*,
        CVPR 2025, [arXiv:2412.00081](https://arxiv.org/abs/2412.00081).
    """
    if rank is not None:
        rank = _checks.rank(rank)
    edits = tree.widened(*_edits(edits))
    rows, _ = side_by_side(**_checks.each("edits", edits))
    parts = [_interference(row, rank) for row in rows if all(len(x.shape) > 1 for x in row)]
    wide = accumulator(*(leaf.dtype for leaf in jax.tree.leaves(edits)))
    return jax.tree.reduce_associative(jnp.add, parts) if parts else jnp.zeros((), wide)


def _listed_edits(edits: Sequence[WeightsLike]) -> list[Any]:
    edits = _checks.listed("edits", edits)
    _checks.same_layout(**_checks.each("edits", edits))
    return edits


def _edits(edits: Sequence[PyTree]) -> list[Any]:
    """Edits of one layout, dense or in factors."""
    edits = _checks.listed("edits", edits)
    side_by_side(**_checks.each("edits", edits))
    return edits


def _are_dense(edits: Sequence[PyTree]) -> bool:
    """Whether no leaf of the edits is in factors."""
    leaves = jax.tree.leaves(edits, is_leaf=_checks.is_factored)
    return not any(map(_checks.is_factored, leaves))


def _pair_matrix(measure: Callable[[Sequence[Any]], Scalar], edits: Sequence[Any]) -> Array:
    """The symmetric matrix of a measure of two edits."""
    count = range(len(edits))
    upper = {(i, j): measure((edits[i], edits[j])) for i in count for j in count if i <= j}
    values = tree.widened(*upper.values())
    upper = dict(zip(upper, values, strict=True))
    return jnp.stack([jnp.stack([upper[min(i, j), max(i, j)] for j in count]) for i in count])


def _fraction(part: Array, whole: Array) -> Array:
    """`part / whole`, and 0 for 0 / 0."""
    return part / jnp.where(whole == 0, 1, whole)


def _total(term: Callable[..., Array], edits: Sequence[WeightsLike]) -> Scalar:
    """The sum of a term of the entries of edits, over all entries."""
    return _summed(term)((), edits)


@functools.cache
def _summed(term: Callable[..., Array]) -> Callable[..., Scalar]:
    @_lift.reduction
    @functools.wraps(term)
    def formula(_: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
        return term(*arrays)

    return formula


# Sums of products and of absolute values, and not of conditions, which XLA writes to memory
# before it adds them.
def _net_sign(x: Array, y: Array) -> Array:
    return jnp.sign(x) * jnp.sign(y)


def _both(x: Array, y: Array) -> Array:
    return jnp.abs(jnp.sign(x) * jnp.sign(y))


def _changed(*xs: Array) -> Array:
    return jnp.sign(_mass(*xs))


def _disputed(*xs: Array) -> Array:
    return jnp.sign(_lost(*map(jnp.sign, xs)))


def _mass(*xs: Array) -> Array:
    return functools.reduce(jnp.add, map(jnp.abs, xs))


def _lost(*xs: Array) -> Array:
    return _mass(*xs) - jnp.abs(functools.reduce(jnp.add, xs))


def _edit_cosine(pair: Sequence[PyTree]) -> Scalar:
    sizes = [lowrank.norm(x) for x in pair]
    undefined = (sizes[0] == 0) | (sizes[1] == 0)
    over = [1 / jnp.where(undefined, 1, size) for size in sizes]
    gap, total = (lowrank.norm(lowrank.combine((over[0], c * over[1]), pair)) for c in (-1, 1))
    # Twice sine and cosine of half the angle.
    sine, cosine = gap**2, total**2
    whole = jnp.where(undefined, 1, sine + cosine)
    return jnp.where(undefined, 1, cosine / whole - sine / whole)


def _interference(row: Sequence[Leaf | LowRank], rank: int | None) -> Scalar:
    lefts, values, rights = zip(*(_triplets(x, rank) for x in row), strict=True)
    edit = np.repeat(np.arange(len(row)), [s.shape[-1] for s in values])
    # The singular vectors of one edit are orthonormal: its own block of the Gram is the identity.
    apart = jnp.asarray(edit[:, None] != edit[None, :], lefts[0].dtype)

    def across(sides: Sequence[Array]) -> Array:
        side = jnp.concatenate(sides, axis=-1)
        product = matmul(transposed(side), side)
        return product * jnp.broadcast_to(apart, product.shape)

    weighted = across(lefts) * jnp.concatenate(values, axis=-1)[..., None, :]
    return jnp.sum(jnp.abs(matmul(weighted, across(rights))))


def _triplets(x: Leaf | LowRank, rank: int | None) -> tuple[Array, Array, Array]:
    """The largest singular triplets, with zeros in place of vectors that are not defined."""
    parts = decomposed(x)
    left, right = (
        side if frame is None else matmul(frame, side)
        for side, frame in zip((parts.left, parts.right), parts.frames, strict=True)
    )
    longest = max(left.shape[-2], right.shape[-2])
    cut = longest * jnp.finfo(left.dtype).eps * parts.values[..., :1]
    left, right = (
        jnp.where((parts.values <= cut)[..., None, :], 0, side)[..., :rank]
        for side in (left, right)
    )
    return left, parts.values[..., :rank], right
