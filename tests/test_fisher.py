"""Laws of the means in the metric of Fishers, diagonal and Kronecker-factored."""

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
from wspace.testing import assert_close, like, points, size, vector, weights
from wspace.testing.strategies import ENTRIES

fisher_mean = jax.jit(average.fisher_mean)
kronecker_mean = jax.jit(average.kronecker_mean, static_argnames="steps")
ROUNDING = float(jnp.finfo(FLOAT).eps)
INFORMATION = st.just(0.0) | ENTRIES.map(abs)


@st.composite
def informed(draw):
    """Points, a Fisher for each with entries often zero, and coefficients."""
    xs = draw(points())
    layout = jax.tree.map(jnp.shape, xs[0])
    fishers = [draw(weights(layout, FLOAT, entries=INFORMATION)) for _ in xs]
    return xs, fishers, draw(costs(len(xs)))


def plain(xs, c):
    return sum(k * vector(x) for k, x in zip(c, xs, strict=True)) / sum(c)


@given(case=informed(), scale=scales, ridge=st.sampled_from([0.0, 0.25]))
def test_fisher_mean_is_the_weighted_mean_entry_by_entry(case, scale, ridge):
    xs, fishers, c = case
    precisions = [k * vector(f) for k, f in zip(c, fishers, strict=True)]
    entries = sum(precisions)
    count = max(entries.size, 1)
    precisions = [
        p + k * ridge * entries.sum() / sum(c) / count for p, k in zip(precisions, c, strict=True)
    ]
    total = sum(precisions)
    nothing = total == 0
    weighed = sum(p * vector(x) for p, x in zip(precisions, xs, strict=True))
    wanted = np.where(nothing, plain(xs, c), weighed / np.where(nothing, 1, total))
    fishers = [jax.tree.map(lambda f: scale * f, f) for f in fishers]
    got = fisher_mean(xs, fishers, c, ridge=ridge)
    assert_close(got, like(wanted, xs[0]), units=32, scale=size(*xs))
    backwards = fisher_mean(xs[::-1], fishers[::-1], c[::-1], ridge=ridge)
    assert_close(backwards, got, units=16, scale=size(*xs))


@given(xs=points(count=3), level=scales)
def test_constant_fishers_give_the_mean_and_one_point_itself(xs, level):
    constant = [jax.tree.map(lambda x: jnp.full_like(x, level), x) for x in xs]
    wanted = average.mean(xs, (1.0, 2.0, 0.5))
    assert_close(fisher_mean(xs, constant, (1.0, 2.0, 0.5)), wanted, units=8, scale=size(*xs))
    assert_close(fisher_mean(xs[:1], constant[:1]), xs[0], units=0)


def test_fisher_mean_of_fits_to_disjoint_data_is_the_fit_to_all_data():
    rng = np.random.default_rng(0)
    signs = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
    inputs = [signs * rng.uniform(0.5, 2, 4), signs * rng.uniform(0.5, 2, 4)]  # orthogonal columns
    outputs = [rng.normal(size=4) for _ in inputs]
    fits = [np.linalg.lstsq(x, y)[0] for x, y in zip(inputs, outputs, strict=True)]
    pooled = np.linalg.lstsq(np.concatenate(inputs), np.concatenate(outputs))[0]
    fishers = [jnp.asarray((x**2).sum(0), FLOAT) for x in inputs]
    got = average.fisher_mean([jnp.asarray(x, FLOAT) for x in fits], fishers)
    assert_close(got, jnp.asarray(pooled, FLOAT), units=16)
    assert np.abs(np.mean(fits, 0) - pooled).max() > 0.01  # the plain mean is another point


def test_entries_beyond_the_range_of_their_squares_keep_their_ratios():
    xs = [jnp.asarray([0.0, 0.0], FLOAT), jnp.asarray([4.0, 4.0], FLOAT)]
    fishers = [jnp.asarray([3e-30, 1e38], FLOAT), jnp.asarray([1e-30, 3e38], FLOAT)]
    assert_close(average.fisher_mean(xs, fishers), jnp.asarray([1.0, 3.0], FLOAT), units=4)


def test_derivative_in_the_fishers_is_zero_where_nothing_is_known():
    xs, zero = [jnp.asarray([0.0]), jnp.asarray([4.0])], jnp.zeros(1)
    slope = jax.grad(lambda f: average.fisher_mean(xs, [f, zero]).sum())(zero)
    assert_close(slope, zero, units=0)
    assert is_nan(average.fisher_mean(xs, [jnp.asarray([jnp.nan]), zero + 1]))


