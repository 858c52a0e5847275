"""The checkers of `wspace.testing`: right operators pass, wrong ones fail by law, leaf, roundings.

Operators here are written in plain JAX, as users write them.
"""

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wspace import testing
from wspace.lowrank import LowRank
from wspace.testing import factors, strategies

RNG = np.random.default_rng(0)
LAYOUT = {"b": (8,), "w": (8, 4)}


def drawn(count, dtype=np.float32):
    """Trees with entries of both signs."""
    return [
        {name: jnp.asarray(RNG.normal(size=shape), dtype) for name, shape in LAYOUT.items()}
        for _ in range(count)
    ]


POINTS, SIGNED = drawn(3), (1.0, -0.3, 0.8)
BOTH = drawn(2)


def wide(x):
    return x if x.dtype == np.float64 else x.astype(jnp.float32)


def mean(points, coefficients=None):
    """The weighted mean, summed in float32 at least."""
    c = [1.0] * len(points) if coefficients is None else list(coefficients)
    return jax.tree.map(
        lambda *xs: (sum(k * wide(x) for k, x in zip(c, xs, strict=True)) / sum(c)).astype(
            xs[0].dtype
        ),
        *points,
    )


def by_sizes(points, coefficients):
    """Divided by the sum of the sizes of the coefficients."""
    total = sum(map(abs, coefficients))
    return jax.tree.map(lambda x: x * (sum(coefficients) / total), mean(points, coefficients))


def in_half(points, coefficients=None):
    """Summed in the dtype of the leaves."""
    c = [1.0] * len(points) if coefficients is None else coefficients
    return jax.tree.map(
        lambda *xs: sum(k * x for k, x in zip(c, xs, strict=True)) / sum(c), *points
    )


def widened(points):
    """Never rounded to the dtype of the leaves."""
    return mean([jax.tree.map(wide, x) for x in points])


def directed(points, epsilon):
    """The mean of points of unit norm."""

    def unit(x):
        size = jnp.sqrt(sum(jnp.sum(jnp.square(wide(y))) for y in jax.tree.leaves(x)))
        return jax.tree.map(lambda y: (wide(y) / (size + epsilon)).astype(y.dtype), x)

    return mean([unit(x) for x in points])


def first_heavier(points, coefficients=None):
    """The first point counts twice."""
    return mean([points[0], *points], None if coefficients is None else [1.0, *coefficients])


def unaligned(points, coefficients):
    """Coefficients that are sorted, and points that are not."""
    return mean(points, sorted(coefficients))


def line(start, end, t):
    """Exact at both ends."""
    return jax.tree.map(lambda x, y: (1 - t) * x + t * y, start, end)


def by_difference(start, end, t):
    """Not exact at 1."""
    return jax.tree.map(lambda x, y: x + t * (y - x), start, end)


def from_the_middle(start, end, t):
    """Not exact at 0."""
    return jax.tree.map(lambda x, y: (x + y) / 2 + (t - 0.5) * (y - x), start, end)


def norm_of(x):
    return jnp.sqrt(sum(jnp.sum(jnp.square(wide(y))) for y in jax.tree.leaves(x)))


def halved(x):
    return jax.tree.map(lambda y: y / 2, x)


def positive(x):
    return jax.tree.map(lambda y: jnp.maximum(y, 0), x)


def doubled_bias(x):
    return x | {"b": 2 * x["b"]}


def branching(x):
    return x if x["w"][0, 0] > 100 else halved(x)


def random_outside_jit(x):
    """Another function under `jit`."""
    compiled = isinstance(x["w"], jax.core.Tracer)
    return x | {"w": x["w"] * (1.01 if compiled else 1.0)}


@jax.custom_batching.custom_vmap
def batched(x):
    return x * 2


@batched.def_vmap
def _(axis_size, in_batched, x):
    return x * 2 + 1e-3 * axis_size, in_batched[0]


def batched_wrong(x):
    return x | {"w": batched(x["w"])}


