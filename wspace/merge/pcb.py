r"""PCB: a mean for each entry, models weighted by how they compete for it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from wspace import _checks, _lift, tree
from wspace.merge.parts.numbers import count, peak_of, share
from wspace.merge.task import differences, siblings
from wspace.selection import kth_magnitude
from wspace.typing import ByLeaf, Scalar, Weights, WeightsLike

__all__ = ["pcb"]


def pcb(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    *,
    density: float = 0.1,
    scale: ByLeaf = 1.0,
) -> Weights:
    r"""PCB: a mean for each entry, models weighted by size there and by agreement with the others.

    $$
    \theta_j = \theta_{0j} + \lambda\, \frac{\sum_i w_{ij}\, \tau_{ij}}{\sum_i w_{ij}}, \qquad
    w_{ij} = \frac{(s_{ij} - t_i)_+}{\max_k s_{ik} - t_i}, \qquad
    s_{ij} = e^{m (\tau_{ij} / \lVert \tau_i \rVert_\infty)^2}
        \Bigl( \tau_{ij} \sum_{k=1}^{m} \tau_{kj} \Bigr)_+
    $$

    The threshold $t_i$ is the score that comes after the $\lfloor \rho n \rfloor$ largest of model
    $i$, 0 if there is none, so that no more than those have weight; an entry against the sum of
    all has none. The authors' code has a $\tanh$ around the product with the sum, so that its
    result depends on the scale of the models: this is its limit for small task vectors. Nor
    are outliers clipped.

    Scaling or negating all task vectors scales or negates the displacement. One model, and equal
    ones, come back to rounding at $\rho = 1$. Permuting the models changes rounding alone.

    Args:
        base: The weights $\theta_0$.
        tuned: The $m$ models $\theta_i$, trees of the layout of `base`, at least one.
        density: The share $\rho$ of entries in which a model has weight, above 0 and at most 1.
        scale: The number $\lambda$, or one for each [leaf][wspace.typing.ByLeaf].

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: If there is no model or a known number is out of its domain; or if the trees
            differ in structure or in a leaf's shape.
        TypeError: If `density` is traced, or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.pcb(jnp.zeros(2), [jnp.array([4.0, -2.0]), jnp.array([4.0, 1.0])], density=1.0)
        Array([ 4., -2.], dtype=float32)

    References:
        G. Du et al., *Parameter Competition Balancing for Model Merging*, NeurIPS 2024, section 3,
        [arXiv:2410.02396](https://arxiv.org/abs/2410.02396).
    """
    density = share("density", density, base, "tree")
    tuned, _ = siblings(base, tuned, None)
    edits = differences(base, tuned)
    total = tree.combine([1.0] * len(edits), edits)
    scores = [_score((float(len(edits)), peak_of(x)), (x, total)) for x in edits]
    size = sum(leaf.size for leaf in jax.tree.leaves(total))
    kept = count(density, size)
    floors = [kth_magnitude(s, kept + 1) if kept < size else 0.0 for s in scores]
    numbers = (_checks.by_leaf("scale", scale, base), *floors, *map(peak_of, scores))
    return _balanced(numbers, (base, *edits, *scores))


@_lift.elementwise
def _score(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (number, peak), (edit, total) = scalars, arrays
    size = edit / jnp.where(peak == 0, 1, peak)
    # Less 1, by which the exponential stays in range and no weight changes.
    return jnp.exp(number * (jnp.square(size) - 1)) * jnp.maximum(edit * total, 0)


@_lift.elementwise
def _balanced(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (scale, *numbers), (base, *others) = scalars, arrays
    k = len(others) // 2
    floors, tops, edits, scores = numbers[:k], numbers[k:], others[:k], others[k:]
    shares = [
        jnp.maximum(score - floor, 0) / jnp.where(top > floor, top - floor, 1)
        for score, floor, top in zip(scores, floors, tops, strict=True)
    ]
    by = sum(shares)
    edit = sum(w * x for w, x in zip(shares, edits, strict=True)) / jnp.where(by == 0, 1, by)
    return base + scale * edit
