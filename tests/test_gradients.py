"""Every function of `wspace` that has derivatives has the true ones, to second order."""

import jax
import jax.numpy as jnp
import pytest
from jax.test_util import check_grads

from tests.catalog import CATALOG, COMPOSED
from tests.test_transforms import trees

WITHOUT_GRADIENT = (
    "merge.tsv_m",
    "negative.guard_normal",
    "negative.harden",
    "negative.rank_to_reach",
    "negative.route",
)
SMOOTH = {
    name: value
    for name, value in CATALOG.items()
    if name not in COMPOSED and name not in WITHOUT_GRADIENT
}
each_smooth = pytest.mark.parametrize(("count", "function"), SMOOTH.values(), ids=SMOOTH)


@each_smooth
def test_gradients_to_second_order_agree_with_finite_differences(count, function):
    with jax.enable_x64(True):
        arguments = trees(count, jnp.float64)
        check_grads(function, arguments, order=2, modes=["rev"], rtol=1e-4)
