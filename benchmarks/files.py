"""How fast whole commands are beside mergekit-yaml and copying, and how much memory they take.

Run: python benchmarks/files.py [speed] [agreement] [--gib 1] [--rounds 3] [--only linear ...]
     [--dtype bfloat16] [--peer path/to/mergekit-yaml] [--where FOLDER]

The models are those of `llama_like.py`, in FOLDER, where they stay for the next run, or in a
temporary folder. Every command is a process of its own, without a compilation cache. mergekit has
an environment of its own (`pip install mergekit==0.1.5`), and is left out where there is none.

`speed`: seconds from start to end, interleaved, with files in the page cache where they fit and
nothing waiting to be written. The floor reads the inputs (`cat` to /dev/null) and writes one of
them (`cp`); a merge that is to survive the end of the machine has to wait for the disk too, as
the second floor does. Start-up is the same command on models of half a megabyte. "anonymous" is
the most memory that the process and those it started had for themselves (RssAnon and RssShmem,
every 10 ms); "resident" also counts the pages of mapped files, which the page cache holds anyway.

`agreement`: results beside those of mergekit, computed in the dtype of the models and in float32:
the share of entries that are more than one rounding apart, and the largest distance in roundings;
a rounding is a unit in the last place of the larger one, and of the inputs of the largest of them:
what cancels to almost nothing is apart by many of the former. For ties it also says how many of
the entries that are apart could go either way, to the precision of the computation: a magnitude is
that at which the trim ends, or the votes cancel.
"""

import argparse
import functools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import llama_like
import ml_dtypes
import numpy as np
from safetensors import safe_open

DENSITY = 0.2
PRESET = "--preset mergekit-0.1.5"
MEMORY_BAR = 1.0
_PAUSE, _FAMILY_PAUSE = 0.01, 0.1


class Method(NamedTuple):
    """A merge, as words after `wspace merge` and as a recipe of mergekit."""

    reads: tuple[str, ...]
    words: str
    recipe: Mapping[str, Any]
    weights: tuple[float, ...] = ()
    bar: float | None = None
    """How often faster than mergekit it has to be."""
    floor_bar: float | None = None
    """How many times as long as the floor it may take, without start-up."""
    whole: str | None = None
    """The form that looks at the whole model, which mergekit has not."""


METHODS = {
    "linear": Method(
        ("a", "c"),
        "linear {a} {c} --coefficients 0.7 0.3",
        {},
        weights=(0.7, 0.3),
        bar=4,
        floor_bar=2.5,
    ),
    "slerp": Method(
        ("a", "c"),
        f"slerp {{a}} {{c}} --t 0.5 {PRESET}",
        {"base_model": "a", "parameters": {"t": 0.5}},
        bar=3.5,
        whole="slerp {a} {c} --t 0.5",
    ),
    "task_arithmetic": Method(
        ("base", "a", "c"),
        "task_arithmetic {a} {c} --base {base} --coefficients 0.7 0.3",
        {"base_model": "base"},
        weights=(0.7, 0.3),
    ),
    "ties": Method(
        ("base", "a", "c"),
        f"ties {{a}} {{c}} --base {{base}} --density {DENSITY} {PRESET}",
        {"base_model": "base", "parameters": {"density": DENSITY}},
        weights=(1.0, 1.0),
        bar=10,
        whole=f"ties {{a}} {{c}} --base {{base}} --density {DENSITY}",
    ),
}


class Cost(NamedTuple):
    """What a process took: seconds, and bytes of memory at the most."""

    seconds: float
    anonymous: int
    resident: int


def measured(command: Sequence[str | Path]) -> Cost:
    """Runs a command to its end; raises with what it said if it fails."""
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=said, env=_environment())
        peaks, ended = [0, 0], threading.Event()
        watch = threading.Thread(target=_watch, args=(process.pid, peaks, ended))
        watch.start()
        code = process.wait()
        seconds = time.perf_counter() - start
        ended.set()
        watch.join()
        if code:
            said.seek(0)
            raise RuntimeError(f"{command} failed: {said.read().decode()[-2000:]}")
    return Cost(seconds, *peaks)


def _environment() -> dict[str, str]:
    """That of a user: no settings of JAX; and no look-ups in the network."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    return kept | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _watch(process: int, peaks: list[int], ended: threading.Event) -> None:
    """Keeps the largest sums over a process and its descendants."""
    family, looked = {process}, 0.0
    while not ended.wait(_PAUSE):
        if time.monotonic() - looked > _FAMILY_PAUSE:
            family, looked = _family(process), time.monotonic()
        found = np.sum([_memory(member) for member in family], axis=0)
        peaks[:] = map(max, peaks, found.tolist())


def _family(process: int) -> set[int]:
    """A process and its descendants."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    family, size = {process}, 0
    while len(family) > size:
        size = len(family)
        family |= {child for child, parent in parents.items() if parent in family}
    return family


