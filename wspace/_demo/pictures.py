"""The three pictures of the demo."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from wspace import plot

BEFORE, AFTER, LIGHT = "#1f5fa8", "#c2410c", "#94a3b8"


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
    ticks, places = figures["ticks"], figures["points"]
    figure = plot.plane(
        ticks,
        ticks,
        figures["accuracy"],
        {_primed(name): place["at"] for name, place in places.items()},
        hollow=["A\N{PRIME}", "C\N{PRIME}"],
        label="share of all held-out digits read correctly",
    )
    axes = figure.axes[0]
    axes.collections[0].set_clim(0, 1)
    for pair, color in ((("A", "C"), BEFORE), (("A'", "C'"), AFTER)):
        across, up = zip(*(places[name]["at"] for name in pair), strict=True)
        style = "-" if color == BEFORE else "--"
        for width, shade in ((4.5, "white"), (2, color)):
            axes.plot(across, up, style, color=shade, linewidth=width, zorder=1.5)
    for width, shade in ((3.5, "black"), (1.5, "white")):
        axes.add_patch(
            Circle((0, 0), figures["radius"], fill=False, linewidth=width, edgecolor=shade)
        )
    axes.set(
        xlabel="distance from B\N{PRIME} along A to C",
        ylabel="distance from B\N{PRIME} towards R\N{PRIME}",
    )
    off = places["A'"]["off"]
    axes.set_title(
        "The plane through A, C and R\N{PRIME}, and the ball avoided around B\N{PRIME}\n"
        f"A\N{PRIME} and C\N{PRIME} (hollow) are projected: "
        f"they lie {off:.1f} off it, on opposite sides",
        fontsize=11,
    )
    return figure


def _primed(name: str) -> str:
    return name.replace("'", "\N{PRIME}")


def coefficient(results: Mapping[str, Any]) -> Figure:
    """Accuracy along the straight lines from A to C and from A' to C'."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, title, names in zip(
        panels,
        ("sweep", "sweep_guarded"),
        ("before", "after the guard"),
        (("A", "B\N{PRIME}", "C"), ("A\N{PRIME}", "R\N{PRIME}", "C\N{PRIME}")),
        strict=True,
    ):
        t, low, high, every = np.array(results[key]).T
        plot.segment(
            t,
            {"all digits": every, "digits 0-4": low, "digits 5-9": high},
            dict(zip(names, (0, 0.5, 1), strict=True)),
            axes=axes,
        )
        start, _, end = names
        axes.set(xlabel=f"coefficient t in (1 - t) {start} + t {end}", ylabel="")
        axes.set_title(title, pad=20)
    panels[0].set(ylim=(-0.03, 1.05), ylabel="share read correctly (held out)")
    panels[0].get_legend().remove()
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
