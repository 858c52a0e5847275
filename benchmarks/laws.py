"""How exactly the laws hold on random trees outside the tests' shapes, in float32 beside float64.

Run: python benchmarks/laws.py [seed]
Every figure is the worst over the draws, in units of machine epsilon times the scale that it names.
"""

import functools
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from wspace import average, geometry, interpolate, negative, tree

EPS = float(np.finfo(np.float32).eps)
LAYOUT = {"in": (37, 21), "b": (21,), "conv": (3, 3, 5, 7), "layers": (4, 11, 9), "scale": ()}
DRAWS = 20


def draw(rng: np.random.Generator, dtype: type = jnp.float32) -> dict:
    """A random tree, of random size."""
    size = 10.0 ** rng.uniform(-3, 3)
    return {k: jnp.asarray(size * rng.normal(size=s), dtype) for k, s in LAYOUT.items()}


def vector(x: object) -> np.ndarray:
    """All entries in extended precision."""
    return np.concatenate(
        [np.asarray(leaf).astype(np.longdouble).reshape(-1) for leaf in jax.tree.leaves(x)]
    )


def norm(x: np.ndarray) -> float:
    """Euclidean norm of a vector."""
    return float(np.sqrt(np.dot(x, x)))


def draw_problem(rng: np.random.Generator) -> tuple:
    """Three points, coefficients of either sign, costs and a target."""
    a = rng.uniform(-1, 2, size=3)
    a[0] += 1 - min(a.sum(), 0)
    return [draw(rng) for _ in range(3)], a, rng.uniform(0.2, 5, size=3), draw(rng)


def retarget_lands(rng: np.random.Generator) -> dict[str, float]:
    """How far the average is from the target, and the cost from numpy's least squares."""
    points, a, c, target = draw_problem(rng)
    moved = negative.retarget(points, a, target, costs=c)
    a = a / a.sum()
    landing = sum(w * vector(y) for w, y in zip(a, moved, strict=True)) - vector(target)
    size = sum(
        abs(w) * (norm(vector(x)) + norm(vector(y)))
        for w, x, y in zip(a, points, moved, strict=True)
    )
    edits = np.stack([vector(y) - vector(x) for x, y in zip(points, moved, strict=True)])
    shift = vector(target) - sum(w * vector(x) for w, x in zip(a, points, strict=True))
    best = np.linalg.lstsq(
        (a / np.sqrt(c))[None].astype(float), shift[None].astype(float), rcond=None
    )[0]
    cost, least = np.sum(c[:, None] * edits**2), np.sum(best**2)
    return {
        "retarget: distance of the average from the target / (eps size)": norm(landing)
        / (EPS * (size + norm(vector(target)))),
        "retarget: cost / numpy.linalg.lstsq - 1, / eps": abs(float(cost) / least - 1) / EPS,
        "retarget: cost / (||D||^2 / S) - 1, / eps": abs(
            float(cost) / (norm(shift) ** 2 / np.sum(a**2 / c)) - 1
        )
        / EPS,
    }


def exit_ball_leaves(rng: np.random.Generator) -> dict[str, float]:
    """How far the average is from the sphere."""
    points, a, c, avoid = draw_problem(rng)
    far = geometry.distance(average.mean(points, a), avoid)
    radius = float(far) * rng.uniform(1.1, 4)
    moved = negative.exit_ball(points, a, avoid, radius, costs=c)
    a = a / a.sum()
    landing = norm(sum(w * vector(y) for w, y in zip(a, moved, strict=True)) - vector(avoid))
    size = sum(
        abs(w) * (norm(vector(x)) + norm(vector(y)))
        for w, x, y in zip(a, points, moved, strict=True)
    )
    return {
        "exit_ball: distance of the average from the sphere / (eps size)": abs(landing - radius)
        / (EPS * (size + norm(vector(avoid))))
    }