def first_of_batch(function):
    """A function that returns the result of the first row for all rows of a batch."""
    wrong = jax.custom_batching.custom_vmap(function)

    @wrong.def_vmap
    def _(axis_size, in_batched, x):
        first = function(x[0])
        return jnp.broadcast_to(first, (axis_size, *first.shape)), in_batched[0]

    return wrong


def with_rule(slope):
    """The square of a leaf, with a derivative of its own."""

    @jax.custom_vjp
    def square(x):
        return x * x

    square.defvjp(lambda x: (x * x, x), lambda x, g: (slope * x * g,))
    return lambda x: x | {"b": square(x["b"])}


def stopped(x):
    return x | {"w": jax.lax.stop_gradient(x["w"]) * 2}


def flattened(x):
    """One vector in column-major order, which leaves sharded by rows refuse."""
    flat = jnp.concatenate([y.T.reshape(-1) for y in jax.tree.leaves(x)])
    return flat / jnp.sqrt(jnp.sum(flat * flat))


def gathered(x):
    """Every device gets the whole of a leaf."""
    y = x["w"]
    return x | {"w": y if jax.typeof(y).sharding.mesh.empty else jax.sharding.reshard(y, jax.P())}


affine, permuted = testing.check_affine_equivariant, testing.check_permutation_invariant
ends, scaled = testing.check_exact_ends, testing.check_scale
half, transformed = testing.check_half_precision, testing.check_transforms
FAILS = r"leaf \['{leaf}'\] differs by [\d.e+]+ roundings, allowed are {units}:"
ANY = FAILS.format(leaf="[bw]", units=r"[\d.]+")

RIGHT = {
    "affine, mean": lambda: affine(mean, POINTS, coefficients=SIGNED),
    "affine, path": lambda: affine(line, *BOTH, t=0.3),
    "affine, half": lambda: affine(mean, drawn(3, jnp.bfloat16)),
    "affine, half to single": lambda: affine(widened, drawn(3, jnp.bfloat16)),
    "affine, zeros": lambda: affine(mean, [jax.tree.map(jnp.zeros_like, POINTS[0])] * 2),
    "affine, one tree": lambda: affine(lambda x: x, POINTS[0]),
    "translation": lambda: affine(lambda x: x, POINTS[0], factor=1.0),
    "order": lambda: permuted(mean, POINTS, coefficients=SIGNED),
    "order, array": lambda: permuted(mean, POINTS, coefficients=np.array(SIGNED, np.float32)),
    "order, given": lambda: permuted(mean, POINTS, coefficients=SIGNED, order=(1, 0, 2)),
    "order, one": lambda: permuted(mean, POINTS[:1]),
    "odd": lambda: testing.check_odd(mean, POINTS),
    "idempotent, mean": lambda: testing.check_idempotent(mean, POINTS, coefficients=SIGNED),
    "idempotent, projection": lambda: testing.check_idempotent(positive, POINTS[0], units=0),
    "idempotent, path": lambda: testing.check_idempotent(line, *BOTH, t=0.3),
    "ends": lambda: ends(line, *BOTH),
    "ends, many": lambda: ends(lambda xs, t: line(xs[0], xs[-1], t), POINTS),
    "scale": lambda: scaled(mean, POINTS, coefficients=SIGNED),
    "scale, exact": lambda: scaled(mean, POINTS, factors=(2.0**-40, 2.0**40), units=0),
    "scale, float16": lambda: scaled(mean, drawn(3, np.float16)),
    "scale, stored in half": lambda: scaled(norm_of, drawn(1, jnp.bfloat16)[0]),
    "scale, degree 0": lambda: scaled(lambda xs: directed(xs, 0), POINTS, degree=0),
    "scale, degree 0, large": lambda: scaled(
        lambda xs: jax.tree.map(lambda x: 1e3 * x, directed(xs, 0)), POINTS, degree=0
    ),
    "scale, degree 2": lambda: scaled(lambda x: jnp.square(norm_of(x)), POINTS[0], degree=2),
    "half": lambda: half(mean, POINTS, coefficients=SIGNED),
    "half, norm": lambda: half(norm_of, POINTS[0]),
    "half, given": lambda: half(mean, drawn(3, np.float16)),
    "transforms": lambda: transformed(lambda xs: directed(xs, 0), POINTS),
    "transforms, mean": lambda: transformed(mean, POINTS, coefficients=SIGNED),
    "transforms, number": lambda: transformed(norm_of, POINTS[0]),
    "transforms, traced t": lambda: transformed(line, *BOTH, jnp.float32(0.3)),
    "transforms, rule": lambda: transformed(with_rule(2), POINTS[0]),
    "transforms, not smooth": lambda: transformed(stopped, POINTS[0], derivatives=False),
}

