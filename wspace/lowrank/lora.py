r"""Edits as LoRA stores them: two factors and a scaling."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from wspace import _checks
from wspace._numerics import accumulator
from wspace.lowrank.factors import LowRank, factors_of, transposed
from wspace.typing import Layout, ScalarLike

__all__ = ["from_lora", "to_lora"]


def from_lora(
    a: Float[Array | np.ndarray, "*batch r in"],
    b: Float[Array | np.ndarray, "*batch out r"],
    *,
    alpha: ScalarLike,
    rank_stabilized: bool = False,
    layout: Layout = "in_out",
) -> LowRank:
    r"""The edit that the two factors of a LoRA layer are.

    $$
    U V^\top = s\,(B A)^\top, \qquad s = \alpha / r \quad\text{or, rank-stabilized,}\quad
    s = \alpha / \sqrt r
    $$

    A layer of torch multiplies by the transpose of its weight `(out, in)`, and LoRA adds $s B A$
    to that weight. Weights here act as `x @ W` with $W$ `(in, out)`, to which the edit is added
    in the layout `"in_out"`; in the layout `"out_in"` it is $s B A$, for the weight as torch
    stores it. Linear in each factor and in $\alpha$, which may have any sign. The scaling is
    multiplied into $B$, exactly if it is a power of two; only the product has a meaning.

    Args:
        a: The factor $A$ `(r, in)`, or a stack of them: `lora_A.weight` of PEFT.
        b: The factor $B$ `(out, r)`, or a stack of them: `lora_B.weight` of PEFT.
        alpha: The number $\alpha$: `lora_alpha` of PEFT.
        rank_stabilized: Whether $s = \alpha / \sqrt r$: `use_rslora` of PEFT.
        layout: Which weight the edit is for: `"in_out"`, `(in, out)`, or `"out_in"`.

    Returns:
        The edit, with factors in at least float32.

    Raises:
        ValueError: If the factors do not match or have rank 0, for which LoRA defines no scaling,
            `layout` is unknown, or `alpha` is known and not finite.
        TypeError: If a factor is not floating-point, or `alpha` is not a number.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank
        >>> a, b = jnp.array([[1.0, 0.0, 2.0]]), jnp.array([[1.0], [3.0]])
        >>> lowrank.materialize(lowrank.from_lora(a, b, alpha=2))
        Array([[ 2.,  6.],
               [ 0.,  0.],
               [ 4., 12.]], dtype=float32)

    References:
        E. Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022, section
        4.1, [arXiv:2106.09685](https://arxiv.org/abs/2106.09685); D. Kalajdzievski, *A Rank
        Stabilization Scaling Factor for Fine-Tuning with LoRA*, 2023,
        [arXiv:2312.03732](https://arxiv.org/abs/2312.03732).
    """
    _checks.known_layout(layout)
    _checks.one_array(a=a, b=b)
    a, b = jnp.asarray(a), jnp.asarray(b)
    if min(a.ndim, b.ndim) < 2 or (*a.shape[:-2], a.shape[-2]) != (*b.shape[:-2], b.shape[-1]):
        raise ValueError(
            f"a {a.shape} and b {b.shape} are not the factors of one update: "
            "they must be (..., r, in) and (..., out, r)"
        )
    wide = accumulator(a.dtype, b.dtype)
    alpha = _checks.scalar("alpha", alpha)
    inputs = transposed(a.astype(wide))
    outputs = b.astype(wide) * _scaling(alpha, b.shape[-1], rank_stabilized).astype(wide)
    return LowRank(inputs, outputs) if layout == "in_out" else LowRank(outputs, inputs)


def to_lora(
    edit: LowRank,
    *,
    alpha: ScalarLike | None = None,
    rank_stabilized: bool = False,
    layout: Layout = "in_out",
) -> tuple[Float[Array, "*batch r in"], Float[Array, "*batch out r"]]:
    r"""The two factors of a LoRA layer that an edit is.

    $$
    s\,(B A)^\top = U V^\top, \qquad s = \alpha / r \quad\text{or, rank-stabilized,}\quad
    s = \alpha / \sqrt r
    $$

    The inverse of [`from_lora`][wspace.lowrank.from_lora] with the same arguments: of the
    product, and of the factors too if $s$ is a power of two.

    Args:
        edit: The edit, of rank at least 1.
        alpha: The number $\alpha$, not zero; `None` for that which makes the scaling 1: $r$ or,
            rank-stabilized, $\sqrt r$.
        rank_stabilized: Whether $s = \alpha / \sqrt r$.
        layout: Which weight the edit is for: `"in_out"`, `(in, out)`, or `"out_in"`.

    Returns:
        The factors $A$ `(..., r, in)` and $B$ `(..., out, r)`, in at least float32.

    Raises:
        ValueError: If the rank is 0, which LoRA does not have, the factors do not match, `layout`
            is unknown, or `alpha` is known and zero or not finite (traced and zero, $B$ is NaN).
        TypeError: If a factor is not floating-point, or `alpha` is not a number.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import lowrank
        >>> edit = lowrank.LowRank(left=jnp.ones((3, 1)), right=jnp.ones((2, 1)))
        >>> a, b = lowrank.to_lora(edit, alpha=2)
        >>> a, b
        (Array([[1., 1., 1.]], dtype=float32), Array([[0.5],
               [0.5]], dtype=float32))

    References:
        As of [`from_lora`][wspace.lowrank.from_lora].
    """
    _checks.known_layout(layout)
    left, right = factors_of(edit, "edit")
    inputs, outputs = (left, right) if layout == "in_out" else (right, left)
    if alpha is not None:
        alpha = _checks.scalar("alpha", alpha, lambda value: value != 0, "finite and not zero")
    scaling = _scaling(alpha, edit.rank, rank_stabilized)
    return transposed(inputs), outputs / scaling.astype(outputs.dtype)


def _scaling(alpha: ScalarLike | None, rank: int, rank_stabilized: bool) -> Array:
    rank_stabilized = _checks.flag("rank_stabilized", rank_stabilized)
    if not rank:
        raise ValueError(
            "rank 0 has no scaling in LoRA, which divides by the rank: leave such a layer out"
        )
    return jnp.asarray(1.0 if alpha is None else alpha / (rank**0.5 if rank_stabilized else rank))
