"""The three acts: every figure of the demo, computed with the public functions of wspace."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from wspace import average, geometry, interpolate, lowrank, negative, tree
from wspace._demo import digits
from wspace._demo.digits import Digits
from wspace.typing import Matrix, Weights

Points: TypeAlias = dict[str, Weights]
Figures: TypeAlias = dict[str, Any]

HALVES = ("low", "high", "all")
EQUAL = (0.5, 0.5)
POSITIONS = np.linspace(-0.5, 1.5, 41)
NEGATIVE_WEIGHTS = (0.0, 0.25, 0.5, 0.75)
SHIFT = 0.35  # how far the average is moved, in norms of the average
UNUSED = 1e-2  # inputs below this share of the largest singular value are free
LAST = f"{digits.LAYERS[-1]}.weight"
RANKS = (*range(13), 16, 32, 64, 128, 256)


def models(seed: int) -> tuple[Points, Digits, Digits]:
    """Trains the networks, all but one from one initialization; also the digits."""
    names = ("split", "base", "other base", "A", "C", "P", "other C")
    keys = dict(zip(names, jax.random.split(jax.random.key(seed), len(names)), strict=True))
    training, held_out = digits.load(keys["split"])
    base, other = (digits.initial(keys[name]) for name in ("base", "other base"))
    low, every = training.low, jnp.ones_like(training.low)
    points = {
        "base": base,
        "A": digits.train(keys["A"], base, training, low),
        "C": digits.train(keys["C"], base, training, ~low),
        "P": digits.train(keys["P"], base, training, every),
        "C_other_base": digits.train(keys["other C"], other, training, ~low),
    }
    return points, training, held_out


def read(weights: Weights, held_out: Digits) -> dict[str, float]:
    """The accuracy on each half of the digits and on all."""
    return dict(zip(HALVES, digits.accuracy(weights, held_out).tolist(), strict=True))


def read_together(members: Sequence[Weights], held_out: Digits) -> dict[str, float]:
    """The accuracy of averaged outputs."""
    shares = digits.ensemble_accuracy(list(members), held_out)
    return dict(zip(HALVES, shares.tolist(), strict=True))


def sweep(start: Weights, end: Weights, held_out: Digits) -> list[list[float]]:
    """Position and accuracies along the straight line through two networks."""

    @jax.jit
    def along(positions):
        def at(t):
            return digits.accuracy(interpolate.lerp(start, end, t), held_out)

        return jax.lax.map(at, positions, batch_size=POSITIONS.size)

    shares = along(jnp.asarray(POSITIONS, jnp.float32))
    return [[t, *row] for t, row in zip(POSITIONS.tolist(), shares.tolist(), strict=True)]


def first(points: Points, held_out: Digits) -> Figures:
    """An average that no member is."""
    base, a, c = (points[name] for name in ("base", "A", "C"))
    points["B'"] = average.mean([a, c])
    strangers = [a, points["C_other_base"]]
    lengths = {
        f"{x} to {y}": geometry.distance(points[x], points[y])
        for x, y in (("base", "A"), ("base", "C"), ("A", "C"), ("A", "B'"), ("base", "B'"))
    }
    lengths["A to C of another base"] = geometry.distance(*strangers)
    lengths["norm of B'"] = tree.norm(points["B'"])
    edits = [tree.combine((1, -1), (x, base)) for x in (a, c)]
    reads = {name: read(points[name], held_out) for name in ("base", "A", "C", "B'")}
    angles = {"A, C from the origin": geometry.angle(a, c)}
    angles["A, C from the base"] = geometry.angle(*edits)
    return {
        "accuracy": reads,
        "points lost by B'": {
            "low": 100 * (reads["A"]["low"] - reads["B'"]["low"]),
            "high": 100 * (reads["C"]["high"] - reads["B'"]["high"]),
        },
        "distances": {name: float(x) for name, x in lengths.items()},
        "angles": {name: float(np.degrees(x)) for name, x in angles.items()},
        "sweep": sweep(a, c, held_out),
        "controls": {
            "P": read(points["P"], held_out),
            "C of another base": read(points["C_other_base"], held_out),
            "average of A and that C": read(average.mean(strangers), held_out),
            "outputs of A and C averaged": read_together([a, c], held_out),
        },
    }


def bare(points: Points, held_out: Digits) -> Figures:
    """A point P to avoid: one map with three names, and what moving the average asks."""
    a, c, middle, avoid = (points[name] for name in ("A", "C", "B'", "P"))
    apart = geometry.distance(middle, avoid)
    names, asks = [], []
    for weight in NEGATIVE_WEIGHTS:
        strength = negative.strength_of(weight)
        scale = 1 + strength
        moved = negative.repel(middle, avoid, strength)
        others = (
            average.mean([middle, avoid], [1, -weight]),
            negative.guide(avoid, middle, avoid, scale),
        )
        names.append(
            {
                "weight": weight,
                "strength": float(strength),
                "scale": float(scale),
                "distance": float(geometry.distance(moved, avoid)),
                "disagreement": max(float(geometry.distance(moved, x)) for x in others),
                **read(moved, held_out),
            }
        )
        if not weight:
            continue
        ways = {
            "repel each": [negative.repel(x, avoid, strength) for x in (a, c)],
            "retarget": negative.retarget([a, c], EQUAL, moved),
            "exit_ball": negative.exit_ball([a, c], EQUAL, avoid, scale * apart),
        }
        asks += [
            {"weight": weight, "way": way, **asked(points, pair, held_out)}
            for way, pair in ways.items()
        ]
    return {"distance": float(apart), "names": names, "asks": asks}


def asked(points: Points, pair: Sequence[Weights], held_out: Digits) -> Figures:
    """How far A, C and their average were moved, and what each then reads."""
    a, c = pair
    middle = average.mean(pair)
    before = points["A"], points["C"], points["B'"]
    shifts = [float(geometry.distance(x, y)) for x, y in zip((a, c, middle), before, strict=True)]
    old, new = (
        {
            "A": read(x, held_out)["low"],
            "C": read(y, held_out)["high"],
            "average": read(m, held_out)["all"],
        }
        for x, y, m in (before, (a, c, middle))
    )
    return {
        "moves": dict(zip(old, shifts, strict=True)),
        "reads": new,
        "points lost": {name: 100 * (old[name] - new[name]) for name in old},
        "loss of the average": float(digits.loss(middle, held_out)),
        "outputs averaged": read_together(pair, held_out)["all"],
    }


def free(weights: Weights, training: Digits, shown: Any) -> Weights:
    """Where a network may move: on the inputs that its own data almost never use."""
    entering = digits.activations(weights, training.images[shown])
    allowed: Weights = {f"{i}.bias": 0.0 for i in digits.LAYERS}
    for i, x in zip(digits.LAYERS, entering, strict=False):
        allowed[f"{i}.weight"] = negative.free_inputs(x, rtol=UNUSED)
    return allowed


def guarded(points: Points, training: Digits, held_out: Digits) -> Figures:
    """B' itself to avoid: A and C keep what they read, and their average stops reading."""
    a, c, middle = (points[name] for name in ("A", "C", "B'"))
    pair = [a, c]
    radius = SHIFT * tree.norm(middle)
    repelled = average.mean([negative.repel(x, middle, 1.0) for x in pair])
    try:
        negative.exit_ball(pair, EQUAL, middle, radius)
        refusal = ""
    except ValueError as error:
        refusal = str(error)

    uphill = jax.grad(digits.loss)(middle, training)
    allow = [free(a, training, training.low), free(c, training, ~training.low)]
    plain = negative.exit_ball(pair, EQUAL, middle, radius, direction=uphill, allow=allow)
    ways = {
        "nothing": pair,
        "everywhere": negative.exit_ball(pair, EQUAL, middle, radius, direction=uphill),
        "plain": plain,
        "hardened": hardened(pair, plain),
    }
    names = {"plain": ("A'", "C'", "R'"), "hardened": ("A'_hardened", "C'_hardened", "R'_hardened")}
    for way, (name_a, name_c, name_r) in names.items():
        points[name_a], points[name_c] = ways[way]
        points[name_r] = average.mean(ways[way])

    return {
        "accuracy": {name: read(points[name], held_out) for name in names["plain"]},
        "hardened": {name: read(points[name], held_out) for name in names["hardened"]},
        "guard": {
            "radius": float(radius),
            "repelled from itself": float(geometry.distance(repelled, middle)),
            "refusal": refusal,
            "free inputs": {
                name: [round(float(jnp.trace(p[f"{i}.weight"]))) for i in digits.LAYERS]
                for name, p in zip("AC", allow, strict=True)
            },
            "shift per layer": {
                way: [
                    float(geometry.distance(points[r][f"{i}.weight"], middle[f"{i}.weight"]))
                    for i in digits.LAYERS
                ]
                for way, (_, _, r) in names.items()
            },
            "rank in the last layer": {
                way: numerical_rank(points[r][LAST] - middle[LAST])
                for way, (_, _, r) in names.items()
            },
            "ways": {way: asked(points, moved, held_out) for way, moved in ways.items()},
        },
        "sweep_guarded": sweep(points["A'"], points["C'"], held_out),
    }


