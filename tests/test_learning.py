"""Laws of `wspace.fit.coefficients`, against least squares by numpy.

One loss, optimizer and number of steps share a compilation, so all three are made once, here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from tests.helpers import is_nan
from tests.strategies import FLOAT, UNIT
from wspace import average, fit, merge, tree
from wspace.testing import assert_close, size, vector, weights

pytestmark = pytest.mark.trains

CLOSE = 1e-5 if np.dtype(FLOAT) == np.float64 else 1e-4
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
LAYOUT = {"w": (4, 3), "s": (2, 3, 5), "b": (5,), "t": (), "e": (0, 2)}
ROWS = {"w": (4,), "s": (2, 3), "b": (), "t": (), "e": (0,)}
SGD, HALF = optax.sgd(0.08), optax.sgd(0.5)
PER = ("tree", "leaf", "row")
each_per = pytest.mark.parametrize("per", PER)


def drawn(layout=LAYOUT, size=1.0):
    return jax.tree.map(
        lambda shape: jnp.asarray(size * RNG.normal(size=shape), FLOAT),
        layout,
        is_leaf=lambda x: isinstance(x, tuple),
    )


BASE = drawn(size=3.0)


def directions():
    """Two task vectors that are neither orthogonal nor nearly parallel in any row."""
    both = [{}, {}]
    for name, shape in LAYOUT.items():
        rows = RNG.normal(size=(*shape, 2)) if shape else np.ones((1, 2))
        basis = np.linalg.qr(rows)[0] if shape[-1:] != (2,) else np.zeros((0, 2, 2))
        first, second = basis[..., 0], basis[..., 1 % basis.shape[-1]]
        both[0][name] = jnp.asarray(first.reshape(shape), FLOAT)
        both[1][name] = jnp.asarray((first / 2 + second).reshape(shape), FLOAT)
    return both


TAUS = directions()
TUNED = [jax.tree.map(jnp.add, BASE, x) for x in TAUS]
TARGET = jax.tree.map(lambda x, y, z: (x + y + z) / 2, *TUNED, drawn())


def flat(x):
    return vector(x).astype(np.float64)


def bowl(x):
    """Half the squared distance from `TARGET`."""
    gaps = [jnp.sum((x[k] - TARGET[k].astype(x[k].dtype)) ** 2) for k in sorted(x)]
    return sum(gaps[1:], gaps[0]) / 2


def pieces(per):
    """What has coefficients of its own: places in a tree, by leaf and row."""
    if per == "tree":
        return [None]
    if per == "leaf":
        return [(k, ...) for k in LAYOUT]
    return [(k, i) for k, shape in ROWS.items() for i in np.ndindex(shape)]


def cut(x, piece):
    """One piece of a tree as a vector: the oracle's view."""
    return flat(x) if piece is None else np.asarray(x[piece[0]], np.float64)[piece[1]].reshape(-1)


def chosen(c, piece):
    """The coefficients of a piece."""
    if piece is None:
        return np.asarray(c, np.float64)
    own = np.asarray(c[piece[0]], np.float64)
    return own if piece[1] is Ellipsis else own[(slice(None), *piece[1])]


def system(piece, base, tuned):
    """Task vectors as columns, and where they are to lead."""
    columns = np.stack([cut(x, piece) - cut(base, piece) for x in tuned], axis=-1)
    return columns, cut(TARGET, piece) - cut(base, piece)


def learned(per="tree", base=BASE, tuned=TUNED, **options):
    usual = {"key": KEY, "loss": bowl, "optimizer": SGD, "steps": 300}
    chosen = usual | options
    return fit.coefficients(chosen.pop("key"), chosen.pop("loss"), base, tuned, per=per, **chosen)


