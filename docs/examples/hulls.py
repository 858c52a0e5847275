"""Hull against ball: what a guard of one average, and one of all, leave to a sweep."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure

from docs.examples import averages, guards, report, study
from wspace import average, geometry, negative, tree
from wspace.typing import Weights

NAMES = ("none", "ball", "hull, convex", "hull, affine", "hull, cheapest normal")
LINE = np.linspace(-1, 2, 61)
STEPS = np.arange(-1, 2.01, 0.25)


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is run."""

    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    steps: int
    widths: dict[str, int]
    sources: tuple[int, ...] = (2, 3)


FULL = Size((0, 1, 2, 3, 4), ("digits", "text"), 600, {"digits": 256, "text": 128})
SMALL = Size((0, 1), ("digits",), 30, {"digits": 16}, (2,))


def coefficients(count: int) -> np.ndarray:
    """Affine coefficients between -1 and 2 for each of two or three sources."""
    if count == 2:
        return np.stack([1 - LINE, LINE], axis=1)
    rows = [(1 - s - t, s, t) for s, t in itertools.product(STEPS, STEPS)]
    return np.array([row for row in rows if -1 <= row[0] <= 2])


@jax.jit
def swept(points: Sequence[Weights], rows: Array, avoid: Weights, data: study.Data) -> Any:
    """Accuracy of averages, and their distance from a point."""

    def at(row: Array) -> Any:
        point = tree.combine(list(row), points)
        return study.accuracy(point, data), geometry.distance(point, avoid)

    return jax.lax.map(at, rows, batch_size=20)


def guarded(task: study.Task, sources: Sequence[Weights]) -> tuple[Weights, Any, dict[str, Any]]:
    """The mean to be kept away from, the radius, and the guards."""
    count = len(sources)
    middle = average.mean(sources)
    radius = guards.SHIFT * tree.norm(middle)
    rising = guards.uphill(middle, task.training)
    allow = []
    for x, classes in zip(sources, np.array_split(np.arange(10), count), strict=True):
        own = np.asarray(task.training.of(classes))
        allow.append(guards.free(x, task.training.inputs[own]))

    equal = [1 / count] * count
    ball = negative.exit_ball(sources, equal, middle, radius, direction=rising, allow=allow)
    along = guards.shift_of(sources, ball)
    least = negative.guard_normal(sources, middle, radius, start=along, allow=allow)

    def hull(normal: Weights, mode: Any) -> list[Weights]:
        return negative.guard_hull(sources, middle, radius, normal=normal, mode=mode, allow=allow)

    hulls = hull(along, "convex"), hull(along, "affine"), hull(least.weights, "convex")
    found = dict(zip(NAMES, (list(sources), ball, *hulls), strict=True))
    return middle, radius, found


def one(name: str, seed: int, size: Size, count: int) -> dict[str, Any]:
    """What a sweep reads under each guard, and how near it comes."""
    settings = (size.steps, size.widths[name], count, 0)
    task, sources = averages.members(name, seed, "one base", *settings)
    middle, radius, found = guarded(task, sources)
    rows = coefficients(count)
    convex = (rows >= 0).all(axis=1)
    figures = {}
    for guard, points in found.items():
        shares, distances = (
            np.asarray(x, np.float64)
            for x in swept(points, jnp.asarray(rows, jnp.float32), middle, task.held_out)
        )
        distances /= float(radius)
        moved = [geometry.distance(x, y) for x, y in zip(points, sources, strict=True)]
        figures[guard] = {
            "moved": float(tree.norm(moved) / radius),
            "mean": float(study.accuracy(average.mean(points), task.held_out)),
            "best, convex": shares[convex].max(),
            "best, any sign": shares.max(),
            "nearest, convex": distances[convex].min(),
            "nearest, any sign": distances.min(),
            "own accuracy": np.mean(
                [
                    float(study.accuracy(x, study.Data(*(y[own] for y in task.held_out))))
                    for x, own in zip(points, parts(task.held_out, count), strict=True)
                ]
            ),
            "accuracy": shares if count == 2 else 0.0,
            "distance": distances if count == 2 else 0.0,
        }
    return figures


def parts(data: study.Data, count: int) -> list[np.ndarray]:
    """Where the examples of each source's own classes are."""
    return [np.asarray(data.of(x)) for x in np.array_split(np.arange(study.CLASSES), count)]


def run(size: Size) -> dict[str, Any]:
    """Guards of the ball and of the hull for two and three sources, for each task and seed."""
    return {
        "settings": dataclasses.asdict(size),
        **{
            name: {
                str(count): report.over_seeds([one(name, x, size, count) for x in size.seeds])
                for count in size.sources
            }
            for name in size.tasks
        },
    }


def tables(results: dict[str, Any]) -> dict[str, str]:
    """For each task and number of sources: accuracies of a sweep and the nearest it comes."""
    found = {}
    for name in results["settings"]["tasks"]:
        for count, rows in results[name].items():
            columns = [x for x in rows["none"] if x not in ("accuracy", "distance")]
            cells = [[x, *(report.cell(row[y]) for y in columns)] for x, row in rows.items()]
            found[f"{name}, {count} sources"] = report.table(["guard", *columns], cells)
    return found


def picture(results: dict[str, Any]) -> Figure:
    """Accuracy and distance of averages of two sources against the coefficient."""
    tasks = results["settings"]["tasks"]
    figure, grid = plt.subplots(
        len(tasks), 2, figsize=(7.4, 3 * len(tasks)), layout="constrained", squeeze=False
    )
    colors = dict(
        zip(
            NAMES,
            (report.FAINT, report.AVOIDED, report.MOVED, report.THIRD, report.INK),
            strict=True,
        )
    )
    for name, (left, right) in zip(tasks, grid, strict=True):
        for guard in (x for x in NAMES if x != "hull, affine"):  # the same points here
            row = results[name]["2"][guard]
            report.band(left, LINE, row["accuracy"], colors[guard], label=guard)
            report.band(right, LINE, row["distance"], colors[guard])
        right.axhline(1, color=report.INK, lw=0.8, ls=(0, (4, 3)))
        for axes in (left, right):
            axes.axvspan(0, 1, color=report.FAINT, alpha=0.12, lw=0)
            axes.set_xlabel("coefficient of C'")
        left.set(ylabel=f"{name}: accuracy", ylim=(0, 1))
        right.set(ylabel="distance from B', in radii", ylim=(0, 8))
    lines = grid[0][0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", ncols=4, frameon=False)
    return figure


PICTURES = {"hulls": picture}
