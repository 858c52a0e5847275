"""Laws of task vectors, TIES and DARE, and of the parts that they are made of."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import is_nan
from tests.strategies import FLOAT, layouts, scales
from wspace import average, merge, tree
from wspace.testing import LAYOUTS, assert_close, like, points, size, vector, weights

pytestmark = pytest.mark.exact

KEY = jax.random.key(0)
NUMBERS = st.floats(-2, 2, width=16)
densities = st.sampled_from([0.1, 0.25, 0.5, 0.7, 1.0])
GRID = st.integers(-24, 24).map(lambda n: n / 8)  # sums and differences of these are exact

arithmetic = jax.jit(merge.task_arithmetic)
SIGNED = {
    "task_arithmetic": merge.task_arithmetic,
    "ties": functools.partial(merge.ties, density=0.5),
    "ties, count": functools.partial(
        merge.ties, density=0.7, election=merge.Election(vote="count", divide="one")
    ),
    "dare": functools.partial(merge.dare, KEY),
    "dare_ties": functools.partial(merge.dare_ties, KEY, election=merge.Election(divide="largest")),
}
"""Methods by which a coefficient's sign has its meaning."""
each_signed = pytest.mark.parametrize("method", SIGNED.values(), ids=SIGNED)


def numbers(count):
    return st.lists(NUMBERS, min_size=count, max_size=count)


@st.composite
def families(draw, count=None):
    """A base and models tuned from it, on a grid where differences are exact."""
    layout, count = draw(layouts), draw(st.integers(1, 3)) if count is None else count
    base, *tuned = (draw(weights(layout, entries=GRID)) for _ in range(count + 1))
    return base, tuned


def flat(*trees):
    return [vector(x).astype(np.float64) for x in trees]


@given(data=st.data(), xs=points(layout=None))
def test_task_arithmetic_is_the_base_and_a_combination(data, xs):
    base, tuned = xs[0], xs[1:] or xs
    c = data.draw(numbers(len(tuned)))
    wanted = vector(base) + 0.5 * sum(
        k * (vector(x) - vector(base)) for k, x in zip(c, tuned, strict=True)
    )
    scale = (1 + sum(map(abs, c))) * size(*xs)
    got = arithmetic(base, tuned, c, scale=0.5)
    assert_close(got, like(wanted, base), units=8, scale=scale)
    edits = [merge.task_vector(base, x) for x in tuned]
    assert_close(edits, [like(vector(x) - vector(base), base) for x in tuned], scale=scale)


def test_the_analogy_and_negation_are_coefficients():
    base, a, b, c = jnp.eye(4)
    assert_close(merge.task_arithmetic(base, [a, b, c], (1, 1, -1)), a + b - c)
    assert_close(merge.task_arithmetic(base, [a], (-1,)), 2 * base - a)


@each_signed
@given(data=st.data(), family=families())
def test_sign_of_the_coefficients_is_that_of_the_displacement_exactly(method, data, family):
    base, tuned = family
    c = data.draw(numbers(len(tuned)))
    zero = jax.tree.map(jnp.zeros_like, base)
    edits = [merge.task_vector(base, x) for x in tuned]
    there, back = method(zero, edits, c), method(zero, edits, [-x for x in c])
    assert_close(back, jax.tree.map(jnp.negative, there), units=0)


@pytest.mark.parametrize("method", list(SIGNED.values())[:3], ids=list(SIGNED)[:3])
def test_a_model_and_its_negative_cancel_exactly(method):
    rng = np.random.default_rng(0)
    base, x = ({"w": jnp.asarray(rng.normal(size=(5, 3)), FLOAT)} for _ in range(2))
    assert_close(method(base, [x, x], (1, -1)), base, units=0)
    assert_close(method(base, [x, x], (-0.3, 0.3)), base, units=0)


@given(data=st.data(), family=families(), k=st.sampled_from([0.5, 2.0, -4.0]))
def test_merges_move_and_scale_with_the_models(data, family, k):
    base, tuned = family
    c = data.draw(numbers(len(tuned)))
    for method in (SIGNED["ties"], SIGNED["dare_ties"]):
        wanted = method(base, tuned, c)
        shift = jax.tree.map(lambda x: jnp.full_like(x, 3), base)
        moved = [tree.combine((1, 1), (x, shift)) for x in (base, *tuned)]
        scale = 4 * (3 + sum(map(abs, c))) * (3 + size(base, *tuned))
        got = method(moved[0], moved[1:], c)
        assert_close(got, tree.combine((1, 1), (wanted, shift)), units=8, scale=scale)
        larger = [tree.combine((k,), (x,)) for x in (base, *tuned)]
        assert_close(method(larger[0], larger[1:], c), tree.combine((k,), (wanted,)), units=0)


