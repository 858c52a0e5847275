"""Laws of the regression mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.test_util import check_grads

from tests.helpers import is_nan
from tests.strategies import FLOAT, costs, scales
from wspace import average, tree
from wspace.testing import assert_close

regression_mean = jax.jit(average.regression_mean)
ROUNDING = float(jnp.finfo(FLOAT).eps)


@st.composite
def layers(draw, count=None):
    """Matrices `(4, 3)`, inputs for each, few or many, and coefficients, in float64 NumPy."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    count = draw(st.integers(1, 3)) if count is None else count
    rows = draw(st.sampled_from([1, 2, 9]))
    near = draw(st.sampled_from([1.0, 1e-2]))
    xs = rng.normal(size=(4, 3)) + near * rng.normal(size=(count, 4, 3))
    return xs, rng.integers(-3, 4, size=(count, rows, 4)) * 1.0, np.array(draw(costs(count)))


def arrays(xs):
    return [jnp.asarray(x, FLOAT) for x in xs]


def squared(inputs):
    return np.swapaxes(inputs, -1, -2) @ inputs


def fitted(xs, inputs, c):
    """The minimum of the squared errors that is nearest to the plain mean."""
    plain = np.average(xs, axis=0, weights=c)
    roots = np.sqrt(c)[:, None, None]
    rows = np.concatenate(roots * inputs)
    left = np.concatenate(roots * (inputs @ (xs - plain)))
    change, _, rank, values = np.linalg.lstsq(rows, left, rcond=1e-10)
    return plain + change, rank, (values[0] / values[rank - 1]) ** 2 if rank else 1.0


@given(case=layers(), scale=scales)
def test_regression_mean_is_the_least_squares_fit_nearest_to_the_mean(case, scale):
    xs, inputs, c = case
    wanted, rank, condition = fitted(xs, inputs, c)
    points, grams = arrays(xs), arrays(scale * squared(inputs))
    got = regression_mean(points, grams, c)
    assert int(got.unseen) == 4 - rank
    np.testing.assert_allclose(got.condition, condition, rtol=64 * ROUNDING * condition)
    far = np.abs(xs - xs.mean(0)).max()
    bound = ROUNDING * (16 * np.abs(xs).max() + 64 * condition * far)
    np.testing.assert_allclose(got.weights, wanted, rtol=0, atol=bound)
    back = regression_mean(points[::-1], grams[::-1], c[::-1])
    np.testing.assert_allclose(back.weights, wanted, rtol=0, atol=bound)
    moved = regression_mean([2 * x + 1 for x in points], grams, c).weights
    np.testing.assert_allclose(moved, 2 * wanted + 1, rtol=0, atol=4 * bound + 16 * ROUNDING)
    sound = regression_mean(points, [grams[0]] * len(xs), c).weights
    assert_close(sound, average.mean(points, c), units=64 * max(condition, 1))
    alone = average.regression_mean(points[:1], grams[:1]).weights
    assert alone.tolist() == points[0].tolist()


@given(
    case=layers(), ridge=st.sampled_from([1e-3, 0.5, 1e6]), shrink=st.sampled_from([0.0, 0.5, 1.0])
)
def test_ridge_and_shrinkage_change_every_gram(case, ridge, shrink):
    xs, inputs, c = case
    grams = squared(inputs) * (shrink + (1 - shrink) * np.eye(4))
    level = ridge * np.trace(np.average(grams, axis=0, weights=c)) / 4
    full = c[:, None, None] * (grams + level * np.eye(4))
    if not level:
        return
    wanted = np.linalg.solve(full.sum(0), (full @ xs).sum(0))
    got = regression_mean(arrays(xs), arrays(squared(inputs)), c, ridge=ridge, shrink=shrink)
    condition = np.linalg.cond(full.sum(0))
    np.testing.assert_allclose(got.weights, wanted, rtol=0, atol=64 * ROUNDING * condition * 8)
    np.testing.assert_allclose(got.condition, condition, rtol=64 * ROUNDING * condition)
    assert got.unseen == 0


@given(case=layers(count=2))
def test_edits_as_their_own_inputs_solve_the_descent_of_wudi(case):
    xs, _, _ = case
    edits = xs - xs.mean(0) * 0.5
    grams = [e @ e.T / (e**2).sum() for e in edits]
    got = np.asarray(regression_mean(arrays(edits), arrays(grams)).weights, np.float64)

    def loss(x):  # with weights (out, in), as where it is from: ||(X - tau) tau^T||^2 / ||tau||^2
        torch = zip(x.T - np.swapaxes(edits, 1, 2), edits, strict=True)
        return sum(((gap @ e) ** 2).sum() / (e**2).sum() for gap, e in torch)

    slope = sum(g @ (got - e) for g, e in zip(grams, edits, strict=True))
    assert np.abs(slope).max() <= 256 * ROUNDING * np.abs(edits).max()
    for other in (edits.mean(0), edits.sum(0)):
        assert loss(got) <= loss(other) * (1 + 1e-5)


def test_rank_one_grams_give_a_fit_where_the_inverse_gives_none():
    xs = arrays([[[1.0], [2.0]], [[5.0], [8.0]]])
    gram = jnp.asarray([[1.0, 1.0], [1.0, 1.0]], FLOAT)
    got = regression_mean(xs, [gram, 0 * gram])
    assert not jnp.isfinite(jnp.linalg.inv(gram)).any()
    assert_close(got.weights, jnp.asarray([[0.5], [2.5]], FLOAT), units=8)
    assert int(got.unseen) == 1
    nothing = regression_mean(xs, [0 * gram, 0 * gram], ridge=0.1)
    assert_close(nothing.weights, jnp.asarray([[3.0], [5.0]], FLOAT), units=0)
    assert (float(nothing.condition), int(nothing.unseen)) == (1, 2)


