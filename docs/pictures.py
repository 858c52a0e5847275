"""Draws the pictures of the docs: `python docs/pictures.py`, from the root of the repository."""

import pathlib
from collections.abc import Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from wspace import average, geometry, negative

INK, FAINT, MOVED, AVOIDED = "#222222", "#8a8a8a", "#0072b2", "#c8501e"
STYLE = {
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "mathtext.fontset": "cm",
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "wspace",
    "text.color": INK,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
}

RADIUS = 1.4


def main(folder: pathlib.Path = pathlib.Path(__file__).parent / "assets") -> None:
    """Writes every picture of the docs into a folder."""
    for name, draw in {"negative-weight": plane, "curve": ranks}.items():
        with mpl.rc_context(mpl.rcParamsDefault), mpl.rc_context(STYLE):
            figure = draw()
            figure.savefig(folder / f"{name}.svg", metadata={"Creator": None, "Date": None})
            plt.close(figure)


def plane() -> plt.Figure:
    """Two points A and C, their mean B', and three ways to move it by moving them."""
    a, c, p, target = (
        np.array(x, np.float32) for x in ((-1.05, 1.15), (2.05, 0.05), (0, 0), (1.8, -0.8))
    )
    halves = [0.5, 0.5]
    mean = average.mean([a, c])
    figure, panels = plt.subplots(1, 3, figsize=(9.6, 2.9), layout="constrained")
    for axes in panels:
        axes.set(xlim=(-2.4, 4.2), ylim=(-1.65, 2.4), aspect="equal")
        axes.axis("off")

    axes = panels[0]
    avoided(axes, p)
    moved = [negative.repel(x, p, 0.8) for x in (a, c)]
    for x in (a, c, mean):
        axes.plot(*np.array([p, x]).T, color=FAINT, lw=0.8, ls=(0, (3, 3)), zorder=1)
    points(axes, (a, c, mean), ("$A$", "$C$", "$B'$"), ((-15, -9), (1, -15), (2, -17)), INK)
    images(axes, (a, c, mean), moved, ("$A'$", "$C'$", "$R'$"), ((4, 5), (-3, 6), (1, 6)))
    caption(axes, "repel", "$x + s\\,(x - P)$")

    axes = panels[1]
    avoided(axes, p, RADIUS)
    moved = negative.exit_ball([a, c], halves, p, RADIUS)
    points(axes, (a, c, mean), ("$A$", "$C$", "$B'$"), ((-15, -7), (3, -14), (-9, -18)), INK)
    images(axes, (a, c, mean), moved, ("$A'$", "$C'$", "$R'$"), ((1, 6), (4, 4), (3, 5)))
    caption(axes, "exit_ball", "the average leaves the ball")

    axes = panels[2]
    moved = negative.retarget([a, c], halves, target)
    points(axes, (a, c, mean), ("$A$", "$C$", "$B'$"), ((-15, 1), (4, 3), (0, 6)), INK)
    images(axes, (a, c, mean), moved, ("$A'$", "$C'$", "$T$"), ((-23, -8), (5, -8), (-5, -16)))
    caption(axes, "retarget", "the average becomes $T$")
    return figure


def avoided(axes: Axes, center: np.ndarray, radius: float | None = None) -> None:
    """The point to avoid, and the sphere around it."""
    if radius is not None:
        axes.add_patch(plt.Circle(center, radius, fc=AVOIDED, ec="none", alpha=0.1, zorder=0))
        axes.add_patch(plt.Circle(center, radius, fc="none", ec=AVOIDED, lw=1, zorder=1))
    axes.plot(*center, "x", color=AVOIDED, ms=6, mew=1.6)
    label(axes, center, "$P$", (-5, -17), AVOIDED)


def points(axes: Axes, triple: Sequence, names: Sequence, offsets: Sequence, color: str) -> None:
    """Two points, the segment between them and their mean."""
    axes.plot(*np.array(triple[:2]).T, color=color, lw=1.1)
    for x, name, offset in zip(triple, names, offsets, strict=True):
        axes.plot(*x, "o", color=color, ms=5)
        label(axes, x, name, offset, color)


def images(
    axes: Axes, before: Sequence, after: Sequence, names: Sequence, offsets: Sequence
) -> None:
    """Where two points and their mean are moved."""
    after = (*after, average.mean(after))
    style = {"arrowstyle": "-|>", "color": MOVED, "lw": 0.9, "mutation_scale": 8}
    for start, end in zip(before, after, strict=True):
        axes.annotate("", end, start, arrowprops=style | {"shrinkA": 3, "shrinkB": 3})
    points(axes, after, names, offsets, MOVED)


def label(axes: Axes, at: np.ndarray, text: str, offset: tuple[int, int], color: str) -> None:
    """A name beside a point."""
    axes.annotate(text, at, offset, textcoords="offset points", color=color, fontsize=14)


def caption(axes: Axes, name: str, words: str) -> None:
    """The name of a function, and what it does."""
    axes.set_title(name, family="DejaVu Sans Mono", fontsize=12, pad=4)
    axes.text(0.5, -0.02, words, transform=axes.transAxes, ha="center", va="top", fontsize=11.5)


def ranks() -> plt.Figure:
    """Distance left after each rank, for a displacement and for the hardened one."""
    rng = np.random.default_rng(0)
    rows, columns = 32, 24
    noise = rng.standard_normal((rows, columns)) * 0.85 ** np.arange(columns)
    plain = (noise / np.linalg.norm(noise)).astype(np.float32)
    flat = negative.harden(plain)
    start = np.zeros_like(plain)
    rank = np.arange(columns + 1)

    figure, axes = plt.subplots(figsize=(6.4, 3.3), layout="constrained")
    law = np.linspace(0, columns, 400)
    axes.plot(law, np.sqrt(1 - law / columns), color=MOVED, lw=1)
    axes.plot(rank, negative.curve(start, flat), "o", color=MOVED, ms=4)
    axes.plot(rank, negative.curve(start, plain), "o-", color=INK, ms=4, lw=1)
    assert np.isclose(geometry.distance(start, flat), geometry.distance(start, plain), rtol=1e-5)
    axes.text(13.2, 0.75, r"hardened:  $\Vert D \Vert\,\sqrt{1 - r/k}$", color=MOVED, fontsize=13)
    axes.text(6.0, 0.24, "as it was", color=INK, ha="right")
    axes.set(
        xlabel="rank $r$ of the edit",
        ylabel=r"distance left, in units of $\Vert D \Vert$",
        xlim=(-0.3, columns + 0.4),
        ylim=(-0.015, 1.04),
        xticks=range(0, columns + 1, 4),
    )
    return figure


if __name__ == "__main__":
    main()
