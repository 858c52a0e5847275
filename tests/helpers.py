"""What several law files ask of results and of pictures."""

import base64
import io
import re

import jax
import jax.numpy as jnp
import numpy as np


def is_nan(tree):
    """Whether every entry is NaN."""
    return all(bool(jnp.isnan(x).all()) for x in jax.tree.leaves(tree))


NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


IMAGE = re.compile(r"data:image/png;base64,([\w+/=\s]+)")


def pixels(payload):
    """A PNG image within an SVG file."""
    from matplotlib.image import imread

    return imread(io.BytesIO(base64.b64decode(payload)), format="png")


def same_picture(kept, new):
    """Asserts that two SVG files show the same, but for last digits of coordinates and colors."""
    kept, new = kept.read_text(), new.read_text()
    if kept == new:
        return
    for old, image in zip(IMAGE.findall(kept), IMAGE.findall(new), strict=True):
        np.testing.assert_allclose(pixels(image), pixels(old), rtol=0, atol=0.02)
    kept, new = (IMAGE.sub("", text) for text in (kept, new))
    # Ids are hashes of coordinates.
    kept, new = (re.sub(r"\b[a-z]+[0-9a-f]{10}\b", "id", text) for text in (kept, new))
    assert NUMBER.sub("0", kept) == NUMBER.sub("0", new)
    kept, new = (np.array(NUMBER.findall(text), float) for text in (kept, new))
    np.testing.assert_allclose(new, kept, rtol=0, atol=0.01)
