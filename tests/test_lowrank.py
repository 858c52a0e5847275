"""Laws of `wspace.lowrank`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import is_nan
from tests.strategies import FLOAT, UNIT
from wspace import interpolate, lowrank, tree
from wspace.lowrank import LowRank
from wspace.testing import assert_close, matrices
from wspace.testing.comparison import eps

SHAPES = [(6, 4), (3, 7), (5, 5), (2, 4, 3)]
each_shape = pytest.mark.parametrize("shape", SHAPES)
each_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
truncate = jax.jit(lowrank.truncate, static_argnums=1)
singular_values = jax.jit(lowrank.singular_values)


def factors(seed, shape, rank):
    rng = np.random.default_rng(seed)
    *stack, m, n = shape
    left, right = (rng.normal(size=(*stack, size, rank)) for size in (m, n))
    return LowRank(jnp.asarray(left, FLOAT), jnp.asarray(right, FLOAT))


def product(x):
    return np.asarray(x.left, np.float64) @ np.swapaxes(np.asarray(x.right, np.float64), -1, -2)


@each_shape
@given(seed=st.integers(0, 2**16), rank=st.sampled_from([0, 1, 3, 8]))
def test_materialize_is_the_product_of_the_factors(shape, seed, rank):
    x = factors(seed, shape, rank)
    got = lowrank.materialize(x)
    assert got.shape == x.shape == shape
    assert x.rank == rank
    np.testing.assert_allclose(got, product(x), atol=64 * UNIT * max(rank, 1))


@each_shape
@given(data=st.data())
def test_singular_values_are_those_of_numpy(shape, data):
    x = data.draw(matrices(shape))
    wanted = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    np.testing.assert_allclose(singular_values(x), wanted, atol=64 * UNIT * wanted.max())


def test_singular_values_of_a_tall_matrix_take_memory_like_its_own():
    x = jax.ShapeDtypeStruct((3000, 3), FLOAT)
    memory = singular_values.lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * memory.argument_size_in_bytes


@each_shape
@given(seed=st.integers(0, 2**16), rank=st.sampled_from([0, 1, 3, 8]))
def test_singular_values_of_factors_are_those_of_the_product(shape, seed, rank):
    x = factors(seed, shape, rank)
    got = np.asarray(singular_values(x))
    wanted = np.linalg.svd(product(x), compute_uv=False)
    count = min(rank, *shape[-2:])
    assert got.shape == (*shape[:-2], count)
    scale = wanted.max(initial=0)
    np.testing.assert_allclose(got, wanted[..., :count], atol=64 * UNIT * scale)
    np.testing.assert_allclose(wanted[..., count:], 0, atol=1e-12 * scale)


@each_shape
@given(data=st.data(), rank=st.sampled_from([0, 1, 2, 3, 9]))
def test_truncation_leaves_what_numpy_says_and_no_more(shape, data, rank):
    x = data.draw(matrices(shape))
    cut = truncate(x, rank)
    exact = np.asarray(x, np.float64)
    values = np.linalg.svd(exact, compute_uv=False)
    tail, norm, p = np.sqrt(np.sum(values[..., rank:] ** 2)), np.linalg.norm(exact), min(shape[-2:])
    residual = np.linalg.norm(exact - product(cut.factors))
    assert cut.factors.rank == min(rank, p)
    assert abs(float(cut.tail) - tail) <= 64 * np.sqrt(p) * UNIT * norm
    assert abs(residual - tail) <= 64 * np.sqrt(p) * UNIT * norm
    if rank >= p:
        assert cut.tail == 0


@each_shape
@given(data=st.data(), rank=st.sampled_from([1, 2]), noise=st.integers(0, 99))
def test_no_matrix_of_that_rank_is_nearer(shape, data, rank, noise):
    x = data.draw(matrices(shape))
    cut, exact = truncate(x, rank), np.asarray(x, np.float64)
    rng = np.random.default_rng(noise)
    left, right = (np.asarray(f, np.float64) for f in (cut.factors.left, cut.factors.right))
    for step in (1e-3, 1e-1):
        near = [f + step * np.abs(f).max() * rng.normal(size=f.shape) for f in (left, right)]
        other = np.linalg.norm(exact - near[0] @ np.swapaxes(near[1], -1, -2))
        assert other >= float(cut.tail) - 64 * UNIT * np.linalg.norm(exact)


@each_shape
@given(data=st.data())
def test_factors_are_balanced_and_in_single_precision_or_wider(shape, data):
    x = data.draw(matrices(shape))
    left, right = truncate(x, 2).factors.left, truncate(x, 2).factors.right
    sizes = [np.linalg.norm(np.asarray(f, np.float64)) for f in (left, right)]
    assert abs(sizes[0] - sizes[1]) <= 64 * UNIT * max(sizes)
    assert lowrank.truncate(x.astype(jnp.bfloat16), 1).factors.left.dtype == jnp.float32


@given(seed=st.integers(0, 2**16), rank=st.sampled_from([0, 1, 2, 5]))
def test_truncating_factors_is_truncating_their_product(seed, rank):
    x = factors(seed, (6, 5), 4)
    cut, wanted = truncate(x, rank), truncate(lowrank.materialize(x), rank)
    scale = np.linalg.norm(product(x))
    np.testing.assert_allclose(cut.tail, wanted.tail, atol=64 * UNIT * scale)
    np.testing.assert_allclose(
        product(cut.factors), product(wanted.factors), atol=1e3 * UNIT * scale
    )
    empty = truncate(factors(seed, (6, 5), 0), rank)
    assert empty.tail == 0
    assert empty.factors.shape == (6, 5)


@given(seed=st.integers(0, 2**16))
def test_the_gauge_of_the_factors_does_not_matter(seed):
    x, rng = factors(seed, (6, 5), 3), np.random.default_rng(seed)
    turn = np.linalg.qr(rng.normal(size=(3, 3)))[0] * np.array([1.0, 2.0, 4.0])
    left = np.asarray(x.left, np.float64) @ turn
    right = np.asarray(x.right, np.float64) @ np.linalg.inv(turn).T
    other = LowRank(jnp.asarray(left, FLOAT), jnp.asarray(right, FLOAT))
    scale = np.linalg.norm(product(x))
    for function in (lowrank.materialize, singular_values, lambda y: truncate(y, 2).tail):
        np.testing.assert_allclose(function(other), function(x), atol=256 * UNIT * scale)


@each_dtype
def test_apply_rounds_the_sum_once(dtype):
    rng = np.random.default_rng(0)
    base = {"w": jnp.asarray(rng.normal(size=(6, 5)), dtype), "b": jnp.ones(5, dtype)}
    edit = {"w": factors(0, (6, 5), 2), "b": jnp.full(5, 0.25)}
    got = lowrank.apply(base, edit)
    wanted = np.asarray(base["w"]).astype(np.float64) + product(edit["w"])
    assert got["w"].dtype == dtype
    assert_close(got["w"], jnp.asarray(wanted.astype(np.float32)).astype(dtype), units=1)
    assert_close(got["b"], jnp.full(5, 1.25, dtype), units=0)
    # The popular form, which rounds the product first, loses what is small beside its rounding.
    tiny = {"w": LowRank(1e-3 * jnp.ones((6, 1)), jnp.ones((5, 1))), "b": jnp.zeros(5)}
    assert_close(
        lowrank.apply(jax.tree.map(lambda x: x.astype(jnp.float32), base), tiny)["w"],
        base["w"].astype(jnp.float32) + jnp.float32(1e-3),
        units=2,
    )


def test_apply_reaches_stacks_and_convolutions():
    base = {"k": jnp.ones((2, 2, 3, 4)), "s": jnp.ones((2, 3, 2))}
    edit = {"k": factors(0, (12, 4), 2), "s": factors(1, (2, 3, 2), 1)}
    got = lowrank.apply(base, edit)
    np.testing.assert_allclose(got["k"], 1 + product(edit["k"]).reshape(2, 2, 3, 4), atol=1e-5)
    np.testing.assert_allclose(got["s"], 1 + product(edit["s"]), atol=1e-5)


def test_what_matrix_a_leaf_is(refuses):
    shapes = {
        (): (1, 1),
        (5,): (5, 1),
        (3, 2): (3, 2),
        (4, 3, 2): (4, 3, 2),
        (3, 3, 8, 16): (72, 16),
        (2, 3, 3, 8, 16): (144, 16),
    }
    for shape, wanted in shapes.items():
        assert lowrank.as_matrix(jnp.ones(shape)).shape == wanted
    with refuses(ValueError, match="reshape it to two or three dimensions first"):
        lowrank.as_matrix(jnp.ones((1,) * 6))


def test_gradient_of_singular_values_that_repeat():
    # The sum of the two largest squares of diag(2, 2, 1) is smooth there; its factors are not.
    def energy(x):
        return jnp.sum(lowrank.singular_values(x)[:2] ** 2)

    slope = jax.grad(energy)(jnp.diag(jnp.array([2.0, 2.0, 1.0])))
    np.testing.assert_allclose(slope, np.diag([4.0, 4.0, 0.0]), atol=1e-5)
    tail = jax.grad(lambda x: lowrank.truncate(x, 2).tail)(jnp.zeros((3, 3)))
    np.testing.assert_array_equal(tail, np.zeros((3, 3)))


def test_low_rank_leaves_pass_through_transformations():
    edit = {"w": factors(0, (6, 5), 2)}
    doubled = jax.jit(lambda e: jax.tree.map(lambda x: 2 * x, e))(edit)
    assert isinstance(doubled["w"], LowRank)
    slope = jax.grad(lambda e: jnp.sum(lowrank.materialize(e["w"]) ** 2))(edit)
    wanted = 2 * product(edit["w"]) @ np.asarray(edit["w"].right, np.float64)
    np.testing.assert_allclose(slope["w"].left, wanted, rtol=1e-4)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), edit)
    assert jax.vmap(lambda e: lowrank.materialize(e["w"]))(stacked).shape == (2, 6, 5)


@pytest.mark.parametrize(
    "function", [interpolate.lerp, lambda x, y, t: tree.combine((1, t), (x, y))]
)
def test_factors_are_refused_where_weights_are_meant(function, refuses):
    edit = {"w": factors(0, (6, 5), 2)}
    with refuses(TypeError, match=r"leaf \['w'\] of .* is a LowRank edit, not weights"):
        function(edit, edit, 0.5)
    with refuses(TypeError, match="is a LowRank edit"):
        function({"w": jnp.ones((6, 5))}, edit, 0.5)


def test_bad_arguments_are_refused(refuses):
    x = jnp.eye(3)
    for rank, error, words in (
        (-1, ValueError, "rank must be at least 0, got -1"),
        (1.5, TypeError, "rank must be a plain integer"),
        (True, TypeError, "rank must be a plain integer"),
        (None, ValueError, "give exactly one of rank, energy and tail"),
    ):
        with refuses(error, match=words):
            lowrank.truncate(x, rank)
    with refuses(ValueError, match=r"leaf \(root\) of x holds NaN or an infinity"):
        lowrank.truncate(x * jnp.nan, 1)
    assert is_nan(truncate(x * jnp.nan, 1).tail)
    with refuses(TypeError, match="has dtype int32"):
        lowrank.truncate(jnp.ones((2, 2), jnp.int32), 1)
    with refuses(ValueError, match="are not the factors of one matrix"):
        lowrank.materialize(LowRank(jnp.ones((3, 2)), jnp.ones((3, 1))))
    with refuses(TypeError, match="of left has dtype int32"):
        lowrank.materialize(LowRank(jnp.ones((3, 2), jnp.int32), jnp.ones((3, 2))))
    base, edit = {"w": jnp.ones((3, 2))}, {"w": LowRank(jnp.ones((2, 1)), jnp.ones((3, 1)))}
    with refuses(ValueError, match=r"leaf \['w'\] has shape \(3, 2\) in base, \(2, 3\) in edit"):
        lowrank.apply(base, edit)
    with refuses(ValueError, match=r"leaf \['w'\] has shape \(3, 2\) in base, \(2,\) in edit"):
        lowrank.apply(base, {"w": jnp.ones(2)})
    with refuses(
        ValueError, match="base has a leaf .* that edit lacks|edit has a leaf .* that base lacks"
    ):
        lowrank.apply(base, {"v": jnp.ones((3, 2))})


def test_matrices_without_entries():
    empty = jnp.ones((0, 3))
    assert lowrank.singular_values(empty).shape == (0,)
    cut = lowrank.truncate(empty, 2)
    assert cut.tail == 0
    assert cut.factors.shape == (0, 3)
    assert eps(cut.tail) > 0
