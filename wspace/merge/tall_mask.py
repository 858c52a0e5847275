r"""TALL masks: where a task is in a sum of task vectors, and where several are."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_leaves_with_path
from jaxtyping import Array, Bool, PyTree

from wspace import _checks, _lift
from wspace.typing import Scalar, ScalarLike, WeightsLike

__all__ = ["consensus_mask", "tall_mask"]


def tall_mask(edit: WeightsLike, total: WeightsLike, strength: ScalarLike = 0.4) -> PyTree:
    r"""Where a task vector is large beside all that others add to it: the TALL mask.

    $$
    m_j = \bigl[\, |\tau_j| > \lambda\, |T_j - \tau_j| \,\bigr], \qquad
    T = \sum_i \tau_i
    $$

    The task vector is compared with the total less itself. Scaling both scales nothing, negating
    both changes nothing, and where others cancel or are zero an entry is needed unless it is zero.

    Args:
        edit: The task vector $\tau$.
        total: The merged task vector $T$ that it is a part of, of the same layout.
        strength: The number $\lambda \ge 0$; the larger, the fewer entries. The masks of rising
            $\lambda$ are nested.

    Returns:
        A tree of boolean arrays of the layout and sharding of `edit`. `cone.project` with a
            [`cone.Mask`][wspace.cone.Mask] of it keeps those entries of an edit.

    Raises:
        ValueError: If `strength` is known and negative (if traced, nothing is selected); or if
            the trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.tall_mask(jnp.array([1.0, 1.0, 0.0]), jnp.array([1.5, -4.0, 0.0]))
        Array([ True, False, False], dtype=bool)

    References:
        K. Wang et al., *Localizing Task Information for Improved Model Merging and Compression*,
        ICML 2024, [arXiv:2405.07813](https://arxiv.org/abs/2405.07813).
    """
    strength = _checks.scalar("strength", strength, lambda s: s >= 0, "at least 0")
    _checks.same_layout(edit=edit, total=total)
    return _stands_out((strength,), (edit, total))


@_lift.elementwise
def _stands_out(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Bool[Array, "*s"]:
    (strength,), (x, total) = scalars, arrays
    return jnp.abs(x) > strength * jnp.abs(total - x)


def consensus_mask(masks: Sequence[PyTree], at_least: int = 2) -> PyTree:
    r"""The entries that several tasks need.

    $$
    m_j = \Bigl[\, \sum_i m_{ij} \ge k \,\Bigr]
    $$

    With $k = 1$ it is the union and with $k$ the number of masks the intersection; the masks of
    rising $k$ are nested, and the order of the masks does not matter. The consensus merge is
    [`task_arithmetic`][wspace.merge.task_arithmetic] under the mask.

    Args:
        masks: Trees of boolean arrays of one layout, at least one, as from
            [`tall_mask`][wspace.merge.tall_mask].
        at_least: The number $k$, at least 0: 2 drops what one task alone needs.

    Returns:
        A tree of boolean arrays of the same layout.

    Raises:
        ValueError: If there is no mask, `at_least` is negative, or the masks differ in structure
            or in a leaf's shape.
        TypeError: If a leaf is not boolean, or `at_least` is not an integer.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> masks = [jnp.array([True, True, False]), jnp.array([False, True, False])]
        >>> merge.consensus_mask(masks)
        Array([False,  True, False], dtype=bool)

    References:
        K. Wang et al., *Localizing Task Information for Improved Model Merging and Compression*,
        ICML 2024, [arXiv:2405.07813](https://arxiv.org/abs/2405.07813).
    """
    at_least = _checks.rank(at_least, "at_least")
    named = _checks.each("masks", _checks.listed("masks", masks))
    _checks.same_layout(**{name: _layout(name, mask) for name, mask in named.items()})
    return _voted((np.uint32(at_least),), list(named.values()))


@_lift.elementwise
def _voted(scalars: Sequence[Any], masks: Sequence[Array]) -> Bool[Array, "*s"]:
    votes = [mask.astype(jnp.uint32) for mask in masks]
    return functools.reduce(jnp.add, votes) >= scalars[0]


def _layout(name: str, mask: PyTree) -> PyTree:
    """The layout of a mask, as if it were weights."""
    for path, leaf in tree_leaves_with_path(mask):
        if jnp.result_type(leaf) != jnp.bool_:
            raise TypeError(
                f"leaf {_checks.path_of(path)} of {name} has dtype {jnp.result_type(leaf)}: "
                "give booleans"
            )
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), jnp.float32), mask)
