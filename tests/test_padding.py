"""Trees of many shapes: the results of few shapes, from few programs."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wspace import _lazy, _padding, average, geometry, interpolate, merge, perturb, selection, tree
from wspace.testing import assert_close, vector

KEY = jax.random.key(3)
SHAPES = ((3, 5), (0, 2), (), (41,), (2, 3, 4), (1, 1), (6, 1), (300,))


@contextlib.contextmanager
def padding(on):
    """All trees, or none, taken as of many shapes; lengths that leave little or much behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_padding, "MANY", -1 if on else 10**9)
        patch.setattr(_padding, "LEAST", 2)
        yield


def drawn(seed, dtype=np.float32, kind="normal"):
    random = np.random.default_rng(seed)
    result = {}
    for i, shape in enumerate(SHAPES):
        x = random.normal(size=shape)
        if kind == "few":
            x = np.where(random.uniform(size=shape) < 0.7, 0, np.round(2 * x))
        if kind == "nan":
            x = np.where(random.uniform(size=shape) < 0.2, np.nan, x)
        result[f"{i}"] = jnp.asarray(x, dtype)
    return result


def masks(base, tuned):
    edits = [merge.task_vector(base, x) for x in tuned]
    total = tree.combine([1.0] * len(edits), edits)
    return merge.consensus_mask([merge.tall_mask(x, total) for x in edits])


# Of these an entry of the result is made of entries of the points alone, and of exact counts.
EXACT = {
    "mean": lambda *points: average.mean(points, [0.5, 0.75, -2.0]),
    "lerp": lambda base, *tuned: interpolate.lerp(base, tuned[0], -0.5),
    "fisher": lambda *points: average.fisher_mean(
        points, [jax.tree.map(jnp.abs, x) for x in points]
    ),
    "task arithmetic": lambda base, *tuned: merge.task_arithmetic(base, tuned, [1.0, -0.5]),
    "ties": lambda base, *tuned: merge.ties(base, tuned, density=0.4),
    "ties of leaves": lambda base, *tuned: merge.ties(
        base, tuned, density=0.4, preset="mergekit-0.1.5"
    ),
    "ties of rows": lambda base, *tuned: merge.ties(base, tuned, density=0.4, scope="row"),
    "breadcrumbs": lambda base, *tuned: merge.breadcrumbs(base, tuned, density=0.5, outliers=0.2),
    "dare": lambda base, *tuned: merge.dare(KEY, base, tuned),
    "dare by another generator": lambda base, *tuned: merge.dare(
        jax.random.key(3, impl="rbg"), base, tuned
    ),
    "dare by an old key": lambda base, *tuned: merge.dare(jax.random.PRNGKey(3), base, tuned),
    "della": lambda base, *tuned: merge.della(KEY, base, tuned, width=0.3),
    "della of leaves": lambda base, *tuned: merge.della(KEY, base, tuned, width=0.3, scope="leaf"),
    "majority": lambda base, *tuned: merge.ties(base, tuned, density=0.4, zero="majority"),
    "ram": lambda base, *tuned: merge.ram(base, tuned, boost=0.1),
    "pcb": lambda base, *tuned: merge.pcb(base, tuned, density=0.5),
    "magmax": lambda base, *tuned: merge.magmax(base, tuned),
    "masks": lambda base, *tuned: masks(base, tuned),
    "filters": lambda base, *tuned: perturb.filter_normalize(tuned[0], base),
    "cast": lambda base, *_: tree.cast_like(tree.upcast(base), base),
    "largest": lambda base, *_: selection.kth_magnitude(base, 7),
}
# In these there are sums, which padding associates in another order.
ROUNDED = {
    "slerp": lambda base, *tuned: interpolate.slerp(base, tuned[0], 0.3),
    "slerp of leaves": lambda base, *tuned: tree.per_leaf(interpolate.slerp)(base, tuned[0], 0.3),
    "slerp beyond a right angle": lambda base, *tuned: interpolate.slerp(
        base, jax.tree.map(jnp.negative, tuned[0]), 0.3
    ),
    "angle": lambda base, *tuned: geometry.angle(base, tuned[0]),
    "karcher": lambda base, *tuned: average.karcher_mean((base, *tuned)).weights,
    "karcher of leaves": lambda base, *tuned: (
        tree.per_leaf(average.karcher_mean)((base, *tuned)).weights
    ),
    "median": lambda base, *tuned: average.geometric_median((base, *tuned)).weights,
    "stock": lambda base, *tuned: average.model_stock(base, tuned),
    "stock of leaves": lambda base, *tuned: average.model_stock(base, tuned, scope="leaf"),
    "stock of rows": lambda base, *tuned: average.model_stock(base, tuned, scope="row"),
    "dare, norm kept": lambda base, *tuned: merge.dare(KEY, base, tuned, preset="mergekit-0.1.5"),
    "della, norm kept": lambda base, *tuned: merge.della(KEY, base, tuned, rescale="norm"),
    "sce": lambda base, *tuned: merge.sce(base, tuned, density=0.5),
    "ext_sub": lambda base, *tuned: merge.ext_sub(base, *tuned),
    "emr": lambda base, *tuned: merge.emr_model(base, merge.emr(base, tuned), 1),
    "report": lambda base, *tuned: jnp.asarray(
        merge.report(base, tuned, merge.magmax(base, tuned)).total.norms
    ),
}


