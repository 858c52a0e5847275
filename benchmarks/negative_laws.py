"""How exactly guards, subspaces, audits and bounds hold outside the tests' shapes, beside float64.

Run: python benchmarks/negative_laws.py [seed]
Figures are the worst over the draws, in units of float32 epsilon times the scale that they name.
"""

import collections
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from wspace import average, cone, lowrank, negative, tree

EPS = float(np.finfo(np.float32).eps)
DRAWS = 5
AVERAGES = 10_000
SHAPES = {"w": (23, 17), "stack": (3, 11, 7), "kernel": (3, 3, 2, 5), "b": (19,)}


def draw(rng: np.random.Generator, scale: float = 1.0) -> dict[str, jax.Array]:
    """A random tree."""
    return {k: jnp.asarray(scale * rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}


def flat(x: dict) -> np.ndarray:
    """A tree as one float64 vector."""
    return np.concatenate([np.asarray(x[k], float).reshape(-1) for k in SHAPES])


def mixtures(rng: np.random.Generator, count: int, mode: str) -> np.ndarray:
    """Coefficients that sum to one: convex, or in [-3, 4]."""
    if mode == "convex":
        return rng.dirichlet(0.3 * np.ones(count), size=AVERAGES)
    kept: list[np.ndarray] = []
    while len(kept) < AVERAGES:
        t = rng.uniform(-3, 4, size=count - 1)
        if -3 <= 1 - t.sum() <= 4:
            kept.append(np.append(t, 1 - t.sum()))
    return np.array(kept)


def guards(rng: np.random.Generator) -> dict[str, float]:
    """Guards of the hull: of many averages, how much nearer than the radius one comes."""
    found = {}
    xs, avoid = [draw(rng) for _ in range(3)], draw(rng)
    inputs = [rng.normal(size=(9, 23)) for _ in xs]
    allow = [
        {
            "w": negative.free_inputs(jnp.asarray(x, jnp.float32), rtol=1e-3),
            "stack": 1.0,
            "kernel": 1.0,
            "b": 0.0,
        }
        for x in inputs
    ]
    radius = 3 * float(tree.norm(avoid))
    for mode in ("convex", "affine"):
        for name, where in (("", None), (", with allow", allow)):
            moved = negative.guard_hull(xs, avoid, radius, mode=mode, allow=where)
            t = mixtures(rng, 3, mode)
            rows = np.stack([flat(x) for x in moved])
            away = np.linalg.norm(t @ rows - flat(avoid), axis=1)
            size = np.linalg.norm(rows, axis=1).max()
            short = (radius - away) / (EPS * size * np.abs(t).sum(axis=1))
            bar = f"{mode} guard{name}: nearer than the radius, {AVERAGES} averages"
            found[f"{bar} / (eps size sum|t|)"] = short.max()
        seen, frozen = 0.0, 0.0
        for x, y, data in zip(xs, moved, inputs, strict=True):
            edit = np.asarray(y["w"], float) - np.asarray(x["w"], float)
            top = np.linalg.norm(data, 2)
            scale = top * (np.linalg.norm(x["w"]) + np.linalg.norm(edit))
            seen = max(seen, np.linalg.norm(data @ edit) / (EPS * scale))
            frozen = max(frozen, float(np.abs(np.asarray(y["b"] - x["b"])).max()))
        found[f"{mode} guard, with allow: own outputs changed / (eps |X| (|x| + |dx|))"] = seen
        found[f"{mode} guard, with allow: frozen leaf moved"] = frozen
    return found


def hardened(rng: np.random.Generator) -> dict[str, float]:
    """Harden: norm, spaces, and the tail at every rank."""
    left, right = rng.normal(size=(23, 6)), rng.normal(size=(6, 17))
    edit = jnp.asarray(left @ right, jnp.float32)
    hard = np.asarray(negative.harden(edit, rtol=1e-5), float)
    norm = np.linalg.norm(np.asarray(edit, float))
    values = np.linalg.svd(hard, compute_uv=False)
    tails = [np.linalg.norm(values[r:]) - norm * np.sqrt(1 - r / 6) for r in range(7)]
    u, v = np.linalg.qr(left)[0], np.linalg.qr(right.T)[0]
    outside = np.linalg.norm(hard - u @ (u.T @ hard)) + np.linalg.norm(hard - hard @ v @ v.T)
    unit = EPS * norm
    return {
        "harden: norm / (eps norm)": abs(np.linalg.norm(hard) - norm) / unit,
        "harden: outside of its rows and columns / (eps norm)": outside / unit,
        "harden: tail at every rank from norm sqrt(1 - r/k) / (eps sqrt(k) norm)": max(
            np.abs(tails)
        )
        / (unit * np.sqrt(6)),
    }


def audits(rng: np.random.Generator) -> dict[str, float]:
    """The edit of the audited budget lands on the sphere, and 0.99 of it stays outside."""
    xs, avoid = [draw(rng), draw(rng)], draw(rng)
    mean = average.mean(xs)
    gap = tree.combine((1, -1), (mean, avoid))
    radius = 0.6 * float(tree.norm(gap))
    report = negative.audit(xs, (0.5, 0.5), avoid, radius)
    size = float(tree.norm(mean)) + float(tree.norm(avoid))
    landing, priced, inside = 0.0, 0.0, -np.inf
    for extra in (1, 4, 12):
        rank = int(report.pooled_rank_needed) + extra
        move = cone.entry(cone.PooledRank(rank), gap, radius)
        landed = lowrank.apply(mean, move.edit)
        away = np.linalg.norm(flat(landed) - flat(avoid))
        landing = max(landing, abs(away - radius) / (EPS * size))
        priced = max(priced, abs(float(move.norm - report.frobenius_budget[rank])) / (EPS * size))
        short = lowrank.apply(mean, lowrank.scale(0.99, move.edit))
        inside = max(inside, (radius - np.linalg.norm(flat(short) - flat(avoid))) / radius)
    return {
        "audit: entry edit of the budget's rank from the sphere / (eps size)": landing,
        "audit: its norm from the audited budget / (eps size)": priced,
        "audit: 0.99 of it, how far inside the ball / radius (negative: outside)": inside,
    }


def subspaces(rng: np.random.Generator) -> dict[str, float]:
    """Oblique erasure erases and keeps; rewrite is least squares of minimum norm."""
    x, erase, keep = draw(rng), [draw(rng) for _ in range(3)], [draw(rng) for _ in range(4)]
    y = flat(negative.erase_keeping(x, erase, keep, mode="oblique"))
    u, k = (np.stack([flat(d) / np.linalg.norm(flat(d)) for d in ds]) for ds in (erase, keep))
    q = np.linalg.qr(k.T)[0]
    span = np.linalg.qr(u.T)[0]
    amplification = 1 / np.linalg.svd(span - q @ (q.T @ span), compute_uv=False)[-1]
    unit = EPS * amplification * np.linalg.norm(flat(x))
    w, keys, values, kept = (
        rng.normal(size=s).astype(np.float32) for s in ((23, 17), (4, 23), (4, 17), (9, 23))
    )
    new = np.asarray(negative.rewrite(w, keys, values, keep=kept), float)
    system = np.concatenate([keys, kept]).astype(float)
    right = np.concatenate([values.astype(float) - keys.astype(float) @ w, np.zeros((9, 17))])
    best = w + np.linalg.lstsq(system, right, rcond=None)[0]
    size = np.linalg.cond(system) * (np.linalg.norm(w) + np.linalg.norm(best - w))
    return {
        "oblique erasure: left along erase / (eps amplification |x|)": np.linalg.norm(u @ y) / unit,
        "oblique erasure: changed along keep / (eps amplification |x|)": np.linalg.norm(
            k @ (y - flat(x))
        )
        / unit,
        "rewrite: from numpy's lstsq / (eps cond size)": np.linalg.norm(new - best) / (EPS * size),
    }


def chains(rng: np.random.Generator) -> dict[str, float]:
    """The chain bound: never broken, and how loose it is."""
    loose = {}
    for depth in (1, 2, 4):
        w = [rng.normal(size=(12, 12)) / 3.5 for _ in range(depth)]
        u = [0.1 * rng.normal(size=(12, 12)) / 3.5 for _ in range(depth)]
        as32 = [[jnp.asarray(m, jnp.float32) for m in ms] for ms in (w, u)]
        bound = float(negative.chain_bound(*as32))
        worst = 0.0
        for _ in range(200):
            a = b = rng.normal(size=12)
            a = b = a / np.linalg.norm(a)
            for m, d in zip(w, u, strict=True):
                a, b = np.maximum(a @ m, 0), np.maximum(b @ (m + d), 0)
            worst = max(worst, np.linalg.norm(b - a))
        loose[f"chain bound, {depth} ReLU layers: largest change of 200 inputs / bound"] = (
            worst / bound
        )
    return loose


def speed(rng: np.random.Generator) -> None:
    """Time and memory of the audit of two trees of 100 matrices 512 x 512."""

    def large() -> dict[str, jax.Array]:
        shape = (512, 512)
        return {f"w{i}": jnp.asarray(rng.normal(size=shape), jnp.float32) for i in range(100)}

    xs, avoid = [large(), large()], large()
    before = resident()
    start = time.perf_counter()
    jax.block_until_ready(negative.audit(xs, (0.5, 0.5), avoid, 300.0))
    taken = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    inputs = 3 * 100
    print(f"{taken:10.3g}  audit of two trees of 100 matrices 512 x 512: seconds")
    print(f"{(peak - before + inputs) / 200:10.3g}  its peak memory, inputs included / two trees")


def resident() -> float:
    """Mebibytes in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def main() -> None:
    """Prints the worst figure of every law, and what the audit takes."""
    rng = np.random.default_rng(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
    speed(rng)
    for law in (guards, hardened, audits, subspaces, chains):
        worst: dict[str, float] = collections.defaultdict(lambda: -np.inf)
        for _ in range(DRAWS):
            for name, value in law(rng).items():
                worst[name] = max(worst[name], value)
        for name, value in worst.items():
            print(f"{value:10.3g}  {name}")


if __name__ == "__main__":
    main()
