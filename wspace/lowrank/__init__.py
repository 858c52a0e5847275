r"""Low-rank edits: a matrix kept as two thin factors.

An edit $U V^\top$ of rank $r$ of an $(m, n)$ matrix is kept as $U$ `(m, r)` and $V$ `(n, r)`,
in float32, and multiplied out only where it is added to weights. Every edit is added:
`apply(base, edit)` is base plus edit.

One function, [`as_matrix`][wspace.lowrank.as_matrix], decides which matrix a leaf is. A leaf of
fewer than two dimensions is a matrix with one column: untouched at rank 0, whole from rank 1.

Singular values need all of a matrix in one place: a sharded leaf is replicated for the
factorization, one leaf at a time, and results that are weights are sharded again.
"""

from wspace.lowrank.algebra import LowRank, apply, as_matrix, materialize
from wspace.lowrank.spectrum import singular_values
from wspace.lowrank.truncation import Truncation, truncate

__all__ = [
    "LowRank",
    "Truncation",
    "apply",
    "as_matrix",
    "materialize",
    "singular_values",
    "truncate",
]
