r"""Minimizing a loss of weights: the loop that everything in `fit` runs, and fine-tuning.

A loss is a function of the weights alone, or, if `keyed`, of the weights and a random key, which is
a new one at every step: it draws the batch. It is called on weights in at least float32, whatever
the dtype of the leaves; what was found is rounded once, at the end.
"""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import tree_leaves_with_path
from jaxtyping import Array, Float, Int, PyTree

from wspace import _checks, lowrank, perturb, tree
from wspace._compiled import compiled, weakly
from wspace._records import record
from wspace._words import described
from wspace.lowrank import LowRank
from wspace.lowrank.factors import matrix_shape
from wspace.typing import Scalar, Weights, WeightsLike

__all__ = ["Fit", "History", "KeyedLoss", "Progress", "adapt"]

KeyedLoss: TypeAlias = Callable[[PyTree], Scalar] | Callable[[PyTree, Array], Scalar]
"""A scalar function of the weights, or of the weights and a random key."""

Progress: TypeAlias = Callable[[int, float], None]
"""A function called with a step and the loss at it."""

Functions: TypeAlias = tuple[Callable[..., Any], ...]

Terms: TypeAlias = Callable[[Functions, PyTree, PyTree, Array], Float[Array, " t"]]
"""The summands of an objective, from the functions it is made of, parameters, data and a key;
hashable."""


@record
class History(NamedTuple):
    """What happened on the way: one entry at the start, and one after every step.

    Attributes:
        loss: What was minimized. Of a run that diverged it is NaN after the first entry that is not
            finite, or whose weights are not.
        terms: Its summands, one a column, before they are multiplied and added: for
            [`guard`][wspace.fit.guard] the losses of the points and then the penalty of the
            average, for [`invert`][wspace.fit.invert] the loss and the squared distance from the
            start.
        gradient: The norm of its gradient, which is zero where nothing is left to gain.
        steps: How many steps were sound. Fewer than were asked for if the next one led to where
            the weights or the loss are not finite: then the weights returned are those before it.
    """

    loss: Float[Array, " n"]
    terms: Float[Array, "n t"]
    gradient: Float[Array, " n"]
    steps: Int[Array, ""]


@record
class Fit(NamedTuple):
    """What an optimizer found, and how it came there.

    Attributes:
        weights: The last weights whose loss is finite.
        history: A [`History`][wspace.fit.History] of the run.
    """

    weights: PyTree
    history: History


def called(loss: Callable[..., Any], weights: PyTree, key: Array, keyed: bool) -> Any:
    """The value of a loss of either kind."""
    return loss(weights, key) if keyed else loss(weights)


def function(name: str, loss: KeyedLoss, keyed: bool) -> None:
    """Raises unless a loss is a function of the weights, or, if `keyed`, of them and a key."""
    _checks.function(name, loss, "a function of the weights")
    keyed = _checks.flag("keyed", keyed)
    try:
        inspect.signature(loss).bind(*("weights", "key")[: 1 + keyed])
    except ValueError:  # one that does not say what it takes
        return
    except TypeError as error:
        mend = (
            "is called with the weights and a key: leave out keyed=True if it takes none"
            if keyed
            else "is called with the weights alone: set keyed=True if it takes a key"
        )
        raise TypeError(f"{name} {mend}; it says {error}") from error


def scalar_loss(name: str, loss: KeyedLoss, weights: PyTree, key: Array, keyed: bool) -> None:
    """Raises unless a loss is a function that returns one floating-point number."""
    function(name, loss, keyed)
    value = jax.eval_shape(lambda *given: called(loss, *given, keyed), weights, key)
    shape, dtype = (getattr(value, name, None) for name in ("shape", "dtype"))
    if shape != () or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        got = type(value) if dtype is None else f"shape {shape} of {dtype}"
        raise TypeError(
            f"{name} must return one floating-point number, got {got}: take the mean over the data"
        )


def one_key(key: Array) -> Array:
    """A key from the one given, which is used up, once it is seen to be one."""
    _checks.random_key(key)
    return jax.random.split(key, 1)[0]


