"""Laws of `wspace.fit.training`: adapt, its history, and what becomes of runs that diverge.

One loss, optimizer and number of steps share a compilation, so all three are made once, here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import is_nan
from tests.strategies import FLOAT, UNIT
from wspace import fit, tree
from wspace.testing import assert_close, size, vector, weights

pytestmark = pytest.mark.trains

CLOSE = 1e-8 if np.dtype(FLOAT) == np.float64 else 1e-4
LAYOUT = {"w": (4, 3), "b": (3,)}
MIXED = {"w": (4, 3), "b": (3,), "s": (2, 3, 2), "c": ()}
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
INPUTS = np.linalg.qr(RNG.normal(size=(8, 4)))[0] * np.array([1.0, 2.0, 1.5, 0.5])
OUTPUTS = RNG.normal(size=(8, 3))
X, Y = jnp.asarray(INPUTS, FLOAT), jnp.asarray(OUTPUTS, FLOAT)
TARGET = jax.tree.map(
    lambda shape: jnp.asarray(RNG.normal(size=shape), FLOAT),
    MIXED,
    is_leaf=lambda x: isinstance(x, tuple),
)
ZERO = jax.tree.map(jnp.zeros_like, TARGET)


def regression(x):
    """Half the sum of squares of a linear model."""
    return jnp.sum((X @ x["w"] + x["b"][None] - Y) ** 2) / 2


def bowl(x):
    """Half the squared distance from `TARGET`."""
    gaps = [jnp.sum((a - b.astype(a.dtype)) ** 2) for a, b in _pairs(x)]
    return sum(gaps[1:], gaps[0]) / 2


def _pairs(x):
    return [(x[name], TARGET[name]) for name in sorted(x)]


def noisy(x, key):
    """A linear loss whose slope is drawn."""
    return jnp.sum(jax.random.normal(key, x.shape, x.dtype) * x)


def dice(x, key):
    """A loss that is its key's draw, whatever the weights."""
    return jax.random.uniform(key, (), x.dtype) + 0 * jnp.sum(x)


def scaled(x, scale=2.0):
    return scale * jnp.sum(x)


def cliff(x):
    """A slope of one in every entry that ends, in NaN, at zero."""
    return jnp.sum(x) + 0 * jnp.sum(jnp.log(x))


def bounded(x):
    """A loss that is finite even where the weights are not."""
    return jnp.sum(jnp.tanh(x))


SGD, SLOW, HALF = optax.sgd(0.2), optax.sgd(0.1), optax.sgd(0.5)
LBFGS = optax.lbfgs()
OPTIMIZERS = {
    "lbfgs": (LBFGS, 30),
    "sgd": (SGD, 500),
    "momentum": (optax.sgd(0.1, momentum=0.8), 500),
    "clipped": (optax.chain(optax.clip_by_global_norm(1.0), SGD), 500),
}


def solution():
    """The minimum of `regression` by numpy, biases last."""
    with_ones = np.hstack([INPUTS, np.ones((8, 1))])
    return np.linalg.lstsq(with_ones, OUTPUTS, rcond=None)[0]


def slope(x):
    """The gradient of `regression`, by numpy."""
    off = INPUTS @ x["w"] + x["b"] - OUTPUTS
    return {"w": INPUTS.T @ off, "b": off.sum(0)}


def wide(x):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), x)


@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=8)
@given(start=weights(LAYOUT))
def test_whole_training_reaches_the_minimum_and_its_gradient_vanishes(name, start):
    optimizer, steps = OPTIMIZERS[name]
    found, history = fit.adapt(KEY, regression, start, optimizer=optimizer, steps=steps)
    best, scale = solution(), CLOSE * (size(start) + 1)
    np.testing.assert_allclose(found["w"], best[:4], atol=scale)
    np.testing.assert_allclose(found["b"], best[4], atol=scale)
    off = np.hstack([INPUTS, np.ones((8, 1))]) @ best - OUTPUTS
    assert abs(float(history.loss[-1]) - np.sum(off**2) / 2) <= 64 * UNIT * np.sum(OUTPUTS**2)
    assert history.gradient[-1] <= 4 * scale
    assert int(history.steps) == steps


