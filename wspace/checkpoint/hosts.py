"""The processes of a run that write one output together, and what they tell each other."""

import contextlib
import pathlib
from collections import Counter
from collections.abc import Generator
from typing import Any

import jax

_WAIT = 5000
"""Milliseconds after which a wait goes on, having let an interruption in."""

_PATIENCE = 12
"""Waits after which a process that has come to an output of the same name elsewhere is not to come
to this one."""

_calls: Counter[pathlib.Path] = Counter()

_failed: list[str] = []
"""What this process told of calls that failed: until its next one, for others to hear."""


def leads() -> bool:
    """Whether this process of a run is the one that does what only one has to do."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def share() -> slice:
    """Which of many things this process of a run does."""
    if not jax.distributed.is_initialized():
        return slice(None)
    return slice(jax.process_index(), None, jax.process_count())


class Hosts:
    """The processes that called the same function at the same time, or this one alone.

    They meet at points, each of which all of them pass in the same order. What is said there goes
    through the coordinator of `jax.distributed`, not through the devices: these may be in the
    middle of a computation where a process fails.
    """

    def __init__(self, target: pathlib.Path) -> None:
        """Counts the processes, which all write at `target`, and others at the same time."""
        self.count = jax.process_count() if jax.distributed.is_initialized() else 1
        self.index = jax.process_index() if self.count > 1 else 0
        _calls[target] += 1
        self._call = f"wspace/{_calls[target]}{target}"
        self._name = target.name
        self._point = 0
        if self.count > 1:
            while _failed:
                _client().key_value_delete(_failed.pop())
            _client().key_value_set(self._told(self.index) + self._call, self._call)

    def gather(self, said: str) -> list[str]:
        """What each of the processes said at this point, once all have come to it."""
        if self.count == 1:
            return [said]
        self._say(said)
        try:
            heard = [self._heard(process) for process in range(self.count)]
        except BaseException:
            if not self._point:
                _failed.append(self._told(self.index) + self._call)
            raise
        # All have come here, so all have read what was said at the point before.
        if self._point:
            _client().key_value_delete(self._key(self._point - 1, self.index))
        else:
            _client().key_value_delete(self._told(self.index) + self._call)
        self._point += 1
        return heard

    @contextlib.contextmanager
    def together(self) -> Generator[None]:
        """Raises in every process if one of them raises; else each waits for all."""
        try:
            yield
        except BaseException as error:
            if self.count > 1:
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    self._say(f"{type(error).__name__}: {error}")
            raise
        for process, failure in enumerate(self.gather("")):
            if failure:
                raise RuntimeError(
                    f"process {process} failed, so nothing is put in place; it says {failure}"
                )

    def _key(self, point: int, process: int) -> str:
        return f"{self._call}/{point}/{process}"

    def _told(self, process: int) -> str:
        """Where a process tells of the outputs of this name that it waits with."""
        return f"wspace-outputs/{process}/{self._name}/"

    def _say(self, said: str) -> None:
        # An empty value is one that the coordinator does not keep.
        _client().key_value_set(self._key(self._point, self.index), f" {said}")

    def _heard(self, process: int) -> str:
        waits = 0
        while True:
            try:
                return _client().blocking_key_value_get(self._key(self._point, process), _WAIT)[1:]
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise RuntimeError(
                        f"process {process} cannot be heard, so nothing is put in place: see "
                        "whether it, or the coordinator of jax.distributed, has ended"
                    ) from error
            waits += 1
            told = dict(_client().key_value_dir_get(self._told(process))).values()
            if waits >= _PATIENCE and told and self._call not in told:
                raise RuntimeError(
                    f"process {process} waits with {', '.join(sorted(told))}, this one with "
                    f"{self._call}: give all the same path"
                )


def _client() -> Any:
    # The public barrier of JAX runs on the devices.
    from jax._src import distributed

    return distributed.global_state.client
