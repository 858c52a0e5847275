"""The mean of two equinox networks, and the loss along the segment between them."""

import equinox as eqx
import jax
import jax.numpy as jnp

from wspace import average, interpolate, tree

x = jnp.linspace(-1, 1, 64)[:, None]
networks = [eqx.nn.MLP(1, 1, 16, 1, key=jax.random.key(seed)) for seed in range(2)]
(a, c), (rest, _) = zip(*map(tree.partition, networks), strict=True)
mean = tree.join(average.mean([a, c]), rest)
at = jax.vmap(lambda t: jnp.mean(jax.vmap(tree.join(interpolate.lerp(a, c, t), rest))(x) ** 2))
losses = at(jnp.linspace(0, 1, 11))
assert jnp.allclose(losses[5], jnp.mean(jax.vmap(mean)(x) ** 2))
