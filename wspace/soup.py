r"""Averages chosen by a score: which members, and with which coefficients.

A score is any function of weights that returns one number, the higher the better, such as the
accuracy on held-out examples; [`grid`][wspace.soup.grid] can also compile it. What is chosen on
some examples is to be judged on others.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Real

from wspace import _checks, average
from wspace._compiled import compiled
from wspace._records import record
from wspace._words import described, shortened
from wspace.typing import Weights, WeightsLike

__all__ = ["Grid", "Soup", "greedy_soup", "grid", "simplex"]


@record
class Soup(NamedTuple):
    """The mean of members chosen one by one.

    Attributes:
        weights: The mean of the members.
        members: Their positions among the points, in the order in which they were added.
        scores: The score of the mean after each was added, which rises; the last is the score of
            `weights`.
        alone: The score of each point by itself, in the order of the points.
    """

    weights: PyTree
    members: tuple[int, ...]
    scores: Float[np.ndarray, " m"]
    alone: Float[np.ndarray, " n"]


@record
class Grid(NamedTuple):
    """The best of several coefficients, and all of them.

    Attributes:
        weights: The weights of the best.
        best: Which it is: the first of the highest score.
        coefficients: The coefficients tried, one row a trial.
        scores: Their scores.
    """

    weights: PyTree
    best: int
    coefficients: Float[np.ndarray, "n ..."]
    scores: Float[np.ndarray, " n"]


def greedy_soup(score: Callable[[Weights], Any], points: Sequence[WeightsLike]) -> Soup:
    r"""The mean of those points that raise its score, tried from the best one on.

    Known as a greedy soup of models.

    $$
    S \leftarrow S \cup \{i\} \quad \text{if} \quad
    f\Bigl(\frac{1}{|S| + 1} \sum_{j \in S \cup \{i\}} \theta_j\Bigr)
    > f\Bigl(\frac{1}{|S|} \sum_{j \in S} \theta_j\Bigr)
    $$

    for $i$ in the order of falling score, the first of equal points first, from the best point
    alone. The result scores at least as well as every point, which the mean of all points need not.
    Takes $2n - 1$ evaluations for $n$ points, and beside them holds two more in memory, in float32
    at least.

    Args:
        score: The $f$, a function of weights that returns one number, higher for better weights.
            It is not traced.
        points: The $\theta_i$, trees of one layout, at least one.

    Returns:
        A [`Soup`][wspace.soup.Soup] with the `weights`, each leaf in the dtype of that leaf of the
            first point, the `members` and the scores.

    Raises:
        ValueError: If a score is NaN, or the points differ in structure or in a leaf's shape.
        TypeError: If a score is not one number or is traced, or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import soup
        >>> def score(w):
        ...     return -abs(float(w) - 3.0)
        >>> found = soup.greedy_soup(score, [jnp.array(1.0), jnp.array(9.0), jnp.array(4.0)])
        >>> found.members, found.scores, found.weights
        ((2, 0), array([-1. , -0.5]), Array(2.5, dtype=float32))

    References:
        M. Wortsman et al., *Model soups: averaging weights of multiple fine-tuned models
        improves accuracy without increasing inference time*, ICML 2022, recipe 1,
        [arXiv:2203.05482](https://arxiv.org/abs/2203.05482).
    """
    _checks.function("score", score, "a function of weights")
    points = _checks.listed("points", points)
    _checks.same_layout(**_checks.each("points", points))
    running = average.running_mean()
    empty = running.init(points[0])
    singles = (running.value(running.update(empty, x)) for x in points)
    alone = np.array([_scored(score, x, f"points[{i}]") for i, x in enumerate(singles)])
    first, *rest = (int(i) for i in np.argsort(-alone, kind="stable"))
    state = running.update(empty, points[first])
    weights, members, scores = running.value(state), [first], [float(alone[first])]
    for i in rest:
        grown = running.update(state, points[i])
        candidate = running.value(grown)
        value = _scored(score, candidate, f"the mean of points {[*members, i]}")
        if value > scores[-1]:
            state, weights = grown, candidate
            members.append(i)
            scores.append(value)
    return Soup(weights, tuple(members), np.array(scores), alone)


def grid(
    score: Callable[[Weights], Any],
    merge: Callable[[Any], Weights],
    coefficients: Sequence[Any] | Real[Array | np.ndarray, "n ..."],
    *,
    batch_size: int | None = None,
) -> Grid:
    r"""The best of several coefficients of a merge.

    $$
    c^* = \arg\max_{c \in C} f(\theta(c))
    $$

    Args:
        score: The $f$, a function of weights that returns one number, higher for better weights.
        merge: The $\theta$, a function from coefficients to weights, such as
            `functools.partial(average.mean, points)`.
        coefficients: The $c$ to try, one a row: [`simplex`][wspace.soup.simplex] for averages,
            `list(itertools.product(...))` for every combination of some numbers; or a sequence of
            numbers for a merge with one, such as a position on a path.
        batch_size: How many trials to run at once, compiled, merge and score together; both must
            then be traceable, and coefficients are JAX arrays. They are compiled once for the same
            two functions: what these close over counts as it was then. `None` to run them one by
            one, as they are, on coefficients in NumPy.

    Returns:
        A [`Grid`][wspace.soup.Grid] with the `weights` of the best and all `scores`.

    Raises:
        ValueError: If a score is NaN, there is no trial, or `batch_size` is below 1.
        TypeError: If a score is not one number or is traced.

    Examples:
        >>> import functools
        >>> import jax.numpy as jnp
        >>> from wspace import average, soup
        >>> points = [jnp.array([0.0, 0.0]), jnp.array([4.0, 0.0]), jnp.array([0.0, 4.0])]
        >>> def score(w):
        ...     return -jnp.sum((w - 1) ** 2)
        >>> merge = functools.partial(average.mean, points)
        >>> found = soup.grid(score, merge, soup.simplex(3, 4), batch_size=8)
        >>> found.coefficients[found.best], found.weights
        (array([0.5 , 0.25, 0.25]), Array([1., 1.], dtype=float32))
    """
    _checks.function("score", score, "a function of weights")
    _checks.function("merge", merge, "a function of coefficients")
    try:
        rows = np.asarray(coefficients, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(
            "coefficients must be a sequence of numbers, or of rows of equally many, got "
            f"{described(coefficients)}"
        ) from error
    if rows.ndim == 0 or len(rows) == 0:
        raise ValueError("coefficients is empty: give at least one row to try")
    if batch_size is None:
        scores = np.array([_scored(score, merge(row), _row(i, row)) for i, row in enumerate(rows)])
    else:
        if _checks.rank(batch_size, "batch_size") < 1:
            raise ValueError("batch_size must be at least 1")
        tried = compiled(_scores, (score, merge), (batch_size,), jnp.asarray(rows, float))
        scores = np.array([_comparable(x, _row(i, rows[i])) for i, x in enumerate(tried)])
    best = int(np.argmax(scores))
    return Grid(merge(rows[best]), best, rows, scores)


def _scores(
    functions: Sequence[Callable[[Any], Any]], settings: tuple[int], rows: Real[Array, "n ..."]
) -> Float[Array, " n"]:
    """The scores of all rows, some at once."""
    (score, merge), (batch_size,) = functions, settings
    return jax.lax.map(lambda row: _one_number(score(merge(row))), rows, batch_size=batch_size)


def simplex(count: int, steps: int) -> Float[np.ndarray, "n k"]:
    r"""All coefficients that are multiples of a step, not negative, and sum to one.

    $$
    \Bigl\{ c \in \tfrac1s \mathbb{Z}^k_{\ge 0} : \sum_i c_i = 1 \Bigr\}
    $$

    Args:
        count: The number $k$ of coefficients, at least 1.
        steps: The number $s$ of steps from $0$ to $1$, at least 1.

    Returns:
        The $\binom{s + k - 1}{k - 1}$ rows, in ascending order.

    Raises:
        ValueError: If `count` or `steps` is below 1.
        TypeError: If `count` or `steps` is not an integer.

    Examples:
        >>> from wspace import soup
        >>> soup.simplex(2, 2)
        array([[0. , 1. ],
               [0.5, 0.5],
               [1. , 0. ]])
    """
    count, steps = _checks.rank(count, "count"), _checks.rank(steps, "steps")
    if count < 1 or steps < 1:
        raise ValueError(f"count and steps must be at least 1, got {count} and {steps}")
    # Bars between stars: the parts of a row of `steps` stars that `count - 1` bars divide.
    bars = itertools.combinations(range(steps + count - 1), count - 1)
    edges = np.array([(-1, *places, steps + count - 1) for places in bars])
    return (np.diff(edges) - 1) / steps


def _row(i: int, row: Any) -> str:
    return f"coefficients[{i}] = {shortened(str(row.tolist()))}"


def _one_number(value: Any) -> Any:
    if np.shape(value) != ():
        got = f"got shape {np.shape(value)}"
        raise TypeError(f"score must return one number, {got}: take the mean over the data")
    return value


def _scored(score: Callable[[Weights], Any], weights: Weights, what: str) -> float:
    """The score of weights, which errors call `what`."""
    return _comparable(_one_number(score(weights)), what)


def _comparable(value: Any, what: str) -> float:
    """A score as a Python number that can be compared."""
    if _checks.is_traced(value):
        raise TypeError("a choice by score needs its value: call it outside of transformations")
    number = float(value)
    if math.isnan(number):
        raise ValueError(f"the score of {what} is NaN, which no score is above or below: mend it")
    return number
