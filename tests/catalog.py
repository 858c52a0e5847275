"""Every public function, callable on trees of weights alone. `test_api.py` holds it complete."""

import jax
import jax.numpy as jnp

from wspace import (
    average,
    cone,
    geometry,
    interpolate,
    lowrank,
    merge,
    negative,
    perturb,
    selection,
    tree,
)


def allow():
    """Where two points of the layout of `test_transforms` may move: a projector, and scalars."""
    half = jnp.diag(jnp.asarray([1.0, 0.0] * 8, jnp.float32))
    projector = jnp.diag(jnp.asarray([1.0] * 8 + [0.0] * 8, jnp.float32))
    return [
        {"w": projector, "b": [1.0, 0.0], "s": 1.0, "k": 1.0},
        {"w": jnp.eye(16, dtype=jnp.float32) / 2, "b": [0.0, 1.0], "s": jnp.eye(8), "k": half},
    ]


def thin(x):
    """An edit with factors at one leaf, cut from that leaf of the layout."""
    return x | {"k": lowrank.LowRank(x["k"][:, 0, :, 0], x["k"][:, 0, :, 1])}


def thick(x):
    """The same edit with that leaf multiplied out, as a list."""
    return [lowrank.materialize(x["k"]), x["w"], x["s"]]


def in_space(function, x, y):
    """The difference of two edits by way of coordinates, the factored leaf multiplied out."""
    return thick(function(merge.task_arithmetic, (thin(x), thin(y)), (1.5, -0.7)))


def masked(x):
    """Every other entry of a tree, and all of its vectors."""
    return {"w": x["w"] > 0, "b": [True, False], "s": True, "k": x["k"] > 0}


def directed(x):
    """A tree of unit length."""
    x = tree.upcast(x)
    return tree.combine((1 / tree.norm(x),), (x,))


def sides():
    """A subspace of the layout of `test_transforms`, by sides."""
    half = jnp.eye(8, 3, dtype=jnp.float32)
    turned = jnp.asarray([[0.6], [0.8], [0.0]], jnp.float32)
    return negative.Sides(
        rows={"w": jnp.eye(16, 5, dtype=jnp.float32), "b": [1.0, 0.0], "s": half, "k": 1.0},
        columns={"w": jnp.eye(4, 2), "b": [1.0, 1.0], "s": 1.0, "k": turned},
    )


def metric():
    """The inverse of a metric for the layout of `test_transforms`."""
    spread = jnp.diag(jnp.arange(1.0, 9))
    return {"w": jnp.eye(16) + 1, "b": [2.0, 1.0], "s": spread, "k": 0.5}


def rewritten(x):
    """A matrix with two of its own columns as keys, and the others as keys to keep."""
    keys = jnp.swapaxes(x["w"], 0, 1)
    return [negative.rewrite(x["w"], keys[:2], jnp.eye(2, 4), keep=keys[2:])]


def squares(x):
    """A tree of the same layout without negative entries."""
    return jax.tree.map(jnp.square, tree.upcast(x))


def grams():
    """Gram matrices of the inputs of two points of the layout of `test_transforms`."""
    spread = jnp.diag(jnp.arange(1.0, 9))
    return [
        {"w": jnp.eye(16) + 1, "b": [None, None], "s": spread, "k": None},
        {"w": jnp.eye(16), "b": [None, None], "s": spread + 1, "k": None},
    ]


def factors():
    """Kronecker factors for the same points."""
    rest = {"w": None, "b": [None, None], "k": None}
    left, right = jnp.diag(jnp.arange(1.0, 9)), jnp.eye(3)
    return [
        rest | {"s": average.Kronecker(left + 1, right)},
        rest | {"s": average.Kronecker(left, right + 1)},
    ]


def streamed(run, *points):
    """An average of a stream of points."""
    state = run.init(points[0])
    for x in points:
        state = run.update(state, x)
    return run.value(state)


def profiles():
    """Profiles of two snapshots, and that of an average put together from them."""
    return [average.Profile(100, 2.0), average.Profile(200, 5.0)], average.Profile(200, 3.0)


def says(x):
    """A readout: a number that depends on every entry of a tree, not linearly."""
    return tree.vdot(x, jax.tree.map(jnp.tanh, x))


