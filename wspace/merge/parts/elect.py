r"""Which sign a merged entry has, and what the task vectors of that sign come to."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax.numpy as jnp
from jaxtyping import Array

from wspace import _checks, _lift
from wspace._numerics import larger, where_kept
from wspace._records import record
from wspace._words import described
from wspace.merge.task import added, total
from wspace.typing import ByLeaf, LeafCoefficients, Scalar, Weights, WeightsLike

__all__ = ["Election", "disjoint_merge", "elect"]

Vote: TypeAlias = Literal["mass", "count"]
Zero: TypeAlias = Literal["zero", "plus", "majority"]
Divide: TypeAlias = Literal["count", "weight", "one", "largest"]


@record
@dataclasses.dataclass(frozen=True)
class Election:
    r"""How task vectors agree: what elects a sign for each entry, and what those of that sign give.

    $$
    \tau_j = \frac{1}{N_j} \sum_{i \in A_j} c_i\, \tau_{ij}, \qquad
    A_j = \{ i : \operatorname{sgn}(v_i\, \tau_{ij}) = \gamma_j \ne 0 \}
    $$

    By default the votes are $v_i = c_i$ and the sign $\gamma_j = \operatorname{sgn} \sum_i v_i\,
    \tau_{ij}$: then negated coefficients negate the result, and equal models of opposite
    coefficients cancel.

    Attributes:
        vote: What is added up: `"mass"`, the terms $v_i\, \tau_{ij}$, so that large entries count
            for more, or `"count"`, their signs.
        weighted: Whether coefficients vote. If not, $v_i = 1$, and a negative coefficient does not
            turn the sign by which its model agrees.
        zero: The sign where votes cancel or all are zero: `"zero"`, by which the entry keeps the
            value of the base; `"plus"`; or `"majority"`, the sign of $\sum_j \gamma_j$ over the
            whole tree, minus if that is 0.
        divide: The number $N_j$: `"count"`, how many agree; `"weight"`, the sum of their
            coefficients, or 1 if that is 0; `"one"`, 1. With `"largest"` the largest of the terms
            that agree is taken alone.

    Raises:
        ValueError: If an attribute is not one of these words.
        TypeError: If `weighted` is not a bool.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> tuned = [jnp.array([4.0, -3.0]), jnp.array([2.0, 3.0])]
        >>> merge.ties(jnp.zeros(2), tuned, density=1.0)
        Array([3., 0.], dtype=float32)
        >>> election = merge.Election(zero="plus", divide="one")
        >>> merge.ties(jnp.zeros(2), tuned, density=1.0, election=election)
        Array([6., 3.], dtype=float32)

    References:
        P. Yadav et al., *TIES-Merging: Resolving Interference When Merging Models*, NeurIPS 2023,
        section 3, [arXiv:2306.01708](https://arxiv.org/abs/2306.01708).
    """

    vote: Vote = "mass"
    weighted: bool = True
    zero: Zero = "zero"
    divide: Divide = "count"

    def __post_init__(self) -> None:
        _checks.one_of("vote", self.vote, get_args(Vote))
        _checks.one_of("zero", self.zero, get_args(Zero))
        _checks.one_of("divide", self.divide, get_args(Divide))
        _checks.flag("weighted", self.weighted)


def elect(
    edits: Sequence[WeightsLike],
    coefficients: LeafCoefficients | None = None,
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
        coefficients: The $c_i$, one a task vector or one for each of its
            [leaves][wspace.typing.ByLeaf], of any sign; ones if not given.
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
    known = _checks.unpacked(_checks.numbers("coefficients", coefficients, len(edits), edits[0]))
    _checks.one_of("vote", vote, get_args(Vote))
    return _signs(known, edits, vote, _checks.one_of("zero", zero, get_args(Zero)))


def _signs(
    coefficients: Sequence[Any], edits: Sequence[WeightsLike], vote: Vote, zero: Zero
) -> Weights:
    signs = _election(vote)(coefficients, edits)
    if zero == "zero":
        return signs
    balance = _balance((), (signs,)) if zero == "majority" else jnp.ones(())
    return _filled((jnp.where(balance > 0, 1, -1),), (signs,))


def _elected(vote: Vote, coefficients: Sequence[Any], edits: Sequence[Array]) -> Array:
    if vote == "mass":
        return jnp.sign(total(coefficients, edits))
    return jnp.sign(sum(jnp.sign(c * x) for c, x in zip(coefficients, edits, strict=True)))


@functools.cache
def _election(vote: Vote) -> Callable[..., Weights]:
    return _lift.elementwise(functools.partial(_elected, vote))


@_lift.elementwise
def _filled(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (sign,) = arrays
    return jnp.where(sign == 0, scalars[0], sign)


@_lift.reduction
def _balance(_: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (signs,) = arrays
    return (signs > 0).astype(jnp.int32) - (signs < 0).astype(jnp.int32)


def disjoint_merge(
    edits: Sequence[WeightsLike],
    signs: WeightsLike,
    coefficients: LeafCoefficients | None = None,
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
        coefficients: The $c_i$, one a task vector or one for each of its
            [leaves][wspace.typing.ByLeaf], of any sign; ones if not given.
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
    known = _checks.unpacked(_checks.numbers("coefficients", coefficients, len(edits), edits[0]))
    weighted = _checks.flag("weighted", weighted)
    merged = _merged(_checks.one_of("divide", divide, get_args(Divide)), weighted)
    return merged(known, (*edits, signs))


@functools.cache
def _merged(divide: Divide, weighted: bool) -> Callable[..., Weights]:
    @_lift.elementwise
    def disjoint(coefficients: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
        *edits, sign = arrays
        return _combined(divide, weighted, coefficients, edits, sign)

    return disjoint


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
    kept = [where_kept(a, x) for a, x in zip(agree, terms, strict=True)]
    if divide == "largest":
        return functools.reduce(larger, kept)
    together = sum(kept[1:], kept[0])
    if divide == "one":
        return together
    if divide == "count":
        by = sum(jnp.where(a, jnp.ones((), sign.dtype), 0) for a in agree)
        return together / jnp.where(by == 0, 1, by)
    # Coefficients brought to one, whose sum does not overflow.
    shares = list(_checks.to_one(jnp.stack(coefficients)))
    by = sum(jnp.where(a, c, 0) for a, c in zip(agree, shares, strict=True))
    parts = [where_kept(a, c * x) for a, c, x in zip(agree, shares, edits, strict=True)]
    return jnp.where(by == 0, together, sum(parts[1:], parts[0]) / jnp.where(by == 0, 1, by))


def agreed(
    base: WeightsLike,
    edits: Sequence[Weights],
    coefficients: Sequence[Any],
    election: Election,
    scale: ByLeaf,
) -> Weights:
    """The base plus a multiple of what the task vectors agree on."""
    if not isinstance(election, Election):
        raise TypeError(
            f"election must be a merge.Election, got {described(election)}: give "
            "merge.Election(vote=...), or leave it out"
        )
    if election.zero == "majority":  # of the whole tree
        votes = coefficients if election.weighted else [1.0] * len(edits)
        signs = _signs(votes, edits, election.vote, election.zero)
        merged = _merged(election.divide, election.weighted)
        return added(base, merged(coefficients, (*edits, signs)), scale)
    numbers = (_checks.by_leaf("scale", scale, base), *coefficients)
    return _in_one_pass(election)(numbers, (base, *edits))


@functools.cache
def _in_one_pass(election: Election) -> Callable[..., Weights]:
    @_lift.elementwise
    def agreement(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
        (scale, *coefficients), (base, *edits) = scalars, arrays
        votes = coefficients if election.weighted else [jnp.ones((), base.dtype)] * len(edits)
        sign = _elected(election.vote, votes, edits)
        if election.zero == "plus":
            sign = jnp.where(sign == 0, 1, sign)
        agree = (election.divide, election.weighted)
        return base + scale * _combined(*agree, coefficients, edits, sign)

    return agreement
