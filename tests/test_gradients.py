"""Every function of `wspace` that has derivatives has the true ones, to second order."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.arguments import trees
from tests.catalog import CASES, each
from tests.spheres import exp_on_sphere, log_on_sphere
from tests.strategies import FLOAT
from wspace import average
from wspace.testing import assert_close


def drawn(rng, like):
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float64), like)


def product(x, y):
    parts = jax.tree.map(lambda a, b: jnp.sum(a * b.astype(jnp.float64)), x, y)
    return jax.tree.reduce(jnp.add, parts)


@each([case for case in CASES if case.derivatives and not case.composed])
def test_gradients_to_second_order_agree_with_finite_differences(case):
    with jax.enable_x64(True):
        x, rng = trees(case.trees, jnp.float64), np.random.default_rng(1)
        along, read = drawn(rng, x), drawn(rng, jax.eval_shape(case.function, *x))

        @jax.jit
        def at(step):
            """A number read off the result, its derivative along a line, and the second one."""

            def number(x):
                return product(read, case.function(*x))

            here = jax.tree.map(lambda a, b: a + step * b, x, along)
            value_and_slopes = jax.value_and_grad(number)
            (value, slopes), (_, bends) = jax.jvp(value_and_slopes, (here,), (along,))
            return value, product(along, slopes), product(along, bends)

        # Differences of fourth order, whose error is that of rounding.
        step = 1e-4
        near, far = ([at(i * step) for i in (-k, k)] for k in (1, 2))
        _, *wanted = at(0.0)
        for order, derivative in enumerate(wanted):
            (a, b), (c, d) = ([x[order] for x in pair] for pair in (near, far))
            got = (8 * (b - a) - (d - c)) / (12 * step)
            size = abs(a) + abs(derivative)
            np.testing.assert_allclose(derivative, got, rtol=0, atol=1e-5 * size)


def test_derivatives_on_a_manifold_are_those_of_the_mean():
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(3, 5)) + np.array([3, 0, 0, 0, 0])
    xs = [jnp.asarray(row / np.linalg.norm(row), FLOAT) for row in rows]
    c, w = jnp.asarray([0.5, 0.3, 0.4], FLOAT), jnp.asarray(rng.normal(size=5), FLOAT)

    def on_manifold(xs, c):
        return average.karcher_mean_on(exp_on_sphere, log_on_sphere, xs, c).weights

    def on_sphere(xs, c):
        return average.karcher_mean([x / jnp.linalg.norm(x) for x in xs], c).weights

    def twice(f):
        """First and second derivatives."""
        rate = w[:3]
        return jax.jvp(lambda c: jax.jvp(lambda c: f(xs, c), (c,), (rate,))[1], (c,), (rate,))

    def against(f):
        by_points, by_numbers = jax.grad(lambda xs, c: w @ f(xs, c), (0, 1))(xs, c)
        # A logarithm is given points of the sphere alone, and so are its derivatives.
        return [v - x * (v @ x) for v, x in zip(by_points, xs, strict=True)], by_numbers

    for of in (twice, against):
        assert_close(jax.jit(lambda of=of: of(on_manifold))(), of(on_sphere), units=256)
