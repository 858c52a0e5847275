r"""Guards that are trained: points that keep their own losses while their average is kept away.

$$
\min_{x_1, \dots, x_k} \ \sum_i L_i(x_i) + \lambda\, \phi\Bigl(\sum_i a_i x_i\Bigr)
$$

The gradient of the second term at the point $x_i$ is $\lambda a_i \nabla \phi$: every point is
pushed along one direction, as in the closed form of
[`negative.retarget`][wspace.negative.retarget], which this reproduces where losses and penalty are
quadratic.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from wspace import _checks, lowrank, tree
from wspace._words import described
from wspace.cone.cones import Cone, refuse_other
from wspace.fit.away import Away
from wspace.fit.training import (
    Fit,
    Functions,
    KeyedLoss,
    Progress,
    called,
    minimized,
    one_key,
    scalar_loss,
)
from wspace.negative.bounds import linear_bound
from wspace.typing import Coefficients, Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["Weightings", "guard"]

Weightings: TypeAlias = (
    Coefficients
    | Sequence[Coefficients]
    | Float[Array | np.ndarray, "n k"]
    | Callable[[Array], Any]
)
"""Coefficients of an average `(k,)`, of several `(n, k)`, or a function that draws either."""


@dataclasses.dataclass(frozen=True)
class _Guarded:
    """The losses of the points, and the penalty of their averages; last what draws these."""

    keyed: bool
    away_keyed: bool

    def __call__(
        self, functions: Functions, points: PyTree, data: PyTree, key: Array
    ) -> Float[Array, " t"]:
        coefficients, cone, budget = data
        losses, (away, *rows) = functions[: len(points)], functions[len(points) :]
        own = [
            called(loss, x, jax.random.fold_in(key, i), self.keyed)
            for i, (loss, x) in enumerate(zip(losses, points, strict=True))
        ]
        drawn, seen = jax.random.split(jax.random.fold_in(key, 2**31))
        for draw in rows:
            coefficients = normalized(draw(drawn), len(points))
        keys = jax.random.split(seen, coefficients.shape[0])

        def penalty(row: Array, key: Array) -> Scalar:
            average = tree.combine(list(row), points)
            if cone is not None:
                average = lowrank.apply(average, self.worst(away, average, cone, budget, key))
            return called(away, average, key, self.away_keyed)

        if coefficients.shape[0] == 1:  # not batched: a factorization in it stays a plain one
            kept = penalty(coefficients[0], keys[0])
        else:
            kept = jnp.mean(jax.vmap(penalty)(coefficients, keys))
        return jnp.stack([jnp.asarray(x).astype(tree.norm(points).dtype) for x in (*own, kept)])

    def worst(
        self, away: KeyedLoss, average: Weights, cone: Cone, budget: Scalar, key: Array
    ) -> PyTree:
        """The edit that raises the penalty most, to first order; a constant for derivatives."""
        here = jax.lax.stop_gradient(average)
        again = jax.random.clone(key)  # the batch on which it then counts
        bound = linear_bound(lambda x: called(away, x, again, self.away_keyed), here, cone, budget)
        return bound.edit


def normalized(rows: Any, count: int) -> Float[Array, "n k"]:
    """Coefficients of one average or of several, each divided by its sum."""
    given = list(rows) if hasattr(rows, "__len__") and np.ndim(rows) else []
    depths = {np.ndim(row) for row in given}
    if depths not in ({0}, {1}):
        raise ValueError(
            "coefficients must be (k,) or (n, k), one number a point, or a function of a key"
        )
    table = [rows] if depths == {0} else given
    return jnp.stack([jnp.asarray(_checks.affine(row, count)) for row in table])


def guard(
    key: Array,
    losses: Sequence[KeyedLoss],
    points: Sequence[WeightsLike],
    coefficients: Weightings,
    away: Away | KeyedLoss,
    *,
    keyed: bool = False,
    optimizer: optax.GradientTransformation,
    steps: int,
    strength: ScalarLike = 1.0,
    cone: Cone | None = None,
    budget: ScalarLike | None = None,
    unbounded: bool = False,
    progress: Progress | None = None,
) -> Fit:
    r"""Trains points to keep their own losses while their average is kept away.

    $$
    \min_{x_1, \dots, x_k} \ \sum_i L_i(x_i) + \lambda\, \phi(M + D^*), \qquad
    M = \sum_i a_i x_i, \qquad D^* = d\, \frac{P\, \nabla \phi(M)}{\lVert P\, \nabla \phi(M) \rVert}
    $$

    Without a cone $D^* = 0$. With one it is the edit of the cone with norm $d$ that raises the
    penalty most, to first order, as [`linear_bound`][wspace.negative.linear_bound] finds it: with
    [`cone.Rank(r)`][wspace.cone.Rank] the average is kept away under the worst low-rank edit, and
    with full rank this is sharpness-aware minimization. It is a constant for the derivatives. It
    has the norm $d$ even where less would do: a step that leads past what it aims at raises no
    penalty, and then nothing is trained. So keep $d$ small, and with a
    [`hinge`][wspace.fit.hinge] start farther from its center than $d$, for instance where
    [`exit_ball`][wspace.negative.exit_ball] leads.

    With several rows of coefficients, or with a function that draws them anew at every step, the
    penalty is the mean over the rows: a guard of one average is none of another.

    Where $L_i = \tfrac{c_i}{2} \lVert x_i - x_{i0} \rVert^2$ and
    $\phi = \tfrac{\mu}{2} \lVert M - T \rVert^2$ the optimum is
    $x_i = x_{i0} + \frac{a_i}{c_i} \frac{T - M_0}{1 / (\lambda \mu) + \sum_j a_j^2 / c_j}$, which
    for $\lambda \mu \to \infty$ is [`retarget`][wspace.negative.retarget]. With $\lambda = 0$ every
    point is trained as if alone, if its loss draws no batches and the optimizer works entry by
    entry.

    A trained guard certifies nothing, not even a distance: [`audit`][wspace.negative.audit] it.

    Args:
        key: A random key, from which every loss and the penalty get one a step.
        losses: The losses $L_i$, one a point, functions of the weights, or of the weights and a
            key.
        points: The points $x_i$ to start at, trees of one layout, at least one.
        coefficients: The $a_i$, one a point, of any sign; several such rows, `(n, k)`; or a
            function of a key that draws either, such as
            `lambda key: jax.random.dirichlet(key, jnp.ones(2), (4,))`. Divided by their sum.
        away: The penalty $\phi$: [`hinge`][wspace.fit.hinge], [`clipped`][wspace.fit.clipped],
            [`entropy`][wspace.fit.entropy] or [`npo`][wspace.fit.npo], or a loss of your own, which
            must be bounded below.
        keyed: Whether the losses take a key, and with them a penalty of your own.
        optimizer: An optimizer of optax, for all points together.
        steps: The number of steps.
        strength: The factor $\lambda \ge 0$ of the penalty.
        cone: The cone $K$ of edits to hold against; none if not given.
        budget: Their norm $d \ge 0$; given with a cone, and only then.
        unbounded: Whether a penalty without a lower bound will do.
        progress: Called with the step and the loss about a hundred times a run.

    Returns:
        A [`Fit`][wspace.fit.Fit] whose `weights` are the list of the points, each leaf in the
            dtype of that leaf of its point, and whose `history.terms` are the losses of the
            points and last the penalty. A run that diverges warns at which step, and its weights
            are the last that were sound.

    Raises:
        ValueError: If `away` has no lower bound and `unbounded` is not set, a loss is not finite
            at the start (NaN if traced), coefficients or `strength` or `budget` are out of their
            domain or not as many as the points, a cone comes without a budget or a budget without
            a cone, or the trees differ in layout.
        TypeError: If a loss does not take what `keyed` says, or does not return one number,
            `optimizer` is not one of optax, `key` is not one key, `cone` is no cone or not a
            pytree, or a leaf is not floating-point.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from wspace import average, fit
        >>> points = [jnp.array([-1.0, 0.0]), jnp.array([1.0, 0.0])]
        >>> losses = [lambda x: jnp.sum((x[0] + 1) ** 2), lambda x: jnp.sum((x[0] - 1) ** 2)]
        >>> away = fit.hinge(jnp.zeros(2), 0.5, direction=jnp.array([0.0, 1.0]))
        >>> guarded = fit.guard(
        ...     jax.random.key(0), losses, points, [0.5, 0.5], away,
        ...     optimizer=optax.sgd(0.1), steps=50,
        ... )
        >>> bool(jnp.linalg.norm(average.mean(guarded.weights)) >= 0.5)
        True
        >>> float(guarded.history.terms[-1].sum())
        0.0

    References:
        The penalty of an average: S. A. Siddiqui et al., *From Dormant to Deleted*, 2025,
        [arXiv:2505.22310](https://arxiv.org/abs/2505.22310). The inner step: P. Foret et al.,
        *Sharpness-Aware Minimization for Efficiently Improving Generalization*, ICLR 2021,
        [arXiv:2010.01412](https://arxiv.org/abs/2010.01412), with another set of edits.
    """
    key = one_key(key)
    points = _checks.listed("points", points)
    _checks.same_layout(**_checks.each("points", points))
    unbounded = _checks.flag("unbounded", unbounded)
    if not isinstance(losses, Sequence):
        raise TypeError(f"losses must be a sequence of functions, got {described(losses)}")
    losses = tuple(losses)
    if len(losses) != len(points):
        raise ValueError(
            f"losses has {len(losses)} functions for {len(points)} points: give one a point"
        )
    if isinstance(away, Away):
        if away.least == -np.inf and not unbounded:
            raise ValueError(
                f"away is {away.name}, which has no lower bound, so that training does not "
                "converge: give hinge, clipped, entropy or npo, or set unbounded=True"
            )
        penalty, away_keyed = away.loss, away.keyed
    else:
        penalty, away_keyed = away, keyed
    if (cone is None) != (budget is None):
        raise ValueError(
            "cone and budget belong together: the edits to hold against, and their norm"
        )
    if cone is not None:
        refuse_other(cone)
        if jax.tree_util.all_leaves([cone]):
            raise TypeError(
                f"cone is a {type(cone).__name__}, which no compiled step can take: register the "
                "class as a pytree, by jax.tree_util.register_dataclass"
            )
    if budget is not None:
        budget = _checks.nonnegative("budget", budget)
    strength = _checks.nonnegative("strength", strength)
    wide = [tree.upcast(x) for x in points]
    for i, (loss, x) in enumerate(zip(losses, wide, strict=True)):
        scalar_loss(f"losses[{i}]", loss, x, key, keyed)
    scalar_loss("away", penalty, wide[0], key, away_keyed)
    drawn: Any = coefficients if callable(coefficients) else None
    rows = None if drawn else normalized(coefficients, len(points))
    if drawn:
        jax.eval_shape(lambda key: normalized(drawn(key), len(points)), key)
    names = [*(f"losses[{i}]" for i in range(len(losses))), "away"]
    shares = [1.0] * len(losses) + [strength]
    found, history = minimized(
        key,
        _Guarded(keyed, away_keyed),
        (*losses, penalty, *((drawn,) if drawn else ())),
        names,
        shares,
        wide,
        (rows, cone, budget),
        optimizer,
        steps,
        progress,
    )
    return Fit([tree.cast_like(x, y) for x, y in zip(found, points, strict=True)], history)
