"""The difference of two models as a low-rank adapter, with what it leaves out."""

import fnmatch
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np

from wspace import checkpoint, geometry, lowrank, tree
from wspace._cli import records
from wspace._cli.calls import wide_enough
from wspace._cli.progress import Progress
from wspace._cli.words import Choice, Misuse, in_bytes, table
from wspace.checkpoint import Checkpoint, Stored, places
from wspace.checkpoint.adapter import Task
from wspace.checkpoint.chosen import chosen
from wspace.checkpoint.folder import refuse_suffix
from wspace.checkpoint.header import shown
from wspace.checkpoint.kept import Kept, kept
from wspace.checkpoint.tensors import write

_LARGE, _FEW = 1024, 16
"""From this many rows and columns on the randomized method pays, for a rank of a 16th of them."""

_USUAL = {
    *("embed", "embed_tokens", "embed_positions", "embed_in", "embedding", "embeddings", "shared"),
    *("word_embeddings", "position_embeddings", "token_type_embeddings", "tok_embeddings"),
    *("token_embedding", "position_embedding", "wte", "wpe"),
}
"""What layers of torch.nn.Embedding are called in the usual models."""

_SIDES = ("left", "right")
_NUMBERS = ("rank", "difference", "tail")


class Row(NamedTuple):
    """A tensor, the rank of its edit, how far the models are apart in it, and what is left."""

    tensor: Stored
    rank: int
    difference: float
    tail: float


@dataclass(frozen=True)
class Adapter:
    """What is to be written: the edit of low rank that brings `start` nearest to `target`.

    The rank of a matrix is `rank`, or the least that keeps this share of the energy of the
    difference, or leaves no more than this tail, but `rank` at most if it is given, too.
    """

    command: str
    start: Path
    target: Path
    rank: int | None
    energy: float | None
    tail: float | None
    exact: bool
    output: Path
    fan_in_fan_out: bool
    embeddings: Sequence[str]
    base_name: str | None
    task_type: str | None
    force: bool
    dry_run: bool
    quiet: bool
    full_hash: bool
    remove_partial: bool
    choice: Choice


def run(job: Adapter) -> None:
    """Writes the adapter, and prints what it leaves out."""
    if job.output.suffix == ".safetensors":
        raise Misuse(f"{job.output} is one file, but an adapter is a folder: give a folder")
    refuse_suffix(job.output, is_folder=True)
    if job.task_type not in (None, *get_args(Task)):
        raise Misuse(f"--task-type must be one of {', '.join(get_args(Task))}")
    if job.base_name == "":
        raise Misuse("--base-name is empty: give the name or the folder of a model")
    records.refuse_overlap(job.output, (job.start, job.target))
    with (
        checkpoint.open(job.start) as start,
        checkpoint.open(job.target) as target,
        wide_enough((start, target)),
    ):
        records.refuse_overlap(job.output, (), (*start.files, *target.files))
        _refuse_output(job, _most_bytes(job, list(start.without(job.choice.skip).values())))
        points = chosen((start, target), outputs=0, **job.choice._asdict())
        for text in points.told:
            print(f"note: {text}", file=sys.stderr)
        weights = points.of_weights(0)
        layers = [x.name for x in weights if _is_layer(x)]
        embeddings = _embeddings(job, layers)
        names = ("adapter_model.safetensors", "adapter_config.json", records.NAME)
        replaced = [str(job.output / x) for x in names if (job.output / x).exists()]
        if replaced and (job.dry_run or not job.quiet):
            said = f"replaces {records.listed(replaced)}; what else is in {job.output} stays"
            print(said, file=sys.stdout if job.dry_run else sys.stderr)
        if job.dry_run:
            print(_plan(job, weights, layers, embeddings))
            _tell_left(job)
            return
        record = records.record(_recipe(job), (start, target), job.full_hash)
        with kept(job.output, record["plan"], job.remove_partial) as done:
            edit, rows = _edit(job, weights, start, target, done)
            if not edit:
                more = "" if job.tail is None else " by more than --tail"
                raise ValueError(
                    f"{job.start} and {job.target} differ in no matrix{more}: there is no adapter"
                )
            checkpoint.save_adapter(
                job.output,
                edit,
                fan_in_fan_out=job.fan_in_fan_out,
                embeddings=[name for name in embeddings if name in edit],
                base=job.base_name,
                task_type=cast("Task | None", job.task_type),
            )
            said = record | {"certificates": _certificates(rows)}
            write(job.output / records.NAME, f"{records.text(said)}\n".encode())
    print(_table(rows))
    _tell_embeddings(job, edit, embeddings)
    if not job.quiet:
        _tell_left(job, sys.stderr)


