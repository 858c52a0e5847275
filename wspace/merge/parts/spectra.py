r"""Merges of task vectors by their singular directions.

A matrix leaf of a task vector, in the sense of [`as_matrix`][wspace.lowrank.as_matrix], is a
sum of singular triples, and models interfere where their singular directions overlap. Merges that
make directions orthonormal or their singular values equal divide by singular values, so each
says how small the smallest divisor was, in `trusted`, and how many it did not divide by.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_leaves_with_path
from jaxtyping import Array, DTypeLike, Float, Int, PyTree

from wspace import _checks, lowrank, tree
from wspace._numerics import (
    accumulator,
    placed_like,
    polar,
    replicated,
    with_nan_of,
)
from wspace._records import record
from wspace.merge.task import added, differences, siblings
from wspace.typing import ByLeaf, LeafCoefficients, Scalar, ScalarLike, WeightsLike

__all__ = ["SpectralMerge"]


@record
class SpectralMerge(NamedTuple):
    r"""Merged weights, and how well the models determine them.

    Attributes:
        weights: The base plus the merged displacement.
        trusted: The smallest singular value that the merge divided by, relative to the largest of
            the same matrix, over all leaves; $1$ if it divided by none. Models that move by a
            share $\delta$ may move the result by the order of $\delta$ over this number.
        left_out: How many directions the merge left out, over all leaves, since their singular
            value is zero or rounding: those that no model moves, such as of units that never act,
            and those in which models coincide, which they then share.
    """

    weights: PyTree
    trusted: Scalar
    left_out: Int[Array, ""]


def by_matrices(
    on_matrices: Callable[[str, Sequence[Any], list[Array]], tuple[Array, Scalar, Array]],
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: LeafCoefficients | None,
    scale: ByLeaf,
    rtol: ScalarLike | None,
) -> SpectralMerge:
    """A merge of every matrix: its edit, how small the least divisor was, and what it left out."""
    tuned, numbers = siblings(base, tuned, coefficients)
    _checks.finite(base=base, **_checks.each("tuned", tuned))
    if rtol is not None:
        rtol = _checks.between("rtol", rtol, 0, 1)
    taus = differences(base, tuned)
    wide = accumulator(*(x.dtype for x in jax.tree.leaves(taus)))
    cutoff = jnp.asarray(0 if rtol is None else rtol).astype(wide)
    leaves, structure = jax.tree.flatten(base)
    paths = [_checks.path_of(path) for path, _ in tree_leaves_with_path(base)]
    merged, certificates, missing = [], [jnp.ones((), wide)], jnp.zeros((), jnp.int32)
    rows = zip(paths, leaves, *map(jax.tree.leaves, taus), strict=True)
    for place, (path, leaf, *displaced) in enumerate(rows):
        c = [a[place] if np.ndim(a) else a for a in numbers]
        if leaf.ndim < 2 or not leaf.size:
            merged.append(tree.combine([a / len(c) for a in c], displaced))
            continue
        matrices = [replicated(lowrank.as_matrix(x)) for x in displaced]
        edit, trusted, left_out = on_matrices(path, c, matrices)
        edit = with_nan_of(edit, cutoff)
        merged.append(placed_like(edit.reshape(leaf.shape), displaced[0]))
        certificates.append(with_nan_of(trusted, cutoff))
        missing += left_out
    weights = added(base, structure.unflatten(merged), scale)
    return SpectralMerge(weights, jnp.min(jnp.stack(certificates)), missing)


def cut_of(rtol: ScalarLike | None, x: Array) -> Scalar:
    """The relative size up to which singular values count as zero, by default of rounding."""
    relative = max(x.shape[-2:]) * float(jnp.finfo(x.dtype).eps) if rtol is None else rtol
    return jnp.asarray(relative).astype(x.dtype)


def checked_least(least: ScalarLike | None) -> Callable[[DTypeLike], Scalar]:
    """For a dtype, the relative size up to which singular values of joined bases are rounding."""
    if least is not None:
        words = "at least 0 and below 1"
        least = _checks.scalar("least", least, lambda x: (x >= 0) & (x < 1), words)

    def least_in(wide: DTypeLike) -> Scalar:
        usual = min(float(jnp.finfo(wide).eps) ** 0.5, 1e-5)
        return jnp.asarray(usual if least is None else least).astype(wide)

    return least_in


def count_of(values: Float[Array, "... k"]) -> Int[Array, "..."]:
    """How many of the last axis, such as singular values, are not zero."""
    return jnp.sum(values != 0, axis=-1, dtype=jnp.int32)


def least_of(values: Float[Array, "... k"]) -> Scalar:
    """The smallest value that is not zero, relative to the first, over a stack."""
    smallest = jnp.min(jnp.where(values == 0, jnp.inf, values), axis=-1)
    none = values[..., 0] == 0
    return jnp.min(jnp.where(none, 1, smallest / jnp.where(none, 1, values[..., 0])))


def isometries(
    triples: list[tuple[Array, Array, Array]], least: Scalar
) -> tuple[Array, Array, Scalar, Array]:
    """The polar factors of both concatenated bases, the least divisor, and how many are left out.

    A direction that no model moves, or in which several coincide, has a singular value of rounding
    there: the factors are partial isometries without it.
    """
    lefts, _, rights = (jnp.concatenate(parts, -1) for parts in zip(*triples, strict=True))
    size = max(lefts.shape[-2], rights.shape[-2]) * jnp.finfo(lefts.dtype).eps
    cut = jnp.maximum(least, size)  # NaN stays
    (left, one), (right, other) = polar(lefts, cut), polar(rights, cut)
    kept = jnp.minimum(count_of(one), count_of(other))
    missing = jnp.sum(lefts.shape[-1] - kept, dtype=jnp.int32)
    trusted = jnp.minimum(least_of(one), least_of(other))
    return with_nan_of(left, least), right, with_nan_of(trusted, least), missing
