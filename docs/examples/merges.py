"""Which merge for which models: networks tuned from one base on four views of digits, merged."""

import dataclasses
from collections.abc import Callable, Sequence
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
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0)
TARGETS = {"0 to 4": range(5), "5 to 9": range(5, 10), "3 and 8": (3, 8), "7": (7,)}
KEPT = 0.95  # the share of its control accuracy that a negated model must keep


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


def merges(
    key: Array, base: Weights, tuned: Sequence[Weights], data: Sequence[study.Data]
) -> dict[str, Weights]:
    """Every method at its own defaults, and at a scale of one where it has a scale."""
    keys = jax.random.split(key, len(tuned) + 1)
    fishers = [fisher(k, x, d) for k, x, d in zip(keys[1:], tuned, data, strict=True)]
    moments = [grams(x, d) for x, d in zip(tuned, data, strict=True)]
    return {
        "mean": average.mean(tuned),
        "fisher_mean": average.fisher_mean(tuned, fishers),
        "regression_mean": average.regression_mean(tuned, moments).weights,
        "model_stock": average.model_stock(base, tuned),
        "task_arithmetic": merge.task_arithmetic(base, tuned),
        "ties": merge.ties(base, tuned),
        "dare": merge.dare(keys[0], base, tuned),
        "tsv_m": merge.tsv_m(base, tuned, least=0.0).weights,
        "iso_c": merge.iso_c(base, tuned).weights,
    }


FIXED = ("mean", "fisher_mean", "regression_mean", "model_stock")
"""Methods that are averages: they have no scale to choose."""


def scaled(base: Weights, merged: Weights, scale: float) -> Weights:
    """The base plus a multiple of a merge's displacement."""
    return tree.combine((1 - scale, scale), (base, merged))


def best(
    base: Weights, merged: Weights, score: Callable[[Weights], float], scales: Sequence[float]
) -> tuple[float, Weights]:
    """The scale with the best score, the first of several."""
    found = max(scales, key=lambda scale: score(scaled(base, merged, scale)))
    return found, scaled(base, merged, found)


def merged_figures(size: Size, seed: int) -> dict[str, Any]:
    """What the base, every tuned network, and every merge of them read of every view."""
    split, first, key, drawn, *keys = jax.random.split(jax.random.key(seed), 4 + len(VIEWS))
    task = study.digits(split, size.width)
    base = trained(
        key, study.initial(first, task.sizes), seen(task.training, "upright"), size.steps[0]
    )
    training = [seen(task.training, view) for view in VIEWS]
    held_out = [seen(task.held_out, view) for view in VIEWS]
    tuned = [trained(k, base, d, size.steps[1]) for k, d in zip(keys, training, strict=True)]

    def read(weights: Weights) -> dict[str, float]:
        rates = [float(study.accuracy(weights, data)) for data in held_out]
        return dict(zip(VIEWS, rates, strict=True)) | {"mean": float(np.mean(rates))}

    def score(weights: Weights) -> float:
        return float(np.mean([study.accuracy(weights, data) for data in training]))

    rows = {"base": read(base)} | {
        f"tuned on {view}": read(x) for view, x in zip(VIEWS, tuned, strict=True)
    }
    for name, merged in merges(drawn, base, tuned, training).items():
        scales = (1.0,) if name in FIXED else SCALES
        chosen, weights = best(base, merged, score, scales)
        rows[name] = read(weights) | {"scale": chosen}
    return {"rows": rows, "models": models(base, tuned)}


def models(base: Weights, tuned: Sequence[Weights]) -> dict[str, float]:
    """How the task vectors lie to each other, and how far a merge of them can be trusted."""
    edits = [merge.task_vector(base, x) for x in tuned]
    cosines = np.asarray(merge.cosines(edits), np.float64)
    trusted = float(merge.tsv_m(base, tuned, least=0.0).trusted)
    return {
        "cosine of two": float(cosines[np.triu_indices(len(edits), 1)].mean()),
        "share of entries whose signs differ": float(merge.sign_disagreement(edits)),
        "share of the mass that cancels": float(merge.cancellation(edits)),
        "log10 of what tsv_m trusts": float(np.log10(max(trusted, 1e-30))),
    }


def negated_figures(size: Size, seed: int) -> dict[str, Any]:
    """A network that reads all digits, less what tuning on some of them adds to it."""
    split, first, key, noise, *keys = jax.random.split(jax.random.key(seed), 4 + len(TARGETS))
    task = study.digits(split, size.width)
    base = trained(key, study.initial(first, task.sizes), task.training, size.steps[0])
    found = {}
    for i, (name, classes) in enumerate(TARGETS.items()):
        shown = task.training.of(classes)
        tuned = study.train(keys[i], base, task.training, shown, steps=size.steps[1])
        edit = merge.task_vector(base, tuned)
        random = perturb.gaussian(jax.random.fold_in(noise, i), base)
        random = perturb.filter_normalize(random, edit)
        floor = KEPT * sides(base, task.training, classes)["control"]
        row = {"base": sides(base, task.held_out, classes)}
        for what, direction in (("negated", edit), ("random", random)):
            moved = [tree.combine((1, -scale), (base, direction)) for scale in SCALES]
            rates = [sides(x, task.training, classes) for x in moved]
            kept = [k for k, rate in enumerate(rates) if rate["control"] >= floor]
            chosen = min(kept, key=lambda k: rates[k]["target"], default=None)
            best = base if chosen is None else moved[chosen]
            row[what] = sides(best, task.held_out, classes)
        found[name] = row
    return found


def sides(weights: Weights, data: study.Data, classes: Sequence[int]) -> dict[str, float]:
    """What a network reads of some classes, and of the others."""
    right = np.asarray(study.outputs(weights, data.inputs)).argmax(axis=1) == data.labels
    target = np.asarray(data.of(classes))
    return {"target": float(right[target].mean()), "control": float(right[~target].mean())}


def run(size: Size) -> dict[str, Any]:
    """Merges and negations, for each seed."""
    return {
        "settings": dataclasses.asdict(size),
        "merged": report.over_seeds([merged_figures(size, seed) for seed in size.seeds]),
        "negated": report.over_seeds([negated_figures(size, seed) for seed in size.seeds]),
    }


def tables(results: dict[str, Any]) -> dict[str, str]:
    """What merges read of every view, and what is left of digits that are negated."""
    merged, negated = results["merged"]["rows"], results["negated"]
    rows = [
        [
            name if name.startswith(("base", "tuned")) else f"`{name}`",
            *(report.cell(row[view]) for view in (*VIEWS, "mean")),
            report.cell(row["scale"], 1) if "scale" in row and name not in FIXED else "",
        ]
        for name, row in merged.items()
    ]
    lost = [
        [
            name,
            *(
                report.cell(row[which][what])
                for which in ("base", "negated", "random")
                for what in ("target", "control")
            ),
        ]
        for name, row in negated.items()
    ]
    heads = [
        f"{which}: {what}"
        for which in ("before", "negated", "random")
        for what in ("target", "control")
    ]
    lie = [[name, report.cell(x)] for name, x in results["merged"]["models"].items()]
    return {
        "models": report.table(["task vectors", ""], lie),
        "merges": report.table(["", *VIEWS, "all", "scale"], rows),
        "negation": report.table(["digits", *heads], lost),
    }


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
