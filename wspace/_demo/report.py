"""The words of the demo: each act as text, from its figures alone."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from wspace._demo import acts, digits

Cell: TypeAlias = str | int | float
Results: TypeAlias = Mapping[str, Any]

WIDTH = 98
COLUMNS = ("0-4", "5-9", "all")
SHOWN = range(0, acts.POSITIONS.size, 5)
WAYS = {
    "nothing": "as trained",
    "everywhere": "bare shift",
    "plain": "guard",
    "hardened": "hardened guard",
}


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Aligned columns, words to the left and numbers to the right, fractions to three digits."""
    body = [
        [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows
    ]
    columns = list(zip(header, *body, strict=True))
    widths = [max(map(len, column)) for column in columns]
    words = [any(cell[-1].isalpha() for cell in column[1:]) for column in columns]
    lines = [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, words, strict=True)
        ).rstrip()
        for row in (header, ["-" * width for width in widths], *body)
    ]
    return textwrap.indent("\n".join(lines), "  ")


def prose(*paragraphs: str) -> str:
    """Paragraphs filled to the width; tables and titles as they are."""
    return "\n".join(
        text if "\n" in text.strip() and text.startswith(("  ", "Act")) else _filled(text)
        for paragraph in paragraphs
        for text in (paragraph, "")
    )


def _filled(text: str) -> str:
    hanging = "  " if text.startswith("- ") else ""
    return textwrap.fill(" ".join(text.split()), WIDTH, subsequent_indent=hanging)


def _title(text: str) -> str:
    return f"{text}\n{'=' * len(text)}"


def _length(x: float) -> str:
    return f"{x:.2f}"


def _points(x: float) -> str:
    return f"{round(x, 1) + 0.0:.1f}"


def opening(seed: int, training: int, held_out: int) -> str:
    """What the demo works on."""
    layers = "-".join(map(str, digits.SIZES))
    return prose(
        f"""wspace demo, seed {seed}. Real networks ({layers}, ReLU) that read handwritten
        digits of 8x8 pixels: {training} to train on, {held_out} held out. Accuracies are shares
        of the held-out digits read correctly: of the digits 0-4, of 5-9, and of all ten.
        Guessing reads 0.1. Points lost are hundredths of accuracy; a negative number is a gain."""
    )


def act1(results: Results) -> str:
    """An average that no member is."""
    reads, lost = results["accuracy"], results["points lost by B'"]
    best = max(reads[name]["all"] for name in ("base", "A", "C"))
    return prose(
        _title("Act 1. An average that no member is"),
        """One random initialization is the base. A is trained from it on the digits 0-4, C on
        5-9. Nobody trains B' = mean(A, C), the point halfway between their weights.""",
        table(
            ("network", *COLUMNS),
            [(name, *reads[name].values()) for name in ("base", "A", "C", "B'")],
        ),
        f"""Base, A and C read at most {best:.3f} of all digits. Their average reads
        {reads["B'"]["all"]:.3f}. What it costs: B' loses {_points(lost["low"])} points to A on
        0-4 and {_points(lost["high"])} to C on 5-9.""",
        "Where they stand: Euclidean distances over all weights, and angles.",
        table(
            ("from, to", "distance"),
            [(name, _length(x)) for name, x in results["distances"].items()],
        ),
        table(
            ("between", "degrees"), [(name, f"{x:.1f}") for name, x in results["angles"].items()]
        ),
        "The coefficient t in (1 - t) A + t C, through [0, 1] and beyond it:",
        table(
            ("t", *COLUMNS),
            [(f"{t:.2f}", *shares) for t, *shares in (results["sweep"][i] for i in SHOWN)],
        ),
        """Controls. P is trained from the base on all ten digits. The other C starts from
        another random initialization: averaging weights leans on the common start. Averaging
        outputs does not, but it needs both networks at once.""",
        table(
            ("control", *COLUMNS), [(name, *x.values()) for name, x in results["controls"].items()]
        ),
    )


