"""How exactly the laws of low rank and cones hold outside the tests' shapes, beside float64.

Run: python benchmarks/lowrank_laws.py [seed]
Every figure is the worst over the draws, in units of float32 epsilon times the scale that it names.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from wspace import cone, geometry, lowrank
from wspace.lowrank import LowRank

EPS = float(np.finfo(np.float32).eps)
SHAPES = [(31, 17), (13, 40), (5, 19, 11)]
DRAWS = 10


def factors(rng: np.random.Generator, shape: tuple[int, ...], rank: int) -> LowRank:
    """A random edit of one leaf."""
    *stack, m, n = shape
    sides = (rng.normal(size=(*stack, size, rank)) for size in (m, n))
    return LowRank(*(jnp.asarray(x, jnp.float32) for x in sides))


def product(x: LowRank) -> np.ndarray:
    """The matrix of an edit in float64."""
    return np.asarray(x.left, float) @ np.asarray(x.right, float).swapaxes(-1, -2)


def regauged(rng: np.random.Generator, x: LowRank) -> LowRank:
    """The same matrix in other factors, by a gauge of condition number 4."""
    bases = [np.linalg.qr(rng.normal(size=(x.rank, x.rank)))[0] for _ in range(2)]
    gauge = (bases[0] * np.linspace(0.5, 2, x.rank)) @ bases[1]
    left = np.asarray(x.left, float) @ gauge
    right = np.asarray(x.right, float) @ np.linalg.inv(gauge).T
    return LowRank(jnp.asarray(left, jnp.float32), jnp.asarray(right, jnp.float32))


def sums(rng: np.random.Generator) -> dict[str, float]:
    """Three adapters of ranks 2, 5 and 9 with coefficients (1, -0.7, 0.3), and gauges."""
    c = (1, -0.7, 0.3)
    worst = {}
    for shape in SHAPES:
        edits = [factors(rng, shape, rank) for rank in (2, 5, 9)]
        dense = [product(x) for x in edits]
        gap = product(lowrank.combine(c, edits)) - sum(k * x for k, x in zip(c, dense, strict=True))
        size = sum(abs(k) * np.linalg.norm(x) for k, x in zip(c, dense, strict=True))
        x = edits[1]
        nothing = lowrank.norm(lowrank.combine((1, -1), (x, regauged(rng, x))))
        values = np.linalg.svd(product(x), compute_uv=False)[..., : min(x.rank, *shape[-2:])]
        apart = np.abs(np.asarray(lowrank.singular_values(x), float) - values).max()
        new = {
            "sum of adapters of ranks 2, 5, 9 from the dense sum / (eps norms)": np.linalg.norm(gap)
            / (EPS * size),
            "norm of an adapter minus itself in another gauge / (eps norm)": float(nothing)
            / (EPS * np.linalg.norm(dense[1])),
            "singular values of factors from numpy's / (eps largest)": apart / (EPS * values.max()),
        }
        worst = {name: max(worst.get(name, 0), value) for name, value in new.items()}
    return worst


def cuts(rng: np.random.Generator) -> dict[str, float]:
    """Exact truncation of spectra distinct, repeated, zero and tiny."""
    worst = 0.0
    for shape in SHAPES:
        *stack, m, n = shape
        p = min(m, n)
        spectra = (
            np.arange(p, 0, -1.0),
            np.repeat([3.0, 1.0], [p // 2, p - p // 2]),
            1.0 * (np.arange(p) < 3),
            10.0 ** -np.arange(p),
        )
        for values in spectra:
            left, right = (np.linalg.qr(rng.normal(size=(*stack, k, p)))[0] for k in (m, n))
            x = jnp.asarray((left * values) @ right.swapaxes(-1, -2), jnp.float32)
            exact = np.asarray(x, float)
            true = np.linalg.svd(exact, compute_uv=False)
            for rank in (0, 1, p // 2, p):
                cut = lowrank.truncate(x, rank)
                best = np.sqrt(np.sum(true[..., rank:] ** 2))
                scale = EPS * np.sqrt(p) * np.linalg.norm(exact)
                residual = np.linalg.norm(exact - product(cut.factors))
                worst = max(
                    worst, abs(residual - best) / scale, abs(float(cut.tail) - best) / scale
                )
    return {"truncate: residual and tail from numpy's tail / (eps sqrt(p) norm)": worst}


def lemma(rng: np.random.Generator) -> dict[str, float]:
    """Entry and exit of every cone: how far from the sphere, and sampled edits that do better."""

    def draw() -> dict[str, jax.Array]:
        return {
            "w": jnp.asarray(rng.normal(size=(17, 12)), jnp.float32),
            "s": jnp.asarray(rng.normal(size=(3, 9, 7)), jnp.float32),
            "b": jnp.asarray(rng.normal(size=12), jnp.float32),
        }

    x = draw()
    mask = jax.tree.map(lambda leaf: leaf > 0, draw())
    cones = [
        cone.Rank(2),
        cone.PooledRank(9),
        cone.Subspace(geometry.orthonormalize([draw() for _ in range(4)])),
        cone.Mask(mask),
        cone.Sparse(60),
    ]
    landing, better = 0.0, 0.0
    flat = flatten(x)
    size = np.linalg.norm(flat)
    for k in cones:
        nearest = cone.project(k, x)
        inside = float(nearest.tail) + 0.3 * (size - float(nearest.tail))
        moves = (cone.entry(k, x, inside), inside, 1), (cone.exit(k, x, 2 * size), 2 * size, -1)
        for move, radius, side in moves:
            landed = np.linalg.norm(flat + flatten(move.edit))
            landing = max(landing, abs(landed - radius) / (EPS * max(size, radius)))
            for _ in range(20):
                other = flatten(cone.project(k, draw()).edit)
                other *= float(move.norm) / np.linalg.norm(other)
                for sign in (1, -1):
                    reached = np.linalg.norm(flat + sign * other)
                    better = max(better, side * (radius - reached) / (EPS * max(size, radius)))
    return {
        "lemma: entry and exit from the sphere / (eps size)": landing,
        "lemma: how much nearer a sampled edit of the cone comes / (eps size)": better,
    }


def flatten(x: dict) -> np.ndarray:
    """An edit as one float64 vector."""
    return np.concatenate(
        [
            (product(x[k]) if isinstance(x[k], LowRank) else np.asarray(x[k], float)).reshape(-1)
            for k in ("w", "s", "b")
        ]
    )


def memory() -> None:
    """Temporary and output bytes of the compiled algebra beside those of one matrix."""
    m, r = 4096, 16
    side = jnp.ones((m, r), jnp.float32)
    functions = {
        "add": lambda u, v: lowrank.add(LowRank(u, v), LowRank(v, u)),
        "vdot": lambda u, v: lowrank.vdot(LowRank(u, v), LowRank(v, u)),
        "norm": lambda u, v: lowrank.norm(LowRank(u, v)),
    }
    for name, function in functions.items():
        used = jax.jit(function).lower(side, side).compile().memory_analysis()
        share = (used.temp_size_in_bytes + used.output_size_in_bytes) / (4 * m * m)
        print(f"{share:10.3g}  {name} at 4096 x 4096, rank 16: memory by that of the matrix")


def main() -> None:
    """Prints the worst figure of every law."""
    rng = np.random.default_rng(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    for law in (sums, cuts, lemma):
        figures = [law(rng) for _ in range(DRAWS)]
        for name in figures[0]:
            worst = functools.reduce(max, (figure[name] for figure in figures))
            print(f"{worst:10.3g}  {name}")
    memory()


if __name__ == "__main__":
    main()
