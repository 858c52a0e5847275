"""The checks that many functions share: what is refused by value is NaN where it is traced."""

import types

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


@pytest.mark.parametrize("size", [1e-300, 1e-36, 1e-30, 1.0, 1e30, 3e38, 1e308])
def test_of_numbers_brought_to_one_only_ratios_matter(size):
    shares = np.array([0.75, -0.5, 0.5])
    expected = [1.0, -2 / 3, 2 / 3]
    np.testing.assert_allclose(_checks.affine(size * shares, 3), expected, rtol=1e-15)
    np.testing.assert_allclose(
        _checks.positive("costs", size * abs(shares), 3) @ [1, -1, -0.5], 0, atol=1e-15
    )
    if 1e-38 < size < 1e38:
        given = jnp.asarray(size * shares, jnp.float32)
        found = jax.jit(_checks.affine, static_argnums=1)(given, 3)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    largest = jnp.asarray(np.float32(min(max(size, 1e-37), 3e38)) * np.ones(3, np.float32))
    np.testing.assert_allclose(jax.jit(_checks.affine, static_argnums=1)(largest, 3), 1 / 3)


def test_the_derivative_of_a_share_is_that_of_the_quotient():
    def first(c):
        return _checks.affine(c, 2)[0]

    rate = jax.grad(first)(jnp.array([1.0, 3.0], jnp.float32))
    np.testing.assert_allclose(rate, [3 / 16, -1 / 16])


def test_numbers_are_real_and_have_an_order(refuses):
    for given in ({0: 0.9, 1: 0.1}, {3.0, 1.0}, {0: 1.0, 1: 2.0}.values(), "12", b"12"):
        with refuses(
            TypeError, match="c must be a sequence of numbers, such as a list or an array, got"
        ):
            _checks.numbers("c", given, 2)
    for given in ((1, 2), [1, 2], range(1, 3), np.array([1, 2]), jnp.array([1, 2])):
        assert _checks.numbers("c", given, 2).tolist() == [1, 2]
    for value in (0.5 + 2j, np.complex64(0.5), jnp.complex64(0.5 + 2j)):
        with refuses(TypeError, match="x must be a real number, got"):
            _checks.scalar("x", value)
    with refuses(TypeError, match="x must be a real number, got"):
        jax.jit(lambda x: _checks.scalar("x", x))(jnp.complex64(0.5))
    with refuses(TypeError, match=r"c\[0\] must be a real number, got"):
        _checks.numbers("c", np.array([1, 2j]), 2)
    with refuses(TypeError, match="points must be a sequence of trees, got"):
        _checks.listed("points", frozenset({1.0, 2.0}))
    with refuses(TypeError, match="points must be a sequence of trees, got"):
        _checks.listed("points", types.MappingProxyType({"w": np.zeros(2)}))


def test_a_traced_number_is_in_single_precision():
    """So that no arithmetic on it rounds to eight bits, or wraps."""
    for value in (jnp.bfloat16(0.3), jnp.float16(0.3), jnp.int8(-128), jnp.uint8(3)):
        for check in (_checks.scalar, lambda name, x: _checks.scalar(name, x, lambda x: x < 4)):
            traced = jax.jit(lambda x, check=check: check("x", x))(value)
            assert traced.dtype == jnp.float32
            assert float(traced) == float(value) == check("x", value)


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


def test_a_power_of_two_is_the_nearest_and_has_an_inverse():
    info = np.finfo(np.float32)
    for x in (1.0, 1.4, 1.5, 3e-5, float(info.tiny), -float(info.max), 1e-45, 0.0, np.inf, np.nan):
        power = np.float32(_numerics.power_of_two(jnp.float32(x)))
        assert np.isfinite([power, 1 / power]).all()
        assert np.frexp(power)[0] == 0.5
        if info.tiny <= abs(x) < 2.0**126:
            assert 0.5**0.5 <= abs(x) / power <= 2**0.5
        if x == 0 or not np.isfinite(x):
            assert power == 1


def test_a_multiple_of_a_gap_is_finite_where_the_gap_is_not():
    x, y = jnp.float32([3e38, 1.0, np.inf]), jnp.float32([-3e38, 0.25, 1.0])
    np.testing.assert_allclose(
        _numerics.gap_times(jnp.float32(0.25), x, y), [1.5e38, 0.1875, np.inf]
    )
