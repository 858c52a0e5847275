"""A recipe carried out: checked, planned, streamed, recorded."""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wspace import checkpoint
from wspace._checks import is_weight, matches
from wspace._cli import records
from wspace._cli.calls import Call, Recipe, wide_enough
from wspace._cli.methods import HOW
from wspace._cli.progress import Progress
from wspace._cli.words import SHARD, Misuse, in_bytes
from wspace._names import unmatched
from wspace.checkpoint import Checkpoint, Writer, partial, places
from wspace.checkpoint.chosen import Chosen, chosen
from wspace.checkpoint.folder import refuse_suffix
from wspace.checkpoint.header import shown
from wspace.checkpoint.streaming import Nonfinite, refuse_nonfinite, streamed
from wspace.checkpoint.tensors import writing

_SMALL, _OFTEN = 2**20, 8
"""Tensors of so few entries, and so many of a shape, are computed one by one where they can be."""


@dataclass(frozen=True)
class Output:
    """Where the result goes, and how it is told."""

    path: Path
    force: bool = False
    shard_bytes: int | None = None
    dry_run: bool = False
    quiet: bool = False
    full_hash: bool = False
    remove_partial: bool = False
    allow_nonfinite: bool = False


def run(recipe: Recipe, output: Output) -> None:
    """Carries a recipe out."""
    started = time.monotonic()
    _refuse_patterns(recipe)
    records.refuse_overlap(output.path, recipe.sources)
    recipe.checked()
    with contextlib.ExitStack() as stack:
        layouts = [stack.enter_context(checkpoint.open(path)) for path in recipe.sources]
        records.refuse_overlap(output.path, recipe.sources, [y for x in layouts for y in x.files])
        stack.enter_context(wide_enough(layouts))
        whole = [x.without(recipe.choice.skip) for x in layouts]
        targets = _targets(recipe, output)
        _refuse_targets(recipe, output, targets, whole)
        points = chosen(
            _in_common(recipe, layouts), outputs=recipe.outputs, **recipe.choice._asdict()
        )
        layouts, sources = whole, points.sources
        _check_names(recipe, points)
        _tell(recipe, points)
        record = records.record(
            {
                "command": recipe.command,
                "method": recipe.method,
                "models": [str(path) for path in recipe.models],
                **{name: str(path) for name, path in recipe.trees.items()},
                "options": dict(recipe.options),
                "patterns": [{"match": glob, **own} for glob, own in recipe.patterns],
                **({"seed": recipe.seed} if recipe.table.seeded else {}),
                **({"common_rows": True} if recipe.common_rows else {}),
                **recipe.choice.said(),
            },
            sources,
            output.full_hash and not output.dry_run,
        )
        left = list(targets)
        if recipe.table.returns == "list" and not output.force:
            left = [i for i in targets if not _is_done(targets[i], record)]
        for i in left:
            _refuse(targets[i], output)
        said = records.of_targets([targets[i] for i in left], layouts[0].others)
        if output.dry_run:
            print(_plan(recipe, output, sources, said))
            return
        if not output.quiet and "replaces" in said:
            print(f"replaces {said['replaces']}", file=sys.stderr)
        job = _Job(output, layouts, points, record, Call(recipe), _lazy(recipe, sources), started)
        for i, target in targets.items():
            if i in left:
                _write(job, target, i)
            elif not output.quiet:
                print(f"{target} is there from an earlier run of this command", file=sys.stderr)
        said = records.of_targets(targets.values(), ())
        if not output.quiet and "left" in said:
            print(f"left of interrupted runs: {said['left']}", file=sys.stderr)


@dataclass
class _Job:
    """What writing takes; `results` has all outputs where they are computed at once.

    The outputs are like `layouts`, of which the points may have fewer rows.
    """

    output: Output
    layouts: Sequence[Checkpoint]
    points: Chosen
    record: Mapping[str, Any]
    call: Call
    lazy: bool
    started: float
    results: list[dict[str, Any]] | None = None

    def result(self, points: Sequence[Mapping[str, Any]], index: int) -> dict[str, Any]:
        """What the function gives for one output."""
        if not self.lazy:
            return self.call(points)[index]
        if self.results is None:
            self.results = self.call(points)
        return dict(self.results[index])


