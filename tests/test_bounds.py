"""Laws of `wspace.negative.bounds`: negative.linear_bound, negative.size_to_change, chain_bound.

Numbers such as (vii L1) are those of the laws in the docs page on the negative weight.
"""

import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from tests.helpers import is_nan
from tests.strategies import FLOAT, UNIT, scales
from wspace import cone, geometry, lowrank, negative, tree
from wspace.lowrank import LowRank
from wspace.testing import like, vector

LAYOUT = {"b": (3,), "s": (2, 3, 3), "w": (4, 3)}
COUNT = sum(math.prod(shape) for shape in LAYOUT.values())
SVD = 64 * math.sqrt(COUNT) * UNIT
seeds = st.integers(0, 2**16)
budgets = st.sampled_from([0.0, 1e-3, 1.0, 30.0])


def flat(x):
    """An edit as one float64 vector, matrices multiplied out."""
    leaves = jax.tree.leaves(x, is_leaf=lambda leaf: isinstance(leaf, LowRank))
    dense = [
        np.asarray(leaf.left, np.float64) @ np.swapaxes(np.asarray(leaf.right, np.float64), -1, -2)
        if isinstance(leaf, LowRank)
        else leaf
        for leaf in leaves
    ]
    return vector(dense).astype(np.float64)


def numbers(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(scale * rng.normal(size=s), FLOAT) for name, s in LAYOUT.items()}


def unit(x):
    return x / np.linalg.norm(x)


MASK = {"b": True, "s": numbers(7)["s"] > 0, "w": False}
BASIS = geometry.orthonormalize([numbers(i) for i in range(3)])
CONES = {
    "all": cone.Mask(dict.fromkeys(LAYOUT, True)),
    "rank 1": cone.Rank(1),
    "pooled 3": cone.PooledRank(3),
    "sparse 5": cone.Sparse(5),
    "mask": cone.Mask(MASK),
    "subspace": cone.Subspace(BASIS),
}
each_cone = pytest.mark.parametrize("name", CONES)


def part(name, x):
    """The norm of the nearest edit in a cone, by numpy."""
    matrices = [np.asarray(x["b"])[:, None], *np.asarray(x["s"]), np.asarray(x["w"])]
    spectra = [np.linalg.svd(m.astype(np.float64), compute_uv=False) for m in matrices]
    entries = flat(x)
    kept = {
        "all": lambda: entries,
        "rank 1": lambda: [s[:1] for s in spectra],
        "pooled 3": lambda: np.sort(np.concatenate(spectra))[-3:],
        "sparse 5": lambda: np.sort(abs(entries))[-5:],
        "mask": lambda: entries[
            flat({n: jnp.broadcast_to(MASK[n], LAYOUT[n]) for n in LAYOUT}) > 0
        ],
        "subspace": lambda: np.stack([flat(q) for q in BASIS]) @ entries,
    }[name]()
    return np.linalg.norm(np.concatenate([np.atleast_1d(k) for k in kept]))


projected = {name: jax.jit(lambda x, k=k: cone.project(k, x).edit) for name, k in CONES.items()}


def member(name, seed, norm):
    """An edit of a cone with a given norm, at random, as a vector."""
    return norm * unit(flat(projected[name](numbers(seed))))


# x -> tanh(tanh(x w + b) s_1) s_2, read along one direction.
INPUT, READ = np.linspace(-1, 1, 4), np.array([1.0, -0.5, 2.0])


def network(w):
    x = jnp.tanh(jnp.asarray(INPUT, FLOAT) @ w["w"] + w["b"])
    return jnp.tanh(x @ w["s"][0]) @ w["s"][1] @ jnp.asarray(READ, FLOAT)


def network_in_numpy(entries):
    b, s, w = entries[:3], entries[3:21].reshape(2, 3, 3), entries[21:].reshape(4, 3)
    return np.tanh(np.tanh(INPUT @ w + b) @ s[0]) @ s[1] @ READ