@given(data=st.data(), family=families())
def test_order_of_the_models_does_not_matter(data, family):
    base, tuned = family
    c = data.draw(numbers(len(tuned)))
    order = data.draw(st.permutations(range(len(tuned))))
    ones = [round(4 * x) / 4 for x in c]  # no rounding, so no vote is swayed by it
    got = merge.ties(base, [tuned[i] for i in order], [ones[i] for i in order], density=0.5)
    scale = (1 + sum(map(abs, c))) * size(base, *tuned)
    assert_close(got, merge.ties(base, tuned, ones, density=0.5), units=8, scale=scale)


@given(family=families(count=1))
def test_one_model_comes_back(family):
    base, (x,) = family
    for merged in (
        merge.ties(base, [x], density=1.0),
        merge.dare(KEY, base, [x], density=1.0),
        merge.dare_ties(KEY, base, [x], density=1.0),
        merge.task_arithmetic(base, [x]),
        *(
            merge.ties(base, [x], **system["ties"] | {"density": 1.0, "scale": 1})
            for system in merge.presets.systems.values()
        ),
    ):
        assert_close(merged, x, units=0)


def votes(rows, vote):
    total = rows.sum(0) if vote == "mass" else np.sign(rows).sum(0)
    return np.sign(total)


def oracle(base, tuned, c, options):
    """TIES on vectors, as it is said in words."""
    base, *tuned = flat(base, *tuned)
    edits = []
    for x in tuned:
        tau, keep = x - base, min(int(options["density"] * x.size) + options["more"], x.size)
        order = np.argsort(-np.abs(tau), kind="stable")[:keep]
        edits.append(np.where(np.isin(np.arange(tau.size), order), tau, 0))
    edits, c = np.array(edits).reshape(len(c), base.size), np.array(c)[:, None]
    voters = c * edits if options["weighted"] else edits
    sign = votes(voters, options["vote"])
    rest = {"zero": 0, "plus": 1, "majority": 1 if sign.sum() > 0 else -1}[options["zero"]]
    sign = np.where(sign == 0, rest, sign)
    agree = (np.sign(voters) == sign) & (sign != 0)
    terms = np.where(agree, c * edits, 0)
    if options["divide"] == "largest":
        return base + np.take_along_axis(terms, np.abs(terms).argmax(0)[None], 0)[0]
    by = {"count": agree, "weight": np.where(agree, c, 0), "one": np.zeros_like(agree)}
    by = by[options["divide"]].sum(0)
    return base + terms.sum(0) / np.where(by == 0, 1, by)


OPTIONS = {
    "density": [0.25, 0.5, 1.0],
    "more": [0, 1],
    "vote": ["mass", "count"],
    "weighted": [True, False],
    "zero": ["zero", "plus", "majority"],
    "divide": ["count", "weight", "one", "largest"],
}


@given(data=st.data(), family=families(count=3))
def test_ties_does_what_its_options_say(data, family):
    base, tuned = family
    options = {name: data.draw(st.sampled_from(values)) for name, values in OPTIONS.items()}
    c = data.draw(st.sampled_from([(1.0, 1.0, 1.0), (2.0, 1.0, 0.5), (1.0, -0.5, 0.25)]))
    wanted = oracle(base, tuned, c, options)
    kept = "floor+1" if options.pop("more") else "floor"
    density = options.pop("density")
    election = merge.Election(**options)
    got = merge.ties(base, tuned, c, density=density, kept=kept, election=election)
    assert_close(got, like(wanted, base), units=16, scale=16 * (1 + size(base, *tuned)))


FIXTURE = """
 .9 -.8  .7  .6 -.5  .4 -.3  .2  .1  0
 .9  .8 -.1  .2  .5 -.4  .6  .7 -.3  0
-.2 -.1  .7 -.6 -.5  .4  .3 -.8  .9  0
"""
SAYS = {
    (None, (1, 1, 1)): ".9 0 .7 0 0 0 .6 -.8 .9 0",
    (None, (2, 1, 0.5)): "1.35 -1.6 .875 1.2 0 0 .6 .7 .45 0",
    ("mergekit-0.1.5", (1, 1, 1)): ".9 .8 .7 .6 0 0 .6 -.8 .9 0",
    ("mergekit-0.1.5", (2, 1, 0.5)): ".9 -.8 .7 .6 0 0 .6 .7 .9 0",
    ("peft-0.21.2", (1, 1, 1)): ".9 .8 .7 .6 0 0 .6 -.8 .9 0",
    ("peft-0.21.2", (2, 1, 0.5)): "1.35 .8 .875 1.2 0 0 .6 -.4 .45 0",
    ("paper", (1, 1, 1)): ".9 .8 .7 .6 -.5 0 .6 -.8 .9 0",
    ("fusionbench", (1, 1, 1)): ".54 .24 .42 .18 -.3 0 .18 -.24 .27 0",
}


