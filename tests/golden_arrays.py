"""Outputs of other systems on seeded inputs; provenance in golden/README.md."""

import functools
import os
import pathlib

import numpy as np

FOLDER = pathlib.Path(os.environ.get("WSPACE_GOLDEN", pathlib.Path(__file__).parent / "golden"))
"""Where the archives lie; the variable names a folder with others of the same keys."""


@functools.cache
def archive(name):
    """All arrays of an archive as trees, by what comes before the last slash of their keys."""
    trees = {}
    with np.load(FOLDER / f"{name}.npz") as arrays:
        for key in arrays:
            case, leaf = key.rsplit("/", 1)
            trees.setdefault(case, {})[leaf] = arrays[key]
    return trees


def cases(name, system):
    """The options of every case of a system, by the name of its method."""
    found = {}
    for case in archive(name):
        if case.startswith(f"{system}/"):
            method, options = case.removeprefix(f"{system}/").split("?")
            found.setdefault(method, []).append(options)
    return found


def tree(name, case):
    """One tree, in the order of keys that JAX gives dictionaries."""
    return dict(sorted(archive(name)[case].items()))
