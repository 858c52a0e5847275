r"""Random entries of a task vector, large ones more likely to stay."""

import functools
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from wspace import _checks, _lazy, _padding, tree
from wspace._numerics import accumulator, placed_like, replicated
from wspace.merge.parts.drop import Rescale, by_place, norm_ratio, uniform
from wspace.merge.parts.numbers import part
from wspace.typing import Weights, WeightsLike

__all__ = ["magprune"]

RankScope: TypeAlias = Literal["row", "leaf"]


@_padding.few_programs
def magprune(
    key: Array,
    x: WeightsLike,
    density: float,
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
        density: The mean probability $\rho$ that an entry stays, above 0 and at most 1.
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
    density, width = _checks.share("density", density), part("width", width)
    if not (density - width > 0 and density + width <= 1 + 1e-12):
        raise ValueError(
            f"density {density} with width {width} gives probabilities from {density - width:g} to "
            f"{density + width:g}: keep them above 0 and at most 1 by a smaller width"
        )
    _checks.one_of("scope", scope, get_args(RankScope))
    _checks.one_of("rescale", rescale, get_args(Rescale))
    _checks.same_layout(x=x)
    keys = tree.split_key_like(key, x)
    return jax.tree.map(
        lambda key, leaf: _pruned(key, _lazy.array(leaf), density, width, scope, rescale), keys, x
    )


@_lazy.entrywise(lambda _, leaf, *__: leaf.dtype, in_pieces=False)
def _pruned(
    key: Array, leaf: Array, density: float, width: float, scope: RankScope, rescale: Rescale
) -> Array:
    by_row = scope == "row" and leaf.ndim > 1
    last = max((leaf.shape[-1] if by_row else leaf.size) - 1, 0)
    ranks = np.float32(last), np.float32(width / max(last, 1))
    if not (_padding.many() and by_place(key)):
        return _pruned_leaf(key, leaf, ranks, density, by_row, rescale)
    pruned_by = _by_rows if by_row else _by_leaf
    return pruned_by(_padded_uniform(key, leaf), leaf, ranks, density, by_row, rescale)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _pruned_leaf(key: Array, leaf: Array, *options: Any) -> Array:
    return _pruned_by(uniform(key, leaf), leaf, *options)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _pruned_by(
    numbers: Array,
    leaf: Array,
    ranks: tuple[Any, Any],
    density: float,
    by_row: bool,
    rescale: Rescale,
) -> Array:
    """The leaf without the entries whose random numbers are not below their probabilities."""
    wide = leaf.astype(accumulator(leaf.dtype))
    sizes = jnp.abs(replicated(wide))
    rise = _rise(sizes if by_row else sizes.reshape(-1), *ranks).reshape(leaf.shape)
    probability = placed_like(density + rise, leaf)
    kept = jnp.where(numbers < probability, wide, 0)
    if rescale == "inverse":
        kept = kept / probability.astype(wide.dtype)
    if rescale == "norm":
        kept = kept * norm_ratio(wide, kept)
    return kept.astype(leaf.dtype)


_by_leaf, _by_rows = (
    _padding.entrywise(zeros=True, rows=rows)(_pruned_by) for rows in (False, True)
)
_padded_uniform = _padding.entrywise()(jax.jit(uniform))


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
