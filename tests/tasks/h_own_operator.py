"""An operator of one's own, and its laws on random weights."""

import jax
import jax.numpy as jnp
from hypothesis import given, settings

from wspace import testing, tree

middle = tree.elementwise(lambda _, arrays: jnp.median(jnp.stack(arrays), axis=0))
operator = jax.jit(lambda points: middle([], points))


@settings(deadline=None)
@given(points=testing.points(3))
def check(points):
    testing.check_permutation_invariant(operator, points, units=0)
    testing.check_affine_equivariant(operator, points)


check()
