"""The three pictures of the demo."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.patheffects import withStroke

BEFORE, AFTER, DARK, LIGHT = "#1f5fa8", "#c2410c", "#0f172a", "#94a3b8"
OUTLINE = [withStroke(linewidth=3, foreground="white")]


def draw(results: Mapping[str, Any]) -> dict[str, bytes]:
    """The PNG files by name."""
    figures = {
        "plane.png": plane(results["plane"]),
        "coefficient.png": coefficient(results),
        "ranks.png": ranks(results),
    }
    return {name: _png(figure) for name, figure in figures.items()}


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()


def plane(figures: Mapping[str, Any]) -> Figure:
    """The plane through A, C and R': how much each of its points reads."""
    figure = Figure(figsize=(7.6, 6.6), layout="constrained")
    axes = figure.add_subplot()
    ticks, places = figures["ticks"], figures["points"]
    image = axes.imshow(
        figures["accuracy"],
        origin="lower",
        extent=(ticks[0], ticks[-1], ticks[0], ticks[-1]),
        vmin=0,
        vmax=1,
        cmap="viridis",
        interpolation="nearest",
    )
    figure.colorbar(image, ax=axes, label="share of all held-out digits read correctly")
    for pair, color in ((("A", "C"), BEFORE), (("A'", "C'"), AFTER)):
        across, up = zip(*(places[name]["at"] for name in pair), strict=True)
        style = "-" if color == BEFORE else "--"
        for width, shade in ((4.5, "white"), (2, color)):
            axes.plot(across, up, style, color=shade, linewidth=width)
    for width, shade in ((3.5, "black"), (1.5, "white")):
        axes.add_patch(
            Circle((0, 0), figures["radius"], fill=False, linewidth=width, edgecolor=shade)
        )
    for name, place in places.items():
        color = AFTER if name in ("A'", "C'", "R'") else BEFORE
        inside = name not in ("A'", "C'")
        axes.plot(
            *place["at"],
            "o",
            markersize=9,
            color=color if inside else "white",
            markeredgecolor="white" if inside else color,
            markeredgewidth=2,
        )
        axes.annotate(
            name.replace("'", "\N{PRIME}"),
            place["at"],
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=14,
            fontweight="bold",
            color=color,
            path_effects=OUTLINE,
        )
    axes.set(
        xlabel="distance from B\N{PRIME} along A to C",
        ylabel="distance from B\N{PRIME} towards R\N{PRIME}",
        xlim=(ticks[0], ticks[-1]),
        ylim=(ticks[0], ticks[-1]),
    )
    off = places["A'"]["off"]
    axes.set_title(
        "The plane through A, C and R\N{PRIME}, and the ball avoided around B\N{PRIME}\n"
        f"A\N{PRIME} and C\N{PRIME} (hollow) are projected: "
        f"they lie {off:.1f} off it, on opposite sides",
        fontsize=11,
    )
    return figure


def coefficient(results: Mapping[str, Any]) -> Figure:
    """Accuracy along the straight lines from A to C and from A' to C'."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    lines = []
    for axes, key, title, (start, middle, end) in zip(
        panels,
        ("sweep", "sweep_guarded"),
        ("before", "after the guard"),
        (("A", "B\N{PRIME}", "C"), ("A\N{PRIME}", "R\N{PRIME}", "C\N{PRIME}")),
        strict=True,
    ):
        t, low, high, every = np.array(results[key]).T
        lines = [
            *axes.plot(t, low, "--", color=BEFORE, linewidth=1.8, label="digits 0-4"),
            *axes.plot(t, high, ":", color=AFTER, linewidth=2.2, label="digits 5-9"),
            *axes.plot(t, every, color=DARK, linewidth=2.8, label="all digits"),
        ]
        for position, name in zip((0, 0.5, 1), (start, middle, end), strict=True):
            axes.vlines(position, 0, 1.03, color=LIGHT, linewidth=1, zorder=0)
            axes.annotate(
                name, (position, 1.05), ha="center", va="bottom", fontsize=12, fontweight="bold"
            )
        axes.set(
            xlabel=f"coefficient t in (1 - t) {start} + t {end}", ylim=(-0.03, 1.15), title=title
        )
        axes.set_yticks(np.linspace(0, 1, 6))
        _plain(axes)
    panels[0].set_ylabel("share read correctly (held out)")
    figure.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False)
    return figure


def ranks(results: Mapping[str, Any]) -> Figure:
    """Distance left to B', and accuracy, after an offset of each rank."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, 2)
    tested = [int(row[0]) for row in results["ranks"]["plain"]]
    for axes, column, label in zip(
        panels, (1, 2), ("distance left to B\N{PRIME}", "share of all digits read"), strict=True
    ):
        for name, color, marker in (("plain", BEFORE, "o"), ("hardened", AFTER, "s")):
            values = [row[column] for row in results["ranks"][name]]
            axes.plot(values, marker=marker, markersize=5, color=color, linewidth=2, label=name)
        axes.axvline(tested.index(10), color=LIGHT, linewidth=1, linestyle="--", zorder=0)
        axes.set_xticks(range(len(tested)), [str(rank) for rank in tested], fontsize=8)
        axes.set(xlabel="rank of the offset in every matrix (not to scale above 12)", ylabel=label)
        axes.set_ylim(bottom=0)
        _plain(axes)
    panels[1].set_ylim(0, 1.05)
    whole = results["accuracy"]["B'"]["all"]
    panels[1].axhline(whole, color=LIGHT, linewidth=1, zorder=0)
    panels[1].annotate("B\N{PRIME}", (0, whole), xytext=(0, 3), textcoords="offset points")
    panels[0].legend(frameon=False, title="guard")
    panels[0].annotate(
        "ten outputs",
        (tested.index(10), 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(5, 0),
        textcoords="offset points",
        fontsize=9,
        color=LIGHT,
        va="top",
    )
    return figure


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
