"""Laws of `wspace.lowrank.algebra`: sums, inner products and norms in factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import is_nan
from tests.strategies import FLOAT, UNIT, scales
from wspace import lowrank, tree
from wspace.lowrank import LowRank
from wspace.testing import assert_close

LAYOUT = {"w": (7, 5), "s": (2, 4, 6), "k": (6, 3), "b": (3,), "c": (), "e": (0,)}
KERNEL = (2, 1, 3, 3)  # the convolution whose matrix "k" is
FACTORED = ("w", "s", "k")
coefficients = st.sampled_from([1.0, -1.0, 0.25, -0.7, 3.0, 0.0])
ranks = st.sampled_from([0, 2, 9])
seeds = st.integers(0, 2**16)
vdot, norm, combine = map(jax.jit, (lowrank.vdot, lowrank.norm, lowrank.combine))
slope_of_norm = jax.jit(jax.grad(lowrank.norm))


def edit(seed, rank, factored=FACTORED):
    """An edit with factors at some leaves, and dense arrays of its layout at the others."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for name, shape in LAYOUT.items():
        if name in factored:
            *stack, m, n = shape
            sides = [rng.normal(size=(*stack, size, rank)) for size in (m, n)]
            leaves[name] = LowRank(*(jnp.asarray(x, FLOAT) for x in sides))
        else:
            leaves[name] = jnp.asarray(rng.normal(size=KERNEL if name == "k" else shape), FLOAT)
    return leaves


def dense(x):
    """The oracle's view of an edit: matrices in float64."""
    return {
        name: np.asarray(leaf.left, np.float64)
        @ np.asarray(leaf.right, np.float64).swapaxes(-1, -2)
        if isinstance(leaf, LowRank)
        else np.asarray(leaf, np.float64).reshape(LAYOUT[name])
        for name, leaf in x.items()
    }


def inner(x, y):
    return sum(np.sum(x[name] * y[name]) for name in LAYOUT)


def length(x):
    return np.sqrt(inner(x, x))


def regauged(x, seed):
    """The same matrices in other factors, by gauges of condition number at most 4."""
    rng = np.random.default_rng(seed)

    def turn(leaf):
        if not isinstance(leaf, LowRank):
            return leaf
        bases = [np.linalg.qr(rng.normal(size=(leaf.rank, leaf.rank)))[0] for _ in range(2)]
        gauge = (bases[0] * rng.uniform(0.5, 2, leaf.rank)) @ bases[1]
        left = np.asarray(leaf.left, np.float64) @ gauge
        right = np.asarray(leaf.right, np.float64) @ np.linalg.inv(gauge).T
        return LowRank(jnp.asarray(left, FLOAT), jnp.asarray(right, FLOAT))

    return {name: turn(leaf) for name, leaf in x.items()}


@pytest.mark.parametrize("r", [(2, 5, 9), (0, 1, 2)])
@given(seed=seeds, c=st.tuples(*[coefficients] * 3))
def test_a_sum_of_edits_is_that_of_their_matrices(r, seed, c):
    edits = [edit(seed + i, rank) for i, rank in enumerate(r)]
    total = combine(c, edits)
    assert total["w"].rank == sum(r)
    wanted = {
        name: sum(k * dense(x)[name] for k, x in zip(c, edits, strict=True)) for name in LAYOUT
    }
    size = sum(abs(k) * length(dense(x)) for k, x in zip(c, edits, strict=True))
    got = dense(total)
    assert length({name: got[name] - wanted[name] for name in LAYOUT}) <= 32 * UNIT * size


@given(seed=seeds, c=coefficients, factored=st.sampled_from([("w",), ("s", "k"), ()]))
def test_factors_and_dense_leaves_add_up(seed, c, factored):
    x, y = edit(seed, 2), edit(seed + 1, 3, factored)
    for one, other in ((x, y), (y, x)):
        total = combine((1.0, c), (one, other))
        assert [name for name in LAYOUT if isinstance(total[name], LowRank)] == [*factored]
        size = length(dense(one)) + abs(c) * length(dense(other))
        gap = {name: dense(one)[name] + c * dense(other)[name] for name in LAYOUT}
        gap = {name: dense(total)[name] - gap[name] for name in LAYOUT}
        assert length(gap) <= 32 * UNIT * size
        for name in {*FACTORED} - {*factored}:
            assert total[name].shape == y[name].shape


