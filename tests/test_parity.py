"""Parity by name: what the presets give is what the systems gave, to 1e-5 of the largest entry."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden_arrays import cases, tree
from wspace import average, interpolate, merge
from wspace import tree as wtree
from wspace.merge import presets

pytestmark = pytest.mark.exact

WEIGHTS = {"equal": (1.0, 1.0, 1.0), "uneven": (2.0, 1.0, 0.5), "signed": (1.0, -0.5, 0.25)}
DIVIDE = {"True": "weight", "False": "one"}
FUNCTION = {"dis-mean": "count", "dis-sum": "one", "dis-max": "largest"}


def on_device(x):
    return jax.tree.map(jnp.asarray, x)


def base():
    return on_device(tree("peers", "input/base"))


def tuned():
    return [on_device(tree("peers", f"input/tuned{i}")) for i in range(3)]


def task_vectors():
    """FusionBench's inputs: they are displacements, from a base of zeros."""
    return [on_device(tree("fusionbench", f"input/tau{i}")) for i in range(3)]


def zeros(like):
    return jax.tree.map(jnp.zeros_like, like)


def parsed(options):
    return dict(pair.split("=") for pair in options.split(",") if "=" in pair)


def assert_parity(got, wanted, tolerance=1e-5):
    """Every leaf within a share of its own largest entry, in float32."""
    assert got.keys() == wanted.keys()
    for leaf, array in wanted.items():
        bound = tolerance * np.abs(array).max()
        np.testing.assert_allclose(got[leaf], array, rtol=0, atol=bound, err_msg=leaf)


def mergekit(method, options):
    given = parsed(options)
    weights = WEIGHTS.get(given.get("weight"))
    match method:
        case "linear":
            return average.mean(tuned(), weights)
        case "arcee_fusion":
            return merge.arcee_fusion(base(), tuned()[0])
        case "slerp":
            return wtree.per_leaf(interpolate.slerp)(base(), tuned()[0], float(given["t"]))
        case "task_arithmetic":
            return merge.task_arithmetic(
                base(),
                tuned(),
                weights,
                **presets.mergekit[method] | {"normalize": given["normalize"] == "True"},
            )
        case "ties":
            return merge.ties(
                base(),
                tuned(),
                weights,
                density=float(given["density"]),
                scope="leaf",
                election=dataclasses.replace(
                    presets.mergekit[method]["election"],
                    divide=DIVIDE[given.get("normalize", "True")],
                ),
                scale=float(given.get("lambda", 1.0)),
            )
        case "karcher":
            return wtree.per_leaf(average.karcher_mean)(tuned()).weights
        case "model_stock":
            return average.model_stock(
                base(),
                tuned(),
                **presets.mergekit[method]
                | ({"scope": "row"} if given.get("filter_wise") == "True" else {}),
            )
        case "nuslerp":
            start, end, origin = *tuned()[:2], base() if options.endswith(",base") else None
            if origin is None:
                return wtree.per_leaf(interpolate.slerp)(start, end, 0.3)
            edits = [merge.task_vector(origin, x) for x in (start, end)]
            edit = wtree.per_leaf(interpolate.slerp)(*edits, 0.3)
            return wtree.combine((1, 1), (origin, edit))
        case "multislerp":
            return multislerp(tuned(), weights)
    raise KeyError(method)


def multislerp(points, weights):
    """The mean direction, whatever it is called, times the mean norm."""

    def of_leaf(*leaves):
        c = np.array(weights) / sum(weights)
        sizes = [float(wtree.norm(x)) for x in leaves]
        direction = wtree.combine(c / np.array(sizes), leaves)
        return wtree.combine((float(c @ sizes) / wtree.norm(direction),), (direction,))

    return jax.tree.map(of_leaf, *points)


def peft(method, options):
    given, edits = parsed(options), [merge.task_vector(base(), x) for x in tuned()]
    weights, origin = WEIGHTS[given["weight"]], zeros(base())
    match method:
        case "task_arithmetic":
            return merge.task_arithmetic(origin, edits, weights, **presets.peft["task_arithmetic"])
        case "magnitude_prune":
            kept = [merge.trim(x, float(given["density"]), scope="leaf") for x in edits]
            return merge.task_arithmetic(origin, kept, weights, **presets.peft["task_arithmetic"])
        case "ties":
            vote = {"total": "mass", "frequency": "count"}[given["majority_sign_method"]]
            election = dataclasses.replace(presets.peft[method]["election"], vote=vote)
            own = {"density": float(given["density"]), "election": election}
            return merge.ties(origin, edits, weights, **presets.peft[method] | own)
    raise KeyError(method)


def fusionbench(method, options):
    given, edits = parsed(options), task_vectors()
    if method == "ties":
        preset = presets.fusionbench[method]
        own = {
            "density": int(given["percent"]) / 100,
            "election": dataclasses.replace(
                preset["election"], divide=FUNCTION[given["merge_func"]]
            ),
            "scale": 1.0,
        }
        return merge.ties(zeros(edits[0]), edits, **preset | own)
    raise KeyError(method)


SYSTEMS = {
    "mergekit-0.1.5": ("peers", mergekit),
    "peft-0.21.2": ("peers", peft),
    "fusionbench-54c9e8c": ("fusionbench", fusionbench),
}
ELSEWHERE = {
    "breadcrumbs": "test_thinning.py: the system empties small leaves",
    "breadcrumbs_ties": "test_thinning.py",
    "nearswap": "test_masks.py",
    "iso_c": "test_spectral.py",
    "iso_cts": "test_spectral.py",
    "ram": "test_masks.py",
    "ramplus_tl": "test_masks.py",
    "sce": "test_masks.py",
    "tsv_m": "test_spectral.py",
}
HERE = [
    (system, method, options)
    for system, (name, _) in SYSTEMS.items()
    for method, found in cases(name, system).items()
    for options in found
    if method not in ELSEWHERE
]


@pytest.mark.parametrize(("system", "method", "options"), HERE)
def test_preset_gives_what_the_system_gave(system, method, options):
    name, run = SYSTEMS[system]
    assert_parity(run(method, options), tree(name, f"{system}/{method}?{options}"))


def test_default_of_every_system_is_another_function():
    edits = task_vectors()
    merged = {
        name: merge.ties(zeros(edits[0]), edits, (2, 1, 0.5), **preset | {"density": 0.5})
        for name, preset in {
            "default": {},
            **{name: system["ties"] for name, system in presets.systems.items()},
        }.items()
    }
    vectors = [np.concatenate([np.ravel(x) for x in m.values()]) for m in merged.values()]
    for i, x in enumerate(vectors):
        for y in vectors[:i]:
            assert np.linalg.norm(x - y) > 0.05 * np.linalg.norm(x)
