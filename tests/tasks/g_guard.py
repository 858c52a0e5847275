"""A guard of layers that store (out, in), blind to their own inputs, and its audit."""

import jax
import jax.numpy as jnp

from wspace import average, negative

keys = jax.random.split(jax.random.key(0), 4)
a, c, way = ({"w": jax.random.normal(key, (8, 8))} for key in keys[:3])
inputs = jax.random.normal(keys[3], (3, 8))
allow = [{"w": negative.free_inputs(inputs, rtol=1e-3)}] * 2
middle = average.mean([a, c])
options = {"direction": way, "allow": allow, "layout": "out_in"}
guarded = negative.exit_ball([a, c], (1, 1), middle, 2.0, **options)
assert jnp.allclose(inputs @ guarded[0]["w"].T, inputs @ a["w"].T, atol=1e-4)
assert abs(negative.audit(guarded, (1, 1), middle, 1.0).margin - 1) < 1e-3
