"""Scalar functions that stay accurate, with their derivatives, where textbook forms fail."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int

Wide: TypeAlias = type
"""A dtype that arithmetic runs in."""


def accumulator(*dtypes: DTypeLike) -> Wide:
    """The dtype to compute in: float64 if any input is, else float32 (never half precision)."""
    is_double = any(jnp.dtype(d) == jnp.float64 for d in dtypes)
    return jnp.float64 if is_double and jax.config.read("jax_enable_x64") else jnp.float32


def in_jax(dtype: DTypeLike) -> np.dtype:
    """The dtype of a JAX array with these numbers: float64 of NumPy may be float32 there."""
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


def rounded_like(x: Array, like: Any) -> Array:
    """`x` in the dtype that `like` has as a JAX array."""
    return x.astype(in_jax(like.dtype))


@jax.jit
def unstacked(x: Array) -> list[Array]:
    """The parts of an array along its first axis, by one program."""
    return list(x)


@jax.jit
def settled(scalars: Sequence[Array]) -> list[Array]:
    """Scalars of one dtype as they are, at the end of a kernel of their own.

    XLA repeats what scalars are made of in each kernel that uses them, for every leaf, but not
    what is sorted; nothing changes places here.
    """
    x = jnp.stack([*scalars, *scalars[:1]])  # no array of one number is sorted
    return list(jax.lax.sort((jax.lax.iota(jnp.int32, len(x)), x), num_keys=1)[1])[:-1]


# XLA adds the entries of a row one after another if it adds several rows in one pass, so rows are
# cut into pieces, few enough entries for a float32 sum to keep its digits.
_LONGEST = 64


@jax.custom_jvp
def row_sums(terms: Sequence[Array]) -> list[Array]:
    """The sums over the last axis of several arrays of one shape, in one pass over them."""
    first = terms[0]
    if not first.ndim:
        return list(terms)
    *rows, length = first.shape
    spec = jax.typeof(first).sharding.spec
    spread = len(spec) == first.ndim and spec[-1] is not None
    piece = max(size for size in range(1, _LONGEST + 1) if length % size == 0)
    if len(terms) == 1 or spread or piece < min(length, _LONGEST // 8):
        return [jnp.sum(x, axis=-1) for x in terms]
    zero = jnp.zeros((), first.dtype)
    sums = jax.lax.reduce(
        tuple(x.reshape(*rows, length // piece, piece) for x in terms),
        (zero,) * len(terms),
        lambda x, y: tuple(a + b for a, b in zip(x, y, strict=True)),
        (first.ndim,),
    )
    return [jnp.sum(x, axis=-1) for x in sums]


@row_sums.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (terms,), (rates,) = primals, tangents
    return row_sums(terms), [jnp.sum(x, axis=-1) if x.ndim else x for x in rates]


@jax.jit(inline=True)
def safe_sqrt(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    r"""$\sqrt{\max(x, 0)}$ with derivative $0$, not infinite, where $x \le 0$; NaN stays NaN."""
    nothing = x <= 0
    return jnp.where(nothing, 0, jnp.sqrt(jnp.where(nothing, 1, x)))


@jax.custom_jvp
def plus(x: Float[Array, "*s"], step: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`x + step`, and where the step is zero `x` bit for bit: the sum of -0.0 and 0.0 is 0.0."""
    return jnp.where(step == 0, x, x + step)


@plus.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x, step), (dx, d_step) = primals, tangents
    return plus(x, step), dx + d_step


def gap_times(
    c: Float[Array, ""], x: Float[Array, "*s"], y: Float[Array, "*s"]
) -> Float[Array, "*s"]:
    """`c * (x - y)`, also where the difference overflows and the product does not."""
    far = jnp.isinf(x - y)
    return jnp.where(far, 2 * c, c) * jnp.where(far, x / 2 - y / 2, x - y)


def exponent_of(x: Float[Array, "*s"]) -> Int[Array, "*s"]:
    """The exponent of the power of two nearest to the size of `x`, without derivative.

    0 where `x` is zero or not finite, so that what is multiplied by the power shows it.
    """
    share, exponent = jnp.frexp(jax.lax.stop_gradient(jnp.abs(x)))
    nearest = jnp.where(share < math.sqrt(0.5), exponent - 1, exponent)
    return jnp.where((share > 0) & jnp.isfinite(x), nearest, 0)


