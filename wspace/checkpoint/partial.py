"""What is being written, beside the place where it is to be: locked, journaled, put in place.

For an output `out`, all of them in the folder of `out`:

    .out.lock                   locked while a process writes `out`, empty
    .out.<hash>.partial/data    what becomes `out`, or the folder of the file that does
    .out.<hash>.partial/journal a line for each finished tensor
    .out.<hash>.partial/old     what `out` was, while it is being replaced
"""

import contextlib
import errno
import json
import os
import re
import shutil
import threading
import warnings
import zlib
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from wspace.checkpoint import places
from wspace.checkpoint.planned import Files, index
from wspace.checkpoint.tensors import reading, writing

_PIECE = 2**20
_FLUSHED = 2**26
_LACKING = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)

Part: TypeAlias = tuple[int, int, int]
"""A range of the bytes of a tensor, from `start` up to `stop`, and its checksum."""


@contextlib.contextmanager
def output(
    files: Files,
    copies: Mapping[str, Path],
    aside: Path,
    target: Path,
    force: bool,
    keep_on_error: bool,
    remove_partial: bool,
) -> Generator[None]:
    """Files of full size while they are written, put in place at the end if nothing raises."""
    places.refuse_place(target)
    with locked(target):
        with writing(target):
            cleared(target, aside, remove_partial)
        places.refuse_existing(target, force, files.is_file)
        nbytes = sum(files.sizes.values()) + sum(x.stat().st_size for x in copies.values())
        places.refuse_size(target, nbytes - held(aside))
        try:
            with writing(target):
                _make(files, copies, aside / "data")
            yield
            places.refuse_existing(target, force, files.is_file)
            with writing(target):
                if len(files.starts) > 1:
                    (aside / "data" / files.index).write_bytes(index(files))
                place(aside, target, files.is_file)
        except BaseException as error:
            fails_again = isinstance(error, TypeError | ValueError) and not keep_on_error
            if fails_again or not is_resumable(aside):
                remove(aside, target)
            raise
        remove(aside, target)


