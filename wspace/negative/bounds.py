r"""What an edit of given size can do to the outputs of a model.

To first order, for one number that a model says: by the support of a cone at its gradient,

$$
\lvert f(\theta + D) - f(\theta) \rvert \le d\, \lVert P\, \nabla f(\theta) \rVert
    + \tfrac{1}{2} H d^2, \qquad D \in K,\ \lVert D \rVert \le d
$$

where $H$ bounds the Hessian. To all orders, for a chain of layers: by the spectral norms of its
matrices. Both hold for every edit in the set, known or not; neither says that an edit which may
change an output by so much is a likely one.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from wspace import _checks, lowrank, tree
from wspace._numerics import safe_sqrt, with_nan_of
from wspace._records import record
from wspace._words import described
from wspace.cone.cones import Cone, project, sizes_of
from wspace.cone.spectra import ratio
from wspace.lowrank import LowRank
from wspace.lowrank.algebra import side_by_side
from wspace.lowrank.factors import matrix_shape
from wspace.typing import Layout, Leaf, Loss, Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["OutputBound", "chain_bound", "linear_bound", "size_to_change"]


@record
class OutputBound(NamedTuple):
    """How far the edits of a cone up to a given norm can change a readout.

    The readout changes by no more than `change + remainder`.

    Attributes:
        change: The most to first order.
        edit: The edit that attains it, to be added; zero if none changes the readout.
        remainder: The most that is left beyond first order; infinite if no curvature was given.
    """

    change: Scalar
    edit: PyTree
    remainder: Scalar


def linear_bound(
    readout: Loss,
    weights: WeightsLike,
    cone: Cone,
    budget: ScalarLike,
    *,
    curvature: ScalarLike | None = None,
) -> OutputBound:
    r"""The most that the edits of a cone up to a given norm can change a readout.

    $$
    \max_{D \in K,\ \lVert D \rVert \le d} \langle \nabla f(\theta), D \rangle
        = d\, \lVert P\, \nabla f(\theta) \rVert
    \quad\text{at}\quad
    D = d\, \frac{P\, \nabla f(\theta)}{\lVert P\, \nabla f(\theta) \rVert}
    $$

    For every edit $D$ of the cone with $\lVert D \rVert \le d$,
    $\lvert f(\theta + D) - f(\theta) \rvert$ is at most that and the remainder
    $\frac{1}{2} H d^2$, if no Hessian on the way from $\theta$ to $\theta + D$ has a spectral norm
    above $H$. In a cone that does not hold $-D$ with $D$, what is bounded is the rise
    $f(\theta + D) - f(\theta)$. Exact for a readout that is affine in the weights, with $H = 0$.
    The change is proportional to $d$, and never above $d\, \lVert \nabla f(\theta) \rVert$,
    the most of all edits of this norm.

    Args:
        readout: A number that the model says, as a function $f$ of the weights: a logit, a
            difference of two, a loss. It is called on weights in at least float32.
        weights: The weights $\theta$.
        cone: The cone $K$ of edits, such as [`Rank`][wspace.cone.Rank].
        budget: The norm $d \ge 0$.
        curvature: The bound $H \ge 0$ on the Hessian. Nothing is estimated in its place: without
            it the remainder is infinite.

    Returns:
        An [`OutputBound`][wspace.negative.OutputBound] with the `change`, the `edit` that attains
            it, as [`project`][wspace.cone.project] returns edits, and the `remainder`.

    Raises:
        ValueError: If `budget` or `curvature` is known and negative or not finite, or the gradient
            is known and holds NaN or an infinity (NaN if traced); and as
            [`project`][wspace.cone.project] does.
        TypeError: If `readout` returns anything but one floating-point number, or a leaf is not
            floating-point; and as [`project`][wspace.cone.project] does.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import cone, negative
        >>> readout = lambda w: 3.0 * w[0] - 4.0 * w[1]
        >>> bound = negative.linear_bound(readout, jnp.ones(2), cone.Sparse(1), 0.5, curvature=0.0)
        >>> float(bound.change), bound.edit.tolist(), float(bound.remainder)
        (2.0, [0.0, -0.5], 0.0)

    References:
        The mean value form of Taylor's theorem, and the lemma behind
        [`cone.support`][wspace.cone.support].
    """
    budget = _checks.nonnegative("budget", budget)
    nearest = project(cone, _gradient(readout, weights))
    norm = with_nan_of(nearest.norm, nearest.tail)  # the cone may leave NaN out
    budget = jnp.asarray(budget).astype(norm.dtype)
    if curvature is None:
        remainder = jnp.full_like(norm, jnp.inf)
    else:
        remainder = _curvature(curvature, norm) / 2 * budget**2
    return OutputBound(
        budget * norm,
        lowrank.scale(ratio(budget, norm), nearest.edit),
        with_nan_of(remainder, norm),
    )


def size_to_change(
    readout: Loss,
    weights: WeightsLike,
    cone: Cone,
    margin: ScalarLike,
    *,
    curvature: ScalarLike = 0.0,
) -> Scalar:
    r"""The norm that an edit in a cone needs at least to change a readout by a margin.

    $$
    d\, g + \tfrac{1}{2} H d^2 = m
    \quad\text{at}\quad
    d = \frac{2 m}{g + \sqrt{g^2 + 2 H m}}, \qquad g = \lVert P\, \nabla f(\theta) \rVert
    $$

    No edit of the cone with a smaller norm changes the readout by $m$ (raises it by $m$, in a cone
    that does not hold $-D$ with $D$), if no Hessian on its way
    has a spectral norm above $H$: it is where the [`linear_bound`][wspace.negative.linear_bound]
    meets the margin. With $H = 0$ it is $m / g$: what is needed exactly where the readout is
    affine in the weights, and elsewhere an estimate to first order, which certifies nothing.

    Args:
        readout: A number that the model says, as a function $f$ of the weights, as in
            [`linear_bound`][wspace.negative.linear_bound].
        weights: The weights $\theta$.
        cone: The cone $K$ of edits.
        margin: The change $m > 0$, such as the difference of the two largest logits for a
            readout that is this difference.
        curvature: The bound $H \ge 0$ on the Hessian.

    Returns:
        The norm, in at least float32; infinite where no edit of the cone changes the readout to
            first order and $H = 0$.

    Raises:
        ValueError: If `margin` is known and not positive or `curvature` is known and negative, or
            either is not finite, or the gradient is known and holds NaN or an infinity (NaN if
            traced); and as [`project`][wspace.cone.project] does.
        TypeError: As [`linear_bound`][wspace.negative.linear_bound] does.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import cone, negative
        >>> readout = lambda w: 3.0 * w[0] - 4.0 * w[1]
        >>> float(negative.size_to_change(readout, jnp.ones(2), cone.Sparse(1), 2.0))
        0.5
    """
    margin = _checks.above_zero("margin", margin)
    norm, tail = sizes_of(cone, _gradient(readout, weights))
    slope = with_nan_of(norm, tail)
    margin = jnp.asarray(margin).astype(slope.dtype)
    root = safe_sqrt(slope**2 + 2 * _curvature(curvature, slope) * margin)
    return 2 * margin / (slope + root)


def _gradient(readout: Loss, weights: WeightsLike) -> Weights:
    _checks.same_layout(weights=weights)
    _checks.function("readout", readout, "a function of the weights")
    value, pullback = jax.vjp(readout, tree.upcast(weights))
    if not _checks.is_weight(value) or value.shape != ():
        got = jax.typeof(value) if hasattr(value, "shape") else described(value)
        raise TypeError(f"readout must return one floating-point number, got {got}")
    (gradient,) = pullback(jnp.ones_like(value))
    _checks.finite(**{"the gradient of readout": gradient})
    return gradient


def _curvature(curvature: ScalarLike, like: Scalar) -> Scalar:
    known = _checks.nonnegative("curvature", curvature)
    return jnp.asarray(known).astype(like.dtype)


def chain_bound(
    matrices: Sequence[Leaf | LowRank],
    edits: Sequence[Leaf | LowRank],
    *,
    input_norm: ScalarLike = 1.0,
    layout: Layout = "in_out",
) -> Scalar:
    r"""The most that edits of given spectral norms can change the output of a chain of layers.

    $$
    \begin{aligned}
    \lVert f_{W + U}(x) - f_W(x) \rVert
        &\le \lVert x \rVert \Bigl( \prod_i (\lVert W_i \rVert + \lVert U_i \rVert)
                                   - \prod_i \lVert W_i \rVert \Bigr) \\
        &= \lVert x \rVert \sum_i \Bigl( \prod_{j < i} \lVert W_j \rVert \Bigr) \lVert U_i \rVert
          \Bigl( \prod_{j > i} (\lVert W_j \rVert + \lVert U_j \rVert) \Bigr)
    \end{aligned}
    $$

    for $f_W(x) = \phi(\dots \phi(x W_1) W_2 \dots)$ with activations that are 1-Lipschitz with
    $\phi(0) = 0$, each its own, such as the identity, ReLU and tanh; not GELU or SiLU, whose
    slopes exceed $1$. It holds for edits of every size. Computed layer by layer as the sum, in
    which nothing cancels. Of an edit only its norm counts, and the bound never falls as that
    grows; a chain without activations attains it if its matrices and edits are aligned and of
    rank one. For one layer it is $\lVert U_1 \rVert\, \lVert x \rVert$.

    There are no biases in it. A bias becomes a row of its matrix, once inputs carry a one and
    matrices a column that passes it on, $\begin{pmatrix} W & 0 \\ b & 1 \end{pmatrix}$; the norms
    are then of these.

    Args:
        matrices: The $W_i$, `(in, out)`, in the order of the layers, at least one.
        edits: The $U_i$, of the same shapes, dense or `LowRank`.
        input_norm: The norm $\lVert x \rVert \ge 0$ of the largest input.
        layout: How the layers store their matrices, `"in_out"`, or `"out_in"` as torch and equinox
            do: what has to fit is then the $W_i^\top$. The bound is the same.

    Returns:
        The bound, in at least float32; exactly $0$ if all edits are zero.

    Raises:
        ValueError: If there is no matrix, a layer is not a matrix, does not take what the one
            before it gives, or has an edit of another shape or none; or a known value is NaN or
            infinite, or `input_norm` is known and negative or not finite (NaN if traced).
        TypeError: If a matrix or an edit is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import negative
        >>> w = [jnp.diag(jnp.array([2.0, 1.0])), jnp.diag(jnp.array([3.0, 1.0]))]
        >>> u = [jnp.diag(jnp.array([0.5, 0.0])), jnp.diag(jnp.array([0.0, 0.25]))]
        >>> round(float(negative.chain_bound(w, u)), 4)
        2.125

    References:
        The perturbation bound of B. Neyshabur, S. Bhojanapalli, N. Srebro, *A PAC-Bayesian
        Approach to Spectrally-Normalized Margin Bounds for Neural Networks*, ICLR 2018,
        [arXiv:1707.09564](https://arxiv.org/abs/1707.09564), before its products are estimated.
    """
    matrices, edits = _checks.listed("matrices", matrices), _checks.listed("edits", edits)
    size = _checks.nonnegative("input_norm", input_norm)
    side_by_side(matrices=matrices, edits=edits)
    _checks.known_layout(layout)
    stored: list[Any] = [getattr(w, "shape", ()) for w in matrices]
    for i, shape in enumerate(stored):
        if len(shape) != 2:
            raise ValueError(f"matrices[{i}] has shape {shape}: a layer is a matrix")
    shapes = [matrix_shape(shape, layout) for shape in stored]
    for i, ((_, given), (taken, _)) in enumerate(itertools.pairwise(shapes), 1):
        if given != taken:
            other = "out_in" if layout == "in_out" else "in_out"
            (_, before), (after, _) = (matrix_shape(x, other) for x in stored[i - 1 : i + 1])
            raise ValueError(
                f"matrices[{i}] takes {taken} inputs, and matrices[{i - 1}] gives {given}: give "
                f"the layers in their order{_checks.in_other_layout(layout, before == after)}"
            )
    _checks.finite(matrices=matrices, edits=edits)
    norms = tree.widened(*map(_spectral_norm, matrices), *map(_spectral_norm, edits))
    size = jnp.asarray(size).astype(norms[0].dtype)
    change = with_nan_of(jnp.zeros_like(size), size)
    for w, u in zip(norms[: len(matrices)], norms[len(matrices) :], strict=True):
        change, size = change * (w + u) + size * u, size * w
    return change


def _spectral_norm(x: Leaf | LowRank) -> Scalar:
    return jnp.max(lowrank.singular_values(x), initial=0)
