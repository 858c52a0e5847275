r"""Moving points so that their average is another one.

Points $x_i$ with coefficients $a_i$ (divided by their sum) average to $M = \sum_i a_i x_i$. The
edits $dx_i$ of least cost $\sum_i c_i \lVert dx_i \rVert^2$ that move the average by $D$ are

$$
dx_i = \frac{a_i / c_i}{S}\, D, \qquad S = \sum_j \frac{a_j^2}{c_j}, \qquad
\text{at the cost } \frac{\lVert D \rVert^2}{S}
$$

Where a point may move only within a subspace, $P_i$ its projector, or at a price, $P_i$ an
inverse metric, $S$ becomes the matrix $\sum_j \frac{a_j^2}{c_j} P_j$ and
$dx_i = \frac{a_i}{c_i} P_i L$ with $S L = D$.

Points round at their own size: in bfloat16 an average lands within bfloat16 of where it should.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_leaves_with_path
from jaxtyping import Array, Float

from wspace import _checks, lowrank, tree
from wspace._checks import Numbers
from wspace._numerics import matmul, placed_like, replicated, safe_sqrt
from wspace.typing import Allow, Coefficients, Scalar, ScalarLike, Weights, WeightsLike

__all__ = ["exit_ball", "free_inputs", "harden", "retarget"]


class _Allowed(NamedTuple):
    """Where a leaf of a point may move: `scale` times the identity, or times `root @ root.T`."""

    scale: Scalar
    root: Float[Array, "... m m"] | None = None

    def factor(self, shape: Sequence[int]) -> Float[Array, "... m m"]:
        """A factor `f` with `f @ f.T` the whole, for a stack of matrices of the given shape."""
        *stack, rows, _ = shape
        eye = jnp.eye(rows, dtype=self.scale.dtype)
        root = jnp.broadcast_to(eye, (*stack, rows, rows)) if self.root is None else self.root
        return jnp.sqrt(self.scale) * root

    def __matmul__(self, x: Array) -> Array:
        if self.root is None:
            return self.scale * x
        # Through the root, so that rounding keeps to the allowed space.
        inner = matmul(jnp.swapaxes(self.root, -1, -2), lowrank.as_matrix(x))
        return placed_like((self.scale * matmul(self.root, inner)).reshape(x.shape), x)


def _without_rounding(values: Float[Array, "... m"]) -> Float[Array, "... m"]:
    """Eigenvalues, those below the rounding of the largest set to zero."""
    largest = jnp.max(values, axis=-1, keepdims=True, initial=0)
    return jnp.where(values > values.shape[-1] * jnp.finfo(values.dtype).eps * largest, values, 0)


def _allowed_leaf(entry: Any, leaf: Array, where: str) -> _Allowed:
    if not isinstance(entry, int | float) and not _checks.is_weight(entry):
        raise TypeError(f"{where} is {entry!r}: give 1.0 (free), 0.0 (frozen) or a matrix")
    if jnp.shape(entry) == ():
        scale = _checks.scalar(where, entry, lambda p: p >= 0, "finite and at least 0")
        return _Allowed(jnp.asarray(scale).astype(leaf.dtype))
    if leaf.ndim < 2:
        raise ValueError(
            f"{where} is a matrix, but the leaf of shape {leaf.shape} is none: "
            "a vector is free (1.0) or frozen (0.0)"
        )
    *stack, rows, _ = lowrank.as_matrix(leaf).shape
    if entry.shape not in ((rows, rows), (*stack, rows, rows)):
        raise ValueError(
            f"{where} has shape {entry.shape} for a leaf of shape {leaf.shape}: it acts on axis 0 "
            f"of the leaf's matrix, as in x @ W, and must be ({rows}, {rows})"
        )
    _checks.finite(**{where: entry})
    given = replicated(jnp.asarray(entry))
    matrix = given.astype(leaf.dtype)
    flipped = jnp.swapaxes(matrix, -1, -2)
    size = jnp.max(jnp.abs(matrix), initial=0)
    skew = jnp.max(jnp.abs(matrix - flipped), initial=0)
    eps = max(float(jnp.finfo(x.dtype).eps) for x in (given, leaf))
    undefined = _checks.refuse(
        skew > 64 * eps * size,
        lambda: (
            f"{where} is not symmetric, by {skew:.3g} in entries up to {size:.3g}: "
            "give a projector or a symmetric positive semidefinite matrix"
        ),
    )
    values, vectors = jnp.linalg.eigh((matrix + flipped) / 2)
    least, largest = jnp.min(values, initial=0), jnp.max(values, initial=0)
    undefined += _checks.refuse(
        least < -64 * rows * eps * size,
        lambda: (
            f"{where} has the eigenvalue {least:.3g} beside {largest:.3g}: "
            "give a projector or a symmetric positive semidefinite matrix"
        ),
    )
    # The scale apart, so that the root shortens nothing but by choice.
    scale = jnp.where(largest > 0, largest, 1) + undefined
    root = vectors * jnp.sqrt(_without_rounding(values) / scale)[..., None, :]
    return _Allowed(scale, jnp.broadcast_to(root, (*stack, rows, rows)))


def _allowed(allow: Allow, points: Sequence[Weights]) -> list[list[_Allowed]]:
    """Per point and leaf, where it may move."""
    structure = jax.tree.structure(points[0])
    if not isinstance(allow, Sequence) or len(allow) != len(points):
        raise ValueError(
            f"allow must have one entry for each of {len(points)} points, a tree like the "
            f"weights or None, got {jax.tree.structure(allow)}"
        )
    rows = []
    for i, (entries, point) in enumerate(zip(allow, points, strict=True)):
        if entries is None:
            entries = structure.unflatten([1.0] * structure.num_leaves)
        if jax.tree.structure(entries) != structure:
            raise ValueError(
                f"allow[{i}] must be a tree like the weights, with 1.0, 0.0 or a matrix at each "
                f"leaf: got {jax.tree.structure(entries)} for {structure}"
            )
        leaves = tree_leaves_with_path(point)
        rows.append(
            [
                _allowed_leaf(entry, leaf, f"allow[{i}] at leaf {keystr(path) or '(root)'}")
                for entry, (path, leaf) in zip(jax.tree.leaves(entries), leaves, strict=True)
            ]
        )
    return rows


def _moved(allowed: Sequence[_Allowed], x: Weights) -> Weights:
    """$P x$, leaf by leaf."""
    leaves, structure = jax.tree.flatten(x)
    return structure.unflatten([p @ leaf for p, leaf in zip(allowed, leaves, strict=True)])


def _edits(a: Numbers, c: Numbers, allowed: Sequence[_Allowed], d: Array) -> list[Array]:
    r"""The edits of one leaf that shift the average by `d` at least cost.

    With $P_i = F_i F_i^\top$ they are $F_i y_i / \sqrt{c_i}$ for the $y$ of least norm with
    $\sum_i a_i / \sqrt{c_i}\, F_i y_i = D$. Of this problem $S L = D$ are the normal equations,
    whose condition number is the square.
    """
    sources = list(zip(_checks.unpacked(a), _checks.unpacked(c), allowed, strict=True))
    if all(p.root is None for p in allowed):
        total = sum((k**2 / cost * p.scale for k, cost, p in sources), jnp.zeros((), d.dtype))
        least = d / jnp.where(total == 0, jnp.inf, total)
        return [k / cost * p.scale * least for k, cost, p in sources]
    matrix = replicated(lowrank.as_matrix(d))
    factors = [p.factor(matrix.shape) / cost**0.5 for _, cost, p in sources]
    blocks = [k * factor for (k, _, _), factor in zip(sources, factors, strict=True)]
    u, values, vt = jnp.linalg.svd(jnp.concatenate(blocks, axis=-1), full_matrices=False)
    squares = _without_rounding(values**2)
    inverse = jnp.where(squares > 0, values / jnp.where(squares > 0, squares, 1), 0)[..., None]
    y = matmul(jnp.swapaxes(vt, -1, -2), inverse * matmul(jnp.swapaxes(u, -1, -2), matrix))
    parts = jnp.split(y, len(sources), axis=-2)
    return [
        placed_like(jnp.where(k == 0, 0, matmul(factor, part)).reshape(d.shape), d)
        for (k, _, _), factor, part in zip(sources, factors, parts, strict=True)
    ]


def _finite(length: Scalar, points: Sequence[WeightsLike], **trees: WeightsLike) -> None:
    """Raises, naming the leaf, if a known length shows that a point holds NaN or an infinity."""
    if not _checks.is_traced(length) and not bool(jnp.isfinite(length)):
        _checks.finite(**_checks.each("points", points), **trees)


class _Problem(NamedTuple):
    """Points in the dtype of the arithmetic, with what both functions need to know of them."""

    points: list[Weights]
    others: list[Weights]
    a: Numbers
    c: Numbers
    mean: Weights
    size: Scalar


def _problem(
    points: Sequence[WeightsLike],
    others: Sequence[WeightsLike],
    coefficients: Coefficients,
    costs: Coefficients | None,
) -> _Problem:
    a = _checks.affine(coefficients, len(points))
    c = _checks.positive("costs", costs, len(points))
    trees = tree.widened(*points, *others)
    wide, others = trees[: len(points)], trees[len(points) :]
    norms = [tree.norm(x) for x in wide]
    a, c = (x if isinstance(x, np.ndarray) else x.astype(norms[0].dtype) for x in (a, c))
    sizes = [abs(k) * norm for k, norm in zip(_checks.unpacked(a), norms, strict=True)]
    return _Problem(wide, others, a, c, tree.combine(a, wide), sum(sizes[1:], sizes[0]))


def retarget(
    points: Sequence[WeightsLike],
    coefficients: Coefficients,
    target: WeightsLike,
    *,
    costs: Coefficients | None = None,
    allow: Allow | None = None,
) -> list[Weights]:
    r"""Moves points, at least cost, so that their average is a given one.

    $$
    dx_i = \frac{a_i}{c_i} P_i L, \qquad
    \Bigl(\sum_j \frac{a_j^2}{c_j} P_j\Bigr) L = T - \sum_j a_j x_j
    $$

    The edits have the least $\sum_i c_i \lVert dx_i \rVert^2$ of all whose average is $T$ and
    which stay where they may go; with projectors $P_i$ (or none) it is unique. Without `allow`
    every point moves along $T - M$, at the cost $\lVert T - M \rVert^2 / S$: with two equal
    coefficients each by the whole of it. A point with coefficient $0$ does not move. Doing it
    twice changes nothing; it commutes with translations, rotations and scalings of all.

    Args:
        points: The $x_i$, trees of one layout, at least one.
        coefficients: The $a_i$, one a point, of any sign; divided by their sum.
        target: The average $T$ to have, of the same layout.
        costs: The $c_i > 0$, one a point; equal if not given.
        allow: Where each point may move; everywhere if not given. Per point `None` (everywhere),
            or a tree like the weights with, at each leaf, `1.0` (free), `0.0` (frozen), or for a
            matrix `x @ W` a projector `(in, in)` onto the inputs whose rows may change, such as
            [`free_inputs`][wspace.negative.free_inputs] gives. Any symmetric positive
            semidefinite matrix will do: then the cost is $c_i \langle dx_i, P_i^+ dx_i \rangle$.

    Returns:
        The moved points, each leaf in the dtype of that leaf of its point.

    Raises:
        ValueError: If `allow` admits no such edits: if the part of $T - M$ out of reach exceeds
            $\sqrt\varepsilon$ of it and the rounding of the points, $64\,\varepsilon$ of their size
            (NaN if traced). Also if coefficients or costs are out of their domain or not as many
            as the points, an entry of `allow` is not symmetric positive semidefinite or does not
            fit its leaf, a known value is NaN or infinite, or the trees differ in layout.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import average, negative
        >>> a, c = {"w": jnp.array([0.0])}, {"w": jnp.array([2.0])}
        >>> moved = negative.retarget([a, c], [0.5, 0.5], {"w": jnp.array([5.0])})
        >>> moved, average.mean(moved)
        ([{'w': Array([4.], dtype=float32)}, {'w': Array([6.], dtype=float32)}],
         {'w': Array([5.], dtype=float32)})

    References:
        The minimum-norm solution of a linear constraint; G. Golub, C. Van Loan, *Matrix
        Computations*, 4th edition, section 5.6.
    """
    points = _checks.listed("points", points)
    _checks.same_layout(**_checks.each("points", points), target=target)
    wide, (goal,), a, c, mean, size = _problem(points, [target], coefficients, costs)
    shift = tree.combine((1, -1), (goal, mean))
    length = tree.norm(shift)
    _finite(length, points, target=target)
    if allow is None:
        pulls = a / c / (a**2 / c).sum()
        return [tree.combine((1, k), (x, shift)) for k, x in zip(pulls, points, strict=True)]
    allowed = _allowed(allow, wide)
    leaves, structure = jax.tree.flatten(shift)
    columns = zip(*allowed, strict=True)
    edits = [_edits(a, c, column, d) for column, d in zip(columns, leaves, strict=True)]
    moves = [structure.unflatten(leaf[i] for leaf in edits) for i in range(len(points))]
    left = tree.combine((1, *(-a)), (shift, *moves))
    missing = tree.norm(left)
    eps = jnp.finfo(length.dtype).eps
    bound = jnp.sqrt(eps) * length + 64 * eps * (size + tree.norm(goal))

    def message() -> str:
        path, worst = max(
            tree_leaves_with_path(left), key=lambda leaf: float(jnp.linalg.norm(leaf[1]))
        )
        return (
            f"allow admits no edits whose average is target: of a shift of norm {length:.3g}, "
            f"{missing:.3g} is out of reach, most of it ({jnp.linalg.norm(worst):.3g}) in leaf "
            f"{keystr(path) or '(root)'}: allow more there, or move target"
        )

    undefined = _checks.refuse(~(missing <= bound), message)
    return [
        tree.combine((1, 1 + undefined), (x, move)) for x, move in zip(points, moves, strict=True)
    ]


def exit_ball(
    points: Sequence[WeightsLike],
    coefficients: Coefficients,
    avoid: WeightsLike,
    radius: ScalarLike,
    *,
    costs: Coefficients | None = None,
    direction: WeightsLike | None = None,
    allow: Allow | None = None,
) -> list[Weights]:
    r"""Moves points so that their average leaves a ball around a point to avoid.

    With $E = M - b$, and $g$ the direction or $E$ itself,

    $$
    dx_i = t\,\frac{a_i}{c_i} P_i\, g, \qquad
    \lVert E + t\, S g \rVert = \rho, \quad t > 0, \qquad S = \sum_j \frac{a_j^2}{c_j} P_j
    $$

    If $\lVert E \rVert \ge \rho$ already, the points come back unchanged, direction or not.
    Without a direction the average moves straight out to $b + \rho\, E / \lVert E \rVert$, the
    least shift there is, at the least cost $(\rho - \lVert E \rVert)^2 / \sum_j a_j^2 / c_j$.
    With one, it moves along $S g$ until it meets the sphere, which is
    [`retarget`][wspace.negative.retarget] to $M + t\, S g$. Doing it twice changes nothing.

    The average *at these coefficients* is kept away, and no other. A margin certifies a
    distance, not safety.

    Args:
        points: The $x_i$, trees of one layout, at least one.
        coefficients: The $a_i$, one a point, of any sign; divided by their sum.
        avoid: The center $b$ of the ball, of the same layout.
        radius: Its radius $\rho > 0$.
        costs: The $c_i > 0$, one a point; equal if not given.
        direction: The direction $g$ to move the average in, such as the gradient of its loss.
            Needed where the average *is* the point to avoid, and with `allow`.
        allow: Where each point may move, as in [`retarget`][wspace.negative.retarget].

    Returns:
        The moved points, each leaf in the dtype of that leaf of its point.

    Raises:
        ValueError: If the average is within $64\,\varepsilon \sum_i |a_i| \lVert x_i \rVert$ of
            `avoid`, where no way out is distinguished, and there is no direction; if the
            direction is zero or `allow` leaves nothing of it, $\lVert S g \rVert \le
            64\,\varepsilon \lVert S \rVert \lVert g \rVert$; if the radius is not positive or below
            the same rounding of the points; if `allow` is given without a direction. Where these
            are traced the result is NaN. Also for the arguments that
            [`retarget`][wspace.negative.retarget] refuses.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import average, negative
        >>> points = [jnp.array([1.0, 0.0]), jnp.array([5.0, 0.0])]
        >>> moved = negative.exit_ball(points, [0.5, 0.5], jnp.zeros(2), 4.0)
        >>> average.mean(moved)
        Array([4., 0.], dtype=float32)
    """
    points = _checks.listed("points", points)
    along = {} if direction is None else {"direction": direction}
    _checks.same_layout(**_checks.each("points", points), avoid=avoid, **along)
    if allow is not None and direction is None:
        raise ValueError("allow needs a direction: give the direction to move the average in")
    radius = _checks.scalar("radius", radius, lambda r: r > 0, "finite and positive")
    others = [avoid, *along.values()]
    wide, (center, *given), a, c, mean, size = _problem(points, others, coefficients, costs)
    apart = tree.combine((1, -1), (mean, center))
    distance = tree.norm(apart)
    _finite(distance, points, avoid=avoid)
    radius = jnp.asarray(radius).astype(distance.dtype)
    rounding = 64 * jnp.finfo(distance.dtype).eps * size
    undefined = _checks.refuse(
        ~(radius > rounding),
        lambda: (
            f"radius {radius:.3g} is below the rounding of the points, {rounding:.3g}: "
            "no average of them can be placed that finely"
        ),
    )
    if given:
        (way,) = given
    else:
        way = apart
        undefined += _checks.refuse(
            ~(distance > rounding),
            lambda: (
                f"the average of points is avoid, to rounding ({distance:.3g} apart), so no way "
                "out is distinguished: give a direction"
            ),
        )
    speed = tree.norm(way)
    if given:
        _finite(speed, points, **along)
    share = _checks.unpacked(a**2 / c)
    if allow is None:
        moves, sizes = [way] * len(points), [1.0] * len(points)
    else:
        allowed = _allowed(allow, wide)
        moves = [_moved(row, way) for row in allowed]
        zero = jnp.zeros((), speed.dtype)
        scales = [[p.scale.astype(speed.dtype) for p in row] for row in allowed]
        sizes = [functools.reduce(jnp.maximum, row, zero) for row in scales]
    moved = tree.combine(share, moves)
    step = tree.norm(moved)
    largest = sum(w * p for w, p in zip(share, sizes, strict=True))
    outside = distance >= radius
    undefined += _checks.refuse(
        ~outside & ~(step > 64 * jnp.finfo(step.dtype).eps * largest * speed),
        lambda: (
            f"direction has norm {speed:.3g}, and where the points may move {step:.3g} is left of "
            "it: give a direction that is not zero and that allow does not annihilate"
        ),
    )
    # The positive root t of ||E + t S g|| = radius, in units of S g.
    gap = jnp.where(outside, 1, (radius - distance) * (radius + distance))
    slope = tree.vdot(apart, moved) / jnp.where(step == 0, 1, step)
    reach = jnp.sqrt(slope**2 + gap) - slope
    t = jnp.where(outside, 0, reach / jnp.where(step == 0, 1, step)) + undefined
    return [
        tree.combine((1, t * k), (x, move))
        for k, x, move in zip(_checks.unpacked(a / c), points, moves, strict=True)
    ]


def free_inputs(
    activations: Float[Array | np.ndarray, "n d"], *, rtol: ScalarLike
) -> Float[Array, "d d"]:
    r"""Projector onto the inputs of a layer that its data almost never use.

    $$
    P = I - \sum_{i:\, \sigma_i \ge \tau \sigma_1} v_i v_i^\top, \qquad
    X = \sum_i \sigma_i\, u_i v_i^\top
    $$

    With rows of $X$ as inputs of `x @ W`, a change $P\,dW$ of the matrix changes no output of
    these data by more than the threshold allows: $\lVert X P\, dW \rVert \le \tau\, \sigma_1(X)
    \lVert dW \rVert$. It is an entry of `allow`, for
    [`retarget`][wspace.negative.retarget] and [`exit_ball`][wspace.negative.exit_ball].

    Args:
        activations: The inputs $X$ of the layer, one a row, `(n, d)`; append a column of ones to
            account for a bias that is a row of the matrix.
        rtol: The threshold $\tau$ in $(0, 1)$, relative to the largest singular value.

    Returns:
        The symmetric projector $P$, `(d, d)`, in at least float32. The identity for activations
            that are all zero.

    Raises:
        ValueError: If `activations` is not a matrix or holds NaN or an infinity (NaN if traced), or
            `rtol` is known and not between 0 and 1.
        TypeError: If `activations` is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import negative
        >>> negative.free_inputs(jnp.array([[3.0, 0.0], [1.0, 0.0]]), rtol=1e-2)
        Array([[0., 0.],
               [0., 1.]], dtype=float32)

    References:
        G. Saha, I. Garg, K. Roy, *Gradient Projection Memory for Continual Learning*, ICLR 2021,
        [arXiv:2103.09762](https://arxiv.org/abs/2103.09762), section 4.
    """
    rtol = _checks.scalar("rtol", rtol, lambda x: (x > 0) & (x < 1), "between 0 and 1")
    _checks.floating_leaves(activations=activations)
    if activations.ndim != 2:
        raise ValueError(
            f"activations must be a matrix (n, d) with one input a row, got {activations.shape}"
        )
    _checks.finite(activations=activations)
    x = replicated(tree.upcast(activations))
    if not x.size:
        return jnp.eye(x.shape[1], dtype=x.dtype)
    _, values, vectors = jnp.linalg.svd(x, full_matrices=False)
    used = (values >= jnp.asarray(rtol).astype(x.dtype) * values[0]) & (values > 0)
    kept = jnp.where(used[:, None], vectors, 0)
    projector = jnp.eye(x.shape[1], dtype=x.dtype) - matmul(kept.T, kept)
    return jnp.where(jnp.isnan(values[0] + rtol), jnp.nan, (projector + projector.T) / 2)


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
