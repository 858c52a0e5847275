"""Pictures of what the other modules compute; needs matplotlib, the extra `wspace[plot]`."""

from typing import TYPE_CHECKING

import numpy as np

from wspace._words import described
from wspace.negative import Audit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["audit"]

_LEFT, _POOLED, _RADIUS, _FAINT = "#222222", "#0072b2", "#c8501e", "#8a8a8a"


def audit(report: Audit) -> "Figure":
    """Draws an audit: distance left by rank, price of an edit by rank, and the leaves.

    Left, the distance that the best edit leaves of the average, against its rank in every matrix
    and against its pooled rank, both as a share of the largest there is; the radius; the rank
    needed and the ceiling. Middle, the least norm of an edit that reaches the ball, against its
    pooled rank: infinite, so not drawn, below the rank needed. Right, the distance in every leaf.

    Args:
        report: What [`negative.audit`][wspace.negative.audit] returned.

    Returns:
        A matplotlib figure that belongs to no window; save it by `figure.savefig("audit.svg")`.

    Raises:
        TypeError: If `report` is no [`Audit`][wspace.negative.Audit].
        ImportError: If matplotlib is not installed.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import negative, plot
        >>> points = [jnp.diag(jnp.array([9.0, 4.0])), jnp.diag(jnp.array([7.0, 8.0]))]
        >>> figure = plot.audit(negative.audit(points, (0.5, 0.5), jnp.zeros((2, 2)), 7.0))
        >>> len(figure.axes)
        3
    """
    if not isinstance(report, Audit):
        raise TypeError(
            f"report must be an Audit, as negative.audit returns, got {described(report)}"
        )
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: install wspace[plot]") from error
    figure = Figure(figsize=(12.5, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _distances(left, report)
    _budgets(middle, report)
    _leaves(right, report)
    margin = float(report.margin)
    figure.suptitle(
        f"margin {margin:.4g} at radius {float(report.radius):.4g}: a distance, not safety"
    )
    return figure


def _distances(axes: "Axes", report: Audit) -> None:
    pooled, leafwise = (np.asarray(x) for x in (report.tail_curve, report.leafwise_curve))
    for values, color, name in (
        (leafwise, _LEFT, "rank in every matrix"),
        (pooled, _POOLED, "pooled rank"),
    ):
        share = np.linspace(0, 1, len(values)) if len(values) > 1 else np.zeros(1)
        full = len(values) - 1
        axes.plot(share, values, ".-", color=color, ms=4, lw=1, label=f"{name}, of {full}")
    axes.axhline(float(report.radius), color=_RADIUS, lw=1, ls="--", label="radius")
    full = max(len(leafwise) - 1, 1)
    for rank, style, name in (
        (report.rank_needed, "-", "rank needed"),
        (report.ceiling, ":", "ceiling"),
    ):
        axes.axvline(int(rank) / full, color=_FAINT, lw=1, ls=style, label=f"{name}: {int(rank)}")
    axes.set(xlabel="rank of the edit, as a share of full", ylabel="distance left", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)


def _budgets(axes: "Axes", report: Audit) -> None:
    budgets = np.asarray(report.frobenius_budget)
    reach = np.isfinite(budgets)
    axes.plot(np.arange(len(budgets))[reach], budgets[reach], ".-", color=_POOLED, ms=4, lw=1)
    axes.axhline(float(report.margin), color=_RADIUS, lw=1, ls="--", label="margin: any rank")
    needed = int(report.pooled_rank_needed)
    axes.axvline(needed, color=_FAINT, lw=1, label=f"pooled rank needed: {needed}")
    axes.set(xlabel="pooled rank of the edit", ylabel="least norm that reaches the ball")
    axes.set(xlim=(0, max(len(budgets) - 1, 1)), ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)


def _leaves(axes: "Axes", report: Audit) -> None:
    names = [leaf.path for leaf in report.leaves]
    sizes = [float(leaf.distance) for leaf in report.leaves]
    alone = [int(leaf.rank_needed) >= 0 for leaf in report.leaves]
    places = np.arange(len(names))[::-1]
    axes.barh(places, sizes, color=[_RADIUS if enough else _POOLED for enough in alone])
    axes.set_yticks(places, names, fontsize=8 if len(names) <= 20 else 5)
    axes.set(xlabel="distance in the leaf\n(orange: this leaf alone leads back)")
