"""The methods of the command line: one table of what they take and how they are carried out.

Options are the keyword-only and the scalar parameters of the functions, by their names. The table
is data, so that help needs no JAX; a test holds it against the signatures.
"""

import argparse
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

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
        many: Whether it takes one number for each model.
        required: Whether it must be given.
        passed: Whether it is a parameter of the function; else it chooses how to call it.
        elects: Whether it is a field of the parameter `election`.
    """

    name: str
    kind: type | tuple[str, ...]
    help: str
    many: bool = False
    required: bool = False
    passed: bool = True
    elects: bool = False


Options: TypeAlias = Mapping[str, Any]


class Method(NamedTuple):
    """A method by what its function takes.

    Attributes:
        function: Where it is, such as `"merge.ties"`.
        models: The parameter that takes the list of models, or the parameters that take one each.
        options: What else it takes.
        whole: Whether what becomes of a tensor depends on the others; `None` if the scope or the
            election of signs says so.
        base: Whether it takes a base, which then gives the dtypes.
        others: Further parameters that take a model.
        seeded: Whether it takes a random key.
        returns: What it returns.
        lazy: Whether it can be computed in pieces, by `checkpoint.stream(..., lazy=True)`; else it
            treats every tensor by itself.
    """

    function: str
    models: str | tuple[str, ...]
    options: tuple[Option, ...]
    whole: bool | None = False
    base: bool = True
    others: tuple[str, ...] = ()
    seeded: bool = False
    returns: Literal["weights", "record", "list"] = "weights"
    lazy: bool = True

    @property
    def trees(self) -> tuple[str, ...]:
        """The options that take a model."""
        return (*(("base",) if self.base else ()), *self.others)


ALL_SYSTEMS = ("paper", "mergekit-0.1.5", "peft-0.21.2", "fusionbench")
MERGEKIT = ("mergekit-0.1.5",)
SCOPES = ("tree", "leaf", "row")

COEFFICIENTS = Option("coefficients", float, "one number for each model, of any sign", many=True)
NEEDED = COEFFICIENTS._replace(help="one number for each model; equal if not given")
COSTS = Option("costs", float, "one positive number for each model: what moving it costs", True)
SCALE = Option("scale", float, "factor of the merged displacement")
DENSITY = Option("density", float, "share of the entries that are kept")
T = Option("t", float, "position on the path, 0 at the first model", required=True)
STRENGTH = Option("strength", float, "how far")
RADIUS = Option("radius", float, "radius of the ball around the model to avoid", required=True)
TOL = Option("tol", float, "relative residual to stop at")
MAX_STEPS = Option("max_steps", int, "most steps")
RTOL = Option("rtol", float, "relative size below which singular values count as zero")
LEAST = Option("least", float, "least relative singular value to divide by")
WHOLE = Option(
    "scope", ("tree", "leaf"), "what is one vector: the whole model or a tensor", passed=False
)
LIKE_MERGEKIT = Option("preset", MERGEKIT, "as that system does: tensor by tensor", passed=False)
VOTE = (
    Option("vote", ("mass", "count"), "what elects the sign", elects=True),
    Option("weighted", bool, "whether coefficients vote", elects=True),
    Option("zero", ("zero", "plus", "majority"), "the sign where the votes cancel", elects=True),
    Option(
        "divide", ("count", "weight", "one", "largest"), "what a sum is divided by", elects=True
    ),
    SCALE,
)


def _preset(*systems: str) -> Option:
    return Option("preset", systems, "take the options of that system where none are given")


def _scope(*scopes: str) -> Option:
    return Option("scope", scopes, "among which entries are chosen")


RESCALE = Option("rescale", ("inverse", "norm", "none"), "how what is kept is scaled up")
WIDTH = Option("width", float, "spread of the probabilities around the density")
OUTLIERS = Option("outliers", float, "share of the largest entries that is dropped")

MERGE: dict[str, Method] = {
    "linear": Method("average.mean", "points", (COEFFICIENTS,), base=False),
    "lerp": Method("interpolate.lerp", ("start", "end"), (T,), base=False),
    "slerp": Method(
        "interpolate.slerp",
        ("start", "end"),
        (T, WHOLE, LIKE_MERGEKIT),
        None,
        base=False,
    ),
    "karcher": Method(
        "average.karcher_mean",
        "points",
        (COEFFICIENTS, TOL, MAX_STEPS, WHOLE, LIKE_MERGEKIT),
        None,
        base=False,
        returns="record",
    ),
    "median": Method(
        "average.geometric_median",
        "points",
        (COEFFICIENTS, TOL, MAX_STEPS, WHOLE),
        None,
        base=False,
        returns="record",
    ),
    "model_stock": Method(
        "average.model_stock",
        "points",
        (
            _preset("mergekit-0.1.5", "fusionbench"),
            Option("statistic", ("angle", "cosine"), "what is averaged over pairs"),
            Option("scope", SCOPES, "what has one ratio"),
            Option("floor", float, "least cosine to take, in [-1, 1]"),
        ),
        None,
    ),
    "task_arithmetic": Method(
        "merge.task_arithmetic",
        "tuned",
        (
            COEFFICIENTS,
            _preset(*ALL_SYSTEMS),
            SCALE,
            Option("normalize", bool, "whether to divide by the sum of the coefficients"),
        ),
    ),
    "ties": Method(
        "merge.ties",
        "tuned",
        (
            COEFFICIENTS,
            _preset(*ALL_SYSTEMS),
            DENSITY,
            _scope(*SCOPES),
            Option("kept", ("floor", "floor+1"), "how the count is rounded"),
            *VOTE,
        ),
        None,
    ),
    "dare": Method(
        "merge.dare",
        "tuned",
        (COEFFICIENTS, _preset(*ALL_SYSTEMS), DENSITY, RESCALE, SCALE),
        seeded=True,
    ),
    "dare_ties": Method(
        "merge.dare_ties",
        "tuned",
        (COEFFICIENTS, _preset(*ALL_SYSTEMS), DENSITY, RESCALE, *VOTE),
        None,
        seeded=True,
    ),
    "della": Method(
        "merge.della",
        "tuned",
        (COEFFICIENTS, _preset(*MERGEKIT), DENSITY, WIDTH, _scope("row", "leaf"), RESCALE, *VOTE),
        None,
        seeded=True,
    ),
    "breadcrumbs": Method(
        "merge.breadcrumbs",
        "tuned",
        (COEFFICIENTS, _preset(*MERGEKIT), DENSITY, OUTLIERS, _scope(*SCOPES), SCALE),
        None,
    ),
    "breadcrumbs_ties": Method(
        "merge.breadcrumbs_ties",
        "tuned",
        (COEFFICIENTS, _preset(*MERGEKIT), DENSITY, OUTLIERS, _scope(*SCOPES), *VOTE),
        None,
    ),
    "sce": Method(
        "merge.sce",
        "tuned",
        (
            _preset(*MERGEKIT),
            DENSITY,
            Option("zero", ("zero", "plus", "majority"), "the sign where the votes cancel"),
            SCALE,
        ),
        True,
    ),
    "ram": Method(
        "merge.ram",
        "tuned",
        (
            _preset(*MERGEKIT),
            Option("threshold", float, "size from which an entry counts as changed"),
            Option("relative", bool, "whether the threshold is relative"),
            Option("boost", float, "how much entries that one model changed are raised"),
            Option("cap", float, "most that they are raised by"),
            SCALE,
        ),
        True,
    ),
    "pcb": Method("merge.pcb", "tuned", (DENSITY, SCALE), True),
    "magmax": Method("merge.magmax", "tuned", (COEFFICIENTS, SCALE)),
    "negmerge": Method("merge.negmerge", "tuned", (STRENGTH,)),
    "nearswap": Method(
        "merge.nearswap",
        ("tuned",),
        (Option("threshold", float, "largest step", required=True),),
    ),
    "arcee_fusion": Method("merge.arcee_fusion", ("tuned",), (), lazy=False),
    "ext_sub": Method("merge.ext_sub", ("tuned",), (STRENGTH,), others=("avoid",), lazy=False),
    "tsv_m": Method(
        "merge.tsv_m", "tuned", (COEFFICIENTS, SCALE, RTOL, LEAST), returns="record", lazy=False
    ),
    "iso_c": Method(
        "merge.iso_c", "tuned", (COEFFICIENTS, SCALE, RTOL), returns="record", lazy=False
    ),
    "iso_cts": Method(
        "merge.iso_cts",
        "tuned",
        (COEFFICIENTS, Option("common", float, "share of the common part"), SCALE, RTOL, LEAST),
        returns="record",
        lazy=False,
    ),
    "knots": Method("merge.knots", "tuned", (COEFFICIENTS, SCALE), lazy=False),
}

STEER: dict[str, Method] = {
    "repel": Method(
        "negative.repel",
        ("point",),
        (STRENGTH._replace(required=True),),
        base=False,
        others=("avoid",),
    ),
    "retarget": Method(
        "negative.retarget",
        "points",
        (NEEDED, COSTS),
        base=False,
        others=("target",),
        returns="list",
    ),
    "exit": Method(
        "negative.exit_ball",
        "points",
        (NEEDED, RADIUS, COSTS),
        True,
        base=False,
        others=("avoid",),
        returns="list",
    ),
    "guard": Method(
        "negative.guard_hull",
        "points",
        (RADIUS, Option("mode", ("convex", "affine"), "which averages are kept away"), COSTS),
        True,
        base=False,
        others=("avoid",),
        returns="list",
    ),
}

TABLES = {"merge": MERGE, "steer": STEER}

ALIASES = {
    "mean": "linear",
    "karcher_mean": "karcher",
    "geometric_median": "median",
    "dare_linear": "dare",
    "exit_ball": "exit",
    "guard_hull": "guard",
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
    for name in method.trees:
        parser.add_argument(f"--{name}", required=True, metavar="MODEL", help="required")
    for option in method.options:
        name = f"--{option.name.replace('_', '-')}"
        text = option.help + (", required" if option.required else "")
        if option.kind is bool:
            parser.add_argument(name, action=argparse.BooleanOptionalAction, help=text)
        elif isinstance(option.kind, tuple):
            parser.add_argument(name, choices=option.kind, required=option.required, help=text)
        else:
            parser.add_argument(
                name,
                type=count if option.kind is int else number,
                nargs="+" if option.many else None,
                metavar="X" if option.many else "N" if option.kind is int else "X",
                required=option.required,
                help=text,
            )


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
    if option.many:
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
