r"""Naming a point: an input that makes a frozen model do what the point does.

A point of weight space found by averaging or steering is one set of numbers for all layers. Its
*name* is a much smaller one: an input embedding, or a coordinate in a chart of weight space, with
which a model that is not touched does the same, as nearly as it can.
"""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from wspace import _checks, tree
from wspace import _frames as frames
from wspace._words import described, layout_of, shortened
from wspace.fit.training import (
    Fit,
    Functions,
    KeyedLoss,
    Progress,
    called,
    minimized,
    one_key,
    scalar_loss,
)
from wspace.typing import ScalarLike, WeightsLike

__all__ = ["invert"]


@dataclasses.dataclass(frozen=True)
class _Inverted:
    """The loss of an embedding, in its table if there is one, and its distance from the start."""

    rows: tuple[int, ...]
    keyed: bool

    def __call__(
        self, functions: Functions, name: PyTree, data: PyTree, key: Array
    ) -> Float[Array, "2"]:
        start, table = data
        seen = name if table is None else placed(table, self.rows, name)
        off = frames.gap_square(
            (1.0,), (name, start)
        )  # no root, whose derivative at 0 is no number
        value = jnp.asarray(called(*functions, seen, key, self.keyed))
        return jnp.stack([value.astype(off.dtype), off])


def placed(table: Array, rows: tuple[int, ...], name: Array) -> Array:
    """The table with some of its rows replaced, the others as they were."""
    index = jnp.arange(table.shape[0])[:, None] == jnp.asarray(rows)[None, :]
    new = jnp.reshape(name, (len(rows), table.shape[1]))[jnp.argmax(index, axis=1)]
    return jnp.where(jnp.any(index, axis=1, keepdims=True), new.astype(table.dtype), table)


