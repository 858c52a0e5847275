"""Laws of merges by singular directions, against float64 NumPy and arrays of another system."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import is_nan
from tests.strategies import FLOAT, UNIT, scales
from wspace import lowrank, merge, negative
from wspace.testing import assert_close

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "fusionbench.npz")
SYSTEM = "fusionbench-54c9e8c"
SHAPES = {"k": (1, 1, 7, 6), "s": (2, 4, 5), "b": (3,)}
ZERO = {name: jnp.zeros(shape, FLOAT) for name, shape in SHAPES.items()}
seeds = st.integers(0, 2**16)
signed = st.lists(st.sampled_from([-2.0, -0.5, 0.25, 1.0, 3.0]), min_size=2, max_size=2)

tsv_m, iso_c = jax.jit(merge.tsv_m), jax.jit(merge.iso_c)
iso_cts = jax.jit(merge.iso_cts, static_argnames="common")
BY_NAME = {"tsv_m": tsv_m, "iso_c": iso_c, "iso_cts": functools.partial(iso_cts, common=0.4)}
each_method = pytest.mark.parametrize("method", BY_NAME.values(), ids=BY_NAME)


def models(seed, count=2, scale=1.0):
    rng = np.random.default_rng(seed)
    return [
        {name: jnp.asarray(scale * rng.normal(size=shape), FLOAT) for name, shape in SHAPES.items()}
        for _ in range(count)
    ]


def polar(x):
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def triples(x, rank):
    """The leading singular triples, and the gap behind them."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    gap = (s[rank - 1] - s[rank]) / s[0] if 0 < rank < len(s) else 1.0
    return u[:, :rank], s[:rank], vt[:rank].T, gap


def joined(parts):
    lefts, values, rights, gaps = zip(*parts, strict=True)
    return np.hstack(lefts), np.concatenate(values), np.hstack(rights), min(gaps)


def ratio(x):
    s = np.linalg.svd(x, compute_uv=False)
    return s[-1] / s[0]