def _tell_left(job: Adapter, stream: Any = None) -> None:
    left = records.of_targets([job.output], ()).get("left")
    if left:
        print(f"left of interrupted runs: {left}", file=stream)


def _embeddings(job: Adapter, layers: Sequence[str]) -> list[str]:
    """The layers that PEFT keeps by other names: those that are asked for, or have usual names."""
    named = {glob: fnmatch.filter(layers, glob) for glob in job.embeddings}
    for glob, names in named.items():
        if not names:
            raise Misuse(f"--embeddings {glob!r} matches no matrix of {job.start}")
    if named:
        return [name for name in layers if any(name in names for names in named.values())]
    return [name for name in layers if name.split(".")[-2] in _USUAL]


def _tell_embeddings(job: Adapter, edit: Iterable[str], embeddings: Sequence[str]) -> None:
    """Says what was taken for embeddings, where nobody said what is: PEFT loads no others."""
    if job.embeddings:
        return
    found = [name for name in edit if name in embeddings]
    others = [x for x in edit if x not in found and "emb" in x.split(".")[-2].lower()]
    for names, what in ((found, "embeddings"), (others, "linear layers")):
        if names:
            print(
                f"kept as {what}: {records.listed(names)}; else PEFT loads nothing of them, so "
                "where that is wrong give --embeddings",
                file=sys.stderr,
            )


def _most_bytes(job: Adapter, weights: Sequence[Stored]) -> int:
    """How many bytes the factors take at most."""
    shapes = [x.shape for x in weights if _is_layer(x)]
    ranks = [min(shape if job.rank is None else (job.rank, *shape)) for shape in shapes]
    return sum(4 * rank * sum(shape) for rank, shape in zip(ranks, shapes, strict=True))


def _refuse_output(job: Adapter, nbytes: int) -> None:
    """Raises, before a tensor is read, if the adapter cannot be written where it is to be."""
    places.refuse_place(job.output)
    if job.rank is not None:  # else the size shows at the end
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
    job: Adapter,
    weights: Sequence[Stored],
    start: Checkpoint,
    target: Checkpoint,
    done: Kept,
) -> tuple[dict[str, Any], list[Row]]:
    """The factors, and for each tensor its rank, the difference and what is left of it."""
    edit, rows = {}, []
    with Progress(2 * sum(x.nbytes for x in weights), job.quiet) as progress:
        for tensor in weights:
            name = tensor.name
            before = done.get(name)
            if before is None:
                try:
                    row, factors = _cut(job, tensor, start, target)
                except (TypeError, ValueError) as error:
                    error.add_note(f"at tensor {shown(name)}")
                    raise
                done.put(name, factors, {x: repr(getattr(row, x)) for x in _NUMBERS})
                progress.advance(2 * tensor.nbytes)
            else:
                factors, said = before
                distances = float(said["difference"]), float(said["tail"])
                row = Row(tensor, int(said["rank"]), *distances)
                progress.skip(2 * tensor.nbytes)
            if factors:
                edit[name] = lowrank.LowRank(*(jnp.asarray(factors[x]) for x in _SIDES))
            rows.append(row)
    return edit, rows


