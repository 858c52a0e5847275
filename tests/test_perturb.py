"""Laws of `wspace.perturb`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import is_nan
from tests.strategies import FLOAT, UNIT, is_shape, layouts
from wspace import lowrank, perturb, tree
from wspace.lowrank import LowRank
from wspace.testing import assert_close, pairs, size, vector
from wspace.testing.comparison import eps

gaussian = jax.jit(perturb.gaussian)
low_rank_gaussian = jax.jit(perturb.low_rank_gaussian, static_argnums=2)
filter_normalize = jax.jit(perturb.filter_normalize)
KEY = jax.random.key(0)
each_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
each_draw = pytest.mark.parametrize(
    "draw",
    [
        perturb.gaussian,
        lambda key, like, **options: perturb.low_rank_gaussian(key, like, 2, **options),
    ],
    ids=["gaussian", "low_rank_gaussian"],
)
keys = st.integers(0, 2**16).map(jax.random.key)
norms = st.sampled_from([1e-6, 0.5, 1.0, 1e6])
MATRICES = {"w": (6, 4), "stack": (2, 5, 3), "conv": (2, 1, 2, 3), "wide": (1, 7), "empty": (0, 3)}
COLUMNS = {"bias": (5,), "scale": ()}


def assert_same(got, wanted, units=0):
    """Asserts edits equal factor by factor, as draws of one key are."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    assert_close(jax.tree.leaves(got), jax.tree.leaves(wanted), units=units)


def room(layout, dtype=FLOAT):
    return jax.tree.map(lambda shape: jnp.zeros(shape, dtype), layout, is_leaf=is_shape)


def dense(edit):
    """An edit multiplied out in float64."""

    def product(x):
        if not isinstance(x, LowRank):
            return np.asarray(x, np.float64)
        left, right = (np.asarray(factor, np.float64) for factor in (x.left, x.right))
        return left @ np.swapaxes(right, -1, -2)

    return jax.tree.map(product, edit, is_leaf=lambda node: isinstance(node, LowRank))


@given(key=keys, layout=layouts, norm=norms)
def test_gaussian_has_exactly_the_norm_in_the_direction_of_the_draw(key, layout, norm):
    like = room(layout)
    draw, edit = vector(gaussian(key, like)), vector(gaussian(key, like, norm=norm))
    assert abs(np.linalg.norm(edit.astype(np.float64)) / norm - 1) <= 8 * UNIT
    np.testing.assert_allclose(edit, draw * (norm / size(draw)), rtol=16 * UNIT)
    assert jax.tree.map(jax.typeof, gaussian(key, like)) == jax.tree.map(jax.typeof, like)


@given(key=keys, layout=layouts, norm=norms, rank=st.sampled_from([1, 3]))
def test_low_rank_gaussian_has_exactly_the_norm_in_the_direction_of_the_draw(
    key, layout, norm, rank
):
    like = room(layout)
    draw = vector(dense(low_rank_gaussian(key, like, rank)))
    edit = vector(dense(low_rank_gaussian(key, like, rank, norm=norm)))
    assert abs(np.linalg.norm(edit.astype(np.float64)) / norm - 1) <= 64 * UNIT
    np.testing.assert_allclose(edit, draw * (norm / size(draw)), atol=64 * UNIT * norm)


def test_draws_are_normal_and_independent_of_each_other():
    like = {"w": jnp.zeros((300, 200)), "v": jnp.zeros((300, 200)), "b": jnp.zeros(20000)}
    for edit in (perturb.gaussian(KEY, like), dense(perturb.low_rank_gaussian(KEY, like, 100))):
        w, v, b = (np.asarray(edit[name], np.float64).ravel() for name in ("w", "v", "b"))
        for x in (w, v, b):
            assert abs(x.mean()) < 0.05
            assert abs(x.var() - 1) < 0.05
            assert abs((x**4).mean() - 3) < 0.3
        assert abs(np.corrcoef(w, v)[0, 1]) < 0.02
    other = perturb.gaussian(jax.random.key(1), like)["w"]
    assert abs(np.corrcoef(other.ravel(), perturb.gaussian(KEY, like)["w"].ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("rank", [1, 2, 9])
def test_entries_have_unit_variance_at_every_rank(rank):
    like = {"w": jnp.zeros((4, 6)), "wide": jnp.zeros((2, 1, 6))}
    rows = jax.vmap(lambda key: perturb.low_rank_gaussian(key, like, rank))(
        jax.random.split(KEY, 4000)
    )
    for x in jax.tree.leaves(dense(rows)):
        assert abs((x**2).mean() - 1) < 0.1


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 9])
@given(key=keys)
def test_low_rank_gaussian_has_the_rank_and_moves_columns_from_rank_one(rank, key):
    like = room(MATRICES | COLUMNS)
    edit = low_rank_gaussian(key, like, rank)
    for name, x in dense({name: edit[name] for name in MATRICES}).items():
        assert isinstance(edit[name], LowRank)
        assert x.shape == lowrank.as_matrix(like[name]).shape
        assert edit[name].rank == min(rank, *x.shape[-2:])
        if x.size:
            values = np.linalg.svd(x, compute_uv=False)
            assert (np.sum(values > 1e-5 * values.max(), axis=-1) == min(rank, *x.shape[-2:])).all()
    columns = {name: edit[name] for name in COLUMNS}
    wanted = gaussian(key, {name: like[name] for name in COLUMNS})
    assert_close(columns, jax.tree.map(lambda x: x if rank else 0 * x, wanted), units=0)
    assert jax.tree.map(jnp.shape, lowrank.apply(like, edit)) == jax.tree.map(jnp.shape, like)


