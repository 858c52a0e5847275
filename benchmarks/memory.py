"""The memory that eager calls take beside their inputs, in trees of bfloat16.

    python benchmarks/memory.py [--gib 0.25] [NAME ...]

Each function runs in a process of its own, once to compile and once measured: the largest resident
memory while it runs, less that before, over the size of one tree. Results count.
"""

import argparse
import gc
import pathlib
import subprocess
import sys
import threading
import time

LEAVES = 8
FUNCTIONS = {
    "geometry.distance": lambda w, x, y, _: w.geometry.distance(x, y),
    "geometry.gram": lambda w, x, y, z: w.geometry.gram([x, y, z]),
    "geometry.coordinates": lambda w, x, y, z: w.geometry.coordinates(x, [y, z]),
    "geometry.orthonormalize": lambda w, x, y, _: w.geometry.orthonormalize([x, y]),
    "interpolate.slerp": lambda w, x, y, _: w.interpolate.slerp(x, y, 0.3),
    "average.mean": lambda w, x, y, _: w.average.mean([x, y]),
    "average.geometric_median": lambda w, x, y, z: w.average.geometric_median([x, y, z]).weights,
    "merge.ties": lambda w, x, y, z: w.merge.ties(x, [y, z]),
    "negative.repel": lambda w, x, y, _: w.negative.repel(x, y, 0.5),
    "negative.guide_perpendicular": lambda w, x, y, z: w.negative.guide_perpendicular(
        x, y, z, 1.0, 1.0
    ),
    "negative.retarget": lambda w, x, y, z: w.negative.retarget([x, y], (0.5, 0.5), z),
    "negative.exit_ball": lambda w, x, y, z: w.negative.exit_ball([x, y], (0.5, 0.5), z, 1e9),
    "negative.guard_hull": lambda w, x, y, z: w.negative.guard_hull([x, y], z, 1e9),
    "negative.guard_hull, normal": lambda w, x, y, z: w.negative.guard_hull(
        [x, y], z, 1e9, normal=x
    ),
    "negative.attenuate": lambda w, x, y, _: w.negative.attenuate(
        x, w.geometry.orthonormalize([y]), 1.0
    ),
}


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(name: str, gib: float) -> None:
    """Prints the memory that a function takes."""
    import jax
    import jax.numpy as jnp

    import wspace

    size = int(gib * 2**30 / 2 / LEAVES)
    keys = jax.random.split(jax.random.key(0), (3, LEAVES))
    trees = [
        {f"{i}": jax.random.normal(key, (size,), jnp.bfloat16) for i, key in enumerate(row)}
        for row in keys
    ]
    jax.block_until_ready(trees)
    tree = sum(leaf.nbytes for leaf in trees[0].values())

    def call() -> object:
        return jax.block_until_ready(FUNCTIONS[name](wspace, *trees))

    call()
    gc.collect()
    before, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident())
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    print(f"{name:30s} {(peak[0] - before) / tree:5.1f} trees  {seconds * 1e3:6.0f} ms", flush=True)


def main() -> None:
    """Measures all functions, or those named, each in a process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="functions, all by default")
    parser.add_argument("--gib", type=float, default=0.25, help="size of a tree")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        return measure(arguments.names[0], arguments.gib)
    print(f"{LEAVES} leaves of bfloat16, {arguments.gib} GiB a tree")
    for name in arguments.names or FUNCTIONS:
        command = [sys.executable, __file__, "--here", "--gib", str(arguments.gib), name]
        subprocess.run(command, check=True)
    return None


if __name__ == "__main__":
    main()
