"""The record of an audit, and the table that it prints as."""

import dataclasses
import math
import textwrap

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from wspace._records import record
from wspace.typing import Scalar

__all__ = ["Audit", "LeafAudit"]


@record
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LeafAudit:
    """What one leaf has to do with a guard.

    Attributes:
        path: The path of the leaf.
        shape: Its shape.
        matrix_shape: The matrix, or the stack of matrices, that it was audited as; the ranks of a
            convolution depend on it. A vector is a matrix with one column.
        distance: The norm of the displacement in this leaf.
        singular_values: The singular values of the displacement in this leaf, `(..., p)`.
        rank_needed: The smallest rank of an edit of this leaf *alone* that brings the average into
            the ball; -1 if none does.
        stable_rank: The stable rank of the displacement, of every matrix of a stack.
        effective_rank: The effective rank of the displacement, of every matrix of a stack.
        data_tail: What edits of rank 0, 1, ... leave of what the displacement does to the outputs
            of the activations given for this leaf; None where none were given.
    """

    path: str = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    matrix_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    distance: Scalar
    singular_values: Float[Array, "..."]
    rank_needed: Int[Array, ""]
    stable_rank: Float[Array, "..."]
    effective_rank: Float[Array, "..."]
    data_tail: Float[Array, " ranks"] | None


@record
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Audit:
    r"""What stands between an average and a ball around a point to avoid.

    `str()` of it is a table to read. It speaks of additive edits towards the declared point, and
    says what it does not speak of.

    Attributes:
        radius: The radius $\rho$ of the ball.
        distance: The distance $e$ of the average from its center.
        margin: $\max(e - \rho, 0)$.
        tail_curve: The distance left after the best edit of pooled rank 0, 1, 2, ...
        leafwise_curve: The distance left after the best edit of rank 0, 1, 2, ... in every matrix.
        rank_needed: The smallest rank in every matrix that reaches the ball.
        pooled_rank_needed: The smallest sum of ranks over all matrices that reaches the ball.
        frobenius_budget: The least norm of an edit of pooled rank 0, 1, 2, ... that reaches the
            ball; infinite below `pooled_rank_needed`, and the margin at the end.
        spectral_budget: The least spectral norm, the largest over all matrices, of an edit of any
            rank that reaches the ball.
        nuclear_budget: The least nuclear norm, summed over all matrices, of such an edit.
        ceiling: The rank in every matrix that reaches the ball whatever the spectrum: the smallest
            $r$ with $\sum_\ell e_\ell^2 \max(0, 1 - r / p_\ell) \le \rho^2$.
        efficiency: `rank_needed` over `ceiling`; 0 within the ball, where both are 0.
        segment_distance: The distance of the nearest convex average of the points from the center:
            on the segment of two points, in the convex hull of more.
        line_distance: The distance of the nearest average with coefficients of any sign. Of the
            steps from each point to the nearest other, those up to the rounding of the points, and
            directions that differ by less than $64\,\varepsilon$, span nothing.
        source_budgets: The norm that an edit of each point alone needs to bring the average into
            the ball, $\max(e - \rho, 0) / |a_i|$; infinite for a coefficient of zero.
        dtype_floor: The distance that the average moves when it is rounded to the dtypes of the
            first point: what is finer than that cannot be stored.
        average_norm: The norm of the average.
        amplification: $\sum_i |a_i|$ of the normalized coefficients.
        aligned_distance: The distance of the average of the aligned points; None if not given.
        aligned_margin: Its margin; None if no aligned points were given.
        leaves: A [`LeafAudit`][wspace.negative.LeafAudit] a leaf.
    """

    radius: Scalar
    distance: Scalar
    margin: Scalar
    tail_curve: Float[Array, " pooled"]
    leafwise_curve: Float[Array, " ranks"]
    rank_needed: Int[Array, ""]
    pooled_rank_needed: Int[Array, ""]
    frobenius_budget: Float[Array, " pooled"]
    spectral_budget: Scalar
    nuclear_budget: Scalar
    ceiling: Int[Array, ""]
    efficiency: Scalar
    segment_distance: Scalar
    line_distance: Scalar
    source_budgets: Float[Array, " k"]
    dtype_floor: Scalar
    average_norm: Scalar
    amplification: Scalar
    aligned_distance: Scalar | None
    aligned_margin: Scalar | None
    leaves: tuple[LeafAudit, ...]

    @property
    def unmoved_leaves(self) -> tuple[str, ...]:
        """Paths of the leaves in which the average is the point to avoid, to its last bit.

        One matrix left out can be enough for a model to come back.
        """
        return tuple(
            leaf.path for leaf in self.leaves if math.prod(leaf.shape) and not leaf.distance > 0
        )

    def __str__(self) -> str:
        """The audit as a table; where it is traced, or is many audits in one, its `repr`."""
        is_one = jnp.ndim(self.radius) == 0 and not isinstance(self.radius, Tracer)
        return _table(self) if is_one else repr(self)


