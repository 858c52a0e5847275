r"""NearSwap: the base moved towards another model, entry by entry, by no more than a step."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

from wspace import _checks, _lift
from wspace.typing import ByLeaf, Scalar, Weights, WeightsLike

__all__ = ["nearswap"]


def nearswap(base: WeightsLike, tuned: WeightsLike, threshold: ByLeaf) -> Weights:
    r"""NearSwap: the base with every entry moved towards the other model, by no more than a step.

    $$
    \theta_j = \theta_{0j} + \operatorname{clip}(\theta_{1j} - \theta_{0j}, -t, t)
    $$

    Entries that are near take the value of the other model, and those that are far keep close to
    their own: the nearest point to the other model in a cube about the base. It is usually written
    as an interpolation by $\min(1, t / |\theta_{1j} - \theta_{0j}|)$, which is the same without a
    division. Scaling both models and $t$ scales the result.

    Args:
        base: The weights $\theta_0$.
        tuned: The weights $\theta_1$, of the same layout.
        threshold: The largest step $t \ge 0$, or one for each [leaf][wspace.typing.ByLeaf].

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: If `threshold` is known and negative (NaN if traced); or if the trees differ in
            structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.nearswap(jnp.zeros(3), jnp.array([0.25, -4.0, 0.0]), 0.5)
        Array([ 0.25, -0.5 ,  0.  ], dtype=float32)

    References:
        The merge method `nearswap` of mergekit 0.1.5.
    """
    _checks.same_layout(base=base, tuned=tuned)
    threshold = _checks.by_leaf("threshold", threshold, base, _checks.nonnegative)
    return _clipped((threshold,), (base, tuned))


@_lift.elementwise
def _clipped(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (threshold,), (base, tuned) = scalars, arrays
    return base + jnp.clip(tuned - base, -threshold, threshold)