def quadratic(parts, w):
    """<g, w> + <w, A w> / 2 over all entries."""
    slopes, matrix = parts
    entries, _ = ravel_pytree(w)
    return slopes @ entries + entries @ (matrix @ entries) / 2


def affine(slopes):
    """The parameters of the quadratic readout that is affine, with given slopes."""
    return [jnp.asarray(flat(slopes), FLOAT), jnp.zeros((COUNT, COUNT), FLOAT)]


quadratic_bound = {
    name: jax.jit(
        lambda p, w, d, h, k=k: negative.linear_bound(
            lambda x: quadratic(p, x), w, k, d, curvature=h
        )
    )
    for name, k in CONES.items()
}
network_bound = {
    name: jax.jit(lambda w, d, k=k: negative.linear_bound(network, w, k, d))
    for name, k in CONES.items()
}
needed = {
    name: jax.jit(
        lambda p, w, m, h, k=k: negative.size_to_change(
            lambda x: quadratic(p, x), w, k, m, curvature=h
        )
    )
    for name, k in CONES.items()
}
along = jax.jit(lambda w, edit: jax.jvp(network, (w,), (edit,))[1])


@each_cone
@given(seed=seeds, scale=scales, d=budgets)
def test_the_change_is_what_the_edit_does_to_an_affine_readout_and_no_edit_does_more(
    name, seed, scale, d
):  # (vii L1)
    slopes, w = numbers(seed, scale), numbers(seed + 1)
    change, edit, remainder = quadratic_bound[name](affine(slopes), w, d, 0.0)
    g, e = flat(slopes), flat(edit)
    tolerance = SVD * d * np.linalg.norm(g)
    assert abs(change - d * part(name, slopes)) <= tolerance
    assert abs(g @ e - change) <= tolerance  # jvp of the readout is g @ e
    assert abs(np.linalg.norm(e) - d) <= SVD * d
    assert remainder == 0
    assert abs(g @ member(name, seed + 2, d)) <= change + tolerance


@each_cone
@given(seed=seeds, d=budgets)
def test_no_cone_does_more_than_all_edits(name, seed, d):  # (vii L5)
    slopes = numbers(seed)
    whole = d * np.linalg.norm(flat(slopes))
    change = quadratic_bound[name](affine(slopes), slopes, d, 0.0).change
    assert change <= whole * (1 + SVD)
    if name == "all":
        assert abs(change - whole) <= SVD * whole


@pytest.mark.parametrize("k", [cone.Rank(3), cone.PooledRank(10), cone.Sparse(COUNT)])
def test_a_cone_that_holds_all_edits_does_as_much_as_they(k):  # (vii L5)
    slopes = numbers(1)
    bound = negative.linear_bound(lambda w: tree.vdot(slopes, w), slopes, k, 2.0)
    whole = 2 * np.linalg.norm(flat(slopes))
    assert abs(bound.change - whole) <= SVD * whole
    np.testing.assert_allclose(flat(bound.edit), 2 * unit(flat(slopes)), atol=2 * SVD)


@each_cone
@given(seed=seeds, d=budgets)
def test_the_derivative_along_the_edit_is_the_change(name, seed, d):  # (vii L6)
    w = numbers(seed, 0.7)
    change, edit, remainder = network_bound[name](w, d)
    size = d * np.linalg.norm(flat(jax.grad(network)(w)))
    assert abs(along(w, like(flat(edit), w)) - change) <= SVD * size
    assert remainder == np.inf


