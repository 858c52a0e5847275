"""How fast merges are beside mergekit's own functions, PEFT, NumPy, PyTorch and a plain copy.

Run: python benchmarks/merge_speed.py [merges] [compile] [--gib 1] [--rounds 5] [--only ties ...]

`merges`: whole models of one base, in float32 and bfloat16, in one process and interleaved. A
line is a contender: median and least milliseconds, and the bandwidth that the bytes it has to
move come to, beside that of a copy. Every input is counted as often as the method needs to read
it, the output once. Ours is "donated" (into a buffer given up), "fresh" (the caller's jit) and
"eager"; the others allocate, so that fresh is the like-for-like form, and run leaf by leaf, on
tensors in memory: reading and writing of files is no part of it. mergekit's methods are called by
`mergekit.merge_methods.api.merge_tensors`, PEFT's are those of `peft.utils.merge_utils`, with the
task vectors made beforehand; NumPy and PyTorch have the formula as it is written by hand. What is
not installed is left out. Below the lines stands how often ours is faster than mergekit's, by
medians, and how far the results are apart, at the leaf where that is most, by its norm.

`compile`: seconds of a first eager call of each merge of many small leaves, with empty caches, and
of a later one; for linear forms also those to trace and to compile one program for all leaves.
"""

import argparse
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from speed import Contenders, donated, forms, interleaved, model, peers, report, tensor, weighted

from wspace import average, interpolate, merge, tree

try:
    import torch
except ImportError:
    torch = None
try:
    from mergekit.merge_methods.api import merge_tensors
except ImportError:
    merge_tensors = None
try:
    from peft.utils import merge_utils
except ImportError:
    merge_utils = None


class Method(NamedTuple):
    """A merge of the base and tuned models, or of `count` models alone, and its peers."""

    count: int
    moved: int
    """How many models it has to read or write."""
    ours: Callable[..., Any]
    mergekit: tuple[str, dict[str, Any], int | None] | None = None
    """The method's name there, its parameters, and the place of the base."""
    plain: Callable[..., Any] | None = None
    """The formula on the arrays of one leaf."""
    peft: Callable[..., Any] | None = None
    """The formula on the task vectors of one leaf."""
    compiled: bool = True
    """Whether it is also measured under one `jit`, which takes minutes where leaves select."""


PRESETS = merge.presets.mergekit


def karcher(*points: Any) -> Any:
    """The mean on the sphere of every tensor."""
    return tree.per_leaf(average.karcher_mean)(points).weights


def model_stock(base: Any, *tuned: Any) -> Any:
    """Model stock for every tensor."""
    return average.model_stock(base, tuned, **PRESETS["model_stock"])


def added(base: Any, *tuned: Any) -> Any:
    """Task arithmetic as it is written without a library."""
    total = base
    for x in tuned:
        total = total + (x - base)
    return total


def dare(base: Any, *tuned: Any, **options: Any) -> Any:
    """DARE with a key that is always the same."""
    return merge.dare(jax.random.key(0), base, tuned, density=0.5, **options)


def ones(edits: Sequence[Any]) -> Any:
    """Coefficients for PEFT."""
    return torch.ones(len(edits))


SPARSE = {"weight": 1.0, "density": 0.2}
METHODS = {
    **{
        f"linear {k}": Method(
            k, k + 1, lambda *xs: average.mean(xs), ("linear", {"weight": 1.0}, None), weighted
        )
        for k in (2, 4, 8)
    },
    "slerp": Method(
        2,
        5,
        lambda x, y: tree.per_leaf(interpolate.slerp)(x, y, 0.3),
        ("slerp", {"t": 0.3}, 0),
    ),
    "task arithmetic": Method(
        3,
        4,
        lambda base, *tuned: merge.task_arithmetic(base, tuned),
        ("task_arithmetic", {"weight": 1.0}, 0),
        added,
        lambda edits: merge_utils.task_arithmetic(edits, ones(edits)),
    ),
    "ties": Method(
        3,
        7,
        lambda base, *tuned: merge.ties(base, tuned, **PRESETS["ties"] | {"density": 0.2}),
        ("ties", SPARSE, 0),
        peft=lambda edits: merge_utils.ties(edits, ones(edits), 0.2),
        compiled=False,
    ),
    "ties, whole tree": Method(
        3,
        7,
        lambda base, *tuned: merge.ties(base, tuned, density=0.2, scope="tree"),
        compiled=False,
    ),
    "dare": Method(
        3,
        4,
        dare,
        peft=lambda edits: merge_utils.dare_linear(edits, ones(edits), 0.5),
    ),
    "dare, norm kept": Method(
        3,
        7,
        lambda *models: dare(*models, rescale="norm"),
        ("dare_linear", SPARSE | {"density": 0.5}, 0),
    ),
    **{
        f"model stock {k}": Method(k + 1, 2 * k + 3, model_stock, ("model_stock", {}, 0))
        for k in (2, 3)
    },
    "karcher 3": Method(3, 7, karcher, ("karcher", {}, None)),
}


