"""Names of leaves, and numbers for each leaf by its name or by the layer that its name tells."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.tree_util import tree_leaves_with_path
from jaxtyping import PyTree

from wspace import _checks
from wspace.typing import Coefficients, ScalarLike

_NUMBER = re.compile(r"(?:^|[^0-9A-Za-z])(\d+)(?=[^0-9A-Za-z]|$)")


def first_matches(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """For each name the index of the first pattern that matches it."""
    return [
        next((i for i, glob in enumerate(patterns) if _checks.matches(name, [glob])), None)
        for name in names
    ]


def unmatched(patterns: Sequence[str], names: Sequence[str]) -> str | None:
    """A pattern that matches none of the names, if there is one."""
    return next(
        (glob for glob in patterns if not any(_checks.matches(name, [glob]) for name in names)),
        None,
    )


def by_name(x: PyTree, numbers: Mapping[str, PyTree]) -> PyTree:
    """A tree with a number for each leaf, from patterns on the names of leaves.

    A name is made of the keys, places and fields on the way to the leaf, joined by dots, such as
    `layers.3.attn.q`. The first pattern that matches it counts.

    What takes one number for each leaf, such as the coefficients of
    [`merge.ties`][wspace.merge.ties] or the `t` of
    [`interpolate.slerp`][wspace.interpolate.slerp], takes the tree in place of a number. The
    patterns of a recipe of the command line mean the same.

    Args:
        x: A tree like the weights.
        numbers: For each pattern, a glob such as `"*attn*"`, a number, which may be traced; or a
            tree like `x`, such as [`by_depth`][wspace.tree.by_depth] gives, of which the numbers at
            the leaves that match are taken.

    Returns:
        A tree like `x` with a number at each leaf.

    Raises:
        ValueError: If a pattern matches no leaf, or a leaf no pattern; or a tree among the numbers
            has none for a leaf.
        TypeError: If `numbers` is not a mapping from patterns.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge, tree
        >>> base = {"attn": jnp.zeros(1), "mlp": {"up": jnp.zeros(1)}}
        >>> tuned = {"attn": jnp.ones(1), "mlp": {"up": jnp.ones(1)}}
        >>> half = tree.by_name(base, {"*attn*": 0.5, "*": 0.25})
        >>> merge.task_arithmetic(base, [tuned], [half])
        {'attn': Array([0.5], dtype=float32), 'mlp': {'up': Array([0.25], dtype=float32)}}
    """
    if not isinstance(numbers, Mapping) or not all(isinstance(glob, str) for glob in numbers):
        raise TypeError(
            "numbers must be a mapping from patterns on the names of leaves to numbers, such as "
            f'{{"*attn*": 0.5, "*": 0.3}}, got {type(numbers)}'
        )
    patterns = list(numbers)
    names = [_checks.name_of(path) for path, _ in tree_leaves_with_path(x)]
    missing = unmatched(patterns, names)
    if missing is not None:
        raise ValueError(f"the pattern {missing!r} matches no leaf of x: {_some(names)}")
    found = first_matches(patterns, names)
    if None in found:
        raise ValueError(
            f"leaf {names[found.index(None)]!r} of x matches no pattern: give one for it, or '*' "
            "for the rest"
        )
    rows = [_checks.for_each_leaf(f"numbers[{glob!r}]", numbers[glob], x) for glob in patterns]
    chosen = [rows[i][place] for place, i in enumerate(found) if i is not None]
    return jax.tree.structure(x).unflatten(chosen)


def by_depth(x: PyTree, gradient: Coefficients, *, rest: ScalarLike | None = None) -> PyTree:
    r"""A tree with a number for each leaf, from a gradient over the layers.

    $$
    c_\ell = (1 - s)\, g_j + s\, g_{j+1}, \qquad j + s = \frac{\ell}{L}\, (m - 1)
    $$

    for the leaves of layer $\ell = 0, \dots, L$, with the $m$ numbers $g_0, \dots, g_{m-1}$ at
    equal distances from the first layer to the last, and straight lines between them. The layer is
    the first number that stands by itself in the name of the leaf, as in `model.layers.12.mlp.up`
    or `Dense_3.kernel`.

    Args:
        x: A tree like the weights.
        gradient: The $g_j$, at least one, which may be traced.
        rest: The number for leaves whose name has no number, such as embeddings.

    Returns:
        A tree like `x` with a number at each leaf.

    Raises:
        ValueError: If the gradient is empty, a leaf has no layer and `rest` is not given, no leaf
            has one, or a known number is not finite.
        TypeError: If the gradient is not a sequence of numbers, or `rest` is no number.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import tree
        >>> x = {"layers": [jnp.zeros(2)] * 5, "head": jnp.zeros(2)}
        >>> tree.by_depth(x, [0.0, 1.0, 0.5], rest=0.3)
        {'head': 0.3, 'layers': [0.0, 0.5, 1.0, 0.75, 0.5]}
    """
    _checks.ordered("gradient", gradient)
    if not len(gradient):
        raise ValueError("gradient is empty: give at least one number")
    numbers = _checks.scalars("gradient", gradient, len(gradient))
    names = [_checks.name_of(path) for path, _ in tree_leaves_with_path(x)]
    layers = [None if (found := _NUMBER.search(name)) is None else int(found[1]) for name in names]
    known = [layer for layer in layers if layer is not None]
    if names and not known:
        raise ValueError(f"no name of a leaf of x has a number of a layer: {_some(names)}")
    if rest is None and None in layers:
        raise ValueError(
            f"leaf {names[layers.index(None)]!r} of x has no number of a layer in its name: give "
            "rest, the number for such leaves"
        )
    rest = None if rest is None else _checks.scalar("rest", rest)
    last = max(known, default=0)
    return jax.tree.structure(x).unflatten(
        rest if layer is None else _at(numbers, layer * (len(numbers) - 1) / max(last, 1))
        for layer in layers
    )


def _at(numbers: Sequence[Any], place: float) -> Any:
    """The number at a place among numbers, on a straight line between two of them."""
    first = min(int(place), max(len(numbers) - 2, 0))
    part = place - first
    if not part:
        return numbers[first]
    return (1 - part) * numbers[first] + part * numbers[first + 1]


def _some(names: Sequence[str]) -> str:
    """A few names, for a message."""
    shown = ", ".join(map(repr, names[:3]))
    return f"its leaves are {shown}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