def allow_holds(rng: np.random.Generator) -> dict[str, float]:
    """Least cost and allowed space of retarget with projectors, and exit_ball beside it."""
    shapes, rows = {"w": (23, 6), "b": (6,)}, 23
    points = [
        {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
        for _ in range(2)
    ]
    bases = [np.linalg.qr(rng.normal(size=(rows, rows)))[0][:, :15] for _ in points]
    projectors = [jnp.asarray(q @ q.T, jnp.float32) for q in bases]
    allow = [{"w": p, "b": 0.0} for p in projectors]
    a, c = np.array([0.7, 0.3]), np.array([1.0, 2.0])
    reach = rng.normal(size=(rows, 6)) * np.ones((rows, 6))
    mean = average.mean(points, a)
    target = mean | {"w": mean["w"] + jnp.asarray(reach, jnp.float32)}
    moved = negative.retarget(points, a, target, costs=c, allow=allow)
    edits = [
        np.asarray(y["w"], float) - np.asarray(x["w"], float)
        for x, y in zip(points, moved, strict=True)
    ]
    exact = [np.asarray(p, float) for p in projectors]
    shift = np.asarray(target["w"], float) - sum(
        w * np.asarray(x["w"], float) for w, x in zip(a, points, strict=True)
    )
    blocks = np.hstack([w / np.sqrt(k) * q for w, k, q in zip(a, c, bases, strict=True)])
    best = np.linalg.lstsq(blocks, shift, rcond=1e-9)[0]
    cost = sum(k * np.sum(e**2) for k, e in zip(c, edits, strict=True))
    leak = max(
        np.linalg.norm(e - p @ e) / (norm(vector(x)) + np.linalg.norm(e))
        for e, p, x in zip(edits, exact, points, strict=True)
    )
    direction = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    out = negative.exit_ball(points, a, mean, 3.0, costs=c, direction=direction, allow=allow)
    goal = average.mean(out, a)
    again = negative.retarget(points, a, goal, costs=c, allow=allow)
    gap = max(float(geometry.distance(x, y)) for x, y in zip(out, again, strict=True))
    return {
        "retarget, allow: cost / lstsq on the vectorized problem - 1, / eps": abs(
            cost / np.sum(best**2) - 1
        )
        / EPS,
        "retarget, allow: ||(I - P) dx|| / (eps (||x|| + ||dx||))": leak / EPS,
        "exit_ball along g beside retarget to M + t S g / (eps size)": gap
        / (EPS * sum(norm(vector(x)) for x in out)),
    }


def repel_is_a_group(rng: np.random.Generator) -> dict[str, float]:
    """Strengths s and then t beside strength s + t + st."""
    x, b = draw(rng), draw(rng)
    s, t = rng.uniform(-3, 3, size=2)
    gap = geometry.distance(
        negative.repel(negative.repel(x, b, s), b, t), negative.repel(x, b, s + t + s * t)
    )
    size = (1 + abs(s)) * (1 + abs(t)) * (norm(vector(x)) + norm(vector(b)))
    return {"repel: group law / (eps size)": float(gap) / (EPS * size)}


def slerp_keeps_its_digits(rng: np.random.Generator) -> dict[str, float]:
    """Slerp beside Shoemake's formula in extended precision, at angles from 1e-7 to pi - 1e-3."""
    worst = 0.0
    for radians in (1e-7, 1e-5, 1e-3, 0.1, 1.0, 1.57, 2.5, 3.1, np.pi - 1e-2, np.pi - 1e-3):
        x, other = rng.normal(size=(2, 61))
        side = other - other @ x / (x @ x) * x
        y = np.cos(radians) * x + np.sin(radians) * side * norm(x) / norm(side)
        ends = [jnp.asarray(x, jnp.float32), jnp.asarray(y * rng.choice([1, 0.5, 7]), jnp.float32)]
        t = rng.uniform(-0.5, 1.5)
        u, v = (vector(z) / norm(vector(z)) for z in ends)
        turn = 2 * np.arctan2(np.sqrt(np.dot(u - v, u - v)), np.sqrt(np.dot(u + v, u + v)))
        t = np.longdouble(np.float32(t))
        wanted = (
            np.sin((1 - t) * turn) * vector(ends[0]) + np.sin(t * turn) * vector(ends[1])
        ) / np.sin(turn)
        error = norm(vector(interpolate.slerp(*ends, float(t))) - wanted)
        worst = max(worst, error / (EPS * max(norm(wanted), *(norm(vector(z)) for z in ends))))
    return {"slerp: distance from the formula / (eps size)": worst}


def hessian_is_true(rng: np.random.Generator) -> dict[str, float]:
    """The Hessian of slerp in an end, where the ends coincide, beside the closed form."""
    x, v, t = rng.normal(size=9), rng.normal(size=9), rng.uniform(0.1, 0.9)
    k = ((1 - t) * (1 - (1 - t) ** 2) + t * (1 - t**2)) / 6
    x = np.asarray(x, np.float32).astype(float)
    wanted = 2 * k * (x @ v) * (np.eye(9) - np.outer(x, x) / (x @ x)) / (x @ x)
    got = _hessian(jnp.asarray(x, jnp.float32), jnp.asarray(v, jnp.float32), jnp.float32(t))
    scale = np.linalg.norm(v) / np.linalg.norm(x)
    return {
        "slerp: Hessian at coincident ends / (eps |v| / |x|)": np.abs(got - wanted).max()
        / (EPS * scale)
    }


@jax.jit
def _hessian(x: jax.Array, v: jax.Array, t: jax.Array) -> jax.Array:
    return jax.hessian(lambda end: jnp.sum(interpolate.slerp(x, end, t) * v))(x)


def half_precision_rounds_once(rng: np.random.Generator) -> dict[str, float]:
    """Entries of bfloat16 results that are not the float32 result rounded, of all entries."""
    xs = [draw(rng, jnp.bfloat16) for _ in range(3)]
    functions: dict[str, Callable] = {
        "lerp": lambda *points: interpolate.lerp(*points[:2], 0.3),
        "slerp": lambda *points: interpolate.slerp(*points[:2], 0.3),
        "mean": lambda *points: average.mean(points, (1, 0.7, -0.3)),
        "repel": lambda *points: negative.repel(*points[:2], 0.7),
        "retarget": lambda *points: negative.retarget(points[:2], (0.4, 0.6), points[2]),
        "harden": lambda *points: negative.harden(points[0]),
    }
    differ = {}
    for name, function in functions.items():
        narrow, wide = function(*xs), function(*map(tree.upcast, xs))
        pairs = zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True)
        differ[f"bfloat16 {name}: entries off from float32 rounded once"] = float(
            sum(int((a != b.astype(a.dtype)).sum()) for a, b in pairs)
        )
    return differ


