r"""The negative weight: keeping a point, or an average of points, away from another.

Three facts. An average of points can be moved by a negative weight on a point to avoid
([`repel`][wspace.negative.repel]); points can be moved, each as little as possible, so that their
average is another one ([`retarget`][wspace.negative.retarget],
[`exit_ball`][wspace.negative.exit_ball]); and a low-rank term added to the average moves it on,
without touching the points it came from ([`offset`][wspace.negative.offset]).

A margin certifies a distance, not safety.
"""

from wspace.negative.allowance import damped_inputs, free_inputs
from wspace.negative.audit import audit
from wspace.negative.bounds import OutputBound, chain_bound, linear_bound, size_to_change
from wspace.negative.erasing import erase_keeping
from wspace.negative.homothety import guide, guide_perpendicular, remove_member, repel, strength_of
from wspace.negative.hull import guard_hull
from wspace.negative.normal import guard_normal
from wspace.negative.offset import Route, curve, gate, offset, rank_to_reach, route
from wspace.negative.report import Audit, LeafAudit
from wspace.negative.retarget import exit_ball, retarget
from wspace.negative.rewriting import rewrite
from wspace.negative.spread import harden, split_rank
from wspace.negative.subspace import Sides, attenuate

__all__ = [
    "Audit",
    "LeafAudit",
    "OutputBound",
    "Route",
    "Sides",
    "attenuate",
    "audit",
    "chain_bound",
    "curve",
    "damped_inputs",
    "erase_keeping",
    "exit_ball",
    "free_inputs",
    "gate",
    "guard_hull",
    "guard_normal",
    "guide",
    "guide_perpendicular",
    "harden",
    "linear_bound",
    "offset",
    "rank_to_reach",
    "remove_member",
    "repel",
    "retarget",
    "rewrite",
    "route",
    "size_to_change",
    "split_rank",
    "strength_of",
]
