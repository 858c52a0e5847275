r"""Penalties that keep a point away from what it is not to be, or not to do.

A penalty is minimized, so it has to have a lower bound: without one, the optimizer pays any price
elsewhere for a little more of it. Each says its bound; the one that has none is used only if it
is asked for.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from wspace import _checks, geometry, tree
from wspace._numerics import stored_rounding
from wspace._records import record
from wspace.fit.training import KeyedLoss, function
from wspace.negative.sources import unit_of
from wspace.typing import Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["Away", "ascent", "clipped", "entropy", "hinge", "npo"]


@record
@dataclasses.dataclass(frozen=True)
class Away:
    r"""A penalty $\phi$ that keeps a point away, and its lower bound.

    Args:
        loss: The penalty, a function of the weights, or of the weights and a key.
        least: Its lower bound; $-\infty$ if it has none.
        name: What errors call it.
        keyed: Whether `loss` takes a key.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import fit
        >>> away = fit.clipped(lambda w: jnp.sum(w**2), 4.0)
        >>> away.name, away.least, float(away.loss(jnp.array([1.0])))
        ('clipped', -4.0, -1.0)
    """

    loss: KeyedLoss
    least: float
    name: str
    keyed: bool = False


def _of(
    argument: str,
    loss: Callable[..., Array],
    keyed: bool,
    formula: Callable[[Callable[[PyTree], Array], PyTree], Scalar],
) -> KeyedLoss:
    """A penalty by a formula of a function of the weights, or of the weights and a key."""
    function(argument, loss, keyed)
    if keyed:
        # A formula may call the loss twice, and means the same batch.
        return lambda weights, key: formula(lambda x: loss(x, jax.random.clone(key)), weights)
    return lambda weights: formula(loss, weights)


def hinge(avoid: WeightsLike, radius: ScalarLike, *, direction: WeightsLike | None = None) -> Away:
    r"""Penalty of a point inside a ball around a point to avoid.

    $$
    \phi(\theta) = \frac{\max(0,\ \rho - \lVert \theta - b \rVert)}{\rho} \in [0, 1]
    $$

    Zero outside the ball, with zero gradient there. At the center no way out is distinguished,
    and the gradient is zero unless a direction is given, which then is that way. It is taken
    within $64\,\varepsilon \lVert b \rVert$ of the center, $\varepsilon$ of the dtype in which the
    center is stored if that is half precision.

    Args:
        avoid: The center $b$.
        radius: The radius $\rho > 0$.
        direction: The way out of the center, of the layout of `avoid` and of any length. Needed
            where the point starts there, as an average does that is to be kept from itself.

    Returns:
        The penalty, with the lower bound $0$.

    Raises:
        ValueError: If `radius` is not positive or `direction` is zero (NaN if traced), or the trees
            differ in layout.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import fit
        >>> away = fit.hinge(jnp.zeros(2), 10.0)
        >>> away.loss(jnp.array([3.0, 4.0])), away.loss(jnp.array([30.0, 40.0]))
        (Array(0.5, dtype=float32), Array(0., dtype=float32))
    """
    radius = _checks.above_zero("radius", radius)
    along = {} if direction is None else {"direction": direction}
    _checks.same_layout(avoid=avoid, **along)
    center, stored = tree.upcast(avoid), jax.tree.leaves(avoid)
    undefined: Scalar | float = 0.0
    way = None
    if direction is not None:
        way = tree.combine((1 / unit_of([direction]),), (direction,), rounded=False)
        length = tree.norm(way)
        undefined = _checks.refuse(
            ~((length > 0) & jnp.isfinite(length)),
            lambda: "direction is zero or not finite: give one that leads out of the ball",
        )
        way = tree.combine((1 / length,), (way,))

    def penalty(weights: Weights) -> Scalar:
        distance = geometry.distance(weights, center)
        if way is not None:
            close = stored_rounding(stored, distance.dtype).share * tree.norm(center)
            ahead = tree.vdot(tree.combine((1, -1), (weights, center)), way)
            distance = jnp.where(distance <= close, ahead, distance)
        size = jnp.asarray(radius).astype(distance.dtype)
        outside = distance >= size  # NaN is neither
        return jnp.where(outside, 0 * size, (size - distance) / size) + undefined

    return Away(penalty, 0.0, "hinge")


def clipped(loss: KeyedLoss, most: ScalarLike, *, keyed: bool = False) -> Away:
    r"""Penalty of a low loss, up to a loss that is high enough.

    $$
    \phi(\theta) = -\min(L(\theta),\ \gamma) \ge -\gamma
    $$

    Args:
        loss: The loss $L$ that is to be high, a function of the weights, or of the weights and a
            key.
        most: The loss $\gamma$ above which there is nothing more to gain; a cross-entropy over $n$
            classes is $\log n$ at chance.
        keyed: Whether the loss takes a key.

    Returns:
        The penalty, with the lower bound $-\gamma$.

    Raises:
        ValueError: If `most` is not finite.
        TypeError: If `most` is not a known number, or the loss does not take what `keyed` says.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import fit
        >>> away = fit.clipped(lambda w: jnp.sum(w**2), 4.0)
        >>> away.loss(jnp.array([1.0])), away.loss(jnp.array([3.0])), away.least
        (Array(-1., dtype=float32), Array(-4., dtype=float32), -4.0)

    References:
        S. A. Siddiqui et al., *From Dormant to Deleted: Tamper-Resistant Unlearning Through
        Weight-Space Regularization*, 2025, [arXiv:2505.22310](https://arxiv.org/abs/2505.22310).
    """
    if _checks.is_traced(most):
        raise TypeError("most must be a known number, since it is the bound of the penalty")
    bound = np.asarray(_checks.scalar("most", most)).item()
    penalty = _of("loss", loss, keyed, lambda f, x: -jnp.minimum(f(x), bound))
    return Away(penalty, float(-bound), "clipped", keyed)


def entropy(logits: Callable[..., Float[Array, "... classes"]], *, keyed: bool = False) -> Away:
    r"""Penalty of outputs that are sure of something.

    $$
    \phi(\theta) = \frac1n \sum_{j=1}^n \bigl( \log k - H(p_j) \bigr) \in [0, \log k], \qquad
    p_j = \operatorname{softmax}(z_j(\theta))
    $$

    The divergence of the $n$ predictions over $k$ classes from the uniform one. Zero for those
    that say nothing. An output of $-\infty$ masks its class, whose $p \log p$ is zero.

    Args:
        logits: The outputs $z$ `(..., k)`, a function of the weights, or of the weights and a key.
        keyed: Whether `logits` takes a key.

    Returns:
        The penalty, with the lower bound $0$.

    Raises:
        TypeError: If `logits` does not take what `keyed` says.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import fit
        >>> away = fit.entropy(lambda w: w)
        >>> away.loss(jnp.zeros((3, 2)))
        Array(0., dtype=float32)
        >>> round(float(away.loss(jnp.array([[100.0, 0.0]]))), 4), round(float(jnp.log(2.0)), 4)
        (0.6931, 0.6931)

    References:
        R. Tamirisa et al., *Tamper-Resistant Safeguards for Open-Weight LLMs*, ICLR 2025,
        [arXiv:2408.00761](https://arxiv.org/abs/2408.00761), section 4.
    """

    def penalty(f: Callable[[PyTree], Array], weights: PyTree) -> Scalar:
        scores = jax.nn.log_softmax(tree.upcast(f(weights)))
        chance = jnp.log(jnp.asarray(scores.shape[-1], scores.dtype))
        # A class that is masked out has no share, and no part in the entropy.
        masked = scores == -jnp.inf
        terms = jnp.where(masked, 0, jnp.exp(scores) * jnp.where(masked, 0, scores))
        gap = jnp.sum(terms, axis=-1) + chance
        return jnp.maximum(jnp.mean(gap), 0)

    return Away(_of("logits", logits, keyed, penalty), 0.0, "entropy", keyed)


def npo(
    losses: Callable[..., Float[Array, " n"]],
    reference: WeightsLike,
    *,
    beta: ScalarLike,
    keyed: bool = False,
) -> Away:
    r"""Penalty of examples that are likelier than under a reference, soft where they are not.

    $$
    \phi(\theta) = -\frac{2}{\beta} \cdot \frac1n \sum_{j=1}^n \log \operatorname{sigmoid}\!\left(
    -\beta \log \frac{p_j(\theta)}{p_j(\theta_{\mathrm{ref}})} \right) \ge 0
    $$

    Negative preference optimization. At the reference it has the gradient of ascent on the mean
    loss, and it fades as the examples become unlikely; as $\beta \to 0$ it is ascent everywhere, up
    to a constant.

    Args:
        losses: The negative log-likelihoods $-\log p_j$ `(n,)`, one an example, a function of the
            weights, or of the weights and a key.
        reference: The weights $\theta_{\mathrm{ref}}$ of the reference, such as the average before.
        beta: The sharpness $\beta > 0$, per unit of log-likelihood.
        keyed: Whether `losses` takes a key.

    Returns:
        The penalty, with the lower bound $0$.

    Raises:
        ValueError: If `beta` is not positive (NaN if traced).
        TypeError: If a leaf of `reference` is not floating-point, or `losses` does not take what
            `keyed` says.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import fit
        >>> away = fit.npo(lambda w: w**2, jnp.array([1.0, 2.0]), beta=1.0)
        >>> round(float(away.loss(jnp.array([1.0, 2.0]))), 4), round(float(2 * jnp.log(2.0)), 4)
        (1.3863, 1.3863)
        >>> float(away.loss(jnp.array([20.0, 20.0])))
        0.0

    References:
        R. Zhang et al., *Negative Preference Optimization: From Catastrophic Collapse to Effective
        Unlearning*, COLM 2024, [arXiv:2404.05868](https://arxiv.org/abs/2404.05868), equation 3.
    """
    beta_ = _checks.above_zero("beta", beta)
    _checks.floating_leaves(reference=reference)
    fixed = tree.upcast(reference)

    def penalty(f: Callable[[PyTree], Array], weights: PyTree) -> Scalar:
        before, now = tree.widened(f(fixed), f(weights))
        likelier = jax.lax.stop_gradient(before) - now
        b = jnp.asarray(beta_).astype(likelier.dtype)
        return 2 / b * jnp.mean(jax.nn.softplus(b * likelier))

    return Away(_of("losses", losses, keyed, penalty), 0.0, "npo", keyed)


def ascent(loss: KeyedLoss, *, keyed: bool = False) -> Away:
    r"""Penalty of a low loss, without end.

    $$
    \phi(\theta) = -L(\theta)
    $$

    It has no lower bound, so that minimizing it with other losses does not converge:
    [`guard`][wspace.fit.guard] takes it only with `unbounded=True`. To be compared with the others.

    Args:
        loss: The loss $L$ that is to be high, a function of the weights, or of the weights and a
            key.
        keyed: Whether the loss takes a key.

    Returns:
        The penalty, with the lower bound $-\infty$.

    Raises:
        TypeError: If the loss does not take what `keyed` says.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import fit
        >>> fit.ascent(lambda w: jnp.sum(w**2)).loss(jnp.array([3.0]))
        Array(-9., dtype=float32)
    """
    return Away(_of("loss", loss, keyed, lambda f, x: -f(x)), -jnp.inf, "ascent", keyed)
