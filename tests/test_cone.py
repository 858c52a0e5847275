"""Laws of `wspace.cone`: the nearest edit in a cone, and the support-distance lemma."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import is_nan
from tests.strategies import FLOAT, UNIT, scales
from wspace import _checks, cone, fit, geometry, lowrank, negative, selection, tree
from wspace.lowrank import LowRank
from wspace.testing import matrices

LAYOUT = {"w": (5, 4), "s": (2, 3, 2), "k": (2, 1, 2, 3), "b": (3,), "c": (), "e": (0, 2)}
NAMES = ("rank 1", "rank 2", "pooled 3", "subspace", "mask", "sparse 7", "even")
each_cone = pytest.mark.parametrize("name", NAMES)
seeds = st.integers(0, 2**16)


def numbers(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), FLOAT) for name, shape in LAYOUT.items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Even:
    """A cone of a user: edits whose entries are equal along the first axis of every leaf."""

    def project(self, edit):
        """The means along that axis."""
        dense = jax.tree.map(
            lambda x: lowrank.materialize(x) if isinstance(x, LowRank) else x,
            edit,
            is_leaf=lambda x: isinstance(x, LowRank),
        )
        nearest = jax.tree.map(
            lambda x: jnp.broadcast_to(x.mean(0, keepdims=True), x.shape) if x.size > 1 else x,
            tree.upcast(dense),
        )
        return cone.Projection(nearest, tree.norm(nearest), geometry.distance(dense, nearest))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ray:
    """Another: the nonnegative multiples of a direction of norm one."""

    direction: Any

    def project(self, edit):
        """The multiple by the inner product, zero where that is negative."""
        length = jnp.maximum(tree.vdot(self.direction, edit), 0)
        nearest = tree.combine((length,), (self.direction,))
        return cone.Projection(nearest, length, geometry.distance(edit, nearest))


@st.composite
def displacements(draw):
    """Edits with singular values of every kind, in matrices, stacks, convolutions and vectors."""
    x = numbers(draw(seeds)) | {"w": draw(matrices((5, 4))), "s": draw(matrices((2, 3, 2)))}
    scale = draw(scales)
    return {name: scale * leaf for name, leaf in x.items()}


BASIS = geometry.orthonormalize([numbers(i) for i in range(3)])
MASK = {name: jnp.asarray(np.asarray(x) > 0) for name, x in numbers(7).items()} | {"b": True}
CONES = {
    "rank 1": cone.Rank(1),
    "rank 2": cone.Rank(2),
    "pooled 3": cone.PooledRank(3),
    "subspace": cone.Subspace(BASIS),
    "mask": cone.Mask(MASK),
    "sparse 7": cone.Sparse(7),
    "even": Even(),
}
project = {name: jax.jit(lambda x, k=k: cone.project(k, x)) for name, k in CONES.items()}
entry = {name: jax.jit(lambda x, r, k=k: cone.entry(k, x, r)) for name, k in CONES.items()}
exit_ = {name: jax.jit(lambda x, r, k=k: cone.exit(k, x, r)) for name, k in CONES.items()}
support = {name: jax.jit(lambda x, d, k=k: cone.support(k, x, d)) for name, k in CONES.items()}
reach = {name: jax.jit(lambda x, d, k=k: cone.reach(k, x, d)) for name, k in CONES.items()}


def flat(x):
    """An edit as one float64 vector, matrices multiplied out."""
    return np.concatenate(
        [
            (
                np.asarray(leaf.left, np.float64)
                @ np.asarray(leaf.right, np.float64).swapaxes(-1, -2)
                if isinstance(leaf, LowRank)
                else np.asarray(leaf, np.float64)
            ).reshape(-1)
            for leaf in (x[name] for name in LAYOUT)
        ]
    )


def columns(x):
    """The matrices of an edit one by one, a vector as one column."""
    for name, shape in LAYOUT.items():
        leaf = np.asarray(x[name], np.float64)
        if not leaf.size:
            continue
        if len(shape) == 3:
            yield from leaf
        else:
            yield leaf.reshape(-1, shape[-1] if len(shape) > 1 else 1)


def wanted_sizes(name, x):
    """Norm and tail of the projection, by numpy."""
    entries = flat(x)
    if name.startswith(("rank", "pooled")):
        rank = int(name.split()[1])
        spectra = [np.linalg.svd(m, compute_uv=False) for m in columns(x)]
        if name.startswith("pooled"):
            values = np.sort(np.concatenate(spectra))[::-1]
            kept, left = values[:rank], values[rank:]
        else:
            kept = np.concatenate([s[:rank] for s in spectra])
            left = np.concatenate([s[rank:] for s in spectra])
    elif name == "subspace":
        basis = np.stack([flat(q) for q in BASIS])
        kept = basis @ entries
        left = entries - basis.T @ kept
    elif name == "mask":
        mask = flat({n: np.broadcast_to(m, LAYOUT[n]) for n, m in MASK.items()}) > 0
        kept, left = entries[mask], entries[~mask]
    elif name == "even":
        parts = {n: np.asarray(x[n], np.float64) for n in LAYOUT}
        means = {n: m.mean(0, keepdims=True) if m.size > 1 else m for n, m in parts.items()}
        kept = flat({n: np.broadcast_to(means[n], shape) for n, shape in LAYOUT.items()})
        left = entries - kept
    else:
        order = np.argsort(-np.abs(entries), kind="stable")
        kept, left = entries[order[:7]], entries[order[7:]]
    return np.linalg.norm(kept), np.linalg.norm(left)


def member(name, seed, near=None):
    """An edit of the cone, at random or close to a given one."""
    other = numbers(seed)
    if near is not None:
        other = {n: near[n] + 0.1 * other[n] * np.abs(flat(near)).max() for n in LAYOUT}
    return cone.project(CONES[name], other).edit


@each_cone
@given(x=displacements())
def test_the_nearest_edit_has_the_norm_and_the_tail_that_numpy_says(name, x):
    nearest = project[name](x)
    norm, tail = wanted_sizes(name, x)
    size = np.linalg.norm(flat(x))
    assert abs(nearest.norm - norm) <= 128 * UNIT * size
    assert abs(nearest.tail - tail) <= 128 * UNIT * size
    assert abs(np.linalg.norm(flat(nearest.edit)) - norm) <= 128 * UNIT * size
    assert abs(np.linalg.norm(flat(x) - flat(nearest.edit)) - tail) <= 128 * UNIT * size
    inner = flat(nearest.edit) @ (flat(x) - flat(nearest.edit))
    assert abs(inner) <= 256 * UNIT * size**2  # (a) of the lemma


@each_cone
@given(x=displacements(), seed=seeds)
def test_no_edit_of_the_cone_is_nearer_and_projecting_twice_changes_nothing(name, x, seed):
    nearest, size = project[name](x), np.linalg.norm(flat(x))
    dense = {n: jnp.asarray(part, FLOAT) for n, part in unflat(flat(nearest.edit)).items()}
    again = project[name](dense)
    assert np.linalg.norm(flat(again.edit) - flat(nearest.edit)) <= 512 * UNIT * size
    for near in (None, dense):
        other = flat(member(name, seed, near))
        # The best multiple of the other edit.
        square = other @ other
        t = other @ flat(x) / square if square else 0
        assert np.linalg.norm(flat(x) - t * other) >= nearest.tail - 128 * UNIT * size


def unflat(entries):
    stops = np.cumsum([0, *(int(np.prod(shape)) for shape in LAYOUT.values())])
    parts = zip(LAYOUT.items(), itertools.pairwise(stops), strict=True)
    return {name: entries[i:j].reshape(shape) for (name, shape), (i, j) in parts}


@each_cone
@given(x=displacements(), seed=seeds, budget=st.sampled_from([0.0, 0.1, 1.0, 3.0]))
def test_support_and_reach_are_the_best_that_edits_of_that_norm_do(name, x, seed, budget):
    size = np.linalg.norm(flat(x))
    d, (norm, tail) = budget * size, wanted_sizes(name, x)
    assert abs(support[name](x, d) - d * norm) <= 128 * UNIT * size * d
    left = reach[name](x, d)
    assert abs(left - np.hypot(tail, max(norm - d, 0))) <= 256 * UNIT * size
    other = flat(member(name, seed))
    other = other * (d / max(np.linalg.norm(other), 1e-300))
    assert other @ flat(x) <= support[name](x, d) + 128 * UNIT * size * d
    assert np.linalg.norm(flat(x) - other) >= left - 256 * UNIT * (size + d)
    best = flat(project[name](x).edit) * (min(d / norm, 1) if norm else 0)
    assert abs(np.linalg.norm(flat(x) - best) - left) <= 512 * UNIT * size


@each_cone
@given(x=displacements(), seed=seeds, share=st.floats(0.01, 0.99))
def test_entry_lands_on_the_sphere_and_no_shorter_edit_does(name, x, seed, share):
    size, (norm, tail) = np.linalg.norm(flat(x)), wanted_sizes(name, x)
    radius = tail + share * (size - tail)
    move = entry[name](x, radius)
    if norm <= 1e-3 * size:
        return
    landed = np.linalg.norm(flat(x) + flat(move.edit))
    assert abs(landed - radius) <= 64 * UNIT * size
    assert abs(np.linalg.norm(flat(move.edit)) - move.norm) <= 64 * UNIT * size
    wanted = norm - np.sqrt(max((radius - tail) * (radius + tail), 0))
    root = np.sqrt(max(radius**2 - tail**2, 0))
    assert abs(move.norm - wanted) <= 256 * UNIT * size * (1 + radius / max(root, UNIT * size))
    # 0.99 of it stays outside, whatever edit of the cone it is.
    for other in (flat(member(name, seed)), flat(move.edit)):
        other = other * (0.99 * float(move.norm) / max(np.linalg.norm(other), 1e-300))
        assert np.linalg.norm(flat(x) + other) >= radius - 64 * UNIT * size
        assert np.linalg.norm(flat(x) - other) >= radius - 64 * UNIT * size


@each_cone
@given(x=displacements())
def test_entry_where_nothing_has_to_move_and_where_nothing_can(name, x):
    size, (_, tail) = np.linalg.norm(flat(x)), wanted_sizes(name, x)
    move = entry[name](x, 1.01 * size)
    assert move.norm == 0
    assert not flat(move.edit).any()
    if tail > 1e-3 * size:
        move = entry[name](x, 0.99 * tail)
        assert jnp.isinf(move.norm)
        assert is_nan([leaf for leaf in jax.tree.leaves(move.edit) if leaf.size][:1])


@each_cone
@given(x=displacements(), seed=seeds, more=st.sampled_from([1.001, 1.5, 10.0]))
def test_exit_lands_on_the_sphere_and_no_shorter_edit_does(name, x, seed, more):
    size, (norm, _) = np.linalg.norm(flat(x)), wanted_sizes(name, x)
    if norm <= 1e-3 * size:
        return
    radius = more * size
    move = exit_[name](x, radius)
    landed = np.linalg.norm(flat(x) + flat(move.edit))
    assert abs(landed - radius) <= 64 * UNIT * radius
    wanted = (radius - size) * (radius + size) / (norm + np.sqrt(norm**2 + radius**2 - size**2))
    assert abs(move.norm - wanted) <= 256 * UNIT * radius * radius / norm
    for other in (flat(member(name, seed)), flat(move.edit)):
        other = other * (0.99 * float(move.norm) / max(np.linalg.norm(other), 1e-300))
        assert np.linalg.norm(flat(x) + other) <= radius + 64 * UNIT * radius
        assert np.linalg.norm(flat(x) - other) <= radius + 64 * UNIT * radius
    outside = exit_[name](x, 0.99 * size)
    assert outside.norm == 0
    assert not flat(outside.edit).any()


def sphere(steps):
    """Unit vectors of R^3, on a grid of angles."""
    a, b = np.meshgrid(np.linspace(0, np.pi, steps), np.linspace(0, 2 * np.pi, 2 * steps))
    return np.stack([np.sin(a) * np.cos(b), np.sin(a) * np.sin(b), np.cos(a)], axis=-1).reshape(
        -1, 3
    )


@pytest.mark.parametrize("seed", range(3))
def test_brute_search_over_rank_one_agrees(seed):
    x = np.random.default_rng(seed).normal(size=(3, 3))
    unit = sphere(40)
    inner = unit @ x @ unit.T  # <E, u v^T> over all rank-one directions of norm 1
    e, k, grid = np.linalg.norm(x), cone.Rank(1), 2e-2 * np.linalg.norm(x)
    displacement = jnp.asarray(x, jnp.float32)
    norm, tail = wanted_sizes_of_rank_one(x)
    assert np.isclose(cone.support(k, displacement, 1.0), inner.max(), rtol=0, atol=grid)
    for d in (0.3 * norm, 2 * norm):
        step = np.clip(inner, 0, d)  # the best length along each direction
        brute = np.sqrt(np.min(e**2 - 2 * step * inner + step**2))
        assert np.isclose(cone.reach(k, displacement, d), brute, rtol=0, atol=grid)
    radius = (tail + e) / 2
    root = inner**2 - (e**2 - radius**2)
    brute = np.min(np.where(root > 0, inner - np.sqrt(np.maximum(root, 0)), np.inf)[inner > 0])
    assert np.isclose(cone.entry(k, displacement, radius).norm, brute, rtol=0, atol=grid)
    radius = 1.5 * e
    brute = np.min(-inner + np.sqrt(inner**2 + radius**2 - e**2))
    assert np.isclose(cone.exit(k, displacement, radius).norm, brute, rtol=0, atol=grid)


def wanted_sizes_of_rank_one(x):
    values = np.linalg.svd(x, compute_uv=False)
    return values[0], np.linalg.norm(values[1:])


@pytest.mark.parametrize("count", [1, 3])
def test_brute_search_over_supports_agrees(count):
    x = np.random.default_rng(count).normal(size=9)
    best = min(
        np.linalg.norm(np.delete(x, list(kept))) for kept in itertools.combinations(range(9), count)
    )
    nearest = cone.project(cone.Sparse(count), jnp.asarray(x.reshape(3, 3), jnp.float32))
    assert np.isclose(nearest.tail, best, rtol=1e-6)


@given(x=displacements(), ranks=st.lists(st.integers(0, 2), min_size=7, max_size=7))
def test_no_split_of_the_ranks_comes_nearer_than_the_pooled_one(x, ranks):
    spectra = [np.linalg.svd(m, compute_uv=False) for m in columns(x)]
    ranks = [min(r, s.size) for r, s in zip(ranks, spectra, strict=False)]
    left = np.concatenate([s[r:] for r, s in zip(ranks, spectra, strict=False)])
    pooled = cone.project(cone.PooledRank(sum(ranks)), x)
    assert pooled.tail <= np.linalg.norm(left) + 128 * UNIT * np.linalg.norm(flat(x))
    held = [np.linalg.matrix_rank(m, 1e-4 * np.abs(flat(x)).max()) for m in columns(dense(pooled))]
    assert sum(held) <= sum(ranks)


def dense(nearest):
    return unflat(flat(nearest.edit))


@given(x=displacements())
def test_factored_edits_are_projected_as_their_matrices(x):
    whole = x | {"w": lowrank.truncate(x["w"], 4).factors}
    for name in NAMES:
        got, wanted = cone.project(CONES[name], whole), cone.project(CONES[name], x)
        size = np.linalg.norm(flat(x))
        np.testing.assert_allclose(got.tail, wanted.tail, rtol=0, atol=256 * UNIT * size)
        np.testing.assert_allclose(got.norm, wanted.norm, rtol=0, atol=256 * UNIT * size)


@given(x=displacements(), rank=st.integers(0, 5), share=st.sampled_from([0.0, 0.3, 0.9, 2.0]))
def test_the_capped_projection_is_von_neumanns(x, rank, share):
    spectra = [np.linalg.svd(m, compute_uv=False) for m in columns(x)]
    cap = share * max(s[0] for s in spectra)
    fitted = [np.where(np.arange(s.size) < rank, np.minimum(s, cap), 0) for s in spectra]
    tail = np.sqrt(sum(np.sum((s - f) ** 2) for s, f in zip(spectra, fitted, strict=True)))
    nearest, size = cone.project_capped(x, rank, cap), np.linalg.norm(flat(x))
    assert abs(nearest.tail - tail) <= 128 * UNIT * size
    assert abs(np.linalg.norm(flat(x) - flat(nearest.edit)) - tail) <= 128 * UNIT * size
    for m in columns(dense(nearest)):
        assert np.linalg.norm(m, 2) <= cap + 128 * UNIT * size
        assert np.linalg.matrix_rank(m, 1e-4 * size) <= rank
    if share > 1:
        plain = cone.project(cone.Rank(rank), x)
        assert abs(nearest.tail - plain.tail) <= 64 * UNIT * size


@given(x=displacements(), seed=seeds, share=st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.5]))
def test_the_nuclear_entry_lands_and_costs_the_least(x, seed, share):
    size = np.linalg.norm(flat(x))
    move = cone.nuclear_entry(x, share * size)
    landed = np.linalg.norm(flat(x) + flat(move.edit))
    assert abs(landed - min(share, 1) * size) <= 128 * UNIT * size
    nuclear = sum(np.linalg.norm(m, "nuc") for m in columns(unflat(flat(move.edit))))
    assert abs(move.norm - nuclear) <= 256 * UNIT * size
    # Any other edit that lands as near, from the same point, costs no less.
    other = flat(move.edit) + 0.1 * size * np.random.default_rng(seed).normal(size=flat(x).size)
    inside = flat(x) + other
    inside *= min(share, 1) * size / np.linalg.norm(inside)
    cost = sum(np.linalg.norm(m, "nuc") for m in columns(unflat(inside - flat(x))))
    assert cost >= move.norm - 256 * UNIT * size


@given(x=displacements(), share=st.sampled_from([0.0, 0.3, 0.9, 2.0]))
def test_the_spectral_entry_lands_with_the_least_norm_and_rank(x, share):
    spectra = [np.linalg.svd(m, compute_uv=False) for m in columns(x)]
    top, size = max(s[0] for s in spectra), np.linalg.norm(flat(x))
    radius = share * top
    move = cone.spectral_entry(x, radius)
    assert abs(move.norm - max(top - radius, 0)) <= 64 * UNIT * size
    for m in columns(unflat(flat(x) + flat(move.edit))):
        assert np.linalg.norm(m, 2) <= radius + 64 * UNIT * size
    close = min(abs(v - radius) for s in spectra for v in s)
    if close > 64 * UNIT * size:
        assert move.rank == max(int((s > radius).sum()) for s in spectra)


def test_ranks_beyond_the_matrix_and_counts_beyond_the_tree_leave_nothing():
    x = numbers(0)
    for k in (cone.Rank(9), cone.PooledRank(99), cone.Sparse(999)):
        nearest = cone.project(k, x)
        assert nearest.tail == 0
        np.testing.assert_allclose(flat(nearest.edit), flat(x), atol=64 * UNIT * 10)
    for k in (cone.Rank(0), cone.PooledRank(0), cone.Sparse(0), cone.Mask(dict.fromkeys(x, False))):
        nearest = cone.project(k, x)
        assert nearest.norm == 0
        np.testing.assert_allclose(nearest.tail, np.linalg.norm(flat(x)), rtol=64 * UNIT)
        move = cone.exit(k, x, 100.0)
        assert jnp.isinf(move.norm)
        assert is_nan([leaf for leaf in jax.tree.leaves(move.edit) if leaf.size][:1])
        assert cone.exit(k, x, 1e-3).norm == 0


def test_a_vector_is_untouched_at_rank_zero_and_whole_from_rank_one():
    x = {"b": jnp.array([3.0, 4.0])}
    assert not flat_of(cone.project(cone.Rank(0), x)).any()
    np.testing.assert_allclose(flat_of(cone.project(cone.Rank(1), x)), [3, 4], rtol=1e-6)
    pooled = cone.project(cone.PooledRank(1), x | {"w": jnp.diag(jnp.array([6.0, 1.0]))})
    assert not np.asarray(pooled.edit["b"]).any()
    np.testing.assert_allclose(pooled.tail, np.sqrt(26), rtol=1e-6)


def flat_of(nearest):
    return np.asarray(nearest.edit["b"])


def test_per_leaf_every_leaf_is_projected_alone():
    x = {"w": numbers(0)["w"], "b": numbers(0)["b"]}
    nearest = tree.per_leaf(lambda leaf: cone.project(cone.Sparse(2), leaf))(x)
    for name in x:
        mask = selection.top_mask(x[name], 2)
        np.testing.assert_array_equal(nearest.edit[name], jnp.where(mask, x[name], 0))


def test_derivatives_go_through_values_alone():
    x = jnp.diag(jnp.array([2.0, 2.0, 1.0]))
    for k in (cone.Rank(2), cone.PooledRank(2)):
        slope = jax.grad(lambda x, k=k: cone.reach(k, x, 0.0))(x)
        np.testing.assert_allclose(slope, x / 3, atol=1e-5)
        slope = jax.grad(lambda x, k=k: cone.support(k, x, 1.0))(x)
        wanted = np.diag([2.0, 2.0, 0.0]) / np.sqrt(8)
        np.testing.assert_allclose(slope, wanted, atol=1e-5)
    sparse = jax.grad(lambda x: cone.support(cone.Sparse(1), x, 1.0))(jnp.array([3.0, -4.0]))
    np.testing.assert_allclose(sparse, [0, -1], atol=1e-6)


def test_cones_pass_through_transformations():
    x = numbers(0)
    for k in CONES.values():
        norm = jax.jit(lambda k, x: cone.support(k, x, 1.0))(k, x)
        np.testing.assert_allclose(norm, cone.support(k, x, 1.0), rtol=64 * UNIT)
    radii = jax.vmap(lambda r: cone.entry(cone.Rank(1), x, r).norm)(jnp.array([4.0, 5.0]))
    assert radii.shape == (2,)
    assert cone.project(cone.Rank(1), jnp.ones((3, 2), jnp.bfloat16)).edit.left.dtype == jnp.float32
    assert cone.project(cone.Sparse(1), jnp.ones(3, jnp.bfloat16)).edit.dtype == jnp.float32


def test_displacements_without_entries():
    for k in (cone.Rank(1), cone.PooledRank(1), cone.Sparse(1), cone.Mask({})):
        nearest = cone.project(k, {})
        assert nearest.edit == {}
        assert nearest.norm == nearest.tail == 0
    assert cone.nuclear_entry({}, 1.0).norm == 0
    assert cone.spectral_entry({}, 1.0).rank == 0


def test_what_is_on_the_sphere_or_just_in_reach_stays_or_gets_there():
    x, zero = jnp.asarray([3.0, -9.0], FLOAT), jnp.zeros(2, FLOAT)
    move = cone.entry(cone.Sparse(1), x, 3.0)  # the tail is the radius
    np.testing.assert_allclose(move.norm, 9.0, rtol=8 * UNIT)
    np.testing.assert_allclose(move.edit, [0.0, 9.0], rtol=8 * UNIT)
    across = jnp.asarray([0.0, 4.0], FLOAT)  # of a cone that does not tell a way out
    first, nothing = cone.Mask(jnp.asarray([True, False])), cone.Mask(False)
    for k, y, radius in ((first, across, 4.0), (nothing, across, 4.0), (cone.Sparse(1), zero, 0.0)):
        move = cone.exit(k, y, radius)
        assert move.norm == 0
        assert not np.any(move.edit)


def test_a_way_out_is_distinguished_from_the_sine_of_rounding_on():
    first = cone.Mask(jnp.asarray([True, False]))
    x = jnp.asarray([256 * UNIT, 1.0], FLOAT)
    move = cone.exit(first, x, 2.0)
    np.testing.assert_allclose(move.edit, [np.sqrt(3), 0.0], rtol=512 * UNIT)
    with pytest.raises(ValueError, match="no way out is distinguished"):
        cone.exit(first, x.at[0].set(16 * UNIT), 2.0)


def test_a_basis_is_as_orthonormal_as_its_dtype_says():
    x = jnp.asarray([1.0, 2.0, 3.0], jnp.float32)
    for dtype in (jnp.bfloat16, jnp.float32):
        unit = float(jnp.finfo(dtype).eps)
        basis = [jnp.asarray([1.0, unit, 0.0], dtype), jnp.asarray([0.0, 1.0, unit], dtype)]
        nearest = cone.project(cone.Subspace(basis), x)
        np.testing.assert_allclose(nearest.edit, [1.0, 2.0, 0.0], atol=16 * unit)
        for tilt in (128 * unit, -128 * unit):
            tilted = [basis[0], jnp.asarray([tilt, 1.0, 0.0], dtype)]
            with pytest.raises(ValueError, match="basis is not orthonormal"):
                cone.project(cone.Subspace(tilted), x)


def test_bad_arguments_are_refused(refuses):
    x = {"w": jnp.diag(jnp.array([3.0, 4.0])), "b": jnp.zeros(2)}
    tilted = [{"w": jnp.eye(2), "b": jnp.zeros(2)}]
    for make, error, words in (
        (lambda: cone.Rank(-1), ValueError, "rank must be at least 0, got -1"),
        (lambda: cone.PooledRank(1.5), TypeError, "rank must be a plain integer"),
        (lambda: cone.Sparse(-2), ValueError, "count must be at least 0, got -2"),
        (lambda: cone.Subspace(tilted), ValueError, "basis is not orthonormal: .* off by up to 1"),
        (lambda: cone.Subspace([]), ValueError, "basis is empty"),
        (
            lambda: cone.Subspace([{"w": jnp.eye(2)}]),
            ValueError,
            r"edit has a leaf \['b'\] that basis",
        ),
        (lambda: cone.Mask({"w": True}), ValueError, "mask must be a tree like the edit"),
        (
            lambda: cone.Mask({"w": 1.0, "b": True}),
            TypeError,
            r"mask at leaf \['w'\] has dtype float",
        ),
        (
            lambda: cone.Mask({"w": jnp.ones(3, bool), "b": True}),
            ValueError,
            r"mask at leaf \['w'\] has shape \(3,\) for a leaf of shape \(2, 2\)",
        ),
        (lambda: "rank 1", TypeError, "cone must be a Rank, PooledRank, Subspace, Mask or Sparse"),
    ):
        with refuses(error, match=words):
            cone.project(make(), x)
    assert is_nan(jax.jit(cone.project)(cone.Subspace(tilted), x).norm)
    rank = cone.Rank(1)
    for function in (cone.support, cone.reach):
        with refuses(ValueError, match="budget must be finite and at least 0"):
            function(rank, x, -1.0)
        assert is_nan(jax.jit(function)(rank, x, -1.0))
    for function in (cone.entry, cone.exit):
        with refuses(ValueError, match="radius must be finite and at least 0"):
            function(rank, x, float("nan"))
        assert is_nan(jax.jit(function)(rank, x, -1.0).norm)
    for function in (cone.nuclear_entry, cone.spectral_entry):
        with refuses(ValueError, match="radius must be finite and at least 0"):
            function(x, -1.0)
        with refuses(ValueError, match=r"leaf \['b'\] of displacement holds NaN"):
            function(x | {"b": jnp.full(2, jnp.nan)}, 1.0)
        assert is_nan(jax.jit(function)(x, -1.0).norm)
    with refuses(ValueError, match="cap must be finite and at least 0"):
        cone.project_capped(x, 1, -1.0)
    with refuses(ValueError, match="rank must be at least 0"):
        cone.project_capped(x, -1, 1.0)
    with refuses(ValueError, match="of norm 5, has a part of norm 0 in the cone"):
        cone.exit(cone.Mask({"w": False, "b": True}), x, 10.0)
    with refuses(ValueError, match="no way out is distinguished"):
        cone.exit(rank, jax.tree.map(jnp.zeros_like, x), 1.0)
    orthogonal = jax.jit(cone.exit)(cone.Mask({"w": False, "b": True}), x, 10.0)
    assert is_nan(orthogonal.norm)
    with refuses(ValueError, match=r"leaf \['w'\] of edit holds NaN"):
        cone.project(rank, x | {"w": x["w"] * jnp.nan})
    assert is_nan(jax.jit(cone.project)(rank, x | {"w": x["w"] * jnp.nan}).tail)
    with refuses(TypeError, match="cone must be a Rank, .* as type has not"):
        cone.reach(cone.Rank, x, 1.0)


# Cones of a user. Those that hold -D with every D obey all laws above; others have a side.


def rays(seed):
    """A displacement and a direction with numpy's inner product, norm and sine between them."""
    x, q = numbers(seed), numbers(seed + 1)
    q = {n: jnp.asarray(part, FLOAT) for n, part in unflat(flat(q) / norm_of(q)).items()}
    size, inner = norm_of(x), flat(q) @ flat(x)
    return x, q, size, inner


