"""Kills a merge at random moments, runs it again, and checks what is there before and after.

Run: python benchmarks/interruptions.py [--count 50] [--gib 0.5] [--seed 0] [--where FOLDER]

The command is `wspace merge linear` of two models of `llama_like.py`. It is run undisturbed first,
which gives the bytes that all others must have, how long it lives, and when it begins to write.
Then it is killed (SIGKILL) until that has found it alive `count` times: every second moment is
drawn from its whole life, the others from the time in which it writes. Checked after a kill: the
output is not there, and nothing else but hidden files, or it is there and whole. The command is
given again (with --force where the output is there) and must succeed. Checked after that: the
same files with the same bytes, and nothing beside them. A tensor counts as resumed if it is in the
journal before the second run, and that run does not enter it again. Any failure raises.
"""

import argparse
import collections
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import llama_like

Bytes = dict[str, str]
"""The files of an output by their names, as a hash of their bytes."""
MISSED = "after its end"


def started(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """The process of a command, in a group of its own."""
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def succeeded(process: subprocess.Popen[bytes]) -> None:
    """Waits for the end, which must be a good one."""
    _, said = process.communicate()
    assert process.returncode == 0, said.decode()


def bytes_of(folder: Path) -> Bytes:
    """All that is in an output."""
    found = {}
    for file in sorted(folder.rglob("*")):
        with file.open("rb") as opened:
            found[str(file.relative_to(folder))] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def timed(command: Sequence[str], out: Path) -> tuple[float, float]:
    """Seconds until an undisturbed run begins to write, and until it ends."""
    start, begun = time.monotonic(), float("inf")
    process = started(command)
    while process.poll() is None:
        if any(out.parent.glob(".*.partial")):
            begun = min(begun, time.monotonic() - start)
        time.sleep(0.002)
    ended = time.monotonic() - start
    succeeded(process)
    return min(begun, ended), ended


def journal(home: Path) -> BinaryIO | None:
    """The journal that a killed run has left, open, so that it can be read when it is removed."""
    return next((file.open("rb") for file in home.glob(".*.partial/journal")), None)


def entered(file: BinaryIO | None) -> list[str]:
    """The tensors in a journal: the whole lines that are still to be read."""
    lines = file.read().split(b"\n")[:-1] if file else []
    return [json.loads(line)[0] for line in lines]


def attempt(command: Sequence[str], out: Path, moment: float, whole: Bytes) -> tuple[str, int]:
    """Where a kill found a run, and how many tensors were resumed by the next one."""
    process = started(command)
    time.sleep(moment)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    shown = [file.name for file in out.parent.iterdir() if not file.name.startswith(".")]
    file = journal(out.parent)
    before = entered(file)
    if process.returncode == 0:
        where = MISSED
    elif shown:
        where = "after writing, with the output in place"
    elif before:
        where = "while writing, with tensors finished"
    elif any(out.parent.glob(".*.partial")):
        where = "while writing, with none finished"
    else:
        where = "before writing"
    assert shown in ([], [out.name]), f"beside the output there is {shown}"
    assert not shown or bytes_of(out) == whole, f"an output that is not whole, {where}"
    succeeded(started([*command, "--force"] if shown else command))
    again = set(entered(file))
    if file:
        file.close()
    assert bytes_of(out) == whole, f"other bytes after a kill {where}"
    left = [file.name for file in out.parent.iterdir() if file != out]
    assert not left, f"{left} is left after a kill {where}"
    return where, 0 if shown else len(set(before) - again)


def main() -> None:
    """Kills, and prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--gib", type=float, default=0.5, help="size of a model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--where", type=Path, help="a folder for models and results")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory(dir=options.where) as scratch:
        models = llama_like.write(options.where or Path(scratch), options.gib, "bfloat16")
        out = Path(scratch, "results", "merged")
        out.parent.mkdir()
        command = [sys.executable, "-m", "wspace", "merge", "linear"]
        command += [str(models["a"]), str(models["c"]), "--coefficients", "0.7", "0.3"]
        command += ["-o", str(out), "--quiet"]
        timed(command, out)  # byte code and the page cache
        whole = bytes_of(out)
        begun, ended = timed([*command, "--force"], out)
        print(f"{platform.machine()}, {os.cpu_count()} cores, {options.gib:g} GiB a model")
        print(f"undisturbed: {ended:.2f} s, of which it writes from {begun:.2f} s")
        assert bytes_of(out) == whole, "two undisturbed runs differ"
        counts: collections.Counter[str] = collections.Counter()
        resumed = []
        while counts.total() - counts[MISSED] < options.count:
            shutil.rmtree(out)
            moment = draw.uniform(0 if counts.total() % 2 else begun, ended)
            where, tensors = attempt(command, out, moment, whole)
            counts[where] += 1
            resumed.append(tensors)
    missed = counts.pop(MISSED, 0)
    print(f"{counts.total()} kills, {missed} more that came too late")
    for where, n in sorted(counts.items()):
        print(f"  {n:3} {where}")
    print(f"{sum(n > 0 for n in resumed)} second runs resumed, {sum(resumed)} tensors in all")
    print("all second runs gave the same bytes, and no part of an output looked like a whole one")


if __name__ == "__main__":
    main()
