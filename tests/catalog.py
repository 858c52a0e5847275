"""Every public function, callable on trees of weights alone. `test_api.py` holds it complete."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from tests.arguments import (
    allow,
    directed,
    factors,
    grams,
    masked,
    metric,
    sides,
    signs_of,
    squares,
)
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


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of trees, and which laws it has beside those of all functions.

    Attributes:
        name: The name of the public function, and after a comma the case where it has several.
        trees: How many trees it takes.
        function: The function.
        composed: Whether it is made of parts that are here or below them. Every part has all laws
            of transformations, and a function made of them the compiled form, the rounding of
            half precision and the refusals: what is left, differentiating and spreading over
            devices, is most of the compilation.
        derivatives: Whether it has some; a function that is composed has those of its parts.
        lazy: Whether on lazy leaves, whatever the layout, it returns lazy leaves.
        command: The arguments of `wspace merge` that do the same, with the places of the trees.
        peak: The most memory that an eager call on bfloat16 takes beside its arguments, in such
            trees: an edit in float32 is two. Projectors and metrics, which a case makes, count, and
            in the layout of the cases they are large.
    """

    name: str
    trees: int
    function: Callable
    composed: bool = False
    derivatives: bool = True
    lazy: bool = False
    command: str | None = None
    peak: float = dataclasses.field(kw_only=True)

    def __str__(self):
        return self.name


def thin(x):
    """An edit with factors at one leaf, cut from that leaf of the layout."""
    factors = (jnp.asarray(x["k"][:, 0, :, i]) for i in (0, 1))
    return x | {"k": lowrank.LowRank(*factors)}


def thick(x):
    """The same edit with that leaf multiplied out, as a list."""
    return [lowrank.materialize(x["k"]), x["w"], x["s"]]


def in_space(function, x, y):
    """The difference of two edits by way of coordinates, the factored leaf multiplied out."""
    return thick(function(merge.task_arithmetic, (thin(x), thin(y)), (1.5, -0.7)))


def rewritten(x):
    """A matrix with two of its own columns as keys, and the others as keys to keep."""
    keys = jnp.swapaxes(x["w"], 0, 1)
    return [negative.rewrite(x["w"], keys[:2], jnp.eye(2, 4), keep=keys[2:])]


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


def split(x):
    """The parts of one matrix that two points take, added to it."""
    return [lowrank.apply(x["w"], e) for e in negative.split_rank(x["w"], (0.3, 0.7), (4, 4))]


CONSTANTS = "allow", "directed", "factors", "grams", "metric", "sides", "signs_of", "squares"
"""What cases make of the layout or of their trees, beside what the function is given."""