@given(
    seed=seeds,
    r=st.sampled_from([(0, 2), (2, 9), (9, 9)]),
    factored=st.sampled_from([FACTORED, ("w",)]),
)
def test_inner_products_are_those_of_the_matrices(seed, r, factored):
    x, y = edit(seed, r[0]), edit(seed + 1, r[1], factored)
    wanted, size = inner(dense(x), dense(y)), length(dense(x)) * length(dense(y))
    assert abs(vdot(x, y) - wanted) <= 64 * UNIT * size
    assert abs(vdot(y, x) - wanted) <= 64 * UNIT * size


@given(seed=seeds, rank=ranks, scale=scales)
def test_the_norm_is_that_of_the_matrices(seed, rank, scale):
    x = edit(seed, rank)
    got = norm(lowrank.scale(scale, x))
    np.testing.assert_allclose(got, scale * length(dense(x)), rtol=64 * UNIT)


@given(seed=seeds, rank=st.sampled_from([1, 2, 4]))
def test_an_edit_minus_itself_in_another_gauge_is_nothing(seed, rank):
    x = edit(seed, rank)
    other = regauged(x, seed)
    nothing = combine((1.0, -1.0), (x, other))
    assert norm(nothing) <= 64 * UNIT * norm(x)


@given(seed=seeds, rank=st.sampled_from([1, 2, 4]))
def test_the_gauge_changes_no_result(seed, rank):
    x, y = edit(seed, rank), edit(seed + 1, 3)
    other, size = regauged(x, seed), length(dense(x)) + length(dense(y))
    for got, wanted, scale in (
        (norm(other), norm(x), size),
        (vdot(other, y), vdot(x, y), size**2),
        (norm(lowrank.add(other, y)), norm(lowrank.add(x, y)), size),
    ):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=64 * UNIT * scale)
    inputs = np.random.default_rng(seed).normal(size=(3, 7))
    got, wanted = (jnp.asarray(inputs, FLOAT) @ z["w"] for z in (other, x))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=64 * UNIT * size * np.linalg.norm(inputs))


@pytest.mark.parametrize("powers", [(66, 66), (-66, -66), (100, -80), (0, 60)])
def test_norm_and_inner_product_are_those_of_every_gauge_exactly(powers):
    """Of columns that are long in one factor and short in the other no product overflows."""
    rng = np.random.default_rng(0)
    left, right, other = rng.normal(size=(3, 5, 2)).astype(np.float32)
    gauge = np.exp2(np.float32(powers))
    plain = lowrank.LowRank(jnp.asarray(left), jnp.asarray(right))
    turned = lowrank.LowRank(jnp.asarray(left * gauge), jnp.asarray(right / gauge))
    dense = jnp.asarray(other @ right.T)
    for solve in (lambda f: f, jax.jit):
        norm, vdot = solve(lowrank.norm), solve(lowrank.vdot)
        np.testing.assert_allclose(norm(turned), norm(plain), rtol=1e-6)
        assert vdot(turned, turned) == vdot(plain, plain)
        np.testing.assert_allclose(vdot(turned, dense), vdot(plain, dense), rtol=1e-6)
    rate = jax.grad(lowrank.norm)(turned)
    wanted = jax.grad(lowrank.norm)(plain)
    np.testing.assert_allclose(np.asarray(rate.left) * gauge, wanted.left, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("power", [-100, 0, 100])
def test_the_norm_of_factors_is_known_at_every_scale(power):
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(2, 5, 2)).astype(np.float32)
    wanted = np.linalg.norm(left.astype(float) @ right.T)
    edit = lowrank.LowRank(jnp.asarray(left * np.float32(2.0**power)), jnp.asarray(right))
    got = lowrank.norm({"a": edit})
    np.testing.assert_allclose(np.float64(got) / 2.0**power, wanted, rtol=1e-6)