def norm_of(x):
    return np.linalg.norm(flat(x))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sign", [1, -1])
def test_a_cone_with_one_side_obeys_the_lemma(seed, sign):
    x, q, size, inner = rays(seed)
    x, inner = jax.tree.map(lambda leaf: sign * leaf, x), sign * inner
    ray, atol = Ray(q), 64 * UNIT * size
    e, d = max(inner, 0), 0.5 * size
    tail = np.sqrt(size**2 - e**2)
    nearest = cone.project(ray, x)
    np.testing.assert_allclose(nearest[1:], (e, tail), atol=atol)
    np.testing.assert_allclose(flat(nearest.edit), e * flat(q), atol=atol)
    np.testing.assert_allclose(cone.support(ray, x, d), d * e, atol=atol * size)
    wanted = np.hypot(tail, max(e - d, 0))
    np.testing.assert_allclose(cone.reach(ray, x, d), wanted, atol=atol)
    # In by +q: the first t >= 0 with ||x + t q|| = radius.
    radius = np.sqrt(size**2 - 0.75 * inner**2)
    move = cone.entry(ray, x, radius)
    if inner < 0:
        t = -inner - np.sqrt(inner**2 - size**2 + radius**2)
        np.testing.assert_allclose(move.norm, t, atol=256 * atol)
        np.testing.assert_allclose(flat(move.edit), t * flat(q), atol=256 * atol)
    else:
        assert jnp.isinf(move.norm)  # every step along +q leads away
    # Out by +q.
    if inner > 0:
        t = -inner + np.sqrt(inner**2 + 3 * size**2)
        move = cone.exit(ray, x, 2 * size)
        np.testing.assert_allclose(move.norm, t, atol=4 * atol)
        np.testing.assert_allclose(flat(move.edit), t * flat(q), atol=4 * atol)
    else:
        with pytest.raises(ValueError, match="no way out is distinguished"):
            cone.exit(ray, x, 2 * size)


