"""Laws of the guards of all averages: guard_hull, guard_normal, the nearest average.

Numbers such as (ii L9) are those of the laws in the docs page on the negative weight.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.helpers import is_nan
from tests.strategies import FLOAT, UNIT, costs, projectors
from wspace import average, geometry, negative, tree
from wspace.negative.nearest import nearest_average, path_of, rounding_of
from wspace.negative.normal import _descend
from wspace.testing import assert_close, points, size, vector, weights

LAYOUT = {"w": (4, 3), "b": (3,), "s": (2, 3, 2)}
MODES = ["convex", "affine"]


@functools.partial(jax.jit, static_argnames="mode")
def nearest(xs, center, mode):
    rounding = rounding_of([tree.norm(x) for x in (*xs, center)])
    return nearest_average(xs, center, mode, rounding)


guard_hull = jax.jit(negative.guard_hull, static_argnames="mode")
guard_normal = jax.jit(negative.guard_normal, static_argnames=("mode", "steps"))


def flat(x):
    return vector(x).astype(np.float64)


def rows(xs):
    return np.stack([flat(x) for x in xs])


def largest(*trees):
    return max(size(x) for x in trees)


def mixtures(rng, count, mode, draws=2000):
    """Coefficients that sum to one: at least zero, or between -3 and 4."""
    if mode == "convex":
        return np.concatenate([np.eye(count), rng.dirichlet(0.3 * np.ones(count), size=draws)])
    t = rng.uniform(-3, 4, size=(draws, count))
    t[:, -1] = 1 - t[:, :-1].sum(axis=1)
    return t[(t[:, -1] >= -3) & (t[:, -1] <= 4)]


def closest(xs, avoid, t):
    """The least distance of averages, and the scale on which each is known."""
    away = np.linalg.norm(t @ rows(xs) - flat(avoid), axis=1)
    return away, np.abs(t).sum(axis=1) * largest(*xs, avoid)


def assert_guarded(moved, avoid, radius, mode, seed=0):
    away, scale = closest(moved, avoid, mixtures(np.random.default_rng(seed), len(moved), mode))
    assert (away >= radius - 64 * UNIT * scale).all()


@st.composite
def guards(draw, count=None, layout=LAYOUT):
    """Points, a point to avoid, a radius and a normal."""
    xs = draw(points(count=count, layout=layout))
    shapes = jax.tree.map(lambda leaf: leaf.shape, xs[0])
    avoid, normal = draw(weights(shapes)), draw(weights(shapes))
    assume(size(normal) > 0.1)
    scale = max(largest(*xs, avoid), 0.1)
    return xs, avoid, draw(st.sampled_from([0.1, 1.0, 10.0])) * scale, normal, draw(costs(len(xs)))


@st.composite
def allowances(draw, count):
    trees = []
    for _ in range(count):
        metric = draw(projectors(4)) + draw(st.sampled_from([0.0, 0.25])) * jnp.eye(4, dtype=FLOAT)
        allow = {"w": metric, "b": draw(st.sampled_from([1.0, 0.0])), "s": 1.0}
        trees.append(draw(st.sampled_from([allow, allow, None])))
    return trees


def dense(entries, x):
    """What an allowance is on the vector of all entries."""
    if entries is None:
        return np.eye(flat(x).size)
    blocks = []
    for name in sorted(x):
        p = np.asarray(entries[name], np.float64)
        if p.ndim:
            blocks.append(np.kron(p, np.eye(x[name].shape[-1])))
        else:
            blocks.append(p * np.eye(x[name].size))
    return scipy.linalg.block_diag(*blocks)


# The nearest average


@given(
    seed=st.integers(0, 2**16), count=st.integers(1, 4), spread=st.sampled_from([1.0, 1e-2, 1e-4])
)
def test_the_nearest_average_is_nearest(seed, count, spread):
    rng = np.random.default_rng(seed)
    common, apart = rng.normal(size=6), rng.normal(size=(count, 6))
    if count > 2:
        apart[-1] = [apart[0], apart[:2].mean(axis=0), apart[-1]][seed % 3]
    shift = [common, common + spread * rng.normal(size=6), rng.normal(size=6)][seed % 5 % 3]
    xs = [jnp.asarray(x, FLOAT) for x in common + spread * apart]
    center = jnp.asarray(shift, FLOAT)
    gaps = rows(xs) - flat(center)
    # The nearest point of a hull, as non-negative least squares: Lawson and Hanson, chapter 23.
    unit = np.abs(gaps).max()
    z, _ = scipy.optimize.nnls(np.vstack([gaps.T / unit, np.ones(count)]), [*np.zeros(6), 1.0])
    wanted = np.linalg.norm(z / z.sum() @ gaps)
    found = nearest(xs, center, mode="convex")
    error = 64 * UNIT * largest(*xs, center)
    assert abs(found.distance - wanted) <= error
    assert found.bound <= wanted + error
    assert found.distance - found.bound <= error
    if found.distance > error:
        n = flat(found.normal)
        assert abs(np.linalg.norm(n) - 1) <= 64 * UNIT
        assert (gaps @ n >= wanted - error).all()
    edges = gaps[1:] - gaps[0]
    values = np.linalg.svd(edges, compute_uv=False) if count > 1 else np.zeros(0)
    assume(not ((values > 1e-9 * unit) & (values < 1e3 * error)).any())
    foot = gaps[0] - np.linalg.pinv(edges, rcond=1e-5) @ edges @ gaps[0] if count > 1 else gaps[0]
    line = nearest(xs, center, mode="affine")
    slack = error * (1 + unit / min(values[values > 1e3 * error], default=unit))
    assert abs(line.distance - np.linalg.norm(foot)) <= slack
    assert line.distance <= found.distance + slack


def test_equal_points_have_one_average():  # A = C
    x, avoid = jnp.asarray([3.0, 4.0], FLOAT), jnp.zeros(2, FLOAT)
    for mode in MODES:
        found = nearest([x, x, x], avoid, mode=mode)
        assert_close(found.distance, jnp.asarray(5.0, FLOAT))
        moved = guard_hull([x, x, x], avoid, 10.0, mode=mode)
        assert_close(moved, [2 * x] * 3)


def test_a_point_that_is_hardly_nearer_is_found_too():
    xs = [jnp.asarray([0.1, 1.0], FLOAT), jnp.asarray([-0.1, 1.0], FLOAT)]
    found = nearest(xs, jnp.zeros(2, FLOAT), mode="convex")
    for distance in (found.distance, found.bound):
        assert_close(distance, jnp.asarray(1.0, FLOAT), units=32)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("far", [1.0, np.inf])
def test_a_path_goes_to_the_nearest_point_left(count, far):
    rng = np.random.default_rng(count)
    draws = np.float32(rng.normal(size=(count, 4)))
    draws[-1] *= far
    center = jnp.asarray(rng.normal(size=4), jnp.float32)
    xs = [jnp.asarray(x) for x in draws]
    order, at, left = [], flat(center), list(range(count))
    while left:
        gaps = [np.linalg.norm(flat(xs[i]) - at) for i in left]
        order.append(left.pop(int(np.argmin(gaps))))
        at = flat(xs[order[-1]])
    for path in (path_of(xs, center), jax.jit(path_of)(xs, center)):
        assert path.order.tolist() == order
        np.testing.assert_array_equal(path.points, draws[order])
        steps = np.diff(np.stack([flat(center), *map(flat, path.points)]), axis=0)
        np.testing.assert_allclose(path.spans, np.linalg.norm(steps, axis=1), rtol=1e-6)


def test_what_is_nearer_by_more_than_rounding_is_told():
    zero = jnp.zeros(2, FLOAT)
    # The second point is behind the first one's normal by 300 roundings.
    xs = [jnp.asarray([1.0, 0.0], FLOAT), jnp.asarray([1 - 300 * UNIT, 1.0], FLOAT)]
    assert nearest(xs, zero, mode="convex").bound >= 1 - 100 * UNIT
    # The third is off the line of the others by as much.
    xs = [jnp.asarray(x, FLOAT) for x in ([-1.0, 0.0], [1.0, 0.0], [0.0, 200 * UNIT])]
    for height, wanted in ((1000, 800), (-1000, 1000)):
        center = jnp.asarray([0.0, height * UNIT], FLOAT)
        found = nearest(xs, center, mode="convex")
        np.testing.assert_allclose(found.distance, wanted * UNIT, rtol=0.01)


# guard_hull


@pytest.mark.parametrize("mode", MODES)
@given(guard=guards(), given_normal=st.booleans())
def test_no_average_comes_nearer_than_the_radius(mode, guard, given_normal):  # (ii L9, L10)
    xs, avoid, radius, normal, k = guard
    if not given_normal:
        assume(nearest(xs, avoid, mode=mode).distance > 0)
        normal = None
    moved = guard_hull(xs, avoid, radius, normal=normal, mode=mode, costs=k)
    assert_guarded(moved, avoid, radius, mode)
    if normal is None:
        return
    n = flat(normal) / np.linalg.norm(flat(normal))
    error = 64 * UNIT * largest(*moved, *xs, avoid)
    heights = (rows(xs) - flat(avoid)) @ n
    if mode == "convex":
        wanted = np.maximum(heights, radius)
    else:
        wanted = np.full(len(xs), max(radius, np.average(heights, weights=k)))
    np.testing.assert_allclose((rows(moved) - flat(avoid)) @ n, wanted, atol=error)
    np.testing.assert_allclose(rows(moved) - rows(xs), (wanted - heights)[:, None] * n, atol=error)
    again = guard_hull(moved, avoid, radius, normal=normal, mode=mode, costs=k)
    assert_close(again, moved, units=64, scale=largest(*moved, avoid))


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=8)
@given(data=st.data(), guard=guards(count=2))
def test_with_allow_all_averages_are_guarded_and_no_point_moves_where_it_may_not(mode, data, guard):
    xs, avoid, radius, normal, k = guard  # (ii L9, L10, section 10)
    allow = data.draw(allowances(2))
    maps = [dense(p, x) for p, x in zip(allow, xs, strict=True)]
    n = flat(normal) / np.linalg.norm(flat(normal))
    reaches = np.array([n @ p @ n for p in maps])
    assume((reaches > 1e-3).all())
    moved = negative.guard_hull(xs, avoid, radius, normal=normal, mode=mode, costs=k, allow=allow)
    assert_guarded(moved, avoid, radius, mode)
    heights = (rows(xs) - flat(avoid)) @ n
    if mode == "convex":
        needs = np.maximum(radius - heights, 0)
    else:
        needs = max(radius, np.average(heights, weights=np.array(k) / reaches)) - heights
    error = 64 * UNIT * largest(*moved, *xs, avoid)
    for x, y, p, need, reach in zip(xs, moved, maps, needs, reaches, strict=True):
        edit = flat(y) - flat(x)
        np.testing.assert_allclose(edit, need / reach * p @ n, atol=error / reach)
        outside = edit - p @ np.linalg.pinv(p, rcond=1e-6, hermitian=True) @ edit
        assert np.linalg.norm(outside) <= 64 * UNIT * (size(x) + np.linalg.norm(edit))
    # The cost in the metric whose inverse is allowed is c_i need^2 / <n, P n>.
    cost = sum(
        w * (d := flat(y) - flat(x)) @ np.linalg.pinv(p, rcond=1e-6, hermitian=True) @ d
        for w, x, y, p in zip(k, xs, moved, maps, strict=True)
    )
    formula = np.sum(np.array(k) * needs**2 / reaches)
    assert abs(np.sqrt(cost) - np.sqrt(formula)) <= 1e2 * error * np.sqrt(sum(k) / min(reaches))


@pytest.mark.parametrize("mode", MODES)
def test_no_other_guard_of_the_half_space_costs_less(mode):
    rng = np.random.default_rng(0)
    xs, avoid, normal = rng.normal(size=(3, 6)), rng.normal(size=6), rng.normal(size=6)
    k, radius = np.array([1.0, 3.0, 0.25]), 2.0
    trees = [jnp.asarray(x, FLOAT) for x in xs]
    moved = guard_hull(
        trees, jnp.asarray(avoid, FLOAT), radius, normal=jnp.asarray(normal, FLOAT), mode=mode,
        costs=tuple(k),
    )  # fmt: skip
    n = normal / np.linalg.norm(normal)
    cost = np.sum(k[:, None] * (rows(moved) - xs) ** 2)

    def spent(z):
        return np.sum(k[:, None] * (z.reshape(3, 6) - xs) ** 2)

    def height(z):
        return (z.reshape(3, 6) - avoid) @ n

    if mode == "convex":
        limits = [{"type": "ineq", "fun": lambda z: height(z) - radius}]
    else:
        limits = [
            {"type": "ineq", "fun": lambda z: height(z)[:1] - radius},
            {"type": "eq", "fun": lambda z: np.diff(height(z))},
        ]
    best = scipy.optimize.minimize(spent, xs.ravel(), constraints=limits, method="SLSQP")
    assert best.success
    assert abs(cost - best.fun) <= 1e-4 * best.fun


@given(guard=guards(count=3))
def test_the_convex_guard_brings_no_points_apart_and_leaves_the_high_ones(guard):  # (ii L9)
    xs, avoid, radius, normal, _ = guard
    moved = guard_hull(xs, avoid, radius, normal=normal)
    error = 64 * UNIT * largest(*moved, *xs, avoid)
    for i in range(3):
        for j in range(i):
            before, after = (np.linalg.norm(flat(y[i]) - flat(y[j])) for y in (xs, moved))
            assert after <= before + error
    n = flat(normal) / np.linalg.norm(flat(normal))
    for x, y in zip(xs, moved, strict=True):
        if (flat(x) - flat(avoid)) @ n > radius + error:
            assert_close(y, x, units=0)


@given(guard=guards(count=2), s=st.sampled_from([2.0**-10, 8.0, -1.0]))
def test_a_guard_scales_and_shifts_with_its_points(guard, s):
    xs, avoid, radius, normal, k = guard
    scaled = functools.partial(jax.tree.map, lambda x: s * x)
    wanted = scaled(guard_hull(xs, avoid, radius, normal=normal, mode="affine", costs=k))
    got = guard_hull(
        scaled(xs), scaled(avoid), abs(s) * radius, normal=scaled(normal), mode="affine", costs=k
    )
    scale = largest(*wanted, scaled(avoid), *scaled(xs))
    assert_close(got, wanted, units=64, scale=scale)
    swapped = guard_hull(xs[::-1], avoid, radius, normal=normal, mode="affine", costs=k[::-1])
    assert_close(scaled(swapped[::-1]), wanted, units=64, scale=scale)


@pytest.mark.parametrize("mode", MODES)
def test_one_weighting_is_not_all_of_them(mode):
    # Negative test (F4): leaving a ball at equal coefficients leaves other averages within it.
    a, c = jnp.asarray([1.0, 3.0], FLOAT), jnp.asarray([1.0, -3.0], FLOAT)
    avoid = jnp.asarray([0.0, 1.5], FLOAT)
    moved = negative.exit_ball([a, c], (0.5, 0.5), avoid, 3.0)
    t = mixtures(np.random.default_rng(0), 2, mode)
    away, _ = closest(moved, avoid, t)
    assert away.min() < 2.0
    assert_guarded(negative.guard_hull([a, c], avoid, 3.0, mode=mode), avoid, 3.0, mode)


def test_a_convex_guard_does_not_hold_for_negative_coefficients():
    a, c = jnp.asarray([1.0, 0.0], FLOAT), jnp.asarray([5.0, 1.0], FLOAT)
    avoid = jnp.zeros(2, FLOAT)
    moved = negative.guard_hull([a, c], avoid, 2.0)
    assert_guarded(moved, avoid, 2.0, "convex")
    away, _ = closest(moved, avoid, mixtures(np.random.default_rng(0), 2, "affine"))
    assert away.min() < 1.0
    assert_guarded(negative.guard_hull([a, c], avoid, 2.0, mode="affine"), avoid, 2.0, "affine")


def test_avoid_inside_the_hull_needs_a_normal(refuses):
    a, c = jnp.asarray([1.0, 0.0], FLOAT), jnp.asarray([-3.0, 0.0], FLOAT)
    inside, beyond = jnp.zeros(2, FLOAT), jnp.asarray([2.0, 0.0], FLOAT)
    for avoid, modes in ((inside, MODES), (beyond, MODES[1:])):
        for mode in modes:
            words = "convex hull" if mode == "convex" else "affine span"
            with pytest.raises(ValueError, match=f"avoid lies in the {words}.*give normal"):
                negative.guard_hull([a, c], avoid, 5.0, mode=mode)
            assert is_nan(guard_hull([a, c], avoid, 5.0, mode=mode))
            with pytest.raises(ValueError, match=f"avoid lies in the {words}.*give start"):
                negative.guard_normal([a, c], avoid, 5.0, mode=mode)
            up = jnp.asarray([0.0, 2.0], FLOAT)
            moved = negative.guard_hull([a, c], avoid, 5.0, mode=mode, normal=up)
            assert_close(moved, [a + 2.5 * up, c + 2.5 * up])
    with refuses(ValueError, match="normal is zero"):
        negative.guard_hull([a, c], inside, 5.0, normal=inside)
    assert is_nan(jax.jit(lambda n: negative.guard_hull([a, c], inside, 5.0, normal=n))(inside))


def test_a_normal_that_allow_annihilates_is_refused_by_point_and_leaf():
    x = {"w": jnp.eye(2, dtype=FLOAT), "b": jnp.ones(2, FLOAT)}
    zero = jax.tree.map(jnp.zeros_like, x)
    normal = {"w": jnp.asarray([[9.0, 0.0], [0.0, 0.0]], FLOAT), "b": jnp.ones(2, FLOAT)}
    frozen = {"w": jnp.diag(jnp.asarray([0.0, 1.0], FLOAT)), "b": 0.0}
    high = jax.tree.map(lambda y: 100 * y, x)
    words = r"points\[1\] would have to rise by .* along normal, but allow\[1\].*leaf \['w'\]"
    for mode in MODES:
        guard = functools.partial(negative.guard_hull, mode=mode, normal=normal)
        with pytest.raises(ValueError, match=words):
            guard([x, x], zero, 9.0, allow=[None, frozen])
        traced = jax.jit(lambda n, mode=mode: negative.guard_hull(
            [x, x], zero, 9.0, allow=[None, frozen], normal=n, mode=mode))  # fmt: skip
        assert is_nan(traced(normal)[1])
    moved = negative.guard_hull([x, high], zero, 9.0, normal=normal, allow=[None, frozen])
    assert_close(moved[1], high, units=0)  # high enough already: nothing is asked of it
    with pytest.raises(ValueError, match="allow leaves nothing of start"):
        negative.guard_normal([x, x], zero, 9.0, start=normal, allow=[None, frozen])


@pytest.mark.parametrize("high", [0.0, 9.0])
@pytest.mark.parametrize("mode", MODES)
def test_metrics_and_numbers_decide_the_common_height_and_the_cost(mode, high):  # (ii L10)
    rng = np.random.default_rng(0)
    trees = [{"w": rng.normal(size=(4, 3)), "b": rng.normal(size=3)} for _ in range(4)]
    normal, avoid, *xs = [jax.tree.map(lambda y: jnp.asarray(y, FLOAT), x) for x in trees]
    xs = [tree.combine((1, high / size(normal)), (x, normal)) for x in xs]
    metric = rng.normal(size=(4, 4))
    metric = 0.05 * metric @ metric.T
    allow = [{"w": jnp.asarray(metric, FLOAT), "b": 0.25}, {"w": 3.0, "b": 4}]
    k, maps = np.array([1.0, 3.0]), [dense(p, x) for p, x in zip(allow, xs, strict=True)]
    n = flat(normal) / np.linalg.norm(flat(normal))
    reaches = np.array([n @ p @ n for p in maps])
    heights = (rows(xs) - flat(avoid)) @ n
    middle = np.average(heights, weights=k / reaches)
    assert (middle > 2) == bool(high)
    assert abs(middle - np.average(heights, weights=k)) > 0.01
    common = max(middle, 2.0) if mode == "affine" else np.maximum(heights, 2.0)
    moved = negative.guard_hull(
        xs, avoid, 2.0, normal=normal, mode=mode, costs=tuple(k), allow=allow
    )
    error = 64 * UNIT * largest(*moved, *xs, avoid)
    needs = common - heights
    for x, y, p, need, reach in zip(xs, moved, maps, needs, reaches, strict=True):
        atol = error * np.linalg.norm(p, 2) / reach
        np.testing.assert_allclose(flat(y) - flat(x), need / reach * p @ n, atol=atol)
    # The residual of no steps is that of the start, by finite differences of the cost.
    options = {"mode": mode, "costs": tuple(k), "allow": allow, "start": normal, "steps": 0}
    found = negative.guard_normal(xs, avoid, 2.0, **options)

    def cost(z):
        z = z / np.linalg.norm(z)
        h, r = (rows(xs) - flat(avoid)) @ z, np.array([z @ p @ z for p in maps])
        top = max(2.0, np.average(h, weights=k / r)) if mode == "affine" else np.maximum(h, 2.0)
        return np.sum(k * (top - h) ** 2 / r)

    steps = 1e-5 * np.eye(n.size)
    slope, value = np.array([(cost(n + d) - cost(n - d)) / 2e-5 for d in steps]), cost(n)
    # Costs count beside what moves at all: over the power of two nearest to the largest eigenvalue.
    k = k / 2 ** np.round(np.log2([np.linalg.norm(p, 2) for p in maps]))
    wanted = np.linalg.norm(slope) / (2 * 2.0 * np.sqrt(value * k.sum())) if value else 0
    np.testing.assert_allclose(found.residual, wanted, rtol=1e-3)


@pytest.mark.parametrize("scale", [2.0**-20, 1.0, 2.0**20])
def test_a_normal_is_blocked_below_the_sine_of_rounding_whatever_the_metric(scale):
    x, zero = jnp.asarray([[1.0], [0.0]], FLOAT), jnp.zeros((2, 1), FLOAT)
    for sine, works in ((256 * UNIT, True), (16 * UNIT, False)):
        normal = jnp.asarray([[sine], [1.0]], FLOAT)
        allow = [scale * jnp.diag(jnp.asarray([1.0, 0.0], FLOAT))]
        if works:
            (y,) = negative.guard_hull([x], zero, 2.0, normal=normal, allow=allow)
            np.testing.assert_allclose(y, [[2 / sine], [0.0]], rtol=1e-4)
        else:
            with pytest.raises(ValueError, match=r"points\[0\] would have to rise"):
                negative.guard_hull([x], zero, 2.0, normal=normal, allow=allow)
        # Only an affine guard asks what allow leaves of a normal on which a point is high enough.
        high = jnp.asarray([[0.0], [4.0]], FLOAT)
        (y,) = negative.guard_hull([high], zero, 2.0, normal=normal, allow=allow)
        assert_close(y, high, units=0)
        affine = functools.partial(negative.guard_hull, normal=normal, allow=allow, mode="affine")
        if works:
            assert_close(affine([high], zero, 2.0), [high])
        else:
            with pytest.raises(ValueError, match=r"points\[0\] would have to rise"):
                affine([high], zero, 2.0)


def test_the_rounding_of_the_longest_point_and_of_the_center_is_the_least_radius():
    far, one = jnp.asarray([1 / UNIT, 0.0], FLOAT), jnp.asarray([0.0, 1.0], FLOAT)
    for xs, avoid in (([one, far], 2 * one), ([one, 2 * one], far)):
        with pytest.raises(ValueError, match="radius 63 is below the rounding of the points, 64"):
            negative.guard_hull(xs, avoid, 63.0, normal=one)
        assert_guarded(negative.guard_hull(xs, avoid, 65.0, normal=one), avoid, 65.0, "convex")


def test_points_apart_by_rounding_span_nothing():
    # Of a line as short as rounding the direction is noise: no average is found far along it.
    one = jnp.asarray([1.0, 1.0], FLOAT)
    other = one + jnp.asarray([0.0, 8 * UNIT], FLOAT)
    found = nearest([one, other], jnp.zeros(2, FLOAT), mode="affine")
    np.testing.assert_allclose(found.distance, np.sqrt(2), rtol=64 * UNIT)
    np.testing.assert_allclose(found.normal, np.sqrt([0.5, 0.5]), rtol=64 * UNIT)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"radius": 0.0}, "radius must be finite and positive"),
        ({"radius": UNIT}, "radius .* is below the rounding of the points"),
        ({"mode": "linear"}, "mode must be one of 'convex', 'affine', got 'linear'"),
        ({"costs": (1, -1)}, "costs must be positive"),
        ({"costs": (1,)}, "costs has 1 numbers for 2 points"),
        ({"points": []}, "points is empty"),
        ({"points": [jnp.ones(2), jnp.ones(3)]}, r"leaf \(root\) has shape"),
        ({"avoid": jnp.asarray([jnp.nan, 0.0])}, r"leaf \(root\) of avoid holds NaN"),
        ({"normal": jnp.asarray([jnp.nan, 0.0])}, r"leaf \(root\) of normal holds NaN"),
        ({"allow": [None]}, "allow must have one entry for each of 2 points"),
    ],
)
def test_guard_hull_refuses(options, words, refuses):
    usual = {"points": [jnp.ones(2), 2 * jnp.ones(2)], "avoid": jnp.zeros(2), "radius": 3.0}
    with refuses(ValueError, match=words):
        negative.guard_hull(**(usual | options))


def test_points_that_are_high_enough_stay_bit_for_bit():
    x = jnp.asarray([5.0, -0.0, 0.0], FLOAT)
    normal = jnp.asarray([1.0, 1.0, -1.0], FLOAT)
    (moved,) = negative.guard_hull([x], jnp.zeros(3, FLOAT), 1.0, normal=normal)
    assert_close(moved, x, units=0)
    np.testing.assert_array_equal(np.signbit(moved), [False, True, False])


def test_a_point_is_moved_by_no_more_than_its_dtype_holds(refuses):
    x, zero = jnp.asarray([1.0, 0.5], jnp.float16), jnp.zeros(2, jnp.float16)
    (moved,) = negative.guard_hull([x], zero, 5e4)
    assert np.isfinite(moved).all()
    with refuses(ValueError, match=r"would have to move by 3e\+05, and its dtype holds"):
        negative.guard_hull([x], zero, 3e5)


def test_a_point_that_may_not_move_and_need_not_has_no_part_in_the_cost():
    xs = [jnp.asarray(x, FLOAT) for x in ([1.0, 0.3], [0.2, -0.6], [9.0, 0.0])]
    zero = jnp.zeros(2, FLOAT)
    free, frozen = (
        negative.guard_normal(xs, zero, 2.0, allow=[None, None, last]) for last in (None, 0.0)
    )
    assert free.converged
    assert frozen.converged
    assert_close(frozen.weights, free.weights, units=4096)


@pytest.mark.parametrize("name", ["radius", "costs"])
def test_what_is_undefined_is_nan_where_traced(name):
    xs = [jnp.ones(2), 2 * jnp.ones(2)]
    usual = {"radius": 3.0, "costs": jnp.ones(2)}
    bad = jax.tree.map(lambda x: -x, usual[name])
    assert is_nan(guard_hull(xs, jnp.zeros(2), mode="affine", **(usual | {name: bad})))


# guard_normal


def cost_of(xs, avoid, radius, n, mode, k):
    heights = (rows(xs) - flat(avoid)) @ n
    if mode == "convex":
        return np.sum(k * np.maximum(radius - heights, 0) ** 2)
    return np.sum(k * (max(radius, np.average(heights, weights=k)) - heights) ** 2)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**16))
def test_no_normal_costs_less_than_the_one_found(mode, seed):
    rng = np.random.default_rng(seed)
    k = rng.uniform(0.3, 3, size=2)
    xs = [jnp.asarray(x, FLOAT) for x in rng.normal(size=(2, 4)) + 1]
    avoid = jnp.asarray(rng.normal(size=4) / 2, FLOAT)
    start = jnp.asarray(rng.normal(size=4), FLOAT)
    found = guard_normal(xs, avoid, 3.0, mode=mode, costs=tuple(k), start=start)
    assume(found.converged)
    n = flat(found.weights)
    assert abs(np.linalg.norm(n) - 1) <= 16 * UNIT
    got = cost_of(xs, avoid, 3.0, n, mode, k)
    others = rng.normal(size=(2000, 4))
    others = np.concatenate([others, n + 1e-2 * others])
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    least = min(cost_of(xs, avoid, 3.0, z, mode, k) for z in others)
    assert got <= least * (1 + 1e-5) + (64 * UNIT * 3) ** 2 * sum(k)
    moved = guard_hull(xs, avoid, 3.0, normal=found.weights, mode=mode, costs=tuple(k))
    assert_guarded(moved, avoid, 3.0, mode)
    spent = np.sum(k[:, None] * (rows(moved) - rows(xs)) ** 2)
    error = 64 * UNIT * (largest(*moved, *xs, avoid) + 3) * np.sqrt(sum(k))
    assert abs(np.sqrt(spent) - np.sqrt(got)) <= error


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("power", [-50, -35, 30, 50])
def test_the_cheapest_normal_is_that_at_every_scale(mode, power):
    """No gradient, of the second degree, is squared where its square has no range."""
    rng = np.random.default_rng(3)
    draws = rng.normal(size=(3, 4)).astype(np.float32)
    start = jnp.asarray(rng.normal(size=4).astype(np.float32))

    def found(size, price):
        xs = [jnp.asarray(np.float32(size) * x) for x in draws]
        costs = price * jnp.asarray([1.0, 2.0], jnp.float32)
        return guard_normal(
            xs[:2], xs[2], jnp.float32(8 * size), mode=mode, costs=costs, start=start
        )

    at_one = found(1.0, 1.0)
    assert at_one.converged
    k = np.array([1.0, 2.0])
    least = cost_of(list(draws[:2]), draws[2], 8.0, flat(at_one.weights), mode, k)
    for one in (found(2.0**power, 1.0), found(1.0, 2.0**power)):
        assert one.converged
        got = cost_of(list(draws[:2]), draws[2], 8.0, flat(one.weights), mode, k)
        assert abs(got / least - 1) < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_the_search_converges_from_most_starts_and_beats_the_default_normal(mode):
    rng = np.random.default_rng(1)
    converged = 0
    for _ in range(30):
        xs = [jnp.asarray(x, FLOAT) for x in rng.normal(size=(2, 4)) + 1]
        avoid, k = jnp.asarray(rng.normal(size=4) / 2, FLOAT), np.ones(2)
        found = guard_normal(xs, avoid, 3.0, mode=mode, costs=(1.0, 1.0))
        converged += bool(found.converged)
        default = flat(nearest(xs, avoid, mode=mode).normal)
        got = cost_of(xs, avoid, 3.0, flat(found.weights), mode, k)
        before = cost_of(xs, avoid, 3.0, default, mode, k)
        assert np.sqrt(got) <= np.sqrt(before) + 64 * UNIT * largest(*xs, avoid)
        assert found.steps <= 500
    assert converged >= 27


def test_about_their_mean_the_cheapest_normal_is_across_the_differences():
    a, c = jnp.asarray([2.0, 0.0, 0.0], FLOAT), jnp.asarray([-2.0, 0.0, 0.0], FLOAT)
    avoid = jnp.zeros(3, FLOAT)
    start = jnp.asarray([1.0, 2.0, -1.0], FLOAT)
    found = guard_normal([a, c], avoid, 5.0, start=start)
    assert found.converged
    assert abs(found.weights[0]) <= 1e-3
    along = guard_normal([a, c], avoid, 5.0, start=a)  # stationary, and the dearest of all
    assert along.residual <= 1e-4
    assert not along.converged


def residual_of(xs, avoid, radius, n, mode, k):
    """The norm of the gradient along the sphere, as the search measures it, in float64."""
    gaps = rows(xs) - flat(avoid)
    heights = gaps @ n
    middle = np.average(heights, weights=k)
    above = mode == "affine" and middle > radius
    needs = (middle if above else radius) - heights
    needs = np.maximum(needs, 0) if mode == "convex" else needs
    shared = np.average(gaps, axis=0, weights=k) if above else 0
    gradient = 2 * (k * needs) @ (shared - gaps)
    gradient -= n * (n @ gradient)
    return np.linalg.norm(gradient) / (2 * radius * np.sqrt(np.sum(k * needs**2) * np.sum(k)))


POSITIONS = {
    "any": lambda x, _: x,
    "nearly collinear": lambda x, way: x[0] + np.outer([0, 1e-3, 2], way) + 1e-6 * x,
    "repeated": lambda x, _: x[[0, 0, 1]],
    "far": lambda x, _: x * [[1], [1], [1e4]],
    "close": lambda x, _: x[0] + 1e-5 * x,
    "beside a far origin": lambda x, way: x + 1e3 * way,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("power", [-60, 0, 60])
@pytest.mark.parametrize("position", POSITIONS)
def test_a_certificate_holds_at_the_points_themselves(position, power, mode):
    """The search runs on coordinates in the span of the gaps, and the points are elsewhere."""
    rng = np.random.default_rng(5)
    draws, way = rng.normal(size=(4, 9)), rng.normal(size=9)
    *xs, avoid = [
        {"w": jnp.asarray(x[:6].reshape(2, 3), jnp.float32), "b": jnp.asarray(x[6:], jnp.float32)}
        for x in np.ldexp([*POSITIONS[position](draws[:3], way), *draws[3:]], power)
    ]
    if position == "beside a far origin":
        avoid = tree.combine((1, np.ldexp(1e3, power)), (avoid, from_vector(way, avoid)))
    radius = np.float32(3 * np.linalg.norm(rows(xs) - flat(avoid), axis=1).max())
    k = np.array([1.0, 2.0, 0.5])
    costs = tuple(k)
    start = from_vector(rng.normal(size=9), avoid)
    found = guard_normal(xs, avoid, radius, mode=mode, costs=costs, start=start)
    assert found.converged
    n = flat(found.weights)
    assert abs(np.linalg.norm(n) - 1) <= 16 * np.finfo(np.float32).eps
    residual = residual_of(xs, avoid, radius, n, mode, k)
    assert abs(residual - float(found.residual)) <= 64 * np.finfo(np.float32).eps


def from_vector(x, like):
    """A float32 tree of the layout of another, from its entries."""
    parts = np.split(np.float32(x), np.cumsum([leaf.size for leaf in jax.tree.leaves(like)])[:-1])
    leaves, structure = jax.tree.flatten(like)
    shaped = [jnp.asarray(p.reshape(leaf.shape)) for p, leaf in zip(parts, leaves, strict=True)]
    return structure.unflatten(shaped)


def test_the_start_may_leave_the_span_and_the_search_keeps_it():
    rng = np.random.default_rng(2)
    xs = [jnp.asarray(x, FLOAT) for x in rng.normal(size=(2, 6))]
    avoid, start = (jnp.asarray(x, FLOAT) for x in rng.normal(size=(2, 6)))
    found = negative.guard_normal(xs, avoid, 9.0, start=start, steps=0)
    wanted = flat(start) / np.linalg.norm(flat(start))
    np.testing.assert_allclose(flat(found.weights), wanted, atol=16 * UNIT)
    found = negative.guard_normal(xs, avoid, 9.0, start=start)
    ways = np.stack([*(rows(xs) - flat(avoid)), flat(start)])
    beside = flat(found.weights) - ways.T @ np.linalg.lstsq(ways.T, flat(found.weights))[0]
    np.testing.assert_allclose(beside, 0, atol=16 * UNIT)


def test_the_program_of_a_search_is_that_of_every_layout():
    rng = np.random.default_rng(0)
    sizes = []
    for shapes in ([(3, 4)], [(2, 5), (7,), (2, 3, 2), ()]):
        *xs, avoid = [[jnp.asarray(rng.normal(size=s), FLOAT) for s in shapes] for _ in range(3)]
        assert negative.guard_normal(xs, avoid, 20.0).residual <= 1e-4
        sizes.append(_descend._cache_size())
    assert sizes[0] == sizes[1]


def test_a_guard_that_costs_nothing_is_found_at_once_and_steps_are_counted(refuses):
    xs = [jnp.asarray([9.0, 0.0], FLOAT), jnp.asarray([9.0, 5.0], FLOAT)]
    avoid = jnp.zeros(2, FLOAT)
    found = negative.guard_normal(xs, avoid, 3.0)
    assert (found.residual, found.steps, found.converged) == (0, 0, True)
    assert_close(found.weights, jnp.asarray([1.0, 0.0], FLOAT))
    short = negative.guard_normal(xs, avoid, 30.0, start=jnp.asarray([1.0, -1.0], FLOAT), steps=1)
    assert (short.steps, short.converged) == (1, False)
    assert short.residual > 1e-4
    with refuses(ValueError, match="steps must be at least 0"):
        negative.guard_normal(xs, avoid, 3.0, steps=-1)
    with refuses(ValueError, match="rtol must be finite and positive"):
        negative.guard_normal(xs, avoid, 3.0, rtol=0.0)


def test_a_normal_that_is_undefined_is_nan_where_traced():
    xs, avoid = [jnp.ones(2, FLOAT), 2 * jnp.ones(2, FLOAT)], jnp.zeros(2, FLOAT)
    for found in (guard_normal(xs, avoid, -1.0), guard_normal(xs, xs[0], 3.0)):
        assert is_nan([found.weights, found.residual])
        assert not found.converged


def test_with_allow_the_normal_found_is_stationary_and_cheaper():
    rng = np.random.default_rng(0)
    xs = [{"w": jnp.asarray(rng.normal(size=(4, 3)), FLOAT)} for _ in range(2)]
    avoid = {"w": jnp.asarray(rng.normal(size=(4, 3)), FLOAT)}
    maps = []
    for _ in xs:
        q = np.linalg.qr(rng.normal(size=(4, 4)))[0][:, :3]
        maps.append(q @ q.T)
    allow = [{"w": jnp.asarray(p, FLOAT)} for p in maps]
    found = guard_normal(xs, avoid, 6.0, allow=allow)
    assert found.converged

    def cost(n):
        n = n / np.linalg.norm(n)
        heights = (rows(xs) - flat(avoid)) @ n
        reaches = np.array([n @ np.kron(p, np.eye(3)) @ n for p in maps])
        return np.sum(np.maximum(6.0 - heights, 0) ** 2 / reaches)

    n = flat(found.weights)
    steps = 1e-5 * rng.normal(size=(50, 12))
    assert all(cost(n + d) >= cost(n) * (1 - 1e-7) for d in steps)
    assert cost(n) < cost(flat(nearest(xs, avoid, mode="convex").normal))
    moved = negative.guard_hull(xs, avoid, 6.0, normal=found.weights, allow=allow)
    assert_guarded(moved, avoid, 6.0, "convex")
    spent = sum(size(tree.combine((1, -1), (y, x))) ** 2 for x, y in zip(xs, moved, strict=True))
    assert abs(spent - cost(n)) <= 1e-4 * spent


def test_a_keeping_guard_of_the_hull_is_invisible_to_gram_weighted_merging():  # (ii L13)
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(5, 8)), rng.normal(size=(6, 8))]
    xs = [{"w": jnp.asarray(rng.normal(size=(8, 3)), FLOAT)} for _ in inputs]
    allow = [{"w": negative.free_inputs(jnp.asarray(x, FLOAT), rtol=1e-6)} for x in inputs]
    normal = {"w": jnp.asarray(rng.normal(size=(8, 3)), FLOAT)}
    avoid = average.mean(xs)
    moved = negative.guard_hull(xs, avoid, 5.0, normal=normal, allow=allow, mode="affine")
    assert_guarded(moved, avoid, 5.0, "affine")
    assert geometry.distance(average.mean(moved), avoid) > 4.99
    for x, before, after in zip(inputs, xs, moved, strict=True):
        scale = np.linalg.norm(x, 2) * size(before, after)
        np.testing.assert_allclose(x @ after["w"], x @ before["w"], atol=64 * UNIT * scale)


@pytest.mark.parametrize("entry", [1e18, 2.0**120, 2.0**-120])
def test_a_normal_counts_by_where_it_points(entry):
    rng = np.random.default_rng(0)
    xs = [jnp.asarray(rng.normal(size=1000), FLOAT) for _ in range(2)]
    for mode in MODES:
        one = jnp.ones(1000, FLOAT)
        wanted = negative.guard_hull(xs, 0 * one, 90.0, normal=one, mode=mode)
        normal = one * jnp.asarray(entry, FLOAT)
        assert_close(
            negative.guard_hull(xs, 0 * one, 90.0, normal=normal, mode=mode), wanted, units=64
        )
        assert_guarded(wanted, 0 * one, 90.0, mode)


def test_a_guard_far_from_a_center_rounds_at_the_size_of_the_center():
    rng = np.random.default_rng(0)
    d = rng.normal(size=40)
    center = jnp.asarray(d / np.linalg.norm(d) / (8 * UNIT), FLOAT)
    xs = [jnp.asarray(rng.normal(size=40), FLOAT) for _ in range(2)]
    radius = float(jnp.asarray(np.linalg.norm(flat(center)) * (1 + 4 * UNIT), FLOAT))
    for mode in MODES:
        moved = negative.guard_hull(xs, center, radius, mode=mode)
        for t in np.linspace(0, 1, 5):
            far = np.linalg.norm(t * flat(moved[0]) + (1 - t) * flat(moved[1]) - flat(center))
            assert far >= radius - 64 * UNIT * (size(center) + max(map(size, moved)))
