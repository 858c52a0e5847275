"""What a cone is, the cones of the library, and the nearest edit in each."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from wspace import _checks, _lift, geometry, lowrank, tree
from wspace._numerics import accumulator
from wspace._records import record
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

__all__ = ["Cone", "Mask", "PooledRank", "Projection", "Rank", "Sparse", "Subspace", "project"]


@record
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


@runtime_checkable
class Cone(Protocol):
    r"""A set of edits that holds with an edit $D$ all its multiples $t D$, $t \ge 0$.

    What a cone of your own has to say is the nearest edit in it, by one method; nothing has to be
    inherited. Everything else follows from that:
    [`support`][wspace.cone.support], [`reach`][wspace.cone.reach], [`entry`][wspace.cone.entry],
    [`exit`][wspace.cone.exit], [`negative.exit_ball`][wspace.negative.exit_ball],
    [`negative.linear_bound`][wspace.negative.linear_bound] and [`fit.guard`][wspace.fit.guard].
    Call it by [`project`][wspace.cone.project], which checks the edit. To be an argument of
    `jax.jit` or `jax.vmap`, and of `fit.guard`, a cone is registered as a pytree.

    Two more methods are used where a cone has them. `sizes(edit)` returns norm and tail alone,
    where they cost less than the edit. `holds_only_zero()` says whether zero is the only edit of
    the cone, so that no way leads out of a ball.
    """

    def project(self, edit: PyTree) -> Projection:
        r"""The nearest edit in the cone, its norm, and the distance that is left.

        $$
        P E = \arg\min_{D \in K} \lVert E - D \rVert, \qquad
        \lVert E \rVert^2 = \lVert P E \rVert^2 + \lVert E - P E \rVert^2
        $$

        Args:
            edit: The edit $E$, a tree with dense or `LowRank` leaves, its known values finite.

        Returns:
            A [`Projection`][wspace.cone.Projection] with the `edit`, in at least float32, its
                `norm` and the `tail`. A NaN of $E$ is to show in one of the two.
        """
        ...


@record
@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("rank",))
@dataclasses.dataclass(frozen=True)
class Rank:
    r"""Edits of rank at most $r$ in every matrix.

    A vector is a matrix with one column: untouched at rank 0, free from rank 1. A stack holds one
    matrix a slice. The nearest edit cuts every matrix to its $r$ largest singular values.

    Args:
        rank: The rank $r \ge 0$; above the rank of a matrix nothing is left.
    """

    rank: int

    def project(self, edit: PyTree) -> Projection:
        """The nearest edit, cut in every matrix."""
        return _by_spectra(edit, largest, self.rank)

    def sizes(self, edit: PyTree) -> tuple[Scalar, Scalar]:
        """Norm and tail, of singular values alone."""
        return _sizes_by_spectra(edit, largest, self.rank)

    def holds_only_zero(self) -> bool:
        """Whether the rank is zero."""
        return self.rank == 0


@record
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

    def project(self, edit: PyTree) -> Projection:
        """The nearest edit, cut in all matrices together."""
        return _by_spectra(edit, largest_of_all, self.rank)

    def sizes(self, edit: PyTree) -> tuple[Scalar, Scalar]:
        """Norm and tail, of singular values alone."""
        return _sizes_by_spectra(edit, largest_of_all, self.rank)

    def holds_only_zero(self) -> bool:
        """Whether the rank is zero."""
        return self.rank == 0


@record
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Subspace:
    r"""Edits in the span of given directions.

    Args:
        basis: Orthonormal trees of the layout of the edits, such as
            [`orthonormalize`][wspace.geometry.orthonormalize] returns.
    """

    basis: Sequence[PyTree]

    def project(self, edit: PyTree) -> Projection:
        """The nearest edit, by its inner products with the basis."""
        edit = _multiplied_out(edit)
        basis = _checks.listed("basis", self.basis)
        _checks.same_layout(edit=edit, **_checks.each("basis", basis))
        inner = [tree.vdot(q, edit) for q in basis]
        wide = accumulator(*(x.dtype for x in inner))
        coefficients = _checks.where_orthonormal(
            jnp.stack([x.astype(wide) for x in inner]),
            geometry.gram(basis),
            [leaf.dtype for leaf in jax.tree.leaves(basis)],
            "basis",
        )
        # The sum is taken in the dtype of its first tree.
        first = jax.tree.map(
            lambda q, x: jnp.asarray(q).astype(accumulator(q.dtype, x.dtype)), basis[0], edit
        )
        nearest = tree.combine(coefficients, (first, *basis[1:]))
        return _nearest(edit, tree.cast_like(nearest, edit))


@record
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    r"""Edits that are zero wherever a mask is false.

    Args:
        mask: A tree of the structure of the edits with, at each leaf, a boolean array of the shape
            of that leaf, or one boolean for all of it.
    """

    mask: PyTree

    def project(self, edit: PyTree) -> Projection:
        """The nearest edit, zero wherever the mask is false."""
        edit = _multiplied_out(edit)
        kinds = "booleans at each leaf"
        places = _checks.entries("mask", self.mask, edit, kinds, of="the edit")
        structure = jax.tree.structure(edit)
        is_whole = [_is_whole(*place) for place in places]
        # Where one boolean is for the whole leaf, the leaf itself takes the place of a mask.
        masks = [x if whole else mask for whole, (mask, x, _) in zip(is_whole, places, strict=True)]
        flags = [
            mask if whole else True for whole, (mask, *_) in zip(is_whole, places, strict=True)
        ]
        kept = _within_mask((), (edit, structure.unflatten(masks)), [structure.unflatten(flags)])
        return _nearest(edit, kept)

    def holds_only_zero(self) -> Bool[Array, ""]:
        """Whether the mask is false everywhere."""
        return ~jnp.any(jnp.stack([jnp.any(x) for x in jax.tree.leaves(self.mask)] or [False]))


@record
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

    def project(self, edit: PyTree) -> Projection:
        """The nearest edit, of the entries of largest magnitude."""
        edit = _multiplied_out(edit)
        count = min(_checks.rank(self.count, "count"), sum(x.size for x in jax.tree.leaves(edit)))
        return _nearest(edit, keep_top(edit, count))

    def holds_only_zero(self) -> bool:
        """Whether the count is zero."""
        return self.count == 0


def project(cone: Cone, edit: PyTree) -> Projection:
    r"""The nearest edit in a cone, its norm, and the distance that is left.

    $$
    P E = \arg\min_{D \in K} \lVert E - D \rVert, \qquad
    \lVert E \rVert^2 = \lVert P E \rVert^2 + \lVert E - P E \rVert^2
    $$

    Idempotent, and it scales with the edit. The tail is computed from what is left out, never by
    subtraction. Derivatives of norm and tail exist where the mathematics has them, repeated
    singular values included; derivatives of the edit do not, where singular values repeat.

    Args:
        cone: A [`Rank`][wspace.cone.Rank], [`PooledRank`][wspace.cone.PooledRank],
            [`Subspace`][wspace.cone.Subspace], [`Mask`][wspace.cone.Mask],
            [`Sparse`][wspace.cone.Sparse], or a [`Cone`][wspace.cone.Cone] of your own.
        edit: The edit $E$, a tree with dense or `LowRank` leaves.

    Returns:
        A [`Projection`][wspace.cone.Projection] with the `edit`, its `norm` and the `tail`.

    Raises:
        ValueError: If a rank or count is negative, a basis is not orthonormal (the error says by
            how much; NaN if traced) or a mask does not fit, or a known value is NaN or infinite
            (NaN if traced).
        TypeError: If `cone` is no cone or does not return a projection, a rank or count is not an
            integer, a mask is not boolean, or a leaf is not floating-point.

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
    return projected(cone, edit)


