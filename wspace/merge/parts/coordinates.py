r"""Merges in coordinates: rules for entries, applied where entries have a meaning.

A rule such as [`ties`][wspace.merge.ties] compares models entry by entry. Models tuned apart,
adapters above all, keep what they learned in different directions, and their entries say
little about each other. Here all edits are written in bases that they share, a rule is applied to
the coordinates, and its result taken back to weights.

The bases are singular vectors of all edits side by side. They depend on the edits alone, not on
the factors that an adapter is kept in, and they hold every edit whole: a linear rule gives what
it gives without them. Where singular values of the edits side by side repeat, the basis is
not unique, and a rule for entries has no one result.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from wspace import _checks, lowrank, tree
from wspace._numerics import matmul, placed_like, replicated, rounded_like, singular_triples
from wspace.lowrank import LowRank
from wspace.lowrank.algebra import side_by_side
from wspace.lowrank.factors import factors_of, from_matrix, product, transposed, turned
from wspace.typing import Layout, Leaf, LeafCoefficients

Rule: TypeAlias = Callable[[PyTree, Sequence[PyTree], LeafCoefficients | None], PyTree]
"""A merge: from base, tuned models and coefficients to weights."""

Coordinates: TypeAlias = tuple[Sequence[Array], Callable[[Array], Leaf | LowRank]]
"""One leaf of all edits in coordinates, and the way from merged coordinates back to it."""


def in_coordinates(
    coordinates: Callable[[Sequence[Leaf | LowRank]], Coordinates],
    rule: Rule,
    edits: Sequence[PyTree],
    coefficients: LeafCoefficients | None,
) -> PyTree:
    """The result of a rule on edits in coordinates, brought back to weights."""
    _checks.function("rule", rule, "a merge of base, tuned models and coefficients")
    edits = _checks.listed("edits", edits)
    rows, structure = side_by_side(**_checks.each("edits", edits))
    _checks.finite(**_checks.each("edits", edits))
    # In one dtype from here on, so that no basis is coarser than the edits in it.
    spaces = [coordinates(tree.widened(*row)) for row in rows]
    seen, back = zip(*spaces, strict=True) if rows else ((), ())
    points = [structure.unflatten(leaves) for leaves in zip(*seen, strict=True)] or edits
    base = jax.tree.map(jnp.zeros_like, points[0])
    merged = rule(base, points, coefficients)
    _checks.same_layout(edits=base, merged=merged)
    edit = [return_(x) for return_, x in zip(back, jax.tree.leaves(merged), strict=True)]
    return structure.unflatten(
        x if isinstance(x, LowRank) or isinstance(row[0], LowRank) else rounded_like(x, row[0])
        for x, row in zip(edit, rows, strict=True)
    )


def of_outputs(row: Sequence[Leaf | LowRank], layout: Layout) -> Coordinates:
    """The outputs of all edits in a basis that they share."""
    if any(not isinstance(x, LowRank) and jnp.ndim(x) < 2 for x in row):
        return _all_dense(row)
    matrices = [
        turned(x, layout) if isinstance(x, LowRank) else lowrank.as_matrix(x, layout=layout)
        for x in row
    ]
    basis = _span([_turned(x) for x in matrices])
    seen = [product(_whole(x), basis) for x in matrices]
    if all(isinstance(x, LowRank) for x in row):
        return seen, lambda merged: turned(LowRank(merged, basis), layout)
    like = _dense_of(row)
    return seen, lambda merged: from_matrix(matmul(merged, transposed(basis)), like, layout)


def of_cores(row: Sequence[Leaf | LowRank]) -> Coordinates:
    """The cores of adapters between two bases that they share."""
    edits = [x for x in row if isinstance(x, LowRank)]
    if len(edits) < len(row):
        return _all_dense(row)
    left, right = _span(edits), _span([_turned(x) for x in edits])
    seen = [product(product(transposed(left), x), right) for x in map(_whole, edits)]
    return seen, lambda merged: LowRank(matmul(left, merged), right)


def _all_dense(row: Sequence[Leaf | LowRank]) -> Coordinates:
    """A leaf that is dense in some edit, multiplied out in every edit."""
    like = _dense_of(row)

    def shaped(matrix: Array) -> Array:
        return placed_like(matrix.reshape(like.shape), like)

    seen = [
        shaped(lowrank.materialize(x)) if isinstance(x, LowRank) else jnp.asarray(x) for x in row
    ]
    return seen, shaped


def _dense_of(row: Sequence[Leaf | LowRank]) -> Array:
    """The first dense leaf."""
    return jnp.asarray(next(x for x in row if not isinstance(x, LowRank)))


def _whole(x: Array | LowRank) -> Any:
    return jax.tree.map(replicated, x)


def _turned(x: Array | LowRank) -> Array | LowRank:
    return turned(x, "out_in") if isinstance(x, LowRank) else transposed(x)


def _span(edits: Sequence[Array | LowRank]) -> Float[Array, "... m k"]:
    """Left singular vectors of edits side by side, zero where the singular value is."""
    wide = jnp.concatenate([_block(_whole(x)) for x in edits], axis=-1)
    *stack, m, n = wide.shape
    if not wide.size:
        return jnp.zeros((*stack, m, min(m, n)), wide.dtype)
    return _left_of(wide)


@jax.jit
def _left_of(wide: Array) -> Array:
    rounding = max(wide.shape[-2:]) * jnp.finfo(wide.dtype).eps
    u, _, _ = singular_triples(wide, jnp.asarray(rounding, wide.dtype))
    return u


def _block(x: Array | LowRank) -> Array:
    r"""Something with the $x x^\top$ of an edit, no wider than its rank: $U R^\top$, $V = Q R$."""
    if not isinstance(x, LowRank):
        return x
    left, right = factors_of(x)
    if not right.size or right.shape[-2] <= right.shape[-1]:
        return matmul(left, transposed(right))
    return matmul(left, transposed(jnp.linalg.qr(right, mode="r")))
