"""How the tests compare trees, and the oracle's view of them."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np


def assert_close(actual, desired, *, units=8, scale=None):
    """Asserts equal layouts and dtypes, and values within `units` roundings of each other.

    One rounding is machine epsilon of the leaf's dtype times `scale`, by default the largest
    entry of `desired`: error is measured against the tree, since an entry may be a difference.
    """
    assert jax.tree.map(jax.typeof, actual) == jax.tree.map(jax.typeof, desired)
    leaves = jax.tree.leaves(desired)
    if scale is None:
        entries = np.abs(vector(desired).astype(np.float64))
        scale = np.max(entries[np.isfinite(entries)], initial=0.0)
    for got, wanted in zip(jax.tree.leaves(actual), leaves, strict=True):
        atol = units * eps(wanted) * float(scale)
        np.testing.assert_allclose(
            np.asarray(got, np.float64), np.asarray(wanted, np.float64), rtol=0, atol=atol
        )


def eps(x):
    """Machine epsilon of the dtype of an array, 0 for integers."""
    return float(jnp.finfo(x.dtype).eps) if jnp.issubdtype(x.dtype, jnp.floating) else 0.0


def vector(tree):
    """All entries of a tree as one NumPy vector in extended precision: the oracle's view."""
    leaves = [np.asarray(x).astype(np.longdouble).reshape(-1) for x in jax.tree.leaves(tree)]
    return np.concatenate([np.zeros(0, np.longdouble), *leaves])


def like(entries, tree):
    """The inverse of `vector`: a tree of the layout and dtypes of `tree`."""
    leaves, structure = jax.tree.flatten(tree)
    stops = np.cumsum([0, *(x.size for x in leaves)])
    parts = [entries[i:j] for i, j in itertools.pairwise(stops)]
    return structure.unflatten(
        [
            jnp.asarray(np.asarray(part, np.float64).reshape(x.shape).astype(x.dtype))
            for part, x in zip(parts, leaves, strict=True)
        ]
    )


def size(*trees):
    """The sum of the norms of some trees: the scale on which their combinations round."""
    return float(sum(np.linalg.norm(vector(x).astype(np.float64)) for x in trees))


def is_nan(tree):
    """Whether every entry is NaN."""
    return all(bool(jnp.isnan(x).all()) for x in jax.tree.leaves(tree))


NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def same_picture(kept, new):
    """Asserts that two SVG files show the same, but for the last digits of their coordinates."""
    kept, new = kept.read_text(), new.read_text()
    if kept == new:
        return
    # Ids are hashes of coordinates.
    kept, new = (re.sub(r"\b[a-z]+[0-9a-f]{10}\b", "id", text) for text in (kept, new))
    assert NUMBER.sub("0", kept) == NUMBER.sub("0", new)
    kept, new = (np.array(NUMBER.findall(text), float) for text in (kept, new))
    np.testing.assert_allclose(new, kept, rtol=0, atol=0.01)
