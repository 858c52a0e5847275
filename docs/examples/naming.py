"""Naming a point: an input that makes a frozen decoder draw what an average of two draws."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jaxtyping import Array, Float

from docs.examples import report, study
from docs.examples.decoders import (
    BLANK,
    GIVEN,
    KNOWN,
    Drawings,
    Point,
    Settings,
    drawings,
    drawn,
    error,
    initial,
    learned,
    points,
)
from wspace import fit, geometry, lowrank, negative, perturb, tree
from wspace.typing import Scalar, Weights

POINTS = {"words": "two words", "digits": "two digits", "styles": "two styles"}
KINDS = {"deep": "deep", "linear": "linear in the word"}
TITLES = {"deep": "deep decoder", "linear": "decoder that is linear in the word"}
WAYS = {
    "none": "none: the base as it is",
    "own": "the word of $B'$ itself",
    "name": "a name",
    "mix": "a mix of the 8 known words",
    "names": "a name for each digit",
    "random": "random directions",
    "one": "along $A$",
    "two": "along $A$ and $C$",
    "rank 1": "offset of rank 1",
    "rank 4": "offset of rank 4",
}

LIKENESS = {
    "base": "base",
    "A": "$A$, of eights",
    "C": "$C$, of nines",
    "average": "$B'$",
    "name": "name of $B'$",
    "direct": "name of the images",
}
DRAWN = {
    "given": "given",
    "image": "the digit",
    "base": "base",
    "A": "$A$",
    "C": "$C$",
    "average": "$B'$",
    "name": "base, named",
}


FULL = Settings()
SMALL = Settings((0, 1), (2,), 2, width=16, learn=40, tune=40, search=40, asked=32, starts=2)


class Naming(NamedTuple):
    """A point to be named: the upper halves at which it is asked, and what it draws there."""

    point: Point
    seen: Drawings
    unseen: Drawings
    targets: Float[Array, "n 64"]
    wanted: Float[Array, "m 64"]


@functools.partial(jax.jit, static_argnames=("rows", "steps"))
def named(
    key: Array,
    base: Weights,
    start: Array,
    asked: Drawings,
    targets: Float[Array, "n 64"],
    *,
    rows: int | tuple[int, ...] = BLANK,
    steps: int,
) -> Weights:
    """The base with those words under which it draws what is wanted, as nearly as it can."""

    def loss(words: Array) -> Scalar:
        return error(base | {"words": words}, asked, targets)

    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))
    table = base["words"]
    found = fit.invert(key, loss, start, table=table, rows=rows, optimizer=optimizer, steps=steps)
    return base | {"words": found.weights}


@functools.partial(jax.jit, static_argnames="steps")
def charted(
    key: Array,
    base: Weights,
    directions: list[Weights],
    asked: Drawings,
    targets: Float[Array, "n 64"],
    *,
    steps: int,
) -> Weights:
    """The best model of a chart around the base: a name that is a coordinate."""
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *directions)

    def at(z: Array) -> Weights:
        return jax.tree.map(lambda x, moved: x + jnp.tensordot(z, moved, 1), base, stacked)

    def loss(z: Array) -> Scalar:
        return error(at(z), asked, targets)

    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))
    start = jnp.zeros(len(directions))
    return at(fit.invert(key, loss, start, optimizer=optimizer, steps=steps).weights)


def to_name(task: study.Task, point: Point, settings: Settings) -> Naming:
    """What there is to name of a point: what it draws under the blank word."""
    parts = []
    for data, count in ((task.training, settings.asked), (task.held_out, settings.asked // 4)):
        places = jnp.argsort(~data.of(point.digits), stable=True)[:count]
        words = data.labels % BLANK  # which of its words a model with a word a digit is given
        parts.append(Drawings(words, data.inputs[:, :GIVEN], data.inputs).at(places))
    targets = [drawn(point.average, part.under(BLANK)) for part in parts]
    return Naming(point, *parts, *targets)


def left(naming: Naming, base: Weights, found: Weights, *, each: bool = False) -> dict[str, float]:
    """The share of the difference between base and point that is left, where seen and not."""
    shares = {}
    for part, wanted, where in (
        (naming.seen, naming.targets, "training"),
        (naming.unseen, naming.wanted, "held out"),
    ):
        blank = part.under(BLANK)
        before = jnp.sum((drawn(base, blank) - wanted) ** 2)
        after = jnp.sum((drawn(found, part if each else blank) - wanted) ** 2)
        shares[where] = float(after / before)
    return shares


def kept(base: Weights, found: Weights) -> int:
    """How many of the known words are as they were, bit for bit."""
    old, new = (np.asarray(x["words"])[:BLANK].view(np.int32) for x in (base, found))
    return int(np.all(old == new, axis=1).sum())


def known_error(task: study.Task, weights: Weights) -> float:
    """The error on held-out images of the digits of the base, under their words; in thousandths."""
    known = np.asarray(task.held_out.of(KNOWN))
    data = drawings(task.held_out)
    wrong = np.asarray(drawn(weights, data) - data.images)[known]
    return 1e3 * float(np.mean(wrong**2))


def least_squares(base: Weights, naming: Naming) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a word that enters linearly changes, what it is to reach, and the best word."""
    asked, length = naming.seen.under(BLANK), base["words"].shape[1]

    def under(word: Array) -> np.ndarray:
        words = base["words"].at[BLANK].set(word)
        return np.asarray(drawn(base | {"words": words}, asked), np.float64).ravel()

    zero = under(jnp.zeros(length))
    matrix = np.stack([under(row) - zero for row in jnp.eye(length)], axis=1)
    wanted = np.asarray(naming.targets, np.float64).ravel() - zero
    return matrix, wanted, np.linalg.lstsq(matrix, wanted)[0]