def _asked(header: Sequence[str], rows: Sequence[tuple[Sequence[str], Results]]) -> str:
    return table(
        (
            *header,
            *("A moves", "C moves", "mean moves"),
            *("A 0-4", "C 5-9", "mean all"),
            *("A lost", "C lost", "mean lost"),
        ),
        [
            (
                *names,
                *map(_length, asked["moves"].values()),
                *asked["reads"].values(),
                *map(_points, asked["points lost"].values()),
            )
            for names, asked in rows
        ],
    )


def act2_bare(results: Results) -> str:
    """The negative weight on a point other than the average."""
    bare = results["bare"]
    last = bare["asks"][-1]["points lost"]
    return prose(
        _title("Act 2. The negative weight: from B' to R'"),
        f"""First the bare geometry. Let P be the point to avoid. It reads
        {results["controls"]["P"]["all"]:.3f} and stands {_length(bare["distance"])} from B'. A
        negative weight v on P, a strength s = v / (1 - v) and a guidance scale g = 1 + s are
        three names of one map, `repel`. It multiplies the distance from P by g. The accuracy is
        that of B' so moved.""",
        table(
            ("weight v", "strength s", "scale g", "distance from P", *COLUMNS),
            [
                (
                    f"{row['weight']:.2f}",
                    f"{row['strength']:.2f}",
                    f"{row['scale']:.2f}",
                    _length(row["distance"]),
                    *(row[half] for half in acts.HALVES),
                )
                for row in bare["names"]
            ],
        ),
        f"""Computed by its three names, the moved point differs by at most
        {max(row["disagreement"] for row in bare["names"]):.0e}.""",
        """A and C can be moved so that their mean stands there. Three ways, one mean: `repel`
        each of them; `retarget` their mean; leave the ball around P by `exit_ball`. The last
        two ask the least: the smallest sum of squared moves.""",
        _asked(("v", "way"), [((f"{row['weight']:.2f}", row["way"]), row) for row in bare["asks"]]),
        f"""A bare shift moves A and C as far as their mean, and what they read is not spared:
        in the last row A loses {_points(last["A"])} points, C {_points(last["C"])}, their mean
        {_points(last["average"])}.""",
    )


def act2_guard(results: Results) -> str:
    """The negative weight on the average itself."""
    guard, reads, flat = (results[key] for key in ("guard", "accuracy", "hardened"))
    ways = guard["ways"]
    bare, lost = (ways[way]["points lost"] for way in ("everywhere", "plain"))
    return prose(
        f"""Now let B' itself be the point to avoid. `repel` cannot move an average away from
        itself, by a law: with A and C repelled from B' at strength 1, their mean has moved by
        {guard["repelled from itself"]:.0e}. And `exit_ball` refuses: "{guard["refusal"]}".""",
        f"""So a direction is needed: g, the gradient of the loss of B'. The ball to leave has
        {acts.SHIFT:g} times the norm of B' as radius, {_length(guard["radius"])}. And A and C
        are to keep what they read. So each may move only on those inputs of its layers that its
        own training digits almost never use (below {acts.UNUSED:g} of the largest singular
        value), and biases are frozen: `exit_ball(..., direction=g, allow=projectors)`. How many
        inputs are free, and how far the mean moves in each layer:""",
        table(
            ("layer", "inputs", "free for A", "free for C", "guard", "hardened guard"),
            [
                (
                    layer,
                    digits.SIZES[layer - 1],
                    *(count[layer - 1] for count in guard["free inputs"].values()),
                    *(_length(x[layer - 1]) for x in guard["shift per layer"].values()),
                )
                for layer in digits.LAYERS
            ],
        ),
        """The hardened guard flattens the edits of A and C by `harden`, within the same
        subspaces, and scales both so that the mean moves exactly as far. Act 3 says what for.
        The bare shift goes along g with A and C free to move everywhere.""",
        _asked(("pair",), [((WAYS[way],), asked) for way, asked in ways.items()]),
        f"""The bare shift is paid by all three: A loses {_points(bare["A"])} points, C
        {_points(bare["C"])}, the mean {_points(bare["average"])}. The guard is paid by the
        mean: A' loses {_points(lost["A"])} points on 0-4, C' {_points(lost["C"])} on 5-9, and
        R' = mean(A', C') loses {_points(lost["average"])}. In distance the guard costs A and C
        more than the bare shift: where one may not move, the other moves for both.""",
        table(
            ("network", *COLUMNS),
            [
                *((name, *reads[name].values()) for name in ("A'", "C'", "R'")),
                *((name.replace("_", " "), *shares.values()) for name, shares in flat.items()),
            ],
        ),
        """What the guard does not cover is in the last column below: averaged outputs. And
        whoever holds A and C holds B'. The loss (cross-entropy) stands beside it, since a
        distance alone says nothing of what a network reads.""",
        table(
            ("pair", "loss of the mean", "mean all", "averaged outputs all"),
            [
                (
                    WAYS[way],
                    asked["loss of the average"],
                    asked["reads"]["average"],
                    asked["outputs averaged"],
                )
                for way, asked in ways.items()
            ],
        ),
        "A margin certifies a distance, not safety.",
    )