def preset_of(name, method="ties"):
    return {} if name is None else merge.presets.systems[name][method]


@pytest.mark.parametrize(("preset", "c"), SAYS)
def test_the_worked_fixture_comes_out_as_each_system_has_it(preset, c):
    tuned = [jnp.asarray(np.array(row.split(), float), FLOAT) for row in FIXTURE.split("\n")[1:-1]]
    got = merge.ties(jnp.zeros(10, FLOAT), tuned, c, **preset_of(preset) | {"density": 0.4})
    wanted = np.array(SAYS[preset, c].split(), float)
    known = [0, 2, 3, 6, 7, 8, 9] if preset in ("paper", "fusionbench") else slice(None)
    np.testing.assert_allclose(np.asarray(got)[known], wanted[known], atol=1e-6)


def test_dividing_by_the_weights_loses_the_sign_and_blows_up_where_ours_does_not():
    base = jnp.zeros(3, FLOAT)
    x, y = jnp.asarray([0.9, -0.8, 0.7], FLOAT), jnp.asarray([0.9, 0.8, -0.1], FLOAT)
    normalized = functools.partial(merge.ties, **merge.presets.mergekit["ties"])
    assert_close(normalized(base, [x], (-1,)), x)  # it adds what it was to subtract
    assert_close(merge.ties(base, [x], (-1,), density=1.0), -x)
    blown = normalized(base, [x, y], (1, -0.999))
    np.testing.assert_allclose(blown[1:], [-1599.2, 799.9], rtol=1e-3)
    ours = merge.ties(base, [x, y], (1, -0.999), density=1.0)
    assert float(jnp.max(jnp.abs(ours))) < 1
    with pytest.raises(ValueError, match="make it differ from zero"):
        merge.task_arithmetic(base, [x, y], (1, -1), normalize=True)
    shares = functools.partial(merge.task_arithmetic, normalize=True)
    assert is_nan(jax.jit(shares)(base, [x, y], jnp.asarray([1.0, -1.0])))
    assert_close(shares(base, [x], (-1,)), x)


@given(x=layouts.flatmap(weights), density=densities, scale=scales)
def test_trim_keeps_the_largest_exactly_as_many_as_asked_for(x, density, scale):
    x = tree.combine((scale,), (x,))
    for kept, more in (("floor", 0), ("floor+1", 1)):
        (tau,) = flat(x)
        count = min(int(density * tau.size) + more, tau.size)
        order = np.argsort(-np.abs(tau), kind="stable")[:count]
        wanted = np.where(np.isin(np.arange(tau.size), order), tau, 0)
        got = merge.trim(x, density, kept=kept)
        assert_close(got, like(wanted, x), units=0)
        assert_close(merge.trim(got, density, kept=kept), got, units=0)
        by_leaf = merge.trim(x, density, kept=kept, scope="leaf")
        for part, leaf in zip(jax.tree.leaves(by_leaf), jax.tree.leaves(x), strict=True):
            count = min(int(density * leaf.size) + more, leaf.size)
            assert np.count_nonzero(part) == min(count, np.count_nonzero(leaf))
            assert_close(part, merge.trim(leaf, density, kept=kept) if count else 0 * leaf, units=0)


@given(data=st.data(), density=densities)
def test_trim_by_row_trims_what_differs_in_the_last_index(data, density):
    x = data.draw(weights(LAYOUTS[3]))
    got = merge.trim(x, density, scope="row")
    for leaf, part in zip(jax.tree.leaves(x), jax.tree.leaves(got), strict=True):
        for index in np.ndindex(leaf.shape[:-1]):
            row = np.asarray(leaf)[index]
            order = np.argsort(-np.abs(row), kind="stable")[: int(density * row.size)]
            wanted = np.where(np.isin(np.arange(row.size), order), row, 0)
            np.testing.assert_array_equal(np.asarray(part)[index], wanted)