def compared(base: Weights, naming: Naming, found: Weights) -> dict[str, float]:
    """How a name found by descent differs from least squares, in millionths."""
    matrix, wanted, best = least_squares(base, naming)
    name = np.asarray(found["words"][BLANK], np.float64)
    start = np.asarray(base["words"][BLANK], np.float64)
    losses = [np.sum((matrix @ e - wanted) ** 2) for e in (start, name, best)]
    return {
        "loss": 1e6 * abs(losses[1] - losses[2]) / losses[0],
        "word": 1e6 * np.linalg.norm(name - best) / np.linalg.norm(best),
    }


def ways(
    key: Array, base: Weights, naming: Naming, name: Weights, settings: Settings
) -> dict[str, tuple[Weights, bool]]:
    """Models that come near a point in one way or another; whether each digit has its own word."""
    asked, words, point = naming.seen.under(BLANK), base["words"], naming.point
    length, steps = words.shape[1], settings.search

    def to(x: Weights) -> Weights:
        return tree.combine([1.0, -1.0], [x, base])

    def word(row: Array) -> Weights:
        return base | {"words": words.at[BLANK].set(row)}

    def chart(directions: list[Weights]) -> Weights:
        spare = max(length, len(KNOWN)) - len(directions)  # zeros: one compilation for all charts
        nothing = jax.tree.map(jnp.zeros_like, base)
        return charted(
            key, base, directions + spare * [nothing], asked, naming.targets, steps=steps
        )

    size = geometry.distance(base, point.average)
    keys = jax.random.split(jax.random.fold_in(key, 1), length)
    for_each = named(
        key,
        base,
        jnp.tile(words[BLANK], (BLANK, 1)),
        naming.seen,
        naming.targets,
        rows=tuple(KNOWN),
        steps=steps,
    )
    models = {
        "none": base,
        "own": word(point.average["words"][BLANK]),
        "name": name,
        "mix": chart([to(word(words[row])) for row in KNOWN[:-1]]),
        "names": for_each,
        "random": chart([perturb.gaussian(k, base, norm=size) for k in keys]),
        "one": chart([to(point.sources[0])]),
        "two": chart([to(x) for x in point.sources]),
    }
    for rank in (1, 4):
        edit = negative.offset(base, point.average, rank).factors
        models[f"rank {rank}"] = lowrank.apply(base, edit)
    return {way: (model, way == "names") for way, model in models.items()}


def numbers(length: int, width: int) -> dict[str, int]:
    """How many numbers each way has to choose, beside what it is given."""
    weights = jax.eval_shape(lambda: initial(jax.random.key(0), "deep", length, width))
    shapes = [x.shape for x in jax.tree.leaves(weights)]

    def of_rank(rank: int) -> int:
        return sum(
            min(rank, *shape) * sum(shape) if len(shape) > 1 else shape[0] for shape in shapes
        )

    return {
        "none": 0,
        "own": 0,
        "name": length,
        "mix": len(KNOWN) - 1,
        "names": len(KNOWN) * length,
        "random": length,
        "one": 1,
        "two": 2,
        "rank 1": of_rank(1),
        "rank 4": of_rank(4),
    }