@pytest.mark.parametrize(("per", "count"), [("tree", 2), ("leaf", 1), ("row", 2)])
@settings(max_examples=4)
@given(base=weights(LAYOUT, entries=st.floats(-4, 4, width=32)))
def test_free_coefficients_are_those_of_least_squares(per, base, count):
    tuned = [jax.tree.map(jnp.add, base, x) for x in TAUS[:count]]
    found = learned(per, base, tuned)
    scale = size(base) + size(TARGET)
    left, gradient = 0.0, 0.0
    for piece in pieces(per):
        columns, wanted = system(piece, base, tuned)
        best = np.linalg.lstsq(columns, wanted, rcond=None)[0]
        got = chosen(found.coefficients, piece)
        assert got.shape == (count,)
        # Where one entry has two coefficients, no one of them is fixed, but what they make is.
        np.testing.assert_allclose(columns @ got, columns @ best, atol=CLOSE * scale)
        moved = cut(found.weights, piece) - cut(base, piece)
        np.testing.assert_allclose(moved, columns @ got, atol=64 * UNIT * scale)
        left += np.sum((columns @ best - wanted) ** 2) / 2
        start = columns @ np.full(count, 0.3) - wanted
        gradient += np.sum((columns.T @ start) ** 2)
    np.testing.assert_allclose(found.history.gradient[0], np.sqrt(gradient), rtol=2**12 * UNIT)
    np.testing.assert_allclose(found.history.loss[-1], left, atol=CLOSE * scale**2)
    assert int(found.history.steps) == 300
    assert found.history.terms.shape == (301, 1)


@pytest.mark.parametrize(("per", "simplex"), [("tree", False), ("leaf", True), ("row", False)])
def test_without_steps_it_is_the_merge_it_starts_at(per, simplex):
    at = [0.3, 0.3]
    for start in (None, (0.2, 0.7)):
        found = learned(per, steps=0, simplex=simplex, start=start)
        if start is not None:
            at = np.array(start) / (sum(start) if simplex else 1)
        elif simplex:
            at = [0.5, 0.5]
        wanted = merge.task_arithmetic(BASE, TUNED, at)
        assert_close(found.weights, wanted, units=16, scale=size(BASE))
        for piece in pieces(per):
            np.testing.assert_allclose(chosen(found.coefficients, piece), at, rtol=8 * UNIT)
    if per != "tree":
        shapes = ROWS if per == "row" else dict.fromkeys(LAYOUT, ())
        assert {k: c.shape for k, c in found.coefficients.items()} == {
            k: (2, *shape) for k, shape in shapes.items()
        }


@each_per
def test_on_a_simplex_coefficients_stay_there_and_the_base_counts_for_nothing(per):
    found = learned(per, simplex=True)
    elsewhere = learned(per, drawn(), simplex=True)
    inside = 0
    for piece in pieces(per):
        c = chosen(found.coefficients, piece)
        assert (c > 0).all()
        assert abs(c.sum() - 1) <= 4 * UNIT
        first, second = (cut(x, piece) for x in TUNED)
        way, far = first - second, cut(TARGET, piece) - second
        if way.size:
            best = np.clip(way @ far / (way @ way), 0, 1)
            assert abs(c[0] - best) <= abs(0.5 - best)
            if per != "row" and 0.1 < best < 0.9:
                inside += 1
                assert abs(c[0] - best) < 0.02
    assert inside or per == "row"
    assert_close(elsewhere.coefficients, found.coefficients, units=2**12, scale=1.0)
    assert_close(elsewhere.weights, found.weights, units=2**12, scale=size(BASE))
    assert_close(
        learned(simplex=True, steps=0).weights, average.mean(TUNED), units=16, scale=size(BASE)
    )


def test_nothing_clamps_a_coefficient_and_optax_bounds_it():
    taus = [merge.task_vector(BASE, x) for x in TUNED]
    target = tree.combine((1.0, 2.0, -1.0), (BASE, *taus))

    def loss(x):
        return sum(jnp.sum((x[k] - target[k]) ** 2) for k in sorted(x)) / 64

    adam = optax.adam(optax.cosine_decay_schedule(0.2, 200))
    found = learned(loss=loss, optimizer=adam, steps=200)
    np.testing.assert_allclose(found.coefficients, [2, -1], atol=1e-2)
    within = optax.chain(adam, optax.keep_params_nonnegative())
    bounded = learned(loss=loss, optimizer=within, steps=200)
    first, second = (flat(x) for x in taus)
    alone = 2 - (first @ second) / (first @ first)
    np.testing.assert_allclose(bounded.coefficients, [alone, 0], atol=1e-2)
    assert bounded.coefficients[1] >= 0


