"""The checks that many functions share: what is refused by value is NaN where it is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import tree_leaves_with_path

from wspace import _checks, _numerics


@pytest.mark.parametrize(
    ("check", "inside", "outside", "words"),
    [
        (_checks.nonnegative, (0.0, 2.5), (-0.5, np.inf, np.nan), "finite and at least 0"),
        (_checks.above_zero, (0.5, 2.5), (0.0, -0.5, np.inf, np.nan), "finite and positive"),
        (
            lambda name, x: _checks.between(name, x, 0, 1),
            (0.25, 0.75),
            (0.0, 1.0, -1.0, np.nan),
            "between 0 and 1",
        ),
    ],
)
def test_a_number_out_of_its_domain_raises_or_is_nan(refuses, check, inside, outside, words):
    traced = jax.jit(lambda x: check("x", x))
    for value in inside:
        assert check("x", value) == value == traced(value)
    for value in outside:
        with refuses(ValueError, match=f"x must be {words}, got {value}"):
            check("x", value)
        assert jnp.isnan(traced(value)) or np.isinf(value)


def test_a_tree_of_entries_has_one_at_each_leaf(refuses):
    like = {"a": [np.zeros(1), None], "b": np.zeros(2)}
    told = {"a": [1.0, None], "b": (2.0, 3.0)}
    places = _checks.entries("told", told, like, "numbers", is_leaf=lambda _: True)
    assert [(entry, where) for entry, _, where in places] == [
        (1.0, "told at leaf ['a'][0]"),
        ((2.0, 3.0), "told at leaf ['b']"),
    ]
    assert [leaf.shape for _, leaf, _ in places] == [(1,), (2,)]
    for bad in (told, told | {"b": None}, {"a": told["a"]}, {"a": [1.0], "b": 2.0}, 1.0):
        with refuses(ValueError, match="told must be a tree like the weights, with numbers: got"):
            _checks.entries("told", bad, like, "numbers")
    told["b"] = None
    optional = _checks.entries("told", told, like, "numbers", is_leaf=lambda x: x is None)
    assert [entry for entry, *_ in optional] == [1.0, None]


def test_a_path_is_named_even_where_the_tree_is_one_leaf():
    tree = {"a": [np.zeros(1), np.zeros(2)]}
    assert [_checks.path_of(p) for p, _ in tree_leaves_with_path(tree)] == ["['a'][0]", "['a'][1]"]
    assert [_checks.path_of(p) for p, _ in tree_leaves_with_path(np.zeros(1))] == ["(root)"]


def test_what_is_undefined_raises_where_it_is_known_and_is_nan_where_it_is_traced(refuses):
    def root(x):
        return _checks.poisoned(jnp.sqrt(jnp.abs(x)), x < 0, lambda: f"{x} has no root")

    assert root(jnp.float32(4)) == jax.jit(root)(4.0) == 2
    assert jnp.isnan(jax.jit(root)(-4.0))
    with refuses(ValueError, match=r"-4.0 has no root"):
        root(jnp.float32(-4))


def test_a_number_takes_over_nan_of_others():
    x = jnp.arange(2.0)
    assert np.array_equal(_numerics.with_nan_of(x, 3.0, jnp.asarray(-2.0)), [0, 1])
    for bad in (jnp.nan, jnp.inf):
        assert np.isnan(_numerics.with_nan_of(x, 3.0, bad)).all()
    assert np.array_equal(np.isnan(_numerics.with_nan_of(x, x / x)), [True, False])
