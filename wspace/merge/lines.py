r"""LiNeS: an edit scaled by depth."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.tree_util import keystr, tree_map_with_path
from jaxtyping import Array, PyTree

from wspace import _checks, _lift
from wspace.typing import Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["lines"]


def lines(
    edit: WeightsLike,
    layers: PyTree | Callable[[str], int | None],
    *,
    start: ScalarLike,
    rise: ScalarLike,
    count: int | None = None,
) -> Weights:
    r"""LiNeS: an edit scaled by depth, so that shallow layers move less than deep ones.

    $$
    \hat\tau_\ell = \Bigl( \alpha + \beta\, \frac{\ell}{L - 1} \Bigr)\, \tau_\ell, \qquad
    \ell = 0, \dots, L - 1
    $$

    Linear in the edit; $\beta = 0$ scales all of it. A single layer, $L = 1$, is the first one
    and gets $\alpha$, and so does a leaf of no layer.

    Args:
        edit: The task vector $\tau$, or a merged one.
        layers: The layer $\ell$ of every leaf: a tree of the structure of `edit` with an integer
            or `None` at each leaf, or a function that takes the path of a leaf, such as
            `"['blocks'][3]['w']"`, and returns one. `None` is a leaf of no layer.
        start: The number $\alpha$, the factor of the first layer.
        rise: The number $\beta$, by how much the factor of the last layer is more.
        count: The number of layers $L$; the largest $\ell$ and one more if not given.

    Returns:
        The scaled edit, of the layout and dtypes of `edit`.

    Raises:
        ValueError: If `layers` is not of the structure of `edit`, a layer is negative or not below
            `count`, or a known number is not finite.
        TypeError: If a layer is not an integer, or a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> edit = {"blocks": [jnp.ones(1), jnp.ones(1), jnp.ones(1)], "head": jnp.ones(1)}
        >>> merge.lines(edit, {"blocks": [0, 1, 2], "head": 2}, start=0.5, rise=1.0)["blocks"]
        [Array([0.5], dtype=float32), Array([1.], dtype=float32), Array([1.5], dtype=float32)]

    References:
        K. Wang et al., *LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model
        Merging*, ICLR 2025, section 4, [arXiv:2410.17146](https://arxiv.org/abs/2410.17146).
    """
    start, rise = _checks.scalar("start", start), _checks.scalar("rise", rise)
    _checks.same_layout(edit=edit)
    structure = jax.tree.structure(edit)
    if callable(layers):
        layers = tree_map_with_path(lambda path, _: layers(keystr(path)), edit)
    kinds = "an integer or None at each leaf, or a function of paths"
    places = _checks.entries("layers", layers, edit, kinds, of="edit", is_leaf=lambda _: True)
    depths = [layer if layer is None else _checks.rank(layer, where) for layer, _, where in places]
    deepest = max((layer for layer in depths if layer is not None), default=0)
    last = deepest if count is None else _checks.rank(count, "count") - 1
    if deepest > last:
        raise ValueError(f"a leaf is of layer {deepest}, but count is {count}: layers begin at 0")
    shares = [np.float64((layer or 0) / max(last, 1)) for layer in depths]
    return _by_depth((start, rise), (edit,), [structure.unflatten(shares)])


@_lift.elementwise
def _by_depth(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (start, rise, depth), (edit,) = scalars, arrays
    return (start + rise * depth) * edit