def test_the_popular_sum_of_factors_depends_on_the_gauge():
    x = edit(0, 4)["w"]
    other = regauged({"w": x}, 0)["w"]
    # Weights (1, -1) by their roots in the factors, as adapters are merged "linearly".
    popular = LowRank(x.left - other.left, x.right + other.right)
    size = lowrank.norm(x)
    assert lowrank.norm(popular) > 0.5 * size
    assert lowrank.norm(lowrank.combine((1, -1), (x, other))) <= 64 * UNIT * size


def test_the_root_of_the_inner_product_keeps_half_the_digits():
    x = edit(0, 4)["w"]
    nothing = lowrank.combine((1, -1), (x, regauged({"w": x}, 0)["w"]))
    root = jnp.sqrt(jnp.abs(lowrank.vdot(nothing, nothing)))
    assert root > 100 * lowrank.norm(nothing) or root == 0  # by chance, and as wrong
    assert lowrank.norm(nothing) > 0


@given(seed=seeds, rank=ranks)
def test_products_with_matrices_and_vectors_are_those_of_the_matrix(seed, rank):
    rng = np.random.default_rng(seed)
    for name in ("w", "s"):
        x = edit(seed, rank)[name]
        matrix, (*_, m, n) = dense({"w": edit(seed, rank)["w"]} | {name: x})[name], x.shape
        for shape in ((n,), (n, 3)):
            y = rng.normal(size=shape)
            size = np.linalg.norm(matrix) * np.linalg.norm(y)
            got, wanted = x @ jnp.asarray(y, FLOAT), matrix @ y
            assert got.shape == wanted.shape
            np.testing.assert_allclose(got, wanted, rtol=0, atol=64 * UNIT * size)
        for shape in ((m,), (3, m)):
            y = rng.normal(size=shape)
            size = np.linalg.norm(matrix) * np.linalg.norm(y)
            for given_as in (lambda y: jnp.asarray(y, FLOAT), lambda y: np.asarray(y, FLOAT)):
                got, wanted = given_as(y) @ x, y @ matrix
                assert got.shape == wanted.shape
                np.testing.assert_allclose(got, wanted, rtol=0, atol=64 * UNIT * size)
    narrow = jnp.ones(n, jnp.bfloat16)
    assert (x @ narrow).dtype == FLOAT


@given(seed=seeds, rank=st.sampled_from([1, 3, 9]))
def test_the_derivative_of_the_norm_is_that_of_the_matrix(seed, rank):
    x = edit(seed, rank)
    slope = slope_of_norm(x)
    matrix, size = dense(x)["w"], length(dense(x))
    wanted = matrix @ np.asarray(x["w"].right, np.float64) / size
    scale = np.linalg.norm(np.asarray(x["w"].right, np.float64), 2)
    np.testing.assert_allclose(slope["w"].left, wanted, rtol=0, atol=64 * UNIT * scale)


def test_the_derivative_of_the_norm_where_columns_depend():
    # As an adapter starts: one factor zero, so that no QR of it has a derivative.
    x = LowRank(jnp.zeros((4, 2)), jnp.ones((3, 2)))
    for point in (x, lowrank.add(x, LowRank(jnp.ones((4, 1)), jnp.ones((3, 1))))):
        slope = jax.grad(lowrank.norm)(point)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(slope))
        again = jax.grad(lambda p: jnp.sum(jax.grad(lowrank.norm)(p).left ** 2))(point)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(again))


@pytest.mark.parametrize("function", ["add", "combine", "scale", "vdot", "vdot, mixed", "norm"])
def test_the_matrix_is_never_formed(function):
    size, rank = 1024, 4
    thin, matrix = (jnp.ones((size, rank)),) * 2, jnp.ones((size, size))
    functions = {
        "add": (lowrank.add, thin, thin),
        "combine": (lambda x, y: lowrank.combine((1, -0.7), (x, y)), thin, thin),
        "scale": (lambda x: lowrank.scale(-2.0, x), thin),
        "vdot": (lowrank.vdot, thin, thin),
        "vdot, mixed": (lowrank.vdot, thin, matrix),
        "norm": (lowrank.norm, thin),
    }
    call, *arguments = functions[function]

    def program(*arguments):
        edits = [LowRank(*x) if isinstance(x, tuple) else x for x in arguments]
        return jax.tree.leaves(call(*edits))

    memory = jax.jit(program).lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < matrix.nbytes / 8


