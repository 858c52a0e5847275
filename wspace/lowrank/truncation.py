r"""The nearest edit of given rank, and how far it is from what it was cut from."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.tree_util import tree_flatten_with_path
from jaxtyping import Array, Bool, Float, PyTree

from wspace import _checks, _lift, tree
from wspace._numerics import length, matmul, power_of_two, safe_sqrt
from wspace._records import record
from wspace.lowrank.algebra import side_by_side
from wspace.lowrank.factors import (
    LowRank,
    as_matrix,
    core_of,
    factors_of,
    other_side,
    product,
    transposed,
    turned,
)
from wspace.lowrank.spectrum import kept_or_left, rank_for, tails_of
from wspace.typing import Layout, Leaf, Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["Truncation", "extract", "truncate", "truncate_outputs"]

Method: TypeAlias = Literal["exact", "randomized"]


@record
class Truncation(NamedTuple):
    """A low-rank edit and how much of the original it leaves out.

    Attributes:
        factors: The edit: a `LowRank`, or a tree with `LowRank` or dense leaves.
        tail: The Frobenius distance between the edit and what it was cut from, over all leaves.
        approximate: Whether an edit of the same rank may come nearer. The tail belongs to
            this edit in either case.
    """

    factors: LowRank | PyTree
    tail: Scalar
    approximate: Bool[Array, ""]


def truncate(
    x: PyTree[Leaf | LowRank],
    rank: int | None = None,
    *,
    energy: ScalarLike | None = None,
    tail: ScalarLike | None = None,
    vectors: bool = True,
    method: Method = "exact",
    key: Array | None = None,
    block: int | None = None,
    steps: int = 5,
) -> Truncation:
    r"""The nearest matrix of given rank, in factors, and its distance.

    $$
    X_r = \sum_{i \le r} \sigma_i\, u_i v_i^\top, \qquad
    \lVert X - X_r \rVert_F = \sqrt{\textstyle\sum_{i > r} \sigma_i^2}
    $$

    No matrix of that rank is nearer in the Frobenius, spectral or any other unitarily
    invariant norm. In the Frobenius norm the nearest is unique if and only if $\sigma_r >
    \sigma_{r+1}$ or both are $0$; in the spectral norm others may be as near. The factors
    are balanced, $U \sqrt\Sigma$ and $V \sqrt\Sigma$, of equal norm. A stack is cut slice by
    slice, at one rank. Factors are cut by way of a core of the size of their rank, the product
    is never formed; cutting to $\min(m, n, r)$ compresses them without loss.

    Every matrix of a tree is cut by itself: to the one rank, or to the least rank that keeps this
    `energy` of that matrix or leaves this `tail` of it. The tree then keeps at least the same share
    of its own squared norm. Its tails combine: the `tail` that is returned,
    $(\sum_\ell \lVert X_\ell - D_\ell \rVert_F^2)^{1/2}$, is the distance of all leaves, at most
    $\sqrt{1 - \eta}\,\lVert X \rVert$ or $\tau$ times the root of the number of leaves. Vectors
    and scalars in a tree are matrices with one column: left out at rank 0, else kept whole.

    | method | how | tail | cost |
    |---|---|---|---|
    | `"exact"` | all singular values | summed over those left out | $O(m n \min(m, n))$ |
    | `"randomized"` | block Krylov space | measured, $X$ minus the factors | $O(m n r)$ a step |

    The randomized tail is measured on the factors returned, so it is never below the exact one but
    for rounding; it exceeds the exact one by little where singular values fall within `steps`
    blocks. Where the blocks would fill the matrix, and for factors, the exact method is the cheaper
    one and is taken. Figures are on the page *Low-rank edits* of the docs.

    An exact tail has derivatives where
    [`singular_values`][wspace.lowrank.singular_values] has them; derivatives of the factors are not
    defined where singular values repeat.

    Args:
        x: A matrix or a stack of them, dense or factored, or a tree of such leaves, such as an edit
            or a task vector.
        rank: The rank, at least 0; above $\min(m, n)$ it is cut to that, where the tail is $0$.
        energy: In place of a rank, the share $\eta$ in $(0, 1]$ of the squared norm of each matrix
            that its least rank must keep, as in [`rank_for`][wspace.lowrank.rank_for].
        tail: In place of a rank, the distance $\tau \ge 0$ that the least rank of each matrix may
            leave.
        vectors: Whether vectors and scalars are kept as the rank says; if not, they are left out
            and count in the tail, as for adapters that edit matrices alone.
        method: `"exact"` or `"randomized"`. The randomized one needs a rank.
        key: A random key, for the randomized method alone; in a tree it is folded with the path of
            every leaf.
        block: Rows in a block of the randomized method; the rank if not given.
        steps: Steps of the randomized method, at least 0.

    Returns:
        A [`Truncation`][wspace.lowrank.Truncation] with the `tail` over the whole stack or tree.
            `factors` is a `LowRank` in at least float32; of a tree, a tree of them for matrices,
            stacks and convolutions, with dense leaves for vectors and scalars.

    Raises:
        ValueError: If `rank` is negative; not exactly one of rank, energy and tail is given, or
            one is out of its domain; the method is unknown or lacks its key, its rank, or blocks
            that hold the rank; the factors do not match; or a value known is NaN or infinite
            (traced, the result is NaN).
        TypeError: If `rank`, `block` or `steps` is not an integer, `energy` or `tail` asks for a
            rank that depends on traced values, or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank
        >>> cut = lowrank.truncate(jnp.array([[4.0, 0.0], [0.0, 3.0]]), 1)
        >>> lowrank.materialize(cut.factors), cut.tail
        (Array([[4., 0.],
               [0., 0.]], dtype=float32), Array(3., dtype=float32))
        >>> edit = {"w": jnp.diag(jnp.array([4.0, 3.0])), "b": jnp.ones(2)}
        >>> cut = lowrank.truncate(edit, energy=0.6)
        >>> cut.factors["w"].rank, cut.factors["b"], cut.tail
        (1, Array([1., 1.], dtype=float32), Array(3., dtype=float32))

    References:
        C. Eckart, G. Young, *The approximation of one matrix by another of lower rank*,
        Psychometrika 1, 1936; L. Mirsky, *Symmetric gauge functions and unitarily invariant
        norms*, Quarterly Journal of Mathematics 11, 1960. Block Krylov: C. Musco, C. Musco,
        *Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value
        Decomposition*, NeurIPS 2015, [arXiv:1504.05477](https://arxiv.org/abs/1504.05477).
    """
    vectors = _checks.flag("vectors", vectors)
    cut = cut_by(rank, energy, tail, method=method, key=key, block=block, steps=steps)
    rows, _ = side_by_side(x=x)
    _checks.finite(x=x)
    if len(rows) == 1 and rows[0][0] is x:
        return _truncated(x, cut if vectors or len(x.shape) > 1 else Cut(0), key)
    return truncate_leaves(x, cut, vectors=vectors, key=key)


class Cut(NamedTuple):
    """How every matrix is cut: to a rank, or to the least that keeps or leaves as much of it."""

    rank: int | None
    energy: ScalarLike | None = None
    tail: ScalarLike | None = None
    method: Method = "exact"
    block: int | None = None
    steps: int = 5

    def rank_of(self, values: Callable[[], Array]) -> int:
        """The rank of a matrix with these singular values, which are not asked for a known one."""
        if self.rank is not None:
            return self.rank
        found = values()
        if _checks.is_traced(found):
            raise TypeError(_SHAPES)
        return int(rank_for(found, energy=self.energy, tail=self.tail))


_SHAPES = (
    "energy and tail decide the rank, and with it shapes, by values that are traced: "
    "give a rank, chosen outside by rank_for"
)


def cut_by(
    rank: int | None,
    energy: ScalarLike | None,
    tail: ScalarLike | None,
    *,
    method: Method = "exact",
    key: Array | None = None,
    block: int | None = None,
    steps: int = 5,
) -> Cut:
    """How matrices are cut, once it is seen to be one way."""
    _checks.one_of("method", method, get_args(Method))
    if sum(x is None for x in (rank, energy, tail)) != 2:
        raise ValueError("give exactly one of rank, energy and tail")
    if rank is not None:
        rank = _checks.rank(rank)
    elif _checks.is_traced(energy, tail):
        raise TypeError(_SHAPES)
    elif method == "randomized":
        raise ValueError("energy and tail need all singular values: give a rank, or method='exact'")
    else:
        energy, tail = kept_or_left(energy, tail)
    if method == "randomized":
        if key is None:
            raise ValueError("method='randomized' needs a random key: give key=jax.random.key(0)")
        _checks.random_key(key)
        steps = _checks.rank(steps, "steps")
        block = None if block is None else _checks.rank(block, "block")
    return Cut(rank, energy, tail, method, block, steps)


def _truncated(x: Leaf | LowRank, cut: Cut, key: Array | None) -> Truncation:
    core, frames = core_of(x)
    if cut.method == "randomized" and cut.rank is not None:
        rank = min(cut.rank, *core.shape[-2:])
        block = max(rank, 1) if cut.block is None else cut.block
        if block * (cut.steps + 1) < rank:
            raise ValueError(
                f"{cut.steps + 1} blocks of {block} rows do not hold rank {rank}: "
                "give a larger block or more steps"
            )
        if not isinstance(x, LowRank) and block * (cut.steps + 1) < min(core.shape[-2:]):
            return _randomized(key, core, rank, block, cut.steps)
    whole = _decomposed(core, frames)
    rank = cut.rank_of(lambda: whole.values)
    left = tails_of(whole.values)[min(rank, whole.values.shape[-1])]
    return Truncation(whole.refit(whole.values, rank), left, jnp.asarray(False))


class Decomposition(NamedTuple):
    r"""A matrix $U \Sigma V^\top$, the singular vectors seen from frames that are not `None`."""

    left: Array
    values: Array
    right: Array
    frames: tuple[Array | None, Array | None]

    def refit(self, values: Array, rank: int | None = None) -> LowRank:
        """Factors of equal norm with other singular values, `rank` of them at most."""
        root = safe_sqrt(values[..., None, :rank])
        sides = self.left[..., :rank] * root, self.right[..., :rank] * root
        left, right = (
            side if frame is None else matmul(frame, side)
            for side, frame in zip(sides, self.frames, strict=True)
        )
        return LowRank(left, right)


def decomposed(x: Leaf | LowRank) -> Decomposition:
    """The singular value decomposition of a leaf, of factors without their product."""
    return _decomposed(*core_of(x))


def _decomposed(core: Array, frames: tuple[Array | None, Array | None]) -> Decomposition:
    if core.size:
        u, s, vt = jnp.linalg.svd(core, full_matrices=False)
    else:
        *stack, m, n = core.shape
        k = min(m, n)
        u, s, vt = (jnp.zeros((*stack, *size), core.dtype) for size in ((m, k), (k,), (k, n)))
    return Decomposition(u, s, transposed(vt), frames)


@jax.jit(static_argnums=(2, 3, 4))
def _randomized(key: Array, x: Array, rank: int, block: int, steps: int) -> Truncation:
    r"""Cut to the block Krylov spaces of $x x^\top$ and $x^\top x$, by Golub and Kahan.

    Both are kept as orthonormal rows, so that $x$ is never transposed in memory:
    `space @ x == core @ images`.
    """
    flipped = x.shape[-2] > x.shape[-1]
    x = transposed(x) if flipped else x
    *stack, m, n = x.shape
    space, images = jnp.zeros((*stack, 0, m), x.dtype), jnp.zeros((*stack, 0, n), x.dtype)
    first, *keys = jax.random.split(key, 2 * steps + 3)
    rows, seen = jax.random.normal(first, (*stack, block, n), x.dtype), []
    for near, far in zip(keys[::2], keys[1::2], strict=True):
        rows = _orthonormalized(near, matmul(rows, transposed(x)), space)
        space = jnp.concatenate([space, rows], axis=-2)
        seen.append(matmul(rows, x))
        rows = _orthonormalized(far, seen[-1], images)
        images = jnp.concatenate([images, rows], axis=-2)
    core = matmul(jnp.concatenate(seen, axis=-2), transposed(images))
    cut = _decomposed(core, (transposed(space), transposed(images)))
    edit = cut.refit(cut.values, rank)
    tail = _distance(x, edit)
    edit = LowRank(edit.right, edit.left) if flipped else edit
    return Truncation(edit, tail, jnp.asarray(True))


def _distance(x: Array, edit: LowRank, blocks: int = 8) -> Scalar:
    """By blocks of rows, so that the product is never whole in memory."""
    unit, rows = power_of_two(jnp.max(jnp.abs(x))), -(-x.shape[-2] // blocks)
    left, right = factors_of(edit)
    right = transposed(right)
    squares = [
        jnp.sum(((x[..., at, :] - matmul(left[..., at, :], right)) / unit) ** 2)
        for at in (slice(i, i + rows) for i in range(0, x.shape[-2], rows))
    ]
    return unit * safe_sqrt(jax.tree.reduce_associative(jnp.add, squares))


def _orthonormalized(key: Array, rows: Array, space: Array) -> Array:
    """Orthonormal rows that span the part of rows outside of a space, or new directions.

    A row that has nothing left there but rounding, which would point back into the space, is
    outweighed by a random one. The space is projected out twice, since that still leaves some.
    """
    length = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    noise = 8 * jnp.finfo(rows.dtype).eps * jax.random.normal(key, rows.shape, rows.dtype)
    rows = rows / jnp.where(length == 0, 1, length) + noise / math.sqrt(rows.shape[-1])
    rows = rows - matmul(matmul(rows, transposed(space)), space)
    for shift in (4, 4, 0):
        rows = _whitened(rows, shift)
    rows = rows - matmul(matmul(rows, transposed(space)), space)
    return _whitened(rows, 0)


def _whitened(rows: Array, shift: int) -> Array:
    """Rows nearer to orthonormal by one Cholesky factorization, shifted for nearly dependent ones.

    With the shift a condition number of up to 1e6 falls two hundredfold; well conditioned rows
    become orthonormal without it. Cheaper than Householder's, and all but a small matrix is
    multiplied by XLA itself.
    """
    gram = matmul(rows, transposed(rows))
    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    size = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    lower = jnp.linalg.cholesky(gram + shift * jnp.finfo(gram.dtype).eps * size * eye)
    inverse = jax.scipy.linalg.solve_triangular(lower, eye, lower=True)
    return matmul(inverse, rows)


def extract(
    base: WeightsLike,
    tuned: WeightsLike,
    rank: int | None = None,
    *,
    energy: ScalarLike | None = None,
    tail: ScalarLike | None = None,
    vectors: bool = True,
    method: Method = "exact",
    key: Array | None = None,
) -> Truncation:
    r"""The edit of given rank that brings one point nearest to another, as an adapter.

    Known as LoRA extraction.

    $$
    D = \arg\min_{\operatorname{rank} D_\ell \le r} \lVert \theta_0 + D - \theta_1 \rVert
    $$

    To be added: `lowrank.apply(base, extract(base, tuned, r).factors)` is the nearest to `tuned`
    that rank $r$ in every matrix can reach, and the tail its distance. Vectors and scalars are
    matrices with one column: untouched at rank 0, corrected whole from rank 1.

    By `energy` or `tail` every matrix gets the least rank that keeps this share of its own squared
    difference, or leaves no more than this distance in it, as in
    [`truncate`][wspace.lowrank.truncate] and in the command `wspace extract`. Neither is over the
    whole tree; the `tail` that is returned is, all tails combined.

    Args:
        base: The weights $\theta_0$ that the edit is to be added to.
        tuned: The weights $\theta_1$, of the same layout.
        rank: The rank $r \ge 0$ for every matrix; cut to what a matrix has.
        energy: In place of a rank, the share in $(0, 1]$ of the squared difference of each matrix
            that its least rank must keep.
        tail: In place of a rank, the distance, at least 0, that the least rank of each matrix may
            leave.
        vectors: Whether vectors and scalars are corrected; if not, they count in the tail.
        method: How every matrix is cut, as in [`truncate`][wspace.lowrank.truncate].
        key: A random key for the randomized method, folded with the path of every leaf.

    Returns:
        A [`Truncation`][wspace.lowrank.Truncation] with `factors` a tree of `LowRank` leaves for
            matrices, stacks and convolutions and dense leaves for vectors, all in at least
            float32, and the `tail` over the whole tree.

    Raises:
        ValueError: If not exactly one of rank, energy and tail is given, or one is out of its
            domain; the trees differ in structure or in a leaf's shape; the method is unknown or
            lacks its key; or a known value is NaN or infinite.
        TypeError: If `rank` is not an integer, `energy` or `tail` asks for a rank that depends on
            traced values, or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank
        >>> base, tuned = {"w": jnp.zeros((2, 2))}, {"w": jnp.array([[5.0, 0.0], [0.0, 1.0]])}
        >>> adapter = lowrank.extract(base, tuned, 1)
        >>> lowrank.apply(base, adapter.factors), adapter.tail
        ({'w': Array([[5., 0.],
               [0., 0.]], dtype=float32)}, Array(1., dtype=float32))
        >>> lowrank.extract(base, tuned, energy=0.9).factors["w"].rank
        1
    """
    vectors = _checks.flag("vectors", vectors)
    cut = cut_by(rank, energy, tail, method=method, key=key)
    return truncate_leaves(displacement(base=base, tuned=tuned), cut, vectors=vectors, key=key)


def displacement(**ends: WeightsLike) -> Weights:
    """From the first of two points, by name, to the second, once both are seen to be finite."""
    _checks.same_layout(**ends)
    start, end = ends.values()
    edit = _displacement((), (end, start))
    if not _checks.is_traced(edit) and not bool(jnp.isfinite(tree.norm(edit))):
        _checks.finite(**ends)
        _checks.finite(**{" - ".join(reversed(ends)): edit})
    return edit


@functools.partial(_lift.elementwise, rounded=False)
def _displacement(_: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    end, start = arrays
    return end - start


def truncate_leaves(edit: PyTree, cut: Cut, *, vectors: bool = True, key: Any = None) -> Truncation:
    """A finite edit with every matrix cut; a vector is whole, or left out, as is."""
    places, structure = tree_flatten_with_path(edit, is_leaf=_checks.is_factored)
    keys = [None] * len(places)
    if key is not None:
        marks = structure.unflatten(range(len(places)))
        keys = jax.tree.leaves(tree.split_key_like(key, marks))
    cuts = []
    for (path, leaf), own in zip(places, keys, strict=True):
        try:
            is_matrix = len(leaf.shape) > 1
            part = _truncated(leaf, cut, own) if is_matrix else _column(leaf, cut, vectors)
        except (TypeError, ValueError) as error:
            error.add_note(f"at leaf {_checks.path_of(path)}")
            raise
        cuts.append(part)
    return Truncation(
        structure.unflatten(part.factors for part in cuts),
        length(jnp.stack(tree.widened(*(part.tail for part in cuts)))) if cuts else jnp.zeros(()),
        jnp.any(jnp.array([part.approximate for part in cuts], bool)),
    )


def _column(x: Leaf, cut: Cut, vectors: bool) -> Truncation:
    x = tree.upcast(x)
    rank = cut.rank_of(lambda: length(x)[None]) if vectors else 0
    tail = jnp.zeros((), x.dtype) if rank else length(x)
    return Truncation(x if rank else 0 * x, tail, jnp.asarray(False))


def truncate_outputs(
    x: Leaf | LowRank,
    inputs: Float[Array, "... k m"],
    rank: int,
    *,
    layout: Layout = "in_out",
) -> Truncation:
    r"""The edit of given rank whose outputs on given inputs are nearest.

    $$
    D = \arg\min_{\operatorname{rank} D \le r} \lVert A\,(X - D) \rVert_F
      = X\, V_r V_r^\top, \qquad A X = U \Sigma V^\top
    $$

    What [`truncate`][wspace.lowrank.truncate] is to a matrix, this is to what a layer does with
    it on data: with $A = I$ both agree. The tail is at most $\lVert A \rVert_2$ times the tail of
    `truncate`. Known as activation-aware SVD.

    Args:
        x: The matrix $X$ `(m, n)`, or a stack of them, dense or factored.
        inputs: The inputs $A$ of the layer, as in `inputs @ x`, one a row: `(k, m)`, or a stack.
        rank: The rank, at least 0; cut to $\min(k, n)$, where the tail is $0$.
        layout: How the layer stores its matrix, `"in_out"`, or `"out_in"` as torch and equinox do:
            then `x` and the factors are $X^\top$ and $D^\top$.

    Returns:
        A [`Truncation`][wspace.lowrank.Truncation] with `factors` a `LowRank` in at least float32,
            and the `tail` $\lVert A\,(X - D) \rVert_F$.

    Raises:
        ValueError: If `rank` is negative, the inputs do not fit the matrix, the factors do not
            match, or a value known is NaN or infinite (traced, the result is NaN).
        TypeError: If `rank` is not an integer, or an argument is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank
        >>> x, inputs = jnp.diag(jnp.array([4.0, 3.0])), jnp.array([[0.0, 1.0]])
        >>> cut = lowrank.truncate_outputs(x, inputs, 1)
        >>> cut.tail, jnp.allclose(inputs @ cut.factors, inputs @ x)
        (Array(0., dtype=float32), Array(True, dtype=bool))

    References:
        Reduced-rank regression: A. Izenman, *Reduced-rank regression for the multivariate linear
        model*, Journal of Multivariate Analysis 5, 1975.
    """
    rank = _checks.rank(rank)
    _checks.one_array(inputs=inputs, **({} if isinstance(x, LowRank) else {"x": x}))
    _checks.finite(x=x, inputs=inputs)
    _checks.known_layout(layout)
    matrix = turned(x, layout) if isinstance(x, LowRank) else as_matrix(x, layout=layout)
    if jnp.ndim(inputs) < 2 or inputs.shape[-1] != matrix.shape[-2]:
        raise ValueError(
            f"inputs {jnp.shape(inputs)} do not fit a matrix {jnp.shape(x)}: give one input a row, "
            f"(k, {matrix.shape[-2]}), as in inputs @ x"
            f"{other_side(jnp.shape(inputs), jnp.shape(x), layout)}"
        )
    seen = decomposed(product(inputs, matrix))
    right = seen.right[..., :rank]
    tail = tails_of(seen.values)[right.shape[-1]]
    factors = turned(LowRank(product(matrix, right), right), layout)
    return Truncation(factors, tail, jnp.asarray(False))
