"""Laws of `wspace.tree`."""

import hashlib
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import FLOAT, layouts
from wspace import average, interpolate, negative, tree
from wspace.testing import (
    LAYOUTS,
    assert_close,
    coefficients,
    like,
    pairs,
    points,
    size,
    vector,
    weights,
)
from wspace.testing.comparison import eps

pytestmark = pytest.mark.exact

combine, vdot, norm = jax.jit(tree.combine), jax.jit(tree.vdot), jax.jit(tree.norm)
each_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])


@given(data=st.data(), xs=points())
def test_combine_is_the_sum_of_products(data, xs):
    c = data.draw(coefficients(len(xs)))
    wanted = sum(k * vector(x) for k, x in zip(c, xs, strict=True))
    scale = sum(abs(k) * size(x) for k, x in zip(c, xs, strict=True))
    assert_close(combine(c, xs), like(wanted, xs[0]), units=len(xs), scale=scale)


@given(x=layouts.flatmap(weights))
def test_combine_with_coefficient_one_is_the_identity_bit_for_bit(x):
    assert_close(combine((1,), (x,)), x, units=0)


@each_dtype
@given(data=st.data())
def test_result_has_the_dtypes_of_the_first_tree_whatever_the_scalars(dtype, data):
    x, y = (data.draw(weights(LAYOUTS[1], one)) for one in (dtype, jnp.float32))
    c = jnp.asarray(0.5, FLOAT)
    wanted = like(0.5 * vector(x) - 2 * vector(y), jax.tree.map(lambda a: a.astype(FLOAT), x))
    got = combine((c, -2.0), (x, y))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(got))
    assert_close(got, tree.cast_like(wanted, x), units=1)


@given(pair=pairs())
def test_vdot_is_the_sum_of_products_and_symmetric(pair):
    x, y = pair
    wanted = np.dot(vector(x), vector(y))
    assert abs(vdot(x, y) - float(wanted)) <= 8 * eps(vdot(x, y)) * size(x) * size(y)
    assert vdot(x, y) == vdot(y, x)


