"""What a guard costs: what the sources lose on their own data, and what a margin asks for."""

import dataclasses
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
from wspace.typing import Scalar, Weights

MARGINS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
DAMPINGS = (1e-6, 1e-4, 1e-2)
BINS = 15


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is run."""

    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    training: guards.Training


FULL = Size((0, 1, 2, 3, 4), ("digits", "text"), guards.Training())
SMALL = Size((0, 1), ("digits",), guards.Training(30, 10, 16))


@jax.jit
def divergence(before: Weights, after: Weights, inputs: Array) -> Scalar:
    """Mean Kullback-Leibler divergence of the predictions before from those after."""
    old, new = (jax.nn.log_softmax(study.outputs(x, inputs)) for x in (before, after))
    return jnp.mean(jnp.sum(jnp.exp(old) * (old - new), axis=1))


def calibration(weights: Weights, data: study.Data) -> float:
    """Expected calibration error: confidence less accuracy, over bins of confidence."""
    shares = np.asarray(jax.nn.softmax(study.outputs(weights, data.inputs)))
    sure, right = shares.max(axis=1), shares.argmax(axis=1) == np.asarray(data.labels)
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = [abs((sure - right)[bins == i].sum()) for i in range(BINS)]
    return float(sum(gaps) / len(sure))


def part(data: study.Data, classes: Sequence[int]) -> study.Data:
    """The examples of some classes."""
    shown = np.asarray(data.of(classes))
    return study.Data(data.inputs[shown], data.labels[shown])


def lost(made: guards.Guarded, pair: Sequence[Weights]) -> dict[str, Any]:
    """What the two sources lose by being moved: means over both."""
    data = made.pair.task.held_out
    halves = [part(data, range(5)), part(data, range(5, 10))]
    sides = list(zip(made.pair.sources, pair, halves, halves[::-1], strict=True))
    moved = float(
        tree.norm([geometry.distance(x, y) for x, y, *_ in sides]) / tree.norm(made.middle)
    )
    margin = float(geometry.distance(average.mean(pair), made.middle) / tree.norm(made.middle))
    own = float(np.mean([divergence(x, y, near.inputs) for x, y, near, _ in sides]))
    figures = {
        "own loss": np.mean([study.loss(y, near) for _, y, near, _ in sides]),
        "own accuracy": np.mean([study.accuracy(y, near) for _, y, near, _ in sides]),
        "calibration error": np.mean([calibration(y, near) for _, y, near, _ in sides]),
        "KL, own inputs": own,
        "KL, foreign inputs": np.mean([divergence(x, y, far.inputs) for x, y, _, far in sides]),
        "margin": margin,
        "moved": moved,
    }
    return {
        **{name: float(x) for name, x in figures.items()},
        "moved per margin": moved / margin if margin else 0.0,
        "KL per margin": own / margin if margin else 0.0,
        "segment": np.asarray(averages.along(*pair, data), np.float64),
    }


def damped(weights: Weights, inputs: Array, damping: float) -> Weights:
    """Where a network may move, at a price: the more its data use an input, the more it costs."""
    allowed: Weights = {f"{i}.bias": 0.0 for i in study.layers(weights)}
    entering = study.activations(weights, inputs)
    for i, x in zip(study.layers(weights), entering, strict=False):
        allowed[f"{i}.weight"] = negative.damped_inputs(x, damping=damping)
    return allowed


def damages(made: guards.Guarded) -> dict[str, Any]:
    """Damage on own held-out inputs, and what the mean still reads, against the margin."""
    task, sources = made.pair.task, made.pair.sources
    rising, size = guards.uphill(made.middle, task.training), tree.norm(made.middle)
    halves = [part(task.held_out, range(5)), part(task.held_out, range(5, 10))]
    inputs = [task.training.inputs[np.asarray(half)] for half in made.pair.halves]
    both = list(zip(sources, inputs, strict=True))
    metrics = {"only free inputs": [guards.free(x, own) for x, own in both]}
    metrics |= {f"damping {d:g}": [damped(x, own, d) for x, own in both] for d in DAMPINGS}
    anywhere = {name: float("weight" in name) for name in made.middle}
    metrics["anywhere"] = [anywhere, anywhere]
    curves = {}
    for name, allow in metrics.items():
        far = negative.exit_ball(
            sources, guards.EQUAL, made.middle, size, direction=rising, allow=allow
        )
        rows = []
        for margin in MARGINS:  # from its own center a guard moves along a line
            pair = [tree.combine((1 - margin, margin), xy) for xy in zip(sources, far, strict=True)]
            own = [
                float(divergence(x, y, half.inputs))
                for x, y, half in zip(sources, pair, halves, strict=True)
            ]
            rows.append([np.mean(own), float(study.accuracy(average.mean(pair), task.held_out))])
        curves[name] = dict(zip(("KL", "accuracy"), np.array(rows).T, strict=True))
    return curves


def run(size: Size) -> dict[str, Any]:
    """The costs of all guards, for each task and seed."""

    def one(name: str, seed: int) -> dict[str, Any]:
        made = guards.guarded(name, seed, size.training)
        return {
            "guards": {guard: lost(made, pair) for guard, pair in made.guards.items()},
            "damage": damages(made),
        }

    return {
        "settings": dataclasses.asdict(size),
        **{name: report.over_seeds([one(name, x) for x in size.seeds]) for name in size.tasks},
    }


def tables(results: dict[str, Any]) -> dict[str, str]:
    """For each task: what each guard costs, and damage against margin by where one may move."""
    found: dict[str, str] = {}
    for name in results["settings"]["tasks"]:
        rows = results[name]["guards"]
        columns = [x for x in next(iter(rows.values())) if x != "segment"]
        cells = [[x, *(report.cell(row[y], 3) for y in columns)] for x, row in rows.items()]
        found[f"{name}, guards"] = report.table(["guard", *columns], cells)
        for what in ("KL", "accuracy"):
            cells = [
                [metric, *(report.cell(x, 3) for x in np.array(curve[what]).T)]
                for metric, curve in results[name]["damage"].items()
            ]
            found[f"{name}, {what} by margin"] = report.table(
                ["may move", *map(str, MARGINS)], cells
            )
    return found


def picture(results: dict[str, Any]) -> Figure:
    """Damage against margin, what the mean reads against damage, and the loss along segments."""
    tasks = results["settings"]["tasks"]
    figure, grid = plt.subplots(
        3, len(tasks), figsize=(3.7 * len(tasks), 10), layout="constrained", squeeze=False
    )
    shades = (report.MOVED, "#5fa6d1", "#9ecae1", report.THIRD, report.AVOIDED)
    for name, (top, middle, bottom) in zip(tasks, grid.T, strict=True):
        for (metric, curve), shade in zip(results[name]["damage"].items(), shades, strict=True):
            kl, _ = report.mean_and_error(curve["KL"])
            top.plot(MARGINS, np.maximum(kl, 1e-7), "o-", color=shade, ms=3, label=metric)
            share, _ = report.mean_and_error(curve["accuracy"])
            middle.plot(np.maximum(kl, 1e-7), share, "o-", color=shade, ms=3)
        top.set(xlabel="margin, in norms of the mean", ylabel="KL on own inputs", yscale="log")
        middle.set(xlabel="KL on own inputs", ylabel="accuracy of the mean", xscale="log")
        chosen = ("none", "plain", "flattened", "one source permuted", "hull", "trained")
        colors = (report.FAINT, report.MOVED, "#5fa6d1", report.THIRD, report.AVOIDED, report.INK)
        for guard, color in zip(chosen, colors, strict=True):
            losses, _ = report.mean_and_error(results[name]["guards"][guard]["segment"])
            bottom.plot(averages.POSITIONS, losses, color=color, label=guard)
        bottom.set(xlabel="from A' to C'", ylabel="loss on all classes", yscale="log")
    for (axes, *_), place in ((grid[0], "upper"), (grid[2], "lower")):
        names = [line.get_label() for line in axes.lines]
        figure.legend(axes.lines, names, loc=f"outside {place} center", ncols=3, frameon=False)
    for axes, name in zip(grid[0], tasks, strict=True):
        axes.set_title(name, fontsize=11)
    return figure


PICTURES = {"cost": picture}
