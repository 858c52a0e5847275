"""A hundred merges at once by vmap, and the barrier of a segment under jit."""

import jax
import jax.numpy as jnp

from wspace import average, interpolate

a, c = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([0.0, 1.0])}
t = jnp.linspace(0, 1, 100)
merged = jax.vmap(lambda t: average.mean([a, c], jnp.stack([1 - t, t])))(t)
assert merged["w"].shape == (100, 2)


@jax.jit
def barrier(start, end):
    losses = jax.vmap(lambda t: -jnp.sum(interpolate.lerp(start, end, t)["w"] ** 2))(t)
    return jnp.max(losses - (1 - t) * losses[0] - t * losses[-1])


assert abs(barrier(a, c) - 0.5) < 1e-3
