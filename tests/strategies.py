"""What the laws are tested on: trees with values drawn freely, layouts from a list.

Each new shape costs a compilation, so shapes come from `LAYOUTS`; values are unrestricted
within the domain where squares neither overflow nor underflow in float32. No strategy calls
wspace: a generator built on the code under test would hide its mistakes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

LAYOUTS = (
    (3,),
    {"w": (4, 3), "b": (3,)},
    [{"scale": (), "none": None}, {"stack": (2, 3, 2), "empty": (0,)}],
    {"conv": (2, 1, 2, 3), "w": (3, 5)},
)
FLOAT = jax.dtypes.canonicalize_dtype(jnp.float64)
UNIT = float(np.finfo(np.dtype(FLOAT)).eps)
VIEWS = [
    lambda x: x,
    np.asfortranarray,
    lambda x: x.T,
    lambda x: x[..., ::-1] if x.ndim else x,
    lambda x: np.repeat(x[None], 2, axis=0)[::2],
    lambda x: np.broadcast_to(x[None], (2, *x.shape)),
]
"""Arrays of other strides than the one they are made of."""
ENTRIES = st.just(0.0) | st.floats(2**-10, 8, width=32) | st.floats(-8, -(2**-10), width=32)

layouts = st.sampled_from(LAYOUTS)
ratios = st.floats(0, 1, width=16)
scales = st.sampled_from([2.0**-20, 1.0, 2.0**20])
strengths = st.floats(-3, 3, width=16)
counts = st.integers(1, 4)


def is_shape(node):
    """Whether a node of a layout is the shape of a leaf."""
    return isinstance(node, tuple)


def weights(layout=LAYOUTS[1], dtype=FLOAT, entries=ENTRIES):
    """Trees of the given layout."""
    shapes, structure = jax.tree.flatten(layout, is_leaf=is_shape)
    leaves = st.tuples(*(arrays(np.float32, shape, elements=entries) for shape in shapes))
    return leaves.map(lambda xs: structure.unflatten([jnp.asarray(x, dtype) for x in xs]))


@st.composite
def points(draw, count=None, dtype=FLOAT, layout=None):
    """Several trees of one layout: unrelated, or fine-tunes at some distance from the first."""
    layout = draw(layouts) if layout is None else layout
    count = draw(counts) if count is None else count
    near, far = draw(st.sampled_from([(0, 1), (0, 1), (1, 1), (1, 1e-2), (1, 1e-4), (1, 0)]))
    first = draw(weights(layout))
    others = [draw(weights(layout)) for _ in range(count - 1)]
    others = [jax.tree.map(lambda x, y: near * x + far * y, first, other) for other in others]
    return [jax.tree.map(lambda x: x.astype(dtype), x) for x in (first, *others)]


@st.composite
def pairs(draw, dtype=FLOAT):
    """Two trees of one layout: unrelated, parallel, equal or, like fine-tunes, nearly parallel."""
    layout = draw(layouts)
    start, other = draw(weights(layout, dtype)), draw(weights(layout, dtype))
    near, far = draw(st.sampled_from([(0, 1), (0.5, 0), (1, 0), (1, 1e-2), (1, 1e-4), (1, 1e-6)]))
    return start, jax.tree.map(lambda x, y: near * x + far * y, start, other)


@functools.cache
def coefficients(count):
    """Mixing numbers of either sign whose sum is not small beside their size."""
    number = st.floats(-2, 2, width=16)
    numbers = st.lists(number, min_size=count, max_size=count)
    return numbers.filter(lambda c: abs(sum(c)) > 0.2 * max(map(abs, c), default=0))


def costs(count):
    """Positive numbers, one a point."""
    return st.lists(st.sampled_from([0.25, 1.0, 3.0, 10.0]), min_size=count, max_size=count)


@st.composite
def matrices(draw, shape, dtype=FLOAT):
    """Matrices of given shape with singular values distinct, repeated, zero or tiny."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    *stack, m, n = shape
    p = min(m, n)
    spectra = {
        "distinct": np.arange(p, 0, -1.0),
        "repeated": np.repeat([3.0, 1.0], [p - p // 2, p // 2]),
        "zeros": np.arange(p, 0, -1.0) * (np.arange(p) < (p + 1) // 2),
        "tiny": 10.0 ** -np.arange(0, 2 * p, 2.0),
    }
    spectrum = spectra[draw(st.sampled_from(sorted(spectra)))] * draw(scales)
    left = np.linalg.qr(rng.normal(size=(*stack, m, p)))[0]
    right = np.linalg.qr(rng.normal(size=(*stack, n, p)))[0]
    return jnp.asarray((left * spectrum) @ np.swapaxes(right, -1, -2), dtype)


@st.composite
def projectors(draw, rows, dtype=FLOAT):
    """Orthogonal projectors of any rank, 0 and full included."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    basis = np.linalg.qr(rng.normal(size=(rows, rows)))[0][:, : draw(st.integers(0, rows))]
    return jnp.asarray(basis @ basis.T, dtype)
