"""What the experiments share: two small natural data sets, networks, and their training."""

import functools
import importlib
import inspect
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int
from sklearn.datasets import load_digits

from wspace import fit
from wspace.typing import Scalar, Weights

CLASSES = 10
MODULES = (
    "_pydecimal",
    "argparse",
    "difflib",
    "doctest",
    "inspect",
    "pickletools",
    "tarfile",
    "turtle",
    "typing",
    "unittest.mock",
)
LETTERS, PAIRS, PASSAGES = 300, 200, 180


class Data(NamedTuple):
    """Inputs, one a row, and the class of each."""

    inputs: Float[Array, "n d"]
    labels: Int[Array, " n"]

    def of(self, classes: Sequence[int]) -> Bool[Array, " n"]:
        """Where the class is one of some."""
        return jnp.isin(self.labels, jnp.asarray(classes, self.labels.dtype))


class Task(NamedTuple):
    """Data to learn from, data held out, and the widths of the networks that learn them."""

    training: Data
    held_out: Data
    sizes: tuple[int, ...]


@functools.cache
def passages() -> tuple[np.ndarray, np.ndarray]:
    """Passages of ten modules of Python's library: roots of the counts of their letter pairs."""
    counts, labels = [], []
    for label, module in enumerate(MODULES):
        source = inspect.getsource(importlib.import_module(module)).lower()
        text = re.sub(r"[^a-z]+", " ", source)
        letters = np.frombuffer(text.encode(), np.uint8).astype(int) - ord("a") + 1
        codes = np.where(letters < 0, 0, letters)
        whole = len(codes) // LETTERS
        for i in np.linspace(0, whole - 1, PASSAGES).astype(int):
            seen = codes[i * LETTERS : (i + 1) * LETTERS]
            counts.append(np.bincount(27 * seen[:-1] + seen[1:], minlength=27 * 27))
            labels.append(label)
    table = np.array(counts)
    common = np.sort(np.argsort(-table.sum(axis=0), kind="stable")[:PAIRS])
    return np.sqrt(table[:, common]) / 4, np.array(labels)


def digits(key: Array, width: int = 256) -> Task:
    """Handwritten digits, 8x8 gray values in [0, 1], split at random: 1400 to train, 397 not."""
    data = load_digits()
    return _split(key, data.data / 16, data.target, 1400, (64, width, width, CLASSES))


def text(key: Array, width: int = 128) -> Task:
    """Which module a passage of 300 letters is from: 1400 to train, 400 not."""
    return _split(key, *passages(), 1400, (PAIRS, width, width, CLASSES))


TASKS = {"digits": digits, "text": text}


def _split(
    key: Array, inputs: np.ndarray, labels: np.ndarray, count: int, sizes: tuple[int, ...]
) -> Task:
    order = np.asarray(jax.random.permutation(key, len(labels)))
    parts = [
        Data(jnp.asarray(inputs[part], jnp.float32), jnp.asarray(labels[part], jnp.int32))
        for part in (order[:count], order[count:])
    ]
    return Task(*parts, sizes)


def layers(weights: Weights) -> range:
    """The numbers of the layers, from 1."""
    return range(1, len(weights) // 2 + 1)


@functools.partial(jax.jit, static_argnums=1)
def initial(key: Array, sizes: tuple[int, ...]) -> Weights:
    """A random initialization: variance 2 / inputs, biases zero."""
    weights = {}
    for i, (rows, columns) in enumerate(itertools.pairwise(sizes), 1):
        noise = jax.random.normal(jax.random.fold_in(key, i), (rows, columns), jnp.float32)
        weights[f"{i}.weight"] = noise * (2 / rows) ** 0.5
        weights[f"{i}.bias"] = jnp.zeros(columns, jnp.float32)
    return weights


def activations(weights: Weights, inputs: Float[Array, "n d"]) -> list[Float[Array, "n _"]]:
    """The inputs of every layer, and last the outputs of the network."""
    entering = [inputs]
    for i in layers(weights):
        x = entering[-1] @ weights[f"{i}.weight"] + weights[f"{i}.bias"][None]
        entering.append(x if i == layers(weights)[-1] else jax.nn.relu(x))
    return entering


def outputs(weights: Weights, inputs: Float[Array, "n d"]) -> Float[Array, "n _"]:
    """The logits."""
    return activations(weights, inputs)[-1]


def losses(weights: Weights, data: Data) -> Float[Array, " n"]:
    """The cross-entropy of every example."""
    return optax.softmax_cross_entropy_with_integer_labels(
        outputs(weights, data.inputs), data.labels
    )


@jax.jit
def loss(weights: Weights, data: Data) -> Scalar:
    """Mean cross-entropy."""
    return losses(weights, data).mean()


@jax.jit
def confidence(weights: Weights, data: Data) -> Scalar:
    """The mean probability that is given to the right class."""
    return jnp.exp(-losses(weights, data)).mean()


@jax.jit
def accuracy(weights: Weights, data: Data) -> Scalar:
    """The share of the examples whose class is read correctly."""
    return jnp.mean(jnp.argmax(outputs(weights, data.inputs), axis=-1) == data.labels)


@jax.jit
def ensemble_accuracy(models: Sequence[Weights], data: Data) -> Scalar:
    """The same for the averaged probabilities of several networks."""
    shares = [jax.nn.softmax(outputs(x, data.inputs)) for x in models]
    return jnp.mean(jnp.argmax(sum(shares[1:], shares[0]), axis=-1) == data.labels)


def batch(key: Array, data: Data, places: Int[Array, " n"], count: Array, size: int) -> Data:
    """Some of the first `count` of the examples at given places, drawn with replacement."""
    chosen = places[jax.random.randint(key, (size,), 0, count)]
    return Data(data.inputs[chosen], data.labels[chosen])


@functools.partial(jax.jit, static_argnames=("steps", "rate", "rank", "size"))
def train(
    key: Array,
    start: Weights,
    data: Data,
    shown: Bool[Array, " n"],
    *,
    steps: int = 600,
    rate: float = 1e-3,
    rank: int | None = None,
    size: int = 100,
) -> Weights:
    """Trains a network on the examples that are shown to it, whole or through a low-rank term."""
    places, count = jnp.argsort(~shown, stable=True), shown.sum()

    def on_batch(weights: Weights, key: Array) -> Scalar:
        return losses(weights, batch(key, data, places, count, size)).mean()

    optimizer = optax.adam(rate)
    return fit.adapt(
        key, on_batch, start, keyed=True, rank=rank, optimizer=optimizer, steps=steps
    ).weights


class Pair(NamedTuple):
    """A task, the base that A and C were trained from, and A and C."""

    task: Task
    base: Weights
    sources: list[Weights]
    halves: list[Bool[Array, " n"]]


def pair(name: str, seed: int, steps: int, width: int | None = None) -> Pair:
    """Two networks trained from one initialization, each on one half of the classes."""
    split, first, *keys = jax.random.split(jax.random.key(seed), 4)
    task = TASKS[name](split) if width is None else TASKS[name](split, width)
    base = initial(first, task.sizes)
    halves = [task.training.of(range(5)), task.training.of(range(5, 10))]
    sources = [
        train(key, base, task.training, half, steps=steps)
        for key, half in zip(keys, halves, strict=True)
    ]
    return Pair(task, base, sources, halves)