@given(pair=pairs(), c=st.floats(-4, 4, width=16))
def test_norm_is_homogeneous_and_has_the_triangle_inequality(pair, c):
    x, y = pair
    assert_close(norm(combine((c,), (x,))), abs(c) * norm(x), units=8)
    assert norm(combine((1, 1), (x, y))) <= (norm(x) + norm(y)) * (1 + 8 * eps(norm(x)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_norm_and_vdot_of_two_thousand_leaves_keep_five_digits(dtype):
    rng = np.random.default_rng(0)
    for entries in (np.full((2000, 64), 0.01), rng.normal(size=(2000, 64)) + 1):
        x = [jnp.asarray(row, dtype) for row in entries]
        exact = float(np.dot(vector(x), vector(x)))
        for got, wanted in ((tree.vdot(x, x), exact), (tree.norm(x), np.sqrt(exact))):
            assert got.dtype == jnp.float32
            assert abs(float(got) - wanted) <= 1e-6 * wanted
    # The popular form, which sums in the dtype of the leaves, fails this law.
    x = [jnp.full(64, 0.01, jnp.bfloat16)] * 2000
    popular = jax.tree.reduce(jnp.add, [jnp.sum(leaf * leaf) for leaf in x])
    assert abs(float(popular) / float(tree.vdot(x, x)) - 1) > 0.5


def test_norm_of_a_half_precision_tree_does_not_overflow():
    assert norm([jnp.full(4, 3e4, jnp.float16)]) == 6e4


@given(x=layouts.flatmap(weights))
def test_gradient_of_the_norm_is_the_unit_vector_and_zero_at_zero(x):
    slope = jax.grad(tree.norm)(x)
    length = np.sqrt(np.dot(vector(x), vector(x)))
    assert_close(slope, like(vector(x) / (length or 1), x), units=8, scale=1)


def test_trees_without_entries_have_norm_zero():
    for x in ({}, [], None, {"empty": jnp.zeros((0, 3))}):
        assert norm(x) == 0
        assert vdot(x, x) == 0


MIXED = {
    "w": jnp.ones(2),
    "half": jnp.ones(2, jnp.bfloat16),
    "numpy": np.ones(2),
    "step": jnp.array(3),
    "flag": True,
    "lr": 0.1,
    "key": jax.random.key(0),
    "fp8": jnp.ones(2, jnp.float8_e4m3fn),
    "f": len,
    "none": None,
    "deep": [{"mask": jnp.array([True])}, (np.float32(2.0),)],
}


def test_partition_takes_the_weights_apart_and_join_puts_them_back():
    kept, rest = tree.partition(MIXED)
    assert set(jax.tree.leaves(jax.tree.map(lambda x: str(x.dtype), kept))) <= {
        "float32",
        "bfloat16",
        "float64",
    }
    assert len(jax.tree.leaves(kept)) == 4
    assert rest["fp8"] is MIXED["fp8"]
    joined = tree.join(kept, rest)
    assert jax.tree.structure(joined) == jax.tree.structure(MIXED)
    for got, wanted in zip(jax.tree.leaves(joined), jax.tree.leaves(MIXED), strict=True):
        assert got is wanted


STATE = {
    "params": {"norm": {"scale": np.ones(2, np.float32)}, "layers": [np.ones((2, 3), np.float32)]},
    "batch_stats": {"norm": {"mean": np.zeros(2, np.float32), "var": np.ones(2, np.float32)}},
    "opt": ({"mu": [np.ones((2, 3), np.float32)], "count": np.int32(3)}, None),
    "key": jax.random.key(0),
    "step": 7,
}
PARAMS = ["params.layers.0", "params.norm.scale"]
FLOATS = [*PARAMS, "batch_stats.norm.mean", "batch_stats.norm.var", "opt.0.mu.0"]


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        (None, FLOATS),
        ("*", FLOATS),
        ("params.*", PARAMS),
        (["params.*", "opt.*"], [*PARAMS, "opt.0.mu.0"]),
        (("!batch_stats.*", "!opt.*"), PARAMS),
        ("!*.mean", [name for name in FLOATS if not name.endswith("mean")]),
        (["*.norm.*", "!batch_stats.*"], ["params.norm.scale"]),
        (["!batch_stats.*", "*.norm.*"], ["params.norm.scale"]),
        ("params.norm.scale", ["params.norm.scale"]),
        ("step", []),
        ([], FLOATS),
        (lambda name, _: name.startswith("params"), PARAMS),
        (lambda _, leaf: leaf.ndim > 1, ["params.layers.0", "opt.0.mu.0"]),
        (lambda *_: True, FLOATS),
        (lambda *_: np.bool_(False), []),
        (lambda _, leaf: (leaf == 0).all(), ["batch_stats.norm.mean"]),
        (lambda _, leaf: jnp.any(leaf == 0), ["batch_stats.norm.mean"]),
    ],
)
def test_where_says_what_is_set_aside_beside_what_is_no_weight(where, kept):
    weights, rest = tree.partition(STATE, where)

    def names(x):
        return {
            jax.tree_util.keystr(path, simple=True, separator=".")
            for path, _ in jax.tree_util.tree_leaves_with_path(x)
        }

    assert names(weights) == set(kept)
    assert names(rest) == names(STATE) - set(kept)
    joined = tree.join(weights, rest)
    assert jax.tree.structure(joined) == jax.tree.structure(STATE)
    assert all(map(operator.is_, jax.tree.leaves(joined), jax.tree.leaves(STATE)))


def test_where_that_says_nothing_is_refused(refuses):
    for where, error, words in (
        (
            "batch_stat.*",
            ValueError,
            "glob 'batch_stat.*', which matches no leaf.*batch_stats.norm",
        ),
        ("!*.men", ValueError, r"glob '!\*\.men', which matches no leaf"),
        (["params.*", "x"], ValueError, "glob 'x', which matches no leaf"),
        (3, TypeError, "where must be a function of name and leaf, a glob"),
        ([3], TypeError, "where must be a function of name and leaf, a glob"),
        ({"params.*": True}, TypeError, "where must be a function of name and leaf, a glob"),
    ):
        with refuses(error, match=words):
            tree.partition(STATE, where)
    with refuses(TypeError, match=r"where must say of leaf \['w'\] what is known when tracing"):
        jax.jit(lambda x: tree.partition(x, lambda _, leaf: leaf.sum() > 0))({"w": jnp.ones(2)})
    by_shape = jax.jit(lambda x: tree.partition(x, lambda _, leaf: leaf.ndim == 1))
    assert_close(by_shape({"w": jnp.ones(2)}), ({"w": jnp.ones(2)}, {"w": None}), units=0)