def test_bad_fishers_are_refused_and_nan_where_traced(refuses):
    xs = [{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}]
    good, bad = {"w": jnp.ones(2)}, {"w": jnp.asarray([-1.0, 1.0])}
    with refuses(ValueError, match=r"leaf \['w'\] of fishers\[1\] has the entry -1: .* squared"):
        average.fisher_mean(xs, [good, bad])
    assert jnp.isnan(fisher_mean(xs, [good, bad])["w"]).tolist() == [True, False]
    with refuses(ValueError, match=r"coefficients must be positive, got \[2.0, -1.0\]"):
        average.fisher_mean(xs, [good, good], [2.0, -1.0])
    assert is_nan(fisher_mean(xs, [good, good], jnp.asarray([2.0, -1.0])))
    with refuses(ValueError, match="fishers has 1 trees for 2 points: give one tree a point"):
        average.fisher_mean(xs, [good])
    with refuses(ValueError, match="ridge must be finite and at least 0, got -1.0"):
        average.fisher_mean(xs, [good, good], ridge=-1.0)
    assert is_nan(fisher_mean(xs, [good, good], ridge=jnp.asarray(-1.0)))


def spread(rng, count, size, rank):
    """Positive semidefinite matrices of a rank, of which the condition is moderate."""
    roots = rng.normal(size=(count, size, rank)) + np.eye(size)[:, :rank] * 2
    return roots @ np.swapaxes(roots, -1, -2)


