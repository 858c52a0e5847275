r"""Arcee Fusion: the base with those entries of another model whose importance is an outlier."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from wspace import _checks, _lift, tree
from wspace.selection import kth_magnitude
from wspace.typing import Scalar, Weights, WeightsLike

__all__ = ["arcee_fusion"]


def arcee_fusion(base: WeightsLike, tuned: WeightsLike) -> Weights:
    r"""Arcee Fusion: the base with those entries of another model whose importance is an outlier.

    $$
    \theta_j = \theta_{0j} + \tau_j\, [\, s_j \ge q_{1/2} + \tfrac32\, (q_{3/4} - q_{1/4}) \,],
    \qquad
    s_j = |\tau_j|\; D\bigl(\operatorname{softmax} \theta_{1,r(j)} \,\big\Vert\,
        \operatorname{softmax} \theta_{0,r(j)}\bigr)
    $$

    Every leaf is taken by itself. $r(j)$ is the row of an entry, those that differ from it in
    the last index alone, $D$ the relative entropy, and $q$ are the quantiles of the importance in
    the leaf, the $\lfloor q\,(n - 1) \rfloor$-th entry counted from the least; all entries are
    counted, where mergekit draws a million of a larger leaf, so that what it keeps is random.

    The softmax of weights is no distribution that a model has, and depends on their scale: the
    merge is not equivariant under it. A leaf whose rows hold one number has no importance and is
    taken whole, as is a leaf of which three quarters did not move.

    Args:
        base: The weights $\theta_0$.
        tuned: The weights $\theta_1$, of the same layout.

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`. Their derivatives are
            those for a fixed selection.

    Raises:
        ValueError: If the trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.arcee_fusion(jnp.zeros(6), jnp.array([0.1, -0.2, 0.3, 0.1, -0.2, 2.0]))
        Array([0., 0., 0., 0., 0., 2.], dtype=float32)

    References:
        The merge method `arcee_fusion` of mergekit 0.1.5.
    """
    _checks.same_layout(base=base, tuned=tuned)
    return jax.tree.map(_fused, base, tuned)


def _fused(base: Array | np.ndarray, tuned: Array | np.ndarray) -> Array:
    if not base.size:
        return jnp.asarray(base)
    importance = jax.lax.stop_gradient(_importance(*tree.widened(base, tuned)))
    ranks = (base.size - int(share * (base.size - 1)) for share in (0.25, 0.5, 0.75))
    quantiles = [kth_magnitude(importance, rank) for rank in ranks]
    return _above(quantiles, (base, tuned, importance))


@jax.jit
def _importance(base: Array, tuned: Array) -> Array:
    """How far an entry moved, times how far the softmax of its row did."""
    if not base.ndim:
        return jnp.zeros_like(base)
    p, q = (jax.nn.log_softmax(x, axis=-1) for x in (tuned, base))
    divergence = jnp.sum(jnp.exp(p) * (p - q), axis=-1, keepdims=True)
    return jnp.abs(tuned - base) * jnp.maximum(divergence, 0)


@_lift.elementwise
def _above(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (least, middle, most), (base, tuned, importance) = scalars, arrays
    small = importance < middle + 1.5 * (most - least)  # NaN is not, and shows
    return base + jnp.where(small, 0, tuned - base)
