"""The mean of points, with coefficients of either sign."""

from collections.abc import Sequence

from wspace import _checks, tree
from wspace.typing import LeafCoefficients, Weights, WeightsLike

__all__ = ["mean"]


@_checks.of_points
def mean(points: Sequence[WeightsLike], coefficients: LeafCoefficients | None = None) -> Weights:
    r"""Weighted mean of points, as in model soups.

    Known as a uniform soup, and as a linear merge.

    $$
    \bar\theta = \frac{\sum_i c_i\, \theta_i}{\sum_i c_i}
    $$

    Commutes with every affine map of weight space. The mean of two points is
    [`lerp`][wspace.interpolate.lerp] between them; with all $c_i \ge 0$ it lies in their
    convex hull.

    Args:
        points: The $\theta_i$, trees of one layout, at least one.
        coefficients: The $c_i$, one a point or one for each of its [leaves][wspace.typing.ByLeaf],
            of any sign; equal if not given. Only their ratios matter.

    Returns:
        The mean, each leaf in the dtype of that leaf of the first point.

    Raises:
        ValueError: If the coefficients sum to less than $10^{-6} \sum_i |c_i|$ in size, where
            the mean is not defined (NaN if they are traced), are not finite or not as many as
            the points; or if the points differ in structure or in a leaf's shape.
        TypeError: If a leaf is not floating-point.

    Examples:
        >>> import jax.numpy as jnp
        >>> from wspace import average
        >>> average.mean([{"w": jnp.array([0.0])}, {"w": jnp.array([4.0])}])
        {'w': Array([2.], dtype=float32)}
        >>> average.mean([{"w": jnp.array([0.0])}, {"w": jnp.array([4.0])}], [3.0, -1.0])
        {'w': Array([-2.], dtype=float32)}

    References:
        M. Wortsman et al., *Model soups: averaging weights of multiple fine-tuned models
        improves accuracy without increasing inference time*, ICML 2022,
        [arXiv:2203.05482](https://arxiv.org/abs/2203.05482).
    """
    points = _checks.listed("points", points)
    _checks.same_layout(**_checks.each("points", points))
    return tree.weighted_sum(
        _checks.unpacked(_checks.affine(coefficients, len(points), points[0])), points
    )
