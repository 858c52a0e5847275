"""The types that signatures speak in."""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree, Real

from wspace._lazy import Lazy

__all__ = [
    "Allow",
    "ByLeaf",
    "Coefficients",
    "Layout",
    "Lazy",
    "Leaf",
    "LeafCoefficients",
    "Loss",
    "Matrix",
    "Path",
    "Scalar",
    "ScalarLike",
    "Weights",
    "WeightsLike",
]

Scalar: TypeAlias = Float[Array, ""]
"""A floating-point JAX scalar, as returned: float32 or wider."""

ScalarLike: TypeAlias = Real[ArrayLike, ""]
"""Any real scalar, as accepted."""

Coefficients: TypeAlias = Sequence[ScalarLike] | Real[Array | np.ndarray, " k"]
"""Mixing numbers of any sign, one per point: a sequence of scalars or an array `(k,)`."""

ByLeaf: TypeAlias = PyTree[Real[ArrayLike, ""]]
"""A number, or a tree of numbers: one for each leaf of the weights, or for a subtree, such as
[`tree.by_name`][wspace.tree.by_name] and [`tree.by_depth`][wspace.tree.by_depth] make."""

LeafCoefficients: TypeAlias = (
    Sequence[ByLeaf] | Real[Array | np.ndarray, " k"] | PyTree[Real[Array | np.ndarray, " k"]]
)
"""As [`Coefficients`][wspace.typing.Coefficients], each a number or a tree of them
([`ByLeaf`][wspace.typing.ByLeaf]); or one tree with an array `(k,)` at each leaf, as
[`fit.coefficients`][wspace.fit.coefficients] returns it."""

Layout: TypeAlias = Literal["in_out", "out_in"]
"""How layers store their matrices: `(in, out)`, a convolution `(..., in, out)`, as flax and haiku
do; or `(out, in)`, a convolution `(out, in, ...)`, as torch and equinox do."""

Leaf: TypeAlias = Float[Array | np.ndarray | Lazy, "..."]
"""One leaf of a tree of weights, of any shape: an array, or a lazy leaf, whose entries are read
when they are needed."""

Matrix: TypeAlias = Float[Array | np.ndarray, "... _ _"]
"""A floating-point matrix `(m, n)`, or a stack of them `(..., m, n)`."""

Weights: TypeAlias = PyTree[Float[Array | Lazy, "?*leaf"], " W"]
"""A tree of floating-point JAX arrays; lazy leaves where some were given. Within one signature,
every `Weights` and `WeightsLike` has the same structure and the same shape at each leaf."""

WeightsLike: TypeAlias = PyTree[Float[Array | np.ndarray | Lazy, "?*leaf"], " W"]
"""As [`Weights`][wspace.typing.Weights], NumPy leaves allowed."""

Allow: TypeAlias = Sequence[PyTree | None]
"""Where each of several points may move. Per point `None`, everywhere, or a tree like the
weights with, at each leaf, `1.0` (free), `0.0` (frozen), or for a matrix `x @ W` a projector
`(in, in)` onto the inputs whose rows may change; or any symmetric positive semidefinite matrix,
the inverse of a metric."""

Path: TypeAlias = Callable[[ScalarLike], Weights]
"""A path through weight space: from a position `t` to a point, such as
`functools.partial(interpolate.slerp, start, end)`."""

Loss: TypeAlias = Callable[[WeightsLike], Scalar]
"""A scalar function of the weights."""
