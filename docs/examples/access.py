"""How strong is a guard? Each guard, by who has access to what."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from scipy.stats import spearmanr

from docs.examples import guards, report, study
from wspace import average, geometry, lowrank, negative, tree
from wspace.typing import Weights

SWEEP = np.linspace(-0.5, 1.5, 41)
PER_LAYER = (-0.5, 0.0, 0.5, 1.0, 1.5)
RIDGE = 1e-6  # of a merge by Gram matrices, relative to the largest of their entries
SIZE = 50  # examples a step, of however few labels, with replacement
RATE, TERM_RATE = 1e-3, 1e-2  # of Adam: a low-rank term takes larger steps


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is run."""

    seeds: tuple[int, ...]
    tasks: tuple[str, ...]
    training: guards.Training
    labels: tuple[int, ...]
    ranks: tuple[int | None, ...]
    steps: int
    offsets: tuple[int, ...]


FULL = Size(
    seeds=(0, 1, 2, 3, 4),
    tasks=("digits", "text"),
    training=guards.Training(),
    labels=(10, 50, 200),
    ranks=(1, 4, None),
    steps=200,
    offsets=(1, 4, 8),
)
SMALL = Size((0, 1), ("digits",), guards.Training(30, 10, 16), (10,), (1,), 10, (1,))


def mixed(start: Weights, end: Weights, shares: Sequence[Any]) -> Weights:
    """A walk from one network to another, by a share of its own in each layer."""
    return {
        name: x + shares[int(name.split(".")[0]) - 1] * (end[name] - x) for name, x in start.items()
    }


@jax.jit
def best_of(start: Weights, end: Weights, shares: Array, data: study.Data) -> Array:
    """The best accuracy over walks, each with a share for every layer."""

    def read(row: Array) -> Array:
        return study.accuracy(mixed(start, end, row), data)

    return jnp.max(jax.lax.map(read, shares, batch_size=25))


@jax.jit
def gram_weighted(sources: Sequence[Weights], inputs: Sequence[Array]) -> Weights:
    """The merge whose layers say on each source's inputs what that source says (RegMean)."""
    merged: Weights = {}
    entering = [study.activations(x, own) for x, own in zip(sources, inputs, strict=True)]
    for i in study.layers(sources[0]):
        grams, targets = [], []
        for x, own in zip(sources, entering, strict=True):
            seen = jnp.concatenate([own[i - 1], jnp.ones((len(own[i - 1]), 1))], axis=1)
            both = jnp.concatenate([x[f"{i}.weight"], x[f"{i}.bias"][None]])
            grams.append(seen.T @ seen)
            targets.append(both)
        total = sum(grams[1:], grams[0])
        ridge = RIDGE * jnp.max(total) * jnp.eye(len(total))
        wanted = sum((g + ridge) @ x for g, x in zip(grams, targets, strict=True))
        solved = jnp.linalg.solve(total + len(grams) * ridge, wanted)
        merged[f"{i}.weight"], merged[f"{i}.bias"] = solved[:-1], solved[-1]
    return merged


def matched(weights: Weights, to: Weights) -> Weights:
    """A network with its hidden units in the order in which they match those of another best."""
    x, y = ({name: np.asarray(leaf) for name, leaf in w.items()} for w in (weights, to))
    hidden = list(study.layers(weights))[:-1]
    for _ in range(20):
        changed = False
        for i in hidden:
            likeness = y[f"{i}.weight"].T @ x[f"{i}.weight"]
            likeness += np.outer(y[f"{i}.bias"], x[f"{i}.bias"])
            likeness += y[f"{i + 1}.weight"] @ x[f"{i + 1}.weight"].T
            _, order = linear_sum_assignment(likeness, maximize=True)
            changed |= bool((order != np.arange(len(order))).any())
            x[f"{i}.weight"], x[f"{i}.bias"] = x[f"{i}.weight"][:, order], x[f"{i}.bias"][order]
            x[f"{i + 1}.weight"] = x[f"{i + 1}.weight"][order]
        if not changed:
            break
    return {name: jnp.asarray(leaf) for name, leaf in x.items()}


