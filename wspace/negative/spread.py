"""Spreading a shift: over its singular directions, or over the points that are to make it."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from wspace import _checks, lowrank, tree
from wspace._checks import Numbers
from wspace._numerics import (
    matmul,
    placed_like,
    polar,
    power_of_two,
    replicated,
    safe_sqrt,
    with_nan_of,
)
from wspace.lowrank import LowRank
from wspace.lowrank.algebra import side_by_side
from wspace.lowrank.truncation import decomposed
from wspace.typing import Coefficients, Leaf, ScalarLike, Weights, WeightsLike

__all__ = ["harden", "split_rank"]


def harden(edit: WeightsLike, *, rtol: ScalarLike | None = None) -> Weights:
    r"""Spreads an edit evenly over its singular directions, at the same norm.

    $$
    D \mapsto \frac{\lVert D \rVert_F}{\sqrt k}\, U_k V_k^\top, \qquad
    k = \#\{i : \sigma_i > \tau \sigma_1\}
    $$

    The norm of every leaf stays, and so do its row space and its column space, where no singular
    value but zero is left out; what an edit of rank $r$
    leaves of it becomes $\lVert D \rVert \sqrt{1 - r/k}$, the most that any edit with this norm
    and rank leaves. A guard that moved an average by a hardened displacement therefore holds
    to the highest rank. That is a bound on edits towards a known point, not resistance to
    training; and hardening the edit of every point does not flatten the edit of their average.

    Args:
        edit: The edit $D$, a tree; each slice of a stack is flattened by itself.
        rtol: The threshold $\tau$ in $(0, 1)$, relative to the largest singular value of each
            matrix; $\max(m, n)\,\varepsilon$ if not given. An edit that was rounded to half
            precision has full rank: give the rounding there.

    Returns:
        The flat edit, each leaf in the dtype of that leaf of `edit`. Vectors, scalars and zero
            leaves are unchanged. Derivatives exist where $k$ stays, also where singular values
            repeat: those of matrices with the same rank, so that a direction that is zero stays so.

    Raises:
        ValueError: If a known value is NaN or infinite (NaN if traced), `rtol` is known and not
            between 0 and 1, or a leaf has more than five dimensions.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import negative
        >>> negative.harden(jnp.diag(jnp.array([4.0, 3.0, 0.0]))).diagonal()
        Array([3.535534, 3.535534, 0.      ], dtype=float32)
    """
    _checks.floating_leaves(edit=edit)
    _checks.finite(edit=edit)
    if rtol is not None:
        rtol = _checks.between("rtol", rtol, 0, 1)

    def flat(leaf: Array) -> Array:
        if leaf.ndim < 2 or not leaf.size:
            return leaf
        matrix = replicated(lowrank.as_matrix(leaf))
        least = max(matrix.shape[-2:]) * jnp.finfo(leaf.dtype).eps if rtol is None else rtol
        least = jnp.asarray(least).astype(leaf.dtype)
        factor, values = polar(matrix, least)
        norm = with_nan_of(_norms(matrix, power_of_two(values[..., 0])), least)
        count = jnp.maximum(jnp.sum(values != 0, axis=-1), 1).astype(leaf.dtype)
        flattened = (norm / safe_sqrt(count))[..., None, None] * factor
        return placed_like(flattened.reshape(leaf.shape), leaf)

    return tree.cast_like(jax.tree.map(flat, tree.upcast(edit)), edit)


@jax.jit
def _norms(matrix: Float[Array, "... m n"], unit: Float[Array, "..."]) -> Float[Array, "..."]:
    """The norms of the matrices of a stack, whose squares may be out of range but over a unit."""
    squares = (matrix / unit[..., None, None]) ** 2
    return unit * safe_sqrt(jnp.sum(squares, axis=(-2, -1)))


def split_rank(
    shift: PyTree,
    coefficients: Coefficients,
    ranks: Sequence[int],
    *,
    costs: Coefficients | None = None,
    rtol: ScalarLike | None = None,
) -> list[PyTree]:
    r"""Edits of given ranks, one a point, that together shift the average of the points.

    $$
    \sum_i a_i\, dx_i = D, \qquad \operatorname{rank} dx_i \le r_i, \qquad
    dx_i = \sum_{j \in J_i} \frac{a_i / c_i}{\sum_{h:\, j \in J_h} a_h^2 / c_h}\,
        \sigma_j u_j v_j^\top
    $$

    There are such edits if and only if $\operatorname{rank} D \le \sum_i r_i$ in every matrix,
    counting the points whose coefficient is not zero: a shift of rank $2r$ takes only rank $r$ of
    each of two points. Point $i$ takes $r_i$ consecutive singular triples $J_i$ of the $k$ that
    the shift has, cyclically, the point of largest $a_i^2 / c_i$ from the first on; a triple that
    several points take is shared at least cost. Where $\sum_i r_i = k$ no other way to deal out
    the triples costs less; where all $r_i \ge k$ the edits are what
    [`retarget`][wspace.negative.retarget] makes, the least of all. In between, the least cost has
    no closed form.

    To be added, by [`lowrank.apply`][wspace.lowrank.apply].

    Args:
        shift: The shift $D$ of the average, a tree with dense or `LowRank` leaves. A vector is a
            matrix with one column.
        coefficients: The $a_i$, one a point, of any sign; divided by their sum.
        ranks: The ranks $r_i \ge 0$, one a point.
        costs: The $c_i > 0$, one a point; equal if not given.
        rtol: Singular values up to this number in $(0, 1)$ times the largest of their matrix count
            as zero and are left out; $\max(m, n)\,\varepsilon$ if not given. A shift that was
            computed as a difference of weights holds their rounding: give that here.

    Returns:
        One edit a point, with `LowRank` leaves for matrices, in at least float32.

    Raises:
        ValueError: If a matrix of the shift has a rank above $\sum_i r_i$ (NaN if traced); the
            error names the leaf and what would be left. Also if a rank is negative, the counts
            differ, a known value is NaN or infinite, or for the coefficients and costs that
            [`retarget`][wspace.negative.retarget] refuses.
        TypeError: If a rank is not an integer, or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank, negative
        >>> edits = negative.split_rank(jnp.diag(jnp.array([3.0, 1.0])), (0.5, 0.5), (1, 1))
        >>> [jnp.round(jnp.abs(lowrank.materialize(edit).diagonal())) for edit in edits]
        [Array([6., 0.], dtype=float32), Array([0., 2.], dtype=float32)]
    """
    _checks.ordered("ranks", ranks)
    _checks.ordered("coefficients", coefficients)
    if len(ranks) != len(coefficients):
        raise ValueError(
            f"ranks has {len(ranks)} numbers for {len(coefficients)} coefficients: give one a point"
        )
    ranks = [_checks.rank(r, f"ranks[{i}]") for i, r in enumerate(ranks)]
    a = _checks.affine(coefficients, len(ranks))
    c = _checks.positive("costs", costs, len(ranks))
    if rtol is not None:
        rtol = _checks.between("rtol", rtol, 0, 1)
    side_by_side(shift=shift)
    _checks.finite(shift=shift)
    leaves, structure = jax.tree_util.tree_flatten_with_path(shift, is_leaf=_checks.is_factored)
    roots = _roots(a, c)
    columns = [
        _dealt(leaf, _checks.path_of(path), jnp.asarray(a), jnp.asarray(roots), ranks, rtol)
        for path, leaf in leaves
    ]
    return [structure.unflatten(column[i] for column in columns) for i in range(len(ranks))]


def _roots(a: Numbers, c: Numbers) -> Numbers:
    r"""The $|a_i| / \sqrt{c_i}$ over the largest of them, whose squares decide who takes what."""
    if isinstance(a, np.ndarray) and isinstance(c, np.ndarray):
        roots = np.abs(a) / np.sqrt(c)
        return roots / roots.max(initial=0)
    a, c = tree.widened(_checks.floating(a), _checks.floating(c))
    roots = jnp.abs(a) / jnp.sqrt(c)
    return roots / jax.lax.stop_gradient(jnp.max(roots, initial=0))


def _dealt(
    leaf: Leaf | LowRank,
    path: str,
    a: Array,
    roots: Array,
    ranks: list[int],
    rtol: ScalarLike | None,
) -> list[Array | LowRank]:
    """The parts of one leaf, one a point."""
    if isinstance(leaf, LowRank) or jnp.ndim(leaf) > 1:
        part = decomposed(leaf)
        values = part.values
        sides = [
            side if frame is None else matmul(frame, side)
            for side, frame in zip((part.left, part.right), part.frames, strict=True)
        ]
    else:
        (column,) = tree.widened(leaf)
        values, sides = tree.norm(column)[None], None
    dtype, count = values.dtype, values.shape[-1]
    a, roots = a.astype(dtype), roots.astype(dtype)
    longest = max(side.shape[-2] for side in sides) if sides else 1
    least = longest * jnp.finfo(dtype).eps if rtol is None else jnp.asarray(rtol).astype(dtype)
    k = jnp.sum(values > least * values[..., :1], axis=-1, keepdims=True, dtype=jnp.int32)
    ring = jnp.maximum(k, 1)

    # The blocks J_i: one after another, in the order of a_i^2 / c_i, on a ring of k triples.
    sizes = jnp.where(a == 0, 0, jnp.asarray(ranks, jnp.int32))
    order = jnp.argsort(-roots, stable=True)
    ends = jnp.cumsum(sizes[order], dtype=jnp.int32)
    starts = jnp.zeros_like(sizes).at[order].set(ends - sizes[order])
    triples = jnp.arange(count, dtype=jnp.int32).reshape((*(1 for _ in k.shape[1:]), count))
    taken = [(triples - starts[i]) % ring < sizes[i] for i in range(len(ranks))]
    # Over the largest root of those that take a triple, so that the squares of them do not vanish.
    tops = functools.reduce(
        jnp.maximum, [jnp.where(t, roots[i], 0) for i, t in enumerate(taken)], jnp.zeros((), dtype)
    )
    tops = jax.lax.stop_gradient(jnp.where(tops == 0, 1, tops))
    shares = [jnp.where(t, (roots[i] / tops) ** 2, 0) for i, t in enumerate(taken)]
    total = sum(shares, jnp.zeros((), dtype))

    def message() -> str:
        given, left = int(ends[-1]), values[..., int(ends[-1]) :]
        return (
            f"leaf {path} of shift has rank {int(jnp.max(k))}, and the ranks of the points with a "
            f"coefficient sum to {given}: {jnp.linalg.norm(left):.3g} of the shift would be left; "
            "give more rank"
        )

    undefined = _checks.refuse(jnp.any(k > ends[-1]), message)
    pulls = [
        jnp.where(t & (triples < k), shares[i] / jnp.where(total == 0, 1, total), 0)
        / jnp.where(a[i] == 0, 1, a[i])
        + undefined
        for i, t in enumerate(taken)
    ]
    if sides is None:
        return [pull[0] * column for pull in pulls]
    parts = []
    for i, rank in enumerate(ranks):
        steps = triples[..., :rank]
        chosen = (starts[i] + steps) % ring
        once = steps < jnp.minimum(sizes[i], ring)
        weight = jnp.where(once, jnp.take_along_axis(pulls[i] * values, chosen, axis=-1), 0)
        left, right = (jnp.take_along_axis(x, chosen[..., None, :], axis=-1) for x in sides)
        root = safe_sqrt(jnp.abs(weight))[..., None, :]
        parts.append(LowRank(left * (jnp.sign(weight)[..., None, :] * root), right * root))
    return parts
