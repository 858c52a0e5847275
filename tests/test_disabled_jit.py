"""What is compiled is what runs, entry by entry, where a user takes it apart in a debugger."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.strategies import FLOAT
from wspace import average, cone, fit, geometry, interpolate, merge, negative, selection
from wspace.testing import assert_close

RANDOM = np.random.default_rng(0)
X, Y, Z = (
    {name: jnp.asarray(RANDOM.normal(size=shape) + 1, FLOAT) for name, shape in LAYOUT.items()}
    for LAYOUT in [{"w": (3, 2), "b": (4,)}] * 3
)
KEY = jax.random.key(0)

FUNCTIONS = {
    "lerp": lambda: interpolate.lerp(X, Y, 0.3),
    "slerp": lambda: interpolate.slerp(X, Y, 0.3),
    "chain": lambda: interpolate.polygonal_chain([X, Y, Z], 0.3),
    "mean": lambda: average.mean([X, Y], (3.0, -1.0)),
    "karcher": lambda: average.karcher_mean([X, Y, Z]),
    "karcher on": lambda: average.karcher_mean_on(
        lambda x, v: jax.tree.map(jnp.add, x, v), lambda x, y: jax.tree.map(jnp.subtract, y, x),
        [X, Y],
    ),
    "median": lambda: average.geometric_median([X, Y, Z]).weights,
    "fisher": lambda: average.fisher_mean([X, Y], [jax.tree.map(jnp.abs, x) for x in (Y, Z)]),
    "stock": lambda: average.model_stock(X, [Y, Z]),
    "gram": lambda: geometry.gram([X, Y]),
    "mask": lambda: selection.top_mask(X, 3),
    "mask of a leaf": lambda: selection.top_mask(X["w"], 2),
    "empty mask": lambda: selection.top_mask(X, 0),
    "kept": lambda: selection.top.keep_top(X, 3),
    "magnitude": lambda: selection.kth_magnitude(X, 3),
    "sparse": lambda: cone.project(cone.Sparse(3), X),
    "rank": lambda: cone.project(cone.Rank(1), X).norm,
    "ties": lambda: merge.ties(X, [Y, Z], density=0.5),
    "dare": lambda: merge.dare(KEY, X, [Y, Z]),
    "repel": lambda: negative.repel(X, Y, 0.5),
    "retarget": lambda: negative.retarget([X, Y], (0.5, 0.5), Z),
    "hull": lambda: negative.guard_hull([X, Y], Z, 0.1),
    "adapt": lambda: fit.adapt(
        KEY, lambda x: jnp.sum(x["w"] ** 2), X, optimizer=SGD, steps=2
    ).weights,
}  # fmt: skip
SGD = pytest.importorskip("optax").sgd(0.1)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_without_compilation_the_result_is_the_same(name, pytestconfig):
    if pytestconfig.getoption("jaxtyping_packages"):
        pytest.skip("annotations of compiled functions speak of traced arrays")
    with jax.disable_jit():
        found = FUNCTIONS[name]()
    assert_close(found, FUNCTIONS[name](), units=64)
