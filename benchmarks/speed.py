"""How fast wspace is beside NumPy, PyTorch and a plain copy: one process, interleaved, medians.

Run: python benchmarks/speed.py [merges] [selection] [lowrank] [--gib 1] [--rounds 5]

A line is a contender: median and least milliseconds, the bandwidth that the bytes it has to move
come to, and how that compares with a copy, or how often faster than the contender it stands
beside. "fresh" allocates its output, as the peers do; "donated" writes into a buffer that the
caller gives up, by an unused argument of a function compiled with `donate_argnums` and
`keep_unused=True`. PyTorch is measured where it is installed.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wspace import average, interpolate, lowrank, negative, selection
from wspace.selection.top import keep_top

try:
    import torch
except ImportError:
    torch = None

Contenders = dict[str, Callable[[], Any]]


def interleaved(contenders: Contenders, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every contender, round by round, after one warm-up."""
    for call in contenders.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def donated(function: Callable[..., Any], arguments: tuple) -> Callable[[], Any]:
    """A compiled function that writes over its own last result."""

    def into(_: Any, *arguments: Any) -> Any:
        return function(*arguments)

    compiled = jax.jit(into, donate_argnums=0, keep_unused=True)
    held = [jax.tree.map(jnp.copy, jax.jit(function)(*arguments))]

    def call() -> Any:
        held[0] = compiled(held[0], *arguments)
        return held[0]

    return call