def projected(cone: Cone, edit: PyTree) -> Projection:
    """The projection of an edit that is known to be one."""
    refuse_other(cone)
    nearest = cone.project(edit)
    if not isinstance(nearest, Projection) or not all(map(_is_size, nearest[1:])):
        raise TypeError(
            f"{type(cone).__name__}.project must return a cone.Projection(edit, norm, tail), norm "
            f"and tail as tree.norm and geometry.distance give them, got {type(nearest)}"
        )
    return nearest


def sizes_of(cone: Cone, displacement: PyTree) -> tuple[Scalar, Scalar]:
    """Norm and tail of the projection; a cone with `sizes` tells them without the edit."""
    refuse_other(cone)
    finite_edit(displacement=displacement)
    sizes = getattr(cone, "sizes", None)
    if sizes is not None:
        return sizes(displacement)
    _, norm, tail = projected(cone, displacement)
    return norm, tail


def holds_only_zero(cone: Cone) -> Bool[Array, ""]:
    """Whether a cone is known to hold nothing but zero."""
    known = getattr(cone, "holds_only_zero", None)
    return jnp.asarray(known is not None and known())


def refuse_other(cone: object) -> None:
    """Raises unless `cone` can be projected on; a class, or the module, is not its instance."""
    if not callable(getattr(type(cone), "project", None)):
        raise TypeError(
            "cone must be a Rank, PooledRank, Subspace, Mask or Sparse, or have a method "
            "project(self, edit) that returns a cone.Projection(edit, norm, tail), as "
            f"{type(cone).__name__} has not: write it, or give a cone"
        )


def _is_size(x: Any) -> bool:
    return _checks.is_weight(x) and x.shape == () and jnp.finfo(x.dtype).bits >= 32


def _by_spectra(edit: PyTree, keep: Callable[[Spectra, int], Spectra], rank: int) -> Projection:
    rank = _checks.rank(rank)
    nearest, spectra, kept = refitted(edit, lambda spectra: keep(spectra, rank), rank)
    return Projection(nearest, *norm_and_tail(spectra, kept))


def _sizes_by_spectra(
    edit: PyTree, keep: Callable[[Spectra, int], Spectra], rank: int
) -> tuple[Scalar, Scalar]:
    spectra = spectra_of(edit)
    return norm_and_tail(spectra, keep(spectra, _checks.rank(rank)))


def _multiplied_out(edit: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x: lowrank.materialize(x) if isinstance(x, LowRank) else tree.upcast(x),
        edit,
        is_leaf=_checks.is_factored,
    )


def _nearest(edit: PyTree, nearest: PyTree) -> Projection:
    return Projection(nearest, tree.norm(nearest), geometry.distance(edit, nearest))


def _is_whole(allowed: Any, leaf: Array, where: str) -> bool:
    """Whether a mask is one boolean for a leaf, and not one an entry."""
    if jnp.result_type(allowed) != jnp.bool_:
        raise TypeError(f"{where} has dtype {jnp.result_type(allowed)}: give booleans")
    if jnp.shape(allowed) not in ((), leaf.shape):
        raise ValueError(
            f"{where} has shape {jnp.shape(allowed)} for a leaf of shape {leaf.shape}: "
            "give one boolean an entry, or one for the leaf"
        )
    return jnp.shape(allowed) == ()


@_lift.elementwise
def _within_mask(scalars: Sequence[Any], arrays: Sequence[Array]) -> Array:
    (allowed,), (edit, mask) = scalars, arrays
    inside = mask if mask.dtype == bool else True
    return jnp.where((allowed != 0) & inside, edit, 0)
