r"""The negative weight: keeping a point, or an average of points, away from another.

Three facts. An average of points can be moved by a negative weight on a point to avoid
([`repel`][wspace.negative.repel]); points can be moved, each as little as possible, so that their
average is another one ([`retarget`][wspace.negative.retarget],
[`exit_ball`][wspace.negative.exit_ball]); and a low-rank term added to the average moves it on,
without touching the points it came from ([`offset`][wspace.negative.offset]).

A margin certifies a distance, not safety.
"""

from wspace.negative.allowance import free_inputs
from wspace.negative.homothety import guide, remove_member, repel, strength_of
from wspace.negative.offset import Route, curve, gate, offset, rank_to_reach, route
from wspace.negative.retarget import exit_ball, retarget
from wspace.negative.spread import harden

__all__ = [
    "Route",
    "curve",
    "exit_ball",
    "free_inputs",
    "gate",
    "guide",
    "harden",
    "offset",
    "rank_to_reach",
    "remove_member",
    "repel",
    "retarget",
    "route",
    "strength_of",
]