COMPILED = {
    "geometric median": lambda *points: average.geometric_median(points),
    "fisher mean": lambda *points: average.fisher_mean(points, [squares(x) for x in points]),
    "ties by row": lambda base, *tuned: merge.ties(base, tuned, scope="row"),
    "breadcrumbs": lambda base, *tuned: merge.breadcrumbs(
        base, tuned, **PRESETS["breadcrumbs"] | {"density": 0.2}
    ),
    "dare_ties": lambda base, *tuned: merge.dare_ties(jax.random.key(0), base, tuned),
    "della": lambda base, *tuned: merge.della(jax.random.key(0), base, tuned),
    "sce": lambda base, *tuned: merge.sce(base, tuned, density=0.5),
    "ram": lambda base, *tuned: merge.ram(base, tuned, boost=0.1),
    "pcb": lambda base, *tuned: merge.pcb(base, tuned),
    "magmax": lambda base, *tuned: merge.magmax(base, tuned),
    "negmerge": lambda base, *tuned: merge.negmerge(base, tuned),
    "ext_sub": lambda base, *tuned: merge.ext_sub(base, *tuned),
    "emr": lambda base, *tuned: merge.emr_model(base, merge.emr(base, tuned), 0),
}
"""Further merges of a base and two models, of which `compile` alone says something."""


def squares(x: Any) -> Any:
    """A Fisher made of weights, on the host, where it costs no program."""
    return jax.tree.map(lambda leaf: jax.device_put(np.square(np.asarray(leaf))), x)


def related(gib: float, dtype: Any, count: int) -> list[dict[str, jax.Array]]:
    """A base, and models tuned from it by a tenth of its size."""
    base = model(gib, dtype, 0)
    moved = jax.jit(
        lambda x, y: jax.tree.map(
            lambda a, b: a + (0.1 * b.astype(jnp.float32)).astype(dtype), x, y
        )
    )
    return [base, *(moved(base, model(gib, dtype, seed)) for seed in range(1, count))]


def theirs(method: Method, models: Sequence[dict[str, jax.Array]]) -> Contenders:
    """What mergekit and PEFT have for a method, on the same memory."""
    contenders: Contenders = {}
    if torch is None:
        return contenders
    tensors = [{k: tensor(x) for k, x in point.items()} for point in models]
    if merge_tensors is not None and method.mergekit is not None:
        name, parameters, base = method.mergekit

        @torch.no_grad()
        def whole() -> Any:
            return {
                k: merge_tensors(
                    [x[k] for x in tensors], name, parameters=parameters, base_index=base
                )
                for k in tensors[0]
            }

        contenders["mergekit"] = whole
    if merge_utils is not None and method.peft is not None:
        base_model, *tuned = tensors
        edits = {k: [x[k] - base_model[k] for x in tuned] for k in base_model}
        contenders["peft"] = lambda: {k: base_model[k] + method.peft(v) for k, v in edits.items()}
    return contenders


