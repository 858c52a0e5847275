r"""RAM: each entry is the mean over the models that changed it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from wspace import _checks, _lift
from wspace._numerics import unstacked, where_kept, with_nan_of
from wspace.merge.parts.numbers import peak_of
from wspace.merge.task import differences, siblings
from wspace.typing import ByLeaf, Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["ram"]


def ram(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    *,
    threshold: ScalarLike = 0.0,
    relative: bool = True,
    boost: ScalarLike = 0.0,
    cap: ScalarLike = 0.2,
    scale: ByLeaf = 1.0,
) -> Weights:
    r"""RAM and RAM+: each entry is the mean over the models that changed it.

    $$
    \theta_j = \theta_{0j} + \frac{\lambda}{\max(1, |C_j|)} \sum_{i \in C_j} b_{ij}\, \tau_{ij},
    \qquad C_j = \{ i : |\tau_{ij}| > \epsilon_i \}
    $$

    What one model alone changed is not diluted by those that did not. With $r > 0$, RAM+, it is
    boosted by $b_{ij} = 1 + r \min(O_i / U_i, \kappa)$, where model $i$ changed $U_i$ entries
    alone and $O_i$ with others; else, and where others changed the entry too, $b_{ij} = 1$.

    One model comes back to rounding at $\epsilon_i = 0$. Permuting the models changes rounding
    alone, and scaling or negating all task vectors scales or negates the displacement, but
    for an absolute threshold.

    The tree is one vector; `tree.per_leaf(merge.ram)(base, tuned)` takes every leaf by itself.

    Args:
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        threshold: The number $\epsilon \ge 0$ beyond which an entry counts as changed.
        relative: Whether $\epsilon_i$ is $\epsilon$ times the largest magnitude in the task vector
            of the model, rather than $\epsilon$ itself.
        boost: The number $r$; 0 is RAM, and 0.1 usual for RAM+.
        cap: The number $\kappa \ge 0$.
        scale: The number $\lambda$, or one for each [leaf][wspace.typing.ByLeaf].

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`. Their derivatives are
            those for fixed $C_j$ and $b_{ij}$.

    Raises:
        ValueError: If there is no model, or a known number is not finite or out of its domain; or
            if the trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.ram(jnp.zeros(3), [jnp.array([2.0, 1.0, 0.0]), jnp.array([4.0, 0.0, 0.0])])
        Array([3., 1., 0.], dtype=float32)

    References:
        X. Yuan et al., *Behavior Knowledge Merge in Reinforced Agentic Models*, 2026,
        [arXiv:2601.13572](https://arxiv.org/abs/2601.13572).
    """
    threshold, cap = (
        _checks.scalar(name, value, lambda v: v >= 0, "at least 0")
        for name, value in (("threshold", threshold), ("cap", cap))
    )
    boost = _checks.scalar("boost", boost)
    tuned, _ = siblings(base, tuned, None)
    edits = differences(base, tuned)
    cuts = [threshold] * len(edits)
    if _checks.flag("relative", relative):
        cuts = [jnp.asarray(threshold).astype(peak.dtype) * peak for peak in map(peak_of, edits)]
    plain = not _checks.is_traced(boost) and boost == 0
    boosts = [1.0] * len(edits) if plain else _boosts(cuts, edits, boost, cap)
    scale = with_nan_of(_checks.by_leaf("scale", scale, base), threshold, cap, boost, *cuts)
    return _shared((scale, *cuts, *boosts), (base, *edits))


def _boosts(cuts: Sequence[Any], edits: Sequence[Weights], boost: Any, cap: Any) -> list[Scalar]:
    return unstacked(_boost_of(_tally(cuts, edits), boost, cap))


@jax.jit
def _boost_of(tally: Array, boost: Any, cap: Any) -> Array:
    alone, shared = tally.reshape(2, -1)
    boost, cap = (jnp.asarray(number).astype(alone.dtype) for number in (boost, cap))
    return 1 + boost * jnp.minimum(shared / jnp.maximum(alone, 1), cap)


@_lift.reduction
def _tally(cuts: Sequence[Scalar], edits: Sequence[Array]) -> list[Array]:
    """The entries that each model changes alone, and those that it shares."""
    changed = [jnp.abs(x) > cut for x, cut in zip(edits, cuts, strict=True)]
    number = sum(c.astype(jnp.int32) for c in changed)
    return [*(c & (number == 1) for c in changed), *(c & (number > 1) for c in changed)]


@_lift.elementwise
def _shared(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (scale, *numbers), (base, *edits) = scalars, arrays
    cuts, boosts = numbers[: len(edits)], numbers[len(edits) :]
    changed = [jnp.abs(x) > cut for x, cut in zip(edits, cuts, strict=True)]
    number = sum(c.astype(base.dtype) for c in changed)
    alone = number == 1
    terms = [
        where_kept(c, jnp.where(alone, boost * x, x))
        for c, x, boost in zip(changed, edits, boosts, strict=True)
    ]
    return base + scale * sum(terms[1:], terms[0]) / jnp.maximum(number, 1)