def test_adam_with_weight_decay_finds_the_minimum_of_the_sum():
    decay = 0.5  # decoupled: at rest the step of adam is that of the decay
    start = jax.tree.map(jnp.zeros_like, {name: TARGET[name] for name in LAYOUT})
    optimizer = optax.adamw(optax.cosine_decay_schedule(0.1, 300), weight_decay=0.0)
    found, _ = fit.adapt(KEY, regression, start, optimizer=optimizer, steps=300)
    optimizer = optax.adamw(0.1, weight_decay=decay)
    four = jnp.full(3, 4.0, FLOAT)
    pulled, history = fit.adapt(KEY, bounded, four, optimizer=optimizer, steps=3)
    np.testing.assert_allclose(found["w"], solution()[:4], atol=1e-2)
    np.testing.assert_allclose(found["b"], solution()[4], atol=1e-2)
    x, first, second = 4.0, 0.0, 0.0
    for t in range(1, 4):
        g = 1 - np.tanh(x) ** 2
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        step = first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        x -= 0.1 * (step + decay * x)
    np.testing.assert_allclose(pulled, np.full(3, x), rtol=1e-4)
    assert history.loss.shape == (4,)


@given(start=weights(LAYOUT))
def test_steps_and_history_are_those_of_a_loop(start):
    found, history = fit.adapt(KEY, regression, start, optimizer=SLOW, steps=5)
    x, losses, slopes = wide(start), [], []
    for _ in range(6):
        off = INPUTS @ x["w"] + x["b"] - OUTPUTS
        losses.append(np.sum(off**2) / 2)
        slopes.append(np.linalg.norm(vector(slope(x)).astype(np.float64)))
        last, x = x, jax.tree.map(lambda a, g: a - 0.1 * g, x, slope(x))
    # The first entry is of the start, the last of what is returned.
    scale = size(start) + size(Y)
    assert_close(found, jax.tree.map(lambda a: jnp.asarray(a, FLOAT), last), units=64, scale=scale)
    np.testing.assert_allclose(history.loss, losses, atol=256 * UNIT * scale**2)
    np.testing.assert_allclose(history.gradient, slopes, atol=256 * UNIT * scale)
    assert history.terms.shape == (6, 1)
    np.testing.assert_array_equal(history.terms[:, 0], history.loss)
    assert history.loss.dtype == history.gradient.dtype == FLOAT
    assert int(history.steps) == 5


@given(start=weights(MIXED))
@pytest.mark.parametrize("rank", [None, 1])
def test_without_steps_nothing_moves(rank, start):
    found, history = fit.adapt(KEY, bowl, start, rank=rank, optimizer=SLOW, steps=0)
    assert_close(found, start, units=0)
    wanted = np.sum((vector(start) - vector(TARGET)) ** 2) / 2
    np.testing.assert_allclose(history.loss, [float(wanted)], rtol=32 * UNIT)
    assert history.gradient.shape == (1,)
    assert int(history.steps) == 0


# Low rank


@pytest.mark.parametrize("rank", [1, 2])
@settings(max_examples=8)
@given(start=weights(MIXED, entries=st.floats(-1, 1, width=32)))
def test_through_rank_r_every_matrix_moves_by_rank_r_and_vectors_freely(rank, start):
    found, history = fit.adapt(KEY, bowl, start, rank=rank, optimizer=SLOW, steps=100)
    left = 0
    for name in ("w", "s"):
        a, b, t = (np.asarray(x[name], np.float64) for x in (start, found, TARGET))
        values = np.linalg.svd(b - a, compute_uv=False)
        assert (values[..., rank:] <= 8 * UNIT * size(start, found)).all()
        assert (values[..., 0] > 1e-2 * np.linalg.norm(t - a, axis=(-2, -1))).all()
        left += np.sum(np.linalg.svd(t - a, compute_uv=False)[..., rank:] ** 2) / 2
    # The loss is a sum over leaves: sgd brings a vector as near as it does alone.
    for name in ("b", "c"):
        a, t = (np.asarray(x[name], np.float64) for x in (start, TARGET))
        wanted = t + 0.9**100 * (a - t)
        np.testing.assert_allclose(found[name], wanted, atol=32 * UNIT * (size(start) + 2))
    assert history.loss[-1] < history.loss[0]
    assert history.loss[-1] >= left - 256 * UNIT * (size(start) + 2) ** 2


