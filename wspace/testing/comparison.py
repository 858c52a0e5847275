"""Trees compared in roundings, and as vectors of NumPy."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from wspace.typing import ScalarLike

__all__ = ["assert_close", "like", "size", "vector"]


def assert_close(
    actual: PyTree, desired: PyTree, *, units: ScalarLike = 8, scale: ScalarLike | None = None
) -> None:
    r"""Asserts that two trees have one layout, one type at each leaf and nearly equal values.

    $$
    \lvert \text{actual} - \text{desired} \rvert \le
    \text{units} \cdot \varepsilon \cdot \text{scale}
    $$

    at every entry, with $\varepsilon$ the machine epsilon of the leaf's dtype. Entries of integers
    and booleans must be equal, and NaN is equal to NaN. Types are what `jax.typeof` says: shape and
    dtype, weak or not, and how a leaf is sharded.

    Args:
        actual: What was computed.
        desired: What it should be.
        units: The number of roundings allowed. 0 asks for equality.
        scale: The size at which the computation rounds, such as [`size`][wspace.testing.size] of
            what it sums. By default the largest entry of `desired`, over all leaves: an entry
            may be a small difference of large numbers, which rounds as they do.

    Raises:
        AssertionError: If they differ, with the leaf and the roundings.

    Examples:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from wspace import testing
        >>> testing.assert_close({"w": jnp.ones(3) / 3}, {"w": np.full(3, 1 / 3, np.float32)})
        >>> testing.assert_close({"w": jnp.ones(3)}, {"w": np.full(3, 1.001, np.float32)})
        Traceback (most recent call last):
            ...
        AssertionError: leaf ['w'] differs by 8.38e+03 roundings, allowed are 8: 1, not 1.001,
        at entry (0,); a rounding is 1.19e-07 times 1
    """
    compare("", actual, desired, units=units, scale=largest(desired) if scale is None else scale)
    named, _ = jax.tree.flatten_with_path(desired)
    for (path, y), x in zip(named, jax.tree.leaves(actual), strict=True):
        if jax.typeof(x) != jax.typeof(y):
            raise AssertionError(f"{at_leaf(path)} is {jax.typeof(x)}, not {jax.typeof(y)}")


def compare(
    law: str,
    actual: PyTree,
    desired: PyTree,
    *,
    units: Any,
    scale: Any,
    rounding: float = 0.0,
    types: PyTree | None = None,
) -> None:
    """Asserts closeness in the name of a law.

    `types` has the layout and dtypes where values of `desired` are of other ones; `rounding` is
    the least machine epsilon, that of the inputs where they were rounded.
    """
    types, said = desired if types is None else types, f"{law}: " if law else ""
    units, scale = (float(np.asarray(x)) for x in (units, scale))
    if jax.tree.structure(actual) != jax.tree.structure(types):
        raise AssertionError(
            f"{said}layout is {jax.tree.structure(actual)}, not {jax.tree.structure(types)}"
        )
    named, _ = jax.tree.flatten_with_path(types)
    got, wanted = jax.tree.leaves(actual), jax.tree.leaves(desired)
    for (path, like), x, y in zip(named, got, wanted, strict=True):
        leaf, kinds = (
            f"{said}{at_leaf(path)}",
            [(jnp.shape(z), jax.typeof(z).dtype) for z in (x, like)],
        )
        if kinds[0] != kinds[1]:
            raise AssertionError(f"{leaf} is {jax.typeof(x)}, not {jax.typeof(like)}")
        x, y = (np.asarray(z).astype(np.longdouble) for z in (x, y))
        unit = (max(eps(like), rounding) if eps(like) else 0.0) * scale
        with np.errstate(invalid="ignore"):
            gaps = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0, np.abs(x - y))
        gaps = np.where(np.isnan(gaps), np.inf, gaps)
        if not np.max(gaps, initial=0) <= units * unit:
            at = tuple(int(i) for i in np.unravel_index(np.argmax(gaps), gaps.shape))
            roundings = f"{float(gaps[at] / unit):.3g}" if unit else "infinitely many"
            raise AssertionError(
                f"{leaf} differs by {roundings} roundings, allowed are {units:.3g}: "
                f"{float(x[at]):.8g}, not {float(y[at]):.8g}, at entry {at}; "
                f"a rounding is {unit / scale if unit else 0:.3g} times {scale:.3g}"
            )


def at_leaf(path: tuple) -> str:
    """What a message calls a leaf."""
    return f"leaf {jax.tree_util.keystr(path)}" if path else "the array"


def largest(tree: PyTree) -> float:
    """The largest finite magnitude of an entry."""
    entries = np.abs(vector(tree).astype(np.float64))
    return float(np.max(entries[np.isfinite(entries)], initial=0.0))


def norm(weights: PyTree) -> float:
    """The norm of all finite entries taken as one vector."""
    entries = vector(weights).astype(np.float64)
    return float(np.linalg.norm(entries[np.isfinite(entries)]))


def stored(weights: PyTree) -> float:
    """The largest machine epsilon of the dtypes in which weights are stored."""
    return max(map(eps, jax.tree.leaves(weights)), default=0.0)


def eps(x: Any) -> float:
    """Machine epsilon of the dtype of an array, 0 for integers."""
    dtype = jax.typeof(x).dtype
    return float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else 0.0


def vector(tree: PyTree) -> np.ndarray:
    """All entries of a tree as one NumPy vector in extended precision, to compute what is right.

    Leaf by leaf in the order of `jax.tree.leaves`, each in row-major order.

    Args:
        tree: A tree of arrays.

    Returns:
        A vector of `np.longdouble`.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import testing
        >>> x = {"w": jnp.ones((2, 2)), "b": jnp.array([3.0])}
        >>> testing.vector(x).astype(float).tolist()
        [3.0, 1.0, 1.0, 1.0, 1.0]
    """
    leaves = [np.asarray(x).astype(np.longdouble).reshape(-1) for x in jax.tree.leaves(tree)]
    return np.concatenate([np.zeros(0, np.longdouble), *leaves])


def like(entries: Any, tree: PyTree) -> PyTree:
    """The inverse of [`vector`][wspace.testing.vector]: a tree with given entries.

    Args:
        entries: One number an entry of `tree`, in the order of `vector`.
        tree: A tree of arrays with the layout and the dtypes that are wanted.

    Returns:
        The tree, with entries rounded to the dtypes of `tree`.

    Raises:
        ValueError: If the number of entries is another.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import testing
        >>> x = {"w": jnp.ones((2, 2)), "b": jnp.array([3.0])}
        >>> testing.like(2 * testing.vector(x), x)["b"]
        Array([6.], dtype=float32)
    """
    leaves, structure = jax.tree.flatten(tree)
    entries, sizes = np.asarray(entries), [x.size for x in leaves]
    if entries.shape != (sum(sizes),):
        raise ValueError(f"entries has shape {entries.shape}, the tree has {sum(sizes)} entries")
    stops = itertools.pairwise(np.cumsum([0, *sizes]))
    parts = [entries[i:j].astype(np.float64) for i, j in stops]
    return structure.unflatten(
        jnp.asarray(part.reshape(x.shape).astype(x.dtype))
        for part, x in zip(parts, leaves, strict=True)
    )


def size(*trees: PyTree) -> float:
    """The sum of the norms of some trees: the scale at which their combinations round.

    Args:
        *trees: Trees of arrays.

    Returns:
        The sum, 0 without trees.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import testing
        >>> testing.size({"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([0.0, 2.0])})
        7.0
    """
    return float(sum(np.linalg.norm(vector(x).astype(np.float64)) for x in trees))
