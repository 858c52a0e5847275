"""Programs that are kept as long as the caller keeps the functions they were compiled from."""

import functools
import weakref
from collections.abc import Callable, Hashable, Sequence
from types import MethodType
from typing import Any

import jax

_programs: dict[Any, Callable[..., Any]] = {}


def compiled(
    body: Callable[..., Any],
    functions: Sequence[Callable[..., Any]],
    settings: tuple[Hashable, ...],
    *arrays: Any,
) -> Any:
    """The value of `body(functions, settings, *arrays)`, by a program.

    The same functions and settings share a program, which is gone once one of the functions is:
    static arguments of `jax.jit`, and the data that they close over, would be kept for ever.
    """
    key = body, tuple(map(_identity, functions)), settings
    program = _programs.get(key)
    if program is None:

        def forget(_: Any, programs: dict[Any, Callable[..., Any]] = _programs) -> None:
            programs.pop(key, None)

        try:
            weak = tuple(weakly(function, forget) for function in functions)
        except TypeError:  # one has no weak references, so nothing tells when it is gone
            return jax.jit(functools.partial(body, tuple(functions), settings))(*arrays)

        def called(*arrays: Any) -> Any:
            return body(tuple(function() for function in weak), settings, *arrays)

        program = _programs[key] = jax.jit(called)
    return program(*arrays)


def _identity(function: Callable[..., Any]) -> tuple[int, ...]:
    """What tells a function from all others that are alive: a method is a new object each time."""
    if isinstance(function, MethodType):
        return id(function.__self__), id(function.__func__)
    return (id(function),)


def weakly(
    function: Callable[..., Any], forget: Callable[[Any], None] | None = None
) -> Callable[[], Any]:
    """What gives a function while the caller keeps it, then None."""
    kind = weakref.WeakMethod if isinstance(function, MethodType) else weakref.ref
    return kind(function, forget)
