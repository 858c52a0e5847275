"""What `import wspace` costs beside `import jax, optax`: medians of interleaved fresh processes.

Run: python benchmarks/import_time.py [repetitions]
"""

import platform
import statistics
import subprocess
import sys
import time

STATEMENTS = ("import jax, optax", "import wspace")


def seconds(statement: str) -> float:
    """Wall-clock time of a fresh interpreter that runs one statement."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Prints both times and their ratio."""
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    for statement in STATEMENTS:
        seconds(statement)  # page cache and byte code
    times = [[seconds(statement) for statement in STATEMENTS] for _ in range(repetitions)]
    floor, ours = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"{platform.machine()}, Python {platform.python_version()}, {repetitions} repetitions")
    print(f"{STATEMENTS[0]}: {floor:.2f} s")
    print(f"{STATEMENTS[1]}: {ours:.2f} s, {ours / floor:.2f} times as long")


if __name__ == "__main__":
    main()
