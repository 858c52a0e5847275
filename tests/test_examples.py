"""The experiments of the docs: they run, the pages hold what they found, their parts work."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import same_picture

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from docs.examples import access, averages, cost, guards, report, study
from docs.examples.experiments import EXPERIMENTS, draw
from wspace import average, geometry, tree

pytestmark = pytest.mark.float32(
    reason="experiments are run in float32, and so are their kept results"
)

PAGES = sorted(report.RESULTS.parents[1].glob("*.md"))


@pytest.fixture(scope="module")
def committed():
    return {name: report.load(name) for name in EXPERIMENTS}


@pytest.fixture(scope="module")
def small():
    """A small version of every experiment, run when it is asked for."""
    found = {}

    def run(name):
        if name not in found:
            found[name] = EXPERIMENTS[name].run(EXPERIMENTS[name].SMALL)
        return found[name]

    return run


def leaves(results):
    """The figures of an experiment: what is at the leaves, its settings left out."""
    return jax.tree.leaves(
        {k: x for k, x in results.items() if k not in ("settings", "on")},
        is_leaf=lambda x: isinstance(x, list),
    )


def network(seed=0, sizes=(5, 7, 6, 10)):
    """A random network with random biases."""
    weights = study.initial(jax.random.key(seed), sizes)
    noise = jax.random.normal(jax.random.key(seed + 100), (10,))
    return {name: x + noise[: x.size] if "bias" in name else x for name, x in weights.items()}


def data(seed=0, count=30, width=5):
    keys = jax.random.split(jax.random.key(seed))
    return study.Data(
        jax.random.normal(keys[0], (count, width)), jax.random.randint(keys[1], (count,), 0, 10)
    )


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs_and_has_one_figure_a_seed(name, small):
    results, size = small(name), EXPERIMENTS[name].SMALL
    assert leaves(results)
    assert all(len(x) == len(size.seeds) for x in leaves(results))
    assert np.isfinite(np.concatenate([np.ravel(x) for x in leaves(results)])).all()
    assert all("|" in x for x in EXPERIMENTS[name].tables(results).values())


def test_an_experiment_says_the_same_again(small):
    first, again = small("averages"), averages.run(averages.SMALL)
    assert first == again


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_committed_figures_are_of_five_seeds(name, committed):
    results = committed[name]
    assert list(results["settings"]["seeds"]) == [0, 1, 2, 3, 4]
    assert all(len(x) == 5 for x in leaves(results))
    assert set(results["on"]) == {"python", "jax", "processor"}


def test_the_pages_hold_the_tables_of_the_committed_figures(committed):
    tables = {name: EXPERIMENTS[name].tables(x) for name, x in committed.items()}
    places = 0
    for page in PAGES:
        text = page.read_text()
        assert report.filled(text, tables) == text
        places += len(report.TABLE.findall(text))
    assert places == sum(map(len, tables.values()))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_pictures_are_drawn_from_the_committed_figures(name, committed, tmp_path):
    draw(name, committed[name], tmp_path)
    assert list(tmp_path.iterdir())
    for file in tmp_path.iterdir():
        same_picture(report.RESULTS / file.name, file)


def test_what_weight_space_promises_holds_in_the_committed_figures(committed):
    for name in committed["access"]["settings"]["tasks"]:
        found = committed["access"][name]["guards"]
        for guard in ("random", "plain", "flattened", "flattened, not the last layer"):
            np.testing.assert_allclose(found[guard]["measures"]["margin"], guards.SHIFT, rtol=1e-3)
        for guard in ("plain", "flattened", "hull", "trained"):
            cells = {x: np.mean(y) for x, y in found[guard]["cells"].items()}
            assert cells["mean"] < 0.5 * np.mean(found["none"]["cells"]["mean"])
            assert cells["outputs"] > 0.9 * np.mean(found["none"]["cells"]["outputs"])
            assert cells["RegMean"] > 2 * cells["mean"]
        lost = committed["cost"][name]["guards"]
        assert max(lost["one source permuted"]["KL, own inputs"]) < 1e-4
        for count in ("2", "3"):
            hulls = committed["hulls"][name][count]
            for guard in ("hull, convex", "hull, affine", "hull, cheapest normal"):
                assert min(hulls[guard]["nearest, convex"]) > 0.999
            assert min(hulls["hull, affine"]["nearest, any sign"]) > 0.999


@pytest.mark.parametrize("name", study.TASKS)
def test_a_task_splits_its_data_once(name):
    task = study.TASKS[name](jax.random.key(0))
    counts = [len(part.labels) for part in (task.training, task.held_out)]
    assert counts[0] == 1400
    assert task.sizes[0] == task.training.inputs.shape[1]
    rows = np.concatenate([np.asarray(x.inputs) for x in (task.training, task.held_out)])
    labels = np.concatenate([np.asarray(x.labels) for x in (task.training, task.held_out)])
    assert set(labels) == set(range(10))
    other = study.TASKS[name](jax.random.key(1))
    again = np.concatenate([np.asarray(x.inputs) for x in (other.training, other.held_out)])
    assert not np.array_equal(rows, again)
    np.testing.assert_allclose(np.sort(rows.sum(axis=1)), np.sort(again.sum(axis=1)), rtol=1e-5)


def test_training_learns_what_it_is_shown_and_a_term_has_its_rank():
    examples, start = data(), network()
    shown = examples.of(range(5))
    options = {"steps": 60, "rate": 1e-2, "size": 10}
    whole = study.train(jax.random.key(1), start, examples, shown, **options)
    part = study.Data(*(np.asarray(x)[np.asarray(shown)] for x in examples))
    assert float(study.loss(whole, part)) < 0.7 * float(study.loss(start, part))
    thin = study.train(jax.random.key(1), start, examples, shown, rank=1, **options)
    values = np.linalg.svd(np.asarray(thin["2.weight"] - start["2.weight"]), compute_uv=False)
    assert values[0] > 100 * values[1]


def test_a_permuted_network_is_the_same_function_and_is_matched_back():
    weights, inputs = network(), data().inputs
    other = guards.permuted(jax.random.key(3), weights)
    np.testing.assert_allclose(
        study.outputs(other, inputs), study.outputs(weights, inputs), rtol=1e-4, atol=1e-4
    )
    assert float(geometry.distance(other, weights)) > 1
    found = access.matched(other, weights)
    assert all(np.array_equal(found[name], weights[name]) for name in weights)


def test_a_merge_by_gram_matrices_says_what_each_source_says_on_its_inputs():
    first, second = network(0), network(1)
    same = access.gram_weighted([first, first], [data(0).inputs, data(1).inputs])
    assert float(geometry.distance(same, first)) < 1e-2 * float(tree.norm(first))
    # Four inputs each do not fill the five inputs and the bias of the first layer.
    few = [data(0, 3).inputs, data(1, 3).inputs]
    merged = access.gram_weighted([first, second], few)
    for source, inputs in zip((first, second), few, strict=True):
        wanted = inputs @ source["1.weight"] + source["1.bias"][None]
        got = inputs @ merged["1.weight"] + merged["1.bias"][None]
        np.testing.assert_allclose(got, wanted, rtol=0.02, atol=0.02)


def test_flat_guards_move_the_mean_as_far_and_where_they_are_to():
    before = [network(0), network(1)]
    after = [network(2), network(3)]
    moved = guards.flattened(before, after, lambda name: name == "2.weight")
    shifts = [geometry.distance(average.mean(before), average.mean(x)) for x in (after, moved)]
    np.testing.assert_allclose(*shifts, rtol=1e-5)
    for x, y in zip(before, moved, strict=True):
        assert [name for name in x if not np.array_equal(x[name], y[name])] == ["2.weight"]
        edit = np.linalg.svd(np.asarray(y["2.weight"] - x["2.weight"]), compute_uv=False)
        np.testing.assert_allclose(edit, edit[0], rtol=1e-3)


def test_a_walk_by_layer_takes_each_layer_by_its_share():
    start, end = network(0), network(1)
    mixed = access.mixed(start, end, (0.0, 1.0, 0.5))
    assert np.array_equal(mixed["1.weight"], start["1.weight"])
    np.testing.assert_allclose(mixed["2.bias"], end["2.bias"], rtol=1e-5)
    np.testing.assert_allclose(
        mixed["3.weight"], (start["3.weight"] + end["3.weight"]) / 2, rtol=1e-4, atol=1e-6
    )


def test_divergence_and_calibration_are_what_they_are_called():
    weights, examples = network(), data()
    assert float(cost.divergence(weights, weights, examples.inputs)) == 0
    other = network(1)
    old, new = (
        np.asarray(jax.nn.softmax(study.outputs(x, examples.inputs)), np.float64)
        for x in (weights, other)
    )
    wanted = np.mean(np.sum(old * np.log(old / new), axis=1))
    np.testing.assert_allclose(cost.divergence(weights, other, examples.inputs), wanted, rtol=1e-4)
    sure = {"1.weight": 100 * jnp.eye(10), "1.bias": jnp.zeros(10)}
    labels = jnp.arange(10) % 5  # right on the first half, wrong on the other, always sure
    assert cost.calibration(sure, study.Data(jnp.eye(10), labels)) == pytest.approx(0.5)


def test_a_cell_is_the_mean_and_its_standard_error():
    values = [0.1, 0.2, 0.6]
    error = math.sqrt(sum((x - 0.3) ** 2 for x in values) / 2 / 3)
    assert report.cell(values) == f"0.30 ± {error:.2f}"


def test_tables_are_put_in_their_places_and_nowhere_else():
    page = "a\n<!-- table x: one -->\n\nold\n\n<!-- end -->\nb <!-- table y: z -->\n\n<!-- end -->"
    filled = report.filled(page, {"x": {"one": "| new |"}})
    assert filled == page.replace("old", "One.\n{ .caption }\n\n| new |")
