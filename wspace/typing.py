"""The types that signatures speak in."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree, Real

__all__ = [
    "Coefficients",
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

Matrix: TypeAlias = Float[Array | np.ndarray, "... _ _"]
"""A floating-point matrix `(m, n)`, or a stack of them `(..., m, n)`."""

Weights: TypeAlias = PyTree[Float[Array, "?*leaf"], " W"]
"""A tree of floating-point JAX arrays. Within one signature, every `Weights` and
`WeightsLike` has the same structure and the same shape at each leaf."""

WeightsLike: TypeAlias = PyTree[Float[Array | np.ndarray, "?*leaf"], " W"]
"""As [`Weights`][wspace.typing.Weights], NumPy leaves allowed."""

Path: TypeAlias = Callable[[ScalarLike], Weights]
"""A path through weight space: from a position `t` to a point, such as
`functools.partial(interpolate.slerp, start, end)`."""

Loss: TypeAlias = Callable[[WeightsLike], Scalar]
"""A scalar function of the weights."""