def test_trim_of_small_leaves_empties_them_by_leaf_and_not_by_tree():
    x = {"b": jnp.asarray([9.0]), "s": jnp.float32(8.0), "w": jnp.ones(8), "e": jnp.zeros((0, 2))}
    by_leaf, by_tree = merge.trim(x, 0.5, scope="leaf"), merge.trim(x, 0.5)
    assert (by_leaf["b"], by_leaf["s"]) == (0, 0)
    assert (by_tree["b"], by_tree["s"]) == (9, 8)
    assert_close(merge.trim(x, 0.05), jax.tree.map(jnp.zeros_like, x), units=0)
    assert merge.trim(x, 0.5, scope="row")["e"].shape == (0, 2)


def test_drop_keeps_the_expectation_or_the_norm():
    tau = jnp.asarray([1.0, -2.0, 0.5, 3.0], FLOAT)
    keys = jax.random.split(KEY, 20_000)
    for density in (0.3, 0.9):
        draws = np.asarray(jax.vmap(lambda k, p=density: merge.drop(k, tau, p))(keys))
        spread = np.abs(tau) * np.sqrt((1 - density) / density)
        np.testing.assert_array_less(np.abs(draws.mean(0) - tau), 5 * spread / np.sqrt(len(keys)))
        np.testing.assert_allclose(draws.std(0), spread, rtol=0.05)
        normed = jax.vmap(lambda k, p=density: merge.drop(k, tau, p, rescale="norm"))(keys)
        sums = np.abs(normed).sum(1)
        np.testing.assert_allclose(sums[sums > 0], 6.5, rtol=1e-6)
        assert (sums == 0).mean() < 2 * (1 - density) ** 4 + 1e-3
    biased = np.asarray(normed).mean(0) - np.asarray(tau)
    assert np.abs(biased).max() > 0.01  # the norm is kept at the cost of the expectation
    assert_close(merge.drop(KEY, tau, 1.0), tau, units=0)
    masked = merge.drop(KEY, tau, 0.5, rescale="none")
    assert set(np.unique(np.asarray(masked / tau))) <= {0.0, 1.0}


@pytest.mark.parametrize("power", [-120, 125])
def test_what_is_left_of_a_leaf_keeps_its_norm_at_every_scale(power):
    x = jnp.asarray([1.0, -1.5, 1.75, -1.25, 1.5, -1.0, 1.25, 1.75, -1.0], jnp.float32)
    scaled = 2.0**power * x  # 2^125 times the norm, which is 12, is out of range
    for method in (merge.drop, merge.magprune):
        got, wanted = (method(KEY, tau, 0.6, rescale="norm") for tau in (scaled, x))
        assert_close(got, 2.0**power * wanted, units=0)


@pytest.mark.parametrize("rescale", ["norm", "inverse"])
def test_a_leaf_of_which_nothing_stays_is_zero_and_so_is_its_derivative(rescale):
    def dropped(x):
        return merge.drop(KEY, x, 1e-6, rescale=rescale)

    for x in (jnp.ones(3), jnp.array([3e38, -3e38, 3e38], jnp.float32)):
        assert_close(dropped(x), jnp.zeros_like(x), units=0)
        assert_close(jax.jacobian(dropped)(x), jnp.zeros((3, 3), x.dtype), units=0)
    assert_close(dropped(jnp.array([1.0, jnp.inf, -jnp.inf])), jnp.zeros(3), units=0)


def test_masks_of_drop_are_those_of_the_path_on_any_number_of_devices():
    x = {"w": jnp.ones((16, 8)), "b": jnp.ones(24)}
    wanted = merge.drop(KEY, x, 0.4)
    more = x | {"a": jnp.ones(5), "z": [jnp.ones((16, 8))]}
    got = merge.drop(KEY, more, 0.4)
    assert_close({name: got[name] for name in x}, wanted, units=0)
    assert not np.array_equal(got["z"][0], got["w"])
    for kind in (jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto):
        mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            spread = jax.device_put(x, jax.NamedSharding(mesh, jax.P("x")))
            sharded = [
                merge.drop(KEY, spread, 0.4),
                jax.jit(merge.drop, static_argnums=2)(KEY, spread, 0.4),
            ]
        for one in sharded:
            for name, leaf in wanted.items():
                np.testing.assert_array_equal(np.asarray(one[name]), np.asarray(leaf))


