"""Laws of the seam between formulas and leaves: `tree.elementwise` and `tree.reduction`."""

import fractions
import functools
from decimal import Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.strategies import FLOAT
from wspace import _checks, average, interpolate, merge, negative, tree
from wspace.testing.comparison import eps

EXACT = np.longdouble
SHAPES = ((), (1,), (0, 3), (5,), (3, 4), (2, 3, 4), (2, 1, 3, 2))
SPECS = {
    "rows": ((8, 3), jax.P(("x", "y"))),
    "columns": ((3, 8), jax.P(None, ("y", "x"))),
    "grid": ((4, 6), jax.P("x", "y")),
    "far": ((2, 4, 2), jax.P(None, "x", "y")),
    "whole": ((5,), jax.P()),
}


def drawn(shapes, seed=0, dtype=np.float32):
    random = np.random.default_rng(seed)
    return {f"{i}": np.asarray(random.normal(size=s) + 1, dtype) for i, s in enumerate(shapes)}


def spread(x):
    """A tree of the shapes of `SPECS` over the eight devices, in explicit mode."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    places = zip(x.values(), SPECS.values(), strict=True)
    placed = (jax.device_put(leaf, jax.NamedSharding(mesh, spec)) for leaf, (_, spec) in places)
    return dict(zip(SPECS, placed, strict=True))


def names(function, *arguments):
    """The names of the programs that a function calls."""
    equations = jax.make_jaxpr(function)(*arguments).eqns
    return [equation.params["name"] for equation in equations if "name" in equation.params]


def test_several_results_are_rounded_each_to_its_tree_and_masks_stay_boolean(programs):
    calls = []

    @tree.elementwise
    def mixed(scalars, arrays):
        x, y, mask = arrays
        calls.append((x.dtype, y.dtype, mask.dtype))
        return (scalars[0] * x, scalars[0] * y, mask & (x > y))

    x, y, mask = (np.array(a) for a in ([1.0, -2, 5], [7.0, -3, 4], [True, True, False]))
    halves = {"w": jnp.asarray(x, jnp.bfloat16), "b": jnp.asarray(x, jnp.float32)}
    others = {"w": jnp.asarray(y, jnp.float32), "b": jnp.asarray(y, jnp.float16)}
    masks = {"w": jnp.asarray(mask), "b": jnp.asarray(mask)}
    before = programs()
    found = mixed((0.3,), (halves, others, masks))
    assert programs() == before + 1
    assert calls == [(jnp.float32, jnp.float32, bool)] * 2
    first, second = (np.float32(0.3) * np.float32(a) for a in (x, y))
    for key in "wb":
        dtypes = [jnp.bfloat16, jnp.float32] if key == "w" else [jnp.float32, jnp.float16]
        for tree_, wanted, dtype in zip(found, (first, second), dtypes, strict=False):
            assert tree_[key].dtype == dtype
            np.testing.assert_array_equal(tree_[key], wanted.astype(dtype))
        assert found[2][key].dtype == bool
        np.testing.assert_array_equal(found[2][key], [False, True, False])


def test_several_results_that_are_not_rounded_stay_wide():
    both = tree.elementwise(lambda _, arrays: [arrays[0] / 3, arrays[1] > 1], rounded=False)
    x = jnp.array([1, 2], jnp.bfloat16)
    third, mask = both((), (x, x))
    assert (third.dtype, mask.dtype) == (jnp.float32, bool)
    np.testing.assert_array_equal(third, np.float32([1, 2]) / np.float32(3))


def test_more_results_than_trees_are_refused(refuses):
    several = tree.elementwise(lambda _, arrays: [arrays[0], arrays[0] > 0])
    for x in ({"w": jnp.ones(2)}, {}):
        with refuses(ValueError, match="the formula returns 2 arrays for 1 trees"):
            several((), (x,))


def test_keys_and_unsigned_scalars_are_untouched_and_numbers_are_in_the_dtype_of_arithmetic():
    seen = []

    @tree.elementwise
    def noted(scalars, arrays):
        seen.extend(c.dtype for c in scalars)
        least = (scalars[1] - jnp.uint32(2**31)).astype(arrays[0].dtype)
        return arrays[0] + least + jax.random.uniform(scalars[3], arrays[0].shape, jnp.float32)

    key = jax.random.key(3)
    scalars = (0.5, np.uint32(2**31 + 1), np.uint8(255), key, 3, jnp.float16(2), np.int8(1))
    found = noted(scalars, ({"w": jnp.zeros(4, jnp.bfloat16)},))["w"]
    wide = jnp.float32
    assert seen == [wide, jnp.uint32, jnp.uint8, key.dtype, wide, wide, wide]
    np.testing.assert_array_equal(
        found, (1 + jax.random.uniform(key, (4,), jnp.float32)).astype(jnp.bfloat16)
    )


@tree.elementwise
def by_half(scalars, arrays):
    return scalars[0] * arrays[0] / 2


def test_every_spelling_of_a_number_is_one_program(programs):
    x = {"w": jnp.ones((3, 5)), "b": jnp.ones(3)}
    numbers = [0.5, 1, -2.5, np.float64(0.3), np.float32(0.3), np.int8(2), jnp.asarray(0.3, FLOAT)]
    by_half((0.25,), (x,))
    before = programs()
    for number in numbers:
        found = by_half((number,), (x,))
        np.testing.assert_allclose(found["b"], float(number) / 2, rtol=1e-6)
    assert programs() == before
    y, single = {"w": jnp.zeros((3, 5)), "b": jnp.zeros(3)}, jnp.float32(0.3)
    pairs = np.array([1.0, -1.0]), jnp.array([1.0, -1.0])
    interpolate.lerp(x, y, 0.5), negative.repel(x, y, 0.5), tree.combine((1.0, -1.0), (x, y))
    before = programs()
    for number in (*numbers, single):
        interpolate.lerp(x, y, number)
        negative.repel(x, y, number)
        tree.combine((number, 1), (x, y))
        tree.combine([1, number], [x, y])
    for pair in pairs:
        tree.combine(pair, (x, y))
    assert programs() == before


@pytest.mark.parametrize("number", [10**12, fractions.Fraction(1, 3), Decimal("0.1"), True])
def test_real_numbers_of_any_kind_are_taken(number):
    known = _checks.scalar("t", number)
    assert type(known) is float
    assert known == float(number)


@pytest.mark.parametrize("number", ["0.5", b"1", 10**400, 1j, None])
def test_what_is_no_real_number_is_refused_by_name(number, refuses):
    with pytest.raises(TypeError, match=r"^t must be a real number, got"):
        _checks.scalar("t", number)
    with refuses(TypeError, match=r"coefficients\[0\] must be a real number, got"):
        tree.combine((number,), ({"w": jnp.ones(2)},))


@functools.partial(tree.elementwise, placed=True, rounded=False)
def numbered(_, arrays, index):
    assert index.dtype == jnp.uint32
    return [index.astype(jnp.float32), index % 3 == 0][: len(arrays)]


def test_placed_formulas_are_given_the_flat_index_of_every_entry():
    x = drawn(SHAPES)
    for places, thirds in (numbered((), (x, x)), jax.jit(lambda x: numbered((), (x, x)))(x)):
        for key, leaf in x.items():
            wanted = np.arange(leaf.size).reshape(leaf.shape)
            np.testing.assert_array_equal(places[key], wanted)
            np.testing.assert_array_equal(thirds[key], wanted % 3 == 0)


@pytest.mark.parametrize("compiled", [False, True])
def test_indices_of_sharded_leaves_are_those_of_whole_ones(compiled):
    x = spread(drawn([shape for shape, _ in SPECS.values()]))

    def function(x):
        return numbered((), (x, x))

    with jax.set_mesh(x["rows"].sharding.mesh):
        places, thirds = (jax.jit(function) if compiled else function)(x)
    for key, leaf in x.items():
        wanted = np.arange(leaf.size).reshape(leaf.shape)
        np.testing.assert_array_equal(places[key], wanted)
        np.testing.assert_array_equal(thirds[key], wanted % 3 == 0)
        assert places[key].sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


@pytest.mark.parametrize("compiled", [False, True])
def test_one_scalar_a_leaf_follows_the_other_scalars(compiled):
    @tree.elementwise
    def line(scalars, arrays):
        scale, slope, offset = scalars
        return scale * (slope * arrays[0] + offset)

    x = drawn(((3,), (4,), (2, 2), ()))
    slopes = {key: float(i) for i, key in enumerate(x)}
    offsets = {key: np.float32(10 * i) for i, key in enumerate(x)}

    def function(x, slopes, offsets):
        return line((2.0,), (x,), [slopes, offsets])

    found = (jax.jit(function) if compiled else function)(x, slopes, offsets)
    for key, leaf in x.items():
        wanted = 2 * (slopes[key] * EXACT(leaf) + offsets[key])
        np.testing.assert_allclose(found[key], np.float32(wanted), rtol=4e-7)


def test_trees_without_leaves_or_entries_come_back():
    one = tree.elementwise(lambda _, arrays: 2 * arrays[0])
    two = tree.elementwise(lambda _, arrays: [arrays[0] > 0, arrays[1]])
    for x in ({}, [], None, {"a": None}):
        assert one((), (x,)) == x
        assert two((), (x, x)) == [x, x]
    empty = {"e": jnp.zeros((0, 2), jnp.bfloat16)}
    mask, same = two((), (empty, empty))
    assert (mask["e"].dtype, same["e"].dtype) == (bool, jnp.bfloat16)
    assert mask["e"].shape == same["e"].shape == one((), (empty,))["e"].shape == (0, 2)


def test_programs_have_the_names_of_their_formulas():
    def shrink(_, arrays):
        return arrays[0] / 2

    x = {"w": jnp.ones(2)}
    for lift in (tree.elementwise, tree.reduction):
        assert "shrink" in names(lambda x, lift=lift: lift(shrink)((), (x,)), x)
        unnamed = lift(lambda _, arrays: arrays[0])
        assert "formula" in names(lambda x, unnamed=unnamed: unnamed((), (x,)), x)
    assert "@shrink(" in jax.jit(lambda x: tree.elementwise(shrink)((), (x,))).lower(x).as_text()


def test_numpy_leaves_in_float64_warn_nowhere():
    x, y = (drawn(((3, 4), (5,)), seed, np.float64) for seed in (0, 1))
    mean = average.running_mean()
    state = mean.update(mean.update(mean.init(x), x), y)
    half = {key: (x[key] + y[key]) / 2 for key in x}
    for found in (average.mean([x, y]), interpolate.lerp(x, y, 0.5), mean.value(state)):
        assert all(leaf.dtype == FLOAT for leaf in found.values())
        for key, wanted in half.items():
            np.testing.assert_allclose(found[key], wanted, rtol=1e-6)
    for ends, wanted in ((0, x), (1, y)):
        for key, leaf in interpolate.slerp(x, y, ends).items():
            np.testing.assert_allclose(leaf, wanted[key], rtol=1e-6)
    tuned = merge.ties(x, [y], density=1.0)
    for key, leaf in tuned.items():
        np.testing.assert_allclose(leaf, y[key], rtol=1e-6, atol=1e-6)
    length = np.sqrt(sum((leaf**2).sum() for leaf in x.values()))
    np.testing.assert_allclose(tree.norm(x), length, rtol=1e-6)


@tree.reduction
def moments(scalars, arrays):
    x, y = arrays
    return [scalars[0] * x, x * y, y**2]


@tree.reduction
def product(scalars, arrays):
    x, y = arrays
    return scalars[0] * x * y


def exact_moments(c, x, y):
    """The sums, and the sums of the sizes of their terms."""
    pairs = [(EXACT(a), EXACT(b)) for a, b in zip(x.values(), y.values(), strict=True)]
    terms = [[c * a for a, _ in pairs], [a * b for a, b in pairs], [b * b for _, b in pairs]]
    return [sum(map(np.sum, row)) for row in terms], [sum(np.abs(t).sum() for t in row)
                                                      for row in terms]  # fmt: skip


@pytest.mark.parametrize(
    "shapes",
    [SHAPES, ((2**18,), (300, 777)), ((100_003,),), ((3, 65), (128, 64)), ((2,),) * 3001],
    ids=["few", "large", "prime", "rows", "many"],
)
def test_sums_are_those_of_long_doubles_for_one_and_for_several_terms(shapes):
    x, y = drawn(shapes), drawn(shapes, 1)
    wanted, sizes = exact_moments(0.75, x, y)
    found = moments((0.75,), (x, y))
    assert (found.shape, found.dtype) == ((3,), jnp.float32)
    for got, exact, size in zip(np.asarray(found), wanted, sizes, strict=True):
        assert abs(EXACT(got) - exact) <= 8 * eps(found) * size
    got = product((2.0,), (x, y))
    assert got.shape == ()
    assert abs(EXACT(np.asarray(got)) - 2 * wanted[1]) <= 8 * eps(got) * 2 * sizes[1]


def test_half_precision_is_added_up_in_single():
    x = {"w": jnp.full(2**15, 0.01, jnp.bfloat16)}
    exact = EXACT(np.asarray(x["w"][0])) * 2**15
    assert abs(EXACT(np.asarray(product((1.0,), (x, {"w": jnp.ones(2**15)})))) / exact - 1) < 1e-6


@pytest.mark.parametrize("kind", ["max", "min"])
def test_the_largest_and_the_least_term(kind):
    best = tree.reduction(lambda _, arrays: arrays[0], kind=kind)
    both = tree.reduction(lambda _, arrays: [arrays[0], -arrays[0]], kind=kind)
    for sign in (1, -1):  # all of one sign, so that zeros would show
        x = {"e": np.zeros((0, 2), np.float32)} | drawn(((4, 5), (7,), ()))
        x = jax.tree.map(lambda a, s=sign: np.asarray(s * (np.abs(a) + 1)), x)
        flat = np.concatenate([leaf.reshape(-1) for leaf in x.values()])
        oracle = getattr(np, kind)
        assert best((), (x,)) == oracle(flat)
        np.testing.assert_array_equal(both((), (x,)), [oracle(flat), oracle(-flat)])
    nothing = -np.inf if kind == "max" else np.inf
    for empty in ({}, {"e": jnp.zeros((0, 2))}):
        assert best((), (empty,)) == nothing
    for key in ("0", "1", "2"):
        bad = x | {key: np.where(np.arange(x[key].size).reshape(x[key].shape) == 0, np.nan, x[key])}
        assert jnp.isnan(best((), (bad,)))


def test_counts_are_exact_where_single_precision_is_not():
    size = 2**24 + 3
    count = tree.reduction(lambda _, arrays: arrays[0] == 0)
    both = tree.reduction(lambda _, arrays: [arrays[0] == 0, arrays[0] != 0])
    x = [jnp.zeros(size, jnp.bfloat16), jnp.ones(2, jnp.float32), jnp.zeros((0, 3), jnp.float32)]
    found = count((), (x,), by_leaf=True)
    assert [int(n) for n in found] == [size, 0, 0]
    assert all(jnp.issubdtype(n.dtype, jnp.integer) for n in found)
    assert [n.tolist() for n in both((), (x,), by_leaf=True)] == [[size, 0], [0, 2], [0, 0]]
    assert count((), (x,)).dtype == jnp.float32


def test_numbers_by_leaf_are_those_of_each_leaf():
    x, y = drawn(SHAPES), drawn(SHAPES, 1)
    found = moments((0.5,), (x, y), by_leaf=True)
    for got, key in zip(found, x, strict=True):
        wanted, sizes = exact_moments(0.5, {key: x[key]}, {key: y[key]})
        np.testing.assert_allclose(got, np.float64(wanted), rtol=0, atol=1e-6 * (max(sizes) + 1))


@pytest.mark.parametrize("compiled", [False, True])
def test_sums_of_sharded_leaves_are_those_of_whole_ones_to_rounding(compiled):
    x, y = (dict(zip(SPECS, drawn([s for s, _ in SPECS.values()], k).values(), strict=True))
            for k in (0, 1))  # fmt: skip
    wanted, sizes = exact_moments(0.75, x, y)
    x, y = spread(x), spread(y)

    def function(x, y):
        return moments((0.75,), (x, y))

    with jax.set_mesh(x["rows"].sharding.mesh):
        found = (jax.jit(function) if compiled else function)(x, y)
    for got, exact, size in zip(np.asarray(found), wanted, sizes, strict=True):
        assert abs(EXACT(got) - exact) <= 8 * eps(found) * size


def test_sums_have_derivatives_of_first_and_second_order():
    waves = tree.reduction(lambda c, arrays: [jnp.sin(c[0] * arrays[0]) * arrays[1], arrays[0]])
    wave = tree.reduction(lambda c, arrays: jnp.sin(c[0] * arrays[0]) * arrays[1])
    x, y = drawn(((3, 4), (), (5,))), drawn(((3, 4), (), (5,)), 1)
    c = 0.5

    def several(c, x):
        first, second = waves((c,), (x, y))
        return first + 3 * second

    for function, more in ((lambda c, x: wave((c,), (x, y)), 0), (several, 3)):
        slopes = jax.grad(function, 1)(c, x)
        for key, leaf in x.items():
            wanted = c * np.cos(c * leaf) * y[key] + more
            np.testing.assert_allclose(slopes[key], wanted, rtol=1e-5, atol=1e-6)
        second = -sum((leaf**2 * np.sin(c * leaf) * y[key]).sum() for key, leaf in x.items())
        for curvature in (jax.grad(jax.grad(function)), jax.jacfwd(jax.grad(function))):
            np.testing.assert_allclose(curvature(c, x), second, rtol=1e-4)
        bends = jax.jvp(lambda x, f=function: jax.grad(f, 1)(c, x), (x,), (x,))[1]
        for key, leaf in x.items():
            wanted = -(c**2) * np.sin(c * leaf) * y[key] * leaf
            np.testing.assert_allclose(bends[key], wanted, rtol=1e-4, atol=1e-6)


def test_what_a_traced_scalar_is_made_of_is_computed_once():
    def programs(leaves):
        x = [jnp.full((3, i + 1), 2.0) for i in range(leaves)]
        c = jnp.float32([1.0, 2.0])

        def moved(c, x):
            return tree.combine((1 - abs(c[0] - jnp.float32(3)), c[1]), (x, x))

        text = jax.jit(moved).lower(c, x).compile().as_text()
        return text.count(" abs(")

    assert programs(2) == programs(6) == 1