def merges(gib: float, rounds: int, names: Sequence[str]) -> None:
    """Every method on whole models, in float32 and bfloat16."""
    for dtype in (jnp.float32, jnp.bfloat16):
        models = related(gib, dtype, max(METHODS[name].count for name in names))
        size = sum(x.nbytes for x in models[0].values())
        print(f"\n{len(models[0])} leaves, {size / 2**30:.2f} GiB a model, {dtype.__name__}")
        copy = donated(
            lambda x, c: jax.tree.map(lambda leaf: (c * leaf).astype(leaf.dtype), x),
            (models[0], jnp.float32(1.5)),
        )
        for name in names:
            method = METHODS[name]
            points = tuple(models[: method.count])
            eager = {"eager": functools.partial(method.ours, *points)}
            ours = forms(method.ours, points) if method.compiled else eager
            contenders = {"copy, donated": copy} | ours
            contenders |= theirs(method, points) | peers(method.plain, points, dtype)
            times = interleaved(contenders, rounds)
            report(name, times, {"copy, donated": 2 * size}, method.moved * size)
            if "mergekit" in contenders:
                medians = {k: statistics.median(ms) for k, ms in times.items()}
                ratios = (f"{form} {medians['mergekit'] / medians[form]:.1f} x" for form in ours)
                print(f"    to mergekit: {', '.join(ratios)}", end="")
                if "dare" not in name:
                    apart = difference(contenders["eager"](), contenders["mergekit"]())
                    print(f"; apart by {apart:.1e}", end="")
                print()


def difference(ours: Any, other: Any) -> float:
    """The largest distance of two leaves, by the norm of the second."""
    apart = []
    for k, x in ours.items():
        mine, wanted = np.asarray(x, np.float32), other[k].float().numpy()
        apart.append(np.linalg.norm(mine - wanted) / np.linalg.norm(wanted))
    return float(max(apart))


def compiling(leaves: int, names: Sequence[str]) -> None:
    """Seconds until a first result, for few distinct shapes and for as many as leaves.

    An eager call compiles a kernel for every distinct shape, or for a few lengths; one program for
    the whole tree, under a caller's `jit`, has a kernel for every leaf, and is measured for the
    methods that read no sums.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    few = [((64,), (256,), (16, 32), (32, 64))[i % 4] for i in range(leaves)]
    many = [(64 + 4 * i,) if i % 2 else (8 + i // 20, 8 + i) for i in range(leaves)]
    calls = {name: METHODS[name].ours for name in names if name in METHODS}
    calls |= {name: COMPILED[name] for name in names if name in COMPILED}
    for shapes in (few, many):
        print(f"\n{leaves} leaves, {len(set(shapes))} shapes: seconds")
        print(f"    {'':<20}{'first call':>12}{'later':>8}{'one program':>13}")
        rng = np.random.default_rng(0)
        models = [
            # By `jnp.asarray` every shape would have a program.
            {
                f"{i}": jax.device_put(rng.standard_normal(shape, np.float32))
                for i, shape in enumerate(shapes)
            }
            for _ in range(8)
        ]
        for name, merged in calls.items():
            points = models[: METHODS[name].count if name in METHODS else 3]
            call = functools.partial(merged, *points)
            jax.clear_caches()
            first, later = (seconds(call) for _ in range(2))
            whole = ""
            if name.startswith(("linear", "task")):
                jax.clear_caches()
                whole = f"{seconds(functools.partial(compiled, merged, points)):13.2f}"
            print(f"    {name:<20}{first:12.2f}{later:8.2f}{whole}", flush=True)


def compiled(function: Callable[..., Any], points: Sequence[Any]) -> Any:
    """A function as one program for trees like some."""
    return jax.jit(function).lower(*points).compile()


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes, with what it returns."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def main() -> None:
    """Prints the parts asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="merges, compile; both by default")
    parser.add_argument("--gib", type=float, default=1.0, help="size of a model in float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--leaves", type=int, default=1000, help="how many to compile for")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*METHODS, *COMPILED],
        default=[*METHODS, *COMPILED],
        metavar="METHOD",
        help=f"of {', '.join(METHODS)}; to compile, also {', '.join(COMPILED)}",
    )
    options = parser.parse_args()
    installed = {"torch": torch, "mergekit": merge_tensors, "peft": merge_utils}
    found = ", ".join(f"{'' if module else 'no '}{name}" for name, module in installed.items())
    print(f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}, {found}")
    runs = {
        "merges": lambda: merges(
            options.gib, options.rounds, [name for name in options.only if name in METHODS]
        ),
        "compile": lambda: compiling(options.leaves, options.only),
    }
    for name in options.parts or runs:
        runs[name]()


if __name__ == "__main__":
    main()
