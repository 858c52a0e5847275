r"""Where a point may move: per leaf everywhere, nowhere, or in the range of a matrix.

The matrix $P$ acts on the inputs of a leaf, on axis 0 of `x @ W`, or of the transpose where layers
store `(out, in)`. A projector confines the point to a subspace; any other symmetric positive
semidefinite matrix is the inverse of a metric, in which moving costs $\langle dx, P^+ dx
\rangle$.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int, PyTree

from wspace import _checks, lowrank, tree
from wspace._numerics import (
    Wide,
    accumulator,
    exponent_of,
    fetched,
    matmul,
    replicated,
)
from wspace._words import described, layout_of
from wspace.lowrank.factors import from_matrix, matrix_shape, other_side
from wspace.typing import Allow, Layout, Leaf, Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["damped_inputs", "free_inputs"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Allowed:
    """Where a leaf may move: `scale * 2**exponent` times the identity, or times `root @ root.T`.

    The root acts on the inputs of the leaf in its layout.
    """

    scale: Scalar
    root: Float[Array, "... m m"] | None
    exponent: Int[Array, ""]
    layout: Layout = dataclasses.field(default="in_out", metadata={"static": True})

    def whole_root(self, shape: Sequence[int]) -> Float[Array, "... m m"]:
        """The root, for a stack of matrices of the given shape."""
        *stack, rows, _ = shape
        eye = jnp.eye(rows, dtype=self.scale.dtype)
        return jnp.broadcast_to(eye, (*stack, rows, rows)) if self.root is None else self.root

    def matrix(self, x: Array) -> Float[Array, "... m n"]:
        """The matrix of the leaf, its inputs as rows."""
        return lowrank.as_matrix(x, layout=self.layout)

    def leaf(self, matrix: Float[Array, "... m n"], like: Array) -> Array:
        """The leaf of a matrix."""
        return from_matrix(matrix, like, self.layout)

    def __matmul__(self, x: Array) -> Array:
        if self.root is None:
            return self.scale * x
        # Through the root, so that rounding keeps to the allowed space.
        inner = matmul(jnp.swapaxes(self.root, -1, -2), self.matrix(x))
        return self.leaf(self.scale * matmul(self.root, inner), x)

    def square(self, x: Array) -> Scalar:
        r"""$\langle x, P x \rangle$, never negative."""
        if self.root is None:
            return self.scale * tree.vdot(x, x)
        inner = matmul(jnp.swapaxes(self.root, -1, -2), self.matrix(x))
        return self.scale * tree.vdot(inner, inner)


NOTHING = -(2**20)
"""The exponent of zero, below all others."""


def relative(allowed: Sequence[Allowed]) -> tuple[list[Allowed], Int[Array, ""]]:
    """Allowances over the power of two of the largest of them, and its exponent."""
    top = functools.reduce(jnp.maximum, [p.exponent for p in allowed], jnp.int32(NOTHING))
    return [_times(p, -top) for p in allowed], top


def _times(allowed: Allowed, exponent: Int[Array, ""] | int) -> Allowed:
    """The allowance times a power of two, all of it in its scale."""
    power = jnp.where(allowed.exponent == NOTHING, 0, allowed.exponent + exponent)
    return dataclasses.replace(
        allowed, scale=jnp.ldexp(allowed.scale, power), exponent=jnp.zeros_like(allowed.exponent)
    )


def rounding_share(rows: int, dtype: DTypeLike) -> float:
    """The share of the largest eigenvalue of a matrix below which another one is rounding."""
    return min(rows, 8 * rows**0.5) * float(jnp.finfo(dtype).eps)


def without_rounding(values: Float[Array, "... m"]) -> Float[Array, "... m"]:
    """Eigenvalues, those below the rounding of the largest set to zero."""
    largest = jnp.max(values, axis=-1, keepdims=True, initial=0)
    return jnp.where(values > rounding_share(values.shape[-1], values.dtype) * largest, values, 0)


class Fault(NamedTuple):
    """Whether an entry is none that `allow` takes, and the words for it."""

    found: Bool[Array, ""]
    message: Callable[[], str]


def _spectral(entry: Array | np.ndarray, dtype: Wide, where: str) -> tuple[Allowed, list[Fault]]:
    """Where a matrix lets a leaf move, and what may be wrong with it."""
    entry, power = _in_range(entry)
    stored = replicated(jnp.asarray(entry))
    given = stored.astype(accumulator(stored.dtype))
    size = jnp.max(jnp.abs(given), initial=0)
    # Over a power of two before anything is rounded to the dtype of arithmetic, or squared.
    exponent = exponent_of(size)
    matrix = jnp.ldexp(given, -exponent).astype(dtype)
    flipped = jnp.swapaxes(matrix, -1, -2)
    unit = jnp.max(jnp.abs(matrix), initial=0)
    skew = jnp.max(jnp.abs(matrix - flipped), initial=0)
    values, vectors = jnp.linalg.eigh((matrix + flipped) / 2)
    least, largest = jnp.min(values, initial=0), jnp.max(values, initial=0)
    symmetric = _checks.matrix_rounding([stored.dtype], dtype)
    definite = _checks.matrix_rounding([stored.dtype], dtype, matrix.shape[-1])

    def shown(x: Scalar) -> float:
        return float(np.ldexp(np.float64(x), int(exponent) + power))

    faults = [
        Fault(
            ~jnp.isfinite(size),
            lambda: (
                f"leaf (root) of {where} holds NaN or an infinity: "
                "no distance or rank is defined for it; mend the weights first"
            ),
        ),
        Fault(
            ~(skew <= symmetric * unit),
            lambda: (
                f"{where} is not symmetric, by {shown(skew):.3g} in entries up to "
                f"{shown(unit):.3g}: give a projector or a symmetric positive semidefinite matrix"
            ),
        ),
        Fault(
            ~(least >= -definite * jnp.maximum(largest, -least)),
            lambda: (
                f"{where} has the eigenvalue {shown(least):.3g} beside {shown(largest):.3g}: "
                "give a projector or a symmetric positive semidefinite matrix"
            ),
        ),
    ]
    # The scale apart, so that the root shortens nothing but by choice.
    scale = jnp.where(largest > 0, largest, 1)
    root = vectors * jnp.sqrt(without_rounding(values) / scale)[..., None, :]
    return _allowed(largest, root, exponent + power), faults


def _in_range(entry: Any) -> tuple[Any, int]:
    """An entry over a power of two, and its exponent, where JAX would not hold all of float64."""
    if not isinstance(entry, np.ndarray | np.generic) or entry.dtype != np.float64:
        return entry, 0
    size = float(np.max(np.abs(entry), initial=0))
    power = math.frexp(size)[1] if 0 < size < math.inf else 0
    return np.ldexp(entry, -power), power


def _allowed(scale: Scalar, root: Any, exponent: Int[Array, ""] | int) -> Allowed:
    """An allowance whose scale is brought to about one."""
    power = exponent_of(scale)
    whole = jnp.where(scale == 0, NOTHING, jnp.asarray(exponent, jnp.int32) + power)
    return Allowed(jnp.ldexp(scale, -power), root, whole)


def _leaf_allowance(
    entry: Any, leaf: Leaf, where: str, dtype: Wide, known: dict[Any, Any], layout: Layout
) -> tuple[Allowed, list[Fault]]:
    number = isinstance(entry, int | float) or getattr(entry, "shape", None) == ()
    if not number and not _checks.is_weight(entry):
        raise TypeError(f"{where} is {described(entry)}: give 1.0 (free), 0.0 (frozen) or a matrix")
    if number:
        scale = _checks.nonnegative(where, entry)
        scale, power = _in_range(np.float64(scale)) if isinstance(scale, float) else (scale, 0)
        wide = _checks.floating(scale)
        exponent = exponent_of(wide)
        return _allowed(jnp.ldexp(wide, -exponent).astype(dtype), None, exponent + power), []
    if leaf.ndim < 2:
        raise ValueError(
            f"{where} is a matrix, but the leaf of shape {leaf.shape} is none: "
            "a vector is free (1.0) or frozen (0.0)"
        )
    *stack, rows, _ = matrix_shape(leaf.shape, layout)
    if entry.shape not in ((rows, rows), (*stack, rows, rows)):
        raise ValueError(
            f"{where} has shape {entry.shape} for a leaf of shape {leaf.shape}: it acts on the "
            f"inputs of the leaf's matrix, and must be ({rows}, {rows})"
            f"{other_side(entry.shape, leaf.shape, layout)}"
        )
    key = id(entry), dtype  # one matrix often stands at many places
    if key not in known:
        known[key] = _spectral(entry, dtype, where)
    allowed, faults = known[key]
    root = jnp.broadcast_to(allowed.root, (*stack, rows, rows))
    return dataclasses.replace(allowed, root=root, layout=layout), faults


def allowances(
    entries: dict[str, PyTree | None],
    layout: Layout,
    points: Sequence[WeightsLike],
    *others: WeightsLike,
) -> list[list[Allowed]]:
    """Where each leaf of each point may move, from trees of entries by their names in errors.

    In the dtype of arithmetic on the points and the other trees that are computed with.
    """
    return [[_times(p, 0) for p in row] for row in _allowances(entries, layout, points, *others)]


def _allowances(
    entries: dict[str, PyTree | None],
    layout: Layout,
    points: Sequence[WeightsLike],
    *others: WeightsLike,
) -> list[list[Allowed]]:
    wide = accumulator(*(leaf.dtype for leaf in jax.tree.leaves((points, others))))
    known: dict[Any, Any] = {}
    found = []
    for (name, given), point in zip(entries.items(), points, strict=True):
        if given is None:
            given = jax.tree.map(lambda _: 1.0, point)
        places = _checks.entries(name, given, point, "1.0, 0.0 or a matrix at each leaf")
        found.append([_leaf_allowance(*place, wide, known, layout) for place in places])
    _refuse_known([fault for row in found for _, faults in row for fault in faults])
    return [[_where_sound(*leaf) for leaf in row] for row in found]


def _refuse_known(faults: Sequence[Fault]) -> None:
    """Raises for the first fault that is known, all of them read at once."""
    faults = [fault for fault in faults if not _checks.is_traced(fault.found)]
    if not faults:
        return
    bad = np.array(fetched([fault.found for fault in faults]))
    if bad.any():
        raise ValueError(faults[int(bad.argmax())].message())


def _where_sound(allowed: Allowed, faults: Sequence[Fault]) -> Allowed:
    """The allowance, NaN where a fault turns out to be there."""
    scale = allowed.scale
    for fault in faults:
        if _checks.is_traced(fault.found):
            scale = jnp.where(fault.found, jnp.nan, scale)
    return dataclasses.replace(allowed, scale=scale)


def each_allowance(
    allow: Allow, layout: Layout, points: Sequence[WeightsLike], *others: WeightsLike
) -> list[list[Allowed]]:
    """`allowances` of an argument `allow` that has one entry a point, each with its exponent."""
    if not isinstance(allow, Sequence) or len(allow) != len(points):
        raise ValueError(
            f"allow must have one entry for each of {len(points)} points, a tree like the "
            f"weights or None, got {layout_of(allow)}"
        )
    named = {f"allow[{i}]": entries for i, entries in enumerate(allow)}
    return _allowances(named, layout, points, *others)


def moved_by(allowed: Sequence[Allowed], x: WeightsLike, times: Scalar | float = 1.0) -> Weights:
    """$P$ times a multiple of $x$, leaf by leaf, in the dtype of the allowances."""
    leaves, structure = jax.tree.flatten(x)
    return structure.unflatten(
        [
            p @ (jnp.asarray(times, p.scale.dtype) * jnp.asarray(leaf).astype(p.scale.dtype))
            for p, leaf in zip(allowed, leaves, strict=True)
        ]
    )


def free_inputs(
    activations: Float[Array | np.ndarray, "n d"], *, rtol: ScalarLike
) -> Float[Array, "d d"]:
    r"""Projector onto the inputs of a layer that its data almost never use.

    $$
    P = I - \sum_{i:\, \sigma_i \ge \tau \sigma_1} v_i v_i^\top, \qquad
    X = \sum_i \sigma_i\, u_i v_i^\top
    $$

    With rows of $X$ as inputs of `x @ W`, a change $P\,dW$ of the matrix changes no output of
    these data by more than the threshold allows: $\lVert X P\, dW \rVert \le \tau\, \sigma_1(X)
    \lVert dW \rVert$. It is an entry of `allow`, for
    [`retarget`][wspace.negative.retarget] and [`exit_ball`][wspace.negative.exit_ball]: the same
    one for layers that store `(out, in)`, where these are told so, by their `layout`.

    Args:
        activations: The inputs $X$ of the layer, one a row, `(n, d)`; append a column of ones to
            account for a bias that is a row of the matrix.
        rtol: The threshold $\tau$ in $(0, 1)$, relative to the largest singular value.

    Returns:
        The symmetric projector $P$, `(d, d)`, in at least float32. The identity for activations
            that are all zero.

    Raises:
        ValueError: If `activations` is not a matrix or holds NaN or an infinity (NaN if traced), or
            `rtol` is known and not between 0 and 1.
        TypeError: If `activations` is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import negative
        >>> negative.free_inputs(jnp.array([[3.0, 0.0], [1.0, 0.0]]), rtol=1e-2)
        Array([[0., 0.],
               [0., 1.]], dtype=float32)

    References:
        G. Saha, I. Garg, K. Roy, *Gradient Projection Memory for Continual Learning*, ICLR 2021,
        [arXiv:2103.09762](https://arxiv.org/abs/2103.09762), section 4.
    """
    rtol = _checks.between("rtol", rtol, 0, 1)
    values, vectors = _spectrum(activations)
    least = jnp.asarray(rtol).astype(values.dtype) * values[:1]
    used = (values >= least) & (values > 0)
    return _less(jnp.where(used, 1, 0 * (values + least)), vectors)


def damped_inputs(
    activations: Float[Array | np.ndarray, "n d"], *, damping: ScalarLike
) -> Float[Array, "d d"]:
    r"""Inverse metric in which an input costs the more to change, the more its data use it.

    $$
    P = \Bigl(I + \frac{X^\top X}{\delta\, \sigma_1^2}\Bigr)^{-1}
      = I - \sum_i \frac{\sigma_i^2}{\sigma_i^2 + \delta\, \sigma_1^2}\, v_i v_i^\top
    $$

    The soft form of [`free_inputs`][wspace.negative.free_inputs], an entry of `allow`: an edit
    $P L$ of the matrix is charged $\lVert dW \rVert^2 + \lVert X\, dW \rVert^2 / (\delta
    \sigma_1^2)$, for its own size and for what it does to these data, and $\lVert X P L \rVert \le
    \tfrac12 \sqrt\delta\, \sigma_1 \lVert L \rVert$. Small damping spares the data and large
    damping the weights; a sweep over it draws the curve of damage against margin. Inputs that the
    data use by no more than rounding count as unused, and eigenvalues below $4 \min(d, 8 \sqrt
    d)\, \varepsilon$ of the largest are raised to that: the entries of a matrix do not hold smaller
    ones, nor their sign.

    Args:
        activations: The inputs $X$ of the layer, one a row, `(n, d)`.
        damping: The number $\delta > 0$, relative to the largest eigenvalue of $X^\top X$.

    Returns:
        The symmetric positive definite matrix $P$, `(d, d)`, in at least float32; the identity for
            activations that are all zero.

    Raises:
        ValueError: If `activations` is not a matrix or holds NaN or an infinity (NaN if traced), or
            `damping` is known and not positive.
        TypeError: If `activations` is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import negative
        >>> negative.damped_inputs(jnp.array([[2.0, 0.0]]), damping=1.0)
        Array([[0.5, 0. ],
               [0. , 1. ]], dtype=float32)
    """
    damping = _checks.above_zero("damping", damping)
    values, vectors = _spectrum(activations)
    part = values / jnp.where(values[:1] > 0, values[:1], 1)
    share = jnp.where(part <= rounding_share(max(activations.shape), part.dtype), 0, part) ** 2
    delta = jnp.asarray(damping).astype(values.dtype)
    kept = jnp.where(share == 0, 1, 1 / (1 + share / delta)) + jnp.where(jnp.isnan(delta), delta, 0)
    rows = vectors.shape[-1]
    whole = len(values) == rows
    largest = jnp.max(kept, initial=0) if whole else 1
    # Smaller eigenvalues are lost in the rounding of the entries, and their sign with them.
    kept = jnp.maximum(kept, 4 * rounding_share(rows, kept.dtype) * largest)
    if not whole:
        return _less(1 - kept, vectors)
    result = matmul(vectors.T, kept[:, None] * vectors)
    return (result + result.T) / 2


def _spectrum(activations: Array | np.ndarray) -> tuple[Array, Array]:
    """Singular values of activations and their right singular vectors, one a row."""
    _checks.one_array(activations=activations)
    if activations.ndim != 2:
        raise ValueError(
            f"activations must be a matrix (n, d) with one input a row, got {activations.shape}"
        )
    _checks.finite(activations=activations)
    x = replicated(tree.upcast(activations))
    if not x.size:
        return jnp.zeros(0, x.dtype), jnp.zeros((0, x.shape[1]), x.dtype)
    _, values, vectors = jnp.linalg.svd(x, full_matrices=False)
    return values, vectors


def _less(shares: Float[Array, " k"], vectors: Float[Array, "k d"]) -> Float[Array, "d d"]:
    """The identity less given shares of the projectors on some orthonormal rows."""
    taken = matmul(vectors.T, shares[:, None] * vectors)
    result = jnp.eye(vectors.shape[-1], dtype=vectors.dtype) - taken
    return (result + result.T) / 2
