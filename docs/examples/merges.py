"""Which merge for which models: networks tuned from one base on four views of digits, merged."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array
from matplotlib.figure import Figure

from docs.examples import report, study
from wspace import average, merge, perturb, tree
from wspace.typing import Weights

VIEWS = ("upright", "turned", "inverted", "mirrored")
TARGETS = {"0 to 4": range(5), "5 to 9": range(5, 10), "3 and 8": (3, 8), "7": (7,)}
LARGEST = 2.0  # of the scales that are tried
DRAWS = 4  # of what is dropped at random


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is run."""

    seeds: tuple[int, ...]
    steps: tuple[int, int]  # of the base, and of every tuned network
    width: int


FULL = Size(seeds=(0, 1, 2, 3, 4), steps=(1000, 400), width=256)
SMALL = Size(seeds=(0, 1), steps=(40, 30), width=16)


def seen(data: study.Data, view: str) -> study.Data:
    """The same digits turned by a quarter, with black and white exchanged, or in a mirror."""
    images = data.inputs.reshape(-1, 8, 8)
    shown = {
        "upright": images,
        "turned": jnp.rot90(images, axes=(1, 2)),
        "inverted": 1 - images,
        "mirrored": images[:, :, ::-1],
    }[view]
    return study.Data(shown.reshape(data.inputs.shape), data.labels)


def trained(key: Array, start: Weights, data: study.Data, steps: int) -> Weights:
    """A network trained on all of some data."""
    return study.train(key, start, data, data.labels >= 0, steps=steps)


def grams(weights: Weights, data: study.Data) -> Weights:
    """Second moments of what enters every layer, and nothing for the biases."""
    entering = study.activations(weights, data.inputs)
    moments = {f"{i}.weight": entering[i - 1] for i in study.layers(weights)}
    products = {name: x.T @ x / len(x) for name, x in moments.items()}
    return {name: products.get(name) for name in weights}


def fisher(key: Array, weights: Weights, data: study.Data) -> Weights:
    """The diagonal of the Fisher information: squared gradients for labels that the model draws."""
    labels = jax.random.categorical(key, study.outputs(weights, data.inputs))

    @jax.jit
    def squares(weights: Weights) -> Weights:
        def gradient(x: Array, label: Array) -> Weights:
            return jax.grad(lambda w: study.losses(w, study.Data(x[None], label[None])).mean())(
                weights
            )

        return jax.tree.map(
            lambda g: jnp.mean(g**2, axis=0), jax.vmap(gradient)(data.inputs, labels)
        )

    return squares(weights)


def stacked(trees: Sequence[Any]) -> Any:
    """Trees of arrays as one, with a first axis."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def merges(
    key: Array, base: Weights, tuned: Sequence[Weights], data: Sequence[study.Data]
) -> dict[str, Weights]:
    """Every method at its own defaults, and a scale of one if it has one: stacks of draws."""
    keys = jax.random.split(key, len(tuned) + 1)
    fishers = [fisher(k, x, d) for k, x, d in zip(keys[1:], tuned, data, strict=True)]
    moments = [grams(x, d) for x, d in zip(tuned, data, strict=True)]
    made = {
        "mean": [average.mean(tuned)],
        "fisher_mean": [average.fisher_mean(tuned, fishers)],
        "regression_mean": [average.regression_mean(tuned, moments).weights],
        "model_stock": [average.model_stock(base, tuned)],
        "task_arithmetic": [merge.task_arithmetic(base, tuned)],
        "ties": [merge.ties(base, tuned)],
        "dare": [merge.dare(draw, base, tuned) for draw in jax.random.split(keys[0], DRAWS)],
        "tsv_m": [merge.tsv_m(base, tuned).weights],
        "iso_c": [merge.iso_c(base, tuned).weights],
    }
    return {name: stacked(draws) for name, draws in made.items()}


FIXED = ("mean", "fisher_mean", "regression_mean", "model_stock")
"""Methods that are averages: they have no scale to choose."""


def scaled(base: Weights, merged: Weights, scale: float) -> Weights:
    """The base plus a multiple of a merge's displacement."""
    return tree.combine((1 - scale, scale), (base, merged))


def best(score: Callable[[float], float]) -> float:
    """The scale with the best score, to a hundredth."""
    coarse = max(np.linspace(0.1, LARGEST, 20), key=score)
    fine = [x for x in coarse + np.linspace(-0.09, 0.09, 19) if 0 < x <= LARGEST]
    return round(float(max(fine, key=score)), 2)


@dataclasses.dataclass(frozen=True)
class Merged:
    """The networks of one seed, the views of data, and every merge, a stack of draws."""

    base: Weights
    tuned: list[Weights]
    training: study.Data
    held_out: study.Data
    merges: dict[str, Weights]


