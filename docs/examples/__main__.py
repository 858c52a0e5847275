"""Runs the experiments of the docs: `python -m docs.examples`, from the root of the repository.

Two processes share the work, each on one core. The figures are the same on every run.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import pathlib
import sys
import time

from docs.examples import report
from docs.examples.experiments import EXPERIMENTS, SHARES, draw, measure

PAGES = sorted(report.RESULTS.parents[1].glob("*.md"))


def main(arguments: list[str] | None = None) -> None:
    """Runs experiments, prints their tables, and writes figures and pictures into a folder."""
    parser = argparse.ArgumentParser(prog="python -m docs.examples", description=main.__doc__)
    parser.add_argument("names", nargs="*", help=f"which: {', '.join(EXPERIMENTS)}; all if none")
    parser.add_argument("--out", type=pathlib.Path, default=report.RESULTS, help="the folder")
    parser.add_argument("--drawn", action="store_true", help="draw and print what is there")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.names if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"no experiment {unknown[0]!r}: there are {', '.join(EXPERIMENTS)}")
    names = given.names or list(EXPERIMENTS)
    given.out.mkdir(parents=True, exist_ok=True)
    if not given.drawn:
        start = time.monotonic()
        chosen = [[name for name in share if name in names] for share in SHARES]
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(len(SHARES), context) as pool:
            for done in [pool.submit(measure, share, given.out) for share in chosen]:
                done.result()
        print(f"all: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    tables = {}
    for name in names:
        results = report.load(name, given.out)
        draw(name, results, given.out)
        tables[name] = EXPERIMENTS[name].tables(results)
        for title, table in tables[name].items():
            print(f"\n{name}: {title}\n\n{table}", flush=True)
    if given.out == report.RESULTS:
        for page in PAGES:
            page.write_text(report.filled(page.read_text(), tables))


if __name__ == "__main__":
    main()
