"""Laws of `wspace.checkpoint.create`: what is there after a failure or an interruption."""

import json
import os
import pathlib
import resource
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from tests.test_writer import MODEL, content, stopped, written
from wspace import checkpoint
from wspace.checkpoint import partial, pieces

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_an_output_is_replaced_only_by_force_and_only_whole(tmp_path, name):
    out = written(tmp_path / name, MODEL)
    before = content(out)
    with (
        pytest.raises(FileExistsError, match=rf"{name} exists: .*force"),
        checkpoint.create(out, MODEL),
    ):
        pass
    stopped(out, ["w"], {"w": MODEL["w"]}, force=True)
    assert content(out) == before
    written(out, {"w": MODEL["w"]}, force=True)
    with checkpoint.open(out) as opened:
        assert list(opened) == ["w"]
    assert os.listdir(tmp_path) == [name]


def test_what_is_no_checkpoint_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("1")
    (tmp_path / "notes").write_text("2")
    (tmp_path / "x.safetensors").mkdir()
    for name, match in (
        ("thesis", "no .safetensors file"),
        ("notes", "no .safetensors file"),
        ("x.safetensors", "is a folder"),
    ):
        with pytest.raises(FileExistsError, match=match):
            written(tmp_path / name, MODEL, force=True)
    assert sorted(os.listdir(tmp_path)) == ["notes", "thesis", "x.safetensors"]
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "1"
    (tmp_path / "link").symlink_to("real")
    written(tmp_path / "real", MODEL)
    written(tmp_path / "link", {"w": MODEL["w"]}, force=True)
    assert not (tmp_path / "link").is_symlink()
    assert checkpoint.open(tmp_path / "real").keys() == MODEL.keys()


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path):
    out = tmp_path / "out.safetensors"

    def another():
        with checkpoint.create(out, {"w": MODEL["w"]}) as writer:
            writer.write("w", MODEL["w"])
            out.write_bytes(b"of another")

    with pytest.raises(FileExistsError, match="exists"):
        another()
    assert out.read_bytes() == b"of another"
    assert os.listdir(tmp_path) == [out.name]


@pytest.mark.parametrize("plan", [None, "plan"])
def test_a_full_disk_shows_at_once_and_leaves_nothing(tmp_path, plan):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, old[1]))
    try:
        with (
            pytest.raises(OSError, match=r"cannot write .*out \(.*space left"),
            checkpoint.create(
                tmp_path / "out", {"x": jax.ShapeDtypeStruct((2**20,), np.float32)}, plan=plan
            ),
        ):
            pytest.fail("the block is entered")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not list(tmp_path.iterdir())


def test_the_space_for_the_tensors_is_taken_before_they_are_written(tmp_path):
    layout = {"x": jax.ShapeDtypeStruct((2**18,), np.float32)}
    with checkpoint.create(tmp_path / "x.safetensors", layout) as writer:
        (file,) = tmp_path.glob(".x*/data/*")
        assert file.stat().st_blocks * 512 >= 2**20
        writer.write("x", np.ones(2**18, np.float32))


@pytest.mark.parametrize("where", ["file/out", "none/out", "file/x.safetensors"])
def test_where_nothing_can_be_written_nothing_is_left(tmp_path, where):
    (tmp_path / "file").write_bytes(b"as it was")
    with pytest.raises(OSError, match=r"cannot write .*give a path in a folder that exists"):
        written(tmp_path / where, MODEL)
    assert os.listdir(tmp_path) == ["file"]


def test_a_failure_at_the_end_leaves_the_output_as_it_was(tmp_path, monkeypatch):
    out = written(tmp_path / "out", MODEL)
    before, rename = content(out), os.rename

    def fails(source, target):
        if pathlib.Path(source).name == "data":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match=r"cannot write .*out \(Input/output error\)"):
        written(out, {"w": MODEL["w"]}, force=True)
    assert content(out) == before
    assert os.listdir(tmp_path) == ["out"]


