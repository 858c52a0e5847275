"""The commands do what the functions do, bit for bit; what they refuse, they refuse in words."""

import hashlib
import inspect
import json
import re
import signal
import subprocess
import sys
import threading
import types
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import wspace
from tests.catalog import CASES
from wspace import (
    _lazy,
    average,
    checkpoint,
    geometry,
    interpolate,
    lowrank,
    merge,
    negative,
    tree,
)
from wspace.__main__ import main
from wspace._cli import adapters, jobs, methods, progress, recipes, signatures
from wspace._cli.words import Parser, size
from wspace.checkpoint.writer import Writer
from wspace.selection import top

LAYOUT = {
    "steps": ((2,), np.int64),
    "up.weight": ((4, 3), np.float32),
    "up.bias": ((4,), np.float32),
    "embed.weight": ((5, 4), ml_dtypes.bfloat16),
}
SPREAD = {"BASE": 0.0, "A": 0.1, "C": 0.2, "P": 0.3}


def written(path, seed, spread, layout=LAYOUT):
    common, own = np.random.default_rng(0), np.random.default_rng(seed)
    shapes = {name: np.zeros(shape, dtype) for name, (shape, dtype) in layout.items()}
    with checkpoint.create(path, shapes, metadata={"format": "pt"}) as writer:
        for name, (shape, dtype) in layout.items():
            x = common.normal(size=shape) + spread * own.normal(size=shape)
            writer.write(name, np.full(shape, 7, dtype) if dtype == np.int64 else x.astype(dtype))
        if path.suffix != ".safetensors":
            writer.add("config.json", b'{"layers": 1}')


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with four models, in which the commands run."""
    for i, (name, spread) in enumerate(SPREAD.items()):
        written(tmp_path / name, i, spread)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def points():
    return {name: weights(name) for name in SPREAD}


def weights(path):
    with checkpoint.open(path) as opened:
        return {
            name: jnp.array(x.read()) for name, x in opened.items() if x.dtype != np.dtype("int64")
        }


def run(*words):
    """The exit code of a command, in words or in strings of them."""
    try:
        return main([part for word in words for part in str(word).split()])
    except SystemExit as stop:
        return stop.code


def assert_same(path, wanted):
    """Asserts that a checkpoint holds a tree, bit for bit, and the integers of the models."""
    with checkpoint.open(path) as opened:
        assert list(opened) == list(checkpoint.open("A"))
        assert opened["steps"].read().tolist() == [7, 7]
    found = weights(path)
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert found[name].dtype == x.dtype, name
        assert found[name].tobytes() == np.asarray(x).tobytes(), name


KEY = jax.random.key(3)
NAMES = ("BASE", "A", "C")


def of_catalog(case):
    """The function of a case on the models that its command names."""
    return lambda m: case.function(*(vars(m)[name] for name in NAMES[: case.trees]))


MERGES = {case.command.format(*NAMES): of_catalog(case) for case in CASES if case.command} | {
    "linear A C": lambda m: average.mean([m.A, m.C]),
    "lerp A C --t 1.25": lambda m: interpolate.lerp(m.A, m.C, 1.25),
    "slerp A C --t 0.5 --scope leaf": lambda m: tree.per_leaf(interpolate.slerp)(m.A, m.C, 0.5),
    "slerp A C --t 0.3 --preset mergekit-0.1.5": lambda m: tree.per_leaf(interpolate.slerp)(
        m.A, m.C, 0.3
    ),
    "median A C P --max-steps 3": lambda m: (
        average.geometric_median([m.A, m.C, m.P], max_steps=3).weights
    ),
    "model_stock A C --base BASE --preset mergekit-0.1.5": lambda m: average.model_stock(
        m.BASE, [m.A, m.C], **merge.presets.mergekit["model_stock"]
    ),
    "task_arithmetic A C --base BASE --coefficients 1 -0.5 --scale 0.7": lambda m: (
        merge.task_arithmetic(m.BASE, [m.A, m.C], [1.0, -0.5], scale=0.7)
    ),
    "ties A C --base BASE --density 0.2 0.5": lambda m: merge.ties(
        m.BASE, [m.A, m.C], density=(0.2, 0.5)
    ),
    "ties A C --base BASE --coefficients 2 0.5 --preset mergekit-0.1.5 --no-weighted": (
        lambda m: merge.ties(
            m.BASE,
            [m.A, m.C],
            [2.0, 0.5],
            density=1.0,
            scope="leaf",
            election=merge.Election(weighted=False, zero="plus", divide="weight"),
        )
    ),
    "dare A C --base BASE --seed 3": lambda m: merge.dare(KEY, m.BASE, [m.A, m.C]),
    "dare_ties A C --base BASE --seed 3 --zero majority": lambda m: merge.dare_ties(
        KEY, m.BASE, [m.A, m.C], election=merge.Election(zero="majority")
    ),
    "della A C --base BASE --seed 3 --scope row": lambda m: merge.della(
        KEY, m.BASE, [m.A, m.C], scope="row"
    ),
    "breadcrumbs A C --base BASE --scope leaf": lambda m: merge.breadcrumbs(
        m.BASE, [m.A, m.C], scope="leaf"
    ),
    "nearswap A --base BASE --threshold 0.01": lambda m: merge.nearswap(m.BASE, m.A, 0.01),
    "tsv_m A C P --base BASE": lambda m: merge.tsv_m(m.BASE, [m.A, m.C, m.P]).weights,
    "knots A C --base BASE --layout out_in": lambda m: merge.knots(
        m.BASE, [m.A, m.C], layout="out_in"
    ),
    "knots A C --base BASE --scale 0.5": lambda m: merge.knots(m.BASE, [m.A, m.C], scale=0.5),
}


def test_every_method_is_run():
    assert {methods.found("merge", words.split()[0]) for words in MERGES} == set(
        methods.TABLES["merge"]
    )


@pytest.mark.parametrize("words", MERGES)
def test_a_merge_is_the_function_bit_for_bit(words, points, capsys):
    assert run("merge", words, "-o", "OUT", "--quiet") == 0, capsys.readouterr().err
    assert_same("OUT", MERGES[words](SimpleNamespace(**points)))
    assert capsys.readouterr().err == ""


def is_lazy(words):
    return methods.TABLES["merge"][methods.found("merge", words.split()[0])].entry.lazy


@pytest.mark.parametrize("words", [words for words in MERGES if is_lazy(words)])
def test_a_merge_in_pieces_is_the_same(words, points, monkeypatch):
    monkeypatch.setattr(_lazy, "_LARGEST", 5)
    monkeypatch.setattr(top, "SMALL", 0)
    monkeypatch.setattr(top, "FEW", 0)
    assert run("merge", words, "-o", "OUT") == 0
    assert_same("OUT", MERGES[words](SimpleNamespace(**points)))


def test_repel_is_the_function(points):
    assert run("steer", "repel", "C", "--avoid", "P", "--strength", "0.5", "-o", "OUT") == 0
    assert_same("OUT", negative.repel(points["C"], points["P"], 0.5))


@pytest.mark.parametrize(
    ("words", "function"),
    [
        ("retarget A C --target P", lambda a, c, p: negative.retarget([a, c], [1, 1], p)),
        (
            "exit A C --avoid P --radius 9 --coefficients 3 1",
            lambda a, c, p: negative.exit_ball([a, c], [3.0, 1.0], p, 9.0),
        ),
        (
            "guard A C --avoid P --radius 2 --mode affine --costs 1 2",
            lambda a, c, p: negative.guard_hull([a, c], p, 2.0, mode="affine", costs=[1.0, 2.0]),
        ),
    ],
)
def test_steering_several_writes_a_folder_for_each(words, function, points):
    assert run("steer", words, "-o", "OUT") == 0
    for name, wanted in zip("AC", function(*(points[x] for x in "ACP")), strict=True):
        assert_same(f"OUT/{name}", wanted)


def difference(x, y):
    return tree.combine((1.0, -1.0), (x, y), rounded=False)


AIMS = {
    "--towards C": lambda m: difference(m["C"], m["P"]),
    "--away-from C": lambda m: difference(m["P"], m["C"]),
    "--{} C": lambda m: m["C"],
}


@pytest.mark.parametrize("aim", AIMS)
@pytest.mark.parametrize("method", ["exit", "guard"])
def test_a_direction_is_given_by_a_model(method, aim, points):
    name = {"exit": "direction", "guard": "normal"}[method]
    words = f"steer {method} A BASE --avoid P --radius 9 {aim.format(name)} -o OUT --quiet"
    assert run(words) == 0
    given, ends = {name: AIMS[aim](points)}, [points["A"], points["BASE"]]
    wanted = (
        negative.exit_ball(ends, [1.0, 1.0], points["P"], 9.0, **given)
        if method == "exit"
        else negative.guard_hull(ends, points["P"], 9.0, **given)
    )
    for folder, one in zip(("A", "BASE"), wanted, strict=True):
        for key, x in weights(f"OUT/{folder}").items():
            np.testing.assert_allclose(
                np.float32(x), np.float32(one[key]), rtol=1e-2 if x.dtype != "float32" else 1e-5
            )
    recipe = json.loads(checkpoint.open("OUT/A").metadata["wspace"])["recipe"]
    assert recipe[aim.format(name).split()[0][2:].replace("-", "_")] == "C"


def test_where_a_direction_is_asked_for_the_options_are_named(capsys):
    words = "steer exit A --avoid A --radius 1 -o OUT --quiet"
    assert run(words) == 1
    told = capsys.readouterr().err
    assert "--towards" in told
    assert "--away-from" in told
    assert run(words, "--towards C") == 0
    assert run("steer guard A --avoid A --radius 1 -o OUT2 --quiet") == 1
    assert "--towards" in capsys.readouterr().err
    assert run("steer guard A --avoid A --radius 1 --away-from C -o OUT2 --quiet") == 0
    assert run(words, "--towards C --direction P --force") == 2
    assert "give one of them" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["offset A --target C", "extract A C"])
def test_an_adapter_is_the_nearest_of_its_rank_and_its_tails_are_printed(words, points, capsys):
    assert run(words, "--rank", 2, "--embeddings", "embed.*", "-o", "OUT") == 0
    told = capsys.readouterr().out
    a, c = ({k: x for k, x in points[p].items() if k.endswith("weight")} for p in "AC")
    cut = negative.offset(a, c, 2)
    edit = checkpoint.load_adapter("OUT", a)
    for name, wanted in lowrank.apply(a, cut.factors).items():
        np.testing.assert_array_equal(lowrank.apply(a, edit)[name], wanted)
    said = json.loads((checkpoint.open("A").path.parent / "OUT" / "wspace.json").read_text())
    tails = said["certificates"]["tails"]
    assert sum(tails[x] ** 2 for x in a) == pytest.approx(float(cut.tail) ** 2, rel=1e-4)
    bias = float(geometry.distance(points["A"]["up.bias"], points["C"]["up.bias"]))
    assert tails["up.bias"] == pytest.approx(bias)
    assert re.search(r"^up\.bias +4 +0 .* 100\.0%$", told, re.MULTILINE)
    assert f"{said['certificates']['tail']:.4g}" in told.splitlines()[-1]


def test_an_adapter_says_which_model_it_is_of(folder):
    assert run("extract A C --rank 1 -o plain --quiet") == 0
    words = "extract A C --rank 1 -o named --base-name org/model --task-type CAUSAL_LM --quiet"
    assert run(words) == 0
    for name, wanted in (("plain", [None, None]), ("named", ["org/model", "CAUSAL_LM"])):
        config = json.loads((folder / name / "adapter_config.json").read_text())
        assert [config[field] for field in ("base_model_name_or_path", "task_type")] == wanted
        recipe = json.loads((folder / name / "wspace.json").read_text())["recipe"]
        assert [recipe.get(field) for field in ("base_name", "task_type")] == wanted


def test_adapters_are_not_replaced_unless_forced(capsys):
    words = "extract A C --rank 1 -o OUT"
    assert [run(words), run(words), run(words, "--force")] == [0, 1, 0]
    told = capsys.readouterr().err
    assert "OUT exists: give another path, or --force" in told
    assert "replaces OUT/adapter_model.safetensors, OUT/adapter_config.json" in told


@pytest.mark.parametrize("words", ["--energy 0.7", "--tail 0.15", "--energy 0.9 --rank 1"])
def test_the_rank_of_an_adapter_is_the_least_by_energy_or_tail(words, points):
    assert run("extract A C", words, "--embeddings embed.* -o OUT --quiet") == 0
    a, c = ({k: x for k, x in points[p].items() if k.endswith("weight")} for p in "AC")
    edit = checkpoint.load_adapter("OUT", a)
    for name, x in a.items():
        values = np.linalg.svd(np.float64(c[name]) - np.float64(x), compute_uv=False)
        tails = np.sqrt(np.append(np.cumsum(values[::-1] ** 2)[::-1], 0))
        shares = 1 - tails**2 / tails[0] ** 2
        rank = np.argmax(tails <= 0.15 if "tail" in words else shares >= float(words.split()[1]))
        assert edit[name].rank == min(rank, 1 if "rank" in words else 9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "give --rank, --energy or --tail"),
        ("--energy 0.5 --tail 1", "give one of them"),
        ("--energy 0", "must be in (0, 1]"),
        ("--tail -1", "must be at least 0"),
    ],
)
def test_an_adapter_of_no_rank_is_refused(words, message, capsys):
    assert run("extract A C -o OUT", words) == 2
    assert message in capsys.readouterr().err


def test_large_matrices_are_cut_by_the_randomized_method(capsys, monkeypatch):
    monkeypatch.setattr(adapters, "_LARGE", 4)
    monkeypatch.setattr(adapters, "_FEW", 4)
    seen = []
    truncate = lowrank.truncate

    def told(*arguments, **options):
        seen.append(options.get("method", "exact"))
        return truncate(*arguments, **options)

    monkeypatch.setattr(lowrank, "truncate", told)
    assert run("extract A C --rank 1 -o OUT --dry-run") == 0
    assert "1 of them by the randomized method" in capsys.readouterr().out
    assert run("extract A C --rank 1 -o OUT --quiet") == 0
    assert run("extract A C --rank 1 -o EXACT --quiet --exact") == 0
    assert sorted(seen) == ["exact"] * 3 + ["randomized"]


def test_an_adapter_that_was_interrupted_goes_on_with_what_was_cut(folder, monkeypatch, capsys):
    cut, cuts = adapters._cut, []

    def stops(job, tensor, *sources):
        cuts.append(tensor.name)
        if len(cuts) == 3:
            raise KeyboardInterrupt
        return cut(job, tensor, *sources)

    words = "extract A C --rank 2 --quiet -o"
    assert run(words, "WHOLE") == 0
    monkeypatch.setattr(adapters, "_cut", stops)
    assert run(words, "OUT") == 1
    assert "run it again to go on" in capsys.readouterr().err
    assert run("extract A C --rank 1 -o OUT --dry-run") == 0
    assert ".OUT." in capsys.readouterr().out
    assert run(words, "OUT") == 0
    assert sorted(cuts) == sorted([*{*cuts}, cuts[2]])  # but for that at which it stopped, once
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "OUT" / name).read_bytes() == (folder / "WHOLE" / name).read_bytes()
    assert not [x for x in folder.iterdir() if x.name.startswith(".")]
    said = json.loads((folder / "OUT" / "wspace.json").read_text())
    assert (
        said["certificates"]
        == json.loads((folder / "WHOLE" / "wspace.json").read_text())["certificates"]
    )


def test_embeddings_by_usual_names_are_kept_as_such_and_others_are_named(folder, capsys):
    layout = {
        "model.embed_tokens.weight": ((5, 3), np.float32),
        "model.my_embedder.weight": ((4, 3), np.float32),
        "model.up.weight": ((4, 3), np.float32),
    }
    for i, name in enumerate(("X", "Y")):
        written(folder / name, i, 0.1, layout)
    assert run("extract X Y --rank 3 -o OUT --quiet") == 0
    told = capsys.readouterr().err
    assert "kept as embeddings: model.embed_tokens.weight" in told
    assert "kept as linear layers: model.my_embedder.weight" in told
    assert {x.split(".")[-1] for x in checkpoint.open("OUT/adapter_model.safetensors")} == {
        "lora_embedding_A",
        "lora_embedding_B",
        "weight",
    }


def test_a_difference_that_is_not_finite_is_refused_by_the_name_of_its_tensor(folder, capsys):
    layout = {"one.weight": ((4, 3), np.float32), "two.bias": ((2,), np.float32)}
    for i, name in enumerate(("X", "Y")):
        written(folder / name, i, np.inf if i else 0.1, layout)
    assert run("extract X Y --rank 1 -o OUT --quiet") == 1
    assert "at tensor 'one.weight'" in capsys.readouterr().err


def test_distances_and_angles_are_those_of_geometry(points, capsys):
    assert run("distance", "A", "C", "P", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    a, c = points["A"], points["C"]
    assert said["norms"][0] == pytest.approx(float(tree.norm(a)), rel=1e-5)
    assert said["distances"][0][1] == pytest.approx(float(geometry.distance(a, c)), rel=1e-5)
    angle = np.degrees(float(geometry.angle(a, c)))
    assert said["angles_in_degrees"][1][0] == pytest.approx(angle, rel=1e-4)
    np.testing.assert_allclose(said["gram"], geometry.gram([*map(points.get, "ACP")]), rtol=1e-5)
    own = said["tensors"]["up.bias"]["distances"][0][2]
    assert own == pytest.approx(float(jnp.linalg.norm(a["up.bias"] - points["P"]["up.bias"])))
    assert run("distance", "A", "C") == 0
    table = capsys.readouterr().out
    assert f"{said['distances'][0][1]:.6g}" in table
    assert "embed.weight" in table


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 2.0, 1e9])
def test_angles_of_points_of_any_scale_are_those_of_longdouble(scale, folder, capsys):
    random = np.random.default_rng(0)
    x = {str(i): random.normal(size=(7, 5)).astype(np.float32) for i in range(3)}
    y = {k: np.float32(scale * (v + 0.4 * random.normal(size=v.shape))) for k, v in x.items()}
    for name, points in (("X", x), ("Y", y)):
        checkpoint.save(folder / f"{name}.safetensors", points)
    assert run("distance X.safetensors Y.safetensors --json") == 0
    said = json.loads(capsys.readouterr().out)

    def angle(*keys):
        u, v = (np.concatenate([np.longdouble(p[k]).ravel() for k in keys]) for p in (x, y))
        u, v = u / np.sqrt(u @ u), v / np.sqrt(v @ v)
        return np.degrees(2 * np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v)))

    for key, tensor in said["tensors"].items():
        assert tensor["angles_in_degrees"][0][1] == pytest.approx(float(angle(key)), rel=1e-6)
    assert said["angles_in_degrees"][1][0] == pytest.approx(float(angle(*x)), rel=1e-6)
    assert said["norms"][1] == pytest.approx(
        float(np.sqrt(sum((np.longdouble(v) ** 2).sum() for v in y.values()))), rel=1e-12
    )


def test_what_is_undefined_is_null(folder, capsys):
    checkpoint.save(folder / "X.safetensors", {"w": np.array([1, np.nan], np.float32)})
    checkpoint.save(folder / "Y.safetensors", {"w": np.array([1, 2], np.float32)})
    assert run("distance X.safetensors Y.safetensors --json") == 0
    said = json.loads(capsys.readouterr().out)
    for part in (said, said["tensors"]["w"]):
        assert part["norms"][0] is None
        assert part["distances"][0][1] is None
        assert part["angles_in_degrees"][0][1] is None


def test_a_record_is_json_whatever_was_certified(folder, monkeypatch):
    monkeypatch.setattr(jobs.Call, "certificates", lambda _: {"residual": np.nan, "steps": 3})
    assert run("merge linear A C -o OUT --quiet") == 0

    def refuse(constant):
        raise AssertionError(constant)

    text = (folder / "OUT" / "wspace.json").read_text()
    said = json.loads(text, parse_constant=refuse)
    assert said["certificates"] == {"residual": None, "steps": 3}


def test_a_small_angle_is_not_lost(folder, capsys):
    x = np.ones((50, 50), np.float32)
    y = x.copy()
    y[0, 0] += 1e-3
    for name, array in (("x", x), ("y", y)):
        checkpoint.save(folder / f"{name}.safetensors", {"w": array})
    assert run("distance", "x.safetensors", "y.safetensors", "--json") == 0
    found = json.loads(capsys.readouterr().out)["angles_in_degrees"][0][1]
    x, y = (v.astype(np.longdouble).reshape(-1) for v in (x, y))
    size = np.linalg.norm
    wanted = 2 * np.arctan2(size(x / size(x) - y / size(y)), size(x / size(x) + y / size(y)))
    assert found == pytest.approx(float(np.degrees(wanted)), rel=1e-3)


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1.0, 1e4])
def test_an_angle_does_not_hang_on_the_lengths(folder, capsys, scale):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 20)).astype(np.float32)
    y = (scale * (x + 0.3 * rng.normal(size=(2, 20)))).astype(np.float32)
    for name, (one, two) in (("x", x), ("y", y)):
        checkpoint.save(folder / f"{name}.safetensors", {"v": one, "w": two})
    assert run("distance", "x.safetensors", "y.safetensors", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    found = [said, *said["tensors"].values()]
    for (a, b), told in zip([(x.ravel(), y.ravel()), *zip(x, y, strict=True)], found, strict=True):
        a, b = a.astype(np.float64), b.astype(np.float64)
        cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
        wanted = np.degrees(np.arccos(cosine))
        assert told["angles_in_degrees"][0][1] == pytest.approx(wanted, rel=1e-5)


def test_the_angle_to_zero_is_zero(folder, capsys):
    for name, x in (("x", np.zeros(3)), ("y", np.array([0.1, 0.2, 0.3]))):
        checkpoint.save(folder / f"{name}.safetensors", {"w": x.astype(np.float32)})
    assert run("distance x.safetensors y.safetensors --json") == 0
    assert json.loads(capsys.readouterr().out)["angles_in_degrees"] == [[0, 0], [0, 0]]


def test_inspect_says_what_is_there(capsys):
    assert run("inspect", "A", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["tensors"]["embed.weight"] == {"dtype": "bfloat16", "shape": [5, 4], "bytes": 40}
    assert (said["elements"], said["bytes"]) == (2 + 12 + 4 + 20, 16 + 48 + 16 + 40)
    assert said["others"] == ["config.json"]
    assert run("inspect", "A") == 0
    table = capsys.readouterr().out
    assert re.search(r"^embed\.weight +bfloat16 +5 x 4 +40 B$", table, re.MULTILINE)


def test_audit_is_the_function(points, capsys):
    words = "audit A C --avoid P --radius 1 --coefficients 2 1"
    assert run(words, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    report = negative.audit([points["A"], points["C"]], [2.0, 1.0], points["P"], 1.0)
    assert said["margin"] == pytest.approx(float(report.margin))
    assert said["rank_needed"] == int(report.rank_needed)
    assert said["frobenius_budget"][0] is None
    assert [leaf["path"] for leaf in said["leaves"]] == [leaf.path for leaf in report.leaves]
    assert run(words) == 0
    assert capsys.readouterr().out == f"{report}\n"


def test_a_file_is_written_as_one_and_a_folder_with_shards(folder, points):
    assert run("merge", "linear", "A", "C", "-o", "one.safetensors") == 0
    assert_same("one.safetensors", average.mean([points["A"], points["C"]]))
    assert run("merge", "linear", "A", "C", "-o", "OUT", "--shard-size", "50B") == 0
    assert (folder / "OUT" / "model.safetensors.index.json").exists()
    assert (folder / "OUT" / "config.json").read_bytes() == b'{"layers": 1}'
    assert weights("OUT").keys() == points["A"].keys()


def test_float64_is_not_rounded(folder):
    layout = {"w": ((3, 2), np.float64), "steps": ((1,), np.int64)}
    for i, name in enumerate("xy"):
        written(folder / name, i, 1.0, layout)
    assert run("merge", "lerp", "x", "y", "--t", "0.25", "-o", "OUT") == 0
    x, y, out = (checkpoint.open(folder / name)["w"].read() for name in ("x", "y", "OUT"))
    np.testing.assert_allclose(out, 0.75 * x + 0.25 * y, rtol=1e-15)


def test_the_record_is_in_the_metadata_and_beside(folder):
    assert run("merge", "karcher", "A", "C", "P", "-o", "OUT") == 0
    beside = json.loads((folder / "OUT" / "wspace.json").read_text())
    metadata = checkpoint.open("OUT").metadata
    assert metadata["format"] == "pt"
    assert json.loads(metadata["wspace"]) == {k: beside[k] for k in beside if k != "certificates"}
    assert beside["recipe"]["models"] == ["A", "C", "P"]
    assert beside["versions"]["jax"] == jax.__version__
    assert beside["certificates"]["converged"] is True
    keys = [set(x) for x in beside["inputs"]]
    assert keys == [{"path", "blake2b_of_headers_states_and_samples"}] * 3
    file = folder / "A" / "model.safetensors"
    content, state = file.read_bytes(), file.stat()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    seen = [state.st_ino, state.st_mtime_ns, state.st_ctime_ns]
    hashed = header + f"{file.name} {state.st_size} {seen}".encode() + 16 * content  # all of it
    wanted = hashlib.blake2b(hashed, digest_size=16).hexdigest()
    assert beside["inputs"][0]["blake2b_of_headers_states_and_samples"] == wanted
    assert run("merge", "linear", "A", "-o", "FULL", "--hash") == 0
    assert "blake2b_of_files" in (folder / "FULL" / "wspace.json").read_text()


def test_a_dry_run_says_the_plan_and_writes_nothing(folder, capsys):
    before = sorted(folder.iterdir())
    words = "merge ties A C --base BASE --density 0.2 -o OUT --dry-run"
    assert run(words) == 0
    told = capsys.readouterr().out
    assert re.search(r"density +0\.2$", told, re.MULTILINE)
    assert re.search(r"reads +360 B, and more for the sums$", told, re.MULTILINE)
    assert re.search(r"writes +120 B$", told, re.MULTILINE)
    assert "sums or counts over the whole models first" in told
    assert run(words, "--scope", "leaf") == 0
    assert "piece by piece, in the memory of a few pieces" in capsys.readouterr().out
    for vote, how in (("plus", "piece by piece"), ("majority", "over the whole models first")):
        assert run("merge dare_ties A C --base BASE --zero", vote, "-o OUT --dry-run") == 0
        assert how in capsys.readouterr().out
    assert run("merge ties A C --base BASE --preset mergekit-0.1.5 -o OUT --dry-run") == 0
    assert "piece by piece" in capsys.readouterr().out
    assert run("merge slerp A C --t 0.5 -o OUT --dry-run") == 0
    assert re.search(r"reads +240 B, and more", capsys.readouterr().out, re.MULTILINE)
    assert run("merge knots A C --base BASE -o OUT --dry-run") == 0
    assert "tensor by tensor, in the memory of a few tensors" in capsys.readouterr().out
    assert run("merge linear A C -o OUT --hash --dry-run") == 0
    assert re.search(r"reads +480 B$", capsys.readouterr().out, re.MULTILINE)
    assert sorted(folder.iterdir()) == before


BAD = {
    "merge linear A C": (2, "required: -o/--output"),
    "merge linear A C --coeficients 1 2 -o OUT": (2, "did you mean --coefficients?"),
    "merge linear A C --coefficients 1 x -o OUT": (2, "'x' is no finite number"),
    "merge linear A C --coefficients 1 nan -o OUT": (2, "'nan' is no finite number"),
    "merge linear A C --coefficients 1 -o OUT": (2, "1 numbers for 2 points"),
    "merge linear A C --coefficients 1 -1 -o OUT": (2, "make it differ from zero"),
    "merge linaer A C -o OUT": (2, "did you mean linear?"),
    "merge slerp A C P --t 0.5 -o OUT": (2, "slerp takes 2 model(s), got 3"),
    "merge slerp A C -o OUT": (2, "required: --t"),
    "merge ties A C -o OUT": (2, "required: --base"),
    "merge ties A C --base BASE --density 0.2 0.2 0.2 -o OUT": (2, "3 numbers for 2 models"),
    "merge median A C --preset mergekit-0.1.5 -o OUT": (2, "there is no option --preset"),
    "merge ties A C --base BASE --preset peft-0.21.2 -o OUT": (
        2,
        "density must be a real number above 0",
    ),
    "merge ties A C --base BASE --density 2 -o OUT": (2, "density must be above 0 and at most 1"),
    "merge ties A C --base BASE --scope lef -o OUT": (2, "choose from"),
    "merge linear A C -o OUT --shard-size 3apples": (2, "'3apples'"),
    "merge linear A C -o A": (2, "overlap"),
    "merge linear A C -o A/inner": (2, "overlap"),
    "merge linear A C -o .": (2, "overlap"),
    "mrge": (2, "did you mean merge?"),
    "merge": (2, "give a method"),
    "merge linear A --quiet C -o OUT": (2, "C has no meaning here: models come before"),
    "steer": (2, "give a method"),
    "steer exit A C --avoid P --radius 0 -o OUT": (2, "radius"),
    "steer exit A C --avoid P --radius 1 -o OUT.safetensors": (2, "give a folder"),
    "offset A --target C --rank 0 -o OUT": (2, "at least 1"),
    "extract A C --rank 1 --embeddings nothing.* -o OUT": (2, "matches no matrix"),
    "extract A C --rank 1 --task-type causal -o OUT": (
        2,
        "one of SEQ_CLS, SEQ_2_SEQ_LM, CAUSAL_LM",
    ),
    "extract A C --rank 1 --base-name= -o OUT": (2, "--base-name is empty"),
    "extract A A --rank 1 -o OUT": (1, "differ in no matrix"),
    "merge linear A B -o OUT": (1, "B"),
    "merge linear A OTHER -o OUT": (1, "the nearest name there is 'up.weights'"),
    "merge linear A WIDE -o OUT": (1, "has shape (4, 3) in A and (4, 5)"),
    "merge linear A STEPS -o OUT": (1, "'steps'"),
    "merge linear A torn.safetensors -o OUT": (1, "torn.safetensors"),
    "merge linear A pickle.bin -o OUT": (1, "never read"),
    "merge linear A C -o P": (1, "P exists: give another path, or --force"),
    "merge linear A C -o no/such/OUT": (1, "no/such"),
    "merge linear A C -o OUT.bin": (1, "give such as OUT.safetensors"),
    "merge linear A C -o OUT.bin --dry-run": (1, "give such as OUT.safetensors"),
    "steer exit A C --avoid P --radius 1 -o OUT.pt": (1, "is a folder, whose name ends in no"),
    "extract A C --rank 1 -o OUT.bin": (1, "is a folder, whose name ends in no"),
    "inspect nowhere": (1, "nowhere"),
    "audit A C --avoid P --radius 1 --coefficients 1": (2, "1 coefficients for 2 models"),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_refused_in_a_paragraph_and_leaves_nothing(
    words, folder, capsys, pytestconfig
):
    layouts = {
        "OTHER": {k.replace("up.weight", "up.weights"): v for k, v in LAYOUT.items()},
        "WIDE": LAYOUT | {"up.weight": ((4, 5), np.float32)},
        "STEPS": LAYOUT | {"steps": ((2,), np.float32)},
    }
    for name, layout in layouts.items():
        written(folder / name, 5, 0.1, layout)
    whole = (folder / "A" / "model.safetensors").read_bytes()
    (folder / "torn.safetensors").write_bytes(whole[:-1])
    (folder / "pickle.bin").write_bytes(b"\x80")
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    code, message = BAD[words]
    assert run(words) == code
    told = capsys.readouterr()
    # Where signatures are checked, that comes first.
    typed = pytestconfig.getoption("jaxtyping_packages") and "Type-check error" in told.err
    assert typed or message in told.err
    assert told.err.count("\n") == 1
    assert told.err.startswith("wspace")
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_a_method_that_fails_on_the_way_leaves_nothing(folder, capsys):
    before = sorted(folder.iterdir())
    assert run("merge tsv_m", "A " * 9, "--base BASE -o OUT") == 1
    assert "singular values for 9 models" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_an_error_that_would_come_again_leaves_nothing_though_tensors_are_finished(
    folder, monkeypatch
):
    write, before, written = Writer._write, sorted(folder.iterdir()), threading.Event()

    def fails(self, name, start, array):
        if name == "up.bias":
            assert written.wait(60)
            raise ValueError("no such merge")
        write(self, name, start, array)
        if name == "up.weight":
            written.set()

    monkeypatch.setattr(Writer, "_write", fails)
    assert run("merge ties A C --base BASE -o OUT") == 1
    assert sorted(folder.iterdir()) == before


def test_an_error_shows_where_only_if_asked(capsys):
    words = "merge linear A nowhere -o OUT"
    assert run(words, "--traceback") == 1
    assert "Traceback" in capsys.readouterr().err


MANY = {f"{i}.weight": ((4, 3), np.float32) for i in range(9)}
BY_LEAF = (
    "slerp X Y --t 0.3 --scope leaf",
    "karcher X Y --scope leaf",
    "ties X Y --base Z --scope leaf",
    "della X Y --base Z --seed 3 --scope row",
    "model_stock X Y --base Z --scope row",
)


@pytest.mark.parametrize("words", BY_LEAF)
def test_many_small_tensors_are_merged_one_by_one_with_the_same_bits(words, folder, monkeypatch):
    for i, name in enumerate("XYZ"):
        written(folder / name, i, 0.1, MANY)
    calls = []

    def streamed(*arguments, real=jobs.streamed, **options):
        calls.append(options["lazy"])
        return real(*arguments, **options)

    monkeypatch.setattr(jobs, "streamed", streamed)
    assert run("merge", words, "-o ALONE --quiet") == 0
    monkeypatch.setattr(jobs, "_OFTEN", 10)
    assert run("merge", words, "-o LAZY --quiet") == 0
    assert calls == [False, True]
    one, two = (weights(x) for x in ("ALONE", "LAZY"))
    assert all(one[name].tobytes() == two[name].tobytes() for name in MANY)


def test_outputs_have_the_names_of_the_files_of_the_input(folder):
    for name in ("A", "C"):
        (folder / name / "model.safetensors").rename(folder / name / "unet.safetensors")
    assert run("merge linear A C -o out --quiet") == 0
    assert (folder / "out" / "unet.safetensors").exists()
    assert run("merge linear A C -o shards --shard-size 100B --quiet") == 0
    assert (folder / "shards" / "unet.safetensors.index.json").exists()
    assert run("merge linear A/unet.safetensors C/unet.safetensors -o alone --quiet") == 0
    assert (folder / "alone" / "model.safetensors").exists()


def test_models_are_called_by_the_path_that_is_given(folder):
    (folder / "link").symlink_to("A")
    assert run("steer retarget link ./C/../C --target P -o out --quiet") == 0
    assert sorted(x.name for x in (folder / "out").iterdir()) == ["C", "link"]


def test_an_output_around_what_is_read_by_links_is_refused(folder, capsys):
    (folder / "link").mkdir()
    (folder / "link" / "model.safetensors").symlink_to("../C/model.safetensors")
    assert run("merge linear A link -o C --force") == 2
    assert "overlap" in capsys.readouterr().err


def test_force_replaces_the_output(points):
    assert run("merge", "linear", "A", "C", "-o", "P", "--force") == 0
    assert_same("P", average.mean([points["A"], points["C"]]))


@pytest.mark.parametrize(
    ("words", "function"),
    [
        ("linear {} {}", lambda x, y, _: average.mean([x, y])),
        ("slerp {} {} --t 0.3", lambda x, y, _: interpolate.slerp(x, y, 0.3)),
        ("knots {1} C --base {0}", lambda x, y, c: merge.knots(x, [y, c])),
    ],
)
@pytest.mark.parametrize("names", [("A", "LONG"), ("LONG", "A")])
def test_common_rows_are_combined_and_the_rest_is_kept(words, function, names, folder, capsys):
    written(folder / "LONG", 9, 0.2, LAYOUT | {"embed.weight": ((7, 4), ml_dtypes.bfloat16)})
    line = f"merge {words.format(*names)} -o OUT"
    assert run(line) == 2
    assert "give --common-rows" in capsys.readouterr().err
    assert run(line, "--common-rows") == 0
    points = {name: weights(name) for name in ("A", "C", "LONG")}
    rest = points[names[0]]["embed.weight"][5:]
    points["LONG"]["embed.weight"] = points["LONG"]["embed.weight"][:5]
    wanted = function(*(points[name] for name in (*names, "C")))
    wanted["embed.weight"] = jnp.concatenate([wanted["embed.weight"], rest])
    assert_same("OUT", wanted)


def test_a_recipe_may_ask_for_common_rows(folder):
    written(folder / "LONG", 9, 0.2, LAYOUT | {"embed.weight": ((7, 4), ml_dtypes.bfloat16)})
    (folder / "x.toml").write_text('method = "linear"\nmodels = ["A", "LONG"]\ncommon_rows = true')
    assert run("merge --recipe x.toml -o OUT") == 0
    assert run("merge linear A LONG --common-rows -o SAME") == 0
    assert_same("OUT", weights("SAME"))


@pytest.mark.parametrize("interruption", ["keys", "signal"])
def test_an_interrupted_run_goes_on(interruption, folder, points, monkeypatch, capsys):
    write, written = Writer._write, threading.Event()

    def interrupted(self, name, start, array):
        if name in ("embed.weight", "up.bias"):
            written.wait()
            raise KeyboardInterrupt
        write(self, name, start, array)
        if name == "up.weight":
            written.set()
            if interruption == "keys":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGTERM)

    words = "merge sce A C --base BASE -o OUT"
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_write", interrupted)
        assert run(words) == 1
    assert capsys.readouterr().err == "wspace merge: interrupted: run it again to go on\n"
    assert not (folder / "OUT").exists()
    names = []
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "_write", lambda *args: (names.append(args[1]), write(*args))[1])
        assert run(words) == 0
    assert sorted(names) == ["embed.weight", "up.bias"]
    assert_same("OUT", merge.sce(points["BASE"], [points["A"], points["C"]]))
    assert not list(folder.glob(".OUT*"))


def test_of_several_outputs_those_that_are_there_are_kept(folder, capsys):
    words = "steer retarget A C --target P -o OUT"
    assert run(words) == 0
    before = (folder / "OUT" / "A" / "model.safetensors").stat().st_mtime_ns
    wanted = weights("OUT/C")
    for file in (folder / "OUT" / "C").iterdir():
        file.unlink()
    (folder / "OUT" / "C").rmdir()
    assert run(words) == 0
    assert (folder / "OUT" / "A" / "model.safetensors").stat().st_mtime_ns == before
    assert_same("OUT/C", wanted)
    capsys.readouterr()
    assert run(words) == 0
    there = " is there from an earlier run of this command\n"
    assert capsys.readouterr().err == f"OUT/A{there}OUT/C{there}"
    assert run(words, "--coefficients", 2, 1) == 1
    assert "OUT/A exists" in capsys.readouterr().err


def test_without_a_terminal_progress_is_lines(capsys, monkeypatch):
    from wspace._cli import progress

    monkeypatch.setattr(progress, "_LINE", 0.0)
    assert run("merge", "linear", "A", "C", "-o", "OUT") == 0
    told = capsys.readouterr().err
    assert re.search(r"^ ?\d+%  \d+ B of 120 B  .*/s  \d+ s left$", told, re.MULTILINE)
    assert "\r" not in told
    assert run("merge", "linear", "A", "C", "-o", "OUT", "--force", "--quiet") == 0
    assert capsys.readouterr().err == ""
    assert run("merge", "slerp", "A", "C", "--t", "0.5", "-o", "OUT", "--force") == 0
    assert re.search(r"^0%  \d+ B of 120 B  208 B read so far$", capsys.readouterr().err, re.M)


def test_on_a_terminal_progress_is_a_bar_that_is_wiped(capsys, monkeypatch):
    from wspace._cli import progress

    monkeypatch.setattr(progress, "_BAR", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run("merge", "linear", "A", "C", "-o", "OUT") == 0
    told = capsys.readouterr().err
    assert "[########################] 100%" in told
    assert re.search(r"\r\x1b\[Kwrote OUT: 4 tensors, 120 B, .*\n$", told)


TOML = """
method = "linear"
models = ["A", "C"]
[options]
coefficients = [0.7, 0.3]
[[patterns]]
match = "up.*"
coefficients = [2, -1]
"""


def test_a_recipe_does_what_the_options_do_with_patterns(folder, points):
    (folder / "r.toml").write_text(TOML)
    assert run("merge", "--recipe", "r.toml", "-o", "OUT") == 0
    pair = [points["A"], points["C"]]
    up, other = average.mean(pair, [2.0, -1.0]), average.mean(pair, [0.7, 0.3])
    assert_same("OUT", {k: (up if k.startswith("up.") else other)[k] for k in up})
    said = json.loads((folder / "OUT" / "wspace.json").read_text())["recipe"]
    assert said["patterns"] == [{"match": "up.*", "coefficients": [2.0, -1.0]}]


WHOLE = {
    "ties": (
        'method = "ties"\nmodels = ["A", "C"]\nbase = "BASE"\n[[patterns]]\nmatch = "up.*"\n'
        "coefficients = [2, -1]\nscale = 0.5\n",
        lambda m, two, one, half: merge.ties(m.BASE, [m.A, m.C], [two, one], scale=half),
    ),
    "slerp": (
        'method = "slerp"\nmodels = ["A", "C"]\n[options]\nt = 1.0\n[[patterns]]\nmatch = "up.*"\n'
        "t = 0.5\n",
        lambda m, _, __, half: interpolate.slerp(m.A, m.C, half),
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_numbers_by_pattern_are_those_by_name_of_the_whole_model(name, folder, points):
    text, function = WHOLE[name]
    (folder / "r.toml").write_text(text)
    assert run("merge", "--recipe", "r.toml", "-o", "OUT") == 0
    m = types.SimpleNamespace(**points)
    numbers = [tree.by_name(m.A, {"up.*": own, "*": 1.0}) for own in (2.0, -1.0, 0.5)]
    assert_same("OUT", function(m, *numbers))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("models =", "modles ="), "unknown key 'modles': did you mean models?"),
        (("[0.7", "[true"), "must be a list of finite numbers"),
        (("coefficients = [2", "coeficients = [2"), "did you mean coefficients?"),
        (('match = "up.*"', ""), "has no match"),
        (("up.*", "down.*"), "matches no tensor of A"),
        (('"linear"', '"liner"'), "did you mean linear?"),
        (("[2, -1]", "[2, -2]"), "pattern 'up.*'"),
        (("[options]", "[options"), "is no TOML"),
        (('["A", "C"]', '"A"'), "must be a list of paths"),
        (('"linear"', '"ties"'), "ties needs base"),
        (
            (TOML, TOML.replace('"linear"', '"ties"\nbase = "BASE"') + "density = 0.5\n"),
            "looks at the whole model",
        ),
    ],
)
def test_a_bad_recipe_is_refused(change, message, folder, capsys):
    assert change[0] in TOML
    (folder / "r.toml").write_text(TOML.replace(*change))
    assert run("merge", "--recipe", "r.toml", "-o", "OUT") == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (folder / "OUT").exists()


def entry(name, **parameters):
    return {"model": name, "parameters": parameters} if parameters else {"model": name}


YAML = [
    (
        {"merge_method": "linear", "models": [entry("A", weight=3), entry("C", weight=1)]},
        lambda m: average.mean([m.A, m.C], [3.0, 1.0]),
    ),
    (
        {
            "merge_method": "slerp",
            "base_model": "C",
            "models": [entry("A"), entry("C")],
            "parameters": {"t": 0.25},
        },
        lambda m: tree.per_leaf(interpolate.slerp)(m.C, m.A, 0.25),
    ),
    (
        {
            "merge_method": "ties",
            "base_model": "BASE",
            "models": [entry("BASE"), entry("A", weight=1, density=0.5), entry("C", weight=0.5)],
            "parameters": {"density": 0.5, "lambda": 0.7, "normalize": False, "int8_mask": True},
        },
        lambda m: merge.ties(
            m.BASE,
            [m.A, m.C],
            [1, 0.5],
            density=0.5,
            scope="leaf",
            election=merge.Election(zero="plus", divide="one"),
            scale=0.7,
        ),
    ),
    (
        {
            "merge_method": "ties",
            "base_model": "BASE",
            "models": [entry("A", weight=1, density=0.5), entry("C", weight=0.5, density=0.2)],
        },
        lambda m: merge.ties(
            m.BASE,
            [m.A, m.C],
            [1, 0.5],
            density=(0.5, 0.2),
            scope="leaf",
            election=merge.Election(zero="plus", divide="weight"),
        ),
    ),
    (
        {
            "merge_method": "task_arithmetic",
            "base_model": "BASE",
            "models": [entry("A", weight=1), entry("C", weight=-0.5)],
        },
        lambda m: merge.task_arithmetic(m.BASE, [m.A, m.C], [1.0, -0.5]),
    ),
    (
        {
            "merge_method": "dare_linear",
            "base_model": "BASE",
            "models": [entry("A", weight=1, density=0.5), entry("C", weight=1, density=0.5)],
        },
        lambda m: merge.dare(KEY, m.BASE, [m.A, m.C], [1.0, 1.0], density=0.5, rescale="norm"),
    ),
    (
        {
            "merge_method": "dare_ties",
            "base_model": "BASE",
            "models": [entry("A", weight=1), entry("C", weight=1)],
            "parameters": {"density": 0.5, "rescale": False},
        },
        lambda m: merge.dare_ties(
            KEY,
            m.BASE,
            [m.A, m.C],
            [1, 1],
            density=0.5,
            rescale="none",
            election=merge.Election(zero="plus", divide="one"),
        ),
    ),
    (
        {
            "merge_method": "breadcrumbs",
            "base_model": "BASE",
            "models": [entry("A", weight=1), entry("C", weight=1)],
            "parameters": {"density": 0.5, "gamma": 0.1},
        },
        lambda m: merge.breadcrumbs(
            m.BASE, [m.A, m.C], [1, 1], density=0.5, outliers=0.1, scope="leaf"
        ),
    ),
    (
        {
            "merge_method": "model_stock",
            "base_model": "BASE",
            "models": [entry("A"), entry("C")],
            "parameters": {"filter_wise": True},
        },
        lambda m: average.model_stock(
            m.BASE, [m.A, m.C], scope="row", statistic="cosine", floor=-1.0
        ),
    ),
    (
        {"merge_method": "karcher", "models": [entry("A"), entry("C")]},
        lambda m: tree.per_leaf(average.karcher_mean)([m.A, m.C], tol=1e-5, max_steps=10).weights,
    ),
    (
        {
            "merge_method": "nearswap",
            "base_model": "BASE",
            "models": [entry("A")],
            "parameters": {"t": 0.02},
        },
        lambda m: merge.nearswap(m.BASE, m.A, 0.02),
    ),
]


@pytest.mark.parametrize(("recipe", "function"), YAML, ids=[x["merge_method"] for x, _ in YAML])
def test_a_recipe_of_mergekit_is_read(recipe, function, folder, points, capsys):
    pytest.importorskip("yaml")
    (folder / "r.yml").write_text(json.dumps(recipe))  # JSON is YAML
    code = run("merge", "--recipe", "r.yml", "--seed", 3, "-o", "OUT")
    assert code == 0, capsys.readouterr().err
    assert_same("OUT", function(SimpleNamespace(**points)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slices": []}, "slices in"),
        ({"merge_methd": "x"}, "did you mean merge_method?"),
        ({"merge_method": "passthrough"}, "'passthrough'"),
        ({"models": [entry("A", weight=[0, 1]), entry("C", weight=1)]}, "is a gradient"),
        ({"models": [entry("A"), entry("C", weight=1)]}, "needs weight for every model"),
        ({"models": [entry("A", weight=1, densty=1)]}, "densty of A"),
        ({"parameters": {"normalize": False}}, "normalize: false"),
        ({"dtype": "float16"}, "the recipe asks for float16"),
        ({"dtype": "float16", "out_dtype": "float32"}, "must be one dtype"),
        ({"models": "A"}, "must be a list of entries"),
        ({"parameters": [1]}, "parameters in r.yaml must be a mapping"),
        ({"dtype": ["float32"]}, "must be one dtype"),
    ],
)
def test_a_recipe_of_mergekit_that_is_not_read_is_refused(change, message, folder, capsys):
    pytest.importorskip("yaml")
    (folder / "r.yaml").write_text(json.dumps(YAML[0][0] | change))
    assert run("merge", "--recipe", "r.yaml", "-o", "OUT") == 2
    assert message in capsys.readouterr().err


def test_a_recipe_may_begin_with_a_byte_order_mark(folder):
    pytest.importorskip("yaml")
    (folder / "r.toml").write_bytes(b"\xef\xbb\xbfmethod = 'linear'\r\nmodels = ['A', 'C']\r\n")
    (folder / "r.yml").write_bytes(
        b"\xef\xbb\xbfmerge_method: karcher\r\nmodels: [{model: A}, {model: C}]\r\n"
        b"parameters: {tol: 1e-5, max_iter: 3}\r\n"
    )
    assert recipes.read(folder / "r.toml", None).method == "linear"
    assert recipes.read(folder / "r.yml", None).options["tol"] == 1e-5


@pytest.mark.parametrize("name", ["r.toml", "r.yml"])
def test_a_recipe_that_is_no_text_is_refused(name, folder, capsys):
    (folder / name).write_bytes(b"\xff\xfe")
    assert run("merge", "--recipe", name, "-o", "OUT") == 2
    assert f"{name} is no text in UTF-8" in capsys.readouterr().err


def test_without_yaml_the_extra_is_named(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "yaml", None)
    (folder / "r.yml").write_text("{}")
    assert run("merge", "--recipe", "r.yml", "-o", "OUT") == 2
    assert 'pip install "wspace[yaml]"' in capsys.readouterr().err


TREES = {"points", "tuned", "start", "end", "point", "base", "avoid", "target", "key"}
NOT_IN_WORDS = {
    "knots": {"method"},
    "repel": {"allow", "layout"},
    "retarget": {"allow", "layout"},
    # A direction and a normal are given by models.
    "exit": {"cone", "direction", "allow", "layout"},
    "guard": {"normal", "allow", "layout"},
}


def test_the_file_of_options_is_current():
    assert signatures.FILE.read_text() == signatures.text()


@pytest.mark.parametrize(
    ("name", "method"), [(name, x) for t in methods.TABLES.values() for name, x in t.items()]
)
def test_no_parameter_is_left_out_but_what_words_cannot_say(name, method):
    function = signatures.named(method.entry.function)
    parameters = inspect.signature(function).parameters
    options = {option.name: option for option in method.options}
    commands = {"scope", "preset"} if method.entry.per_tensor else {"preset"}
    said = options.keys() - commands | ({"scope"} & parameters.keys())
    if "election" in parameters:
        fields = {x for x in said if options[x].elects}
        assert fields == merge.Election.__dataclass_fields__.keys()
        said = said - fields | {"election"}
    left_out = NOT_IN_WORDS.get(name, set())
    assert said == parameters.keys() - TREES - left_out
    assert left_out <= parameters.keys()


OPTIONS = {
    "merge ties coefficients": (float, None, "each", False),
    "merge ties density": (float, 0.2, "one or each", False),
    "merge ties kept": (("floor", "floor+1"), "floor", "one", False),
    "merge ties weighted": (bool, True, "one", False),
    "merge ties preset": (
        ("paper", "mergekit-0.1.5", "peft-0.21.2", "fusionbench"),
        None,
        "one",
        False,
    ),
    "merge della scope": (("row", "leaf"), "row", "one", False),
    "merge pcb density": (float, 0.1, "one", False),
    "merge karcher max_steps": (int, 50, "one", False),
    "merge slerp t": (float, None, "one", True),
    "merge slerp scope": (("tree", "leaf"), "tree", "one", False),
    "merge slerp preset": (("mergekit-0.1.5",), None, "one", False),
    "merge model_stock statistic": (("angle", "cosine"), "angle", "one", False),
    "steer exit coefficients": (float, None, "each", False),
    "steer exit radius": (float, None, "one", True),
    "steer guard costs": (float, None, "each", False),
}


@pytest.mark.parametrize("words", OPTIONS)
def test_options_are_of_the_kinds_that_the_functions_take(words):
    command, method, name = words.split()
    (found,) = (x for x in methods.TABLES[command][method].options if x.name == name)
    assert (found.kind, found.default, found.count, found.required) == OPTIONS[words]


def test_help_and_mistakes_do_not_import_jax():
    for words in (["--help"], ["merge", "ties", "--help"], ["merge", "tise"], ["merge", "--help"]):
        code = (
            "import sys\nfrom wspace.__main__ import main\n"
            f"try: main({words})\nexcept SystemExit: pass\n"
            "print('jax' in sys.modules, 'numpy' in sys.modules)"
        )
        root = inspect.getfile(wspace).rsplit("/", 2)[0]
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
        )
        assert done.stdout.splitlines()[-1] == "False False"


def test_a_reader_that_leaves_early_is_no_error_to_speak_of(folder):
    root = inspect.getfile(wspace).rsplit("/", 2)[0]
    words = [sys.executable, "-m", "wspace", "inspect", str(folder / "A")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, cwd=root, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_the_version_is_told(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"wspace {wspace.__version__}\n"


def test_names_from_files_are_no_commands_to_a_terminal(folder, capsys):
    name = "w\x1b[2J\x1b]0;title\x07\nfake  float32\u202e"
    checkpoint.save(folder / "X.safetensors", {name: np.ones(2, np.float32)})
    (folder / "A" / "\x1b[2J.txt").write_text("1")
    for words in ("inspect X.safetensors", "distance X.safetensors A", "inspect A",
                  "distance X.safetensors X.safetensors", "merge linear A C -o A2 --dry-run",
                  "merge linear X.safetensors missing\x1b[2J -o m"):  # fmt: skip
        run(words)
        for text in capsys.readouterr():
            assert all(x.isprintable() or x == "\n" for x in text)
            assert "\nfake" not in text


def test_no_error_is_as_long_as_what_a_file_holds(folder, capsys):
    checkpoint.save(folder / "X.safetensors", {10**6 * "x": np.ones(2, np.float32)})
    assert run("merge linear X.safetensors A -o m") == 1
    assert len(capsys.readouterr().err) < 5000


@pytest.mark.parametrize("sizes", [[33_600_000], [1, 33_600_000]])
def test_a_rate_is_of_the_time_that_bytes_took(sizes, capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.Progress(sum(sizes), False) as told:
        for size in sizes:
            clock[0] += 30
            told.advance(size)
    said = capsys.readouterr().err
    assert "100%  33.6 MB of 33.6 MB" in said
    assert ("1.12 MB/s" in said) == (len(sizes) == 2)
    assert "GB/s" not in said
    assert "TB/s" not in said


def test_every_command_has_help(capsys):
    for words in ("", "merge", "steer", "merge ties", "offset", "extract", "audit", "distance"):
        assert run(words, "--help") == 0
        told = capsys.readouterr().out
        assert "usage: wspace" in told
    assert "--density" not in told


@pytest.mark.parametrize(
    ("text", "nbytes"), [("5GB", 5 * 10**9), ("512MiB", 2**29), ("1.5kB", 1500), ("7", 7)]
)
def test_sizes(text, nbytes):
    assert size(text) == nbytes


@pytest.mark.parametrize("text", ["-3e-1", "-1e300", "-5e-324", "-0", "-7"])
def test_negative_numbers_are_no_options(text):
    parser = Parser(prog="x", description="x")
    parser.add_argument("--by", type=float)
    assert parser.parse(["--by", text]).by == float(text)


def test_the_parser_takes_no_abbreviations(capsys):
    parser = Parser(prog="x", description="x")
    parser.add_argument("--strength")
    with pytest.raises(SystemExit):
        parser.parse(["--stren", "1"])
    assert "did you mean --strength?" in capsys.readouterr().err
