r"""Breadcrumbs: task vectors without outliers and small entries, added up or merged by signs."""

from collections.abc import Sequence

from wspace.merge.parts.band import band
from wspace.merge.parts.elect import Election, agreed
from wspace.merge.parts.numbers import Densities, share_of_each
from wspace.merge.parts.trim import Scope
from wspace.merge.task import differences, moved, siblings
from wspace.typing import ByLeaf, LeafCoefficients, Weights, WeightsLike

__all__ = ["breadcrumbs", "breadcrumbs_ties"]


def breadcrumbs(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: LeafCoefficients | None = None,
    *,
    density: Densities = 0.2,
    outliers: float = 0.01,
    scope: Scope = "tree",
    scale: ByLeaf = 1.0,
) -> Weights:
    r"""Breadcrumbs: drop the outliers and the small entries of the task vectors, add up the rest.

    $$
    \theta = \theta_0 + \lambda \sum_i c_i \operatorname{band}_{\rho, \gamma}(\theta_i - \theta_0)
    $$

    Negated coefficients negate the displacement exactly. The number kept is exact at every size,
    where mergekit empties leaves of fewer than $1/\gamma$ entries.

    Args:
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        coefficients: The $c_i$, one a model or one for each of its
            [leaves][wspace.typing.ByLeaf], of any sign; ones if not given.
        density: The share $\rho$ of entries that stay, one for all models or one a model, above 0
            and at most 1; with the scope `"leaf"` or `"row"` also one for each
            [leaf][wspace.typing.ByLeaf].
        outliers: The share $\gamma$ of largest entries that go, from 0 to below 1.
        scope: What is counted as one: the whole `"tree"`, every `"leaf"`, or every `"row"`, the
            entries of a leaf that differ in their last index alone.
        scale: The number $\lambda$, or one for each [leaf][wspace.typing.ByLeaf].

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: If the counts differ or are zero, a known number is not finite or out of its
            domain, or an option is unknown; or if the trees differ in structure or in a leaf's
            shape.
        TypeError: If a density or `outliers` is traced, or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> tuned = [jnp.array([90.0, -3.0, 4.0, 0.1])]
        >>> merge.breadcrumbs(jnp.zeros(4), tuned, density=0.5, outliers=0.25)
        Array([ 0., -3.,  4.,  0.], dtype=float32)

    References:
        M. Davari, E. Belilovsky, *Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse
        Masks*, ECCV 2024, [arXiv:2312.06795](https://arxiv.org/abs/2312.06795).
    """
    tuned, known = siblings(base, tuned, coefficients)
    return moved(base, _banded(base, tuned, density, outliers, scope), known, scale)


def breadcrumbs_ties(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: LeafCoefficients | None = None,
    *,
    density: Densities = 0.2,
    outliers: float = 0.01,
    scope: Scope = "tree",
    election: Election = Election(),
    scale: ByLeaf = 1.0,
) -> Weights:
    r"""Breadcrumbs and then TIES: drop outliers and small entries, elect, merge what agrees.

    $$
    \theta = \theta_0 + \lambda\, \operatorname{merge}_\gamma(c, \hat\tau), \qquad
    \hat\tau_i = \operatorname{band}_{\rho, \gamma}(\theta_i - \theta_0)
    $$

    With no outliers it is [`ties`][wspace.merge.ties].

    Args:
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        coefficients: The $c_i$, one a model or one for each of its
            [leaves][wspace.typing.ByLeaf], of any sign; ones if not given.
        density: The share $\rho$ of entries that stay, one for all models or one a model, above 0
            and at most 1; with the scope `"leaf"` or `"row"` also one for each
            [leaf][wspace.typing.ByLeaf].
        outliers: The share $\gamma$ of largest entries that go, from 0 to below 1.
        scope: What is counted as one: the whole `"tree"`, every `"leaf"`, or every `"row"`, the
            entries of a leaf that differ in their last index alone.
        election: How a sign is elected for each entry and what has it is merged, an
            [`Election`][wspace.merge.Election].
        scale: The number $\lambda$, or one for each [leaf][wspace.typing.ByLeaf].

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: If the counts differ or are zero, a known number is not finite or out of its
            domain, or an option is unknown; or if the trees differ in structure or in a leaf's
            shape.
        TypeError: If a density or `outliers` is traced, or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> tuned = [jnp.array([90.0, -3.0, 4.0, 0.1]), jnp.array([0.1, 5.0, 90.0, 2.0])]
        >>> merge.breadcrumbs_ties(jnp.zeros(4), tuned, density=0.5, outliers=0.25)
        Array([0., 5., 4., 2.], dtype=float32)

    References:
        M. Davari, E. Belilovsky, *Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse
        Masks*, ECCV 2024, [arXiv:2312.06795](https://arxiv.org/abs/2312.06795).
    """
    tuned, known = siblings(base, tuned, coefficients)
    edits = _banded(base, tuned, density, outliers, scope)
    return agreed(base, edits, known, election, scale)


def _banded(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    density: Densities,
    outliers: float,
    scope: Scope,
) -> list[Weights]:
    densities = share_of_each("density", density, len(tuned))
    return [
        band(x, share, outliers, scope=scope)
        for x, share in zip(differences(base, tuned), densities, strict=True)
    ]
