r"""Removing what lies along some directions and keeping what lies along others.

What is removed is a linear function of the weights, so points erased alike average to their average
erased. All is exact but for rounding; where the question is badly conditioned the rounding grows by
the *amplification* $1 / \sin\alpha$, with $\alpha$ the smallest angle between what has to change
and what must not.
"""

import functools
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from wspace import _checks, _lift, geometry, lowrank, tree
from wspace._numerics import (
    accumulator,
    coarsest_eps,
    matmul,
    pseudo_inverse,
    rows_within,
    stored_rounding,
    unstacked,
    with_nan_of,
)
from wspace.lowrank.factors import from_matrix
from wspace.negative.allowance import allowances
from wspace.negative.subspace import KINDS
from wspace.typing import Layout, Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["erase_keeping"]

ErasureMode: TypeAlias = Literal["orthogonal", "oblique"]


@functools.partial(_lift.elementwise, rounded=False)
def _times_number(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (c,), (x,) = scalars, arrays
    return c * x


def _coordinates(
    directions: Sequence[WeightsLike], rounding: float
) -> tuple[list[Weights], Float[Array, "k k"]]:
    """Orthonormal trees, and the directions in unit length as rows of coordinates in them.

    What is left of a direction that the ones before it make up is rounding, and its tree is zero.
    """
    basis: list[Weights] = []
    rows = []
    for x in directions:
        size = tree.norm(x)
        unit = _times_number((1 / jnp.where(size == 0, 1, size),), (x,))
        coefficients, rest = geometry.components(unit, basis)
        left = tree.norm(rest)
        nothing = left <= rounding
        inverse = jnp.where(nothing, 0, 1 / jnp.where(nothing, 1, left))
        basis.append(_times_number((inverse,), (rest,)))
        left = jnp.where(nothing, 0, left)
        zeros = [jnp.zeros_like(left)] * (len(directions) - len(basis))
        rows.append(jnp.stack([*coefficients, left, *zeros]))
    return basis, jnp.stack(rows)


@jax.jit(static_argnames="mode")
def _erased(
    x: Float[Array, "1 m"],
    erase: Float[Array, "p m"],
    keep: Float[Array, "q m"],
    cut: Scalar,
    rounding: Scalar,
    mode: ErasureMode,
) -> tuple[Float[Array, "1 m"], Scalar, Scalar]:
    """What to take away, the least sine of erase against keep, and the share that stays.

    The rounding is that of directions, which have unit length.
    """
    span = rows_within(jnp.eye(x.shape[1], dtype=x.dtype), erase, rounding)
    outside = span - rows_within(span, keep, rounding)
    removed = (
        matmul(x, pseudo_inverse(outside, cut).T)
        if mode == "oblique"
        else rows_within(x, outside, cut)
    )
    removed -= rows_within(removed, keep, rounding)
    sines = jnp.linalg.svd(outside, compute_uv=False)
    rank = jnp.round(jnp.trace(span))
    sine = jnp.min(jnp.where(jnp.arange(len(sines), dtype=x.dtype) < rank, sines, 1))
    whole, left = (tree.norm(matmul(y, span)) for y in (x, x - removed))
    share = left / jnp.where(whole == 0, 1, whole)
    return removed, *jax.lax.stop_gradient((sine, share))


def _whitening(
    inverse_metric: PyTree, point: WeightsLike, layout: Layout
) -> list[tuple[Array, Array]]:
    r"""Per leaf the $F$ with $H^{-1} = F F^\top$, and its inverse: numbers or matrices."""
    (allowed,) = allowances({"inverse_metric": inverse_metric}, layout, [point])
    factors = []
    places = _checks.entries("inverse_metric", inverse_metric, point, KINDS)
    for leaf, (_, _, where) in zip(allowed, places, strict=True):
        scale, root = leaf.scale, leaf.root
        squares = jnp.ones_like(scale) if root is None else jnp.sum(root**2, axis=-2)
        least = scale * jnp.min(squares, initial=1)
        scale = _checks.poisoned(
            scale,
            ~(least > 0),
            lambda where=where: (
                f"{where} is not positive definite: a metric has no directions that are free: "
                "add a small multiple of the identity"
            ),
        )
        size = jnp.sqrt(scale)
        # Columns of the root are orthogonal.
        factors.append(
            (size, 1 / size)
            if root is None
            else (size * root, jnp.swapaxes(root / squares[..., None, :], -1, -2) / size)
        )
    return factors


def _each_times(factors: Sequence[Array], x: Weights, layout: Layout) -> Weights:
    leaves, structure = jax.tree.flatten(x)
    return structure.unflatten(
        f * leaf
        if f.ndim == 0
        else from_matrix(matmul(f, lowrank.as_matrix(leaf, layout=layout)), leaf, layout)
        for f, leaf in zip(factors, leaves, strict=True)
    )


def erase_keeping(
    point: WeightsLike,
    erase: Sequence[WeightsLike],
    keep: Sequence[WeightsLike],
    *,
    mode: ErasureMode = "orthogonal",
    inverse_metric: PyTree | None = None,
    layout: Layout = "in_out",
    rtol: ScalarLike | None = None,
) -> Weights:
    r"""Erases what a point has along some directions, and keeps what it has along others.

    With the directions as columns of $U$ and $K$, and $V = (I - P_K)\, U$,

    $$
    y = x - P_V\, x \quad\text{(orthogonal)}, \qquad
    y = x - V (V^\top V)^{-1} U^\top x \quad\text{(oblique)}
    $$

    | mode | $K^\top y$ | $U^\top y$ | change |
    |---|---|---|---|
    | `"orthogonal"` | $K^\top x$ | $0$ only if $U \perp K$ | never longer than $x$ |
    | `"oblique"` | $K^\top x$ | $0$ | the least of all that do both |

    The oblique change is up to $1 / \sin\alpha$ times as long as $x$, with $\alpha$ the smallest
    angle between the spans of $U$ and $K$. Both are linear in $x$ and idempotent, and depend on
    the two spans alone; if $U \perp K$ both are [`attenuate`][wspace.negative.attenuate] at gain
    $1$. What the oblique one erases and keeps is off by rounding times $1 / \sin\alpha$, the rest
    by rounding times $1 / \sin^2\alpha$.

    In a metric $H$, given by its inverse, what changes is the least in $\langle dx, H\, dx
    \rangle$: with $H^{-1} = F F^\top$, $\tilde U = F^\top U$, $\tilde K = F^\top K$ and
    $\tilde V = (I - P_{\tilde K})\, \tilde U$ the oblique one is

    $$
    y = x - F\, \tilde V (\tilde V^\top \tilde V)^{-1}\, U^\top x
    $$

    and the orthogonal one projects onto the span of $F \tilde V$, orthogonally in $H$. Without
    `keep` both are $x - H^{-1} U (U^\top H^{-1} U)^{-1} U^\top x$. With $x$ a centered
    representation, $H^{-1} = \Sigma_{xx}$ and $U = \Sigma_{xx}^{-1} \Sigma_{xz}$ this is LEACE,
    which leaves no linear trace of $z$ in $x$ at the least mean square change in any metric.

    Known as concept erasure by null-space projection.

    Args:
        point: The weights $x$.
        erase: The directions $U$, trees of the layout of `point`, at least one, of any length.
            Those that are zero, or that others make up, add nothing.
        keep: The directions $K$, of the same layout, possibly none.
        mode: `"orthogonal"` or `"oblique"`.
        inverse_metric: $H^{-1}$, a tree like the weights with, at each leaf, a positive number or
            a symmetric positive definite matrix that acts on the inputs, as `(in, in)` does on
            `x @ W`; the identity if not given. Rounding grows by the square root of its condition
            number.
        layout: How the layers store their matrices, `"in_out"`, as in `x @ W`, or `"out_in"`, as
            torch and equinox do: which inputs are meant,
            [`as_matrix`][wspace.lowrank.as_matrix] says.
        rtol: Directions in the span of `erase` whose sine against `keep` is at most this, between
            0 and 1, count as kept and are not erased; $\sqrt\varepsilon$ if not given, and then
            the oblique mode refuses them.

    Returns:
        The weights $y$, each leaf in the dtype of that leaf of `point`. Derivatives exist where
            `rtol` leaves out nothing but what is wholly within the span of `keep`.

    Raises:
        ValueError: If the mode is oblique without `rtol`, and a direction in the span of `erase` is
            in the span of `keep`, to a sine of $\sqrt\varepsilon$ (NaN if traced): it cannot be
            both erased and kept. Also if the mode is unknown, `rtol` is known and not between
            0 and 1, `inverse_metric` is not symmetric positive definite or does not fit, there is
            nothing to erase, a known value is NaN or infinite, or the trees differ in layout.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import negative
        >>> x = jnp.array([3.0, 3.0, 3.0], jnp.float32)
        >>> erase, keep = [jnp.array([1.0, 1.0, 0.0])], [jnp.array([0.0, 1.0, 1.0])]
        >>> negative.erase_keeping(x, erase, keep).round()
        Array([1., 2., 4.], dtype=float32)
        >>> negative.erase_keeping(x, erase, keep, mode="oblique").round()
        Array([-1.,  1.,  5.], dtype=float32)

    References:
        N. Belrose et al., *LEACE: Perfect linear concept erasure in closed form*, NeurIPS 2023,
        [arXiv:2306.03819](https://arxiv.org/abs/2306.03819). T. Greville, *Solutions of the matrix
        equation XAX = X, and relations between oblique and orthogonal projectors*, SIAM Journal
        on Applied Mathematics 26, 1974.
    """
    _checks.one_of("mode", mode, get_args(ErasureMode))
    _checks.known_layout(layout)
    if rtol is not None:
        rtol = _checks.between("rtol", rtol, 0, 1)
    erase = _checks.listed("erase", erase)
    keep = [] if isinstance(keep, list | tuple) and not keep else _checks.listed("keep", keep)
    trees = {"point": point, **_checks.each("erase", erase), **_checks.each("keep", keep)}
    _checks.same_layout(**trees)
    _checks.finite(**trees)
    white, *directions = tree.in_one_dtype(point, *keep, *erase)
    factors = None if inverse_metric is None else _whitening(inverse_metric, white, layout)
    if factors is not None:
        white = _each_times([inverse for _, inverse in factors], tree.upcast(white), layout)
        across = [jnp.swapaxes(f, -1, -2) if f.ndim else f for f, _ in factors]
        directions = [_each_times(across, tree.upcast(x), layout) for x in directions]
    leaves = jax.tree.leaves((keep, erase))
    wide = accumulator(*(leaf.dtype for leaf in jax.tree.leaves(trees)))
    rounding = stored_rounding(leaves, wide).share
    basis, rows = _coordinates(directions, rounding)
    x = jnp.stack([tree.vdot(q, white) for q in basis])[None]
    least = max(float(jnp.finfo(wide).eps) ** 0.5, coarsest_eps(leaf.dtype for leaf in leaves))
    cut = jnp.asarray(least if rtol is None else rtol).astype(x.dtype)
    known = jnp.asarray(rounding, x.dtype)
    removed, sine, share = _erased(x, rows[len(keep) :], rows[: len(keep)], cut, known, mode)
    removed = _checks.poisoned(
        with_nan_of(removed[0], cut),
        mode == "oblique" and rtol is None and ~(sine > cut),
        lambda: (
            f"erase has a direction within the span of keep, to a sine of {sine:.3g}, which cannot "
            f"be both erased and kept; without it {share:.3g} of what point has along erase would "
            "stay: leave out that direction, give rtol to have it left out, or use "
            'mode="orthogonal"'
        ),
    )
    change = tree.weighted_sum(unstacked(removed), basis)
    if factors is not None:
        change = _each_times([f for f, _ in factors], change, layout)
    return tree.weighted_sum((1, -1), (point, change))
