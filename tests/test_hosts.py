"""Laws of `wspace.checkpoint` in a run of two processes, with the devices of both in one mesh."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_writer import content, written
from wspace import average, checkpoint, interpolate, merge, negative

ROOT = pathlib.Path(__file__).parents[1]
SHAPES = {"rows": (8, 3), "columns": (3, 8), "whole": (5,), "scalar": (), "empty": (0, 4)}
OWN = {name: np.arange(12, dtype=np.float32) + i for i, name in enumerate(("a", "b", "c"))}

PROCESS = """
import importlib.util, json, pathlib, sys, tempfile, time, unittest.mock
from concurrent.futures import ThreadPoolExecutor
import jax

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
me = int(sys.argv[2])
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, me)

import numpy as np
from tests.test_hosts import OWN, mesh_of, merged, sharding_on, whole_model
from wspace import checkpoint
from wspace.checkpoint import hosts
from wspace.checkpoint.stored import Stored

folder, said = pathlib.Path(sys.argv[3]), {}


def says(case):
    def run(function):
        try:
            said[case] = function()
        except BaseException as error:
            said[case] = f"{type(error).__name__}: {error}"
    return run


def recorded(tensor, index, part=Stored.part):
    found = part(tensor, index)
    read[tensor.name] = read.get(tensor.name, 0) + found.nbytes
    return found


Stored.part, read = recorded, {}
points = [checkpoint.load(folder / f"{x}.safetensors", sharding_on(mesh_of())) for x in "abc"]
for name, weights in merged(*points):
    checkpoint.save(folder / f"{name}.safetensors", weights)
checkpoint.save(folder / "local", OWN)
if importlib.util.find_spec("orbax"):
    tree = {"model": {name: x for name, x in points[0].items() if x.size}}
    checkpoint.save_orbax(folder / "tree", tree)
    loaded = checkpoint.load_orbax(folder / "tree", sharding_on(mesh_of()))
    checkpoint.save(folder / "tree.safetensors", loaded["model"])


files = [checkpoint.open(folder / f"{x}.safetensors") for x in "abc"]
with checkpoint.create(folder / "streamed", files[0]) as writer:
    checkpoint.stream(whole_model, files, writer, lazy=True)


def filled(name, write, layout=OWN, **options):
    with checkpoint.create(folder / name, layout, **options) as writer:
        write(writer)
    return sorted(writer.finished)


def shares(writer):
    if me == 0:
        writer.write("a", OWN["a"])
        writer.write_part("b", 8, OWN["b"][8:])
        writer.write_part("b", 0, OWN["b"][:4])
    else:
        writer.write("c", OWN["c"])
        writer.write_part("b", 4, OWN["b"][4:8])


def missing(writer):
    if me == 0:
        writer.write("a", OWN["a"])
    writer.write_part("b", 0, OWN["b"][:6])


def fails(writer):
    shares(writer)
    if me == 1:
        raise KeyboardInterrupt("by hand")


@says("shares")
def _():
    return filled("shares", shares, shard_bytes=48, others=[folder / "config.json"])


@says("missing")
def _():
    return filled("missing", missing)


@says("twice")
def _():
    return filled("twice", lambda writer: [writer.write(*item) for item in OWN.items()])


@says("failing")
def _():
    return filled("failing", fails)


@says("again")
def _():
    return filled("shares", shares)


@says("other-layout")
def _():
    return filled("other-layout", shares, {"a": np.zeros(1 + me)})


@says("planned")
def _():
    return filled("planned", shares, plan="x")


@says("threads")
def _():
    # In one process after the other, in opposite orders.
    places = ["one", "two"] if me == 0 else ["two", "one"]
    with ThreadPoolExecutor(2) as pool:
        runs = []
        for place in places:
            (folder / place).mkdir(exist_ok=True)
            runs.append(pool.submit(filled, f"{place}/threads", shares))
            time.sleep(0.5)
        return [run.result() for run in runs]


@says("unseen")
def _():
    with unittest.mock.patch.object(pathlib.Path, "is_dir", lambda _: me == 0):
        return filled("unseen", shares)


@says("elsewhere")
def _():
    hosts._PATIENCE, hosts._WAIT = 4, 500
    if me == 1:
        global folder
        folder = pathlib.Path(tempfile.mkdtemp())
    return filled("elsewhere", shares)


print(json.dumps(said | {"read": read}))
"""


def mesh_of():
    kinds = (jax.sharding.AxisType.Explicit,)
    return jax.make_mesh((4,), ("x",), devices=jax.devices()[:4], axis_types=kinds)


def sharding_on(mesh):
    """Cuts a tensor along the first axis that all devices can share."""

    def sharding(_, tensor):
        axis = next((i for i, size in enumerate(tensor.shape) if size and size % 4 == 0), None)
        spec = ["x" if i == axis else None for i in range(len(tensor.shape))]
        return jax.NamedSharding(mesh, jax.P(*spec))

    return sharding


def merged(a, b, c):
    yield "mean", average.mean([a, b], [0.7, 0.3])
    yield "sum", merge.task_arithmetic(c, [a, b], [0.5, -0.9])
    yield "repelled", negative.repel(a, b, 0.5)
    some = [{name: x[name] for name in ("rows", "scalar", "half")} for x in (a, b)]
    yield "between", interpolate.slerp(*some, 0.3)


def whole_model(points):
    turned = interpolate.slerp(*points[:2], 0.3)
    return merge.ties(points[2], [turned, points[1]], density=0.4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with what two processes wrote together, and what each of them says."""
    folder = tmp_path_factory.mktemp("hosts")
    for i, name in enumerate("abc"):
        draw = np.random.default_rng(i).normal
        model = {x: draw(size=shape).astype(np.float32) for x, shape in SHAPES.items()}
        model["half"] = draw(size=(2, 4)).astype(jnp.bfloat16)
        checkpoint.save(folder / f"{name}.safetensors", model)
    (folder / "config.json").write_text("{}")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, port, str(i), str(folder)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        texts = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], texts
    return folder, [json.loads(out.splitlines()[-1]) for out, _ in texts]


