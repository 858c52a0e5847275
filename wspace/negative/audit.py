r"""What a guard is worth against edits of the average: margins, ranks and budgets, all exact.

Of the displacement $E = M - b$ of the average from the point to avoid, the singular values of the
leaves and the radius $\rho$ decide which additive edits get back into the ball, and at what price.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.tree_util import tree_leaves_with_path
from jaxtyping import Array, Bool, Float, Int, PyTree

from wspace import _checks, geometry, lowrank, tree
from wspace._numerics import safe_sqrt, with_nan_of
from wspace.cone.budgets import threshold
from wspace.cone.spectra import Spectra, pooled, ratio, spectra_of
from wspace.lowrank.factors import as_matrix, matrix_shape, other_side, product
from wspace.lowrank.spectrum import effective_rank_of, stable_rank_of, tail_curve
from wspace.negative.nearest import nearest_in, rounding_of, seen_from
from wspace.negative.offset import curve_of, first_within
from wspace.negative.report import Audit, LeafAudit
from wspace.negative.sources import finite_length, sources
from wspace.typing import Coefficients, Layout, Leaf, Scalar, ScalarLike, WeightsLike

__all__ = ["audit"]


@_checks.of_points
def audit(
    points: Sequence[WeightsLike],
    coefficients: Coefficients,
    avoid: WeightsLike,
    radius: ScalarLike,
    *,
    activations: PyTree | None = None,
    layout: Layout = "in_out",
    aligned: Sequence[WeightsLike] | None = None,
) -> Audit:
    r"""How far an average is from a ball around a point to avoid, by every price of an edit.

    With $E = \sum_i a_i x_i - b$, $e = \lVert E \rVert$, and of the singular values of all leaves
    the norm $e_r$ of the $r$ largest and $\operatorname{tail}_r$ of the others, an edit $D$ of the
    average with pooled rank $r$ and norm $d$ leaves

    $$
    \lVert E + D \rVert \ge \sqrt{\operatorname{tail}_r^2 + \max(e_r - d, 0)^2}
    $$

    and reaches $\rho$ if and only if $\operatorname{tail}_r \le \rho$ and
    $d \ge e_r - \sqrt{\rho^2 - \operatorname{tail}_r^2}$. All figures are exact values of such
    problems, not estimates. Scaling all points and the radius scales distances and budgets and
    leaves ranks; translations, permutations and rotations leave the report unchanged, and a larger
    radius raises no budget and no rank.

    A certificate about additive edits towards the declared point. It certifies a distance, not
    safety: read beside it what the model does.

    Args:
        points: The $x_i$, trees of one layout, at least one.
        coefficients: The $a_i$, one a point, of any sign; divided by their sum.
        avoid: The center $b$ of the ball, of the same layout.
        radius: Its radius $\rho \ge 0$.
        activations: The inputs `(n, in)` of layers, one a row, for tails that see the data: a tree
            like the weights with, at each leaf, such a matrix for a matrix leaf (for a
            convolution, its patches), or None.
        layout: How the layers store their matrices, `"in_out"`, as in `x @ W`, or `"out_in"`, as
            torch and equinox do: which inputs are meant,
            [`as_matrix`][wspace.lowrank.as_matrix] says.
        aligned: The points after an alignment with one another, such as a permutation of hidden
            units, if there is one: a guard that only permutes is gone in their average.

    Returns:
        An [`Audit`][wspace.negative.Audit].

    Raises:
        ValueError: If a known value is NaN or infinite, which names the leaf, or squares of norms
            leave the range of the dtype (the report is NaN and its ranks -1 if traced); if `radius`
            is known and negative or not finite; if activations do not fit their leaf; for the
            coefficients that
            [`retarget`][wspace.negative.retarget] refuses, or trees of different layout.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import negative
        >>> points = [jnp.diag(jnp.array([9.0, 4.0])), jnp.diag(jnp.array([7.0, 8.0]))]
        >>> report = negative.audit(points, (0.5, 0.5), jnp.zeros((2, 2)), 7.0)
        >>> report.distance, report.margin, report.rank_needed
        (Array(10., dtype=float32), Array(3., dtype=float32), Array(1, dtype=int32))
    """
    points = _checks.listed("points", points)
    _checks.known_layout(layout)
    given = {} if aligned is None else _checks.each("aligned", _checks.listed("aligned", aligned))
    _checks.same_layout(**_checks.each("points", points), avoid=avoid, **given)
    if aligned is not None and len(given) != len(points):
        raise ValueError(
            f"aligned has {len(given)} trees for {len(points)} points: give each point aligned"
        )
    radius = _checks.nonnegative("radius", radius)
    seen = sources(points, avoid, coefficients, None)
    a, distance = _checks.unpacked(seen.a), seen.distance
    finite_length(distance, points, avoid=avoid)
    dtype = distance.dtype
    ends = [*points, avoid]
    norms = jnp.stack(tree.widened(*map(tree.norm, ends)))
    lost = geometry.lost_squares(norms**2, ends)
    # Beside one that is measured, what the others lost is rounding.
    unmeasured = (jnp.any(lost) & jnp.all(lost | (norms == 0))) | ~jnp.isfinite(distance)
    undefined = _checks.measured(unmeasured, points, dtype)
    distance = distance + undefined
    radius = with_nan_of(jnp.asarray(radius).astype(dtype), distance)
    mean = tree.combine(a, points, rounded=False)
    size, floor = tree.norm(mean), geometry.distance(mean, tree.cast_like(mean, points[0]))
    apart = tree.combine((1, -1), (mean, avoid), rounded=False)
    inputs = _inputs_of(activations, apart, layout)
    # Others have the singular values of their transposes.
    kernels = jax.tree.map(lambda x: as_matrix(x, layout=layout) if x.ndim > 3 else x, apart)
    spectra = spectra_of(kernels)
    leaves = _leaf_audits(apart, layout, spectra, radius, inputs)
    del mean, apart, kernels  # each as large as a point, and so are the directions below
    rounding = rounding_of([jnp.max(norms)])
    columns = seen_from(points, avoid, rounding).columns
    realigned = None
    if given:
        realigned = tree.norm(tree.combine((*a, -1), (*given.values(), avoid), rounded=False))
        finite_length(realigned, points, **given)

    values = jnp.sort(pooled(spectra).astype(dtype) + undefined, descending=True)
    tails, kept = safe_sqrt(tail_curve(values)), safe_sqrt(_heads(values))
    leafwise = curve_of(spectra).astype(dtype) + undefined
    outside = distance > radius
    nothing = with_nan_of(jnp.zeros((), dtype), radius)
    margin = jnp.where(outside, distance - radius, nothing)
    needed, ceiling = first_within(leafwise, radius), _ceiling(spectra, radius, outside)
    shares = jnp.abs(jnp.stack([jnp.asarray(w).astype(dtype) for w in a]))
    return Audit(
        radius=radius,
        distance=distance,
        margin=margin,
        tail_curve=tails,
        leafwise_curve=leafwise,
        rank_needed=needed,
        pooled_rank_needed=first_within(tails, radius),
        frobenius_budget=_entry_budget(kept, tails, radius),
        spectral_budget=jnp.where(outside, _cap_needed(values, radius), nothing),
        nuclear_budget=_nuclear_budget(spectra, radius),
        ceiling=ceiling,
        efficiency=with_nan_of(ratio(needed.astype(dtype), ceiling.astype(dtype)), radius),
        segment_distance=nearest_in(columns, rounding, "convex")[1] + undefined,
        line_distance=nearest_in(columns, rounding, "affine")[1] + undefined,
        source_budgets=jnp.where((shares == 0) & outside, jnp.inf, ratio(margin, shares)),
        dtype_floor=floor,
        average_norm=size,
        amplification=jnp.sum(shares),
        aligned_distance=realigned,
        aligned_margin=None if realigned is None else jnp.maximum(realigned - radius, 0),
        leaves=leaves,
    )


def _heads(values: Float[Array, " n"]) -> Float[Array, " n+1"]:
    r"""$\sum_{i \le r} \sigma_i^2$ for r = 0, 1, ..., n."""
    return jnp.concatenate([jnp.zeros(1, values.dtype), jnp.cumsum(values**2)])


def _entry_budget(
    kept: Float[Array, " ranks"], tails: Float[Array, " ranks"], radius: Scalar
) -> Float[Array, " ranks"]:
    """The least norm that reaches the radius by rank 0, 1, 2, ...: `cone.entry` at every rank."""
    size = tails[0]
    feasible = tails <= radius
    root = safe_sqrt(jnp.where(feasible, (radius - tails) * (radius + tails), 0))
    budget = ratio((size - radius) * (size + radius), kept + root)
    budget = jnp.where(size > radius, jnp.where(feasible, budget, jnp.inf), 0)
    return with_nan_of(budget, size, radius)


def _cap_needed(values: Float[Array, " n"], radius: Scalar) -> Scalar:
    r"""The $s$ with $\sum_i \max(\sigma_i - s, 0)^2 = \rho^2$, from descending values.

    With $G_j = \sum_{i \le j} (\sigma_i - \sigma_j)^2$ and $T_j = \sum_{i \le j} (\sigma_i -
    \sigma_j)$, both sums of positive terms, it lies $\delta$ below the last $\sigma_j$ with
    $G_j < \rho^2$, where $G_j + 2 \delta T_j + j \delta^2 = \rho^2$.
    """
    if not values.size:
        return jnp.zeros((), values.dtype)
    counts = jnp.arange(1, values.size + 1, dtype=values.dtype)
    drops = values[:-1] - values[1:]
    start = jnp.zeros(1, values.dtype)
    first = jnp.concatenate([start, jnp.cumsum(counts[:-1] * drops)])
    second = jnp.cumsum(2 * drops * first[:-1] + counts[:-1] * drops**2)
    second = jnp.concatenate([start, second])
    last = jnp.maximum(jnp.sum(second < radius**2) - 1, 0)
    gap = jnp.maximum(radius**2 - second[last], 0)
    below = ratio(gap, first[last] + safe_sqrt(first[last] ** 2 + counts[last] * gap))
    return with_nan_of(jnp.maximum(values[last] - below, 0), radius)


def _nuclear_budget(spectra: Spectra, radius: Scalar) -> Scalar:
    values = pooled(spectra)
    if not values.size:
        return 0 * radius
    return jnp.sum(jnp.maximum(values - threshold(spectra, radius).astype(values.dtype), 0))


def _ceiling(spectra: Spectra, radius: Scalar, outside: Bool[Array, ""]) -> Int[Array, ""]:
    """The rank at which the flattest spectra of the same norms would be within the radius."""
    longest = max((s.shape[-1] for s in spectra), default=0)
    ranks = jnp.arange(longest + 1, dtype=radius.dtype)
    left = jnp.zeros_like(ranks)
    for s in spectra:
        if s.size:
            part = jnp.maximum(s.shape[-1] - ranks, 0) / s.shape[-1]
            left += jnp.sum(s**2).astype(radius.dtype) * part
    return jnp.where(outside | jnp.isnan(radius), first_within(safe_sqrt(left), radius), 0)


def _inputs_of(activations: PyTree | None, weights: PyTree, layout: Layout) -> list[Leaf | None]:
    """Per leaf the inputs of its layer, or None."""
    if activations is None:
        return [None] * len(jax.tree.leaves(weights))
    kinds = "a matrix (n, in) or None at each leaf"
    places = _checks.entries(
        "activations", activations, weights, kinds, is_leaf=lambda x: x is None
    )
    for x, leaf, where in places:
        if x is None:
            continue
        _checks.floating_leaves(**{where: x})
        inputs = matrix_shape(leaf.shape, layout)[-2] if leaf.ndim > 1 else None
        if leaf.ndim == 3 or x.ndim != 2 or x.shape[-1] != inputs:
            raise ValueError(
                f"{where} has shape {x.shape} for a leaf of shape {leaf.shape}: give the inputs of "
                "one matrix, one a row (n, in), and None for vectors and stacks"
                f"{other_side(x.shape, leaf.shape, layout)}"
            )
        _checks.finite(**{where: x})
    return [x for x, _, _ in places]


def _leaf_audits(
    apart: PyTree,
    layout: Layout,
    spectra: Spectra,
    radius: Scalar,
    inputs: list[Leaf | None],
) -> tuple[LeafAudit, ...]:
    leaves = tree_leaves_with_path(apart)
    if not leaves:
        return ()
    # What the other leaves hold, added up from both sides, since a difference would cancel.
    sizes = [jnp.sum(s**2).astype(radius.dtype) for s in spectra]
    before, after = [0 * radius], [0 * radius]
    for left, right in zip(sizes[:-1], sizes[:0:-1], strict=True):
        before.append(before[-1] + left)
        after.append(after[-1] + right)
    others = [x + y for x, y in zip(before, reversed(after), strict=True)]
    audits = []
    for (path, leaf), s, rest, x in zip(leaves, spectra, others, inputs, strict=True):
        alone = safe_sqrt(tail_curve(s).astype(radius.dtype) + rest)
        needed = first_within(alone, radius)
        data = None
        if x is not None:
            seen = product(x, as_matrix(leaf, layout=layout))
            data = safe_sqrt(tail_curve(lowrank.singular_values(seen)))
        audits.append(
            LeafAudit(
                path=_checks.path_of(path),
                shape=leaf.shape,
                matrix_shape=matrix_shape(leaf.shape, layout) if leaf.ndim > 1 else (leaf.size, 1),
                distance=tree.norm(leaf),
                singular_values=s,
                rank_needed=jnp.where(needed == alone.size, -1, needed),
                stable_rank=stable_rank_of(s),
                effective_rank=effective_rank_of(s),
                data_tail=data,
            )
        )
    return tuple(audits)
