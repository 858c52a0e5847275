"""The mean of two networks of NNX, and of two of linen."""

import jax
import jax.numpy as jnp
from flax import linen, nnx

from wspace import average

x = jnp.ones((1, 3))
(definition, a), (_, c) = (nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(i))) for i in range(2))
merged = nnx.merge(definition, average.mean([a, c]))
assert merged(x).shape == (1, 2)
variables = [linen.Dense(2).init(jax.random.key(i), x) for i in range(2)]
outputs = [linen.Dense(2).apply(v, x) for v in (*variables, average.mean(variables))]
assert jnp.allclose(outputs[2], (outputs[0] + outputs[1]) / 2, atol=1e-6)
