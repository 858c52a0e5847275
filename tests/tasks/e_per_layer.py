"""TIES, DARE and TSV-M with coefficients for each layer, and a density for each model."""

import jax

from wspace import geometry, merge, tree

keys = jax.random.split(jax.random.key(0), 3)
base, a, c = ({"in": jax.random.normal(k, (6, 4)), "out": jax.random.normal(k, (4,))} for k in keys)
by_layer = [tree.by_name(base, {"in": x, "*": 1 - x}) for x in (1.0, 0.0)]
merged = merge.ties(base, [a, c], by_layer, density=1.0)
sparse = merge.ties(base, [a, c], by_layer, density=(0.5, 0.2))
dropped = merge.dare(keys[0], base, [a, c], by_layer, density=1.0)
spectral = merge.tsv_m(base, [a, c], by_layer).weights
assert geometry.distance(dropped, {"in": a["in"], "out": c["out"]}) < 1e-5
assert all(geometry.distance(x, base) > 0 for x in (merged, sparse, spectral))
