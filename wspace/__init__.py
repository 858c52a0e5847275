"""Geometry of weight space: pure functions on pytrees of model weights."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
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
    from wspace import testing as testing

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


# Imported when they are asked for, so that the command line answers before JAX is there;
# `from wspace import *` asks for all but `testing`, which needs hypothesis, an extra.
def __getattr__(name: str) -> Any:
    if name in __all__ or name == "testing":
        return importlib.import_module(f"wspace.{name}")
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("wspace")
    raise AttributeError(f"module 'wspace' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "testing", "__version__"})
