r"""Whole methods under the names that papers give them, each a composition of the parts."""

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import Array

from wspace import _checks
from wspace.merge import presets
from wspace.merge.consensus import Divide, Vote, Zero, agreed
from wspace.merge.sparsify import Kept, Rescale, Scope, drop, trim
from wspace.merge.task import differences, moved, siblings
from wspace.merge.thinning import RankScope, band, magprune
from wspace.typing import Coefficients, ScalarLike, Weights, WeightsLike

__all__ = ["breadcrumbs", "breadcrumbs_ties", "dare", "dare_ties", "della", "ties"]


def ties(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: Coefficients | None = None,
    *,
    preset: str | None = None,
    density: float | None = None,
    scope: Scope | None = None,
    kept: Kept | None = None,
    vote: Vote | None = None,
    weighted: bool | None = None,
    zero: Zero | None = None,
    divide: Divide | None = None,
    scale: ScalarLike | None = None,
) -> Weights:
    r"""TIES: trim the task vectors, elect a sign for each entry, merge what agrees with it.

    $$
    \theta = \theta_0 + \lambda\, \operatorname{merge}_\gamma(c, \hat\tau), \qquad
    \hat\tau_i = \operatorname{trim}_\rho(\theta_i - \theta_0), \qquad
    \gamma = \operatorname{sgn} \sum_i c_i\, \hat\tau_i
    $$

    The steps are [`trim`][wspace.merge.trim], [`elect`][wspace.merge.elect] and
    [`disjoint_merge`][wspace.merge.disjoint_merge], whose options these are. By default negated
    coefficients negate the displacement, two equal models of opposite coefficients cancel, both
    exactly, one model at $c = 1$ and density 1 comes back to rounding, and permuting the models
    with their coefficients changes rounding alone. Presets break the first two laws: see
    [the table of presets](merge.md#presets).

    Args:
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        coefficients: The $c_i$, one a model, of any sign; ones if not given. They are not
            normalized.
        preset: Whose options are the defaults: `None`, or a name in the table of presets.
        density: The share $\rho$ of entries that stay; 0.2 by default.
        scope: Where they are counted; the whole `"tree"` by default.
        kept: How many stay of $n$; `"floor"` by default.
        vote: How signs are elected; by `"mass"` by default.
        weighted: Whether coefficients have a voice in the election; `True` by default.
        zero: The sign where votes cancel; `"zero"` by default.
        divide: What the sum of the terms that agree is divided by; their `"count"` by default.
        scale: The number $\lambda$; 1 by default.

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`. Their derivatives are
            those for fixed masks and signs, which are steps.

    Raises:
        ValueError: If the counts differ or are zero, a known number is not finite or out of its
            domain, the preset or an option is unknown; or if the trees differ in structure or in
            a leaf's shape.
        TypeError: If `density` is traced, or a leaf is not floating-point.

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
    options = _checks.settings(
        presets.TIES,
        preset,
        density=density,
        scope=scope,
        kept=kept,
        vote=vote,
        weighted=weighted,
        zero=zero,
        divide=divide,
        scale=scale,
    )
    tuned, known = siblings(base, tuned, coefficients)
    edits = [
        trim(x, options.density, scope=options.scope, kept=options.kept)
        for x in differences(base, tuned)
    ]
    return agreed(base, edits, known, options)


def dropped(
    key: Array, base: WeightsLike, tuned: Sequence[WeightsLike], options: Any
) -> list[Weights]:
    """Task vectors of which random entries stay, each model with a key of its own."""
    return [
        drop(jax.random.fold_in(key, i), x, options.density, rescale=options.rescale)
        for i, x in enumerate(differences(base, tuned))
    ]


def dare(
    key: Array,
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: Coefficients | None = None,
    *,
    preset: str | None = None,
    density: float | None = None,
    rescale: Rescale | None = None,
    scale: ScalarLike | None = None,
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
        coefficients: The $c_i$, one a model, of any sign; ones if not given.
        preset: Whose options are the defaults: `None`, or a name in
            [the table of presets](merge.md#presets).
        density: The probability $\rho$ that an entry stays; 0.5 by default.
        rescale: How the rest is enlarged, as in [`drop`][wspace.merge.drop]; `"inverse"` by
            default.
        scale: The number $\lambda$; 1 by default.

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: If the counts differ or are zero, a known number is not finite or out of its
            domain, the preset or an option is unknown; or if the trees differ in structure or in
            a leaf's shape.
        TypeError: If `density` is traced, or a leaf is not floating-point.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.dare(jax.random.key(0), jnp.zeros(6), [jnp.ones(6)], density=0.5)
        Array([0., 2., 2., 2., 0., 0.], dtype=float32)

    References:
        L. Yu et al., *Language Models are Super Mario: Absorbing Abilities from Homologous Models
        as a Free Lunch*, ICML 2024, [arXiv:2311.03099](https://arxiv.org/abs/2311.03099).
    """
    options = _checks.settings(presets.DARE, preset, density=density, rescale=rescale, scale=scale)
    tuned, known = siblings(base, tuned, coefficients)
    edits = dropped(key, base, tuned, options)
    return moved(base, edits, known, options.scale)


