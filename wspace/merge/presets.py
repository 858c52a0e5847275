"""What other systems take where an option is not given, as dictionaries to spread into a call.

`paper`, `mergekit`, `peft` and `fusionbench` have the options of a method under its name, all of
them; `systems` has the same four by their names and versions. An option of one's own replaces
theirs: `merge.ties(base, tuned, **merge.presets.mergekit["ties"] | {"density": 0.2})`. `None` is a
density without a default there, which must be replaced so.

Signatures have the form without the defects of the others: selection over the whole tree, one
meaning of a coefficient's sign, and zero where the votes cancel.
"""

from typing import Any, TypeAlias

from wspace.merge.parts.elect import Election

System: TypeAlias = dict[str, dict[str, Any]]
"""Options by the name of a method."""

paper: System = {
    "task_arithmetic": {"scale": 1.0, "normalize": False},
    "ties": {
        "density": 0.2,
        "scope": "tree",
        "kept": "floor+1",
        "election": Election(weighted=False, zero="majority"),
        "scale": 1.0,
    },
    "dare": {"density": 0.5, "rescale": "inverse", "scale": 1.0},
    "dare_ties": {
        "density": 0.5,
        "rescale": "inverse",
        "election": Election(weighted=False, zero="majority"),
        "scale": 1.0,
    },
}
"""The authors of the methods."""

mergekit: System = {
    "task_arithmetic": {"scale": 1.0, "normalize": False},
    "ties": {
        "density": 1.0,
        "scope": "leaf",
        "kept": "floor",
        "election": Election(zero="plus", divide="weight"),
        "scale": 1.0,
    },
    "dare": {"density": 1.0, "rescale": "norm", "scale": 1.0},
    "dare_ties": {
        "density": 1.0,
        "rescale": "norm",
        "election": Election(zero="plus", divide="one"),
        "scale": 1.0,
    },
    "della": {
        "density": None,
        "width": 0.15,
        "scope": "row",
        "rescale": "norm",
        "election": Election(zero="plus", divide="weight"),
        "scale": 1.0,
    },
    "breadcrumbs": {"density": None, "outliers": 0.01, "scope": "leaf", "scale": 1.0},
    "breadcrumbs_ties": {
        "density": None,
        "outliers": 0.01,
        "scope": "leaf",
        "election": Election(zero="plus", divide="one"),
        "scale": 1.0,
    },
    "sce": {"density": 1.0, "zero": "plus", "scale": 1.0},
    "ram": {"threshold": 1e-5, "relative": False, "boost": 0.0, "cap": 0.2, "scale": 1.0},
    "model_stock": {"statistic": "cosine", "scope": "leaf", "floor": -1.0},
}
"""mergekit 0.1.5."""

peft: System = {
    "task_arithmetic": {"scale": 1.0, "normalize": False},
    "ties": {
        "density": None,
        "scope": "leaf",
        "kept": "floor",
        "election": Election(weighted=False, zero="plus"),
        "scale": 1.0,
    },
    "dare": {"density": None, "rescale": "inverse", "scale": 1.0},
    "dare_ties": {
        "density": None,
        "rescale": "inverse",
        "election": Election(weighted=False, zero="plus"),
        "scale": 1.0,
    },
}
"""PEFT 0.21.2."""

fusionbench: System = {
    "task_arithmetic": {"scale": 0.3, "normalize": False},
    "ties": {
        "density": 0.2,
        "scope": "tree",
        "kept": "floor+1",
        "election": Election(weighted=False, zero="majority", divide="one"),
        "scale": 0.3,
    },
    "dare": {"density": 0.5, "rescale": "inverse", "scale": 0.5},
    "dare_ties": {
        "density": 0.5,
        "rescale": "inverse",
        "election": Election(weighted=False, zero="majority", divide="one"),
        "scale": 0.5,
    },
    "model_stock": {"statistic": "angle", "scope": "leaf", "floor": -1.0},
}
"""FusionBench."""

systems: dict[str, System] = {
    "paper": paper,
    "mergekit-0.1.5": mergekit,
    "peft-0.21.2": peft,
    "fusionbench": fusionbench,
}
"""All of them, by name and version."""