def likeness(
    key: Array, base: Weights, naming: Naming, name: Weights, steps: int
) -> dict[str, float]:
    """The error on the lower halves of held-out images that a point is trained to draw."""
    seen, unseen, point = naming.seen.under(BLANK), naming.unseen.under(BLANK), naming.point
    direct = named(key, base, base["words"][BLANK], seen, seen.images, steps=steps)
    models = {
        "base": base,
        "A": point.sources[0],
        "C": point.sources[1],
        "average": point.average,
        "name": name,
        "direct": direct,
    }
    wrong = {who: np.asarray(drawn(model, unseen) - unseen.images) for who, model in models.items()}
    return {who: 1e3 * float(np.mean(x[:, GIVEN:] ** 2)) for who, x in wrong.items()}


def images(base: Weights, naming: Naming, name: Weights) -> dict[str, np.ndarray]:
    """What all concerned draw of the first upper half that is held out."""
    asked = naming.unseen.under(BLANK).at(jnp.arange(1))
    models = {
        "base": base,
        "A": naming.point.sources[0],
        "C": naming.point.sources[1],
        "average": naming.point.average,
        "name": name,
    }
    rows = {"given": asked.halves, "image": asked.images}
    rows |= {who: drawn(model, asked) for who, model in models.items()}
    return {who: np.clip(np.asarray(x[0], np.float64), 0, 1).round(2) for who, x in rows.items()}


def measure(seed: int, settings: Settings) -> dict[str, Any]:
    """The figures of one seed."""
    split, first, second, third = jax.random.split(jax.random.key(seed), 4)
    task, steps = study.digits(split), settings.search
    shares: dict[str, Any] = {kind: {} for kind in KINDS}
    exact, rows, pictures, more = {}, {"kept": 0, "to keep": 0}, {}, {}
    for kind in KINDS:
        for length in settings.lengths:
            base = learned(first, task, kind, length, settings)
            found = shares[kind][f"{length}"] = {}
            differences = []
            for what, point in points(second, task, base, settings).items():
                naming = to_name(task, point, settings)
                asked = naming.seen.under(BLANK), naming.targets
                name = named(third, base, base["words"][BLANK], *asked, steps=steps)
                found[what] = left(naming, base, name)
                rows["kept"] += kept(base, name)
                rows["to keep"] += len(KNOWN)
                if kind == "linear":
                    differences.append(compared(base, naming, name))
                elif length == settings.length:
                    more[what] = beside(third, task, base, naming, name, settings)
                    pictures[what] = images(base, naming, name)
            if kind == "linear":
                exact[f"{length}"] = {
                    key: max(x[key] for x in differences) for key in differences[0]
                }
    return {"left": shares, "exact": exact, "rows": rows, "beside": more, "drawn": pictures}


def beside(
    key: Array,
    task: study.Task,
    base: Weights,
    naming: Naming,
    name: Weights,
    settings: Settings,
) -> dict[str, Any]:
    """What else there is to say of a point: other ways to it, other starts, and its likeness."""
    asked, steps = (naming.seen.under(BLANK), naming.targets), settings.search
    starts = [
        named(key, base, base["words"][row], *asked, steps=steps) for row in range(settings.starts)
    ]
    reached = [left(naming, base, x)["training"] for x in starts]
    figures: dict[str, Any] = {
        "ways": {
            way: left(naming, base, model, each=each) | {"known": known_error(task, model)}
            for way, (model, each) in ways(key, base, naming, name, settings).items()
        },
        "starts": {"lowest": min(reached), "highest": max(reached)},
    }
    if naming.point.digits == range(8, 10):
        figures["likeness"] = likeness(key, base, naming, name, steps)
    return figures


def run(settings: Settings) -> dict[str, Any]:
    """All figures, at each leaf a list over the seeds."""
    figures = report.over_seeds([measure(seed, settings) for seed in settings.seeds])
    return {"settings": dataclasses.asdict(settings), **figures}


def percent(shares: list[float]) -> str:
    """A share over the seeds, in percent."""
    return report.cell([100 * x for x in shares], 1)