def without_labels(made: guards.Guarded, pair: Sequence[Weights], size: Size) -> dict[str, Any]:
    """What is read from two sources, or from their mean, by whoever has no label."""
    data, middle = made.pair.task.held_out, average.mean(pair)
    inputs = [made.pair.task.training.inputs[np.asarray(half)] for half in made.pair.halves]
    count = len(study.layers(middle))
    alone = [float(study.accuracy(x, data)) for x in pair]
    grid = np.array(list(itertools.product(PER_LAYER, repeat=count)), np.float32)
    line = np.repeat(SWEEP[:, None], count, axis=1).astype(np.float32)
    return {
        "A'": alone[0],
        "C'": alone[1],
        "mean": float(study.accuracy(middle, data)),
        "sweep": float(best_of(*pair, jnp.asarray(line), data)),
        "per layer": float(best_of(*pair, jnp.asarray(grid), data)),
        **{
            f"offset, rank {rank}": float(
                study.accuracy(
                    lowrank.apply(middle, negative.offset(middle, made.middle, rank).factors), data
                )
            )
            for rank in size.offsets
        },
        "RegMean": float(study.accuracy(gram_weighted(pair, inputs), data)),
        "matched": float(study.accuracy(average.mean([pair[0], matched(pair[1], pair[0])]), data)),
        "outputs": float(study.ensemble_accuracy(list(pair), data)),
    }


@functools.partial(jax.jit, static_argnames=("steps", "rank"))
def relearned(
    key: Array,
    starts: Weights,
    task: study.Task,
    count: Array,
    *,
    steps: int,
    rank: int | None,
) -> Array:
    """What stacked networks read after training on the first labels, all in the same batches."""
    shown = jnp.arange(task.training.labels.size) < count
    rate = RATE if rank is None else TERM_RATE

    def one(start: Weights) -> Array:
        options = {"steps": steps, "rate": rate, "rank": rank, "size": SIZE}
        return study.accuracy(
            study.train(key, start, task.training, shown, **options), task.held_out
        )

    return jax.lax.map(one, starts)


def training_name(rank: int | None) -> str:
    """What a column of trained cells is called."""
    return "whole" if rank is None else f"rank {rank}"


def with_labels(made: guards.Guarded, seed: int, size: Size) -> dict[str, Any]:
    """What is read after training on labels, from the mean of each guard, and from controls."""
    task = made.pair.task
    key, fresh = jax.random.split(jax.random.fold_in(jax.random.key(seed), 2))
    starts = {"fresh": study.initial(fresh, task.sizes), "base": made.pair.base}
    for name, (a, c) in made.guards.items():
        starts |= {f"R' {name}": average.mean([a, c]), f"A' {name}": a, f"C' {name}": c}
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *starts.values())
    read: dict[str, Any] = {name: {} for name in starts}
    for count, rank in itertools.product(size.labels, size.ranks):
        shares = relearned(key, stacked, task, jnp.asarray(count), steps=size.steps, rank=rank)
        for name, share in zip(starts, shares.tolist(), strict=True):
            read[name][f"{count} labels, {training_name(rank)}"] = share
    return read


def measures(made: guards.Guarded, pair: Sequence[Weights]) -> dict[str, float]:
    """What weight space says of a guard: margin, rank needed, and what a rank leaves on data."""
    middle = average.mean(pair)
    away = geometry.distance(middle, made.middle)
    edit = tree.combine((1, -1), (made.middle, middle))
    entering = study.activations(made.middle, made.pair.task.training.inputs)
    tails = []
    for i, x in zip(study.layers(middle), entering, strict=False):
        cut = lowrank.truncate_outputs(edit[f"{i}.weight"], x, 1)
        tails.append(cut.tail / tree.norm(x @ made.middle[f"{i}.weight"]))
    return {
        "margin": float(away / tree.norm(made.middle)),
        "rank needed": int(negative.rank_to_reach(middle, made.middle, away / 2)),
        "data-aware tail": float(tree.norm(tails)),
    }


def one_seed(name: str, seed: int, size: Size) -> dict[str, Any]:
    """All figures of one seed."""
    made = guards.guarded(name, seed, size.training)
    data = made.pair.task.held_out
    trained = with_labels(made, seed, size)
    figures: dict[str, Any] = {"guards": {}, "controls": {}}
    for guard, pair in made.guards.items():
        plain = without_labels(made, pair, size)
        starts = {x: trained[f"{x} {guard}"] for x in ("R'", "A'", "C'")}
        cells = {x: plain[x] for x in plain if x not in ("A'", "C'")} | starts["R'"]
        figures["guards"][guard] = {
            "cells": cells,
            "A'": {"as it is": plain["A'"]} | starts["A'"],
            "C'": {"as it is": plain["C'"]} | starts["C'"],
            "measures": measures(made, pair),
        }
    base = float(study.accuracy(made.pair.base, data))
    figures["controls"]["base"] = {"as it is": base} | trained["base"]
    figures["controls"]["fresh"] = trained["fresh"]
    return figures