def plain_tsv_m(taus, c):
    u, s, v, gap = joined([triples(x, min(x.shape) // len(taus)) for x in taus])
    s *= np.repeat(c, len(s) // len(taus))
    return (polar(u) * s) @ polar(v).T, min(ratio(u), ratio(v)), gap


def plain_iso_c(taus, c):
    total = sum(a * x for a, x in zip(c, taus, strict=True))
    u, s, v, gap = triples(total, min(total.shape))
    return s.mean() * u @ v.T, s[-1] / s[0], gap


def plain_iso_cts(taus, c, own):
    terms = [a * x for a, x in zip(c, taus, strict=True)]
    parts = [triples(sum(terms), min(terms[0].shape) - own * len(taus))]
    u = parts[0][0]
    parts += [triples(x - u @ (u.T @ x), own) for x in terms]
    u, s, v, gap = joined(parts)
    return s.mean() * polar(u) @ polar(v).T, min(ratio(u), ratio(v)), gap


# At common = 0.4 the smaller sides 6 and 4 leave 4 and 3 directions to two models: 2 for each.
PLAIN = {
    "tsv_m": plain_tsv_m,
    "iso_c": plain_iso_c,
    "iso_cts": lambda taus, c: plain_iso_cts(taus, c, 2),
}


def by_slices(formula, taus, c):
    """What a formula on matrices makes of one leaf, the least that it divides by, and the gap."""
    if taus[0].ndim < 2:
        return sum(a * x for a, x in zip(c, taus, strict=True)) / len(taus), 1.0, 1.0
    shape = taus[0].shape
    stacks = [np.asarray(x, np.float64) for x in taus]
    stacks = [x.reshape(shape if x.ndim == 3 else (1, -1, shape[-1])) for x in stacks]
    results, least, gaps = zip(
        *(formula(list(xs), c) for xs in zip(*stacks, strict=True)), strict=True
    )
    return np.stack(results).reshape(shape), min(least), min(gaps)


@pytest.mark.parametrize("name", BY_NAME)
@given(seed=seeds, c=signed, scale=scales)
def test_a_merge_is_its_formula_slice_by_slice(name, seed, c, scale):
    taus, method = models(seed, scale=scale), BY_NAME[name]
    got = method(ZERO, taus, c)
    plain = {leaf: by_slices(PLAIN[name], [x[leaf] for x in taus], c) for leaf in SHAPES}
    least, gap = (min(parts[i] for parts in plain.values()) for i in (1, 2))
    room = 64 / (least * gap)
    wanted = {leaf: jnp.asarray(x, FLOAT) for leaf, (x, _, _) in plain.items()}
    assert_close(got.weights, wanted, units=room)
    np.testing.assert_allclose(got.trusted, least, rtol=0, atol=64 * UNIT / gap)
    # Order, base and the sign of coefficients.
    assert_close(method(ZERO, taus[::-1], c[::-1]).weights, wanted, units=room)
    negated = method(ZERO, taus, [-a for a in c])
    opposite = jax.tree.map(jnp.negative, got.weights)
    assert_close(negated.weights, opposite, units=0 if name == "tsv_m" else room)
    base = models(seed + 1, 1, scale)[0]
    there = method(base, [jax.tree.map(jnp.add, base, x) for x in taus], c)
    assert_close(there.weights, jax.tree.map(jnp.add, base, wanted), units=4 * room)


PARITY = {
    "tsv_m?": merge.tsv_m,
    "iso_c?": merge.iso_c,
    "iso_cts?common_space_fraction=0.5": functools.partial(merge.iso_cts, common=0.5),
    "iso_cts?common_space_fraction=0.8": merge.iso_cts,
}


@pytest.mark.parametrize("key", PARITY)
def test_merged_task_vectors_are_those_of_another_system(key):
    names = ("matrix", "tall", "vector")
    taus = [{n: jnp.asarray(GOLDEN[f"input/tau{i}/{n}"]) for n in names} for i in range(3)]
    got = PARITY[key](jax.tree.map(jnp.zeros_like, taus[0]), taus)
    for name in names:
        wanted = GOLDEN[f"{SYSTEM}/{key}/{name}"]
        error = np.linalg.norm(got.weights[name] - wanted) / np.linalg.norm(wanted)
        assert error <= max(1e-6 / float(got.trusted), 1e-6)  # at most 1e-5 but where ill-posed


@pytest.mark.parametrize("c", [-2.0, 1.0])
def test_one_model_comes_back_or_flattened(c):
    (tau,) = models(1, 1)
    term = scaled(c, tau)
    back = tsv_m(ZERO, [tau], [c])
    assert_close(back.weights, term, units=64)
    np.testing.assert_allclose(back.trusted, 1, atol=64 * UNIT)
    flat = iso_c(ZERO, [tau], [c])
    spectrum = lowrank.singular_values(flat.weights["s"])
    wanted = jnp.mean(lowrank.singular_values(term["s"]), axis=-1, keepdims=True)
    assert_close(spectrum, jnp.broadcast_to(wanted, spectrum.shape), units=64)
    assert_close(iso_c(ZERO, [flat.weights], [1.0]).weights, flat.weights, units=64)
    room = 64 / float(flat.trusted)
    assert_close(iso_cts(ZERO, [tau], [c], common=0.4).weights, flat.weights, units=room)
    hard = negative.harden(term["k"])
    share = jnp.linalg.norm(flat.weights["k"]) / jnp.linalg.norm(hard)
    assert_close(flat.weights["k"], share * hard, units=room)


def test_coefficients_act_linearly_and_a_common_space_alone_is_the_flat_sum():
    taus, c = models(2), [3.0, -0.5]
    one, other = (tsv_m(ZERO, taus, pair) for pair in ([1.0, 0.0], [0.0, 1.0]))
    wanted = jax.tree.map(lambda x, y: c[0] * x + c[1] * y, one.weights, other.weights)
    room = 128 / float(one.trusted)
    assert_close(tsv_m(ZERO, taus, c).weights, wanted, units=room)
    assert_close(merge.tsv_m(ZERO, taus, c, scale=-2.0).weights, scaled(-2, wanted), units=room)
    flat = iso_c(ZERO, taus, c)
    whole = iso_cts(ZERO, taus, c, common=1.0)
    assert_close(whole.weights, flat.weights, units=64 / float(flat.trusted))


def scaled(c, x):
    return jax.tree.map(lambda leaf: c * leaf, x)


def test_tasks_in_orthogonal_directions_do_not_disturb_each_other():
    left, right = (np.linalg.qr(np.random.default_rng(n).normal(size=(n, 6)))[0] for n in (9, 7))
    taus = [(left[:, i::2] * [3.0, 2.0, 1.0]) @ right[:, i::2].T for i in range(2)]
    taus = [jnp.asarray(x, FLOAT) for x in taus]
    got = merge.tsv_m(jnp.zeros((9, 7), FLOAT), taus, (1.0, -2.0))
    assert_close(got.weights, taus[0] - 2 * taus[1], units=64)
    np.testing.assert_allclose(got.trusted, 1, atol=64 * UNIT)


def test_what_has_no_direction_is_left_out_and_not_raised():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(8, 2)), rng.normal(size=(8, 2))
    one, zero = jnp.asarray(left @ right.T, FLOAT), jnp.zeros((8, 8), FLOAT)
    flat = merge.iso_c(zero, [one, zero])
    u, values, v, _ = triples(np.asarray(one, np.float64), 2)
    wanted = values.mean() * u @ v.T
    assert_close(flat.weights, jnp.asarray(wanted, FLOAT), units=256)
    np.testing.assert_allclose(flat.trusted, values[1] / values[0], rtol=64 * UNIT)
    # The plain mean runs over the zeros, and gives each an arbitrary direction.
    assert np.linalg.matrix_rank(plain_iso_c([np.asarray(one)], [1])[0]) == 8
    # Four directions of this model are zero: the other model is not turned away from them.
    assert_close(merge.tsv_m(zero, [one, zero]).weights, one, units=64)
    rounded = one + 1e-3 * jnp.asarray(rng.normal(size=(8, 8)), FLOAT)
    kept = merge.iso_c(zero, [rounded], rtol=1e-2).weights
    assert jnp.linalg.norm(kept - flat.weights) < 1e-2 * jnp.linalg.norm(kept)
    assert int(flat.left_out) == 6
    nothing = merge.iso_cts(zero, [zero, zero])
    assert_close(nothing, merge.SpectralMerge(zero, jnp.ones((), FLOAT), jnp.int32(8)), units=0)


def test_directions_are_told_apart_from_the_least_angle_on():
    # Bases of two unit vectors at a small angle have singular values of the ratio of half of it.
    least = min(UNIT**0.5, 1e-5)
    zero, other = jnp.zeros((4, 4), FLOAT), jnp.eye(4, dtype=FLOAT)[:2]
    for times in (0.25, 4):
        turned = other[0] + 2 * times * least * other[1]
        taus = [jnp.outer(x, y) for x, y in zip((other[0], turned), other, strict=True)]
        got = merge.tsv_m(zero, taus)
        if times > 1:
            np.testing.assert_allclose(got.trusted, times * least, rtol=0.1)
            assert int(got.left_out) == 2  # of two triples a model, one is zero
        else:
            # The left direction is one, half of it of each model.
            shared = jnp.outer(other[0], other[0] + other[1]) / 2**0.5
            assert_close(got.weights, shared, units=64, scale=1 + least / UNIT)
            np.testing.assert_allclose(got.trusted, 1, atol=64 * UNIT)
            assert int(got.left_out) == 3
            assert int(merge.tsv_m(zero, taus, least=least / 8).left_out) == 2


def plain_left_out(taus, c, least):
    """TSV-M whose polar factors leave out directions of small singular values."""
    u, s, v, _ = joined([triples(x, min(x.shape) // len(taus)) for x in taus])
    there = s > 1e-12 * max(s)
    kept = []
    for side in (u, v):
        left, values, right = np.linalg.svd(np.where(there, side, 0), full_matrices=False)
        kept.append((left[:, values > least * values[0]], right[values > least * values[0]]))
    s = np.where(there, s, 0) * np.repeat(c, len(s) // len(taus))
    (ul, ur), (vl, vr) = kept
    return (ul @ ur * s) @ (vl @ vr).T, len(s) - min(len(ur), len(vr))


def dead_nets(rows=5, columns=5, decay=0.0, seed=0):
    """Two moves of a layer with inputs that are always zero, and outputs that never act."""
    rng = np.random.default_rng(seed)
    taus = np.zeros((2, 8, 8))
    taus[:, :rows, :columns] = rng.normal(size=(2, rows, columns))
    taus[:, rows:] -= decay * rng.normal(size=(8 - rows, 8))  # what decays, decays alike
    return taus


DEAD = {
    "rows": {"columns": 8},
    "columns": {"rows": 8},
    "rows and columns": {},
    "most": {"rows": 2, "columns": 3},
    "decaying rows": {"columns": 8, "decay": 3.0},
}


@pytest.mark.parametrize("net", DEAD.values(), ids=DEAD)
@pytest.mark.parametrize("scale", [2.0**-60, 1.0, 2.0**60])
def test_inputs_and_outputs_that_never_act_are_left_out_and_counted(net, scale):
    taus = dead_nets(**net)
    c = [1.5, -0.5]
    wanted, missing = plain_left_out(taus, c, 1e-5)
    assert missing or "decay" in net
    points, zero = [jnp.asarray(scale * x, FLOAT) for x in taus], jnp.zeros((8, 8), FLOAT)
    for method in (merge.tsv_m, tsv_m):
        got = method(zero, points, c)
        assert_close(got.weights, jnp.asarray(scale * wanted, FLOAT), units=2**10)
        assert int(got.left_out) == missing
        assert 1e-5 < got.trusted <= 1
    for method in (merge.iso_c, merge.iso_cts):
        got = method(zero, points, c)
        assert jnp.isfinite(got.weights).all()
        assert 1e-5 < got.trusted <= 1


@pytest.mark.parametrize("net", [{"rows": 3, "columns": 8}, {"rows": 5}], ids=str)
@pytest.mark.parametrize("name", BY_NAME)
def test_derivatives_in_coefficients_are_those_where_inputs_never_act(net, name):
    taus = dead_nets(**net)
    probe = np.random.default_rng(7).normal(size=(8, 8))
    method, points = BY_NAME[name], [jnp.asarray(x, FLOAT) for x in taus]
    weigh = jnp.asarray(probe, FLOAT)

    def value(c):
        return jnp.sum(weigh * method(jnp.zeros((8, 8), FLOAT), points, c).weights)

    c, step = np.array([1.5, 0.7]), 1e-3
    got = jax.grad(value)(jnp.asarray(c, FLOAT))
    with jax.enable_x64(True):
        zero, wide = jnp.zeros((8, 8), jnp.float64), [jnp.asarray(x, jnp.float64) for x in taus]
        ends = [
            [float(np.sum(probe * method(zero, wide, jnp.asarray(c + s * e)).weights)) for e in EYE]
            for s in (step, -step)
        ]
    slopes = np.subtract(*ends) / (2 * step)
    np.testing.assert_allclose(got, slopes, rtol=1e-3, atol=1e-3 * np.abs(slopes).max())


EYE = np.eye(2)


def flat_of(x):
    """Iso-C of one matrix of rank three, in float64."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return s[:3].mean() * u[:, :3] @ vt[:3]


def hard_of(x):
    """The same at the Frobenius norm."""
    flat = flat_of(x)
    return np.linalg.norm(x) / np.linalg.norm(flat) * flat


def iso_of(x):
    return merge.iso_c(jnp.zeros_like(x), [x]).weights


@pytest.mark.parametrize("values", [[3.0, 2.0, 1.0], [2.0, 2.0, 2.0], [5.0, 1.0, 1.0]], ids=str)
@pytest.mark.parametrize(
    "pair", [(iso_of, flat_of), (negative.harden, hard_of)], ids=["iso", "hard"]
)
def test_a_flat_spectrum_has_derivatives_where_singular_values_repeat_or_are_zero(pair, values):
    function, plain = pair
    rng = np.random.default_rng(8)
    left, right = (np.linalg.qr(rng.normal(size=(n, 3)))[0] for n in (7, 5))
    x, probe = (left * values) @ right.T, rng.normal(size=(7, 5))
    one, other = rng.normal(size=(7, 7)), rng.normal(size=(5, 5))

    def matrix(t):
        """A curve of matrices of rank three."""
        return (np.eye(7) + t * one) @ x @ (np.eye(5) + t * other)

    step = 1e-5
    ends = [np.sum(probe * plain(matrix(t))) for t in (step, -step)]
    slope = np.subtract(*ends) / (2 * step)
    way = jnp.asarray(one @ x + x @ other, FLOAT)

    def value(t):
        return jnp.sum(jnp.asarray(probe, FLOAT) * function(jnp.asarray(x, FLOAT) + t * way))

    np.testing.assert_allclose(jax.grad(value)(0.0), slope, rtol=1e-3, atol=1e-3)
    assert values[1] == values[2] or jnp.isfinite(jax.grad(jax.grad(value))(0.0))


@pytest.mark.parametrize(
    "method", [merge.tsv_m, merge.iso_cts, merge.knots], ids=lambda f: f.__name__
)
def test_derivatives_in_models_are_finite_where_inputs_never_act(method):
    taus = [jnp.asarray(x, FLOAT) for x in dead_nets(rows=3, columns=8)]

    def value(points):
        weights = method(jnp.zeros((8, 8), FLOAT), points, (1.0, 0.5))
        return jnp.sum(jnp.sin(getattr(weights, "weights", weights)))

    for slope in jax.grad(value)(taus):
        assert jnp.isfinite(slope).all()


def test_a_direction_counts_from_the_rounding_of_a_matrix_on():
    for times, kept in ((0.25, 0), (8, 1)):
        small = times * 4 * UNIT
        tau = jnp.diag(jnp.array([1, small, 0, 0], FLOAT))
        got = merge.tsv_m(jnp.zeros_like(tau), [tau]).weights
        np.testing.assert_allclose(got[1, 1], kept * small, rtol=0.25)


def test_each_of_as_many_models_as_directions_keeps_one():
    assert int(49 * (1 / 49)) == 0  # the count that drops everything
    taus = [jnp.zeros((49, 49), FLOAT).at[i, i].set(i + 1.0) for i in range(49)]
    got = merge.tsv_m(jnp.zeros((49, 49), FLOAT), taus)
    assert_close(got.weights, jnp.diag(jnp.arange(1.0, 50.0, dtype=FLOAT)), units=4)


def test_shares_that_do_not_divide_the_directions():
    rng = np.random.default_rng(3)
    taus = rng.normal(size=(4, 5, 3))
    points, zero = [jnp.asarray(x, FLOAT) for x in taus], jnp.zeros((5, 3), FLOAT)
    # Half of three directions rounds to two for each of two models, which is four of three.
    got = merge.iso_cts(zero, points[:2], common=0.0)
    wanted, *_ = plain_iso_cts(list(taus[:2]), [1, 1], 1)
    assert_close(got.weights, jnp.asarray(wanted, FLOAT), units=256 / float(got.trusted))
    flat = merge.iso_c(zero, points)
    assert_close(merge.iso_cts(zero, points, common=0.0).weights, flat.weights, units=256)
    with pytest.raises(
        ValueError, match=r"leaf .* has 3 singular values for 4 models.*merge fewer"
    ):
        merge.tsv_m({"w": zero}, [{"w": x} for x in points])


@each_method
def test_bad_arguments_are_refused(method, refuses):
    taus = models(0)
    with refuses(ValueError, match="tuned is empty"):
        method(ZERO, [])
    with refuses(ValueError, match="coefficients has 1 numbers for 2 points"):
        method(ZERO, taus, (1.0,))
    with refuses(ValueError, match="leaf .* has shape"):
        method(ZERO, [ZERO | {"b": jnp.zeros(2, FLOAT)}])


def test_options_out_of_their_domain_are_refused():
    taus, broken = models(0), ZERO | {"k": ZERO["k"] + jnp.inf}
    with pytest.raises(ValueError, match="holds NaN or an infinity"):
        merge.iso_c(ZERO, [*taus, broken])
    with pytest.raises(ValueError, match="rtol must be between 0 and 1"):
        merge.iso_c(ZERO, taus, rtol=0.0)
    with pytest.raises(ValueError, match="least must be at least 0 and below 1"):
        merge.tsv_m(ZERO, taus, least=1.0)
    for method in (merge.tsv_m, merge.iso_cts):  # also where there is no matrix
        with pytest.raises(ValueError, match="least must be at least 0 and below 1"):
            method(jnp.zeros(3, FLOAT), [jnp.ones(3, FLOAT)], least=-1.0)
    with pytest.raises(ValueError, match="common must be from 0 to 1"):
        merge.iso_cts(ZERO, taus, common=1.5)
    with pytest.raises(TypeError, match="common decides shapes"):
        jax.jit(lambda f: merge.iso_cts(ZERO, taus, common=f))(0.5)
    assert is_nan(iso_c(ZERO, [broken]).weights["k"])
    assert is_nan(jax.jit(lambda r: merge.iso_c(ZERO, taus, rtol=r))(2.0).weights["k"])
    for least in (jnp.nan, 2.0):
        unknown = jax.jit(lambda x: merge.tsv_m(ZERO, taus, least=x))(least)
        assert is_nan(unknown.weights["k"])