def test_the_term_reaches_the_best_one_of_its_rank():
    found, history = fit.adapt(KEY, bowl, ZERO, rank=1, optimizer=SGD, steps=1000)
    u, values, v = np.linalg.svd(np.asarray(TARGET["w"], np.float64))
    np.testing.assert_allclose(found["w"], values[0] * np.outer(u[:, 0], v[0]), atol=1e-3)
    rest = [np.linalg.svd(np.asarray(TARGET[k], np.float64), compute_uv=False) for k in ("w", "s")]
    least = sum(np.sum(s[..., 1:] ** 2) for s in rest) / 2
    np.testing.assert_allclose(history.loss[-1], least, rtol=1e-4)


def trace(x):
    return jnp.trace(x)


def test_the_factors_start_as_the_docstring_says():
    # The first step of sgd is -lr U U^T G, with G = I here, and E ||U||^2 = r.
    start, rank = jnp.zeros((64, 64), FLOAT), 4
    run = functools.partial(fit.adapt, rank=rank, optimizer=HALF, steps=1)
    moves = [np.asarray(run(jax.random.key(i), trace, start).weights) for i in range(2)]
    for move in moves:
        values = np.linalg.eigvalsh(np.asarray(-2 * move, np.float64))
        assert abs(values.sum() - rank) < 1.5  # four standard deviations
        assert (np.abs(values[:-rank]) < 64 * UNIT).all()
        assert (values[-rank:] > 0.3).all()
    assert np.abs(moves[0] - moves[1]).max() > 1e-2


# dtypes


@pytest.mark.parametrize("rank", [None, 1])
def test_half_precision_is_trained_in_float32_and_rounded_once(rank):
    def loss(x):
        assert {leaf.dtype for leaf in jax.tree.leaves(x)} == {jnp.dtype(jnp.float32)}
        return bowl(x)

    start = jax.tree.map(lambda x: (x / 3).astype(jnp.bfloat16), TARGET)
    start["b"] = start["b"].astype(jnp.float32)
    found, history = fit.adapt(KEY, loss, start, rank=rank, optimizer=SLOW, steps=7)
    whole, _ = fit.adapt(KEY, loss, tree.upcast(start), rank=rank, optimizer=SLOW, steps=7)
    assert_close(found, jax.tree.map(lambda x, y: x.astype(y.dtype), whole, start), units=0)
    assert history.loss.dtype == jnp.float32
    assert found["w"].dtype == jnp.bfloat16


def test_a_step_below_the_rounding_of_the_leaf_is_not_lost():
    # 1 + 2^-10 is 1 in bfloat16, a thousand times: the run keeps what a leaf could not.
    start, step = jnp.ones(3, jnp.bfloat16), optax.sgd(2.0**-10)
    found, _ = fit.adapt(KEY, summed, start, optimizer=step, steps=512)
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.full(3, 0.5))


def summed(x):
    return jnp.sum(x)


def test_numpy_weights_come_back_as_arrays():
    found, _ = fit.adapt(KEY, summed, np.ones(3, np.float32), optimizer=HALF, steps=1)
    assert isinstance(found, jax.Array)
    np.testing.assert_array_equal(found, np.full(3, 0.5))


# Keys


def test_a_loss_gets_a_new_key_at_every_step_and_one_for_its_value_and_gradient():
    x = jnp.zeros(3, FLOAT)
    rolls = fit.adapt(KEY, dice, x, keyed=True, optimizer=HALF, steps=20).history.loss
    assert len(set(np.asarray(rolls).tolist())) == 21
    found, history = fit.adapt(KEY, noisy, x, keyed=True, optimizer=HALF, steps=1)
    # One step of -1/2 g from zero: the slope drawn there is -2 x.
    np.testing.assert_allclose(history.gradient[0], 2 * np.linalg.norm(found), rtol=8 * UNIT)
    assert history.loss[0] == 0