def _make(files: Files, copies: Mapping[str, Path], data: Path) -> None:
    """Gives the files, new or left by an earlier run, their full length."""
    data.mkdir(parents=True, exist_ok=True)
    for file in data.iterdir():
        if file.name not in files.starts:
            file.unlink()
    for file, size in files.sizes.items():
        number = os.open(data / file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.ftruncate(number, size)
            _allocate(number, size)
            pwrite(number, files.starts[file], 0)
        finally:
            os.close(number)
    for name, other in copies.items():
        _copy(other, data / name)


def _allocate(number: int, size: int) -> None:
    """Takes the space of an open file, where the file system can."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(number, 0, size)
        except OSError as error:
            if error.errno not in (*_LACKING, errno.EINVAL, errno.ENODEV):
                raise


def _copy(source: Path, copy: Path) -> None:
    """Copies a file; an error says which of the two is at fault."""
    with contextlib.ExitStack() as opened:
        with reading(source):
            stream = opened.enter_context(open(source, "rb"))
        written = opened.enter_context(open(copy, "wb"))
        while True:
            with reading(source):
                piece = stream.read(_PIECE)
            if not piece:
                break
            written.write(piece)


@contextlib.contextmanager
def locked(target: Path) -> Generator[None]:
    """Keeps all others, in this process or another, from writing the same output."""
    import fcntl  # not on Windows, where the rest of the library works

    file = target.parent / f".{target.name}.lock"
    while True:
        with writing(target):
            number = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had the lock removes the file when done, perhaps after it was opened here.
            if file.exists() and os.path.samestat(file.stat(), os.fstat(number)):
                break
        except BlockingIOError as error:
            os.close(number)
            raise BlockingIOError(
                f"{target} is being written by another process: wait until it ends, or give "
                "another path"
            ) from error
        except OSError as error:
            if error.errno in _LACKING:
                _tell(
                    f"files cannot be locked ({error.strerror}): see to it yourself that "
                    "no other process writes the same output",
                )
                break
            os.close(number)
            with writing(file):
                raise
        except BaseException:
            os.close(number)
            raise
        os.close(number)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.unlink()
        os.close(number)


class Journal:
    """The finished tensors with the checksums of their parts, a line each.

    A line is appended when the bytes are with the system, so it survives the death of the process
    with them. Were the machine to stop, a line might reach the disk before its tensor: so a tensor
    counts as finished when the bytes that are there have the checksums of the line.
    """

    def __init__(self, file: Path) -> None:
        """Opens the journal of an earlier run, or a new one."""
        self._number = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._lock = threading.Lock()

    def lines(self) -> Iterator[tuple[str, list[Part]]]:
        """The tensors and their parts; lines that are torn or damaged are dropped."""
        text = b"".join(iter(lambda: os.read(self._number, _PIECE), b""))
        whole = text.rpartition(b"\n")[0] + b"\n" if b"\n" in text else b""
        os.ftruncate(self._number, len(whole))
        for line in whole.split(b"\n"):
            with contextlib.suppress(ValueError, TypeError, OverflowError, RecursionError):
                name, parts = json.loads(line)
                yield str(name), [(int(start), int(stop), int(crc)) for start, stop, crc in parts]

    def append(self, name: str, parts: list[Part]) -> None:
        """Says that all bytes of a tensor were written."""
        line = json.dumps([name, sorted(parts)], separators=(",", ":")).encode() + b"\n"
        with self._lock:
            os.write(self._number, line)

    def close(self) -> None:
        """Ends it."""
        os.close(self._number)


@contextlib.contextmanager
def flushing(target: Path, numbers: Collection[int]) -> Generator[Callable[[int], None]]:
    """Has open files written to disk while they grow, so that little is left to write at the end.

    What it gives is to be told how many bytes were written. An error of the disk is raised when
    the block ends: the system says it only once.
    """
    lock, wake = threading.Lock(), threading.Event()
    written, ended, errors = 0, False, []

    def flush() -> None:
        while wake.wait() and not ended:
            wake.clear()
            try:
                for number in numbers:
                    os.fsync(number)
            except OSError as error:
                errors.append(error)
                return

    def count(nbytes: int) -> None:
        nonlocal written
        with lock:
            written += nbytes
            if written >= _FLUSHED:
                written = 0
                wake.set()

    thread = threading.Thread(target=flush, daemon=True)
    thread.start()
    try:
        yield count
    finally:
        ended = True
        wake.set()
        thread.join()
    if errors:
        with writing(target):
            raise errors[0]


def verified(number: int, offset: int, nbytes: int, parts: list[Part]) -> bool:
    """Whether a tensor's bytes in an open file still have the checksums of its parts."""
    end = 0
    for start, stop, checksum in sorted(parts):
        if start != end or not start < stop <= nbytes:
            return False
        found = 0
        for piece in range(start, stop, _PIECE):
            data = os.pread(number, min(_PIECE, stop - piece), offset + piece)
            found = zlib.crc32(data, found)
        if found != checksum:
            return False
        end = stop
    return end == nbytes


def leftovers(target: Path) -> list[Path]:
    """What is left beside an output of jobs that were to write it, or is being written."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{16}}\.partial")
    if not target.parent.is_dir():
        return []
    return [x for x in sorted(target.parent.iterdir()) if pattern.fullmatch(x.name)]


def held(partial: Path) -> int:
    """How many bytes of the disk the files in a folder take."""
    nbytes = 0
    for folder, _, names in os.walk(partial):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # its writer has put it in place
                nbytes += 512 * os.lstat(os.path.join(folder, name)).st_blocks
    return nbytes


def cleared(target: Path, aside: Path, remove_partial: bool) -> None:
    """Recovers, and removes what other jobs than that of `aside` left if asked."""
    recover(target)
    for other in leftovers(target) if remove_partial else ():
        if other != aside:
            remove(other, target)


def recover(target: Path) -> None:
    """Clears up after processes that died while writing this output, to be called when locked.

    An output that was being replaced is put back, and what cannot be resumed is removed.
    """
    for partial in leftovers(target):
        if os.path.lexists(partial / "old") and not os.path.lexists(target):
            os.rename(partial / "old", target)
        if not is_resumable(partial):
            remove(partial, target)


def is_resumable(partial: Path) -> bool:
    """Whether there are finished tensors, and a plan that says of what."""
    journal, data = partial / "journal", partial / "data"
    begun = journal.is_file() and journal.stat().st_size > 0
    return begun and data.is_dir() and any(data.iterdir())


def place(partial: Path, target: Path, is_file: bool) -> None:
    """Puts what was written, all on disk by now, in place of the output in one step."""
    data, old = partial / "data", partial / "old"
    for file in sorted(data.iterdir()):
        synced(file)
    synced(data)
    if is_file:
        os.replace(data / target.name, target)
    else:
        try:
            if os.path.lexists(target):
                os.rename(target, old)
            os.rename(data, target)
        except BaseException:
            if os.path.lexists(old) and not os.path.lexists(target):
                os.rename(old, target)
            raise
        _keep(old, target)
    synced(target.parent)


def _keep(old: Path, target: Path) -> None:
    """Moves what is not of a checkpoint from a folder that was replaced to what replaced it."""
    if old.is_dir() and target.is_dir() and not os.path.samefile(old, target):
        with writing(target):
            _, kept = places.replaced(old, os.listdir(target))
            for name in kept:
                os.rename(old / name, target / name)
            if kept:
                synced(target)


def remove(partial: Path, target: Path) -> None:
    """Removes what was written, or replaced; never the only copy of the output that there was."""
    old = partial / "old"
    if os.path.lexists(old):
        if not os.path.lexists(target):
            return
        _keep(old, target)
    shutil.rmtree(partial, ignore_errors=True)


def synced(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if not path.is_dir() or error.errno not in (*_LACKING, errno.EINVAL):
            raise
        _tell(
            f"folders cannot be flushed ({error.strerror}): if the machine fails within "
            "the next minute, look whether the output is there",
        )
    finally:
        os.close(number)


def pwrite(number: int, data: Any, offset: int) -> None:
    """Writes all bytes of a buffer to a place of a file."""
    view = memoryview(data).cast("B")
    while view:
        done = os.pwrite(number, view, offset)
        view, offset = view[done:], offset + done


def _tell(what: str) -> None:
    """Warns of what a file system cannot do; of the same words, Python says them once."""
    warnings.warn(f"on the file system of the output, {what}", stacklevel=3)
