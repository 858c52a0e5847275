"""Laws of task vectors thinned by rank, and of the methods made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import golden_arrays
from tests.strategies import FLOAT, layouts, scales
from wspace import merge, tree
from wspace.testing import assert_close, like, vector, weights

KEY = jax.random.key(0)
WEIGHTS = {"equal": (1.0, 1.0, 1.0), "uneven": (2.0, 1.0, 0.5), "signed": (1.0, -0.5, 0.25)}
SIZES = (1, 2, 7, 50, 99, 150)


def band_of(x, density, outliers):
    """The entries of a NumPy vector after the outliers; of equal ones the first ranks higher."""
    order = np.argsort(-np.abs(x), kind="stable")
    gone, kept = int(np.floor(outliers * x.size)), int(np.floor(density * x.size))
    result = np.zeros_like(x)
    chosen = order[gone : gone + kept]
    result[chosen] = x[chosen]
    return result


@settings(max_examples=8)
@given(
    x=layouts.flatmap(weights),
    density=st.sampled_from([0.1, 0.5, 0.7]),
    outliers=st.sampled_from([0.0, 0.1, 0.3]),
    scale=scales,
)
def test_band_is_the_entries_after_the_outliers(x, density, outliers, scale):
    got = merge.band(x, density, outliers)
    assert_close(got, like(band_of(vector(x), density, outliers), x), units=0)
    scaled = jax.tree.map(lambda leaf: scale * leaf, x)
    wanted = jax.tree.map(lambda leaf: scale * leaf, got)
    assert_close(merge.band(scaled, density, outliers), wanted, units=0)
    if outliers == 0:
        assert_close(got, merge.trim(x, density), units=0)


def test_every_leaf_and_row_keeps_its_share_however_small_it_is():
    rng = np.random.default_rng(0)
    x = {n: jnp.asarray(rng.normal(size=n), FLOAT) for n in SIZES}
    got = merge.band(x, 0.9, 0.01, scope="leaf")
    assert [int((got[n] != 0).sum()) for n in SIZES] == [int(0.9 * n) for n in SIZES]
    for n in SIZES:
        np.testing.assert_array_equal(got[n], band_of(np.asarray(x[n]), 0.9, 0.01))
    matrix = rng.normal(size=(3, 50))
    rows = merge.band(jnp.asarray(matrix, FLOAT), 0.5, 0.1, scope="row")
    wanted = np.stack([band_of(row, 0.5, 0.1) for row in np.asarray(matrix)])
    np.testing.assert_array_equal(rows, jnp.asarray(wanted, FLOAT))


def test_shares_that_are_all_together_may_be_rounded_to_more():
    x = jnp.arange(1.0, 51.0)
    assert float(np.float32(0.93)) + float(np.float32(0.07)) > 1
    for kept, gone in ((0.93, 0.07), (0.99, 0.01), (0.5, 0.5)):
        got = merge.band(x, float(np.float32(kept)), float(np.float32(gone)))
        np.testing.assert_array_equal(got, band_of(np.asarray(x), kept, gone))
        with pytest.raises(ValueError, match="are more than all entries together"):
            merge.band(x, kept, gone + 1e-6)
    # Of so many entries these two shares are 60 more than all.
    many = jax.ShapeDtypeStruct((2**31,), jnp.float32)
    whole = jax.eval_shape(
        lambda x: merge.band(x, float(np.float32(0.97)), float(np.float32(0.03))), many
    )
    assert whole.shape == many.shape


def test_slicing_by_counts_from_both_ends_would_empty_small_leaves():
    def sliced(x, density, outliers):
        gone = int(outliers * x.size)
        least = x.size - int(density * x.size) - gone
        return np.argsort(np.abs(x), kind="stable")[least:-gone]

    x = np.random.default_rng(0).normal(size=150)
    assert [sliced(x[:n], 0.9, 0.01).size for n in SIZES] == [0, 0, 0, 0, 0, 135]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("method", [merge.breadcrumbs, merge.breadcrumbs_ties])
def test_breadcrumbs_are_those_of_mergekit_where_it_empties_no_leaf(method, weight):
    base = jax.tree.map(jnp.asarray, golden_arrays.tree("peers", "input/base"))
    tuned = [golden_arrays.tree("peers", f"input/tuned{i}") for i in range(3)]
    got = method(
        base,
        [jax.tree.map(jnp.asarray, x) for x in tuned],
        WEIGHTS[weight],
        **merge.presets.mergekit[method.__name__] | {"density": 0.6, "outliers": 0.1},
    )
    case = f"mergekit-0.1.5/{method.__name__}?weight={weight},density=0.6,gamma=0.1"
    wanted = jax.tree.map(jnp.asarray, golden_arrays.tree("peers", case))
    assert_close(got, wanted, units=4)


def test_methods_negate_with_their_coefficients_and_contain_others():
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 3), "b": (3,)}
    base, *edits = (
        {name: jnp.asarray(rng.normal(size=shape), FLOAT) for name, shape in shapes.items()}
        for _ in range(3)
    )
    zero = jax.tree.map(jnp.zeros_like, base)
    c, minus = (1.0, -0.5), (-1.0, 0.5)
    for method in (
        lambda c: merge.breadcrumbs(zero, edits, c, density=0.4, outliers=0.1),
        lambda c: merge.breadcrumbs_ties(zero, edits, c, density=0.4, outliers=0.1),
        lambda c: merge.della(KEY, zero, edits, c, width=0.3),
    ):
        wanted = jax.tree.map(jnp.negative, method(c))
        assert_close(method(minus), wanted, units=0)
    no_outliers = merge.breadcrumbs_ties(base, edits, c, density=0.5, outliers=0.0)
    assert_close(no_outliers, merge.ties(base, edits, c, density=0.5), units=0)
    assert_close(
        merge.della(KEY, base, edits, c, width=0.0), merge.dare_ties(KEY, base, edits, c), units=0
    )
    whole = merge.breadcrumbs(base, edits[:1], density=1.0, outliers=0.0)
    assert_close(whole, tree.combine((1, 0), (edits[0], base)), units=4, scale=16)


def probabilities(x, density, width):
    """Linear in the rank in a row; of equal magnitudes the first has the higher probability."""
    above = np.argsort(np.argsort(-np.abs(x), axis=-1, kind="stable"), axis=-1)
    n = x.shape[-1]
    return density + (width * (n - 1 - 2 * above) / (n - 1) if n > 1 else np.zeros(x.shape))


DRAWS = 3000
X = {
    "row": np.array([[3.0, -1.0, 1.0, 0.5, -8.0], [1.0, 1.0, -1.0, 1.0, 1.0]]),
    "one": np.array([[2.0], [-5.0]]),
    "scalar": np.array(4.0),
}


@pytest.mark.parametrize("scope", ["row", "leaf"])
def test_magprune_keeps_by_rank_and_is_unbiased(scope):
    density, width = 0.55, 0.35
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), X)
    keys = jax.random.split(KEY, DRAWS)
    draw = jax.jit(jax.vmap(lambda k: merge.magprune(k, x, density, width=width, scope=scope)))
    draws = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), draw(keys))
    for name, leaf in X.items():
        rows = leaf.reshape(1, -1) if scope == "leaf" or leaf.ndim < 2 else leaf
        p = probabilities(rows, density, width).reshape(leaf.shape)
        np.testing.assert_allclose(np.mean(p), density)
        kept = draws[name] != 0
        np.testing.assert_allclose(
            draws[name], np.where(kept, leaf / p, 0), rtol=1e-6, err_msg="x / p"
        )
        deviation = np.sqrt(p * (1 - p) / DRAWS)
        assert (np.abs(kept.mean(0) - p) < 5 * deviation).all()
        spread = np.abs(leaf) * deviation / p
        assert (np.abs(draws[name].mean(0) - leaf) < 5 * spread).all()


def test_mask_depends_on_the_order_of_magnitudes_alone():
    values = np.random.default_rng(0).normal(size=(5, 1000))  # more ranks than bfloat16 has
    half = jnp.asarray(values, jnp.bfloat16)
    x = half.astype(jnp.float32)
    mask = merge.magprune(KEY, x, 0.5, width=0.4, rescale="none") != 0
    for other in (half, -x, 2.0**-20 * x):
        assert jnp.array_equal(
            merge.magprune(KEY, other, 0.5, width=0.4, rescale="none") != 0, mask
        )
    normed = merge.magprune(KEY, x, 0.5, width=0.4, rescale="norm")
    np.testing.assert_allclose(jnp.abs(normed).sum(), jnp.abs(x).sum(), rtol=1e-5)
    assert_close(merge.magprune(KEY, x, 0.7, width=0.0), merge.drop(KEY, x, 0.7), units=2)
    # Large entries stay more often than small ones.
    assert jnp.abs(x)[mask].mean() > 1.2 * jnp.abs(x).mean()


def test_shares_in_float32_may_add_up_to_one():
    x = {"w": jnp.arange(1.0, 6, dtype=FLOAT)}
    density, width = (float(np.float32(share)) for share in (0.6, 0.4))
    assert density + width > 1
    found = merge.magprune(KEY, x, density, width=width, rescale="none")["w"]
    assert found[-1] == 5  # the largest magnitude, whose probability is one
    assert_close(found, merge.magprune(KEY, x, 0.6, width=0.4, rescale="none")["w"], units=0)


def test_mask_is_the_same_on_one_device_and_on_eight():
    x = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32)}
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    for spec, scope in ((jax.P("x", None), "row"), (jax.P(None, "x"), "leaf")):
        wanted = merge.magprune(KEY, x, 0.5, width=0.3, scope=scope)
        with jax.set_mesh(mesh):
            spread = {"w": jax.device_put(x["w"], spec)}
            got = merge.magprune(KEY, spread, 0.5, width=0.3, scope=scope)
        assert jax.typeof(got["w"]) == jax.typeof(spread["w"])
        np.testing.assert_array_equal(got["w"] != 0, wanted["w"] != 0)
        np.testing.assert_allclose(got["w"], wanted["w"], rtol=1e-6)


def test_bad_arguments_are_refused(refuses):
    x = {"w": jnp.ones(4)}
    with refuses(ValueError, match="density 0.8 and outliers 0.3 are more than all entries"):
        merge.band(x, 0.8, 0.3)
    with refuses(ValueError, match=r"outliers must be from 0 to below 1, got 1"):
        merge.band(x, 0.1, 1.0)
    with refuses(TypeError, match="outliers must be a plain number"):
        jax.jit(lambda gamma: merge.band(x, 0.5, gamma))(0.1)
    with refuses(ValueError, match="scope must be one of"):
        merge.band(x, 0.5, scope="column")
    with refuses(ValueError, match="gives probabilities from -0.1 to 0.3"):
        merge.magprune(KEY, x, 0.1, width=0.2)
    with refuses(ValueError, match="gives probabilities from 0.8 to 1.2"):
        merge.magprune(KEY, x, 1.0, width=0.2)
    with refuses(ValueError, match="scope must be one of 'row', 'leaf'"):
        merge.magprune(KEY, x, 0.5, scope="tree")
    with refuses(ValueError, match="rescale must be one of"):
        merge.magprune(KEY, x, 0.5, rescale="mean")
    for method in (merge.breadcrumbs, merge.breadcrumbs_ties):
        with refuses(
            TypeError, match="density must be a real number above 0 and at most 1, got None"
        ):
            method(x, [x], **merge.presets.mergekit[method.__name__])
    with refuses(TypeError, match="density must be a real number above 0 and at most 1, got None"):
        merge.della(KEY, x, [x], **merge.presets.mergekit["della"])
