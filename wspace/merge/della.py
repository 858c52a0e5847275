r"""DELLA: random entries of task vectors, large ones more likely, and a sign elected for each."""

from collections.abc import Sequence

import jax
from jaxtyping import Array

from wspace import _checks
from wspace.merge.parts.drop import Rescale
from wspace.merge.parts.elect import Election, agreed
from wspace.merge.parts.magprune import RankScope, magprune
from wspace.merge.parts.numbers import Densities, share_of_each
from wspace.merge.task import differences, siblings
from wspace.typing import ByLeaf, LeafCoefficients, Weights, WeightsLike

__all__ = ["della"]


def della(
    key: Array,
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: LeafCoefficients | None = None,
    *,
    density: Densities = 0.5,
    width: float = 0.05,
    scope: RankScope = "row",
    rescale: Rescale = "inverse",
    election: Election = Election(),
    scale: ByLeaf = 1.0,
) -> Weights:
    r"""DELLA: drop random entries, small ones more likely, elect a sign, merge what agrees.

    $$
    \theta = \theta_0 + \lambda\, \operatorname{merge}_\gamma(c, \hat\tau), \qquad
    \hat\tau_i = \operatorname{magprune}_{\rho, \epsilon}(\theta_i - \theta_0), \qquad
    \gamma = \operatorname{sgn} \sum_i c_i\, \hat\tau_i
    $$

    By default negated coefficients negate the displacement exactly, and width 0 is
    [`dare_ties`][wspace.merge.dare_ties]. Without the election, give
    [`magprune`][wspace.merge.magprune] of task vectors to [`tree.combine`][wspace.tree.combine].

    Args:
        key: A random key.
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        coefficients: The $c_i$, one a model or one for each of its
            [leaves][wspace.typing.ByLeaf], of any sign; ones if not given.
        density: The mean probability $\rho$ that an entry stays, one for all models or one a
            model, or one for each [leaf][wspace.typing.ByLeaf], above 0 and at most 1.
        width: The most $\epsilon$ by which a probability differs from the mean, at least 0, with
            $\rho - \epsilon$ above 0 and $\rho + \epsilon$ at most 1.
        scope: Among which entries ranks are counted: of every `"row"`, which differ in their last
            index alone, or of every `"leaf"`.
        rescale: The factor of what stays: `"inverse"`, one over its probability; `"norm"`, by which
            a leaf keeps its 1-norm, though not its expectation; or `"none"`, 1.
        election: How a sign is elected for each entry and what has it is merged, an
            [`Election`][wspace.merge.Election].
        scale: The number $\lambda$, or one for each [leaf][wspace.typing.ByLeaf].

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: If the counts differ or are zero, a known number is not finite or out of its
            domain, or an option is unknown; or if the trees differ in structure or in a leaf's
            shape.
        TypeError: If a density or `width` is traced, or a leaf is not floating-point.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.della(jax.random.key(0), jnp.zeros(6), [jnp.ones(6), -jnp.ones(6)], width=0.0)
        Array([ 0.,  0.,  0.,  0., -2., -2.], dtype=float32)

    References:
        P. T. Deep, R. Bhardwaj, S. Poria, *DELLA-Merging: Reducing Interference in Model Merging
        through Magnitude-Based Sampling*, 2024,
        [arXiv:2406.11617](https://arxiv.org/abs/2406.11617).
    """
    _checks.random_key(key)
    tuned, known = siblings(base, tuned, coefficients)
    densities = share_of_each("density", density, len(tuned))
    pairs = zip(differences(base, tuned), densities, strict=True)
    edits = [
        magprune(jax.random.fold_in(key, i), x, share, width=width, scope=scope, rescale=rescale)
        for i, (x, share) in enumerate(pairs)
    ]
    return agreed(base, edits, known, election, scale)