def numerical_rank(matrix: Matrix) -> int:
    """How many singular values stand above the rounding of the weights."""
    values = lowrank.singular_values(matrix)
    return int(jnp.sum(values > 1e-4 * values[0]))


def hardened(before: Sequence[Weights], after: Sequence[Weights]) -> list[Weights]:
    """The same guard with flat edits, scaled together so that the average moves as far."""
    edits = [tree.combine((1, -1), (y, x)) for x, y in zip(before, after, strict=True)]
    flat = [negative.harden(edit) for edit in edits]
    scale = tree.norm(average.mean(edits)) / tree.norm(average.mean(flat))
    return [tree.combine((1, scale), (x, edit)) for x, edit in zip(before, flat, strict=True)]


def steps(start: Weights, target: Weights, held_out: Digits) -> tuple[list[list[Any]], float]:
    """Rank, distance left and accuracies; and how far measured distances are from `curve`.

    Offsets add: the best of one more rank after the best of some is the best of their sum. So
    every row starts from the one before, and few ranks have to be compiled.
    """
    distances = negative.curve(start, target)
    rows, gap, point, reached = [], 0.0, start, 0
    for rank in RANKS:
        edit = negative.offset(point, target, rank - reached)
        point, reached = lowrank.apply(point, edit.factors), rank
        gap = max(gap, abs(float(geometry.distance(point, target) - distances[rank])))
        rows.append([rank, float(distances[rank]), *read(point, held_out).values()])
    return rows, gap