def merged_models(size: Size, seed: int, rounding: int) -> Merged:
    """A base, a network tuned from it on every view, and every merge of them."""
    split, first, key, drawn, *keys = jax.random.split(jax.random.key(seed), 4 + len(VIEWS))
    task = study.digits(split, size.width)
    start = rounded(study.initial(first, task.sizes), rounding)
    training = [seen(task.training, view) for view in VIEWS]
    held_out = [seen(task.held_out, view) for view in VIEWS]
    base = trained(key, start, training[0], size.steps[0])
    tuned = [trained(k, base, d, size.steps[1]) for k, d in zip(keys, training, strict=True)]
    made = merges(drawn, base, tuned, training)
    return Merged(base, tuned, stacked(training), stacked(held_out), made)


def rounded(weights: Weights, units: int) -> Weights:
    """Weights of which one in a hundred is changed by some units in the last place."""
    up = np.float32(1 + units * 2.0**-23)
    return jax.tree.map(lambda x: x.at[::100].multiply(up), weights)


@functools.partial(jax.jit, static_argnums=0)
def on_views(
    measure: Callable[..., Array], base: Weights, draws: Weights, data: study.Data, scale: float
) -> Array:
    """What is measured of the base plus a multiple of each merge, on each view."""

    def of_draw(merged: Weights) -> Array:
        weights = scaled(base, merged, scale)
        return jax.vmap(lambda view: measure(weights, view))(data)

    return jax.vmap(of_draw)(draws).mean(axis=0)


def merged_figures(size: Size, rounding: int) -> list[dict[str, Any]]:
    """What the base, every tuned network, and every merge of them read of every view, by seed."""
    seeds = [merged_models(size, seed, rounding) for seed in size.seeds]

    def score(name: str, scale: float) -> float:
        confidences = [
            on_views(study.confidence, x.base, x.merges[name], x.training, scale) for x in seeds
        ]
        return float(np.mean(confidences))

    names = [name for name in seeds[0].merges if name not in FIXED]
    scales = {name: best(functools.partial(score, name)) for name in names}
    return [rows_of(found, scales) for found in seeds]


def rows_of(found: Merged, scales: Mapping[str, float]) -> dict[str, Any]:
    """What is read of every view of the digits held out, a mean over draws."""

    def read(draws: Weights, scale: float) -> dict[str, float]:
        rates = np.asarray(on_views(study.accuracy, found.base, draws, found.held_out, scale))
        return dict(zip(VIEWS, map(float, rates), strict=True)) | {"mean": float(rates.mean())}

    rows = {"base": read(stacked([found.base]), 1.0)} | {
        f"tuned on {view}": read(stacked([x]), 1.0)
        for view, x in zip(VIEWS, found.tuned, strict=True)
    }
    for name, draws in found.merges.items():
        scale = scales.get(name, 1.0)
        rows[name] = read(draws, scale) | {"scale": scale}
    return {"rows": rows, "models": models(found.base, found.tuned)}


def models(base: Weights, tuned: Sequence[Weights]) -> dict[str, float]:
    """How the task vectors lie to each other, and how far a merge of them can be trusted."""
    edits = [merge.task_vector(base, x) for x in tuned]
    cosines = np.asarray(merge.cosines(edits), np.float64)
    trusted = float(merge.tsv_m(base, tuned).trusted)
    return {
        "cosine of two": float(cosines[np.triu_indices(len(edits), 1)].mean()),
        "share of entries whose signs differ": float(merge.sign_disagreement(edits)),
        "share of the mass that cancels": float(merge.cancellation(edits)),
        "log10 of what tsv_m trusts": float(np.log10(trusted)),
    }


@dataclasses.dataclass(frozen=True)
class Negated:
    """The network of one seed, and by target an edit and a random one of its size."""

    base: Weights
    task: study.Task
    edits: dict[str, dict[str, Weights]]


def negated_models(size: Size, seed: int, rounding: int) -> Negated:
    """A network that reads all digits, and what tuning on some of them adds to it."""
    split, first, key, noise, *keys = jax.random.split(jax.random.key(seed), 4 + len(TARGETS))
    task = study.digits(split, size.width)
    start = rounded(study.initial(first, task.sizes), rounding)
    base = trained(key, start, task.training, size.steps[0])
    edits = {}
    for i, (name, classes) in enumerate(TARGETS.items()):
        shown = task.training.of(classes)
        tuned = study.train(keys[i], base, task.training, shown, steps=size.steps[1])
        edit = merge.task_vector(base, tuned)
        random = perturb.gaussian(jax.random.fold_in(noise, i), base)
        edits[name] = {"negated": edit, "random": perturb.filter_normalize(random, edit)}
    return Negated(base, task, edits)


