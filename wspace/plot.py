"""Pictures of what the other modules compute; needs matplotlib, the extra `wspace[plot]`.

Every function takes numbers and returns a figure of matplotlib that belongs to no window: save it
by `figure.savefig("picture.svg")`, or let a notebook show it. `segment`, `plane` and `gram` also
draw into axes that are given, so that several pictures can stand side by side.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from jaxtyping import Array

from wspace import _checks
from wspace._words import described, shortened
from wspace.negative import Audit
from wspace.typing import ScalarLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["audit", "gram", "plane", "segment", "spectrum"]

Numbers: TypeAlias = Sequence[Any] | Array | np.ndarray

_INK, _BLUE, _ORANGE, _FAINT = "#222222", "#0072b2", "#c8501e", "#8a8a8a"
_COLORS = (_INK, _BLUE, _ORANGE, "#009e73", "#aa4499")
_STYLES = ("-", "--", ":", "-.", (0, (6, 2)))
_LEAVES = 24  # that an audit shows


def segment(
    positions: Numbers,
    values: Numbers | Mapping[str, Numbers],
    marks: Mapping[str, ScalarLike] | None = None,
    *,
    label: str = "loss",
    axes: "Axes | None" = None,
) -> "Figure":
    """Draws values along a path, such as losses along the straight line between two models.

    Args:
        positions: The positions $t$ on the path, `(n,)`, in increasing order.
        values: The value at each position, `(n,)`, or several such curves by their names. A value
            that is not finite is a gap.
        marks: Positions that have names, such as `{"A": 0, "C": 1}`: each gets a line and its name.
        label: What the values are.
        axes: Axes of matplotlib to draw into; a figure of its own by default.

    Returns:
        The figure.

    Raises:
        ValueError: If `positions` are not finite and increasing, or a curve has another length.
        ImportError: If matplotlib is not installed.

    Examples:
        >>> import jax
        >>> import numpy as np
        >>> from wspace import interpolate, plot
        >>> t = np.linspace(0, 1, 11)
        >>> a, c = np.float32([-1, 0]), np.float32([3, 1])
        >>> losses = jax.vmap(lambda t: (interpolate.lerp(a, c, t) ** 2).sum())(t)
        >>> figure = plot.segment(t, losses, {"A": 0, "C": 1})
        >>> figure.axes[0].get_ylabel()
        'loss'
    """
    t = _ticks("positions", positions)
    curves = values if isinstance(values, Mapping) else {"": values}
    figure, axes = _panel(axes, (7.2, 4.0))
    for name, place in _named("marks", marks).items():
        at = float(np.asarray(_checks.scalar(f"marks[{name!r}]", place)))
        axes.axvline(at, color=_FAINT, lw=0.8, zorder=0)
        axes.annotate(
            name, (at, 1), (0, 3), xycoords=("data", "axes fraction"),
            textcoords="offset points", ha="center", fontweight="bold",
        )  # fmt: skip
    for i, (name, curve) in enumerate(curves.items()):
        color = _COLORS[i % len(_COLORS)]
        style = _STYLES[(i + i // len(_COLORS)) % len(_STYLES)]  # no pair comes twice below 26
        y = _array(f"values {name!r}" if name else "values", curve)
        if y.shape != t.shape:
            raise ValueError(
                f"values{f' {name!r}' if name else ''} must have one number for each of the "
                f"{len(t)} positions, got shape {y.shape}"
            )
        y = np.where(np.isfinite(y), y, np.nan)
        axes.plot(t, y, color=color, ls=style, lw=2, label=name or None)
    axes.set(xlabel="position t", ylabel=label)
    axes.spines[["top", "right"]].set_visible(False)
    if isinstance(values, Mapping):
        axes.legend(frameon=False)
    return figure


def plane(
    xs: Numbers,
    ys: Numbers,
    values: Numbers,
    points: Mapping[str, Numbers] | None = None,
    *,
    hollow: Collection[str] = (),
    label: str = "loss",
    axes: "Axes | None" = None,
) -> "Figure":
    """Draws values on a plane, such as the losses of the models in the plane through three.

    Both axes have the same scale, so that distances on the picture are distances of models, if the
    directions of the plane are orthonormal
    ([`geometry.orthonormalize`][wspace.geometry.orthonormalize]).

    Args:
        xs: Coordinates of the columns, `(m,)`, in increasing order, at least two.
        ys: Coordinates of the rows, `(n,)`, in increasing order, at least two.
        values: `values[i, j]` is the value at `(xs[j], ys[i])`, `(n, m)`. A value that is not
            finite is a gap.
        points: Where models lie, by their names.
        hollow: Names of points that lie off the plane and are shown where they are projected to.
        label: What the values are.
        axes: Axes of matplotlib to draw into; a figure of its own by default.

    Returns:
        The figure.

    Raises:
        ValueError: If `xs` or `ys` are not finite and increasing, the shapes do not match, or a
            name in `hollow` is not among the points.
        ImportError: If matplotlib is not installed.

    Examples:
        >>> import numpy as np
        >>> from wspace import plot
        >>> x, y = np.linspace(-1, 2, 31), np.linspace(-1, 1, 21)
        >>> figure = plot.plane(x, y, x**2 + y[:, None] ** 2, {"A": (0, 0), "C": (1, 0.5)})
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['A', 'C']
    """
    x, y, z = _ticks("xs", xs, 2), _ticks("ys", ys, 2), _array("values", values)
    places = {
        name: _array(f"points[{name!r}]", at) for name, at in _named("points", points).items()
    }
    for name, place in places.items():
        if place.shape != (2,):
            raise ValueError(f"points[{name!r}] must be two numbers, got shape {place.shape}")
    if z.shape != (len(y), len(x)):
        raise ValueError(
            f"values must have shape {(len(y), len(x))}, a row for each of ys, got {z.shape}"
        )
    _names("hollow", hollow)
    if unknown := [name for name in hollow if name not in places]:
        raise ValueError(
            f"hollow names {shortened(repr(unknown[0]))}, which is not in points: "
            f"{shortened(str(list(places)))}"
        )
    height = 5.4 * float((y[-1] - y[0]) / (x[-1] - x[0])) + 1.0
    figure, axes = _panel(axes, (7.2, min(max(height, 3.0), 9.0)))
    shown = np.ma.masked_invalid(z)
    image = axes.pcolormesh(x, y, shown, shading="nearest", cmap="viridis", rasterized=True)
    figure.colorbar(image, ax=axes, label=label)
    for name, place in places.items():
        inside, outside = ("white", _INK) if name in hollow else (_INK, "white")
        axes.plot(*place, "o", ms=9, color=inside, mec=outside, mew=2)
        axes.annotate(
            name, tuple(place), (0, 9), textcoords="offset points", ha="center", fontsize=13,
            fontweight="bold", color=_INK, path_effects=_outline(),
        )  # fmt: skip
    axes.set(xlabel="first direction", ylabel="second direction", aspect="equal")
    return figure


def gram(
    values: Numbers, names: Sequence[str] | None = None, *, axes: "Axes | None" = None
) -> "Figure":
    r"""Draws a Gram matrix: the cosine of every pair as a color and a number, and the norms.

    $$
    \cos_{ij} = \frac{G_{ij}}{\sqrt{G_{ii}\, G_{jj}}}
    $$

    Numbers are left out above twelve points. The cosine of a point of norm zero is undefined, and a
    gap.

    Args:
        values: The inner products $G$, `(n, n)`, as
            [`geometry.gram`][wspace.geometry.gram] or [`merge.gram`][wspace.merge.gram] returns.
        names: A name for each point; their numbers from 0 by default.
        axes: Axes of matplotlib to draw into; a figure of its own by default.

    Returns:
        The figure.

    Raises:
        ValueError: If `values` is no square matrix of at least one row, or the number of names is
            another one.
        ImportError: If matplotlib is not installed.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import geometry, plot
        >>> points = [jnp.array([3.0, 0.0]), jnp.array([1.0, 1.0])]
        >>> figure = plot.gram(geometry.gram(points), ["A", "C"])
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['A: 3', 'C: 1.41']
    """
    products = _array("values", values)
    n = len(products) if products.ndim else 0
    if products.shape != (n, n) or not n:
        raise ValueError(
            f"values must be a square matrix, as of geometry.gram, got {products.shape}"
        )
    if names is not None:
        _names("names", names)
    names = [str(i) for i in range(n)] if names is None else list(names)
    if len(names) != n:
        raise ValueError(f"names must be {n}, one for each point, got {len(names)}")
    with np.errstate(invalid="ignore", divide="ignore"):
        norms = np.sqrt(np.diag(products))
        cosines = products / norms / norms[:, None]
    figure, axes = _panel(axes, (7.2, min(1.8 + 0.5 * n, 7.2)))
    shown = np.ma.masked_invalid(cosines)
    image = axes.imshow(shown, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="cosine")
    axes.set_xticks(range(n), names, rotation=0 if n <= 6 else 90)
    axes.set_yticks(
        range(n), [f"{name}: {norm:.3g}" for name, norm in zip(names, norms, strict=True)]
    )
    axes.set(ylabel="point: norm")
    for i, j in np.argwhere(np.isfinite(cosines)) if n <= 12 else ():
        color = "white" if abs(cosines[i, j]) > 0.6 else _INK
        text = f"{round(cosines[i, j], 2) + 0.0:.2f}"
        axes.text(j, i, text, ha="center", va="center", color=color, fontsize=9)
    return figure


def spectrum(values: Numbers | Mapping[str, Numbers]) -> "Figure":
    r"""Draws singular values, and what the best edit of each rank leaves.

    Left, the singular values on a logarithmic scale; zeros are left out. Right, the distance that
    the best edit of rank $r$ leaves, as a share of the norm:

    $$
    \frac{\sqrt{\sum_{i > r} \sigma_i^2}}{\sqrt{\sum_i \sigma_i^2}}
    $$

    Args:
        values: The singular values of a matrix, `(n,)`, in any order, as
            [`lowrank.singular_values`][wspace.lowrank.singular_values] returns; or of several
            matrices, by their names.

    Returns:
        The figure, with two axes.

    Raises:
        ValueError: If `values` are not one-dimensional, finite and at least zero.
        ImportError: If matplotlib is not installed.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank, plot
        >>> edit = jnp.diag(jnp.array([4.0, 3.0, 0.0]))
        >>> figure = plot.spectrum(lowrank.singular_values(edit))
        >>> [round(float(y), 2) for y in figure.axes[1].lines[0].get_ydata()]
        [1.0, 0.6, 0.0, 0.0]
    """
    curves = values if isinstance(values, Mapping) else {"": values}
    figure = _figure((7.2, 3.6))
    left, right = figure.subplots(1, 2)
    for (name, curve), color in zip(curves.items(), cycle(_COLORS), strict=False):
        sigma = _array(f"values {name!r}" if name else "values", curve)
        if sigma.ndim != 1 or not (np.isfinite(sigma) & (sigma >= 0)).all():
            raise ValueError(
                f"values{f' {name!r}' if name else ''} must be one-dimensional, finite and at "
                "least zero, as lowrank.singular_values of a matrix returns"
            )
        sigma = np.sort(sigma)[::-1]
        style: dict[str, Any] = {"color": color, "lw": 1, "ms": 4, "label": name or None}
        above = np.count_nonzero(sigma)
        left.plot(np.arange(1, above + 1), sigma[:above], ".-", **style)
        right.plot(np.arange(len(sigma) + 1), _tails(sigma), ".-", **style)
        if above:
            left.set_yscale("log")
    left.set(xlabel="number", ylabel="singular value")
    right.set(xlabel="rank of the edit", ylabel="distance left, as a share", ylim=(0, 1.04))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    if isinstance(values, Mapping):
        right.legend(frameon=False)
    return figure


def _tails(sigma: np.ndarray) -> np.ndarray:
    """The norms of what is left of falling singular values from each number on, as shares."""
    if not sigma.any():
        return np.zeros(len(sigma) + 1)
    squares = (sigma / sigma[0])[::-1] ** 2
    sums = np.concatenate([[0.0], np.cumsum(squares)])[::-1]
    return np.sqrt(sums / sums[0])


def audit(report: Audit) -> "Figure":
    """Draws an audit: distance left by rank, price of an edit by rank, and the leaves.

    First, the distance that the best edit leaves of the average, against its rank in every matrix
    and against its pooled rank, both as a share of the largest there is; the radius; the rank
    needed and the ceiling. Second, the least norm of an edit that reaches the ball, against its
    pooled rank: infinite, so not drawn, below the rank needed. Below, the distance in every leaf;
    of more than 24 leaves, in those with the largest.

    Args:
        report: What [`negative.audit`][wspace.negative.audit] returned.

    Returns:
        The figure, with three axes.

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
    shown = min(len(report.leaves), _LEAVES)
    below = 1 + 0.16 * max(shown, 4)
    figure = _figure((7.2, 3.4 + below))
    grid = figure.add_gridspec(2, 2, height_ratios=(3.4, below))
    _distances(figure.add_subplot(grid[0, 0]), report)
    _budgets(figure.add_subplot(grid[0, 1]), report)
    _leaves(figure.add_subplot(grid[1, :]), report)
    margin = float(report.margin)
    figure.suptitle(
        f"margin {margin:.4g} at radius {float(report.radius):.4g}: a distance, not safety"
    )
    return figure