def minimized(
    key: Array,
    terms: Terms,
    functions: Functions,
    names: Sequence[str],
    shares: Sequence[Any],
    start: PyTree,
    data: PyTree,
    optimizer: optax.GradientTransformation,
    steps: int,
    progress: Progress | None,
) -> tuple[PyTree, History]:
    """The last sound parameters on the way down, and the way; errors call the terms by `names`."""
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"optimizer must be one of optax, such as optax.adam(1e-3), got {described(optimizer)}"
        )
    steps = _checks.rank(steps, "steps")
    if progress is not None:
        _checks.function("progress", progress, "a function of a step and a loss")
    if not any(x.size for x in jax.tree.leaves(start)):
        raise ValueError("start has no entries, so there is nothing to fit")
    wide = tree.norm(jax.tree.leaves(start)).dtype
    factors = jnp.stack([jnp.asarray(x).astype(wide) for x in shares])
    found, history = compiled(
        _run,
        (*functions, *optimizer, *(() if progress is None else (progress,))),
        (terms, len(functions), type(optimizer), progress is not None, steps),
        key,
        factors,
        start,
        data,
    )

    first = [jnp.isfinite(x).all() for x in (history.loss[0], *jax.tree.leaves(start))]
    alive = functools.reduce(jnp.logical_and, first)

    def message() -> str:
        if not all(first[1:]):
            return "start holds NaN or an infinity: start where the weights are finite"
        sound = np.isfinite(np.asarray(history.terms[0]))
        if sound.all():
            return f"the loss at the start is {history.loss[0]}: scale its terms down"
        i = int(np.argmin(sound))
        return (
            f"{names[i]} at the start is {history.terms[0, i]}: start where it is finite, "
            "or mend the loss"
        )

    undefined = _checks.refuse(~alive, message)
    if progress is not None and not _checks.is_traced(history):
        jax.effects_barrier()
    if not _checks.is_traced(history) and int(history.steps) < steps:
        warnings.warn(
            f"step {int(history.steps) + 1} of {steps} led to where the weights or the loss are "
            "not finite: the weights before it are returned; lower the learning rate",
            RuntimeWarning,
            stacklevel=3,
        )
    return jax.tree.map(lambda x: x + jnp.asarray(undefined).astype(x.dtype), found), history


