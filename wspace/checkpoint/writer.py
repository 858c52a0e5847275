"""Checkpoints of any size written tensor by tensor, put in place at once, and resumed."""

import contextlib
import json
import os
import threading
import zlib
from bisect import bisect
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from wspace.checkpoint import header, partial
from wspace.checkpoint.hosts import Hosts, leads
from wspace.checkpoint.pieces import is_whole, joined, pieces, runs
from wspace.checkpoint.planned import Files, carried, digest, planned, refuse_name
from wspace.checkpoint.stored import Stored
from wspace.checkpoint.tensors import writing

__all__ = ["Layout", "Writer", "create"]

Layout: TypeAlias = Mapping[str, Stored | jax.ShapeDtypeStruct | jax.Array | np.ndarray]
"""The tensors of a checkpoint to be written, in order: from names to anything with a dtype and a
shape, of which nothing else is used. An open checkpoint is the layout of one like it."""


class Writer:
    """Writes the tensors of a checkpoint, in any order and from any thread.

    Made by [`create`][wspace.checkpoint.create]. Every tensor is written exactly once, whole or
    in parts. Of an array that is spread over devices, each process writes the shards that it has,
    the first of equal ones, and nothing is gathered.

    Examples:
        >>> import tempfile
        >>> import jax, jax.numpy as jnp
        >>> from wspace import checkpoint
        >>> layout = {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with checkpoint.create(f"{folder}/out", layout) as writer:
        ...         writer.write_part("w", 4, jnp.zeros(2))
        ...         writer.write_part("w", 0, jnp.ones(4))
        ...     checkpoint.load(f"{folder}/out")["w"]
        Array([[1., 1., 1.],
               [1., 0., 0.]], dtype=float32)
    """

    def __init__(
        self, files: Files, folder: Path, streams: Mapping[str, int], count: Callable[[int], None]
    ) -> None:
        """Writes into open files, and counts the bytes; made by `create`."""
        self._files = files
        self._streams = streams
        self._folder = folder
        self._count = count
        self._lock = threading.Lock()
        self._taken: dict[str, list[tuple[int, int]]] = {name: [] for name in files.places}
        self._parts: dict[str, list[partial.Part]] = {name: [] for name in files.places}
        self._shared: dict[str, int] = {}
        self._left = {name: place.entry.nbytes for name, place in files.places.items()}
        self._finished = {name for name, left in self._left.items() if not left}
        self._journal: partial.Journal | None = None

    @property
    def finished(self) -> frozenset[str]:
        """The names of the tensors that are written, before an interruption or since.

        Those without elements are finished from the start. In a run of several processes, those
        that this one wrote all of.
        """
        with self._lock:
            return frozenset(self._finished)

    def write(self, name: str, array: jax.Array | np.ndarray) -> None:
        """Writes a whole tensor.

        Args:
            name: A name of the layout.
            array: An array of the dtype and shape that the layout says, of any strides. Where it
                is shared by several processes, all of them call this.

        Raises:
            ValueError: If the layout has no such name, another dtype or another shape, or the
                tensor or a part of it was written before.
            OSError: If it cannot be written.
        """
        entry = self._entry(name, array)
        if array.shape != entry.shape:
            raise ValueError(
                f"{header.shown(name)} is given as an array of shape {array.shape}, but the layout "
                f"says {entry.shape}: reshape it, or write parts of it by write_part"
            )
        self._write(name, 0, array)

    def write_part(self, name: str, start: int, array: jax.Array | np.ndarray) -> None:
        """Writes consecutive elements of a tensor, from the one with the flat index `start`.

        Args:
            name: A name of the layout.
            start: The index of the first element in the tensor, flattened in row-major order.
            array: A flat array of the dtype that the layout says.

        Raises:
            ValueError: If the layout has no such name or another dtype, the array is not flat or
                reaches over the end, or one of the elements was written before.
            OSError: If it cannot be written.
        """
        entry = self._entry(name, array)
        size = entry.nbytes // entry.dtype.itemsize
        if len(array.shape) != 1 or not 0 <= start <= size - array.shape[0]:
            raise ValueError(
                f"a part of {header.shown(name)} is given as an array of shape {array.shape} from "
                f"element {start}: it must be flat and end in the {size} elements of the tensor"
            )
        self._write(name, start, array)

    def add(self, name: str, data: bytes) -> None:
        """Puts a small file, such as a record of how the weights were made, into the folder.

        Args:
            name: A file name; a file that was carried over is replaced.
            data: The content.

        Raises:
            ValueError: If the output is a single file, or the name is that of a file of tensors,
                or leads out of the folder.
            OSError: If it cannot be written.
        """
        refuse_name(self._files, name)
        with writing(self._folder / name):
            (self._folder / name).write_bytes(data)

    def _entry(self, name: str, array: Any) -> header.Entry:
        if name not in self._files.places:
            raise ValueError(
                f"the layout has no tensor {header.shown(name)}: write those that it names"
            )
        entry = self._files.places[name].entry
        dtype = getattr(array, "dtype", type(array))
        if dtype != entry.dtype:
            raise ValueError(
                f"{header.shown(name)} is given as {dtype}, but the layout says {entry.dtype}: "
                "convert it, so that what is rounded is seen"
            )
        return entry

    def _write(self, name: str, start: int, array: jax.Array | np.ndarray) -> None:
        """Writes what this process has of an array, from this element of the tensor on."""
        if not array.size:
            return
        place = self._files.places[name]
        if place.file not in self._streams:
            raise ValueError(
                f"{header.shown(name)} is written too late: write inside of the with statement"
            )
        first = start * array.dtype.itemsize
        span = first, first + array.nbytes
        self._take(name, span)
        parts = []
        try:
            with writing(self._folder / place.file):
                for element, run in runs(array):
                    begin = first + element * run.itemsize
                    position, checksum = place.entry.offset + begin, 0
                    for piece in pieces(run):
                        if self._journal is not None:
                            checksum = zlib.crc32(piece, checksum)
                        partial.pwrite(self._streams[place.file], piece, position)
                        position += len(piece)
                        self._count(len(piece))
                    parts.append((begin, begin + run.nbytes, checksum))
                self._finish(name, parts, getattr(array, "is_fully_addressable", True))
        except BaseException:
            with self._lock:
                self._taken[name].remove(span)
            raise

    def _take(self, name: str, span: tuple[int, int]) -> None:
        """Reserves a range of bytes that no other call may write."""
        with self._lock:
            taken = self._taken[name]
            i = bisect(taken, span)
            before, after = taken[max(i - 1, 0) : i], taken[i : i + 1]
            if any(x[1] > span[0] for x in before) or any(x[0] < span[1] for x in after):
                raise ValueError(
                    f"{header.shown(name)} was written before, or a part of it: write every "
                    "element once, and skip the tensors in finished"
                )
            taken.insert(i, span)

    def _finish(self, name: str, parts: list[partial.Part], is_own: bool) -> None:
        """Counts ranges of bytes as written, of an array of this process or of a shared one."""
        nbytes = sum(stop - start for start, stop, _ in parts)
        with self._lock:
            if is_own:
                self._parts[name] += parts
            else:
                self._shared[name] = self._shared.get(name, 0) + nbytes
            self._left[name] -= nbytes
            if self._left[name]:
                return
        if self._journal is not None:
            self._journal.append(name, self._parts[name])
        with self._lock:
            self._finished.add(name)

    def _resume(self, journal: partial.Journal) -> None:
        """Counts as finished what is in the journal and still has the checksums in it."""
        for name, parts in journal.lines():
            if name in self._files.places and name not in self._finished:
                file, (_, _, offset, nbytes) = self._files.places[name]
                if partial.verified(self._streams[file], offset, nbytes, parts):
                    self._taken[name] = [(0, nbytes)]
                    self._finished.add(name)
        self._journal = journal

    def _written(self, name: str) -> np.ndarray:
        """The elements of a tensor that is finished, from the file that is being written."""
        file, (dtype, _, offset, nbytes) = self._files.places[name]
        if not nbytes:
            return np.empty(0, dtype)
        return np.memmap(self._folder / file, dtype, "r", offset, (nbytes // dtype.itemsize,))

    def _close(self) -> None:
        self._streams = {}

    def _complete(self, hosts: Hosts) -> None:
        """Raises unless every tensor is written, by this process or by all of them together."""
        missing = [name for name in self._files.places if name not in self._finished]
        if hosts.count > 1:
            shares = [json.loads(said) for said in hosts.gather(json.dumps(self._share()))]
            missing = [
                name
                for name, place in self._files.places.items()
                if not is_whole([share.get(name, []) for share in shares], place.entry.nbytes)
            ]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self._files.places)} tensors were not written whole"
                f"{' and once' if hosts.count > 1 else ''}, so nothing is put in place: write "
                f"{', '.join(map(repr, missing[:8]))}"
            )

    def _share(self) -> dict[str, int | list[list[int]]]:
        """What this process wrote of each tensor: bytes of a shared array, or ranges of its own."""
        return {name: joined(parts) for name, parts in self._parts.items() if parts} | self._shared


