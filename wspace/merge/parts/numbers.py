"""Numbers that merges ask for: shares of entries, for all models or each, and the largest entry."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from wspace import _checks, _lift
from wspace.typing import Scalar, WeightsLike


def count(share: float, size: int) -> int:
    """A share of `size` entries as a number of entries, rounded down."""
    return math.floor(share * size)


def part(name: str, value: Any) -> float:
    """A share of entries from 0 to below 1, known when tracing."""
    if _checks.is_traced(value):
        raise TypeError(f"{name} must be a plain number, got a traced one: close over it")
    _checks.scalar(name, value, lambda known: 0 <= known < 1, "from 0 to below 1")
    return float(value)


def share_of_each(name: str, value: Any, models: int) -> list[float]:
    """A share above 0 and up to 1 for each model, given as one number for all or one a model."""
    if not hasattr(value, "__len__") or np.shape(value) == ():
        return [_checks.share(name, value)] * models
    if len(value) != models:
        raise ValueError(
            f"{name} has {len(value)} numbers for {models} models: give one number a model, or "
            "one for all"
        )
    return [_checks.share(f"{name}[{i}]", one) for i, one in enumerate(value)]


@functools.partial(_lift.reduction, kind="max")
def _sizes(_: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    return jnp.abs(arrays[0])


def peak_of(x: WeightsLike) -> Scalar:
    """The largest magnitude in a tree, 0 where there is nothing."""
    return jnp.maximum(_sizes((), (x,)), 0)