def power_of_two(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The power of two nearest to the size of `x`, the powers whose inverse overflows left out."""
    most = jnp.finfo(x.dtype).maxexp - 2
    return jnp.ldexp(jnp.ones_like(x), jnp.clip(exponent_of(x), -most, most))


def length(x: Float[Array, "*s"]) -> Float[Array, ""]:
    """The norm of an array, whose squares may be out of range."""
    unit = power_of_two(jnp.max(jnp.abs(x), initial=0))
    return unit * safe_sqrt(jnp.sum((x / unit) ** 2))


def coarsest_eps(dtypes: Iterable[DTypeLike]) -> float:
    """The largest machine epsilon, zero of none."""
    return max((float(jnp.finfo(in_jax(dtype)).eps) for dtype in dtypes), default=0.0)


def arithmetic_eps(stored: Iterable[DTypeLike], wide: DTypeLike) -> float:
    """Machine epsilon of arithmetic, or of what made the values that were stored, if coarser."""
    return coarsest_eps([wide, *map(accumulator, stored)])


class Rounding(NamedTuple):
    """What sums of stored points are known to: a share of their size, and a length besides."""

    share: float
    length: float
    by_storage: bool


def stored_rounding(leaves: Sequence[Any], wide: DTypeLike) -> Rounding:
    r"""What points with these leaves are known to, in arithmetic of the dtype `wide`.

    The share is $64\,\varepsilon$ of the arithmetic, or $\varepsilon$ of the coarsest dtype stored
    if that is more: rounding moves a point by half of that at most, and so it moves the point that
    it is compared with. The length is that of entries too small to be told from zero.
    """
    stored = [leaf.dtype for leaf in leaves]
    sums, eps = 64 * arithmetic_eps(stored, wide), coarsest_eps(stored)
    squares = sum(math.prod(leaf.shape) * _least(leaf.dtype, wide) ** 2 for leaf in leaves)
    return Rounding(max(sums, eps), math.sqrt(squares), eps > sums)


def _least(stored: DTypeLike, wide: DTypeLike) -> float:
    """The spacing of the smallest numbers, in float16 subnormal ones, elsewhere flushed to zero."""
    least = float(jnp.finfo(wide).tiny)
    if jnp.dtype(stored) == jnp.float16:
        return max(least, float(jnp.finfo(stored).smallest_subnormal))
    return max(least, float(jnp.finfo(stored).tiny))


def with_nan_of(x: Any, *others: Any) -> Any:
    """`x`, but NaN where one of the others is NaN or infinite."""
    for y in others:
        x = x + 0 * y
    return x


def where_kept(kept: Bool[Array, "*s"], x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The entries that are kept, and zero elsewhere; NaN, which no comparison tells, stays NaN."""
    return jnp.where(kept | jnp.isnan(x), x, 0)


def larger(x: Float[Array, "*s"], y: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Of each two entries the one of larger magnitude, of equal ones the first; NaN before all."""
    return jnp.where((jnp.abs(y) > jnp.abs(x)) | jnp.isnan(y), y, x)


# sin(sqrt w) / sqrt w = sum_k (-w)^k / (2k+1)!; for |w| <= 1 nine terms leave less than 1e-17.
_SINC_SERIES = [(-1) ** k / math.factorial(2 * k + 1) for k in reversed(range(9))]

# arcsin(sqrt q)^2 = sum_k (4q)^k / (2 k^2 C(2k, k)); for |q| <= 1/8 eighteen terms leave 1e-17.
_ARCSIN_SERIES = [4**k / (2 * k**2 * math.comb(2 * k, k)) for k in range(18, 0, -1)] + [0.0]

# arcsin(sqrt q) / sqrt(q (1 - q)) = sum_k (4q)^k (k!)^2 / (2k+1)!; nineteen terms leave 1e-17.
_PULL_SERIES = [
    4**k * math.factorial(k) ** 2 / math.factorial(2 * k + 1) for k in range(19, -1, -1)
]


def sinc_of_square(w: Float[Array, "*s"]) -> Float[Array, "*s"]:
    r"""$\sin(\sqrt w)/\sqrt w$, an entire function of $w$.

    As a function of the square it has a derivative of every order at $w = 0$, where the
    square root has none, and `jax.numpy.sinc` loses its own to cancellation.
    """
    near = jnp.abs(w) <= 1
    root = jnp.sqrt(jnp.where(near, 1, w))
    series = jnp.polyval(jnp.asarray(_SINC_SERIES, w.dtype), jnp.where(near, w, 0))
    return jnp.where(near, series, jnp.sin(root) / root)


def arcsin_of_root_squared(q: Float[Array, "*s"]) -> Float[Array, "*s"]:
    r"""$\arcsin(\sqrt q)^2$ for $q < 1$, with a derivative of every order at $q = 0$."""
    near = jnp.abs(q) <= 1 / 8
    series = jnp.polyval(jnp.asarray(_ARCSIN_SERIES, q.dtype), jnp.where(near, q, 0))
    return jnp.where(near, series, jnp.arcsin(jnp.sqrt(jnp.where(near, 0.5, q))) ** 2)


def angle_over_sine(q: Float[Array, "*s"]) -> Float[Array, "*s"]:
    r"""$\Omega / \sin \Omega$ at $q = \sin^2(\Omega/2) < 1$, with every derivative at $q = 0$."""
    near = jnp.abs(q) <= 1 / 8
    series = jnp.polyval(jnp.asarray(_PULL_SERIES, q.dtype), jnp.where(near, q, 0))
    far = jnp.where(near, 0.5, q)
    return jnp.where(near, series, jnp.arcsin(jnp.sqrt(far)) / jnp.sqrt(far * (1 - far)))


def split(x: Float[Array, "*s"]) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """`x` as a sum `high + low` whose `high` has half the digits, so that their products are exact.

    Every derivative goes through `low`.
    """
    info = jnp.finfo(x.dtype)
    high = jax.lax.reduce_precision(jax.lax.stop_gradient(x), info.nexp, (info.nmant - 1) // 2)
    return high, x - high


def matmul(x: Float[Array, "... m k"], y: Float[Array, "... k n"]) -> Float[Array, "... m n"]:
    """Matrix product in full precision on every backend, both factors replicated first."""
    return jnp.matmul(replicated(x), replicated(y), precision=jax.lax.Precision.HIGHEST)


def replicated(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`x` whole on every device of its explicit mesh; elsewhere `x` itself.

    Factorizations and contractions over a sharded axis are not defined in explicit mode.
    """
    return _placed(x, jax.P(*(None for _ in range(x.ndim))))


def placed_like(x: Float[Array, "*s"], like: Array) -> Float[Array, "*s"]:
    """`x` with the explicit sharding of `like`."""
    return _placed(x, jax.typeof(like).sharding.spec)


def _placed(x: Array, spec: jax.P) -> Array:
    sharding = jax.typeof(x).sharding
    return x if sharding.spec == spec else jax.reshard(x, jax.NamedSharding(sharding.mesh, spec))


@jax.custom_jvp
def rows_within(
    x: Float[Array, "k n"], a: Float[Array, "m n"], cut: Float[Array | np.ndarray, ""]
) -> Float[Array, "k n"]:
    """The rows of `x` projected onto the span of the rows of `a` with singular values above cut."""
    if 0 in a.shape:
        return jnp.zeros_like(x)
    _, values, vt = jnp.linalg.svd(a, full_matrices=False)
    vt = jnp.where((values <= cut)[:, None], 0, vt)  # NaN stays
    return matmul(matmul(x, vt.T), vt)


# The derivatives of singular vectors do not exist where singular values repeat, as those of
# orthonormal directions do; these do: G. Golub, V. Pereyra, SIAM J. Numer. Anal. 10, 1973.
@rows_within.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x, a, cut), (dx, da, _) = primals, tangents
    inverse = pseudo_inverse(a, cut)
    inside = rows_within(x, a, cut)
    turn = matmul(matmul(x, inverse), da)
    back = matmul(matmul(x - inside, da.T), inverse.T)
    # Not by `rows_within`: JAX differentiates through a custom rule what depends on a tangent.
    return inside, matmul(matmul(dx - turn, inverse), a) + turn + back


@jax.custom_jvp
def pseudo_inverse(a: Float[Array, "m n"], cut: Float[Array, ""]) -> Float[Array, "n m"]:
    """The pseudo-inverse, singular values up to the cut taken as zero."""
    if 0 in a.shape:
        return jnp.zeros_like(a.T)
    u, values, vt = jnp.linalg.svd(a, full_matrices=False)
    inverses = jnp.where(values <= cut, 0, 1 / jnp.where(values <= cut, 1, values))
    return matmul(vt.T, inverses[:, None] * u.T)


@pseudo_inverse.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (a, cut), (da, _) = primals, tangents
    p = pseudo_inverse(a, cut)
    left, right = matmul(matmul(p, p.T), da.T), matmul(da.T, matmul(p.T, p))
    return p, (
        left
        - matmul(matmul(left, a), p)
        + right
        - matmul(p, matmul(a, right))
        - matmul(matmul(p, da), p)
    )


@jax.custom_jvp
def polar(
    x: Float[Array, "... m n"], cut: Float[Array, ""]
) -> tuple[Float[Array, "... m n"], Float[Array, "... k"]]:
    """The polar factor of matrices, and their singular values, zero up to a share of the largest.

    Directions whose value is zero are left out of the factor, which is a partial isometry then.
    """
    u, values, vt = jnp.linalg.svd(x, full_matrices=False)
    gone = values <= cut * values[..., :1]  # NaN stays
    return matmul(jnp.where(gone[..., None, :], 0, u), vt), jnp.where(gone, 0, values)


# Of matrices of the same rank as x: unlike singular vectors, the factor has derivatives where
# singular values repeat, and where they are zero.
@polar.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x, cut), (dx, _) = primals, tangents
    u, values, v = singular_triples(x, cut)
    kept = values != 0
    inverse = _inverses(values, kept)[..., None, :]
    turn = matmul(_turned(u), matmul(dx, v))
    both = kept[..., :, None] & kept[..., None, :]
    sums = values[..., :, None] + values[..., None, :]
    inner = jnp.where(both, turn - _turned(turn), 0) / jnp.where(both, sums, 1)
    left = (matmul(dx, v) - matmul(u, turn)) * inverse
    right = (matmul(_turned(dx), u) - matmul(v, _turned(turn))) * inverse
    change = matmul(matmul(u, inner) + left, _turned(v)) + matmul(u, _turned(right))
    return (matmul(u, _turned(v)), values), (change, jnp.diagonal(turn, axis1=-2, axis2=-1))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def singular_triples(
    x: Float[Array, "... m n"],
    cut: Float[Array, ""],
    rank: int | None = None,
    largest: Float[Array, "... 1"] | None = None,
) -> tuple[Float[Array, "... m k"], Float[Array, "... k"], Float[Array, "... n k"]]:
    """Leading singular vectors and values, zero where a value is up to a share of the largest."""
    u, values, vt = jnp.linalg.svd(x, full_matrices=False)
    gone = values <= cut * (values[..., :1] if largest is None else largest)  # NaN stays
    u, values, v, gone = (y[..., :rank] for y in (u, values, _turned(vt), gone))
    u, v = (jnp.where(gone[..., None, :], 0, side) for side in (u, v))
    return u, jnp.where(gone, 0, values), v


