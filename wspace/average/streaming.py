r"""Averages of a stream of weights, one at a time: checkpoints of a run, shards of a soup.

An [`Average`][wspace.average.Average] is three pure functions in the manner of optax. Its state is
a tree of arrays with the `count` of the weights seen, to be carried through `jit` and `scan` and
saved with a checkpoint. It is kept in the dtype of arithmetic on the weights that `init` was given,
sums of it in two parts that together have twice its digits: neither a million weights nor a decay
next to one lose any. Before the first update there is nothing to average, and the value is
refused, or NaN if traced.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from wspace import _checks, _lift, tree
from wspace._numerics import accumulator, in_jax
from wspace._records import record
from wspace.typing import Scalar, ScalarLike, WeightsLike

__all__ = ["Average", "ema", "power_ema", "running_mean", "window"]


@record
class Average(NamedTuple):
    """How to average a stream of weights.

    Attributes:
        init: From weights, whose values do not count unless the average says so, to the state
            before the first update.
        update: From a state and the next weights to the next state.
        value: From a state to the average, each leaf in the dtype of that leaf of the weights
            that `init` was given. Of a state that has seen no weights it is refused, and NaN if
            the state is traced.
    """

    init: Callable[..., Any]
    update: Callable[..., Any]
    value: Callable[..., Any]


@record
class _Sums(NamedTuple):
    """Sums `high + low` of the weights and of the number 1, a pair, with the same coefficients.

    `like` are empty arrays in the dtypes to which the value is rounded.
    """

    count: Array
    high: PyTree
    low: PyTree
    like: PyTree


@record
class _SignedSums(NamedTuple):
    """Sums whose coefficients may cancel, and the sum of their sizes."""

    sums: _Sums
    size: Scalar


@record
class _Ring(NamedTuple):
    """The last weights that were kept, stacked, the i-th at place `i` modulo the length."""

    count: Array
    last: PyTree


def _nothing(x: WeightsLike) -> _Sums:
    """The sums before the first update."""
    zero = jax.tree.map(jnp.zeros_like, tree.upcast(x))
    mass = jnp.zeros((), accumulator(*(leaf.dtype for leaf in jax.tree.leaves(x))))
    like = jax.tree.map(lambda leaf: jnp.zeros(0, in_jax(leaf.dtype)), x)
    return _Sums(jnp.zeros((), jnp.int32), (zero, mass), (zero, mass), like)


def _two_sum(x: Array, y: Array) -> tuple[Array, Array]:
    """The sum, and its rounding error: D. Knuth, The Art of Computer Programming 2, 4.2.2."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


