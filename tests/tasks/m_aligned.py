"""Hidden units in another order, found again by an assignment: the library has no alignment."""

import jax
import numpy as np
from scipy.optimize import linear_sum_assignment

from wspace import geometry

first, second = jax.random.split(jax.random.key(0))
a = {"in": jax.random.normal(first, (5, 16)), "out": jax.random.normal(second, (16, 3))}
order = np.random.default_rng(0).permutation(16)
c = {"in": a["in"][:, order], "out": a["out"][order]}
units = [np.concatenate([x["in"].T, x["out"]], axis=1) for x in (a, c)]
_, found = linear_sum_assignment(units[0] @ units[1].T, maximize=True)
aligned = {"in": c["in"][:, found], "out": c["out"][found]}
assert geometry.distance(aligned, a) == 0 < geometry.distance(c, a)