@pytest.mark.parametrize("name", ["all", "rank 1", "sparse 5"])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_left_falls_as_the_square_of_the_budget(name, seed):  # (vii L7)
    w = numbers(seed, 0.7)
    entries, unravel = ravel_pytree(w)
    hessian = jax.jit(jax.hessian(lambda x: network(unravel(x))))
    quotients = []
    for d in 2.0 ** -np.arange(7):
        change, edit, _ = network_bound[name](w, d)
        e = flat(edit)
        left = network_in_numpy(flat(w) + e) - network_in_numpy(flat(w)) - float(change)
        way = [hessian(entries + jnp.asarray(t * e, FLOAT)) for t in np.linspace(0, 1, 9)]
        most = 1.1 * max(np.linalg.norm(h, 2) for h in way)
        bound = negative.linear_bound(network, w, CONES[name], d, curvature=most)
        assert abs(bound.remainder - most * d**2 / 2) <= 4 * UNIT * most * d**2
        assert abs(left) <= bound.remainder + SVD * d
        quotients.append(left / d**2)
    e = unit(e)
    limit = e @ np.asarray(hessian(entries), np.float64) @ e / 2
    errors = abs(np.array(quotients) - limit)
    assert errors[-1] <= 0.05 * np.linalg.norm(hessian(entries), 2)
    assert errors[-1] <= errors[-3] / 2 + SVD / d  # to the limit as d itself


@each_cone
@given(seed=seeds, d=st.sampled_from([1e-3, 0.3, 3.0]), h=st.sampled_from([0.0, 0.1, 5.0]))
def test_no_edit_of_the_cone_breaks_a_bound_with_a_true_curvature(name, seed, d, h):
    rng = np.random.default_rng(seed)
    q = np.linalg.qr(rng.normal(size=(COUNT, COUNT)))[0]
    values = h * np.concatenate([[rng.choice([-1, 1])], rng.uniform(-1, 1, COUNT - 1)])
    slopes, matrix = rng.normal(size=COUNT), (q * values) @ q.T
    w, p = numbers(seed + 1, 0.1), [jnp.asarray(x, FLOAT) for x in (slopes, matrix)]
    x = flat(w)
    gradient = slopes + matrix @ x
    change, edit, remainder = quadratic_bound[name](p, w, d, h)
    tolerance = (SVD + COUNT * UNIT) * (np.linalg.norm(gradient) + h * (1 + d)) * d

    def changed(e):
        return gradient @ e + e @ matrix @ e / 2

    for e in (flat(edit), member(name, seed + 2, d), -member(name, seed + 3, d / 2)):
        assert abs(changed(e)) <= float(change) + float(remainder) + tolerance
    margin = float(change) + float(remainder)
    size = float(needed[name](p, w, margin, h))
    assert abs(size - d) <= 64 * tolerance / np.linalg.norm(gradient)
    for e in (flat(edit), member(name, seed + 4, d)):
        assert abs(changed(0.9 * size / d * e)) < margin


@given(seed=seeds, d=st.sampled_from([0.1, 1.0, 10.0]), h=st.sampled_from([0.0, 0.5, 5.0]))
def test_the_top_eigenvector_attains_the_bound(seed, d, h):
    rng = np.random.default_rng(seed)
    top = unit(rng.normal(size=COUNT))
    p = [jnp.asarray(x, FLOAT) for x in (2 * top, h * np.outer(top, top))]
    w = numbers(0, 0.0)
    change, edit, remainder = quadratic_bound["all"](p, w, d, h)
    t = flat(edit) @ top
    reached = 2 * t + h * t**2 / 2
    assert abs(reached - (change + remainder)) <= SVD * reached
    size = needed["all"](p, w, reached, h)
    assert abs(size - d) <= SVD * d


@each_cone
@given(seed=seeds, m=st.sampled_from([1e-3, 1.0, 1e3]), scale=scales)
def test_the_size_to_change_is_the_budget_at_which_the_edit_does_it(name, seed, m, scale):
    p, w = affine(numbers(seed, scale)), numbers(seed + 1)
    size = needed[name](p, w, m, 0.0)
    wanted = m / part(name, numbers(seed, scale))
    assert abs(size - wanted) <= SVD * wanted
    assert abs(quadratic_bound[name](p, w, size, 0.0).change - m) <= SVD * m


def linearized(w):
    """The readout that the network is to first order about some weights."""

    def readout(x):
        value, slope = jax.jvp(network, (w,), (tree.combine((1, -1), (x, w)),))
        return value + slope

    return readout


linearized_bound = jax.jit(lambda w, x, d: negative.linear_bound(linearized(w), x, cone.Rank(1), d))
linearized_value = jax.jit(lambda w, x: linearized(w)(x))