def negated_figures(size: Size, rounding: int) -> list[dict[str, Any]]:
    """What is left of a target and of the control once an edit is taken away, by seed."""
    seeds = [negated_models(size, seed, rounding) for seed in size.seeds]
    rows: list[dict[str, Any]] = [{} for _ in seeds]
    for name, classes in TARGETS.items():

        def apart(scale: float, name: str = name, classes: Sequence[int] = classes) -> float:
            rates = [
                sides(less(found, name, "negated", scale), found.task.training, classes, sure)
                for found in seeds
            ]
            return float(np.mean([rate["control"] - rate["target"] for rate in rates]))

        scale = best(apart)
        for row, found in zip(rows, seeds, strict=True):
            row[name] = {"base": sides(found.base, found.task.held_out, classes, right)} | {
                what: sides(less(found, name, what, scale), found.task.held_out, classes, right)
                for what in ("negated", "random")
            }
            row[name]["scale"] = scale
    return rows


def less(found: Negated, name: str, what: str, scale: float) -> Weights:
    """The network less a multiple of an edit."""
    return tree.combine((1, -scale), (found.base, found.edits[name][what]))


@jax.jit
def right(weights: Weights, data: study.Data) -> Array:
    """Whether the class of each example is read correctly."""
    return jnp.argmax(study.outputs(weights, data.inputs), axis=-1) == data.labels


@jax.jit
def sure(weights: Weights, data: study.Data) -> Array:
    """The probability that the right class of each example is given."""
    return jnp.exp(-study.losses(weights, data))


def sides(
    weights: Weights,
    data: study.Data,
    classes: Sequence[int],
    measure: Callable[[Weights, study.Data], Array],
) -> dict[str, float]:
    """What a network reads of some classes, and of the others."""
    found, target = np.asarray(measure(weights, data)), np.asarray(data.of(classes))
    return {"target": float(found[target].mean()), "control": float(found[~target].mean())}


def run(size: Size) -> dict[str, Any]:
    """Merges and negations, for each seed, and again from weights that are rounded otherwise."""
    figures: dict[str, Any] = {"settings": dataclasses.asdict(size)}
    for name, measured in (("merged", merged_figures), ("negated", negated_figures)):
        figures[name], again = (report.over_seeds(measured(size, times)) for times in (0, 1))
        figures[f"{name}, rounded otherwise"] = again
    return figures


def tables(results: dict[str, Any]) -> dict[str, str]:
    """What merges read of every view, and what is left of digits that are negated."""
    merged, negated = results["merged"]["rows"], results["negated"]
    again = results["merged, rounded otherwise"]["rows"]
    rows = [
        [
            name if name.startswith(("base", "tuned")) else f"`{name}`",
            *(report.cell(row[view]) for view in (*VIEWS, "mean")),
            "" if name in FIXED or "scale" not in row else f"{row['scale'][0]:.2f}",
            largest_change(row, again[name], (*VIEWS, "mean")),
        ]
        for name, row in merged.items()
    ]
    whats, kinds = ("base", "negated", "random"), ("target", "control")
    lost = [
        [
            name,
            *(report.cell(row[which][what]) for which in whats for what in kinds),
            f"{row['scale'][0]:.2f}",
            largest_change(
                row["negated"], results["negated, rounded otherwise"][name]["negated"], kinds
            ),
        ]
        for name, row in negated.items()
    ]
    heads = [f"{which}: {what}" for which in ("before", *whats[1:]) for what in kinds]
    lie = [[name, report.cell(x)] for name, x in results["merged"]["models"].items()]
    return {
        "task vectors of the four models": report.table(["of two models", "value"], lie),
        "what the merges read": report.table(["merge", *VIEWS, "all", "scale", "rounding"], rows),
        "what negation leaves": report.table(["digits", *heads, "scale", "rounding"], lost),
    }


def largest_change(row: Mapping[str, Any], again: Mapping[str, Any], names: Sequence[str]) -> str:
    """The largest change of a mean over the seeds, among the cells of some names."""
    return f"{max(abs(np.mean(row[name]) - np.mean(again[name])) for name in names):.2f}"


def picture(results: dict[str, Any]) -> Figure:
    """What every merge reads of each view."""
    merged = results["merged"]["rows"]
    names = [name for name in merged if not name.startswith("tuned")]
    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    colors = (report.INK, report.MOVED, report.AVOIDED, report.THIRD)
    places = np.arange(len(names))
    for i, (view, color) in enumerate(zip(VIEWS, colors, strict=True)):
        mean, error = np.array([report.mean_and_error(merged[name][view]) for name in names]).T
        axes.errorbar(
            places + 0.12 * (i - 1.5), mean, error, fmt="o", ms=5, color=color, label=view, lw=1.2
        )
    axes.axhline(0.1, color=report.FAINT, lw=0.8, ls=":")
    axes.set_xticks(places, names, rotation=30, ha="right")
    axes.set_ylabel("read correctly")
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


PICTURES = {"merges": picture}