@each_draw
@given(key=keys)
def test_leaves_added_or_taken_away_change_no_other_draw(draw, key):
    like = room(MATRICES | COLUMNS)
    more = draw(key, like | {"a": jnp.zeros((8, 8), jnp.bfloat16), "z": jnp.zeros(3)})
    few = draw(key, {"w": like["w"], "scale": like["scale"]})
    every = draw(key, like)
    for name in few:
        assert_same(few[name], every[name])
    for name in every:
        assert_same(more[name], every[name])
    assert not np.array_equal(*(vector(every[name])[:5] for name in ("w", "bias")))


@each_draw
def test_values_of_the_layout_do_not_matter(draw):
    like = room(MATRICES | COLUMNS)
    broken = jax.tree.map(lambda x: x + jnp.nan, like)
    assert_same(draw(KEY, broken, norm=1.0), draw(KEY, like, norm=1.0))
    known = jax.tree.map(np.asarray, like)
    assert_same(draw(KEY, known, norm=1.0), draw(KEY, like, norm=1.0))


@each_dtype
@pytest.mark.parametrize("norm", [None, 0.5])
@given(key=keys)
def test_gaussian_in_half_precision_is_that_in_single_rounded_once(dtype, norm, key):
    single, half = (room(MATRICES | COLUMNS, d) for d in (jnp.float32, dtype))
    got, wanted = gaussian(key, half, norm=norm), gaussian(key, single, norm=norm)
    assert_close(got, tree.cast_like(wanted, half), units=0)


def test_factors_and_columns_are_in_single_precision_or_wider():
    like = {"w": jnp.zeros((3, 2), jnp.bfloat16), "b": jnp.zeros(2, jnp.float16)}
    edit = perturb.low_rank_gaussian(KEY, like, 1, norm=1.0)
    assert {x.dtype for x in jax.tree.leaves(edit)} == {jnp.dtype(jnp.float32)}
    with jax.enable_x64(True):
        like = {"w": jnp.zeros((3, 2), jnp.float64), "b": jnp.zeros(2, jnp.bfloat16)}
        edit = perturb.low_rank_gaussian(KEY, like, 1, norm=1.0)
        assert edit["w"].left.dtype == edit["w"].right.dtype == jnp.float64
        assert edit["b"].dtype == jnp.float32


@each_draw
def test_draws_are_the_same_sharded(draw):
    like = room({"w": (16, 4), "stack": (8, 8, 3), "conv": (8, 1, 2, 3), "b": (8,), "s": ()})
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        spread = jax.tree.map(lambda x: jax.device_put(x, jax.P("x") if x.ndim else jax.P()), like)
        results = [draw(KEY, spread), jax.jit(draw)(KEY, spread)]
    results.append(draw(KEY, spread))
    for got in results:
        whole = (jax.tree.leaves(x) for x in (got, draw(KEY, like)))
        assert_close(*jax.tree.map(np.asarray, tuple(whole)), units=1)
        for x, leaf in ((got[name], spread[name]) for name in spread):
            assert isinstance(x, LowRank) or jax.typeof(x) == jax.typeof(leaf)
        moved = lowrank.apply(spread, got)
        assert jax.tree.map(jax.typeof, moved) == jax.tree.map(jax.typeof, spread)


def test_gaussian_is_drawn_where_it_lies():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        spread = jax.device_put(jnp.zeros((16, 4)), jax.P("x"))
        drawn = jax.jit(perturb.gaussian).lower(KEY, spread).compile().as_text()
        scaled = jax.jit(perturb.filter_normalize).lower(spread, spread).compile().as_text()
    assert not re.search(r"all-|collective-permute|reduce-scatter", drawn)
    assert not re.search(r"all-gather|all-to-all|collective-permute", scaled)