def test_an_output_that_cannot_be_put_back_is_kept_and_put_back_by_the_next_run(
    tmp_path, monkeypatch
):
    out = written(tmp_path / "out", MODEL)
    before, rename = content(out), os.rename

    def fails(source, target):
        if pathlib.Path(target) == out:
            raise OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fails)
        with pytest.raises(OSError, match="Input/output error"):
            written(out, {"w": MODEL["w"]}, force=True)
    assert not out.exists()
    with pytest.raises(FileExistsError, match="exists"):
        written(out, MODEL)
    assert content(out) == before
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_everything_is_on_disk_before_it_is_put_in_place(tmp_path, monkeypatch, name):
    fsync, synced = os.fsync, []

    def recorded(number):
        synced.append(os.fstat(number).st_ino)
        assert (tmp_path / name).exists() == (synced[-1] == tmp_path.stat().st_ino)
        fsync(number)

    monkeypatch.setattr(os, "fsync", recorded)
    shards = {} if name.endswith("s") else {"shard_bytes": 8, "others": [__file__]}
    out = written(tmp_path / name, MODEL, **shards)
    files = [out] if out.is_file() else [out, *out.iterdir()]
    assert {file.stat().st_ino for file in files} <= set(synced)
    assert synced[-1] == tmp_path.stat().st_ino


def test_a_system_that_writes_less_than_asked_is_asked_again(tmp_path, monkeypatch):
    pwrite = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda number, data, at: pwrite(number, data[:3], at))
        written(tmp_path / "slow", MODEL)
    assert content(tmp_path / "slow") == content(written(tmp_path / "fast", MODEL))


def test_what_could_not_be_written_can_be_written_again(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(28, "No space left on device")

    with checkpoint.create(tmp_path / "out", {"w": MODEL["w"]}) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", fails)
            with pytest.raises(OSError, match=r"cannot write .*out.*\(No space left"):
                writer.write("w", MODEL["w"])
        assert not writer.finished
        writer.write("w", MODEL["w"])
    assert content(tmp_path / "out") == content(written(tmp_path / "x", {"w": MODEL["w"]}))


def test_what_is_written_goes_to_disk_meanwhile_and_an_error_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(partial, "_FLUSHED", 16)
    flushed = threading.Event()

    def fails(_):
        flushed.set()
        raise OSError(5, "Input/output error")

    def run():
        with checkpoint.create(tmp_path / "out", {"w": MODEL["w"]}) as writer:
            writer.write_part("w", 0, MODEL["w"][0, :3])
            assert not flushed.wait(0.05)
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", fails)
                writer.write_part("w", 3, MODEL["w"].reshape(-1)[3:])
                assert flushed.wait(60)

    with pytest.raises(OSError, match=r"cannot write .*out \(Input/output error\)"):
        run()
    assert not list(tmp_path.iterdir())


def test_one_output_has_one_writer(tmp_path):
    with checkpoint.create(tmp_path / "out", MODEL) as writer:
        for options in ({}, {"plan": "another"}, {"force": True}):
            with (
                pytest.raises(BlockingIOError, match=r"out is being written by another"),
                checkpoint.create(tmp_path / "out", MODEL, **options),
            ):
                pass
        written(tmp_path / "other", MODEL)
        for name, x in MODEL.items():
            writer.write(name, x)
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def left_of(path, names, **options):
    """The folder that an interrupted run leaves."""
    stopped(path, names, **options)
    (left,) = path.parent.glob(f".{path.name}.*.partial")
    return left


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_an_interrupted_job_goes_on_with_what_is_finished(tmp_path, name):
    whole = written(tmp_path / f"whole-{name}", MODEL, plan="job")
    left = left_of(tmp_path / name, ["w", "b"], plan="job")
    assert left.name.startswith(f".{name}.")
    with checkpoint.create(tmp_path / name, MODEL, plan="job") as writer:
        assert writer.finished == {"w", "b", "e"}
        with pytest.raises(ValueError, match="'w' was written before"):
            writer.write("w", MODEL["w"])
        writer.write("s", MODEL["s"])
    assert content(tmp_path / name) == content(whole)
    assert sorted(os.listdir(tmp_path)) == [name, whole.name]


def test_an_interrupted_job_leaves_no_other_files_to_the_next(tmp_path):
    whole = written(tmp_path / "whole", MODEL)
    stopped(tmp_path / "out", ["w"], plan="job", others=[__file__])
    written(tmp_path / "out", MODEL, plan="job")
    assert content(tmp_path / "out") == content(whole)


def test_a_tensor_of_many_pieces_verifies(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "_PIECE", 16)
    monkeypatch.setattr(partial, "_PIECE", 20)
    stopped(tmp_path / "out", ["w"], plan="job")
    assert stopped(tmp_path / "out", [], plan="job") == {"w", "e"}


def test_only_the_same_job_goes_on(tmp_path):
    options = {"plan": "job", "metadata": {"a": "b"}}
    left = left_of(tmp_path / "out", ["w"], **options)
    for other in ({"plan": "another"}, {"metadata": {"a": "c"}}, {"plan": None}):
        assert stopped(tmp_path / "out", [], **options | other) == {"e"}
        assert [file.name for file in tmp_path.iterdir()] == [left.name]
    with checkpoint.create(tmp_path / "out", MODEL, **options) as writer:
        assert writer.finished == {"w", "e"}
        for name in ("b", "s"):
            writer.write(name, MODEL[name])


@pytest.mark.parametrize(("plan", "names"), [(None, ["w"]), ("job", [])])
def test_without_a_plan_or_a_finished_tensor_nothing_is_left(tmp_path, plan, names):
    stopped(tmp_path / "out", names, plan=plan)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError, TypeError, OSError, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("keep_on_error", [True, False])
def test_an_error_of_what_is_computed_leaves_nothing_if_asked(tmp_path, error, keep_on_error):
    options = {"plan": "job", "keep_on_error": keep_on_error}

    def fails():
        with checkpoint.create(tmp_path / "out", MODEL, **options) as writer:
            writer.write("w", MODEL["w"])
            raise error("here")

    with pytest.raises(error, match="here"):
        fails()
    kept = keep_on_error or not issubclass(error, ValueError | TypeError)
    assert len(list(tmp_path.iterdir())) == kept
    with checkpoint.create(tmp_path / "out", MODEL, **options) as writer:
        assert writer.finished == ({"w", "e"} if kept else {"e"})
        for name in MODEL.keys() - writer.finished:
            writer.write(name, MODEL[name])


def damage_file(left):
    file = left / "data" / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-13] + bytes([data[-13] ^ 1]) + data[-12:])