@pytest.mark.parametrize("rank", [None, 1])
def test_one_key_is_one_run_bit_for_bit_and_another_is_another(rank):
    start = jnp.zeros((3, 2), FLOAT)
    runs = [
        fit.adapt(
            jax.random.key(seed), noisy, start, keyed=True, rank=rank, optimizer=HALF, steps=4
        )
        for seed in (5, 5, 6)
    ]
    assert_close(runs[0], runs[1], units=0)
    assert np.abs(np.asarray(runs[0].weights - runs[2].weights)).max() > 1e-3


@pytest.mark.parametrize(
    "loss",
    [
        scaled,
        functools.partial(lambda scale, x: scale * jnp.sum(x), 2.0),
        lambda x, *_, scale=2.0, **__: scale * jnp.sum(x),
        type("Loss", (), {"__call__": lambda _, x: 2 * jnp.sum(x)})(),
        jax.jit(scaled),
    ],
    ids=["default", "partial", "variadic", "object", "jitted"],
)
def test_a_loss_of_any_kind_is_called_with_the_weights_alone(loss):
    found, _ = fit.adapt(KEY, loss, jnp.zeros(3, FLOAT), optimizer=HALF, steps=1)
    np.testing.assert_array_equal(found, np.full(3, -1.0))


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, key, scale=1.0: scale * dice(x, key),
        functools.partial(lambda scale, x, key: scale * dice(x, key), 1.0),
        type("Loss", (), {"__call__": lambda _, x, key: dice(x, key)})(),
        jax.jit(dice),
    ],
    ids=["default", "partial", "object", "jitted"],
)
def test_a_keyed_loss_of_any_kind_gets_a_key(loss):
    x = jnp.zeros(3, FLOAT)
    _, history = fit.adapt(KEY, loss, x, keyed=True, optimizer=HALF, steps=2)
    wanted = fit.adapt(KEY, dice, x, keyed=True, optimizer=HALF, steps=2).history
    assert_close(history, wanted, units=0)


def test_a_loss_that_takes_anything_gets_a_key_only_if_it_is_said_to():
    seen, x = [], jnp.zeros(3, FLOAT)

    def loss(*given):
        seen.append(len(given))
        return jnp.sum(given[0])

    for keyed in (False, True):
        seen.clear()
        fit.adapt(KEY, loss, x, keyed=keyed, optimizer=HALF, steps=1)
        assert set(seen) == {1 + keyed}


@pytest.mark.parametrize(
    ("loss", "keyed", "words"),
    [
        (dice, False, r"loss is called with the weights alone: set keyed=True.*'key'"),
        (
            functools.partial(lambda a, x, key: a * dice(x, key), 1.0),
            False,
            "set keyed=True if it takes a key",
        ),
        (bounded, True, "loss is called with the weights and a key: leave out keyed=True.*many"),
    ],
)
def test_a_loss_that_takes_something_else_is_refused(loss, keyed, words):
    x = jnp.zeros(3, FLOAT)
    runs = [
        lambda: fit.adapt(KEY, loss, x, keyed=keyed, optimizer=HALF, steps=1),
        lambda: fit.invert(KEY, loss, x, keyed=keyed, optimizer=HALF, steps=1),
        lambda: fit.coefficients(KEY, loss, x, [x], keyed=keyed, optimizer=HALF, steps=1),
        lambda: fit.clipped(loss, 1.0, keyed=keyed),
        lambda: fit.ascent(loss, keyed=keyed),
    ]
    for run in runs:
        with pytest.raises(TypeError, match=words):
            run()
    for make, name in (
        (fit.entropy, "logits"),
        (functools.partial(fit.npo, reference=x, beta=1.0), "losses"),
    ):
        with pytest.raises(TypeError, match=words.replace("loss is", f"{name} is")):
            make(loss, keyed=keyed)
    guard = functools.partial(fit.guard, KEY, optimizer=HALF, steps=1, keyed=keyed)
    fine = dice if keyed else bounded
    with pytest.raises(TypeError, match=words.replace("loss is", r"losses\[1\] is")):
        guard([fine, loss], [x, x], (1.0, 1.0), fine)
    with pytest.raises(TypeError, match=words.replace("loss is", "away is")):
        guard([fine], [x], [1.0], loss)