@each_draw
def test_norm_is_traced_or_refused(draw):
    like = room(MATRICES | COLUMNS)
    for norm in (0.0, 0, np.float32(2.0), jnp.asarray(3, jnp.int32)):
        got = np.linalg.norm(vector(dense(draw(KEY, like, norm=norm))).astype(np.float64))
        assert abs(got - float(norm)) <= 64 * UNIT * float(norm)
    traced = jax.jit(lambda norm: draw(KEY, like, norm=norm))
    assert_same(traced(2.0), draw(KEY, like, norm=2.0), units=16)
    assert is_nan({name: dense(traced(-1.0))[name] for name in ("w", "bias")})
    for norm in (-1.0, float("inf")):
        with pytest.raises(ValueError, match="norm must be finite and at least 0"):
            draw(KEY, like, norm=norm)
    assert jax.tree.leaves(draw(KEY, {})) == []
    for empty in ({}, {"w": jnp.zeros((0, 3)), "b": jnp.zeros(0)}):
        with pytest.raises(ValueError, match="nothing is drawn for an empty tree or at rank 0"):
            draw(KEY, empty, norm=1.0)


def test_bad_ranks_and_leaves_are_refused(refuses):
    like = room(MATRICES | COLUMNS)
    with pytest.raises(ValueError, match="nothing is drawn for an empty tree or at rank 0"):
        perturb.low_rank_gaussian(KEY, like, 0, norm=1.0)
    with pytest.raises(ValueError, match="rank must be at least 0, got -1"):
        perturb.low_rank_gaussian(KEY, like, -1)
    with refuses(TypeError, match="rank must be a plain integer"):
        perturb.low_rank_gaussian(KEY, like, 1.5)
    six = jnp.zeros((1,) * 6)
    with pytest.raises(ValueError, match="is no matrix, stack of matrices or convolution"):
        perturb.low_rank_gaussian(KEY, six, 1)
    with pytest.raises(ValueError, match="is no matrix, stack of matrices or convolution"):
        perturb.filter_normalize(six, six)
    with refuses(ValueError, match=r"leaf \(root\) has shape \(2,\) in direction, \(3,\) in like"):
        perturb.filter_normalize(jnp.ones(2), jnp.ones(3))
    for draw in (perturb.gaussian, lambda key, like: perturb.low_rank_gaussian(key, like, 1)):
        with refuses(TypeError, match="of like has dtype int32"):
            draw(KEY, {"w": jnp.ones(2, jnp.int32)})


def filters(leaf):
    """Norms of the filters of a leaf of two dimensions or more, in float64."""
    x = np.asarray(leaf, np.float64)
    return np.linalg.norm(x if x.ndim == 3 else x.reshape(-1, x.shape[-1]), axis=-2)


@pytest.mark.parametrize("dtype", [FLOAT, jnp.bfloat16])
@given(pair=pairs())
def test_filters_get_the_norms_of_the_weights_and_keep_their_direction(dtype, pair):
    direction, like = jax.tree.map(lambda x: x.astype(dtype), pair)
    got = filter_normalize(direction, like)
    assert jax.tree.map(jax.typeof, got) == jax.tree.map(jax.typeof, direction)
    for d, w, x in zip(*map(jax.tree.leaves, (direction, like, got)), strict=True):
        if x.ndim < 2:
            assert not np.asarray(x, np.float64).any()
            continue
        lengths, wanted = filters(d), np.where(filters(d) > 0, filters(w), 0)
        np.testing.assert_allclose(filters(x), wanted, rtol=16 * eps(x))
        ratio = np.expand_dims(wanted / np.where(lengths > 0, lengths, 1), -2)
        matrix = np.asarray(d, np.float64)
        flat = matrix if matrix.ndim == 3 else matrix.reshape(-1, matrix.shape[-1])
        np.testing.assert_allclose(
            np.asarray(x, np.float64).reshape(flat.shape), ratio * flat, rtol=16 * eps(x)
        )


@given(pair=pairs(), scale=st.sampled_from([2.0**-12, 0.3, 40.0]))
def test_length_of_the_direction_does_not_matter_and_that_of_the_weights_does(pair, scale):
    direction, like = pair
    got = filter_normalize(direction, like)
    longer = jax.tree.map(lambda x: scale * x, direction)
    assert_close(filter_normalize(longer, like), got, units=16)
    larger = jax.tree.map(lambda x: -scale * x, like)
    wanted = jax.tree.map(lambda x: scale * x, got)
    assert_close(filter_normalize(direction, larger), wanted, units=16)
    assert_close(filter_normalize(got, like), got, units=16)
    own = jax.tree.map(lambda x: x if x.ndim > 1 else 0 * x, like)
    assert_close(filter_normalize(like, like), own, units=16)


def test_derivatives_at_zero_filters_are_zero():
    direction = jnp.array([[0.0, 1.0, 2.0], [0.0, -1.0, 0.0]])
    like = jnp.array([[1.0, 0.0, 3.0], [1.0, 0.0, 4.0]])
    read = jax.jacobian(perturb.filter_normalize, argnums=(0, 1))
    for slope in read(direction, like):
        assert bool(jnp.isfinite(slope).all())
        assert not slope[:, :2, :, :2].any()
    assert read(direction, like)[1][0, 2, :, 2].tolist() == pytest.approx([0.6, 0.8])
    second = jax.hessian(lambda d: perturb.filter_normalize(d, like).sum())(direction)
    assert bool(jnp.isfinite(second).all())
