"""Laws of `wspace.lowrank.lora`: edits as LoRA stores them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import is_nan
from tests.strategies import FLOAT, UNIT
from wspace import lowrank
from wspace.lowrank import LowRank
from wspace.testing import assert_close

LAYOUTS = ("in_out", "out_in")
seeds = st.integers(0, 2**16)
ranks = st.sampled_from([1, 2, 9])
stacks = st.sampled_from([(), (2,), (2, 3)])
alphas = st.sampled_from([16, 1.0, 0.3, 0, -8, np.dtype(FLOAT).type(2.5)])
layouts = st.sampled_from(LAYOUTS)


def factors(seed, rank, stack=(), dtype=FLOAT):
    """The factors A `(r, in)` and B `(out, r)` of a layer with 5 inputs and 7 outputs."""
    rng = np.random.default_rng(seed)
    shapes = ((*stack, rank, 5), (*stack, 7, rank))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def wide(x):
    return np.asarray(x).astype(np.float64)


def product(a, b, layout):
    """The oracle's B A, transposed where the weight is `(in, out)`."""
    matrix = wide(b) @ wide(a)
    return matrix if layout == "out_in" else matrix.swapaxes(-1, -2)


def scaling(alpha, rank, rank_stabilized):
    return float(alpha) / (np.sqrt(rank) if rank_stabilized else rank)


def value(x):
    return wide(x.left) @ wide(x.right).swapaxes(-1, -2)


@given(seeds, ranks, stacks, alphas, st.booleans(), layouts)
def test_the_edit_is_the_scaled_product(seed, rank, stack, alpha, rank_stabilized, layout):
    a, b = factors(seed, rank, stack)
    x = lowrank.from_lora(a, b, alpha=alpha, rank_stabilized=rank_stabilized, layout=layout)
    wanted = scaling(alpha, rank, rank_stabilized) * product(a, b, layout)
    assert (x.shape, x.rank) == (wanted.shape, rank)
    size = (
        abs(scaling(alpha, rank, rank_stabilized))
        * np.linalg.norm(wide(a))
        * (np.linalg.norm(wide(b)))
    )
    np.testing.assert_allclose(value(x), wanted, rtol=0, atol=16 * UNIT * size)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_is_that_of_the_weight_that_acts(layout):
    a, b = factors(0, 3)
    inputs = np.random.default_rng(1).normal(size=(4, 5))
    edit = value(lowrank.from_lora(a, b, alpha=6, layout=layout))
    wanted = 2 * (inputs @ wide(a).T) @ wide(b).T
    acted = inputs @ (edit if layout == "in_out" else edit.T)
    np.testing.assert_allclose(acted, wanted, rtol=0, atol=1e2 * UNIT * np.abs(wanted).max())


@given(seeds, ranks, stacks, st.sampled_from([None, 16, 0.3, -8]), st.booleans(), layouts)
def test_there_and_back_is_the_same_product(seed, rank, stack, alpha, rank_stabilized, layout):
    right, left = factors(seed, rank, stack)
    x = LowRank(left, jnp.swapaxes(right, -1, -2))
    options = {"rank_stabilized": rank_stabilized, "layout": layout}
    a, b = lowrank.to_lora(x, alpha=alpha, **options)
    s = 1.0 if alpha is None else scaling(alpha, rank, rank_stabilized)
    size = np.linalg.norm(wide(x.left)) * np.linalg.norm(wide(x.right))
    np.testing.assert_allclose(s * product(a, b, layout), value(x), rtol=0, atol=16 * UNIT * size)
    known = (rank**0.5 if rank_stabilized else rank) if alpha is None else alpha
    y = lowrank.from_lora(a, b, alpha=known, **options)
    np.testing.assert_allclose(value(y), value(x), rtol=0, atol=16 * UNIT * size)


@given(seeds, st.sampled_from([1, 2, 4]), st.sampled_from([-8, 0.5, 16]), layouts)
def test_scalings_that_are_powers_of_two_change_no_factor(seed, rank, alpha, layout):
    a, b = factors(seed, rank)
    x = lowrank.from_lora(a, b, alpha=alpha, layout=layout)
    got = lowrank.to_lora(x, alpha=alpha, layout=layout)
    assert_close(got, (a, b), units=0)
    assert_close(lowrank.to_lora(x, layout=layout)[0], a, units=0)


