"""The demo: the whole idea on real networks, in three acts."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from wspace import checkpoint
from wspace._demo import acts, pictures, report
from wspace.checkpoint.tensors import write
from wspace.typing import Weights

__all__ = ["run"]

RESULTS = "results.json"
FILES = {
    "A'": "A_guarded",
    "C'": "C_guarded",
    "A'_hardened": "A_hardened",
    "C'_hardened": "C_hardened",
}


def run(out: Path, seed: int) -> None:
    """Trains the networks, plays the acts on stdout and writes what they made to a folder.

    Args:
        out: The folder, created if there is none. An earlier `results.json` in it is removed
            first, and the new one is written last: it is there if and only if the run was whole.
        seed: Decides initializations, split and batches.

    Raises:
        OSError: If the folder cannot be written.
    """
    prepare(out)
    # Threads of BLAS wait by spinning: on busy cores they slow small factorizations tenfold.
    with threadpool_limits(1, user_api="blas"):
        results = play(out, seed)
    write(out / RESULTS, json.dumps(results, allow_nan=False, indent=1).encode())
    print(f"Figures, pictures and weights are in {out}: see {RESULTS}.")


def prepare(out: Path) -> None:
    """Makes the folder and proves that it can be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot make the folder {out} ({error.strerror}): give another one by --out"
        ) from error
    write(out / RESULTS, b"")
    (out / RESULTS).unlink()


def play(out: Path, seed: int) -> dict[str, Any]:
    """The acts in turn: their figures, with report, weights and pictures on the way."""
    start = time.monotonic()

    def progress(what: str) -> None:
        print(f"[{time.monotonic() - start:4.0f} s] {what}", file=sys.stderr, flush=True)

    def tell(text: str) -> None:
        print(text, flush=True)

    def stored(name: str, weights: Weights) -> Weights:
        file = out / f"{FILES.get(name, name)}.safetensors"
        checkpoint.save(file, weights)
        return checkpoint.load(file)

    progress("training five networks")
    points, training, held_out = acts.models(seed)
    points = {name: stored(name, weights) for name, weights in points.items()}
    tell(report.opening(seed, training.labels.size, held_out.labels.size))

    progress("act 1: the average")
    results: dict[str, Any] = {"seed": seed, **acts.first(points, held_out)}
    tell(report.act1(results))

    progress("act 2: a point to avoid")
    results["bare"] = acts.bare(points, held_out)
    tell(report.act2_bare(results))
    progress("act 2: the average to avoid")
    figures = acts.guarded(points, training, held_out)
    results["accuracy"] |= figures.pop("accuracy")
    results |= figures
    points |= {name: stored(name, points[name]) for name in FILES}
    tell(report.act2_guard(results))

    progress("act 3: low-rank terms")
    results |= acts.third(points, results, held_out)
    tell(report.act3(results))

    progress("pictures")
    results["plane"] = acts.plane(points, held_out)
    for name, png in pictures.draw(results).items():
        write(out / name, png)
    progress("done")
    return results
