"""The order of entries: by the code of their magnitude, then by leaf, then by place in the leaf."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, DTypeLike, UInt

from wspace._numerics import Wide


class Codes(NamedTuple):
    """The unsigned dtype whose integers stand for magnitudes, and the largest of them, for NaN."""

    dtype: type
    nan: int


def codes_of(wide: DTypeLike) -> Codes:
    """The integers of float32 or float64."""
    if wide == np.float64:
        return Codes(np.uint64, 0x7FF0000000000001)
    return Codes(np.uint32, 0x7F800001)


def code(x: Array, wide: Wide) -> UInt[Array, "*s"]:
    """Magnitudes as integers of the same order, all NaN as one; codes stay as they are."""
    dtype, nan = codes_of(wide)
    if x.dtype == dtype:
        return x
    bits = lax.bitcast_convert_type(x.astype(wide), dtype)
    return jnp.minimum(bits & jnp.asarray(jnp.iinfo(dtype).max >> 1, dtype), nan)


class Keys(NamedTuple):
    """The last entry selected, by three integers that fall from the first entry to the last.

    Attributes:
        code: That of its magnitude.
        number: How many leaves come after its own.
        place: How many entries of its leaf come after it.
    """

    code: Any
    number: Any
    place: Any


def numbers(leaves: Any) -> list[np.uint32]:
    """How many leaves come after each."""
    return [np.uint32(len(leaves) - 1 - i) for i in range(len(leaves))]


def first_place(size: int) -> np.uint32:
    """How many entries come after the first one of a leaf."""
    return np.uint32(max(size, 1) - 1)
