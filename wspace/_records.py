"""Records that functions of several rooms return."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Int, PyTree

from wspace.typing import Scalar


class Solution(NamedTuple):
    """What an iteration found, and how good it is.

    Attributes:
        weights: The weights found.
        residual: How far they are from solving the problem, relative to its size; the function
            says in what measure.
        steps: The number of steps taken.
        converged: Whether the residual is as small as was asked for.
    """

    weights: PyTree
    residual: Scalar
    steps: Int[Array, ""]
    converged: Bool[Array, ""]
