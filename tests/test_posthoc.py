"""Laws of averages chosen after the run."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import integrate

from tests.helpers import is_nan
from tests.strategies import FLOAT
from wspace import average
from wspace.average import Profile
from wspace.average.posthoc import _inner, _masses
from wspace.testing import assert_close

EXPONENTS = st.sampled_from([0.0, 0.5, 1.0, 6.94, 16.97])
STEPS = 400
RUN = np.cumsum(np.random.default_rng(0).normal(size=(STEPS, 3)), 0) / 10


@st.composite
def profiles(draw):
    start = draw(st.sampled_from([0.0, 0.0, 0.0, 3.0, 4.5, 7.0]))
    length = draw(st.sampled_from([1.0, 2.5, 6.0]))
    return Profile(start + length, draw(EXPONENTS), start)


def density(p, tau):
    """By the formula of the docstring."""
    n = p.exponent + 1
    inside = (p.start <= tau) & (tau <= p.stop)
    return inside * n * tau**p.exponent / (p.stop**n - p.start**n)


def masses(profile, steps=STEPS):
    """The coefficients of the updates, from the difference of powers."""
    edges = np.clip(np.arange(steps + 1.0), profile.start, profile.stop) ** (profile.exponent + 1)
    return np.diff(edges) / (edges[-1] - edges[0])


def snapshots(profiles, run=RUN, dtype=FLOAT):
    """What averages of these profiles hold, by direct summation in float64."""
    return [{"w": jnp.asarray(masses(p, len(run)) @ run, dtype)} for p in profiles]


def kept(times, exponents=(16.97, 6.94)):
    return [Profile(float(t), g) for t in times for g in exponents]


@given(p=profiles(), q=profiles())
def test_inner_products_and_masses_are_the_integrals(p, q):
    low, high = max(p.start, q.start), min(p.stop, q.stop)
    wanted = 0.0
    if low < high:
        wanted = integrate.quad(
            lambda t: density(p, t) * density(q, t), low, high, epsabs=1e-13, epsrel=1e-11
        )[0]
    np.testing.assert_allclose(_inner(p, q), wanted, rtol=1e-9, atol=1e-12)
    steps = np.array(
        [
            integrate.quad(lambda t: density(p, t), max(i, p.start), min(i + 1, p.stop))[0]
            if max(i, p.start) < min(i + 1, p.stop)
            else 0.0
            for i in range(14)
        ]
    )
    np.testing.assert_allclose(_masses(p, 14), steps, rtol=1e-8, atol=1e-10)
    row = np.arange(5.0)
    np.testing.assert_allclose(_inner(p, row), _masses(p, 14)[:5] @ row, rtol=1e-12)
    assert _inner(row, p) == _inner(p, row)
    assert _inner(row, np.ones(3)) == 3
    scaled = [Profile(1e6 * f.stop, f.exponent, 1e6 * f.start) for f in (p, q)]
    np.testing.assert_allclose(1e6 * _inner(*scaled), _inner(p, q), rtol=1e-9, atol=1e-12)


@given(exponent=st.floats(0, 1e4), other=st.floats(0, 1e4))
def test_width_and_exponent_are_inverse_and_fall(exponent, other):
    width = average.width_of(exponent)
    np.testing.assert_allclose(average.exponent_of(width), exponent, rtol=1e-8, atol=1e-12)
    if exponent < 20:
        moments = [
            integrate.quad(lambda t, k=k: (exponent + 1) * t ** (exponent + k), 0, 1)[0]
            for k in (1, 2)
        ]
        np.testing.assert_allclose(width**2, moments[1] - moments[0] ** 2, rtol=1e-6)
    if other > exponent * (1 + 1e-12):
        assert average.width_of(other) <= width
    assert average.exponent_of(1 / math.sqrt(12)) == pytest.approx(0, abs=1e-14)


@given(stop=st.sampled_from([400.0, 350.0]), exponent=st.sampled_from([8.0, 10.0, 15.0]))
def test_error_falls_with_the_number_of_snapshots_and_is_bounded_by_the_residual(stop, exponent):
    wanted = Profile(stop, exponent)
    exact = masses(wanted) @ RUN
    spread = np.linalg.norm(RUN - RUN.mean(0))
    size = math.sqrt(_inner(wanted, wanted))
    errors, residuals = [], []
    for count in (2, 8, 32):
        profiles = kept(np.linspace(STEPS / count, STEPS, count))
        found = average.reconstruct(snapshots(profiles), profiles, wanted)
        error = np.linalg.norm(np.asarray(found.weights["w"], float) - exact)
        rounding = 1e-6 * np.abs(found.coefficients).sum() * np.abs(RUN).max()
        assert error <= size * found.residual * spread + rounding
        assert sum(found.coefficients) == pytest.approx(1, abs=1e-9)
        errors.append(error)
        residuals.append(found.residual)
    assert residuals[-1] < 0.05 * residuals[0]
    assert errors[-1] < 0.01 * errors[0]


@given(index=st.integers(0, 7))
def test_a_snapshot_reconstructs_itself(index):
    profiles = kept(np.linspace(STEPS / 4, STEPS, 4))
    points = snapshots(profiles)
    found = average.reconstruct(points, profiles, profiles[index])
    scale = np.abs(found.coefficients).sum() * np.abs(RUN).max()
    assert_close(found.weights, points[index], units=16, scale=scale)
    np.testing.assert_allclose(found.coefficients, np.arange(8) == index, atol=1e-7)
    assert found.residual < 1e-6


@given(data=st.data())
def test_coefficients_are_the_least_squares_under_the_sum(data):
    rows = [data.draw(st.lists(st.integers(-2, 4), min_size=n, max_size=n)) for n in (3, 5, 6, 6)]
    rows = [np.array(row, float) for row in rows]
    assume(all(abs(row.sum()) > 0.1 * np.abs(row).sum() for row in rows))
    table = np.array([np.pad(row / row.sum(), (0, 6 - len(row))) for row in rows])
    columns, target = table[:-1].T, table[-1]
    assume(np.linalg.cond(columns) < 1e3)
    points = [jnp.asarray(row, FLOAT) for row in np.eye(3)]
    found = average.reconstruct(points, [list(rows[0]), *rows[1:-1]], rows[-1])
    # Without the constraint: x = (1 - a - b, a, b).
    free = columns[:, 1:] - columns[:, :1]
    part = np.linalg.lstsq(free, target - columns[:, 0])[0]
    x = np.array([1 - part.sum(), *part])
    np.testing.assert_allclose(found.coefficients, x, rtol=0, atol=1e-8 * np.abs(x).sum())
    size = np.linalg.norm(target)
    wanted = np.linalg.norm(columns @ x - target) / size
    np.testing.assert_allclose(found.residual, wanted, rtol=1e-6, atol=1e-6)
    unit = columns / np.linalg.norm(columns, axis=0)
    np.testing.assert_allclose(found.condition, np.linalg.cond(unit), rtol=1e-6)
    np.testing.assert_allclose(found.weights, x, rtol=0, atol=1e-6 * np.abs(x).sum())


def test_streams_have_the_profiles_that_are_said():
    stream = [jnp.asarray(x, FLOAT) for x in RUN[:12]]
    runs = {
        average.running_mean(): Profile(12),
        average.power_ema(6.94): Profile(12, 6.94),
        average.window(5): Profile(12, start=7),
        average.window(1): Profile(12, start=11),
        average.ema(0.75): 0.75 ** np.arange(11.0, -1, -1),
    }
    points = []
    for run in runs:
        update, state = jax.jit(run.update), run.init(stream[0])
        for x in stream:
            state = update(state, x)
        points.append(run.value(state))
    for point, profile in zip(points, runs.values(), strict=True):
        row = masses(profile, 12) if isinstance(profile, Profile) else profile / profile.sum()
        assert_close(point, jnp.asarray(row @ RUN[:12], FLOAT), units=64)
    # The mean of the updates that a window leaves out, from what was kept.
    found = average.reconstruct(points, list(runs.values()), Profile(7))
    wanted = jnp.asarray(RUN[:7].mean(0), FLOAT)
    assert_close(found.weights, wanted, units=1e3 if jnp.float32 == FLOAT else 1e9)
    assert found.residual < 1e-6


def test_half_precision_snapshots_give_fewer_digits_not_noise():
    profiles = [Profile(STEPS, g) for g in (6.0, 6.5, 7.0, 7.5, 8.0)]
    points, wanted = snapshots(profiles, RUN + 5, jnp.float16), Profile(STEPS, 10.0)
    exact = masses(wanted) @ (RUN + 5)
    found = average.reconstruct(points, profiles, wanted)
    assert found.weights["w"].dtype == jnp.float16
    error = np.abs(np.asarray(found.weights["w"], float) - exact).max()
    # Solved to the last digit of the profiles, what is left is the rounding of the snapshots.
    x = np.linalg.lstsq(np.array([masses(p) for p in profiles]).T, masses(wanted))[0]
    naive = np.abs(x @ np.array([p["w"] for p in points], float) - exact).max()
    assert 20 * error < naive
    assert found.condition > 1 / float(jnp.finfo(jnp.float16).eps)
    assert found.residual < 0.01


def test_degenerate_snapshots_and_the_certificate():
    one = average.reconstruct([jnp.ones(2)], [Profile(3, 1.0)], Profile(5, 2.0))
    assert_close(one.weights, jnp.ones(2), units=2)
    assert one.condition == 1
    square = _inner(Profile(3, 1.0), Profile(3, 1.0)), _inner(Profile(5, 2.0), Profile(5, 2.0))
    cross = _inner(Profile(3, 1.0), Profile(5, 2.0))
    wanted = math.sqrt((square[0] + square[1] - 2 * cross) / square[1])
    np.testing.assert_allclose(one.residual, wanted, rtol=1e-9)
    p = Profile(4, 2.0)
    twice = average.reconstruct([jnp.ones(2), jnp.ones(2)], [p, p], p)
    np.testing.assert_allclose(twice.coefficients, [0.5, 0.5], rtol=1e-12)
    assert twice.condition > 1e7
    apart = average.reconstruct(
        [jnp.zeros(2), jnp.ones(2)], [p, Profile(9, start=8)], Profile(9, start=5)
    )
    np.testing.assert_allclose(sum(apart.coefficients), 1, rtol=1e-12)
    pair = [Profile(100), Profile(200)]
    jitted = jax.jit(lambda x, y: average.reconstruct([x, y], pair, Profile(200, start=100)))
    found = jitted(jnp.ones(2), jnp.full(2, 2.0))
    np.testing.assert_allclose(found.weights, 3, rtol=1e-6)
    assert is_nan(jitted(jnp.full(2, jnp.nan), jnp.ones(2)).weights)


def test_bad_profiles_are_refused(refuses):
    x = jnp.ones(2)
    cases = {
        "profiles\\[0\\].stop must be finite and above the start 3": Profile(3, start=3),
        "profiles\\[0\\].start must be finite and at least 0": Profile(3, start=-1),
        "profiles\\[0\\].exponent must be finite and at least 0": Profile(3, -1.0),
        "profiles\\[0\\] must be a Profile or one finite coefficient": [1.0, math.nan],
        "profiles\\[0\\] sums to 0, nothing beside its size 2": [1.0, -1.0],
    }
    for message, profile in cases.items():
        with refuses(ValueError, match=message):
            average.reconstruct([x], [profile], Profile(3))
    with refuses(ValueError, match="profiles has 2 for 1 points"):
        average.reconstruct([x], [Profile(3)] * 2, Profile(3))
    with refuses(TypeError, match="target.stop is computed with on the host, so it must be known"):
        jax.jit(lambda t: average.reconstruct([x], [Profile(3)], Profile(t)))(3.0)
    with refuses(TypeError, match="target is computed with on the host"):
        jax.jit(lambda t: average.reconstruct([x], [Profile(3)], t))(jnp.ones(3))
    for bad in (0.0, 0.3, math.nan):
        with refuses(ValueError, match=r"width must be above 0 and at most 1/sqrt\(12\)"):
            average.exponent_of(bad)
    with refuses(ValueError, match="exponent must be finite and at least 0"):
        average.width_of(-0.1)


@pytest.mark.parametrize("width", [0.1, 1e-8, 1e-150, 1e-307])
def test_the_exponent_of_a_small_width_is_its_inverse(width):
    np.testing.assert_allclose(average.width_of(average.exponent_of(width)), width, rtol=1e-12)


def test_of_coefficients_of_updates_only_ratios_matter(refuses):
    points = [jnp.array([1.0]), jnp.array([3.0])]
    for size in (1.0, 1e308, 1e-308):
        found = average.reconstruct(points, [[size], [size, size]], [size, 3 * (size / 2)])
        np.testing.assert_allclose(found.coefficients, [-0.2, 1.2], rtol=1e-12)
    for bad in ("12", {0: 1.0, 1: 2.0}, {1.0, 2.0}, np.array([1, 2j])):
        with refuses(TypeError, match="target must"):
            average.reconstruct(points, [[1.0], [1.0, 1.0]], bad)
