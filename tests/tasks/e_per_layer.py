"""TIES with coefficients for each layer, or a density for each model; DARE and TSV-M."""

import jax

from wspace import geometry, merge, testing, tree

keys = jax.random.split(jax.random.key(0), 3)
base, a, c = ({"in": jax.random.normal(k, (6, 4)), "out": jax.random.normal(k, (4,))} for k in keys)
by_layer = [{"in": 1.0, "out": 0.0}, {"in": 0.0, "out": 1.0}]
merged = tree.per_leaf(merge.ties)(base, [a, c], by_layer, density=1.0)
assert geometry.distance(merged, {"in": a["in"], "out": c["out"]}) < 1e-5
sparse = merge.ties(base, [a, c], (0.7, 0.3), density=(0.5, 0.2))
dropped = merge.dare(keys[0], base, [a, c], (0.7, 0.3), density=0.5)
spectral = merge.tsv_m(base, [a, c], (0.7, 0.3)).weights
assert min(map(testing.size, (sparse, dropped, spectral))) > 0