def test_old_keys_are_keys():
    x = jnp.zeros(3, FLOAT)
    found = [
        fit.adapt(key, noisy, x, keyed=True, optimizer=HALF, steps=3)
        for key in (jax.random.PRNGKey(3), jax.random.key(3))
    ]
    assert_close(found[0], found[1], units=0)


@pytest.mark.parametrize("rank", [None, 1])
def test_no_key_is_used_twice(rank):
    start = jnp.ones((3, 2), FLOAT)
    with jax.debug_key_reuse(True):
        found = fit.adapt(
            jax.random.key(1), noisy, start, keyed=True, rank=rank, optimizer=HALF, steps=4
        )
    wanted = fit.adapt(
        jax.random.key(1), noisy, start, keyed=True, rank=rank, optimizer=HALF, steps=4
    )
    assert_close(found, wanted, units=0)


def _told(updates, state, params, *, value, grad, value_fn):
    off = value_fn(params) - value
    return jax.tree.map(lambda u, g: u - g + off, updates, grad), state


TOLD = optax.GradientTransformationExtraArgs(lambda _: (), _told)


@pytest.mark.parametrize("looked_for", [False, True])
def test_a_search_along_a_line_is_told_the_value_slope_and_batch_of_its_step(looked_for):
    start = jnp.ones(3, FLOAT)
    with jax.debug_key_reuse(looked_for):
        found, history = fit.adapt(
            jax.random.key(1), drawn, start, keyed=True, optimizer=TOLD, steps=3
        )
    assert_close(found, start, units=64)  # where nothing it was told is off, nothing moved
    assert len(set(np.asarray(history.loss).tolist())) == 4


def drawn(x, key):
    """Half the squared distance from a point that is drawn."""
    return jnp.sum((x - jax.random.normal(key, x.shape, x.dtype)) ** 2) / 2


def test_a_key_given_to_two_runs_is_refused_where_jax_looks_for_that():
    start, key = jnp.ones((3, 2), FLOAT), jax.random.key(1)
    with jax.debug_key_reuse(True):
        fit.adapt(key, noisy, start, keyed=True, optimizer=HALF, steps=4)
        with pytest.raises(jax.errors.KeyReuseError):
            fit.adapt(key, noisy, start, keyed=True, optimizer=HALF, steps=4)


# Transformations


def test_runs_are_compiled_and_batched_over_keys_and_starts():
    keys = jax.random.split(KEY, 2)
    starts = jnp.asarray(RNG.normal(size=(2, 4, 2)), FLOAT)

    def run(key, start):
        return fit.adapt(key, drawn, start, keyed=True, rank=1, optimizer=HALF, steps=5)

    batched = jax.jit(jax.vmap(run))(keys, starts)
    for i in range(2):
        one = run(keys[i], starts[i])
        assert_close(jax.tree.map(lambda x, i=i: x[i], batched), one, units=64)


@jax.jit
def towards(target, start):
    """Training on a loss that closes over what is traced."""

    def loss(x):
        return jnp.sum((x - target) ** 2) / 2

    return fit.adapt(KEY, loss, start, optimizer=SGD, steps=100).weights


@given(target=weights((3,)), start=weights((3,)))
def test_a_loss_may_close_over_what_is_traced(target, start):
    a, b = (np.asarray(x, np.float64) for x in (target, start))
    wanted = a + 0.8**100 * (b - a)
    np.testing.assert_allclose(towards(target, start), wanted, atol=16 * UNIT * size(target, start))


# Progress


@pytest.mark.parametrize(("steps", "told"), [(0, 1), (3, 4), (250, 126), (251, 127)])
def test_progress_is_told_in_order_about_a_hundred_times_from_start_to_end(steps, told):
    lines = []
    _, history = fit.adapt(
        KEY, summed, jnp.ones(3, FLOAT), optimizer=HALF, steps=steps,
        progress=lambda i, loss: lines.append((i, loss)),
    )  # fmt: skip
    where = [i for i, _ in lines]
    assert len(lines) == told
    assert where == sorted(set(where))
    assert (where[0], where[-1]) == (0, steps)
    assert {(type(i), type(loss)) for i, loss in lines} == {(int, float)}
    np.testing.assert_array_equal([loss for _, loss in lines], np.asarray(history.loss)[where])


