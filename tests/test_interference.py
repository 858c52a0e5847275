"""How much edits interfere: counts, masses, angles and singular vectors, against NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.strategies import FLOAT, scales
from wspace import merge, tree
from wspace.lowrank import LowRank, materialize
from wspace.testing import assert_close, points, vector

SIGNS = [
    jax.jit(f)
    for f in (merge.sign_conflict, merge.overlap, merge.sign_disagreement, merge.cancellation)
]
gram, cosines = jax.jit(merge.gram), jax.jit(merge.cosines)
interference = jax.jit(merge.singular_interference, static_argnames="rank")
seeds = st.integers(0, 2**16)


def share(part, whole):
    return float(part) / float(whole) if whole else 0.0


def array(x):
    return jnp.asarray(np.asarray(x, np.float64), FLOAT)


def by_numpy(edits):
    """The four measures on signs, each by the words of its definition."""
    xs = np.stack([vector(x) for x in edits])
    pairs = list(itertools.product(xs, xs))
    shape = (len(xs), len(xs))
    opposite = [share(np.sum(x * y < 0), np.sum((x != 0) & (y != 0))) for x, y in pairs]
    common = [share(np.sum((x != 0) & (y != 0)), np.sum((x != 0) | (y != 0))) for x, y in pairs]
    disputed = np.sum((xs > 0).any(0) & (xs < 0).any(0))
    total = np.abs(xs).sum()
    return [
        array(np.reshape(opposite, shape)),
        array(np.reshape(common, shape)),
        array(share(disputed, np.sum((xs != 0).any(0)))),
        array(share(total - np.abs(xs.sum(0)).sum(), total)),
    ]


@given(points(count=3), scales)
def test_signs_supports_and_masses_are_those_of_numpy(edits, scale):
    got = [f(edits) for f in SIGNS]
    assert_close(got, by_numpy(edits), scale=1)
    assert_close([f([tree.combine((scale,), (x,)) for x in edits]) for f in SIGNS], got, units=0)
    conflict, common, disagreement, cancelled = got
    assert conflict.max() <= disagreement * (1 + 1e-6) / max(float(common.min()), 1e-9)
    assert 0 <= cancelled <= 1
    assert float(jnp.trace(conflict)) == 0
    assert [float(f([edits[0]] * 3).max()) for f in (SIGNS[0], *SIGNS[2:])] == [0, 0, 0]
    first, second, _ = edits
    turned = SIGNS[0]([first, tree.combine((-1,), (second,)), second])
    shared = any(np.any(vector(first) * vector(second)) for _ in (0,))
    wanted = 1 - conflict[0, 1] if shared else jnp.zeros((), FLOAT)
    assert_close(turned[0, 1], wanted, scale=1)


def test_nothing_is_a_share_of_zero_of_nothing():
    nothing = {"w": jnp.zeros((4, 3), FLOAT), "b": jnp.zeros(3, FLOAT)}
    something = jax.tree.map(jnp.ones_like, nothing)
    for edits in ([nothing], [nothing, nothing], [{}, {}]):
        assert not any(np.any(np.asarray(f(edits))) for f in (*SIGNS, gram, interference))
        assert np.all(np.asarray(cosines(edits)) == 1)
    opposite = [something, jax.tree.map(jnp.negative, something)]
    assert [float(f(opposite).max()) for f in SIGNS] == [1, 1, 1, 1]
    # An edit without a support of its own hides no disagreement, and is in no conflict.
    assert float(SIGNS[2]([*opposite, nothing])) == 1
    assert not SIGNS[0]([*opposite, nothing])[2].any()


def test_random_supports_overlap_as_their_density_says():
    rng, density = np.random.default_rng(0), 0.2
    edits = [jnp.asarray(rng.normal(size=10**5) * (rng.random(10**5) < density)) for _ in range(2)]
    edits = [x.astype(FLOAT) for x in edits]
    assert abs(float(merge.overlap(edits)[0, 1]) - density / (2 - density)) < 0.01
    assert abs(float(merge.sign_conflict(edits)[0, 1]) - 0.5) < 0.04


@st.composite
def adapters(draw):
    """Three edits with factors of ranks 1, 2 and 2, alike or unlike, and a vector."""
    rng = np.random.default_rng(draw(seeds))
    far = draw(st.sampled_from([1, 1e-2, 1e-4]))
    size = draw(scales)
    left, right = rng.normal(size=(4, 2)), rng.normal(size=(3, 2))
    noise = far * rng.normal(size=(3, 4, 2))
    edits = [
        {"w": LowRank(array(size * (left + d)[:, :k]), array(right[:, :k])), "b": array(size * b)}
        for d, k, b in zip(noise, (1, 2, 2), rng.normal(size=(3, 3)), strict=True)
    ]
    return edits, rng.normal(size=(2, 2)) + 3 * np.eye(2)


def dense(edit):
    return {"w": materialize(edit["w"]), "b": edit["b"]}


def regauged(edit, turn):
    """The same edit by other factors."""
    left, right = (np.asarray(x, np.float64) for x in (edit["w"].left, edit["w"].right))
    turn = turn[: left.shape[1], : left.shape[1]]
    return edit | {"w": LowRank(array(left @ turn), array(right @ np.linalg.inv(turn).T))}


@given(adapters())
def test_inner_products_and_cosines_are_those_of_the_products(drawn):
    edits, turn = drawn
    xs = []
    for edit in edits:
        left, right = (np.asarray(x, np.longdouble) for x in (edit["w"].left, edit["w"].right))
        xs.append(np.concatenate([(left @ right.T).ravel(), vector(edit["b"])]))
    wanted = np.array([[x @ y for x in xs] for y in xs])
    length = np.sqrt(np.diagonal(wanted))
    got = gram(edits), cosines(edits)
    bound = np.linalg.norm(turn) * np.linalg.norm(np.linalg.inv(turn))
    others = [regauged(x, turn) for x in edits]
    for g, c, units in ((*got, 64), (gram(others), cosines(others), 64 * bound**2)):
        assert_close(g, array(wanted), units=units, scale=float(length.max() ** 2))
        assert_close(c, array(wanted / length / length[:, None]), units=units, scale=1)
        assert np.abs(c).max() <= 1
        assert np.all(np.diagonal(c) > 1 - 1e-6)
    assert_close(gram([dense(x) for x in edits]), got[0], units=64)
    assert_close(cosines([dense(edits[0]), *edits[1:]]), got[1], units=64)


def test_cosines_of_factors_laid_out_as_vectors_depend_on_the_gauge():
    edit = {"w": LowRank(jnp.ones((4, 1)), jnp.ones((3, 1))), "b": jnp.zeros(3)}
    other = {"w": LowRank(-jnp.ones((4, 1)), -jnp.ones((3, 1))), "b": jnp.zeros(3)}
    np.testing.assert_allclose(cosines([edit, other]), 1, atol=1e-6)
    flat = [np.concatenate([x["w"].left.ravel(), x["w"].right.ravel()]) for x in (edit, other)]
    assert flat[0] @ flat[1] < 0


def sti(matrices, rank):
    """The interference of matrices by its definition."""
    cuts = [np.linalg.svd(x, full_matrices=False) for x in matrices]
    kept = [int(np.sum(s > 1e-9 * s[0])) if s[0] else 0 for _, s, _ in cuts]
    kept = [min(k, rank) for k in kept]
    u = np.concatenate([u[:, :k] for (u, _, _), k in zip(cuts, kept, strict=True)], axis=1)
    s = np.concatenate([s[:k] for (_, s, _), k in zip(cuts, kept, strict=True)])
    v = np.concatenate([vt[:k] for (_, _, vt), k in zip(cuts, kept, strict=True)])
    gap, other = (x - np.eye(len(s)) for x in (u.T @ u, v @ v.T))
    return np.sum(np.abs(gap @ np.diag(s) @ other))


def spread(rng, shape):
    """A matrix with well separated singular values."""
    *stack, m, n = shape
    p = min(m, n)
    left = np.linalg.qr(rng.normal(size=(*stack, m, p)))[0]
    right = np.linalg.qr(rng.normal(size=(*stack, n, p)))[0]
    return (left * (np.arange(p, 0, -1) + rng.random(p) / 2)) @ np.swapaxes(right, -1, -2)


@given(seeds, st.sampled_from([1, 2, None]), scales)
def test_singular_interference_is_that_of_its_definition(seed, rank, scale):
    rng = np.random.default_rng(seed)
    xs = [{"w": spread(rng, (4, 3)), "s": spread(rng, (2, 3, 2))} for _ in range(3)]
    edits = [jax.tree.map(array, {**x, "b": rng.normal(size=3)}) for x in xs]
    stacks = [[x["w"] for x in xs], *([x["s"][i] for x in xs] for i in (0, 1))]
    wanted = array(sum(sti(stack, rank or 3) for stack in stacks))
    got = interference(edits, rank=rank)
    assert_close(got, wanted, units=256)
    assert_close(interference(edits[::-1], rank=rank), got, units=256)
    scaled = [tree.combine((scale,), (x,)) for x in edits]
    assert_close(interference(scaled, rank=rank) / scale, got, units=64)
    turn = array(np.linalg.qr(rng.normal(size=(4, 4)))[0])
    turned = [x | {"w": jnp.matmul(turn, x["w"], precision="highest")} for x in edits]
    assert_close(interference(turned, rank=rank), got, units=256)
    factored = [
        x | {"w": LowRank(x["w"], array(np.eye(3))), "s": LowRank(x["s"], array([np.eye(2)] * 2))}
        for x in edits
    ]
    assert_close(interference(factored, rank=rank), got, units=256)
    assert float(interference(edits[:1], rank=rank)) == 0


@given(seeds)
def test_edits_of_orthogonal_columns_do_not_interfere(seed):
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (4, 3))
    first = array(np.outer(left[:, 0], right[:, 0]) * 3 + np.outer(left[:, 1], right[:, 1]))
    apart = array(np.outer(left[:, 2], right[:, 0] + right[:, 1]))
    zero = jnp.zeros((), FLOAT)
    # Vectors of singular values zero, which a factorization fills in, interfere with nothing.
    assert_close(interference([first, apart]), zero, units=256, scale=1)
    assert_close(interference([first, jnp.zeros_like(first)]), zero, units=256, scale=1)
    assert_close(interference([first, 2 * first]), array(3 * 4.0), units=256)


def test_concatenating_along_the_wrong_axis_sees_no_interference():
    rng = np.random.default_rng(0)
    us = [np.linalg.qr(rng.normal(size=(4, 3)))[0] for _ in range(2)]
    tall = np.concatenate(us, axis=0)
    np.testing.assert_allclose(tall.T @ tall, 2 * np.eye(3), atol=1e-12)
    assert np.abs(us[0].T @ us[1]).max() > 0.1


def test_refuses(refuses):
    x = jnp.ones((4, 3), FLOAT)
    thin = LowRank(jnp.ones((4, 1)), jnp.ones((3, 1)))
    with refuses(ValueError, match="edits is empty: give at least one tree"):
        merge.gram([])
    with refuses(ValueError, match="rank must be at least 0, got -1"):
        merge.singular_interference([x], rank=-1)
    with refuses(TypeError, match="is a LowRank edit, not weights"):
        merge.sign_conflict([thin, thin])
    with refuses(ValueError, match=r"has shape \(4, 3\) in .*, \(3, 3\) in"):
        merge.cosines([thin, jnp.ones((3, 3))])
    assert float(merge.singular_interference([x, x], rank=0)) == 0


@pytest.mark.parametrize("f", [*SIGNS, gram, cosines, interference])
def test_nan_is_seen(f):
    x = np.ones((4, 3))
    bad = array(np.where(np.eye(4, 3), np.nan, x))
    got = np.asarray(f([array(x), bad]))
    assert np.isnan(got if got.ndim == 0 else got[0, 1])
