"""Points to be averaged, as everything that moves or audits them sees them."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from wspace import _checks, tree
from wspace._checks import Numbers
from wspace.typing import Coefficients, Scalar, Weights, WeightsLike


def finite_length(length: Scalar, points: Sequence[WeightsLike], **trees: WeightsLike) -> None:
    """Raises, naming the leaf, if a known length shows that a point holds NaN or an infinity."""
    if not _checks.is_traced(length) and not bool(jnp.isfinite(length)):
        _checks.finite(**_checks.each("points", points), **trees)


class Sources(NamedTuple):
    """Points and other trees in the dtype of the arithmetic, with what is to be known of them.

    `a` are the coefficients divided by their sum, `c` the costs, `mean` is the average and `size`
    the scale that it rounds at, the sum of |a_i| times the norm of each point.
    """

    points: list[Weights]
    others: list[Weights]
    a: Numbers
    c: Numbers
    mean: Weights
    size: Scalar


def sources(
    points: Sequence[WeightsLike],
    others: Sequence[WeightsLike],
    coefficients: Coefficients,
    costs: Coefficients | None,
) -> Sources:
    """The points and others in one dtype, their coefficients normalized and their costs checked."""
    a = _checks.affine(coefficients, len(points))
    c = _checks.positive("costs", costs, len(points))
    trees = tree.widened(*points, *others)
    wide, others = trees[: len(points)], trees[len(points) :]
    norms = [tree.norm(x) for x in wide]
    a, c = (x if isinstance(x, np.ndarray) else x.astype(norms[0].dtype) for x in (a, c))
    sizes = [abs(k) * norm for k, norm in zip(_checks.unpacked(a), norms, strict=True)]
    return Sources(wide, others, a, c, tree.combine(a, wide), sum(sizes[1:], sizes[0]))