def _cut(
    job: Adapter, tensor: Stored, start: Checkpoint, target: Checkpoint
) -> tuple[Row, dict[str, np.ndarray]]:
    """What is written of a tensor, and what it leaves out."""
    x, y = (jax.device_put(source[tensor.name].read()) for source in (start, target))
    for path, point in ((job.start, x), (job.target, y)):
        if not bool(jnp.isfinite(point).all()):
            raise ValueError(
                f"{path} holds NaN or an infinity, of which there is no adapter: mend it, or leave "
                "the tensor out by --skip"
            )
    difference = float(geometry.distance(x, y))
    if not _is_layer(tensor) or not difference:
        return Row(tensor, 0, difference, difference), {}
    edit = tree.combine((1.0, -1.0), (y, x), rounded=False)
    cut = _truncated(job, edit)
    row = Row(tensor, cut.factors.rank, difference, float(cut.tail))
    return row, {x: np.asarray(getattr(cut.factors, x)) for x in _SIDES if row.rank}


def _truncated(job: Adapter, edit: Any) -> Any:
    rank = job.rank
    if job.energy is not None or job.tail is not None:
        cut = lowrank.truncate(edit, energy=job.energy, tail=job.tail)
        if rank is None or cut.factors.rank <= rank:
            return cut
    if rank is not None and _pays(rank, edit.shape) and not job.exact:
        return lowrank.truncate(edit, rank, method="randomized", key=jax.random.key(0))
    return lowrank.truncate(edit, rank)


def _pays(rank: int, shape: tuple[int, ...]) -> bool:
    """Whether the randomized method is much faster, and as near but for rounding as a rule."""
    return min(shape) >= max(_LARGE, _FEW * rank)


def _recipe(job: Adapter) -> dict[str, Any]:
    given = ("rank", "energy", "tail", "exact", "base_name", "task_type")
    how = {name: getattr(job, name) for name in given}
    return {
        "command": job.command,
        "models": [str(job.start), str(job.target)],
        **{name: value for name, value in how.items() if value is not None},
        "fan_in_fan_out": job.fan_in_fan_out,
        "embeddings": list(job.embeddings),
        **job.choice.said(),
    }


def _certificates(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "difference": math.hypot(*(row.difference for row in rows)),
        "tail": math.hypot(*(row.tail for row in rows)),
        "tails": {row.tensor.name: row.tail for row in rows},
    }


def _table(rows: Sequence[Row]) -> str:
    lines = [("tensor", "shape", "rank", "difference", "tail", "left")]
    for tensor, rank, difference, tail in rows:
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        lines.append((tensor.name, shape, str(rank), f"{difference:.4g}", f"{tail:.4g}", ""))
        lines[-1] = (*lines[-1][:-1], _share(tail, difference))
    whole = [math.hypot(*(getattr(row, x) for row in rows)) for x in _NUMBERS[1:]]
    lines.append(("all", "", "", f"{whole[0]:.4g}", f"{whole[1]:.4g}", _share(whole[1], whole[0])))
    return table(lines)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "0.0%"


def _rank(job: Adapter) -> str:
    most = "" if job.rank is None else f", at most {job.rank}"
    if job.energy is not None:
        return f"to keep {job.energy:g} of the energy of each difference{most}"
    if job.tail is not None:
        return f"to leave {job.tail:g} of each difference{most}"
    return f"{job.rank}"


def _plan(
    job: Adapter, weights: Sequence[Stored], layers: Sequence[str], embeddings: Sequence[str]
) -> str:
    nbytes = sum(x.nbytes for x in weights)
    cut = job.rank if job.energy is None and job.tail is None and not job.exact else None
    pays = [x for x in weights if cut and _is_layer(x) and _pays(cut, x.shape)]
    by = f", {len(pays)} of them by the randomized method" if pays else ""
    return "\n".join(
        [
            job.command,
            f"  from    {job.start}",
            f"  to      {job.target}",
            f"  rank    {_rank(job)}",
            f"  output  {job.output}: an adapter of {len(layers)} of {len(weights)} tensors, "
            f"{len(embeddings)} of them embeddings",
            f"  reads   {in_bytes(2 * nbytes)}",
            f"  writes  at most {in_bytes(_most_bytes(job, weights))}",
            f"  how     tensor by tensor{by}; the factors stay in memory",
        ]
    )
