"""Laws of `wspace.fit.invert`: the least-squares name, and a table of which nothing else moves."""

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
from wspace import fit, geometry, tree
from wspace.testing import assert_close, size, vector, weights

pytestmark = pytest.mark.trains

CLOSE = 1e-8 if np.dtype(FLOAT) == np.float64 else 1e-4
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
TALL = (
    np.linalg.qr(RNG.normal(size=(5, 3)))[0]
    * np.array([1.0, 2.0, 1.5])
    @ [[0.6, -0.8, 0], [0.8, 0.6, 0], [0, 0, 1]]
)
FLAT = np.diag([1.0, 2.0]) @ np.linalg.qr(RNG.normal(size=(3, 2)))[0].T
WANTED = RNG.normal(size=5)
ADAMW = optax.adamw(0.1, weight_decay=0.5)
SGD = optax.sgd(0.05)


def misses(model):
    """The sum of squares that a linear model misses its targets by."""

    def loss(e):
        off = jnp.asarray(model, e.dtype) @ e - jnp.asarray(WANTED[: len(model)], e.dtype)
        return jnp.sum(off**2)

    return loss


TALL_LOSS, FLAT_LOSS = misses(TALL), misses(FLAT)


def flat(x):
    return vector(x).astype(np.float64)


@settings(max_examples=8)
@given(start=weights((3,)))
def test_a_linear_model_is_named_by_least_squares(start):
    found, history = fit.invert(KEY, TALL_LOSS, start, optimizer=SGD, steps=400)
    best, (rest,), *_ = np.linalg.lstsq(TALL, WANTED, rcond=None)
    scale = size(start) + np.linalg.norm(best)
    np.testing.assert_allclose(found, best, atol=CLOSE * scale)
    np.testing.assert_allclose(history.loss[-1], rest, rtol=CLOSE)
    # What is left is orthogonal to what the embedding can change.
    off = TALL @ np.asarray(found, np.float64) - WANTED
    np.testing.assert_allclose(TALL.T @ off, 0, atol=20 * CLOSE * scale)
    assert history.gradient[-1] <= 40 * CLOSE * scale


@settings(max_examples=8)
@given(start=weights((3,)))
def test_of_many_names_that_fit_the_nearest_to_the_start_is_found(start):
    found, history = fit.invert(KEY, FLAT_LOSS, start, optimizer=SGD, steps=400)
    e = np.asarray(start, np.float64)
    best = e + np.linalg.lstsq(FLAT, WANTED[:2] - FLAT @ e, rcond=None)[0]
    np.testing.assert_allclose(found, best, atol=CLOSE * (size(start) + 1))
    assert history.loss[-1] <= CLOSE**2 * (size(start) + 1) ** 2


@pytest.mark.parametrize(("loss", "model"), [(TALL_LOSS, TALL), (FLAT_LOSS, FLAT)])
@settings(max_examples=8)
@given(start=weights((3,)), ridge=st.sampled_from([0.25, 1.0, 3.0]))
def test_with_ridge_it_is_the_formula(loss, model, start, ridge):
    found, history = fit.invert(KEY, loss, start, ridge=ridge, optimizer=SGD, steps=400)
    e = np.asarray(start, np.float64)
    off = WANTED[: len(model)] - model @ e
    best = e + np.linalg.solve(model.T @ model + ridge * np.eye(3), model.T @ off)
    scale = size(start) + np.linalg.norm(best)
    np.testing.assert_allclose(found, best, atol=CLOSE * scale)
    parts = np.sum((model @ best - WANTED[: len(model)]) ** 2), np.sum((best - e) ** 2)
    np.testing.assert_allclose(history.terms[-1], parts, atol=40 * CLOSE * scale**2)
    np.testing.assert_allclose(history.terms[0], [off @ off, 0], rtol=64 * UNIT, atol=64 * UNIT)
    np.testing.assert_allclose(
        history.loss[-1], parts[0] + ridge * parts[1], atol=40 * CLOSE * scale**2 * (1 + ridge)
    )


