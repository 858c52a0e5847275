r"""Merges in which models compete for every entry: by magnitude, variance, or having changed it."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from wspace import _checks, _lazy, _padding, tree
from wspace.merge import presets
from wspace.merge.consensus import Rule, Zero, agreed
from wspace.merge.sparsify import count
from wspace.merge.task import differences, siblings
from wspace.selection import kth_magnitude, top_mask
from wspace.typing import Coefficients, Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["magmax", "pcb", "ram", "sce"]


@tree.elementwise
def _largest(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (scale, *coefficients), (base, *tuned) = scalars, arrays
    terms = [c * (x - base) for c, x in zip(coefficients, tuned, strict=True)]
    winner = functools.reduce(lambda x, y: jnp.where(jnp.abs(y) > jnp.abs(x), y, x), terms)
    return base + scale * winner


def magmax(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: Coefficients | None = None,
    *,
    scale: ScalarLike = 1.0,
) -> Weights:
    r"""MagMax: each entry from the model that changed it most.

    $$
    \theta_j = \theta_{0j} + \lambda\, c_i\, \tau_{ij}, \qquad
    i = \arg\max_i |c_i\, \tau_{ij}|
    $$

    Where two are equally large the first one wins, so that permuting models matters there alone.
    One model at $c = \lambda = 1$ comes back to rounding, negated coefficients negate the
    displacement exactly, and a model given twice counts once.

    Args:
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        coefficients: The $c_i$, one a model, of any sign; ones if not given.
        scale: The number $\lambda$.

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: If the counts differ or are zero, or a known number is not finite; or if the
            trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.magmax(jnp.zeros(2), [jnp.array([1.0, -2.0]), jnp.array([-3.0, 2.0])])
        Array([-3., -2.], dtype=float32)

    References:
        D. Marczak et al., *MagMax: Leveraging Model Merging for Seamless Continual Learning*,
        ECCV 2024, [arXiv:2407.06322](https://arxiv.org/abs/2407.06322).
    """
    tuned, known = siblings(base, tuned, coefficients)
    return _largest((_checks.scalar("scale", scale), *known), (base, *tuned))


@tree.elementwise
def _variance(_: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    mean = sum(arrays[1:], arrays[0]) / len(arrays)
    squares = [jnp.square(x - mean) for x in arrays]
    return sum(squares[1:], squares[0]) / len(arrays)


def sce(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    *,
    preset: str | None = None,
    density: float | None = None,
    zero: Zero | None = None,
    scale: ScalarLike | None = None,
) -> Weights:
    r"""SCE: select the entries that differ most, weigh models by energy, erase the minority's sign.

    $$
    \theta_j = \theta_{0j}
        + \lambda\, \frac{\sum_{i \in A_j} w_i\, \hat\tau_{ij}}{\sum_{i \in A_j} w_i}, \qquad
    w_i = \lVert \hat\tau_i \rVert^2, \qquad
    A_j = \Bigl\{ i :
        \operatorname{sgn} \hat\tau_{ij} = \operatorname{sgn} \sum_k \hat\tau_{kj} \ne 0 \Bigr\}
    $$

    $\hat\tau_i$ has the $\lfloor \rho n \rfloor$ entries whose variance over the models is
    largest, of equal ones the first. An entry on which all models agree has none and is selected
    only by $\rho = 1$, at which one model comes back to rounding. The weights are computed, not
    given: permuting the models changes rounding alone, and scaling or negating all task vectors
    scales or negates the displacement.

    The tree is one vector; the paper's weights for every matrix are
    `tree.per_leaf(merge.sce)(base, tuned)`.

    Args:
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        preset: Whose options are the defaults: `None`, or a name in
            [the table of presets](merge.md#presets).
        density: The share $\rho$ of entries that are selected; 1 by default.
        zero: The sign where votes cancel, as in [`elect`][wspace.merge.elect]; `"zero"` by
            default.
        scale: The number $\lambda$; 1 by default.

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`. Their derivatives are
            those for a fixed selection and fixed signs.

    Raises:
        ValueError: If there is no model, a known number is out of its domain, the preset or an
            option is unknown; if a norm of the task vectors is not finite (NaN if traced); or if
            the trees differ in structure or in a leaf's shape.
        TypeError: If `density` is traced, or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.sce(jnp.zeros(2), [jnp.array([2.0, 0.0]), jnp.array([1.0, 1.0])])
        Array([1.6666667, 1.       ], dtype=float32)

    References:
        F. Wan et al., *FuseChat: Knowledge Fusion of Chat Models*, 2024,
        [arXiv:2408.07990](https://arxiv.org/abs/2408.07990).
    """
    options = _checks.settings(presets.SCE, preset, density=density, zero=zero, scale=scale)
    density = _checks.share("density", options.density)
    tuned, _ = siblings(base, tuned, None)
    edits = differences(base, tuned)
    if density < 1:
        variance = _variance((), edits)
        size = sum(leaf.size for leaf in jax.tree.leaves(variance))
        mask = top_mask(variance, count(density, size))
        edits = [_padding.mapped(_selected, x, mask, variance) for x in edits]
    weights, infinite = _shares([tree.vdot(x, x) for x in edits])
    undefined = _checks.refuse(
        infinite,
        lambda: "the task vectors have no finite norm: base or tuned holds NaN or an infinity",
    )
    rule = Rule("mass", options.zero, "weight", weighted=False, scale=options.scale + undefined)
    return agreed(base, edits, weights, rule)


@jax.jit
def _shares(energies: Sequence[Scalar]) -> tuple[list[Scalar], Bool[Array, ""]]:
    """Energies divided by their sum, and whether that is not finite."""
    total = functools.reduce(jnp.add, energies)
    return [x / jnp.where(total == 0, 1, total) for x in energies], ~jnp.isfinite(total)


@_lazy.entrywise(lambda x, *_: x.dtype)
@_padding.entrywise()
@jax.jit
def _selected(x: Array, mask: Array, variance: Array) -> Array:
    return jnp.where(mask & (variance > 0), x, 0)


@tree.elementwise
def _shared(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (scale, *numbers), (base, *edits) = scalars, arrays
    cuts, boosts = numbers[: len(edits)], numbers[len(edits) :]
    changed = [jnp.abs(x) > cut for x, cut in zip(edits, cuts, strict=True)]
    number = sum(c.astype(base.dtype) for c in changed)
    alone = number == 1
    terms = [
        jnp.where(c, jnp.where(alone, boost * x, x), 0)
        for c, x, boost in zip(changed, edits, boosts, strict=True)
    ]
    return base + scale * sum(terms[1:], terms[0]) / jnp.maximum(number, 1)


def ram(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    *,
    preset: str | None = None,
    threshold: ScalarLike | None = None,
    relative: bool | None = None,
    boost: ScalarLike | None = None,
    cap: ScalarLike | None = None,
    scale: ScalarLike | None = None,
) -> Weights:
    r"""RAM and RAM+: each entry is the mean over the models that changed it.

    $$
    \theta_j = \theta_{0j} + \frac{\lambda}{\max(1, |C_j|)} \sum_{i \in C_j} b_{ij}\, \tau_{ij},
    \qquad C_j = \{ i : |\tau_{ij}| > \epsilon_i \}
    $$

    What one model alone changed is not diluted by those that did not. With $r > 0$, RAM+, it is
    boosted by $b_{ij} = 1 + r \min(O_i / U_i, \kappa)$, where model $i$ changed $U_i$ entries
    alone and $O_i$ with others; else, and where others changed the entry too, $b_{ij} = 1$.

    One model comes back to rounding at $\epsilon_i = 0$. Permuting the models changes rounding
    alone, and scaling or negating all task vectors scales or negates the displacement, but
    for an absolute threshold.

    The tree is one vector; `tree.per_leaf(merge.ram)(base, tuned)` takes every leaf by itself.

    Args:
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        preset: Whose options are the defaults: `None`, or a name in
            [the table of presets](merge.md#presets).
        threshold: The number $\epsilon \ge 0$ beyond which an entry counts as changed; 0, any
            change, by default.
        relative: Whether $\epsilon_i$ is $\epsilon$ times the largest magnitude in the task vector
            of the model, rather than $\epsilon$ itself; `True` by default.
        boost: The number $r$; 0, RAM, by default. 0.1 is usual for RAM+.
        cap: The number $\kappa \ge 0$; 0.2 by default.
        scale: The number $\lambda$; 1 by default.

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`. Their derivatives are
            those for fixed $C_j$ and $b_{ij}$.

    Raises:
        ValueError: If there is no model, a known number is not finite or out of its domain, or
            the preset is unknown; or if the trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.ram(jnp.zeros(3), [jnp.array([2.0, 1.0, 0.0]), jnp.array([4.0, 0.0, 0.0])])
        Array([3., 1., 0.], dtype=float32)

    References:
        X. Yuan et al., *Behavior Knowledge Merge in Reinforced Agentic Models*, 2026,
        [arXiv:2601.13572](https://arxiv.org/abs/2601.13572).
    """
    options = _checks.settings(
        presets.RAM,
        preset,
        threshold=threshold,
        relative=relative,
        boost=boost,
        cap=cap,
        scale=scale,
    )
    threshold, cap = (
        _checks.scalar(name, value, lambda v: v >= 0, "at least 0")
        for name, value in (("threshold", options.threshold), ("cap", options.cap))
    )
    boost = _checks.scalar("boost", options.boost)
    tuned, _ = siblings(base, tuned, None)
    edits = differences(base, tuned)
    cuts = [threshold] * len(edits)
    if options.relative:
        cuts = [jnp.asarray(threshold).astype(peak.dtype) * peak for peak in map(_peak, edits)]
    plain = not _checks.is_traced(boost) and boost == 0
    boosts = [1.0] * len(edits) if plain else _boosts(cuts, edits, boost, cap)
    scale = _checks.scalar("scale", options.scale)
    return _shared((scale, *cuts, *boosts), (base, *edits))


@_padding.few_programs
def _peak(x: WeightsLike) -> Scalar:
    """The largest magnitude in a tree, 0 where there is nothing."""
    parts = itertools.chain.from_iterable(_lazy.parts([leaf]) for leaf in jax.tree.leaves(x))
    peaks = [_largest_in(part) for part in parts]
    return jax.tree.reduce_associative(jnp.maximum, peaks) if peaks else jnp.zeros(())


@_padding.reading
@jax.jit
def _largest_in(leaves: Sequence[Array]) -> Scalar:
    (x,) = leaves
    return jnp.max(jnp.abs(x), initial=0)


@_padding.few_programs
def _boosts(cuts: Sequence[Any], edits: Sequence[Weights], boost: Any, cap: Any) -> list[Scalar]:
    tallies = [
        sum(_tally(cuts, part) for part in _lazy.parts(leaves)).astype(leaves[0].dtype)
        for leaves in zip(*map(jax.tree.leaves, edits), strict=True)
    ]
    alone, shared = sum(tallies[1:], tallies[0]) if tallies else jnp.zeros((2, len(edits)))
    boost, cap = (jnp.asarray(number).astype(alone.dtype) for number in (boost, cap))
    return list(1 + boost * jnp.minimum(shared / jnp.maximum(alone, 1), cap))


@_padding.reading
@jax.jit
def _tally(cuts: Sequence[Any], leaves: Sequence[Array]) -> Int32[Array, "2 k"]:
    changed = [
        jnp.abs(x) > jnp.asarray(cut).astype(x.dtype) for x, cut in zip(leaves, cuts, strict=True)
    ]
    number = sum(c.astype(jnp.int32) for c in changed)
    counts = [[jnp.sum(c & (number == 1)), jnp.sum(c & (number > 1))] for c in changed]
    return jnp.asarray(counts, jnp.int32).T


@tree.elementwise
def _score(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (number, peak), (edit, total) = scalars, arrays
    size = edit / jnp.where(peak == 0, 1, peak)
    # Less 1, by which the exponential stays in range and no weight changes.
    return jnp.exp(number * (jnp.square(size) - 1)) * jnp.maximum(edit * total, 0)


@tree.elementwise
def _balanced(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (scale, *numbers), (base, *others) = scalars, arrays
    k = len(others) // 2
    floors, tops, edits, scores = numbers[:k], numbers[k:], others[:k], others[k:]
    shares = [
        jnp.maximum(score - floor, 0) / jnp.where(top > floor, top - floor, 1)
        for score, floor, top in zip(scores, floors, tops, strict=True)
    ]
    by = sum(shares)
    edit = sum(w * x for w, x in zip(shares, edits, strict=True)) / jnp.where(by == 0, 1, by)
    return base + scale * edit


def pcb(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    *,
    density: float = 0.1,
    scale: ScalarLike = 1.0,
) -> Weights:
    r"""PCB: a mean for each entry, models weighted by size there and by agreement with the others.

    $$
    \theta_j = \theta_{0j} + \lambda\, \frac{\sum_i w_{ij}\, \tau_{ij}}{\sum_i w_{ij}}, \qquad
    w_{ij} = \frac{(s_{ij} - t_i)_+}{\max_k s_{ik} - t_i}, \qquad
    s_{ij} = e^{m (\tau_{ij} / \lVert \tau_i \rVert_\infty)^2}
        \Bigl( \tau_{ij} \sum_{k=1}^{m} \tau_{kj} \Bigr)_+
    $$

    The threshold $t_i$ is the score that comes after the $\lfloor \rho n \rfloor$ largest of model
    $i$, 0 if there is none, so that no more than those have weight; an entry against the sum of
    all has none. The authors' code has a $\tanh$ around the product with the sum, by which its
    result is not that of the same models at another scale: this is its limit for small task
    vectors. Nor are outliers clipped.

    Scaling or negating all task vectors scales or negates the displacement. One model, and equal
    ones, come back to rounding at $\rho = 1$. Permuting the models changes rounding alone.

    Args:
        base: The weights $\theta_0$.
        tuned: The $m$ models $\theta_i$, trees of the layout of `base`, at least one.
        density: The share $\rho$ of entries in which a model has weight, above 0 and at most 1.
        scale: The number $\lambda$.

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: If there is no model or a known number is out of its domain; or if the trees
            differ in structure or in a leaf's shape.
        TypeError: If `density` is traced, or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.pcb(jnp.zeros(2), [jnp.array([4.0, -2.0]), jnp.array([4.0, 1.0])], density=1.0)
        Array([ 4., -2.], dtype=float32)

    References:
        G. Du et al., *Parameter Competition Balancing for Model Merging*, NeurIPS 2024, section 3,
        [arXiv:2410.02396](https://arxiv.org/abs/2410.02396).
    """
    density = _checks.share("density", density)
    tuned, _ = siblings(base, tuned, None)
    edits = differences(base, tuned)
    total = tree.combine([1.0] * len(edits), edits)
    scores = [_score((float(len(edits)), _peak(x)), (x, total)) for x in edits]
    size = sum(leaf.size for leaf in jax.tree.leaves(total))
    kept = count(density, size)
    floors = [kth_magnitude(s, kept + 1) if kept < size else 0.0 for s in scores]
    numbers = (_checks.scalar("scale", scale), *floors, *map(_peak, scores))
    return _balanced(numbers, (base, *edits, *scores))