@given(data=st.data(), family=families())
def test_elect_is_the_sign_of_the_vote(data, family):
    _, edits = family
    c = [round(4 * x) / 4 for x in data.draw(numbers(len(edits)))]
    rows = np.array(c)[:, None] * np.array(flat(*edits)).reshape(len(c), -1)
    for vote in ("mass", "count"):
        sign = votes(rows, vote)
        assert_close(merge.elect(edits, c, vote=vote), like(sign, edits[0]), units=0)
        rest = 1 if sign.sum() > 0 else -1
        got = merge.elect(edits, c, vote=vote, zero="majority")
        assert_close(got, like(np.where(sign == 0, rest, sign), edits[0]), units=0)


def test_gradients_are_those_for_fixed_masks():
    base = jnp.zeros(3, FLOAT)
    x, y = jnp.asarray([3.0, -2.0, 0.1], FLOAT), jnp.asarray([1.0, 4.0, 0.2], FLOAT)
    merged = functools.partial(merge.ties, density=0.7)
    slope = jax.jacobian(lambda c: merged(base, [x, y], c))(jnp.ones(2, FLOAT))
    np.testing.assert_allclose(slope, [[1.5, 0.5], [0, 4], [0, 0]], rtol=1e-6)
    slope = jax.jacobian(lambda x: merged(base, [x, y]))(x)
    np.testing.assert_allclose(slope, np.diag([0.5, 0, 0]), rtol=1e-6)
    slope = jax.grad(lambda b: merged(b, [x, y]).sum())(base)
    np.testing.assert_allclose(slope, [0, 0, 1], atol=1e-6)  # 1 - the share that moves along


def test_merges_of_nothing_and_of_the_base_are_the_base():
    base = {"w": jnp.ones((2, 3)), "e": jnp.zeros((0,))}
    for method in SIGNED.values():
        assert_close(method(base, [base, base]), base, units=0)
        assert method({}, [{}]) == {}


def test_bad_arguments_are_refused(refuses):
    base, x = {"w": jnp.ones(4)}, {"w": jnp.zeros(4)}
    for density in (0, -0.1, 1.5, np.nan):
        with refuses(ValueError, match="density must be above 0 and at most 1, got"):
            merge.ties(base, [x], density=density)
        with refuses(ValueError, match="density must be above 0 and at most 1, got"):
            merge.dare(KEY, base, [x], density=density)
    with refuses(TypeError, match="density must be a plain number.*selection.top_mask"):
        jax.jit(merge.trim)(base, 0.5)
    for method in ("ties", "dare_ties"):
        with refuses(
            TypeError, match="density must be a real number above 0 and at most 1, got None"
        ):
            call = functools.partial(merge.dare_ties, KEY) if "dare" in method else merge.ties
            call(base, [x], **merge.presets.peft[method])
    with refuses(ValueError, match="density has 2 numbers for 1 models: give one number a model"):
        merge.ties(base, [x], density=(0.5, 0.2))
    with refuses(ValueError, match=r"density\[1\] must be above 0 and at most 1, got 2"):
        merge.ties(base, [x, x], density=(0.5, 2.0))
    with refuses(ValueError, match="tuned is empty: give at least one tree"):
        merge.ties(base, [])
    with refuses(ValueError, match=r"coefficients\[0\] must be finite, got nan"):
        merge.ties(base, [x], [np.nan])
    with refuses(ValueError, match="coefficients has 2 numbers for 1 points"):
        merge.dare(KEY, base, [x], [1, 1])
    with refuses(ValueError, match=r"leaf \['w'\] has shape \(4,\) in base, \(3,\) in tuned\[1\]"):
        merge.task_arithmetic(base, [x, {"w": jnp.zeros(3)}])
    for option in ("scope", "kept"):
        with refuses(ValueError, match=f"{option} must be one of .*, got 'none of them'"):
            merge.ties(base, [x], **{option: "none of them"})
    for option in ("vote", "zero", "divide"):
        with refuses(ValueError, match=f"{option} must be one of .*, got 'none of them'"):
            merge.Election(**{option: "none of them"})
    with refuses(TypeError, match="weighted must be True or False, got 'no'"):
        merge.Election(weighted="no")
    with refuses(ValueError, match="rescale must be one of .*, got 'none of them'"):
        merge.drop(KEY, base, 0.5, rescale="none of them")


PRESETS = [(system, method) for system, table in merge.presets.systems.items() for method in table]


