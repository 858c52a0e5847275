"""Hypothesis strategies for matrices and for edits in thin factors."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from jaxtyping import DTypeLike, PyTree

from wspace.lowrank import LowRank
from wspace.testing.strategies import LAYOUTS, canonical, described, weights

__all__ = ["low_rank_edits", "matrices"]

SCALES = (2.0**-20, 1.0, 2.0**20)


def low_rank_edits(
    layout: PyTree | None = None, *, rank: int | None = None, dtype: DTypeLike | None = None
) -> SearchStrategy[PyTree]:
    """Edits with factors where weights have matrices, to be added by `lowrank.apply`.

    Matrices, stacks of matrices and convolutions become a
    [`LowRank`][wspace.lowrank.LowRank], and vectors and scalars stay arrays.

    Args:
        layout: As in [`weights`][wspace.testing.weights].
        rank: The number of columns of every factor, by default 0, 1 or 2.
        dtype: The dtype of all arrays, by default float32, float64 where JAX has it on.

    Returns:
        A strategy for trees.

    Examples:
        >>> from hypothesis import given, settings
        >>> from wspace import lowrank, testing
        >>> @settings(max_examples=3, deadline=None)
        ... @given(edit=testing.low_rank_edits({"w": (4, 3)}, rank=2))
        ... def test_norm_is_positive(edit):
        ...     assert lowrank.norm(edit) >= 0
        >>> test_norm_is_positive()
    """
    if layout is None:
        some = st.sampled_from(LAYOUTS)
        return some.flatmap(lambda one: low_rank_edits(one, rank=rank, dtype=dtype))
    if rank is None:
        some = st.sampled_from((0, 1, 2))
        return some.flatmap(lambda one: low_rank_edits(layout, rank=one, dtype=dtype))
    shapes, _, structure = described(layout)
    wide = float if dtype is None else dtype
    return st.tuples(*(_edits(shape, rank, wide) for shape in shapes)).map(structure.unflatten)


def matrices(shape: tuple, dtype: DTypeLike | None = None) -> SearchStrategy[jax.Array]:
    """Matrices with singular values that are distinct, repeated, zero or tiny.

    Args:
        shape: The shape `(m, n)`, or `(..., m, n)` for stacks.
        dtype: The dtype, by default float32, float64 where JAX has it on.

    Returns:
        A strategy for arrays.

    Examples:
        >>> from hypothesis import given, settings
        >>> from wspace import lowrank, testing
        >>> @settings(max_examples=3, deadline=None)
        ... @given(x=testing.matrices((4, 3)))
        ... def test_tail_of_full_rank_is_zero(x):
        ...     assert lowrank.truncate(x, 3).tail == 0
        >>> test_tail_of_full_rank_is_zero()
    """
    return _matrices(shape, dtype)


@st.composite
def _matrices(draw: Callable[..., Any], shape: Any, dtype: Any) -> jax.Array:
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    *stack, m, n = shape
    p = min(m, n)
    spectra = {
        "distinct": np.arange(p, 0, -1.0),
        "repeated": np.repeat([3.0, 1.0], [p - p // 2, p // 2]),
        "zeros": np.arange(p, 0, -1.0) * (np.arange(p) < (p + 1) // 2),
        "tiny": 10.0 ** -np.arange(0, 2 * p, 2.0),
    }
    spectrum = spectra[draw(st.sampled_from(sorted(spectra)))] * draw(st.sampled_from(SCALES))
    left = np.linalg.qr(rng.normal(size=(*stack, m, p)))[0]
    right = np.linalg.qr(rng.normal(size=(*stack, n, p)))[0]
    product = (left * spectrum) @ np.swapaxes(right, -1, -2)
    return jnp.asarray(product, canonical(dtype, None))


def _edits(shape: tuple, rank: int, dtype: DTypeLike) -> SearchStrategy:
    """Edits of one leaf."""
    if len(shape) < 2:
        return weights(shape, dtype)
    flat = len(shape) > 3
    *stack, m, n = (math.prod(shape[:-1]), shape[-1]) if flat else shape
    factors = st.tuples(weights((*stack, m, rank), dtype), weights((*stack, n, rank), dtype))
    return factors.map(lambda pair: LowRank(*pair))