@given(seed=seeds)
def test_a_linearized_readout_superposes_and_has_one_bound_everywhere(seed):  # (vii L8)
    w = numbers(seed, 0.7)
    here, there = network_bound["rank 1"](w, 1.0), linearized_bound(w, numbers(seed + 1), 1.0)
    whole = np.linalg.norm(flat(jax.grad(network)(w)))
    assert abs(here.change - there.change) <= SVD * whole
    e, f = flat(here.edit), member("sparse 5", seed + 2, 0.5)
    edits = (0 * e, e, f, e + f)
    values = [linearized_value(w, like(flat(w) + x, w)) for x in edits]
    start, one, other, both = map(float, values)
    rounding = SVD * (abs(start) + whole * (np.linalg.norm(flat(w)) + 1))
    assert abs((both - start) - (one - start) - (other - start)) <= rounding
    assert abs((one - start) - here.change) <= rounding


@each_cone
def test_a_readout_that_no_edit_changes_to_first_order(name):
    w = numbers(0)
    bound = negative.linear_bound(lambda _: jnp.ones((), FLOAT), w, CONES[name], 2.0, curvature=3.0)
    assert bound.change == 0
    assert not flat(bound.edit).any()
    assert bound.remainder == 6
    assert negative.size_to_change(lambda _: jnp.ones((), FLOAT), w, CONES[name], 2.0) == np.inf
    size = negative.size_to_change(
        lambda x: tree.vdot(x, x), numbers(0, 0.0), CONES[name], 9.0, curvature=2
    )
    assert size == 3


@pytest.mark.parametrize("name", ["all", "rank 1", "sparse 5", "mask", "subspace"])
def test_a_gradient_that_is_not_finite_is_refused_and_nan_where_traced(name, refuses):
    w = jax.tree.map(jnp.ones_like, numbers(0)) | {"w": jnp.zeros((4, 3), FLOAT)}

    def readout(x):
        return sum(jnp.sum(jnp.sqrt(leaf)) for leaf in jax.tree.leaves(x))

    def bound(x):
        return negative.linear_bound(readout, x, CONES[name], 1.0, curvature=1.0)

    def size(x):
        return negative.size_to_change(readout, x, CONES[name], 1.0)

    for function in (bound, size):
        with refuses(ValueError, match=r"leaf \['w'\] of the gradient of readout holds NaN or an"):
            function(w)
        got = jax.jit(function)(w)
        assert is_nan([x for x in jax.tree.leaves(got) if x.ndim == 0])
    assert any(bool(jnp.isnan(x).any()) for x in jax.tree.leaves(jax.jit(bound)(w).edit))


def test_no_budget_changes_nothing():
    for name in CONES:
        bound = negative.linear_bound(network, numbers(0), CONES[name], 0, curvature=1.0)
        assert bound.change == 0
        assert bound.remainder == 0
        assert not flat(bound.edit).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_of_half_precision_weights_are_taken_in_single(dtype):
    half = jax.tree.map(lambda x: x.astype(dtype), numbers(0))
    single = jax.tree.map(lambda x: x.astype(jnp.float32), half)

    def readout(w):
        return sum(jnp.sum(jnp.tanh(x)) for x in jax.tree.leaves(w))

    for k in (cone.Rank(1), cone.Sparse(5)):
        got, wanted = (negative.linear_bound(readout, w, k, 1.0) for w in (half, single))
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            assert x.dtype == jnp.float32
            np.testing.assert_array_equal(x, y)


