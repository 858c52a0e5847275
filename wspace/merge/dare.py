r"""DARE: random entries of task vectors, added up or merged by an election of signs."""

from collections.abc import Sequence

import jax
from jaxtyping import Array

from wspace import _checks
from wspace.merge.parts.drop import Rescale, drop
from wspace.merge.parts.elect import Election, agreed
from wspace.merge.parts.numbers import Densities, share_of_each
from wspace.merge.task import differences, moved, siblings
from wspace.typing import ByLeaf, LeafCoefficients, Weights, WeightsLike

__all__ = ["dare", "dare_ties"]


def dare(
    key: Array,
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: LeafCoefficients | None = None,
    *,
    density: Densities = 0.5,
    rescale: Rescale = "inverse",
    scale: ByLeaf = 1.0,
) -> Weights:
    r"""DARE: drop random entries of the task vectors, enlarge the rest, add them up.

    $$
    \theta = \theta_0 + \lambda \sum_i c_i \operatorname{drop}_\rho(\theta_i - \theta_0)
    $$

    By default the expectation is [`task_arithmetic`][wspace.merge.task_arithmetic]. Negated
    coefficients negate the displacement exactly. Each model has its own key, folded from its
    place in the sequence, so that permuting models draws other masks for them.

    Args:
        key: A random key.
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        coefficients: The $c_i$, one a model or one for each of its
            [leaves][wspace.typing.ByLeaf], of any sign; ones if not given.
        density: The probability $\rho$ that an entry stays, one for all models or one a model,
            or one for each [leaf][wspace.typing.ByLeaf], above 0 and at most 1.
        rescale: The factor of what stays: `"inverse"`, $1/\rho$; `"norm"`, by which a leaf keeps
            its 1-norm, though not its expectation; or `"none"`, 1.
        scale: The number $\lambda$, or one for each [leaf][wspace.typing.ByLeaf].

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: If the counts differ or are zero, a known number is not finite or out of its
            domain, or an option is unknown; or if the trees differ in structure or in a leaf's
            shape.
        TypeError: If a density is traced, or a leaf is not floating-point.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.dare(jax.random.key(0), jnp.zeros(6), [jnp.ones(6)], density=0.5)
        Array([0., 2., 2., 2., 0., 0.], dtype=float32)

    References:
        L. Yu et al., *Language Models are Super Mario: Absorbing Abilities from Homologous Models
        as a Free Lunch*, ICML 2024, [arXiv:2311.03099](https://arxiv.org/abs/2311.03099).
    """
    _checks.random_key(key)
    tuned, known = siblings(base, tuned, coefficients)
    return moved(base, _dropped(key, base, tuned, density, rescale), known, scale)


def dare_ties(
    key: Array,
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: LeafCoefficients | None = None,
    *,
    density: Densities = 0.5,
    rescale: Rescale = "inverse",
    election: Election = Election(),
    scale: ByLeaf = 1.0,
) -> Weights:
    r"""DARE and then TIES: drop random entries in place of small ones, elect, merge what agrees.

    $$
    \theta = \theta_0 + \lambda\, \operatorname{merge}_\gamma(c, \hat\tau), \qquad
    \hat\tau_i = \operatorname{drop}_\rho(\theta_i - \theta_0), \qquad
    \gamma = \operatorname{sgn} \sum_i c_i\, \hat\tau_i
    $$

    By default negated coefficients negate the displacement exactly.

    Known as DARE-TIES.

    Args:
        key: A random key.
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        coefficients: The $c_i$, one a model or one for each of its
            [leaves][wspace.typing.ByLeaf], of any sign; ones if not given.
        density: The probability $\rho$ that an entry stays, one for all models or one a model,
            or one for each [leaf][wspace.typing.ByLeaf], above 0 and at most 1.
        rescale: The factor of what stays: `"inverse"`, $1/\rho$; `"norm"`, by which a leaf keeps
            its 1-norm, though not its expectation; or `"none"`, 1.
        election: How a sign is elected for each entry and what has it is merged, an
            [`Election`][wspace.merge.Election].
        scale: The number $\lambda$, or one for each [leaf][wspace.typing.ByLeaf].

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: If the counts differ or are zero, a known number is not finite or out of its
            domain, or an option is unknown; or if the trees differ in structure or in a leaf's
            shape.
        TypeError: If a density is traced, or a leaf is not floating-point.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.dare_ties(jax.random.key(0), jnp.zeros(6), [jnp.ones(6), -jnp.ones(6)])
        Array([ 0.,  0.,  0.,  0., -2., -2.], dtype=float32)

    References:
        L. Yu et al., *Language Models are Super Mario: Absorbing Abilities from Homologous Models
        as a Free Lunch*, ICML 2024, section 3.3,
        [arXiv:2311.03099](https://arxiv.org/abs/2311.03099).
    """
    _checks.random_key(key)
    tuned, known = siblings(base, tuned, coefficients)
    return agreed(base, _dropped(key, base, tuned, density, rescale), known, election, scale)


def _dropped(
    key: Array,
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    density: Densities,
    rescale: Rescale,
) -> list[Weights]:
    """Task vectors of which random entries stay, each model with a key of its own."""
    densities = share_of_each("density", density, len(tuned))
    edits = zip(differences(base, tuned), densities, strict=True)
    return [
        drop(jax.random.fold_in(key, i), x, share, rescale=rescale)
        for i, (x, share) in enumerate(edits)
    ]
