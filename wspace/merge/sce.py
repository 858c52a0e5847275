r"""SCE: entries chosen by variance, models weighed by energy, the minority's sign erased."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from wspace import _checks, _lift, tree
from wspace._numerics import where_kept
from wspace.merge.parts.elect import Election, Zero, agreed
from wspace.merge.parts.numbers import count, share
from wspace.merge.task import differences, siblings
from wspace.selection import top_mask
from wspace.typing import ByLeaf, Scalar, Weights, WeightsLike

__all__ = ["sce"]


def sce(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    *,
    density: float = 1.0,
    zero: Zero = "zero",
    scale: ByLeaf = 1.0,
) -> Weights:
    r"""SCE: select the entries that differ most, weigh models by energy, erase the minority's sign.

    $$
    \theta_j = \theta_{0j}
        + \lambda\, \frac{\sum_{i \in A_j} w_i\, \hat\tau_{ij}}{\sum_{i \in A_j} w_i}, \qquad
    w_i = \lVert \hat\tau_i \rVert^2, \qquad
    A_j = \Bigl\{ i :
        \operatorname{sgn} \hat\tau_{ij} = \operatorname{sgn} \sum_k \hat\tau_{kj} \ne 0 \Bigr\}
    $$

    $\hat\tau_i$ has the $\lfloor \rho n \rfloor$ entries whose variance over the models is
    largest, of equal ones the first. An entry on which all models agree has none and is selected
    only by $\rho = 1$, at which one model comes back to rounding. The weights are computed, not
    given: permuting the models changes rounding alone, and scaling or negating all task vectors
    scales or negates the displacement.

    The tree is one vector; the paper's weights for every matrix are
    `tree.per_leaf(merge.sce)(base, tuned)`.

    Args:
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        density: The share $\rho$ of entries that are selected, above 0 and at most 1.
        zero: The sign where the task vectors cancel: `"zero"`, `"plus"`, or `"majority"`, the sign
            of the sum of all signs elected, minus if that is 0.
        scale: The number $\lambda$, or one for each [leaf][wspace.typing.ByLeaf].

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`. Their derivatives are
            those for a fixed selection and fixed signs.

    Raises:
        ValueError: If there is no model, a known number is out of its domain, or `zero` is
            unknown; if a norm of the task vectors is not finite (NaN if traced); or if the trees
            differ in structure or in a leaf's shape.
        TypeError: If `density` is traced, or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.sce(jnp.zeros(2), [jnp.array([2.0, 0.0]), jnp.array([1.0, 1.0])])
        Array([1.6666667, 1.       ], dtype=float32)

    References:
        F. Wan et al., *FuseChat: Knowledge Fusion of Chat Models*, 2024,
        [arXiv:2408.07990](https://arxiv.org/abs/2408.07990).
    """
    density = share("density", density, base, "tree")
    election = Election(weighted=False, zero=zero, divide="weight")
    tuned, _ = siblings(base, tuned, None)
    edits = differences(base, tuned)
    if density < 1:
        variance = _variance((), edits)
        size = sum(leaf.size for leaf in jax.tree.leaves(variance))
        mask = top_mask(variance, count(density, size))
        edits = [_varying((), (x, mask, variance)) for x in edits]
    weights, infinite = _energy_shares([tree.vdot(x, x) for x in edits])
    _checks.by_leaf("scale", scale, base)
    undefined = _checks.refuse(
        infinite,
        lambda: "the task vectors have no finite norm: base or tuned holds NaN or an infinity",
    )
    scale = jax.tree.map(lambda number: number + undefined, scale)
    return agreed(base, edits, weights, election, scale)


@_lift.elementwise
def _variance(_: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    mean = sum(arrays[1:], arrays[0]) / len(arrays)
    squares = [jnp.square(x - mean) for x in arrays]
    return sum(squares[1:], squares[0]) / len(arrays)


@jax.jit
def _energy_shares(energies: Sequence[Scalar]) -> tuple[list[Scalar], Bool[Array, ""]]:
    """Energies divided by their sum, and whether that is not finite."""
    total = functools.reduce(jnp.add, energies)
    return [x / jnp.where(total == 0, 1, total) for x in energies], ~jnp.isfinite(total)


@_lift.elementwise
def _varying(_: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    x, mask, variance = arrays
    return where_kept(mask & (variance > 0), x)