def test_edits_pass_through_transformations():
    x, y = edit(0, 2), edit(1, 3)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), x, edit(2, 2))
    total = jax.jit(lowrank.combine)([1.0, -0.5], [x, y])
    assert isinstance(total["w"], LowRank)
    lengths = jax.vmap(lowrank.norm)(stacked)
    np.testing.assert_allclose(lengths, [norm(x), norm(edit(2, 2))], rtol=64 * UNIT)
    products = jax.vmap(lambda c: lowrank.norm(lowrank.scale(c, x)))(jnp.array([1.0, -2.0]))
    np.testing.assert_allclose(products, [norm(x), 2 * norm(x)], rtol=64 * UNIT)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        spread = LowRank(jax.device_put(jnp.ones((16, 2)), jax.P("x", None)), jnp.ones((5, 2)))
        doubled = lowrank.add(spread, spread)
        assert jax.typeof(doubled.left).sharding.spec == jax.P("x", None)
        np.testing.assert_allclose(lowrank.norm(doubled), 2 * np.sqrt(16 * 5 * 4), rtol=64 * UNIT)
        np.testing.assert_allclose(lowrank.vdot(spread, doubled), 640, rtol=64 * UNIT)


def test_factors_in_half_precision_are_summed_in_single():
    x = LowRank(jnp.ones((3, 1), jnp.bfloat16), jnp.ones((2, 1), jnp.bfloat16))
    assert lowrank.add(x, x).left.dtype == jnp.float32
    assert lowrank.norm(x).dtype == lowrank.vdot(x, x).dtype == jnp.float32
    base = jnp.zeros((3, 2), jnp.bfloat16)
    assert lowrank.add(base, x).dtype == jnp.bfloat16
    assert lowrank.add(x, base).dtype == jnp.float32


def test_edits_without_entries():
    assert lowrank.norm({}) == 0
    assert lowrank.vdot({}, {}) == 0
    none = LowRank(jnp.zeros((3, 0)), jnp.zeros((2, 0)))
    assert lowrank.norm(none) == 0
    assert lowrank.add(none, none).shape == (3, 2)
    base = jnp.full((3, 2), jnp.nan, jnp.bfloat16)
    assert is_nan(lowrank.apply(base, none))
    assert_close(lowrank.apply(jnp.ones((3, 2)), none), jnp.ones((3, 2)), units=0)
    empty = LowRank(jnp.zeros((0, 3, 1)), jnp.zeros((0, 2, 1)))
    assert lowrank.norm(empty) == 0


def test_bad_arguments_are_refused(refuses):
    x, y = edit(0, 2), edit(1, 2)
    with refuses(ValueError, match="coefficients has 1 numbers for 2 points"):
        lowrank.combine([1.0], [x, y])
    with refuses(ValueError, match="edits is empty"):
        lowrank.combine([], [])
    with refuses(ValueError, match="c must be finite"):
        lowrank.scale(float("nan"), x)
    with refuses(ValueError, match=r"leaf \['w'\] has shape \(7, 5\) in x, \(5, 7\) in y"):
        lowrank.vdot(x, y | {"w": LowRank(y["w"].right, y["w"].left)})
    with refuses(ValueError, match=r"leaf \['k'\] has shape \(6, 3\) in x, \(3, 6\) in y"):
        lowrank.add(x, y | {"k": jnp.ones((3, 6))})
    with refuses(ValueError, match=r"x has a leaf \['b'\] that y lacks"):
        lowrank.vdot(x, {name: y[name] for name in LAYOUT if name != "b"})
    with refuses(ValueError, match="are not the factors of one matrix"):
        lowrank.norm(LowRank(jnp.ones((3, 2)), jnp.ones((3, 1))))
    with refuses(TypeError, match=r"leaf \['b'\] of x has dtype int32"):
        lowrank.norm(x | {"b": jnp.ones(3, jnp.int32)})
    with refuses(TypeError, match="has dtype int32"):
        x["w"] @ jnp.ones(5, jnp.int32)
    nan = lowrank.scale(1.0, LowRank(jnp.full((2, 1), jnp.nan), jnp.ones((2, 1))))
    assert is_nan(lowrank.norm(nan))
    assert is_nan(tree.norm(lowrank.materialize(nan)))