def test_from_an_optimum_nothing_moves():
    once, _ = fit.invert(KEY, TALL_LOSS, jnp.ones(3, FLOAT), optimizer=SGD, steps=400)
    twice, history = fit.invert(KEY, TALL_LOSS, once, optimizer=SGD, steps=400)
    assert_close(twice, once, units=64)
    assert history.gradient[0] <= 1e3 * UNIT
    # Nor with a ridge, which holds it where it is.
    twice, _ = fit.invert(KEY, TALL_LOSS, once, ridge=1.0, optimizer=SGD, steps=400)
    assert_close(twice, once, units=64)


def test_history_starts_at_the_start():
    start = jnp.ones(3, FLOAT)
    found, history = fit.invert(KEY, TALL_LOSS, start, optimizer=SGD, steps=0)
    off = TALL.sum(1) - WANTED
    np.testing.assert_allclose(history.loss, [off @ off], rtol=64 * UNIT)
    np.testing.assert_allclose(history.gradient, [2 * np.linalg.norm(TALL.T @ off)], rtol=64 * UNIT)
    assert_close(found, start, units=0)


# In a table

TABLE = jnp.asarray(RNG.normal(size=(6, 3)), FLOAT)


def named(table):
    """What `TALL_LOSS` says of row 4."""
    return TALL_LOSS(table[4])


def pair(table):
    """What it says of rows 4 and 1, the second with other targets."""
    other = jnp.asarray(TALL, table.dtype) @ table[1] - 1
    return TALL_LOSS(table[4]) + jnp.sum(other**2)


def touches_all(table):
    """A loss with a slope in every row."""
    return TALL_LOSS(table[4]) + jnp.sum(table**2) / 8


@settings(max_examples=8)
@given(table=weights((6, 3)), start=weights((3,)))
def test_a_row_of_a_table_is_named_as_if_alone(table, start):
    run = functools.partial(fit.invert, KEY, start=start, optimizer=SGD, steps=100)
    found, history = run(named, table=table, rows=4)
    alone, other = run(TALL_LOSS)
    assert_close(found[4], alone, units=64, scale=size(start) + 1)
    assert_close(jnp.delete(found, 4, axis=0), jnp.delete(table, 4, axis=0), units=0)
    np.testing.assert_allclose(history.loss, other.loss, rtol=1e-3)
    atol = 256 * UNIT * (size(start) + 1)
    np.testing.assert_allclose(history.gradient, other.gradient, rtol=1e-3, atol=atol)
    assert found.dtype == FLOAT


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [4, [4, 1]])
def test_no_other_row_moves_by_a_bit_though_weights_decay_and_the_loss_pulls(dtype, rows):
    table = TABLE.astype(dtype)
    start = jnp.ones((3,) if rows == 4 else (2, 3), FLOAT)
    found, _ = fit.invert(
        KEY, touches_all, start, table=table, rows=rows, ridge=0.1, optimizer=ADAMW, steps=5
    )
    others = np.setdiff1d(np.arange(6), rows)
    assert found.dtype == dtype
    np.testing.assert_array_equal(
        np.asarray(found[others], np.float32), np.asarray(table[others], np.float32)
    )
    assert (np.abs(np.asarray(found[4] - table[4], np.float32)) > 1e-3).all()


def test_a_row_of_half_precision_is_rounded_once():
    table, start = TABLE.astype(jnp.bfloat16), jnp.full(3, 1 / 3, jnp.float32)
    run = functools.partial(fit.invert, KEY, named, rows=4, optimizer=SGD, steps=7)
    found, history = run(start, table=table)
    whole, _ = run(start, table=tree.upcast(table))
    assert_close(found, whole.astype(jnp.bfloat16), units=0)
    assert history.loss.dtype == jnp.float32
    # The start is not: it is that of the run, in the dtype it comes in.
    off = TALL @ np.asarray(start, np.float64) - WANTED
    np.testing.assert_allclose(history.loss[0], off @ off, rtol=1e-5)


