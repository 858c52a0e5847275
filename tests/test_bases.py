"""Laws of merges in coordinates: coordinates lose nothing, and know nothing of factors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import is_nan
from tests.strategies import FLOAT, UNIT, scales
from wspace import lowrank, merge
from wspace.lowrank import LowRank
from wspace.testing import assert_close

MATRICES = {"w": (9, 7), "s": (2, 6, 8)}
seeds = st.integers(0, 2**16)
signed = st.lists(st.sampled_from([-2.0, -0.5, 0.0, 1.0, 3.0]), min_size=2, max_size=2)


def adapters(seed, ranks=(1, 3), scale=1.0):
    """Edits with factors of different ranks, a dense matrix and a vector."""
    rng = np.random.default_rng(seed)

    def one(rank):
        factors = {
            name: LowRank(
                jnp.asarray(scale * rng.normal(size=(*stack, m, rank)), FLOAT),
                jnp.asarray(rng.normal(size=(*stack, n, rank)), FLOAT),
            )
            for name, (*stack, m, n) in MATRICES.items()
        }
        dense = {"d": (4, 3), "b": (3,)}
        return factors | {
            k: jnp.asarray(scale * rng.normal(size=d), FLOAT) for k, d in dense.items()
        }

    return [one(rank) for rank in ranks]


def whole(edit):
    """An edit multiplied out in NumPy."""
    return {
        name: np.asarray(x.left, np.float64) @ np.asarray(x.right, np.float64).swapaxes(-1, -2)
        if isinstance(x, LowRank)
        else np.asarray(x, np.float64)
        for name, x in edit.items()
    }


def as_weights(entries):
    return {name: jnp.asarray(x, FLOAT) for name, x in entries.items()}


def odd(base, tuned, coefficients):
    """A rule for entries that is not linear, and knows no signs of a basis."""
    return jax.tree.map(
        lambda b, *xs: b + sum(c * x * jnp.abs(x) for c, x in zip(coefficients, xs, strict=True)),
        base,
        *tuned,
    )


SPACES = {"shared": merge.in_shared_space, "core": merge.in_core_space}
FUNCTIONS = {
    (space, rule.__name__): jax.jit(functools.partial(function, rule))
    for space, function in SPACES.items()
    for rule in (merge.task_arithmetic, odd)
}
each_space = pytest.mark.parametrize("space", SPACES)
knots = jax.jit(merge.knots, static_argnames="method")


@each_space
@given(seed=seeds, c=signed, scale=scales)
def test_a_linear_rule_gives_what_it_gives_without_coordinates(space, seed, c, scale):
    edits = adapters(seed, scale=scale)
    got = FUNCTIONS[space, "task_arithmetic"](edits, c)
    assert got["w"].rank <= 4
    sizes = [whole(x) for x in edits]
    wanted = {name: c[0] * sizes[0][name] + c[1] * sizes[1][name] for name in sizes[0]}
    room = sum(
        abs(a) * np.linalg.norm(x[name]) for a, x in zip(c, sizes, strict=True) for name in x
    )
    largest = sum(np.linalg.norm(x[name]) for x in sizes for name in x)
    assert_close(as_weights(whole(got)), as_weights(wanted), scale=room + largest)


def in_gauge(edit, seed):
    """The same edit, its factors multiplied by a matrix and by its inverse."""
    rng = np.random.default_rng(seed)

    def turned(x):
        g = np.eye(x.rank) + 0.7 * np.linalg.qr(rng.normal(size=(x.rank, x.rank)))[0]
        back = np.linalg.inv(g).T
        return LowRank(*(f @ jnp.asarray(h, FLOAT) for f, h in ((x.left, g), (x.right, back))))

    return {k: turned(x) if isinstance(x, LowRank) else x for k, x in edit.items()}


@each_space
@pytest.mark.parametrize("seed", [0, 1])
def test_the_gauge_of_factors_changes_nothing(space, seed):
    edits, c = adapters(seed, (2, 2)), [1.0, -0.5]
    turned = [in_gauge(x, seed + i) for i, x in enumerate(edits)]
    got, again = (as_weights(whole(FUNCTIONS[space, "odd"](x, c))) for x in (edits, turned))
    assert_close(again, got, units=4096)
    # Factors summed one by one hold products of two models, which differ from gauge to gauge.
    pairs = [[(x["w"].left, x["w"].right) for x in given] for given in (edits, turned)]
    popular, moved = ((a + b) @ (p + q).T for (a, p), (b, q) in pairs)
    true = whole(edits[0])["w"] + whole(edits[1])["w"]
    assert np.linalg.norm(popular - true) > 0.5 * np.linalg.norm(true)
    assert np.linalg.norm(popular - moved) > 0.1 * np.linalg.norm(true)


def test_rules_that_turn_with_a_matrix_see_no_difference_in_the_core():
    edits, c = [{k: x[k] for k in "wb"} for x in adapters(3, (2, 2))], [1.0, -0.5]
    dense = [as_weights(whole(x)) for x in edits]
    zero = jax.tree.map(jnp.zeros_like, dense[0])
    for rule in (merge.iso_c, merge.tsv_m):
        core = merge.in_core_space(lambda *given, rule=rule: rule(*given).weights, edits, c)
        wanted = rule(zero, dense, c)
        # In the core each of two models of rank 2 keeps two triples, in the matrix all it has.
        assert_close(as_weights(whole(core)), wanted.weights, units=512 / float(wanted.trusted))
    norms = [lowrank.norm(x) for x in edits]
    same = merge.in_core_space(lambda _, cores, __: cores[0], edits)
    np.testing.assert_allclose(lowrank.norm(same), norms[0], rtol=64 * UNIT)


def plain_knots(taus, c):
    """The rule `odd` in the right singular vectors of task vectors one above another."""
    *_, vt = np.linalg.svd(np.concatenate(taus, axis=-2), full_matrices=False)
    seen = [x @ vt.swapaxes(-1, -2) for x in taus]
    return sum(a * x * np.abs(x) for a, x in zip(c, seen, strict=True)) @ vt


@pytest.mark.parametrize("seed", [0, 1])
def test_knots_merges_in_shared_outputs_each_model_by_its_own_coefficient(seed):
    edits, c = adapters(seed), [1.0, -0.5]
    sizes = [whole(x) for x in edits]
    dense = [as_weights(x) for x in sizes]
    zero = jax.tree.map(jnp.zeros_like, dense[0])
    wanted = {name: plain_knots([x[name] for x in sizes], c) for name in ("w", "s", "d")}
    wanted["b"] = sum(a * x["b"] * np.abs(x["b"]) for a, x in zip(c, sizes, strict=True))
    got = knots(zero, dense, c, method=odd)
    assert_close(got, as_weights(wanted), units=4096)
    factored = FUNCTIONS["shared", "odd"](edits, c)
    assert_close(as_weights(whole(factored)), as_weights(wanted), units=4096)
    mixed = FUNCTIONS["shared", "odd"]([edits[0], dense[1]], c)
    assert_close(mixed, as_weights(wanted), units=4096)
    one_weight = plain_knots([x["w"] for x in sizes], c[:1] * 2)
    assert np.linalg.norm(one_weight - wanted["w"]) > 0.5 * np.linalg.norm(wanted["w"])


def test_knots_without_a_rule_is_task_arithmetic():
    base, *tuned = [as_weights(whole(x)) for x in adapters(5, (1, 2, 3))]
    c = [2.0, -1.0]
    assert_close(knots(base, tuned, c), merge.task_arithmetic(base, tuned, c), units=64)
    assert_close(knots(base, tuned[:1]), tuned[0], units=64)
    got = merge.knots(base["d"], [x["d"] for x in tuned], c, method=merge.ties, scale=0.5)
    assert got.shape == base["d"].shape


@each_space
def test_adapters_are_never_multiplied_out(space):
    edits = [LowRank(jnp.ones((50, r), FLOAT), jnp.ones((40, r), FLOAT)) for r in (2, 3)]
    program = jax.make_jaxpr(functools.partial(SPACES[space], odd))(edits, [1.0, 1.0])
    assert not any(f"[{shape}]" in str(program) for shape in ("50,40", "40,50"))
    assert SPACES[space](odd, edits, [1.0, 1.0]).rank == 5


@each_space
def test_edits_of_nothing_are_nothing(space):
    c = [1.0, 1.0]
    for rank in (0, 2):
        edits = [LowRank(jnp.zeros((4, rank), FLOAT), jnp.zeros((3, rank), FLOAT))] * 2
        got = SPACES[space](odd, edits, c)
        assert_close(lowrank.materialize(got), jnp.zeros((4, 3), FLOAT), units=0)


@each_space
def test_a_direction_is_kept_from_the_rounding_of_a_matrix_on(space):
    small = 32 * UNIT
    edit = LowRank(jnp.diag(jnp.array([1, small], FLOAT)), jnp.eye(2, dtype=FLOAT))
    got = SPACES[space](merge.task_arithmetic, [edit, edit], [1.0, 1.0])
    np.testing.assert_allclose(lowrank.materialize(got)[1, 1], 2 * small, rtol=0.25)


@each_space
def test_edits_in_half_precision_come_back_in_it_and_no_basis_is_as_coarse(space):
    rng = np.random.default_rng(0)
    half, single = jnp.asarray(rng.normal(size=(2, 5, 4)), jnp.bfloat16)
    got = SPACES[space](odd, [{"w": half}, {"w": single.astype(jnp.float32)}], [1.0, 1.0])["w"]
    wide = [x.astype(jnp.float32) for x in (half, single)]
    wanted = SPACES[space](odd, [{"w": x} for x in wide], [1.0, 1.0])["w"]
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), wanted, rtol=2**-8)


@each_space
def test_bad_arguments_are_refused(space):
    function, edits = SPACES[space], adapters(0)
    with pytest.raises(ValueError, match="edits is empty"):
        function(odd, [])
    with pytest.raises(ValueError, match=r"leaf \['w'\] has shape"):
        function(odd, [edits[0], edits[1] | {"w": jnp.zeros((3, 3), FLOAT)}])
    with pytest.raises(ValueError, match="merged has a leaf"):
        function(lambda base, *_: base | {"z": base["b"]}, edits)
    broken = edits[0] | {"w": LowRank(edits[0]["w"].left * jnp.nan, edits[0]["w"].right)}
    with pytest.raises(ValueError, match="holds NaN or an infinity"):
        function(odd, [broken, edits[1]], [1.0, 1.0])
    assert is_nan(FUNCTIONS[space, "odd"]([broken, edits[1]], [1.0, 1.0])["w"].left)