def test_points_leave_a_ball_along_a_cone_of_ones_own():
    x, q, size, inner = rays(1)
    sign = np.sign(inner)
    avoid = numbers(7)
    center = tree.combine((1, sign), (avoid, x))
    points = [tree.combine((1, s), (center, numbers(8))) for s in (1, -1)]
    moved = negative.exit_ball(points, (0.5, 0.5), avoid, 2 * size, cone=Ray(q))
    t = -abs(inner) + np.sqrt(inner**2 + 3 * size**2)
    for before, after in zip(points, moved, strict=True):
        np.testing.assert_allclose(flat(after) - flat(before), t * flat(q), atol=512 * UNIT * size)
    back = tree.combine((-1,), (q,))
    with pytest.raises(ValueError, match="no edit of the cone is distinguished"):
        negative.exit_ball(points, (0.5, 0.5), avoid, 2 * size, cone=Ray(back))


def test_a_readout_is_bounded_on_a_cone_of_ones_own():
    x, q, size, inner = rays(2)
    for sign in (1, -1):
        bound = negative.linear_bound(
            lambda w, sign=sign: sign * tree.vdot(x, w), numbers(9), Ray(q), 0.5, curvature=0.0
        )
        rises = sign * inner > 0
        np.testing.assert_allclose(bound.change, 0.5 * max(sign * inner, 0), atol=64 * UNIT * size)
        np.testing.assert_allclose(flat(bound.edit), 0.5 * rises * flat(q), atol=64 * UNIT)


