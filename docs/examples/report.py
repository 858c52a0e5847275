"""How the experiments write their figures down: JSON, tables of means with errors, pictures."""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np

RESULTS = pathlib.Path(__file__).parent / "results"
INK, FAINT, MOVED, AVOIDED, THIRD = "#222222", "#8a8a8a", "#0072b2", "#c8501e", "#009e73"
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


def over_seeds(rows: Sequence[Any]) -> Any:
    """One tree of figures out of one a seed: at each leaf the list of the figures, by seed."""
    first = rows[0]
    if isinstance(first, Mapping):
        return {name: over_seeds([row[name] for row in rows]) for name in first}
    return [round(float(x), 5) if np.ndim(x) == 0 else _rounded(x) for x in rows]


def _rounded(x: Any) -> list[Any]:
    return np.round(np.asarray(x, np.float64), 5).tolist()


def mean_and_error(values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the seeds, and its standard error."""
    x = np.asarray(values, np.float64)
    error = x.std(axis=0, ddof=1) / np.sqrt(len(x)) if len(x) > 1 else np.zeros(x.shape[1:])
    return x.mean(axis=0), error


def cell(values: Sequence[float], digits: int = 2) -> str:
    """A cell of a table: the mean over the seeds and its standard error."""
    mean, error = (np.round(x, digits) + 0.0 for x in mean_and_error(values))  # no minus zero
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


TABLE = re.compile(r"<!-- table (\w+): (.*?) -->\n\n.*?<!-- end -->", re.DOTALL)


def filled(page: str, tables: Mapping[str, Mapping[str, str]]) -> str:
    """A page with the tables of the experiments in their places, each below its title."""

    def put(place: re.Match[str]) -> str:
        name, title = place.groups()
        if name not in tables:
            return place.group()
        caption = f"{title[0].upper()}{title[1:]}.\n{{ .caption }}"
        return (
            f"<!-- table {name}: {title} -->\n\n{caption}\n\n{tables[name][title]}\n\n<!-- end -->"
        )

    return TABLE.sub(put, page)


def band(axes: Any, x: Sequence[float], values: Sequence[Any], color: str, **style: Any) -> None:
    """A curve of means over the seeds, with a band of one standard error to either side."""
    mean, error = mean_and_error(values)
    axes.fill_between(x, mean - error, mean + error, color=color, alpha=0.2, lw=0)
    axes.plot(x, mean, color=color, **{"lw": 1.6} | style)


def save(results: Mapping[str, Any], file: pathlib.Path) -> None:
    """Writes figures as JSON."""
    file.write_text(json.dumps(results, allow_nan=False, indent=1, ensure_ascii=False) + "\n")


def load(name: str, folder: pathlib.Path = RESULTS) -> dict[str, Any]:
    """The figures of an experiment as they were committed."""
    return json.loads((folder / f"{name}.json").read_text())


def draw(figure: Any, file: pathlib.Path) -> None:
    """Writes a picture. Call it, and draw the figure, within `styled`."""
    figure.savefig(file, metadata={"Creator": None, "Date": None})
    plt.close(figure)


def styled() -> Any:
    """The style of the pictures, whatever the user's own: a context."""
    return mpl.rc_context(mpl.rcParamsDefault | STYLE)
