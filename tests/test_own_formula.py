"""Laws of formulas that are lifted to trees: they keep the rules of every function here."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.strategies import FLOAT
from wspace import _lazy, tree
from wspace._lazy import Lazy

LIFTED = {
    "elementwise": tree.elementwise(lambda _, arrays: arrays[0] + arrays[1]),
    "reduction": tree.reduction(lambda _, arrays: arrays[0] * arrays[1]),
}
X = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float32)}
lifted = pytest.mark.parametrize("function", LIFTED.values(), ids=LIFTED)


def lazy(x):
    return Lazy(x.shape, x.dtype, lambda span, _: _lazy.taken(x, span))


@lifted
@pytest.mark.parametrize(
    ("other", "error", "words"),
    [
        ({"w": X["w"], "b": np.ones(1, np.float32)}, ValueError,
         "leaf ['b'] has shape (3,) in trees[0], (1,) in trees[1]"),
        ({"w": X["w"], "b": np.ones((1, 3), np.float32)}, ValueError, "leaf ['b'] has shape"),
        ({"w": X["w"]}, ValueError, "trees[0] has a leaf ['b'] that trees[1] lacks"),
        (X | {"z": X["b"]}, ValueError, "trees[1] has a leaf ['z'] that trees[0] lacks"),
        ({"w": X["w"], "b": np.ones(3, int)}, TypeError, "leaf ['b'] of trees[1] has dtype int"),
        ({"w": X["w"], "b": np.ones(3, np.uint8)}, TypeError, "tree.partition"),
        ({"w": X["w"], "b": np.ones(3, complex)}, TypeError, "has dtype complex"),
        ({"w": X["w"].T, "b": X["b"]}, ValueError, "leaf ['w'] has shape (2, 3) in trees[0]"),
    ],
)  # fmt: skip
def test_trees_of_another_layout_are_refused_by_leaf(function, other, error, words, refuses):
    for form in (function, jax.jit(function)):
        with refuses(error, match=re.escape(words)):
            form((), [X, other])


@lifted
def test_lazy_leaves_have_the_same_rules(function, refuses):
    asleep = jax.tree.map(lazy, X)
    with refuses(ValueError, match=r"leaf \['b'\] has shape \(3,\) in trees\[0\], \(1,\)"):
        function((), [asleep, {"w": X["w"], "b": lazy(np.ones(1, np.float32))}])
    with refuses(TypeError, match=r"leaf \['b'\] of trees\[0\] has dtype int32"):
        function((), [asleep | {"b": lazy(np.ones(3, np.int32))}, X])


@lifted
def test_a_step_counter_is_set_aside_as_anywhere_else(function, refuses):
    states = [{"w": np.ones(2, np.float32), "step": step} for step in (3, 4)]
    with refuses(TypeError, match=r"leaf \['step'\] of trees\[0\] is a .*tree\.partition"):
        function((), states)
    weights = [tree.partition(state)[0] for state in states]
    assert jnp.all(jnp.asarray(jax.tree.leaves(function((), weights))) == 2)


@lifted
def test_one_tree_is_no_sequence_of_trees(function, refuses):
    with refuses(TypeError, match="trees must be a sequence of trees"):
        function((), X)
    with refuses(TypeError, match="trees must be a sequence of trees"):
        function((), X["w"])
    with refuses(ValueError, match="trees is empty"):
        function((), [])


@lifted
@pytest.mark.parametrize("scalar", [X, [1.0, 2.0], np.ones(3), "0.5", None, 1j])
def test_a_scalar_is_one_number(function, scalar, refuses):
    with refuses(TypeError, match=r"scalars\[1\] must be one real number"):
        function((1.0, scalar), [X, X])
    with refuses(TypeError, match="scalars must be a sequence of numbers"):
        function(1.0, [X, X])


def test_numbers_of_leaves_are_a_tree_like_the_first(refuses):
    scaled = tree.elementwise(lambda scalars, arrays: scalars[0] * arrays[0])
    found = scaled((), [X], [{"w": 2.0, "b": jnp.float32(3.0)}])
    np.testing.assert_array_equal(found["w"], 2 * X["w"])
    np.testing.assert_array_equal(found["b"], 3 * X["b"])
    for bad in ({"w": 2.0}, 2.0, {"w": 2.0, "b": [1.0, 2.0]}):
        with refuses(ValueError, match=r"each\[0\] must be a tree like the weights"):
            scaled((), [X], [bad])
    with refuses(TypeError, match=r"each\[0\] at leaf \['b'\] must be one real number"):
        scaled((), [X], [{"w": 2.0, "b": np.ones(3)}])
    with refuses(TypeError, match="each must be a sequence of trees"):
        scaled((), [X], {"w": 2.0, "b": 3.0})


@pytest.mark.parametrize("made", [jax.random.key, jax.random.PRNGKey])
def test_keys_of_both_kinds_are_taken(made):
    def drawn(keys, arrays):
        return jax.random.normal(keys[0], arrays[0].shape, arrays[0].dtype)

    draw, one = tree.elementwise(drawn), {"w": X["w"]}
    key, keys = made(0), tree.split_key_like(made(0), one)
    for got, own in ((draw((), [one], [keys]), keys["w"]), (draw((key,), [one]), key)):
        wanted = jax.random.normal(own, (2, 3), jnp.float32)
        np.testing.assert_array_equal(got["w"], wanted)


def test_a_formula_returns_a_number_for_every_entry(refuses):
    for formula in (
        lambda _, arrays: arrays[0].sum(),
        lambda _, arrays: arrays[0][None],
        lambda *_: 0.0,
    ):
        for lift in (tree.elementwise, tree.reduction):
            with refuses(ValueError, match=r"for arrays of shape \(3,\): it must return one"):
                lift(formula)((), [{"b": X["b"]}])
    for lift in (tree.elementwise, tree.reduction):
        with refuses(TypeError, match="weights are real numbers"):
            lift(lambda _, arrays: jax.lax.complex(arrays[0], arrays[0]))((), [{"b": X["b"]}])


def test_masks_are_taken_but_weights_are_not_rounded_to_them(refuses):
    mask = jax.tree.map(lambda x: x > 0, X)
    kept = tree.elementwise(lambda _, arrays: jnp.where(arrays[1], arrays[0], 0))((), [X, mask])
    np.testing.assert_array_equal(kept["w"], X["w"])
    either = tree.elementwise(lambda _, arrays: arrays[0] | arrays[1])((), [mask, mask])
    assert either["w"].dtype == bool
    assert tree.reduction(lambda _, arrays: arrays[0])((), [mask]) == 8
    chosen = [mask, X], lambda _, arrays: jnp.where(arrays[0], arrays[1], 0)
    with refuses(ValueError, match="put a tree of weights first"):
        tree.elementwise(chosen[1])((), chosen[0])
    wide = tree.elementwise(chosen[1], rounded=False)((), chosen[0])
    np.testing.assert_array_equal(wide["w"], X["w"])


def test_results_have_the_dtype_of_the_first_tree_and_scalars_widen_nothing():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), X)
    third = tree.elementwise(lambda scalars, arrays: scalars[0] * arrays[0] + arrays[1])
    for first, dtype in ((half, jnp.bfloat16), (X, jnp.float32)):
        for c in (1 / 3, np.float64(1 / 3), np.int64(2), jnp.int32(2), True):
            assert third((c,), [first, X])["w"].dtype == dtype
    double = jax.tree.map(np.float64, X)
    assert third((1 / 3,), [double, X])["w"].dtype == FLOAT


def test_many_points_at_once_keep_the_rules(refuses):
    rows = {"w": jnp.ones((4, 2, 3)), "b": jnp.ones((4, 3))}
    added = jax.vmap(lambda x: LIFTED["elementwise"]((), [x, x]))(rows)
    assert (added["w"] == 2).all()
    with refuses(ValueError, match=r"leaf \['b'\] has shape \(3,\) in trees\[0\], \(1,\)"):
        jax.vmap(lambda x: LIFTED["reduction"]((), [x, x | {"b": x["b"][:1]}]))(rows)