def _memory(process: int) -> tuple[int, int]:
    """Bytes that are a process's own, and all that are resident."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = dict.fromkeys(("RssAnon", "RssShmem", "VmRSS"), 0)
    for line in lines:
        name, _, value = line.partition(":")
        if name in found:
            found[name] = 1024 * int(value.split()[0])
    return found["RssAnon"] + found["RssShmem"], found["VmRSS"]


def ours(words: str, folders: Mapping[str, Path], out: Path) -> list[str]:
    """The command of a merge."""
    filled = [word.format(**folders) for word in words.split()]
    return [sys.executable, "-m", "wspace", "merge", *filled, "-o", str(out), "--quiet"]


def theirs(
    peer: str, name: str, folders: Mapping[str, Path], out: Path, dtype: str | None = None
) -> list[str]:
    """The command of mergekit for a merge, with its recipe written beside the output."""
    method = METHODS[name]
    merged = [k for k in method.reads if k != "base"]
    recipe: dict[str, Any] = {"merge_method": name, **method.recipe}
    recipe["models"] = [{"model": str(folders[k])} for k in merged]
    for model, weight in zip(recipe["models"], method.weights, strict=False):
        model["parameters"] = {"weight": weight}
    if "base_model" in recipe:
        recipe["base_model"] = str(folders[recipe["base_model"]])
    if dtype is not None:
        stored = json.loads((folders["a"] / "config.json").read_text())["dtype"]
        recipe |= {"dtype": dtype, "out_dtype": stored}
    file = out.with_suffix(".yml")
    file.write_text(json.dumps(recipe))  # which is YAML too
    return [peer, str(file), str(out), "--no-copy-tokenizer", "--no-write-model-card", "--quiet"]


def floors(reads: Sequence[Path], out: Path) -> dict[str, list[str]]:
    """Reading the inputs and writing one of them."""
    copy = 'out="$1"; shift; cat "$@" > /dev/null && mkdir "$out" && cp "$(dirname "$1")"/* "$out"'
    inputs = [file for folder in reads for file in sorted(folder.glob("*.safetensors"))]
    words = ["sh", *map(str, [out, *inputs])]
    return {
        "cat and cp": ["sh", "-c", copy, *words],
        "cat and cp, to the disk": ["sh", "-c", copy + ' && sync "$out"/*', *words],
    }


def speed(
    name: str, folders: Mapping[str, Path], small: Mapping[str, Path], options: argparse.Namespace
) -> None:
    """One method: what it takes, and the bars."""
    method, out = METHODS[name], options.where / "out"
    reads = [folders[k] for k in method.reads]
    commands = floors(reads, out)
    commands["wspace"] = ours(method.words, folders, out)
    commands["wspace, start-up"] = ours(method.words, small, out)
    if method.whole:
        commands["wspace, whole model"] = ours(method.whole, folders, out)
        commands["wspace, whole model, start-up"] = ours(method.whole, small, out)
    if options.peer:
        commands["mergekit"] = theirs(options.peer, name, folders, out)
        commands["mergekit, start-up"] = theirs(options.peer, name, small, options.where / "tiny")
    costs: dict[str, list[Cost]] = {contender: [] for contender in commands}
    for _ in range(options.rounds):
        for contender, command in commands.items():
            os.sync()
            costs[contender].append(measured(command))
            for folder in (out, options.where / "tiny"):
                shutil.rmtree(folder, ignore_errors=True)
    read, written = sum(map(llama_like.size, reads)), llama_like.size(folders["a"])
    print(f"\n{name}: {_gib(read)} read, {_gib(written)} written")
    print(f"  {'':<32}{'median s':>10}{'least s':>10}{'anonymous':>12}{'resident':>12}")
    for contender, found in costs.items():
        seconds, *memory = zip(*found, strict=True)
        peaks = "".join(f"{_gib(max(column)):>12}" for column in memory)
        print(f"  {contender:<32}{statistics.median(seconds):10.2f}{min(seconds):10.2f}{peaks}")
    _bars(method, costs)


def _bars(method: Method, costs: Mapping[str, Sequence[Cost]]) -> None:
    """The ratios of the medians."""
    median = {k: statistics.median(cost.seconds for cost in found) for k, found in costs.items()}
    for form in ("wspace", "wspace, whole model"):
        if form not in costs:
            continue
        work = median[form] - median[f"{form}, start-up"]
        bar = f" (bar {method.floor_bar})" if method.floor_bar else ""
        said = f"without start-up {work / median['cat and cp']:.2f} x cat and cp{bar}"
        said += f", {work / median['cat and cp, to the disk']:.2f} x to the disk"
        if "mergekit" in costs:
            bar = f" (bar {method.bar})" if method.bar else ""
            said += f"; {median['mergekit'] / median[form]:.1f} x as fast as mergekit{bar}"
        memory = max(cost.anonymous for cost in costs[form])
        print(f"  {form}: {said}; {_gib(memory)} of memory (bar {MEMORY_BAR:g} GiB)")


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"


def agreement(
    name: str, folders: Mapping[str, Path], _: Mapping[str, Path], options: argparse.Namespace
) -> None:
    """One method: how far results are from mergekit's."""
    if not options.peer:
        return
    mine, other = options.where / "mine", options.where / "theirs"
    measured(ours(METHODS[name].words, folders, mine))
    for dtype in dict.fromkeys((options.dtype, "float32")):
        measured(theirs(options.peer, name, folders, other, dtype))
        count = apart = 0
        largest = of_inputs = rest = 0.0
        either = np.zeros(3, int)
        for tensor, x in tensors(mine):
            y = _tensor(other, tensor)
            points = [_tensor(folders[k], tensor) for k in METHODS[name].reads]
            steps = roundings(x, y)
            differ = steps > 1
            count, apart = count + x.size, apart + np.count_nonzero(differ)
            largest = max(largest, float(steps.max()))
            coarse = roundings(x, y, *points)
            of_inputs = max(of_inputs, float(coarse.max()))
            if name == "ties":
                last, votes = undecided(*points, dtype=dtype)
                either += [np.sum(votes), np.sum(differ & last), np.sum(differ & votes & ~last)]
                rest = max(rest, float(coarse[~(last | votes)].max(initial=0)))
        said = f"{apart} of {count} entries ({apart / count:.2e}) more than a rounding apart"
        said += f", at most {largest:.3g} roundings, or {of_inputs:.3g} of the inputs"
        if name == "ties":
            cancel, last, votes = either
            said += f"; {last} of them where the trim ends, {votes} more where votes cancel"
            said += f" (which they do in {cancel} entries), all others at most {rest:.3g}"
        print(f"{name}, mergekit in {dtype}: {said}")
        shutil.rmtree(other)
    shutil.rmtree(mine)


