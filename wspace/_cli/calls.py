"""A recipe as a function of trees."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wspace import interpolate, merge, tree
from wspace._cli.methods import TABLES, Method
from wspace._cli.signatures import named
from wspace._cli.words import Choice, Misuse
from wspace._names import first_matches
from wspace.checkpoint import Checkpoint

_ALIGNED = 0.9995
"""The cosine beyond which mergekit takes the straight line instead of the arc."""


@dataclass(frozen=True)
class Recipe:
    """What is to be done.

    Attributes:
        command: `"merge"` or `"steer"`.
        method: The name of the method.
        models: The models, in order.
        trees: The models that options name, such as the base.
        options: The options that were given.
        patterns: Globs on tensor names with options for these; the first that matches counts.
        seed: What the random key is made from, where the method takes one.
        dtype: The dtype that all weights must have, if the recipe says one.
        common_rows: Whether tensors may differ in their number of rows, and then are merged in
            those that all have.
        choice: Which tensors are combined.
    """

    command: str
    method: str
    models: tuple[Path, ...]
    trees: Mapping[str, Path] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    patterns: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    seed: int = 0
    dtype: str | None = None
    common_rows: bool = False
    choice: Choice = field(default_factory=Choice)

    @property
    def table(self) -> Method:
        """What the method takes."""
        return TABLES[self.command][self.method]

    @property
    def sources(self) -> tuple[Path, ...]:
        """All models; the first gives names, shapes and dtypes."""
        first = [self.trees["base"]] if self.table.base else []
        aim = [self.trees[self.aim]] if self.aim else []
        return (*first, *self.models, *(self.trees[name] for name in self.table.others), *aim)

    @property
    def aim(self) -> str | None:
        """The option that says where models move, if one does."""
        return next((name for name in self.table.aims if name in self.trees), None)

    @property
    def outputs(self) -> int:
        """How many results there are."""
        return len(self.models) if self.table.returns == "list" else 1

    def settings(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Each pattern with the recipe's options and its own; last the recipe's for the rest."""
        return [(glob, {**self.options, **own}) for glob, own in self.patterns] + [
            ("*", self.options)
        ]

    def numbers_alone(self) -> bool:
        """Whether patterns give numbers alone that the function takes for each leaf."""
        known = {x.name for x in self.table.options if x.by_leaf}
        if any(self.is_whole(options) for _, options in self.settings()):
            known.discard("density")  # one share of all entries
        return all(own.keys() <= known for _, own in self.patterns)

    def is_whole(self, options: Mapping[str, Any]) -> bool:
        """Whether, with these options, the result for a tensor depends on other tensors."""
        entry = self.table.entry
        if entry.per_tensor:
            return options.get("scope") != "leaf" and not options.get("preset")
        taken = {x.name: x.default for x in self.table.options} | self.keywords(options)
        election = taken.get("election", merge.Election())
        return entry.whole or taken.get("scope") == "tree" or election.zero == "majority"

    def subtracts(self) -> bool:
        """Whether a model may count negatively, which no statistic of squares stands."""
        if self.command == "steer" or self.method in ("negmerge", "ext_sub"):
            return True
        for _, options in self.settings():
            numbers = [options.get("scale", 1.0), options.get("strength", 1.0)]
            numbers += options.get("coefficients", [])
            if min(numbers) < 0 or not 0 <= options.get("t", 0.5) <= 1:
                return True
            if self.method == "task_arithmetic" and not options.get("normalize"):
                # The base counts 1 less all of these.
                given = options.get("coefficients", [1.0] * len(self.models))
                if options.get("scale", 1.0) * math.fsum(given) > 1:
                    return True
        return False

    def keywords(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options as the function takes them: what is given, and for the rest the preset's."""
        given = dict(options)
        preset = given.pop("preset", None)
        if self.table.entry.per_tensor:
            given.pop("scope", None)
            return given
        taken = {} if preset is None else dict(merge.presets.systems[preset][self.method])
        names = [x.name for x in self.table.options if x.elects and x.name in given]
        if names:
            election = taken.get("election", merge.Election())
            fields = {name: given.pop(name) for name in names}
            taken["election"] = dataclasses.replace(election, **fields)
        return taken | given

    def checked(self) -> None:
        """Raises unless the method takes so many models, and the options are in their domains."""
        method, count = self.table, len(self.models)
        wanted = 1 if isinstance(method.models, str) else len(method.models)
        if count < wanted or (count > wanted and not isinstance(method.models, str)):
            more = " at least" if isinstance(method.models, str) else ""
            raise Misuse(f"{self.method} takes{more} {wanted} model(s), got {count}")
        for path in self.sources:
            model, plus, adapter = str(path).partition("+")
            if plus and not path.exists() and Path(model).exists():
                raise Misuse(
                    f"{path} names a model with an adapter, and adapters are not read here: put "
                    f"the adapter into {model} first, by checkpoint.load_adapter({adapter!r}, "
                    "base), lowrank.apply and checkpoint.save in Python"
                )
        for option in method.options:
            if option.required and option.name not in self.options:
                raise Misuse(f"{self.method} needs {option.name}: give it")
        # Traced and not computed: what is wrong with the options shows before a tensor is read.
        size = max(2, len(self.models))  # a direction for each
        tree = {"tensor": jax.ShapeDtypeStruct((size, size), jnp.float32)}
        call = Call(self)
        for glob, options in self.settings():
            where = f" (pattern {glob!r})" if self.patterns and glob != "*" else ""
            try:
                jax.eval_shape(lambda xs, o=options: call.result(xs, o), [tree] * call.count)
            except (TypeError, ValueError) as error:
                raise Misuse(f"{self.method}{where}: {error}") from error


def hinted(recipe: Recipe, error: Exception) -> None:
    """Notes the options of a direction beside an error that asks for one."""
    name = recipe.table.entry.aim
    if name and recipe.aim is None and name in str(error):
        error.add_note(
            f"here by --towards MODEL, --away-from MODEL or --{name} MODEL, a tree as a model is"
        )


class Call:
    """The function of a recipe, and what it certifies."""

    def __init__(self, recipe: Recipe) -> None:
        """Finds the function."""
        self._recipe, self._method = recipe, recipe.table
        self._function = named(recipe.table.entry.function)
        self._settings = recipe.settings()
        self._records: list[Any] = []
        self.count = len(recipe.sources)

    def __call__(self, points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The results, one for each output, of trees, one for each source."""
        results: list[dict[str, Any]] = [{} for _ in range(self._recipe.outputs)]
        for names, options in self._groups(list(points[0])):
            part = [{name: x[name] for name in names} for x in points]
            for result, own in zip(results, self._parted(self.result(part, options)), strict=True):
                result.update(own)
        return results

    def _groups(self, names: Sequence[str]) -> list[tuple[list[str], Mapping[str, Any]]]:
        """Names of tensors, and the options that these have."""
        groups: list[tuple[list[str], Mapping[str, Any]]] = [([], x) for _, x in self._settings]
        found = first_matches([glob for glob, _ in self._settings], names)
        if self._recipe.patterns and self._recipe.numbers_alone():
            return [(list(names), self._by_name(names, [groups[i or 0][1] for i in found]))]
        for name, i in zip(names, found, strict=True):
            groups[i or 0][0].append(name)
        return [group for group in groups if group[0]]

    def _by_name(
        self, names: Sequence[str], settings: Sequence[Mapping[str, Any]]
    ) -> Mapping[str, Any]:
        """The options of a recipe, with trees of the numbers that patterns give."""
        options = dict(self._recipe.options)
        usual = {x.name: x.default for x in self._method.options}
        for key in {key for _, own in self._recipe.patterns for key in own}:
            rows = [(usual | self._recipe.keywords(given))[key] for given in settings]
            count = len(self._recipe.models)
            rows = [[1.0] * count if row is None else row for row in rows]
            if any(isinstance(row, list) for row in rows):
                rows = [row if isinstance(row, list) else [row] * count for row in rows]
                options[key] = [
                    dict(zip(names, column, strict=True)) for column in zip(*rows, strict=True)
                ]
            else:
                options[key] = dict(zip(names, rows, strict=True))
        return options

    def result(self, points: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> Any:
        """What the function returns."""
        given, method = self._given(points, options), self._method
        if not method.entry.per_tensor or self._recipe.is_whole(options):
            try:
                return self._function(**given)
            except ValueError as error:
                hinted(self._recipe, error)
                raise
        function = self._function
        if options.get("preset") and function is interpolate.slerp:
            function = functools.partial(interpolate.slerp_unless_aligned, cosine=_ALIGNED)
        first = given.pop(method.models if isinstance(method.models, str) else method.models[0])
        return tree.per_leaf(function)(first, **given)

    def _given(
        self, points: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        method, points = self._method, list(points)
        given: dict[str, Any] = {}
        aim = self._recipe.aim
        goal = points.pop() if aim else None
        if method.base:
            given["base"] = points.pop(0)
        for name in reversed(method.others):
            given[name] = points.pop()
        if isinstance(method.models, str):
            given[method.models] = points
        else:
            given.update(zip(method.models, points, strict=True))
        if method.returns == "list" and any(x.name == "coefficients" for x in method.options):
            given["coefficients"] = [1.0] * len(points)
        given.update(self._recipe.keywords(options))
        if aim:
            signs = {"towards": (1.0, -1.0), "away_from": (-1.0, 1.0)}.get(aim)
            ends = goal, given["avoid"]
            given[method.entry.aim] = tree.combine(signs, ends, rounded=False) if signs else goal
        if method.seeded:
            given["key"] = jax.random.key(self._recipe.seed)
        return given

    def _parted(self, result: Any) -> list[dict[str, Any]]:
        if self._method.returns == "list":
            return list(result)
        if self._method.returns == "record":
            self._records.append(result._replace(weights=None)._asdict())
            return [result.weights]
        return [result]

    def certificates(self) -> dict[str, Any]:
        """The worst of what the results say of themselves, over all tensors since the start."""
        worst: dict[str, Any] = {"residual": np.max, "steps": np.max, "converged": np.all}
        worst |= {"trusted": np.min, "left_out": np.sum}
        records, self._records = self._records, []
        return {
            name: worst[name](
                np.stack(jax.tree.leaves([record[name] for record in records]))
            ).item()
            for name in (records[0] if records else ())
            if name in worst
        }


def wide_enough(sources: Sequence[Checkpoint]) -> contextlib.AbstractContextManager[Any]:
    """A context in which JAX does not round the float64 that is in a source to float32."""
    if any(x.dtype == np.float64 for source in sources for x in source.values()):
        return jax.enable_x64(True)
    return contextlib.nullcontext()
