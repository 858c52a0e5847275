r"""Merges of task vectors by their singular directions.

A matrix leaf of a task vector, in the sense of [`as_matrix`][wspace.lowrank.as_matrix], is a
sum of singular triples, and models interfere where their singular directions overlap. Merges that
make directions orthonormal or their singular values equal divide by singular values, so each
says how small the smallest divisor was, in `trusted`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import tree_leaves_with_path
from jaxtyping import Array, Bool, Float, Int, PyTree

from wspace import _checks, lowrank, tree
from wspace._numerics import accumulator, fetched, matmul, placed_like, replicated, with_nan_of
from wspace._records import record
from wspace.lowrank.factors import transposed
from wspace.merge.task import added, differences, siblings
from wspace.typing import Coefficients, Scalar, ScalarLike, WeightsLike

__all__ = ["SpectralMerge"]


@record
class SpectralMerge(NamedTuple):
    r"""Merged weights, and how well the models determine them.

    Attributes:
        weights: The base plus the merged displacement.
        trusted: The smallest singular value that the merge divided by, relative to the largest of
            the same matrix, over all leaves; $1$ if it divided by none. Models that move by a
            share $\delta$ may move the result by the order of $\delta$ over this number.
    """

    weights: PyTree
    trusted: Scalar


def by_matrices(
    on_matrices: Callable[[str, Sequence[Any], list[Array]], tuple[Array, Scalar]],
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: Coefficients | None,
    scale: ScalarLike,
    rtol: ScalarLike | None,
    least: ScalarLike | None,
) -> SpectralMerge:
    """A merge of every matrix, which gives its edit and how small its least divisor was."""
    tuned, c = siblings(base, tuned, coefficients)
    _checks.finite(base=base, **_checks.each("tuned", tuned))
    if rtol is not None:
        rtol = _checks.between("rtol", rtol, 0, 1)
    taus = differences(base, tuned)
    wide = accumulator(*(x.dtype for x in jax.tree.leaves(taus)))
    if least is None:
        least = min(float(jnp.finfo(wide).eps) ** 0.5, 1e-5)
    least = _checks.scalar("least", least, lambda x: (x >= 0) & (x < 1), "at least 0 and below 1")
    least = jnp.asarray(least).astype(wide)
    cutoff = jnp.asarray(0 if rtol is None else rtol).astype(wide)
    leaves, structure = jax.tree.flatten(base)
    paths = [_checks.path_of(path) for path, _ in tree_leaves_with_path(base)]
    merged, certificates, refused = [], [jnp.ones((), wide)], {}
    for path, leaf, *displaced in zip(paths, leaves, *map(jax.tree.leaves, taus), strict=True):
        if leaf.ndim < 2 or not leaf.size:
            merged.append(tree.combine([a / len(c) for a in c], displaced))
            continue
        edit, trusted = on_matrices(path, c, [replicated(lowrank.as_matrix(x)) for x in displaced])
        if _checks.is_traced(bad := ~(trusted >= least)):
            edit = _checks.poisoned(edit, bad, str)
        else:
            refused[path] = bad, trusted
        edit = with_nan_of(edit, cutoff)
        merged.append(placed_like(edit.reshape(leaf.shape), displaced[0]))
        certificates.append(trusted)
    # After all are asked for, as to look at one waits for it.
    flags = fetched([bad for bad, _ in refused.values()])
    for bad, (path, (_, trusted)) in zip(flags, refused.items(), strict=True):
        if bad:
            raise ValueError(
                f"directions of the models nearly coincide at leaf {path}: the smallest singular "
                f"value of their bases is {trusted:.2g} of the largest, less than {least:.2g}, and "
                "rounding would decide the result: first average models that are nearly equal, "
                "or take iso_c, or accept it by a smaller `least`"
            )
    weights = added(base, structure.unflatten(merged), scale)
    return SpectralMerge(weights, jnp.min(jnp.stack(certificates)))


def cut_of(rtol: ScalarLike | None, x: Array) -> Scalar:
    """The relative size up to which singular values count as zero, by default of rounding."""
    relative = max(x.shape[-2:]) * float(jnp.finfo(x.dtype).eps) if rtol is None else rtol
    return jnp.asarray(relative).astype(x.dtype)


def leading(
    x: Array, rank: int, cut: Scalar, largest: Float[Array, "... 1"] | None = None
) -> tuple[Array, Array, Array]:
    """The leading singular triples of matrices, zero where the value is up to `cut * largest`."""
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    gone = s <= cut * (s[..., :1] if largest is None else largest)  # NaN stays
    u, s, v, gone = u[..., :rank], s[..., :rank], transposed(vt)[..., :rank], gone[..., :rank]
    return (
        jnp.where(gone[..., None, :], 0, u),
        jnp.where(gone, 0, s),
        jnp.where(gone[..., None, :], 0, v),
    )


def count_of(values: Float[Array, "... k"]) -> Int[Array, "..."]:
    """How many of the last axis, such as singular values, are not zero."""
    return jnp.sum(values != 0, axis=-1, dtype=jnp.int32)


def _first(count: Int[Array, "..."], size: int) -> Bool[Array, "... k"]:
    """The mask of the first `count` of `size` places."""
    places = jax.lax.broadcasted_iota(jnp.int32, (*count.shape, size), count.ndim)
    return places < count[..., None]


def least_of(values: Float[Array, "... k"], count: Int[Array, "..."]) -> Scalar:
    """The smallest of the first `count` values, relative to the first, over a stack."""
    kept = _first(count, values.shape[-1])
    smallest = jnp.min(jnp.where(kept, values, jnp.inf), axis=-1)
    none = count == 0
    return jnp.min(jnp.where(none, 1, smallest / jnp.where(none, 1, values[..., 0])))


def isometries(
    triples: list[tuple[Array, Array, Array]], taus: Sequence[Array]
) -> tuple[Array, Array, Scalar]:
    """The polar factors of both concatenated bases, and the smallest singular value of either.

    They have no more directions than there are rows, or columns, that a task vector moves: in the
    others bases are zero, and rounding would choose a direction there.
    """
    lefts, values, rights = (jnp.concatenate(parts, -1) for parts in zip(*triples, strict=True))
    count = count_of(values)
    sizes = functools.reduce(jnp.maximum, [jnp.abs(x) for x in taus])
    sides = [(lefts, jnp.max(sizes, axis=-1)), (rights, jnp.max(sizes, axis=-2))]
    (left, one), (right, other) = (
        _isometry(basis, jnp.minimum(count, count_of(moved))) for basis, moved in sides
    )
    return left, right, jnp.minimum(one, other)


def _isometry(basis: Float[Array, "... m k"], count: Int[Array, "..."]) -> tuple[Array, Scalar]:
    """The polar factor of a basis of `count` directions."""
    u, s, vt = jnp.linalg.svd(basis, full_matrices=False)
    kept = _first(count, s.shape[-1])[..., None, :]
    return matmul(jnp.where(kept, u, 0), vt), least_of(s, count)
