"""How far a job is: a bar on a terminal, a line now and then elsewhere."""

import sys
import threading
import time
from contextlib import AbstractContextManager
from types import TracebackType

from wspace._cli.words import in_bytes

_BAR, _LINE = 0.1, 5.0
"""Seconds between two updates."""


class Progress(AbstractContextManager["Progress"]):
    """Counts bytes from any thread and says so on stderr; a context manager."""

    def __init__(self, total: int, quiet: bool) -> None:
        """Of a job of this many bytes."""
        self._total = total
        self._is_bar = sys.stderr.isatty()
        self._pause = float("inf") if quiet else _BAR if self._is_bar else _LINE
        self._lock = threading.Lock()
        self._done = self._skipped = self._looked = self._before = 0
        self._start = self._said = time.monotonic()
        self._drawn = False

    def skip(self, nbytes: int) -> None:
        """Counts bytes that were there before."""
        self._done += nbytes
        self._skipped += nbytes

    def advance(self, nbytes: int) -> None:
        """Counts bytes that were written now."""
        with self._lock:
            self._done += nbytes
            if not self._before:  # when the first bytes were begun is not known
                self._start, self._before = time.monotonic(), self._done
            self._tell()

    def look(self, nbytes: int) -> None:
        """Counts bytes that were read, which is told as long as none is written."""
        with self._lock:
            self._looked += nbytes
            self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._said >= self._pause:
            self._said = now
            self._say(now)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _say(self, now: float) -> None:
        since, seconds = self._done - self._before, now - self._start
        share = self._done / self._total if self._total else 1.0
        text = f"{share:4.0%}  {in_bytes(self._done)} of {in_bytes(self._total)}"
        if self._before and since > 0.01 * self._total and seconds:  # less says nothing of the rest
            left = _in_time((self._total - self._done) * seconds / since)
            text += f"  {in_bytes(round(since / seconds))}/s  {left} left"
        elif self._done == self._skipped:
            text += f"  {in_bytes(self._looked)} read so far"
        if self._is_bar:
            filled = round(24 * share)
            sys.stderr.write(f"\r\x1b[K[{'#' * filled}{'.' * (24 - filled)}] {text}")
            self._drawn = True
        else:
            sys.stderr.write(text.strip() + "\n")
        sys.stderr.flush()


def _in_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
