"""Numbers that merges ask for: shares of entries, for all models or each, and the largest entry."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from wspace import _checks, _lift
from wspace.typing import Scalar, WeightsLike

Densities: TypeAlias = float | Sequence[float] | PyTree[float]
"""A density for all models, or one a model, each a number or a tree of them."""


WHOLE = 1 + float(np.finfo(np.float32).eps)
"""What shares may add up to, as 0.99 and 0.01 of float32 do."""


def count(share: float, size: int) -> int:
    """A share of `size` entries as a number of entries, rounded down."""
    return math.floor(share * size)


def part(name: str, value: Any) -> float:
    """A share of entries from 0 to below 1, known when tracing."""
    if _checks.is_traced(value):
        raise TypeError(f"{name} must be a plain number, got a traced one: close over it")
    _checks.scalar(name, value, lambda known: 0 <= known < 1, "from 0 to below 1")
    return float(value)


def share(name: str, value: Any, like: WeightsLike, scope: str) -> Any:
    """A share above 0 and up to 1, or an array of one for each leaf where it is a tree."""
    if scope == "tree" and _checks.is_tree(value):
        raise ValueError(
            f"{name} is a tree of numbers, but over the whole tree one share of all entries stays: "
            'give one number, or scope="leaf" where there is that choice'
        )
    return _checks.by_leaf(name, value, like, _checks.share)


def share_of_each(name: str, value: Any, models: int) -> list[Any]:
    """A share above 0 and up to 1, or a tree of them, for each model, or one for all."""
    is_tree = isinstance(value, Mapping) or hasattr(value, "_fields")
    if is_tree or not hasattr(value, "__len__") or np.shape(value) == ():
        return [value if _checks.is_tree(value) else _checks.share(name, value)] * models
    if len(value) != models:
        raise ValueError(
            f"{name} has {len(value)} numbers for {models} models: give one number a model, or "
            "one for all"
        )
    return [
        one if _checks.is_tree(one) else _checks.share(f"{name}[{i}]", one)
        for i, one in enumerate(value)
    ]


@functools.partial(_lift.reduction, kind="max")
def _sizes(_: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    return jnp.abs(arrays[0])


def peak_of(x: WeightsLike) -> Scalar:
    """The largest magnitude in a tree, 0 where there is nothing."""
    return jnp.maximum(_sizes((), (x,)), 0)
