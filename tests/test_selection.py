"""Laws of `wspace.selection`."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.strategies import FLOAT
from wspace import selection, tree
from wspace.selection import bracket, counting, top
from wspace.testing import assert_close

pytestmark = pytest.mark.exact

kth_magnitude, top_mask = jax.jit(selection.kth_magnitude), jax.jit(selection.top_mask)
keep_top = jax.jit(top.keep_top)
LAYOUT = {"w": (4, 7), "b": (5,), "k": (2, 3, 2, 2), "c": (), "e": (0, 3)}
SIZE = 28 + 5 + 24 + 1
DTYPES = [FLOAT, jnp.bfloat16, jnp.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3e-8, 2.0**-149]
seeds = st.integers(0, 2**16)
kinds = st.sampled_from(["normal", "ties", "special", "constant", "wide"])


def draw(kind, seed, shape, dtype):
    rng = np.random.default_rng(seed)
    values = {
        "normal": lambda: rng.normal(size=shape),
        "ties": lambda: rng.integers(-3, 4, size=shape),
        "special": lambda: rng.choice(SPECIAL, size=shape),
        "constant": lambda: np.full(shape, -2.5),
        "wide": lambda: rng.normal(size=shape) * 10.0 ** rng.integers(-30, 30, size=shape),
    }[kind]()
    with np.errstate(over="ignore", invalid="ignore"):
        return jnp.asarray(np.asarray(values, np.float64).astype(jnp.dtype(dtype)))


def trees(kind, seed, dtype):
    return {
        name: draw(kind, seed + i, shape, dtype) for i, (name, shape) in enumerate(LAYOUT.items())
    }


def magnitudes(x):
    """All magnitudes, leaf by leaf in the order of the tree, in float64: exact for every dtype."""
    leaves = [
        np.abs(np.asarray(leaf).astype(np.float64)).reshape(-1) for leaf in jax.tree.leaves(x)
    ]
    return np.concatenate(leaves)


def oracle(x, k):
    """The k-th largest magnitude and the mask, by a stable sort; NaN above all."""
    flat = magnitudes(x)
    keys = np.where(np.isnan(flat), 2.0, 1.0), np.where(np.isnan(flat), 0, flat)
    order = np.lexsort((np.arange(flat.size), -keys[1], -keys[0]))
    mask = np.zeros(flat.size, bool)
    mask[order[:k]] = True
    return (flat[order[k - 1]] if k else np.inf), mask


def flat(masks):
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(masks)])


@each_dtype
@given(kind=kinds, seed=seeds, k=st.integers(1, SIZE))
def test_the_selection_is_that_of_a_stable_sort(dtype, kind, seed, k):
    x = trees(kind, seed, dtype)
    value, mask = oracle(x, k)
    for function in (selection.kth_magnitude, kth_magnitude):
        got = function(x, k)
        assert got.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
        np.testing.assert_array_equal(np.asarray(got, np.float64), value)
    for function in (selection.top_mask, top_mask):
        masks = function(x, k)
        assert jax.tree.map(jnp.shape, masks) == jax.tree.map(jnp.shape, x)
        np.testing.assert_array_equal(flat(masks), mask)


@each_dtype
@given(kind=kinds, seed=seeds, k=st.sampled_from([0, 1, 7, 34, 35]))
def test_an_array_is_a_tree(dtype, kind, seed, k):
    x = draw(kind, seed, (5, 7), dtype)
    value, mask = oracle(x, k)
    np.testing.assert_array_equal(flat(top_mask(x, k)), mask)
    np.testing.assert_array_equal(flat(selection.top_mask(x, k)), mask)
    if k:
        np.testing.assert_array_equal(np.asarray(kth_magnitude(x, k), np.float64), value)
    wide = np.asarray(x).astype(np.float64)
    kept = np.where(mask.reshape(5, 7) | np.isnan(wide), wide, 0)  # NaN stays, or it would be lost
    assert keep_top(x, k).dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(keep_top(x, k)).astype(np.float64), kept)


@pytest.mark.parametrize(("few", "small"), [(0, 2**22), (0, 0)], ids=["one program", "passes"])
@given(kind=kinds, seed=seeds, k=st.sampled_from([1, 7, 35]))
def test_an_array_of_any_size_is_selected_from_alike(few, small, kind, seed, k):
    x = draw(kind, seed, (5, 7), FLOAT)
    value, mask = oracle(x, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top, "FEW", few)
        patch.setattr(top, "SMALL", small)
        np.testing.assert_array_equal(flat(selection.top_mask(x, k)), mask)
        np.testing.assert_array_equal(np.asarray(selection.kth_magnitude(x, k)), value)


@pytest.mark.parametrize("few", [2**14, 10], ids=["sorted", "counted"])
@pytest.mark.parametrize("most", [1, 4])
def test_small_leaves_that_are_joined_are_selected_from_as_by_themselves(few, most, monkeypatch):
    monkeypatch.setattr(top, "FEW", few)
    rng = np.random.default_rng(0)
    sizes = 7, 1, 4, 0, 5, 11, 2, 3
    x = [jnp.asarray(rng.integers(-most, most + 1, size=n), jnp.float32) for n in sizes]
    for k in range(sum(sizes) + 1):
        np.testing.assert_array_equal(flat(selection.top_mask(x, k)), oracle(x, k)[1])


def test_equal_entries_are_counted_across_leaves_beyond_two_to_the_sixteen():
    x = [jnp.ones(40_000, jnp.float32), -jnp.ones(40_000, jnp.float32), jnp.zeros(20_000)]
    for k in (39_999, 70_000, 90_000):
        assert float(selection.kth_magnitude(x, k)) == (k < 80_000)
        mask = flat(selection.top_mask(x, k))
        assert mask[:k].all()
        assert not mask[k:].any()


@each_dtype
def test_every_nan_comes_before_infinity_whatever_its_bits(dtype):
    bits = f"u{jnp.dtype(dtype).itemsize}"
    x = np.array([np.inf, 1, np.nan, -np.nan, -np.inf, np.nan, 0], jnp.dtype(dtype))
    x.view(bits)[[2, 5]] += np.array([3, 1], bits)
    for k in range(1, x.size + 1):
        for value, mask in (
            (selection.kth_magnitude(x, k), selection.top_mask(x, k)),
            (kth_magnitude(x, k), top_mask(x, k)),
        ):
            np.testing.assert_array_equal(np.asarray(value, np.float64), oracle(x, k)[0])
            np.testing.assert_array_equal(mask, oracle(x, k)[1])


@given(kind=st.sampled_from(["normal", "ties"]), seed=seeds)
def test_masks_are_nested_and_per_leaf_each_leaf_selects_alone(kind, seed):
    x = trees(kind, seed, FLOAT)
    masks = [flat(top_mask(x, k)) for k in range(0, SIZE + 1, 6)]
    for small, large in itertools.pairwise(masks):
        assert (small <= large).all()
    alone = tree.per_leaf(selection.top_mask)({"w": x["w"], "b": x["b"]}, 3)
    for name in ("w", "b"):
        np.testing.assert_array_equal(flat(alone[name]), oracle(x[name], 3)[1])


@pytest.mark.parametrize("size", [1, 2, 100, 3 * 2**14 + 5, 10**6])
def test_large_arrays_agree_with_numpy(size):
    rng = np.random.default_rng(size)
    smooth = rng.normal(size=size).astype(np.float32)
    clumped = np.concatenate([1e-20 * smooth[: size // 2], 1e20 * smooth[size // 2 :]])
    for x in (smooth, clumped, np.round(smooth, 1)):
        for k in {1, max(size // 5, 1), max(size // 2, 1), size}:
            wanted = np.partition(np.abs(x), size - k)[size - k]
            assert selection.kth_magnitude(x, k) == wanted
            assert kth_magnitude(x, k) == wanted
            np.testing.assert_array_equal(flat(selection.top_mask(x, k)), oracle(x, k)[1])


def test_adversarial_values_take_a_bounded_number_of_passes(monkeypatch):
    passes, counts = [], counting._counts

    def counted(*arguments):
        passes.append(1)
        return counts(*arguments)

    monkeypatch.setattr(counting, "_counts", counted)
    # Every power of two, then values that crowd just above and below the one sought.
    powers = 2.0 ** np.arange(-126, 127, dtype=np.float32)
    crowd = np.float32(1) + np.arange(1, 4000, dtype=np.float32) * np.float32(2.0**-23)
    x = np.concatenate([np.repeat(powers, 40), crowd, 1 / crowd]).astype(np.float32)
    for k in (1, 2000, 7000, 9001, x.size):
        passes.clear()
        assert selection.kth_magnitude(x, k) == np.sort(np.abs(x))[-k]
        assert len(passes) <= 17  # each pass leaves at most a quarter of the 2^31 codes


def spread(x):
    return jax.device_put(x, jax.P("a", "b") if x.ndim == 2 else jax.P(("b", "a")))


@pytest.mark.parametrize("kind", ["normal", "ties", "special"])
def test_sharded_leaves_give_the_same_bits_and_only_counts_travel(kind):
    x = {"w": draw(kind, 0, (8, 12), jnp.float32), "b": draw(kind, 1, (16,), jnp.float32)}
    alone = draw(kind, 2, (3,), jnp.float32)
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    with jax.set_mesh(jax.make_mesh((4, 2), ("a", "b"), axis_types=kinds)):
        sharded = jax.tree.map(spread, x) | {"c": alone}
        for k in (1, 17, 50, 100):
            wanted = x | {"c": alone}
            for value in (kth_magnitude(sharded, k), selection.kth_magnitude(sharded, k)):
                np.testing.assert_array_equal(value, kth_magnitude(wanted, k))
            for masks in (top_mask(sharded, k), selection.top_mask(sharded, k)):
                np.testing.assert_array_equal(flat(masks), flat(top_mask(wanted, k)))
            assert jax.typeof(masks["w"]).sharding.spec == jax.P("a", "b")
        for name in "wb":  # by itself
            np.testing.assert_array_equal(
                flat(top.keep_top(sharded[name], 5)), flat(top.keep_top(x[name], 5))
            )
        for function in (selection.kth_magnitude, top.keep_top):
            program = jax.jit(function).lower(sharded, 17).compile().as_text()
            assert "all-reduce" in program
            assert not re.search(r"all-gather|all-to-all|collective-permute", program)


@given(seed=seeds, k=st.integers(1, 2**40), size=st.sampled_from([2**33, 2**40, 2**44]))
def test_counters_are_right_beyond_two_to_the_thirty_two(seed, k, size):
    # Counts of a population that no memory holds: how many of `size` values reach a key.
    k = 1 + k % size
    rng = np.random.default_rng(seed)
    keys = np.sort(rng.integers(0, 2**31 - 1, size=20))
    shares = rng.integers(1, 1000, size=20)
    members = [int(size) * int(s) // int(shares.sum()) for s in shares]
    members[0] += size - sum(members)

    def counted(pivots):
        totals = [
            sum(m for key, m in zip(keys, members, strict=True) if key >= int(p)) for p in pivots
        ]
        parts = jnp.stack([bracket.count_of(t // 3) for t in totals])
        rest = jnp.stack([bracket.count_of(t - 2 * (t // 3)) for t in totals])
        return bracket.plus(bracket.plus(parts, rest), parts)

    start = bracket.begun(np.uint32(2**31), bracket.count_of(size), bracket.count_of(k), None, True)
    found = bracket.search(counted, start, bracket.count_of(k), True).bracket
    reaching = np.cumsum(members[::-1], dtype=object)[::-1]
    assert int(found.low) == max(key for key, n in zip(keys, reaching, strict=True) if n >= k)
    above = sum(m for key, m in zip(keys, members, strict=True) if key > int(found.low))
    high_part, low_part = map(int, found.high_count)
    assert high_part * 2**16 + low_part == above
    left = bracket.less(bracket.count_of(k), found.high_count)
    assert int(left[0]) * 2**16 + int(left[1]) == k - above


def test_derivative_of_the_magnitude_is_that_of_its_entry():
    x = jnp.array([3.0, -5.0, 4.0, 4.0, -4.0])
    np.testing.assert_array_equal(jax.grad(selection.kth_magnitude)(x, 1), [0, -1, 0, 0, 0])
    np.testing.assert_allclose(jax.grad(kth_magnitude)(x, 3), [0, 0, 1 / 3, 1 / 3, -1 / 3])
    np.testing.assert_array_equal(
        jax.grad(lambda x: jnp.sum(top.keep_top(x, 2) ** 2))(x), [0, -10, 8, 0, 0]
    )


def test_a_new_count_compiles_nothing():
    x = jnp.asarray(np.random.default_rng(0).normal(size=50), jnp.float32)
    seen = []
    function = jax.jit(lambda x, k: (seen.append(k), selection.kth_magnitude(x, k))[1])
    traces = [function(x, k) for k in (1, 7, 50)]
    assert len(seen) == 1
    values = jax.vmap(selection.kth_magnitude, in_axes=(None, 0))(x, jnp.array([1, 7, 50]))
    np.testing.assert_array_equal(values, traces)


def test_trees_without_entries():
    assert selection.top_mask({}, 0) == {}
    assert selection.top_mask({"e": jnp.zeros((0, 3))}, 0)["e"].shape == (0, 3)


def test_bad_arguments_are_refused(refuses):
    x = jnp.arange(5.0)
    for k in (0, 6, -1):
        with refuses(ValueError, match=f"k must be from 1 to the 5 entries of x, got {k}"):
            selection.kth_magnitude(x, k)
    with refuses(ValueError, match="k must be from 0 to the 5 entries of x, got -1"):
        selection.top_mask(x, -1)
    with refuses(ValueError, match="k must be from 1 to the 0 entries"):
        selection.kth_magnitude(jnp.zeros(0), 1)
    with refuses(TypeError, match="k must be an integer, got 1.5"):
        selection.kth_magnitude(x, 1.5)
    with refuses(TypeError, match="k must be an integer, got an array of dtype float"):
        kth_magnitude(x, 1.5)
    with refuses(TypeError, match="has dtype int"):
        selection.top_mask(jnp.arange(5), 1)
    assert jnp.isnan(kth_magnitude(x, 0))
    assert jnp.isnan(kth_magnitude(x, 6))
    assert_close(top_mask(x, -1), jnp.zeros(5, bool), units=0)
    assert_close(top_mask(x, 9), jnp.ones(5, bool), units=0)


def test_leaves_that_a_counter_cannot_hold_are_refused():
    huge = jax.ShapeDtypeStruct((2**16, 2**16), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"2\^32 entries or more: split it along its first axis"):
        jax.eval_shape(lambda x: selection.kth_magnitude(x, 1), huge)
    nearly = jax.ShapeDtypeStruct((2**16, 2**16 - 1), jnp.bfloat16)
    assert jax.eval_shape(lambda x: selection.kth_magnitude(x, 2**31), nearly).shape == ()


@given(counts=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=9))
@example(counts=[2**16 - 1, 1])
def test_sums_and_differences_of_counts_carry_and_borrow(counts):
    total = functools.reduce(bracket.plus, [bracket.count_of(c) for c in counts])
    assert int(total[0]) * 2**16 + int(total[1]) == sum(counts)
    rest = bracket.less(total, bracket.count_of(counts[0]))
    assert int(rest[0]) * 2**16 + int(rest[1]) == sum(counts[1:])
    assert bool(bracket.reaches(total, bracket.count_of(sum(counts))))
    assert not bool(bracket.reaches(total, bracket.count_of(sum(counts) + 1)))