@pytest.mark.parametrize("rows", [[4, 1], (4, 1), np.array([4, 1]), [np.int64(4), np.int32(1)]])
def test_several_rows_are_named_each_in_its_place(rows):
    start = jnp.asarray(RNG.normal(size=(2, 3)), FLOAT)
    found, _ = fit.invert(KEY, pair, start, table=TABLE, rows=rows, optimizer=SGD, steps=400)
    for row, target in ((4, WANTED), (1, np.ones(5))):
        best = np.linalg.lstsq(TALL, target, rcond=None)[0]
        np.testing.assert_allclose(found[row], best, atol=10 * CLOSE)
    others = [0, 2, 3, 5]
    np.testing.assert_array_equal(found[jnp.asarray(others)], TABLE[jnp.asarray(others)])


def test_without_steps_the_start_stands_in_its_row():
    start = jnp.asarray([[1.0, 2, 3], [4, 5, 6]], FLOAT)
    found, history = fit.invert(KEY, pair, start, table=TABLE, rows=[4, 1], optimizer=SGD, steps=0)
    np.testing.assert_array_equal(found, np.asarray(TABLE.at[jnp.asarray([4, 1])].set(start)))
    assert history.terms.shape == (1, 2)
    one, _ = fit.invert(KEY, named, start[:1], table=TABLE, rows=[4], optimizer=SGD, steps=0)
    np.testing.assert_array_equal(one, np.asarray(TABLE.at[4].set(start[0])))
    first, _ = fit.invert(
        KEY, named, start[0], table=np.asarray(TABLE), rows=0, optimizer=SGD, steps=0
    )
    np.testing.assert_array_equal(first, np.asarray(TABLE.at[0].set(start[0])))


# Charts, keys, transformations

ORIGIN, *AXES = (
    {"w": jnp.asarray(RNG.normal(size=(4, 3)) / 3, FLOAT), "b": jnp.ones(3, FLOAT) / 3}
    for _ in range(3)
)
GOAL = {"w": jnp.asarray(RNG.normal(size=(4, 3)), FLOAT), "b": jnp.zeros(3, FLOAT)}


def charted(z):
    """The squared distance of a point of a chart from a goal."""
    point = tree.combine([1.0, *z], [ORIGIN, *AXES])
    return geometry.distance(point, GOAL) ** 2


def test_a_coordinate_in_a_chart_is_the_projection():
    z, history = fit.invert(KEY, charted, jnp.zeros(2, FLOAT), optimizer=SGD, steps=400)
    axes = np.stack([flat(x) for x in AXES])
    best, (rest,), *_ = np.linalg.lstsq(axes.T, flat(GOAL) - flat(ORIGIN), rcond=None)
    np.testing.assert_allclose(z, best, atol=10 * CLOSE)
    np.testing.assert_allclose(history.loss[-1], rest, rtol=10 * CLOSE)
    point = tree.combine([1.0, *z], [ORIGIN, *AXES])
    off = flat(GOAL) - flat(point)
    np.testing.assert_allclose(axes @ off, 0, atol=100 * CLOSE)


def spread(name):
    """A loss of any tree."""
    return sum(jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(name))


@given(start=weights({"w": (4, 3), "b": (3,)}), ridge=st.sampled_from([0.0, 0.5, 3.0]))
@settings(max_examples=8)
def test_any_tree_is_a_name(start, ridge):
    found, _ = fit.invert(KEY, spread, start, ridge=ridge, optimizer=SGD, steps=400)
    wanted = jax.tree.map(lambda x: (1 + ridge * x) / (1 + ridge), start)
    assert_close(found, wanted, units=256, scale=size(start) + 1)


def test_names_in_half_precision_come_back_so():
    start = {"w": jnp.zeros(3, jnp.bfloat16), "b": jnp.zeros((), jnp.float32)}
    found, _ = fit.invert(KEY, spread, start, optimizer=SGD, steps=100)
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, start)
    assert_close(found, jax.tree.map(jnp.ones_like, start), units=256)


