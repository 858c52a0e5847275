"""What the functions of the catalog take: trees of one layout, and what belongs to the layout."""

import jax
import jax.numpy as jnp
import numpy as np

from wspace import average, negative, tree

SHAPES = {"w": (16, 4), "b": [(8,), ()], "s": (8, 8, 3), "k": (8, 1, 2, 3)}


def trees(count, dtype=jnp.float32, seed=0):
    """Trees whose entries have bfloat16 digits, so that they are the same points in every dtype."""
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(
            lambda shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16).astype(dtype),
            SHAPES,
            is_leaf=lambda node: isinstance(node, tuple),
        )
        for _ in range(count)
    ]


def allow():
    """Where two points of the layout may move: a projector, and scalars."""
    half = jnp.diag(jnp.asarray([1.0, 0.0] * 8, jnp.float32))
    projector = jnp.diag(jnp.asarray([1.0] * 8 + [0.0] * 8, jnp.float32))
    return [
        {"w": projector, "b": [1.0, 0.0], "s": 1.0, "k": 1.0},
        {"w": jnp.eye(16, dtype=jnp.float32) / 2, "b": [0.0, 1.0], "s": jnp.eye(8), "k": half},
    ]


def masked(x):
    """Every other entry of a tree, and all of its vectors."""
    return {"w": x["w"] > 0, "b": [True, False], "s": True, "k": x["k"] > 0}


def directed(x):
    """A tree of unit length."""
    x = tree.upcast(x)
    return tree.combine((1 / tree.norm(x),), (x,))


def sides():
    """A subspace of the layout, by sides."""
    half = jnp.eye(8, 3, dtype=jnp.float32)
    turned = jnp.asarray([[0.6], [0.8], [0.0]], jnp.float32)
    return negative.Sides(
        rows={"w": jnp.eye(16, 5, dtype=jnp.float32), "b": [1.0, 0.0], "s": half, "k": 1.0},
        columns={"w": jnp.eye(4, 2), "b": [1.0, 1.0], "s": 1.0, "k": turned},
    )


def metric():
    """The inverse of a metric for the layout."""
    spread = jnp.diag(jnp.arange(1.0, 9))
    return {"w": jnp.eye(16) + 1, "b": [2.0, 1.0], "s": spread, "k": 0.5}


def squares(x):
    """A tree of the same layout without negative entries."""
    return jax.tree.map(jnp.square, tree.upcast(x))


def grams():
    """Gram matrices of the inputs of two points of the layout."""
    spread = jnp.diag(jnp.arange(1.0, 9))
    return [
        {"w": jnp.eye(16) + 1, "b": [None, None], "s": spread, "k": None},
        {"w": jnp.eye(16), "b": [None, None], "s": spread + 1, "k": None},
    ]


def factors():
    """Kronecker factors for the same points."""
    rest = {"w": None, "b": [None, None], "k": None}
    left, right = jnp.diag(jnp.arange(1.0, 9)), jnp.eye(3)
    return [
        rest | {"s": average.Kronecker(left + 1, right)},
        rest | {"s": average.Kronecker(left, right + 1)},
    ]


def signs_of(x):
    """A tree of signs."""
    return jax.tree.map(jnp.sign, x)
