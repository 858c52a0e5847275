"""Float64 of NumPy where 64-bit values are off: it counts as float32, and no file is rounded."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.test_streaming_files import saved
from wspace import (
    average,
    checkpoint,
    cone,
    fit,
    geometry,
    interpolate,
    lowrank,
    merge,
    negative,
    soup,
    testing,
    tree,
)
from wspace.lowrank import LowRank
from wspace.testing import assert_close

pytestmark = pytest.mark.float32(reason="what is asked is asked of 64-bit values switched off")

KEY, SGD = jax.random.key(0), optax.sgd(0.01)
SHAPES = {"w": (6, 4), "b": (4,)}


def points(finer=0.0):
    """Points with the digits of float32, or with others below them, as NumPy has them."""
    rng = np.random.default_rng(0)
    drawn = [
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
        for _ in range(3)
    ]
    return jax.tree.map(lambda x: x.astype(np.float64) * (1 + finer), drawn)


def loss(x):
    return jnp.sum(jnp.asarray(x["w"]) ** 2) + jnp.sum(jnp.abs(x["b"]))


def run(average_, *xs):
    states = [average_.init(xs[0])]
    for x in xs:
        states.append(average_.update(states[-1], x))
    return states, average_.value(states[-1])


CALLS = {
    "audit": lambda a, b, c: negative.audit([a, b], [0.5, 0.5], c, 1.0),
    "report": lambda a, b, c: str(merge.report(a, [b, c], merge.ties(a, [b, c]))),
    "greedy_soup": lambda a, b, c: soup.greedy_soup(lambda x: -loss(x), [a, b, c]),
    "greedy_soup, of one": lambda a, *_: soup.greedy_soup(loss, [a]),
    "grid": lambda a, b, _: soup.grid(loss, lambda k: average.mean([a, b], k), soup.simplex(2, 2)),
    "adapt": lambda a, *_: fit.adapt(KEY, loss, a, optimizer=SGD, steps=1),
    "adapt, no step": lambda a, *_: fit.adapt(KEY, loss, a, optimizer=SGD, steps=0),
    "coefficients": lambda a, b, c: fit.coefficients(
        KEY, loss, a, [b, c], per="leaf", optimizer=SGD, steps=1
    ),
    "invert": lambda a, b, _: fit.invert(
        KEY, lambda x: jnp.sum(x**2), a["b"], table=b["w"], rows=1, optimizer=SGD, steps=1
    ),
    "ema": lambda *xs: run(average.ema(0.3), *xs),
    "running_mean": lambda *xs: run(average.running_mean(), *xs),
    "window": lambda *xs: run(average.window(2), *xs),
    # Of snapshots so close that the rounding of the points decides which combinations are kept.
    "reconstruct": lambda a, b, _: average.reconstruct(
        [a, b],
        [average.Profile(100, 2.0), average.Profile(100, 2.0 + 1e-6)],
        average.Profile(100, 3.0),
    ),
    "as_matrix": lambda a, *_: lowrank.as_matrix(a["w"]),
    "truncate, tree": lambda a, *_: lowrank.truncate(a, energy=0.7),
    "extract": lambda a, b, _: lowrank.extract(a, b, tail=0.7),
    "rank_for": lambda a, *_: lowrank.rank_for(abs(a["b"]), energy=0.7),
    "materialize": lambda a, b, _: lowrank.materialize(LowRank(a["w"], b["w"])),
    "product": lambda a, b, c: LowRank(a["w"], b["w"]) @ c["w"],
    "from_lora": lambda a, b, _: lowrank.from_lora(a["w"].T, b["w"], alpha=3.0),
    "to_lora": lambda a, b, _: lowrank.to_lora(LowRank(a["w"], b["w"]), alpha=3.0),
    "free_inputs": lambda a, *_: negative.free_inputs(a["w"], rtol=0.9),
    "damped_inputs": lambda a, *_: negative.damped_inputs(a["w"], damping=0.1),
    "exit_ball, outside": lambda a, b, c: negative.exit_ball([a, b], [0.5, 0.5], c, 1e-3),
    "gate, far": lambda a, b, _: negative.gate(a, b, a, 1e-3),
    "subspace": lambda a, b, _: cone.Subspace(geometry.orthonormalize([b])).project(a),
}


@pytest.mark.parametrize("name", CALLS)
def test_functions_beside_the_catalog_take_float64_as_float32(name):
    call, finer = CALLS[name], points(2.0**-40)
    got = call(*finer)
    wanted = call(*jax.tree.map(lambda x: jnp.asarray(x.astype(np.float32)), finer))
    if isinstance(wanted, str):
        assert got == wanted
        return
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert isinstance(x, jax.Array) == isinstance(y, jax.Array)
        if isinstance(y, jax.Array):
            assert_close(x, y, units=0)
        else:
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("kind", [np.float64, np.float32, jnp.asarray])
def test_bounds_are_those_of_float32(kind):
    unit = np.finfo(np.float32).eps
    # 64 roundings of the arithmetic, and two of what is stored.
    for off, fits in ((65, True), (70, False)):
        basis = [kind(x) for x in np.float32([[1, off * unit], [0, 1]])]
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="orthonormal"):
            cone.Subspace(basis).project(basis[0])
    # An edit that float32 does not hold.
    zero, one = kind(np.zeros(1, np.float32)), kind(np.ones(1, np.float32))
    with pytest.raises(ValueError, match=r"its dtype holds numbers up to 3\.4e\+38"):
        negative.exit_ball(
            [zero, zero], [1e-25, 1.0], one, 1e18, direction=one, costs=[1e-20, 1e35]
        )


def test_laws_hold_of_points_in_float64():
    mean, xs = (lambda *given: average.mean(list(given))), points(2.0**-40)
    testing.check_exact_ends(interpolate.lerp, *xs[:2])
    testing.check_half_precision(mean, *xs)
    testing.check_idempotent(mean, *xs)
    testing.check_permutation_invariant(average.mean, xs)
    testing.check_scale(mean, *xs)


def test_digits_that_float32_lacks_are_no_direction():
    (a, *_), (b, *_) = points(), points(2.0**-40)
    assert any((x != y).any() for x, y in zip(a.values(), b.values(), strict=True))
    assert geometry.distance(a, b) == 0
    with pytest.raises(ValueError, match="give a direction"):
        negative.exit_ball([a], [1.0], b, 1.0)
    assert lowrank.extract(a, b, energy=0.9).factors["w"].rank == 0


def test_what_moves_leaves_hands_them_on():
    a, *_ = points()
    weights, rest = tree.partition(a | {"step": 7})
    assert all(weights[name] is a[name] for name in a)
    assert tree.join(weights, rest)["w"] is a["w"]
    assert tree.upcast(a)["w"].dtype == tree.cast_like(a, a)["w"].dtype == jnp.float32


def test_no_file_is_rounded(tmp_path):
    a, b, _ = points(2.0**-40)
    single = jax.tree.map(lambda x: x.astype(np.float32), a)
    one, two = saved(tmp_path / "one.safetensors", single), tmp_path / "two.safetensors"
    checkpoint.save(two, b)
    refused = r"tensor '\w' of .*two\.safetensors is float64, which JAX would round.*enable_x64"
    with checkpoint.open(two) as opened:
        for name, x in b.items():
            assert opened[name].read().tobytes() == x.tobytes()
        for like in (None, b, single):
            with pytest.raises(ValueError, match=refused):
                checkpoint.load(two, like=like)
        for sources in ([opened, opened], [one, opened], [opened, one]):
            for lazy in (False, True):
                calls = []

                def mean(xs, calls=calls):
                    calls.append(xs)
                    return average.mean(xs)

                with (
                    pytest.raises(ValueError, match=refused),
                    checkpoint.create(tmp_path / "out", one) as writer,
                ):
                    checkpoint.stream(mean, sources, writer, lazy=lazy)
                assert not calls
    # What is not computed is copied.
    mixed = saved(tmp_path / "mixed.safetensors", {"w": b["w"], "b": single["b"]})
    with checkpoint.create(tmp_path / "out", mixed) as writer:
        checkpoint.stream(average.mean, [mixed, one], writer, carry=["w"])
    with checkpoint.open(tmp_path / "out") as copied:
        assert copied["w"].read().tobytes() == b["w"].tobytes()
    as_single = checkpoint.load(tmp_path / "one.safetensors", like=a)
    assert_close(as_single, jax.tree.map(jnp.asarray, single), units=0)
