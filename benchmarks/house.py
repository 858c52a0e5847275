"""How the library is built, in figures: lines, modules that know of laziness, reads, programs.

    python benchmarks/house.py [lines] [passages] [reads] [programs] [shapes]

All by default, each in a process of its own. To compare two commits, run it with PYTHONPATH set to
a checkout of each: it calls nothing that is not public, and finds modules by their imports.
"""

import argparse
import ast
import collections
import contextlib
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import wspace
from wspace import average, checkpoint, cone, interpolate, merge, negative

jax.config.update("jax_enable_compilation_cache", False)

ROOT = pathlib.Path(wspace.__file__).parent
LAZINESS = ("_lazy", "_padding", "_pieces")
SEAM = (*LAZINESS, "tree", "typing", "checkpoint")
"""What may know of laziness: itself, what lifts formulas, the types, and the files."""


def shown(what: str, figure: object) -> None:
    """Prints a line of the table."""
    print(f"{what:58s} {figure}", flush=True)


def lines() -> None:
    """Lines of the package, and which modules above the seam import laziness or padding."""
    total: collections.Counter[str] = collections.Counter()
    knowing = []
    for path in sorted(ROOT.rglob("*.py")):
        text = path.read_text()
        module = ast.parse(text)
        prose: set[int] = set()
        for node in ast.walk(module):
            body = getattr(node, "body", None)
            for part in body if isinstance(body, list) else []:
                if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant):
                    prose |= set(range(part.lineno, part.end_lineno + 1))
        rows = text.splitlines()
        total["all"] += len(rows)
        total["docstrings"] += len(prose)
        blank = {i for i, row in enumerate(rows, 1) if not row.strip() or row.strip()[0] == "#"}
        total["code"] += len(set(range(1, len(rows) + 1)) - prose - blank)
        name = path.relative_to(ROOT).with_suffix("").as_posix()
        if name.split("/")[0] not in SEAM and _imports(module) & set(LAZINESS):
            knowing.append(name)
    shown("lines: all, code, docstrings", [total[k] for k in ("all", "code", "docstrings")])
    shown("modules above `tree` that import laziness or padding", f"{len(knowing)} {knowing}")


def _imports(module: ast.Module) -> set[str]:
    """The modules of the package that one imports from its top."""
    found: set[str] = set()
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.module:
            top, *rest = node.module.split(".")
            if top == "wspace":
                found |= {rest[0]} if rest else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("wspace.")}
    return found


RANDOM = np.random.default_rng(0)


def model(count: int) -> dict[str, jax.Array]:
    """Matrices, and as many vectors."""
    shapes = {f"w{i}": (6, 5) for i in range(count)} | {f"b{i}": (5,) for i in range(count)}
    return {name: jnp.asarray(RANDOM.normal(size=s), jnp.float32) for name, s in shapes.items()}


def free(count: int) -> dict[str, Any]:
    """Where such a model may move."""
    return {f"w{i}": jnp.eye(6) for i in range(count)} | {f"b{i}": 1.0 for i in range(count)}


def passages() -> None:
    """How often an eager call goes from one module of the package into another."""
    x, y, avoid = (model(3) for _ in range(3))
    allow = [free(3)] * 2

    def call() -> object:
        return negative.exit_ball([x, y], (0.5, 0.5), avoid, 100.0, direction=avoid, allow=allow)

    call()
    into: collections.Counter[str] = collections.Counter()

    def entered(frame: Any, event: str, _: Any) -> None:
        name, caller = frame.f_code.co_filename, frame.f_back
        if event != "call" or not name.startswith(str(ROOT)):
            return
        while caller and not caller.f_code.co_filename.startswith(str(ROOT)):
            caller = caller.f_back
        if caller is None or caller.f_code.co_filename != name:
            into[pathlib.Path(name).relative_to(ROOT).with_suffix("").as_posix()] += 1

    sys.setprofile(entered)
    call()
    sys.setprofile(None)
    lazy = sum(count for name, count in into.items() if name in LAZINESS)
    shown("passages of exit_ball(allow=): all, into laziness", [sum(into.values()), lazy])


