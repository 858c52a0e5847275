r"""Random entries of a task vector."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from wspace import _checks, _lift, tree
from wspace._numerics import power_of_two, where_kept
from wspace.typing import Scalar, Weights, WeightsLike

__all__ = ["drop"]

Rescale: TypeAlias = Literal["inverse", "norm", "none"]


def drop(
    key: Array, x: WeightsLike, density: float | PyTree[float], *, rescale: Rescale = "inverse"
) -> Weights:
    r"""Random entries of a task vector, enlarged to make up for those that are dropped.

    $$
    \operatorname{drop}(\tau)_j = s\, m_j\, \tau_j, \qquad
    m_j \sim \operatorname{Bernoulli}(\rho) \text{ independently}
    $$

    With $s = 1/\rho$ the expectation is $\tau$ and the variance $\tau_j^2\,(1 - \rho)/\rho$.

    The mask depends on the key, the path of the leaf and its shape: on no value, no other leaf
    and no sharding.

    Args:
        key: A random key.
        x: The task vector $\tau$.
        density: The probability $\rho$ that an entry stays, or one for each
            [leaf][wspace.typing.ByLeaf], above 0 and at most 1.
        rescale: The factor $s$: `"inverse"`, $1/\rho$; `"norm"`, by which a leaf keeps its 1-norm,
            $\lVert \tau_\ell \rVert_1 / \lVert m_\ell \tau_\ell \rVert_1$, though not its
            expectation; or `"none"`, $1$. A leaf of which nothing stays is zero.

    Returns:
        The task vector with entries dropped, of the layout, dtypes and sharding of `x`. Its
            derivative is that under the mask drawn.

    Raises:
        ValueError: If `density` is out of its domain, or `rescale` is unknown.
        TypeError: If `density` is traced, or a leaf is not floating-point.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.drop(jax.random.key(0), {"w": jnp.ones(6)}, 0.5)
        {'w': Array([0., 2., 0., 2., 0., 0.], dtype=float32)}

    References:
        L. Yu et al., *Language Models are Super Mario: Absorbing Abilities from Homologous Models
        as a Free Lunch*, ICML 2024, section 3.2,
        [arXiv:2311.03099](https://arxiv.org/abs/2311.03099).
    """
    _checks.one_of("rescale", rescale, get_args(Rescale))
    _checks.same_layout(x=x)
    shares = _checks.by_leaf("density", density, x, _checks.share)
    return _dropping(rescale)((shares,), (x,), [tree.split_key_like(key, x)])


@functools.cache
def _dropping(rescale: Rescale) -> Callable[..., Weights]:
    @functools.partial(_lift.elementwise, scope="leaf")
    def drop(scalars: Sequence[Any], arrays: Sequence[Array]) -> Array:
        (density, key), (x,) = scalars, arrays
        kept = where_kept(uniform(key, x) < density.astype(jnp.float32), x)
        if rescale == "inverse":
            kept = kept / density
        if rescale == "norm":
            kept = kept * norm_ratio(x, kept)
        return kept

    return drop


def uniform(key: Array, leaf: Array) -> Float[Array, "*s"]:
    """Random numbers from 0 to 1 for the entries of a leaf, where it lies."""
    sharding = jax.typeof(leaf).sharding
    return jax.random.uniform(key, leaf.shape, jnp.float32, out_sharding=sharding)


def norm_ratio(whole: Array, part: Array) -> Scalar:
    """The 1-norm of an array divided by the 1-norm of a part of the array; 1 for nothing."""
    unit = power_of_two(jnp.max(jnp.abs(whole), initial=0))
    left = jnp.sum(jnp.abs(part / unit))
    return jnp.where(left == 0, 1, jnp.sum(jnp.abs(whole / unit)) / jnp.where(left == 0, 1, left))
