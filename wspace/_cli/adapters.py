"""The difference of two models as a low-rank adapter, with what it leaves out."""

import fnmatch
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from wspace import checkpoint, geometry, negative
from wspace._checks import WEIGHT_DTYPES
from wspace._cli import records
from wspace._cli.calls import wide_enough
from wspace._cli.progress import Progress
from wspace._cli.words import Misuse, in_bytes, table
from wspace.checkpoint import Checkpoint, Stored, places
from wspace.checkpoint.streaming import alike


@dataclass(frozen=True)
class Adapter:
    """What is to be written: the edit of this rank that brings `start` nearest to `target`."""

    command: str
    start: Path
    target: Path
    rank: int
    output: Path
    fan_in_fan_out: bool
    embeddings: Sequence[str]
    force: bool
    dry_run: bool
    quiet: bool
    full_hash: bool
    remove_partial: bool


def run(job: Adapter) -> None:
    """Writes the adapter, and prints what it leaves out."""
    if job.output.suffix == ".safetensors":
        raise Misuse(f"{job.output} is one file, but an adapter is a folder: give a folder")
    records.refuse_overlap(job.output, (job.start, job.target))
    with (
        checkpoint.open(job.start) as start,
        checkpoint.open(job.target) as target,
        wide_enough((start, target)),
    ):
        records.refuse_overlap(job.output, (), (*start.files, *target.files))
        weights = [x for x in start.values() if x.dtype in WEIGHT_DTYPES]
        layers = [x.name for x in weights if _is_layer(x)]
        _refuse_output(job, _most_bytes(job, weights))
        alike((start, target))
        named = {glob: fnmatch.filter(layers, glob) for glob in job.embeddings}
        for glob, names in named.items():
            if not names:
                raise Misuse(f"--embeddings {glob!r} matches no matrix of {job.start}")
        if job.dry_run:
            print(_plan(job, weights, layers))
            return
        edit, rows = _edit(job, weights, start, target)
        if not edit:
            raise ValueError(
                f"{job.start} and {job.target} differ in no matrix: there is no adapter"
            )
        record = _record(job, (start, target), rows)
    embeddings = {name for names in named.values() for name in names if name in edit}
    checkpoint.save_adapter(
        job.output, edit, fan_in_fan_out=job.fan_in_fan_out, embeddings=embeddings
    )
    (job.output / records.NAME).write_text(json.dumps(record, indent=2) + "\n")
    print(_table(rows))


def _most_bytes(job: Adapter, weights: Sequence[Stored]) -> int:
    """How many bytes the factors take at most."""
    shapes = [x.shape for x in weights if _is_layer(x)]
    return sum(4 * min(job.rank, *shape) * sum(shape) for shape in shapes)


def _refuse_output(job: Adapter, nbytes: int) -> None:
    """Raises, before a tensor is read, if the adapter cannot be written where it is to be."""
    places.refuse_place(job.output)
    places.refuse_size(job.output, nbytes)
    if not os.path.lexists(job.output):
        return
    if not job.force:
        raise FileExistsError(
            f"{job.output} exists: give another path, or --force to replace an adapter in it"
        )
    if not job.output.is_dir():
        raise FileExistsError(
            f"{job.output} is a file, not the folder of an adapter: give another path"
        )


def _is_layer(tensor: Stored) -> bool:
    """Whether LoRA can edit a tensor: the matrix of a layer, by its name in torch."""
    return len(tensor.shape) == 2 and tensor.name.endswith(".weight")


def _edit(
    job: Adapter, weights: Sequence[Stored], start: Checkpoint, target: Checkpoint
) -> tuple[dict[str, Any], list[tuple[Stored, int, float, float]]]:
    """The factors, and for each tensor its rank, the difference and what is left of it."""
    edit, rows = {}, []
    with Progress(2 * sum(x.nbytes for x in weights), job.quiet) as progress:
        for tensor in weights:
            name = tensor.name
            x, y = (jax.device_put(source[name].read()) for source in (start, target))
            difference = float(geometry.distance(x, y))
            tail, rank = difference, 0
            if _is_layer(tensor) and difference:
                cut = negative.offset(x, y, job.rank)
                edit[name], tail = cut.factors, float(cut.tail)
                rank = min(job.rank, *tensor.shape)
            rows.append((tensor, rank, difference, tail))
            progress.advance(2 * tensor.nbytes)
    return edit, rows


def _record(
    job: Adapter,
    sources: Sequence[Checkpoint],
    rows: Sequence[tuple[Stored, int, float, float]],
) -> dict[str, Any]:
    recipe = {
        "command": job.command,
        "models": [str(job.start), str(job.target)],
        "rank": job.rank,
        "fan_in_fan_out": job.fan_in_fan_out,
        "embeddings": list(job.embeddings),
    }
    return records.record(recipe, sources, job.full_hash) | {
        "certificates": {
            "difference": math.hypot(*(row[2] for row in rows)),
            "tail": math.hypot(*(row[3] for row in rows)),
            "tails": {row[0].name: row[3] for row in rows},
        }
    }


def _table(rows: Sequence[tuple[Stored, int, float, float]]) -> str:
    lines = [("tensor", "shape", "rank", "difference", "tail", "left")]
    for tensor, rank, difference, tail in rows:
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        lines.append((tensor.name, shape, str(rank), f"{difference:.4g}", f"{tail:.4g}", ""))
        lines[-1] = (*lines[-1][:-1], _share(tail, difference))
    whole = [math.hypot(*(row[i] for row in rows)) for i in (2, 3)]
    lines.append(("all", "", "", f"{whole[0]:.4g}", f"{whole[1]:.4g}", _share(whole[1], whole[0])))
    return table(lines)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "0.0%"


def _plan(job: Adapter, weights: Sequence[Stored], layers: Sequence[str]) -> str:
    nbytes = sum(x.nbytes for x in weights)
    return "\n".join(
        [
            job.command,
            f"  from    {job.start}",
            f"  to      {job.target}",
            f"  rank    {job.rank}",
            f"  output  {job.output}: an adapter of {len(layers)} of {len(weights)} tensors",
            f"  reads   {in_bytes(2 * nbytes)}",
            f"  writes  at most {in_bytes(_most_bytes(job, weights))}",
            "  how     tensor by tensor; the factors stay in memory",
        ]
    )