# Outputs without labels, as in adaptive merging: two experts of two classes each of four.

CENTERS = RNG.normal(size=(4, 6)) * 2
INPUTS = jnp.asarray(np.concatenate([c + 0.5 * RNG.normal(size=(16, 6)) for c in CENTERS]), FLOAT)


def batch(x, key):
    rows = jax.random.choice(key, INPUTS.shape[0], (32,), replace=False)
    return INPUTS[rows] @ x["w"] + x["b"][None]


UNSURE = fit.entropy(batch, keyed=True)


def sureness(x, key):
    """The mean entropy of outputs, less log 4."""
    return -UNSURE.loss(x, key)


@pytest.mark.parametrize("per", ["tree", "row"])
def test_without_labels_the_entropy_falls_and_labels_come_out(per):
    base = {"w": jnp.zeros((6, 4), FLOAT), "b": jnp.zeros(4, FLOAT)}
    labels = np.repeat(np.arange(4), 16)
    experts = []
    for own in ((0, 1), (2, 3)):
        w = np.zeros((6, 4))
        w[:, list(own)] = 0.5 * (CENTERS[list(own)] - CENTERS.mean(0)).T
        b = -w.T @ CENTERS.mean(0)
        experts.append({"w": jnp.asarray(w, FLOAT), "b": jnp.asarray(b, FLOAT)})

    def outputs(x):
        return np.asarray(INPUTS, np.float64) @ np.asarray(x["w"]) + np.asarray(x["b"])

    def entropy(x):
        return special.entr(special.softmax(outputs(x), axis=-1)).sum(-1).mean()

    found = learned(
        per, base, experts, loss=sureness, keyed=True, optimizer=optax.adam(1e-2), steps=100
    )
    before = entropy(merge.task_arithmetic(base, experts, (0.3, 0.3)))
    after = entropy(found.weights)
    assert after < 0.8 * before
    assert (outputs(found.weights).argmax(-1) == labels).mean() > 0.95
    # The history is on batches, so near the entropy of all, less log 4.
    assert abs(float(found.history.loss[-1]) + np.log(4) - after) < 0.1


# Layouts, dtypes, transformations


def test_half_precision_is_merged_in_float32_and_rounded_once():
    narrow = jnp.bfloat16
    base, *tuned = (jax.tree.map(lambda x: x.astype(narrow), x) for x in (BASE, *TUNED))

    def loss(x):
        assert {leaf.dtype for leaf in jax.tree.leaves(x)} == {jnp.dtype(jnp.float32)}
        return bowl(x)

    found = learned("leaf", base, tuned, loss=loss, optimizer=SGD, steps=3)
    for name, c in found.coefficients.items():
        assert c.dtype == jnp.float32
        x, *others = (np.asarray(x[name], np.float64) for x in (base, *tuned))
        exact = x + np.tensordot(np.asarray(c, np.float64), np.array(others) - x, 1)
        got = np.asarray(found.weights[name], np.float64)
        assert found.weights[name].dtype == narrow
        assert (np.abs(got - exact) <= 1.001 * 2.0**-8 * np.abs(exact) + 1e-6).all()


def test_runs_are_compiled_and_batched():
    def run(base, start):
        return learned("row", base, start=start, optimizer=SGD, steps=3)

    starts = jnp.asarray([[0.1, 0.5], [1.0, -1.0]], FLOAT)
    batched = jax.jit(jax.vmap(run, in_axes=(None, 0)))(BASE, starts)
    for i in range(2):
        wanted = run(BASE, starts[i])
        got = jax.tree.map(lambda x, i=i: x[i], batched)
        assert_close(got, wanted, units=256)


