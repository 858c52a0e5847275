"""Records that functions return, and how they are shown: by names and sizes, never by weights."""

import dataclasses
import html
from typing import Any, NamedTuple, TypeVar

from jaxtyping import Array, Bool, Int, PyTree

from wspace._words import shown
from wspace.typing import Scalar

Class = TypeVar("Class", bound=type)

_LONGEST = 400
"""The most characters of a `repr`."""

_INNER = 120
"""The most characters of a record within another one."""


def record(cls: Class) -> Class:
    """Gives a named tuple or a dataclass a short `repr`, and a table for notebooks."""
    for name, method in (("__repr__", _summary), ("_repr_html_", _as_html)):
        setattr(cls, name, method)
    return cls


def _summary(self: Any) -> str:
    return _within(_LONGEST, self)


def _within(most: int, self: Any) -> str:
    """The fields, from the first one on, as many as there is room for."""
    name = type(self).__name__
    parts = [f"{key}={value}" for key, value in _fields(self)]
    text = f"{name}({', '.join(parts)})"
    while len(text) > most and parts:
        parts.pop()
        text = f"{name}({', '.join([*parts, '...'])})"
    return text


def _fields(self: Any) -> list[tuple[str, str]]:
    """The fields and their values, as they are shown."""
    names = getattr(self, "_fields", None) or [x.name for x in dataclasses.fields(self) if x.repr]
    # Of trees no entry is shown, be they one small vector.
    kinds = type(self).__annotations__
    return [(name, _shown(getattr(self, name), kinds.get(name) is not PyTree)) for name in names]


def _shown(value: Any, entries: bool) -> str:
    if _is_record(value):
        return _within(_INNER, value)
    if isinstance(value, list | tuple) and value and all(map(_is_record, value)):
        return f"<{len(value):,} {type(value[0]).__name__}>"
    return shown(value, entries=entries)


def _is_record(value: Any) -> bool:
    return type(value).__repr__ is _summary


def _as_html(self: Any) -> str:
    """The text of a record that has one of its own, or else a table of its fields."""
    if type(self).__str__ is not object.__str__:
        return f"<pre>{html.escape(str(self))}</pre>"
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in _fields(self)
    )
    return f"<table><caption>{html.escape(type(self).__name__)}</caption>{rows}</table>"


@record
class Solution(NamedTuple):
    """What an iteration found, and how good it is.

    Attributes:
        weights: The weights found.
        residual: How far they are from solving the problem, relative to its size; the function
            says in what measure.
        steps: The number of steps taken.
        converged: Whether the residual is as small as was asked for.
    """

    weights: PyTree
    residual: Scalar
    steps: Int[Array, ""]
    converged: Bool[Array, ""]
