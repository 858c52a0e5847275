"""Checkpoints as mappings from names to tensors that stay in their files until asked for."""

import copy
import dataclasses
import hashlib
import math
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from wspace._checks import matches
from wspace._records import record
from wspace.checkpoint import folder, header

__all__ = ["Checkpoint", "Stored", "open"]

_SAMPLES, _SAMPLE = 16, 2**12
"""Pieces of a file that its fingerprint is taken of, and the bytes of each."""


@record
@dataclass(frozen=True)
class Stored:
    """One tensor of an open checkpoint, in its file until it is read.

    It has `dtype` and `shape`, as an array has, and so stands for one in a
    [`Layout`][wspace.checkpoint.Layout].

    Attributes:
        name: Its name.
        dtype: Its dtype in NumPy; one that NumPy lacks, such as bfloat16, is JAX's.
        shape: Its shape.
        file: The file that it is in.
        offset: Its first byte in the file.
        nbytes: How many bytes it takes.

    Examples:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> from wspace import checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "model.safetensors")
        ...     checkpoint.save(file, {"weight": jnp.arange(6.0).reshape(2, 3)})
        ...     with checkpoint.open(file) as opened:
        ...         tensor = opened["weight"]
        ...         print(tensor.dtype, tensor.shape, tensor.rows(2, 4))
        float32 (2, 3) [2. 3.]
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    _maps: "_Maps" = field(repr=False, compare=False)

    @property
    def size(self) -> int:
        """The number of elements."""
        return self.nbytes // self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor as a read-only array on the memory map of the file.

        Nothing is copied where the tensor is aligned for its dtype in the file, as it is in the
        files of most programs; else the array is a copy. The array stays valid when the
        checkpoint is closed, and keeps the map open.

        Raises:
            ValueError: If the checkpoint is closed, or the file changed since it was opened.
        """
        return self.rows(0, self.size).reshape(self.shape)

    def part(self, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of the tensor, such as the shard of a device; no more of the file is read.

        The index is a slice along each axis. Otherwise as
        [`read`][wspace.checkpoint.Stored.read].
        """
        return _aligned(self._mapped(0, self.size).reshape(self.shape)[..., *index])

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The elements from `start` up to `stop` in the order of the file, as a flat array.

        Otherwise as [`read`][wspace.checkpoint.Stored.read].

        Raises:
            ValueError: If not `0 <= start <= stop <= size`; also as `read`.
        """
        if not 0 <= start <= stop <= self.size:
            raise ValueError(
                f"elements {start} to {stop} of tensor {header.shown(self.name)} of {self.file} "
                f"are asked for, but it has {self.size}"
            )
        return _aligned(self._mapped(start, stop))

    def _mapped(self, start: int, stop: int) -> np.ndarray:
        """Elements on the memory map, perhaps not aligned."""
        offset = self.offset + start * self.dtype.itemsize
        return np.frombuffer(self._maps.of(self.file), self.dtype, stop - start, offset)


class Checkpoint(Mapping[str, Stored], AbstractContextManager["Checkpoint"]):
    """The tensors of a file or a folder by name, in the order in which they lie in the files.

    A context manager: leaving it closes the memory maps, except where arrays are still in use.
    Made by [`open`][wspace.checkpoint.open], and safe to read from many threads.

    Attributes:
        path: The file or folder that was opened.
        name: What the files are called: `model` of a file `model.safetensors`, and of its shards;
            also `diffusion_pytorch_model.fp16` or what else they have in their folder.
        files: The files with tensors.
        metadata: What the headers of the files say in `__metadata__`; where two differ, the last.

    Examples:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> from wspace import checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint.save(pathlib.Path(folder, "model.safetensors"), {"w": jnp.ones((2, 3))})
        ...     _ = pathlib.Path(folder, "config.json").write_text("{}")
        ...     with checkpoint.open(folder) as opened:
        ...         print([x.name for x in opened.others], {k: v.shape for k, v in opened.items()})
        ['config.json'] {'w': (2, 3)}
    """

    def __init__(self, path: Path, name: str, headers: Mapping[Path, header.Header]) -> None:
        """Collects the tensors of files whose headers were read."""
        self.path = path
        self.name = name
        self.files = tuple(headers)
        self._headers = headers
        self.metadata: dict[str, str] = {}
        self._maps = _Maps({file: head.state for file, head in headers.items()})
        self._tensors: dict[str, Stored] = {}
        for file, head in headers.items():
            self.metadata |= head.metadata
            for name, entry in head.entries.items():
                self._tensors[name] = Stored(
                    name, entry.dtype, entry.shape, file, entry.offset, entry.nbytes, self._maps
                )

    @property
    def others(self) -> tuple[Path, ...]:
        """The configuration, tokenizer and other small files of a folder, to be carried over.

        All regular files of up to 64 MiB in the folder itself, sorted, but for hidden ones, files
        of weights in any format and their indices. Links are followed. Empty for a single file.
        """
        if folder.is_index(self.path):
            return folder.others_of(self.path.parent)
        return folder.others_of(self.path) if self.path.is_dir() else ()

    def fingerprint(self) -> str:
        """A hash of the headers of all files, their names, sizes, inodes and times, and samples.

        All but the samples are as they were when the files were opened. Of the tensors a few
        kilobytes are read, spread over each file: files with the same headers are told apart by
        what the system says of them, and hardly by their numbers. A copy of a file has another
        hash, and so has a file to which a link or other permissions were given.

        Examples:
            >>> import tempfile
            >>> import jax.numpy as jnp
            >>> from wspace import checkpoint
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     checkpoint.save(f"{folder}/a.safetensors", {"w": jnp.ones(2)})
            ...     with checkpoint.open(f"{folder}/a.safetensors") as opened:
            ...         print(len(opened.fingerprint()))
            32
        """
        state = hashlib.blake2b(digest_size=16)
        for file, head in self._headers.items():
            size, _, *place_and_times = head.state
            state.update(head.text)
            state.update(f"{file.name} {size} {place_and_times}".encode())
            mapped = self._maps.of(file)
            for i in range(_SAMPLES):
                start = max(size - _SAMPLE, 0) * i // (_SAMPLES - 1)
                state.update(mapped[start : start + _SAMPLE])
        return state.hexdigest()

    def first_rows(self, counts: Mapping[str, int]) -> "Checkpoint":
        """The same checkpoint with only the first rows of some tensors, by name.

        Of embeddings of vocabularies that were extended, these are the rows that all have. Nothing
        is read; both are closed together.

        Args:
            counts: The numbers of rows, by the names of tensors with at least one axis.

        Raises:
            ValueError: If there is no such tensor, or it has no rows or fewer.

        Examples:
            >>> import tempfile
            >>> import jax.numpy as jnp
            >>> from wspace import checkpoint
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     checkpoint.save(f"{folder}/a.safetensors", {"words": jnp.ones((5, 2))})
            ...     with checkpoint.open(f"{folder}/a.safetensors") as opened:
            ...         print(opened.first_rows({"words": 3})["words"].shape)
            (3, 2)
        """
        cut = copy.copy(self)
        cut._tensors = dict(self._tensors)
        for name, count in counts.items():
            tensor = self._tensors.get(name)
            if tensor is None or not tensor.shape or not 0 <= count <= tensor.shape[0]:
                shape = "is not there" if tensor is None else f"has shape {tensor.shape}"
                raise ValueError(
                    f"the first {count} rows of tensor {header.shown(name)} of {self.path} are "
                    f"asked for, which {shape}: ask for at most as many as it has"
                )
            length = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
            cut._tensors[name] = dataclasses.replace(
                tensor, shape=(count, *tensor.shape[1:]), nbytes=count * length
            )
        return cut

    def without(self, names: Iterable[str]) -> "Checkpoint":
        """The same checkpoint without some tensors. Nothing is read; both are closed together.

        Args:
            names: Names or globs, such as `"*.position_ids"`, with `*`, `?` and `[...]`.

        Examples:
            >>> import tempfile
            >>> import jax.numpy as jnp
            >>> from wspace import checkpoint
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     file = f"{folder}/a.safetensors"
            ...     checkpoint.save(file, {"w": jnp.ones(2), "step.0": jnp.ones(1)})
            ...     with checkpoint.open(file) as opened:
            ...         print(list(opened.without(["step.*"])))
            ['w']
        """
        left = copy.copy(self)
        left._tensors = {name: x for name, x in self._tensors.items() if not matches(name, names)}
        return left

    def close(self) -> None:
        """Closes the memory maps, but for those of arrays that are still in use."""
        self._maps.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, name: str) -> Stored:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors)"


