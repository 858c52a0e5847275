r"""Ext-Sub: one model less what another has beyond the direction that both share."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

from wspace import _checks, _lift
from wspace._numerics import safe_sqrt
from wspace.typing import ByLeaf, Scalar, Weights, WeightsLike

__all__ = ["ext_sub"]


def ext_sub(
    base: WeightsLike, tuned: WeightsLike, avoid: WeightsLike, strength: ByLeaf = 1.0
) -> Weights:
    r"""Ext-Sub: subtract from one model what another has beyond the direction that both share.

    $$
    w = w_0 + a - \lambda\,(b - P_{\hat a + \hat b}\, b)
      = w_0 + a - \frac{\lambda}{2}\,\bigl( b - \lVert b \rVert\, \hat a \bigr)
    $$

    for every row, the entries of a leaf that differ in their last index alone, with the unit
    vectors $\hat a = a / \lVert a \rVert$ and $\hat b$. The projection onto the sum of two unit
    vectors is half that sum times the norm, which is the second form; it needs no division by a
    sum that may vanish.

    Where both rows point one way nothing is subtracted, where they are opposite all of $\lambda b$
    is. A row of zeros has no direction: with $b = 0$ nothing is subtracted, and with $a = 0$
    half of $\lambda b$, the mean over all directions. Scaling or turning all rows of both
    displacements scales or turns the rows of the result.

    Args:
        base: The weights $w_0$.
        tuned: The model $w_0 + a$ with what is wanted.
        avoid: The model $w_0 + b$ with what is not.
        strength: The number $\lambda$, of any sign, or one for each [leaf][wspace.typing.ByLeaf].

    Returns:
        The weights $w$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: If `strength` is known and not finite; or if the trees differ in structure or
            in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.ext_sub(jnp.zeros(2), jnp.array([2.0, 0.0]), jnp.array([0.0, 2.0]))
        Array([ 3., -1.], dtype=float32)

    References:
        X. Hu et al., *Separate the Wheat from the Chaff: Model Deficiency Unlearning via
        Parameter-Efficient Module Operation*, AAAI 2024,
        [arXiv:2308.08090](https://arxiv.org/abs/2308.08090).
    """
    _checks.same_layout(base=base, tuned=tuned, avoid=avoid)
    return _extracted((_checks.by_leaf("strength", strength, base),), (base, tuned, avoid))


@functools.partial(_lift.elementwise, scope="leaf")
def _extracted(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (strength,), (base, tuned, avoid) = scalars, arrays
    good, bad = tuned - base, avoid - base
    size, weight = _row_norms(good), _row_norms(bad)
    along = good / jnp.where(size == 0, 1, size)
    return tuned - strength / 2 * (bad - weight * along)


def _row_norms(x: Array) -> Array:
    return safe_sqrt(jnp.sum(jnp.square(x), axis=-1 if x.ndim else None, keepdims=True))
