"""Small leaves of rare shapes share programs, where they lie, and it does not show."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wspace import _pieces, interpolate, merge, tree
from wspace._lazy import Lazy, taken

pytestmark = pytest.mark.exact

SHAPES = [(65 + i,) if i % 2 else (9 + i, 17) for i in range(128)]
MIXED = ((3, 5), (0, 2), (), (41,), (2, 3, 4), (1, 1), (6, 1), (300,))
DEVICE = 3  # of eight


def drawn(shapes, seed=0, dtype=np.float32):
    random = np.random.default_rng(seed)
    return {f"{i}": np.asarray(random.normal(size=s), dtype) for i, s in enumerate(shapes)}


def in_memory(x):
    return jax.tree.map(jnp.asarray, x)


def lazily(x):
    return Lazy(x.shape, x.dtype, lambda span, _: jnp.asarray(taken(x, span)))


@contextlib.contextmanager
def grouping(on):
    """All leaves, or none, taken as small ones of rare shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_pieces, "_RARE", 10**9 if on else 0)
        patch.setattr(_pieces, "_SMALL", 10**9 if on else -1)
        yield


def same_bits(found, wanted):
    found, wanted = map(jax.tree.leaves, (found, wanted))
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


FUNCTIONS = {
    "lerp": (lambda x, y, _: interpolate.lerp(x, y, 0.3), 4),
    "ties": (lambda x, y, z: merge.ties(x, [y, z], density=0.4), 24),
    "ties of leaves": (lambda x, y, z: merge.ties(x, [y, z], density=0.4, scope="leaf"), 24),
    "dare": (lambda x, y, z: merge.dare(jax.random.key(3), x, [y, z]), 24),
    "slerp": (lambda x, y, _: interpolate.slerp(x, y, 0.3), 24),
}


@pytest.mark.parametrize("name", ["lerp", "ties", "slerp"])
def test_trees_of_many_shapes_take_few_programs(name, programs):
    points = [in_memory(drawn(SHAPES, seed)) for seed in range(3)]
    function, most = FUNCTIONS[name]
    jax.clear_caches()
    before = programs()
    function(*points)
    assert 0 < programs() - before <= most


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, np.float32) for name in FUNCTIONS), ("lerp", jnp.bfloat16)]
)
def test_bits_are_the_same_with_and_without_groups(name, dtype):
    points = [in_memory(drawn(MIXED, seed, dtype)) for seed in range(3)]
    results = []
    for on in (True, False):
        with grouping(on):
            results.append(FUNCTIONS[name][0](*points))
    same_bits(*results)


def test_which_leaves_share_a_program():
    small = [np.zeros(s, np.float32) for s in ((2,), (3,), (2,), (0,), ())]
    often = [np.zeros(7, np.float32)] * _pieces._RARE
    large = [np.zeros(_pieces._SMALL + 1, np.float32), np.zeros(_pieces._SMALL, np.float32)]
    leaves = [*small, *often, *large]
    groups = sorted(_pieces.groups([leaves]))
    together = [0, 1, 2, 3, 4, len(leaves) - 1]
    assert groups == sorted([together, *([i] for i in range(5, len(leaves) - 1))])
    # One short of often is rare.
    assert sorted(_pieces.groups([often[1:]])) == [list(range(len(often) - 1))]
    many = [np.zeros(i, np.float32) for i in range(2 * _pieces._TOGETHER + 1)]
    assert [len(group) for group in _pieces.groups([many])] == [128, 128, 1]
    assert sorted(i for group in _pieces.groups([many]) for i in group) == list(range(len(many)))


@pytest.mark.parametrize("function", [FUNCTIONS["lerp"][0], FUNCTIONS["ties"][0]])
def test_leaves_are_computed_on_their_device_and_stay_there(function):
    device = jax.devices()[DEVICE]
    points = [drawn(MIXED, seed) for seed in range(3)]
    wanted = function(*map(in_memory, points))
    found = function(*jax.device_put(points, device))
    assert all(x.committed and x.devices() == {device} for x in jax.tree.leaves(found))
    same_bits(found, wanted)


def test_programs_run_on_the_device_of_the_leaves(monkeypatch):
    device, moved = jax.devices()[DEVICE], []
    x, y = jax.device_put([drawn(MIXED, seed) for seed in range(2)], device)
    put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda *xs, **kw: moved.append(xs) or put(*xs, **kw))
    with jax.transfer_guard_device_to_device("disallow"):
        found = interpolate.lerp(x, y, np.float32(0.3))
        tree.norm(x)
    assert not moved
    assert all(leaf.devices() == {device} for leaf in found.values())