WRONG = {
    "sizes": (
        lambda: affine(by_sizes, POINTS, coefficients=SIGNED),
        "affine equivariance: " + FAILS.format(leaf="[bw]", units=16),
    ),
    "sizes, idempotence": (
        lambda: testing.check_idempotent(by_sizes, POINTS, coefficients=SIGNED),
        "idempotence: " + FAILS.format(leaf="[bw]", units=8),
    ),
    "translation": (
        lambda: affine(doubled_bias, POINTS[0], factor=1.0),
        "affine equivariance: " + FAILS.format(leaf="b", units=16),
    ),
    "factors": (
        lambda: affine(lambda xs: directed(xs, 0), POINTS),
        "affine equivariance: " + FAILS.format(leaf="b", units=16),
    ),
    "not of the layout": (
        lambda: affine(norm_of, POINTS[0]),
        "the operator returns PyTreeDef.*, which is the layout of no point",
    ),
    "order": (
        lambda: permuted(first_heavier, POINTS),
        r"permutation invariance, order \(2, 1, 0\): " + ANY,
    ),
    "order, coefficients": (
        lambda: permuted(unaligned, POINTS, coefficients=SIGNED),
        r"permutation invariance, order \(2, 1, 0\): " + ANY,
    ),
    "order, rotations": (
        lambda: permuted(lambda xs: xs[1], POINTS),
        r"permutation invariance, order \(1, 2, 0\): " + ANY,
    ),
    "order, given": (
        lambda: permuted(lambda xs: xs[0], POINTS, order=(1, 0, 2)),
        r"permutation invariance, order \(1, 0, 2\): " + ANY,
    ),
    "odd": (lambda: testing.check_odd(positive, POINTS[0]), "oddness: " + ANY),
    "odd, one leaf": (
        lambda: testing.check_odd(lambda x: x | {"w": jnp.abs(x["w"])}, POINTS[0]),
        "oddness: " + FAILS.format(leaf="w", units=8),
    ),
    "idempotent": (lambda: testing.check_idempotent(halved, POINTS[0]), "idempotence: " + ANY),
    "ends, last": (
        lambda: ends(by_difference, *drawn(2)),
        "exact ends, t = 1.0: " + FAILS.format(leaf="[bw]", units=0),
    ),
    "ends, first": (lambda: ends(from_the_middle, *drawn(2)), "exact ends, t = 0.0: " + ANY),
    "ends, order": (
        lambda: ends(lambda xs, t: line(xs[0], xs[1], t), POINTS),
        "exact ends, t = 1.0: " + ANY,
    ),
    "scale": (
        lambda: scaled(lambda xs: directed(xs, 1e-8), POINTS, degree=0),
        "scale, factor 9.31e-10: " + ANY,
    ),
    "scale, threshold": (
        lambda: scaled(
            lambda x: jax.tree.map(lambda y: jnp.where(abs(y) > 1e-3, y, 0), x), POINTS[0]
        ),
        "scale, factor 0.001: " + ANY,
    ),
    "scale, degree": (lambda: scaled(mean, POINTS, degree=2), "scale, factor 3: " + ANY),
    "scale, float16": (
        lambda: scaled(lambda xs: directed(xs, 1.0), drawn(3, np.float16), degree=0),
        "scale, factor (16|0.0625): " + ANY,
    ),
    "half": (lambda: half(in_half, POINTS), "half precision, bfloat16: " + ANY),
    "half, float16": (
        lambda: half(in_half, drawn(3, np.float16)),
        "half precision, float16: " + ANY,
    ),
    "half, one of both": (
        lambda: half(
            lambda xs: in_half(xs) if xs[0]["b"].dtype == np.float16 else mean(xs), POINTS
        ),
        "half precision, float16: " + ANY,
    ),
    "half, widened": (
        lambda: half(widened, POINTS),
        r"half precision, bfloat16: leaf \['b'\] is float32\[8\], not bfloat16\[8\]",
    ),
    "jit": (
        lambda: transformed(branching, POINTS[0]),
        "jit: the operator raises TracerBoolConversionError: Attempted boolean conversion",
    ),
    "jit, value": (
        lambda: transformed(random_outside_jit, POINTS[0]),
        "jit: " + FAILS.format(leaf="w", units=64),
    ),
    "vmap": (
        lambda: transformed(batched_wrong, POINTS[0]),
        "vmap: " + FAILS.format(leaf="w", units=64),
    ),
    "vmap, a number": (
        lambda: transformed(first_of_batch(lambda x: x * 2), jnp.float32(3), derivatives=False),
        r"vmap: the array differs by [\d.e+]+ roundings, allowed are 64:",
    ),
    "vmap, degree 0": (
        lambda: transformed(first_of_batch(jnp.sign), POINTS[0]["w"], derivatives=False),
        r"vmap: the array differs by [\d.e+]+ roundings, allowed are 64:",
    ),
    "derivatives": (
        lambda: transformed(with_rule(1.9), POINTS[0]),
        r"derivatives: along leaf \[0\]\['b'\] of the weights the result changes by",
    ),
    "derivatives, stopped": (
        lambda: transformed(stopped, POINTS[0]),
        r"derivatives: along leaf \[0\]\['w'\] .* by its gradient 0: ",
    ),
    "sharding, flattened": (
        lambda: transformed(flattened, POINTS[0]),
        "explicit sharding, compiled: the operator raises ",
    ),
    "sharding, gathered": (
        lambda: transformed(gathered, POINTS[0]),
        r"explicit sharding, compiled: leaf \['w'\] is float32\[8,4\], not float32\[8@shards,4\]",
    ),
}


