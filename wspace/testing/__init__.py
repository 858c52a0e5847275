"""Laws of operators on weights, as tests of your own; needs the extra `wspace[testing]`.

An *operator* takes weights, as one tree, several trees or a sequence of trees, and returns weights
or numbers. A *law* says what must come out if what goes in is changed: scaled, reordered, rounded,
batched. A checker `check_...` tries a law on given weights and raises an `AssertionError` that
names the law, the leaf and the difference. A strategy of [Hypothesis](https://hypothesis.works)
draws the weights.
"""

import importlib

try:
    # Asked for here, where one line says which extra to install.
    importlib.import_module("hypothesis")
except ImportError as error:
    raise ImportError('wspace.testing needs hypothesis: pip install "wspace[testing]"') from error

from wspace.testing.comparison import assert_close, like, size, vector
from wspace.testing.derived import check_transforms
from wspace.testing.factors import low_rank_edits, matrices
from wspace.testing.laws import (
    check_affine_equivariant,
    check_exact_ends,
    check_half_precision,
    check_idempotent,
    check_odd,
    check_permutation_invariant,
    check_scale,
)
from wspace.testing.strategies import (
    LAYOUTS,
    coefficients,
    dtypes,
    keys,
    pairs,
    points,
    tuned,
    weights,
)

__all__ = [
    "LAYOUTS",
    "assert_close",
    "check_affine_equivariant",
    "check_exact_ends",
    "check_half_precision",
    "check_idempotent",
    "check_odd",
    "check_permutation_invariant",
    "check_scale",
    "check_transforms",
    "coefficients",
    "dtypes",
    "keys",
    "like",
    "low_rank_edits",
    "matrices",
    "pairs",
    "points",
    "size",
    "tuned",
    "vector",
    "weights",
]
