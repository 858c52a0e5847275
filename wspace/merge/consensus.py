r"""Which sign a merged entry has, and what the task vectors of that sign come to."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from wspace import _checks, _lazy, _padding, tree
from wspace.merge.task import added, total
from wspace.typing import Coefficients, Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["disjoint_merge", "elect"]

Vote: TypeAlias = Literal["mass", "count"]
Zero: TypeAlias = Literal["zero", "plus", "majority"]
Divide: TypeAlias = Literal["count", "weight", "one", "largest"]


def _elected(vote: Vote, coefficients: Sequence[Any], edits: Sequence[Array]) -> Array:
    if vote == "mass":
        return jnp.sign(total(coefficients, edits))
    return jnp.sign(sum(jnp.sign(c * x) for c, x in zip(coefficients, edits, strict=True)))


@functools.cache
def _election(vote: Vote) -> Callable[..., Weights]:
    return tree.elementwise(functools.partial(_elected, vote))


@tree.elementwise
def _filled(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (sign,) = arrays
    return jnp.where(sign == 0, scalars[0], sign)


def elect(
    edits: Sequence[WeightsLike],
    coefficients: Coefficients | None = None,
    *,
    vote: Vote = "mass",
    zero: Zero = "zero",
) -> Weights:
    r"""The sign that each entry of a merge has, by a vote of the task vectors.

    $$
    \gamma_j = \operatorname{sgn} \sum_i c_i\, \tau_{ij}
    \qquad\text{or}\qquad
    \gamma_j = \operatorname{sgn} \sum_i \operatorname{sgn}(c_i\, \tau_{ij})
    $$

    Negating all coefficients negates every sign that is not filled in.

    Args:
        edits: The task vectors $\tau_i$, trees of one layout, at least one.
        coefficients: The $c_i$, one a task vector, of any sign; ones if not given.
        vote: `"mass"`, the first form, in which large entries count for more, or `"count"`.
        zero: The sign where the votes cancel, or all are zero: `"zero"`, `"plus"`, or
            `"majority"`, the sign of $\sum_j \gamma_j$ over the whole tree, minus if that is 0.

    Returns:
        A tree of $-1$, $0$ and $1$ in the layout and dtypes of the first task vector. Derivatives
            are zero.

    Raises:
        ValueError: If the counts differ or are zero, a known coefficient is not finite, an option
            is unknown, or the trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> edits = [jnp.array([1.0, 1.0, 1.0]), jnp.array([-3.0, -1.0, 0.5])]
        >>> merge.elect(edits)
        Array([-1.,  0.,  1.], dtype=float32)

    References:
        P. Yadav et al., *TIES-Merging: Resolving Interference When Merging Models*, NeurIPS 2023,
        section 3, [arXiv:2306.01708](https://arxiv.org/abs/2306.01708).
    """
    edits = _checks.listed("edits", edits)
    _checks.same_layout(**_checks.each("edits", edits))
    known = _checks.unpacked(_checks.numbers("coefficients", coefficients, len(edits)))
    signs = _election(_checks.one_of("vote", vote, get_args(Vote)))(known, edits)
    if _checks.one_of("zero", zero, get_args(Zero)) == "zero":
        return signs
    balance = _balance(signs) if zero == "majority" else jnp.ones(())
    return _filled((jnp.where(balance > 0, 1, -1),), (signs,))


@_padding.few_programs
def _balance(signs: Weights) -> Scalar:
    """The sum of all entries."""
    sums = [
        functools.reduce(jnp.add, map(_majority, _lazy.parts([leaf]))).astype(jnp.float32)
        for leaf in jax.tree.leaves(signs)
    ]
    return jax.tree.reduce_associative(jnp.add, sums) if sums else jnp.zeros(())


@_padding.reading
@jax.jit
def _majority(leaves: Sequence[Array]) -> Int32[Array, ""]:
    (signs,) = leaves
    return jnp.sum((signs > 0).astype(jnp.int32) - (signs < 0).astype(jnp.int32), dtype=jnp.int32)


def disjoint_merge(
    edits: Sequence[WeightsLike],
    signs: WeightsLike,
    coefficients: Coefficients | None = None,
    *,
    divide: Divide = "count",
    weighted: bool = True,
) -> Weights:
    r"""The mean of those terms that have the sign elected, entry by entry.

    $$
    \tau_j = \frac{1}{N_j} \sum_{i \in A_j} c_i\, \tau_{ij}, \qquad
    A_j = \{ i : \operatorname{sgn}(c_i\, \tau_{ij}) = \gamma_j \ne 0 \}
    $$

    | `divide` | $N_j$ |
    |---|---|
    | `"count"` | the number of terms in $A_j$ |
    | `"weight"` | $\sum_{i \in A_j} c_i$; 1 if that is 0 |
    | `"one"` | 1 |
    | `"largest"` | only the term of largest magnitude in $A_j$ is taken, not divided |

    Where no term agrees the entry is 0. Coefficients of both signs that nearly cancel in $N_j$ make
    entries arbitrarily large under `"weight"`.

    Args:
        edits: The task vectors $\tau_i$, trees of one layout, at least one.
        signs: The signs $\gamma$, as from [`elect`][wspace.merge.elect].
        coefficients: The $c_i$, one a task vector, of any sign; ones if not given.
        divide: What the sum is divided by.
        weighted: Whether a negative coefficient turns the sign by which a term agrees; else
            $A_j = \{ i : \operatorname{sgn}(\tau_{ij}) = \gamma_j \}$.

    Returns:
        The merged task vector in the layout and dtypes of the first one.

    Raises:
        ValueError: If the counts differ or are zero, a known coefficient is not finite, `divide`
            is unknown, or the trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> edits = [jnp.array([1.0, 1.0, 1.0]), jnp.array([-3.0, -1.0, 0.5])]
        >>> merge.disjoint_merge(edits, merge.elect(edits))
        Array([-3.  ,  0.  ,  0.75], dtype=float32)

    References:
        P. Yadav et al., *TIES-Merging: Resolving Interference When Merging Models*, NeurIPS 2023,
        section 3, [arXiv:2306.01708](https://arxiv.org/abs/2306.01708).
    """
    edits = _checks.listed("edits", edits)
    _checks.same_layout(**_checks.each("edits", edits), signs=signs)
    known = _checks.unpacked(_checks.numbers("coefficients", coefficients, len(edits)))
    merged = _merged(_checks.one_of("divide", divide, get_args(Divide)), weighted)
    return merged(known, (*edits, signs))


@functools.cache
def _merged(divide: Divide, weighted: bool) -> Callable[..., Weights]:
    @tree.elementwise
    def formula(coefficients: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
        *edits, sign = arrays
        return _combined(divide, weighted, coefficients, edits, sign)

    return formula


def _combined(
    divide: Divide,
    weighted: bool,
    coefficients: Sequence[Scalar],
    edits: Sequence[Array],
    sign: Array,
) -> Array:
    terms = [c * x for c, x in zip(coefficients, edits, strict=True)]
    voters = terms if weighted else edits
    agree = [(jnp.sign(v) == sign) & (sign != 0) for v in voters]
    kept = [jnp.where(a, x, 0) for a, x in zip(agree, terms, strict=True)]
    if divide == "largest":
        return functools.reduce(lambda x, y: jnp.where(jnp.abs(y) > jnp.abs(x), y, x), kept)
    together = sum(kept[1:], kept[0])
    if divide == "one":
        return together
    shares = [jnp.ones((), sign.dtype)] * len(edits) if divide == "count" else coefficients
    by = sum(jnp.where(a, c, 0) for a, c in zip(agree, shares, strict=True))
    return together / jnp.where(by == 0, 1, by)


class Rule(NamedTuple):
    """How task vectors agree."""

    vote: Vote
    zero: Zero
    divide: Divide
    weighted: bool
    scale: ScalarLike


def agreed(
    base: WeightsLike, edits: Sequence[Weights], coefficients: Sequence[Any], options: Any
) -> Weights:
    """The base plus what the task vectors agree on, by options that have the fields of a `Rule`."""
    for name, words in (("vote", Vote), ("zero", Zero), ("divide", Divide)):
        _checks.one_of(name, getattr(options, name), get_args(words))
    if options.zero == "majority":  # of the whole tree
        votes = coefficients if options.weighted else None
        signs = elect(edits, votes, vote=options.vote, zero=options.zero)
        edit = disjoint_merge(
            edits, signs, coefficients, divide=options.divide, weighted=options.weighted
        )
        return added(base, edit, options.scale)
    scale = _checks.scalar("scale", options.scale)
    in_one_pass = _agreement(options.vote, options.zero, options.divide, options.weighted)
    return in_one_pass((scale, *coefficients), (base, *edits))


@functools.cache
def _agreement(vote: Vote, zero: Zero, divide: Divide, weighted: bool) -> Callable[..., Weights]:
    @tree.elementwise
    def formula(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
        (scale, *coefficients), (base, *edits) = scalars, arrays
        votes = coefficients if weighted else [jnp.ones((), base.dtype)] * len(edits)
        sign = _elected(vote, votes, edits)
        if zero == "plus":
            sign = jnp.where(sign == 0, 1, sign)
        return base + scale * _combined(divide, weighted, coefficients, edits, sign)

    return formula