def halved(x):
    """A chain of two layers, and edits of them."""
    half = x["w"] / 2
    return [x["w"], x["w"].T], [half, half.T]


def signs_of(x):
    """A tree of signs."""
    return jax.tree.map(jnp.sign, x)


def split(x):
    """The parts of one matrix that two points take, added to it."""
    return [lowrank.apply(x["w"], e) for e in negative.split_rank(x["w"], (0.3, 0.7), (4, 4))]


CATALOG = {
    "average.ema": (3, lambda *points: streamed(average.ema(0.3), *points)),
    "average.fisher_mean": (
        3,
        lambda x, y, z: average.fisher_mean([x, y], [squares(y), squares(z)], (1.0, 0.7)),
    ),
    "average.kronecker_mean": (2, lambda x, y: average.kronecker_mean([x, y], factors()).weights),
    "average.geometric_median": (
        3,
        lambda *points: average.geometric_median(points, (1.0, 0.7, 0.8)).weights,
    ),
    "average.karcher_mean": (
        3,
        lambda *points: average.karcher_mean(points, (1.0, 0.7, -0.3)).weights,
    ),
    "average.karcher_mean, equal": (3, lambda *points: average.karcher_mean(points).weights),
    "average.mean": (3, lambda *points: average.mean(points, (1.0, 0.7, -0.3))),
    "average.model_stock": (3, lambda base, *points: average.model_stock(base, points, floor=-1.0)),
    "average.model_stock, row": (
        3,
        lambda base, *points: average.model_stock(base, points, scope="row"),
    ),
    "average.power_ema": (3, lambda *points: streamed(average.power_ema(2.0), *points)),
    "average.reconstruct": (2, lambda x, y: average.reconstruct([x, y], *profiles()).weights),
    "average.regression_mean": (2, lambda x, y: average.regression_mean([x, y], grams()).weights),
    "average.running_mean": (3, lambda *points: streamed(average.running_mean(), *points)),
    "average.window": (3, lambda *points: streamed(average.window(2), *points)),
    "cone.entry": (1, lambda x: cone.entry(cone.PooledRank(3), x, 17.0).norm),
    "cone.exit": (1, lambda x: cone.exit(cone.Rank(1), x, 40.0).norm),
    "cone.nuclear_entry": (1, lambda x: cone.nuclear_entry(x, 9.0).norm),
    "cone.project": (1, lambda x: cone.project(cone.Sparse(9), x).edit),
    "cone.project, Mask": (1, lambda x: cone.project(cone.Mask(masked(x)), x).edit),
    "cone.project, Subspace": (2, lambda x, y: cone.project(cone.Subspace([directed(y)]), x).edit),
    "cone.project_capped": (1, lambda x: cone.project_capped(x, 2, 3.0).tail),
    "cone.reach": (1, lambda x: cone.reach(cone.PooledRank(3), x, 2.0)),
    "cone.spectral_entry": (1, lambda x: cone.spectral_entry(x, 3.0)[1:]),
    "cone.support": (1, lambda x: cone.support(cone.Rank(2), x, 2.0)),
    "geometry.angle": (2, geometry.angle),
    "geometry.coordinates": (3, lambda x, *points: geometry.coordinates(x, points)),
    "geometry.cosine": (2, geometry.cosine),
    "geometry.distance": (2, geometry.distance),
    "geometry.gram": (2, lambda *points: geometry.gram(points)),
    "geometry.orthonormalize": (2, lambda *points: geometry.orthonormalize(points)),
    "geometry.principal_angles": (3, lambda x, y, z: geometry.principal_angles([x, y], [z])),
    "geometry.project": (2, lambda x, q: geometry.project(x, [q])),
    "interpolate.bezier": (3, lambda *points: interpolate.bezier(points, 0.3)),
    "interpolate.lerp": (2, lambda start, end: interpolate.lerp(start, end, 0.3)),
    "interpolate.polygonal_chain": (3, lambda *points: interpolate.polygonal_chain(points, 0.3)),
    "interpolate.slerp": (2, lambda start, end: interpolate.slerp(start, end, 0.3)),
    "lowrank.add": (2, lowrank.add),
    "lowrank.apply": (2, lowrank.apply),
    "lowrank.combine": (2, lambda x, y: lowrank.combine((2.0, -0.5), (x, y))),
    "lowrank.combine, factored": (
        2,
        lambda x, y: thick(lowrank.combine((2.0, -0.5), (thin(x), thin(y)))),
    ),
    "lowrank.effective_rank": (
        1,
        lambda x: [lowrank.effective_rank(leaf) for leaf in jax.tree.leaves(x)],
    ),
    "lowrank.extract": (2, lambda x, y: lowrank.apply(x, lowrank.extract(x, y, 1).factors)),
    "lowrank.norm": (1, lowrank.norm),
    "lowrank.norm, factored": (1, lambda x: lowrank.norm(thin(x))),
    "lowrank.scale": (1, lambda x: lowrank.scale(-0.7, x)),
    "lowrank.singular_values": (
        1,
        lambda x: [lowrank.singular_values(leaf) for leaf in jax.tree.leaves(x)],
    ),
    "lowrank.stable_rank": (
        1,
        lambda x: [lowrank.stable_rank(leaf) for leaf in jax.tree.leaves(x)],
    ),
    "lowrank.truncate": (1, lambda x: lowrank.truncate(x["w"], 2).tail),
    "lowrank.truncate, randomized": (
        1,
        lambda x: (
            lowrank.truncate(x["w"], 1, method="randomized", key=jax.random.key(0), steps=2).tail
        ),
    ),
    "lowrank.truncate_outputs": (
        1,
        lambda x: lowrank.truncate_outputs(x["w"], jnp.swapaxes(x["w"], 0, 1), 2).tail,
    ),
    "lowrank.vdot": (2, lowrank.vdot),
    "lowrank.vdot, factored": (2, lambda x, y: lowrank.vdot(thin(x), thin(y))),
    "merge.band": (1, lambda x: merge.band(x, 0.4, 0.1)),
    "merge.arcee_fusion": (2, merge.arcee_fusion),
    "merge.breadcrumbs": (
        3,
        lambda base, *xs: merge.breadcrumbs(base, xs, (1.5, -0.7), density=0.4, outliers=0.1),
    ),
    "merge.breadcrumbs_ties": (
        3,
        lambda base, *xs: merge.breadcrumbs_ties(base, xs, density=0.4, outliers=0.1),
    ),
    "merge.cancellation": (2, lambda *edits: merge.cancellation(edits)),
    "merge.cosines": (2, lambda *edits: merge.cosines(edits)),
    "merge.cosines, factored": (2, lambda x, y: merge.cosines((thin(x), thin(y)))),
    "merge.dare": (3, lambda base, *xs: merge.dare(jax.random.key(0), base, xs, (1.5, -0.7))),
    "merge.dare_ties": (
        3,
        lambda base, *xs: merge.dare_ties(jax.random.key(0), base, xs, (1.5, -0.7)),
    ),
    "merge.della": (3, lambda base, *xs: merge.della(jax.random.key(0), base, xs, (1.5, -0.7))),
    "merge.disjoint_merge": (3, lambda signs, *xs: merge.disjoint_merge(xs, signs_of(signs))),
    "merge.drop": (1, lambda x: merge.drop(jax.random.key(0), x, 0.4)),
    "merge.elect": (3, lambda *edits: merge.elect(edits, (1.5, -0.7, 0.2))),
    "merge.emr": (3, lambda base, *tuned: merge.emr(base, tuned)[::2]),
    "merge.emr_model": (
        3,
        lambda base, *tuned: merge.emr_model(base, merge.emr(base, tuned), 1),
    ),
    "merge.ext_sub": (3, lambda base, x, y: merge.ext_sub(base, x, y, 0.7)),
    "merge.gram": (2, lambda *edits: merge.gram(edits)),
    "merge.gram, factored": (2, lambda x, y: merge.gram((thin(x), thin(y)))),
    "merge.in_core_space": (2, lambda x, y: in_space(merge.in_core_space, x, y)),
    "merge.in_shared_space": (2, lambda x, y: in_space(merge.in_shared_space, x, y)),
    "merge.iso_c": (3, lambda base, *tuned: merge.iso_c(base, tuned, (1.5, -0.7)).weights),
    "merge.iso_cts": (3, lambda base, *tuned: merge.iso_cts(base, tuned, common=0.4).weights),
    "merge.knots": (3, lambda base, *tuned: merge.knots(base, tuned, (1.5, -0.7))),
    "merge.lines": (
        1,
        lambda x: merge.lines(x, {"w": 0, "b": [1, 2], "s": 3, "k": None}, start=0.5, rise=0.7),
    ),
    "merge.magmax": (3, lambda base, *tuned: merge.magmax(base, tuned, (1.5, -0.7))),
    "merge.magprune": (1, lambda x: merge.magprune(jax.random.key(0), x, 0.5, width=0.2)),
    "merge.nearswap": (2, lambda base, tuned: merge.nearswap(base, tuned, 0.7)),
    "merge.negmerge": (3, lambda base, *tuned: merge.negmerge(base, tuned, 0.7)),
    "merge.overlap": (2, lambda *edits: merge.overlap(edits)),
    "merge.pcb": (3, lambda base, *tuned: merge.pcb(base, tuned, density=0.5)),
    "merge.ram": (3, lambda base, *tuned: merge.ram(base, tuned, threshold=0.2, boost=0.1)),
    "merge.sce": (3, lambda base, *tuned: merge.sce(base, tuned, density=0.5)),
    "merge.sign_conflict": (2, lambda *edits: merge.sign_conflict(edits)),
    "merge.sign_disagreement": (3, lambda *edits: merge.sign_disagreement(edits)),
    "merge.singular_interference": (
        2,
        lambda *edits: merge.singular_interference(edits, rank=2),
    ),
    "merge.tall_mask": (
        2,
        lambda x, y: [m.astype(jnp.float32) for m in jax.tree.leaves(merge.tall_mask(x, y, 0.7))],
    ),
    "merge.task_arithmetic": (
        3,
        lambda base, *tuned: merge.task_arithmetic(base, tuned, (1.5, -0.7)),
    ),
    "merge.task_vector": (2, merge.task_vector),
    "merge.ties": (3, lambda base, *tuned: merge.ties(base, tuned, (1.5, -0.7), density=0.4)),
    "merge.trim": (1, lambda x: merge.trim(x, 0.3)),
    "merge.trim, row": (1, lambda x: merge.trim(x, 0.5, scope="row")),
    "merge.tsv_m": (3, lambda base, *tuned: merge.tsv_m(base, tuned, (1.5, -0.7)).weights),
    "negative.attenuate": (
        3,
        lambda x, y, c: negative.attenuate(x, [directed(y)], 1.3, center=c),
    ),
    "negative.attenuate, Sides": (2, lambda x, c: negative.attenuate(x, sides(), 1.3, center=c)),
    "negative.chain_bound": (1, lambda x: negative.chain_bound(*halved(x))),
    "negative.curve": (2, negative.curve),
    "negative.erase_keeping": (3, lambda x, u, k: negative.erase_keeping(x, [u], [k])),
    "negative.erase_keeping, oblique": (
        3,
        lambda x, u, k: negative.erase_keeping(
            x, [u], [k], mode="oblique", inverse_metric=metric()
        ),
    ),
    "negative.exit_ball": (
        3,
        lambda x, y, avoid: negative.exit_ball([x, y], (0.6, 0.4), avoid, 40.0, costs=(1.0, 2.0)),
    ),
    "negative.exit_ball, direction": (
        3,
        lambda x, y, direction: negative.exit_ball(
            [x, y], (0.6, 0.4), x, 40.0, direction=direction, allow=allow()
        ),
    ),
    "negative.gate": (2, lambda x, y: negative.gate(x, y, y, 1e3)),
    "negative.exit_ball, cone": (
        3,
        lambda x, y, avoid: negative.exit_ball(
            [x, y], (0.6, 0.4), avoid, 40.0, cone=cone.Sparse(30)
        ),
    ),
    "negative.guard_hull": (
        3,
        lambda x, y, avoid: negative.guard_hull([x, y], avoid, 40.0, costs=(1.0, 2.0)),
    ),
    "negative.guard_hull, affine": (
        3,
        lambda x, y, normal: negative.guard_hull(
            [x, y], x, 40.0, normal=normal, mode="affine", allow=allow()
        ),
    ),
    "negative.guard_normal": (
        3,
        lambda x, y, avoid: negative.guard_normal([x, y], avoid, 40.0, steps=2).weights,
    ),
    "negative.guide": (3, lambda x, y, z: negative.guide(x, y, z, 1.5)),
    "negative.guide_perpendicular": (
        3,
        lambda x, y, z: negative.guide_perpendicular(x, y, z, 1.5, 0.7),
    ),
    "negative.harden": (1, negative.harden),
    "negative.linear_bound": (
        1,
        lambda x: negative.linear_bound(says, x, cone.Mask(masked(x)), 2.0, curvature=1.0)[::2],
    ),
    "negative.offset": (2, lambda x, y: lowrank.apply(x, negative.offset(x, y, 1).factors)),
    "negative.rank_to_reach": (2, lambda x, y: negative.rank_to_reach(x, y, 4.0)),
    "negative.remove_member": (2, lambda x, y: negative.remove_member(x, y, 0.3)),
    "negative.repel": (2, lambda x, y: negative.repel(x, y, 0.7)),
    "negative.repel, allow": (2, lambda x, y: negative.repel(x, y, 0.7, allow=allow()[0])),
    "negative.retarget": (
        3,
        lambda x, y, target: negative.retarget([x, y], (0.6, 0.4), target, costs=(1.0, 2.0)),
    ),
    "negative.retarget, allow": (
        3,
        lambda x, y, target: negative.retarget([x, y], (0.6, 0.4), target, allow=allow()),
    ),
    "negative.rewrite": (1, rewritten),
    "negative.route": (2, lambda x, y: negative.route(x, {"y": y}, 2, radius=1.0)),
    "negative.size_to_change": (
        1,
        lambda x: negative.size_to_change(says, x, cone.PooledRank(3), 2.0, curvature=1.0),
    ),
    "negative.split_rank": (1, split),
    "perturb.filter_normalize": (2, perturb.filter_normalize),
    "perturb.gaussian": (1, lambda like: perturb.gaussian(jax.random.key(0), like)),
    "perturb.gaussian, norm": (1, lambda like: perturb.gaussian(jax.random.key(0), like, norm=2.0)),
    "perturb.low_rank_gaussian": (
        1,
        lambda like: lowrank.apply(
            like, perturb.low_rank_gaussian(jax.random.key(0), like, 2, norm=2.0)
        ),
    ),
    "selection.kth_magnitude": (1, lambda x: selection.kth_magnitude(x, 30)),
    "selection.top_mask": (
        1,
        lambda x: [m.astype(jnp.float32) for m in jax.tree.leaves(selection.top_mask(x, 30))],
    ),
    "tree.cast_like": (2, tree.cast_like),
    "tree.combine": (2, lambda x, y: tree.combine((2.0, -0.5), (x, y))),
    "tree.norm": (1, tree.norm),
    "tree.per_leaf": (2, tree.per_leaf(lambda x, y: interpolate.lerp(x, y, 0.3))),
    "tree.upcast": (1, tree.upcast),
    "tree.vdot": (2, tree.vdot),
}
"""By name, and the case where a function has several: how many trees it takes, and the function."""

