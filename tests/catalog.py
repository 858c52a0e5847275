"""Every public function, callable on trees of weights alone. `test_api.py` holds it complete."""

import jax
import jax.numpy as jnp

from wspace import average, geometry, interpolate, lowrank, negative, tree


def allow():
    """Where two points of the layout of `test_transforms` may move: a projector, and scalars."""
    half = jnp.diag(jnp.asarray([1.0, 0.0] * 8, jnp.float32))
    projector = jnp.diag(jnp.asarray([1.0] * 8 + [0.0] * 8, jnp.float32))
    return [
        {"w": projector, "b": [1.0, 0.0], "s": 1.0, "k": 1.0},
        {"w": jnp.eye(16, dtype=jnp.float32) / 2, "b": [0.0, 1.0], "s": jnp.eye(8), "k": half},
    ]


CATALOG = {
    "average.mean": (3, lambda *points: average.mean(points, (1.0, 0.7, -0.3))),
    "geometry.angle": (2, geometry.angle),
    "geometry.distance": (2, geometry.distance),
    "geometry.gram": (2, lambda *points: geometry.gram(points)),
    "geometry.orthonormalize": (2, lambda *points: geometry.orthonormalize(points)),
    "geometry.project": (2, lambda x, q: geometry.project(x, [q])),
    "interpolate.lerp": (2, lambda start, end: interpolate.lerp(start, end, 0.3)),
    "interpolate.slerp": (2, lambda start, end: interpolate.slerp(start, end, 0.3)),
    "lowrank.apply": (2, lowrank.apply),
    "lowrank.singular_values": (
        1,
        lambda x: [lowrank.singular_values(leaf) for leaf in jax.tree.leaves(x)],
    ),
    "lowrank.truncate": (1, lambda x: lowrank.truncate(x["w"], 2).tail),
    "negative.curve": (2, negative.curve),
    "negative.exit_ball": (
        3,
        lambda x, y, avoid: negative.exit_ball([x, y], (0.6, 0.4), avoid, 40.0, costs=(1.0, 2.0)),
    ),
    "negative.exit_ball, direction": (
        3,
        lambda x, y, direction: negative.exit_ball(
            [x, y], (0.6, 0.4), x, 40.0, direction=direction, allow=allow()
        ),
    ),
    "negative.gate": (2, lambda x, y: negative.gate(x, y, y, 1e3)),
    "negative.guide": (3, lambda x, y, z: negative.guide(x, y, z, 1.5)),
    "negative.harden": (1, negative.harden),
    "negative.offset": (2, lambda x, y: lowrank.apply(x, negative.offset(x, y, 1).factors)),
    "negative.rank_to_reach": (2, lambda x, y: negative.rank_to_reach(x, y, 4.0)),
    "negative.remove_member": (2, lambda x, y: negative.remove_member(x, y, 0.3)),
    "negative.repel": (2, lambda x, y: negative.repel(x, y, 0.7)),
    "negative.retarget": (
        3,
        lambda x, y, target: negative.retarget([x, y], (0.6, 0.4), target, costs=(1.0, 2.0)),
    ),
    "negative.retarget, allow": (
        3,
        lambda x, y, target: negative.retarget([x, y], (0.6, 0.4), target, allow=allow()),
    ),
    "negative.route": (2, lambda x, y: negative.route(x, {"y": y}, 2, radius=1.0)),
    "tree.cast_like": (2, tree.cast_like),
    "tree.combine": (2, lambda x, y: tree.combine((2.0, -0.5), (x, y))),
    "tree.norm": (1, tree.norm),
    "tree.per_leaf": (2, tree.per_leaf(lambda x, y: interpolate.lerp(x, y, 0.3))),
    "tree.upcast": (1, tree.upcast),
    "tree.vdot": (2, tree.vdot),
}
"""By name, and the case where a function has several: how many trees it takes, and the function."""

NOT_ON_TREES = {
    "lowrank.LowRank": "a record",
    "lowrank.Truncation": "a record",
    "lowrank.as_matrix": "acts on one leaf; laws in test_lowrank.py",
    "lowrank.materialize": "acts on factors; laws in test_lowrank.py",
    "negative.Route": "a record",
    "negative.free_inputs": "acts on activations; laws in test_retarget.py",
    "negative.strength_of": "acts on a number; laws in test_homothety.py",
    "tree.elementwise": "acts on a formula; tree.combine is one",
    "tree.join": "moves leaves; laws in test_tree.py",
    "tree.partition": "moves leaves; laws in test_tree.py",
    "tree.split_key_like": "returns keys; laws in test_tree.py",
}
"""What the laws of transformations do not speak of, and why."""
