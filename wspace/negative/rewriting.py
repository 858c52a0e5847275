"""Writing new values into a matrix, beside those that it is to keep."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wspace import _checks, tree
from wspace._numerics import (
    matmul,
    placed_like,
    pseudo_inverse,
    replicated,
    rounded_like,
    rows_within,
    safe_sqrt,
)
from wspace.lowrank.factors import as_matrix, matrix_shape
from wspace.typing import Layout, ScalarLike

__all__ = ["rewrite"]

_NAMES = {"in_out": "(in, out)", "out_in": "(out, in)"}


def rewrite(
    matrix: Float[Array | np.ndarray, "p q"],
    keys: Float[Array | np.ndarray, "k m"],
    values: Float[Array | np.ndarray, "k n"],
    *,
    keep: Float[Array | np.ndarray, "l m"] | None = None,
    ridge: ScalarLike = 0.0,
    layout: Layout = "in_out",
) -> Float[Array, "p q"]:
    r"""Makes a matrix take given values at some keys, and keep those that it has at others.

    Known as model editing (ROME, MEMIT), with `keep` as null-space editing (AlphaEdit).

    With keys as rows of $K$, values as rows of $Y$, and $P = I - K_0^+ K_0$ for the rows of `keep`,

    $$
    W' = W + P K^\top \bigl(K P K^\top + \lambda I\bigr)^{-1} (Y - K W)
    $$

    At $\lambda = 0$, $K W' = Y$ and $K_0 W' = K_0 W$, at the least $\lVert W' - W \rVert$ of all
    that do both. The edit has the rank of the keys at most. With a ridge, $K_0 W' = K_0 W$
    still, and the values are approached: $\lVert K\,dW - R \rVert^2 + \lambda \lVert dW
    \rVert^2$, $R = Y - K W$, is the least of all edits that keep.

    Args:
        matrix: The matrix $W$, `(in, out)`, of `x @ W`.
        keys: The inputs $K$, one a row, `(k, in)`.
        values: The outputs $Y$ that they are to have, `(k, out)`.
        keep: Inputs $K_0$ whose outputs must not change, one a row, `(n, in)`; none if not given.
            If they span all inputs no edit is left: of many inputs keep those that matter.
        ridge: The $\lambda \ge 0$, in units of squared keys.
        layout: How the layer stores its matrix, `"in_out"`, or `"out_in"` as torch and equinox do:
            then `matrix` and the result are $W^\top$, and all else is the same.

    Returns:
        The matrix $W'$, in the dtype of `matrix`. Derivatives exist where the rank of keys and of
            `keep` does not change; the derivative by the ridge is $0$ at $0$.

    Raises:
        ValueError: If there is no ridge and the keys cannot take the values, since some depend on
            others or on `keep`: if what is out of reach exceeds $\sqrt\varepsilon$ of $R$ and
            the rounding of its terms, $64\,\varepsilon\,(\lVert Y \rVert + \lVert K \rVert \lVert W
            \rVert)$ (NaN if traced). Also if the shapes do not fit, the ridge is known and not at
            least 0, or a known value is NaN or infinite.
        TypeError: If an array is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import negative
        >>> w = jnp.array([[1.0, 2.0], [3.0, 4.0]], jnp.float32)
        >>> keys, keep = jnp.array([[1.0, 1.0]]), jnp.array([[0.0, 1.0]])
        >>> new = negative.rewrite(w, keys, jnp.array([[8.0, 9.0]]), keep=keep)
        >>> new.round()  # the rows add up to the values, and the second is what it was
        Array([[5., 5.],
               [3., 4.]], dtype=float32)

    References:
        J. Fang et al., *AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models*,
        ICLR 2025, [arXiv:2410.02355](https://arxiv.org/abs/2410.02355). Here the system is as
        large as the keys are many, not as they are long.
    """
    ridge = _checks.nonnegative("ridge", ridge)
    _checks.known_layout(layout)
    arrays = {"matrix": matrix, "keys": keys, "values": values}
    arrays |= {} if keep is None else {"keep": keep}
    _checks.one_array(**arrays)
    shapes = {name: x.shape for name, x in arrays.items()}
    flat = all(len(shape) == 2 for shape in shapes.values())
    stored = matrix_shape(matrix.shape, layout)
    sides = (keys.shape[-1], values.shape[-1]) if flat else ()
    if not (
        flat
        and keys.shape[0] == values.shape[0]
        and stored == sides
        and (keep is None or keep.shape[1] == keys.shape[1])
    ):
        turned = flat and stored == sides[::-1]
        raise ValueError(
            f"matrix must be {_NAMES[layout]}, keys (k, in), values (k, out) and keep (n, in), "
            f"got {shapes}{_checks.in_other_layout(layout, turned)}"
        )
    _checks.finite(**arrays)
    w, k, y, *kept = (replicated(x) for x in tree.widened(*arrays.values()))
    w = as_matrix(w, layout=layout)
    ridge = jnp.asarray(ridge).astype(w.dtype)
    rounding = 64 * jnp.finfo(w.dtype).eps

    def free(rows: Float[Array, "_ m"]) -> Float[Array, "_ m"]:
        for x in kept:
            rows = rows - rows_within(rows, x, rounding * jnp.linalg.norm(x))
        return rows

    wanted = y - matmul(k, w)
    # With A = (K P, sqrt(ridge) I) it is A^+ = A^T (A A^T)^-1 without its lower rows: unlike the
    # normal equations it squares nothing.
    damped = jnp.concatenate([free(k), safe_sqrt(ridge) * jnp.eye(len(k), dtype=k.dtype)], axis=1)
    inverse = pseudo_inverse(damped, rounding * jnp.linalg.norm(k))[: len(w)]
    edit = matmul(free(inverse.T).T, wanted)
    missing = jnp.linalg.norm(matmul(k, edit) - wanted, axis=1)
    lost, whole = jnp.linalg.norm(missing), jnp.linalg.norm(wanted)
    terms = jnp.linalg.norm(y) + jnp.linalg.norm(k) * jnp.linalg.norm(w)
    new = _checks.poisoned(
        w + edit,
        ~jnp.isfinite(terms)
        | ((ridge == 0) & ~(lost <= jnp.finfo(w.dtype).eps ** 0.5 * whole + rounding * terms)),
        lambda: (
            f"keys cannot take the values: of a change of norm {whole:.3g}, {lost:.3g} is out of "
            f"reach, most of it ({jnp.max(missing):.3g}) at keys[{jnp.argmax(missing)}], which "
            "depends on other keys or on keep: leave it out, keep less, or give a ridge"
        ),
    )
    return placed_like(rounded_like(as_matrix(new, layout=layout), matrix), jnp.asarray(matrix))