COMPOSED = {
    "average.ema",
    "average.geometric_median",
    "average.karcher_mean",
    "average.karcher_mean, equal",
    "average.kronecker_mean",
    "average.model_stock, row",
    "average.power_ema",
    "average.reconstruct",
    "average.window",
    "merge.band",
    "merge.arcee_fusion",
    "merge.breadcrumbs",
    "merge.breadcrumbs_ties",
    "merge.cancellation",
    "merge.cosines",
    "merge.cosines, factored",
    "merge.dare",
    "merge.dare_ties",
    "merge.della",
    "merge.emr",
    "merge.emr_model",
    "merge.ext_sub",
    "merge.gram",
    "merge.gram, factored",
    "merge.in_core_space",
    "merge.in_shared_space",
    "merge.iso_c",
    "merge.iso_cts",
    "merge.knots",
    "merge.lines",
    "merge.magmax",
    "merge.magprune",
    "merge.nearswap",
    "merge.negmerge",
    "merge.overlap",
    "merge.pcb",
    "merge.ram",
    "merge.sce",
    "merge.sign_conflict",
    "merge.sign_disagreement",
    "merge.singular_interference",
    "merge.tall_mask",
    "merge.trim, row",
}
"""Functions made of parts that are here or below them: every part has all laws of transformations,
and of these the compiled form, the rounding of half precision and the refusals are tested, since
what is left, differentiating and spreading them over devices, is most of the compilation."""