def _table(report: Audit) -> str:
    """The report in words and columns."""
    e, radius = float(report.distance), float(report.radius)
    full = report.leafwise_curve.size - 1
    pooled_full = report.tail_curve.size - 1
    norm = float(report.average_norm)
    budget = float(report.frobenius_budget[-1])
    relative = f", {budget / norm:.3g} of the average's norm" if norm else ""
    lines = [
        f"Audit of an average {e:.6g} away from the point to avoid, radius {radius:.6g}",
        "",
        f"{'margin':<34}{float(report.margin):.6g}",
        *_why_no_margin(report),
        f"{'least edit back, any rank':<34}{budget:.6g}{relative}",
        f"{'  its least spectral norm':<34}{float(report.spectral_budget):.6g}",
        f"{'  its least nuclear norm':<34}{float(report.nuclear_budget):.6g}",
        f"{'rank needed in every matrix':<34}{int(report.rank_needed)} of {full}"
        f" (ceiling {int(report.ceiling)}, efficiency {float(report.efficiency):.2f})",
        f"{'rank needed over all matrices':<34}{int(report.pooled_rank_needed)} of {pooled_full}",
        f"{'nearest convex average':<34}{float(report.segment_distance):.6g}",
        f"{'nearest average of any sign':<34}{float(report.line_distance):.6g}",
        f"{'least edit back of one point':<34}"
        + ", ".join(f"{float(x):.6g}" for x in report.source_budgets),
        f"{'rounding of the average':<34}{float(report.dtype_floor):.3g}"
        f" (amplification {float(report.amplification):.3g})",
    ]
    if report.aligned_distance is not None and report.aligned_margin is not None:
        lines.append(
            f"{'margin after alignment':<34}{float(report.aligned_margin):.6g}"
            f" (distance {float(report.aligned_distance):.6g})"
        )
    lines += ["", _leaf_table(report)]
    unmoved = report.unmoved_leaves
    lines += ["", "Unmoved leaves: " + (", ".join(unmoved) if unmoved else "none")]
    missing = ["what the model does", "averaged outputs and merges that see data", "training"]
    missing += ["other points with the same function", "other points to avoid"]
    if report.aligned_distance is None:
        missing.append("alignment of the points (no aligned points given)")
    unseen = [leaf.path for leaf in report.leaves if leaf.data_tail is None]
    if unseen:
        missing.append(f"data-aware tails of {len(unseen)} of {len(report.leaves)} leaves")
    left_out = "Not audited: " + "; ".join(missing) + "."
    lines += textwrap.wrap(left_out, 98, subsequent_indent="  ")
    lines.append("A margin certifies a distance, not safety.")
    return "\n".join(lines)


def _why_no_margin(report: Audit) -> list[str]:
    """What is to be said where the average is on the ball to its rounding, or inside."""
    e, radius = float(report.distance), float(report.radius)
    arithmetic = 64 * float(jnp.finfo(jnp.asarray(report.distance).dtype).eps)
    rounding = float(report.amplification) * float(report.dtype_floor)
    if abs(e - radius) <= rounding + arithmetic * (radius + float(report.average_norm)):
        return [
            "  The average is on the surface of the ball, to its rounding: a guard of this radius",
            "  puts it there, and any step inwards is inside. Audit it at a smaller radius.",
        ]
    if e < radius:
        return [
            "  The average is inside the ball, so no edit is needed to get there. Guard the points",
            "  first, as by negative.exit_ball, or audit at a smaller radius.",
        ]
    return []


def _leaf_table(report: Audit) -> str:
    header = (
        "leaf",
        "matrix",
        "distance",
        "stable rank",
        "effective rank",
        "rank alone",
        "on data",
    )
    rows = [header]
    for leaf in report.leaves:
        alone = int(leaf.rank_needed)
        data = "-" if leaf.data_tail is None else f"{float(leaf.data_tail[0]):.4g}"
        rows.append(
            (
                leaf.path,
                " x ".join(map(str, leaf.matrix_shape)),
                f"{float(leaf.distance):.4g}",
                _range_of(leaf.stable_rank),
                _range_of(leaf.effective_rank),
                "never" if alone < 0 else str(alone),
                data,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _range_of(ranks: Float[Array, "..."]) -> str:
    """One rank, or the smallest and largest of a stack."""
    if not ranks.size:
        return "-"
    least, most = float(jnp.min(ranks)), float(jnp.max(ranks))
    return f"{least:.2f}" if ranks.ndim == 0 else f"{least:.2f} to {most:.2f}"
