"""Values in a few words, for errors and for the records of results: never the entries of a tree."""

import collections
import functools
import os
import warnings
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from wspace._leaves import Factored

_WIDTH = 60
"""The most characters that one value is shown in."""

_PLAIN = (bool, int, float, complex, str, bytes, np.generic)


def shortened(text: str, most: int = _WIDTH) -> str:
    """A text on one line, without what goes beyond a length."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def counted(count: int, one: str, several: str) -> str:
    """A number of things."""
    return f"{count:,} {one if count == 1 else several}"


def described(value: Any) -> str:
    """What was given where something else is meant: a number is shown, of a tree kind and size."""
    if value is None or isinstance(value, _PLAIN):
        return shortened(str(value) if isinstance(value, np.generic) else repr(value))
    kind = type(value).__name__
    kind = f"{'an' if kind[:1].lower() in 'aeio' else 'a'} {kind}"
    if _is_array(value):
        if value.shape:
            return f"an array of shape {value.shape} and dtype {value.dtype}"
        if _is_known(value):
            return f"the {value.dtype} number {np.asarray(value)}"
        return f"a traced number of dtype {value.dtype}"
    if callable(value) and hasattr(value, "__name__"):
        return shortened(f"the {type(value).__name__} {value.__name__}")
    leaves = _leaves(value)
    if leaves is None:
        return kind
    return f"{kind} of {counted(len(leaves), 'leaf', 'leaves')}"


def layout_of(value: Any) -> str:
    """How a tree is put together, or its kind and size if that takes many words."""
    structure = str(jax.tree.structure(value))
    return structure if len(structure) <= 2 * _WIDTH else described(value)


def shown(value: Any, *, entries: bool = True) -> str:
    """A value as a record shows it: numbers in full, few of them in a row too, of trees the size.

    Without `entries`, no number of an array is shown.
    """
    if value is None or isinstance(value, _PLAIN):
        return shortened(str(value) if isinstance(value, np.generic) else repr(value))
    if _is_array(value):
        return _shown_array(value, entries)
    if isinstance(value, list | tuple) and value and all(isinstance(x, _PLAIN) for x in value):
        text = repr(value)
        return text if len(text) <= _WIDTH else f"<{len(value):,} {type(value[0]).__name__}>"
    leaves = _leaves(value)
    if leaves is not None:
        return _shown_leaves(leaves)
    if isinstance(value, os.PathLike | np.dtype):
        return shortened(str(value))
    if isinstance(value, functools.partial):
        value = value.func
    if callable(value) and hasattr(value, "__name__"):
        return shortened(f"<function {value.__name__}>")
    return f"<{type(value).__name__}>"


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype") and isinstance(getattr(value, "shape", None), tuple)


def _leaves(value: Any) -> list[Any] | None:
    """The leaves of a tree; nothing of what is a leaf itself, or no tree that JAX takes apart."""
    try:
        with warnings.catch_warnings():  # of iterables that are no trees
            warnings.simplefilter("error", DeprecationWarning)
            leaves, structure = jax.tree.flatten(value, is_leaf=lambda x: isinstance(x, Factored))
    except (DeprecationWarning, TypeError, ValueError):  # keys that have no order, too
        return None
    is_leaf = jax.tree_util.treedef_is_leaf(structure) and not isinstance(value, Factored)
    return None if is_leaf else leaves


def _shown_array(x: Any, entries: bool) -> str:
    shape = f"{x.shape} " if x.shape else ""
    unread = f"<{shape}{x.dtype}>"
    if not entries or len(x.shape) > 1 or not _is_known(x):
        return unread
    if x.shape and x.shape[0] > _WIDTH:
        return unread
    values = np.asarray(x)
    text = f"[{', '.join(map(str, values))}]" if values.ndim else str(values)
    return text if len(text) <= _WIDTH else unread


def _is_known(x: Any) -> bool:
    """Whether an array holds numbers that can be read here."""
    if isinstance(x, np.ndarray):
        return True
    return (
        isinstance(x, jax.Array)
        and not isinstance(x, Tracer)
        and not jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
        and x.is_fully_addressable
        and not x.is_deleted()
    )


def _shown_leaves(leaves: list[Any]) -> str:
    """How many leaves, and how many entries of every dtype."""
    factored = [x for x in leaves if isinstance(x, Factored)]
    sizes: collections.Counter[str] = collections.Counter()
    for x in leaves:
        for array in jax.tree.leaves(x):
            if _is_array(array):
                sizes[str(array.dtype)] += int(np.prod(array.shape, dtype=np.int64))
    parts = [counted(len(leaves), "leaf", "leaves")]
    if factored:
        parts.append(f"{len(factored):,} of them {type(factored[0]).__name__}")
    parts += [f"{size:,} {dtype}" for dtype, size in sizes.most_common(3)]
    return f"<{', '.join(parts)}>"