# Divergence: x = 2.25, 1.75, 1.25, 0.75, 0.25 and then -0.25, where `cliff` is NaN


@pytest.mark.parametrize("steps", [5, 9])
def test_a_run_that_diverges_says_where_and_returns_what_was_before(steps, pytestconfig):
    start = jnp.asarray([2.25, 9.0], FLOAT)
    with pytest.warns(RuntimeWarning, match=rf"step 5 of {steps} led to where") as record:
        found, history = fit.adapt(KEY, cliff, start, optimizer=HALF, steps=steps)
    if not pytestconfig.getoption("jaxtyping_packages"):  # which puts itself between
        assert record[0].filename == __file__
    np.testing.assert_array_equal(found, [0.25, 7.0])
    assert int(history.steps) == 4
    np.testing.assert_array_equal(history.loss[:5], 11.25 - np.arange(5.0))
    np.testing.assert_allclose(history.gradient[:5], np.sqrt(2), rtol=8 * UNIT)
    assert history.loss.shape == (steps + 1,)
    assert is_nan((history.loss[5:], history.terms[5:], history.gradient[6:]))


def test_where_the_weights_leave_all_bounds_the_run_ends_though_the_loss_is_finite():
    def leap(updates, state, params=None):
        del params
        return jax.tree.map(lambda g: jnp.where(state == 2, jnp.inf, -g), updates), state + 1

    wild = optax.GradientTransformation(lambda _: jnp.zeros((), jnp.int32), leap)
    with pytest.warns(RuntimeWarning, match="step 3 of 6"):
        found, history = fit.adapt(KEY, summed_tanh, jnp.zeros(3, FLOAT), optimizer=wild, steps=6)
    x = 0.0
    for _ in range(2):
        x -= 1 - np.tanh(x) ** 2
    np.testing.assert_allclose(found, np.full(3, x), rtol=8 * UNIT)
    assert int(history.steps) == 2
    assert is_nan(history.loss[4:])


def summed_tanh(x):
    return jnp.sum(jnp.tanh(x))


def test_a_low_rank_run_that_diverges_keeps_its_last_sound_term():
    start = jnp.ones((4, 3), FLOAT)
    with pytest.warns(RuntimeWarning, match="of 40 led to where"):
        found, history = fit.adapt(KEY, quartic, start, rank=1, optimizer=HALF, steps=40)
    last = int(history.steps)
    assert 0 < last < 40
    assert np.isfinite(found).all()
    value = np.sum(np.asarray(found, np.float64) ** 4)
    np.testing.assert_allclose(history.loss[last], value, rtol=1e-4)


def quartic(x):
    return jnp.sum(x**4)


def test_traced_a_run_that_diverges_is_quiet_and_disturbs_no_other():
    starts = jnp.asarray([[2.25, 9.0], [100.0, 100.0]], FLOAT)

    def run(start):
        return fit.adapt(KEY, cliff, start, optimizer=HALF, steps=9)

    found, history = jax.vmap(run)(starts)
    np.testing.assert_array_equal(found, [[0.25, 7.0], [95.5, 95.5]])
    assert history.steps.tolist() == [4, 9]
    np.testing.assert_array_equal(history.loss[0, :5], 11.25 - np.arange(5.0))
    assert is_nan(history.loss[0, 5:])
    np.testing.assert_array_equal(history.loss[1], 200 - np.arange(10.0))
    alone = jax.jit(run)(starts[0])
    np.testing.assert_array_equal(alone.weights, [0.25, 7.0])
    assert int(alone.history.steps) == 4


def test_where_the_loss_is_not_finite_at_the_start_there_is_no_run(refuses):
    start = jnp.asarray([-1.0, 1.0], FLOAT)

    def run(start):
        return fit.adapt(KEY, cliff, start, optimizer=HALF, steps=9)

    with refuses(ValueError, match=r"loss.* at the start.* nan"):
        run(start)
    assert is_nan(jax.jit(run)(start).weights)
    found, _ = jax.vmap(run)(jnp.stack([start, start + 99]))
    assert is_nan(found[0])
    np.testing.assert_array_equal(found[1], [93.5, 95.5])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_start_that_is_not_finite_is_refused_though_the_loss_does_not_see_it(bad, refuses):
    start = jnp.asarray([bad, 1.0], FLOAT)

    def run(start):
        return fit.adapt(KEY, second, start, optimizer=HALF, steps=2)

    with refuses(ValueError, match="start"):
        run(start)
    assert is_nan(jax.jit(run)(start).weights)