def dare_ties(
    key: Array,
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: Coefficients | None = None,
    *,
    preset: str | None = None,
    density: float | None = None,
    rescale: Rescale | None = None,
    vote: Vote | None = None,
    weighted: bool | None = None,
    zero: Zero | None = None,
    divide: Divide | None = None,
    scale: ScalarLike | None = None,
) -> Weights:
    r"""DARE and then TIES: drop random entries in place of small ones, elect, merge what agrees.

    $$
    \theta = \theta_0 + \lambda\, \operatorname{merge}_\gamma(c, \hat\tau), \qquad
    \hat\tau_i = \operatorname{drop}_\rho(\theta_i - \theta_0), \qquad
    \gamma = \operatorname{sgn} \sum_i c_i\, \hat\tau_i
    $$

    By default negated coefficients negate the displacement exactly.

    Args:
        key: A random key.
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        coefficients: The $c_i$, one a model, of any sign; ones if not given.
        preset: Whose options are the defaults: `None`, or a name in
            [the table of presets](merge.md#presets).
        density: The probability $\rho$ that an entry stays; 0.5 by default.
        rescale: As in [`drop`][wspace.merge.drop]; `"inverse"` by default.
        vote: As in [`ties`][wspace.merge.ties], and so the following; `"mass"` by default.
        weighted: `True` by default.
        zero: `"zero"` by default.
        divide: `"count"` by default.
        scale: The number $\lambda$; 1 by default.

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: As [`ties`][wspace.merge.ties] does.
        TypeError: If `density` is traced, or a leaf is not floating-point.

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
    options = _checks.settings(
        presets.DARE_TIES,
        preset,
        density=density,
        rescale=rescale,
        vote=vote,
        weighted=weighted,
        zero=zero,
        divide=divide,
        scale=scale,
    )
    tuned, known = siblings(base, tuned, coefficients)
    return agreed(base, dropped(key, base, tuned, options), known, options)


def della(
    key: Array,
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: Coefficients | None = None,
    *,
    preset: str | None = None,
    density: float | None = None,
    width: float | None = None,
    scope: RankScope | None = None,
    rescale: Rescale | None = None,
    vote: Vote | None = None,
    weighted: bool | None = None,
    zero: Zero | None = None,
    divide: Divide | None = None,
    scale: ScalarLike | None = None,
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
        coefficients: The $c_i$, one a model, of any sign; ones if not given.
        preset: Whose options are the defaults: `None`, or a name in
            [the table of presets](merge.md#presets).
        density: The mean probability $\rho$ that an entry stays; 0.5 by default.
        width: As in [`magprune`][wspace.merge.magprune], and so the next two; 0.05 by default.
        scope: `"row"` by default.
        rescale: `"inverse"` by default.
        vote: As in [`ties`][wspace.merge.ties], and so the following; `"mass"` by default.
        weighted: `True` by default.
        zero: `"zero"` by default.
        divide: `"count"` by default.
        scale: The number $\lambda$; 1 by default.

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: As [`ties`][wspace.merge.ties] and `magprune` do.
        TypeError: If `density` or `width` is traced, or a leaf is not floating-point.

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
    options = _checks.settings(
        presets.DELLA,
        preset,
        density=density,
        width=width,
        scope=scope,
        rescale=rescale,
        vote=vote,
        weighted=weighted,
        zero=zero,
        divide=divide,
        scale=scale,
    )
    tuned, known = siblings(base, tuned, coefficients)
    edits = [
        magprune(
            jax.random.fold_in(key, i),
            x,
            options.density,
            width=options.width,
            scope=options.scope,
            rescale=options.rescale,
        )
        for i, x in enumerate(differences(base, tuned))
    ]
    return agreed(base, edits, known, options)


def breadcrumbs(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: Coefficients | None = None,
    *,
    preset: str | None = None,
    density: float | None = None,
    outliers: float | None = None,
    scope: Scope | None = None,
    scale: ScalarLike | None = None,
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
        coefficients: The $c_i$, one a model, of any sign; ones if not given.
        preset: Whose options are the defaults: `None`, or a name in
            [the table of presets](merge.md#presets).
        density: The share $\rho$ of entries that stay; 0.2 by default.
        outliers: The share $\gamma$ of largest entries that go; 0.01 by default.
        scope: As in [`band`][wspace.merge.band]; the whole `"tree"` by default.
        scale: The number $\lambda$; 1 by default.

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: If the counts differ or are zero, a known number is not finite or out of its
            domain, the preset or an option is unknown; or if the trees differ in structure or in
            a leaf's shape.
        TypeError: If `density` or `outliers` is traced, or a leaf is not floating-point.

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
    options = _checks.settings(
        presets.BREADCRUMBS, preset, density=density, outliers=outliers, scope=scope, scale=scale
    )
    tuned, known = siblings(base, tuned, coefficients)
    return moved(base, _banded(base, tuned, options), known, options.scale)


def _banded(base: WeightsLike, tuned: Sequence[WeightsLike], options: Any) -> list[Weights]:
    return [
        band(x, options.density, options.outliers, scope=options.scope)
        for x in differences(base, tuned)
    ]


def breadcrumbs_ties(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: Coefficients | None = None,
    *,
    preset: str | None = None,
    density: float | None = None,
    outliers: float | None = None,
    scope: Scope | None = None,
    vote: Vote | None = None,
    weighted: bool | None = None,
    zero: Zero | None = None,
    divide: Divide | None = None,
    scale: ScalarLike | None = None,
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
        coefficients: The $c_i$, one a model, of any sign; ones if not given.
        preset: Whose options are the defaults: `None`, or a name in
            [the table of presets](merge.md#presets).
        density: As in [`breadcrumbs`][wspace.merge.breadcrumbs], and so the next two; 0.2 by
            default.
        outliers: 0.01 by default.
        scope: The whole `"tree"` by default.
        vote: As in [`ties`][wspace.merge.ties], and so the following; `"mass"` by default.
        weighted: `True` by default.
        zero: `"zero"` by default.
        divide: `"count"` by default.
        scale: The number $\lambda$; 1 by default.

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: As [`breadcrumbs`][wspace.merge.breadcrumbs] does.
        TypeError: If `density` or `outliers` is traced, or a leaf is not floating-point.

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
    options = _checks.settings(
        presets.BREADCRUMBS_TIES,
        preset,
        density=density,
        outliers=outliers,
        scope=scope,
        vote=vote,
        weighted=weighted,
        zero=zero,
        divide=divide,
        scale=scale,
    )
    tuned, known = siblings(base, tuned, coefficients)
    return agreed(base, _banded(base, tuned, options), known, options)
