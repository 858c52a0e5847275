"""The cones, and the nearest edit in each."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_map_with_path
from jaxtyping import Array, Bool, PyTree

from wspace import _checks, geometry, lowrank, tree
from wspace.cone.spectra import (
    Spectra,
    finite_edit,
    largest,
    largest_of_all,
    norm_and_tail,
    refitted,
    spectra_of,
)
from wspace.lowrank import LowRank
from wspace.selection.top import keep_top
from wspace.typing import Scalar

__all__ = ["Mask", "PooledRank", "Projection", "Rank", "Sparse", "Subspace", "project"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("rank",))
@dataclasses.dataclass(frozen=True)
class Rank:
    r"""Edits of rank at most $r$ in every matrix.

    A vector is a matrix with one column: untouched at rank 0, free from rank 1. A stack holds one
    matrix a slice. The nearest edit cuts every matrix to its $r$ largest singular values.

    Args:
        rank: The rank $r \ge 0$; above that of a matrix it leaves nothing.
    """

    rank: int


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("rank",))
@dataclasses.dataclass(frozen=True)
class PooledRank:
    r"""Edits whose ranks add up to at most $R$ over all matrices.

    The nearest edit keeps the $R$ largest of the singular values of all leaves sorted together, so
    no split of $R$ over the leaves comes nearer. A vector counts as a matrix of rank one, every
    slice of a stack by itself; of equal values the first in the tree is kept.

    Args:
        rank: The sum of ranks $R \ge 0$.
    """

    rank: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Subspace:
    r"""Edits in the span of given directions.

    Args:
        basis: Orthonormal trees of the layout of the edits, such as
            [`orthonormalize`][wspace.geometry.orthonormalize] returns.
    """

    basis: Sequence[PyTree]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    r"""Edits that are zero wherever a mask is false.

    Args:
        mask: A tree of the structure of the edits with, at each leaf, a boolean array of the shape
            of that leaf, or one boolean for all of it.
    """

    mask: PyTree


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("count",))
@dataclasses.dataclass(frozen=True)
class Sparse:
    r"""Edits with at most $k$ entries that are not zero, over the whole tree.

    The nearest edit keeps the $k$ entries of largest magnitude, exactly so many, of equal ones the
    first, as [`top_mask`][wspace.selection.top_mask] does. For $k$ in every leaf, project by
    [`tree.per_leaf`][wspace.tree.per_leaf].

    Args:
        count: The number $k \ge 0$; all entries if there are fewer.
    """

    count: int


Cone: TypeAlias = Rank | PooledRank | Subspace | Mask | Sparse


class Projection(NamedTuple):
    """The nearest edit in a cone.

    Attributes:
        edit: The edit, to be added: with `LowRank` leaves for matrices if the cone speaks of rank,
            else dense, in at least float32.
        norm: Its norm.
        tail: The distance that is left.
    """

    edit: PyTree
    norm: Scalar
    tail: Scalar


def project(cone: Cone, edit: PyTree) -> Projection:
    r"""The nearest edit in a cone, its norm, and the distance that is left.

    $$
    P E = \arg\min_{D \in K} \lVert E - D \rVert, \qquad
    \lVert E \rVert^2 = \lVert P E \rVert^2 + \lVert E - P E \rVert^2
    $$

    Idempotent, and it scales with the edit. The tail is computed from what is left out, never by
    subtraction. Derivatives of norm and tail exist where the mathematics has them, repeated
    singular values included; those of the edit do not exist where singular values repeat.

    Args:
        cone: A [`Rank`][wspace.cone.Rank], [`PooledRank`][wspace.cone.PooledRank],
            [`Subspace`][wspace.cone.Subspace], [`Mask`][wspace.cone.Mask] or
            [`Sparse`][wspace.cone.Sparse].
        edit: The edit $E$, a tree with dense or `LowRank` leaves.

    Returns:
        A [`Projection`][wspace.cone.Projection] with the `edit`, its `norm` and the `tail`.

    Raises:
        ValueError: If a rank or count is negative, a basis is not orthonormal (the error says by
            how much; NaN if traced) or a mask does not fit, or a known value is NaN or infinite
            (NaN if traced).
        TypeError: If `cone` is no cone, a rank or count is not an integer, a mask is not boolean,
            or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import cone
        >>> nearest = cone.project(cone.Sparse(1), {"w": jnp.array([3.0, -4.0])})
        >>> nearest.edit, nearest.norm, nearest.tail
        ({'w': Array([ 0., -4.], dtype=float32)}, Array(4., dtype=float32),
         Array(3., dtype=float32))

    References:
        C. Eckart, G. Young, *The approximation of one matrix by another of lower rank*,
        Psychometrika 1, 1936.
    """
    finite_edit(edit=edit)
    if isinstance(cone, Rank | PooledRank):
        nearest, spectra, kept = refitted(edit, functools.partial(_kept, cone), cone.rank)
        return Projection(nearest, *norm_and_tail(spectra, kept))
    return _entrywise(cone, edit)


def sizes_of(cone: Cone, displacement: PyTree) -> tuple[Scalar, Scalar]:
    """Norm and tail of the projection; of the spectral cones from singular values alone."""
    finite_edit(displacement=displacement)
    if isinstance(cone, Rank | PooledRank):
        spectra = spectra_of(displacement)
        return norm_and_tail(spectra, _kept(cone, spectra))
    _, norm, tail = _entrywise(cone, displacement)
    return norm, tail


def _kept(cone: Rank | PooledRank, spectra: Spectra) -> Spectra:
    rank = _checks.rank(cone.rank)
    return largest(spectra, rank) if isinstance(cone, Rank) else largest_of_all(spectra, rank)


def _entrywise(cone: Cone, edit: PyTree) -> Projection:
    """The projection on a cone that is a linear space, or a union of those of some entries."""
    dense = jax.tree.map(
        lambda x: lowrank.materialize(x) if isinstance(x, LowRank) else tree.upcast(x),
        edit,
        is_leaf=_checks.is_factored,
    )
    if isinstance(cone, Sparse):
        count = min(_checks.rank(cone.count, "count"), sum(x.size for x in jax.tree.leaves(dense)))
        nearest = keep_top(dense, count)
    elif isinstance(cone, Mask):
        nearest = _masked(cone.mask, dense)
    elif isinstance(cone, Subspace):
        nearest = _inside(cone.basis, dense)
    else:
        raise TypeError(
            f"cone must be a Rank, PooledRank, Subspace, Mask or Sparse, got {type(cone)}"
        )
    return Projection(nearest, tree.norm(nearest), geometry.distance(dense, nearest))


def _masked(mask: PyTree, edit: PyTree) -> PyTree:
    if jax.tree.structure(mask) != jax.tree.structure(edit):
        raise ValueError(
            "mask must be a tree like the edit, with booleans at each leaf: got "
            f"{jax.tree.structure(mask)} for {jax.tree.structure(edit)}"
        )

    def kept(path: Any, allowed: Any, leaf: Array) -> Array:
        where = f"leaf {keystr(path) or '(root)'} of mask"
        if jnp.result_type(allowed) != jnp.bool_:
            raise TypeError(f"{where} has dtype {jnp.result_type(allowed)}: give booleans")
        if jnp.shape(allowed) not in ((), leaf.shape):
            raise ValueError(
                f"{where} has shape {jnp.shape(allowed)} for a leaf of shape {leaf.shape}: "
                "give one boolean an entry, or one for the leaf"
            )
        return jnp.where(allowed, leaf, 0)

    return tree_map_with_path(kept, mask, edit)


def _inside(basis: Sequence[PyTree], edit: PyTree) -> PyTree:
    basis = _checks.listed("basis", basis)
    _checks.same_layout(edit=edit, **_checks.each("basis", basis))
    gram = geometry.gram(basis)
    off = jnp.max(jnp.abs(gram - jnp.eye(len(basis), dtype=gram.dtype)))
    dtypes = [jnp.asarray(x).dtype for x in jax.tree.leaves(basis)]
    unit = max((float(jnp.finfo(dtype).eps) for dtype in dtypes), default=0.0)
    undefined = _checks.refuse(
        ~(off <= 64 * unit),
        lambda: (
            f"basis is not orthonormal: its inner products are off by up to {off:.3g}: "
            "orthonormalize it first, by geometry.orthonormalize"
        ),
    )
    return tree.combine((1 + undefined,), (geometry.project(edit, basis),))


def is_zero(cone: Cone) -> Bool[Array, ""]:
    """Whether a cone holds nothing but zero."""
    if isinstance(cone, Mask):
        return ~jnp.any(jnp.stack([jnp.any(x) for x in jax.tree.leaves(cone.mask)] or [False]))
    size = {Rank: "rank", PooledRank: "rank", Sparse: "count"}.get(type(cone))
    return jnp.asarray(size is not None and getattr(cone, size) == 0)