def test_two_processes_write_what_one_writes_bit_for_bit(run):
    folder, _ = run
    files = [folder / f"{x}.safetensors" for x in "abc"]
    whole = dict(merged(*map(checkpoint.load, files)))
    shards = dict(merged(*(checkpoint.load(file, sharding_on(mesh_of())) for file in files)))
    for name in whole:
        found = content(folder / f"{name}.safetensors")
        checkpoint.save(folder / "alone.safetensors", shards[name])
        assert found == content(folder / "alone.safetensors")
        if name != "between":  # whose norms are summed in the order of the shards
            checkpoint.save(folder / "alone.safetensors", whole[name])
            assert found == content(folder / "alone.safetensors")
        else:
            loaded = checkpoint.load(folder / f"{name}.safetensors")
            for x, leaf in whole[name].items():
                np.testing.assert_allclose(
                    np.asarray(loaded[x], np.float64),
                    np.asarray(leaf, np.float64),
                    rtol=4 * float(jnp.finfo(leaf.dtype).eps),
                )


def test_a_function_of_files_is_shared_out_by_tensors(run):
    folder, _ = run
    wanted = whole_model([checkpoint.load(folder / f"{x}.safetensors") for x in "abc"])
    found = checkpoint.load(folder / "streamed")
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        assert np.asarray(found[name]).tobytes() == np.asarray(x).tobytes(), name


def test_a_process_reads_its_own_shards_alone(run):
    folder, said = run
    nbytes = {name: x.nbytes for name, x in checkpoint.load(folder / "a.safetensors").items()}
    cut = {"rows": 2, "columns": 2, "half": 2}
    for process in said:
        assert process["read"] == {
            name: 3 * size // cut.get(name, 1) for name, size in nbytes.items()
        }


def test_a_tree_of_orbax_goes_through_two_processes(run):
    pytest.importorskip("orbax.checkpoint")
    folder, _ = run
    wanted = checkpoint.load(folder / "a.safetensors")
    del wanted["empty"]
    for found in (
        checkpoint.load_orbax(folder / "tree")["model"],
        checkpoint.load(folder / "tree.safetensors"),
    ):
        assert found.keys() == wanted.keys()
        assert all((found[name] == wanted[name]).all() for name in wanted)


def test_tensors_and_parts_of_each_process_make_one_output(run, tmp_path):
    folder, said = run
    config = [folder / "config.json"]
    alone = written(tmp_path / "shares", OWN, shard_bytes=48, others=config)
    assert content(folder / "shares") == content(alone)
    local = written(tmp_path / "local", OWN, metadata={"format": "pt"})
    assert content(folder / "local") == content(local)
    # Nor does what failed in between keep later outputs from being written, or refused.
    assert [x["shares"] for x in said] == [["a"], ["c"]]
    assert "exists: give another path" in said[0]["again"]
    assert said[1]["again"].startswith("RuntimeError: process 0 failed")


def test_outputs_of_one_name_in_two_folders_are_told_apart(run, tmp_path):
    folder, said = run
    assert said[0]["threads"] == [["a"], ["a"]]
    assert said[1]["threads"] == [["c"], ["c"]]
    alone = content(written(tmp_path / "threads", OWN))
    assert content(folder / "one" / "threads") == content(folder / "two" / "threads") == alone


@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        ("missing", "ValueError: 2 of 3 tensors .*write 'b', 'c'", None),
        ("twice", "ValueError: 3 of 3 tensors were not written whole and once", None),
        ("failing", "RuntimeError: process 1 failed, .* KeyboardInterrupt: by hand", "Keyboard"),
        ("other-layout", "ValueError: the processes differ in the layout", None),
        ("planned", "ValueError: plan is for one process: leave it out", None),
        (
            "unseen",
            "RuntimeError: process 1 failed",
            "ValueError: process 1 does not see .*/.unseen",
        ),
        (
            "elsewhere",
            "RuntimeError: process 1 waits with .*/elsewhere, this one with .*: give all the same",
            "RuntimeError: process 0 waits with .*/elsewhere",
        ),
    ],
)
def test_what_fails_in_one_process_is_refused_in_all_and_leaves_nothing(run, case, first, second):
    folder, said = run
    for found, match in zip(said, (first, second or first), strict=True):
        assert re.search(match, found[case])
    assert [file.name for file in folder.iterdir() if case in file.name] == []