# Of matrices of the same rank as x: those of JAX are NaN where two values are zero.
@singular_triples.defjvp
def _(rank: int | None, primals: Any, tangents: Any) -> Any:
    (x, cut, largest), (dx, *_) = primals, tangents
    u, values, v = singular_triples(x, cut, None, largest)
    kept = values != 0
    unit = power_of_two(values[..., :1])
    s, dx = values / unit, dx / unit[..., None]
    inverse = _inverses(s, kept)[..., None, :]
    turn = matmul(_turned(u), matmul(dx, v))
    rows, columns = s[..., :, None], s[..., None, :]
    other = ~jnp.eye(s.shape[-1], dtype=bool) & kept[..., :, None] & kept[..., None, :]
    gaps = 1 / jnp.where(other, (columns - rows) * (columns + rows), 1)
    gaps = jnp.where(other, gaps, 0)
    du = matmul(u, gaps * (turn * columns + rows * _turned(turn)))
    dv = matmul(v, gaps * (rows * turn + _turned(turn) * columns))
    du += (matmul(dx, v) - matmul(u, turn)) * inverse
    dv += (matmul(_turned(dx), u) - matmul(v, _turned(turn))) * inverse
    ds = unit * jnp.diagonal(turn, axis1=-2, axis2=-1)
    return tuple(tuple(y[..., :rank] for y in row) for row in ((u, values, v), (du, ds, dv)))


def _inverses(values: Array, kept: Array) -> Array:
    return jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)


def _turned(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def fetched(scalars: Sequence[Array]) -> list[Any]:
    """Known scalars as plain numbers, by one wait for the device, not one each."""
    together: dict[Any, list[int]] = {}
    for i, x in enumerate(scalars):
        together.setdefault((x.sharding, x.dtype), []).append(i)
    found: list[Any] = [None] * len(scalars)
    for places in together.values():
        row = np.asarray(_stacked([scalars[i] for i in places])).tolist()
        for i, number in zip(places, row, strict=True):
            found[i] = number
    return found


@jax.jit
def _stacked(scalars: Sequence[Array]) -> Array:
    return jnp.stack(scalars)
