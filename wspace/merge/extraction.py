r"""Part of an edit: without what is unwanted, by depth, or up to a size."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_leaves_with_path
from jaxtyping import Array, PyTree

from wspace import _checks, tree
from wspace._numerics import safe_sqrt
from wspace.merge.task import siblings
from wspace.selection import kth_magnitude
from wspace.typing import Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["arcee_fusion", "ext_sub", "lines", "nearswap", "negmerge"]


@tree.elementwise
def _less_consensus(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (strength,), (base, *tuned) = scalars, arrays
    edits = [x - base for x in tuned]
    signs = [jnp.sign(x) for x in edits]
    agree = functools.reduce(jnp.logical_and, [s == signs[0] for s in signs])
    mean = sum(edits[1:], edits[0]) / len(edits)
    return base - strength * jnp.where(agree, mean, 0)


def negmerge(
    base: WeightsLike, tuned: Sequence[WeightsLike], strength: ScalarLike = 1.0
) -> Weights:
    r"""NegMerge: the base less what all of several fine-tunes on one thing agree on in sign.

    $$
    \theta_j = \theta_{0j} - \frac{\lambda}{k} \sum_{i=1}^{k} \tau_{ij}
        \Bigl[\, \operatorname{sgn} \tau_{1j} = \dots = \operatorname{sgn} \tau_{kj} \,\Bigr]
    $$

    The models are trained on what is to be forgotten, each with other settings; an entry in which
    one of them does not move, or moves the other way, stays that of the base. One model is
    [`task_arithmetic`][wspace.merge.task_arithmetic] with coefficient $-\lambda$. Permuting the
    models changes rounding alone, negating all task vectors negates the displacement exactly.

    Args:
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        strength: The number $\lambda$, of any sign; a negative one adds.

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: If there is no model or `strength` is known and not finite; or if the trees
            differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.negmerge(jnp.zeros(2), [jnp.array([1.0, 2.0]), jnp.array([3.0, -2.0])])
        Array([-2.,  0.], dtype=float32)

    References:
        H. Kim, D. Han, J. Choe, *NegMerge: Sign-Consensual Weight Merging for Machine Unlearning*,
        ICML 2025, [arXiv:2410.05583](https://arxiv.org/abs/2410.05583).
    """
    tuned, _ = siblings(base, tuned, None)
    return _less_consensus((_checks.scalar("strength", strength),), (base, *tuned))


@functools.partial(tree.elementwise, scope="row")
def _extracted(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (strength,), (base, tuned, avoid) = scalars, arrays
    good, bad = tuned - base, avoid - base
    size, weight = _row_norms(good), _row_norms(bad)
    along = good / jnp.where(size == 0, 1, size)
    return tuned - strength / 2 * (bad - weight * along)


def _row_norms(x: Array) -> Array:
    return safe_sqrt(jnp.sum(jnp.square(x), axis=-1 if x.ndim else None, keepdims=True))


def ext_sub(
    base: WeightsLike, tuned: WeightsLike, avoid: WeightsLike, strength: ScalarLike = 1.0
) -> Weights:
    r"""Ext-Sub: subtract from one model what another has beyond the direction that both share.

    $$
    w = w_0 + a - \lambda\,(b - P_{\hat a + \hat b}\, b)
      = w_0 + a - \frac{\lambda}{2}\,\bigl( b - \lVert b \rVert\, \hat a \bigr)
    $$

    for every row, the entries of a leaf that differ in their last index alone, with the unit
    vectors $\hat a = a / \lVert a \rVert$ and $\hat b$. The projection onto the sum of two unit
    vectors is half that sum times the norm, which is the second form; it needs no division by a
    sum that may vanish.

    Where both rows point one way nothing is subtracted, where they are opposite all of $\lambda b$
    is. A row of zeros has no direction: with $b = 0$ nothing is subtracted, and with $a = 0$
    half of $\lambda b$, the mean over all directions. Scaling or turning all rows of both
    displacements scales or turns those of the result.

    Args:
        base: The weights $w_0$.
        tuned: The model $w_0 + a$ with what is wanted.
        avoid: The model $w_0 + b$ with what is not.
        strength: The number $\lambda$, of any sign.

    Returns:
        The weights $w$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: If `strength` is known and not finite; or if the trees differ in structure or
            in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.ext_sub(jnp.zeros(2), jnp.array([2.0, 0.0]), jnp.array([0.0, 2.0]))
        Array([ 3., -1.], dtype=float32)

    References:
        X. Hu et al., *Separate the Wheat from the Chaff: Model Deficiency Unlearning via
        Parameter-Efficient Module Operation*, AAAI 2024,
        [arXiv:2308.08090](https://arxiv.org/abs/2308.08090).
    """
    _checks.same_layout(base=base, tuned=tuned, avoid=avoid)
    return _extracted((_checks.scalar("strength", strength),), (base, tuned, avoid))


@tree.elementwise
def _scaled(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (start, rise, depth), (edit,) = scalars, arrays
    return (start + rise * depth) * edit


def lines(
    edit: WeightsLike,
    layers: PyTree | Callable[[str], int | None],
    *,
    start: ScalarLike,
    rise: ScalarLike,
    count: int | None = None,
) -> Weights:
    r"""LiNeS: an edit scaled by depth, so that shallow layers move less than deep ones.

    $$
    \hat\tau_\ell = \Bigl( \alpha + \beta\, \frac{\ell}{L - 1} \Bigr)\, \tau_\ell, \qquad
    \ell = 0, \dots, L - 1
    $$

    Linear in the edit; $\beta = 0$ scales all of it. A single layer, $L = 1$, is the first one
    and gets $\alpha$, and so does a leaf of no layer.

    Args:
        edit: The task vector $\tau$, or a merged one.
        layers: The layer $\ell$ of every leaf: a tree of the structure of `edit` with an integer
            or `None` at each leaf, or a function that takes the path of a leaf, such as
            `"['blocks'][3]['w']"`, and returns one. `None` is a leaf of no layer.
        start: The number $\alpha$, the factor of the first layer.
        rise: The number $\beta$, by how much that of the last layer is more.
        count: The number of layers $L$; the largest $\ell$ and one more if not given.

    Returns:
        The scaled edit, of the layout and dtypes of `edit`.

    Raises:
        ValueError: If `layers` is not of the structure of `edit`, a layer is negative or not below
            `count`, or a known number is not finite.
        TypeError: If a layer is not an integer, or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> edit = {"blocks": [jnp.ones(1), jnp.ones(1), jnp.ones(1)], "head": jnp.ones(1)}
        >>> merge.lines(edit, {"blocks": [0, 1, 2], "head": 2}, start=0.5, rise=1.0)["blocks"]
        [Array([0.5], dtype=float32), Array([1.], dtype=float32), Array([1.5], dtype=float32)]

    References:
        K. Wang et al., *LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model
        Merging*, ICLR 2025, section 4, [arXiv:2410.17146](https://arxiv.org/abs/2410.17146).
    """
    start, rise = _checks.scalar("start", start), _checks.scalar("rise", rise)
    _checks.same_layout(edit=edit)
    leaves, structure = jax.tree.flatten(edit)
    paths = [keystr(path) for path, _ in tree_leaves_with_path(edit)]
    depths = [
        layer if layer is None else _checks.rank(layer, f"the layer of leaf {path or '(root)'}")
        for path, layer in zip(paths, _layers(layers, paths, structure), strict=True)
    ]
    deepest = max((layer for layer in depths if layer is not None), default=0)
    last = deepest if count is None else _checks.rank(count, "count") - 1
    if deepest > last:
        raise ValueError(f"a leaf is of layer {deepest}, but count is {count}: layers begin at 0")
    return structure.unflatten(
        _scaled((start, rise, (layer or 0) / max(last, 1)), (leaf,))
        for layer, leaf in zip(depths, leaves, strict=True)
    )


def _layers(layers: Any, paths: Sequence[str], structure: Any) -> list[Any]:
    if callable(layers):
        return [layers(path) for path in paths]
    try:
        return structure.flatten_up_to(layers)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "layers must be a tree like edit, with an integer or None at each leaf, or a function "
            f"of paths: {error}"
        ) from error


@tree.elementwise
def _clipped(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (threshold,), (base, tuned) = scalars, arrays
    return base + jnp.clip(tuned - base, -threshold, threshold)


def nearswap(base: WeightsLike, tuned: WeightsLike, threshold: ScalarLike) -> Weights:
    r"""NearSwap: the base with every entry moved towards the other model, by no more than a step.

    $$
    \theta_j = \theta_{0j} + \operatorname{clip}(\theta_{1j} - \theta_{0j}, -t, t)
    $$

    Entries that are near take the value of the other model, and those that are far keep close to
    their own: the nearest point to the other model in a cube about the base. It is usually written
    as an interpolation by $\min(1, t / |\theta_{1j} - \theta_{0j}|)$, which is the same without a
    division. Scaling both models and $t$ scales the result.

    Args:
        base: The weights $\theta_0$.
        tuned: The weights $\theta_1$, of the same layout.
        threshold: The largest step $t \ge 0$.

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: If `threshold` is known and negative (NaN if traced); or if the trees differ in
            structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.nearswap(jnp.zeros(3), jnp.array([0.25, -4.0, 0.0]), 0.5)
        Array([ 0.25, -0.5 ,  0.  ], dtype=float32)

    References:
        The merge method `nearswap` of mergekit 0.1.5.
    """
    threshold = _checks.scalar("threshold", threshold, lambda t: t >= 0, "at least 0")
    _checks.same_layout(base=base, tuned=tuned)
    return _clipped((threshold,), (base, tuned))


@jax.jit
def _importance(base: Array, tuned: Array) -> Array:
    """How far an entry moved, times how far the softmax of its row did."""
    if not base.ndim:
        return jnp.zeros_like(base)
    p, q = (jax.nn.log_softmax(x, axis=-1) for x in (tuned, base))
    divergence = jnp.sum(jnp.exp(p) * (p - q), axis=-1, keepdims=True)
    return jnp.abs(tuned - base) * jnp.maximum(divergence, 0)


@tree.elementwise
def _above(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (least, middle, most), (base, tuned, importance) = scalars, arrays
    small = importance < middle + 1.5 * (most - least)  # NaN is not, and shows
    return base + jnp.where(small, 0, tuned - base)


def arcee_fusion(base: WeightsLike, tuned: WeightsLike) -> Weights:
    r"""Arcee Fusion: the base with those entries of another model whose importance is an outlier.

    $$
    \theta_j = \theta_{0j} + \tau_j\, [\, s_j \ge q_{1/2} + \tfrac32\, (q_{3/4} - q_{1/4}) \,],
    \qquad
    s_j = |\tau_j|\; D\bigl(\operatorname{softmax} \theta_{1,r(j)} \,\big\Vert\,
        \operatorname{softmax} \theta_{0,r(j)}\bigr)
    $$

    Every leaf is taken by itself. $r(j)$ is the row of an entry, those that differ from it in
    the last index alone, $D$ the relative entropy, and $q$ are the quantiles of the importance in
    the leaf, the $\lfloor q\,(n - 1) \rfloor$-th entry counted from the least; all entries are
    counted, where mergekit draws a million of a larger leaf, so that what it keeps is random.

    The softmax of weights is no distribution that a model has, and depends on their scale: the
    merge is not equivariant under it. A leaf whose rows hold one number has no importance and is
    taken whole, as is a leaf of which three quarters did not move.

    Args:
        base: The weights $\theta_0$.
        tuned: The weights $\theta_1$, of the same layout.

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`. Their derivatives are
            those for a fixed selection.

    Raises:
        ValueError: If the trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.arcee_fusion(jnp.zeros(6), jnp.array([0.1, -0.2, 0.3, 0.1, -0.2, 2.0]))
        Array([0., 0., 0., 0., 0., 2.], dtype=float32)

    References:
        The merge method `arcee_fusion` of mergekit 0.1.5.
    """
    _checks.same_layout(base=base, tuned=tuned)
    return jax.tree.map(_fused, base, tuned)


def _fused(base: Array, tuned: Array) -> Array:
    if not base.size:
        return base
    importance = jax.lax.stop_gradient(_importance(*tree.widened(base, tuned)))
    ranks = (base.size - int(share * (base.size - 1)) for share in (0.25, 0.5, 0.75))
    quantiles = [kth_magnitude(importance, rank) for rank in ranks]
    return _above(quantiles, (base, tuned, importance))
