r"""The largest entries of a task vector."""

import functools
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import jax
import numpy as np
from jaxtyping import Float, PyTree

from wspace import _checks
from wspace.merge.parts.numbers import count, share
from wspace.selection.top import keep_between, keep_in_leaves, keep_in_rows
from wspace.typing import Weights, WeightsLike

__all__ = ["trim"]

Scope: TypeAlias = Literal["tree", "leaf", "row"]
Kept: TypeAlias = Literal["floor", "floor+1"]


def trim(
    x: WeightsLike, density: float | PyTree[float], *, scope: Scope = "tree", kept: Kept = "floor"
) -> Weights:
    r"""The entries of largest magnitude of a task vector, and zero elsewhere.

    $$
    \operatorname{trim}(\tau)_j = \tau_j\,
        \bigl[\, j \text{ among the } \lfloor \rho n \rfloor \text{ largest of } |\tau| \,\bigr]
    $$

    Exactly that many entries stay, the first of equal ones, whatever the sharding. Trimming twice
    is trimming once if the same number is asked for; scaling the input scales the output.

    Args:
        x: The task vector $\tau$.
        density: The share $\rho$ of entries that stay, above 0 and at most 1; where the scope is
            `"leaf"` or `"row"` also a tree of them, one for each leaf.
        scope: What is counted as one: the whole `"tree"`, every `"leaf"`, or every `"row"`, the
            entries of a leaf that differ in their last index alone. Where $\rho n < 1$ nothing
            stays: a small leaf is emptied under `"leaf"`, and not under `"tree"`.
        kept: How many stay of $n$: `"floor"`, or `"floor+1"`, as where the threshold is the
            $\lfloor \rho n \rfloor$-th entry that goes.

    Returns:
        The trimmed task vector, of the layout, dtypes and sharding of `x`. Its derivative is that
            of the entries kept.

    Raises:
        ValueError: If `density` is out of its domain, or an option is unknown.
        TypeError: If `density` is traced, or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.trim({"w": jnp.array([3.0, -5.0, 1.0]), "b": jnp.array([4.0])}, 0.5)
        {'b': Array([4.], dtype=float32), 'w': Array([ 0., -5.,  0.], dtype=float32)}

    References:
        P. Yadav et al., *TIES-Merging: Resolving Interference When Merging Models*, NeurIPS 2023,
        section 3, [arXiv:2306.01708](https://arxiv.org/abs/2306.01708).
    """
    _checks.one_of("scope", scope, get_args(Scope))
    _checks.one_of("kept", kept, get_args(Kept))
    _checks.same_layout(x=x)
    shares, more = share("density", density, x, scope), kept == "floor+1"
    return band_of(x, lambda size, own: (0, min(count(own, size) + more, size)), scope, shares)


def band_of(
    x: WeightsLike,
    band: Callable[[int, float], tuple[int, int]],
    scope: Scope,
    density: float | Float[np.ndarray, " leaves"],
) -> Weights:
    """The entries whose place by falling magnitude is in a band, of given size and density."""
    leaves = jax.tree.leaves(x)
    if scope == "tree":
        return keep_between(x, *band(sum(leaf.size for leaf in leaves), float(density)))
    shares = np.broadcast_to(density, len(leaves)).tolist()
    bands = [functools.partial(_of_share, band, own) for own in shares]
    return (keep_in_rows if scope == "row" else keep_in_leaves)(x, bands)


def _of_share(band: Callable[..., tuple[int, int]], own: float, size: int) -> tuple[int, int]:
    return band(size, own)
