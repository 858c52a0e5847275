"""Checkpoints of any size written tensor by tensor, put in place at once, and resumed."""

import contextlib
import os
import shutil
import threading
import zlib
from bisect import bisect
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np

from wspace.checkpoint import header, partial
from wspace.checkpoint.planned import INDEX, Files, carried, digest, index, planned, refuse_name
from wspace.checkpoint.stored import Stored
from wspace.checkpoint.tensors import writing

__all__ = ["Layout", "Writer", "create"]

_PIECE = 2**20

Layout: TypeAlias = Mapping[str, Stored | jax.ShapeDtypeStruct | jax.Array | np.ndarray]
"""The tensors of a checkpoint to be written, in order: from names to anything with a dtype and a
shape, of which nothing else is used. An open checkpoint is the layout of one like it."""


class Writer:
    """Writes the tensors of a checkpoint, in any order and from any thread.

    Made by [`create`][wspace.checkpoint.create]. Every tensor is written exactly once, whole or
    in parts.

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
        self._left = {name: place.entry.nbytes for name, place in files.places.items()}
        self._finished = {name for name, left in self._left.items() if not left}
        self._journal: partial.Journal | None = None

    @property
    def finished(self) -> frozenset[str]:
        """The names of the tensors that are written, before an interruption or since.

        Those without elements are finished from the start.
        """
        with self._lock:
            return frozenset(self._finished)

    def write(self, name: str, array: jax.Array | np.ndarray) -> None:
        """Writes a whole tensor.

        Args:
            name: A name of the layout.
            array: An array of the dtype and shape that the layout says, of any strides.

        Raises:
            ValueError: If the layout has no such name, another dtype or another shape, or the
                tensor or a part of it was written before.
            OSError: If it cannot be written.
        """
        entry = self._entry(name, array)
        if array.shape != entry.shape:
            raise ValueError(
                f"{name!r} is given as an array of shape {array.shape}, but the layout says "
                f"{entry.shape}: reshape it, or write parts of it by write_part"
            )
        self._write(name, 0, np.asarray(array))

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
                f"a part of {name!r} is given as an array of shape {array.shape} from element "
                f"{start}: it must be flat and end in the {size} elements of the tensor"
            )
        self._write(name, start * entry.dtype.itemsize, np.asarray(array))

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
            raise ValueError(f"the layout has no tensor {name!r}: write those that it names")
        entry = self._files.places[name].entry
        dtype = getattr(array, "dtype", type(array))
        if dtype != entry.dtype:
            raise ValueError(
                f"{name!r} is given as {dtype}, but the layout says {entry.dtype}: convert it, so "
                "that what is rounded is seen"
            )
        return entry

    def _write(self, name: str, start: int, array: np.ndarray) -> None:
        """Writes elements from this byte of the tensor on."""
        if not array.size:
            return
        place = self._files.places[name]
        if place.file not in self._streams:
            raise ValueError(f"{name!r} is written too late: write inside of the with statement")
        span = start, start + array.nbytes
        self._take(name, span)
        position, checksum = place.entry.offset + start, 0
        try:
            with writing(self._folder / place.file):
                for piece in _pieces(array):
                    if self._journal is not None:
                        checksum = zlib.crc32(piece, checksum)
                    partial.pwrite(self._streams[place.file], piece, position)
                    position += len(piece)
                    self._count(len(piece))
                self._finish(name, (*span, checksum))
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
                    f"{name!r} was written before, or a part of it: write every element once, and "
                    "skip the tensors in finished"
                )
            taken.insert(i, span)

    def _finish(self, name: str, part: partial.Part) -> None:
        """Counts a range of bytes as written."""
        with self._lock:
            self._parts[name].append(part)
            self._left[name] -= part[1] - part[0]
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

    def _close(self) -> None:
        self._streams = {}

    def _complete(self) -> None:
        """Raises unless every tensor is written."""
        missing = [name for name in self._files.places if name not in self._finished]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self._files.places)} tensors were not written whole, so "
                f"nothing is put in place: write {', '.join(map(repr, missing[:8]))}"
            )


@contextlib.contextmanager
def create(
    path: str | os.PathLike[str],
    layout: Layout,
    *,
    shard_bytes: int | None = None,
    metadata: Mapping[str, str] | None = None,
    others: Iterable[str | os.PathLike[str]] = (),
    force: bool = False,
    plan: str | None = None,
) -> Generator[Writer]:
    """Writes a checkpoint of any size, tensor by tensor; a context manager.

    The files have their full size from the start, beside their place on the same disk, so that
    a full disk shows before anything is computed. When the block ends, everything is flushed to
    disk and put in place at once. Until then, and where the block raises or the process dies, an
    output that was there stays as it was. Tensors are aligned in the files for being read by
    memory map.

    With a `plan`, an interrupted job is taken up again: called with the same path, layout, options
    and plan, the writer's `finished` has the tensors that were written before the interruption,
    each read again and compared with its checksum (CRC-32, which is fast enough to cost nothing
    beside the disk: it is to find accidents, not forgeries). Only the others need to be written.
    What is left of a job is a hidden folder `.<name>.<hash>.partial` beside the output, used for
    the same job alone; remove it to give the job up.

    Args:
        path: The output: one file if it ends in `.safetensors`, else a folder with
            `model.safetensors`, or with several files and an index.
        layout: The tensors, by name, with their dtypes and shapes.
        shard_bytes: Of a folder, how many bytes of tensors a file may have; a larger tensor is in
            a file of its own. One file if `None`.
        metadata: Strings by name for the `__metadata__` of every file.
        others: Files to be copied into the folder, as `Checkpoint.others` lists them.
        force: Whether to replace an output that exists. A folder is replaced as a whole, and only
            if it is empty or has `.safetensors` files.
        plan: A text that says what is computed from what, such as a recipe with the hashes of the
            inputs.

    Returns:
        A context manager that gives the [`Writer`][wspace.checkpoint.Writer].

    Raises:
        FileExistsError: If the output exists, and `force` is not given or it is no checkpoint.
        BlockingIOError: If another process is writing the same output.
        OSError: If the output cannot be written, such as on a full disk.
        ValueError: If an option does not fit a single file, a file in `others` has no name of its
            own, or, at the end, if a tensor was not written.
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
    files = planned(target, layout, shard_bytes, metadata)
    copies = carried(files, others)
    aside = target.parent / f".{target.name}.{digest(files, plan)}.partial"
    with partial.locked(target):
        with writing(target):
            partial.recover(target)
        partial.refuse_existing(target, force, files.is_file)
        try:
            with contextlib.ExitStack() as stack:
                with writing(target):
                    writer = _started(files, aside, target, plan is not None, stack)
                    for name, other in copies.items():
                        shutil.copyfile(other, aside / "data" / name)
                yield writer
                writer._complete()
            partial.refuse_existing(target, force, files.is_file)
            with writing(target):
                if len(files.starts) > 1:
                    (aside / "data" / INDEX).write_bytes(index(files))
                partial.place(aside, target, files.is_file)
        except BaseException:
            if not partial.is_resumable(aside):
                partial.remove(aside, target)
            raise
        partial.remove(aside, target)


