"""What only the laws of this suite draw; strategies for weights are those of `wspace.testing`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from wspace.testing import LAYOUTS, coefficients

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
"""Arrays of other strides than the one they are made of, and of other shapes."""

layouts = st.sampled_from(LAYOUTS)
ratios = st.floats(0, 1, width=16)
scales = st.sampled_from([2.0**-20, 1.0, 2.0**20])
strengths = st.floats(-3, 3, width=16)
costs = functools.partial(coefficients, positive=True)


def is_shape(node):
    """Whether a node of a layout is the shape of a leaf."""
    return isinstance(node, tuple)


@st.composite
def projectors(draw, rows, dtype=FLOAT):
    """Orthogonal projectors of any rank, 0 and full included."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    basis = np.linalg.qr(rng.normal(size=(rows, rows)))[0][:, : draw(st.integers(0, rows))]
    return jnp.asarray(basis @ basis.T, dtype)
