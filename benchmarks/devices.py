"""Whether every public function gives on an accelerator what it gives on the processor beside it.

Run: PYTHONPATH=. python benchmarks/devices.py [--part 0 --parts 1]

A line is a function that does not: the largest difference of an entry, both compiled, in
roundings of float32 times the largest entry of the result. Below stands how many were compared,
and the distribution of the differences. The arguments are those of tests/arguments.py.
Compiling takes nearly all of the time, so that parts may run side by side.
"""

import argparse
import platform

import jax
import numpy as np

from tests.arguments import trees
from tests.catalog import CASES

BOUND = 256  # roundings; products of 16 numbers in half precision would be off by thousands


def apart(got, wanted):
    """The largest difference of an entry, in roundings of the largest entry; infinite if NaN."""
    worst = 0.0
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if not np.array_equal(np.isnan(x), np.isnan(y)):
            return np.inf
        scale = np.max(np.abs(np.nan_to_num(y)), initial=0.0)
        gap = np.max(np.abs(np.nan_to_num(x) - np.nan_to_num(y)), initial=0.0)
        worst = max(worst, gap / (scale * np.finfo(np.float32).eps) if gap else 0.0)
    return worst


def main():
    """Prints what differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    options = parser.parse_args()
    device, host = jax.devices()[0], jax.devices("cpu")[0]
    print(f"{device.device_kind} beside {platform.machine()}, jax {jax.__version__}")
    found = []
    for case in CASES[options.part :: options.parts]:
        results = []
        for place in (device, host):
            with jax.default_device(place):
                results.append(jax.tree.map(np.asarray, jax.jit(case.function)(*trees(case.trees))))
        gap = apart(*results)
        if gap > BOUND:
            print(f"    {case.name:<40}{gap:12.1f}", flush=True)
        found.append(gap)
    shares = ", ".join(f"{np.quantile(found, q):.1f} at {q:.0%}" for q in (0.5, 0.9, 1.0))
    print(f"{len(found)} functions; roundings apart: {shares}")


if __name__ == "__main__":
    main()
