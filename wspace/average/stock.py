r"""Model Stock: how far to go from a base towards the mean of models tuned from it."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from wspace import _checks, _lift, geometry
from wspace._numerics import row_sums, safe_sqrt
from wspace.typing import Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["model_stock"]

Statistic: TypeAlias = Literal["angle", "cosine"]
Scope: TypeAlias = Literal["tree", "leaf", "row"]


def model_stock(
    base: WeightsLike,
    points: Sequence[WeightsLike],
    *,
    statistic: Statistic = "angle",
    scope: Scope = "tree",
    floor: ScalarLike = 0.0,
) -> Weights:
    r"""Model Stock: the mean of tuned models, drawn back to their base by the angle between them.

    $$
    \theta = \theta_0 + t\,(\bar\theta - \theta_0), \qquad
    t = \frac{N c}{1 + (N - 1)\, c}, \qquad c = \cos \Omega
    $$

    $\Omega$ is the angle between two task vectors $\theta_i - \theta_0$. If these are a common
    part and independent noise of one size each, this is the point of the segment that is nearest
    to the common part: all of the mean where they agree, $\Omega = 0$, and the base where they are
    orthogonal. For more than two points, `statistic="angle"` takes the mean of the pairwise
    angles, as the authors do, and `"cosine"` the mean of the pairwise cosines; for two points they
    are the same. Translating base and points together translates the result, and scaling them
    scales it, however close to the base the points are.

    `**merge.presets.mergekit["model_stock"]` are the options of mergekit, whose `filter_wise` is
    `scope="row"`, and `**merge.presets.fusionbench["model_stock"]` the options of FusionBench.

    Args:
        base: The weights $\theta_0$.
        points: The $\theta_i$, $N \ge 2$ trees of the layout of `base`.
        statistic: `"angle"` or `"cosine"`. A task vector that is zero is taken as
            orthogonal to the others.
        scope: What has one $t$: the `"tree"`, each `"leaf"`, or each `"row"`, the last axis of a
            leaf.
        floor: The least $c$ to take; with 0, task vectors that point away from each other leave
            the base. With -1, as in the presets, such a $c$ goes beyond the base, away from the
            mean.

    Returns:
        The weights, each leaf in the dtype of that leaf of `base`. Where all task vectors of a
            scope are zero it is the base.

    Raises:
        ValueError: If $1 + (N - 1)\,c \le 64\,\varepsilon N$, where the formula has its pole,
            which takes a negative floor; NaN if the values are traced. Also if there are fewer
            than two points, an option is unknown, `floor` is known and not in $[-1, 1]$, or
            the trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import average
        >>> average.model_stock(jnp.zeros(2), [jnp.array([4.0, 3.0]), jnp.array([4.0, -3.0])])
        Array([1.75, 0.  ], dtype=float32)

    References:
        D.-H. Jang, S. Yun, D. Han, *Model Stock: All we need is just a few fine-tuned models*,
        ECCV 2024, [arXiv:2403.19522](https://arxiv.org/abs/2403.19522).
    """
    points = _checks.listed("points", points)
    _checks.same_layout(base=base, **_checks.each("points", points))
    if len(points) < 2:
        raise ValueError("points holds one tree: the angle is between two, so give at least two")
    _checks.one_of("statistic", statistic, get_args(Statistic))
    _checks.one_of("scope", scope, get_args(Scope))
    floor = _checks.scalar("floor", floor, lambda c: (c >= -1) & (c <= 1), "in [-1, 1]")

    trees = [base, *points]
    if scope == "row":
        ratios = _ratios_of_rows(statistic)((floor,), trees)
        if _checks.is_traced(floor) or np.less(floor, 0):
            _refuse_pole(_has_pole((), (ratios,)) > 0)
        return _drawn_by_entry((), [*trees, ratios])
    by_leaf = scope == "leaf"
    sums = geometry.pair_sums_from_first((), trees, by_leaf=by_leaf)
    ratios = [_t_of(x, floor, statistic) for x in (sums if by_leaf else [sums])]
    # After all sums are asked for, as to look at one waits for it.
    _refuse_pole(_any_pole(ratios))
    if not by_leaf:
        return _drawn(ratios, trees)
    return _drawn((), trees, [jax.tree.structure(base).unflatten(ratios)])


def _refuse_pole(pole: Any) -> None:
    _checks.refuse(
        pole, lambda: "task vectors of points cancel, where t has its pole: take floor=0.0"
    )


@jax.jit
def _any_pole(ratios: Sequence[Array]) -> Bool[Array, ""]:
    return functools.reduce(jnp.logical_or, map(jnp.isinf, ratios), jnp.asarray(False))


@functools.partial(_lift.reduction, kind="max")
def _has_pole(_: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (ratios,) = arrays
    return jnp.isinf(ratios)


@jax.jit(static_argnames="statistic")
def _t_of(sums: Array, floor: ScalarLike, statistic: str) -> Array:
    """The `t` of a scope, from inner products of task vectors; at its pole infinite."""
    floor = jnp.asarray(floor).astype(sums.dtype)
    count = next(n for n in range(len(sums) + 1) if n * (n + 1) // 2 == len(sums))
    gram = geometry.symmetric(sums, count)
    norms = [safe_sqrt(gram[i, i]) for i in range(count)]
    safe = [jnp.where(size == 0, 1, size) for size in norms]
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    cosines = jnp.stack([gram[i, j] / safe[i] / safe[j] for i, j in pairs])
    if statistic == "cosine" or count == 2:
        c = jnp.mean(cosines, axis=0)
    else:
        angles = 2 * jnp.arctan2(safe_sqrt(1 - cosines), safe_sqrt(1 + cosines))
        c = jnp.cos(jnp.mean(angles, axis=0))
    c = jnp.where(c < floor, floor, c)
    below = 1 + (count - 1) * c
    still = jnp.all(jnp.stack(norms) == 0, axis=0)
    pole = (below <= 64 * count * jnp.finfo(c.dtype).eps) & ~still
    t = jnp.where(pole, jnp.inf, count * c / jnp.where(pole | still, 1, below))
    return jnp.where(still, 0, t)


@functools.cache
def _ratios_of_rows(statistic: str) -> Callable[..., Weights]:
    """For every entry the `t` of its row."""

    @functools.partial(_lift.elementwise, rounded=False, scope="leaf")
    def ratios_of_rows(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
        (floor,) = scalars
        rows = row_sums(geometry.pairs_from_first((), arrays))
        sums = jnp.stack([jnp.expand_dims(x, -1) if arrays[0].ndim else x for x in rows])
        return jnp.broadcast_to(_t_of(sums, floor, statistic), arrays[0].shape)

    return ratios_of_rows


def _toward_mean(t: Array, base: Array, points: Sequence[Array]) -> Array:
    t = jnp.where(jnp.isinf(t), jnp.nan, t)
    return base + t / len(points) * functools.reduce(jnp.add, [x - base for x in points])


@_lift.elementwise
def _drawn(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (t,), (base, *points) = scalars, arrays
    return _toward_mean(t, base, points)


@_lift.elementwise
def _drawn_by_entry(_: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    base, *points, t = arrays
    return _toward_mean(t, base, points)