def dice(e, key):
    """A loss that is its key's draw, and pulls at nothing."""
    return jax.random.uniform(key, (), e.dtype) + 0 * jnp.sum(e)


def noisy(e, key):
    """A linear loss whose slope is drawn."""
    return jnp.sum(jax.random.normal(key, e.shape, e.dtype) * e)


def test_the_loss_gets_a_new_key_at_every_step():
    start = jnp.zeros(3, FLOAT)
    _, history = fit.invert(KEY, dice, start, keyed=True, optimizer=SGD, steps=9)
    assert len(set(np.asarray(history.loss).tolist())) == 10
    runs = [
        fit.invert(jax.random.key(seed), noisy, start, keyed=True, optimizer=SGD, steps=3)
        for seed in (5, 5, 6)
    ]
    assert_close(runs[0], runs[1], units=0)
    assert np.abs(np.asarray(runs[0].weights - runs[2].weights)).max() > 1e-3


@pytest.mark.parametrize("rows", [None, 1])
def test_no_key_is_used_twice(rows):
    start, table = jnp.ones(3, FLOAT), None if rows is None else TABLE

    def run():
        return fit.invert(
            jax.random.key(1),
            noisy,
            start,
            keyed=True,
            table=table,
            rows=rows,
            optimizer=SGD,
            steps=3,
        )

    with jax.debug_key_reuse(True):
        found = run()
    assert_close(found, run(), units=0)


def test_a_key_given_to_two_inversions_is_refused_where_jax_looks_for_that():
    key = jax.random.key(1)
    run = functools.partial(
        fit.invert, loss=noisy, start=TABLE[0], keyed=True, optimizer=SGD, steps=3
    )
    with jax.debug_key_reuse(True):
        run(key)
        with pytest.raises(jax.errors.KeyReuseError):
            run(key)


def test_inversions_are_compiled_and_batched():
    starts, ridges = TABLE[:2], jnp.asarray([0.0, 2.0], FLOAT)
    keys = jax.random.split(KEY, 2)

    def run(key, start, ridge, table):
        return fit.invert(
            key, noisy, start, keyed=True, table=table, rows=1, ridge=ridge, optimizer=SGD, steps=3
        )

    batched = jax.jit(jax.vmap(run, in_axes=(0, 0, 0, None)))(keys, starts, ridges, TABLE)
    for i in range(2):
        one = run(keys[i], starts[i], ridges[i], TABLE)
        assert_close(jax.tree.map(lambda x, i=i: x[i], batched), one, units=64)
    bad = jax.jit(run)(KEY, starts[0], jnp.asarray(-1.0, FLOAT), TABLE)
    assert is_nan(bad.weights[1])


def test_progress_is_told():
    lines = []
    _, history = fit.invert(
        KEY, TALL_LOSS, jnp.ones(3, FLOAT), optimizer=SGD, steps=3,
        progress=lambda i, loss: lines.append((i, loss)),
    )  # fmt: skip
    assert lines == list(enumerate(np.asarray(history.loss).tolist()))


def cliff(e):
    """A slope of one in every entry that ends, in NaN, at zero."""
    return jnp.sum(e) + 0 * jnp.sum(jnp.log(e))


def test_an_inversion_that_diverges_says_where():
    start, half = jnp.asarray([2.25, 9.0, 9.0], FLOAT), optax.sgd(0.5)
    with pytest.warns(RuntimeWarning, match="step 5 of 9 led to where"):
        found, history = fit.invert(KEY, cliff, start, optimizer=half, steps=9)
    np.testing.assert_array_equal(found, [0.25, 7.0, 7.0])
    np.testing.assert_allclose(history.terms[:5, 1], 0.75 * np.arange(5.0) ** 2, rtol=16 * UNIT)


# Refusals

START = jnp.ones(3, FLOAT)


