"""Draws the pictures of the docs: `python -m docs.pictures`, from the root of the repository."""

import pathlib
import re
from collections.abc import Sequence

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.examples.report import AVOIDED, FAINT, INK, MOVED, draw, styled
from wspace import average, cone, geometry, negative, plot

RADIUS = 1.4


def main(folder: pathlib.Path = pathlib.Path(__file__).parent / "assets") -> None:
    """Writes every picture of the docs into a folder."""
    pictures = {
        "negative-weight": plane,
        "curve": ranks,
        "low-rank": lemma,
        "hull": hull,
        "damage": damage,
        "audit": audited,
    }
    for name, picture in pictures.items():
        with styled():
            draw(picture(), folder / f"{name}.svg")
    with styled():
        for name, picture in drawn_by("gallery.md").items():
            draw(picture, folder / f"gallery-{name}.svg")
        draw(along_the_segment(), folder / "start-here.svg")


def drawn_by(page: str) -> dict[str, Figure]:
    """The figures that the code of a page draws, by the names of their variables."""
    text = (pathlib.Path(__file__).parent / page).read_text()
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        exec(block, names)
    return {name: x for name, x in names.items() if isinstance(x, Figure)}


def along_the_segment() -> Figure:
    """The losses that the page *Start here* prints."""
    text = (pathlib.Path(__file__).parent / "start-here.md").read_text()
    t, losses = np.array(re.findall(r"^(\d\.\d)  (\d+\.\d)$", text, re.MULTILINE), float).T
    return plot.segment(t, losses, {"A": 0, "mean": 0.5, "C": 1})


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


def avoided(axes: Axes, center: np.ndarray, radius: float | None = None, name: str = "$P$") -> None:
    """The point to avoid, and the sphere around it."""
    if radius is not None:
        axes.add_patch(plt.Circle(center, radius, fc=AVOIDED, ec="none", alpha=0.1, zorder=0))
        axes.add_patch(plt.Circle(center, radius, fc="none", ec=AVOIDED, lw=1, zorder=1))
    axes.plot(*center, "x", color=AVOIDED, ms=6, mew=1.6)
    label(axes, center, name, (-5, -17), AVOIDED)


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


