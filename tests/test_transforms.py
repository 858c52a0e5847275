"""What every function of `wspace` promises under JAX's transformations."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import catalog
from tests.catalog import CATALOG, COMPOSED
from wspace.testing import assert_close

each_function = pytest.mark.parametrize(("count", "function"), CATALOG.values(), ids=CATALOG)
SEVERAL = {name: value for name, value in CATALOG.items() if value[0] > 1}
each_with_several = pytest.mark.parametrize(("count", "function"), SEVERAL.values(), ids=SEVERAL)
PARTS = {name: value for name, value in CATALOG.items() if name not in COMPOSED}
each_part = pytest.mark.parametrize(("count", "function"), PARTS.values(), ids=PARTS)
SEVERAL_PARTS = {name: value for name, value in PARTS.items() if name in SEVERAL}
each_part_with_several = pytest.mark.parametrize(
    ("count", "function"), SEVERAL_PARTS.values(), ids=SEVERAL_PARTS
)
SHAPES = {"w": (16, 4), "b": [(8,), ()], "s": (8, 8, 3), "k": (8, 1, 2, 3)}
COLLECTIVES = r"all-(gather|reduce|to-all)|collective-permute|reduce-scatter"


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


@functools.cache
def eager(count, function):
    """What most laws compare with: eager calls take longest here, so each is made once."""
    return function(*trees(count))


@each_function
def test_jit_agrees_with_eager(count, function):
    assert_close(jax.jit(function)(*trees(count)), eager(count, function), units=32)


@each_part
def test_vmap_agrees_with_a_loop(count, function):
    batch = jax.tree.map(lambda *xs: jnp.stack(xs), trees(count), trees(count, seed=1))
    rows = [eager(count, function), jax.jit(function)(*trees(count, seed=1))]
    looped = jax.tree.map(lambda *xs: jnp.stack(xs), *rows)
    assert_close(jax.jit(jax.vmap(function))(*batch), looped, units=64)


@each_function
def test_half_precision_result_is_the_single_precision_result_rounded_once(count, function):
    got, wide = function(*trees(count, jnp.bfloat16)), eager(count, function)
    assert_close(got, jax.tree.map(lambda x, like: x.astype(like.dtype), wide, got), units=0)
    if isinstance(got, jax.Array):
        assert got.dtype in (jnp.float32, jnp.int32)


@each_part_with_several
def test_points_of_different_dtypes_meet_in_the_widest(count, function):
    with jax.enable_x64(True):
        dtypes = (jnp.float32, jnp.float64, jnp.float16)
        mixed = [trees(count, d)[i] for i, d in enumerate(dtypes[:count])]
        got = jax.jit(function)(*mixed)
        wanted = jax.jit(function)(*jax.tree.map(lambda x: x.astype(jnp.float64), mixed))
        wanted = jax.tree.map(lambda x, like: x.astype(like.dtype), wanted, got)
        largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(wanted))
        assert_close(got, wanted, units=64, scale=max(largest, 1.0))  # as large as the entries


@each_part
def test_sharded_leaves_stay_sharded(count, function):
    arguments = trees(count)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        spread = jax.tree.map(
            lambda x: jax.device_put(x, jax.P("x") if x.ndim else jax.P()), arguments
        )
        results = [jax.jit(function)(*spread)]
    results.append(function(*spread))  # arrays carry their mesh, so the context is not needed
    for got in results:
        for one in got if isinstance(got, list) else [got]:
            if jax.tree.structure(one) == jax.tree.structure(spread[0]):
                assert jax.tree.map(jax.typeof, one) == jax.tree.map(jax.typeof, spread[0])
    got, wanted = jax.tree.map(np.asarray, (got, eager(count, function)))
    assert_close(got, wanted, units=64)


@pytest.mark.parametrize(
    "name", ["average.mean", "interpolate.lerp", "negative.repel", "negative.retarget"]
)
def test_combinations_of_sharded_leaves_communicate_nothing(name):
    count, function = CATALOG[name]
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        spread = jax.tree.map(
            lambda x: jax.device_put(x, jax.P("x") if x.ndim else jax.P()), trees(count)
        )
        program = jax.jit(function).lower(*spread).compile().as_text()
    assert not re.search(COLLECTIVES, program)


@pytest.mark.parametrize("name", ["negative.retarget, allow", "negative.exit_ball, direction"])
def test_what_is_known_may_be_closed_over(name):
    count, function = CATALOG[name]
    arguments, constants = trees(count), catalog.allow()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "allow", lambda: constants)
        assert_close(jax.jit(function)(*arguments), function(*arguments), units=32)


@each_function
def test_refuses_leaves_that_are_not_floating_point(count, function, refuses):
    *rest, last = trees(count)
    with refuses(TypeError, match=r"leaf .* has dtype int32; weights are .* tree.partition"):
        function(*rest, last | {"w": jnp.ones((16, 4), jnp.int32)})


@each_with_several
def test_refuses_trees_of_different_layout(count, function, refuses):
    *rest, last = trees(count)
    with refuses(ValueError, match=r"leaf .* has shape \(16, 4\) in .*, \(4, 1\) in"):
        function(*rest, last | {"w": jnp.ones((4, 1))})
    with refuses(ValueError, match=r"has a leaf .* that .* lacks|must be a tree like base"):
        function(*rest, {name: last[name] for name in ("w", "b", "k")})