def inverted(**options):
    """`invert` on a small problem, with some arguments replaced."""
    usual = {"key": KEY, "loss": jnp.sum, "start": START, "optimizer": SGD, "steps": 1}
    return fit.invert(**(usual | options))


@pytest.mark.parametrize(
    ("error", "options", "words"),
    [
        (ValueError, {"table": TABLE}, "table and rows belong together"),
        (ValueError, {"rows": 1}, "table and rows belong together"),
        (ValueError, {"table": TABLE, "rows": 6}, "rows must be distinct rows .* 0 to 5, got 6"),
        (ValueError, {"table": TABLE, "rows": -1}, "rows must be distinct rows .*got -1"),
        (ValueError, {"table": TABLE, "rows": [1, 1], "start": TABLE[:2]}, "must be distinct rows"),
        (ValueError, {"table": TABLE, "rows": [0, 9], "start": TABLE[:2]}, "must be distinct rows"),
        (ValueError, {"table": TABLE, "rows": [], "start": TABLE[:0]}, "rows"),
        (TypeError, {"table": TABLE, "rows": 1.0}, "rows must be an integer or several, got 1.0"),
        (TypeError, {"table": TABLE, "rows": "1"}, "rows must be an integer or several"),
        (TypeError, {"table": TABLE, "rows": [1.0]}, "rows must be an integer or several"),
        (TypeError, {"table": TABLE, "rows": True}, "rows must be an integer or several"),
        (TypeError, {"table": TABLE, "rows": [True, False], "start": TABLE[:2]}, "rows must be an"),
        (TypeError, {"table": TABLE, "rows": np.arange(6) == 1}, "rows must be an integer"),
        (ValueError, {"table": TABLE, "rows": 1, "start": START[:2]}, r"start .*have \(3,\)"),
        (ValueError, {"table": TABLE, "rows": [1], "start": START}, r"start .*have \(1, 3\)"),
        (ValueError, {"table": TABLE, "rows": 1, "start": START[None]}, r"start .*have \(3,\)"),
        (ValueError, {"table": TABLE, "rows": 1, "start": {"e": START}}, "start has the layout"),
        (ValueError, {"table": START, "rows": 1}, "table must be a matrix"),
        (ValueError, {"table": TABLE[None], "rows": 1}, "table must be a matrix"),
        (ValueError, {"table": {"e": TABLE}, "rows": 1}, "table must be a matrix"),
        (TypeError, {"table": jnp.ones((6, 3), jnp.int32), "rows": 1}, "of table has dtype int32"),
        (ValueError, {"ridge": -1.0}, "ridge must be finite and at least 0, got -1"),
        (ValueError, {"ridge": np.inf}, "ridge must be finite and at least 0, got inf"),
        (ValueError, {"loss": lambda e: jnp.sum(e) / 0}, "loss.* start"),
        (ValueError, {"start": START * np.inf, "loss": spread}, "start"),
        (TypeError, {"start": jnp.ones(3, jnp.int32)}, "of start has dtype int32"),
        (ValueError, {"start": START[:0]}, "start has no entries"),
        (TypeError, {"loss": lambda e: e}, "loss must return one"),
        (TypeError, {"loss": 3}, "loss must be a function"),
        (TypeError, {"key": 0}, "key must be one random key"),
        (TypeError, {"key": jax.random.split(KEY)}, "key must be one random key"),
        (TypeError, {"optimizer": None}, "optimizer must be one of optax"),
        (TypeError, {"steps": 1.0}, "steps must be a plain integer"),
        (ValueError, {"steps": -1}, "steps must be at least 0"),
    ],
)
def test_invert_refuses(error, options, words, refuses):
    with refuses(error, match=words):
        inverted(**options)


def test_where_the_loss_is_not_finite_at_the_start_is_nan_where_traced():
    run = jax.jit(lambda e: fit.invert(KEY, cliff, e, optimizer=SGD, steps=2).weights)
    assert is_nan(run(-START))
    assert not is_nan(run(START))