def _distances(axes: "Axes", report: Audit) -> None:
    pooled, leafwise = (np.asarray(x) for x in (report.tail_curve, report.leafwise_curve))
    for values, color, name in (
        (leafwise, _INK, "rank in every matrix"),
        (pooled, _BLUE, "pooled rank"),
    ):
        share = np.linspace(0, 1, len(values)) if len(values) > 1 else np.zeros(1)
        full = len(values) - 1
        axes.plot(share, values, ".-", color=color, ms=4, lw=1, label=f"{name}, of {full}")
    axes.axhline(float(report.radius), color=_ORANGE, lw=1, ls="--", label="radius")
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
    axes.plot(np.arange(len(budgets))[reach], budgets[reach], ".-", color=_BLUE, ms=4, lw=1)
    axes.axhline(float(report.margin), color=_ORANGE, lw=1, ls="--", label="margin: any rank")
    needed = int(report.pooled_rank_needed)
    axes.axvline(needed, color=_FAINT, lw=1, label=f"pooled rank needed: {needed}")
    axes.set(xlabel="pooled rank of the edit", ylabel="least norm that reaches the ball")
    axes.set(xlim=(0, max(len(budgets) - 1, 1)), ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)


def _leaves(axes: "Axes", report: Audit) -> None:
    sizes = np.array([float(leaf.distance) for leaf in report.leaves])
    kept = np.sort(np.argsort(-sizes, kind="stable")[:_LEAVES])
    alone = [int(report.leaves[i].rank_needed) >= 0 for i in kept]
    places = np.arange(len(kept))[::-1]
    axes.barh(places, sizes[kept], color=[_ORANGE if enough else _BLUE for enough in alone])
    axes.set_yticks(places, [report.leaves[i].path for i in kept], fontsize=8)
    few = f", the {len(kept)} largest of {len(sizes)}" if len(kept) < len(sizes) else ""
    axes.set(xlabel=f"distance in the leaf{few} (orange: this leaf alone leads back)")


