r"""NegMerge: the base less what all fine-tunes on one thing agree on."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

from wspace import _checks, _lift
from wspace.merge.task import siblings
from wspace.typing import ByLeaf, Scalar, Weights, WeightsLike

__all__ = ["negmerge"]


def negmerge(base: WeightsLike, tuned: Sequence[WeightsLike], strength: ByLeaf = 1.0) -> Weights:
    r"""NegMerge: the base less what all of several fine-tunes on one thing agree on in sign.

    $$
    \theta_j = \theta_{0j} - \frac{\lambda}{k} \sum_{i=1}^{k} \tau_{ij}
        \Bigl[\, \operatorname{sgn} \tau_{1j} = \dots = \operatorname{sgn} \tau_{kj} \,\Bigr]
    $$

    The models are trained on what is to be forgotten, each with other settings; an entry in which
    one of them does not move, or moves the other way, keeps the value of the base. One model is
    [`task_arithmetic`][wspace.merge.task_arithmetic] with coefficient $-\lambda$. Permuting the
    models changes rounding alone, negating all task vectors negates the displacement exactly.

    Args:
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        strength: The number $\lambda$, of any sign, or one for each [leaf][wspace.typing.ByLeaf];
            a negative one adds.

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: If there is no model or `strength` is known and not finite; or if the trees
            differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.negmerge(jnp.zeros(2), [jnp.array([1.0, 2.0]), jnp.array([3.0, -2.0])])
        Array([-2.,  0.], dtype=float32)

    References:
        H. Kim, D. Han, J. Choe, *NegMerge: Sign-Consensual Weight Merging for Machine Unlearning*,
        ICML 2025, [arXiv:2410.05583](https://arxiv.org/abs/2410.05583).
    """
    tuned, _ = siblings(base, tuned, None)
    return _less_consensus((_checks.by_leaf("strength", strength, base),), (base, *tuned))


@_lift.elementwise
def _less_consensus(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (strength,), (base, *tuned) = scalars, arrays
    edits = [x - base for x in tuned]
    signs = [jnp.sign(x) for x in edits]
    agree = functools.reduce(jnp.logical_and, [s == signs[0] for s in signs])
    mean = sum(edits[1:], edits[0]) / len(edits)
    undefined = functools.reduce(jnp.logical_or, map(jnp.isnan, edits))
    return base - strength * jnp.where(agree | undefined, mean, 0)
