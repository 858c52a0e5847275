r"""Task vectors, and the merge that adds them up."""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from wspace import _checks, _lift
from wspace.typing import ByLeaf, LeafCoefficients, Scalar, Weights, WeightsLike

__all__ = ["task_arithmetic", "task_vector"]


def _difference(_: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    base, tuned = arrays
    return tuned - base


_rounded_difference = _lift.elementwise(_difference)


@functools.partial(_lift.elementwise, rounded=False)
def _differences(_: Sequence[Scalar], arrays: Sequence[Array]) -> list[Array]:
    base, *tuned = arrays
    return [x - base for x in tuned]


def task_vector(base: WeightsLike, tuned: WeightsLike) -> Weights:
    r"""What training added to the base: the displacement from it to the tuned model.

    Known as a task vector, or a delta.

    $$
    \tau = \theta - \theta_0
    $$

    Args:
        base: The weights $\theta_0$ that training began with.
        tuned: The weights $\theta$ after it, of the same layout.

    Returns:
        The task vector, each leaf in the dtype of that leaf of `base`. Half precision rounds
            it: give [`tree.upcast`][wspace.tree.upcast] of the base to keep the difference.

    Raises:
        ValueError: If the trees differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> merge.task_vector({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([1.5, 1.0])})
        {'w': Array([ 0.5, -1. ], dtype=float32)}

    References:
        G. Ilharco et al., *Editing Models with Task Arithmetic*, ICLR 2023, section 2,
        [arXiv:2212.04089](https://arxiv.org/abs/2212.04089).
    """
    _checks.same_layout(base=base, tuned=tuned)
    return _rounded_difference((), (base, tuned))


def siblings(
    base: WeightsLike, tuned: Sequence[WeightsLike], coefficients: LeafCoefficients | None
) -> tuple[list[WeightsLike], list[Any]]:
    """The models tuned from one base, of one layout with it, and a coefficient for each."""
    tuned = _checks.listed("tuned", tuned)
    _checks.same_layout(base=base, **_checks.each("tuned", tuned))
    return tuned, _checks.unpacked(_checks.numbers("coefficients", coefficients, len(tuned), base))


def differences(base: WeightsLike, tuned: Sequence[WeightsLike]) -> list[Weights]:
    """The task vectors in the dtype of arithmetic on base and models together."""
    return _differences((), (base, *tuned))


@_lift.elementwise
def _added(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (scale,), (base, edit) = scalars, arrays
    return base + scale * edit


def added(base: WeightsLike, edit: WeightsLike, scale: ByLeaf = 1.0) -> Weights:
    """The base moved by a multiple of an edit, rounded once."""
    return _added((_checks.by_leaf("scale", scale, base),), (base, edit))


@_lift.elementwise
def _moved(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (scale, *coefficients), (base, *edits) = scalars, arrays
    return base + scale * total(coefficients, edits)


def moved(
    base: WeightsLike, edits: Sequence[Weights], coefficients: Sequence[Any], scale: ByLeaf
) -> Weights:
    """The base plus a combination of edits, in one pass over them."""
    return _moved((_checks.by_leaf("scale", scale, base), *coefficients), (base, *edits))


def total(coefficients: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    """The combination of arrays, in which a term and its negative cancel exactly.

    Sums of either sign are apart, since a product that is rounded, and one that a compiler fuses
    with the addition, and so does not round, would leave a rest.
    """
    terms = [c * x for c, x in zip(coefficients, arrays, strict=True)]
    above, below = ([part(x, 0) for x in terms] for part in (jnp.maximum, jnp.minimum))
    return functools.reduce(jnp.add, above) + functools.reduce(jnp.add, below)


@_lift.elementwise
def _sum_of_terms(scalars: Sequence[Scalar], arrays: Sequence[Array]) -> Array:
    (scale, *coefficients), (base, *tuned) = scalars, arrays
    return base + scale * total(coefficients, [x - base for x in tuned])


def task_arithmetic(
    base: WeightsLike,
    tuned: Sequence[WeightsLike],
    coefficients: LeafCoefficients | None = None,
    *,
    scale: ByLeaf = 1.0,
    normalize: bool = False,
) -> Weights:
    r"""The base plus a combination of task vectors.

    Known as task arithmetic: task addition, task negation ($c < 0$) and task analogies.

    $$
    \theta = \theta_0 + \lambda \sum_i c_i\, (\theta_i - \theta_0)
    $$

    Negation is the coefficient $-1$: what was learned is subtracted. The analogy "what `c` is to
    `b`, as `a` is to the base" has the coefficients $1, 1, -1$ for $a, b, c$. Negated coefficients
    negate the displacement exactly, a model and its own negative cancel exactly, and coefficients
    are in no way normalized, so that one model at $c = 1$ comes back to rounding.

    Args:
        base: The weights $\theta_0$.
        tuned: The models $\theta_i$, trees of the layout of `base`, at least one.
        coefficients: The $c_i$, one a model or one for each of its
            [leaves][wspace.typing.ByLeaf], of any sign; ones if not given.
        scale: The number $\lambda$, or one for each [leaf][wspace.typing.ByLeaf].
        normalize: Whether the coefficients are divided by their sum, which takes the meaning
            from their sign: $c$ and $-c$ are then one merge.

    Returns:
        The weights $\theta$, each leaf in the dtype of that leaf of `base`.

    Raises:
        ValueError: If the counts differ or are zero, a known number is not finite, or coefficients
            to be normalized sum to nothing beside their size (NaN if traced); or if the trees
            differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import merge
        >>> base = {"w": jnp.array([1.0, 1.0])}
        >>> tuned = [{"w": jnp.array([3.0, 1.0])}, {"w": jnp.array([1.0, 2.0])}]
        >>> merge.task_arithmetic(base, tuned, (0.5, -1.0))
        {'w': Array([2., 0.], dtype=float32)}

    References:
        G. Ilharco et al., *Editing Models with Task Arithmetic*, ICLR 2023,
        [arXiv:2212.04089](https://arxiv.org/abs/2212.04089).
    """
    tuned, known = siblings(base, tuned, coefficients)
    if _checks.flag("normalize", normalize):
        known = _checks.unpacked(_checks.affine(coefficients, len(tuned), base))
    return _sum_of_terms((_checks.by_leaf("scale", scale, base), *known), (base, *tuned))
