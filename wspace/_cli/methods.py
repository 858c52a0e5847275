"""The methods of the command line: what they take, and how they are carried out.

What a method takes is read from `options.json`, so that help needs no JAX.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from wspace._cli.table import ALIASES, ENTRIES, WORDS, Entry
from wspace._cli.words import Misuse, Parser, count, near, number

HOW = {
    "pieces": "piece by piece, in the memory of a few pieces",
    "passes": "sums or counts over the whole models first, then in pieces",
    "tensors": "tensor by tensor, in the memory of a few tensors",
}
"""How a method is carried out, in words."""


class Option(NamedTuple):
    """An option, by the name of the parameter.

    Attributes:
        name: The name of the parameter.
        kind: `float`, `int`, `bool`, or the words to choose from.
        help: What it is.
        default: What it is if it is not given; `None` if that follows from the models.
        count: Whether it takes one number, or one for each model, or either.
        required: Whether it must be given.
        elects: Whether it is a field of the parameter `election`.
        by_leaf: Whether the function takes a tree with a number for each leaf in its place.
    """

    name: str
    kind: type | tuple[str, ...]
    help: str
    default: Any = None
    count: Literal["one", "each", "one or each"] = "one"
    required: bool = False
    elects: bool = False
    by_leaf: bool = False


class Method(NamedTuple):
    """A method by what its function takes.

    Attributes:
        entry: What the signature does not say.
        models: The parameter that takes the list of models, or the parameters that take one each.
        named: The parameters that take a model which an option names.
        options: What else the command takes.
        seeded: Whether it takes a random key.
        returns: What it returns.
    """

    entry: Entry
    models: str | tuple[str, ...]
    named: tuple[str, ...]
    options: tuple[Option, ...]
    seeded: bool
    returns: Literal["weights", "record", "list"]

    @property
    def base(self) -> bool:
        """Whether it takes a base, which then gives the dtypes."""
        return "base" in self.named

    @property
    def aims(self) -> tuple[str, ...]:
        """The options that say where models move, each by a model, if there are any."""
        return ("towards", "away_from", self.entry.aim) if self.entry.aim else ()

    @property
    def others(self) -> tuple[str, ...]:
        """The other parameters that take a model which an option names."""
        return tuple(name for name in self.named if name != "base")


_KINDS = {"float": float, "int": int, "bool": bool}


def _method(entry: Entry, takes: Mapping[str, Any]) -> Method:
    options = []
    if entry.per_tensor:
        text = "what is one vector: the whole model or a tensor"
        options.append(Option("scope", ("tree", "leaf"), text, "tree"))
    if entry.like:
        options.append(Option("preset", entry.like, "as that system does: tensor by tensor"))
    if takes["presets"]:
        text = "take the options of that system where none are given"
        options.append(Option("preset", tuple(takes["presets"]), text))
    for name, taken in takes["options"].items():
        option = dict(taken)
        kind = option.pop("kind")
        kind = tuple(kind) if isinstance(kind, list) else _KINDS[kind]
        # Where every model is moved, coefficients are those of a mean.
        optional = takes["returns"] == "list" and name == "coefficients"
        required = option.pop("required", False) and not optional
        options.append(Option(name, kind, WORDS[name], required=required, **option))
    models = takes["models"]
    return Method(
        entry,
        models if isinstance(models, str) else tuple(models),
        tuple(takes["named"]),
        tuple(options),
        takes["seeded"],
        takes["returns"],
    )


_TAKES = json.loads(Path(__file__).with_name("options.json").read_text())

TABLES = {
    command: {name: _method(entry, _TAKES[entry.function]) for name, entry in entries.items()}
    for command, entries in ENTRIES.items()
}


def found(command: str, name: str) -> str:
    """The name in the table of what a method is called."""
    plain = name.replace("-", "_")
    plain = ALIASES.get(plain, plain)
    if plain not in TABLES[command]:
        raise Misuse(f"there is no method {name!r}{near(plain, TABLES[command])}")
    return plain


def add_options(parser: Parser, method: Method) -> None:
    """The options of a method, in the words of a command."""
    for name in method.named:
        parser.add_argument(f"--{name}", required=True, metavar="MODEL", help="required")
    texts = (
        "where to move: from the model to avoid to this one",
        "where to move: from this model to the one to avoid",
        f"where to move: the {method.entry.aim} itself, in files as a model is",
    )
    for name, text in zip(method.aims, texts, strict=False):
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="MODEL", help=text)
    for option in method.options:
        name = f"--{option.name.replace('_', '-')}"
        text = option.help + (", required" if option.required else "")
        if option.default is not None:
            text += f"; default: {_said(option.default)}"
        if option.kind is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
        elif isinstance(option.kind, tuple):
            parser.add_argument(name, choices=option.kind, required=option.required, help=text)
        else:
            parser.add_argument(
                name,
                type=count if option.kind is int else number,
                nargs=None if option.count == "one" else "+",
                metavar="N" if option.kind is int else "X",
                required=option.required,
                help=text,
            )


def _said(default: Any) -> str:
    return ("no", "yes")[default] if isinstance(default, bool) else str(default)


def given(method: Method, options: argparse.Namespace) -> dict[str, Any]:
    """The options that a command gives; one number where it is one for all models."""
    found = {option.name: getattr(options, option.name) for option in method.options}
    for option in method.options:
        if option.count == "one or each" and found[option.name] and len(found[option.name]) == 1:
            (found[option.name],) = found[option.name]
    return {name: value for name, value in found.items() if value is not None}


def checked(method: Method, where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a recipe, of the types that the method takes."""
    known = {option.name: option for option in method.options}
    options: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name not in known:
            raise Misuse(f"{where} has an unknown option {key!r}{near(name, known)}")
        options[name] = _of_kind(known[name], f"{key} in {where}", value)
    return options


def _of_kind(option: Option, where: str, value: Any) -> Any:
    if option.count == "each" or (option.count == "one or each" and isinstance(value, list)):
        if not isinstance(value, list) or not all(map(_is_number, value)):
            raise Misuse(f"{where} must be a list of finite numbers, got {value!r}")
        return [float(x) for x in value]
    if isinstance(option.kind, tuple):
        if value not in option.kind:
            raise Misuse(
                f"{where} must be one of {', '.join(option.kind)}, got {value!r}"
                f"{near(str(value), option.kind)}"
            )
        return value
    if option.kind is bool and not isinstance(value, bool):
        raise Misuse(f"{where} must be true or false, got {value!r}")
    if option.kind is int and (type(value) is not int or value < 1):
        raise Misuse(f"{where} must be an integer of at least 1, got {value!r}")
    if option.kind is float:
        if not _is_number(value):
            raise Misuse(f"{where} must be a finite number, got {value!r}")
        return float(value)
    return value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < float("inf")
