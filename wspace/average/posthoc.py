r"""Moving averages chosen after the run, from snapshots of others.

An average of a run has a profile: how much each moment $\tau$ counts in it. It is linear in the
profile, so that a combination of snapshots is the average whose profile is the combination of
theirs. Time counts updates; the weights after update $i$ stand for the interval $[i - 1, i]$.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree, Real

from wspace import _checks, tree
from wspace._numerics import coarsest_eps
from wspace._records import record
from wspace._words import described
from wspace.typing import ScalarLike, WeightsLike

__all__ = ["Profile", "Reconstruction", "exponent_of", "reconstruct", "width_of"]


@record
class Profile(NamedTuple):
    r"""How much each moment of a run counts in an average: a power of time, over an interval.

    $$
    p(\tau) = \frac{(\gamma + 1)\, \tau^\gamma}{t^{\gamma + 1} - s^{\gamma + 1}},
    \qquad s \le \tau \le t
    $$

    `Profile(t, gamma)` belongs to a snapshot of [`power_ema`][wspace.average.power_ema] after
    update $t$, `Profile(t)` of [`running_mean`][wspace.average.running_mean], `Profile(t,
    start=t - k)` of a full [`window`][wspace.average.window] of $k$, and `Profile(t, start=t - 1)`
    of the weights themselves.

    Attributes:
        stop: The end $t$ of the interval.
        exponent: The exponent $\gamma \ge 0$.
        start: The start $s$ of the interval, at least $0$ and below $t$.
    """

    stop: float
    exponent: float = 0.0
    start: float = 0.0


AnyProfile: TypeAlias = Profile | Real[Array | np.ndarray, " _"] | Sequence[ScalarLike]
"""A profile, or the coefficients of the updates from the first one on."""


@record
class Reconstruction(NamedTuple):
    r"""An average put together from others, and how close its profile is to the one asked for.

    Attributes:
        weights: The average.
        coefficients: The $x_k$ of the snapshots, float64, which sum to one. Rounding of the
            snapshots grows by the sum of their sizes.
        residual: The distance $\lVert \sum_k x_k p_k - p \rVert / \lVert p \rVert$ of the profiles
            in $L^2$; zero within about $10^{-8}$.
        condition: The ratio of the largest singular value to the smallest of the profiles of the
            snapshots, each at length one; infinite if they are dependent.
    """

    weights: PyTree
    coefficients: Float[Array | np.ndarray, " n"]
    residual: Float[Array, ""] | float
    condition: Float[Array, ""] | float


def width_of(exponent: ScalarLike) -> float:
    r"""The width of the profile of a power-function average, relative to the length of the run.

    $$
    \sigma_{\text{rel}} = \frac{1}{\gamma + 2} \sqrt{\frac{\gamma + 1}{\gamma + 3}}
    $$

    The standard deviation of time under the [`Profile`][wspace.average.Profile] on $[0, 1]$. It
    falls from $1/\sqrt{12}$ at $\gamma = 0$ towards zero.

    Args:
        exponent: The $\gamma \ge 0$.

    Returns:
        The width, a Python number.

    Raises:
        ValueError: If `exponent` is not finite or below $0$.

    Examples:
        >>> from wspace import average
        >>> round(average.width_of(6.94), 3)
        0.1

    References:
        T. Karras et al., *Analyzing and Improving the Training Dynamics of Diffusion Models*, CVPR
        2024, section 3.1, [arXiv:2312.02696](https://arxiv.org/abs/2312.02696).
    """
    g = _on_host("exponent", exponent, lambda g: g >= 0, "finite and at least 0")
    return math.sqrt((g + 1) / (g + 3)) / (g + 2)


def exponent_of(width: ScalarLike) -> float:
    r"""The exponent of the power-function average of a given relative width.

    $$
    \gamma = 2 r \cos\Bigl(\tfrac13 \arccos \tfrac{-q}{2 r^3}\Bigr) - \tfrac73, \qquad
    r^2 = \frac{1 + 3 \sigma^{-2}}{9}, \quad q = \frac{2 + 36\, \sigma^{-2}}{27}
    $$

    The inverse of [`width_of`][wspace.average.width_of]: $\gamma + 2$ is the largest root of
    $z^3 + z^2 - \sigma^{-2} (z - 1)$.

    Args:
        width: The $\sigma$ in $(0, 1/\sqrt{12}]$.

    Returns:
        The exponent, a Python number.

    Raises:
        ValueError: If `width` is not in $(0, 1/\sqrt{12}]$.

    Examples:
        >>> from wspace import average
        >>> round(average.exponent_of(0.05), 2)
        16.97

    References:
        T. Karras et al., *Analyzing and Improving the Training Dynamics of Diffusion Models*, CVPR
        2024, appendix C, [arXiv:2312.02696](https://arxiv.org/abs/2312.02696).
    """
    widest = math.sqrt(1 / 12) * (1 + 4 * np.finfo(float).eps)  # its rounding, either way
    words = "above 0 and at most 1/sqrt(12), that of the mean of the whole run"
    sigma = _on_host("width", width, lambda s: 0 < s <= widest and 1 / s < math.inf, words)
    # Times sigma and its cube, since the inverse of a square overflows.
    r = math.sqrt(sigma**2 + 3) / 3
    q = (2 * sigma**3 + 36 * sigma) / 27
    return max(2 * r * math.cos(math.acos(-q / (2 * r**3)) / 3) / sigma - 7 / 3, 0.0)


@_checks.of_points
def reconstruct(
    points: Sequence[WeightsLike], profiles: Sequence[AnyProfile], target: AnyProfile
) -> Reconstruction:
    r"""An average with another profile, put together from snapshots whose profiles are known.

    Known as post-hoc EMA (EDM2), of snapshots of [`power_ema`][wspace.average.power_ema].

    $$
    \theta = \sum_k x_k\, \theta_k, \qquad
    x = \arg\min_{\sum_k x_k = 1} \Bigl\lVert \sum_k x_k\, p_k - p \Bigr\rVert_{L^2}
    $$

    Such as an exponential average of another decay than any that was kept, or a mean of the end of
    a run, after the run. Snapshots of two power-function averages, taken now and then, give all
    averages of a width between theirs and many beyond. The sum of one makes it an average: where
    the run stands still the result stands there too. For a target of the run $\theta(\tau)$ and
    every $c$ the error is at most $\lVert p\rVert\, \text{residual}\, \bigl(\int \lVert
    \theta(\tau) - c\rVert^2\bigr)^{1/2}$.

    The inner products of profiles are closed forms; the coefficients are found from them in
    float64 on the host. Combinations whose profile is below the rounding $\varepsilon$ of the
    snapshots, relative to the largest, are not used: in them nothing is left but rounding. So
    snapshots kept in half precision give fewer digits, not noise.

    Args:
        points: The snapshots $\theta_k$, trees of one layout, at least one.
        profiles: The $p_k$, one a snapshot: a [`Profile`][wspace.average.Profile], or the
            coefficients of the updates $1, 2, \dots$ as a sequence, of any sign and of nonzero
            sum, by which they are divided.
        target: The profile $p$ of the average that is wanted, likewise.

    Returns:
        A [`Reconstruction`][wspace.average.Reconstruction] with the `weights`, each leaf in the
            dtype of that leaf of the first snapshot, the `coefficients`, and as a certificate the
            `residual` and the `condition`.

    Raises:
        ValueError: If a profile is not one, there are not as many profiles as snapshots, or the
            points differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point, or a profile is traced.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import average
        >>> early, late = jnp.array([1.0]), jnp.array([2.0])  # means of 100 and of 200 updates
        >>> profiles = [average.Profile(100), average.Profile(200)]
        >>> found = average.reconstruct([early, late], profiles, average.Profile(200, start=100))
        >>> found.weights, round(found.residual, 6)
        (Array([3.], dtype=float32), 0.0)

    References:
        T. Karras et al., *Analyzing and Improving the Training Dynamics of Diffusion Models*, CVPR
        2024, section 3.2, [arXiv:2312.02696](https://arxiv.org/abs/2312.02696).
    """
    points = _checks.listed("points", points)
    _checks.same_layout(**_checks.each("points", points))
    if not hasattr(profiles, "__len__") or isinstance(profiles, Mapping):
        raise TypeError(
            f"profiles must be a sequence, one profile a point, got {described(profiles)}"
        )
    if len(profiles) != len(points):
        raise ValueError(
            f"profiles has {len(profiles)} for {len(points)} points: give one profile a point"
        )
    known = [_profile(f"profiles[{i}]", p) for i, p in enumerate(profiles)]
    wanted = _profile("target", target)
    rounding = coarsest_eps(leaf.dtype for leaf in jax.tree.leaves(points))
    found = _reconstructed(known, wanted, rounding)
    return Reconstruction(tree.combine(found[0], points), *found)


def _reconstructed(
    profiles: list[Profile | np.ndarray], target: Profile | np.ndarray, rounding: float
) -> tuple[np.ndarray, float, float]:
    """The coefficients, the residual and the condition of `reconstruct`."""
    lengths = np.sqrt([_inner(p, p) for p in profiles])
    size = math.sqrt(_inner(target, target))
    gram = np.array([[_inner(p, q) for q in profiles] for p in profiles])
    gram /= lengths[:, None] * lengths
    product = np.array([_inner(p, target) for p in profiles]) / (lengths * size)

    values, vectors = np.linalg.eigh(gram)
    cut = max(rounding**2, len(profiles) * np.finfo(float).eps) * values[-1]
    kept = vectors[:, values > cut]
    inverse = (kept / values[values > cut]) @ kept.T
    free = inverse @ product * size  # of the profiles at length one, as is `push`
    push = inverse @ (1 / lengths)
    scaled = free + push * (1 - np.sum(free / lengths)) / np.sum(push / lengths)

    y = scaled / size
    square = max(float(y @ gram @ y - 2 * y @ product + 1), 0.0)
    condition = math.sqrt(values[-1] / values[0]) if values[0] > 0 else math.inf
    return scaled / lengths, math.sqrt(square), condition


def _inner(p: Profile | np.ndarray, q: Profile | np.ndarray) -> float:
    """The inner product of two profiles, of powers at most one: nothing overflows."""
    if isinstance(p, np.ndarray):
        q = q if isinstance(q, np.ndarray) else _masses(q, len(p))
        shared = min(len(p), len(q))
        return float(p[:shared] @ q[:shared])
    if isinstance(q, np.ndarray):
        return _inner(q, p)
    start, stop = max(p.start, q.start), min(p.stop, q.stop)
    if start >= stop:
        return 0.0
    power = p.exponent + q.exponent + 1
    heights = [
        (f.exponent + 1) / f.stop * (stop / f.stop) ** f.exponent / _growth(f, f.start / f.stop)
        for f in (p, q)
    ]
    grown = -math.expm1(power * math.log(start / stop)) if start > 0 else 1.0
    return heights[0] * heights[1] * stop * grown / power


def _growth(p: Profile, ratio: float) -> float:
    """The share of the integral of a power over [0, stop] that lies above `ratio * stop`."""
    return -math.expm1((p.exponent + 1) * math.log(ratio)) if ratio > 0 else 1.0


def _masses(p: Profile, steps: int) -> np.ndarray:
    """The integrals of a profile over the unit intervals before the first updates."""
    edges = np.clip(np.arange(steps + 1.0), p.start, p.stop) / p.stop
    with np.errstate(divide="ignore"):  # of the start of the run
        shares = np.log(edges[:-1] / edges[1:])
    grown = edges[1:] ** (p.exponent + 1) * -np.expm1((p.exponent + 1) * shares)
    return grown / _growth(p, p.start / p.stop)


def _on_host(name: str, value: ScalarLike, domain: Callable[[float], bool], words: str) -> float:
    """A number that the host computes with."""
    if _checks.is_traced(value):
        raise TypeError(f"{name} is computed with on the host, so it must be known, not traced")
    _checks.scalar(name, value, domain, words)
    return float(np.asarray(value))


def _profile(name: str, profile: AnyProfile) -> Profile | np.ndarray:
    """A profile with its numbers checked, or coefficients of the updates that sum to one."""
    if not isinstance(profile, Profile):
        if _checks.is_traced(profile):
            raise TypeError(f"{name} is computed with on the host, so it must be known, not traced")
        _checks.ordered(name, profile)
        if _checks.is_complex(np.asarray(profile)):
            raise TypeError(f"{name} must hold real numbers, got complex ones")
        try:
            steps = np.asarray(profile, np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name} must be a Profile or one coefficient an update, got {described(profile)}"
            ) from error
        if steps.ndim != 1 or not np.isfinite(steps).all():
            raise ValueError(
                f"{name} must be a Profile or one finite coefficient an update, got "
                f"{described(profile)}"
            )
        steps = np.asarray(_checks.to_one(steps))
        total, size = steps.sum(), np.abs(steps).sum()
        if _checks.cancels(total, size):
            raise ValueError(
                f"{name} sums to {total:g}, nothing beside its size {size:g}: "
                "an average divides by the sum, so make it differ from zero"
            )
        return steps / total
    start = _on_host(f"{name}.start", profile.start, lambda s: s >= 0, "finite and at least 0")
    exponent = _on_host(
        f"{name}.exponent", profile.exponent, lambda g: g >= 0, "finite and at least 0"
    )
    words = f"finite and above the start {start:g}"
    stop = _on_host(f"{name}.stop", profile.stop, lambda t: t > start, words)
    return Profile(stop, exponent, start)