def _lazy(recipe: Recipe, sources: Sequence[Checkpoint]) -> bool:
    """Whether the function is called once with whole trees, and not for every tensor alone.

    Both give the same. Of many small tensors of few shapes that are measured by themselves, each
    is in memory at once, and is read once.
    """
    tensors = list(sources[0].values())
    alike = len({(x.shape, x.dtype) for x in tensors}) * _OFTEN <= len(tensors)
    small = all(x.size <= _SMALL for x in tensors)
    whole = any(recipe.is_whole(own) for _, own in recipe.settings())
    method = recipe.table
    by_leaf = method.entry.per_tensor or any(x.name == "scope" for x in method.options)
    alone = small and alike and by_leaf and not whole and method.returns != "list"
    return method.entry.lazy and not alone


def _refuse_patterns(recipe: Recipe) -> None:
    whole = any(recipe.is_whole(own) for _, own in recipe.settings())
    if recipe.patterns and whole and not recipe.numbers_alone():
        raise Misuse(
            f"patterns give options to single tensors, but with these options {recipe.method} "
            "looks at the whole model: give scope = 'leaf' if it has that, or leave out of them "
            "what is no number of each tensor, such as coefficients"
        )


def _in_common(recipe: Recipe, layouts: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The models, each tensor cut to the rows that all models have."""
    counts = {}
    for name, tensor in layouts[0].items():
        if matches(name, recipe.choice.carry + recipe.choice.skip):
            continue
        shapes = [x[name].shape for x in layouts if name in x]
        if len(set(shapes)) == 1 or not all(x and x[1:] == tensor.shape[1:] for x in shapes):
            continue
        if not recipe.common_rows:
            raise Misuse(
                f"tensor {shown(name)} has {', '.join(str(x[0]) for x in shapes)} rows in the "
                "models, as where a vocabulary was extended: give --common-rows to combine the "
                "rows that all have, and to keep the others of the model that the output is like"
            )
        counts[name] = min(x[0] for x in shapes)
    return [x.first_rows({name: n for name, n in counts.items() if name in x}) for x in layouts]


_TOLD = 8
"""Tensors that are told one by one."""

_VARIANCE = re.compile(r"(^|[._])((running|moving)_var(iance)?|var|variance)$")


def _tell(recipe: Recipe, points: Chosen) -> None:
    """Says what was decided without being asked for, and what a negative coefficient reaches."""
    told = list(points.told)
    name = next(filter(_VARIANCE.search, points.combined), None)
    if name is not None and recipe.subtracts():
        told.append(
            f"what is subtracted is subtracted from variances, too, such as {shown(name)}, which "
            f"may become negative: --carry '*{name.rpartition('.')[2]}' keeps those of the first "
            "model"
        )
    for text in told:
        print(f"note: {text}", file=sys.stderr)


def _check_names(recipe: Recipe, points: Chosen) -> None:
    """Raises unless all patterns match a tensor, and the dtypes are those of the recipe."""
    first = points.sources[0]
    missing = unmatched([glob for glob, _ in recipe.patterns], list(first))
    if missing is not None:
        raise Misuse(f"the pattern {missing!r} matches no tensor of {first.path}")
    for tensor in first.values():
        is_other = is_weight(tensor) and tensor.dtype.name != recipe.dtype
        if recipe.dtype is not None and is_other:
            raise Misuse(
                f"the recipe asks for {recipe.dtype}, but {shown(tensor.name)} of {first.path} is "
                f"{tensor.dtype}: every tensor keeps its dtype here, so leave the dtype out"
            )


def _targets(recipe: Recipe, output: Output) -> dict[int, Path]:
    """The outputs by the index of the source that each is like."""
    if recipe.table.returns != "list":
        return {0: output.path}
    if output.path.suffix == ".safetensors":
        raise Misuse(f"{output.path} is one file, but every model is moved: give a folder")
    refuse_suffix(output.path, is_folder=True)
    names = [records.called(path) for path in recipe.models]
    return {
        i: output.path / (name if names.count(name) == 1 else f"{i + 1}-{name}")
        for i, name in enumerate(names)
    }


def _refuse_targets(
    recipe: Recipe, output: Output, targets: Mapping[int, Path], layouts: Sequence[Checkpoint]
) -> None:
    """Raises, before a tensor is read, if the outputs cannot be written where they are to be."""
    several = recipe.table.returns == "list"
    if several and not os.path.lexists(output.path):
        places.refuse_place(output.path)
    else:
        for target in targets.values():
            places.refuse_place(target)
    if not several:
        _refuse(output.path, output)
    left = {i: x for i, x in targets.items() if output.force or not os.path.lexists(x)}
    sizes = [sum(tensor.nbytes for tensor in layouts[i].values()) for i in left]
    kept = sum(partial.held(x) for target in left.values() for x in partial.leftovers(target))
    places.refuse_size(output.path, sum(sizes) - kept)


def _refuse(target: Path, output: Output) -> None:
    is_file = target.suffix == ".safetensors"
    try:
        places.refuse_existing(target, output.force, is_file)
    except FileExistsError as error:
        raise FileExistsError(str(error).replace("force=True", "--force")) from error


def _is_done(target: Path, record: Mapping[str, Any]) -> bool:
    """Whether an interrupted run of this recipe finished this output, one of several."""
    try:
        return json.loads((target / records.NAME).read_text())["plan"] == record["plan"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write(job: _Job, target: Path, index: int) -> None:
    """Writes the output that is like the source of this index."""
    layout, is_file = job.layouts[index], target.suffix == ".safetensors"
    if target != job.output.path:
        with writing(job.output.path):
            job.output.path.mkdir(exist_ok=True)
    with checkpoint.create(
        target,
        layout,
        shard_bytes=None if is_file else job.output.shard_bytes or SHARD,
        metadata=layout.metadata | {"wspace": json.dumps(job.record)},
        name=layout.name,
        others=() if is_file else layout.others,
        force=job.output.force,
        remove_partial=job.output.remove_partial,
        plan=job.record["plan"],
        keep_on_error=False,
    ) as writer:
        found = _fill(job, writer, index)
        certificates = job.call.certificates()
        if not is_file:
            counts = {name: x._asdict() for name, x in found.items()}
            said = {**job.record, "certificates": certificates}
            said |= {"nonfinite": counts} if counts else {}
            writer.add(records.NAME, f"{records.text(said)}\n".encode())
    _tell_nonfinite(found)
    for name, value in certificates.items():
        print(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")
    if not job.output.quiet:
        nbytes = in_bytes(sum(tensor.nbytes for tensor in layout.values()))
        seconds = time.monotonic() - job.started
        print(f"wrote {target}: {len(layout)} tensors, {nbytes}, {seconds:.1f} s", file=sys.stderr)


def _tell_nonfinite(found: Mapping[str, Nonfinite]) -> None:
    for name, counts in list(found.items())[:_TOLD]:
        print(
            f"note: entries of {shown(name)} that are infinite or NaN: {sum(counts)}, of which "
            f"{counts.given} are so in a model",
            file=sys.stderr,
        )
    if len(found) > _TOLD:
        total = sum(map(sum, found.values()))
        print(
            f"note: so it is in {len(found) - _TOLD} more tensors, {total} entries in all",
            file=sys.stderr,
        )


def _fill(job: _Job, writer: Writer, index: int) -> dict[str, Nonfinite]:
    """Writes the tensors that are not there from before an interruption."""
    layout, finished = job.layouts[index], writer.finished
    with Progress(sum(tensor.nbytes for tensor in layout.values()), job.output.quiet) as progress:
        progress.skip(sum(layout[name].nbytes for name in finished))
        found = streamed(
            lambda points: job.result(points, index),
            job.points,
            writer,
            lazy=job.lazy,
            like=index,
            whole=layout,
            advance=progress.advance,
            look=progress.look,
        )
    if not job.output.allow_nonfinite:
        refuse_nonfinite(found)
    return found


def _plan(
    recipe: Recipe, output: Output, sources: Sequence[Checkpoint], said: Mapping[str, str]
) -> str:
    """What would be done."""
    sizes = [sum(tensor.nbytes for tensor in source.values()) for source in sources]
    whole = any(recipe.is_whole(own) for _, own in recipe.settings())
    how = "tensors" if not _lazy(recipe, sources) else "passes" if whole else "pieces"
    passes = recipe.outputs + output.full_hash
    lines = {
        "models": ", ".join(map(str, recipe.models)),
        **{name: str(path) for name, path in recipe.trees.items()},
        **{name: str(value) for name, value in recipe.options.items()},
        **{f"where {glob}": str(dict(own)) for glob, own in recipe.patterns},
        **({"seed": str(recipe.seed)} if recipe.table.seeded else {}),
        **{name: str(value) for name, value in recipe.choice.said().items()},
        "output": str(output.path),
        **said,
        "reads": in_bytes(sum(sizes) * passes) + (", and more for the sums" if whole else ""),
        "writes": in_bytes(sum(sizes[: recipe.outputs])),
        "how": HOW[how],
    }
    width = max(map(len, lines)) + 2
    return "\n".join(
        [
            f"{recipe.command} {recipe.method}",
            *(f"  {k.replace('_', '-'):<{width}}{v}" for k, v in lines.items()),
        ]
    )
