"""The data, the network and the training of the demo: handwritten digits and three layers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int
from sklearn.datasets import load_digits

from wspace.typing import Scalar, Weights

SIZES = (64, 256, 256, 10)
LAYERS = tuple(range(1, len(SIZES)))
TRAINING = 1400
STEPS, BATCH, RATE = 600, 100, 1e-3


class Digits(NamedTuple):
    """Images as rows of 64 gray values in [0, 1], and the digit that each shows."""

    images: Float[Array, "n 64"]
    labels: Int[Array, " n"]

    @property
    def low(self) -> Bool[Array, " n"]:
        """Where the digit is one of 0-4."""
        return self.labels < 5


def load(key: Array) -> tuple[Digits, Digits]:
    """All digits, split at random into training and held-out ones."""
    data = load_digits()
    images = jnp.asarray(data.data / 16, jnp.float32)
    labels = jnp.asarray(data.target, jnp.int32)
    order = jax.random.permutation(key, labels.size)
    parts = order[:TRAINING], order[TRAINING:]
    training, held_out = (Digits(images[part], labels[part]) for part in parts)
    return training, held_out


@jax.jit
def initial(key: Array) -> Weights:
    """A random initialization: variance 2 / inputs, biases zero."""
    weights = {}
    for i, rows, columns in zip(LAYERS, SIZES[:-1], SIZES[1:], strict=True):
        noise = jax.random.normal(jax.random.fold_in(key, i), (rows, columns), jnp.float32)
        weights[f"{i}.weight"] = noise * (2 / rows) ** 0.5
        weights[f"{i}.bias"] = jnp.zeros(columns, jnp.float32)
    return weights


def activations(weights: Weights, images: Float[Array, "n 64"]) -> list[Float[Array, "n _"]]:
    """The inputs of every layer, and last the outputs of the network."""
    entering = [images]
    for i in LAYERS:
        x = entering[-1] @ weights[f"{i}.weight"] + weights[f"{i}.bias"][None]
        entering.append(x if i == LAYERS[-1] else jax.nn.relu(x))
    return entering


@jax.jit
def loss(weights: Weights, digits: Digits) -> Scalar:
    """Mean cross-entropy."""
    outputs = activations(weights, digits.images)[-1]
    return optax.softmax_cross_entropy_with_integer_labels(outputs, digits.labels).mean()


@jax.jit
def train(key: Array, start: Weights, digits: Digits, shown: Bool[Array, " n"]) -> Weights:
    """Trains a network from `start` on the digits that are shown to it."""
    places = jnp.argsort(~shown, stable=True)
    batches = places[jax.random.randint(key, (STEPS, BATCH), 0, shown.sum())]
    optimizer = optax.adam(RATE)

    def step(state, batch):
        weights, memory = state
        seen = Digits(digits.images[batch], digits.labels[batch])
        update, memory = optimizer.update(jax.grad(loss)(weights, seen), memory, weights)
        return (optax.apply_updates(weights, update), memory), None

    (weights, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), batches)
    return weights


def _score(scores: Float[Array, "n 10"], digits: Digits) -> Float[Array, "3"]:
    right = jnp.argmax(scores, axis=-1) == digits.labels
    return jnp.stack([right.mean(where=digits.low), right.mean(where=~digits.low), right.mean()])


@jax.jit
def accuracy(weights: Weights, digits: Digits) -> Float[Array, "3"]:
    """The share read correctly: of the digits 0-4, of 5-9 and of all."""
    return _score(activations(weights, digits.images)[-1], digits)


@jax.jit
def ensemble_accuracy(models: list[Weights], digits: Digits) -> Float[Array, "3"]:
    """The same for the averaged probabilities of several networks."""
    outputs = [jax.nn.softmax(activations(x, digits.images)[-1]) for x in models]
    return _score(sum(outputs[1:], outputs[0]), digits)