def cut_file(left):
    os.truncate(left / "data" / "model.safetensors", 100)


def lie(parts):
    """A journal that says of `w` what is not so."""
    return lambda left: (left / "journal").write_text(f'["w",{parts}]\n')


@pytest.mark.parametrize(
    "damage",
    [
        damage_file,
        cut_file,
        lambda left: (left / "data" / "model.safetensors").unlink(),
        lambda left: os.truncate(left / "journal", (left / "journal").stat().st_size - 1),
        lambda left: (left / "journal").write_bytes(b"\xff\x00[\n[[[[\n{}\n3\n[1]\n"),
        *map(
            lie,
            (
                "[]",
                "[[0,48,1]]",
                "[[0,24,0]]",
                "[[-8,48,0]]",
                "[[0,1e18,0]]",
                "[[0,Infinity,0]]",
                '"x"',
                "[[]]",
            ),
        ),
        lambda left: (left / "journal").write_text('["none",[[0,48,1]]]\n["w",[[0,48,"x"]]]\n'),
    ],
)
def test_what_does_not_verify_is_written_again(tmp_path, damage):
    whole = written(tmp_path / "whole", MODEL)
    damage(left_of(tmp_path / "out", ["w"], plan="job"))
    with checkpoint.create(tmp_path / "out", MODEL, plan="job") as writer:
        assert writer.finished == {"e"}
        for name in ("w", "b", "s"):
            writer.write(name, MODEL[name])
    assert content(tmp_path / "out") == content(whole)


def test_a_line_after_a_torn_one_counts(tmp_path):
    left = left_of(tmp_path / "out", ["w"], plan="job")
    with open(left / "journal", "ab") as stream:
        stream.write(b'["b",[[0,5')
    stopped(tmp_path / "out", ["b"], plan="job")
    with checkpoint.create(tmp_path / "out", MODEL, plan="job") as writer:
        assert writer.finished == {"w", "b", "e"}
        writer.write("s", MODEL["s"])


