"""All experiments of the docs: run, written down and drawn."""

import pathlib
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from threadpoolctl import threadpool_limits

from docs.examples import access, averages, cost, hulls, merges, naming, report

EXPERIMENTS = {
    "averages": averages,
    "access": access,
    "cost": cost,
    "hulls": hulls,
    "naming": naming,
    "merges": merges,
}
SHARES = (
    ("access", "cost", "hulls", "merges"),
    ("averages", "naming"),
)  # about as long; guards are shared


def measure(names: Sequence[str], folder: pathlib.Path) -> None:
    """Runs some of the experiments, one after the other."""
    for name in names:
        start = time.monotonic()
        # Threads of BLAS wait by spinning: on few cores they slow small factorizations.
        with threadpool_limits(1, user_api="blas"):
            found = EXPERIMENTS[name].run(EXPERIMENTS[name].FULL)
        report.save({"on": machine()} | found, folder / f"{name}.json")
        print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def draw(name: str, results: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Draws the pictures of an experiment from its figures."""
    for picture, figure in EXPERIMENTS[name].PICTURES.items():
        with report.styled():
            report.draw(figure(results), folder / f"{picture}.svg")


def machine() -> dict[str, str]:
    """What the figures were measured on, as far as they depend on it."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "processor": platform.machine(),
    }
