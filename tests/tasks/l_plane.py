"""Losses on the plane through three models, drawn."""

import jax
import jax.numpy as jnp

from wspace import geometry, merge, plot, tree

a, b, c = (jax.random.normal(key, (4,)) for key in jax.random.split(jax.random.key(0), 3))
axes = geometry.orthonormalize([merge.task_vector(a, b), merge.task_vector(a, c)])
place = {n: [tree.vdot(x - a, axis) for axis in axes] for n, x in {"A": a, "B": b, "C": c}.items()}
at = jax.vmap(lambda x, y: tree.norm(tree.combine((1, x, y), (a, *axes))), (0, None))
ticks = jnp.linspace(-1, 4, 21)
losses = jax.vmap(at, (None, 0))(ticks, ticks)
figure = plot.plane(ticks, ticks, losses, place)
assert [text.get_text() for text in figure.axes[0].texts] == ["A", "B", "C"]
