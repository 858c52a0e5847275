r"""MagMax: each entry from the model that changed it most."""

import functools
from collections.abc import Sequence

from jaxtyping import Array

from wspace import _checks, _lift
from wspace._numerics import larger
from wspace.merge.task import siblings
from wspace.typing import ByLeaf, LeafCoefficients, Scalar, Weights, WeightsLike

__all__ = ["magmax"]


def magmax(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: LeafCoefficients | None = None,
    *,
    scale: ByLeaf = 1.0,
) -> Weights:
    r"""MagMax: each entry from the model that changed it most.

    $$
    \theta_j = \theta_{0j} + \lambda\, c_i\, \tau_{ij}, \qquad
    i = \arg\max_i |c_i\, \tau_{ij}|
    $$

    Where two are equally large the first one wins, so that permuting models matters there alone.
    One model at $c = \lambda = 1$ comes back to rounding, negated coefficients negate the
    displacement exactly, and a model given twice counts once.

    Args:
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        coefficients: The $c_i$, one a model or one for each of its
            [leaves][wspace.typing.ByLeaf], of any sign; ones if not given.
        scale: The number $\lambda$, or one for each [leaf][wspace.typing.ByLeaf].

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: If the counts differ or are zero, or a known number is not finite; or if the
            trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.magmax(jnp.zeros(2), [jnp.array([1.0, -2.0]), jnp.array([-3.0, 2.0])])
        Array([-3., -2.], dtype=float32)

    References:
        D. Marczak et al., *MagMax: Leveraging Model Merging for Seamless Continual Learning*,
        ECCV 2024, [arXiv:2407.06322](https://arxiv.org/abs/2407.06322).
    """
    tuned, known = siblings(base, tuned, coefficients)
    return _largest((_checks.by_leaf("scale", scale, base), *known), (base, *tuned))


@_lift.elementwise
def _largest(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (scale, *coefficients), (base, *tuned) = scalars, arrays
    terms = [c * (x - base) for c, x in zip(coefficients, tuned, strict=True)]
    return base + scale * functools.reduce(larger, terms)