def test_sharded_leaves_stay_sharded():
    layout = {"w": (8, 3), "k": (4, 8), "b": (8,), "t": ()}
    specs = {"w": jax.P("x"), "k": jax.P(None, "x"), "b": jax.P("x"), "t": jax.P()}
    target, base, *tuned = (drawn(layout) for _ in range(4))

    def run(target, base, tuned):
        def loss(x):
            return sum(jnp.sum((x[k] - target[k]) ** 2) for k in sorted(x)) / 8

        return learned("row", base, tuned, loss=loss, optimizer=SGD, steps=3)

    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        spread = [
            {k: jax.device_put(x[k], spec) for k, spec in specs.items()}
            for x in (target, base, *tuned)
        ]
        found = run(spread[0], spread[1], spread[2:])
    for k, x in found.weights.items():
        assert x.sharding.is_equivalent_to(spread[1][k].sharding, x.ndim)
    wanted = run(target, base, tuned)
    for got, want in zip(jax.tree.leaves(found[:2]), jax.tree.leaves(wanted[:2]), strict=True):
        np.testing.assert_allclose(got, want, atol=64 * UNIT * size(base, *tuned))


# Where it has no answer


def cliff(x):
    """A slope that ends, in NaN, at zero."""
    return jnp.sum(x) + 0 * jnp.sum(jnp.log(x))


def test_a_run_that_diverges_says_where_and_returns_what_was_before(pytestconfig):
    base, tuned = jnp.asarray([1.0], FLOAT), [jnp.asarray([2.0], FLOAT)]
    with pytest.warns(RuntimeWarning, match="step 3 of 5 led to where") as record:
        found = learned("tree", base, tuned, loss=cliff, start=[0.25], optimizer=HALF, steps=5)
    if not pytestconfig.getoption("jaxtyping_packages"):
        assert record[0].filename == __file__
    np.testing.assert_array_equal(found.coefficients, [-0.75])
    np.testing.assert_array_equal(found.weights, [0.25])
    assert int(found.history.steps) == 2


def test_a_start_off_the_simplex_is_nan_where_traced():
    run = jax.jit(lambda start: learned(simplex=True, start=start, optimizer=SGD, steps=1))
    found = run(jnp.asarray([1.0, -0.5], FLOAT))
    assert is_nan((found.coefficients, found.weights))


@pytest.mark.parametrize(
    ("error", "options", "words"),
    [
        (ValueError, {"tuned": [BASE, {"w": BASE["w"]}]}, r"leaf \['b'\] that tuned\[1\] lacks"),
        (ValueError, {"tuned": [BASE | {"b": BASE["w"]}]}, r"leaf \['b'\] has shape"),
        (ValueError, {"tuned": []}, "tuned is empty"),
        (TypeError, {"tuned": [BASE | {"b": jnp.ones(5, jnp.int32)}]}, r"leaf \['b'\] of tuned"),
        (ValueError, {"base": {"w": BASE["e"]}, "tuned": [{"w": BASE["e"]}]}, "base has no entr"),
        (ValueError, {"per": "column"}, "per must be one of 'tree', 'leaf', 'row'"),
        (ValueError, {"start": [0.3]}, "start has 1 numbers for 2 points"),
        (ValueError, {"start": [0.3, np.inf]}, r"start\[1\] must be finite"),
        (ValueError, {"start": [1.0, 0.0], "simplex": True}, "start must be positive"),
        (ValueError, {"steps": -1}, "steps must be at least 0"),
        (TypeError, {"loss": lambda x: x["w"]}, "loss must return one"),
        (TypeError, {"optimizer": None}, "optimizer must be one of optax"),
        (TypeError, {"key": 0}, "key must be one random key"),
    ],
)
def test_coefficients_refuses(error, options, words, refuses):
    with refuses(error, match=words):
        learned(**options)
