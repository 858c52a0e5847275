"""What is in checkpoints, how far they are apart, and what a guard is worth."""

import contextlib
import dataclasses
import json
import math
import sys
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from wspace import checkpoint, geometry, negative
from wspace._cli.calls import wide_enough
from wspace._cli.progress import Progress
from wspace._cli.words import Choice, Misuse, in_bytes, table
from wspace.checkpoint.chosen import Chosen, chosen


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
            _print_json(said)
            return
        rows = [("tensor", "dtype", "shape", "bytes")]
        rows += [
            (x.name, x.dtype.name, " x ".join(map(str, x.shape)) or "scalar", in_bytes(x.nbytes))
            for x in tensors
        ]
        print(f"{path}: {len(tensors)} tensors, {said['elements']} elements, ", end="")
        print(f"{in_bytes(said['bytes'])} in {len(said['files'])} file(s)")
        print("dtypes    " + (", ".join(f"{k} ({n})" for k, n in counts.items()) or "none"))
        print("others    " + (", ".join(said["others"]) or "none"))
        print("metadata  " + (", ".join(said["metadata"]) or "none"))
        print()
        print(table(rows))


def distance(paths: Sequence[Path], as_json: bool, quiet: bool, choice: Choice) -> None:
    """Prints norms, distances, angles and inner products, and which tensors differ most."""
    with _opened(paths, choice) as (sources, names, _):
        k = len(sources)
        grams, squares, angles = np.zeros((3, len(names), k, k))
        total = sum(source[name].nbytes for source in sources for name in names)
        with Progress(total, quiet) as progress:
            for i, name in enumerate(names):
                points = [jax.device_put(source[name].read()) for source in sources]
                grams[i] = np.asarray(geometry.gram(points))
                for a in range(k):
                    for b in range(a):
                        found = float(geometry.distance(points[a], points[b]))
                        squares[i, a, b] = squares[i, b, a] = found**2
                        turn = float(geometry.angle(points[a], points[b]))
                        angles[i, a, b] = angles[i, b, a] = turn
                progress.advance(sum(source[name].nbytes for source in sources))
    gram, square = grams.sum(0), squares.sum(0)
    norms, own = np.sqrt(np.diagonal(gram)), np.sqrt(np.diagonal(grams, axis1=1, axis2=2))
    said: dict[str, Any] = {
        "models": list(map(str, paths)),
        "norms": norms,
        "distances": np.sqrt(square),
        "angles_in_degrees": np.degrees(_whole_angles(norms, own, angles)),
        "gram": gram,
        "tensors": {
            name: {
                "norms": own[i],
                "distances": np.sqrt(squares[i]),
                "angles_in_degrees": np.degrees(angles[i]),
            }
            for i, name in enumerate(names)
        },
    }
    if as_json:
        _print_json(said)
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
    for name, its in said["tensors"].items():
        cells = [
            f"{its[key][pair]:.4g}" for pair in pairs for key in ("distances", "angles_in_degrees")
        ]
        rows.append((name, f"{its['norms'][0]:.4g}", *cells))
    print()
    print(table(rows))


def _whole_angles(norms: np.ndarray, own: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Angles of models from the norms and the angles of their tensors.

    With unit models of which a tensor has the lengths p and q, the squares of chords add up:
    (p - q)^2 + 4 p q sin^2 of half the angle to the difference, and with cos^2 to the sum, all
    terms of one sign. Zero where a norm is zero, as in `geometry.angle`.
    """
    unit = own / np.where(norms == 0, 1, norms)
    p, q = unit[:, :, None], unit[:, None, :]
    apart, both = (p - q) ** 2, 4 * p * q
    difference = np.sum(apart + both * np.sin(angles / 2) ** 2, axis=0)
    together = np.sum(apart + both * np.cos(angles / 2) ** 2, axis=0)
    found = 2 * np.arctan2(np.sqrt(difference), np.sqrt(together))
    np.fill_diagonal(found, 0)
    return np.where((norms[:, None] == 0) | (norms == 0), 0, found)


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
        _print_json({"models": list(map(str, paths)), "avoid": str(avoid), **said})


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


def _print_json(said: Any) -> None:
    print(json.dumps(_plain(said), indent=2))


def _plain(value: Any) -> Any:
    """A value in the types of JSON, which has no infinity and no NaN: they become null."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _plain(np.asarray(value).tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