def roundings(x: np.ndarray, y: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """How many units in the last place of the largest of some entries `x` and `y` are apart."""
    digits = ml_dtypes.finfo(x.dtype).nmant
    size = functools.reduce(np.maximum, (np.abs(z.astype(np.float32)) for z in (x, y, *others)))
    _, exponent = np.frexp(size)
    steps = np.exp2(exponent - 1.0 - digits)
    return np.abs(x.astype(np.float64) - y.astype(np.float64)) / steps


def undecided(base: np.ndarray, *tuned: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Where the trim of ties, and where its vote, depends on less than a rounding."""
    eps = float(ml_dtypes.finfo(llama_like.DTYPES[dtype]).eps)
    votes, mass = np.zeros(base.shape), np.zeros(base.shape)
    at_last = np.zeros(base.shape, bool)
    for x in tuned:
        delta = x.astype(np.float64) - base.astype(np.float64)
        size = np.abs(delta)
        kept = max(int(DENSITY * size.size), 1)
        last = np.partition(size.ravel(), -kept)[-kept]
        at_last |= np.abs(size - last) <= eps * last
        votes += delta * (size >= last)
        mass += size * (size >= last)
    return at_last, (np.abs(votes) <= eps * mass) & (mass > 0)


def tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors of a folder, one by one."""
    for name, opened in _stored(folder):
        yield name, opened.get_tensor(name)


def _tensor(folder: Path, name: str) -> np.ndarray:
    """A tensor of a folder."""
    return next(opened.get_tensor(name) for found, opened in _stored(folder) if found == name)


def _stored(folder: Path) -> Iterator[tuple[str, Any]]:
    """The names of the tensors of a folder, each with its open file."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "numpy") as opened:
            names = opened.keys()
            yield from ((name, opened) for name in names)


def main() -> None:
    """Prints the parts asked for, both by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="speed, agreement; both by default")
    parser.add_argument("--gib", type=float, default=1.0, help="size of a model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtype", choices=llama_like.DTYPES, default="bfloat16")
    parser.add_argument("--peer", default=shutil.which("mergekit-yaml"), help="its mergekit-yaml")
    parser.add_argument("--where", type=Path, help="a folder for models and results")
    options = parser.parse_args()
    peer = options.peer or "no mergekit"
    print(f"{platform.machine()}, {os.cpu_count()} cores, {options.dtype}, {Path(peer).name}")
    with tempfile.TemporaryDirectory(dir=options.where) as scratch:
        home, options.where = options.where or Path(scratch), Path(scratch)
        folders = llama_like.write(home, options.gib, options.dtype)
        small = llama_like.write(home, 0.0005, options.dtype)
        runs = {"speed": speed, "agreement": agreement}
        for name in options.only:
            for part in options.parts or runs:
                runs[part](name, folders, small, options)


if __name__ == "__main__":
    main()
