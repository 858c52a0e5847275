"""What is in checkpoints, how far they are apart, and what a guard is worth."""

import contextlib
import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from wspace import checkpoint, geometry, negative
from wspace._cli import records
from wspace._cli.calls import wide_enough
from wspace._cli.progress import Progress
from wspace._cli.words import Choice, Misuse, in_bytes, printable, table
from wspace.checkpoint.chosen import Chosen, chosen

_PIECE = 2**20


def inspect(path: Path, as_json: bool) -> None:
    """Prints what is in a checkpoint, without reading a tensor."""
    with checkpoint.open(path) as opened:
        tensors = list(opened.values())
        counts = Counter(x.dtype.name for x in tensors)
        said = {
            "path": str(path),
            "files": [file.name for file in opened.files],
            "others": [other.name for other in opened.others],
            "metadata": opened.metadata,
            "tensors": {
                x.name: {"dtype": x.dtype.name, "shape": list(x.shape), "bytes": x.nbytes}
                for x in tensors
            },
            "elements": sum(x.size for x in tensors),
            "bytes": sum(x.nbytes for x in tensors),
        }
        if as_json:
            print(records.text(said))
            return
        rows = [("tensor", "dtype", "shape", "bytes")]
        rows += [
            (x.name, x.dtype.name, " x ".join(map(str, x.shape)) or "scalar", in_bytes(x.nbytes))
            for x in tensors
        ]
        print(f"{path}: {len(tensors)} tensors, {said['elements']} elements, ", end="")
        print(f"{in_bytes(said['bytes'])} in {len(said['files'])} file(s)")
        print("dtypes    " + (", ".join(f"{k} ({n})" for k, n in counts.items()) or "none"))
        print("others    " + (", ".join(map(printable, said["others"])) or "none"))
        print("metadata  " + (", ".join(map(printable, said["metadata"])) or "none"))
        print()
        print(table(rows))


def distance(paths: Sequence[Path], as_json: bool, quiet: bool, choice: Choice) -> None:
    """Prints norms, distances, angles and inner products, and which tensors differ most."""
    with _opened(paths, choice) as (sources, names, _):
        k = len(sources)
        own = np.zeros((len(names), k))
        grams, distances, angles = np.zeros((3, len(names), k, k))
        total = sum(source[name].nbytes for source in sources for name in names)
        with Progress(total, quiet) as progress:
            for i, name in enumerate(names):
                arrays = [source[name].read() for source in sources]
                points = [jax.device_put(x) for x in arrays]
                grams[i] = np.asarray(geometry.gram(points))
                own[i] = [_norm(x) for x in arrays]
                for a in range(k):
                    for b in range(a):
                        x, y = points[a], points[b]
                        distances[i, [a, b], [b, a]] = float(geometry.distance(x, y))
                        angles[i, [a, b], [b, a]] = float(geometry.angle(x, y))
                progress.advance(sum(source[name].nbytes for source in sources))
    norms = np.array([math.hypot(*column) for column in own.T])
    said: dict[str, Any] = {
        "models": list(map(str, paths)),
        "norms": norms,
        "distances": _joined(distances),
        "angles_in_degrees": np.degrees(_angle(own, norms, angles)),
        "gram": grams.sum(0),
        "tensors": {
            name: {
                "norms": own[i],
                "distances": distances[i],
                "angles_in_degrees": np.degrees(angles[i]),
            }
            for i, name in enumerate(names)
        },
    }
    if as_json:
        print(records.text(said))
        return
    labels = [f"{i + 1}" for i in range(k)]
    rows = [("model", "norm", "path")]
    rows += [(labels[i], f"{norms[i]:.6g}", str(paths[i])) for i in range(k)]
    print(table(rows))
    for title, key in (
        ("distance", "distances"),
        ("angle, degrees", "angles_in_degrees"),
        ("inner product", "gram"),
    ):
        print()
        body = [[labels[i], *(f"{x:.6g}" for x in said[key][i])] for i in range(k)]
        print(table([[title, *labels], *body]))
    pairs = [(a, b) for b in range(k) for a in range(b)][:4]
    heads = [f"{title} {a + 1}-{b + 1}" for a, b in pairs for title in ("distance", "angle")]
    rows = [("tensor", "norm 1", *heads)]
    for name, tensor in said["tensors"].items():
        cells = [
            f"{tensor[key][pair]:.4g}"
            for pair in pairs
            for key in ("distances", "angles_in_degrees")
        ]
        rows.append((name, f"{tensor['norms'][0]:.4g}", *cells))
    print()
    print(table(rows))


def _norm(x: np.ndarray) -> float:
    """The norm of a tensor in double precision, whatever its scale, in the memory of a piece."""
    flat, norms = x.reshape(-1), []
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE].astype(np.float64)
        scale = np.max(np.abs(piece))
        norms.append(float(scale * np.linalg.norm(piece / scale)) if scale > 0 else float(scale))
    return math.hypot(*norms)


def _joined(distances: np.ndarray) -> np.ndarray:
    """Distances of models from those of their tensors."""
    largest = np.maximum(distances.max(0, initial=0), np.finfo(float).tiny)
    return largest * np.sqrt(((distances / largest) ** 2).sum(0))


def _angle(own: np.ndarray, norms: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Angles of models from the norms and angles of their tensors.

    With both models scaled to norm one, and a tensor's parts a and b long, their difference and
    their sum have the squares (a - b)^2 + 4 a b sin^2 and cos^2 of half the angle of the tensor:
    nothing cancels, whatever the norms are. Zero where a norm is zero, as `geometry.angle`.
    """
    shares = own / np.where(norms == 0, 1, norms)
    a, b = shares[:, :, None], shares[:, None, :]
    apart, product = (a - b) ** 2, 4 * a * b
    sine = np.sqrt((apart + product * np.sin(angles / 2) ** 2).sum(0))
    cosine = np.sqrt((apart + product * np.cos(angles / 2) ** 2).sum(0))
    return np.where(norms[:, None] * norms == 0, 0, 2 * np.arctan2(sine, cosine))


def audit(
    paths: Sequence[Path],
    avoid: Path,
    radius: float,
    coefficients: Sequence[float] | None,
    as_json: bool,
    choice: Choice,
) -> None:
    """Prints what stands between the average of models and a ball around another one."""
    if coefficients is not None and len(coefficients) != len(paths):
        raise Misuse(f"{len(coefficients)} coefficients for {len(paths)} models: give one a model")
    if not radius > 0:
        raise Misuse(f"--radius must be positive, got {radius:g}")
    with _opened((*paths, avoid), choice) as (sources, names, _):
        *points, center = (
            {name: jax.device_put(source[name].read()) for name in names} for source in sources
        )
        report = negative.audit(points, coefficients or [1.0] * len(points), center, radius)
        if not as_json:
            print(report)
            return
        said = {x.name: getattr(report, x.name) for x in dataclasses.fields(report)}
        said["leaves"] = [dataclasses.asdict(leaf) for leaf in report.leaves]
        said["unmoved_leaves"] = report.unmoved_leaves
        print(records.text({"models": list(map(str, paths)), "avoid": str(avoid), **said}))


@contextlib.contextmanager
def _opened(paths: Sequence[Path], choice: Choice) -> Generator[Chosen]:
    """Checkpoints that are points of one weight space, while they are open."""
    with contextlib.ExitStack() as stack:
        sources = [stack.enter_context(checkpoint.open(path)) for path in paths]
        stack.enter_context(wide_enough(sources))
        points = chosen(sources, outputs=0, **choice._asdict())
        for text in points.told:
            print(f"note: {text}", file=sys.stderr)
        yield points
