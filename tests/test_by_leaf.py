"""Laws of numbers for each leaf: coefficients, densities and positions, by names and depth."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.strategies import FLOAT, UNIT
from wspace import average, fit, interpolate, merge, negative, tree
from wspace.testing import assert_close

SHAPES = {
    "layers": [{"attn": (4, 3), "mlp": (3, 5)}, {"attn": (4, 3), "mlp": (3, 5)}],
    "head": (7,),
}
KEY = jax.random.key(0)


def trees(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(
            lambda shape: jnp.asarray(rng.normal(size=shape), FLOAT),
            SHAPES,
            is_leaf=lambda node: isinstance(node, tuple),
        )
        for _ in range(count)
    ]


BASE, *TUNED = trees(3)
HALF = tree.by_name(BASE, {"*attn": 0.5, "layers.*": -1.5, "*": 2.0})
OTHER = {"layers": 0.75, "head": -0.25}
"""A number for a subtree."""


def by_groups(function):
    """The leaves of runs with one number for all, each leaf from the run with its own numbers."""
    firsts, seconds = jax.tree.leaves(HALF), tree_of(OTHER)
    results = {
        pair: jax.tree.leaves(function(*pair)) for pair in set(zip(firsts, seconds, strict=True))
    }
    picked = [results[pair][i] for i, pair in enumerate(zip(firsts, seconds, strict=True))]
    return jax.tree.structure(BASE).unflatten(picked)


def spread(numbers):
    """A tree of numbers with those of subtrees at each leaf."""
    return jax.tree.structure(BASE).unflatten(tree_of(numbers))


def tree_of(numbers):
    """The leaves of a tree of numbers, those of subtrees at each leaf."""
    return jax.tree.leaves(
        tree.by_name(BASE, {"layers*": numbers["layers"], "head": numbers["head"]})
    )


METHODS = {
    "combine": lambda c, d: tree.combine([c, d], TUNED),
    "mean": lambda c, d: average.mean(TUNED, [c, d]),
    "lerp": lambda c, _: interpolate.lerp(*TUNED, c),
    "slerp": lambda c, _: interpolate.slerp(*TUNED, c),
    "task_arithmetic": lambda c, d: merge.task_arithmetic(BASE, TUNED, [c, d], scale=d),
    "normalized": lambda c, d: merge.task_arithmetic(BASE, TUNED, [c, d], normalize=True),
    "ties": lambda c, d: merge.ties(BASE, TUNED, [c, d], density=0.4, scale=c),
    "ties, weight": lambda c, d: merge.ties(
        BASE, TUNED, [c, d], density=0.9, scope="leaf", election=merge.Election(divide="weight")
    ),
    "dare": lambda c, d: merge.dare(KEY, BASE, TUNED, [c, d]),
    "dare_ties": lambda c, d: merge.dare_ties(KEY, BASE, TUNED, [c, d]),
    "della": lambda c, d: merge.della(KEY, BASE, TUNED, [c, d]),
    "breadcrumbs": lambda c, d: merge.breadcrumbs(BASE, TUNED, [c, d]),
    "breadcrumbs_ties": lambda c, d: merge.breadcrumbs_ties(BASE, TUNED, [c, d]),
    "magmax": lambda c, d: merge.magmax(BASE, TUNED, [c, d], scale=d),
    "negmerge": lambda c, _: merge.negmerge(BASE, TUNED, strength=c),
    "ext_sub": lambda c, _: merge.ext_sub(BASE, *TUNED, strength=c),
    "ram": lambda c, _: merge.ram(BASE, TUNED, scale=c),
    "pcb": lambda c, _: merge.pcb(BASE, TUNED, density=0.5, scale=c),
    "sce": lambda c, _: merge.sce(BASE, TUNED, density=0.5, scale=c),
    "tsv_m": lambda c, d: merge.tsv_m(BASE, TUNED, [c, d]).weights,
    "iso_c": lambda c, d: merge.iso_c(BASE, TUNED, [c, d], scale=d).weights,
    "iso_cts": lambda c, d: merge.iso_cts(BASE, TUNED, [c, d]).weights,
    "knots": lambda c, d: merge.knots(BASE, TUNED, [c, d]),
    "repel": lambda c, _: negative.repel(BASE, TUNED[0], c),
}
each_method = pytest.mark.parametrize("function", METHODS.values(), ids=METHODS)


@each_method
def test_a_leaf_is_what_it_is_where_its_own_numbers_are_those_of_all(function):
    """So what is trimmed, elected or turned over the whole tree is the same as before."""
    wanted = by_groups(function)
    got = function(HALF, OTHER)
    assert_close(got, wanted, units=16)
    traced = jax.jit(function)(HALF, OTHER)
    assert_close(traced, wanted, units=64)


def test_numbers_by_leaf_are_learned_as_others_are():
    goal = tree.combine([HALF, OTHER], TUNED)

    def loss(numbers):
        found = tree.combine(
            [tree.by_name(BASE, {"*attn": numbers[0], "*": numbers[1]}), OTHER], TUNED
        )
        return tree.norm(tree.combine((1, -1), (found, goal))) ** 2 / 2

    numbers = jnp.asarray([0.2, 0.3], FLOAT)
    slopes = []
    for wanted in ("attn", ""):
        total = 0.0
        for name, x in named(TUNED[0]).items():
            if ("attn" in name) == (wanted == "attn"):
                gap = float(numbers[0 if wanted else 1]) - named(HALF)[name]
                total += gap * np.sum(np.asarray(x, float) ** 2)
        slopes.append(total)
    np.testing.assert_allclose(jax.grad(loss)(numbers), slopes, rtol=1e-4)
    many = jax.vmap(lambda t: interpolate.slerp(*TUNED, {"layers": t, "head": 0.5}))(numbers)
    for i, t in enumerate([0.2, 0.3]):
        one = interpolate.slerp(*TUNED, {"layers": t, "head": 0.5})
        assert_close(jax.tree.map(lambda x, i=i: x[i], many), one, units=16)


def named(x):
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(x)
    }


def test_a_majority_is_that_of_the_whole_tree_with_the_numbers_of_its_leaves():
    election = merge.Election(zero="majority")
    got = merge.ties(BASE, TUNED, [HALF, OTHER], density=0.4, election=election)
    parts = [merge.trim(merge.task_vector(BASE, x), 0.4) for x in TUNED]
    terms = [
        jax.tree.map(lambda c, x: c * np.asarray(x, float), numbers, part)
        for numbers, part in zip((HALF, spread(OTHER)), parts, strict=True)
    ]
    leaves = [np.stack(xs) for xs in zip(*map(jax.tree.leaves, terms), strict=True)]
    signs = [np.sign(x.sum(0)) for x in leaves]
    most = 1 if sum(s.sum() for s in signs) > 0 else -1
    signs = [np.where(s == 0, most, s) for s in signs]
    agree = [np.sign(x) == s for x, s in zip(leaves, signs, strict=True)]
    edits = [(x * a).sum(0) / np.maximum(a.sum(0), 1) for x, a in zip(leaves, agree, strict=True)]
    wanted = [np.asarray(x, float) + y for x, y in zip(jax.tree.leaves(BASE), edits, strict=True)]
    wanted = jax.tree.structure(BASE).unflatten(jnp.asarray(x, FLOAT) for x in wanted)
    assert_close(got, wanted, units=16)


def test_what_a_fit_returns_for_each_leaf_merges_as_it_did():
    rows = jax.tree.map(
        lambda c, d: jnp.asarray([c, d], FLOAT),
        HALF,
        jax.tree.unflatten(jax.tree.structure(BASE), tree_of(OTHER)),
    )
    got = merge.task_arithmetic(BASE, TUNED, rows)
    assert_close(got, merge.task_arithmetic(BASE, TUNED, [HALF, OTHER]), units=0)
    found = fit.coefficients(
        KEY,
        lambda w: tree.vdot(w, w),
        BASE,
        TUNED,
        per="leaf",
        optimizer=optax.sgd(1e-3),
        steps=2,
    )
    assert_close(merge.task_arithmetic(BASE, TUNED, found.coefficients), found.weights, units=16)


DENSITIES = tree.by_name(BASE, {"*attn": 0.25, "*mlp": 0.6, "head": 1.0})
THINNED = {
    "trim": lambda rho: merge.trim(TUNED[0], rho, scope="leaf"),
    "trim rows": lambda rho: merge.trim(TUNED[0], rho, scope="row"),
    "drop": lambda rho: merge.drop(KEY, TUNED[0], rho),
    "magprune": lambda rho: merge.magprune(KEY, TUNED[0], rho, width=0.0),
    "band": lambda rho: merge.band(TUNED[0], rho, 0.0, scope="leaf"),
    "ties": lambda rho: merge.ties(BASE, TUNED, density=rho, scope="leaf"),
    "dare": lambda rho: merge.dare(KEY, BASE, TUNED, density=rho),
    "della": lambda rho: merge.della(KEY, BASE, TUNED, density=rho, width=0.0),
    "breadcrumbs": lambda rho: merge.breadcrumbs(
        BASE, TUNED, density=rho, outliers=0.0, scope="leaf"
    ),
}


@pytest.mark.parametrize("function", THINNED.values(), ids=THINNED)
def test_densities_by_leaf_keep_in_each_leaf_what_its_own_density_keeps(function):
    own = jax.tree.leaves(DENSITIES)
    results = {rho: jax.tree.leaves(function(rho)) for rho in set(own)}
    wanted = [results[rho][i] for i, rho in enumerate(own)]
    assert_close(function(DENSITIES), jax.tree.structure(BASE).unflatten(wanted), units=0)


def test_each_model_may_have_a_density_for_each_leaf():
    got = merge.ties(BASE, TUNED, density=[DENSITIES, 0.5], scope="leaf")
    parts = [
        merge.trim(merge.task_vector(BASE, x), rho, scope="leaf")
        for x, rho in zip(TUNED, (DENSITIES, 0.5), strict=True)
    ]
    wanted = merge.ties(BASE, [tree.combine((1, 1), (BASE, part)) for part in parts], density=1.0)
    assert_close(got, wanted, units=16)
    kept = [int((leaf != 0).sum()) for leaf in jax.tree.leaves(parts[0])]
    sizes = [leaf.size for leaf in jax.tree.leaves(BASE)]
    assert kept == [int(rho * n) for rho, n in zip(jax.tree.leaves(DENSITIES), sizes, strict=True)]


def test_densities_of_a_named_tuple_are_one_tree_for_all_models():
    base, *tuned = (Pair(x["head"], x["layers"][0]["mlp"]) for x in (BASE, *TUNED))
    own = Pair(0.5, 0.25)
    got = merge.ties(base, tuned, density=own, scope="leaf")
    assert_close(got, merge.ties(base, tuned, density=[own, own], scope="leaf"), units=0)
    kept = [int((x != 0).sum()) for x in merge.trim(tuned[0], own, scope="leaf")]
    assert kept == [3, 3]


class Pair(NamedTuple):
    """A model of two leaves."""

    x: Any
    y: Any


def test_names_are_matched_by_the_first_pattern():
    names = {"embed": 0, "blocks": [{"q": 0, "k": 0}, {"q": 0, "k": 0}]}
    got = tree.by_name(names, {"*.1.q": 1.0, "blocks.*": 2.0, "*": 3.0})
    assert got == {"embed": 3.0, "blocks": [{"q": 2.0, "k": 2.0}, {"q": 1.0, "k": 2.0}]}
    depth = tree.by_depth(names, [0.0, 1.0], rest=9.0)
    assert depth == {"embed": 9.0, "blocks": [{"q": 0.0, "k": 0.0}, {"q": 1.0, "k": 1.0}]}
    both = tree.by_name(names, {"*.q": depth, "*": 0.5})
    assert both == {"embed": 0.5, "blocks": [{"q": 0.0, "k": 0.5}, {"q": 1.0, "k": 0.5}]}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("gradient", [[0.3], [0.0, 1.0], [0.2, 0.8, 0.5, 0.1]], ids=len)
def test_a_gradient_is_interpolated_from_the_first_layer_to_the_last(count, gradient):
    names = {f"model.layers.{i}.attn.q{j}": 0 for i in range(count) for j in (0, 1)}
    got = tree.by_depth(names, gradient)
    for name, number in got.items():
        share = int(name.split(".")[2]) / max(count - 1, 1)
        wanted = np.interp(share, np.linspace(0, 1, len(gradient)), gradient)
        np.testing.assert_allclose(number, wanted, rtol=1e-12)
    own = [float(i) ** 2 for i in range(50 + count)]  # one for each layer is taken as it is
    assert tree.by_depth(own, own) == own
    traced = jax.jit(lambda g: tree.by_depth(names, g))(jnp.asarray(gradient, FLOAT))
    for name, number in traced.items():
        np.testing.assert_allclose(number, got[name], rtol=8 * UNIT)


def test_what_matches_nothing_or_has_no_number_is_refused_by_name(refuses):
    refused = {
        r"the pattern '\*attention\*' matches no leaf of x: its leaves are 'head', .* and 2 more": (
            lambda: tree.by_name(BASE, {"*attention*": 1.0, "*": 0.5})
        ),
        r"leaf 'head' of x matches no pattern: give one for it, or '\*'": lambda: tree.by_name(
            BASE, {"layers*": 1.0}
        ),
        "leaf 'head' of x has no number of a layer in its name: give rest": lambda: tree.by_depth(
            BASE, [1.0]
        ),
        "no name of a leaf of x has a number of a layer": lambda: tree.by_depth({"w": 0}, [1.0]),
        "gradient is empty": lambda: tree.by_depth(BASE, []),
        "rest must be finite, got nan": lambda: tree.by_depth(BASE, [1.0], rest=jnp.nan),
        r"coefficients\[0\] has no number for leaf \['layers'\]\[0\]\['attn'\]": lambda: merge.ties(
            BASE, TUNED, [{"head": 1.0}, 1.0]
        ),
        r"t has a number at \['tail'\], where the weights have none": lambda: interpolate.lerp(
            *TUNED, {"head": 0.5, "layers": 0.5, "tail": 0.5}
        ),
        r"scale at leaf \['head'\] must be finite, got nan": lambda: merge.task_arithmetic(
            BASE, TUNED, scale={"head": jnp.nan, "layers": 1.0}
        ),
        r"density is a tree of numbers, but over the whole tree one share": lambda: merge.ties(
            BASE, TUNED, density=DENSITIES
        ),
        r"density at leaf \['head'\] must be above 0": lambda: merge.drop(
            KEY, BASE, {"layers": 0.5, "head": 0.0}
        ),
        r"coefficients \[1.0, -1.0\] at leaf \['head'\] sum to 0": lambda: average.mean(
            TUNED, [1.0, {"layers": 1.0, "head": -1.0}]
        ),
    }
    for message, call in refused.items():
        with refuses(ValueError, match=message):
            call()
    with refuses(TypeError, match="numbers must be a mapping from patterns"):
        tree.by_name(BASE, [1.0])
    with refuses(TypeError, match="rest must be a real number, got a dict of 5 leaves"):
        tree.by_depth(BASE, [1.0], rest=BASE)
    for call in (
        lambda c: average.karcher_mean(TUNED, c),
        lambda c: average.geometric_median(TUNED, c),
        lambda c: negative.retarget(TUNED, c, BASE),
    ):
        with refuses(TypeError, match=r"is a tree of numbers, but here a point is taken whole"):
            call([HALF, 1.0])


def test_a_model_given_for_a_coefficient_is_named_and_not_printed(refuses):
    where = r"^coefficients\[0\] at leaf \['head'\] must be one number, got shape \(7,\).{,40}$"
    with refuses(ValueError, match=where):
        merge.task_arithmetic(BASE, TUNED, [BASE, 1.0])


def test_a_report_of_a_merge_takes_the_numbers_that_the_merge_took():
    numbers = [HALF, OTHER]
    merged = merge.task_arithmetic(BASE, TUNED, numbers)
    told = merge.report(BASE, TUNED, merged, numbers)
    assert told.coefficients.shape == (2, 5)
    assert "-1.5 to 2" in str(told)
    for i, (c, d) in enumerate(zip(jax.tree.leaves(HALF), tree_of(OTHER), strict=True)):
        leaf = [jax.tree.leaves(x)[i] for x in (BASE, *TUNED, merged)]
        alone = merge.report(leaf[0], leaf[1:3], leaf[3], [c, d])
        assert told.leaves[i].agreed.tolist() == alone.total.agreed.tolist()
        assert told.leaves[i].disputed == alone.total.disputed
