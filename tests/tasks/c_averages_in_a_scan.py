"""EMA, and LAWA of every 20 steps, in a training loop under jit and scan."""

import jax
import jax.numpy as jnp

from wspace import average

ema, lawa = average.ema(0.9), average.window(3, every=20)


def step(carry, t):
    weights, states = 0.5 * carry[0] + jnp.sin(t), carry[1]
    return (weights, (ema.update(states[0], weights), lawa.update(states[1], weights))), weights


start = (jnp.ones(2), (ema.init(jnp.ones(2)), lawa.init(jnp.ones(2))))
(_, states), seen = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(100.0)))(start)
assert jnp.allclose(lawa.value(states[1]), seen[jnp.array([59, 79, 99])].mean(axis=0))
assert ema.value(states[0]).shape == (2,)