def _run(
    functions: Functions,
    settings: tuple[Terms, int, type[optax.GradientTransformation], bool, int],
    key: Array,
    shares: Float[Array, " t"],
    start: PyTree,
    data: PyTree,
) -> tuple[PyTree, History]:
    terms, count, kind, tells, steps = settings
    progress = functions[-1] if tells else None
    functions, rules = functions[:count], functions[count : len(functions) - tells]
    optimizer = optax.with_extra_args_support(kind(*rules))
    every = max(steps // 100, 1)

    def loss(params: PyTree, key: Array) -> tuple[Scalar, Float[Array, " t"]]:
        parts = terms(functions, params, data, key).astype(shares.dtype)
        return jnp.sum(jnp.where(shares == 0, 0, shares * parts)), parts

    def forward(carry: Any, i: Array) -> Any:
        params, memory, sound, _ = carry
        here = jax.random.fold_in(key, i)
        (value, parts), slope = jax.value_and_grad(loss, has_aux=True)(params, here)
        finite = [jnp.isfinite(x).all() for x in (value, *jax.tree.leaves(params))]
        alive = functools.reduce(jnp.logical_and, finite)
        sound = jax.tree.map(lambda new, old: jnp.where(alive, new, old), params, sound)

        def again(params: PyTree) -> Scalar:  # the same batch is meant
            return loss(params, jax.random.clone(here))[0]

        search = {"value": value, "grad": slope, "value_fn": again}
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            updates, memory = optimizer.update(slope, memory, params, **search)
            moved = optax.apply_updates(params, updates)
        row = value, parts, tree.norm(jax.tree.leaves(slope)).astype(value.dtype)
        return (moved, memory, sound, alive), row

    def stay(carry: Any, _: Array) -> Any:
        nothing = jnp.full((), jnp.nan, shares.dtype)
        return carry, (nothing, jnp.full(shares.shape, jnp.nan, shares.dtype), nothing)

    def step(carry: Any, i: Array) -> Any:
        carry, row = jax.lax.cond(carry[-1], forward, stay, carry, i)
        alive = carry[-1]
        if progress is not None:
            jax.lax.cond(
                (i % every == 0) | (i == steps),
                lambda: jax.debug.callback(_told(progress), i, row[0], ordered=True),
                lambda: None,
            )
        return carry, (*row, alive)

    # The last turn measures where the last step led, and its own step is not taken.
    carry = (start, optimizer.init(start), start, jnp.asarray(True))
    (_, _, sound, _), (values, parts, slopes, alive) = jax.lax.scan(
        step, carry, jnp.arange(steps + 1)
    )
    count = jnp.maximum(jnp.sum(alive, dtype=jnp.int32) - 1, 0)
    return sound, History(values, parts, slopes, count)


def _told(progress: Progress) -> Callable[[Any, Any], None]:
    """The callback of a program, which does not keep `progress` alive."""
    try:
        kept = weakly(progress)
    except TypeError:  # its program is not kept either

        def kept() -> Progress:
            return progress

    def tell(i: Array | np.ndarray, value: Array | np.ndarray) -> None:
        if (alive := kept()) is not None:
            alive(int(i), float(value))

    return tell


@dataclasses.dataclass(frozen=True)
class _Tuned:
    """One loss, of weights or of weights to which an edit is added."""

    keyed: bool

    def __call__(
        self, functions: Functions, edit: PyTree, base: PyTree, key: Array
    ) -> Float[Array, "1"]:
        weights = edit if base is None else lowrank.apply(base, edit)
        return jnp.asarray(called(*functions, weights, key, self.keyed))[None]


def adapt(
    key: Array,
    loss: KeyedLoss,
    start: WeightsLike,
    *,
    keyed: bool = False,
    rank: int | None = None,
    optimizer: optax.GradientTransformation,
    steps: int,
    progress: Progress | None = None,
) -> Fit:
    r"""Fine-tunes weights on a loss, whole or through a low-rank term.

    $$
    \theta_{t+1} = \theta_t + u_t(\nabla L(\theta_t)), \qquad\text{or}\qquad
    \theta_t = \theta_0 + U_t V_t^\top, \quad U_0 \sim \mathcal N(0, 1/m), \quad V_0 = 0
    $$

    with $u_t$ the update of the optimizer. In the second form the factors are trained and the
    weights they are added to are not; the term starts at zero. The whole run is one compiled
    scan, which is used again by every call with the same `loss`, `optimizer` and `steps`.

    Through rank $r$ every matrix moves by a matrix of rank at most $r$; a vector or scalar is a
    matrix with one column, and moves freely. The term of the result is
    `lowrank.extract(start, fit.weights, rank)`.

    Args:
        key: A random key, from which the loss gets one a step, and the factors their start.
        loss: The loss $L$, a function of the weights, or of the weights and a key.
        start: The weights $\theta_0$.
        keyed: Whether the loss takes a key, which decides the batch.
        rank: The rank $r \ge 1$ of the term; `None` to train all weights.
        optimizer: An optimizer of optax. It is also given the value of the loss and the loss
            itself, for those that search along a line.
        steps: The number of steps.
        progress: Called with the step and the loss about a hundred times a run, the start and the
            end among them.

    Returns:
        A [`Fit`][wspace.fit.Fit] with the `weights`, each leaf in the dtype of that leaf of
            `start`, and the `history`. A run that diverges warns at which step, and its weights
            are the last that were sound.

    Raises:
        ValueError: If the loss is not finite at the start (NaN if traced), `rank` is below 1 or
            more than a matrix has, which the error names, `steps` is negative or `start` has no
            entries.
        TypeError: If the loss does not take what `keyed` says, or does not return one number,
            `optimizer` is not one of optax, `steps` or `rank` is not an integer, `key` is not one
            key, or a leaf is not floating-point.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from wspace import fit
        >>> def loss(w, key):
        ...     return jnp.mean((w - 3 + 0.01 * jax.random.normal(key, w.shape)) ** 2)
        >>> found = fit.adapt(
        ...     jax.random.key(0), loss, jnp.zeros(4), keyed=True,
        ...     optimizer=optax.adam(0.1), steps=200,
        ... )
        >>> jnp.round(found.weights, 1), found.history.loss.shape, int(found.history.steps)
        (Array([3., 3., 3., 3.], dtype=float32), (201,), 200)

    References:
        E. Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022, section 4,
        [arXiv:2106.09685](https://arxiv.org/abs/2106.09685).
    """
    key = one_key(key)
    _checks.same_layout(start=start)
    base = tree.upcast(start)
    scalar_loss("loss", loss, base, key, keyed)
    if rank is None:
        params, data = base, None
    else:
        params, data = _edit_of(key, base, rank), base
    run = key, _Tuned(keyed), (loss,), ("loss",), (1.0,), params, data, optimizer, steps, progress
    found, history = minimized(*run)
    if rank is None:
        return Fit(tree.cast_like(found, start), history)
    return Fit(lowrank.apply(start, found), history)


def _edit_of(key: Array, base: Weights, rank: int) -> PyTree:
    """A low-rank edit that is zero, with factors that a gradient can move."""
    rank = _checks.rank(rank)
    if rank < 1:
        raise ValueError("rank must be at least 1: at rank 0 nothing moves, None trains the whole")
    for path, leaf in tree_leaves_with_path(base):
        *_, m, n = matrix_shape(leaf.shape)
        if leaf.ndim > 1 and rank > min(m, n):
            raise ValueError(
                f"rank {rank} is above that of leaf {_checks.path_of(path)} of start, a matrix "
                f"of shape {(m, n)}: give at most {min(m, n)}, or None to train the whole"
            )

    def zero(x: Any) -> Any:
        if not isinstance(x, LowRank):
            return jnp.zeros_like(x)
        return LowRank(x.left * (rank**0.5 / x.shape[-2]) ** 0.5, jnp.zeros_like(x.right))

    drawn = perturb.low_rank_gaussian(jax.random.fold_in(key, 2**31), base, rank)
    return jax.tree.map(zero, drawn, is_leaf=_checks.is_factored)
