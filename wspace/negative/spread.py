"""Spreading a shift: over its singular directions, or over the points that are to make it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from wspace import _checks, lowrank, tree
from wspace._numerics import matmul, placed_like, replicated, safe_sqrt
from wspace.typing import ScalarLike, Weights, WeightsLike

__all__ = ["harden"]


def harden(edit: WeightsLike, *, rtol: ScalarLike | None = None) -> Weights:
    r"""Spreads an edit evenly over its singular directions, at the same norm.

    $$
    D \mapsto \frac{\lVert D \rVert_F}{\sqrt k}\, U_k V_k^\top, \qquad
    k = \#\{i : \sigma_i > \tau \sigma_1\}
    $$

    The norm of every leaf, its row space and its column space stay; what an edit of rank $r$
    leaves of it becomes $\lVert D \rVert \sqrt{1 - r/k}$, the most that any edit with this norm
    and rank leaves. A guard that moved an average by a hardened displacement therefore holds
    to the highest rank. That is a bound on edits towards a known point, not resistance to
    training; and hardening the edit of every point does not flatten that of their average.

    Args:
        edit: The edit $D$, a tree; each slice of a stack is flattened by itself.
        rtol: The threshold $\tau$ in $(0, 1)$, relative to the largest singular value of each
            matrix; $\max(m, n)\,\varepsilon$ if not given. An edit that was rounded to half
            precision has full rank: give the rounding there.

    Returns:
        The flat edit, each leaf in the dtype of that leaf of `edit`. Vectors, scalars and zero
            leaves are unchanged. Derivatives are not defined where singular values repeat, as
            they do in the result.

    Raises:
        ValueError: If a known value is NaN or infinite (NaN if traced), `rtol` is known and not
            between 0 and 1, or a leaf has more than five dimensions.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import negative
        >>> negative.harden(jnp.diag(jnp.array([4.0, 3.0, 0.0]))).diagonal()
        Array([3.535534, 3.535534, 0.      ], dtype=float32)
    """
    _checks.floating_leaves(edit=edit)
    _checks.finite(edit=edit)
    if rtol is not None:
        rtol = _checks.scalar("rtol", rtol, lambda x: (x > 0) & (x < 1), "between 0 and 1")

    def flat(leaf: Array) -> Array:
        if leaf.ndim < 2 or not leaf.size:
            return leaf
        matrix = replicated(lowrank.as_matrix(leaf))
        u, values, vt = jnp.linalg.svd(matrix, full_matrices=False)
        least = max(matrix.shape[-2:]) * jnp.finfo(leaf.dtype).eps if rtol is None else rtol
        kept = values > jnp.asarray(least).astype(leaf.dtype) * values[..., :1]
        norm = safe_sqrt(jnp.sum(matrix**2, axis=(-2, -1)))
        level = norm / safe_sqrt(jnp.maximum(jnp.sum(kept, axis=-1), 1).astype(leaf.dtype))
        flattened = matmul(u * jnp.where(kept, level[..., None], 0)[..., None, :], vt)
        return placed_like(flattened.reshape(leaf.shape), leaf)

    return tree.cast_like(jax.tree.map(flat, tree.upcast(edit)), edit)