def test_bad_arguments_of_readouts_are_refused(refuses):
    w, k = numbers(0), cone.Rank(1)
    for budget in (-1.0, np.inf, np.nan):
        with refuses(ValueError, match="budget must be finite and at least 0"):
            negative.linear_bound(network, w, k, budget)
    for margin in (0.0, -1.0, np.inf, np.nan):
        with refuses(ValueError, match="margin must be finite and positive"):
            negative.size_to_change(network, w, k, margin)
    for function in (negative.linear_bound, negative.size_to_change):
        with refuses(ValueError, match="curvature must be finite and at least 0, got -1"):
            function(network, w, k, 1.0, curvature=-1.0)
        with refuses(TypeError, match=r"readout must return one floating.* float\d\d\[3\]"):
            function(lambda x: x["b"], w, k, 1.0)
        with refuses(TypeError, match=r"readout must return one floating.*int"):
            function(lambda x: jnp.argmax(x["b"]), w, k, 1.0)
        with refuses(TypeError, match=r"readout must return one floating"):
            function(lambda x: (x["b"][0], x["b"][1]), w, k, 1.0)
        with refuses(TypeError, match=r"leaf \['b'\] of weights has dtype int32"):
            function(network, w | {"b": jnp.ones(3, jnp.int32)}, k, 1.0)
        with refuses(TypeError, match="cone must be a Rank"):
            function(network, w, "rank", 1.0)


def test_bad_traced_arguments_of_readouts_give_nan():
    w, k = numbers(0), cone.Rank(1)
    bound = jax.jit(lambda d, h: negative.linear_bound(network, w, k, d, curvature=h))
    bad = bound(-1.0, 1.0)
    assert is_nan([bad.change, bad.remainder, lowrank.materialize(bad.edit["w"])])
    assert jnp.isnan(bound(1.0, -1.0).remainder)
    size = jax.jit(lambda m, h: negative.size_to_change(network, w, k, m, curvature=h))
    assert is_nan([size(0.0, 1.0), size(-1.0, 1.0), size(1.0, -1.0)])


def test_derivatives_of_the_bounds():
    w = numbers(3, 0.7)
    change = jax.jit(lambda x: negative.linear_bound(network, x, cone.Rank(1), 2.0).change)
    grad = jax.jit(jax.grad(change))(w)
    step = 1e-3 * unit(flat(grad))
    up, down = (float(change(like(flat(w) + s * step, w))) for s in (1, -1))
    assert (up - down) / 2e-3 == pytest.approx(np.linalg.norm(flat(grad)), rel=2e-2)
    size = jax.jit(lambda h: negative.size_to_change(network, w, cone.Rank(1), 0.5, curvature=h))
    slope = float(change(w)) / 2
    assert float(jax.grad(size)(0.0)) == pytest.approx(-(0.5**2) / (2 * slope**3), rel=1e-4)


WIDTHS = ((5, 4), (4, 3, 5), (4, 6, 3, 3, 2))
ACTIVATIONS = {"identity": lambda x: x, "relu": lambda x: np.maximum(x, 0), "tanh": np.tanh}
chain = jax.jit(lambda w, u, size: negative.chain_bound(w, u, input_norm=size))


def output(matrices, x, phi):
    """A chain of layers, by numpy."""
    for matrix in matrices:
        x = phi(x @ matrix)
    return x


@st.composite
def chains(draw):
    """Matrices and edits of a chain, the edits dense or low-rank and of any size, or zero."""
    widths = draw(st.sampled_from(WIDTHS))
    rng = np.random.default_rng(draw(seeds))
    factored = draw(st.booleans())
    size = draw(st.sampled_from([0.0, 1e-6, 0.1, 3.0]))
    matrices, edits = [], []
    for m, n in itertools.pairwise(widths):
        matrices.append(jnp.asarray(rng.normal(size=(m, n)), FLOAT))
        left, right = rng.normal(size=(m, 2)), rng.normal(size=(n, 2))
        edit = LowRank(jnp.asarray(size * left, FLOAT), jnp.asarray(right, FLOAT))
        dense = jnp.asarray(size * rng.normal(size=(m, n)), FLOAT)
        edits.append(edit if factored else dense)
    return matrices, edits


def spectral(x):
    return np.linalg.norm(flat(x).reshape(x.shape), 2)


def product_form(matrices, edits):
    """The difference of products, exactly, from the spectral norms that numpy finds."""
    w, u = ([Fraction(float(spectral(x))) for x in xs] for xs in (matrices, edits))
    grown = math.prod(a + b for a, b in zip(w, u, strict=True))
    return float(grown - math.prod(w))