def test_a_guard_holds_against_a_cone_of_ones_own():
    start, avoid = jnp.asarray([1.0, 2.0], FLOAT), jnp.asarray([0.5, 3.0], FLOAT)
    q = jnp.asarray([0.6, -0.8], FLOAT)
    guarded = fit.guard(
        jax.random.key(0),
        [lambda w: 0 * jnp.sum(w)],
        [start],
        [1.0],
        lambda w: jnp.sum((w - avoid) ** 2) / 2,
        optimizer=optax.sgd(0.1),
        steps=1,
        cone=Ray(q),
        budget=0.25,
    )
    # The slope there is (0.5, -1), which q raises; so the worst edit is 0.25 q.
    wanted = np.array([1.0, 2.0]) - 0.1 * (np.array([0.5, -1.0]) + 0.25 * np.array([0.6, -0.8]))
    np.testing.assert_allclose(guarded.weights[0], wanted, rtol=16 * UNIT)


def test_what_a_cone_of_ones_own_says_besides_is_used():
    class Nothing:
        def project(self, edit):
            nearest = jax.tree.map(jnp.zeros_like, edit)
            return cone.Projection(nearest, tree.norm(nearest), tree.norm(edit))

        def holds_only_zero(self):
            return True

        def sizes(self, edit):
            return jnp.zeros((), FLOAT), 7 * tree.norm(edit) / np.sqrt(2)

    x = jnp.ones(2, FLOAT)
    assert jnp.isinf(cone.exit(Nothing(), x, 9.0).norm)
    assert cone.exit(Nothing(), x, 1.0).norm == 0
    np.testing.assert_allclose(cone.reach(Nothing(), x, 1.0), 7, rtol=8 * UNIT)  # by `sizes`


