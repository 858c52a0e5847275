"""Geometry of weight space: pure functions on pytrees of model weights."""

from wspace import (
    average,
    checkpoint,
    geometry,
    interpolate,
    lowrank,
    negative,
    tree,
    typing,
)

__all__ = [
    "average",
    "checkpoint",
    "geometry",
    "interpolate",
    "lowrank",
    "negative",
    "tree",
    "typing",
]
