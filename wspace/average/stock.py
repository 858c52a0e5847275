r"""Model Stock: how far to go from a base towards the mean of models tuned from it."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from wspace import _checks, _lazy, _padding
from wspace import _products as products
from wspace._numerics import accumulator, safe_sqrt
from wspace.typing import ScalarLike, Weights, WeightsLike

__all__ = ["model_stock"]

PRESETS: dict[str | None, dict[str, Any]] = {
    None: {"statistic": "angle", "scope": "tree", "floor": 0.0},
    "mergekit-0.1.5": {"statistic": "cosine", "scope": "leaf", "floor": -1.0},
    "fusionbench": {"statistic": "angle", "scope": "leaf", "floor": -1.0},
}


@_padding.few_programs
def model_stock(
    base: WeightsLike,
    points: Sequence[WeightsLike],
    *,
    preset: str | None = None,
    statistic: str | None = None,
    scope: str | None = None,
    floor: ScalarLike | None = None,
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

    Presets set the options as these systems do: `"mergekit-0.1.5"`, whose `filter_wise` is
    `scope="row"`, and `"fusionbench"`.

    Args:
        base: The weights $\theta_0$.
        points: The $\theta_i$, $N \ge 2$ trees of the layout of `base`.
        preset: The system whose options to take where none are given.
        statistic: `"angle"` (the default) or `"cosine"`. A task vector that is zero is taken as
            orthogonal to the others.
        scope: What has one $t$: the `"tree"` (the default), each `"leaf"`, or each `"row"`, the
            last axis of a leaf.
        floor: The least $c$ to take, 0 by default, so that task vectors that point away from each
            other leave the base. With -1, as in the presets, such a $c$ goes beyond the base, away
            from the mean.

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
    options = _checks.settings(PRESETS, preset, statistic=statistic, scope=scope, floor=floor)
    _checks.one_of("statistic", options.statistic, ["angle", "cosine"])
    _checks.one_of("scope", options.scope, ["tree", "leaf", "row"])
    floor = _checks.scalar("floor", options.floor, lambda c: (c >= -1) & (c <= 1), "in [-1, 1]")

    leaves, structure = jax.tree.flatten(base)
    rows = [leaves, *map(jax.tree.leaves, points)]
    wide = accumulator(*(leaf.dtype for row in rows for leaf in row))
    if options.scope == "tree":
        sums = products.sums(products.pairs_from_first, [base, *points])
        ratios = [_ratios(sums, floor, options.statistic)] * len(leaves)
    else:
        ratios = []
        for group in zip(*rows, strict=True):
            if options.scope == "leaf" or not group[0].ndim:
                sums = products.sums(products.pairs_from_first, group)
            else:
                found = products.leaf_row_sums(products.pairs_from_first, group, wide)
                sums = jnp.stack([jnp.expand_dims(x, -1) for x in found])
            ratios.append(_ratios(sums, floor, options.statistic))
    # After all sums are asked for, as to look at one waits for it.
    _checks.refuse(
        not _checks.is_traced(ratios) and any(bool(pole) for _, pole in ratios),
        lambda: "task vectors of points cancel, where t has its pole: take floor=0.0",
    )
    groups = zip(*rows, strict=True)
    drawn = _drawn_by_row if options.scope == "row" else _drawn
    mixed = [drawn(t, group) for (t, _), group in zip(ratios, groups, strict=True)]
    return structure.unflatten(mixed)


@jax.jit(static_argnames="statistic")
def _ratios(sums: Array, floor: ScalarLike, statistic: str) -> tuple[Array, Bool[Array, ""]]:
    """The `t` of every scope, from products of deltas, NaN at its pole; whether one is there."""
    floor = jnp.asarray(floor).astype(sums.dtype)
    count = next(n for n in range(len(sums) + 1) if n * (n + 1) // 2 == len(sums))
    gram = products.symmetric(sums, count)
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
    t = jnp.where(pole, jnp.nan, count * c / jnp.where(pole | still, 1, below))
    return jnp.where(still, 0, t), jnp.any(pole)


@jax.jit
def _drawn_leaf(t: Array, leaves: Sequence[Array]) -> Array:
    base, *points = (leaf.astype(t.dtype) for leaf in leaves)
    total = functools.reduce(jnp.add, [x - base for x in points])
    return (base + t / len(points) * total).astype(leaves[0].dtype)


_drawn, _drawn_by_row = (
    _lazy.entrywise(lambda _, leaves: leaves[0].dtype, in_pieces=in_pieces)(kernel)
    for in_pieces, kernel in ((True, _padding.entrywise()(_drawn_leaf)), (False, _drawn_leaf))
)