def open(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a checkpoint of any size: its headers are read, its tensors when they are asked for.

    A folder holds `model.safetensors`, or another single `.safetensors` file, or several with an
    index `*.safetensors.index.json`, or of a variant, such as `*.safetensors.index.fp16.json`. Of a
    folder with several, the path of an index opens the files that it names. Every header is checked
    in full: a file whose tensors do not cover it exactly, or whose header says anything twice, is
    refused before a tensor is read. Nothing is ever unpickled.

    Symbolic links are followed, wherever they lead: caches of the Hugging Face hub and folders of
    links to one copy of large files are read as any folder is. An index can name only what lies
    beside it, and no name in a file is taken for a path. The files must stay as they are while they
    are open: one that was replaced or changed before it is first read is refused, but the system
    ends a process that reads what was cut off since.

    Args:
        path: A file, a folder, or an index in one.

    Returns:
        A mapping from the names of the tensors to [`Stored`][wspace.checkpoint.Stored]; also a
            context manager that closes it.

    Raises:
        FileNotFoundError: If there is no such file or folder, the folder has no tensors, or files
            that its index names are missing.
        ValueError: If a file is truncated, corrupt, or of another format, which the message says
            how to convert; if there are several files and no index; if the index and the files
            disagree, or it names a file outside of the folder.

    Examples:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> from wspace import checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint.save(pathlib.Path(folder, "model.safetensors"), {"bias": jnp.zeros(2)})
        ...     with checkpoint.open(folder) as opened:
        ...         print({name: tensor.read() for name, tensor in opened.items()})
        {'bias': array([0., 0.], dtype=float32)}

    References:
        The [format](https://huggingface.co/docs/safetensors) of Hugging Face.
    """
    path = Path(path)
    return Checkpoint(path, *folder.found(path))


class _Maps:
    """Memory maps of files, each made when it is first asked for."""

    def __init__(self, states: Mapping[Path, tuple[int, ...]]) -> None:
        self._states = states
        self._maps: dict[Path, mmap.mmap] | None = {}
        self._lock = threading.Lock()

    def of(self, file: Path) -> mmap.mmap:
        with self._lock:
            if self._maps is None:
                raise ValueError(f"{file} is closed: read inside of the with statement")
            if file not in self._maps:
                self._maps[file] = self._map(file)
            return self._maps[file]

    def close(self) -> None:
        # Not closed by force: a map ends with the last array on it.
        with self._lock:
            self._maps = None

    def _map(self, file: Path) -> mmap.mmap:
        with header.opened(file) as stream:
            *now, _ = header.state_of(stream.fileno())
            *before, _ = self._states[file]
            if now != before:
                raise ValueError(f"{file} changed since it was opened: open it again")
            try:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise OSError(
                    f"{file} cannot be mapped into memory ({error.strerror}): copy it to another "
                    "file system"
                ) from error
        if hasattr(mmap, "MADV_SEQUENTIAL"):
            mapped.madvise(mmap.MADV_SEQUENTIAL)
        return mapped


def _aligned(array: np.ndarray) -> np.ndarray:
    """A read-only array, copied if it is not aligned."""
    if not array.flags.aligned:
        array = array.copy()
        array.flags.writeable = False
    return array
