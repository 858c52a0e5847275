r"""Low-rank edits: a matrix kept as two thin factors.

An edit $U V^\top$ of rank $r$ of an $(m, n)$ matrix is kept as $U$ `(m, r)` and $V$ `(n, r)`,
in float32, and multiplied out only where it is added to weights. Every edit is added:
`apply(base, edit)` is base plus edit.

One function, [`as_matrix`][wspace.lowrank.as_matrix], decides which matrix a leaf is. A leaf of
fewer than two dimensions is a matrix with one column: untouched at rank 0, whole from rank 1.

Singular values need all of a matrix in one place: a sharded leaf is replicated for the
factorization, one leaf at a time, and results that are weights are sharded again.
"""

from wspace.lowrank.algebra import add, apply, combine, norm, scale, vdot
from wspace.lowrank.factors import LowRank, as_matrix, materialize
from wspace.lowrank.lora import from_lora, to_lora
from wspace.lowrank.spectrum import effective_rank, rank_for, singular_values, stable_rank
from wspace.lowrank.truncation import Truncation, extract, truncate, truncate_outputs

__all__ = [
    "LowRank",
    "Truncation",
    "add",
    "apply",
    "as_matrix",
    "combine",
    "effective_rank",
    "extract",
    "from_lora",
    "materialize",
    "norm",
    "rank_for",
    "scale",
    "singular_values",
    "stable_rank",
    "to_lora",
    "truncate",
    "truncate_outputs",
    "vdot",
]