@_lift.elementwise
def _with_term(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    (coefficient,), (high, low, x) = scalars, arrays
    return _increased(high, low, coefficient * x)


@_lift.elementwise
def _with_term_or_anew(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    (coefficient, anew), (high, low, x) = scalars, arrays
    high, low = (jnp.where(anew > 0, 0, part) for part in (high, low))
    return _increased(high, low, coefficient * x)


@_lift.elementwise
def _nearer(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    (rate,), (high, low, x) = scalars, arrays
    return _increased(high, low, rate * ((x - high) - low))


def _increased(high: Array, low: Array, increment: Array) -> list[Array]:
    total, error = _two_sum(high, increment)
    return list(_two_sum(total, low + error))


def _updated(
    increased: Callable[..., Any],
    scalars: Sequence[ScalarLike | Bool[Array, ""]],
    sums: _Sums,
    x: WeightsLike,
) -> _Sums:
    """The sums after one more increment."""
    weights, mass = sums.high
    _checks.same_layout(state=weights, weights=x)
    # Else the arithmetic, and what it rounds, would be that of x.
    x = jax.tree.map(lambda x, y: x.astype(y.dtype) if _is_wider(x, y) else x, x, weights)
    high, low = increased(scalars, (sums.high, sums.low, (x, jnp.ones_like(mass))))
    return _Sums(sums.count + 1, high, low, sums.like)


def _is_wider(x: Any, y: Any) -> bool:
    return accumulator(x.dtype, y.dtype) != y.dtype


@functools.partial(_lift.elementwise, rounded=False)
def _over(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (mass,), (high, low) = scalars, arrays
    return (high + low) / mass


def _quotient(sums: _Sums) -> PyTree:
    (high, mass), (low, rest) = sums.high, sums.low
    found = _over((mass + rest,), (high, low))
    return jax.tree.map(lambda x, like: x.astype(like.dtype), found, sums.like)


def running_mean(*, start: int = 0) -> Average:
    r"""Mean of all weights so far, with coefficients of either sign; from a step on (SWA).

    Known as stochastic weight averaging (SWA), and as averaging of checkpoints.

    $$
    \bar\theta_t = \frac{\sum_{s < i \le t} c_i\, \theta_i}{\sum_{s < i \le t} c_i}
        \quad (t > s), \qquad \bar\theta_t = \theta_t \quad (t \le s)
    $$

    What [`mean`][wspace.average.mean] is of a sequence, without holding it: the sums are
    compensated, so that they do not depend on the order but for rounding, however long they are.
    With equal coefficients this is stochastic weight averaging (SWA), from the step where training
    circles its end; statistics of activations that a model keeps, as for batch normalization, are
    to be measured anew.

    Args:
        start: The number $s$ of weights that do not count. Up to then the value is the latest
            weights, whatever their coefficient, so that it is defined throughout a run; from then
            on it is what it would be had the state not seen them, NaN and infinities included.

    Returns:
        An [`Average`][wspace.average.Average] whose `update(state, weights, coefficient=1.0)` adds
            weights, with a negative coefficient also takes them out again, and whose `value`
            raises a `ValueError` if the coefficients sum to less than $10^{-6} \sum_i |c_i|$ in
            size, or that is out of the range of the dtype (NaN if they are traced).

    Raises:
        ValueError: If `start` is below $0$.
        TypeError: If `start` is not an integer.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from wspace import average
        >>> running = average.running_mean()
        >>> state = running.init({"w": jnp.zeros(1)})
        >>> for w in (1.0, 2.0, 6.0):
        ...     state = running.update(state, {"w": jnp.array([w])})
        >>> running.value(state)
        {'w': Array([3.], dtype=float32)}

        Of the weights from the second step on, in a scan:

        >>> swa = average.running_mean(start=1)
        >>> def step(state, weights):
        ...     state = swa.update(state, weights)
        ...     return state, swa.value(state)
        >>> jax.lax.scan(step, swa.init(jnp.zeros(())), jnp.array([1.0, 2.0, 6.0]))[1]
        Array([1., 2., 4.], dtype=float32)

    References:
        P. Izmailov et al., *Averaging Weights Leads to Wider Optima and Better Generalization*,
        UAI 2018, [arXiv:1803.05407](https://arxiv.org/abs/1803.05407).
        A. Neumaier, *Rundungsfehleranalyse einiger Verfahren zur Summation endlicher Summen*,
        ZAMM 54, 1974.
    """
    start = _checks.rank(start, "start")

    def init(weights: WeightsLike) -> _SignedSums:
        sums = _nothing(weights)
        return _SignedSums(sums, jnp.zeros_like(sums.high[1]))

    def update(
        state: _SignedSums, weights: WeightsLike, coefficient: ScalarLike = 1.0
    ) -> _SignedSums:
        c = jnp.asarray(_checks.scalar("coefficient", coefficient)).astype(state.size.dtype)
        if not start:
            sums = _updated(_with_term, (c,), state.sums, weights)
            return _SignedSums(sums, state.size + jnp.abs(c))
        c = jnp.where(state.sums.count < start, 1, c)
        anew = state.sums.count <= start
        sums = _updated(_with_term_or_anew, (c, anew), state.sums, weights)
        return _SignedSums(sums, jnp.where(anew, 0, state.size) + jnp.abs(c))

    def value(state: _SignedSums) -> PyTree:
        sums, size = state
        _refuse_empty(sums.count == 0)
        counted = jnp.where(sums.count > start, sums.count - start, jnp.minimum(sums.count, 1))
        total = sums.high[1] + sums.low[1]
        cancels = _checks.cancels(total, size) & (sums.count > 0)
        high, mass = sums.high
        mass = _checks.poisoned(
            mass,
            ~jnp.isfinite(size),
            lambda: (
                f"the sizes of the coefficients of {counted} weights sum to {size:g}, out of "
                f"the range of {size.dtype}: only their ratios matter, so make all of them smaller"
            ),
        )
        mass = _checks.poisoned(
            mass,
            cancels,
            lambda: (
                f"the coefficients of {counted} weights sum to {total:g}, nothing beside their "
                f"size {size:g}: an average divides by the sum, so make it differ from zero"
            ),
        )
        return _quotient(sums._replace(high=(high, mass)))

    return Average(init, update, value)


def ema(decay: ScalarLike | Callable[[Array], ScalarLike], *, debias: bool = True) -> Average:
    r"""Exponential moving average of the weights.

    Known as EMA and as Polyak averaging; `optax.incremental_update` is a step of it.

    $$
    \theta^{\text{ema}}_t = \frac{e_t}{m_t}, \qquad
    e_t = \beta_t\, e_{t-1} + (1 - \beta_t)\, \theta_t, \quad
    m_t = 1 - \prod_{i \le t} \beta_i, \quad e_0 = 0
    $$

    The coefficients $(1 - \beta_i) \prod_{j > i} \beta_j$ sum to $m_t$, so that weights that stay
    where they are average to themselves from the first update on. Without this correction an
    average from $e_0 = 0$ is short by the factor $m_t$. A decay next to one is subtracted from
    one before it is rounded, and small steps are not lost beside large weights.

    Args:
        decay: The $\beta$ in $[0, 1)$; or a function from the number of updates before this one,
            $0$ at the first, to $\beta_t$, like a schedule of optax.
        debias: Whether to divide by $m_t$. If not, the average starts at the weights that `init`
            was given, $e_0 = \theta_0$, which count with the coefficient $1 - m_t$.

    Returns:
        An [`Average`][wspace.average.Average].

    Raises:
        ValueError: If a number `decay` is known and not in $[0, 1)$; NaN if it is traced.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import average
        >>> moving = average.ema(0.5)
        >>> state = moving.update(moving.init(jnp.zeros(1)), jnp.array([3.0]))
        >>> moving.value(state)
        Array([3.], dtype=float32)
        >>> moving.value(moving.update(state, jnp.array([6.0])))
        Array([5.], dtype=float32)
        >>> warm = average.ema(lambda step: jnp.minimum(0.9999, (1 + step) / (10 + step)))

    References:
        B. Polyak, A. Juditsky, *Acceleration of Stochastic Approximation by Averaging*, SIAM
        Journal on Control and Optimization 30, 1992.
        D. Kingma, J. Ba, *Adam: A Method for Stochastic Optimization*, ICLR 2015, section 3,
        [arXiv:1412.6980](https://arxiv.org/abs/1412.6980).
    """
    if isinstance(decay, Callable):
        return _moving(lambda count: 1 - _checks.scalar("decay", decay(count)), debias)
    words = "in [0, 1), or a function of the step"
    rate = 1 - _checks.scalar("decay", decay, lambda d: (d >= 0) & (d < 1), words)
    return _moving(lambda _: rate, debias)


def power_ema(exponent: ScalarLike) -> Average:
    r"""Power-function moving average, which remembers a fixed share of the run so far.

    Known as post-hoc EMA (EDM2), together with [`reconstruct`][wspace.average.reconstruct].

    $$
    \theta^{(\gamma)}_t = \Bigl(1 - \frac1t\Bigr)^{\gamma + 1} \theta^{(\gamma)}_{t-1}
        + \Bigl(1 - \bigl(1 - \tfrac1t\bigr)^{\gamma + 1}\Bigr)\, \theta_t
        = \sum_{i \le t} \frac{i^{\gamma + 1} - (i - 1)^{\gamma + 1}}{t^{\gamma + 1}}\, \theta_i
    $$

    The coefficients are the integrals of the [`Profile`][wspace.average.Profile]
    $p(\tau) \propto \tau^\gamma$ on $[0, t]$ over the unit intervals before each update, and sum
    to one. Exponent $0$ is the [`running_mean`][wspace.average.running_mean]; the larger it is,
    the shorter the memory: [`exponent_of`][wspace.average.exponent_of] a width. Snapshots of two
    such averages are enough to [`reconstruct`][wspace.average.reconstruct] others later.

    Args:
        exponent: The $\gamma \ge 0$.

    Returns:
        An [`Average`][wspace.average.Average].

    Raises:
        ValueError: If `exponent` is known and not finite or below $0$; NaN if it is traced.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import average
        >>> late = average.power_ema(1.0)
        >>> state = late.init(jnp.zeros(1))
        >>> for w in (1.0, 2.0):
        ...     state = late.update(state, jnp.array([w]))
        >>> late.value(state)
        Array([1.75], dtype=float32)

    References:
        T. Karras et al., *Analyzing and Improving the Training Dynamics of Diffusion Models*, CVPR
        2024, section 3.1, [arXiv:2312.02696](https://arxiv.org/abs/2312.02696).
    """
    exponent = _checks.nonnegative("exponent", exponent)

    def rate(count: Array) -> Scalar:
        t = (count + 1).astype(float)
        return -jnp.expm1((jnp.asarray(exponent).astype(t.dtype) + 1) * jnp.log1p(-1 / t))

    return _moving(rate, debias=True)


def _moving(rate: Callable[[Array], ScalarLike], debias: bool) -> Average:
    """The average that moves toward the next weights by a rate, which is one minus the decay."""
    debias = _checks.flag("debias", debias)

    def init(weights: WeightsLike) -> _Sums:
        sums = _nothing(weights)
        if debias:
            return sums
        return sums._replace(high=(tree.upcast(weights), jnp.ones_like(sums.high[1])))

    def update(state: _Sums, weights: WeightsLike) -> _Sums:
        return _updated(_nearer, (rate(state.count),), state, weights)

    def value(state: _Sums) -> PyTree:
        _refuse_empty((state.high[1] == 0) & (state.low[1] == 0))
        return _quotient(state)

    return Average(init, update, value)


def _refuse_empty(empty: Array) -> None:
    """Raises if no weights count in a known state: of a traced one the value is 0 / 0."""
    _checks.refuse(empty, lambda: "the state has seen no weights: update it before its value")


def window(length: int, *, every: int = 1) -> Average:
    r"""Mean of the latest weights, or of every so many, with the same coefficient (LAWA).

    Known as latest weight averaging (LAWA), and as averaging of the last checkpoints.

    $$
    \bar\theta_t = \frac1k \sum_{j = n - k + 1}^{n} \theta_{j e}, \qquad
    n = \lfloor t / e \rfloor, \quad k = \min(n, \text{length})
    $$

    The weights themselves are kept, `length` of them in their own dtypes, so that what leaves the
    window is forgotten without a trace, NaN and infinities included; a mean from which the oldest
    weights are subtracted would keep their rounding, and NaN for ever. With $e$ the steps of an
    epoch this is latest weight averaging (LAWA), the mean of the weights at the ends of the latest
    epochs, with an update at every step.

    Args:
        length: How many weights to keep, at least 1.
        every: The number $e \ge 1$: the weights of updates $e, 2e, \dots$ are kept, the others
            are not. Before the first of them, the value is the latest weights.

    Returns:
        An [`Average`][wspace.average.Average].

    Raises:
        ValueError: If `length` or `every` is below 1.
        TypeError: If `length` or `every` is not an integer.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from wspace import average
        >>> latest = average.window(2)
        >>> state = latest.init(jnp.zeros(1))
        >>> for w in (1.0, 2.0, 6.0):
        ...     state = latest.update(state, jnp.array([w]))
        >>> latest.value(state)
        Array([4.], dtype=float32)

        Of the last two of every 3 steps, in a scan:

        >>> lawa = average.window(2, every=3)
        >>> def step(state, weights):
        ...     state = lawa.update(state, weights)
        ...     return state, lawa.value(state)
        >>> jax.lax.scan(step, lawa.init(jnp.zeros(())), jnp.arange(1.0, 10.0))[1]
        Array([1. , 2. , 3. , 3. , 3. , 4.5, 4.5, 4.5, 7.5], dtype=float32)

    References:
        J. Kaddour, *Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest
        Weight Averaging*, 2022, [arXiv:2209.14981](https://arxiv.org/abs/2209.14981).
    """
    length = _checks.rank(length, "length")
    if length < 1:
        raise ValueError("length must be at least 1: a window of 0 weights has no mean")
    every = _checks.rank(every, "every")
    if every < 1:
        raise ValueError("every must be at least 1: 1 keeps the weights of every update")

    def init(weights: WeightsLike) -> _Ring:
        _checks.same_layout(weights=weights)

        def room(leaf: Any) -> Array:
            zero = jnp.zeros_like(leaf, in_jax(leaf.dtype))
            return jnp.broadcast_to(zero[None], (length, *zero.shape))

        return _Ring(jnp.zeros((), jnp.int32), jax.tree.map(room, weights))

    def update(state: _Ring, weights: WeightsLike) -> _Ring:
        slots = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state.last)
        _checks.same_layout(state=slots, weights=weights)
        count = state.count + 1
        place = jnp.maximum(count // every - 1, 0) % length
        kept = (count % every == 0) | (count < every)
        return _Ring(count, _stored(state.last, weights, place, kept))

    def value(state: _Ring) -> PyTree:
        _refuse_empty(state.count == 0)
        return _mean_of_stored(
            state.last, jnp.minimum(jnp.maximum(state.count // every, 1), state.count)
        )

    return Average(init, update, value)


@jax.jit
def _stored(last: PyTree, weights: PyTree, place: Array, kept: Array) -> PyTree:
    def put(row: Array, x: Array) -> Array:
        there = jax.lax.dynamic_index_in_dim(row, place, 0, keepdims=False)
        x = jnp.where(kept, x.astype(row.dtype), there)
        return jax.lax.dynamic_update_index_in_dim(row, x, place, 0)

    return jax.tree.map(put, last, weights)


@jax.jit
def _mean_of_stored(last: PyTree, seen: Array) -> PyTree:
    def leaf(row: Array) -> Array:
        wide = row.astype(accumulator(row.dtype))
        count = jnp.minimum(seen, len(row)).astype(wide.dtype)
        return (jnp.sum(wide, 0) / count).astype(row.dtype)

    return jax.tree.map(leaf, last)