CASES = (
    Case(
        "average.ema",
        3,
        lambda *points: streamed(average.ema(0.3), *points),
        peak=8.0,
        composed=True,
    ),
    Case(
        "average.fisher_mean",
        3,
        lambda x, y, z: average.fisher_mean([x, y], [squares(y), squares(z)], (1.0, 0.7)),
        peak=5.0,
    ),
    Case(
        "average.kronecker_mean",
        2,
        lambda x, y: average.kronecker_mean([x, y], factors()).weights,
        peak=11.2,
        composed=True,
    ),
    Case(
        "average.geometric_median",
        3,
        lambda *points: average.geometric_median(points, (1.0, 0.7, 0.8)).weights,
        peak=1.2,
        composed=True,
        command="median {0} {1} {2} --coefficients 1 0.7 0.8",
    ),
    Case(
        "average.karcher_mean",
        3,
        lambda *points: average.karcher_mean(points, (1.0, 0.7, -0.3)).weights,
        peak=1.1,
        composed=True,
        command="karcher {0} {1} {2} --coefficients 1 0.7 -0.3",
    ),
    Case(
        "average.karcher_mean, equal",
        3,
        lambda *points: average.karcher_mean(points).weights,
        peak=1.1,
        composed=True,
    ),
    Case(
        "average.mean",
        3,
        lambda *points: average.mean(points, (1.0, 0.7, -0.3)),
        peak=1.0,
        command="linear {0} {1} {2} --coefficients 1 0.7 -3e-1",
    ),
    Case(
        "average.model_stock",
        3,
        lambda base, *points: average.model_stock(base, points, floor=-1.0),
        peak=1.0,
        lazy=True,
        command="model-stock {1} {2} --base {0} --floor -1",
    ),
    Case(
        "average.model_stock, row",
        3,
        lambda base, *points: average.model_stock(base, points, scope="row"),
        peak=3.0,
        composed=True,
    ),
    Case(
        "average.power_ema",
        3,
        lambda *points: streamed(average.power_ema(2.0), *points),
        peak=8.0,
        composed=True,
    ),
    Case(
        "average.reconstruct",
        2,
        lambda x, y: average.reconstruct([x, y], *profiles()).weights,
        peak=1.0,
        composed=True,
    ),
    Case(
        "average.regression_mean",
        2,
        lambda x, y: average.regression_mean([x, y], grams()).weights,
        peak=19.6,
    ),
    Case(
        "average.running_mean",
        3,
        lambda *points: streamed(average.running_mean(), *points),
        peak=8.1,
    ),
    Case(
        "average.window",
        3,
        lambda *points: streamed(average.window(2), *points),
        peak=4.0,
        composed=True,
    ),
    Case("cone.entry", 1, lambda x: cone.entry(cone.PooledRank(3), x, 17.0).norm, peak=6.5),
    Case("cone.exit", 1, lambda x: cone.exit(cone.Rank(1), x, 40.0).norm, peak=3.9),
    Case("cone.nuclear_entry", 1, lambda x: cone.nuclear_entry(x, 9.0).norm, peak=5.6),
    Case("cone.project", 1, lambda x: cone.project(cone.Sparse(9), x).edit, peak=5.3),
    Case("cone.project, Mask", 1, lambda x: cone.project(cone.Mask(masked(x)), x).edit, peak=4.2),
    Case(
        "cone.project, Subspace",
        2,
        lambda x, y: cone.project(cone.Subspace([directed(y)]), x).edit,
        peak=6.1,
    ),
    Case("cone.project_capped", 1, lambda x: cone.project_capped(x, 2, 3.0).tail, peak=4.7),
    Case("cone.reach", 1, lambda x: cone.reach(cone.PooledRank(3), x, 2.0), peak=1.4),
    Case("cone.spectral_entry", 1, lambda x: cone.spectral_entry(x, 3.0)[1:], peak=5.6),
    Case("cone.support", 1, lambda x: cone.support(cone.Rank(2), x, 2.0), peak=1.4),
    Case("geometry.angle", 2, geometry.angle, peak=0.1),
    Case("geometry.coordinates", 3, lambda x, *points: geometry.coordinates(x, points), peak=0.1),
    Case("geometry.cosine", 2, geometry.cosine, peak=0.1),
    Case("geometry.distance", 2, geometry.distance, peak=0.0),
    Case("geometry.gram", 2, lambda *points: geometry.gram(points), peak=0.1),
    Case("geometry.orthonormalize", 2, lambda *points: geometry.orthonormalize(points), peak=6.0),
    Case(
        "geometry.principal_angles",
        3,
        lambda x, y, z: geometry.principal_angles([x, y], [z]),
        peak=10.1,
    ),
    Case("geometry.project", 2, lambda x, q: geometry.project(x, [q]), peak=1.0),
    Case("interpolate.bezier", 3, lambda *points: interpolate.bezier(points, 0.3), peak=1.0),
    Case(
        "interpolate.lerp",
        2,
        lambda start, end: interpolate.lerp(start, end, 0.3),
        peak=1.0,
        command="lerp {0} {1} --t 0.3",
    ),
    Case(
        "interpolate.polygonal_chain",
        3,
        lambda *points: interpolate.polygonal_chain(points, 0.3),
        peak=1.0,
    ),
    Case(
        "interpolate.slerp",
        2,
        lambda start, end: interpolate.slerp(start, end, 0.3),
        peak=1.0,
        lazy=True,
        command="slerp {0} {1} --t 0.3",
    ),
    Case("lowrank.add", 2, lowrank.add, peak=1.0),
    Case("lowrank.apply", 2, lowrank.apply, peak=1.0),
    Case("lowrank.combine", 2, lambda x, y: lowrank.combine((2.0, -0.5), (x, y)), peak=1.0),
    Case(
        "lowrank.combine, factored",
        2,
        lambda x, y: thick(lowrank.combine((2.0, -0.5), (thin(x), thin(y)))),
        peak=1.9,
    ),
    Case(
        "lowrank.effective_rank",
        1,
        lambda x: [lowrank.effective_rank(leaf) for leaf in jax.tree.leaves(x)],
        peak=1.4,
    ),
    Case(
        "lowrank.extract",
        2,
        lambda x, y: lowrank.apply(x, lowrank.extract(x, y, 1).factors),
        peak=4.6,
    ),
    Case("lowrank.norm", 1, lowrank.norm, peak=0.1),
    Case("lowrank.norm, factored", 1, lambda x: lowrank.norm(thin(x)), peak=0.6),
    Case("lowrank.scale", 1, lambda x: lowrank.scale(-0.7, x), peak=1.0),
    Case(
        "lowrank.singular_values",
        1,
        lambda x: [lowrank.singular_values(leaf) for leaf in jax.tree.leaves(x)],
        peak=1.4,
    ),
    Case(
        "lowrank.stable_rank",
        1,
        lambda x: [lowrank.stable_rank(leaf) for leaf in jax.tree.leaves(x)],
        peak=1.4,
    ),
    Case("lowrank.truncate", 1, lambda x: lowrank.truncate(x["w"], 2).tail, peak=1.2),
    Case(
        "lowrank.truncate, tree",
        1,
        lambda x: lowrank.truncate(thin(x), 1).tail,
        peak=4.0,
        composed=True,
    ),
    Case(
        "lowrank.truncate, randomized",
        1,
        lambda x: (
            lowrank.truncate(x["w"], 1, method="randomized", key=jax.random.key(0), steps=2).tail
        ),
        peak=0.6,
    ),
    Case(
        "lowrank.truncate_outputs",
        1,
        lambda x: lowrank.truncate_outputs(x["w"], jnp.swapaxes(x["w"], 0, 1), 2).tail,
        peak=1.1,
    ),
    Case("lowrank.vdot", 2, lowrank.vdot, peak=0.0),
    Case("lowrank.vdot, factored", 2, lambda x, y: lowrank.vdot(thin(x), thin(y)), peak=0.8),
    Case("merge.band", 1, lambda x: merge.band(x, 0.4, 0.1), peak=3.8, composed=True),
    Case(
        "merge.arcee_fusion",
        2,
        merge.arcee_fusion,
        peak=3.1,
        composed=True,
        command="arcee_fusion {1} --base {0}",
    ),
    Case(
        "merge.breadcrumbs",
        3,
        lambda base, *xs: merge.breadcrumbs(base, xs, (1.5, -0.7), density=0.4, outliers=0.1),
        peak=9.8,
        composed=True,
        command="breadcrumbs {1} {2} --base {0} --coefficients 1.5 -0.7 --density 0.4"
        " --outliers 0.1",
    ),
    Case(
        "merge.breadcrumbs_ties",
        3,
        lambda base, *xs: merge.breadcrumbs_ties(base, xs, density=0.4, outliers=0.1),
        peak=9.8,
        composed=True,
        command="breadcrumbs_ties {1} {2} --base {0} --density 0.4 --outliers 0.1",
    ),
    Case(
        "merge.cancellation", 2, lambda *edits: merge.cancellation(edits), peak=0.0, composed=True
    ),
    Case("merge.cosines", 2, lambda *edits: merge.cosines(edits), peak=0.1, composed=True),
    Case(
        "merge.cosines, factored",
        2,
        lambda x, y: merge.cosines((thin(x), thin(y))),
        peak=7.1,
        composed=True,
    ),
    Case(
        "merge.dare",
        3,
        lambda base, *xs: merge.dare(jax.random.key(0), base, xs, (1.5, -0.7)),
        peak=8.1,
        composed=True,
        lazy=True,
        command="dare {1} {2} --base {0} --coefficients 1.5 -0.7 --seed 0",
    ),
    Case(
        "merge.dare_ties",
        3,
        lambda base, *xs: merge.dare_ties(jax.random.key(0), base, xs, (1.5, -0.7)),
        peak=8.1,
        composed=True,
        command="dare_ties {1} {2} --base {0} --coefficients 1.5 -0.7 --seed 0",
    ),
    Case(
        "merge.della",
        3,
        lambda base, *xs: merge.della(jax.random.key(0), base, xs, (1.5, -0.7)),
        peak=8.1,
        composed=True,
        command="della {1} {2} --base {0} --coefficients 1.5 -0.7 --seed 0",
    ),
    Case(
        "merge.disjoint_merge",
        3,
        lambda signs, *xs: merge.disjoint_merge(xs, signs_of(signs)),
        peak=2.0,
    ),
    Case("merge.drop", 1, lambda x: merge.drop(jax.random.key(0), x, 0.4), peak=1.1),
    Case("merge.elect", 3, lambda *edits: merge.elect(edits, (1.5, -0.7, 0.2)), peak=1.0),
    Case(
        "merge.emr", 3, lambda base, *tuned: merge.emr(base, tuned)[::2], peak=11.1, composed=True
    ),
    Case(
        "merge.emr_model",
        3,
        lambda base, *tuned: merge.emr_model(base, merge.emr(base, tuned), 1),
        peak=11.1,
        composed=True,
    ),
    Case(
        "merge.ext_sub",
        3,
        lambda base, x, y: merge.ext_sub(base, x, y, 0.7),
        peak=1.0,
        composed=True,
        command="ext_sub {1} --base {0} --avoid {2} --strength 0.7",
    ),
    Case("merge.gram", 2, lambda *edits: merge.gram(edits), peak=0.1, composed=True),
    Case(
        "merge.gram, factored",
        2,
        lambda x, y: merge.gram((thin(x), thin(y))),
        peak=4.6,
        composed=True,
    ),
    Case(
        "merge.in_core_space",
        2,
        lambda x, y: in_space(merge.in_core_space, x, y),
        peak=8.9,
        composed=True,
    ),
    Case(
        "merge.in_shared_space",
        2,
        lambda x, y: in_space(merge.in_shared_space, x, y),
        peak=12.7,
        composed=True,
    ),
    Case(
        "merge.iso_c",
        3,
        lambda base, *tuned: merge.iso_c(base, tuned, (1.5, -0.7)).weights,
        peak=7.0,
        composed=True,
        command="iso_c {1} {2} --base {0} --coefficients 1.5 -0.7",
    ),
    Case(
        "merge.iso_cts",
        3,
        lambda base, *tuned: merge.iso_cts(base, tuned, common=0.4).weights,
        peak=8.4,
        composed=True,
        command="iso_cts {1} {2} --base {0} --common 0.4",
    ),
    Case(
        "merge.knots",
        3,
        lambda base, *tuned: merge.knots(base, tuned, (1.5, -0.7)),
        peak=14.6,
        composed=True,
        command="knots {1} {2} --base {0} --coefficients 1.5 -0.7",
    ),
    Case(
        "merge.lines",
        1,
        lambda x: merge.lines(x, {"w": 0, "b": [1, 2], "s": 3, "k": None}, start=0.5, rise=0.7),
        peak=1.0,
        composed=True,
    ),
    Case(
        "merge.magmax",
        3,
        lambda base, *tuned: merge.magmax(base, tuned, (1.5, -0.7)),
        peak=1.0,
        composed=True,
        command="magmax {1} {2} --base {0} --coefficients 1.5 -0.7",
    ),
    Case(
        "merge.magprune",
        1,
        lambda x: merge.magprune(jax.random.key(0), x, 0.5, width=0.2),
        peak=1.1,
        composed=True,
    ),
    Case(
        "merge.nearswap",
        2,
        lambda base, tuned: merge.nearswap(base, tuned, 0.7),
        peak=1.0,
        composed=True,
        command="nearswap {1} --base {0} --threshold 0.7",
    ),
    Case(
        "merge.negmerge",
        3,
        lambda base, *tuned: merge.negmerge(base, tuned, 0.7),
        peak=1.0,
        composed=True,
        command="negmerge {1} {2} --base {0} --strength 0.7",
    ),
    Case("merge.overlap", 2, lambda *edits: merge.overlap(edits), peak=0.1, composed=True),
    Case(
        "merge.pcb",
        3,
        lambda base, *tuned: merge.pcb(base, tuned, density=0.5),
        peak=13.3,
        composed=True,
        command="pcb {1} {2} --base {0} --density 0.5",
    ),
    Case(
        "merge.ram",
        3,
        lambda base, *tuned: merge.ram(base, tuned, threshold=0.2, boost=0.1),
        peak=5.0,
        composed=True,
        command="ram {1} {2} --base {0} --threshold 0.2 --boost 0.1",
    ),
    Case(
        "merge.sce",
        3,
        lambda base, *tuned: merge.sce(base, tuned, density=0.5),
        peak=10.5,
        composed=True,
        command="sce {1} {2} --base {0} --density 0.5",
    ),
    Case(
        "merge.sign_conflict", 2, lambda *edits: merge.sign_conflict(edits), peak=0.1, composed=True
    ),
    Case(
        "merge.sign_disagreement",
        3,
        lambda *edits: merge.sign_disagreement(edits),
        peak=0.0,
        composed=True,
    ),
    Case(
        "merge.singular_interference",
        2,
        lambda *edits: merge.singular_interference(edits, rank=2),
        peak=10.7,
        composed=True,
    ),
    Case(
        "merge.tall_mask",
        2,
        lambda x, y: [m.astype(jnp.float32) for m in jax.tree.leaves(merge.tall_mask(x, y, 0.7))],
        peak=2.0,
        composed=True,
    ),
    Case(
        "merge.task_arithmetic",
        3,
        lambda base, *tuned: merge.task_arithmetic(base, tuned, (1.5, -0.7)),
        peak=1.0,
        command="task_arithmetic {1} {2} --base {0} --coefficients 1.5 -0.7",
    ),
    Case("merge.task_vector", 2, merge.task_vector, peak=1.0),
    Case(
        "merge.ties",
        3,
        lambda base, *tuned: merge.ties(base, tuned, (1.5, -0.7), density=0.4),
        peak=9.3,
        lazy=True,
        command="ties {1} {2} --base {0} --coefficients 1.5 -0.7 --density 0.4",
    ),
    Case("merge.trim", 1, lambda x: merge.trim(x, 0.3), peak=3.3),
    Case("merge.trim, row", 1, lambda x: merge.trim(x, 0.5, scope="row"), peak=1.0, composed=True),
    Case(
        "merge.tsv_m",
        3,
        lambda base, *tuned: merge.tsv_m(base, tuned, (1.5, -0.7)).weights,
        peak=7.0,
        derivatives=False,
        command="tsv_m {1} {2} --base {0} --coefficients 1.5 -0.7",
    ),
    Case(
        "negative.attenuate",
        3,
        lambda x, y, c: negative.attenuate(x, [directed(y)], 1.3, center=c),
        peak=4.0,
    ),
    Case(
        "negative.attenuate, Sides",
        2,
        lambda x, c: negative.attenuate(x, sides(), 1.3, center=c),
        peak=5.4,
    ),
    Case("negative.chain_bound", 1, lambda x: negative.chain_bound(*halved(x)), peak=1.1),
    Case("negative.curve", 2, negative.curve, peak=2.3),
    Case(
        "negative.erase_keeping", 3, lambda x, u, k: negative.erase_keeping(x, [u], [k]), peak=10.1
    ),
    Case(
        "negative.erase_keeping, oblique",
        3,
        lambda x, u, k: negative.erase_keeping(
            x, [u], [k], mode="oblique", inverse_metric=metric()
        ),
        peak=32.9,
    ),
    Case(
        "negative.exit_ball",
        3,
        lambda x, y, avoid: negative.exit_ball([x, y], (0.6, 0.4), avoid, 40.0, costs=(1.0, 2.0)),
        peak=2.1,
    ),
    Case(
        "negative.exit_ball, direction",
        3,
        lambda x, y, direction: negative.exit_ball(
            [x, y], (0.6, 0.4), x, 40.0, direction=direction, allow=allow()
        ),
        peak=21.7,
    ),
    Case("negative.gate", 2, lambda x, y: negative.gate(x, y, y, 1e3), lazy=True, peak=2.0),
    Case(
        "negative.exit_ball, cone",
        3,
        lambda x, y, avoid: negative.exit_ball(
            [x, y], (0.6, 0.4), avoid, 40.0, cone=cone.Sparse(30)
        ),
        peak=8.1,
    ),
    Case(
        "negative.guard_hull",
        3,
        lambda x, y, avoid: negative.guard_hull([x, y], avoid, 40.0, costs=(1.0, 2.0)),
        peak=4.1,
    ),
    Case(
        "negative.guard_hull, affine",
        3,
        lambda x, y, normal: negative.guard_hull(
            [x, y], x, 40.0, normal=normal, mode="affine", allow=allow()
        ),
        peak=21.7,
    ),
    Case(
        "negative.guard_normal",
        3,
        lambda x, y, avoid: negative.guard_normal([x, y], avoid, 40.0, steps=2).weights,
        peak=6.1,
        derivatives=False,
    ),
    Case("negative.guide", 3, lambda x, y, z: negative.guide(x, y, z, 1.5), peak=1.0),
    Case(
        "negative.guide_perpendicular",
        3,
        lambda x, y, z: negative.guide_perpendicular(x, y, z, 1.5, 0.7),
        peak=1.0,
    ),
    Case("negative.harden", 1, negative.harden, peak=6.6, derivatives=False),
    Case(
        "negative.linear_bound",
        1,
        lambda x: negative.linear_bound(says, x, cone.Mask(masked(x)), 2.0, curvature=1.0)[::2],
        peak=8.2,
    ),
    Case(
        "negative.offset",
        2,
        lambda x, y: lowrank.apply(x, negative.offset(x, y, 1).factors),
        peak=4.6,
    ),
    Case(
        "negative.rank_to_reach",
        2,
        lambda x, y: negative.rank_to_reach(x, y, 4.0),
        peak=2.3,
        derivatives=False,
    ),
    Case("negative.remove_member", 2, lambda x, y: negative.remove_member(x, y, 0.3), peak=1.0),
    Case("negative.repel", 2, lambda x, y: negative.repel(x, y, 0.7), peak=1.0),
    Case(
        "negative.repel, allow",
        2,
        lambda x, y: negative.repel(x, y, 0.7, allow=allow()[0]),
        peak=9.4,
    ),
    Case(
        "negative.retarget",
        3,
        lambda x, y, target: negative.retarget([x, y], (0.6, 0.4), target, costs=(1.0, 2.0)),
        peak=2.0,
    ),
    Case(
        "negative.retarget, allow",
        3,
        lambda x, y, target: negative.retarget([x, y], (0.6, 0.4), target, allow=allow()),
        peak=63.3,
    ),
    Case("negative.rewrite", 1, rewritten, peak=3.0),
    Case(
        "negative.route",
        2,
        lambda x, y: negative.route(x, {"y": y}, 2, radius=1.0),
        peak=2.3,
        derivatives=False,
    ),
    Case(
        "negative.size_to_change",
        1,
        lambda x: negative.size_to_change(says, x, cone.PooledRank(3), 2.0, curvature=1.0),
        peak=8.0,
    ),
    Case("negative.split_rank", 1, split, peak=2.4),
    Case("perturb.filter_normalize", 2, perturb.filter_normalize, peak=1.0),
    Case("perturb.gaussian", 1, lambda like: perturb.gaussian(jax.random.key(0), like), peak=3.0),
    Case(
        "perturb.gaussian, norm",
        1,
        lambda like: perturb.gaussian(jax.random.key(0), like, norm=2.0),
        peak=3.0,
    ),
    Case(
        "perturb.low_rank_gaussian",
        1,
        lambda like: lowrank.apply(
            like, perturb.low_rank_gaussian(jax.random.key(0), like, 2, norm=2.0)
        ),
        peak=3.7,
    ),
    Case("selection.kth_magnitude", 1, lambda x: selection.kth_magnitude(x, 30), peak=3.3),
    Case(
        "selection.top_mask",
        1,
        lambda x: [m.astype(jnp.float32) for m in jax.tree.leaves(selection.top_mask(x, 30))],
        peak=3.3,
    ),
    Case("tree.cast_like", 2, tree.cast_like, peak=0.0),
    Case("tree.combine", 2, lambda x, y: tree.combine((2.0, -0.5), (x, y)), peak=1.0, lazy=True),
    Case("tree.norm", 1, tree.norm, peak=0.0),
    Case("tree.per_leaf", 2, tree.per_leaf(lambda x, y: interpolate.lerp(x, y, 0.3)), peak=1.0),
    Case("tree.upcast", 1, tree.upcast, peak=2.0),
    Case("tree.vdot", 2, tree.vdot, peak=0.0),
)