def test_leaves_without_a_gram_get_the_mean_and_others_are_matrices():
    rng = np.random.default_rng(0)
    w, kernel, bias = rng.normal(size=(2, 2, 4, 3)), rng.normal(size=(2, 2, 1, 2, 3)), np.eye(2)
    layouts = zip(w, kernel, bias, strict=True)
    xs = [{"s": jnp.asarray(s), "k": jnp.asarray(k), "b": jnp.asarray(b)} for s, k, b in layouts]
    stacks = squared(rng.normal(size=(2, 2, 9, 4)))
    grams = [{"s": jnp.asarray(g), "k": jnp.asarray(g[0]), "b": None} for g in stacks]
    got = regression_mean(xs, grams, (1.0, 3.0)).weights
    assert_close(got["b"], average.mean([x["b"] for x in xs], (1.0, 3.0)), units=2)
    for i in (0, 1):
        one = regression_mean([x["s"][i] for x in xs], [g["s"][i] for g in grams], (1.0, 3.0))
        assert_close(got["s"][i], one.weights, units=64)
    flat = regression_mean([x["k"].reshape(4, 3) for x in xs], [g["k"] for g in grams], (1.0, 3.0))
    assert_close(got["k"].reshape(4, 3), flat.weights, units=64)
    shared = regression_mean(xs, [g | {"s": g["s"][0]} for g in grams], (1.0, 3.0)).weights
    assert_close(shared["s"][0], got["s"][0], units=64)


def test_derivatives_in_points_and_grams_are_true_even_where_eigenvalues_repeat():
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        xs, roots = rng.normal(size=(2, 4, 3)), np.stack([np.eye(4), 2 * np.eye(4)])

        def solved(xs, roots):
            grams = [r @ r.T for r in roots]
            return average.regression_mean(list(xs), grams, ridge=0.1, shrink=0.5).weights

        check_grads(jax.jit(solved), (xs, roots), order=2, modes=["rev"], rtol=1e-3)
        seen = jnp.diag(jnp.asarray([1.0, 2.0, 0.0, 0.0]))
        check_grads(
            lambda xs: average.regression_mean(list(xs), [seen, seen + seen.T]).weights,
            (xs,),
            order=1,
            modes=["rev"],
        )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_points_are_rounded_once(dtype):
    rng = np.random.default_rng(2)
    xs = [jnp.asarray(x, dtype) for x in rng.normal(size=(2, 4, 3))]
    grams = [jnp.asarray(g, jnp.float32) for g in squared(rng.normal(size=(2, 9, 4)))]
    wanted = regression_mean([tree.upcast(x) for x in xs], grams).weights
    assert_close(regression_mean(xs, grams).weights, wanted.astype(dtype), units=0)
    thin = [jnp.asarray(g, dtype) for g in squared(rng.normal(size=(2, 1, 4)))]
    assert not is_nan(average.regression_mean(xs, thin).weights)  # rounded, so not quite positive


def test_bad_arguments_are_refused_and_nan_where_traced(refuses):
    xs = [{"w": jnp.ones((2, 1))}, {"w": jnp.zeros((2, 1))}]
    good = [{"w": jnp.eye(2)}] * 2
    with refuses(ValueError, match=r"grams\[1\] at leaf \['w'\] has shape \(3, 3\) for .* inputs"):
        average.regression_mean(xs, [good[0], {"w": jnp.eye(3)}])
    with refuses(TypeError, match=r"grams\[0\] at leaf \['w'\] has dtype int32: give a float"):
        average.regression_mean(xs, [{"w": jnp.eye(2, dtype=jnp.int32)}] * 2)
    with refuses(ValueError, match=r"grams\[0\] must be a tree like the points"):
        average.regression_mean(xs, [{"v": jnp.eye(2)}] * 2)
    with refuses(ValueError, match=r"grams\[1\] at leaf \['w'\] is None, where others have"):
        average.regression_mean(xs, [good[0], {"w": None}])
    with refuses(ValueError, match="grams has 1 trees for 2 points"):
        average.regression_mean(xs, good[:1])
    for bad, words in (
        (jnp.asarray([[1.0, 1.0], [0.0, 1.0]]), r"grams\[0\] at leaf .* is not symmetric"),
        (jnp.full((2, 2), jnp.nan), "is not symmetric or not finite"),
        (jnp.diag(jnp.asarray([1.0, -1.0])), "the sum of grams.* has the eigenvalue -1 beside 1"),
    ):
        with refuses(ValueError, match=words):
            average.regression_mean(xs, [{"w": bad}] * 2)
        assert is_nan(regression_mean(xs, [{"w": bad}] * 2).weights)
    for name, bad in (("ridge", -1.0), ("shrink", 1.5), ("rtol", -1.0)):
        with refuses(ValueError, match=f"{name} must be .*, got {bad}"):
            average.regression_mean(xs, good, **{name: bad})
        assert is_nan(regression_mean(xs, good, **{name: jnp.asarray(bad)}).weights)
    with refuses(ValueError, match=r"coefficients must be positive, got \[1.0, 0.0\]"):
        average.regression_mean(xs, good, (1.0, 0.0))
    assert is_nan(regression_mean(xs, good, jnp.asarray([1.0, 0.0])).weights)


def test_what_is_undefined_has_no_condition():
    x = jnp.eye(2)
    for bad in ([[jnp.inf, 0], [0, 1]], [[jnp.nan, 0], [0, 1]], [[-3.0, 0], [0, 1]]):
        found = jax.jit(lambda g: average.regression_mean([x, 2 * x], [g, jnp.eye(2)]))(
            jnp.array(bad)
        )
        assert jnp.isnan(found.weights).all()
        assert jnp.isnan(found.condition)