@st.composite
def factored(draw, count=None):
    """Matrices `(4, 3)`, their factors and coefficients, in float64 NumPy."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    count = draw(st.integers(1, 3)) if count is None else count
    inputs = spread(rng, count, 4, draw(st.sampled_from([2, 4])))
    outputs = spread(rng, count, 3, 3) * draw(scales)
    return rng.normal(size=(count, 4, 3)), inputs, outputs, np.array(draw(costs(count)))


def as_arrays(xs, inputs, outputs):
    xs, inputs, outputs = ([jnp.asarray(x, FLOAT) for x in each] for each in (xs, inputs, outputs))
    pairs = zip(inputs, outputs, strict=True)
    return [{"w": x} for x in xs], [{"w": average.Kronecker(a, b)} for a, b in pairs]


def dense(inputs, outputs, c, ridge):
    """One Fisher a point, on matrices flattened by rows."""
    fishers = [k * np.kron(a, b) for k, a, b in zip(c, inputs, outputs, strict=True)]
    level = ridge * np.trace(sum(fishers)) / len(fishers[0]) / sum(c)
    return [f + k * level * np.eye(len(f)) for f, k in zip(fishers, c, strict=True)]


@given(case=factored(), ridge=st.sampled_from([0.0, 0.5]))
def test_kronecker_mean_solves_the_normal_equations(case, ridge):
    xs, inputs, outputs, c = case
    got = kronecker_mean(*as_arrays(xs, inputs, outputs), c, ridge=ridge)
    assert got.converged
    assert 0 <= got.residual <= ROUNDING**0.75
    fishers = dense(inputs, outputs, c, ridge)
    wide = np.asarray(got.weights["w"], np.float64)
    left = sum(f @ (wide - x).reshape(-1) for f, x in zip(fishers, xs, strict=True))
    size = sum(np.linalg.norm(f) * np.abs(x).max() for f, x in zip(fishers, xs, strict=True))
    bound = 4 * ROUNDING**0.75
    assert np.abs(left).max() <= bound * size
    if np.linalg.cond(sum(fishers)) < 1e4:
        seen = np.linalg.solve(
            sum(fishers), sum(f @ x.reshape(-1) for f, x in zip(fishers, xs, strict=True))
        )
        np.testing.assert_allclose(wide.reshape(-1), seen, rtol=0, atol=1e4 * bound)
    again = kronecker_mean(*as_arrays(xs[::-1], 8 * inputs[::-1], outputs[::-1]), c[::-1])
    if ridge == 0:
        np.testing.assert_allclose(again.weights["w"], wide, rtol=0, atol=1e3 * bound)


@given(case=factored(count=2))
def test_equal_factors_give_the_mean_and_equal_outputs_the_regression_mean(case):
    xs, inputs, outputs, c = case
    points, _ = as_arrays(xs, inputs, outputs)
    _, equal = as_arrays(xs, inputs[[0, 0]], outputs[[0, 0]])
    got = kronecker_mean(points, equal, c)
    assert_close(got.weights, average.mean(points, c), units=64)
    assert kronecker_mean(points[:1], equal[:1]).weights["w"].tolist() == points[0]["w"].tolist()
    inputs = inputs + np.eye(4)
    _, pairs = as_arrays(xs, inputs, outputs[[0, 0]])
    wanted = average.regression_mean(points, [{"w": p["w"].inputs} for p in pairs], c)
    assert_close(kronecker_mean(points, pairs, c).weights, wanted.weights, units=4096)


def test_fits_to_disjoint_data_of_unequal_noise_average_to_the_fit_to_all_data():
    rng = np.random.default_rng(1)
    truth = rng.normal(size=(4, 3))
    inputs, noises = rng.normal(size=(2, 9, 4)), spread(rng, 2, 3, 3)  # of the outputs, by model
    outputs = inputs @ truth + rng.normal(size=(2, 9, 3))
    fits = [np.linalg.lstsq(x, y)[0] for x, y in zip(inputs, outputs, strict=True)]
    grams, precisions = np.swapaxes(inputs, 1, 2) @ inputs, np.linalg.inv(noises)
    roots = [np.linalg.cholesky(p).T for p in precisions]
    rows = [np.kron(x, r) for x, r in zip(inputs, roots, strict=True)]
    whitened = [(y @ r.T).reshape(-1) for y, r in zip(outputs, roots, strict=True)]
    pooled = np.linalg.lstsq(np.concatenate(rows), np.concatenate(whitened))[0].reshape(4, 3)
    got = average.kronecker_mean(*as_arrays(fits, grams, precisions)).weights["w"]
    np.testing.assert_allclose(got, pooled, atol=1e-4)
    products = [g @ w @ p for g, w, p in zip(grams, fits, precisions, strict=True)]
    center = np.kron(grams.mean(0), precisions.mean(0))  # the product of means is no mean product
    wrong = np.linalg.solve(center, np.mean(products, 0).reshape(-1)).reshape(4, 3)
    assert np.abs(wrong - pooled).max() > 0.01


def test_one_step_is_exact_where_the_factors_commute_and_the_certificate_tells_the_rest():
    rng = np.random.default_rng(2)
    turn, other = np.linalg.qr(rng.normal(size=(4, 4)))[0], np.linalg.qr(rng.normal(size=(3, 3)))[0]
    inputs = [turn * d @ turn.T for d in rng.uniform(0.1, 2, (3, 4))]
    outputs = [other * d @ other.T for d in rng.uniform(0.1, 2, (3, 3))]
    xs = rng.normal(size=(3, 4, 3))
    got = kronecker_mean(*as_arrays(xs, inputs, outputs))
    assert got.steps == 1
    mixed = as_arrays(xs, spread(rng, 3, 4, 4), spread(rng, 3, 3, 3))
    short, full = kronecker_mean(*mixed, steps=2), kronecker_mean(*mixed)
    assert (int(short.steps), bool(short.converged)) == (2, False)
    assert full.converged
    assert short.residual > 10 * full.residual


def test_directions_that_nobody_knows_keep_the_plain_mean():
    known, zero = jnp.diag(jnp.asarray([1.0, 0.0])), jnp.zeros((2, 2))
    xs = [jnp.ones((2, 2)), jnp.full((2, 2), 5.0)]
    factors = [average.Kronecker(known, jnp.eye(2)), average.Kronecker(3 * known, jnp.eye(2))]
    got = kronecker_mean(xs, factors)
    assert_close(got.weights, jnp.asarray([[4.0, 4.0], [3.0, 3.0]]), units=4)
    tiny = [average.Kronecker(1e-24 * f.inputs, 1e-24 * f.outputs) for f in factors]
    assert_close(kronecker_mean(xs, tiny).weights, got.weights, units=4)
    nothing = kronecker_mean(xs, [average.Kronecker(zero, zero)] * 2)
    assert_close(nothing.weights, xs[0] + 2, units=0)
    assert (float(nothing.residual), int(nothing.steps), bool(nothing.converged)) == (0, 0, True)


def test_stacks_and_convolutions_are_solved_matrix_by_matrix():
    rng = np.random.default_rng(3)
    stacks, grams, outs = rng.normal(size=(2, 2, 4, 3)), spread(rng, 4, 4, 4), spread(rng, 2, 3, 3)
    grams = grams.reshape(2, 2, 4, 4)
    xs = [{"s": jnp.asarray(s), "c": jnp.asarray(s[0]).reshape(2, 1, 2, 3)} for s in stacks]
    pairs = [
        average.Kronecker(jnp.asarray(a), jnp.asarray(b)) for a, b in zip(grams, outs, strict=True)
    ]
    one = [average.Kronecker(p.inputs[0], p.outputs) for p in pairs]
    factors = [{"s": p, "c": q} for p, q in zip(pairs, one, strict=True)]
    got = kronecker_mean(xs, factors).weights
    first = kronecker_mean([x["s"][0] for x in xs], one).weights
    np.testing.assert_allclose(got["s"][0], first, atol=1e-4)
    np.testing.assert_allclose(got["c"].reshape(4, 3), first, atol=1e-4)


def test_derivatives_in_points_and_factors_are_true():
    with jax.enable_x64(True):
        rng = np.random.default_rng(4)
        xs = rng.normal(size=(2, 4, 3))
        roots = [rng.normal(size=(2, n, n)) + 2 * np.eye(n) for n in (4, 3)]

        def solved(xs, left, right):
            pairs = [average.Kronecker(a @ a.T, b @ b.T) for a, b in zip(left, right, strict=True)]
            return average.kronecker_mean(list(xs), pairs, ridge=0.1, rtol=1e-13).weights

        check_grads(jax.jit(solved), (xs, *roots), order=2, modes=["rev"], rtol=1e-3)


@pytest.mark.parametrize("power", [-100, 0, 100])
def test_the_kronecker_mean_is_certified_at_every_scale(power):
    rng = np.random.default_rng(0)
    factors = []
    for _ in range(2):
        a, b = (x @ x.swapaxes(-1, -2) + np.eye(3) for x in rng.normal(size=(2, 3, 3)))
        factors.append((a.astype(np.float32), b.astype(np.float32)))
    rows = rng.normal(size=(2, 3, 3)).astype(np.float32)
    system = sum(np.kron(a.astype(float), b) for a, b in factors)
    right = sum(a.astype(float) @ x @ b for x, (a, b) in zip(rows, factors, strict=True))
    wanted = np.linalg.solve(system, right.ravel()).reshape(3, 3)
    scale = np.float32(2.0**power)
    given = [average.Kronecker(jnp.asarray(a), jnp.asarray(b)) for a, b in factors]
    got = average.kronecker_mean([jnp.asarray(scale * x) for x in rows], given)
    assert got.converged
    np.testing.assert_allclose(np.asarray(got.weights) / scale, wanted, rtol=1e-4, atol=1e-5)


def test_nan_is_no_certified_kronecker_mean():
    sound, broken = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, {"w": jnp.eye(2), "b": jnp.ones(2)}
    factors = [{"w": average.Kronecker(jnp.eye(2), jnp.eye(2)), "b": None}] * 2
    for leaf in "wb":
        bad = broken | {leaf: jnp.nan * broken[leaf]}
        found = average.kronecker_mean([sound, bad], factors)
        assert jnp.isnan(found.weights[leaf]).all()
        assert jnp.isnan(found.residual)
        assert not found.converged

    def of(inputs):
        given = [average.Kronecker(inputs, jnp.eye(2))] * 2
        return average.kronecker_mean([sound["w"], broken["w"]], given)

    found = jax.jit(of)(jnp.diag(jnp.array([1.0, -1.0])))
    assert jnp.isnan(found.weights).all()
    assert not found.converged


def test_bad_factors_are_refused_and_nan_where_traced(refuses):
    xs = [{"w": jnp.ones((2, 1))}, {"w": jnp.zeros((2, 1))}]

    def both(inputs, outputs=None):
        return [{"w": average.Kronecker(inputs, jnp.eye(1) if outputs is None else outputs)}] * 2

    with refuses(TypeError, match=r"factors\[0\] at leaf \['w'\] .* give an average.Kronecker"):
        average.kronecker_mean(xs, [{"w": jnp.eye(2)}] * 2)
    with refuses(ValueError, match=r"outputs of factors\[0\] .* outputs and must be \(1, 1\)"):
        average.kronecker_mean(xs, both(jnp.eye(2), jnp.eye(2)))
    with refuses(ValueError, match=r"at leaf \['w'\] is None, where others have something"):
        average.kronecker_mean(xs, [both(jnp.eye(2))[0], {"w": None}])
    for name in ("ridge", "rtol"):
        with refuses(ValueError, match=f"{name} must be .*, got -1.0"):
            average.kronecker_mean(xs, both(jnp.eye(2)), **{name: -1.0})
        traced = kronecker_mean(xs, both(jnp.eye(2)), **{name: jnp.asarray(-1.0)})
        assert is_nan(traced.weights)
        assert not traced.converged
    for bad, words in (
        (jnp.asarray([[1.0, 1.0], [0.0, 1.0]]), "is not symmetric or not finite"),
        (jnp.full((2, 2), jnp.nan), "is not symmetric or not finite"),
        (jnp.diag(jnp.asarray([1.0, -1.0])), "has the eigenvalue -.* positive semidefinite"),
    ):
        with refuses(ValueError, match=words):
            average.kronecker_mean(xs, both(bad))
        assert is_nan(kronecker_mean(xs, both(bad)).weights)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_points_and_fishers_are_widened(dtype):
    xs = [jnp.asarray([1.0, 2.0], dtype), jnp.asarray([3.0, 5.0], dtype)]
    fishers = [jnp.asarray([1.0, 3.0], dtype), jnp.asarray([1.0, 1.0], dtype)]
    got = average.fisher_mean(xs, fishers)
    wanted = average.fisher_mean([tree.upcast(x) for x in xs], fishers)
    assert_close(got, wanted.astype(dtype), units=0)
