"""Laws of `wspace.lowrank.truncation` and `spectrum` beyond those of one exact cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import is_nan
from tests.strategies import FLOAT, UNIT, scales
from wspace import geometry, lowrank, negative
from wspace.lowrank import LowRank
from wspace.testing import assert_close, matrices

SHAPES = [(6, 4), (3, 7), (5, 5), (2, 4, 3)]
each_shape = pytest.mark.parametrize("shape", SHAPES)
seeds = st.integers(0, 2**16)
KEY = jax.random.key(0)


def product(x):
    return np.asarray(x.left, np.float64) @ np.asarray(x.right, np.float64).swapaxes(-1, -2)


def spectrum(x):
    return np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)


def tail_of(values, rank):
    return np.sqrt(np.sum(values[..., rank:] ** 2))


# Large enough that three blocks do not fill the matrix.
LARGE = [(60, 40), (40, 60), (2, 40, 30)]
KINDS = ["falling", "repeated", "low rank", "steep", "zero", "noise"]


def large(kind, shape, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    *stack, m, n = shape
    p = min(m, n)
    values = {
        "falling": 1 / np.arange(1, p + 1),
        "repeated": np.repeat([3.0, 1.0], [p // 2, p - p // 2]),
        "low rank": 1.0 * (np.arange(p) < 3),
        "steep": 10.0 ** -np.arange(p),
        "zero": np.zeros(p),
        "noise": np.ones(p),
    }[kind]
    left, right = (np.linalg.qr(rng.normal(size=(*stack, size, p)))[0] for size in (m, n))
    noise = rng.normal(size=shape) if kind == "noise" else 0
    return jnp.asarray(scale * ((left * values) @ right.swapaxes(-1, -2) + noise), FLOAT)


randomized = jax.jit(lambda x, key: lowrank.truncate(x, 4, method="randomized", key=key, steps=2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", LARGE)
@given(seed=seeds, scale=scales)
def test_the_randomized_tail_is_that_of_the_factors(kind, shape, seed, scale):
    x = large(kind, shape, seed, scale)
    cut = randomized(x, jax.random.key(seed))
    size, best = np.linalg.norm(np.asarray(x, np.float64)), tail_of(spectrum(x), 4)
    true = np.linalg.norm(np.asarray(x, np.float64) - product(cut.factors))
    assert abs(cut.tail - true) <= 16 * UNIT * size
    assert cut.tail >= best - 16 * UNIT * size
    assert bool(cut.approximate)
    assert cut.factors.rank == 4
    if kind in ("low rank", "steep", "zero"):
        assert cut.tail <= best + 64 * UNIT * size
    if kind == "falling":
        assert cut.tail <= 1.01 * best


def test_a_falling_spectrum_is_cut_nearly_as_well_as_can_be():
    x = large("falling", (300, 200), 0)
    best, size = tail_of(spectrum(x), 8), np.linalg.norm(x)
    for block, steps, excess in ((None, 5, 1e-7), (16, 3, 1e-5), (2, 12, 1e-3)):
        cut = lowrank.truncate(x, 8, method="randomized", key=KEY, block=block, steps=steps)
        assert cut.tail <= best + excess * size
        assert cut.tail >= best - 64 * UNIT * size


def test_factors_of_the_randomized_method_are_balanced():
    cut = randomized(large("falling", (60, 40), 0), KEY)
    sizes = [
        np.linalg.norm(np.asarray(x, np.float64)) for x in (cut.factors.left, cut.factors.right)
    ]
    assert abs(sizes[0] - sizes[1]) <= 64 * UNIT * max(sizes)
    narrow = lowrank.truncate(
        jnp.ones((60, 40), jnp.bfloat16), 2, method="randomized", key=KEY, steps=1
    )
    assert narrow.factors.left.dtype == jnp.float32


@pytest.mark.parametrize("power", [-110, 0, 110])
def test_a_tail_is_the_distance_at_every_scale(power):
    """Nothing that is left out counts as nothing because its square does."""
    x = np.random.default_rng(0).normal(size=(24, 16)).astype(np.float32)
    values = np.linalg.svd(x.astype(float), compute_uv=False)
    scale, exact = np.float32(2.0**power), np.linalg.norm(values[2:])
    given = jnp.asarray(scale * x)
    cut = lowrank.truncate(given, 2)
    np.testing.assert_allclose(np.float64(cut.tail) / 2.0**power, exact, rtol=1e-5)
    at_random = lowrank.truncate(
        given, 2, method="randomized", key=jax.random.key(0), block=2, steps=3
    )
    edit = np.asarray(lowrank.materialize(at_random.factors), float) / 2.0**power
    assert at_random.approximate
    np.testing.assert_allclose(
        np.float64(at_random.tail) / 2.0**power, np.linalg.norm(x - edit), rtol=1e-5
    )
    base = {"w": jnp.zeros((24, 16)), "b": jnp.zeros(16)}
    adapter = lowrank.extract(base, {"w": given, "b": given[0]}, 2, vectors=False)
    whole = np.hypot(exact, np.linalg.norm(x[0].astype(float)))
    np.testing.assert_allclose(np.float64(adapter.tail) / 2.0**power, whole, rtol=1e-5)
    seen = lowrank.truncate_outputs(given, jnp.eye(24), 2)
    np.testing.assert_allclose(np.float64(seen.tail) / 2.0**power, exact, rtol=1e-5)
    rank = lowrank.rank_for(jnp.asarray(scale * values.astype(np.float32)), energy=0.5)
    assert int(rank) == np.argmax(np.cumsum(values**2) >= 0.5 * np.sum(values**2)) + 1


def test_the_exact_method_is_taken_where_it_is_the_cheaper_one():
    x = large("noise", (12, 10), 0)
    edit = lowrank.truncate(x, 10).factors
    for y in (x, edit):
        cut = lowrank.truncate(y, 3, method="randomized", key=KEY)
        assert not cut.approximate
        np.testing.assert_allclose(cut.tail, tail_of(spectrum(x), 3), rtol=64 * UNIT)
    assert not lowrank.truncate(x, 3).approximate


@each_shape
@given(data=st.data(), energy=st.sampled_from([0.1, 0.5, 0.9, 0.99, 1.0]))
def test_the_rank_for_an_energy_is_the_smallest_that_keeps_it(shape, data, energy):
    x = data.draw(matrices(shape))
    rank = lowrank.truncate(x, energy=energy).factors.rank
    values = spectrum(x)
    total, slack = np.sum(values**2), 64 * UNIT * np.sum(values**2)
    assert total - tail_of(values, rank) ** 2 >= energy * total - slack
    if rank:
        assert total - tail_of(values, rank - 1) ** 2 < energy * total + slack
    assert rank == lowrank.rank_for(lowrank.singular_values(x), energy=energy)


@each_shape
@given(data=st.data(), share=st.sampled_from([0.0, 0.01, 0.5, 0.9, 2.0]))
def test_the_rank_for_a_tail_is_the_smallest_that_leaves_no_more(shape, data, share):
    x = data.draw(matrices(shape))
    values = spectrum(x)
    bound, slack = share * np.linalg.norm(x), 64 * UNIT * np.linalg.norm(x)
    cut = lowrank.truncate(x, tail=bound)
    assert cut.tail <= np.asarray(bound, cut.tail.dtype)
    if cut.factors.rank:
        assert tail_of(values, cut.factors.rank - 1) >= bound - slack
    if share > 1:
        assert cut.factors.rank == 0


def test_rank_for_by_hand():
    values = jnp.array([3.0, 2.0, 1.0])  # 14 = 9 + 4 + 1
    for share, rank in ((9 / 14 - 1e-3, 1), (9 / 14 + 1e-3, 2), (13 / 14 + 1e-3, 3), (1.0, 3)):
        assert lowrank.rank_for(values, energy=share) == rank
    for tail, rank in ((4.0, 0), (3.0, 1), (2.0, 2), (1.0, 2), (0.5, 3), (0.0, 3)):
        assert lowrank.rank_for(values, tail=tail) == rank
    assert lowrank.rank_for(jnp.array([1.0, 0.0]), energy=1.0) == 1
    assert lowrank.rank_for(jnp.array([[1.0, 0.0], [2.0, 1.0]]), tail=0.5) == 2
    assert jax.jit(lambda v, e: lowrank.rank_for(v, energy=e))(values, 1.5) == -1
    assert jax.jit(lambda v: lowrank.rank_for(v, tail=1.0))(values * jnp.nan) == -1


@each_shape
@given(data=st.data(), scale=scales)
def test_stable_and_effective_rank_are_those_of_the_spectrum(shape, data, scale):
    x = scale * data.draw(matrices(shape))
    values = spectrum(x)
    stable = np.sum(values**2, -1) / values[..., 0] ** 2
    shares = values / np.sum(values, -1, keepdims=True)
    entropy = -np.sum(shares * np.log(np.where(shares > 0, shares, 1)), -1)
    rank = min(shape[-2:])
    got = lowrank.stable_rank(x), lowrank.effective_rank(x)
    np.testing.assert_allclose(got[0], stable, rtol=64 * UNIT)
    np.testing.assert_allclose(got[1], np.exp(entropy), rtol=1e3 * UNIT * rank)
    for one in got:
        assert (np.asarray(one) >= 1 - 64 * UNIT).all()
        assert (np.asarray(one) <= rank * (1 + 64 * UNIT)).all()


def test_stable_and_effective_rank_at_their_ends():
    flat, thin = jnp.eye(4), jnp.ones((4, 3))
    for function in (lowrank.stable_rank, lowrank.effective_rank):
        np.testing.assert_allclose(function(flat), 4, rtol=64 * UNIT)
        np.testing.assert_allclose(function(thin), 1, rtol=1e4 * UNIT)
        np.testing.assert_allclose(function(LowRank(thin, thin)), 1, rtol=1e4 * UNIT)
        assert function(jnp.zeros((3, 2))) == 0
        assert function(jnp.zeros((0, 2))) == 0
        assert function(jnp.ones(5)) == 1
        assert function(jnp.ones((2, 3, 3))).shape == (2,)
        assert jnp.isfinite(jax.grad(function)(jnp.zeros((3, 2)))).all()


LAYOUT = {"w": (6, 5), "k": (2, 1, 3, 4), "s": (2, 4, 3), "b": (3,), "c": (), "e": (0,)}


def ends(seed):
    rng = np.random.default_rng(seed)
    return [
        {name: jnp.asarray(rng.normal(size=shape), FLOAT) for name, shape in LAYOUT.items()}
        for _ in range(2)
    ]


@given(seed=seeds, rank=st.sampled_from([0, 1, 3, 9]), vectors=st.booleans())
def test_what_is_extracted_leads_from_base_to_within_the_tail_of_tuned(seed, rank, vectors):
    base, tuned = ends(seed)
    cut = lowrank.extract(base, tuned, rank, vectors=vectors)
    gap = {name: np.asarray(tuned[name] - base[name], np.float64) for name in LAYOUT}
    gap["k"] = gap["k"].reshape(6, 4)
    squares = [tail_of(spectrum(gap[name]), rank) ** 2 for name in ("w", "k", "s")]
    if not (rank and vectors):
        squares += [np.sum(gap[name] ** 2) for name in ("b", "c")]
    size = np.sqrt(sum(np.sum(x**2) for x in gap.values()))
    assert abs(cut.tail - np.sqrt(sum(squares))) <= 64 * UNIT * size
    left = geometry.distance(lowrank.apply(base, cut.factors), tuned)
    assert abs(left - cut.tail) <= 256 * UNIT * size
    assert [isinstance(cut.factors[name], LowRank) for name in LAYOUT] == [True] * 3 + [False] * 3


def least_rank(values, energy=None, tail=None):
    """The first rank whose tail is small enough, by NumPy."""
    whole = tail_of(values, 0)
    left = tail if energy is None else np.sqrt(1 - energy) * whole
    ranks = range(values.shape[-1] + 1)
    return next(r for r in ranks if tail_of(values, r) <= left * (1 + 1e-9))


MATRICES, VECTORS = ("w", "k", "s"), ("b", "c", "e")


def spectra(x):
    """Singular values by leaf, as those of matrices with one column where it is a vector."""
    flat = {name: np.asarray(x[name], np.float64) for name in LAYOUT}
    flat |= {"k": flat["k"].reshape(6, 4)} | {n: flat[n].reshape(-1, 1) for n in VECTORS}
    return {name: spectrum(leaf) for name, leaf in flat.items()}


@pytest.mark.parametrize(
    "how", [{"energy": 0.6}, {"energy": 0.9}, {"energy": 1.0}, {"tail": 1.5}, {"tail": 0.3}]
)
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_every_leaf_of_a_tree_is_cut_to_its_own_least_rank_and_the_tails_combine(how, scale):
    base, tuned = ends(7)
    base = jax.tree.map(lambda x: 0 * x, base)
    tuned = jax.tree.map(lambda x: scale * x, tuned)
    given = {name: scale * value if name == "tail" else value for name, value in how.items()}
    values = {name: x / scale for name, x in spectra(tuned).items()}
    ranks = {name: least_rank(x, **how) for name, x in values.items()}
    tails = {name: tail_of(x, ranks[name]) for name, x in values.items()}
    cuts = [
        lowrank.extract(base, tuned, **given),
        negative.offset(base, tuned, **given),
        lowrank.truncate(tuned, **given),
    ]
    combined = np.sqrt(sum(x**2 for x in tails.values()))
    size = np.sqrt(sum(np.sum(x**2) for x in values.values()))
    for cut in cuts:
        assert {name: cut.factors[name].rank for name in MATRICES} == {
            name: ranks[name] for name in MATRICES
        }
        for name in VECTORS:
            wanted = tuned[name] if ranks[name] else 0 * tuned[name]
            np.testing.assert_array_equal(cut.factors[name], wanted)
        np.testing.assert_allclose(float(cut.tail) / scale, combined, rtol=0, atol=64 * UNIT * size)
        if "energy" in how:
            assert float(cut.tail) / scale <= np.sqrt(1 - how["energy"]) * size + 64 * UNIT * size
        else:
            assert float(cut.tail) / scale <= how["tail"] * np.sqrt(len(LAYOUT)) + 64 * UNIT * size
    left = lowrank.truncate(tuned, vectors=False, **given)
    rest = np.sqrt(sum(np.sum(values[name] ** 2) for name in VECTORS))
    kept = np.sqrt(sum(tails[name] ** 2 for name in MATRICES))
    assert not any(np.any(left.factors[name]) for name in VECTORS)
    np.testing.assert_allclose(float(left.tail) / scale, np.hypot(rest, kept), rtol=64 * UNIT)


@pytest.mark.parametrize("how", [{"rank": 0}, {"rank": 2}, {"energy": 0.8}, {"tail": 1.0}])
def test_a_tree_of_factors_is_cut_as_the_tree_of_their_products(how):
    _, x = ends(3)
    whole = lowrank.truncate(x, 9).factors
    dense, factored = lowrank.truncate(x, **how), lowrank.truncate(whole, **how)
    size = np.linalg.norm(np.concatenate([np.ravel(leaf) for leaf in x.values()]))
    np.testing.assert_allclose(factored.tail, dense.tail, rtol=0, atol=256 * UNIT * size)
    for name in MATRICES:
        assert factored.factors[name].rank == dense.factors[name].rank
        np.testing.assert_allclose(
            product(factored.factors[name]), product(dense.factors[name]), atol=1e4 * UNIT * size
        )
    for name in VECTORS:
        assert_close(factored.factors[name], dense.factors[name], units=0)


def test_a_tree_is_cut_to_a_rank_leaf_by_leaf_and_under_jit():
    _, x = ends(5)
    cut = lowrank.truncate(x, 2)
    assert_close(jax.jit(lambda y: lowrank.truncate(y, 2).tail)(x), cut.tail, units=32)
    alone = [lowrank.truncate(x[name], 2) for name in MATRICES]
    for name, one in zip(MATRICES, alone, strict=True):
        assert_close(cut.factors[name], one.factors, units=0)
    combined = np.sqrt(sum(np.float64(one.tail) ** 2 for one in alone))
    np.testing.assert_allclose(cut.tail, combined, rtol=64 * UNIT)
    nothing = lowrank.truncate({"a": None, "b": []}, energy=0.5)
    assert (nothing.factors, float(nothing.tail)) == ({"a": None, "b": []}, 0.0)
    column = lowrank.truncate(x["b"], energy=0.5, vectors=False)
    assert column.factors.rank == 0
    np.testing.assert_allclose(column.tail, np.linalg.norm(x["b"]), rtol=64 * UNIT)
    numpy = jax.tree.map(np.asarray, x)
    assert_close(lowrank.truncate(numpy, energy=0.8), lowrank.truncate(x, energy=0.8), units=0)


def test_ways_to_cut_a_tree_that_mean_nothing_are_refused(refuses):
    base, tuned = ends(0)
    cuts = [
        lambda **how: lowrank.truncate(tuned, **how),
        lambda **how: lowrank.extract(base, tuned, **how),
        lambda **how: negative.offset(base, tuned, **how),
        lambda **how: lowrank.extract({}, {}, **how),
    ]
    for cut in cuts:
        for how in ({}, {"rank": 1, "energy": 0.9}, {"energy": 0.9, "tail": 1.0}):
            with refuses(ValueError, match="give exactly one of rank, energy and tail"):
                cut(**how)
        for how in ({"energy": 0.0}, {"energy": 1.5}, {"energy": float("nan")}):
            with refuses(ValueError, match=r"energy must be in \(0, 1\]"):
                cut(**how)
        for how in ({"tail": -1.0}, {"tail": float("nan")}, {"tail": float("inf")}):
            with refuses(ValueError, match="tail must be finite and at least 0"):
                cut(**how)
        with refuses(TypeError, match="by values that are traced: give a rank"):
            jax.jit(lambda e, cut=cut: cut(energy=e).tail)(0.5)
    for cut in cuts[:3]:
        with refuses(TypeError, match="by values that are traced: give a rank"):
            jax.jit(lambda _, cut=cut: cut(energy=0.5).tail)(0.5)
    with refuses(TypeError, match="by values that are traced: give a rank"):
        jax.jit(lambda b: lowrank.truncate({"b": b}, tail=0.5).tail)(tuned["b"])
    with refuses(ValueError, match="need all singular values"):
        lowrank.extract(base, tuned, energy=0.5, method="randomized", key=KEY)
    with refuses(ValueError, match=r"leaf \['b'\] of x holds NaN"):
        lowrank.truncate(tuned | {"b": jnp.full(3, jnp.nan)}, 1)
    with refuses(TypeError, match=r"leaf \['b'\] of x has dtype int32; weights are"):
        lowrank.truncate(tuned | {"b": jnp.ones(3, jnp.int32)}, energy=0.5)
    with refuses(ValueError, match="leaf of shape") as caught:
        lowrank.truncate({"w": jnp.ones((1,) * 6)}, 1)
    if not isinstance(caught.value, TypeError):
        assert caught.value.__notes__ == ["at leaf ['w']"]
    far = jax.tree.map(lambda x: jnp.full_like(x, jnp.finfo(FLOAT).max), tuned)
    with refuses(ValueError, match=r"of tuned - base holds NaN or an infinity"):
        lowrank.extract(jax.tree.map(jnp.negative, far), far, 1)


def test_what_is_extracted_at_random_depends_on_the_path_of_a_leaf_alone():
    rng = np.random.default_rng(0)
    few = {"w": jnp.asarray(rng.normal(size=(60, 50)), FLOAT)}
    more = few | {"a": jnp.asarray(rng.normal(size=(60, 50)), FLOAT)}
    cuts = [
        lowrank.extract(jax.tree.map(jnp.zeros_like, x), x, 4, method="randomized", key=KEY)
        for x in (few, more)
    ]
    assert_close(cuts[0].factors["w"].left, cuts[1].factors["w"].left, units=0)
    assert bool(cuts[1].approximate)
    assert cuts[1].tail > cuts[0].tail
    twice = {"a": few["w"], "w": few["w"]}
    base = jax.tree.map(jnp.zeros_like, twice)
    alike = lowrank.extract(base, twice, 4, method="randomized", key=KEY).factors
    assert (alike["a"].left != alike["w"].left).any()


@given(seed=seeds, rank=st.sampled_from([0, 1, 2, 7]), rows=st.sampled_from([1, 3, 9]))
def test_outputs_on_given_inputs_are_cut_as_well_as_can_be(seed, rank, rows):
    rng = np.random.default_rng(seed)
    x, inputs = rng.normal(size=(6, 4)), rng.normal(size=(rows, 6))
    cut = lowrank.truncate_outputs(jnp.asarray(x, FLOAT), jnp.asarray(inputs, FLOAT), rank)
    seen = inputs @ x
    size = np.linalg.norm(inputs, 2) * np.linalg.norm(x)
    best = tail_of(np.linalg.svd(seen, compute_uv=False), rank)
    assert abs(cut.tail - best) <= 64 * UNIT * size
    left = np.linalg.norm(seen - inputs @ product(cut.factors))
    assert abs(left - best) <= 256 * UNIT * size
    assert cut.factors.rank == min(rank, rows, 4)
    plain = tail_of(np.linalg.svd(x, compute_uv=False), rank)
    assert cut.tail <= np.linalg.norm(inputs, 2) * plain + 64 * UNIT * size
    other = lowrank.truncate(jnp.asarray(x, FLOAT), rank).factors
    assert cut.tail <= np.linalg.norm(inputs @ (x - product(other))) + 64 * UNIT * size


@given(seed=seeds, rank=st.sampled_from([0, 1, 3]))
def test_on_all_inputs_alike_outputs_are_cut_as_the_matrix_is(seed, rank):
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(2, 5, 4)), FLOAT)
    for given_as in (x, lowrank.truncate(x, 4).factors):
        cut = lowrank.truncate_outputs(given_as, jnp.eye(5, dtype=FLOAT), rank)
        wanted = lowrank.truncate(x, rank)
        size = np.linalg.norm(x)
        np.testing.assert_allclose(cut.tail, wanted.tail, rtol=0, atol=64 * UNIT * size)
        np.testing.assert_allclose(
            product(cut.factors), product(wanted.factors), rtol=0, atol=1e4 * UNIT * size
        )


def test_bad_arguments_are_refused(refuses):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(40, 30)), jnp.float32)
    for arguments, words in (
        ({"rank": 1, "method": "gram"}, "method must be one of 'exact', 'randomized', got 'gram'"),
        ({"rank": 1, "method": "randomized"}, "needs a random key"),
        ({"energy": 0.5, "method": "randomized", "key": KEY}, "need all singular values"),
        ({"rank": 1, "energy": 0.5}, "exactly one of rank, energy and tail"),
        ({}, "exactly one of rank, energy and tail"),
        ({"energy": 0.0}, r"energy must be in \(0, 1\]"),
        ({"energy": 1.1}, r"energy must be in \(0, 1\]"),
        ({"tail": -1.0}, "tail must be finite and at least 0"),
        (
            {"rank": 8, "method": "randomized", "key": KEY, "block": 2, "steps": 2},
            "3 blocks of 2 rows do not hold rank 8",
        ),
        ({"rank": 1, "method": "randomized", "key": KEY, "steps": -1}, "steps must be at least 0"),
    ):
        with refuses(ValueError, match=words):
            lowrank.truncate(x, **arguments)
    with refuses(TypeError, match="block must be a plain integer"):
        lowrank.truncate(x, 1, method="randomized", key=KEY, block=1.5)
    with refuses(TypeError, match="chosen outside by rank_for"):
        jax.jit(lambda y: lowrank.truncate(y, energy=0.5))(x)
    with refuses(ValueError, match="exactly one of energy and tail"):
        lowrank.rank_for(jnp.ones(2))
    with refuses(ValueError, match="of singular_values holds NaN"):
        lowrank.rank_for(jnp.array([jnp.nan]), tail=1.0)
    with refuses(ValueError, match=r"leaf \(root\) of x holds NaN"):
        lowrank.truncate(x * jnp.nan, 1, method="randomized", key=KEY)
    assert is_nan(randomized(jnp.full((60, 40), jnp.nan, FLOAT), KEY).tail)
    base = {"w": x}
    with refuses(ValueError, match=r"leaf \['w'\] of tuned holds NaN"):
        lowrank.extract(base, {"w": x * jnp.nan}, 1)
    with refuses(ValueError, match="needs a random key"):
        lowrank.extract(base, base, 1, method="randomized")
    with refuses(ValueError, match=r"leaf \['w'\] has shape \(40, 30\) in base, \(2,\) in tuned"):
        lowrank.extract(base, {"w": jnp.ones(2)}, 1)
    with refuses(ValueError, match=r"inputs \(3, 30\) do not fit a matrix \(40, 30\)"):
        lowrank.truncate_outputs(x, jnp.ones((3, 30)), 1)
    with refuses(ValueError, match="of inputs holds NaN"):
        lowrank.truncate_outputs(x, jnp.full((3, 40), jnp.nan), 1)


def test_which_nearest_matrices_are_the_only_ones():
    def distances(x, y):
        gap = np.linalg.svd(np.asarray(x, np.float64) - y, compute_uv=False)
        return np.sqrt(np.sum(gap**2)), gap[0]

    x = jnp.diag(jnp.asarray([3.0, 1.0, 0.0], FLOAT))
    cut = lowrank.truncate(x, 1)
    frobenius, spectral = distances(x, product(cut.factors))
    other = distances(x, np.diag([2.5, 0.0, 0.0]))
    assert other[1] == pytest.approx(spectral)  # as near in the spectral norm, and only in that
    assert other[0] > frobenius == pytest.approx(1.0)
    whole = lowrank.truncate(x, 2)  # of rank 2: nothing else is at the distance 0
    assert_close(lowrank.materialize(whole.factors), x, units=8)
    assert whole.tail == 0