def head_starts(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By guard and access, what is read more than by the best control, for each seed.

    The best control is the one that reads most on average over the seeds. The best of each seed
    would be picked by the data on which it is measured.
    """
    heads: dict[str, dict[str, Any]] = {}
    for guard, figures in found["guards"].items():
        controls = [*found["controls"].values(), figures["A'"], figures["C'"]]
        heads[guard] = {}
        for access, share in figures["cells"].items():
            column = access if "labels" in access else "as it is"
            best = max((x[column] for x in controls if column in x), key=np.mean)
            heads[guard][access] = np.subtract(share, best).tolist()
    return heads


def correlations(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rank correlation over the guards of what weight space says with the head start, by seed."""
    heads, guards = head_starts(found), found["guards"].values()
    first = next(iter(guards))
    return {
        measure: {
            access: [
                float(spearmanr(*pair).statistic)
                for pair in zip(
                    zip(*(x["measures"][measure] for x in guards), strict=True),
                    zip(*(x[access] for x in heads.values()), strict=True),
                    strict=True,
                )
            ]
            for access in first["cells"]
            if "labels" in access
        }
        for measure in first["measures"]
    }


def run(size: Size) -> dict[str, Any]:
    """All guards against all accesses, for each task and seed."""
    return {
        "settings": dataclasses.asdict(size),
        **{
            name: report.over_seeds([one_seed(name, seed, size) for seed in size.seeds])
            for name in size.tasks
        },
    }


def tables(results: dict[str, Any]) -> dict[str, str]:
    """For each task: accuracies without labels and with, head starts, and correlations."""
    found: dict[str, str] = {}
    for name in results["settings"]["tasks"]:
        rows, controls = results[name]["guards"], results[name]["controls"]
        first = next(iter(rows.values()))
        bare, labeled = (
            [x for x in first["cells"] if ("labels" in x) == wanted] for wanted in (False, True)
        )
        below = [
            [f"control: {x}", *(report.cell(controls[x][y]) for y in labeled)]
            for x in ("base", "fresh")
        ]
        for what in ("A'", "C'"):
            cells = [report.cell(rows["none"][what][y]) for y in labeled]
            below.append([f"control: {what[0]}", *cells])
        correlated = [
            [measure, *(report.cell(row[x]) for x in labeled)]
            for measure, row in correlations(results[name]).items()
        ]
        trained = [*_lines(rows, "cells", labeled), *below]
        found |= {
            f"{name}, without labels": report.table(["guard", *bare], _lines(rows, "cells", bare)),
            f"{name}, with labels": report.table(["guard", *labeled], trained),
            f"{name}, head start": report.table(
                ["guard", *labeled],
                [
                    [guard, *(report.cell(head[x]) for x in labeled)]
                    for guard, head in head_starts(results[name]).items()
                ],
            ),
            f"{name}, measures": report.table(
                ["guard", *first["measures"]], _lines(rows, "measures", first["measures"])
            ),
            f"{name}, correlation": report.table(["measure", *labeled], correlated),
        }
    return found


def _lines(rows: dict[str, Any], what: str, columns: Iterable[str]) -> list[list[str]]:
    return [
        [guard, *(report.cell(figures[what][x]) for x in columns)]
        for guard, figures in rows.items()
    ]


def picture(results: dict[str, Any]) -> Figure:
    """The head start of every guard by labels and by what is trained."""
    tasks = results["settings"]["tasks"]
    figure, grid = plt.subplots(
        len(tasks), 1, figsize=(7.4, 5.6 * len(tasks)), layout="constrained", squeeze=False
    )
    for name, (axes,) in zip(tasks, grid, strict=True):
        rows = head_starts(results[name])
        columns = next(iter(rows.values()))
        values = np.array([[np.mean(row[x]) for row in rows.values()] for x in columns])
        image = axes.imshow(values, cmap="RdBu_r", vmin=-0.6, vmax=0.6, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            color = "white" if abs(value) > 0.4 else report.INK
            axes.text(
                j,
                i,
                f"{np.round(value, 2) + 0.0:+.2f}",
                ha="center",
                va="center",
                color=color,
                fontsize=8,
            )
        axes.set_xticks(range(len(rows)), rows, rotation=35, ha="right", fontsize=9)
        axes.set_yticks(range(len(columns)), columns, fontsize=9)
        axes.set_title(f"{name}: head start", fontsize=11)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


PICTURES = {"access": picture}
