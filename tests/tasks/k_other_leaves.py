"""Weights in bfloat16 beside counters, keys and statistics, which stay as they are."""

import jax
import jax.numpy as jnp

from wspace import average, tree

states = [
    {"w": jnp.full(2, w, jnp.bfloat16), "step": 7, "key": jax.random.key(0), "mean": jnp.ones(2)}
    for w in (1.0, 3.0)
]
weights, rest = zip(*(tree.partition(x, where="!mean") for x in states), strict=True)
merged = tree.join(average.mean(weights), rest[0])
assert merged["w"].dtype == jnp.bfloat16
assert merged["w"].tolist() == [2, 2]
assert merged["step"] == 7