@contextlib.contextmanager
def create(
    path: str | os.PathLike[str],
    layout: Layout,
    *,
    shard_bytes: int | None = None,
    metadata: Mapping[str, str] | None = None,
    name: str = "model",
    others: Iterable[str | os.PathLike[str]] = (),
    force: bool = False,
    plan: str | None = None,
    keep_on_error: bool = True,
    remove_partial: bool = False,
) -> Generator[Writer]:
    """Writes a checkpoint of any size, tensor by tensor; a context manager.

    The files have their full size from the start, beside their place on the same disk, so that
    a full disk shows before anything is computed. When the block ends, everything is flushed to
    disk and put in place at once. Until then, and where the block raises or the process dies, an
    output that was there stays as it was. Tensors are aligned in the files for being read by
    memory map.

    In a run of several processes, by `jax.distributed`, all of them call this with the same path,
    on one file system, and options, and each writes what it has: its shards of a global array,
    or tensors and parts of its own, which no other process may write. They begin and end the block
    together, and the output has the same bytes as one that a single process writes. Where a process
    raises, nothing is put in place, and the others raise when they come to the end of the block.

    With a `plan`, an interrupted job is taken up again: called with the same path, layout, options
    and plan, the writer's `finished` has the tensors that were written before the interruption,
    each read again and compared with its checksum (CRC-32, which is fast enough to cost nothing
    beside the disk: it is to find accidents, not forgeries). Only the others need to be written.
    This is for one process.
    What is left of a job is a hidden folder `.<name>.<hash>.partial` beside the output, used for
    the same job alone; remove it to give the job up, or have another job for the same output
    remove it.

    On file systems that cannot lock files, or flush folders, this goes on with a warning.

    Args:
        path: The output: one file if it ends in `.safetensors`, else a folder with
            `model.safetensors`, or with several files and an index, by the `name`.
        layout: The tensors, by name, with their dtypes and shapes.
        shard_bytes: Of a folder, how many bytes of tensors a file may have; a larger tensor is in
            a file of its own. One file if `None`.
        metadata: Strings by name for the `__metadata__` of every file.
        name: Of a folder, what its files are called, such as the `name` of an open checkpoint:
            programs look for weights by that, as diffusers does for `diffusion_pytorch_model`.
        others: Files to be copied into the folder, as `Checkpoint.others` lists them.
        force: Whether to replace an output that exists. A folder is replaced only if it is empty
            or has `.safetensors` files. Weights of any format in it go, and indices, configuration
            and tokenizer; all else stays, but for what the new files replace by name.
        plan: A text that says what is computed from what, such as a recipe with the hashes of the
            inputs.
        keep_on_error: Whether, with a plan, what is written is kept where the block raises a
            `ValueError` or a `TypeError`, as a computation does that would fail again. After an
            interruption and any other error, such as a full disk, it is always kept.
        remove_partial: Whether what interrupted jobs with other plans left of this output is
            removed first.

    Returns:
        A context manager that gives the [`Writer`][wspace.checkpoint.Writer].

    Raises:
        FileExistsError: If the output exists, and `force` is not given or it is no checkpoint.
        BlockingIOError: If another process is writing the same output.
        OSError: If the output cannot be written, such as on a full disk.
        ValueError: If an option does not fit a single file, a file in `others` has no name of its
            own, or, at the end, if a tensor was not written; if several processes differ in what
            they write, or have a `plan`.
        RuntimeError: If another process of the run failed.
        TypeError: If `layout` or `metadata` is no mapping from strings, or a dtype has no name in
            the format.

    Examples:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> from wspace import checkpoint
        >>> with tempfile.TemporaryDirectory() as name:
        ...     folder = pathlib.Path(name)
        ...     checkpoint.save(folder / "a.safetensors", {"w": jnp.ones(2), "b": jnp.ones(1)})
        ...     with checkpoint.open(folder / "a.safetensors") as a:
        ...         with checkpoint.create(folder / "doubled", a, shard_bytes=8) as writer:
        ...             for name, tensor in a.items():
        ...                 writer.write(name, 2 * tensor.read())
        ...     print(sorted(file.name for file in (folder / "doubled").iterdir()))
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors',
         'model.safetensors.index.json']
    """
    target = Path(os.path.abspath(path))
    hosts = Hosts(target)
    with contextlib.ExitStack() as output, contextlib.ExitStack() as opened:
        with hosts.together():
            files = planned(target, layout, shard_bytes, metadata, name)
            copies = carried(files, others)
            if hosts.count > 1 and plan is not None:
                raise ValueError("plan is for one process: leave it out in a run of several")
        job = digest(files, plan)
        if set(hosts.gather(job)) != {job}:
            raise ValueError(
                f"the processes differ in the layout or metadata of {target}: give all the same"
            )
        aside = target.parent / f".{target.name}.{job}.partial"
        with hosts.together():
            if leads():
                output.enter_context(
                    partial.output(
                        files, copies, aside, target, force, keep_on_error, remove_partial
                    )
                )
        with hosts.together(), writing(target):
            if not aside.is_dir():
                raise ValueError(
                    f"process {hosts.index} does not see {aside}, which process 0 made: give a "
                    "path on a file system that all processes see"
                )
            writer = opened.enter_context(_opened(files, aside, target, plan is not None))
        with hosts.together(), opened:
            yield writer
        writer._complete(hosts)
        with hosts.together():
            output.close()


@contextlib.contextmanager
def _opened(files: Files, aside: Path, target: Path, resumable: bool) -> Generator[Writer]:
    """A writer into files of full size, with what is left of an earlier run."""
    data, streams = aside / "data", {}
    with contextlib.ExitStack() as stack:
        for file in files.sizes:
            streams[file] = os.open(data / file, os.O_RDWR)
            stack.callback(os.close, streams[file])
        count = stack.enter_context(partial.flushing(target, streams.values()))
        writer = Writer(files, data, streams, count)
        stack.callback(writer._close)
        if resumable:
            journal = partial.Journal(aside / "journal")
            stack.callback(journal.close)
            writer._resume(journal)
        yield writer