def _started(
    files: Files, aside: Path, target: Path, resumable: bool, stack: contextlib.ExitStack
) -> Writer:
    """A writer into files of full size, with what is left of an earlier run."""
    data = aside / "data"
    data.mkdir(parents=True, exist_ok=True)
    for file in data.iterdir():
        if file.name not in files.starts:
            file.unlink()
    streams = {}
    for file, size in files.sizes.items():
        number = os.open(data / file, os.O_RDWR | os.O_CREAT, 0o666)
        stack.callback(os.close, number)
        os.ftruncate(number, size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(number, 0, size)
        partial.pwrite(number, files.starts[file], 0)
        streams[file] = number
    count = stack.enter_context(partial.flushing(target, streams.values()))
    writer = Writer(files, data, streams, count)
    stack.callback(writer._close)
    if resumable:
        journal = partial.Journal(aside / "journal")
        stack.callback(journal.close)
        writer._resume(journal)
    return writer


def _pieces(array: np.ndarray) -> Iterator[memoryview]:
    """The bytes of an array in the order of its elements, whatever its strides, in pieces."""
    bits: Any = array.view(f"u{array.itemsize}")
    step = _PIECE // array.itemsize
    if bits.flags.c_contiguous:
        flat = bits.reshape(-1)
        for start in range(0, flat.size, step):
            yield memoryview(flat[start : start + step]).cast("B")
    else:
        in_order: Any = np.nditer
        flags = ["external_loop", "buffered"], ["readonly", "contig"]
        for piece in in_order(bits, *flags, order="C", buffersize=step):
            yield memoryview(piece).cast("B")