def _array(name: str, values: Any) -> np.ndarray:
    try:
        if np.iscomplexobj(values):
            raise TypeError("complex numbers have no place on an axis")
        return np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array of numbers, got {described(values)}") from error


def _names(name: str, values: Any) -> None:
    """Raises unless names are given."""
    if not isinstance(values, Collection) or not all(isinstance(x, str) for x in values):
        raise TypeError(f"{name} must be a sequence of names, got {described(values)}")


def _named(name: str, values: Any) -> Mapping[str, Any]:
    """Values by names, none if not given."""
    if values is not None and not isinstance(values, Mapping):
        raise TypeError(f"{name} must be a mapping from names to numbers, got {described(values)}")
    return values or {}


def _ticks(name: str, values: Numbers, least: int = 1) -> np.ndarray:
    ticks = _array(name, values)
    if ticks.ndim != 1 or len(ticks) < least or not np.isfinite(ticks).all():
        raise ValueError(
            f"{name} must be finite numbers in one dimension, {least} or more, got {ticks.shape}"
        )
    if not (np.diff(ticks) > 0).all():
        raise ValueError(f"{name} must be in increasing order")
    return ticks


def _panel(axes: "Axes | None", size: tuple[float, float]) -> "tuple[Figure, Axes]":
    if axes is None:
        figure = _figure(size)
        return figure, figure.add_subplot()
    if not hasattr(axes, "get_figure"):
        raise TypeError(f"axes must be of matplotlib, got {described(axes)}")
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure, axes


def _figure(size: tuple[float, float]) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs matplotlib: install wspace[plot]") from error
    return Figure(figsize=size, layout="constrained")


def _outline() -> list[Any]:
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=3, foreground="white")]