@pytest.mark.parametrize("check", RIGHT.values(), ids=RIGHT)
def test_a_right_operator_passes(check):
    check()


@pytest.mark.parametrize(("check", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_operator_fails_by_law_and_leaf(check, message):
    with pytest.raises(AssertionError) as failure:
        check()
    assert re.match(message, str(failure.value))


@given(xs=testing.points(dtype=testing.dtypes()), data=st.data())
def test_a_right_average_has_its_laws_on_all_that_is_drawn(xs, data):
    c = data.draw(testing.coefficients(len(xs)))
    enlarged = sum(map(abs, c)) / abs(sum(c))
    permuted(mean, xs, coefficients=c, units=8 * enlarged)
    affine(mean, xs, coefficients=c, units=16 * enlarged)
    scaled(mean, xs, coefficients=c, units=8 * enlarged)
    testing.check_odd(mean, xs, coefficients=c, units=0)
    testing.check_idempotent(mean, xs, coefficients=c, units=8 * enlarged)
    half(mean, xs, coefficients=c)


@given(models=testing.tuned(2, numpy=True))
def test_numpy_leaves_and_two_arguments_pass_through(models):
    def extrapolated(base, tuned):
        return jax.tree.map(
            lambda b, *xs: jnp.asarray(b) + sum(jnp.asarray(x - b) for x in xs), base, *tuned
        )

    affine(extrapolated, *models)
    scaled(extrapolated, *models)


def test_a_tolerance_is_a_number_of_roundings():
    x = {"w": np.array([1.0, 2.0, np.nan, np.inf], np.float32), "n": np.array([1])}
    unit = 2 * np.finfo(np.float32).eps
    testing.assert_close(x, x, units=0)
    for times in (1, 5):
        y = x | {"w": x["w"] + np.float32(times * unit)}
        testing.assert_close(y, x, units=times)
        with pytest.raises(AssertionError, match=rf"leaf \['w'\] differs by {times} roundings"):
            testing.assert_close(y, x, units=times - 0.01)
        testing.assert_close(y, x, units=0.01 * times, scale=200)
    for y in (
        x | {"w": np.array([1.0, 2.0, 0.0, np.inf], np.float32)},
        x | {"w": np.array([1.0, 2.0, np.nan, -np.inf], np.float32)},
        x | {"w": np.array([1.0, np.nan, np.nan, np.inf], np.float32)},
        x | {"n": np.array([4])},
    ):
        with pytest.raises(AssertionError, match=r"differs by (inf|infinitely many) roundings"):
            testing.assert_close(y, x, units=1e6)
    with pytest.raises(AssertionError, match=r"differs by 0\.5 roundings"):
        testing.assert_close({"w": np.float32(1 + unit)}, {"w": np.float32(1)}, units=0, scale=4)
    with pytest.raises(AssertionError, match="a rounding is"):
        testing.assert_close({"w": np.float32(2)}, {"w": np.float32(1)}, scale=np.nan)


def test_layouts_and_types_are_compared():
    x = {"w": jnp.ones(3), "b": jnp.ones(())}
    with pytest.raises(AssertionError, match=r"layout is PyTreeDef.*, not PyTreeDef"):
        testing.assert_close([jnp.ones(3), jnp.ones(())], x)
    for other in (jnp.ones(2), jnp.ones((3, 1)), jnp.ones(3, jnp.bfloat16), jnp.full(3, 1.0)):
        with pytest.raises(AssertionError, match=r"leaf \['w'\] is .*, not float\d\d\[3\]"):
            testing.assert_close(x | {"w": other}, x)
    with pytest.raises(AssertionError, match="the array is "):
        testing.assert_close(jnp.ones(2), jnp.ones(3))


def test_a_vector_and_back():
    x = [{"b": jnp.arange(3.0), "w": jnp.ones((2, 1), jnp.bfloat16)}, np.float32(7)]
    assert testing.vector(x).dtype == np.longdouble
    assert testing.vector(x).tolist() == [0, 1, 2, 1, 1, 7]
    testing.assert_close(testing.like(testing.vector(x[0]), x[0]), x[0], units=0)
    with pytest.raises(ValueError, match=r"entries has shape \(4,\), the tree has 5 entries"):
        testing.like(np.zeros(4), x[0])
    assert testing.size(x[0], [np.float32(7)]) == pytest.approx(np.sqrt(7) + 7)
    assert testing.vector({}).shape == (0,)


def test_layouts_have_every_kind_of_leaf():
    shapes = [
        shape
        for layout in testing.LAYOUTS
        for shape in jax.tree.leaves(layout, is_leaf=lambda node: isinstance(node, tuple))
    ]
    assert {len(shape) for shape in shapes} == {0, 1, 2, 3, 4}
    assert any(0 in shape for shape in shapes)
    text = str([jax.tree.structure(layout) for layout in testing.LAYOUTS])
    assert all(kind in text for kind in ("None", "[", "{"))


MODEL = {"w": jnp.ones((2, 3), jnp.bfloat16), "rest": (jax.ShapeDtypeStruct((4,), jnp.float16),)}


@given(data=st.data())
def test_a_model_is_a_layout(data):
    draws = [
        data.draw(testing.weights(MODEL)),
        *data.draw(testing.points(2, layout=MODEL)),
        *data.draw(testing.pairs(layout=MODEL)),
        data.draw(testing.tuned(1, layout=MODEL))[0],
    ]
    for x in draws:
        assert jax.tree.map(lambda y: (y.shape, y.dtype), x) == jax.tree.map(
            lambda y: (y.shape, y.dtype), MODEL
        )
    wide = data.draw(testing.weights(MODEL, jnp.float32))
    assert {x.dtype for x in jax.tree.leaves(wide)} == {np.dtype(np.float32)}


def test_what_is_no_layout_is_refused():
    with pytest.raises(TypeError, match=r"leaf \['n'\] of layout is no floating-point array"):
        testing.weights({"w": jnp.ones(2), "n": jnp.ones(2, int)})
    with pytest.raises(TypeError, match=r"leaf \['w'\] of layout is no shape, got 3"):
        testing.weights({"w": 3})


@given(data=st.data())
def test_numpy_leaves_have_various_strides_and_the_same_points(data):
    x = data.draw(testing.weights(numpy=True, dtype=testing.dtypes()))
    assert all(isinstance(y, np.ndarray) for y in jax.tree.leaves(x))
    assert len({y.dtype for y in jax.tree.leaves(x)}) == 1
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    strided = [stride(rows) for stride in strategies.STRIDES]
    assert len({y.strides for y in strided}) == len(strided)
    for y in strided:
        np.testing.assert_array_equal(y, rows)
    for stride in strategies.STRIDES:
        assert stride(np.float32(1)[...]).shape == ()


@given(data=st.data(), count=st.integers(1, 3))
def test_coefficients_and_keys(data, count):
    signed = data.draw(testing.coefficients(count))
    assert len(signed) == count
    assert abs(sum(signed)) > 0.2 * max(map(abs, signed))
    assert min(data.draw(testing.coefficients(count, positive=True))) > 0
    assert jnp.issubdtype(data.draw(testing.keys()).dtype, jax.dtypes.prng_key)


@given(data=st.data(), rank=st.sampled_from([0, 1, 3]))
def test_low_rank_edits_have_factors_where_weights_have_matrices(data, rank):
    layout = {"m": (4, 3), "s": (2, 4, 3), "k": (2, 2, 3, 5), "b": (3,)}
    edit = data.draw(testing.low_rank_edits(layout, rank=rank))
    assert {name: x.shape for name, x in edit.items()} == layout | {"k": (12, 5)}
    assert {name for name, x in edit.items() if isinstance(x, LowRank)} == {"m", "s", "k"}
    assert {x.rank for x in edit.values() if isinstance(x, LowRank)} == {rank}
    some = data.draw(testing.low_rank_edits())
    assert jax.tree.leaves(some)


@pytest.mark.parametrize(
    "strategy",
    [
        testing.pairs(layout=(3,)),
        testing.points(2, layout=(3,)),
        testing.tuned(1, layout=(3,)).map(lambda models: (models[0], models[1][0])),
    ],
    ids=["pairs", "points", "tuned"],
)
def test_distances_are_drawn_from_far_to_near_to_none(strategy):
    seen = []

    @settings(max_examples=200)
    @given(pair=strategy)
    def look(pair):
        x, y = (testing.vector(z) for z in pair)
        if x.any():
            seen.append(np.linalg.norm(x - y) / np.linalg.norm(x))

    look()
    assert max(seen) > 0.5
    assert min(seen) == 0
    assert any(1e-6 < distance < 1e-3 for distance in seen)
    assert any(1e-3 < distance < 1e-1 for distance in seen)


def test_strategies_call_no_function_of_wspace():
    taken = {
        name: value
        for module in (strategies, factors)
        for name, value in vars(module).items()
        if str(getattr(value, "__module__", "")).startswith("wspace")
        and not value.__module__.startswith("wspace.testing")
    }
    assert taken == {"LowRank": LowRank}  # a record


def test_without_hypothesis_the_extra_is_named():
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import wspace; from wspace import *\n"
        "try: wspace.testing\n"
        "except ImportError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    wanted = 'wspace.testing needs hypothesis: pip install "wspace[testing]"'
    assert run.stdout.strip() == wanted
    code = "import sys, wspace; from wspace import testing; print(wspace.testing is testing)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "True"