def test_statistics_and_moments_stay_when_weights_are_averaged():
    parts = {"params", "batch_stats", "opt"}
    other = STATE | {name: jax.tree.map(lambda x: x + 2, STATE[name]) for name in parts}
    (x, rest), (y, _) = (tree.partition(state, where="params.*") for state in (STATE, other))
    joined = tree.join(tree.combine((0.5, 0.5), (x, y)), rest)
    assert (joined["params"]["layers"][0] == 2).all()
    assert joined["batch_stats"]["norm"]["mean"] is STATE["batch_stats"]["norm"]["mean"]
    assert joined["opt"][0]["mu"][0] is STATE["opt"][0]["mu"][0]
    assert joined["step"] == 7


def test_weights_in_the_other_byte_order_are_weights():
    other = np.dtype(np.float32).newbyteorder()
    odd = {
        "w": np.arange(3, dtype=other),
        "n": np.arange(2, dtype=np.dtype(np.int32).newbyteorder()),
    }
    kept, rest = tree.partition(odd)
    assert kept["n"] is rest["w"] is None
    assert rest["n"] is odd["n"]
    assert kept["w"].dtype == np.float32
    assert kept["w"].dtype.isnative
    assert np.array_equal(kept["w"], [0, 1, 2])
    assert_close(average.mean([kept, kept])["w"], jnp.arange(3, dtype=jnp.float32))
    with pytest.raises(TypeError, match=r"leaf \['w'\] of x .*byte order.*newbyteorder"):
        tree.norm({"w": odd["w"]})


def test_join_refuses_what_is_not_one_partition():
    with pytest.raises(ValueError, match=r"both weights and rest hold a leaf at \['w'\]"):
        tree.join({"w": 1}, {"w": 2})
    with pytest.raises(ValueError, match="differ in structure"):
        tree.join({"w": 1}, {"w": None, "b": 2})


def test_leaves_that_are_no_weights_are_refused_by_path(refuses):
    for leaf, words in (
        (jnp.ones(2, jnp.int32), "has dtype int32"),
        (jnp.ones(2, jnp.complex64), "has dtype complex64"),
        (jnp.ones(2, jnp.float8_e4m3fn), "has dtype float8_e4m3fn"),
        (jax.random.key(0), "has dtype key<fry>"),
        (jnp.array(True), "has dtype bool"),
        (0.5, "is a <class 'float'>"),
        ("text", "is a <class 'str'>"),
    ):
        with refuses(TypeError, match=rf"leaf \['a'\]\[0\] of x {words}.*tree\.partition"):
            tree.norm({"a": [leaf]})


def test_numpy_leaves_are_accepted_and_none_is_structure(refuses):
    got = tree.combine((1, 1), ({"w": np.ones(2), "n": None}, {"w": jnp.ones(2), "n": None}))
    assert isinstance(got["w"], jax.Array)
    assert got["n"] is None
    with refuses(ValueError, match=r"points\[1\] has a leaf \['n'\] that points\[0\] lacks"):
        tree.combine((1, 1), ({"w": jnp.ones(2), "n": None}, {"w": jnp.ones(2), "n": jnp.ones(1)}))


def test_combine_refuses_bad_counts_and_numbers(refuses):
    x = {"w": jnp.ones(2)}
    with refuses(ValueError, match="coefficients has 1 numbers for 2 points"):
        tree.combine((1,), (x, x))
    with refuses(ValueError, match="points is empty"):
        tree.combine((), ())
    with refuses(TypeError, match="points must be a sequence of trees"):
        tree.combine((1,), x)
    with refuses(ValueError, match=r"coefficients\[1\] must be finite, got nan"):
        tree.combine((1, float("nan")), (x, x))
    with refuses(ValueError, match=r"coefficients\[0\] must be one number, got shape \(2,\)"):
        tree.combine((jnp.ones(2), 1), (x, x))