def test_cones_of_ones_own_are_refused_by_name(refuses):
    class Nothing:
        pass

    class Bare:
        def project(self, edit):
            return edit

    class Plain:
        def project(self, edit):
            return cone.Projection(edit, 1.0, tree.norm(edit))

    class Coarse:
        def project(self, edit):
            norm = tree.norm(edit)
            return cone.Projection(edit, norm.astype(jnp.bfloat16), norm)

    x = jnp.ones(2, FLOAT)
    calls = (
        lambda k: cone.project(k, x),
        lambda k: cone.support(k, x, 1.0),
        lambda k: cone.reach(k, x, 1.0),
        lambda k: cone.entry(k, x, 1.0),
        lambda k: cone.exit(k, x, 9.0),
        lambda k: negative.exit_ball([x], (1.0,), 0 * x, 9.0, cone=k),
        lambda k: negative.linear_bound(jnp.sum, x, k, 1.0),
        lambda k: negative.size_to_change(jnp.sum, x, k, 1.0),
        guard_with,
    )
    words = r"or have a method project\(self, edit\) that returns .* as Nothing has not: write it"
    for call in calls:
        with refuses(TypeError, match=words):
            call(Nothing())
    for call in calls[:-1]:
        for made in (Bare, Plain, Coarse):
            words = rf"{made.__name__}.project must return a cone.Projection\(edit, norm, tail\)"
            with refuses(TypeError, match=words):
                call(made())
    with refuses(TypeError, match="cone is a Bare, .* by jax.tree_util.register_dataclass"):
        guard_with(Bare())