@given(seeds, st.sampled_from([16, -0.3]), layouts)
def test_the_edit_is_linear_in_each_factor_and_in_alpha(seed, alpha, layout):
    a, b = factors(seed, 2)
    x = value(lowrank.from_lora(a, b, alpha=alpha, layout=layout))
    size = np.linalg.norm(wide(a)) * np.linalg.norm(wide(b)) * abs(alpha)
    for other in (
        lowrank.from_lora(-3 * a, b, alpha=alpha, layout=layout),
        lowrank.from_lora(a, -3 * b, alpha=alpha, layout=layout),
        lowrank.from_lora(a, b, alpha=-3 * alpha, layout=layout),
    ):
        np.testing.assert_allclose(value(other), -3 * x, rtol=0, atol=64 * UNIT * size)


@pytest.mark.parametrize(
    "dtypes", [(jnp.bfloat16, jnp.float16), (jnp.float32, FLOAT), (FLOAT, jnp.bfloat16)]
)
@pytest.mark.parametrize("swapped", [False, True])
def test_factors_are_widened_to_the_wider_and_float32(dtypes, swapped):
    first, second = dtypes[::-1] if swapped else dtypes
    a, b = factors(0, 4)
    a, b = a.astype(first), b.astype(second)
    x = lowrank.from_lora(a, b, alpha=4)
    wanted = FLOAT if FLOAT in dtypes else jnp.float32
    assert x.left.dtype == x.right.dtype == wanted
    # The scaling is 1: no value is rounded on the way.
    np.testing.assert_array_equal(wide(x.left), wide(a).T)
    np.testing.assert_array_equal(wide(x.right), wide(b))
    half = LowRank(x.left.astype(jnp.bfloat16), x.right.astype(jnp.bfloat16))
    assert {factor.dtype for factor in lowrank.to_lora(half)} == {np.dtype(jnp.float32)}


def test_both_ways_under_jit_vmap_and_grad():
    a, b = factors(0, 2, (3,))

    def there_and_back(a, b, alpha):
        return lowrank.to_lora(lowrank.from_lora(a, b, alpha=alpha), alpha=alpha)

    assert_close(jax.jit(there_and_back)(a, b, 4.0), (a, b), units=0)
    assert_close(jax.vmap(there_and_back, (0, 0, None))(a, b, 4.0), (a, b), units=0)

    def total(alpha):
        return lowrank.materialize(lowrank.from_lora(a, b, alpha=alpha)).sum()

    slope = jax.grad(total)(jnp.asarray(4.0, FLOAT))
    np.testing.assert_allclose(slope, (wide(b) @ wide(a)).sum() / 2, rtol=256 * UNIT)


def test_numpy_factors_are_taken():
    a, b = (np.asarray(x) for x in factors(0, 2))
    x = lowrank.from_lora(a, b, alpha=2)
    assert isinstance(x.left, jax.Array)
    assert isinstance(x.right, jax.Array)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((2, 5), (7, 3)),
        ((5,), (7, 5)),
        ((2, 5), (2,)),
        ((5, 2), (7, 2)),
        ((3, 2, 5), (2, 7, 2)),
        ((3, 2, 5), (7, 2)),
        ((2, 5), (2, 7)),
    ],
)
def test_factors_that_do_not_match_are_refused(refuses, a, b):
    with refuses(ValueError, match=r"not the factors of one update.*\(\.\.\., r, in\)"):
        lowrank.from_lora(jnp.ones(a), jnp.ones(b), alpha=1)


