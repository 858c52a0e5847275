"""What the methods of the command line take, from the signatures of their functions.

`python -m wspace._cli.signatures` writes it into `options.json`, so that help needs no JAX; a test
says whether the file is current.
"""

import dataclasses
import importlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jaxtyping import PyTree

from wspace._cli.table import ENTRIES
from wspace.merge import Election, presets
from wspace.typing import ByLeaf, Coefficients, LeafCoefficients, ScalarLike, WeightsLike

FILE = Path(__file__).with_name("options.json")
_NAMED = ("base", "avoid", "target")
"""Models that an option names; the others come first in a command."""


def described() -> dict[str, Any]:
    """What every function takes, by its name."""
    functions = sorted({entry.function for table in ENTRIES.values() for entry in table.values()})
    return {function: _described(function) for function in functions}


def text() -> str:
    """The same as the file has it, an option a line."""
    functions = []
    for function, takes in described().items():
        options = [f"  {json.dumps({k: v})[1:-1]}" for k, v in takes.pop("options").items()]
        own = json.dumps(takes)[1:-1]
        lines = ",\n".join(options)
        functions.append(f' "{function}": {{{own}, "options": {{\n{lines}\n }}}}')
    return "{\n" + ",\n".join(functions) + "\n}\n"


def named(function: str) -> Any:
    """A function by its module and name."""
    module, name = function.split(".")
    return getattr(importlib.import_module(f"wspace.{module}"), name)


def _described(function: str) -> dict[str, Any]:
    signature = inspect.signature(named(function))
    parameters = signature.parameters.values()
    several = [x.name for x in parameters if x.annotation == Sequence[WeightsLike]]
    single = [x.name for x in parameters if x.annotation == WeightsLike]
    first = [name for name in single if name not in _NAMED]
    method = function.split(".")[1]
    found: dict[str, Any] = {}
    for x in parameters:
        if x.name == "layout" and "allow" in signature.parameters:
            continue  # of matrices that no option gives
        if x.annotation is Election:
            fields = dataclasses.fields(Election)
            hints = get_type_hints(Election)
            found |= {
                field.name: _option(hints[field.name], field.default) | {"elects": True}
                for field in fields
            }
        elif option := _option(x.annotation, x.default):
            found[x.name] = option
    returned = signature.return_annotation
    kind = "list" if get_origin(returned) is list else "weights"
    return {
        "models": several[0] if several else first,
        "named": [name for name in _NAMED if name in single],
        "seeded": "key" in signature.parameters,
        "returns": "record" if hasattr(returned, "_fields") else kind,
        "presets": [name for name, system in presets.systems.items() if method in system],
        "options": found,
    }


def _option(annotation: Any, default: Any) -> dict[str, Any]:
    """The kind and the default of an option, nothing if no words are one."""
    parts = [annotation, *get_args(annotation)]
    words = [list(get_args(x)) for x in parts if get_origin(x) is Literal]
    option: dict[str, Any] = {}
    if words:
        option["kind"] = words[0]
    elif any(all(x in parts for x in get_args(c)) for c in (Coefficients, LeafCoefficients)):
        option |= {"kind": "float", "count": "each"}
    elif Sequence[float] in parts:
        option |= {"kind": "float", "count": "one or each"}
    elif float in parts or ByLeaf in parts or all(x in parts for x in get_args(ScalarLike)):
        option["kind"] = "float"
    elif bool in parts or int in parts:
        option["kind"] = "bool" if bool in parts else "int"
    else:
        return {}
    by_leaf = [ByLeaf], get_args(LeafCoefficients), [PyTree[float]]
    if any(all(x in parts for x in kinds) for kinds in by_leaf):
        option["by_leaf"] = True
    required = default is inspect.Parameter.empty
    return option | ({"required": True} if required else {"default": default})


if __name__ == "__main__":
    FILE.write_text(text())