@contextlib.contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """How often the host waits for a value; what a read calls inside is not another one."""
    kind, count, inside = type(jnp.zeros(())), 0, False

    def counting(read: Callable[..., Any]) -> Callable[..., Any]:
        def called(x: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal count, inside
            outermost = not inside and isinstance(x, jax.Array)
            count, inside = count + outermost, inside or outermost
            try:
                return read(x, *args, **kwargs)
            finally:
                inside = inside and not outermost

        return called

    names = ("__array__", "__bool__", "__float__", "__int__", "__index__", "item", "tolist")
    places = [(kind, name) for name in names] + [(np, "asarray"), (np, "array")]
    kept = [(place, name, getattr(place, name)) for place, name in places]
    for place, name, read in kept:
        setattr(place, name, counting(read))
    try:
        yield lambda: count
    finally:
        for place, name, read in kept:
            setattr(place, name, read)


def reads() -> None:
    """How often calls on twelve matrices and twelve vectors wait for a value."""
    x, y, z = (model(12) for _ in range(3))
    allow, squares = [free(12)] * 2, [{k: v * v for k, v in tree.items()} for tree in (x, y)]
    half = (0.5, 0.5)
    calls = {
        "retarget(allow=)": lambda: negative.retarget([x, y], half, z, allow=allow),
        "exit_ball(allow=)": lambda: negative.exit_ball(
            [x, y], half, z, 100.0, direction=z, allow=allow
        ),
        "tsv_m": lambda: merge.tsv_m(x, [y, z]),
        "fisher_mean": lambda: average.fisher_mean([x, y], squares),
        "cone.project": lambda: cone.project(cone.Rank(1), x),
    }
    for name, call in calls.items():
        call()
        with counted() as count:
            call()
        shown(f"blocking reads of {name}, 24 leaves", count())


def many_shapes() -> dict[str, jax.Array]:
    """128 small tensors of 128 shapes."""
    shapes = {f"t{i}": (65 + i,) if i % 2 else (9 + i, 17) for i in range(128)}
    return {name: jnp.asarray(RANDOM.normal(size=s), jnp.float32) for name, s in shapes.items()}


def programs() -> None:
    """What a merge of files with 128 tensors of 128 shapes compiles."""
    from wspace.__main__ import main

    compiled = 0

    def listen(event: str, *_: Any, **__: Any) -> None:
        nonlocal compiled
        compiled += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    with tempfile.TemporaryDirectory() as folder:
        base, *tuned, out = (f"{folder}/{name}.safetensors" for name in ("b", "x", "y", "out"))
        for path in (base, *tuned):
            checkpoint.save(path, many_shapes())
        before, start = compiled, time.perf_counter()
        main(["merge", "ties", *tuned, "--base", base, "-o", out, "--quiet"])
        seconds = time.perf_counter() - start
    shown("`wspace merge ties`, 128 shapes: programs, s", [compiled - before, round(seconds, 1)])


def shapes() -> None:
    """How long calls on 128 leaves of 128 shapes take, beside the same compiled as one."""
    x, y, z = (many_shapes() for _ in range(3))
    calls = {
        "lerp": (interpolate.lerp, (x, y, 0.3)),
        "ties": (lambda x, y, z: merge.ties(x, [y, z]), (x, y, z)),
    }
    for name, (function, arguments) in calls.items():
        contenders = {"eager": function, "jit": jax.jit(function)}
        times: dict[str, list[float]] = {key: [] for key in contenders}
        for round_ in range(12):
            for key, call in contenders.items():
                start = time.perf_counter()
                jax.block_until_ready(call(*arguments))
                if round_:
                    times[key].append(1e3 * (time.perf_counter() - start))
        eager, jitted = (statistics.median(times[key]) for key in contenders)
        figures = [round(eager, 2), round(jitted, 2), round(eager / jitted, 2)]
        shown(f"{name}, 128 shapes again: eager ms, under jit ms, ratio", figures)


PARTS = {part.__name__: part for part in (lines, passages, reads, programs, shapes)}


def main() -> None:
    """Prints the parts asked for, each from a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}, all by default")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for part in arguments.parts or PARTS:
        if arguments.here:
            PARTS[part]()
        else:
            subprocess.run([sys.executable, __file__, "--here", part], check=True)


if __name__ == "__main__":
    main()