def test_bad_arguments_are_refused(refuses):
    a, b = factors(0, 2)
    edit = lowrank.from_lora(a, b, alpha=2)
    none = LowRank(jnp.ones((5, 0)), jnp.ones((7, 0)))
    for call in (
        lambda **options: lowrank.from_lora(a, b, **{"alpha": 1, **options}),
        lambda **options: lowrank.to_lora(edit, **{"alpha": 1, **options}),
    ):
        with refuses(ValueError, match="layout must be one of 'in_out', 'out_in', got 'torch'"):
            call(layout="torch")
        with refuses(ValueError, match="alpha must be finite"):
            call(alpha=float("nan"))
        with refuses(ValueError, match="alpha must be one number"):
            call(alpha=jnp.ones(2))
        with refuses(TypeError, match="alpha must be a real number"):
            call(alpha="sixteen")
    with refuses(ValueError, match="rank 0 has no scaling in LoRA.*leave such a layer out"):
        lowrank.from_lora(jnp.ones((0, 5)), jnp.ones((7, 0)), alpha=1)
    for alpha in (None, 1):
        with refuses(ValueError, match="rank 0 has no scaling in LoRA.*leave such a layer out"):
            lowrank.to_lora(none, alpha=alpha)
    with refuses(ValueError, match="alpha must be finite and not zero, got 0"):
        lowrank.to_lora(edit, alpha=0)
    with refuses(ValueError, match="not the factors of one matrix"):
        lowrank.to_lora(LowRank(edit.left, edit.right[:, :1]))
    with refuses(TypeError, match="of a has dtype int32"):
        lowrank.from_lora(a.astype(jnp.int32), b, alpha=1)
    with refuses(TypeError, match="of b has dtype int32"):
        lowrank.from_lora(a, b.astype(jnp.int32), alpha=1)
    with refuses(TypeError, match="of right has dtype int32"):
        lowrank.to_lora(LowRank(edit.left, edit.right.astype(jnp.int32)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_traced_alpha_of_zero_makes_b_nan(layout):
    a, b = factors(0, 2)
    edit = lowrank.from_lora(a, b, alpha=2, layout=layout)
    got = jax.jit(lambda alpha: lowrank.to_lora(edit, alpha=alpha, layout=layout))(0.0)
    assert_close(got[0], a, units=0)
    assert is_nan(got[1])


def popular(weights, layers):
    """The sum of adapters by the roots of their weights in the factors: "linear" of PEFT."""
    roots = [
        (np.sign(w * s), np.sqrt(abs(w * s))) for w, (_, _, s) in zip(weights, layers, strict=True)
    ]
    a = sum(sign * root * a for (sign, root), (a, _, _) in zip(roots, layers, strict=True))
    b = sum(root * b for (_, root), (_, b, _) in zip(roots, layers, strict=True))
    return b @ a


def layers(seed, count=2, rank=4):
    """Layers of one rank: A, B and the scaling of each, in float64."""
    every = (factors(seed + i, rank) for i in range(count))
    return [
        (wide(a), wide(b), alpha / rank) for (a, b), alpha in zip(every, (8, 4, 2), strict=False)
    ]


@given(seed=seeds, weights=st.sampled_from([(0.5, 0.5), (1, -0.7), (0.3, 0.2, -1)]))
def test_the_popular_sum_of_factors_is_no_sum_of_edits(seed, weights):
    given_layers = layers(seed, len(weights))
    exact = sum(w * s * b @ a for w, (a, b, s) in zip(weights, given_layers, strict=True))
    gap = np.linalg.norm(popular(weights, given_layers) - exact)
    assert gap > 0.1 * np.linalg.norm(exact)

    edits = [
        lowrank.from_lora(
            jnp.asarray(a, FLOAT), jnp.asarray(b, FLOAT), alpha=s * a.shape[0], layout="out_in"
        )
        for a, b, s in given_layers
    ]
    got = value(lowrank.combine(weights, edits))
    size = sum(abs(w) * np.linalg.norm(value(x)) for w, x in zip(weights, edits, strict=True))
    assert np.linalg.norm(got - exact) <= 32 * UNIT * size


@given(seed=seeds)
def test_the_popular_difference_of_one_edit_in_two_gauges_is_not_zero(seed):
    ((a, b, s),) = layers(seed, 1)
    rng = np.random.default_rng(seed)
    bases = [np.linalg.qr(rng.normal(size=(4, 4)))[0] for _ in range(2)]
    gauge = (bases[0] * np.array([0.5, 1.0, 1.5, 2.0])) @ bases[1]
    other = (np.linalg.inv(gauge) @ a, b @ gauge, s)
    size = s * np.linalg.norm(b @ a)
    assert np.linalg.norm(other[1] @ other[0] - b @ a) <= 1e-12 * size
    assert np.linalg.norm(popular((1, -1), [(a, b, s), other])) > 0.1 * size

    edits = [
        lowrank.from_lora(jnp.asarray(x, FLOAT), jnp.asarray(y, FLOAT), alpha=4 * s)
        for x, y, _ in ((a, b, s), other)
    ]
    nothing = lowrank.add(edits[0], lowrank.scale(-1.0, edits[1]))
    assert lowrank.norm(nothing) <= 64 * UNIT * lowrank.norm(edits[0])


@pytest.mark.parametrize("alpha", [jnp.bfloat16(0.3), jnp.float16(0.3), jnp.int8(-128)])
def test_the_scaling_is_computed_in_single_precision(alpha):
    a, b = jnp.ones((3, 2)), jnp.ones((4, 3))
    for solve in (lambda f: f, jax.jit):
        edit = solve(lambda alpha: lowrank.from_lora(a, b, alpha=alpha))(alpha)
        np.testing.assert_allclose(lowrank.materialize(edit), float(alpha), rtol=1e-6)
