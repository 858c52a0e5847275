r"""The negative weight: keeping a point, or an average of points, away from another.

Three facts. An average of points can be moved by a negative weight on a point to avoid
([`repel`][wspace.negative.repel]); points can be moved, each as little as possible, so that their
average is another one ([`retarget`][wspace.negative.retarget],
[`exit_ball`][wspace.negative.exit_ball]); and a low-rank term added to the average moves it on,
without touching the points it came from ([`offset`][wspace.negative.offset]).

A margin certifies a distance, not safety.
"""

from wspace.negative.allowance import damped_inputs, free_inputs
from wspace.negative.homothety import guide, remove_member, repel, strength_of
from wspace.negative.hull import guard_hull
from wspace.negative.normal import guard_normal
from wspace.negative.offset import Route, curve, gate, offset, rank_to_reach, route
from wspace.negative.retarget import exit_ball, retarget
from wspace.negative.spread import harden, split_rank

__all__ = [
    "Route",
    "curve",
    "damped_inputs",
    "exit_ball",
    "free_inputs",
    "gate",
    "guard_hull",
    "guard_normal",
    "guide",
    "harden",
    "offset",
    "rank_to_reach",
    "remove_member",
    "repel",
    "retarget",
    "route",
    "split_rank",
    "strength_of",
]
