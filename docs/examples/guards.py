"""The guards that are compared: A and C moved so that their mean no longer reads what it read."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from docs.examples import study
from wspace import average, cone, fit, negative, perturb, tree
from wspace.typing import Scalar, Weights

EQUAL = (0.5, 0.5)
SHIFT = 0.35  # how far a closed form moves the mean, in norms of the mean
UNUSED = 1e-2  # inputs below this share of the largest singular value are free
RANK, BUDGET = 4, 0.01  # edits that the robust guard is trained against, in norms of the mean
NAMES = (
    "none",
    "random",
    "plain",
    "flattened",
    "flattened, not the last layer",
    "one source permuted",
    "hull",
    "trained",
    "trained, low-rank SAM",
)


class Guarded(NamedTuple):
    """Two sources, their mean B', and what guards make of them by name."""

    pair: study.Pair
    middle: Weights
    guards: dict[str, list[Weights]]


def free(weights: Weights, inputs: Array) -> Weights:
    """Where a network may move: on the inputs that given data almost never use."""
    allowed: Weights = {f"{i}.bias": 0.0 for i in study.layers(weights)}
    entering = study.activations(weights, inputs)
    for i, x in zip(study.layers(weights), entering, strict=False):
        allowed[f"{i}.weight"] = negative.free_inputs(x, rtol=UNUSED)
    return allowed


def uphill(weights: Weights, data: study.Data) -> Weights:
    """The gradient of the loss on all classes."""
    return jax.grad(study.loss)(weights, data)


def flattened(
    before: Sequence[Weights], after: Sequence[Weights], keep: Callable[[str], bool]
) -> list[Weights]:
    """The same guard with flat edits, in some leaves, that move the mean as far together."""
    edits = [tree.combine((1, -1), (y, x)) for x, y in zip(before, after, strict=True)]
    flat = [negative.harden(edit, rtol=1e-3) for edit in edits]
    flat = [{name: x if keep(name) else 0 * x for name, x in edit.items()} for edit in flat]
    scale = tree.norm(average.mean(edits)) / tree.norm(average.mean(flat))
    return [tree.combine((1, scale), (x, edit)) for x, edit in zip(before, flat, strict=True)]


def shift_of(before: Sequence[Weights], after: Sequence[Weights]) -> Weights:
    """How a guard moves the mean: a normal that lies where the sources may move."""
    return tree.combine((1, -1), (average.mean(after), average.mean(before)))


def permuted(key: Array, weights: Weights) -> Weights:
    """The same network with its hidden units in another order."""
    result = dict(weights)
    for i in study.layers(weights)[:-1]:
        order = jax.random.permutation(jax.random.fold_in(key, i), weights[f"{i}.bias"].size)
        result[f"{i}.weight"] = result[f"{i}.weight"][:, order]
        result[f"{i}.bias"] = result[f"{i}.bias"][order]
        result[f"{i + 1}.weight"] = result[f"{i + 1}.weight"][order]
    return result


@functools.partial(jax.jit, static_argnames=("steps", "rank"))
def trained(key: Array, pair: study.Pair, *, steps: int, rank: int | None = None) -> list[Weights]:
    """Sources trained to keep their own losses while their mean loses all classes.

    Given a rank, the mean is to lose them under the worst edit of that rank, too.
    """
    data = pair.task.training

    def on(shown: Array) -> fit.KeyedLoss:
        places, count = jnp.argsort(~shown, stable=True), shown.sum()

        def loss(weights: Weights, key: Array) -> Scalar:
            return study.losses(weights, study.batch(key, data, places, count, 100)).mean()

        return loss

    everything = on(jnp.ones(data.labels.shape, bool))
    middle = average.mean(pair.sources)
    found = fit.guard(
        key,
        [on(half) for half in pair.halves],
        pair.sources,
        EQUAL,
        fit.clipped(everything, np.log(study.CLASSES), keyed=True),
        keyed=True,
        optimizer=optax.adam(1e-3),
        steps=steps,
        cone=None if rank is None else cone.Rank(rank),
        budget=None if rank is None else BUDGET * tree.norm(middle),
    )
    return found.weights


def closed(key: Array, pair: study.Pair) -> dict[str, list[Weights]]:
    """The guards that are formulas; along a direction they move the mean equally far."""
    task, sources = pair.task, pair.sources
    middle = average.mean(sources)
    radius = SHIFT * tree.norm(middle)
    allow = [
        free(x, task.training.inputs[np.asarray(half)])
        for x, half in zip(sources, pair.halves, strict=True)
    ]

    def along(direction: Weights) -> list[Weights]:
        return negative.exit_ball(sources, EQUAL, middle, radius, direction=direction, allow=allow)

    rising = uphill(middle, task.training)
    noise, order = jax.random.split(key)
    plain = along(rising)
    last = f"{study.layers(middle)[-1]}.weight"
    return {
        "none": sources,
        "random": along(perturb.gaussian(noise, middle)),
        "plain": plain,
        "flattened": flattened(sources, plain, lambda _: True),
        "flattened, not the last layer": flattened(sources, plain, lambda name: name != last),
        "one source permuted": [sources[0], permuted(order, sources[1])],
        "hull": negative.guard_hull(
            sources, middle, radius, normal=shift_of(sources, plain), allow=allow
        ),
    }


@dataclasses.dataclass(frozen=True)
class Training:
    """Steps of training of the sources and of the trained guards, and the width if not usual."""

    steps: int = 600
    guard: int = 300
    width: int | None = None


@functools.cache
def guarded(name: str, seed: int, training: Training) -> Guarded:
    """All guards of one pair of sources."""
    pair = study.pair(name, seed, training.steps, training.width)
    first, second, third = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), 3)
    guards = closed(first, pair)
    guards["trained"] = trained(second, pair, steps=training.guard)
    robust = trained(third, pair, steps=training.guard, rank=RANK)
    guards["trained, low-rank SAM"] = robust
    return Guarded(pair, average.mean(pair.sources), {x: guards[x] for x in NAMES})
