"""The law of every guard: outside the ball, or refused, or NaN where traced, at every scale.

Points, radii, costs, coefficients, directions and allowances are drawn at every scale that float32
holds, points in half precision too, and in positions that have no answer. `HYPOTHESIS_PROFILE` may
be `guards`, which draws 10,000 of each.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from tests.helpers import is_nan
from tests.strategies import FLOAT
from wspace import cone, negative
from wspace.testing import vector

LAYOUT = {"b": (2,), "w": (2, 2)}
COUNT = sum(int(np.prod(shape)) for shape in LAYOUT.values())
DTYPES = {np.dtype(x): x for x in (FLOAT, jnp.bfloat16, jnp.float16)}
RANGE = {np.dtype(jnp.float16): (-14, 10)}
"""Exponents of points in dtypes that do not hold all of the others."""

exponents = st.one_of(st.integers(-4, 4), st.integers(-120, 120))
seeds = st.integers(0, 2**16)
turns = itertools.count()


def flat(x):
    return vector(x).astype(np.float64)


def unflat(x, dtype):
    x = np.asarray(x, np.float64)
    return {
        "b": jnp.asarray(x[:2].astype(dtype)),
        "w": jnp.asarray(x[2:].reshape(2, 2).astype(dtype)),
    }


@st.composite
def positions(draw):
    """Points in some dtype, coefficients, a point to avoid or to reach, and a radius."""
    dtype = draw(st.sampled_from(list(DTYPES)))
    low, high = RANGE.get(dtype, (-120, 120))
    k = draw(st.one_of(st.integers(-4, 4), st.integers(low, high)))
    rng = np.random.default_rng(draw(seeds))
    count = draw(st.sampled_from([1, 3]))
    a = np.array([1.0]) if count == 1 else rng.choice([-0.5, 0.25, 1.0, 1.0, 3.0], 3)
    a = a if abs(a.sum()) > 0.2 * abs(a).max() else abs(a)
    spread = 2.0 ** draw(st.sampled_from([0, -3, -8, -20]))
    start, ways = rng.normal(size=COUNT), rng.normal(size=(count, COUNT))
    kind = draw(st.sampled_from(["any", "equal", "line", "zeros"]))
    if kind in ("equal", "zeros"):
        ways[:], start = 0, start * (kind == "equal")
    if kind == "line":
        ways[:] = ways[0] * rng.normal(size=(count, 1))
    xs = [unflat(2.0**k * (start + spread * way), dtype) for way in ways]
    mean = a @ [flat(x) for x in xs] / a.sum()
    where = draw(st.sampled_from(["mean", "near", "near", "point", "far", "zero"]))
    other = draw(st.sampled_from([dtype, np.dtype(FLOAT)]))
    center = {
        "mean": mean,
        "near": mean + 2.0**k * spread * rng.normal(size=COUNT),
        "point": flat(xs[0]),
        "far": mean + 2.0 ** draw(st.integers(low, high)) * rng.normal(size=COUNT),
        "zero": 0 * mean,
    }[where]
    times = draw(st.one_of(st.sampled_from([1.0, spread]), exponents.map(lambda e: 2.0**e)))
    length = min(max(times * 2.0**k * 3, 2.0**-124), 2.0 ** (high - 1))
    scale = 2.0 ** draw(exponents)
    return xs, tuple(scale * a), unflat(center, other), float(np.float32(length)), rng


def costs_of(draw, rng, count):
    spread = draw(st.sampled_from([0, 0, 4, 40]))
    return tuple(
        2.0 ** np.clip(draw(exponents) + rng.integers(-spread, spread + 1, count), -120, 120)
    )


def direction_of(draw, rng, xs, avoid):
    """A direction of any scale, of some dtype, random or along what the points give."""
    kind = draw(st.sampled_from(["any", "any", "one", "point", "center"]))
    way = {
        "any": rng.normal(size=COUNT),
        "one": np.eye(COUNT)[rng.integers(COUNT)],
        "point": flat(xs[0]),
        "center": flat(avoid),
    }[kind]
    size = np.abs(way).max()
    return unflat(way / (size or 1) * 2.0 ** draw(exponents), np.dtype(FLOAT))


def allow_of(draw, rng, count):
    """Per point projectors, metrics and numbers, all of them at one scale, or at several."""
    several = draw(st.booleans())
    scale = draw(exponents)

    def entry(matrix):
        times = 2.0 ** (draw(exponents) if several else scale)
        if not matrix:
            return float(times * draw(st.sampled_from([1.0, 1.0, 0.0])))
        q = np.linalg.qr(rng.normal(size=(2, 2)))[0][:, : draw(st.sampled_from([0, 1, 1, 2]))]
        soft = draw(st.sampled_from([0.0, 0.0, 2.0**-12, 0.25]))
        return jnp.asarray(times * (q @ q.T + soft * np.eye(2)), FLOAT)

    return [{"b": entry(False), "w": entry(True)} for _ in range(count)]


def eps_of(*trees):
    return max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(trees))


def rounding(a, xs, moved, *others):
    """What an average of moved points may be off by, stored as they are."""
    sums, stored = 64 * float(jnp.finfo(FLOAT).eps), eps_of(xs)
    least = 2.0**-24 if any(x.dtype == jnp.float16 for x in jax.tree.leaves(xs)) else 2.0**-126
    a = np.abs(a)
    size = a @ [
        np.linalg.norm(flat(x)) + np.linalg.norm(flat(y)) for x, y in zip(xs, moved, strict=True)
    ]
    beside = sum(np.linalg.norm(flat(x)) for x in others)
    return a.sum() * ((sums + stored) * size + sums * beside + 8 * COUNT * least)


@functools.cache
def compiled(function, **options):
    return jax.jit(functools.partial(function, **options))


def tried(function, *args, **options):
    """The points that come back, known and traced: none where they are refused, or NaN."""
    fixed = {name: options.pop(name) for name in ("mode", "cone") if name in options}
    traced = compiled(function, **fixed)(*args, **options)
    if (
        settings.default.max_examples > 1000 and next(turns) % 8
    ):  # eager calls take most of the time
        event("NaN traced" if is_nan(traced) else "traced")
        return [] if is_nan(traced) else [traced]
    try:
        known = function(*args, **fixed, **options)
    except ValueError:
        event("refused")
        assert is_nan(traced), "refused where known, and not NaN where traced"
        return []
    event("known and NaN traced" if is_nan(traced) else "known and traced")
    return [known] if is_nan(traced) else [known, traced]


def assert_outside(a, xs, moved, avoid, radius):
    a = np.array(a) / np.sum(a)
    start = np.linalg.norm(a @ [flat(x) for x in xs] - flat(avoid))
    far = np.linalg.norm(a @ [flat(x) for x in moved] - flat(avoid))
    error = rounding(a, xs, moved, avoid) + 64 * eps_of(avoid) * radius
    event("vacuous" if error > radius / 2 else "held")
    assert far >= radius - error, (far / radius, error / radius)
    assert far <= max(radius, start) + error, (far / radius, start / radius, error / radius)
    if start > radius + error:
        for x, y in zip(xs, moved, strict=True):
            least = float(jnp.finfo(FLOAT).tiny)  # below it XLA takes numbers for zero
            np.testing.assert_allclose(flat(y), flat(x), rtol=0, atol=least)


@given(data=st.data(), position=positions())
def test_the_average_is_out_of_the_ball(data, position):
    xs, a, avoid, radius, rng = position
    costs = costs_of(data.draw, rng, len(xs))
    for moved in tried(negative.exit_ball, xs, a, avoid, radius, costs=costs):
        assert_outside(a, xs, moved, avoid, radius)


@pytest.mark.parametrize("allowed", [False, True])
@given(data=st.data(), position=positions())
def test_the_average_is_out_of_the_ball_along_a_direction(allowed, data, position):
    xs, a, avoid, radius, rng = position
    options = {"costs": costs_of(data.draw, rng, len(xs))}
    options["direction"] = direction_of(data.draw, rng, xs, avoid)
    if allowed:
        options["allow"] = allow_of(data.draw, rng, len(xs))
    for moved in tried(negative.exit_ball, xs, a, avoid, radius, **options):
        assert_outside(a, xs, moved, avoid, radius)


CONES = [cone.Rank(1), cone.Sparse(2)]


@given(data=st.data(), position=positions(), kind=st.sampled_from([0, 1]))
def test_the_average_is_out_of_the_ball_by_an_edit_of_a_cone(data, position, kind):
    xs, a, avoid, radius, rng = position
    options = {"costs": costs_of(data.draw, rng, len(xs)), "cone": CONES[kind]}
    for moved in tried(negative.exit_ball, xs, a, avoid, radius, **options):
        assert_outside(a, xs, moved, avoid, radius)


@pytest.mark.parametrize("mode", ["convex", "affine"])
@given(data=st.data(), position=positions(), normal=st.booleans(), allowed=st.booleans())
def test_every_average_is_out_of_the_ball(mode, data, position, normal, allowed):
    xs, _, avoid, radius, rng = position
    options = {"mode": mode, "costs": costs_of(data.draw, rng, len(xs))}
    if normal:
        options["normal"] = direction_of(data.draw, rng, xs, avoid)
    if allowed:
        options["allow"] = allow_of(data.draw, rng, len(xs))
    weights = [*np.eye(len(xs)), *rng.dirichlet(np.ones(len(xs)), 4)]
    if mode == "affine":
        draws = rng.uniform(-3, 4, (4, len(xs)))
        draws[:, -1] += 1 - draws.sum(axis=1)
        weights = [*weights, *draws]
    for moved in tried(negative.guard_hull, xs, avoid, radius, **options):
        for t in weights:
            far = np.linalg.norm(t @ [flat(x) for x in moved] - flat(avoid))
            error = rounding(np.abs(t), xs, moved, avoid, avoid)
            assert far >= radius - error, (far / radius, error / radius)


@given(data=st.data(), position=positions(), allowed=st.booleans())
def test_the_average_is_the_target(data, position, allowed):
    xs, a, target, _, rng = position
    options = {"costs": costs_of(data.draw, rng, len(xs))}
    if allowed:
        options["allow"] = allow_of(data.draw, rng, len(xs))
    a = np.array(a) / np.sum(a)
    for moved in tried(negative.retarget, xs, tuple(a), target, **options):
        off = np.linalg.norm(a @ [flat(x) for x in moved] - flat(target))
        assert off <= rounding(a, xs, moved, target, target) + eps_of(xs, target) * np.linalg.norm(
            flat(target)
        )