def act3(results: Results) -> str:
    """The low-rank term."""
    ranks, routes, holds = (results[key] for key in ("ranks", "routes", "holds_to"))
    guard, alone = results["guard"], results["last layer alone"]
    whole = results["accuracy"]["B'"]["all"]
    outputs = (guard["ways"][way]["outputs averaged"] for way in ("plain", "hardened"))
    return prose(
        _title("Act 3. A low-rank term moves R' on"),
        f"""`offset` is the edit of given rank in every matrix that brings R' nearest to a
        target. It is added to R': no new layer, and A' and C' stay as they are. Towards B',
        which reads {whole:.3f}, from R' of either guard:""",
        table(
            ("rank", "guard: distance", "accuracy", "hardened guard: distance", "accuracy"),
            [
                (x[0], _length(x[1]), x[2], _length(y[1]), y[2])
                for x, y in zip(ranks["plain"], ranks["hardened"], strict=True)
            ],
        ),
        f"""A guard holds to rank r if no offset of rank r or less reads more than half of what
        B' reads ({results["holds_below"]:.3f}). The plain guard holds to rank {holds["plain"]},
        the hardened one to rank {holds["hardened"]}; both moved the mean by
        {_length(guard["radius"])}. The distances are those of `curve`; measured ones differ by
        at most {results["largest gap to curve"]:.0e}.""",
        "The smallest rank that comes within a share of the shift (`rank_to_reach`, `route`):",
        table(
            ("share", "radius", "guard to B'", "hardened to B'", "guard to A", "guard to P"),
            [
                (f"{row['share']:g}", _length(row["radius"]), *row["ranks"].values())
                for row in results["rank_to_reach"]
            ],
        ),
        "The same term leads elsewhere too. From R' of the plain guard towards A, and towards P:",
        table(
            ("rank", "to A: distance", *COLUMNS, "to P: distance", *COLUMNS),
            [
                (x[0], _length(x[1]), *x[2:], _length(y[1]), *y[2:])
                for x, y in zip(routes["A"], routes["P"], strict=True)
            ],
        ),
        "What the rank is, and what it is not:",
        """- It is a bound in weight space, against someone who knows B' and adds an edit: with
        that rank in every matrix, no edit comes nearer to B' than the distance in the table.""",
        f"""- It is limited by the last layer and its ten outputs. The shift has rank
        {guard["rank in the last layer"]["plain"]} there (hardened
        {guard["rank in the last layer"]["hardened"]}), since a gradient of cross-entropy sums
        to zero over the outputs. An edit of that rank restores this layer, and R' with the last
        layer of B' alone reads {alone["plain"]:.3f} (hardened {alone["hardened"]:.3f}).""",
        "- It is not resistance to training: whoever trains R' on digits is not bound by it.",
        """- The guard covers one thing, the mean of the weights at equal coefficients. Averaged
        outputs of A' and C' read {:.3f} (hardened {:.3f}). Merges that use data, training, and
        holders of A and C are not covered either.""".format(*outputs),
        "- A margin certifies a distance, not safety.",
    )
