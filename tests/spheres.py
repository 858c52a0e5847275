"""The exponential and the logarithm on a sphere, for laws of means on a manifold."""

import jax.numpy as jnp

from wspace import tree


def exp_on_sphere(x, v):
    turn = tree.norm(v)
    return jnp.cos(turn) * x + jnp.sinc(turn / jnp.pi) * v


def log_on_sphere(x, y):
    across = y - jnp.sum(x * y) * x
    sine = tree.norm(across)
    return across * (jnp.arctan2(sine, jnp.sum(x * y)) / jnp.where(sine == 0, 1, sine))
