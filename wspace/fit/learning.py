r"""Merges whose coefficients are trained: which share of each task vector serves a loss best.

A merge is linear in its coefficients, so they have a gradient through any loss of the weights.
There are few of them, one a model, a leaf or a row, and little data will do, even data without
labels: [`entropy`][wspace.fit.entropy], negated, is the objective of AdaMerging.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from wspace import _checks, tree
from wspace._numerics import accumulator
from wspace._records import record
from wspace.fit.training import (
    Functions,
    History,
    KeyedLoss,
    Progress,
    called,
    minimized,
    one_key,
    scalar_loss,
)
from wspace.merge.parts.trim import Scope
from wspace.typing import Coefficients, WeightsLike

__all__ = ["Learned", "coefficients"]


@record
class Learned(NamedTuple):
    """A merge whose coefficients were trained, and how it came there.

    Attributes:
        weights: The merged weights.
        coefficients: An array `(k,)`, one number a model; or, for each leaf of the weights, such an
            array, or one `(k, ...)` with a number for every row of the leaf.
        history: A [`History`][wspace.fit.History] of the run; its gradient is by the numbers
            trained, the $z$ of a simplex.
    """

    weights: PyTree
    coefficients: Float[Array, " k"] | PyTree
    history: History


@dataclasses.dataclass(frozen=True)
class _Merge:
    """The loss of a merge, as a function of the numbers that make it."""

    per: Scope
    simplex: bool
    keyed: bool

    def __call__(
        self, functions: Functions, numbers: PyTree, data: PyTree, key: Array
    ) -> Float[Array, "1"]:
        weights = self.weights(self.coefficients(numbers), *data)
        return jnp.asarray(called(*functions, weights, key, self.keyed))[None]

    def coefficients(self, numbers: PyTree) -> PyTree:
        return (
            jax.tree.map(lambda z: jax.nn.softmax(z, axis=0), numbers) if self.simplex else numbers
        )

    def weights(self, chosen: PyTree, base: PyTree, tuned: Sequence[PyTree]) -> PyTree:
        each = jax.tree.map(lambda _: chosen, base) if self.per == "tree" else chosen
        return jax.tree.map(_merged_leaf, each, base, *tuned)


@jax.jit
def _merged_leaf(c: Float[Array, "k ..."], base: Array, *tuned: Array) -> Array:
    """One leaf in the dtype of arithmetic, with one coefficient a model, or one a model and row."""
    wide = accumulator(base.dtype, *(x.dtype for x in tuned))
    shares = [x[..., None] if x.ndim else x for x in c.astype(wide)]
    origin = base.astype(wide)
    terms = [a * (x.astype(wide) - origin) for a, x in zip(shares, tuned, strict=True)]
    return origin + sum(terms[1:], terms[0])


def coefficients(
    key: Array,
    loss: KeyedLoss,
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    *,
    keyed: bool = False,
    per: Scope = "tree",
    simplex: bool = False,
    start: Coefficients | None = None,
    optimizer: optax.GradientTransformation,
    steps: int,
    progress: Progress | None = None,
) -> Learned:
    r"""Learns the coefficients of a merge by a loss of the merged weights.

    Known as a learned soup (`simplex=True`), as AdaMerging, task-wise (`per="tree"`) and layer-wise
    (`per="leaf"`), and as differentiable adaptive merging (DAM, `per="row"`).

    $$
    \min_c \ L\Bigl(\theta_0 + \sum_i c_i\, (\theta_i - \theta_0)\Bigr), \qquad\text{or}\qquad
    c = \operatorname{softmax}(z), \quad \min_z
    $$

    | name | `per` | `simplex` | loss |
    |---|---|---|---|
    | AdaMerging, task-wise | `"tree"` | no | mean entropy of outputs without labels |
    | AdaMerging, layer-wise | `"leaf"` | no | the same |
    | learned soup | `"tree"`, `"leaf"` | yes | the loss of training, on held-out data |
    | DAM | `"row"` | no | divergence from each model on its own data |

    A row is what differs in the last index of a leaf alone: for a matrix in $x W$ the weights of
    one input feature. Vectors and scalars have one coefficient.

    Free coefficients have no bounds. A clamp in the loss would have no gradient outside of them,
    and leave there what once came there; where bounds are wanted, take a simplex, the weight decay
    of an optimizer, or `optax.keep_params_nonnegative()` chained to one. On a simplex
    $\theta = \sum_i c_i\, \theta_i$, and the base counts for nothing: give it among the models if
    it is to have a share.

    Where $L = \tfrac12 \lVert \theta - t \rVert^2$ the free optimum is the least-squares solution
    of $\sum_i c_i\, \tau_i = t - \theta_0$, over the tree, or for every leaf, or row, alone.

    Args:
        key: A random key, from which the loss gets one a step.
        loss: The loss $L$, a function of the weights, or of the weights and a key. It gets weights
            in at least float32.
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        keyed: Whether the loss takes a key, as in [`adapt`][wspace.fit.adapt].
        per: What has coefficients of its own: the whole `"tree"`, every `"leaf"`, or every
            `"row"`.
        simplex: Whether coefficients are positive and sum to 1.
        start: The $c_i$ to start at, one a model, in every leaf and row alike; 0.3, or if they
            are on a simplex $1/k$. There they have to be positive, and are divided by their sum.
        optimizer: An optimizer of optax, for the $c$ or the $z$.
        steps: The number of steps.
        progress: Called with the step and the loss about a hundred times a run.

    Returns:
        A [`Learned`][wspace.fit.Learned] with the `weights`, each leaf in the dtype of that leaf
            of `base`, the `coefficients`, which by tree and by leaf are what merges take, and the
            `history`. A run that diverges warns at which step, and its coefficients are the last
            that were sound.

    Raises:
        ValueError: If the loss is not finite at the start (NaN if traced), `start` has not one
            number a model, a number in it is known and not finite or, on a simplex, not positive,
            `per` is unknown, `steps` is negative, or the trees have no entries or differ in
            structure or in a leaf's shape.
        TypeError: If the loss does not take what `keyed` says, or does not return one number,
            `optimizer` is not one of optax, `steps` is not an integer, `key` is not one key, or a
            leaf is not floating-point.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from wspace import fit
        >>> base, tuned = jnp.zeros(3), [jnp.array([1.0, 1.0, 0.0]), jnp.array([0.0, 1.0, 1.0])]
        >>> target = jnp.array([2.0, 1.0, -1.0])
        >>> found = fit.coefficients(
        ...     jax.random.key(0), lambda w: jnp.sum((w - target) ** 2), base, tuned,
        ...     optimizer=optax.sgd(0.1), steps=200,
        ... )
        >>> found.coefficients.round(3), found.weights.round(3)
        (Array([ 2., -1.], dtype=float32), Array([ 2.,  1., -1.], dtype=float32))

    References:
        E. Yang et al., *AdaMerging: Adaptive Model Merging for Multi-Task Learning*, ICLR 2024,
        [arXiv:2310.02575](https://arxiv.org/abs/2310.02575). Learned soups: M. Wortsman et al.,
        *Model Soups: Averaging Weights of Multiple Fine-Tuned Models Improves Accuracy without
        Increasing Inference Time*, ICML 2022,
        [arXiv:2203.05482](https://arxiv.org/abs/2203.05482).
    """
    key = one_key(key)
    tuned = _checks.listed("tuned", tuned)
    _checks.same_layout(base=base, **_checks.each("tuned", tuned))
    _checks.one_of("per", per, get_args(Scope))
    if not any(x.size for x in jax.tree.leaves(base)):
        raise ValueError("base has no entries, so there is nothing to merge")
    first: Any
    simplex = _checks.flag("simplex", simplex)
    if simplex:
        c = _checks.positive("start", start, len(tuned))
        first = jnp.log(jnp.asarray(c / c.sum()))
    else:
        c = [0.3] * len(tuned) if start is None else start
        first = jnp.asarray(_checks.numbers("start", c, len(tuned)))
    wide = accumulator(*(x.dtype for x in jax.tree.leaves((base, tuned))))
    merge = _Merge(per, simplex, keyed)
    numbers = _everywhere(first.astype(wide), per, base)
    scalar_loss("loss", loss, merge.weights(numbers, base, tuned), key, keyed)
    run = key, merge, (loss,), ("loss",), (1.0,), numbers, (base, tuned), optimizer, steps, progress
    numbers, history = minimized(*run)
    chosen = merge.coefficients(numbers)
    return Learned(tree.cast_like(merge.weights(chosen, base, tuned), base), chosen, history)


def _everywhere(start: Float[Array, " k"], per: Scope, base: PyTree) -> PyTree:
    """The numbers to start at, in every place that has its own."""
    if per == "tree":
        return start

    def placed(leaf: Any) -> Array:
        rows = leaf.shape[:-1] if per == "row" else ()
        return jnp.broadcast_to(start.reshape(-1, *(1 for _ in rows)), (start.size, *rows))

    return jax.tree.map(placed, base)
