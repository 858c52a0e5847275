"""Coefficients of a merge, learned for each leaf, and the gradient of a spectral merge."""

import jax
import jax.numpy as jnp
import optax

from wspace import fit, geometry, merge

keys = jax.random.split(jax.random.key(0), 3)
base, a, c = ({"in": jax.random.normal(k, (5, 4)), "out": jax.random.normal(k, (4,))} for k in keys)
target = {"in": a["in"], "out": c["out"]}


def loss(weights):
    return geometry.distance(weights, target) ** 2


options = {"per": "leaf", "optimizer": optax.adam(3e-2), "steps": 100}
learned = fit.coefficients(keys[0], loss, base, [a, c], **options)
assert learned.history.loss[-1] < 0.01 * learned.history.loss[0]
spectral = jax.grad(lambda x: loss(merge.tsv_m(base, [a, c], x).weights))(jnp.ones(2))
assert jnp.isfinite(spectral).all()
