"""Laws of averages of a stream of weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import is_nan
from tests.strategies import FLOAT
from wspace import average
from wspace.testing import assert_close, coefficients, like, points, size, vector
from wspace.testing.comparison import eps

pytestmark = pytest.mark.exact

RUNNING, WINDOW = average.running_mean(), average.window(2)
COUNTS = st.integers(1, 5)


def warming(step):
    return jnp.minimum(0.9999, (1 + step) / (10 + step))


MOVING = {
    "0": (average.ema(0.0), lambda _: 0.0),
    "0.75": (average.ema(0.75), lambda _: 0.75),
    "0.9999": (average.ema(0.9999), lambda _: 0.9999),
    "warming": (average.ema(warming), lambda t: min(0.9999, t / (9 + t))),
    "power 0": (average.power_ema(0.0), lambda t: (1 - 1 / t) ** 1.0),
    "power 7": (average.power_ema(7.0), lambda t: (1 - 1 / t) ** 8.0),
}


def jitted(run):
    return average.Average(run.init, jax.jit(run.update), jax.jit(run.value))


RUN = {name: jitted(run) for name, (run, _) in MOVING.items()}
FAST, LATEST = jitted(RUNNING), jitted(WINDOW)


def folded(run, xs, *more):
    state = run.init(xs[0])
    for row in zip(xs, *more, strict=True):
        state = run.update(state, *row)
    return run.value(state)


@functools.partial(jax.jit, static_argnums=0)
def scanned(run, stream, *more):
    def step(state, row):
        return run.update(state, *row), None

    start = run.init(jax.tree.map(lambda x: x[0], stream))
    return run.value(jax.lax.scan(step, start, (stream, *more))[0])


@given(data=st.data(), xs=COUNTS.flatmap(points))
def test_running_mean_is_the_mean_in_every_order(data, xs):
    c = data.draw(coefficients(len(xs)))
    total = sum(np.longdouble(c))
    wanted = like(sum(k * vector(x) for k, x in zip(c, xs, strict=True)) / total, xs[0])
    scale = sum(map(abs, c)) / abs(float(total)) * size(*xs)
    order = data.draw(st.permutations(range(len(xs))))
    for turn in (range(len(xs)), order):
        got = folded(FAST, [xs[i] for i in turn], [c[i] for i in turn])
        assert_close(got, wanted, units=4, scale=scale)


@given(xs=COUNTS.flatmap(points))
def test_a_member_is_taken_out_by_its_negative_coefficient(xs):
    others = folded(FAST, xs)
    back = folded(FAST, [*xs, xs[0], xs[0]], [1.0] * len(xs) + [2.0, -2.0])
    assert_close(back, others, units=4, scale=5 * size(*xs))


@given(xs=COUNTS.flatmap(points), name=st.sampled_from(sorted(MOVING)))
def test_moving_averages_have_their_coefficients_whose_sum_is_one(xs, name):
    decay = MOVING[name][1]
    total, mass = 0 * vector(xs[0]), np.longdouble(0)
    for t, x in enumerate(xs, 1):
        b = np.longdouble(decay(t))
        total, mass = b * total + (1 - b) * vector(x), b * mass + (1 - b)
    got = folded(RUN[name], xs)
    assert_close(got, like(total / mass, xs[0]), units=8, scale=size(*xs))
    same = folded(RUN[name], [xs[-1]] * 3)
    assert_close(same, xs[-1], units=2)


@given(xs=st.integers(2, 5).flatmap(points))
def test_without_correction_the_start_counts_too(xs):
    moving = average.ema(0.75, debias=False)
    assert_close(moving.value(moving.init(xs[0])), xs[0], units=0)
    total = vector(xs[0])
    state = moving.init(xs[0])
    for x in xs[1:]:
        total, state = 0.75 * total + 0.25 * vector(x), UNCORRECTED(state, x)
    assert_close(moving.value(state), like(total, xs[0]), units=8, scale=size(*xs))


UNCORRECTED = jax.jit(average.ema(0.75, debias=False).update)


@given(xs=COUNTS.flatmap(points))
def test_window_is_the_mean_of_the_latest(xs):
    latest = xs[-2:]
    wanted = like(sum(map(vector, latest)) / len(latest), xs[0])
    assert_close(folded(LATEST, xs), wanted, units=4, scale=size(*latest))
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), xs[0])
    assert_close(folded(LATEST, [broken, broken, *latest, *latest]), wanted, scale=size(*latest))


STRIDED, LATE = jitted(average.window(2, every=2)), jitted(average.running_mean(start=2))


@given(xs=COUNTS.flatmap(points))
def test_a_window_of_every_second_is_that_of_the_subsampled_run(xs):
    wanted = folded(LATEST, xs[1::2] or xs)
    assert_close(folded(STRIDED, xs), wanted, units=0)
    if len(xs) > 3:
        broken = [jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), x) for x in xs]
        mixed = [x if i % 2 else y for i, (x, y) in enumerate(zip(xs, broken, strict=True))]
        assert_close(folded(STRIDED, mixed), wanted, units=0)


@given(data=st.data(), xs=st.integers(3, 5).flatmap(points))
def test_a_mean_that_starts_late_is_that_of_the_tail(data, xs):
    c = data.draw(coefficients(len(xs)))
    wanted = folded(FAST, xs[2:], c[2:])
    assert_close(folded(LATE, xs, c), wanted, units=0)
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), xs[0])
    assert_close(folded(LATE, [broken, broken, *xs[2:]], c), wanted, units=0)
    for count in (1, 2):
        assert_close(folded(LATE, xs[:count], c[:count]), xs[count - 1], units=0)


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("every", [1, 4])
def test_a_run_in_a_scan_is_averaged_as_it_is_read_by_hand(length, every):
    xs = np.random.default_rng(0).normal(size=23)
    lawa, swa = average.window(length, every=every), average.running_mean(start=every)

    def step(states, x):
        states = [run.update(state, x) for run, state in zip((lawa, swa), states, strict=True)]
        return states, [run.value(state) for run, state in zip((lawa, swa), states, strict=True)]

    starts = [run.init(jnp.zeros((), FLOAT)) for run in (lawa, swa)]
    got = jax.jit(jax.vmap(lambda rows: jax.lax.scan(step, starts, rows)[1]))(
        jnp.asarray(np.stack([xs, -xs]), FLOAT)
    )
    for t in range(1, len(xs) + 1):
        kept = xs[every - 1 : t : every][-length:] if t >= every else xs[t - 1 : t]
        tail = xs[every:t] if t > every else xs[t - 1 : t]
        for found, wanted in zip(got, (kept.mean(), tail.mean()), strict=True):
            rows = [wanted, -wanted]
            np.testing.assert_allclose(found[:, t - 1], rows, rtol=0, atol=16 * eps(found))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_small_weights_are_not_lost_beside_a_large_one(dtype):
    count = 1000
    stream = jnp.asarray([2.0**27] + [1.0] * count + [2.0**27], dtype)
    signs = jnp.asarray([1.0] * (count + 1) + [-1.0], jnp.float32)
    assert scanned(RUNNING, stream, signs) == jnp.asarray(1.0, dtype)  # count / count
    eager = folded(FAST, [*stream[:20], stream[-1]], [1.0] * 20 + [-1.0])
    assert eager == jnp.asarray(1.0, dtype)

    def add(total, row):
        return total + row[0] * row[1], None

    naive = jax.lax.scan(add, jnp.float32(0), (stream.astype(jnp.float32), signs))[0]
    assert naive == 0


def test_a_decay_next_to_one_loses_no_digits():
    rate, count = 1e-5, 20_000
    rng = np.random.default_rng(0)
    xs = np.float32(100 + rng.normal(size=count))
    exact = (1 - rate) ** np.arange(count - 1.0, -1, -1)
    wanted = exact @ xs.astype(float) / exact.sum()
    got = scanned(average.ema(1 - rate), jnp.asarray(xs))
    assert abs(float(got) - wanted) < 4 * 100 * eps(got)

    def naive(state, x):
        total, product, n = state
        b = jnp.float32(1 - rate)
        return (b * total + (1 - b) * x, b * product, n + 1), None

    (total, product, _), _ = jax.lax.scan(
        naive, (jnp.float32(0), jnp.float32(1), jnp.int32(0)), jnp.asarray(xs)
    )
    assert abs(float(total / (1 - product)) - wanted) > 100 * 100 * eps(got)  # rounded on the way
    assert abs(float(total) - wanted) > 50  # and without the correction


def test_power_averages_of_many_steps_have_the_masses_of_their_profile():
    exponent, count = 6.94, 3000
    xs = np.sin(np.arange(count) / 100)
    edges = (np.arange(count + 1) / count) ** (exponent + 1)
    got = scanned(average.power_ema(exponent), jnp.asarray(xs, FLOAT))
    np.testing.assert_allclose(got, np.diff(edges) @ xs, rtol=0, atol=64 * eps(got))


def test_the_debiased_average_is_that_of_the_gradient_transformation():
    xs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    other = optax.ema(0.9)
    state = other.init(jnp.zeros(3))
    for x in xs:
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
            wanted, state = other.update(jnp.asarray(x), state)
    got = folded(average.ema(0.9), [jnp.asarray(x) for x in xs])
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


AVERAGES = {
    "running_mean": RUNNING,
    "ema": MOVING["0.75"][0],
    "power_ema": MOVING["power 7"][0],
    "window": WINDOW,
    "window of every second": average.window(2, every=2),
    "running_mean of the tail": average.running_mean(start=1),
}
each_average = pytest.mark.parametrize("run", AVERAGES.values(), ids=AVERAGES)


@each_average
def test_every_average_follows_one_contract(run, refuses):
    xs = [{"w": jnp.full((4, 2), k, jnp.bfloat16), "b": jnp.float32(k)} for k in (1.0, 2.0, 4.0)]
    empty = run.init(xs[0])
    with refuses(ValueError, match="the state has seen no weights: update it before its value"):
        run.value(empty)
    assert is_nan(jax.jit(run.value)(empty))
    state = run.update(empty, xs[0])
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, empty)
    assert_close(run.value(state), xs[0], units=0)
    stream = jax.tree.map(lambda *leaves: jnp.stack(leaves), *xs)
    assert_close(scanned(run, stream), folded(run, xs), units=4)
    moved = [jax.tree.map(lambda x: x + jnp.asarray(3, x.dtype), x) for x in xs]
    wanted = jax.tree.map(lambda x: x + jnp.asarray(3, x.dtype), folded(run, xs))
    assert_close(folded(run, moved), wanted, units=2)
    with refuses(ValueError, match=r"leaf \['b'\] has shape \(\) in state, \(1,\) in weights"):
        run.update(state, xs[0] | {"b": jnp.ones(1)})
    with refuses(TypeError, match=r"leaf \['b'\] of weights has dtype int32"):
        run.update(state, xs[0] | {"b": jnp.int32(1)})


@each_average
def test_states_stay_where_the_weights_are(run):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        xs = [jax.device_put(jnp.full((8, 2), k, jnp.float32), jax.P("x")) for k in (1.0, 2.0)]
        state = run.init(xs[0])
        for update in (run.update, jax.jit(run.update)):
            new = update(update(state, xs[0]), xs[1])
            assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
            assert jax.typeof(run.value(new)) == jax.typeof(xs[0])


def test_coefficients_that_cancel_and_bad_arguments_are_refused(refuses):
    x = jnp.ones(2)
    state = RUNNING.update(RUNNING.update(RUNNING.init(x), x), x, -1.0)
    with refuses(ValueError, match="coefficients of 2 weights sum to 0, nothing beside .* size 2"):
        RUNNING.value(state)
    assert is_nan(FAST.value(state))
    nothing = RUNNING.update(RUNNING.init(x), x, 0.0)
    with refuses(ValueError, match="coefficients of 1 weights sum to 0"):
        RUNNING.value(nothing)
    assert is_nan(FAST.value(nothing))
    with refuses(ValueError, match="coefficient must be finite, got nan"):
        RUNNING.update(state, x, np.nan)
    for bad in (1.0, -0.1):
        with refuses(ValueError, match=r"decay must be in \[0, 1\), or a function of the step"):
            average.ema(bad)
    with refuses(ValueError, match="exponent must be finite and at least 0"):
        average.power_ema(-1.0)
    with refuses(ValueError, match="length must be at least 1"):
        average.window(0)
    with refuses(TypeError, match="length must be a plain integer"):
        average.window(2.0)
    with refuses(ValueError, match="every must be at least 1"):
        average.window(2, every=0)
    with refuses(TypeError, match="every must be a plain integer"):
        average.window(2, every=0.5)
    with refuses(ValueError, match="start must be at least 0, got -1"):
        average.running_mean(start=-1)
    late = average.running_mean(start=1)
    state = late.update(late.update(late.init(x), x, 0.0), x, 0.0)
    with refuses(ValueError, match="coefficients of 1 weights sum to 0"):
        late.value(state)
    traced = jax.jit(lambda d: folded(average.ema(d), [x, 2 * x]))
    assert is_nan(traced(1.0))
    assert_close(traced(0.5), jnp.full(2, 5 / 3, FLOAT), units=4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_decay_in_half_precision_is_taken_from_one_in_single(dtype):
    decay = dtype(0.9)

    def after_two(decay):
        moving = average.ema(decay)
        state = moving.update(moving.init(jnp.zeros(1)), jnp.ones(1))
        return moving.value(moving.update(state, 3 * jnp.ones(1)))

    beta = float(decay)
    wanted = (beta + 3) / (beta + 1)
    for known in (decay, lambda _: decay):
        np.testing.assert_allclose(after_two(known), wanted, rtol=1e-6)
    for traced in (after_two, lambda decay: after_two(lambda _: decay)):
        np.testing.assert_allclose(jax.jit(traced)(decay), wanted, rtol=1e-6)


def test_coefficients_whose_sum_overflows_are_refused(refuses):
    running = average.running_mean()
    state = running.init(jnp.zeros(1, jnp.float32))
    for _ in range(2):
        state = running.update(state, jnp.full(1, 0.1, jnp.float32), 2e38)
    with refuses(ValueError, match="sum to inf, out of the range of float32"):
        running.value(state)
    assert jnp.isnan(jax.jit(running.value)(state)).all()


def test_a_window_in_half_precision_is_summed_in_single():
    latest = average.window(2)
    state = latest.init(jnp.zeros(1, jnp.float16))
    for x in (40_000, 60_032):
        state = latest.update(state, jnp.array([x], jnp.float16))
    assert latest.value(state).item() == 50_016


def test_wider_weights_are_averaged_in_the_arithmetic_of_the_state():
    """Else what float32 rounds would be lost, as the errors kept would be those of float64."""
    running = average.running_mean()
    with jax.enable_x64(True):
        state = running.init(jnp.zeros(1, jnp.float32))
        for x in (1.0, *[2.0**-24] * 64):
            state = running.update(state, jnp.array([x], jnp.float64))
        got = running.value(state)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, (1 + 64 * 2.0**-24) / 65, rtol=2e-7)