def test_leaves_on_different_devices_stay_apart():
    devices = jax.devices()
    x, y = (drawn(MIXED, seed) for seed in range(2))
    wanted = interpolate.lerp(in_memory(x), in_memory(y), 0.3)
    places = {key: devices[i % 3] for i, key in enumerate(x)}
    free = {"2", "5"}  # these are not committed to any
    x, y = (
        {k: leaf if k in free else jax.device_put(leaf, places[k]) for k, leaf in a.items()}
        for a in (x, y)
    )
    found = interpolate.lerp(x, y, 0.3)
    same_bits(found, wanted)
    for key, leaf in found.items():
        assert leaf.committed == (key not in free)
        assert key in free or leaf.devices() == {places[key]}
    # One of the trees alone says where the leaf is.
    half = interpolate.lerp(jax.tree.map(np.asarray, x), y, 0.3)
    assert all(key in free or half[key].devices() == {places[key]} for key in half)
    same_bits(half, wanted)


def test_numpy_leaves_are_taken_and_come_back_free():
    points = [drawn(MIXED, seed) for seed in range(3)]
    for name in ("lerp", "ties"):
        found, wanted = FUNCTIONS[name][0](*points), FUNCTIONS[name][0](*map(in_memory, points))
        same_bits(found, wanted)
        assert all(isinstance(x, jax.Array) and not x.committed for x in jax.tree.leaves(found))


def test_no_leaf_is_brought_to_the_host(monkeypatch):
    x, y = (in_memory(drawn(SHAPES, seed)) for seed in range(2))
    wanted = interpolate.lerp(x, y, 0.3)
    taken, asarray = [], np.asarray
    monkeypatch.setattr(np, "asarray", lambda a, *b, **c: taken.append(a) or asarray(a, *b, **c))
    with jax.transfer_guard_device_to_host("disallow"):
        found = interpolate.lerp(x, y, 0.3)
        length = tree.norm(x)
    monkeypatch.undo()
    assert not [a for a in taken if isinstance(a, jax.Array)]
    same_bits(found, wanted)
    exact = np.sqrt(sum((np.longdouble(leaf) ** 2).sum() for leaf in x.values()))
    np.testing.assert_allclose(length, np.float64(exact), rtol=1e-6)


def test_spread_leaves_have_programs_of_their_own():
    mesh = jax.make_mesh((2,), ("m",))
    sharding = jax.NamedSharding(mesh, jax.P("m"))
    spread = jax.device_put(jnp.arange(8.0), sharding)
    other = jax.device_put(jnp.arange(4.0), sharding)
    x = {"a": jnp.arange(3.0), "b": spread, "c": jnp.arange(4.0), "d": other}
    assert sorted(_pieces.groups([list(x.values())])) == [[0, 2], [1], [3]]
    found = tree.combine((2.0,), (x,))
    assert found["b"].sharding.is_equivalent_to(sharding, 1)
    assert not found["a"].committed
    for key, leaf in x.items():
        np.testing.assert_array_equal(found[key], 2 * np.arange(leaf.size))


def test_traced_leaves_and_transformations_see_no_groups():
    x, y = (in_memory(drawn(MIXED, seed)) for seed in range(2))
    wanted = interpolate.lerp(x, y, 0.5)
    same_bits(jax.jit(lambda x, y: interpolate.lerp(x, y, 0.5))(x, y), wanted)
    same_bits(jax.jit(lambda x: interpolate.lerp(x, y, 0.5))(x), wanted)  # a constant beside it
    mapped = jax.vmap(lambda t: interpolate.lerp(x, y, t))(jnp.array([0.0, 1.0]))
    same_bits([jax.tree.map(lambda a, i=i: a[i], mapped) for i in (0, 1)], [x, y])
    slope = jax.jacfwd(lambda t: interpolate.lerp(x, y, t))(0.5)
    for key in x:
        np.testing.assert_allclose(slope[key], np.asarray(y[key]) - x[key], rtol=1e-6)


@pytest.mark.parametrize("first", ["lazy", "memory"])
def test_lazy_leaves_beside_others_in_one_tree(first):
    x = drawn(((3,), (4,), (2, 3)))
    kinds = {"lazy": lazily, "memory": jnp.asarray}
    other = next(kind for kind in kinds if kind != first)
    mixed = {"0": kinds[first](x["0"]), "1": kinds[other](x["1"]), "2": kinds[first](x["2"])}
    found = tree.combine((2.0,), (mixed,))
    for key, leaf in found.items():
        assert isinstance(leaf, Lazy) == isinstance(mixed[key], Lazy)
        np.testing.assert_array_equal(leaf.read() if isinstance(leaf, Lazy) else leaf, 2 * x[key])
    exact = np.sqrt(sum((np.longdouble(leaf) ** 2).sum() for leaf in x.values()))
    np.testing.assert_allclose(tree.norm(mixed), np.float64(exact), rtol=1e-6)
