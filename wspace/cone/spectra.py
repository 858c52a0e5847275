"""The singular values of every leaf of an edit, and edits that have others in their place."""

import itertools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from wspace import _checks, lowrank, tree
from wspace.lowrank import LowRank
from wspace.lowrank.algebra import side_by_side
from wspace.lowrank.truncation import decomposed
from wspace.typing import Leaf, Scalar

Spectra: TypeAlias = list[Float[Array, "..."]]


def finite_edit(**edits: PyTree) -> None:
    """Raises unless edits, by name, are edits of known values without NaN."""
    for name, edit in edits.items():
        side_by_side(**{name: edit})
        _checks.finite(**{name: edit})


def _is_column(leaf: Leaf | LowRank) -> bool:
    return not isinstance(leaf, LowRank) and jnp.ndim(leaf) < 2


def spectra_of(edit: PyTree) -> Spectra:
    """The singular values of every leaf; a vector has one, its norm."""
    leaves = jax.tree.leaves(edit, is_leaf=_checks.is_factored)
    return [tree.norm(x)[None] if _is_column(x) else lowrank.singular_values(x) for x in leaves]


def refitted(
    edit: PyTree, fit: Callable[[Spectra], Spectra], rank: int | None = None
) -> tuple[PyTree, Spectra, Spectra]:
    """An edit with its singular values replaced, the old values, and the new ones.

    The factors have as many columns as `rank`, if the new values are zero from there on.
    """
    leaves, structure = jax.tree.flatten(edit, is_leaf=_checks.is_factored)
    parts = [None if _is_column(leaf) else decomposed(leaf) for leaf in leaves]
    spectra = [
        tree.norm(leaf)[None] if part is None else part.values
        for leaf, part in zip(leaves, parts, strict=True)
    ]
    fitted = fit(spectra)
    edits = [
        ratio(new[0], old[0]) * tree.upcast(leaf) if part is None else part.refit(new, rank)
        for leaf, part, old, new in zip(leaves, parts, spectra, fitted, strict=True)
    ]
    return structure.unflatten(edits), spectra, fitted


def largest(spectra: Spectra, rank: int) -> Spectra:
    """The largest singular values of every matrix, and zero in place of the others."""
    return [jnp.where(jnp.arange(s.shape[-1]) < rank, s, 0) for s in spectra]


def largest_of_all(spectra: Spectra, rank: int) -> Spectra:
    """The largest singular values of all matrices together; of equal ones the first."""
    values = pooled(spectra)
    order = jnp.argsort(-values, stable=True)
    kept = jnp.zeros(values.shape, bool).at[order[:rank]].set(True)
    stops = np.cumsum([0, *(s.size for s in spectra)])
    return [
        jnp.where(kept[i:j].reshape(s.shape), s, 0)
        for (i, j), s in zip(itertools.pairwise(stops), spectra, strict=True)
    ]


def pooled(spectra: Spectra) -> Float[Array, " n"]:
    """All singular values of a tree in one row."""
    rows = tree.widened(*(s.reshape(-1) for s in spectra))
    return jnp.concatenate(rows) if rows else jnp.zeros(0)


def norm_and_tail(spectra: Spectra, kept: Spectra) -> tuple[Scalar, Scalar]:
    """The norm of the singular values kept, and the norm of the rest."""
    left = [s - k for s, k in zip(spectra, kept, strict=True)]
    return tree.norm(kept), tree.norm(left)


def ratio(x: Float[Array, "*m"], y: Float[Array, "*n"]) -> Array:
    """A quotient, the numerator where the denominator is zero."""
    return x / jnp.where(y == 0, 1, y)