KILLED = """
import os, pathlib, random, shutil, signal, sys, time
import numpy as np
from wspace import checkpoint

home, shards = pathlib.Path(sys.argv[1]), {"shard_bytes": 3000}
model = {str(i): np.random.default_rng(i).bytes(1000 + i) for i in range(8)}
model = {name: np.frombuffer(data, np.uint8) for name, data in model.items()}

def write(path, **options):
    with checkpoint.create(path, model, **options) as writer:
        for name, x in model.items():
            if name not in writer.finished:
                writer.write_part(name, 500, x[500:])
                writer.write_part(name, 0, x[:500])

def content(path):
    if not path.exists():
        return None
    if path.is_file():
        return path.read_bytes()
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}

def child(run):
    pid = os.fork()
    if not pid:
        try:
            run()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return pid

def dies_at(call):
    left = [call]
    for name in ("pwrite", "write", "fsync", "rename", "replace", "mkdir", "unlink", "ftruncate"):
        def counted(*arguments, real=getattr(os, name), **options):
            left[0] -= 1
            if not left[0]:
                if real.__name__ in ("pwrite", "write"):  # half of it gets through
                    number, data, *rest = arguments
                    real(number, bytes(data)[: len(data) // 2], *rest)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)
        setattr(os, name, counted)

def survives(name, kill, old, **options):
    out = home / name
    if old is not None:
        shutil.copytree(old, out) if old.is_dir() else shutil.copy(old, out)
    before = content(out)
    status = kill(lambda: write(out, plan="job", force=True, **options))
    killed = os.WIFSIGNALED(status)
    assert killed or status == 0, status
    found = content(out)
    kept = {"notes.txt": b"mine"} if old is not None and out.suffix == "" else {}
    wanted = expected[name] | kept if kept else expected[name]
    # Between two renames there is a moment without the old folder; the next run puts it back.
    # Before the third, the new one has not yet what was beside the old weights.
    states = (before, wanted, expected[name])
    assert found in states or (found is None and out.suffix == ""), call
    _, status = os.waitpid(child(lambda: write(out, plan="job", force=True, **options)), 0)
    assert status == 0, status
    assert content(out) == wanted, call
    assert os.listdir(home) == [name], os.listdir(home)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    return killed

def at_call(run):
    def go():
        dies_at(call)
        run()
    return os.waitpid(child(go), 0)[1]

def at_time(run):
    pid = child(run)
    time.sleep(random.Random(call).uniform(0, duration))
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]

elsewhere = home.parent / "elsewhere"
elsewhere.mkdir()
forms = {"out.safetensors": {}, "out": shards}
expected, counts = {}, {}
start = time.perf_counter()
for name, options in forms.items():
    write(elsewhere / name, **options)
    expected[name] = content(elsewhere / name)
duration = time.perf_counter() - start
write(elsewhere / "old")
(elsewhere / "old" / "notes.txt").write_bytes(b"mine")
write(elsewhere / "old.safetensors", metadata={"old": "yes"})
olds = {"out": elsewhere / "old", "out.safetensors": elsewhere / "old.safetensors"}
for name, options in forms.items():
    for old in (None, olds[name]):
        call = 1
        while survives(name, at_call, old, **options):
            call += 1
        counts[name, old is not None] = call - 1
        for call in range(5):
            survives(name, at_time, old, **options)
print(sorted(counts.values()))
"""


def test_killed_at_any_call_to_the_system_or_any_moment_a_rerun_completes(tmp_path):
    (tmp_path / "home").mkdir()
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "home")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    # So many calls there are in a run, and at each of them one was killed.
    assert all(count > 30 for count in json.loads(run.stdout))


def test_an_output_that_was_being_replaced_is_put_back(tmp_path):
    out = written(tmp_path / "out", MODEL)
    before = content(out)
    aside = tmp_path / ".out.0123456789abcdef.partial"
    aside.mkdir()
    out.rename(aside / "old")
    with (
        pytest.raises(FileExistsError, match="exists"),
        checkpoint.create(out, {"w": MODEL["w"]}, plan="another job"),
    ):
        pass
    assert content(out) == before
    assert os.listdir(tmp_path) == ["out"]
