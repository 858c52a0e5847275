"""How long one program takes to compile, and how that grows with the leaves of a tree.

    python benchmarks/compile.py [NAME ...] [--leaves 50 200] [--entries 30]

For every function of the catalog, under `jit` on trees of matrices and vectors: seconds from
tracing to the program, lines of the program, and the exponent with which either grows from the
first number of leaves to the second. Nothing is read from or kept in a cache.
"""

import argparse
import math
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from tests.arguments import trees
from tests.catalog import CASES, Case


def grown(case: Case, leaves: int, entries: int) -> list[Any]:
    """Trees as a case takes them, with more leaves."""
    rng = np.random.default_rng(0)
    shapes = [(entries // 5, 5) if i % 2 else (5,) for i in range(leaves)]
    return [
        x
        | {
            f"l{i:04d}": jnp.asarray(rng.normal(size=shape), jnp.float32)
            for i, shape in enumerate(shapes[len(x) :])
        }
        for x in trees(case.trees)
    ]


def measured(case: Case, leaves: int, entries: int) -> tuple[float, int]:
    """Seconds to trace, lower and compile a function, and the lines of its program."""
    arguments = grown(case, leaves, entries)
    jax.clear_caches()
    start = time.perf_counter()
    program = jax.jit(case.function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    return seconds, (program.as_text() or "").count("\n")


def main() -> None:
    """Prints a row for each function."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="of functions; all by default")
    parser.add_argument("--leaves", type=int, nargs=2, default=[50, 200])
    parser.add_argument("--entries", type=int, default=30, help="of a matrix")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    few, many = options.leaves
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {few} and {many} leaves")
    print(f"{'function':44}{'seconds':>16}{'exponent':>9}{'lines':>18}{'exponent':>9}")
    for case in CASES:
        if options.names and not any(map(case.name.startswith, options.names)):
            continue
        try:
            rows = [measured(case, leaves, options.entries) for leaves in options.leaves]
        except (TypeError, ValueError) as error:
            print(f"{case.name:44}  of one layout: {str(error).splitlines()[0][:50]}")
            continue
        (short, few_lines), (long, many_lines) = rows
        times = math.log(long / short) / math.log(many / few)
        lines = math.log(many_lines / few_lines) / math.log(many / few)
        figures = f"{short:8.2f}{long:8.2f}{times:9.2f}{few_lines:9}{many_lines:9}{lines:9.2f}"
        print(f"{case.name:44}{figures}", flush=True)


if __name__ == "__main__":
    main()
