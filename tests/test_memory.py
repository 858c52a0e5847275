"""What the memory of calls is measured with, and what the programs of fused passes take inside."""

import gc
import sys

import jax
import jax.extend.core
import jax.numpy as jnp
import pytest

from tests.memory import peak
from wspace import geometry, negative, tree

SIZE = 2**12
ROOM = 2**10
"""Scalars, in bytes."""


def halves(count):
    """Trees of two leaves in half precision, of `SIZE` bytes each."""
    size = SIZE // 4
    return [
        {"w": jnp.full(size, i + 1, jnp.bfloat16), "b": jnp.full(size, i + 2, jnp.bfloat16)}
        for i in range(count)
    ]


def doubled_in_turn(x):
    """Two copies in float32 at once, of three in all."""
    wide = tree.combine((2.0,), (tree.upcast(x),))
    return tree.combine((0.5,), (wide,))


class Ring:
    """What may refer to itself, so that it is garbage after use, until that is collected."""


def thrown_away(x):
    """One copy in float32 that is garbage, then one of half precision."""
    ring = Ring()
    ring.held, ring.own = tree.upcast(x), ring
    del ring
    return tree.combine((1.0,), (x,))


@pytest.mark.parametrize(
    ("function", "trees"),
    [
        (lambda x: x, 0),
        (lambda x: tree.combine((2.0,), (x,)), 1),
        (lambda x: tree.cast_like(tree.upcast(x), x), 3),
        (lambda x: tree.norm(tree.upcast(x)), 2),
        (doubled_in_turn, 4),
        (thrown_away, 3),
    ],
)
def test_memory_is_what_is_alive_at_once(function, trees, pytestconfig):
    if pytestconfig.getoption("jaxtyping_packages"):
        pytest.skip("a checked call holds on to its arguments until it returns")
    (x,) = halves(1)
    function(x)
    before = len(jax.live_arrays())
    assert peak(function, [x]) == pytest.approx(trees * SIZE, abs=ROOM)
    gc.collect()
    assert gc.isenabled()
    assert len(jax.live_arrays()) <= before


def test_nothing_is_left_behind_where_a_call_fails(refuses):
    with refuses(TypeError, match="int32"):
        peak(tree.upcast, [jnp.ones(3, jnp.int32)])
    assert gc.isenabled()
    assert sys.getprofile() is None


FUSED = {
    "angle": lambda x, y, _: geometry.angle(x, y),
    "coordinates": lambda x, y, z: geometry.coordinates(x, [y, z]),
    "distance": lambda x, y, _: geometry.distance(x, y),
    "exit_ball": lambda x, y, z: negative.exit_ball([x, y], (0.6, 0.4), z, 1e9),
    "gram": lambda *points: geometry.gram(points),
    "guard_hull": lambda x, y, z: negative.guard_hull([x, y], z, 1e9),
    "retarget": lambda x, y, z: negative.retarget([x, y], (0.6, 0.4), z),
}


def programs(function, arguments):
    """The programs that an eager call would run one after another, apart from single operations."""
    traced = jax.make_jaxpr(function)(*arguments)
    for step in traced.jaxpr.eqns:
        if step.primitive.name in ("jit", "pjit"):
            types = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in step.invars]
            run = jax.extend.core.jaxpr_as_fun(step.params["jaxpr"])
            yield step.params["name"], jax.jit(run).lower(*types).compile()


@pytest.mark.parametrize("name", FUSED)
def test_programs_of_fused_passes_write_no_tree_inside(name):
    points = [{"w": jnp.ones((2**10, 2**9), jnp.bfloat16)} for _ in range(3)]
    taken = {}
    for title, program in programs(FUSED[name], points):
        if (memory := program.memory_analysis()) is None:
            pytest.skip("the device does not say what its programs take")
        taken[title] = memory.temp_size_in_bytes / points[0]["w"].nbytes
    assert taken
    assert max(taken.values()) < 0.25, taken
