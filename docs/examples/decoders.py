"""Small decoders of digits that are given a word, and points found by averaging two of them."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from docs.examples import study
from wspace import average, fit
from wspace.typing import Scalar, Weights

KNOWN = range(8)  # the digits that the base learns, one word each
BLANK = 8  # the row of the word that it does not learn
GIVEN = 32  # the pixels of the upper half
PAIR = (3, 6)  # the two words whose average is a name by construction


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much of everything: the lengths of words, and the one at which all else is measured."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    lengths: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    length: int = 16
    width: int = 128
    learn: int = 1500
    tune: int = 500
    search: int = 1200
    asked: int = 256
    starts: int = 4


class Drawings(NamedTuple):
    """What to draw: for each image its word and its upper half."""

    words: Int[Array, " n"]
    halves: Float[Array, "n 32"]
    images: Float[Array, "n 64"]

    def at(self, places: Int[Array, " k"]) -> "Drawings":
        """Some of them."""
        return Drawings(*(x[places] for x in self))

    def under(self, word: int) -> "Drawings":
        """The same, all under one word."""
        return self._replace(words=jnp.full_like(self.words, word))


class Point(NamedTuple):
    """Two models, their average, and the digits at which they were trained."""

    sources: list[Weights]
    average: Weights
    digits: range


def draw(weights: Weights, asked: Drawings) -> Float[Array, "n 64"]:
    """The images that a decoder draws, given words and upper halves."""
    words, network = weights["words"][asked.words], weights["network"]
    if "gate" not in weights:
        return study.outputs(network, jnp.concatenate([words, asked.halves], axis=1))
    hidden = jax.nn.relu(asked.halves @ network["1.weight"] + network["1.bias"][None])
    opened = hidden * (1 + words @ weights["gate"])
    return opened @ network["2.weight"] + network["2.bias"][None]


drawn = jax.jit(draw)


def error(weights: Weights, asked: Drawings, targets: Float[Array, "n 64"]) -> Scalar:
    """Mean squared difference, over images and pixels."""
    return jnp.mean((draw(weights, asked) - targets) ** 2)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def initial(key: Array, kind: str, length: int, width: int) -> Weights:
    """A decoder before training, of one of two kinds."""
    words, network, gate = jax.random.split(key, 3)
    weights = {"words": jax.random.normal(words, (BLANK + 1, length), jnp.float32)}
    if kind == "deep":
        sizes = (length + GIVEN, width, width, 64)
        return weights | {"network": study.initial(network, sizes)}
    weights["gate"] = jax.random.normal(gate, (length, width), jnp.float32) * length**-0.5
    return weights | {"network": study.initial(network, (GIVEN, width, 64))}


@functools.partial(jax.jit, static_argnames=("steps", "rate", "size"))
def train(
    key: Array,
    start: Weights,
    data: Drawings,
    shown: Bool[Array, " n"],
    *,
    steps: int,
    rate: float = 1e-3,
    size: int = 100,
) -> Weights:
    """Trains all weights of a decoder on the images that are shown to it."""
    places, count = jnp.argsort(~shown, stable=True), shown.sum()

    def on_batch(weights: Weights, key: Array) -> Scalar:
        batch = data.at(places[jax.random.randint(key, (size,), 0, count)])
        return error(weights, batch, batch.images)

    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    return fit.adapt(key, on_batch, start, keyed=True, optimizer=optimizer, steps=steps).weights


def bold(images: Float[Array, "n 64"]) -> Float[Array, "n 64"]:
    """Every pixel as dark as the darkest of it and its four neighbors."""
    middle = (slice(None), slice(1, -1), slice(1, -1))
    padded = jnp.pad(images.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    moved = [jnp.roll(padded, by, axis)[middle] for by in (-1, 1) for axis in (1, 2)]
    return functools.reduce(jnp.maximum, moved, padded[middle]).reshape(-1, 64)


def shifted(images: Float[Array, "n 64"]) -> Float[Array, "n 64"]:
    """All one pixel to the right."""
    padded = jnp.pad(images.reshape(-1, 8, 8), ((0, 0), (0, 0), (1, 0)))
    return padded[:, :, :-1].reshape(-1, 64)


def drawings(data: study.Data) -> Drawings:
    """Images under the words of their digits."""
    return Drawings(jnp.minimum(data.labels, BLANK), data.inputs[:, :GIVEN], data.inputs)


def learned(key: Array, task: study.Task, kind: str, length: int, settings: Settings) -> Weights:
    """The base: it knows eight words, and its blank word is their mean."""
    first, later = jax.random.split(key)
    start = initial(first, kind, length, settings.width)
    data, shown = drawings(task.training), task.training.of(KNOWN)
    base = train(later, start, data, shown, steps=settings.learn)
    words = base["words"]
    return base | {"words": words.at[BLANK].set(words[:BLANK].mean(axis=0))}


def points(key: Array, task: study.Task, base: Weights, settings: Settings) -> dict[str, Point]:
    """Three pairs of models, each from the base, and their averages."""
    data = drawings(task.training).under(BLANK)

    def word(row: int) -> Weights:
        return base | {"words": base["words"].at[BLANK].set(base["words"][row])}

    def tuned(i: int, images: Array, digits: range) -> Weights:
        pictures, shown = data._replace(images=images), task.training.of(digits)
        return train(jax.random.fold_in(key, i), base, pictures, shown, steps=settings.tune)

    pairs = {
        "words": ([word(row) for row in PAIR], KNOWN),
        "digits": ([tuned(i, data.images, range(i, i + 1)) for i in (8, 9)], range(8, 10)),
        "styles": (
            [tuned(i, style(data.images), KNOWN) for i, style in enumerate((bold, shifted))],
            KNOWN,
        ),
    }
    return {
        name: Point(sources, average.mean(sources), digits)
        for name, (sources, digits) in pairs.items()
    }