def each(cases):
    """A test of every one of some cases; all tests of a case follow each other in their module.

    So they are run in one process, where what one of them has traced and compiled serves the next.
    """
    return pytest.mark.parametrize("case", cases, ids=str, scope="module")


NOT_ON_TREES = {
    "average.Average": "a record",
    "average.Kronecker": "a record",
    "average.Profile": "a record",
    "average.Reconstruction": "a record",
    "average.Regression": "a record",
    "average.Solution": "a record",
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
    "merge.Election": "a record of options",
    "merge.Report": "a record",
    "merge.SpectralMerge": "a record",
    "merge.Tally": "a record",
    "merge.Unified": "a record",
    "merge.consensus_mask": "acts on masks; laws in test_masks.py",
    "merge.presets": "options of other systems; tested in test_parity.py",
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
    "plot.gram": "draws; tests in test_plot.py",
    "plot.plane": "draws; tests in test_plot.py",
    "plot.segment": "draws; tests in test_plot.py",
    "plot.spectrum": "draws; tests in test_plot.py",
    "soup.Grid": "a record",
    "soup.Soup": "a record",
    "soup.greedy_soup": "chooses by a score; laws in test_soup.py",
    "soup.grid": "chooses by a score; laws in test_soup.py",
    "soup.simplex": "returns coefficients; laws in test_soup.py",
    "tree.by_depth": "returns numbers; laws in test_by_leaf.py",
    "tree.by_name": "returns numbers; laws in test_by_leaf.py",
    "tree.elementwise": "acts on a formula; tree.combine is one",
    "tree.reduction": "acts on a formula; tree.vdot is one",
    "tree.join": "moves leaves; laws in test_tree.py",
    "tree.partition": "moves leaves; laws in test_tree.py",
    "tree.split_key_like": "returns keys; laws in test_tree.py",
}
"""What the laws of transformations do not speak of, and why."""
