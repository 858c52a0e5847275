"""The demo over several seeds: the figures that the README quotes, as a Markdown table.

Run: python benchmarks/demo_seeds.py [seed ...]
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

COLUMNS = {
    "B'": lambda r: r["accuracy"]["B'"]["all"],
    "A' on 0-4": lambda r: r["accuracy"]["A'"]["low"],
    "C' on 5-9": lambda r: r["accuracy"]["C'"]["high"],
    "points lost by A', C'": lambda r: max(
        100 * (r["accuracy"]["A"]["low"] - r["accuracy"]["A'"]["low"]),
        100 * (r["accuracy"]["C"]["high"] - r["accuracy"]["C'"]["high"]),
    ),
    "R'": lambda r: r["accuracy"]["R'"]["all"],
    "outputs of A', C' averaged": lambda r: r["guard"]["ways"]["plain"]["outputs averaged"],
    "plain guard holds to rank": lambda r: r["holds_to"]["plain"],
    "hardened guard holds to rank": lambda r: r["holds_to"]["hardened"],
}


def run(seed: int) -> tuple[dict, float]:
    """The results of one demo, and how many seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "wspace", "demo", "--out", folder, "--seed", str(seed)]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.perf_counter() - start
        return json.loads(pathlib.Path(folder, "results.json").read_text()), seconds


def cell(x: float) -> str:
    """A whole number as it is, others to three digits."""
    return f"{x:.3f}".removesuffix(".000") if isinstance(x, float) else str(x)


def main() -> None:
    """Prints a row a seed and a row with the range."""
    seeds = [int(word) for word in sys.argv[1:]] or list(range(5))
    print(f"| seed | {' | '.join(COLUMNS)} |")
    print("|---|" + "---|" * len(COLUMNS))
    rows, times = [], []
    for seed in seeds:
        results, seconds = run(seed)
        rows.append([read(results) for read in COLUMNS.values()])
        times.append(seconds)
        print(f"| {seed} | {' | '.join(map(cell, rows[-1]))} |", flush=True)
    spans = [f"{cell(min(column))} to {cell(max(column))}" for column in zip(*rows, strict=True)]
    print(f"| all | {' | '.join(spans)} |")
    print(f"\n{statistics.median(times):.0f} s a run (median)")


if __name__ == "__main__":
    main()