def second(x):
    return x[1]


# Bad input

THREE = jnp.ones(3, FLOAT)


def nothing(_):
    """A loss that depends on nothing."""
    return jnp.zeros((), FLOAT)


def adapted(**options):
    """`adapt` on a small problem, with some arguments replaced or, if None, left out."""
    usual = {"key": KEY, "loss": summed, "start": THREE, "optimizer": HALF, "steps": 1}
    return fit.adapt(**{k: v for k, v in (usual | options).items() if v is not ...})


MATRICES = {"w": jnp.ones((4, 3), FLOAT), "k": [jnp.ones((2, 1, 2, 3), FLOAT), THREE]}


@pytest.mark.parametrize(
    ("error", "options", "words"),
    [
        (TypeError, {"loss": lambda x: x}, r"loss must return one .*, got shape \(3,\)"),
        (TypeError, {"loss": lambda x: jnp.sum(x)[None]}, r"loss must return one .*\(1,\)"),
        (TypeError, {"loss": lambda x: jnp.sum(x).astype(jnp.int32)}, "loss must .* of int32"),
        (TypeError, {"loss": lambda x: (jnp.sum(x), x)}, "loss must return .*, got .*tuple"),
        (TypeError, {"loss": lambda _: None}, "loss must return one"),
        (TypeError, {"loss": 3.0}, "loss must be a function of the weights"),
        (TypeError, {"loss": None}, "loss must be a function of the weights"),
        (TypeError, {"optimizer": None}, "optimizer must be one of optax"),
        (TypeError, {"optimizer": 1e-3}, "optimizer must be one of optax"),
        (TypeError, {"optimizer": optax.sgd}, "optimizer must be one of optax"),
        (TypeError, {"optimizer": ...}, "missing .*'optimizer'"),
        (TypeError, {"steps": ...}, "missing .*'steps'"),
        (TypeError, {"steps": None}, "steps must be a plain integer"),
        (TypeError, {"steps": 3.0}, "steps must be a plain integer"),
        (TypeError, {"steps": True}, "steps must be a plain integer"),
        (ValueError, {"steps": -1}, "steps must be at least 0, got -1"),
        (ValueError, {"rank": 0}, "rank must be at least 1"),
        (ValueError, {"rank": -1}, "rank must be at least"),
        (TypeError, {"rank": 1.0}, "rank must be a plain integer"),
        (ValueError, {"rank": 4, "start": MATRICES, "loss": nothing}, r"leaf \['k'\]\[0\]"),
        (ValueError, {"rank": 4, "start": [MATRICES["w"]], "loss": nothing}, "at most 3"),
        (TypeError, {"key": 0}, "key must be one random key"),
        (TypeError, {"key": None}, "key must be one random key"),
        (TypeError, {"key": jax.random.split(KEY)}, "key must be one .* use jax.vmap for many"),
        (TypeError, {"key": jnp.zeros((), jnp.float32)}, "key must be one random key"),
        (TypeError, {"start": jnp.ones(3, jnp.int32)}, "leaf .*of start has dtype int32"),
        (TypeError, {"start": {"w": THREE, "n": 3}}, r"leaf \['n'\] of start"),
        (TypeError, {"start": jnp.ones(3, jnp.complex64)}, "leaf .*of start has dtype complex64"),
        (ValueError, {"start": {}, "loss": nothing}, "start has no entries"),
        (ValueError, {"start": THREE[:0]}, "start has no entries"),
    ],
)  # fmt: skip
def test_adapt_refuses(error, options, words, refuses):
    with refuses(error, match=words):
        adapted(**options)


def test_the_rank_of_every_matrix_is_the_highest_that_will_do():
    start = {"w": jnp.ones((4, 3), FLOAT), "b": THREE}
    found, _ = fit.adapt(KEY, bowl, start, rank=3, optimizer=HALF, steps=1)
    assert found["w"].shape == (4, 3)