def lemma() -> plt.Figure:
    """The least edit of a cone into a ball, in the plane; distance left against its norm."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.6, 3.7), layout="constrained", width_ratios=(1, 1.15)
    )
    entry_in_the_plane(left)
    reach_by_rank(right)
    return figure


def entry_in_the_plane(axes: Axes) -> None:
    """A displacement E, its projection on a cone of two lines, and the edit into the ball."""
    start = np.array((2.25, 1.45), np.float32)
    lines = np.array([(np.cos(t), np.sin(t)) for t in np.radians((8, 105))], np.float32)
    choices = [cone.Subspace([line]) for line in lines]  # the cone is the union of both
    nearest = max((cone.project(k, start) for k in choices), key=lambda p: p.norm)
    move = min((cone.entry(k, start, RADIUS) for k in choices), key=lambda m: m.norm)
    foot, landed = np.asarray(nearest.edit), start + move.edit
    assert np.isclose(np.linalg.norm(landed), RADIUS, rtol=1e-5)

    avoided(axes, np.zeros(2), RADIUS, "$0$")
    for line, (back, ahead) in zip(lines, ((-2.1, 3.15), (-1.75, 2.25)), strict=True):
        axes.plot(*np.outer(line, (back, ahead)), color=FAINT, lw=1.1, zorder=1)
    for end in (start, landed):
        axes.plot(*np.array([(0, 0), end]).T, color=INK, lw=0.8, ls=(0, (3, 3)), zorder=1)
    axes.plot(*np.array([start, foot]).T, color=INK, lw=1)
    along, up = 0.16 * foot / nearest.norm, 0.16 * (start - foot) / nearest.tail
    axes.plot(*np.array([foot - along, foot - along + up, foot + up]).T, color=INK, lw=0.7)
    style = {"arrowstyle": "-|>", "color": MOVED, "lw": 1.4, "mutation_scale": 11}
    axes.annotate("", landed, start, arrowprops=style | {"shrinkA": 3, "shrinkB": 3})
    for x, color in ((start, INK), (foot, INK), (landed, MOVED)):
        axes.plot(*x, "o", color=color, ms=5)

    label(axes, start, "$E$", (5, 2), INK)
    label(axes, foot, "$P E$", (-5, -18), INK)
    label(axes, (start + landed) / 2, "$D$", (-4, 6), MOVED)
    label(axes, landed, "$E + D$", (-32, 12), MOVED)
    label(axes, (start + foot) / 2, r"$\mathrm{tail}$", (6, -4), INK)
    label(axes, 3.15 * lines[0], "$K$", (4, -3), FAINT)
    label(axes, RADIUS * np.array((np.cos(4.1), np.sin(4.1))), r"$\rho$", (-12, -9), AVOIDED)
    axes.set(xlim=(-2.3, 3.6), ylim=(-1.75, 2.3), aspect="equal", anchor="N")
    axes.axis("off")
    axes.set_title("entry", family="DejaVu Sans Mono", fontsize=12, pad=4)


def reach_by_rank(axes: Axes) -> None:
    """Distance that the best edit of given rank and norm leaves of a random displacement."""
    noise = np.random.default_rng(0).standard_normal((24, 16))
    plain = jnp.asarray(noise / np.linalg.norm(noise), jnp.float32)
    radius, budgets = np.float32(0.85), np.linspace(0, 1, 201, dtype=np.float32)
    shades = ("#9ecae1", "#5fa6d1", MOVED, INK)
    places = ((0.99, 0.918), (0.99, 0.752), (0.99, 0.602), (0.70, 0.34))
    axes.axhline(radius, color=AVOIDED, lw=1, ls=(0, (5, 3)), zorder=1)
    axes.text(0.012, radius - 0.018, r"$\rho$", color=AVOIDED, fontsize=14, va="top")
    for rank, shade, place in zip((1, 2, 4, 16), shades, places, strict=True):
        allowed = cone.Rank(rank)
        left = [cone.reach(allowed, plain, d) for d in budgets]
        axes.plot(budgets, left, color=shade, lw=1.5)
        name = "full rank" if rank == 16 else f"rank {rank}"
        axes.text(*place, name, color=INK, ha="right" if rank < 16 else "left")
        needed = cone.entry(allowed, plain, radius).norm
        if np.isfinite(needed):
            axes.plot([needed] * 2, [0, radius], color=shade, lw=0.8, ls=(0, (2, 2)), zorder=1)
            axes.plot(needed, radius, "o", color=shade, ms=5, zorder=3)
    axes.set(
        xlabel=r"norm of the edit, in units of $\Vert E \Vert$",
        ylabel="distance left",
        xlim=(0, 1.0),
        ylim=(0, 1.03),
    )
    axes.set_title("reach", family="DejaVu Sans Mono", fontsize=12, pad=4)


def hull() -> plt.Figure:
    """Two points whose mean leaves a ball, all of whose averages do, and all of whose line does."""
    a, c, p = (np.array(x, np.float32) for x in ((-2.2, 1.3), (1.6, 0.1), (0, 0)))
    figure, panels = plt.subplots(1, 3, figsize=(9.6, 2.9), layout="constrained")
    guards = {
        "exit_ball": (negative.exit_ball([a, c], (0.5, 0.5), p, RADIUS), "one average"),
        "guard_hull": (negative.guard_hull([a, c], p, RADIUS), "every convex average"),
        'mode="affine"': (
            negative.guard_hull([a, c], p, RADIUS, mode="affine", normal=np.float32([-0.25, 1])),
            "coefficients of any sign",
        ),
    }
    style = {"arrowstyle": "-|>", "color": MOVED, "lw": 0.9, "mutation_scale": 8}
    for axes, (name, (moved, words)) in zip(panels, guards.items(), strict=True):
        axes.set(xlim=(-3.1, 2.9), ylim=(-1.6, 2.4), aspect="equal")
        axes.axis("off")
        avoided(axes, p, RADIUS)
        axes.plot(*np.array([a, c]).T, color=INK, lw=1.1)
        ends = np.array(moved)
        line = np.array([ends[0] + t * (ends[1] - ends[0]) for t in (-0.4, 1.4)])
        axes.plot(*line.T, color=MOVED, lw=0.9, ls=(0, (3, 3)))
        axes.plot(*ends.T, color=MOVED, lw=1.6)
        for start, end in zip((a, c), moved, strict=True):
            axes.annotate("", end, start, arrowprops=style | {"shrinkA": 3, "shrinkB": 3})
            axes.plot(*start, "o", color=INK, ms=5)
            axes.plot(*end, "o", color=MOVED, ms=5)
        above, below = (-6, 7), (-8, -18)
        down = moved[0][1] < a[1]
        label(axes, a, "$A$", above if down else below, INK)
        label(axes, c, "$C$", below, INK)
        label(axes, moved[0], "$A'$", below if down else above, MOVED)
        label(axes, moved[1], "$C'$", above, MOVED)
        caption(axes, name, words)
    return figure


def damage() -> plt.Figure:
    """What moving costs the outputs on own data, against the margin that the move gives."""
    rng = np.random.default_rng(0)
    spectrum = np.diag(1.5 ** -np.arange(32.0))
    inputs = [rng.standard_normal((200, 32)) @ spectrum @ basis(rng, 32) for _ in range(2)]
    direction = rng.standard_normal((32, 8))
    plain = [direction / np.linalg.norm(direction)] * 2

    def figures(moves: Sequence) -> tuple[float, float]:
        size = np.sqrt(sum(np.sum(m**2) for m in moves))
        seen = np.sqrt(sum(np.sum((x @ m) ** 2) for x, m in zip(inputs, moves, strict=True)))
        return seen / size, np.linalg.norm(sum(moves) / 2) / size

    most_damage, most = figures(plain)
    dampings = np.logspace(-9, 2, 45)
    curve = []
    for damping in dampings:
        metrics = [
            np.asarray(negative.damped_inputs(jnp.asarray(x, jnp.float32), damping=damping))
            for x in inputs
        ]
        curve.append(figures([metric @ direction for metric in metrics]))
    curve = np.array(curve) / (most_damage, most)

    figure, axes = plt.subplots(figsize=(6.4, 3.3), layout="constrained")
    axes.plot(*curve.T, color=MOVED, lw=1.6)
    axes.plot(1, 1, "o", color=INK, ms=6)
    axes.annotate("free to move", (1, 1), (8, -20), textcoords="offset points", ha="right")
    for damping in (1e-8, 1e-6, 1e-4):
        at = curve[np.argmin(np.abs(np.log(dampings / damping)))]
        axes.plot(*at, "o", color=MOVED, ms=5)
        text = rf"$\delta = 10^{{{round(np.log10(damping))}}}$"
        axes.annotate(text, at, (8, -10), textcoords="offset points", color=MOVED, fontsize=12)
    axes.set(
        xlabel="damage: change of the outputs on own data, as a share",
        ylabel="margin per unit moved, as a share",
        xscale="log",
        xlim=(None, 1.6),
        ylim=(0, 1.08),
    )
    return figure


def basis(rng: np.random.Generator, size: int) -> np.ndarray:
    """A random orthogonal matrix."""
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


def audited() -> plt.Figure:
    """An audit of a small guard, as the library draws it."""
    rng = np.random.default_rng(0)

    def weights(scale: float) -> dict:
        falling = 0.8 ** np.arange(24.0)
        return {
            "hidden": np.float32(scale * rng.standard_normal((32, 24)) * falling),
            "bias": np.float32(0.1 * scale * rng.standard_normal(24)),
            "out": np.float32(0.5 * scale * rng.standard_normal((24, 10))),
        }

    a, c, avoid = weights(1), weights(1), weights(0.3)
    report = negative.audit([a, c], (0.5, 0.5), avoid, 6.3)
    return plot.audit(report)


if __name__ == "__main__":
    main()