def tables(results: dict[str, Any]) -> dict[str, str]:
    """Everything that was measured, as tables in Markdown by their titles."""
    beside, settings = results["beside"], results["settings"]
    lengths = [f"{x}" for x in settings["lengths"]]
    places = ("training", "held out")
    found: dict[str, str] = {}
    for kind, shares in results["left"].items():
        rows = [
            [f"{label}, {where}"] + [percent(shares[length][point][where]) for length in lengths]
            for point, label in POINTS.items()
            for where in places
        ]
        found[TITLES[kind]] = report.table(["left, %", *lengths], rows)
    found["against least squares"] = report.table(
        ["relative difference, 1e-6", *lengths],
        [
            [what] + [report.cell(results["exact"][length][what]) for length in lengths]
            for what in ("loss", "word")
        ],
    )
    count = numbers(settings["length"], settings["width"])
    rows = [
        [label, f"{count[way]}"]
        + [percent(beside[point]["ways"][way]["held out"]) for point in POINTS]
        + [report.cell(beside[point]["ways"][way]["known"], 1) for point in ("digits", "styles")]
        for way, label in WAYS.items()
    ]
    known = [f"known digits, {POINTS[x]}" for x in ("digits", "styles")]
    found["other ways to the same point"] = report.table(
        ["moved by", "numbers", *POINTS.values(), *known], rows
    )
    found["from several starts"] = report.table(
        ["left, %", "from the blank word", "best of four", "worst of four"],
        [
            [label, percent(results["left"]["deep"][f"{settings['length']}"][point]["training"])]
            + [percent(beside[point]["starts"][x]) for x in ("lowest", "highest")]
            for point, label in POINTS.items()
        ],
    )
    likeness = beside["digits"]["likeness"]
    found["likeness of drawings"] = report.table(
        ["drawn by", *LIKENESS.values()],
        [["error"] + [report.cell(likeness[who], 1) for who in LIKENESS]],
    )
    same, whole = (f"{sum(results['rows'][x]):.0f}" for x in ("kept", "to keep"))
    found["rows of the table that are kept"] = report.table(
        ["rows to keep", "the same bit for bit"], [[whole, same]]
    )
    return found


def gallery(results: dict[str, Any]) -> plt.Figure:
    """What all concerned draw of an upper half, for each point and, one a column, each seed."""
    figure, panels = plt.subplots(1, 3, figsize=(9.6, 4.3), layout="constrained")
    for axes, (point, label) in zip(panels, POINTS.items(), strict=True):
        rows = [np.asarray(results["drawn"][point][who]) for who in DRAWN]
        tiles = np.full((10 * len(rows), 10 * len(rows[0])), 0.0)
        for i, row in enumerate(rows):
            for j, image in enumerate(row):
                height = len(image) // 8
                at = 10 * i + 1, 10 * j + 1
                tiles[at[0] : at[0] + height, at[1] : at[1] + 8] = image.reshape(height, 8)
        axes.imshow(tiles, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(label, fontsize=11)
        axes.set_xticks([])
        axes.set_yticks([10 * i + 4.5 for i in range(len(rows))], DRAWN.values())
        axes.tick_params(length=0, labelleft=axes is panels[0])
        axes.spines[:].set_visible(False)
    return figure


def by_length(results: dict[str, Any]) -> plt.Figure:
    """What a name leaves, against the length of the word."""
    figure, panels = plt.subplots(1, 2, figsize=(8.4, 3.6), sharey=True, layout="constrained")
    colors = dict(zip(POINTS, (report.THIRD, report.MOVED, report.AVOIDED), strict=True))
    for axes, (kind, found) in zip(panels, results["left"].items(), strict=True):
        lengths = [int(x) for x in found]
        for point, color in colors.items():
            for where, style in (("training", "-"), ("held out", ":")):
                columns = [np.multiply(100, found[f"{x}"][point][where]) for x in lengths]
                label = POINTS[point] if where == "training" else None
                report.band(axes, lengths, np.transpose(columns), color, ls=style, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{x}" for x in lengths])
        axes.set_xlabel("length of the word")
        axes.set_title(KINDS[kind], fontsize=11)
        axes.set_ylim(-3, 103)
    panels[1].text(0.03, 0.1, "dotted: held out", transform=panels[1].transAxes)
    panels[0].set_ylabel("left of the difference, %")
    panels[0].legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 0.04))
    return figure


PICTURES = {"naming": gallery, "naming-length": by_length}