def invert(
    key: Array,
    loss: KeyedLoss,
    start: WeightsLike,
    *,
    keyed: bool = False,
    table: Float[Array | np.ndarray, "n d"] | None = None,
    rows: SupportsIndex | Sequence[SupportsIndex] | np.ndarray | None = None,
    ridge: ScalarLike = 0.0,
    optimizer: optax.GradientTransformation,
    steps: int,
    progress: Progress | None = None,
) -> Fit:
    r"""Finds an embedding with which a frozen model does what is asked: textual inversion.

    $$
    \min_e \ L(e) + \lambda \lVert e - e_0 \rVert^2, \qquad
    \text{such as } L(e) = \frac1n \sum_j \lVert f(e; z_j) - t_j \rVert^2
    $$

    The model is whatever `loss` closes over, and stays as it is. With a `table` of embeddings the
    loss is called on the table in which the new rows stand, and those rows alone are trained: the
    others come back bit for bit, whatever the optimizer does, weight decay included.

    Where the model is linear, $f(e) = W e$ with sum of squares as the loss, the optimum is
    $e_0 + (W^\top W + \lambda I)^{-1} W^\top (t - W e_0)$, and without ridge, found by an optimizer
    that moves along gradients, the least-squares solution nearest to $e_0$. There, and wherever
    the gradient is zero, the residual is orthogonal to what the embedding can change. What is
    left of the loss says what the name cannot say.

    Any tree will do in place of an embedding. For a coordinate in a chart of weight space the
    loss is a function of the coordinate, such as
    `lambda z: model_loss(tree.combine([1.0, *z], [origin, *directions]))`.

    Args:
        key: A random key, from which the loss gets one a step.
        loss: The loss $L$, a function of the embedding, or of the table if there is one; or of
            that and a key.
        start: The embedding $e_0$ to start at, such as the embedding of a coarse word: `(d,)`, or
            `(k, d)` for several rows of a table, or any tree if there is no table.
        keyed: Whether the loss takes a key, which decides the batch.
        table: The embeddings of the model, one a row.
        rows: Which row or rows of the table to replace; given with a table, and only then.
        ridge: The factor $\lambda \ge 0$.
        optimizer: An optimizer of optax.
        steps: The number of steps.
        progress: Called with the step and the loss about a hundred times a run.

    Returns:
        A [`Fit`][wspace.fit.Fit] whose `weights` are the table with the new rows, or the embedding
            if there is no table, in the dtypes that came in. `history.gradient` tells how near
            the run came to an optimum.

    Raises:
        ValueError: If `start` is not of the layout of the rows it is to replace, `rows` are not
            distinct rows of the table, a table comes without rows or rows without a table,
            `ridge` is known and negative or not finite, or the loss is not finite at the start
            (NaN if traced).
        TypeError: If the loss does not take what `keyed` says, or does not return one number,
            `optimizer` is not one of optax, `key` is not one key, or a leaf is not floating-point.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from wspace import fit
        >>> model = jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> def loss(table):
        ...     return jnp.sum((model @ table[1] - jnp.array([3.0, 4.0, 5.0])) ** 2)
        >>> table = jnp.ones((3, 2))
        >>> named = fit.invert(
        ...     jax.random.key(0), loss, table[0], table=table, rows=1,
        ...     optimizer=optax.sgd(0.1), steps=100,
        ... )
        >>> named.weights[0], named.weights[1].round(2).tolist()
        (Array([1., 1.], dtype=float32), [3.0, 2.0])
        >>> float(named.history.loss[-1])
        25.0

    References:
        R. Gal et al., *An Image is Worth One Word: Personalizing Text-to-Image Generation using
        Textual Inversion*, ICLR 2023, [arXiv:2208.01618](https://arxiv.org/abs/2208.01618),
        section 3.
    """
    key = one_key(key)
    _checks.same_layout(start=start)
    ridge = _checks.nonnegative("ridge", ridge)
    if (table is None) != (rows is None):
        raise ValueError("table and rows belong together: the embeddings, and which to replace")
    places: tuple[int, ...] = ()
    wide: Any = None
    if table is not None:
        places = _rows_of(table, rows, start)
        wide = tree.upcast(table)
    first = tree.upcast(start)
    whole = first if wide is None else wide
    scalar_loss("loss", loss, whole, key, keyed)
    found, history = minimized(
        key,
        _Inverted(places, keyed),
        (loss,),
        ("loss", "the distance"),
        (1.0, ridge),
        first,
        (first, wide),
        optimizer,
        steps,
        progress,
    )
    if table is None:
        return Fit(tree.cast_like(found, start), history)
    return Fit(_placed(jnp.asarray(table), places, found), history)


_placed = jax.jit(placed, static_argnums=1)


def _rows_of(table: Any, rows: Any, start: Any) -> tuple[int, ...]:
    """The rows to replace, once they are seen to be rows of the table that `start` fits."""
    _checks.same_layout(table=table)
    if getattr(table, "ndim", None) != 2:
        raise ValueError(f"table must be a matrix with one embedding a row, got {described(table)}")
    count, width = table.shape
    several = hasattr(rows, "__len__")
    given = list(rows) if several else [rows]
    try:
        if any(isinstance(row, bool | np.bool_) for row in given):
            raise TypeError
        places = tuple(map(operator.index, given))
    except TypeError as error:
        raise TypeError(f"rows must be an integer or several, got {described(rows)}") from error
    bad = [row for row in places if not 0 <= row < count]
    if bad or len(set(places)) != len(places) or not places:
        raise ValueError(
            f"rows must be distinct rows of table, from 0 to {count - 1}, got "
            f"{shortened(str(rows))}"
        )
    wanted = (len(places), width) if several else (width,)
    if getattr(start, "shape", None) != wanted:
        shape = start.shape if hasattr(start, "shape") else layout_of(start)
        raise ValueError(
            f"start has the layout {shape}, but the rows of table it is to replace have {wanted}: "
            "start from an embedding of this table"
        )
    return places