@given(xs=chains(), size=st.sampled_from([0.0, 0.5, 1e3]))
def test_the_sum_is_the_difference_of_products_to_all_its_digits(xs, size):
    wanted = size * product_form(*xs)
    assert abs(chain(*xs, size) - wanted) <= 64 * UNIT * wanted


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(xs=chains(), seed=seeds, scale=st.sampled_from([0.1, 1.0, 10.0]))
def test_no_output_of_a_chain_changes_by_more_than_the_bound(activation, xs, seed, scale):
    # (vii L2)
    matrices, edits = xs
    phi = ACTIVATIONS[activation]
    before = [flat(w).reshape(w.shape) for w in matrices]
    after = [w + flat(u).reshape(u.shape) for w, u in zip(before, edits, strict=True)]
    total = np.linalg.multi_dot([np.eye(len(after[0])), *after])
    worst = np.linalg.svd(total - np.linalg.multi_dot([np.eye(len(before[0])), *before]))[0][:, 0]
    for x in (np.random.default_rng(seed).normal(size=len(worst)), worst):
        x = scale * unit(x)
        change = np.linalg.norm(output(after, x, phi) - output(before, x, phi))
        assert change <= float(chain(matrices, edits, scale)) * (1 + 64 * UNIT)


@pytest.mark.parametrize("widths", WIDTHS)
@given(seed=seeds, size=st.sampled_from([1e-3, 1.0, 10.0]))
def test_an_aligned_chain_of_rank_one_attains_the_bound(widths, seed, size):  # (vii L2)
    rng = np.random.default_rng(seed)
    frames = [unit(rng.normal(size=n)) for n in widths]
    gains = rng.uniform(0.5, 2, len(widths))
    # In extended precision, since small edits are seen in the difference of two outputs.
    outer = [np.outer(x, y).astype(np.longdouble) for x, y in itertools.pairwise(frames)]
    before = [g * m for g, m in zip(gains, outer, strict=False)]
    after = [w + size * m for w, m in zip(before, outer, strict=True)]
    edits = [
        LowRank(jnp.asarray(size * x[:, None], FLOAT), jnp.asarray(y[:, None], FLOAT))
        for x, y in itertools.pairwise(frames)
    ]
    x = 2 * frames[0]
    before_after = [output(matrices, x, ACTIVATIONS["identity"]) for matrices in (before, after)]
    change = float(np.linalg.norm(before_after[1] - before_after[0]))
    bound = chain([jnp.asarray(w.astype(FLOAT)) for w in before], edits, 2.0)
    assert abs(change - bound) <= 64 * UNIT * bound


@given(seed=seeds, factored=st.booleans())
def test_one_layer_changes_by_the_norm_of_its_edit(seed, factored):
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.normal(size=(5, 4)), FLOAT)
    left, right = rng.normal(size=(5, 1)), rng.normal(size=(4, 1))
    edit = LowRank(jnp.asarray(left, FLOAT), jnp.asarray(right, FLOAT))
    bound = chain([w], [edit if factored else lowrank.materialize(edit)], 3.0)
    dense, aligned = flat(edit).reshape(5, 4), 3 * unit(left[:, 0])
    assert abs(np.linalg.norm(aligned @ dense) - bound) <= 64 * UNIT * bound  # tight at rank one
    assert np.linalg.norm(3 * unit(rng.normal(size=5)) @ dense) <= bound * (1 + 64 * UNIT)


