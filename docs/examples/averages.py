"""An average that no member is: when does the mean of networks read what none of them reads?"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.examples import report, study
from wspace import average, interpolate
from wspace.typing import Weights

POSITIONS = np.linspace(0, 1, 21)
STARTS = ("one base", "two bases")
HEADS = {
    "steps": "steps of training",
    "width": "width",
    "sources": "members",
    "shared": "classes shared",
}


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is run: what is varied, one thing at a time, from the usual value."""

    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    steps: tuple[int, ...]
    widths: tuple[int, ...]
    sources: tuple[int, ...]
    shared: tuple[int, ...]
    usual: tuple[int, int, int, int]  # steps, width, sources, shared classes


FULL = Size(
    seeds=(0, 1, 2, 3, 4),
    tasks=("digits", "text"),
    steps=(25, 50, 100, 200, 400, 800, 1600),
    widths=(16, 32, 64, 128, 256, 512),
    sources=(2, 3, 5, 10),
    shared=(0, 2, 4, 6, 8, 10),
    usual=(600, 256, 2, 0),
)
SMALL = Size((0, 1), ("digits",), (30,), (16,), (3,), (10,), (30, 16, 2, 0))


def members(
    name: str, seed: int, start: str, steps: int, width: int, sources: int, shared: int
) -> tuple[study.Task, list[Weights]]:
    """A task and networks trained on one part of its classes each, from one base or several.

    Some classes, the last ones, are shared: everyone learns those.
    """
    split, first, training = jax.random.split(jax.random.key(seed), 3)
    task = study.TASKS[name](split, width)
    found = []
    own, common = np.split(np.arange(study.CLASSES), [study.CLASSES - shared])
    for i, part in enumerate(np.array_split(own, sources)):
        base = first if start == "one base" else jax.random.fold_in(first, i)
        found.append(
            study.train(
                jax.random.fold_in(training, i),
                study.initial(base, task.sizes),
                task.training,
                task.training.of([*part, *common]),
                steps=steps,
            )
        )
    return task, found


@jax.jit
def along(start: Weights, end: Weights, data: study.Data) -> Any:
    """The loss along the segment between two networks."""

    def at(t: Any) -> Any:
        return study.loss(interpolate.lerp(start, end, t), data)

    return jax.lax.map(at, jnp.asarray(POSITIONS, jnp.float32), batch_size=POSITIONS.size)


def figures(task: study.Task, sources: Sequence[Weights], shared: int) -> dict[str, Any]:
    """What members, their mean and their averaged outputs read, and the loss between two."""
    losses = np.asarray(along(sources[0], sources[1], task.held_out), np.float64)
    chord = losses[0] + POSITIONS * (losses[-1] - losses[0])
    return {
        "member": max(float(study.accuracy(x, task.held_out)) for x in sources),
        "average": float(study.accuracy(average.mean(sources), task.held_out)),
        "outputs": float(study.ensemble_accuracy(sources, task.held_out)),
        "barrier": float((losses - chord).max()),
        "loss of members": float((losses[0] + losses[-1]) / 2),
        "loss of average": losses[len(losses) // 2],
        "losses": losses,
        "on": on_classes(task, average.mean(sources), shared),
    }


def on_classes(task: study.Task, weights: Weights, shared: int) -> dict[str, float]:
    """What a network reads of the classes that its members share, and of the others."""
    labels = np.asarray(task.held_out.labels)
    right = np.asarray(study.outputs(weights, task.held_out.inputs)).argmax(axis=1) == labels
    common = labels >= study.CLASSES - shared
    return {
        name: float(right[where].mean()) if where.any() else 0.0
        for name, where in (("shared", common), ("own", ~common))
    }


def run(size: Size) -> dict[str, Any]:
    """Varies start, steps, width and number of sources, for each task and seed."""
    choices = (size.steps, size.widths, size.sources, size.shared)
    varied = {
        what: [(x, (*size.usual[:i], x, *size.usual[i + 1 :])) for x in choices[i]]
        for i, what in enumerate(HEADS)
    }

    def rows(name: str, start: str, settings: Sequence[int]) -> Any:
        return report.over_seeds(
            [figures(*members(name, seed, start, *settings), settings[-1]) for seed in size.seeds]
        )

    return {
        "settings": dataclasses.asdict(size),
        **{
            name: {
                what: {
                    start: {str(x): rows(name, start, settings) for x, settings in chosen}
                    for start in STARTS
                }
                for what, chosen in varied.items()
            }
            for name in size.tasks
        },
    }


def tables(results: dict[str, Any]) -> dict[str, str]:
    """A table for each task and each thing that is varied."""
    return {
        f"{name}, {what}": report.table(*lines(results[name][what], what))
        for name in results["settings"]["tasks"]
        for what in HEADS
    }


def lines(varied: dict[str, Any], what: str) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of a table."""
    head = [HEADS[what], "best member", "mean", "mean, two bases", "outputs averaged"]
    if what == "sources":
        head[3] = "mean, each of its own base"
    elif what == "shared":
        head += ["mean, on shared classes", "on others", "barrier", "barrier, two bases"]
    else:
        head += ["loss: members", "mean", "mean, two bases"]
    rows = []
    for x, one in varied["one base"].items():
        two = varied["two bases"][x]
        shown = [one["member"], one["average"], two["average"], one["outputs"]]
        if what == "shared":
            shown += [one["on"]["shared"], one["on"]["own"], one["barrier"], two["barrier"]]
        elif what != "sources":
            shown += [one["loss of members"], one["loss of average"], two["loss of average"]]
        rows.append([x, *map(report.cell, shown)])
        if what == "shared" and x in ("0", str(study.CLASSES)):
            rows[-1][5 + (x != "0")] = ""  # there are no such classes
    return head, rows


def picture(results: dict[str, Any]) -> Figure:
    """Accuracy of the mean against what is varied, and the loss along the segment."""
    tasks = results["settings"]["tasks"]
    figure, grid = plt.subplots(
        5, len(tasks), figsize=(3.6 * len(tasks), 11), layout="constrained", squeeze=False
    )
    for name, panels in zip(tasks, grid.T, strict=True):
        for axes, what in zip(panels, HEADS, strict=False):
            curves(axes, results[name][what])
            axes.set(xlabel=HEADS[what], ylim=(0, 1.02), ylabel="accuracy")
        panels[0].set_title(name, fontsize=11)
        usual = results[name]["sources"]
        for start, color in (("one base", report.MOVED), ("two bases", report.AVOIDED)):
            report.band(panels[-1], POSITIONS, usual[start]["2"]["losses"], color)
        panels[-1].set(xlabel="from A to C", ylabel="loss on all classes", ylim=(0, None))
    names = ("best member", "mean, two bases", "mean, one base")
    figure.legend(
        grid[0][0].lines, names, loc="outside upper center", ncols=3, frameon=False, fontsize=10
    )
    return figure


def curves(axes: Axes, varied: dict[str, Any]) -> None:
    """The best member and the means of networks from one base and from several."""
    xs = [int(x) for x in varied["one base"]]
    for start, what, color in (
        ("one base", "member", report.FAINT),
        ("two bases", "average", report.AVOIDED),
        ("one base", "average", report.MOVED),
    ):
        columns = np.array([varied[start][str(x)][what] for x in xs]).T
        report.band(axes, xs, columns, color, marker="o", ms=3)
    if xs[0]:
        axes.set_xscale("log")
    shown = xs[::2] if len(xs) > 6 else xs
    axes.set_xticks(shown, [str(x) for x in shown])
    axes.minorticks_off()


PICTURES = {"averages": picture}
