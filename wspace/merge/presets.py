"""What each system takes as the options of a method, where they disagree: one table, no code.

`None` is the form without the defects of the others: whole-tree selection, one meaning of a
coefficient's sign, and zero where the votes cancel.
"""

from typing import Any, TypeAlias

Table: TypeAlias = dict[str | None, dict[str, Any]]
"""The defaults of a method's options, by the name of the system."""

TASK_ARITHMETIC: Table = {
    None: {"scale": 1.0, "normalize": False},
    "paper": {"scale": 1.0, "normalize": False},
    "mergekit-0.1.5": {"scale": 1.0, "normalize": False},
    "peft-0.21.2": {"scale": 1.0, "normalize": False},
    "fusionbench": {"scale": 0.3, "normalize": False},
}

CONSENSUS: Table = {
    None: {"weighted": True, "zero": "zero", "divide": "count", "scale": 1.0},
    "paper": {"weighted": False, "zero": "majority", "divide": "count", "scale": 1.0},
    "mergekit-0.1.5": {"weighted": True, "zero": "plus", "divide": "weight", "scale": 1.0},
    "peft-0.21.2": {"weighted": False, "zero": "plus", "divide": "count", "scale": 1.0},
    "fusionbench": {"weighted": False, "zero": "majority", "divide": "one", "scale": 0.3},
}
CONSENSUS = {name: {"vote": "mass"} | options for name, options in CONSENSUS.items()}

TRIM: Table = {
    None: {"density": 0.2, "scope": "tree", "kept": "floor"},
    "paper": {"density": 0.2, "scope": "tree", "kept": "floor+1"},
    "mergekit-0.1.5": {"density": 1.0, "scope": "leaf", "kept": "floor"},
    "peft-0.21.2": {"density": None, "scope": "leaf", "kept": "floor"},
    "fusionbench": {"density": 0.2, "scope": "tree", "kept": "floor+1"},
}

DARE: Table = {
    None: {"density": 0.5, "rescale": "inverse", "scale": 1.0},
    "paper": {"density": 0.5, "rescale": "inverse", "scale": 1.0},
    "mergekit-0.1.5": {"density": 1.0, "rescale": "norm", "scale": 1.0},
    "peft-0.21.2": {"density": None, "rescale": "inverse", "scale": 1.0},
    "fusionbench": {"density": 0.5, "rescale": "inverse", "scale": 0.5},
}

TIES: Table = {name: TRIM[name] | CONSENSUS[name] for name in CONSENSUS}

DARE_TIES: Table = {name: CONSENSUS[name] | DARE[name] for name in CONSENSUS}
DARE_TIES["mergekit-0.1.5"]["divide"] = "one"

DELLA: Table = {
    None: {"density": 0.5, "width": 0.05, "scope": "row", "rescale": "inverse"},
    "mergekit-0.1.5": {"density": None, "width": 0.15, "scope": "row", "rescale": "norm"},
}
DELLA = {name: CONSENSUS[name] | options for name, options in DELLA.items()}

BREADCRUMBS: Table = {
    None: {"density": 0.2, "outliers": 0.01, "scope": "tree", "scale": 1.0},
    "mergekit-0.1.5": {"density": None, "outliers": 0.01, "scope": "leaf", "scale": 1.0},
}

BREADCRUMBS_TIES: Table = {name: CONSENSUS[name] | BREADCRUMBS[name] for name in BREADCRUMBS}
BREADCRUMBS_TIES["mergekit-0.1.5"]["divide"] = "one"

SCE: Table = {
    None: {"density": 1.0, "zero": "zero", "scale": 1.0},
    "mergekit-0.1.5": {"density": 1.0, "zero": "plus", "scale": 1.0},
}

RAM: Table = {
    None: {"threshold": 0.0, "relative": True, "boost": 0.0, "cap": 0.2, "scale": 1.0},
    "mergekit-0.1.5": {
        "threshold": 1e-5,
        "relative": False,
        "boost": 0.0,
        "cap": 0.2,
        "scale": 1.0,
    },
}
