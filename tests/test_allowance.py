"""Laws of `wspace.negative.allowance`: free_inputs and damped_inputs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.helpers import is_nan
from tests.strategies import FLOAT, UNIT
from wspace import negative


@given(seed=st.integers(0, 2**16), n=st.sampled_from([3, 6, 20]), rtol=st.sampled_from([1e-3, 0.3]))
def test_free_inputs_is_the_projector_onto_what_the_data_hardly_use(seed, n, rtol):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 6)) * 10.0 ** -np.arange(6)
    x = jnp.asarray(x @ np.linalg.qr(rng.normal(size=(6, 6)))[0], FLOAT)
    p = np.asarray(negative.free_inputs(x, rtol=rtol), np.float64)
    values, vectors = np.linalg.svd(np.asarray(x, np.float64))[1:]
    values = np.pad(values, (0, 6 - len(values)))
    assume(min(abs(values / values[0] / rtol - 1)) > 1e-2)
    free = vectors[values < rtol * values[0]]
    gaps = np.diff(values[::-1])[max(len(free) - 1, 0)] / values[0] if len(free) < 6 else 1
    np.testing.assert_array_equal(p, p.T)
    np.testing.assert_allclose(p @ p, p, atol=64 * UNIT)
    assert round(np.trace(p)) == len(free)
    np.testing.assert_allclose(p, free.T @ free, atol=256 * UNIT / gaps)
    edit = rng.normal(size=(6, 4))
    outputs = np.linalg.norm(np.asarray(x, np.float64) @ p @ edit)
    assert outputs <= (rtol + 64 * UNIT) * values[0] * np.linalg.norm(edit)


def test_degenerate_activations(refuses):
    np.testing.assert_array_equal(negative.free_inputs(jnp.zeros((3, 2)), rtol=0.1), np.eye(2))
    np.testing.assert_array_equal(negative.free_inputs(jnp.zeros((0, 2)), rtol=0.1), np.eye(2))
    for rtol in (0, 1, -0.1, 2.0, float("nan")):
        with refuses(ValueError, match="rtol must be between 0 and 1"):
            negative.free_inputs(jnp.ones((3, 2)), rtol=rtol)
    with refuses(ValueError, match=r"activations must be a matrix \(n, d\)"):
        negative.free_inputs(jnp.ones(3), rtol=0.1)
    with refuses(ValueError, match="of activations holds NaN"):
        negative.free_inputs(jnp.full((2, 2), jnp.nan), rtol=0.1)
    with refuses(TypeError, match="of activations has dtype int32"):
        negative.free_inputs(jnp.ones((2, 2), jnp.int32), rtol=0.1)
    assert is_nan(jax.jit(lambda t: negative.free_inputs(jnp.eye(2), rtol=t))(1.5))


def test_a_value_on_the_threshold_counts_as_used():
    x = jnp.diag(jnp.asarray([4.0, 2.0, 1.0], FLOAT))
    for rtol, free in ((0.5, [0, 0, 1]), (0.51, [0, 1, 1]), (0.25, [0, 0, 0])):
        np.testing.assert_allclose(negative.free_inputs(x, rtol=rtol), np.diag(free), atol=UNIT)


# What is a matrix to move in

POINT = {"w": jnp.zeros((3, 2), FLOAT)}
GOAL = {"w": jnp.ones((3, 2), FLOAT)}


def retargeted(metric):
    return negative.retarget([POINT], (1,), GOAL, allow=[{"w": metric}])


def test_asymmetry_and_negative_eigenvalues_are_refused_beyond_rounding_alone(refuses):
    eye = jnp.eye(3, dtype=FLOAT)
    for times, bad in ((16, False), (256, True)):
        skew = eye.at[0, 1].set(times * UNIT)
        if bad:
            with refuses(ValueError, match="is not symmetric, by"):
                retargeted(skew)
        else:
            np.testing.assert_allclose(retargeted(skew)[0]["w"], GOAL["w"], atol=64 * UNIT)
    goal = {"w": GOAL["w"].at[2].set(0)}
    for times, bad in ((16, False), (512, True)):
        least = eye.at[2, 2].set(-times * UNIT)
        if bad:
            with refuses(ValueError, match="has the eigenvalue -.* beside 1"):
                negative.retarget([POINT], (1,), goal, allow=[{"w": least}])
        else:
            (moved,) = negative.retarget([POINT], (1,), goal, allow=[{"w": least}])
            np.testing.assert_allclose(moved["w"], goal["w"], atol=64 * UNIT)


def test_a_matrix_of_half_precision_is_as_definite_as_its_own_rounding():
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 2)))[0]
    half = jnp.asarray(q @ q.T, jnp.bfloat16)
    least = np.linalg.eigvalsh(np.asarray(half, np.float64))[0]
    half = half if least < 0 else half - jnp.eye(3, dtype=jnp.bfloat16) / 128
    least = np.linalg.eigvalsh(np.asarray(half, np.float64))[0]
    assert least < -1e4 * np.finfo(np.float32).eps
    direction = {"w": jnp.asarray(q @ np.ones((2, 2)), FLOAT)}
    (moved,) = negative.exit_ball(
        [POINT], (1,), POINT, 1.0, direction=direction, allow=[{"w": half}]
    )
    np.testing.assert_allclose(np.linalg.norm(moved["w"]), 1.0, rtol=64 * UNIT)


def test_what_is_undefined_is_nan_where_traced():
    eye = jnp.eye(3, dtype=FLOAT)
    for bad in (-eye, eye.at[0, 1].set(1.0)):
        assert is_nan(jax.jit(retargeted)(bad))
    assert not is_nan(jax.jit(retargeted)(eye))


# damped_inputs


@given(
    seed=st.integers(0, 2**16),
    n=st.sampled_from([3, 6, 20]),
    damping=st.sampled_from([1e-4, 0.1, 10.0]),
)
def test_damped_inputs_is_the_inverse_of_the_metric(seed, n, damping):
    rng = np.random.default_rng(seed)
    given_x = jnp.asarray(rng.normal(size=(n, 6)) * 10.0 ** -np.arange(6) * 8, FLOAT)
    p = np.asarray(negative.damped_inputs(given_x, damping=damping), np.float64)
    x = np.asarray(given_x, np.float64)
    top = np.linalg.norm(x, 2)
    wanted = np.linalg.inv(np.eye(6) + x.T @ x / (damping * top**2))
    np.testing.assert_array_equal(p, p.T)
    np.testing.assert_allclose(p, wanted, atol=64 * UNIT)
    edit = rng.normal(size=(6, 4))
    size = top * np.linalg.norm(edit)
    assert np.linalg.norm(x @ p @ edit) <= (np.sqrt(damping) / 2 + 64 * UNIT) * size
    scaled = negative.damped_inputs(8 * given_x, damping=damping)
    np.testing.assert_allclose(scaled, p, atol=8 * UNIT)


def test_damping_goes_from_the_free_inputs_to_all_inputs(refuses):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)), FLOAT)
    spared = negative.damped_inputs(x, damping=1e-12)
    np.testing.assert_allclose(spared, negative.free_inputs(x, rtol=1e-3), atol=1e-4)
    np.testing.assert_allclose(negative.damped_inputs(x, damping=1e12), np.eye(6), atol=1e-6)
    for zero in (jnp.zeros((3, 2)), jnp.zeros((0, 2))):
        np.testing.assert_array_equal(negative.damped_inputs(zero, damping=0.1), np.eye(2))
    for damping in (0, -1.0, float("nan")):
        with refuses(ValueError, match="damping must be finite and positive"):
            negative.damped_inputs(x, damping=damping)
    with refuses(ValueError, match=r"activations must be a matrix \(n, d\)"):
        negative.damped_inputs(jnp.ones(3), damping=0.1)
    with refuses(ValueError, match="of activations holds NaN"):
        negative.damped_inputs(jnp.full((2, 2), jnp.nan), damping=0.1)
    assert is_nan(jax.jit(lambda d: negative.damped_inputs(jnp.eye(2), damping=d))(-1.0))


def test_less_damping_spares_the_data_more_and_moves_the_weights_more():
    # The curve of damage against margin: the same shift of the average, at several dampings.
    rng = np.random.default_rng(0)
    spectrum = np.diag(4.0 ** -np.arange(6))
    inputs = [rng.normal(size=(20, 6)) @ spectrum @ rng.normal(size=(6, 6)) for _ in "ac"]
    inputs = [x / np.linalg.norm(x, 2) for x in inputs]
    xs = [{"w": jnp.asarray(rng.normal(size=(6, 3)), FLOAT)} for _ in inputs]
    target = {"w": jnp.asarray(rng.normal(size=(6, 3)), FLOAT)}
    damage, moves = [], []
    for damping in (1e-3, 1e-2, 1e-1, 1.0, 1e3):
        metrics = [negative.damped_inputs(jnp.asarray(x, FLOAT), damping=damping) for x in inputs]
        allow = [{"w": p} for p in metrics]
        moved = negative.retarget(xs, (0.5, 0.5), target, allow=allow)
        edits = [np.asarray(y["w"] - x["w"], np.float64) for x, y in zip(xs, moved, strict=True)]
        seen = [np.linalg.norm(x @ e) ** 2 for x, e in zip(inputs, edits, strict=True)]
        damage.append(sum(seen))
        moves.append(sum(np.linalg.norm(e) ** 2 for e in edits))
    slack = 1 + 1e3 * UNIT
    assert all(a <= b * slack for a, b in itertools.pairwise(damage))
    assert all(a * slack >= b for a, b in itertools.pairwise(moves))
    assert damage[0] < 0.5 * damage[-1]


@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.parametrize("damping", [1e-2, 1e-6, 1e-9, 1e-30])
def test_damped_inputs_is_definite_and_accurate_at_every_damping(rank, damping):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, rank)) @ np.linalg.qr(rng.normal(size=(8, 8)))[0][:rank]
    x = jnp.asarray(x, FLOAT)
    p = negative.damped_inputs(x, damping=damping)
    values = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    share = np.where(np.arange(8) < rank, (values / values[0]) ** 2, 0)
    wanted = np.sort(damping / (share + damping))
    got = np.linalg.eigvalsh(np.asarray(p, np.float64))
    assert (got > 0).all()
    np.testing.assert_allclose(got, wanted, rtol=256 * UNIT, atol=64 * UNIT * wanted[-1])
    xs = [{"w": jnp.asarray(rng.normal(size=(8, 3)), FLOAT)} for _ in range(2)]
    goal = {"w": jnp.asarray(rng.normal(size=(8, 3)), FLOAT)}
    moved = negative.retarget(xs, (0.5, 0.5), goal, allow=[{"w": p}] * 2)
    mean = (np.asarray(moved[0]["w"], np.float64) + np.asarray(moved[1]["w"], np.float64)) / 2
    sizes = sum(np.linalg.norm(np.asarray(y["w"], np.float64)) for y in (*xs, *moved, goal))
    assert np.linalg.norm(mean - np.asarray(goal["w"], np.float64)) <= 64 * UNIT * sizes


def test_a_large_matrix_is_no_less_definite():
    for rows, least in ((512, -1e-3), (512, -1e-6)):
        p = jnp.eye(rows, dtype=jnp.float32).at[3, 3].set(least)
        x = {"w": jnp.ones((rows, 1), jnp.float32)}
        goal = {"w": x["w"].at[:3].set(2.0)}
        if least < -1e-4:
            with pytest.raises(ValueError, match=r"has the eigenvalue -0\.001 beside 1"):
                negative.retarget([x], (1,), goal, allow=[{"w": p}])
        else:
            negative.retarget([x], (1,), goal, allow=[{"w": p}])


@pytest.mark.parametrize("damping", [1e-30, 1e-60])
def test_a_damping_that_vanishes_frees_what_the_data_do_not_use(damping):
    got = negative.damped_inputs(jnp.array([[3.0, 0.0], [1.0, 0.0]], FLOAT), damping=damping)
    np.testing.assert_allclose(got, [[0, 0], [0, 1]], atol=16 * UNIT)
