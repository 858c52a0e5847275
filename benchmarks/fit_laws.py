"""How exactly trained guards and names meet their closed forms, beside float64.

Run: python benchmarks/fit_laws.py [seed]
Figures are the worst over the draws. With JAX_ENABLE_X64=1 they are those of float64.
"""

import collections
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from wspace import cone, fit, negative

DRAWS = 5
FLOAT = jax.dtypes.canonicalize_dtype(np.float64)
KEY = jax.random.key(0)
SHAPES = {"w": (23, 17), "b": (19,)}


def draw(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A random tree in float64."""
    return {name: rng.normal(size=shape) for name, shape in SHAPES.items()}


def flat(x: dict) -> np.ndarray:
    """A tree as one float64 vector."""
    return np.concatenate([np.asarray(x[name], float).reshape(-1) for name in SHAPES])


def device(x: dict) -> dict[str, jax.Array]:
    """A tree in the dtype that is measured."""
    return {name: jnp.asarray(leaf, FLOAT) for name, leaf in x.items()}


def quadratic(rng: np.random.Generator) -> dict[str, float]:
    """A guard whose losses and penalty are quadratic, from the closed form."""
    points, target = [draw(rng) for _ in range(3)], draw(rng)
    a, c, mu = rng.uniform(0.3, 1, 3), rng.uniform(0.5, 2, 3), 4.0
    a /= a.sum()

    def half_square(x: dict, y: dict) -> jax.Array:
        return sum(jnp.sum((x[name] - y[name]) ** 2) / 2 for name in SHAPES)

    def kept(i: int) -> fit.KeyedLoss:
        return lambda x: float(c[i]) * half_square(x, device(points[i]))

    found = fit.guard(
        KEY,
        [kept(i) for i in range(3)],
        [device(x) for x in points],
        a.tolist(),
        lambda m: mu * half_square(m, device(target)),
        optimizer=optax.lbfgs(),
        steps=60,
    )
    shift = flat(target) - sum(k * flat(x) for k, x in zip(a, points, strict=True))
    share = shift / (1 / mu + np.sum(a**2 / c))
    gaps = [
        np.linalg.norm(flat(x) - (flat(y) + k / cost * share)) / np.linalg.norm(flat(x))
        for x, y, k, cost in zip(found.weights, points, a, c, strict=True)
    ]
    return {"guard, quadratic: from the closed form, relative": max(gaps)}


def inner_step(rng: np.random.Generator) -> dict[str, float]:
    """The worst low-rank edit of a penalty, beside 10,000 sampled ones of the same norm."""
    center, at = draw(rng), draw(rng)
    rank, budget = 2, 0.3
    away = fit.clipped(
        lambda x: sum(jnp.sum(jnp.cosh(x[k] - device(center)[k])) for k in SHAPES), 1e9
    )
    bound = negative.linear_bound(away.loss, device(at), cone.Rank(rank), budget)
    gradient = {name: -np.sinh(at[name] - center[name]) for name in SHAPES}
    u, values, vt = np.linalg.svd(gradient["w"])
    wanted = budget * np.hypot(
        np.linalg.norm(values[:rank]), np.linalg.norm(gradient["b"])
    )  # a vector is free from rank 1
    edit = {"w": bound.edit["w"].left @ bound.edit["w"].right.T, "b": bound.edit["b"]}
    gain = float(flat(edit) @ flat(gradient))
    sampled = -np.inf
    for spread in (10.0, 1.0, 0.1, 0.01):  # from anywhere to near the worst one
        for _ in range(2500):
            left = u[:, :rank] * values[:rank] + spread * rng.normal(size=(23, rank))
            right = vt[:rank].T + spread / 5 * rng.normal(size=(17, rank))
            other = {"w": left @ right.T, "b": gradient["b"] + spread * rng.normal(size=19)}
            x = flat(other)
            sampled = max(sampled, budget * float(x @ flat(gradient)) / np.linalg.norm(x))
    return {
        "inner step: gain, from budget |P grad|, relative": abs(gain - wanted) / wanted,
        "inner step: best of 10000 sampled edits / its gain": sampled / gain,
        "inner step: its norm, from the budget, relative": abs(
            np.linalg.norm(flat(edit)) / budget - 1
        ),
    }


def inversion(rng: np.random.Generator) -> dict[str, float]:
    """A name in a linear model, from least squares, and the other rows of its table."""
    model, wanted, table = rng.normal(size=(40, 8)), rng.normal(size=40), rng.normal(size=(50, 8))
    rows = jnp.asarray(table, FLOAT)
    matrix, target = jnp.asarray(model, FLOAT), jnp.asarray(wanted, FLOAT)
    changed, gaps = 0, []
    for ridge in (0.0, 3.0):
        found = fit.invert(
            KEY,
            lambda words: jnp.sum((matrix @ words[7] - target) ** 2),
            rows[7],
            table=rows,
            rows=7,
            ridge=ridge,
            optimizer=optax.adamw(optax.cosine_decay_schedule(0.1, 1500), weight_decay=0.0),
            steps=1500,
        )
        square = model.T @ model + ridge * np.eye(8)
        best = table[7] + np.linalg.solve(square, model.T @ (wanted - model @ table[7]))
        words = np.asarray(found.weights)
        gaps.append(np.linalg.norm(words[7] - best) / np.linalg.norm(best))
        changed += int((np.delete(words, 7, 0) != np.delete(np.asarray(rows), 7, 0)).sum())
    return {
        "invert, linear: from least squares, with and without ridge, relative": max(gaps),
        "invert: entries of the other rows that changed": float(changed),
    }


def main() -> None:
    """Prints every figure."""
    rng = np.random.default_rng(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    worst: dict[str, float] = collections.defaultdict(lambda: -np.inf)
    for _ in range(DRAWS):
        for part in (quadratic, inner_step, inversion):
            for name, value in part(rng).items():
                worst[name] = max(worst[name], value)
    print(f"jax {jax.__version__}, {jnp.dtype(FLOAT).name}, {DRAWS} draws")
    for name, value in worst.items():
        print(f"{value:11.6g}  {name}")


if __name__ == "__main__":
    main()
