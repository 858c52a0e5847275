r"""TIES: the largest entries of task vectors, merged where they have the sign elected."""

from collections.abc import Sequence

from wspace.merge.parts.elect import Election, agreed
from wspace.merge.parts.numbers import Densities, share_of_each
from wspace.merge.parts.trim import Kept, Scope, trim
from wspace.merge.task import differences, siblings
from wspace.typing import ByLeaf, LeafCoefficients, Weights, WeightsLike

__all__ = ["ties"]


def ties(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: LeafCoefficients | None = None,
    *,
    density: Densities = 0.2,
    scope: Scope = "tree",
    kept: Kept = "floor",
    election: Election = Election(),
    scale: ByLeaf = 1.0,
) -> Weights:
    r"""TIES: trim the task vectors, elect a sign for each entry, merge what agrees with it.

    $$
    \theta = \theta_0 + \lambda\, \operatorname{merge}_\gamma(c, \hat\tau), \qquad
    \hat\tau_i = \operatorname{trim}_\rho(\theta_i - \theta_0), \qquad
    \gamma = \operatorname{sgn} \sum_i c_i\, \hat\tau_i
    $$

    The steps are [`trim`][wspace.merge.trim], [`elect`][wspace.merge.elect] and
    [`disjoint_merge`][wspace.merge.disjoint_merge]. By default negated coefficients negate the
    displacement, two equal models of opposite coefficients cancel, both exactly, one model at
    $c = 1$ and density 1 comes back to rounding, and permuting the models with their coefficients
    changes rounding alone. Other systems break the first two laws: see
    [the presets](merge.md#presets).

    Args:
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        coefficients: The $c_i$, one a model or one for each of its
            [leaves][wspace.typing.ByLeaf], of any sign; ones if not given. They are not
            normalized.
        density: The share $\rho$ of entries that stay, one for all models or one a model, above 0
            and at most 1; with the scope `"leaf"` or `"row"` also one for each
            [leaf][wspace.typing.ByLeaf].
        scope: What is counted as one: the whole `"tree"`, every `"leaf"`, or every `"row"`, the
            entries of a leaf that differ in their last index alone. Where $\rho n < 1$ nothing
            stays.
        kept: How many stay of $n$: `"floor"`, $\lfloor \rho n \rfloor$, or `"floor+1"`, one more.
        election: How a sign is elected for each entry and what has it is merged, an
            [`Election`][wspace.merge.Election].
        scale: The number $\lambda$, or one for each [leaf][wspace.typing.ByLeaf].

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`. Their derivatives are
            those for fixed masks and signs, which are steps.

    Raises:
        ValueError: If the counts differ or are zero, a known number is not finite or out of its
            domain, or an option is unknown; or if the trees differ in structure or in a leaf's
            shape.
        TypeError: If a density is traced, or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> base = jnp.zeros(4)
        >>> tuned = [jnp.array([4.0, -3.0, 0.1, 0.0]), jnp.array([2.0, 5.0, 0.0, -0.1])]
        >>> merge.ties(base, tuned, density=0.5)
        Array([3., 5., 0., 0.], dtype=float32)

    References:
        P. Yadav et al., *TIES-Merging: Resolving Interference When Merging Models*, NeurIPS 2023,
        [arXiv:2306.01708](https://arxiv.org/abs/2306.01708).
    """
    tuned, known = siblings(base, tuned, coefficients)
    densities = share_of_each("density", density, len(tuned))
    edits = [
        trim(x, share, scope=scope, kept=kept)
        for x, share in zip(differences(base, tuned), densities, strict=True)
    ]
    return agreed(base, edits, known, election, scale)