@pytest.mark.parametrize(("system", "method"), PRESETS)
def test_every_preset_states_every_option(system, method):
    function = getattr(average if method == "model_stock" else merge, method)
    parameters = inspect.signature(function).parameters.values()
    options = {x.name for x in parameters if x.kind is inspect.Parameter.KEYWORD_ONLY}
    assert merge.presets.systems[system][method].keys() == options


def test_signatures_have_the_defaults_and_none_is_none():
    for name in (*merge.presets.mergekit, "magmax", "pcb"):
        parameters = inspect.signature(getattr(average if name == "model_stock" else merge, name))
        for x in parameters.parameters.values():
            if x.kind is inspect.Parameter.KEYWORD_ONLY:
                assert x.default not in (None, inspect.Parameter.empty), (name, x.name)


SPARSE = {
    "ties": merge.ties,
    "dare": functools.partial(merge.dare, KEY),
    "dare_ties": functools.partial(merge.dare_ties, KEY),
    "della": functools.partial(merge.della, KEY),
    "breadcrumbs": merge.breadcrumbs,
    "breadcrumbs_ties": merge.breadcrumbs_ties,
}


@pytest.mark.parametrize("name", SPARSE)
def test_a_density_a_model_is_its_own(name):
    rng = np.random.default_rng(0)
    zero, *edits = (jnp.asarray(k * rng.normal(size=(40, 50)), FLOAT) for k in (0, 1, 1, 1))
    method, densities, size = SPARSE[name], (0.25, 0.5, 0.75), zero.size
    same = method(zero, edits, density=[0.5, 0.5, 0.5])
    assert_close(same, method(zero, edits, density=0.5), units=0)
    for i, density in enumerate(densities):  # of one model alone, the others at coefficient 0
        alone = [float(i == j) for j in range(3)]
        got = method(zero, edits, alone, density=densities)
        assert_close(got, method(zero, edits, alone, density=density), units=0)
        kept, exact = jnp.count_nonzero(got), name in ("ties", "breadcrumbs", "breadcrumbs_ties")
        spread = 0 if exact else 5 * (size * density * (1 - density)) ** 0.5
        assert abs(int(kept) - size * density) <= spread


@pytest.mark.parametrize("size", [2.0**-100, 1.0, 2.0**126])
def test_where_the_sum_of_weights_divides_only_their_ratios_matter(size):
    """Their sum may be out of range, and a mean is no edit of zero then."""
    edits = [jnp.array([0.1, 0.2, -0.3], jnp.float32), jnp.array([0.3, -0.4, -0.1], jnp.float32)]
    signs = jnp.array([1.0, -1.0, -1.0], jnp.float32)
    c = np.float32(size) * np.array([3.0, 3.0], np.float32)
    merged = merge.disjoint_merge(edits, signs, c, divide="weight")
    np.testing.assert_allclose(merged, [0.2, -0.4, -0.2], rtol=1e-6)


@pytest.mark.parametrize("size", [0.5, 1.0, 8.0])
def test_weights_that_cancel_divide_by_nothing(size):
    edits = [jnp.array([1.0, 2.0], jnp.float32), jnp.array([-3.0, 1.0], jnp.float32)]
    merged = merge.disjoint_merge(edits, jnp.ones(2), [size, -size], divide="weight")
    np.testing.assert_array_equal(merged, [4 * size, 2])


def test_votes_and_agreement_by_hand():
    rows = [jnp.array([x], jnp.float32) for x in (2.0, -4.0, -1.0)]
    c = [3.0, 1.0, 1.0]
    assert merge.elect(rows, c, vote="mass").item() == 1  # 6 - 4 - 1
    assert merge.elect(rows, c, vote="count").item() == -1  # one against two, whatever the c_i
    up, pair = jnp.ones(1, jnp.float32), [jnp.array([x], jnp.float32) for x in (2.0, 4.0)]
    assert merge.disjoint_merge(pair, up, [-1.0, 1.0]).item() == 4  # the first term is negative
    assert merge.disjoint_merge(pair, up, [-1.0, 1.0], weighted=False).item() == 1
    for weighted, wanted in ((True, 4), (False, 1)):
        election = merge.Election(weighted=weighted, zero="plus")
        assert merge.ties(0 * up, pair, [-1.0, 1.0], density=1.0, election=election) == wanted
    pair[1] = jnp.array([-3.0], jnp.float32)
    for zero in ("zero", "plus", "majority"):
        for weighted, wanted in ((True, 4), (False, -3)):
            election = merge.Election(weighted=weighted, zero=zero)
            assert merge.ties(0 * up, pair, [2.0, 1.0], density=1.0, election=election) == wanted
