"""The demo says what it computed, and what it computed is so."""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import wspace
from wspace import average, checkpoint, geometry
from wspace.__main__ import main

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

NETWORKS = {"base", "A", "C", "P", "C_other_base", "A_guarded", "C_guarded"} | {
    "A_hardened",
    "C_hardened",
}
PICTURES = {"plane.png", "coefficient.png", "ranks.png"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run as a user starts it: the process and the folder."""
    out = tmp_path_factory.mktemp("demo") / "a" / "b"
    root = str(Path(wspace.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "wspace", "demo", "--out", str(out), "--seed", "3"],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done, out


@pytest.fixture(scope="module")
def results(run):
    return json.loads((run[1] / "results.json").read_text())


@pytest.fixture(scope="module")
def points(run):
    return {name: checkpoint.load(run[1] / f"{name}.safetensors") for name in NETWORKS}


def test_the_folder_holds_results_pictures_and_weights_and_nothing_else(run):
    files = {x.name for x in run[1].iterdir()}
    assert files == {"results.json", *PICTURES, *(f"{name}.safetensors" for name in NETWORKS)}


def test_act_1_the_average_reads_what_no_member_reads(results):
    reads = results["accuracy"]
    assert reads["base"]["all"] < 0.3
    assert reads["A"]["low"] > 0.95 > 0.05 > reads["A"]["high"]
    assert reads["C"]["high"] > 0.95 > 0.05 > reads["C"]["low"]
    best = max(reads[name]["all"] for name in ("base", "A", "C"))
    assert reads["B'"]["all"] > best + 0.2
    assert reads["B'"]["all"] > results["controls"]["average of A and that C"]["all"]


def test_act_2_the_three_names_are_one_map_and_retarget_asks_the_least(results):
    bare = results["bare"]
    for row in bare["names"]:
        assert row["scale"] == pytest.approx(1 + row["strength"])
        assert row["strength"] == pytest.approx(row["weight"] / (1 - row["weight"]))
        assert row["distance"] == pytest.approx(row["scale"] * bare["distance"], rel=1e-5)
        assert row["disagreement"] < 1e-4
    for each, target, out in zip(*(bare["asks"][i::3] for i in range(3)), strict=True):
        assert out["moves"] == pytest.approx(target["moves"], rel=1e-4)
        assert each["moves"]["average"] == pytest.approx(target["moves"]["average"], rel=1e-4)
        squares = [x["moves"]["A"] ** 2 + x["moves"]["C"] ** 2 for x in (each, target)]
        assert squares[0] > squares[1] * (1 - 1e-5)


def test_act_2_the_guard_keeps_the_sources_and_not_their_average(results):
    reads, guard = results["accuracy"], results["guard"]
    for flat, guarded in (("", reads), ("_hardened", results["hardened"])):
        assert guarded[f"A'{flat}"]["low"] >= reads["A"]["low"] - 0.0151
        assert guarded[f"C'{flat}"]["high"] >= reads["C"]["high"] - 0.0151
    assert reads["R'"]["all"] <= 0.3
    assert results["hardened"]["R'_hardened"]["all"] < 0.5 * reads["B'"]["all"]
    assert guard["repelled from itself"] < 1e-4
    assert "give a direction" in guard["refusal"]
    bare = guard["ways"]["everywhere"]["reads"]
    assert max(bare.values()) < 0.6


def test_act_2_the_saved_weights_are_those_that_were_measured(points, results):
    a, c = points["A"], points["C"]
    middle, radius = average.mean([a, c]), results["guard"]["radius"]
    for kind in ("guarded", "hardened"):
        moved = average.mean([points[f"A_{kind}"], points[f"C_{kind}"]])
        assert float(geometry.distance(moved, middle)) == pytest.approx(radius, rel=1e-4)
        for name, x in points[f"A_{kind}"].items():
            assert x.shape == a[name].shape
            assert "weight" in name or bool((x == a[name]).all())


def test_act_2_holds_on_digits_read_without_the_library(points):
    from sklearn.datasets import load_digits

    data = load_digits()

    def accuracy(*members):
        weights = {k: sum(np.asarray(x[k]) for x in members) / len(members) for k in members[0]}
        x = data.data / 16
        for i in (1, 2, 3):
            x = np.maximum(x, 0) @ weights[f"{i}.weight"] + weights[f"{i}.bias"]
        return np.mean(x.argmax(axis=1) == data.target)

    assert accuracy(points["A"], points["C"]) > 0.75
    assert accuracy(points["A_guarded"], points["C_guarded"]) <= 0.3
    assert accuracy(points["A_guarded"]) == pytest.approx(accuracy(points["A"]), abs=0.01)


def test_act_3_the_hardened_guard_is_at_least_as_far_at_every_rank(results):
    plain, flat = (np.array(results["ranks"][name]) for name in ("plain", "hardened"))
    assert {*range(13), 16, 32, 64, 128, 256} <= set(plain[:, 0])
    np.testing.assert_array_equal(plain[:, 0], flat[:, 0])
    assert flat[0, 1] == pytest.approx(plain[0, 1], rel=1e-4)
    assert flat[0, 1] == pytest.approx(results["guard"]["radius"], rel=1e-4)
    assert (flat[1:, 1] >= plain[1:, 1]).all()
    assert results["holds_to"]["hardened"] > results["holds_to"]["plain"]
    for rows in (plain, flat):
        assert (np.diff(rows[:, 1]) <= 0).all()
        assert rows[0, 2] < 0.5 * results["accuracy"]["B'"]["all"]
        assert rows[-1, 1:] == pytest.approx([0, results["accuracy"]["B'"]["all"]], abs=1e-6)
    assert results["largest gap to curve"] < 1e-4


def test_act_3_the_same_term_leads_to_the_other_targets(results):
    for name, known in (("A", results["accuracy"]["A"]), ("P", results["controls"]["P"])):
        rank, distance, *shares = results["routes"][name][-1]
        assert (rank, distance) == (256, 0)
        assert shares == pytest.approx(list(known.values()))


def test_the_results_hold_what_was_promised(results):
    reads = results["accuracy"]
    assert list(reads) == ["base", "A", "C", "B'", "A'", "C'", "R'"]
    assert all(list(x) == ["low", "high", "all"] for x in reads.values())
    assert results["seed"] == 3
    assert set(results["ranks"]) == {"plain", "hardened"}


def numbers(x):
    """All numbers of a JSON value."""
    if isinstance(x, dict | list):
        return [n for y in (x.values() if isinstance(x, dict) else x) for n in numbers(y)]
    return [x] if isinstance(x, int | float) else []


def test_every_figure_of_the_report_is_in_the_results(run, results):
    known = numbers(results)
    for digits in (2, 3):
        printed = set(re.findall(rf"(?<![\d.])-?\d+\.\d{{{digits}}}(?!\d)", run[0].stdout))
        assert printed <= {f"{x:.{digits}f}" for x in known}


def test_the_report_says_what_things_cost_and_what_is_not_covered(run, results):
    text = " ".join(run[0].stdout.split())
    outside = results["guard"]["ways"]["plain"]["outputs averaged"]
    for words in (
        "Act 1.",
        "Act 2.",
        "Act 3.",
        "A margin certifies a distance, not safety.",
        "What it costs:",
        "not resistance to training",
        "bound in weight space, against someone who knows B'",
        "limited by the last layer and its ten outputs",
        f"Averaged outputs of A' and C' read {outside:.3f}",
    ):
        assert words in text
    assert max(map(len, run[0].stdout.splitlines()[:-1])) <= 100  # the last names the folder
    assert "training" in run[0].stderr
    assert "Act" not in run[0].stderr


@pytest.mark.parametrize("name", sorted(PICTURES))
def test_the_pictures_show_something(run, name):
    from matplotlib.image import imread

    data = (run[1] / name).read_bytes()
    assert data.startswith(b"\x89PNG")
    assert min(struct.unpack(">II", data[16:24])) > 500
    pixels = imread(run[1] / name)[..., :3].reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 50


@pytest.mark.parametrize("seed", ["-1", "1.5", "x", "", "4294967296"])
def test_a_bad_seed_is_bad_usage(tmp_path, capsys, seed):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--out", str(tmp_path / "out"), "--seed", seed])
    assert stopped.value.code == 2
    assert f"give an integer from 0 to 4294967295, not '{seed}'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["file", "file/out"])
def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path, capsys, where):
    (tmp_path / "file").write_bytes(b"as it was")
    assert main(["demo", "--out", str(tmp_path / where)]) == 1
    told = capsys.readouterr()
    assert re.fullmatch(r"wspace demo: cannot make the folder .*--out\n", told.err)
    assert told.out == ""
    assert [x.read_bytes() for x in tmp_path.iterdir()] == [b"as it was"]


def test_a_run_that_fails_leaves_no_results(tmp_path, capsys, monkeypatch):
    from wspace._demo import acts

    def fail(_):
        raise ValueError("the digits are gone")

    monkeypatch.setattr(acts, "models", fail)
    (tmp_path / "results.json").write_text("of an earlier run")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith("wspace demo: the digits are gone\n")
    assert not list(tmp_path.iterdir())


def test_missing_packages_name_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("wspace._cli.commands.find_spec", lambda module: None if module else module)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert "scikit-learn" in told
    assert 'pip install "wspace[demo]"' in told
    assert not list(tmp_path.iterdir())


def test_no_command_prints_help_and_is_bad_usage(capsys):
    assert main([]) == 2
    assert "demo" in capsys.readouterr().err


def test_importing_the_library_imports_no_package_of_the_demo():
    packages = ("matplotlib", "sklearn")
    code = f"import sys; from wspace import *; print([x for x in {packages} if x in sys.modules])"
    root = str(Path(wspace.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_a_guard_holds_to_the_last_rank_before_the_first_that_reads():
    from wspace._demo.acts import held_to

    rows = [[0, 3.0, 0.1], [1, 2.0, 0.2], [2, 1.0, 0.6], [3, 0.0, 0.1]]
    assert held_to(rows, 0.5) == 1
    assert held_to(rows, 0.9) == 3
    assert held_to(rows, 0.05) == -1


def test_flat_edits_move_the_average_as_far():
    from wspace._demo.acts import hardened

    before = [{"w": jnp.zeros((2, 2))}, {"w": jnp.ones((2, 2))}]
    after = [{"w": jnp.diag(jnp.array([3.0, 1.0]))}, {"w": jnp.ones((2, 2))}]
    moved = average.mean(hardened(before, after))
    means = average.mean(before), average.mean(after)
    wanted = geometry.distance(*means)
    assert float(geometry.distance(moved, means[0])) == pytest.approx(float(wanted), rel=1e-6)
