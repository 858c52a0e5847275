r"""Random entries of a task vector, large ones more likely to stay."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from wspace import _checks, _lift, tree
from wspace._numerics import placed_like, replicated, where_kept
from wspace.merge.parts.drop import Rescale, norm_ratio, uniform
from wspace.merge.parts.numbers import WHOLE, part
from wspace.typing import Weights, WeightsLike

__all__ = ["magprune"]

RankScope: TypeAlias = Literal["row", "leaf"]


def magprune(
    key: Array,
    x: WeightsLike,
    density: float | PyTree[float],
    *,
    width: float = 0.05,
    scope: RankScope = "row",
    rescale: Rescale = "inverse",
) -> Weights:
    r"""Random entries of a task vector, large ones more likely to stay than small ones.

    $$
    \operatorname{magprune}(\tau)_j = s_j\, m_j\, \tau_j, \qquad
    m_j \sim \operatorname{Bernoulli}(p_j), \qquad
    p_j = \rho + \epsilon\, \frac{n + 1 - 2\operatorname{rank}_j}{n - 1}
    $$

    The probability falls from $\rho + \epsilon$ for the largest of $n$ entries, rank 1, to
    $\rho - \epsilon$ for the least, and its mean is $\rho$. With $s_j = 1/p_j$ the expectation is
    $\tau$ and the variance $\tau_j^2\,(1 - p_j)/p_j$. Width 0 is [`drop`][wspace.merge.drop],
    mask for mask.

    Ranks are exact, of equal magnitudes the first entry the higher. The mask depends on the key,
    the path of the leaf, its shape and the order of its magnitudes: on no scale, no other leaf
    and no sharding. Ranks need a sort, for which a sharded leaf is gathered.

    Args:
        key: A random key.
        x: The task vector $\tau$.
        density: The mean probability $\rho$ that an entry stays, or one for each
            [leaf][wspace.typing.ByLeaf], above 0 and at most 1.
        width: The most $\epsilon$ by which a probability differs from the mean, at least 0, with
            $\rho - \epsilon$ above 0 and $\rho + \epsilon$ at most 1.
        scope: Among which entries ranks are counted: of every `"row"`, which differ in their last
            index alone, or of every `"leaf"`. An entry by itself has $p = \rho$.
        rescale: The factor $s_j$: `"inverse"`, $1/p_j$; `"norm"`, by which a leaf keeps its
            1-norm, though not its expectation; or `"none"`, 1.

    Returns:
        The thinned task vector, of the layout, dtypes and sharding of `x`. Its derivative is that
            under the mask drawn.

    Raises:
        ValueError: If `density` or `width` is out of its domain, or an option is unknown.
        TypeError: If `density` or `width` is traced, or a leaf is not floating-point.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.magprune(jax.random.key(0), {"w": jnp.arange(1.0, 6)}, 0.5, width=0.3)
        {'w': Array([0.       , 5.714286 , 0.       , 6.1538463, 0.       ], dtype=float32)}

    References:
        P. T. Deep, R. Bhardwaj, S. Poria, *DELLA-Merging: Reducing Interference in Model Merging
        through Magnitude-Based Sampling*, 2024, section 3,
        [arXiv:2406.11617](https://arxiv.org/abs/2406.11617).
    """
    _checks.one_of("scope", scope, get_args(RankScope))
    _checks.one_of("rescale", rescale, get_args(Rescale))
    _checks.same_layout(x=x)
    shares, width = _checks.by_leaf("density", density, x, _checks.share), part("width", width)
    for own in np.atleast_1d(shares).tolist():
        if not (own - width > 0 and own + width <= WHOLE):
            raise ValueError(
                f"density {own} with width {width} gives probabilities from {own - width:g} to "
                f"{own + width:g}: keep them above 0 and at most 1 by a smaller width"
            )
    leaves, structure = jax.tree.flatten(x)
    lasts = [max(_row_of(leaf, scope) - 1, 0) for leaf in leaves]
    steps = [np.float32(width / max(last, 1)) for last in lasts]
    each = [tree.split_key_like(key, x), *map(structure.unflatten, (lasts, steps))]
    return _pruning(scope, rescale)((shares,), (x,), each)


def _row_of(leaf: Any, scope: RankScope) -> int:
    """Among how many entries ranks are counted."""
    return leaf.shape[-1] if scope == "row" and leaf.ndim > 1 else leaf.size


@functools.cache
def _pruning(scope: RankScope, rescale: Rescale) -> Callable[..., Weights]:
    @functools.partial(_lift.elementwise, scope="leaf")
    def magprune(scalars: Sequence[Any], arrays: Sequence[Array]) -> Array:
        """The leaf without entries whose random numbers are not below their probabilities."""
        (density, key, last, step), (x,) = scalars, arrays
        sizes = jnp.abs(replicated(x))
        rows = sizes if scope == "row" and x.ndim > 1 else sizes.reshape(-1)
        density, last, step = (n.astype(jnp.float32) for n in (density, last, step))
        probability = placed_like(density + _rise(rows, last, step).reshape(x.shape), x)
        kept = where_kept(uniform(key, x) < probability, x)
        if rescale == "inverse":
            kept = kept / probability.astype(x.dtype)
        if rescale == "norm":
            kept = kept * norm_ratio(x, kept)
        return kept

    return magprune


def _rise(sizes: Float[Array, "... n"], last: Any, step: Any) -> Float[Array, "... n"]:
    """From the width for the largest in a row to its negative for the least, in equal steps."""
    rise = (last - 2 * _places(sizes).astype(jnp.float32)) * step
    # One bit less, so that no compiler fuses the product with a sum that follows: the bits of the
    # probability, and with them the mask, are those of every sharding.
    return jax.lax.reduce_precision(rise, 8, 22)


def _places(x: Float[Array, "*s n"]) -> Int[Array, "*s n"]:
    """The place of every entry in its row by falling magnitude, the first of equal ones first."""
    sizes = jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x))
    order = jnp.argsort(-sizes, axis=-1, stable=True)
    place = jnp.broadcast_to(jnp.arange(x.shape[-1], dtype=order.dtype), x.shape)
    return jnp.put_along_axis(jnp.zeros_like(order), order, place, axis=-1, inplace=False)
