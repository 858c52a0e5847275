"""A NaN of a model is not lost in a merge: no comparison tells it, so none may decide over it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wspace import checkpoint, merge, tree

KEY = jax.random.key(0)
RNG = np.random.default_rng(3)
BASE = {"w": RNG.normal(size=(6, 5)).astype(np.float32)}
TUNED = [{"w": (BASE["w"] + 0.1 * RNG.normal(size=(6, 5))).astype(np.float32)} for _ in range(3)]
PLACES = (1, 2), (4, 4)

ELECTIONS = {
    f"{vote} {zero} {divide} {weighted}": merge.Election(vote, weighted, zero, divide)
    for vote, zero, divide, weighted in (
        ("mass", "zero", "count", True),
        ("mass", "plus", "weight", False),
        ("count", "majority", "one", True),
        ("count", "zero", "largest", False),
        ("mass", "majority", "largest", True),
    )
}

MERGES = {
    "trimmed": lambda b, xs: merge.ties(b, xs, density=0.05),
    "trimmed by leaf": lambda b, xs: merge.ties(b, xs, density=0.04, scope="leaf"),
    "trimmed by row": lambda b, xs: merge.ties(b, xs, density=0.05, scope="row"),
    "dropped": lambda b, xs: merge.dare(KEY, b, xs, density=0.1),
    "dropped, elected": lambda b, xs: merge.dare_ties(KEY, b, xs, density=0.1),
    "pruned": lambda b, xs: merge.della(KEY, b, xs, density=0.2),
    "banded": lambda b, xs: merge.breadcrumbs(b, xs, density=0.5, outliers=0.3),
    "banded by row": lambda b, xs: merge.breadcrumbs_ties(
        b, xs, density=0.4, outliers=0.4, scope="row"
    ),
    "changed": lambda b, xs: merge.ram(b, xs, threshold=0.01, relative=False),
    "changed, relative": lambda b, xs: merge.ram(b, xs),
    "largest": merge.magmax,
    "consensus": merge.negmerge,
    "one task": lambda b, xs: merge.emr_model(b, merge.emr(b, xs), 0),
    "competition": merge.pcb,
    "clipped": lambda b, xs: merge.nearswap(b, xs[0], 0.01),
    "fused": lambda b, xs: merge.arcee_fusion(b, xs[0]),
    **{
        name: lambda b, xs, election=election: merge.ties(b, xs, density=1.0, election=election)
        for name, election in ELECTIONS.items()
    },
}
OF_FIRST = "clipped", "fused"


def broken(which):
    tuned = [dict(x) for x in TUNED]
    tuned[which] = {"w": tuned[which]["w"].copy()}
    for place in PLACES:
        tuned[which]["w"][place] = np.nan
    return tuned


@pytest.mark.parametrize("name", MERGES)
def test_a_nan_of_any_model_stays_nan_in_every_merge(name):
    compiled = jax.jit(MERGES[name])
    for which in (0,) if name in OF_FIRST else (0, 2):
        for function in (MERGES[name], compiled):
            merged = np.asarray(function(BASE, broken(which))["w"])
            assert all(np.isnan(merged[place]) for place in PLACES)


@pytest.mark.parametrize("name", ["trimmed", "largest", "consensus", "changed", *ELECTIONS])
def test_where_no_model_is_nan_nothing_is(name):
    merged = np.asarray(MERGES[name](BASE, broken(1))["w"])
    places = np.zeros_like(merged, bool)
    for place in PLACES:
        places[place] = True
    np.testing.assert_array_equal(np.isnan(merged), places)


@pytest.mark.parametrize("name", ["trimmed", "dropped, elected", "largest", "consensus", "banded"])
def test_a_nan_stays_nan_in_files(name, tmp_path):
    for i, weights in enumerate([BASE, *broken(2)]):
        checkpoint.save(tmp_path / f"{i}.safetensors", weights)
    opened = [checkpoint.open(tmp_path / f"{i}.safetensors") for i in range(4)]
    with checkpoint.create(tmp_path / "out.safetensors", opened[0]) as writer:
        checkpoint.stream(lambda xs: MERGES[name](xs[0], xs[1:]), opened, writer, lazy=True)
    merged = np.asarray(checkpoint.load(tmp_path / "out.safetensors")["w"])
    assert all(np.isnan(merged[place]) for place in PLACES)
    for one in opened:
        one.close()


def test_infinite_entries_of_two_signs_are_no_nan_where_models_disagree():
    tuned = [jnp.array([jnp.inf, 1.0]), jnp.array([-jnp.inf, 1.0])]
    np.testing.assert_array_equal(merge.negmerge(jnp.zeros(2), tuned), [0.0, -1.0])


def test_the_parts_keep_nan():
    x = {"w": jnp.array([3.0, jnp.nan, 1.0, jnp.nan])}
    for thinned in (
        merge.trim(x, 0.25),
        merge.band(x, 0.25, 0.5),
        merge.drop(KEY, x, 0.01),
        merge.disjoint_merge([x, x], tree.combine((0.0,), ({"w": jnp.ones(4)},))),
    ):
        assert np.isnan(np.asarray(thinned["w"])[[1, 3]]).all()
