"""Geometry of weight space: pure functions on pytrees of model weights."""

from wspace import (
    average,
    checkpoint,
    cone,
    fit,
    geometry,
    interpolate,
    lowrank,
    merge,
    negative,
    perturb,
    plot,
    selection,
    soup,
    tree,
    typing,
)

__all__ = [
    "average",
    "checkpoint",
    "cone",
    "fit",
    "geometry",
    "interpolate",
    "lowrank",
    "merge",
    "negative",
    "perturb",
    "plot",
    "selection",
    "soup",
    "tree",
    "typing",
]