def related(dtype):
    """A base and two models that are not far from it."""
    base, *others = (drawn(seed) for seed in range(3))
    moved = [jax.tree.map(lambda x, y: x + y / 4, base, other) for other in others]
    return [jax.tree.map(lambda x: x.astype(dtype), x) for x in (base, *moved)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, jnp.float32) for name in (*EXACT, *ROUNDED)),
        *(
            (name, jnp.bfloat16)
            for name in ("mean", "cast", "ties of leaves", "della", "slerp of leaves")
        ),
    ],
)
def test_padding_does_not_show(name, dtype):
    points = related(dtype)
    results = []
    for on in (False, True):
        with padding(on):
            results.append((EXACT | ROUNDED)[name](*points))
    plain, padded = results
    if name in EXACT:
        assert jax.tree.map(jax.typeof, padded) == jax.tree.map(jax.typeof, plain)
        np.testing.assert_array_equal(vector(padded), vector(plain))
    else:
        assert_close(padded, plain, units=64)


@pytest.mark.parametrize("kind", ["normal", "few", "nan"])
@pytest.mark.parametrize(
    ("on", "few", "piece"),
    [(True, 2**14, 2**20), (True, 16, 2**20), (False, 45, 16), (False, 0, 1)],
)
def test_selection_is_that_of_a_stable_sort(kind, on, few, piece, monkeypatch):
    monkeypatch.setattr(selection, "FEW", few)  # up to which neighbours are counted as one leaf
    monkeypatch.setattr(_lazy, "PIECE", piece)
    for seed in range(3):
        x = drawn(seed, kind=kind)
        flat = np.abs(np.concatenate([np.asarray(leaf).reshape(-1) for leaf in x.values()]))
        order = np.argsort(-np.where(np.isnan(flat), np.inf, flat), kind="stable")
        for k in (0, 1, 2, 17, 40, 63, len(flat) - 1, len(flat)):
            with padding(on):
                mask = selection.top_mask(x, k)
            found = np.concatenate([np.asarray(m).reshape(-1) for m in mask.values()])
            wanted = np.zeros(len(flat), bool)
            wanted[order[:k]] = True
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("few", [16, 2**14])
def test_selection_in_leaves_counts_no_padding(few, monkeypatch):
    monkeypatch.setattr(selection, "FEW", few)  # beyond which leaves are not sorted, but counted
    for seed in range(3):
        for leaf in drawn(seed, kind="few").values():
            flat = np.abs(np.asarray(leaf).reshape(-1))
            for k in {0, min(1, flat.size), flat.size // 2, flat.size}:
                with padding(True):
                    mask = np.asarray(selection.top_mask(leaf, k)).reshape(-1)
                wanted = np.zeros(flat.size, bool)
                wanted[np.argsort(-flat, kind="stable")[:k]] = True
                np.testing.assert_array_equal(mask, wanted)


@pytest.fixture
def compiled():
    """The number of programs compiled so far."""
    count = [0]

    def listen(event, *_, **__):
        count[0] += event == "/jax/core/compile/jaxpr_to_mlir_module_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: count[0]
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    "name",
    ["mean", "ties", "ties of leaves", "ties of rows", "dare", "della", "slerp of leaves",
     "karcher of leaves", "stock of leaves", "sce", "ext_sub", "masks", "emr", "report"],
)  # fmt: skip
def test_many_shapes_take_few_programs(name, compiled):
    random = np.random.default_rng(0)
    shapes = [(65 + i,) if i % 2 else (9 + i, 17) for i in range(2 * _padding.MANY)]
    base, *tuned = (
        {
            f"{i}": jax.device_put(random.normal(size=s).astype(np.float32))
            for i, s in enumerate(shapes)
        }
        for _ in range(3)
    )
    jax.clear_caches()
    before = compiled()
    (EXACT | ROUNDED)[name](base, *tuned)
    assert 0 < compiled() - before < len(shapes)


def test_known_arrays_in_a_traced_program_and_traced_ones_are_not_taken_to_the_host():
    base, *tuned = related(jnp.float32)
    wanted = average.mean((base, *tuned))
    with padding(True):
        inside = jax.jit(lambda: average.mean((base, *tuned)))()
        traced = jax.jit(lambda *points: average.mean(points))(base, *tuned)
        mapped = jax.vmap(lambda t: interpolate.lerp(base, tuned[0], t))(jnp.array([0.0, 1.0]))
        slope = jax.jacfwd(lambda t: interpolate.lerp(base, tuned[0], t))(0.5)
    assert_close(inside, wanted)
    assert_close(traced, wanted)
    assert_close(jax.tree.map(lambda x: x[1], mapped), tuned[0])
    assert_close(slope, tree.combine((1.0, -1.0), (tuned[0], base)))


def test_results_are_where_the_points_are():
    device = jax.devices()[3]
    base, *tuned = jax.device_put(related(jnp.float32), device)
    with padding(True):
        moved = merge.ties(base, tuned)
        free = merge.ties(*map(functools.partial(jax.tree.map, np.asarray), (base, tuned)))
    assert all(leaf.committed and leaf.devices() == {device} for leaf in jax.tree.leaves(moved))
    assert not any(leaf.committed for leaf in jax.tree.leaves(free))


def test_leaves_too_large_or_sharded_have_programs_of_their_own(monkeypatch):
    monkeypatch.setattr(_padding, "LARGEST", 8)
    calls = []
    padded = _padding._padded
    monkeypatch.setattr(
        _padding, "_padded", lambda x, *args: calls.append(x.size) or padded(x, *args)
    )
    x = {
        "large": jnp.ones(9),
        "small": jnp.ones(8),
        "empty": jnp.ones((0, 2)),
        "number": jnp.ones(()),
    }
    mesh = jax.make_mesh((2,), ("m",))
    spread = jax.device_put(jnp.ones(8), jax.NamedSharding(mesh, jax.P("m")))
    with padding(True):
        tree.combine((2.0,), (x,))
        result = tree.combine((2.0,), (spread,))
    assert calls == [8]
    assert result.sharding.is_equivalent_to(spread.sharding, 1)
