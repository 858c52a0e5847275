"""The zero of a function of a few numbers, with its derivatives."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wspace.typing import Scalar, ScalarLike

Numbers = Float[Array, " k"]


def newton(gap: Callable[[Numbers], Numbers], w: Numbers) -> Numbers:
    """One step of Newton's method for gap(w) = 0."""
    return w - jnp.linalg.solve(jax.jacfwd(gap)(w), gap(w))


def solved(
    gap: Callable[..., Numbers],
    sure: Callable[..., Numbers],
    cost: Callable[..., Scalar],
    residual: Callable[..., Scalar],
    start: Numbers,
    data: Any,
    tol: Scalar,
    max_steps: ScalarLike,
) -> tuple[Numbers, Scalar, Int[Array, ""], Bool[Array, ""]]:
    """The solution by the best of Newton's step, shortened or not, and a sure one that descends.

    Returns it with its residual, the steps taken and whether the residual is below `tol`.

    Every function takes `w` and the data; `gap` vanishes at the solution. The derivatives are taken
    through two more steps of Newton's method there, the true ones up to third order.
    """
    frozen = jax.lax.stop_gradient(data)
    slack = 8 * jnp.finfo(start.dtype).eps

    def unfinished(state):
        w, taken = state
        return (residual(w, *frozen) > tol) & (taken < max_steps)

    def step(state):
        w, taken = state
        bold, plain = newton(lambda w: gap(w, *frozen), w), sure(w, *frozen)
        # Near a kink of the cost all of Newton's step is too much, and the sure one crawls.
        tried = jnp.stack([*(w + (bold - w) / 2**k for k in range(8)), plain])
        costs = jax.vmap(lambda w: cost(w, *frozen))(tried)
        costs = jnp.where(jnp.isnan(costs), jnp.inf, costs)
        least = jnp.min(costs)
        best = jnp.where(costs[0] <= least + slack * abs(least), 0, jnp.argmin(costs))
        return tried[best], taken + 1

    state = jax.lax.stop_gradient(start), jnp.int32(0)
    found, taken = jax.lax.while_loop(unfinished, step, state)
    # A scan, so that the step is compiled once.
    polished, _ = jax.lax.scan(
        lambda w, _: (newton(lambda w: gap(w, *data), w), None), found, length=2
    )
    before, after = residual(found, *frozen), residual(jax.lax.stop_gradient(polished), *frozen)
    kept = after <= jnp.where(before > tol, before, tol)
    left = jnp.where(kept, after, before)
    return jnp.where(kept, polished, found), left, taken, left <= tol