def model(gib: float, dtype: Any, seed: int) -> dict[str, jax.Array]:
    """Weights with the shapes of a small decoder, as many layers as fill the size in float32."""
    width, hidden, words = 1024, 2816, 32000
    layer = {f"p{i}": (width, width) for i in range(4)} | {"n0": (width,), "n1": (width,)}
    layer |= {f"m{i}": (width, hidden) for i in range(2)} | {"m2": (hidden, width)}
    size = sum(int(np.prod(shape)) for shape in layer.values())
    layers = max(round((gib * 2**28 - words * width) / size), 1)
    shapes = {"embed": (words, width)}
    shapes |= {f"{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    rng = np.random.default_rng(seed)
    block = rng.standard_normal(2**22, dtype=np.float32)
    return {
        name: jnp.asarray(np.resize(np.roll(block, i), shape), dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }


def merges(gib: float, rounds: int) -> None:
    """Elementwise methods on whole models, in float32 and bfloat16."""
    for dtype in (jnp.float32, jnp.bfloat16):
        models = [model(gib, dtype, seed) for seed in range(8)]
        size = sum(x.nbytes for x in models[0].values())
        print(f"\n{len(models[0])} leaves, {size / 2**30:.2f} GiB a model, {dtype.__name__}")
        methods = {
            "lerp": (2, lambda x, y: interpolate.lerp(x, y, 0.3), lambda x, y: 0.7 * x + 0.3 * y),
            "mean of 2": (2, lambda *xs: average.mean(xs), lambda x, y: 0.5 * x + 0.5 * y),
            "mean of 4": (4, lambda *xs: average.mean(xs), weighted),
            "mean of 8": (8, lambda *xs: average.mean(xs), weighted),
            "repel": (2, lambda x, b: negative.repel(x, b, 0.5), lambda x, b: x + 0.5 * (x - b)),
            "slerp": (2, lambda x, y: interpolate.slerp(x, y, 0.3), None),
        }
        factor = jnp.float32(1.5)
        copy = donated(
            lambda x, c: jax.tree.map(lambda leaf: (c * leaf).astype(leaf.dtype), x),
            (models[0], factor),
        )
        for name, (count, ours, plain) in methods.items():
            points = tuple(models[:count])
            contenders = {"copy, donated": copy} | forms(ours, points)
            times = interleaved(contenders | peers(plain, points, dtype), rounds)
            # slerp reads its points twice, once for the angle
            moved = (count + 1 + count * (name == "slerp")) * size
            report(name, times, {"copy, donated": 2 * size}, moved)


def forms(ours: Callable[..., Any], arguments: tuple) -> Contenders:
    """A function of ours in the three ways that it is called."""
    compiled = jax.jit(ours)
    return {
        "donated": donated(ours, arguments),
        "fresh": lambda: compiled(*arguments),
        "eager": lambda: ours(*arguments),
    }


def weighted(*xs: Any) -> Any:
    """A mean as it is written without a library."""
    total = xs[0] / len(xs)
    for x in xs[1:]:
        total = total + x / len(xs)
    return total


def peers(plain: Callable[..., Any] | None, points: tuple, dtype: Any) -> Contenders:
    """The same formula leaf by leaf in NumPy and PyTorch."""
    contenders: Contenders = {}
    if plain is None:
        return contenders
    if dtype == jnp.float32:
        arrays = [{k: np.asarray(x) for k, x in point.items()} for point in points]
        contenders["numpy"] = lambda: {k: plain(*(a[k] for a in arrays)) for k in arrays[0]}
    if torch is not None:
        tensors = [{k: tensor(x) for k, x in point.items()} for point in points]
        contenders["torch"] = lambda: {k: plain(*(a[k] for a in tensors)) for k in tensors[0]}
    return contenders


def tensor(x: jax.Array) -> Any:
    """The same memory as a PyTorch tensor."""
    return torch.from_dlpack(x)


def report(name: str, times: dict[str, list[float]], moves: dict[str, int], moved: int) -> None:
    """One block of lines, bandwidth beside that of the first contender."""
    print(f"  {name}")
    base = None
    for contender, ms in times.items():
        median = statistics.median(ms)
        rate = moves.get(contender, moved) / median / 1e6
        base = rate if base is None else base
        print(
            f"    {contender:<16}{median:9.1f} ms  min {min(ms):9.1f}  {rate:6.1f} GB/s"
            f"  {rate / base:5.2f} of the copy"
        )


def select(size: int, rounds: int) -> None:
    """The exact k-th largest magnitude, and the entries from it on, at a density of 0.2."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal(size, dtype=np.float32))
    k, host = size // 5, np.asarray(x)
    compiled, trim = jax.jit(selection.kth_magnitude), jax.jit(keep_top)
    contenders = {
        "ours, jit": lambda: compiled(x, k),
        "ours, eager": lambda: selection.kth_magnitude(x, k),
        "np.partition": lambda: np.partition(np.abs(host), size - k)[size - k],
        "ours, whole trim": lambda: trim(x, k),
        "ours, trim donated": donated(lambda x: keep_top(x, k), (x,)),
    }
    if torch is not None:
        t = tensor(x)
        contenders["torch.kthvalue"] = lambda: torch.kthvalue(t.abs(), size - k + 1).values
    times = interleaved(contenders, rounds)
    sort = jax.jit(lambda x: jnp.sort(jnp.abs(x))[size - k]).lower(x).compile()
    top = jax.jit(lambda x: jax.lax.top_k(jnp.abs(x), k)[0][-1]).lower(x).compile()
    times |= {"jnp.sort": [once(lambda: sort(x))], "lax.top_k": [once(lambda: top(x))]}
    wanted = float(contenders["np.partition"]())
    exact = all(float(contenders[name]()) == wanted for name in ("ours, jit", "ours, eager"))
    print(f"\nselection of {k} of {size:.0e}, equal to np.partition: {exact}")
    base = statistics.median(times["ours, jit"])
    for name, ms in times.items():
        median = statistics.median(ms)
        print(f"    {name:<20}{median:10.1f} ms  min {min(ms):10.1f}  {median / base:7.2f} x")


def once(call: Callable[[], Any]) -> float:
    """Milliseconds of what is too slow to repeat, compiled before."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return 1e3 * (time.perf_counter() - start)


def truncations(rounds: int) -> None:
    """A 4096 x 4096 matrix with a falling spectrum and noise, cut to ranks 16 and 64."""
    size, directions = 4096, 512
    rng = np.random.default_rng(0)
    bases = [rng.standard_normal((size, directions), dtype=np.float32) for _ in range(2)]
    left, right = (np.linalg.qr(x)[0] for x in bases)
    values = np.arange(1, directions + 1, dtype=np.float32) ** -0.7
    noise = 2e-4 * rng.standard_normal((size, size), dtype=np.float32)
    matrix = (left * values) @ right.T + noise
    x = jnp.asarray(matrix)
    full = jax.jit(lambda x: jnp.linalg.svd(x, full_matrices=False)).lower(x).compile()
    slow = once(lambda: full(x))
    print(f"\ntruncation of {size} x {size}; full SVD {slow:.0f} ms, once")
    spectrum = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    for rank in (16, 64):
        truncation(matrix, rank, float(np.sqrt(np.sum(spectrum[rank:] ** 2))), slow, rounds)


def truncation(matrix: np.ndarray, rank: int, best: float, slow: float, rounds: int) -> None:
    """One rank: times, and the excess of the error over the least there is, by the norm."""
    x, key, norm = jnp.asarray(matrix), jax.random.key(0), float(np.linalg.norm(matrix))
    program = jax.jit(lambda x: lowrank.truncate(x, rank, method="randomized", key=key))
    contenders = {
        "ours, jit": lambda: program(x),
        "ours, eager": lambda: lowrank.truncate(x, rank, method="randomized", key=key),
    }
    if torch is not None:
        t = tensor(x)
        contenders["torch niter=4"] = lambda: torch.svd_lowrank(t, q=rank, niter=4)
    times = interleaved(contenders, rounds)
    base = statistics.median(times["ours, jit"])
    for name, ms in times.items():
        if name.startswith("ours"):
            cut = contenders[name]()
            error = distance(matrix, cut.factors.left, cut.factors.right)
            rest = f"  tail off by {(float(cut.tail) - error) / norm:8.1e}"
        else:
            u, s, v = contenders[name]()
            error, rest = distance(matrix, u * s, v), ""
        median = statistics.median(ms)
        print(
            f"    rank {rank:<4}{name:<16}{median:9.1f} ms  {median / base:5.2f} x  "
            f"{slow / median:5.1f} times as fast as a full SVD  "
            f"excess {(error - best) / norm:8.1e}{rest}"
        )


def distance(matrix: np.ndarray, left: Any, right: Any) -> float:
    """The Frobenius distance of a matrix from a product, in float64 by blocks of rows."""
    left, right = (np.asarray(factor, np.float64) for factor in (left, right))
    blocks = range(0, len(matrix), 512)
    squares = [
        np.sum((matrix[i : i + 512].astype(np.float64) - left[i : i + 512] @ right.T) ** 2)
        for i in blocks
    ]
    return float(np.sqrt(sum(squares)))


def main() -> None:
    """Prints the parts asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help="merges, selection, lowrank; all by default")
    parser.add_argument("--gib", type=float, default=1.0, help="size of a model in float32")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    peer = "no torch" if torch is None else f"torch {torch.__version__}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}, {peer}")
    runs = {
        "lowrank": lambda: truncations(options.rounds),
        "selection": lambda: [select(size, options.rounds) for size in (10**7, 10**8)],
        "merges": lambda: merges(options.gib, options.rounds),
    }
    for name in options.parts or runs:
        runs[name]()


if __name__ == "__main__":
    main()
