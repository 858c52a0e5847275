"""The zero of a function of a few numbers, with its derivatives."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from wspace._numerics import safe_sqrt, with_nan_of
from wspace.typing import Scalar, ScalarLike

Numbers = Float[Array, " k"]


def newton(gap: Callable[[Numbers], Numbers], w: Numbers) -> Numbers:
    """One step of Newton's method for gap(w) = 0."""
    return w - jnp.linalg.solve(jax.jacfwd(gap)(w), gap(w))


def length(t: Numbers, gram: Float[Array, "k k"]) -> tuple[Scalar, Scalar]:
    """The norm of a combination of vectors with given inner products, and a bound by its rounding.

    Of terms that cancel only half of the digits are left, and the norm itself may round to zero.
    """
    square = jnp.sum(t * jnp.sum(gram * t[None, :], axis=1))
    terms = jnp.sum(jnp.abs(t) * jnp.sum(jnp.abs(gram * t[None, :]), axis=1))
    above = jnp.where(square > 0, square, 0) + jnp.finfo(t.dtype).eps * terms
    return safe_sqrt(square), safe_sqrt(with_nan_of(above, square))


def solved(
    gap: Callable[..., Numbers],
    sure: Callable[..., Numbers],
    rise: Callable[..., tuple[Scalar, Scalar]],
    residual: Callable[..., Scalar],
    start: Numbers,
    data: Any,
    tol: Scalar,
    max_steps: ScalarLike,
) -> tuple[Numbers, Scalar, Int[Array, ""], Bool[Array, ""]]:
    """The solution by the best of Newton's step, shortened or not, and a sure one that descends.

    Returns it with its residual, the steps taken and whether the residual is below `tol`.

    Every function takes `w` and the data; `gap` vanishes at the solution. `rise` takes another `w`
    after the first and returns how much more the first one costs, and the rounding of that: beside
    a large cost that both share, nothing would be left of the difference of two costs. The
    derivatives are taken through two more steps of Newton's method there, the true ones up to third
    order.
    """
    frozen = jax.lax.stop_gradient(data)

    def unfinished(state):
        w, taken = state
        return (residual(w, *frozen) > tol) & (taken < max_steps)

    def step(state):
        w, taken = state
        bold, plain = newton(lambda w: gap(w, *frozen), w), sure(w, *frozen)
        # Near a kink of the cost all of Newton's step is too much, and the sure one crawls.
        tried = jnp.stack([*(w + (bold - w) / 2**k for k in range(8)), plain])
        rises, slack = jax.vmap(lambda new: rise(new, w, *frozen))(tried)
        rises = jnp.where(jnp.isnan(rises), jnp.inf, rises)
        best = jnp.where(rises[0] <= jnp.min(rises) + slack[0], 0, jnp.argmin(rises))
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
