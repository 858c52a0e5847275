r"""What became of every model in a merge: which entries were trimmed, and which lost the vote.

Whatever the method, a merge can be read from what went in and what came out. An entry of a model's
term is *kept* if it was not trimmed, *agreed* if the merge moves the way it does, and *flipped* if
the merge moves the other way.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_leaves_with_path
from jaxtyping import Array, Float, Int

from wspace import _checks, _lift
from wspace._records import record
from wspace.merge.task import siblings
from wspace.typing import LeafCoefficients, Scalar, WeightsLike

__all__ = ["Report", "Tally", "report"]


@record
@dataclasses.dataclass(frozen=True, eq=False)
class Tally:
    r"""What became of every model in one leaf of a merge, or in all of them.

    Norms and counts are one number a model; $m = \theta - \theta_0$ is the merged displacement.

    Attributes:
        path: The path of the leaf; `"(all)"` for the whole tree.
        entries: How many entries there are.
        norms: The norms of the task vectors $\tau_i$.
        moved: How many entries of a task vector are not zero.
        kept: How many entries of its edit $e_i$ are not zero.
        agreed: How many of these have, times $c_i$, the sign of $m$.
        flipped: How many have the opposite sign. The others are not in the merge at all: $c_i$ or
            the entry of $m$ is zero, because votes cancel or because rounding to the dtype of the
            leaf takes what is left.
        trimmed: The norm of what trimming takes: of $\tau_i$ where the edit is zero.
        outvoted: The norm of what the vote takes: of the edit where it did not agree.
        overruled: Who flipped whom: at `[i, j]`, in how many entries $m$ has the sign of model $j$
            and the opposite one of model $i$.
        disputed: In how many entries two models have opposite signs.
        displacement: The norm of $m$.
        cosines: The cosines of $m$ with the task vectors; NaN where one of the two is zero.
    """

    path: str
    entries: int
    norms: Float[np.ndarray, " k"]
    moved: Int[np.ndarray, " k"]
    kept: Int[np.ndarray, " k"]
    agreed: Int[np.ndarray, " k"]
    flipped: Int[np.ndarray, " k"]
    trimmed: Float[np.ndarray, " k"]
    outvoted: Float[np.ndarray, " k"]
    overruled: Int[np.ndarray, "k k"]
    disputed: int
    displacement: float
    cosines: Float[np.ndarray, " k"]


@record
@dataclasses.dataclass(frozen=True, eq=False)
class Report:
    """What became of every model in a merge.

    `str()` of it is a table to read.

    Attributes:
        coefficients: The coefficients of the models, or a row for each, with a number by leaf.
        total: A [`Tally`][wspace.merge.Tally] of the whole tree.
        leaves: One a leaf.
        seed: The data of the key that the edits were drawn with, if one was given.
        knows_edits: Whether the edits were given. If not, the tallies take the task vectors
            themselves, and an entry that was trimmed counts as any other.
    """

    coefficients: Float[np.ndarray, "k ..."]
    total: Tally
    leaves: tuple[Tally, ...]
    seed: tuple[int, ...] | None
    knows_edits: bool

    def __str__(self) -> str:
        """The report as tables, of models and of leaves."""
        return _text(self)


def report(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    merged: WeightsLike,
    coefficients: LeafCoefficients | None = None,
    *,
    edits: Sequence[WeightsLike] | None = None,
    key: Array | None = None,
) -> Report:
    r"""Tells what became of every model in a merge, of whatever method.

    With $\tau_i = \theta_i - \theta_0$, the edits $e_i$ that the merge made of them, and
    $m = \theta - \theta_0$, the entry $j$ of model $i$ is

    $$
    \begin{aligned}
    \text{trimmed if } & e_{ij} = 0 \ne \tau_{ij}, \\
    \text{agreed if } & \operatorname{sgn}(c_i\, e_{ij}) = \operatorname{sgn}(m_j) \ne 0, \\
    \text{flipped if } & \operatorname{sgn}(c_i\, e_{ij}) = -\operatorname{sgn}(m_j) \ne 0
    \end{aligned}
    $$

    Only the signs of the coefficients count, so that neither scaling all of them by a positive
    number nor scaling all trees changes a count. A merge that is rounded to half precision has the
    signs of the one that is not, or zeros.

    Args:
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        merged: The merged weights $\theta$.
        coefficients: The $c_i$ that the merge was given; ones if not given. Where it was also given
            a negative `scale`, times that.
        edits: What [`trim`][wspace.merge.trim] or [`drop`][wspace.merge.drop] made of the task
            vectors, one a model. If not given, the task vectors themselves, and the report prints
            that it is not known what was trimmed.
        key: The key that the edits were drawn with, to stand in the report.

    Returns:
        A [`Report`][wspace.merge.Report] of NumPy numbers.

    Raises:
        ValueError: If the counts differ or are zero, a coefficient is not finite, or the trees
            have no leaves or differ in structure or in a leaf's shape.
        TypeError: If a value is traced, since a report is read, or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> base, tuned = jnp.zeros(4), [jnp.array([4.0, -3, 1, 0]), jnp.array([2.0, 5, 0, -1])]
        >>> edits = [merge.trim(merge.task_vector(base, x), 0.5) for x in tuned]
        >>> merged = merge.ties(base, tuned, density=0.5)
        >>> told = merge.report(base, tuned, merged, edits=edits)
        >>> told.total.kept, told.total.flipped, told.total.overruled[0]
        (array([2, 2]), array([1, 0]), array([0, 1]))
        >>> print(str(told).splitlines()[0])
        Merge of 2 models: displacement 5.83095, 1 of 4 entries disputed
    """
    if _checks.is_traced(base, tuned, merged, coefficients, edits, key):
        raise TypeError(
            "a report is read, so that base, tuned, merged and all else that it is given must be "
            "known: make it outside jit"
        )
    tuned, c = siblings(base, tuned, coefficients)
    names = {"base": base, "merged": merged}
    if edits is not None:
        edits = _checks.listed("edits", edits)
        if len(edits) != len(tuned):
            raise ValueError(f"edits has {len(edits)} trees for {len(tuned)} models: give one each")
        names |= _checks.each("edits", edits)
    _checks.same_layout(**names)
    paths = [_checks.path_of(path) for path, _ in tree_leaves_with_path(base)]
    if not paths:
        raise ValueError("base has no leaves, so there is nothing to report")
    signs = [np.sign(x) for x in c]
    trees = (base, merged, *tuned, *(edits or []))
    found = [f(signs, trees, by_leaf=True) for f in (_count_sums, _square_sums)]
    sizes = [leaf.size for leaf in jax.tree.leaves(base)]
    sums = [_sums(*leaf) for leaf in zip(sizes, *jax.device_get(found), strict=True)]
    total = functools.reduce(lambda x, y: jax.tree.map(np.add, x, y), sums)
    if key is not None:
        _checks.random_key(key)
    seed = None if key is None else tuple(np.ravel(jax.random.key_data(key)).tolist())
    leaves = tuple(_leaf_tally(path, x) for path, x in zip(paths, sums, strict=True))
    whole = _leaf_tally("(all)", total)
    return Report(np.asarray(c, np.float64), whole, leaves, seed, edits is not None)


class _LeafSums(NamedTuple):
    """Counts, squares and products of one leaf; over several leaves they add."""

    entries: Any
    moved: Any
    kept: Any
    agreed: Any
    flipped: Any
    overruled: Any
    disputed: Any
    norms: Any
    trimmed: Any
    outvoted: Any
    displacement: Any
    products: Any


def _compared(
    signs: Sequence[Scalar], arrays: Sequence[Array]
) -> tuple[Array, list[Array], list[Array], list[Array], list[Array]]:
    """The displacement, the task vectors, the edits, and who agrees or is flipped.

    The arrays are base, merge and models, and then the edits, if there are any.
    """
    base, merged, *given = arrays
    move = merged - base
    taus = [x - base for x in given[: len(signs)]]
    edits = given[len(signs) :] or taus
    way = jnp.sign(move)
    votes = [jnp.sign(x) * sign for x, sign in zip(edits, signs, strict=True)]
    agreed = [(v == way) & (way != 0) for v in votes]
    flipped = [(v == -way) & (way != 0) for v in votes]
    return move, taus, edits, agreed, flipped


@_lift.reduction
def _count_sums(signs: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    _, taus, edits, agreed, flipped = _compared(signs, arrays)
    votes = [jnp.sign(x) * sign for x, sign in zip(edits, signs, strict=True)]
    plus, minus = (functools.reduce(jnp.logical_or, [s * v > 0 for v in votes]) for s in (1, -1))
    overruled = [f & a for f in flipped for a in agreed]
    moved, kept = ([x != 0 for x in xs] for xs in (taus, edits))
    return [*moved, *kept, *agreed, *flipped, *overruled, plus & minus]


@_lift.reduction
def _square_sums(signs: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    move, taus, edits, agreed, _ = _compared(signs, arrays)
    trimmed = [jnp.where(e == 0, x, 0) for x, e in zip(taus, edits, strict=True)]
    outvoted = [jnp.where(a, 0, e) for a, e in zip(agreed, edits, strict=True)]
    products = [move * x for x in taus]
    return [*(x * x for x in (*taus, *trimmed, *outvoted, move)), *products]


def _sums(size: int, counts: np.ndarray, squares: np.ndarray) -> _LeafSums:
    """The figures of a leaf by name, in types wide enough for sums over many leaves."""
    k = len(squares) // 4
    counts, squares = counts.astype(np.int64), squares.astype(np.float64)
    moved, kept, agreed, flipped = counts[: 4 * k].reshape(4, k)
    norms, trimmed, outvoted = squares[: 3 * k].reshape(3, k)
    return _LeafSums(
        entries=np.int64(size),
        moved=moved,
        kept=kept,
        agreed=agreed,
        flipped=flipped,
        overruled=counts[4 * k : -1].reshape(k, k),
        disputed=counts[-1],
        norms=norms,
        trimmed=trimmed,
        outvoted=outvoted,
        displacement=squares[3 * k],
        products=squares[3 * k + 1 :],
    )


def _leaf_tally(path: str, sums: _LeafSums) -> Tally:
    roots = {
        name: np.sqrt(getattr(sums, name))
        for name in ("norms", "trimmed", "outvoted", "displacement")
    }
    scale = roots["displacement"] * roots["norms"]
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = np.clip(sums.products / scale, -1, 1)
    figures = sums._asdict() | roots
    del figures["products"]
    whole = {name: figures[name].item() for name in ("entries", "disputed", "displacement")}
    return Tally(path=path, cosines=cosines, **figures | whole)


def _text(report: Report) -> str:
    """The report in words and columns."""
    total, c = report.total, report.coefficients
    moved = f"displacement {total.displacement:.6g}"
    share = f"{total.disputed} of {_counted(total.entries, 'entry', 'entries')} disputed"
    lines = [f"Merge of {_counted(len(c), 'model', 'models')}: {moved}, {share}"]
    if report.seed is not None:
        lines.append(f"Edits drawn with the key {list(report.seed)}")
    known = report.knows_edits
    if not known:
        lines.append("What was trimmed: not known (give edits)")
    kept, outvoted = ("kept", "outvoted") if known else ("moved", "not agreed")
    header = ("model", "coefficient", "norm", kept, "agreed", "flipped", "flipped by each")
    models = [(*header, *(["trimmed"] if known else []), outvoted, "cosine")]
    for i in range(len(c)):
        count = total.kept[i]
        flips = " ".join("-" if i == j else str(n) for j, n in enumerate(total.overruled[i]))
        models.append(
            (
                str(i),
                " to ".join(f"{x:.4g}" for x in np.unique([c[i].min(), c[i].max()])),
                f"{total.norms[i]:.4g}",
                _part(count, total.entries),
                _part(total.agreed[i], count),
                _part(total.flipped[i], count),
                flips,
                *([f"{total.trimmed[i]:.4g}"] if known else []),
                f"{total.outvoted[i]:.4g}",
                _shown_cosine(total.cosines[i]),
            )
        )
    leaves = [("leaf", "entries", "displacement", "disputed", kept, "flipped", "cosine")]
    for leaf in report.leaves:
        leaves.append(
            (
                leaf.path,
                str(leaf.entries),
                f"{leaf.displacement:.4g}",
                _percent(leaf.disputed, leaf.entries),
                " ".join(_percent(x, leaf.entries) for x in leaf.kept),
                " ".join(_percent(x, y) for x, y in zip(leaf.flipped, leaf.kept, strict=True)),
                " ".join(map(_shown_cosine, leaf.cosines)),
            )
        )
    return "\n".join([*lines, "", _columns(models), "", _columns(leaves)])


def _counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def _percent(part: Any, whole: Any) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _part(part: Any, whole: Any) -> str:
    return f"{part} ({_percent(part, whole)})"


def _shown_cosine(x: Any) -> str:
    return "-" if np.isnan(x) else f"{x:.3f}"


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
