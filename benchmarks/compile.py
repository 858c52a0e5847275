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
from tests import arguments, catalog
from tests.arguments import trees
from tests.catalog import CASES, Case
from wspace import average, negative


def shapes_of(leaves: int, entries: int, first: int) -> dict[str, tuple[int, ...]]:
    """The leaves that a layout of a few has more: vectors and matrices in turn."""
    return {f"l{i:04d}": (entries // 5, 5) if i % 2 else (5,) for i in range(first, leaves)}


def grown(case: Case, leaves: int, entries: int) -> list[Any]:
    """Trees as a case takes them, with more leaves."""
    rng = np.random.default_rng(0)
    return [
        x
        | {
            name: jnp.asarray(rng.normal(size=shape), jnp.float32)
            for name, shape in shapes_of(leaves, entries, len(x)).items()
        }
        for x in trees(case.trees)
    ]


def grow_constants(leaves: int, entries: int) -> None:
    """Has cases make what they make of the layout for more leaves, too."""
    shapes = shapes_of(leaves, entries, len(trees(1)[0]))

    def more(x: Any, matrix: Any, vector: Any) -> Any:
        return x | {name: matrix if len(s) > 1 else vector for name, s in shapes.items()}

    inputs, outputs = jnp.eye(entries // 5), jnp.eye(5)
    both = average.Kronecker(inputs, outputs)
    own = {name: getattr(arguments, name) for name in ("allow", "metric", "grams", "factors")}
    sides = arguments.sides()
    rows, columns = more(sides.rows, inputs[:, :2], 1.0), more(sides.columns, 1.0, 1.0)
    for name, function in {
        "allow": lambda: [more(x, inputs, 1.0) for x in own["allow"]()],
        "metric": lambda: more(own["metric"](), inputs, 1.0),
        "grams": lambda: [more(x, inputs, None) for x in own["grams"]()],
        "factors": lambda: [more(x, both, None) for x in own["factors"]()],
        "sides": lambda: negative.Sides(rows=rows, columns=columns),
    }.items():
        setattr(catalog, name, function)


def measured(case: Case, leaves: int, entries: int) -> tuple[float, int]:
    """Seconds to trace, lower and compile a function, and the lines of its program."""
    points = grown(case, leaves, entries)
    grow_constants(leaves, entries)
    jax.clear_caches()
    start = time.perf_counter()
    program = jax.jit(case.function).lower(*points).compile()
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