def guard_with(k):
    x = jnp.ones(2, FLOAT)
    return fit.guard(
        jax.random.key(0),
        [jnp.sum],
        [x],
        [1.0],
        jnp.sum,
        optimizer=optax.sgd(0.1),
        steps=1,
        cone=k,
        budget=1.0,
    )


# How often a call waits for the device.


READS = ("__array__", "__bool__", "__float__", "__index__", "__int__", "item", "tolist")


@pytest.fixture
def reads(monkeypatch):
    """Counts the values of arrays that a call reads, once it is compiled."""
    seen, inner = [], []

    def counting(read):
        def wrapped(self, *args, **kwargs):
            if not inner:
                seen.append(read.__name__)
            inner.append(None)  # one read may go by way of another
            try:
                return read(self, *args, **kwargs)
            finally:
                inner.pop()

        return wrapped

    kind = type(jnp.zeros(()))
    for name in READS:
        monkeypatch.setattr(kind, name, counting(getattr(kind, name)))

    def count(call):
        call()
        seen.clear()
        call()
        return len(seen)

    return count


def test_values_are_read_as_seldom_with_many_leaves_as_with_one(reads):
    rng = np.random.default_rng(0)
    shapes = {f"{i}": (6, 5) if i % 2 else (5,) for i in range(24)}
    x, *basis = (
        {n: jnp.asarray(rng.normal(size=shape), FLOAT) for n, shape in shapes.items()}
        for _ in range(3)
    )
    basis = geometry.orthonormalize(basis)
    cones = {
        cone.Rank(1): 1,
        cone.PooledRank(3): 1,
        # The search for the smallest entry that is kept decides by values how long it is.
        cone.Sparse(10): 1 + reads(lambda: selection.top.keep_top(x, 10)),
    }
    others = ((cone.Mask(dict.fromkeys(x, True)), 1), (cone.Subspace(basis), 3), (Even(), 1))
    for k, wanted in (*cones.items(), *others):
        assert reads(lambda k=k: cone.project(k, x)) <= wanted
        assert reads(lambda k=k: cone.support(k, x, 1.0)) <= wanted
        assert reads(lambda k=k: cone.reach(k, x, 1.0)) <= wanted
        assert reads(lambda k=k: cone.entry(k, x, 99.0)) <= wanted + 1  # of a radius in reach
        assert reads(lambda k=k: cone.exit(k, x, 99.0)) <= wanted + 1