def many_leaves_keep_their_digits(rng: np.random.Generator) -> dict[str, float]:
    """Norm and vdot of a bfloat16 tree of 2000 leaves, relative."""
    x = [jnp.asarray(row, jnp.bfloat16) for row in rng.normal(size=(2000, 64)) + 0.5]
    y = [jnp.asarray(row, jnp.bfloat16) for row in rng.normal(size=(2000, 64)) + 0.5]
    dot = float(np.dot(vector(x), vector(y)))
    return {
        "norm of 2000 bfloat16 leaves, relative error": abs(
            float(tree.norm(x)) / norm(vector(x)) - 1
        ),
        "vdot of 2000 bfloat16 leaves, relative error": abs(float(tree.vdot(x, y)) / dot - 1),
    }


def main() -> None:
    """Prints the worst figure of every law."""
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    rng = np.random.default_rng(seed)
    laws = {
        retarget_lands: DRAWS,
        exit_ball_leaves: DRAWS,
        allow_holds: DRAWS,
        repel_is_a_group: DRAWS,
        slerp_keeps_its_digits: DRAWS,
        hessian_is_true: DRAWS,
        half_precision_rounds_once: 3,
        many_leaves_keep_their_digits: 1,
    }
    for law, draws in laws.items():
        figures = [law(rng) for _ in range(draws)]
        for name in figures[0]:
            worst = functools.reduce(max, (figure[name] for figure in figures))
            print(f"{worst:10.3g}  {name}")


if __name__ == "__main__":
    main()
