"""What a job has computed, tensor by tensor, kept beside its output until that is in place.

For an output whose size shows only at the end, such as an adapter with ranks by energy. The place
is that of `partial`, with a file of its own for what was computed of each tensor.
"""

import contextlib
import hashlib
import os
import zlib
from collections.abc import Generator, Mapping
from pathlib import Path

import numpy as np

from wspace.checkpoint import partial, stored
from wspace.checkpoint.tensors import packed, writing


class Kept:
    """Arrays and texts by the name of the tensor that they were computed of."""

    def __init__(self, aside: Path) -> None:
        """Takes what an earlier run kept there, where it is as it was written."""
        self._data = aside / "data"
        self._journal = partial.Journal(aside / "journal")
        self._files = {}
        for name, parts in self._journal.lines():
            with contextlib.suppress(OSError, ValueError):
                file = self._file(name)
                ((_, size, checksum),) = parts
                data = file.read_bytes()
                if (len(data), zlib.crc32(data)) == (size, checksum):
                    self._files[name] = file

    def get(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, str]] | None:
        """What was kept of a tensor, or `None`."""
        if name not in self._files:
            return None
        with stored.open(self._files[name]) as opened:
            return {key: np.array(x.read()) for key, x in opened.items()}, opened.metadata

    def put(self, name: str, arrays: Mapping[str, np.ndarray], texts: dict[str, str]) -> None:
        """Keeps what was computed of a tensor."""
        data = packed(arrays, texts)
        with writing(self._data):
            self._file(name).write_bytes(data)
            self._journal.append(name, [(0, len(data), zlib.crc32(data))])

    def close(self) -> None:
        """Ends it."""
        self._journal.close()

    def _file(self, name: str) -> Path:
        digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        return self._data / f"{digest}.safetensors"


@contextlib.contextmanager
def kept(target: Path, plan: str, remove_partial: bool) -> Generator[Kept]:
    """A place for what a job computes, with what an interrupted run of the same plan left there.

    It is gone when the block ends, or raises an error that would come again.
    """
    target = Path(os.path.abspath(target))
    digest = hashlib.blake2b(f"wspace 1 {plan}".encode(), digest_size=8).hexdigest()
    aside = target.parent / f".{target.name}.{digest}.partial"
    with partial.locked(target):
        with writing(target):
            partial.cleared(target, aside, remove_partial)
            (aside / "data").mkdir(parents=True, exist_ok=True)
            found = Kept(aside)
        try:
            yield found
        except BaseException as error:
            if isinstance(error, TypeError | ValueError) or not partial.is_resumable(aside):
                partial.remove(aside, target)
            raise
        finally:
            found.close()
        partial.remove(aside, target)