def test_the_leaf_that_is_not_finite_is_named_wherever_leaves_lie():
    here, there = jax.devices()[:2]
    sound = {"a": jax.device_put(jnp.ones(2), here), "b": jax.device_put(jnp.ones(2), there)}
    _checks.finite(x=sound, y=sound, z={"c": np.ones(2, np.float32)})
    for name in sound:
        for value in (jnp.nan, jnp.inf):
            bad = sound | {name: sound[name].at[1].set(value)}
            with pytest.raises(ValueError, match=rf"leaf \['{name}'\] of y holds NaN or an inf"):
                _checks.finite(x=sound, y=bad, z=sound)
    known = jnp.asarray([jnp.nan])
    with pytest.raises(ValueError, match=r"leaf \['b'\] of displacement holds NaN"):
        jax.grad(lambda a: cone.support(cone.Sparse(1), {"a": a, "b": known}, 1.0))(jnp.ones(2))


def test_second_derivatives_exist_where_the_tail_is_zero():
    # A tail of zero is a kink, but its square, which is what enters, has none.
    inside = cone.Mask({"w": jnp.asarray([True, False])})
    flat = {"w": jnp.asarray([3.0, 0.0], FLOAT)}
    radius = 5.0
    curved = {
        "exit": (lambda x: cone.exit(inside, x, radius).norm, -1 / radius),
        "entry": (lambda x: cone.entry(inside, x, 2.0).norm, 1 / 2.0),
        "reach": (lambda x: cone.reach(inside, x, 1.0), 1 / 2.0),
    }
    for name, (function, wanted) in curved.items():
        found = jax.hessian(function)(flat)["w"]["w"]
        np.testing.assert_allclose(found, np.diag([0.0, wanted]), atol=1e-5, err_msg=name)
        near = jax.hessian(function)({"w": jnp.asarray([3.0, 1e-3], FLOAT)})["w"]["w"]
        np.testing.assert_allclose(near, found, atol=2e-3, err_msg=name)


def test_second_derivatives_exist_where_the_tail_of_low_rank_is_zero():
    def norm(t):
        return cone.exit(cone.Rank(1), jnp.diag(jnp.stack([jnp.asarray(3.0, FLOAT), t])), 5.0).norm

    # -3 + sqrt(25 - t^2)
    for t in (0.0, 1e-2):
        found = jax.grad(jax.grad(norm))(jnp.asarray(t, FLOAT))
        np.testing.assert_allclose(found, -1 / 5, atol=1e-3)
