"""Where outputs lie: file systems that lack something, what is checked before, what force takes."""

import errno
import fcntl
import os
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from tests.test_writer import MODEL, content, stopped, written
from wspace import checkpoint
from wspace.__main__ import main
from wspace.checkpoint import places

LACKING = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def raises(number):
    def call(*_, **__):
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Two models in a folder in which the commands run."""
    for i, name in enumerate("ac"):
        layout = {"l.weight": np.full((2, 3), i, np.float32), "n": np.arange(2)}
        with checkpoint.create(tmp_path / name, layout) as writer:
            for key, x in layout.items():
                writer.write(key, x)
            writer.add("config.json", b"{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(words):
    return main(words.split())


@pytest.mark.parametrize("number", LACKING)
def test_without_locks_or_flushed_folders_the_output_is_written_and_it_is_said_once(
    models, monkeypatch, capsys, number
):
    def fsync(descriptor, real=os.fsync):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(fcntl, "flock", raises(number))
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "posix_fallocate", raises(errno.EOPNOTSUPP))
    with pytest.warns(UserWarning, match="file system") as told:
        written(models / "out", MODEL)
    said = {str(x.message) for x in told}
    assert len(said) == 2, said
    assert any(os.strerror(number) in x for x in said)
    assert sorted(os.listdir(models)) == ["a", "c", "out"]
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run("merge linear a c -o m --quiet") == 0
    assert sorted(capsys.readouterr().err.splitlines()) == sorted(
        f"wspace merge: {x}" for x in said
    )
    assert (models / "m").is_dir()


def test_an_error_of_a_lock_or_of_a_file_is_said_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", raises(errno.EIO))
    with pytest.raises(OSError, match=r"cannot write .*\.out\.lock \(Input/output error\)"):
        written(tmp_path / "out", MODEL)
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", raises(errno.EINVAL))
    with pytest.raises(OSError, match=r"cannot write .*out \(Invalid argument\)"):
        written(tmp_path / "out", MODEL)


def denied(*paths, real=os.access):
    def access(path, mode):
        return os.fspath(path) not in map(os.fspath, paths) and real(path, mode)

    return access


def test_a_file_beside_the_weights_that_cannot_be_read_is_named_before_anything(
    models, monkeypatch, capsys
):
    monkeypatch.setattr(os, "access", denied("a/config.json"))
    assert run("merge linear a c -o m --quiet") == 1
    told = capsys.readouterr().err
    assert "cannot read a/config.json (Permission denied)" in told
    assert sorted(os.listdir(models)) == ["a", "c"]


COMMANDS = (
    "merge linear a c -o {} --quiet",
    "steer retarget a c --target c -o {} --quiet",
    "extract a c --rank 1 -o {} --quiet",
)


@pytest.mark.parametrize("dry", ["", " --dry-run"])
@pytest.mark.parametrize("words", COMMANDS)
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("none/m", "No such file or directory"),
        ("file/m", "Not a directory"),
        (300 * "m", "File name too long.*give a shorter name"),
        ("here/m", "Permission denied: .*here"),
    ],
)
def test_what_cannot_be_written_is_refused_before_a_tensor_is_read(
    models, monkeypatch, capsys, words, out, message, dry
):
    def reads(*_):
        raise AssertionError("a tensor is read")

    (models / "here").mkdir()
    (models / "file").touch()
    monkeypatch.setattr(os, "access", denied("here"))
    monkeypatch.setattr(checkpoint.Stored, "rows", reads)
    assert run(words.format(out) + dry) == 1
    assert re.search(f"cannot write m+|cannot write .*{out[:9]}", told := capsys.readouterr().err)
    assert re.search(message, told)


@pytest.mark.parametrize("dry", ["", " --dry-run"])
@pytest.mark.parametrize("words", COMMANDS)
def test_a_full_disk_is_told_before_a_tensor_is_read(models, monkeypatch, capsys, words, dry):
    disk = SimpleNamespace(f_bavail=3, f_frsize=1, f_blocks=9, f_flag=0)
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    assert run(words.format("m") + dry) == 1
    told = capsys.readouterr().err
    assert re.search(r"cannot write m.* \(No space left on device: it takes \d+ bytes, 3 are", told)
    assert sorted(os.listdir(models)) == ["a", "c"]


def test_what_an_interrupted_job_holds_is_not_asked_for_again(tmp_path, monkeypatch):
    stopped(tmp_path / "out", ["w"], plan="job")
    disk = SimpleNamespace(f_bavail=0, f_frsize=1, f_blocks=9, f_flag=0)
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "other", MODEL)
    with checkpoint.create(tmp_path / "out", MODEL, plan="job") as writer:
        for name in MODEL.keys() - writer.finished:
            writer.write(name, MODEL[name])


def test_force_keeps_what_is_not_of_a_checkpoint_and_says_so(models, capsys):
    out = written(models / "m", MODEL, shard_bytes=20)
    for name in ("notes.txt", "tokenizer.json", "pytorch_model.bin", "wspace.json", ".gitignore"):
        (out / name).write_text(name)
    (out / "runs").mkdir()
    (out / "runs" / "config.json").write_text("mine")
    shards = {x for x in os.listdir(out) if "safetensors" in x}
    gone = shards | {"tokenizer.json", "pytorch_model.bin", "wspace.json"}
    assert run("merge linear a c -o m --force --dry-run") == 0
    told = capsys.readouterr().out
    (line,) = (x for x in told.splitlines() if "replaces" in x)
    goes, keeps = line.split("and keeps")
    assert all(f"m/{x}" in goes for x in gone)
    assert all(f"m/{x}" in keeps for x in ("notes.txt", "runs", ".gitignore"))
    assert run("merge linear a c -o m --force") == 0
    assert "replaces m/" in capsys.readouterr().err
    kept = {"notes.txt", "runs", ".gitignore"}
    assert set(os.listdir(out)) == kept | {"model.safetensors", "config.json", "wspace.json"}
    assert (out / "runs" / "config.json").read_text() == "mine"


def test_a_link_is_replaced_and_what_it_leads_to_stays(models, capsys):
    real = written(models / "real", MODEL)
    (real / "notes.txt").write_text("1")
    (models / "m").symlink_to("real")
    before = content(real)
    assert places.replaced(models / "m") == ([], [])
    assert run("merge linear a c -o m --force") == 0
    assert "replaces m\n" in capsys.readouterr().err
    assert content(real) == before
    assert not (models / "m").is_symlink()
    assert not (models / "m" / "notes.txt").exists()


def test_a_move_that_fails_loses_nothing_and_the_next_run_completes_it(tmp_path, monkeypatch):
    out = written(tmp_path / "out", MODEL)
    (out / "notes.txt").write_text("1")

    def fails(source, target, real=os.rename):
        if os.path.basename(source) == "notes.txt":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match=r"cannot write .*out"):
        written(out, {"w": MODEL["w"]}, force=True)
    assert [x.read_text() for x in tmp_path.rglob("notes.txt")] == ["1"]
    monkeypatch.undo()
    written(out, {"w": MODEL["w"]}, force=True)
    assert (out / "notes.txt").read_text() == "1"
    assert os.listdir(tmp_path) == ["out"]


def test_what_other_jobs_left_is_named_and_removed_where_asked(models, capsys):
    for plan in ("one", "two"):
        stopped(models / "m", ["w"], plan=plan)
    left = sorted(x for x in os.listdir(models) if x.endswith(".partial"))
    assert len(left) == 2
    assert run("merge linear a c -o m --dry-run") == 0
    told = capsys.readouterr().out
    assert all(x in told for x in left)
    assert run("merge linear a c -o m") == 0
    told = capsys.readouterr().err
    assert all(x in told for x in left)
    assert "--remove-partial" in told
    assert run("merge linear a c -o m --force --remove-partial") == 0
    assert sorted(os.listdir(models)) == ["a", "c", "m"]
    stopped(models / "m.safetensors", ["w"], plan="one")
    with checkpoint.create(
        models / "m.safetensors", MODEL, plan="one", remove_partial=True
    ) as writer:
        assert "w" in writer.finished
        for name in MODEL.keys() - writer.finished:
            writer.write(name, MODEL[name])
