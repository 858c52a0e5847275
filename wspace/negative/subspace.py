r"""Removing a subspace.

What is removed is a linear function of the weights, so points attenuated alike average to their
average attenuated.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from wspace import _checks, _lift, geometry, lowrank, tree
from wspace._numerics import (
    accumulator,
    matmul,
    plus,
    replicated,
    unstacked,
)
from wspace._records import record
from wspace._words import described
from wspace.lowrank.factors import from_matrix, matrix_shape
from wspace.typing import Layout, Leaf, Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["Sides", "attenuate"]


@record
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sides:
    r"""A subspace of weights, by leaf: of the inputs of `x @ W`, of its outputs, or of both.

    $$
    P X = Q_L Q_L^\top\, X\, Q_R Q_R^\top
    $$

    Each side is a tree like the weights with, at each leaf, `1.0` (all of it), `0.0` (nothing, so
    that the leaf stays), or an orthonormal matrix, whose columns span a part of that side. A
    convolution is the matrix that [`as_matrix`][wspace.lowrank.as_matrix] makes of it; for a
    stack of matrices give one for all, or a stack. A vector or a scalar is `1.0` or `0.0`.

    Args:
        rows: The $Q_L$ of the inputs, `(in, k)`; all of every leaf if not given.
        columns: The $Q_R$ of the outputs, `(out, k)`; all of every leaf if not given.
    """

    rows: PyTree | None = None
    columns: PyTree | None = None


KINDS = "a number or a matrix at each leaf"
"""What a tree has that says something of one side of every leaf."""


def _side(entry: Any, leaf: Leaf, where: str, axis: int, layout: Layout) -> Array:
    """The part of one side of a leaf in the subspace: 1, 0 or an orthonormal matrix."""
    number = isinstance(entry, int | float) or getattr(entry, "shape", None) == ()
    if not number and not _checks.is_weight(entry):
        raise TypeError(
            f"{where} is {described(entry)}: give 1.0 (all), 0.0 (nothing) or an orthonormal matrix"
        )
    if number:
        whole = _checks.scalar(where, entry, lambda p: (p == 0) | (p == 1), "1 (all) or 0 (none)")
        return jnp.asarray(whole).astype(accumulator(leaf.dtype))
    if leaf.ndim < 2:
        raise ValueError(
            f"{where} is a matrix, but the leaf of shape {leaf.shape} is none: "
            "give 1.0 (all of it) or 0.0 (nothing)"
        )
    *stack, rows, columns = matrix_shape(leaf.shape, layout)
    size, side = ((rows, "inputs"), (columns, "outputs"))[axis]
    if entry.shape[:-1] not in ((size,), (*stack, size)):
        raise ValueError(
            f"{where} has shape {entry.shape} for a leaf of shape {leaf.shape}: its columns are "
            f"directions of the {side} of the leaf's matrix, so it must be ({size}, k)"
            f"{_checks.in_other_layout(layout, entry.shape[-2:-1] == ((columns, rows)[axis],))}"
        )
    given = replicated(jnp.asarray(entry))
    q = given.astype(accumulator(leaf.dtype))
    return _checks.where_orthonormal(q, matmul(jnp.swapaxes(q, -1, -2), q), [given.dtype], where)


def _sided(x: Array, left: Array, right: Array, layout: Layout) -> Array:
    if left.ndim == right.ndim == 0:
        return left * right * x
    part = lowrank.as_matrix(x, layout=layout)
    part = left * part if left.ndim == 0 else _spanned(left, part)
    part = jnp.swapaxes(part, -1, -2)
    part = right * part if right.ndim == 0 else _spanned(right, part)
    return from_matrix(jnp.swapaxes(part, -1, -2), x, layout)


def _spanned(q: Float[Array, "... m k"], x: Float[Array, "... m n"]) -> Float[Array, "... m n"]:
    return matmul(q, matmul(jnp.swapaxes(q, -1, -2), x))


def attenuate(
    point: WeightsLike,
    basis: Sequence[WeightsLike] | Sides,
    gain: ScalarLike,
    *,
    center: WeightsLike | None = None,
    layout: Layout = "in_out",
) -> Weights:
    r"""Scales the part of a point in a subspace.

    Known as null-space projection (INLP) and weight orthogonalization, at gain $1$.

    $$
    y = x - g\, P (x - c)
    $$

    Gain $1$ removes the part, $2$ reflects it, a negative gain amplifies it, $0$ changes nothing,
    bit for bit. Gain $1$ is idempotent, gain $2$ its own inverse, and gains $g$ and then $h$ are
    gain $g + h - g h$. With $\lVert y - c \rVert^2 = \lVert (I - P)(x - c) \rVert^2 + (1 - g)^2
    \lVert P (x - c) \rVert^2$ the distance from $c$ never grows if and only if $0 \le g \le 2$.
    It commutes with averages, and depends on the span alone, not on the basis.

    Weight orthogonalization, or *direction removal*, is gain $1$ with a `columns` of one column
    $d$: no output of `x @ W` has a part along $d$ any more.

    Args:
        point: The weights $x$.
        basis: What spans the subspace: orthonormal trees of the layout of `point`, such as
            [`orthonormalize`][wspace.geometry.orthonormalize] returns, where $P$ acts on all
            weights as one vector; or [`Sides`][wspace.negative.Sides], where it acts leaf by leaf.
        gain: The gain $g$, any real number.
        center: The weights $c$ that stay where they are; zero if not given.
        layout: How the layers store their matrices, `"in_out"`, as in `x @ W`, or `"out_in"`, as
            torch and equinox do: `rows` of [`Sides`][wspace.negative.Sides] are the inputs in both,
            as [`as_matrix`][wspace.lowrank.as_matrix] says.

    Returns:
        The weights $y$, each leaf in the dtype of that leaf of `point`.

    Raises:
        ValueError: If the basis is empty or not orthonormal, its inner products off by more than
            $64\,\varepsilon$ of the arithmetic and $2\,\varepsilon$ of its own dtype (NaN if
            traced); if a side does not fit its leaf, is a number other than 0 and 1, or neither
            side is given; if a known value is NaN or infinite, or the trees differ in layout.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import negative, tree
        >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]], jnp.float32)
        >>> negative.attenuate(x, negative.Sides(columns=jnp.array([[0.0], [1.0]])), 1.0)
        Array([[1., 0.],
               [3., 0.]], dtype=float32)
        >>> negative.attenuate(x, [x / tree.norm(x)], 2.0).round()
        Array([[-1., -2.],
               [-3., -4.]], dtype=float32)

    References:
        S. Ravfogel et al., *Null It Out: Guarding Protected Attributes by Iterative Nullspace
        Projection*, ACL 2020, [arXiv:2004.07667](https://arxiv.org/abs/2004.07667).
    """
    gain = _checks.scalar("gain", gain)
    _checks.known_layout(layout)
    trees = {"point": point} | ({} if center is None else {"center": center})
    vectors = [] if isinstance(basis, Sides) else _checks.listed("basis", basis)
    _checks.same_layout(**trees, **_checks.each("basis", vectors))
    _checks.finite(**trees)
    if isinstance(basis, Sides):
        return _sided_away(basis, gain, list(trees.values()), layout)
    gram = geometry.inner_products(vectors)
    gain = jnp.asarray(gain).astype(gram.dtype)
    stored = [leaf.dtype for leaf in jax.tree.leaves(vectors)]
    gain = _checks.where_orthonormal(gain, gram, stored, "basis")
    parts = _parts(len(vectors))((), [*vectors, *trees.values()])
    gain = gain.astype(parts.dtype)
    return _attenuated([-gain * part for part in unstacked(parts)], [point, *vectors])


@functools.cache
def _parts(count: int) -> Callable[..., Array]:
    """The inner products of a basis with a point, less the center if there is one."""

    @_lift.reduction
    def parts(_: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
        basis, (x, *center) = arrays[:count], arrays[count:]
        away = x - center[0] if center else x
        return [q * away for q in basis]

    return parts


@_lift.elementwise
def _attenuated(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    x, *basis = arrays
    return plus(x, functools.reduce(jnp.add, [c * q for c, q in zip(scalars, basis, strict=True)]))


def _sided_away(
    sides: Sides, gain: ScalarLike, trees: Sequence[WeightsLike], layout: Layout
) -> Weights:
    """The point, first of the trees, less a gain times its part in the subspace, leaf by leaf."""
    if sides.rows is None and sides.columns is None:
        raise ValueError("basis has neither rows nor columns: give at least one of them")
    points, structure = jax.tree.flatten(trees[0])
    trees = tree.in_one_dtype(*trees)
    every = structure.unflatten([1.0] * len(points))
    left, right = (
        [
            _side(*place, axis, layout)
            for place in _checks.entries(name, every if side is None else side, trees[0], KINDS)
        ]
        for axis, (name, side) in enumerate(
            [("basis.rows", sides.rows), ("basis.columns", sides.columns)]
        )
    )
    gain = _checks.floating(gain)
    results = []
    for x, *row, q, r in zip(points, *map(jax.tree.leaves, trees), left, right, strict=True):
        away = tree.combine((1, -1)[: len(row)], row, rounded=False)
        results.append(tree.displaced((-gain,), (x, _sided(away, q, r, layout))))
    return structure.unflatten(results)
