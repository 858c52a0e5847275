"""What a function promises under the transformations of JAX."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from wspace.testing.comparison import at_leaf, compare, norm, stored
from wspace.testing.laws import has_point
from wspace.typing import ScalarLike

__all__ = ["check_transforms"]

STEP = 1e-2
"""Of differences, relative to the weights: their error is its fourth power, or rounding over it."""


def check_transforms(
    operator: Callable[..., Any],
    *weights: PyTree,
    derivatives: bool = True,
    units: ScalarLike = 64,
    **options: Any,
) -> None:
    """Asserts that an operator is the same function under the transformations of JAX.

    - **jit**: the compiled result is the result of the eager call.
    - **vmap**: a batch of three gives what a loop gives. The others are the weights times 3/4 and
      the weights with the entries of each leaf reversed.
    - **derivatives**: the gradient along a random direction in each leaf is a difference quotient,
      to within a thousandth; in the dtype of the weights, float32 at least.
    - **explicit sharding**, with several devices: the result on weights that are sharded along an
      axis which the number of devices divides is that on one device, compiled and eager, and a
      result with the layout of a point is sharded as the point is.

    Args:
        operator: The function.
        *weights: What it is called with: trees, or sequences of trees. All of it is traced, so
            that numbers given by position, such as a list of coefficients, are traced and have
            derivatives.
        derivatives: Whether the operator has derivatives. They are not checked otherwise.
        units: The number of roundings allowed, at the size of the weights.
        **options: Passed on to the operator as they are, not traced.

    Raises:
        AssertionError: If the operator raises under a transformation, or its result there differs;
            with the transformation, the leaf and the roundings.

    Examples:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> from wspace import interpolate, testing
        >>> x, y = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([4.0, 3.0])}
        >>> testing.check_transforms(interpolate.slerp, x, y, t=0.3)
        >>> testing.check_transforms(lambda x: x if x["w"][0] > 0 else y, x)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        AssertionError: jit: the operator raises TracerBoolConversionError: ...
    """
    weights = jax.tree.map(jnp.asarray, weights)

    def function(*weights: PyTree) -> Any:
        return operator(*weights, **options)

    result = function(*weights)
    compiled = jax.jit(function)
    got = _called("jit", compiled, weights)
    compare("jit", got, result, units=units, scale=norm(weights))
    _check_vmap(function, compiled, weights, units)
    if derivatives:
        _check_derivatives(function, weights)
    if len(jax.devices()) > 1:
        _check_sharding(function, weights, result, units)


def _called(law: str, function: Callable[..., Any], weights: tuple) -> Any:
    """The result, or the error as a failure of the law."""
    try:
        return function(*weights)
    except Exception as error:
        line = str(error).strip().split("\n")[0]
        raise AssertionError(
            f"{law}: the operator raises {type(error).__name__}: {line}"
        ) from error


def _check_vmap(function: Callable, compiled: Callable, weights: tuple, units: Any) -> None:
    rows = [
        weights,
        jax.tree.map(lambda x: (0.75 * np.asarray(x, np.float64)).astype(x.dtype), weights),
        jax.tree.map(lambda x: np.asarray(x).reshape(-1)[::-1].reshape(x.shape), weights),
    ]
    batch = jax.tree.map(lambda *xs: jnp.asarray(np.stack([np.asarray(x) for x in xs])), *rows)
    looped = [compiled(*jax.tree.map(jnp.asarray, row)) for row in rows]
    looped = jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *looped)
    got = _called("vmap", jax.jit(jax.vmap(function)), batch)
    compare("vmap", got, looped, units=units, scale=norm(weights))


def _check_derivatives(function: Callable, weights: tuple) -> None:
    rng, size = np.random.default_rng(0), norm(weights) or 1.0
    here = jax.tree.map(lambda x: x if x.dtype == np.float64 else x.astype(jnp.float32), weights)
    result = function(*here)
    read = [rng.normal(size=x.shape) for x in jax.tree.leaves(result)]

    @jax.jit
    def number(*weights: PyTree) -> jax.Array:
        """A number read off all floating entries of the result."""
        parts = [
            jnp.sum(x * v.astype(x.dtype)).astype(float)
            for x, v in zip(jax.tree.leaves(function(*weights)), read, strict=True)
            if jnp.issubdtype(x.dtype, jnp.floating)
        ]
        return sum(parts, jnp.zeros((), float))

    every = tuple(range(len(here)))
    slopes = _called("derivatives", jax.jit(jax.grad(number, every)), here)
    leaves, structure = jax.tree.flatten(here)
    named, _ = jax.tree.flatten_with_path(slopes)
    floor = 64 * stored(here) * norm(result)
    for i, (path, slope) in enumerate(named):
        along = rng.normal(size=leaves[i].shape)
        along *= STEP * size / max(float(np.linalg.norm(along)), 1.0)

        def at(k: int, i: int = i, along: np.ndarray = along) -> float:
            moved = (np.asarray(leaves[i]) + k * along).astype(leaves[i].dtype)
            return float(number(*structure.unflatten([*leaves[:i], moved, *leaves[i + 1 :]])))

        got = float(np.sum(np.asarray(slope) * along))
        wanted = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / 12
        allowed = 1e-3 * (abs(got) + abs(wanted)) + floor
        if not abs(got - wanted) <= allowed:
            raise AssertionError(
                f"derivatives: along leaf {jax.tree_util.keystr(path)} of the weights the result "
                f"changes by {wanted:.6g}, by its gradient {got:.6g}: "
                f"{abs(got - wanted) / allowed:.3g} times what is allowed"
            )


def _check_sharding(function: Callable, weights: tuple, result: Any, units: Any) -> None:
    leaves = jax.tree.leaves(weights)

    def axis(x: jax.Array, devices: int) -> int | None:
        return next((i for i, n in enumerate(x.shape) if n and n % devices == 0), None)

    def sharded(devices: int) -> int:
        return sum(axis(x, devices) is not None for x in leaves)

    count = max(range(len(jax.devices()), 1, -1), key=sharded)
    explicit = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((count,), ("shards",), axis_types=explicit, devices=jax.devices()[:count])

    def spread(x: jax.Array) -> jax.Array:
        at = axis(x, count)
        spec = jax.P() if at is None else jax.P(*[None] * at, "shards")
        return jax.device_put(x, jax.NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        placed = jax.tree.map(spread, weights)
        results = {
            "compiled": _called("explicit sharding, compiled", jax.jit(function), placed),
            "eager": _called("explicit sharding, eager", function, placed),
        }
    for how, got in results.items():
        law = f"explicit sharding, {how}"
        compare(law, *jax.tree.map(np.asarray, (got, result)), units=units, scale=norm(weights))
    if not has_point(weights, result):
        return
    structure = jax.tree.structure(result)
    parts = jax.tree.leaves(placed, is_leaf=lambda x: jax.tree.structure(x) == structure)
    point = next(x for x in parts if jax.tree.structure(x) == structure)
    for how, got in results.items():
        named, _ = jax.tree.flatten_with_path(got)
        for (path, x), y in zip(named, jax.tree.leaves(point), strict=True):
            if jax.typeof(x) != jax.typeof(y):
                leaf = f"explicit sharding, {how}: {at_leaf(path)}"
                raise AssertionError(f"{leaf} is {jax.typeof(x)}, not {jax.typeof(y)}")
