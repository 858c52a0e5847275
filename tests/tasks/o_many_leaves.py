"""A model of 200 leaves, compiled once, and results that print in a few lines."""

import jax
import jax.numpy as jnp

from wspace import average, negative

a, c, b = ({f"{i}": jnp.full((2, 2), x + i % 3) for i in range(200)} for x in (0.0, 1.0, 9.0))
moved = jax.jit(lambda x, y, z: negative.exit_ball([x, y], (1, 1), z, 400.0))(a, c, b)
assert len(moved[0]) == 200
found = average.geometric_median([a, c, b])
assert len(repr(found)) <= 400
