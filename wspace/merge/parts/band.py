r"""The entries of a task vector that are neither outliers nor small."""

from typing import get_args

import numpy as np
from jaxtyping import PyTree

from wspace import _checks
from wspace.merge.parts.numbers import WHOLE, count, part, share
from wspace.merge.parts.trim import Scope, band_of
from wspace.typing import Weights, WeightsLike

__all__ = ["band"]


def band(
    x: WeightsLike, density: float | PyTree[float], outliers: float = 0.0, *, scope: Scope = "tree"
) -> Weights:
    r"""The entries of a task vector that come next in magnitude after its outliers.

    $$
    \operatorname{band}(\tau)_j = \tau_j\,
        \bigl[\, \lfloor \gamma n \rfloor < \operatorname{rank}_j
        \le \lfloor \gamma n \rfloor + \lfloor \rho n \rfloor \,\bigr]
    $$

    Rank 1 is the largest magnitude, and of equal ones the first. Exactly that many entries stay,
    whatever $n$ and the sharding; with $\gamma = 0$ this is [`trim`][wspace.merge.trim]. Scaling
    the input scales the output.

    Args:
        x: The task vector $\tau$.
        density: The share $\rho$ of entries that stay, above 0 and at most 1; with the scope
            `"leaf"` or `"row"` also one for each [leaf][wspace.typing.ByLeaf].
        outliers: The share $\gamma$ of largest entries that go, from 0 to below 1.
        scope: What is counted as one: the whole `"tree"`, every `"leaf"`, or every `"row"`, the
            entries of a leaf that differ in their last index alone.

    Returns:
        The thinned task vector, of the layout, dtypes and sharding of `x`. Its derivative is that
            of the entries kept.

    Raises:
        ValueError: If `density` or `outliers` is out of its domain, both are more than 1 together,
            or `scope` is unknown.
        TypeError: If `density` or `outliers` is traced, or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.band({"w": jnp.array([3.0, -5.0, 1.0, 90.0])}, 0.5, 0.25)
        {'w': Array([ 3., -5.,  0.,  0.], dtype=float32)}

    References:
        M. Davari, E. Belilovsky, *Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse
        Masks*, ECCV 2024, [arXiv:2312.06795](https://arxiv.org/abs/2312.06795).
    """
    outliers = part("outliers", outliers)
    _checks.one_of("scope", scope, get_args(Scope))
    _checks.same_layout(x=x)
    shares = share("density", density, x, scope)
    most = np.max(shares, initial=0)
    if most + outliers > WHOLE:
        raise ValueError(
            f"density {most} and outliers {outliers} are more than all entries together: "
            "lower one of them"
        )

    def middle(size: int, own: float) -> tuple[int, int]:
        gone = count(outliers, size)
        return gone, min(gone + count(own, size), size)

    return band_of(x, middle, scope, shares)