def test_containers_that_differ_are_refused(refuses):
    with refuses(ValueError, match="different containers"):
        tree.vdot([jnp.ones(1)], (jnp.ones(1),))


def test_nan_reaches_only_what_depends_on_it():
    x = {"b": jnp.ones(2), "w": jnp.array([1.0, jnp.nan])}
    got = tree.combine((1, 2), (x, x))
    assert bool((got["b"] == 3).all())
    np.testing.assert_array_equal(np.isnan(got["w"]), [False, True])


@given(pair=pairs(), t=st.floats(0, 1, width=16))
def test_per_leaf_treats_every_leaf_as_a_point(pair, t):
    for function in (interpolate.slerp, interpolate.lerp):
        got = tree.per_leaf(function)(*pair, t)
        wanted = jax.tree.map(lambda x, y, f=function: f(x, y, t), *pair)
        assert_close(got, wanted, units=0)


@given(xs=points(count=3, layout=LAYOUTS[1]))
def test_per_leaf_takes_sequences_and_gives_back_trees_in_place_of_arrays(xs):
    wanted = jax.tree.map(lambda *leaves: average.mean(leaves, (1, 2, 3)), *xs)
    assert_close(tree.per_leaf(average.mean)(xs, (1, 2, 3)), wanted, units=0)
    moved = tree.per_leaf(negative.retarget)(xs, (1, 2, 3), xs[0], costs=(1, 2, 1))
    by_leaf = {
        k: negative.retarget([x[k] for x in xs], (1, 2, 3), xs[0][k], costs=(1, 2, 1))
        for k in xs[0]
    }
    assert_close(moved, [{k: by_leaf[k][i] for k in by_leaf} for i in range(3)], units=0)
    assert_close(tree.per_leaf(tree.norm)(xs[0]), jax.tree.map(tree.norm, xs[0]), units=0)


def test_per_leaf_says_which_leaf_failed(refuses):
    x, y = {"w": jnp.ones(2), "b": jnp.ones(1)}, {"w": jnp.ones(3), "b": jnp.ones(1)}
    with refuses(ValueError, match="shape") as caught:
        tree.per_leaf(tree.vdot)(x, y)
    assert caught.value.__notes__ == ["where (root) is leaf ['w'], taken by itself"]


def test_keys_depend_on_the_path_alone():
    key = jax.random.key(3)
    layout = {"a": {"w": jnp.ones(2), "b": jnp.ones(1)}, "c": [jnp.ones(1)]}
    keys = tree.split_key_like(key, layout)
    fewer = tree.split_key_like(key, {"a": {"w": jnp.ones((9, 9))}})
    assert keys["a"]["w"] == fewer["a"]["w"]
    draws = {int(jax.random.bits(k)) for k in jax.tree.leaves(keys)}
    assert len(draws) == 3
    # The rule itself, so that keys stay the same from version to version.
    digest = hashlib.sha256(b"['a']['w']").digest()
    first, second = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4))
    assert keys["a"]["w"] == jax.random.fold_in(jax.random.fold_in(key, first), second)
    assert tree.split_key_like(jax.random.key(4), layout)["a"]["w"] != keys["a"]["w"]


def test_new_scalars_compile_nothing():
    calls = []

    @tree.elementwise
    def shrink(scalars, arrays):
        calls.append(1)
        return scalars[0] * arrays[0]

    for c in (0.5, 2, jnp.float32(3), np.float64(1.5)):
        shrink((c,), ({"w": jnp.ones(3)},))
    assert len(calls) <= 2  # one for numbers, one for arrays where they are of another dtype


@each_dtype
def test_what_is_not_rounded_keeps_the_digits_of_the_arithmetic(dtype):
    def third(_, arrays):
        return arrays[0] / 3

    x = {"w": jnp.arange(1, 5).astype(dtype)}
    wide = tree.elementwise(third, rounded=False)((), (x,))["w"]
    assert wide.dtype == jnp.float32
    np.testing.assert_array_equal(wide, np.arange(1, 5, dtype=np.float32) / np.float32(3))
    assert tree.elementwise(third)((), (x,))["w"].dtype == dtype