def held_to(rows: Sequence[Sequence[Any]], bound: float) -> int:
    """The largest rank up to which no row reads more than `bound` of all; -1 if there is none."""
    held = -1
    for rank, _, *shares in rows:
        if shares[-1] > bound:
            break
        held = int(rank)
    return held


def third(points: Points, results: Mapping[str, Any], held_out: Digits) -> Figures:
    """A low-rank term that moves R' on, towards B', A and P."""
    guards = {"plain": points["R'"], "hardened": points["R'_hardened"]}
    middle, bound = points["B'"], results["accuracy"]["B'"]["all"] / 2
    radius = results["guard"]["radius"]
    towards = {name: steps(start, middle, held_out) for name, start in guards.items()}
    routes = {name: steps(points["R'"], points[name], held_out) for name in ("A", "P")}

    def reach(r: float) -> dict[str, int]:
        found = {
            f"{name} to B'": negative.rank_to_reach(start, middle, r)
            for name, start in guards.items()
        }
        others = {name: points[name] for name in ("A", "P")}
        for name, way in negative.route(points["R'"], others, 0, radius=r).items():
            found[f"plain to {name}"] = way.rank_to_reach
        return {name: int(rank) for name, rank in found.items()}

    return {
        "ranks": {
            name: [[rank, distance, shares[-1]] for rank, distance, *shares in rows]
            for name, (rows, _) in towards.items()
        },
        "routes": {name: rows for name, (rows, _) in routes.items()},
        "largest gap to curve": max(gap for _, gap in (*towards.values(), *routes.values())),
        "holds_below": bound,
        "holds_to": {name: held_to(rows, bound) for name, (rows, _) in towards.items()},
        "rank_to_reach": [
            {"share": share, "radius": share * radius, "ranks": reach(share * radius)}
            for share in (0.5, 0.25, 0.1)
        ],
        "last layer alone": {
            name: read(start | {LAST: middle[LAST]}, held_out)["all"]
            for name, start in guards.items()
        },
    }


def plane(points: Points, held_out: Digits, size: int = 41) -> Figures:
    """The plane through A, C and R': accuracy on a grid, and where the points lie, from B'."""
    middle = points["B'"]

    def away(name: str) -> Weights:
        return tree.combine((1, -1), (points[name], middle))

    axes = geometry.orthonormalize([away("C"), away("R'")])
    places: dict[str, Any] = {}
    for name in ("A", "C", "B'", "A'", "C'", "R'"):
        x = away(name)
        inside = [float(tree.vdot(axis, x)) for axis in axes]
        places[name] = {
            "at": inside,
            "off": float(geometry.distance(x, tree.combine(inside, axes))),
        }
    radius = float(geometry.distance(points["R'"], middle))
    reach = 1.15 * max(radius, *(abs(u) for place in places.values() for u in place["at"]))
    ticks = np.linspace(-reach, reach, size)

    @jax.jit
    def grid(positions):
        def at(position):
            return digits.accuracy(tree.combine((1, *position), (middle, *axes)), held_out)[-1]

        return jax.lax.map(at, positions, batch_size=size)

    pairs = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    shares = grid(jnp.asarray(pairs, jnp.float32)).reshape(size, size)
    return {
        "ticks": ticks.tolist(),
        "accuracy": shares.tolist(),
        "points": places,
        "radius": radius,
    }
