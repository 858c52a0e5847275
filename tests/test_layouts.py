"""Layers that store `(out, in)` are treated as those that store `(in, out)`, transposed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.strategies import FLOAT
from wspace import average, lowrank, merge, negative, perturb
from wspace.testing import assert_close

SHAPES = {"square": (4, 4), "w": (6, 4), "b": (4,), "stack": (2, 6, 4), "kernel": (2, 1, 3, 4)}
"""Leaves as they act from the left; a kernel of the other layout is `(4, 3, 2, 1)`."""


def trees(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {name: jnp.asarray(rng.normal(size=shape), FLOAT) for name, shape in SHAPES.items()}
        for _ in range(count)
    ]


def stored(x):
    """The same layers, stored `(out, in)`."""

    def turned(leaf):
        leaf = np.asarray(leaf)
        if leaf.ndim == 4:
            return jnp.asarray(leaf.reshape(6, 4).T.reshape(4, 3, 2, 1))
        return jnp.asarray(np.swapaxes(leaf, -1, -2) if leaf.ndim > 1 else leaf)

    return jax.tree.map(turned, x)


def spread(rows, seed):
    """A positive definite matrix for the inputs or the outputs of a leaf."""
    x = np.random.default_rng(seed).normal(size=(2 * rows, rows))
    return jnp.asarray(x.T @ x / rows, FLOAT)


def inputs(seed=0, frozen=0.0):
    sizes = {name: (6, 4)[name == "square"] for name in SHAPES if name != "b"}
    return {name: spread(rows, seed) for name, rows in sizes.items()} | {"b": frozen}


def projectors():
    used = np.linalg.qr(np.random.default_rng(3).normal(size=(6, 2)))[0]
    six = jnp.asarray(np.eye(6) - used @ used.T, FLOAT)
    four = jnp.diag(jnp.asarray([1.0, 1.0, 0.0, 1.0], FLOAT))
    return {"square": four, "w": six, "b": 1.0, "stack": six, "kernel": six}


def sides():
    six, four = np.linalg.qr(np.random.default_rng(4).normal(size=(6, 2)))[0], np.eye(4)[:, 1:2]
    six, four = jnp.asarray(six, FLOAT), jnp.asarray(four, FLOAT)
    rows = {"square": four, "w": six, "b": 1.0, "stack": six, "kernel": six}
    return negative.Sides(rows=rows, columns=dict.fromkeys(SHAPES, four) | {"b": 1.0})


def kroneckers():
    outer = spread(4, 9)
    return [
        {
            name: None if name == "b" else average.Kronecker(entry, outer)
            for name, entry in inputs(seed).items()
        }
        for seed in (5, 6)
    ]


def moving():
    """Where the points of `ends` may move so that their average goes anywhere."""
    return [inputs(1, 1.0), None]


GRAMS = [inputs(5, None), inputs(6, None)]
AVOID = trees(1, seed=9)[0]
OF_TREES = {
    "retarget": lambda xs, goal, **o: negative.retarget(xs, (0.3, 0.7), goal, allow=moving(), **o),
    "retarget both": lambda xs, goal, **o: negative.retarget(
        xs, (0.3, 0.7), goal, allow=[inputs(1, 1.0), inputs(2, 1.0)], **o
    ),
    "exit_ball": lambda xs, way, **o: negative.exit_ball(
        xs, (0.5, 0.5), xs[0], 30.0, direction=way, allow=[projectors(), inputs(2)], **o
    ),
    "guard_hull": lambda xs, avoid, **o: negative.guard_hull(
        xs, avoid, 12.0, allow=[projectors(), inputs(2)], **o
    ),
    "guard_normal": lambda xs, avoid, **o: (
        negative.guard_normal(
            xs, avoid, 12.0, allow=[projectors(), inputs(2)], steps=5, **o
        ).weights
    ),
    "repel": lambda xs, avoid, **o: negative.repel(xs[0], avoid, 0.5, allow=projectors(), **o),
    "erase_keeping": lambda xs, way, **o: negative.erase_keeping(
        xs[0], [way], [xs[1]], inverse_metric=inputs(2, 2.0), **o
    ),
    "attenuate": lambda xs, center, **o: negative.attenuate(
        xs[0], sides(), 1.0, center=center, **o
    ),
    "regression_mean": lambda xs, _, **o: average.regression_mean(xs, GRAMS, **o).weights,
    "kronecker_mean": lambda xs, _, **o: average.kronecker_mean(xs, kroneckers(), **o).weights,
    "filter_normalize": lambda xs, way, **o: perturb.filter_normalize(way, xs[0], **o),
    "knots": lambda xs, base, **o: merge.knots(base, xs, method=merge.magmax, **o),
}


@pytest.mark.parametrize("function", OF_TREES.values(), ids=OF_TREES)
def test_layers_stored_the_other_way_are_treated_alike(function, refuses):
    wanted = stored(function(trees(2), AVOID))
    got = function(stored(trees(2)), stored(AVOID), layout="out_in")
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, wanted)
    assert_close(got, wanted, units=512)
    with refuses(ValueError, match="layout must be one of 'in_out', 'out_in', got 'torch'"):
        function(trees(2), AVOID, layout="torch")


def test_a_convolution_is_the_matrix_that_its_patches_are_multiplied_by():
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(5, 3, 2, 4)), FLOAT)
    images = jnp.asarray(rng.normal(size=(2, 3, 6, 7)), FLOAT)
    wanted = jax.lax.conv(images, kernel, (1, 1), "VALID")
    patches = jax.lax.conv_general_dilated_patches(images, (2, 4), (1, 1), "VALID")
    matrix = lowrank.as_matrix(kernel, layout="out_in")
    got = jnp.einsum("nihw,io->nohw", patches, matrix)
    assert_close(got, wanted, units=16)


@pytest.mark.parametrize("shape", [(4, 4), (3, 4), (5, 2, 2, 1)])
def test_what_a_layer_of_torch_does_on_its_data_stays(shape):
    """`layer(x) = x @ weight.T`, and the square one moved on its outputs before."""
    rng = np.random.default_rng(1)
    data = rng.normal(size=(9, 1)) @ rng.normal(size=(1, 4))
    p = negative.free_inputs(jnp.asarray(data, FLOAT), rtol=1e-3)
    x, way = (jnp.asarray(rng.normal(size=shape), FLOAT) for _ in range(2))
    moved = negative.exit_ball(
        [x, x], (0.5, 0.5), x, 3.0, direction=way, allow=[p, p], layout="out_in"
    )
    for y in moved:
        change = np.asarray(y - x, np.float64).reshape(shape[0], -1)
        assert np.linalg.norm(change) > 2.9
        assert np.linalg.norm(data @ change.T) < 1e-4 * np.linalg.norm(data)


def test_activations_are_the_inputs_of_layers_stored_the_other_way():
    rng = np.random.default_rng(2)
    shapes = {"square": (4, 4), "w": (3, 4), "k": (5, 2, 2, 1)}
    x, avoid = ({n: rng.normal(size=s).astype(FLOAT) for n, s in shapes.items()} for _ in range(2))
    seen = {name: jnp.asarray(rng.normal(size=(6, 4)), FLOAT) for name in shapes}
    report = negative.audit([x], (1,), avoid, 0.1, activations=seen, layout="out_in")
    for leaf, name in zip(report.leaves, sorted(shapes), strict=True):
        apart = (x[name] - avoid[name]).astype(float).reshape(shapes[name][0], -1)
        assert leaf.shape == shapes[name]
        assert leaf.matrix_shape == apart.T.shape
        values = np.linalg.svd(np.asarray(seen[name], float) @ apart.T)[1]
        tails = np.sqrt(np.append(np.cumsum(values[::-1] ** 2)[::-1], 0))
        np.testing.assert_allclose(leaf.data_tail, tails, rtol=1e-5, atol=1e-5)
        spectrum = np.linalg.svd(apart)[1]
        np.testing.assert_allclose(leaf.singular_values, spectrum, rtol=1e-5)


def test_matrices_by_themselves_may_be_stored_the_other_way():
    rng = np.random.default_rng(3)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), FLOAT)

    w, keys, values, keep = draw(5, 3), draw(2, 5), draw(2, 3), draw(1, 5)
    for ridge in (0.0, 0.5):
        wanted = negative.rewrite(w, keys, values, keep=keep, ridge=ridge)
        got = negative.rewrite(w.T, keys, values, keep=keep, ridge=ridge, layout="out_in")
        assert_close(got, wanted.T, units=64)
    assert_close(negative.rewrite(w.T, keys, values, layout="out_in") @ keys.T, values.T, units=64)
    factors = lowrank.LowRank(draw(5, 2), draw(3, 2))
    for x, other in ((w, w.T), (factors, lowrank.LowRank(factors.right, factors.left))):
        wanted = lowrank.truncate_outputs(x, keys, 1)
        got = lowrank.truncate_outputs(other, keys, 1, layout="out_in")
        product = lowrank.materialize(got.factors)
        assert_close(product, lowrank.materialize(wanted.factors).T, units=64)
        assert_close(got.tail, wanted.tail, units=64)
    chain, edits = [draw(5, 3), draw(3, 4)], [draw(5, 3), factors_of_shape(rng, 3, 4)]
    turned = [x.T for x in chain], [edits[0].T, lowrank.LowRank(edits[1].right, edits[1].left)]
    wanted = negative.chain_bound(chain, edits)
    assert_close(negative.chain_bound(*turned, layout="out_in"), wanted, units=64)


def factors_of_shape(rng, m, n):
    return lowrank.LowRank(*(jnp.asarray(rng.normal(size=(k, 2)), FLOAT) for k in (m, n)))


def test_factors_in_a_shared_space_may_be_those_of_the_transpose():
    rng = np.random.default_rng(4)
    edits = [factors_of_shape(rng, 5, 3) for _ in range(2)]
    turned = [lowrank.LowRank(x.right, x.left) for x in edits]
    wanted = merge.in_shared_space(merge.magmax, edits)
    got = merge.in_shared_space(merge.magmax, turned, layout="out_in")
    assert got.shape == (3, 5)
    assert_close(lowrank.materialize(got), lowrank.materialize(wanted).T, units=256)
    base = jnp.zeros((3, 5), FLOAT)
    dense = merge.knots(
        base, list(map(lowrank.materialize, turned)), method=merge.magmax, layout="out_in"
    )
    assert_close(dense, lowrank.materialize(got), units=256)


def test_a_matrix_for_the_other_side_names_the_layout(refuses):
    x, p = jnp.ones((3, 4)), jnp.eye(4)
    hint = r"if your layers store \(out, in\), as torch and equinox do, give layout='out_in'"
    refused = {
        rf"allow\[0\] at leaf \(root\) has shape \(4, 4\) .* \(3, 3\); {hint}": lambda: (
            negative.retarget([x], (1,), x, allow=[p])
        ),
        rf"activations at leaf \(root\) has shape \(7, 4\) .*; {hint}": lambda: negative.audit(
            [x], (1,), 2 * x, 0.1, activations=jnp.ones((7, 4))
        ),
        rf"inverse_metric at leaf \(root\) has shape \(4, 4\) .*; {hint}": lambda: (
            negative.erase_keeping(x, [x], [], inverse_metric=p)
        ),
        rf"basis.rows at leaf \(root\) has shape \(4, 4\) .* inputs .*; {hint}": lambda: (
            negative.attenuate(x, negative.Sides(rows=p), 1.0)
        ),
        rf"grams\[0\] at leaf \(root\) has shape \(4, 4\) .* inputs .*; {hint}": lambda: (
            average.regression_mean([x], [p])
        ),
        rf"inputs of factors\[0\] at leaf \(root\) has shape \(4, 4\) .*; {hint}": lambda: (
            average.kronecker_mean([x], [average.Kronecker(p, jnp.eye(3))])
        ),
        rf"matrix must be \(in, out\), .*; {hint}": lambda: negative.rewrite(
            x, jnp.ones((1, 4)), jnp.ones((1, 3))
        ),
        rf"inputs \(2, 4\) do not fit a matrix \(3, 4\): .*; {hint}": lambda: (
            lowrank.truncate_outputs(x, jnp.ones((2, 4)), 1)
        ),
        rf"matrices\[1\] takes 5 inputs, and matrices\[0\] gives 4: .*; {hint}": lambda: (
            negative.chain_bound([x, jnp.ones((5, 3))], [x, jnp.ones((5, 3))])
        ),
    }
    for message, call in refused.items():
        with refuses(ValueError, match=message):
            call()
    with refuses(ValueError, match=r"must be \(4, 4\); if your layers store \(in, out\)"):
        negative.repel(x, x, 1.0, allow=jnp.eye(3), layout="out_in")
    with refuses(ValueError, match=r"must be \(3, 3\)$"):
        negative.repel(x, x, 1.0, allow=jnp.eye(5))
    chain = [jnp.ones((2, 3)), jnp.ones((3, 4))]
    with refuses(ValueError, match=r"in their order; if your layers store \(in, out\)"):
        negative.chain_bound(chain, chain, layout="out_in")
    chain = [jnp.ones((3, 4)), jnp.ones((5, 6))]
    for layout in ("in_out", "out_in"):
        with refuses(ValueError, match=r"give the layers in their order$"):
            negative.chain_bound(chain, chain, layout=layout)


def test_a_layout_is_kept_under_transformations():
    x, way = (jnp.asarray(np.random.default_rng(i).normal(size=(3, 4)), FLOAT) for i in range(2))
    p = jnp.diag(jnp.asarray([1.0, 0.0, 1.0, 1.0], FLOAT))

    def moved(way, strength):
        return negative.repel(x, way, strength, allow=p, layout="out_in")

    wanted = np.asarray(x) + 0.5 * (np.asarray(x) - np.asarray(way)) @ np.asarray(p)
    assert_close(jax.jit(moved)(way, 0.5), jnp.asarray(wanted), units=16)
    many = jax.vmap(moved, (None, 0))(way, jnp.asarray([0.5, 0.5], FLOAT))
    assert_close(many[1], jnp.asarray(wanted), units=16)
    slope = jax.grad(lambda s: jnp.sum(moved(way, s)))(0.5)
    np.testing.assert_allclose(slope, (np.asarray(x - way) @ np.asarray(p)).sum(), rtol=1e-4)