@given(seed=seeds)
def test_biases_are_rows_of_the_matrices(seed):
    rng = np.random.default_rng(seed)
    shapes = list(itertools.pairwise((4, 3, 5)))
    w, u = ([rng.normal(size=s) for s in shapes] for _ in range(2))
    b, c = ([rng.normal(size=s[1]) for s in shapes] for _ in range(2))
    x = y = rng.normal(size=4)
    size = np.hypot(np.linalg.norm(x), 1)
    for i in range(2):
        x, y = np.maximum(x @ w[i] + b[i], 0), np.maximum(y @ (w[i] + u[i]) + b[i] + c[i], 0)

    def rows(matrix, bias, one):
        corner = np.concatenate([np.zeros(len(matrix)), [one]])[:, None]
        return jnp.asarray(np.hstack([np.vstack([matrix, bias]), corner]), FLOAT)

    bound = negative.chain_bound(list(map(rows, w, b, (1, 1))), list(map(rows, u, c, (0, 0))))
    assert np.linalg.norm(y - x) <= size * bound * (1 + 64 * UNIT)


@given(xs=chains())
def test_zero_edits_change_nothing_exactly(xs):  # (vii L3)
    matrices, edits = xs
    assert chain(matrices, jax.tree.map(jnp.zeros_like, edits), 2.0) == 0
    assert chain(matrices, edits, 0.0) == 0


@given(xs=chains(), layer=st.integers(0, 3), factor=st.floats(1, 10, width=16))
def test_the_bound_grows_with_each_edit(xs, layer, factor):  # (vii L4)
    matrices, edits = xs
    layer %= len(edits)
    larger = [lowrank.scale(factor, u) if i == layer else u for i, u in enumerate(edits)]
    bound = chain(matrices, edits, 1.0)
    assert chain(matrices, larger, 1.0) >= bound * (1 - 64 * UNIT)
    if factor > 1.01 and bound > 0:
        assert chain(matrices, larger, 1.0) > bound


def test_bad_chains_are_refused(refuses):
    w = [jnp.ones((2, 3)), jnp.ones((3, 4))]
    with refuses(ValueError, match=r"matrices\[1\] takes 3 inputs, and matrices\[0\] gives 2"):
        negative.chain_bound([w[0].T, w[1]], [w[0].T, w[1]])
    with refuses(ValueError, match=r"leaf \[1\] has shape \(3, 4\) in matrices, \(4, 3\) in edits"):
        negative.chain_bound(w, [w[0], w[1].T])
    with refuses(ValueError, match=r"leaf \[1\] has shape \(3, 4\) in matrices, \(3, 2\) in edits"):
        negative.chain_bound(w, [w[0], LowRank(jnp.ones((3, 1)), jnp.ones((2, 1)))])
    with refuses(ValueError, match=r"matrices has a leaf \[1\] that edits lacks"):
        negative.chain_bound(w, w[:1])
    with refuses(ValueError, match="matrices is empty"):
        negative.chain_bound([], [])
    for bad in (jnp.ones(3), jnp.ones((2, 3, 4)), {"w": jnp.ones((3, 4))}):
        with refuses(ValueError, match=r"matrices\[1\] has shape .*: a layer is a matrix"):
            negative.chain_bound([w[0], bad], [w[0], bad])
    with refuses(TypeError, match=r"leaf \[0\] of edits has dtype int32"):
        negative.chain_bound(w, [w[0].astype(jnp.int32), w[1]])
    with refuses(ValueError, match=r"leaf \[1\] of edits holds NaN"):
        negative.chain_bound(w, [w[0], w[1] * jnp.nan])
    with refuses(ValueError, match="input_norm must be finite and at least 0, got -1"):
        negative.chain_bound(w, w, input_norm=-1)
    assert jnp.isnan(chain(w, w, -1.0))
    assert jnp.isnan(chain(w, [w[0], w[1] * jnp.nan], 1.0))


def test_chains_of_mixed_dtypes_and_without_inputs():
    w = [jnp.ones((2, 3), jnp.bfloat16), np.ones((3, 4), np.float32)]
    bound = negative.chain_bound(w, [np.zeros((2, 3), np.float16), jnp.ones((3, 4), jnp.bfloat16)])
    assert bound.dtype == jnp.float32
    assert float(bound) == pytest.approx(math.sqrt(6 * 12), rel=1e-5)
    assert negative.chain_bound([jnp.ones((0, 3))], [jnp.ones((0, 3))]) == 0
