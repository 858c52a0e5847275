r"""EMR: one edit for all models, and a mask and a number for each."""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from wspace import _checks, _lift
from wspace._numerics import where_kept
from wspace._records import record
from wspace._words import described
from wspace.merge.parts.elect import disjoint_merge, elect
from wspace.merge.task import differences, siblings
from wspace.typing import Scalar, Weights, WeightsLike

__all__ = ["Unified", "emr", "emr_model"]


@record
class Unified(NamedTuple):
    """One edit for several tasks, with the masks and scales that recover each task's own edit.

    Attributes:
        edit: The unified task vector, in at least float32.
        masks: One tree of booleans a task: where the edit has the sign of its task vector.
        scales: One number a task, by which the masked edit has the 1-norm of its task vector.
    """

    edit: PyTree
    masks: list[PyTree]
    scales: Float[Array, " k"]


def emr(base: WeightsLike, tuned: Sequence[WeightsLike]) -> Unified:
    r"""EMR: elect one edit for all tasks, with a mask and a scale for each: no task is averaged.

    $$
    \tau_j = \gamma_j \max_{i:\, \operatorname{sgn} \tau_{ij} = \gamma_j} |\tau_{ij}|, \qquad
    \gamma_j = \operatorname{sgn} \sum_i \tau_{ij}, \qquad
    m_{ij} = [\, \tau_{ij}\, \tau_j > 0 \,], \qquad
    s_i = \frac{\lVert \tau_i \rVert_1}{\lVert m_i\, \tau \rVert_1}
    $$

    One task comes back exactly. Permuting the models permutes masks and scales, scaling all task
    vectors scales the edit alone, and negating them negates it alone. Both norms are sums over
    the whole tree: means of leaves, added up, let small leaves outweigh large ones. Where votes
    cancel no task has the entry.

    Args:
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.

    Returns:
        The [`Unified`][wspace.merge.Unified] edit $\tau$ with masks $m_i$ and scales $s_i$, 0 for
            a mask under which there is nothing. A model is
            [`emr_model`][wspace.merge.emr_model] of it.

    Raises:
        ValueError: If there is no model, or the trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> base = jnp.zeros(3)
        >>> unified = merge.emr(base, [jnp.array([4.0, -2.0, 0.0]), jnp.array([2.0, 1.0, 1.0])])
        >>> unified.edit, unified.scales
        (Array([ 4., -2.,  1.], dtype=float32), Array([1. , 0.8], dtype=float32))
        >>> merge.emr_model(base, unified, 1)
        Array([3.2, 0. , 0.8], dtype=float32)

    References:
        C. Huang et al., *EMR-Merging: Tuning-Free High-Performance Model Merging*, NeurIPS 2024,
        section 3, [arXiv:2405.17461](https://arxiv.org/abs/2405.17461).
    """
    tuned, _ = siblings(base, tuned, None)
    edits = differences(base, tuned)
    edit = disjoint_merge(edits, elect(edits), divide="largest")
    masks = [_same_sign((), (x, edit)) for x in edits]
    kept = [_masked((), (edit, mask)) for mask in masks]
    return Unified(
        edit, masks, jnp.stack([_rescaling(x, y) for x, y in zip(edits, kept, strict=True)])
    )


def emr_model(base: WeightsLike, unified: Unified, index: int) -> Weights:
    r"""The model of one task, as it comes out of a unified edit.

    $$
    \hat\theta_i = \theta_0 + s_i\, m_i\, \tau
    $$

    Args:
        base: The weights $\theta_0$.
        unified: What [`emr`][wspace.merge.emr] returned.
        index: The place of the task's model in the sequence given to `emr`.

    Returns:
        The weights $\hat\theta_i$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: If the trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.
        IndexError: If there is no such task.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> unified = merge.emr(jnp.zeros(2), [jnp.array([4.0, -2.0])])
        >>> merge.emr_model(jnp.zeros(2), unified, 0)
        Array([ 4., -2.], dtype=float32)
    """
    if not isinstance(unified, Unified):
        raise TypeError(f"unified must be what merge.emr returns, got {described(unified)}")
    try:
        index = operator.index(index)
    except TypeError as error:
        raise TypeError(f"index must be an integer, got {described(index)}") from error
    _checks.same_layout(base=base, edit=unified.edit)
    return _of_task((unified.scales[index],), (base, unified.edit, unified.masks[index]))


@_lift.elementwise
def _of_task(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (scale,), (base, edit, mask) = scalars, arrays
    return base + scale * where_kept(mask, edit)


@_lift.elementwise
def _same_sign(_: Sequence[Scalar], arrays: Sequence[Array]) -> Bool[Array, "*s"]:
    x, edit = arrays
    return (jnp.sign(x) == jnp.sign(edit)) & (edit != 0)


@_lift.elementwise
def _masked(_: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    edit, mask = arrays
    return where_kept(mask, edit)


def _rescaling(whole: WeightsLike, part: WeightsLike) -> Scalar:
    left = _sum_of_sizes((), (part,))
    return jnp.where(left == 0, 0, _sum_of_sizes((), (whole,)) / jnp.where(left == 0, 1, left))


@_lift.reduction
def _sum_of_sizes(_: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    return jnp.abs(arrays[0])