NOT_ON_TREES = {
    "average.Average": "a record",
    "average.Kronecker": "a record",
    "average.Profile": "a record",
    "average.Reconstruction": "a record",
    "average.Regression": "a record",
    "average.exponent_of": "acts on a number; laws in test_posthoc.py",
    "average.karcher_mean_on": "acts on an exponential; laws in test_karcher.py",
    "average.width_of": "acts on a number; laws in test_posthoc.py",
    "cone.Cone": "a protocol; laws in test_cone.py",
    "cone.Mask": "a record",
    "cone.Move": "a record",
    "cone.PooledRank": "a record",
    "cone.Projection": "a record",
    "cone.Rank": "a record",
    "cone.Sparse": "a record",
    "cone.SpectralMove": "a record",
    "cone.Subspace": "a record",
    "fit.Away": "a record",
    "fit.Fit": "a record",
    "fit.History": "a record",
    "fit.KeyedLoss": "a type",
    "fit.Learned": "a record",
    "fit.Progress": "a type",
    "fit.Weightings": "a type",
    "fit.adapt": "trains on a loss; laws in test_fit.py",
    "fit.ascent": "makes a penalty; laws in test_guard.py",
    "fit.clipped": "makes a penalty; laws in test_guard.py",
    "fit.coefficients": "trains on a loss; laws in test_learning.py",
    "fit.entropy": "makes a penalty; laws in test_guard.py",
    "fit.guard": "trains on losses; laws in test_guard.py",
    "fit.hinge": "makes a penalty; laws in test_guard.py",
    "fit.invert": "trains on a loss; laws in test_invert.py",
    "fit.npo": "makes a penalty; laws in test_guard.py",
    "geometry.Coordinates": "a record",
    "lowrank.LowRank": "a record",
    "lowrank.Truncation": "a record",
    "lowrank.as_matrix": "acts on one leaf; laws in test_lowrank.py",
    "lowrank.from_lora": "acts on factors; laws in test_lora.py",
    "lowrank.rank_for": "acts on singular values; laws in test_truncation.py",
    "lowrank.materialize": "acts on factors; laws in test_lowrank.py",
    "lowrank.to_lora": "acts on factors; laws in test_lora.py",
    "merge.Report": "a record",
    "merge.SpectralMerge": "a record",
    "merge.Tally": "a record",
    "merge.Unified": "a record",
    "merge.consensus_mask": "acts on masks; laws in test_masks.py",
    "merge.report": "a report; laws in test_merge_report.py",
    "negative.Audit": "a record",
    "negative.audit": "a report; transformations in test_audit.py",
    "negative.LeafAudit": "a record",
    "negative.OutputBound": "a record",
    "negative.Route": "a record",
    "negative.Sides": "a record",
    "negative.damped_inputs": "acts on activations; laws in test_allowance.py",
    "negative.free_inputs": "acts on activations; laws in test_allowance.py",
    "negative.strength_of": "acts on a number; laws in test_homothety.py",
    "plot.audit": "draws; tests in test_plot.py",
    "soup.Grid": "a record",
    "soup.Soup": "a record",
    "soup.greedy_soup": "chooses by a score; laws in test_soup.py",
    "soup.grid": "chooses by a score; laws in test_soup.py",
    "soup.simplex": "returns coefficients; laws in test_soup.py",
    "tree.elementwise": "acts on a formula; tree.combine is one",
    "tree.join": "moves leaves; laws in test_tree.py",
    "tree.partition": "moves leaves; laws in test_tree.py",
    "tree.split_key_like": "returns keys; laws in test_tree.py",
}
"""What the laws of transformations do not speak of, and why."""
