r"""Merges of task vectors by their singular directions.

A matrix leaf of a task vector, in the sense of [`as_matrix`][wspace.lowrank.as_matrix], is a
sum of singular triples, and models interfere where their singular directions overlap. The
merges here make directions orthonormal or their singular values equal. Both are divisions, by
singular values, so every merge says how small the smallest divisor was, in `trusted`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_leaves_with_path
from jaxtyping import Array, Bool, Float, Int, PyTree

from wspace import _checks, lowrank, tree
from wspace._numerics import accumulator, matmul, placed_like, replicated
from wspace.lowrank.factors import transposed
from wspace.merge.task import added, differences, siblings
from wspace.typing import Coefficients, Scalar, ScalarLike, WeightsLike

__all__ = ["SpectralMerge", "iso_c", "iso_cts", "tsv_m"]


class SpectralMerge(NamedTuple):
    r"""Merged weights, and how well the models determine them.

    Attributes:
        weights: The base plus the merged displacement.
        trusted: The smallest singular value that the merge divided by, relative to the largest of
            the same matrix, over all leaves; $1$ if it divided by none. Models that move by a
            share $\delta$ may move the result by the order of $\delta$ over this number.
    """

    weights: PyTree
    trusted: Scalar


def tsv_m(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: Coefficients | None = None,
    *,
    scale: ScalarLike = 1.0,
    rtol: ScalarLike | None = None,
    least: ScalarLike | None = None,
) -> SpectralMerge:
    r"""Task singular vectors, cut to an equal share for each model and made orthogonal.

    Of every matrix $\tau_i = U_i \Sigma_i V_i^\top$ of the $T$ task vectors the leading $r =
    \lfloor \min(m, n) / T \rfloor$ triples are kept, and the bases replaced by the nearest with
    orthonormal columns:

    $$
    D = \operatorname{polar}(U_1, \dots, U_T)\,
        \operatorname{diag}(c_1 \Sigma_1, \dots, c_T \Sigma_T)\,
        \operatorname{polar}(V_1, \dots, V_T)^\top
    $$

    Linear in the coefficients: negated ones negate the displacement exactly, and a coefficient of
    $0$ takes out what a model adds but keeps its directions occupied. One model comes back to
    rounding. Where the kept directions of the models are orthogonal on both sides, the sum of
    the cut task vectors is returned. A vector or a scalar is the mean of the terms $c_i\,\tau_i$.

    Where directions of two models nearly coincide, the polar factor splits them along their
    difference, which is rounding: two equal models, one of them moved by $10^{-12}$, change the
    formula's result by more than half. Here that is refused, or accepted by `least` and told by
    `trusted`. Apart from that the merge jumps where the $r$-th and the next singular value of a
    model meet, as every cut does.

    Args:
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        coefficients: The $c_i$, one a model, of any sign; ones if not given.
        scale: The number that multiplies the merged displacement.
        rtol: Singular values up to this number in $(0, 1)$ times the largest of their matrix have
            no direction and are left out; $\max(m, n)\,\varepsilon$ if not given. A difference of
            weights that were rounded to half precision has full rank: give the rounding there.
        least: The least `trusted` to accept, in $[0, 1)$; $10^{-5}$ if not given, or
            $\sqrt\varepsilon$ of the arithmetic where that is less. Joined bases that fill a
            square matrix have about $1/m$ by chance; those of layers with units that never act,
            which leave rows of zeros, have less than rounding, and in one direction noise is all
            there is: 0 accepts that.

    Returns:
        A [`SpectralMerge`][wspace.merge.SpectralMerge]: the weights, each leaf in the dtype of that
            leaf of `base`, and the smallest singular value of the concatenated bases. Derivatives
            are not defined where singular values repeat.

    Raises:
        ValueError: If a leaf has fewer singular values than there are models, the directions of
            the models are less independent than `least` (NaN in that leaf if traced), a number is
            known and out of its domain, the counts differ or are zero, a known value is NaN or
            infinite, or the trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> x, y = jnp.diag(jnp.array([4.0, 1.0])), jnp.diag(jnp.array([0.0, 2.0]))
        >>> merge.tsv_m(jnp.zeros((2, 2)), [x, y])
        SpectralMerge(weights=Array([[4., 0.],
               [0., 2.]], dtype=float32), trusted=Array(1., dtype=float32))

    References:
        A. Gargiulo et al., *Task Singular Vectors: Reducing Task Interference in Model Merging*,
        CVPR 2025, section 4, [arXiv:2412.00081](https://arxiv.org/abs/2412.00081).
    """

    def on_matrices(path: str, c: Sequence[Any], taus: list[Array]) -> tuple[Array, Scalar]:
        k = min(taus[0].shape[-2:])
        if k < len(taus):
            raise ValueError(
                f"leaf {path} has {k} singular values for {len(taus)} models, so that none is left "
                "for each: merge fewer models, or that leaf by merge.task_arithmetic"
            )
        return _made_orthogonal(c, taus, _cut(rtol, taus[0]))

    return _merged(on_matrices, base, tuned, coefficients, scale, rtol, least)


@jax.jit
def _made_orthogonal(c: Sequence[Any], taus: list[Array], cut: Scalar) -> tuple[Array, Scalar]:
    rank = min(taus[0].shape[-2:]) // len(taus)
    triples = [_leading(x, rank, cut) for x in taus]
    values = [jnp.asarray(a).astype(cut.dtype) * s for a, (_, s, _) in zip(c, triples, strict=True)]
    left, right, trusted = _isometries(triples)
    return matmul(left * jnp.concatenate(values, -1)[..., None, :], transposed(right)), trusted


def iso_c(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: Coefficients | None = None,
    *,
    scale: ScalarLike = 1.0,
    rtol: ScalarLike | None = None,
) -> SpectralMerge:
    r"""Task arithmetic with a flat spectrum: every singular value becomes their mean.

    $$
    D = \frac{\sigma_1 + \dots + \sigma_k}{k}\, U_k V_k^\top, \qquad
    \sum_i c_i\,\tau_i = U \Sigma V^\top, \qquad k = \#\{j : \sigma_j > \rho\, \sigma_1\}
    $$

    The nuclear norm of every matrix stays. Not the identity for one model, whose spectrum it
    flattens too; applied twice it is applied once. A vector or a scalar is the mean of the terms.
    Zero singular values have no directions that could be raised to the mean, so both the mean and
    the result are taken over the $k$ others: the sum of two adapters stays within their ranks.
    `trusted` is $\sigma_k / \sigma_1$.

    The same spectrum at the Frobenius norm of the edit, not the nuclear one, is
    [`negative.harden`][wspace.negative.harden].

    Args:
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        coefficients: The $c_i$, one a model, of any sign; ones if not given.
        scale: The number that multiplies the merged displacement.
        rtol: The threshold $\rho$ in $(0, 1)$; $\max(m, n)\,\varepsilon$ if not given. A difference
            of weights that were rounded to half precision has full rank: give the rounding there.

    Returns:
        A [`SpectralMerge`][wspace.merge.SpectralMerge]: the weights, each leaf in the dtype of that
            leaf of `base`, and the smallest singular value that was raised. Derivatives are not
            defined where singular values repeat, as they do in the result.

    Raises:
        ValueError: If a number is known and out of its domain, the counts differ or are zero, a
            known value is NaN or infinite, or the trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> x, y = jnp.diag(jnp.array([4.0, 1.0])), jnp.diag(jnp.array([1.0, 0.0]))
        >>> merge.iso_c(jnp.zeros((2, 2)), [x, y]).weights
        Array([[3., 0.],
               [0., 3.]], dtype=float32)

    References:
        D. Marczak et al., *No Task Left Behind: Isotropic Model Merging with Common and
        Task-Specific Subspaces*, ICML 2025, section 4,
        [arXiv:2502.04959](https://arxiv.org/abs/2502.04959).
    """

    def on_matrices(_: str, c: Sequence[Any], taus: list[Array]) -> tuple[Array, Scalar]:
        return _flattened(tree.combine(c, taus), _cut(rtol, taus[0]))

    return _merged(on_matrices, base, tuned, coefficients, scale, rtol, 0.0)


@jax.jit
def _flattened(x: Array, cut: Scalar) -> tuple[Array, Scalar]:
    u, s, v = _leading(x, min(x.shape[-2:]), cut)
    count = _count(s)
    level = jnp.sum(s, axis=-1) / jnp.maximum(count, 1).astype(s.dtype)
    return level[..., None, None] * matmul(u, transposed(v)), _least_of(s, count)


def iso_cts(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: Coefficients | None = None,
    *,
    common: ScalarLike = 0.8,
    scale: ScalarLike = 1.0,
    rtol: ScalarLike | None = None,
    least: ScalarLike | None = None,
) -> SpectralMerge:
    r"""A flat spectrum over directions that the models share, and some that each has alone.

    Of the sum of the terms $c_i\,\tau_i$ the leading $c$ triples $U_0 \Sigma_0 V_0^\top$ are
    kept, and of every term the leading $s$ of what they leave, $(I - U_0 U_0^\top)\, c_i\,\tau_i =
    U_i \Sigma_i V_i^\top$. With $\bar\sigma$ the mean of all $c + T s$ singular values kept,

    $$
    D = \bar\sigma \operatorname{polar}(U_0, U_1, \dots, U_T)\,
        \operatorname{polar}(V_0, V_1, \dots, V_T)^\top
    $$

    For $f$, the common share, and $k = \min(m, n)$, the $s$ of each model is
    $(k - \lfloor f k \rfloor) / T$ rounded to the nearest integer, but at most $\lfloor k / T
    \rfloor$, and $c = k - T s$. With $f = 1$, with one model, and where a matrix has too few
    directions to give each model one, it is [`iso_c`][wspace.merge.iso_c]. A vector or a scalar is
    the mean of the terms.

    Args:
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        coefficients: The $c_i$, one a model, of any sign; ones if not given.
        common: The share $f$ of common directions, in $[0, 1]$.
        scale: The number that multiplies the merged displacement.
        rtol: Singular values up to this number in $(0, 1)$ times the largest of the sum, or of the
            term, have no direction and are left out, of the mean too; $\max(m, n)\,\varepsilon$
            if not given.
        least: The least `trusted` to accept, in $[0, 1)$, as for [`tsv_m`][wspace.merge.tsv_m];
            $10^{-5}$ or $\sqrt\varepsilon$ of the arithmetic if not given.

    Returns:
        A [`SpectralMerge`][wspace.merge.SpectralMerge]: the weights, each leaf in the dtype of that
            leaf of `base`, and the smallest singular value of the concatenated bases. Derivatives
            are not defined where singular values repeat.

    Raises:
        ValueError: If the directions are less independent than `least` (NaN in that leaf if
            traced), a number is known and out of its domain, the counts differ or are zero, a
            known value is NaN or infinite, or the trees differ in structure or in a leaf's shape.
        TypeError: If `common` is traced, since it decides shapes, or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> x, y = jnp.diag(jnp.array([4.0, 1.0, 0.0])), jnp.diag(jnp.array([4.0, 0.0, 3.0]))
        >>> merge.iso_cts(jnp.zeros((3, 3)), [x, y], common=0.4).weights.diagonal()
        Array([4., 4., 4.], dtype=float32)

    References:
        D. Marczak et al., *No Task Left Behind: Isotropic Model Merging with Common and
        Task-Specific Subspaces*, ICML 2025, section 4,
        [arXiv:2502.04959](https://arxiv.org/abs/2502.04959).
    """
    if _checks.is_traced(common):
        raise TypeError("common decides shapes, so it must be a plain number, not a traced one")
    share: Any = _checks.scalar("common", common, lambda f: 0 <= f <= 1, "from 0 to 1")

    def on_matrices(_: str, c: Sequence[Any], taus: list[Array]) -> tuple[Array, Scalar]:
        k, count = min(taus[0].shape[-2:]), len(taus)
        own = min(round((k - math.floor(float(share) * k)) / count), k // count)
        terms = [tree.combine((a,), (x,)) for a, x in zip(c, taus, strict=True)]
        return _shared_and_own(terms, tree.combine(c, taus), _cut(rtol, taus[0]), own)

    return _merged(on_matrices, base, tuned, coefficients, scale, rtol, least)


@functools.partial(jax.jit, static_argnames="own")
def _shared_and_own(
    terms: list[Array], total: Array, cut: Scalar, own: int
) -> tuple[Array, Scalar]:
    shared = min(total.shape[-2:]) - own * len(terms)
    triples = [_leading(total, shared, cut)]
    u, _, _ = triples[0]
    for term in terms:
        rest = term - matmul(u, matmul(transposed(u), term))
        largest = lowrank.singular_values(term)[..., :1]
        triples.append(_leading(rest, own, cut, largest))
    values = jnp.concatenate([s for _, s, _ in triples], -1)
    level = jnp.sum(values, axis=-1) / jnp.maximum(_count(values), 1).astype(values.dtype)
    left, right, trusted = _isometries(triples)
    return level[..., None, None] * matmul(left, transposed(right)), trusted


def _merged(
    on_matrices: Callable[[str, Sequence[Any], list[Array]], tuple[Array, Scalar]],
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: Coefficients | None,
    scale: ScalarLike,
    rtol: ScalarLike | None,
    least: ScalarLike | None,
) -> SpectralMerge:
    tuned, c = siblings(base, tuned, coefficients)
    _checks.finite(base=base, **_checks.each("tuned", tuned))
    if rtol is not None:
        rtol = _checks.scalar("rtol", rtol, lambda x: (x > 0) & (x < 1), "between 0 and 1")
    taus = differences(base, tuned)
    wide = accumulator(*(x.dtype for x in jax.tree.leaves(taus)))
    if least is None:
        least = min(float(jnp.finfo(wide).eps) ** 0.5, 1e-5)
    least = _checks.scalar("least", least, lambda x: (x >= 0) & (x < 1), "at least 0 and below 1")
    least = jnp.asarray(least).astype(wide)
    nan_if_outside = 0 * jnp.asarray(0 if rtol is None else rtol).astype(wide)
    leaves, structure = jax.tree.flatten(base)
    paths = [keystr(path) or "(root)" for path, _ in tree_leaves_with_path(base)]
    merged, certificates = [], [jnp.ones((), wide)]
    for path, leaf, *displaced in zip(paths, leaves, *map(jax.tree.leaves, taus), strict=True):
        if leaf.ndim < 2 or not leaf.size:
            merged.append(tree.combine([a / len(c) for a in c], displaced))
            continue
        edit, trusted = on_matrices(path, c, [replicated(lowrank.as_matrix(x)) for x in displaced])
        undefined = _checks.refuse(
            ~(trusted >= least),
            lambda path=path, trusted=trusted: (
                f"directions of the models nearly coincide at leaf {path}: the smallest singular "
                f"value of their bases is {trusted:.2g} of the largest, less than {least:.2g}, and "
                "rounding would decide the result: first average models that are nearly equal, "
                "or take iso_c, or accept it by a smaller `least`"
            ),
        )
        merged.append(
            placed_like((edit + undefined + nan_if_outside).reshape(leaf.shape), displaced[0])
        )
        certificates.append(trusted)
    weights = added(base, structure.unflatten(merged), scale)
    return SpectralMerge(weights, jnp.min(jnp.stack(certificates)))


def _cut(rtol: ScalarLike | None, x: Array) -> Scalar:
    relative = max(x.shape[-2:]) * float(jnp.finfo(x.dtype).eps) if rtol is None else rtol
    return jnp.asarray(relative).astype(x.dtype)


def _leading(
    x: Array, rank: int, cut: Scalar, largest: Float[Array, "... 1"] | None = None
) -> tuple[Array, Array, Array]:
    """The leading singular triples of matrices, zero where the value is up to `cut * largest`."""
    u, s, vt = jnp.linalg.svd(x, full_matrices=False)
    gone = s <= cut * (s[..., :1] if largest is None else largest)  # NaN stays
    u, s, v, gone = u[..., :rank], s[..., :rank], transposed(vt)[..., :rank], gone[..., :rank]
    return (
        jnp.where(gone[..., None, :], 0, u),
        jnp.where(gone, 0, s),
        jnp.where(gone[..., None, :], 0, v),
    )


def _count(values: Float[Array, "... k"]) -> Int[Array, "..."]:
    return jnp.sum(values != 0, axis=-1, dtype=jnp.int32)


def _first(count: Int[Array, "..."], size: int) -> Bool[Array, "... k"]:
    """The mask of the first `count` of `size` places."""
    places = jax.lax.broadcasted_iota(jnp.int32, (*count.shape, size), count.ndim)
    return places < count[..., None]


def _least_of(values: Float[Array, "... k"], count: Int[Array, "..."]) -> Scalar:
    """The smallest of the first `count` values, relative to the first, over a stack."""
    kept = _first(count, values.shape[-1])
    smallest = jnp.min(jnp.where(kept, values, jnp.inf), axis=-1)
    none = count == 0
    return jnp.min(jnp.where(none, 1, smallest / jnp.where(none, 1, values[..., 0])))


def _isometries(triples: list[tuple[Array, Array, Array]]) -> tuple[Array, Array, Scalar]:
    """The polar factors of both concatenated bases, and the smallest singular value of either."""
    lefts, values, rights = (jnp.concatenate(parts, -1) for parts in zip(*triples, strict=True))
    count = _count(values)
    (left, one), (right, other) = (_isometry(basis, count) for basis in (lefts, rights))
    return left, right, jnp.minimum(one, other)


def _isometry(basis: Float[Array, "... m k"], count: Int[Array, "..."]) -> tuple[Array, Scalar]:
    """The polar factor of a basis of which `count` columns are not zero."""
    u, s, vt = jnp.linalg.svd(basis, full_matrices=False)
    kept = _first(count, s.shape[-1])[..., None, :]
    return matmul(jnp.where(kept, u, 0), vt), _least_of(s, count)
