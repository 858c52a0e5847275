"""Recipes in files: TOML of our own, and YAML of mergekit where the methods agree."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wspace._cli.calls import Recipe
from wspace._cli.methods import TABLES, checked, found
from wspace._cli.words import Choice, Misuse, near
from wspace.checkpoint.tensors import reading

_KEYS = ("method", "models", "seed", "common_rows", "carry", "skip", "common_tensors")
_TABLES = ("options", "patterns")
_EXPONENTIAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_PRESET = "mergekit-0.1.5"
_WITHOUT = ("linear", "slerp", "karcher")
"""Methods of mergekit that take no base, but for the first model of a slerp."""

_YAML = {
    "linear": "linear",
    "slerp": "slerp",
    "task_arithmetic": "task_arithmetic",
    "ties": "ties",
    "dare_linear": "dare",
    "dare_ties": "dare_ties",
    "breadcrumbs": "breadcrumbs",
    "model_stock": "model_stock",
    "karcher": "karcher",
    "nearswap": "nearswap",
    "arcee_fusion": "arcee_fusion",
}


def read(file: Path, seed: int | None) -> Recipe:
    """The recipe of a merge in a file."""
    try:
        with reading(file):
            text = file.read_text(encoding="utf-8-sig")  # some editors begin with a mark
    except UnicodeDecodeError as error:
        raise Misuse(f"{file} is no text in UTF-8, but a recipe is: give another file") from error
    if file.suffix.lower() in (".yml", ".yaml"):
        return _of_mergekit(file, _yaml(file, text), seed or 0)
    try:
        said = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Misuse(f"{file} is no TOML: {error}") from error
    return _of_toml(file, said, seed)


def _of_toml(file: Path, said: dict[str, Any], seed: int | None) -> Recipe:
    if not isinstance(said.get("method"), str):
        raise Misuse(f"{file} names no method: give method = 'linear' or another")
    name = found("merge", said["method"])
    method = TABLES["merge"][name]
    _refuse_unknown_keys(said, (*_KEYS, *_TABLES, *method.named), f"{file}")
    models = said.get("models", [])
    if not isinstance(models, list) or not all(isinstance(x, str) for x in models):
        raise Misuse(f"models in {file} must be a list of paths, got {models!r}")
    trees = {}
    for tree in method.named:
        if not isinstance(said.get(tree), str):
            raise Misuse(f"{name} needs {tree}, a path, in {file}")
        trees[tree] = Path(said[tree])
    patterns = said.get("patterns", [])
    if not isinstance(patterns, list) or not all(isinstance(x, dict) for x in patterns):
        raise Misuse(f"patterns in {file} must be tables: write [[patterns]] above each")
    if not isinstance(said.get("options", {}), dict):
        raise Misuse(f"options in {file} must be a table: write [options] above them")
    if seed is None:
        seed = said.get("seed", 0)
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise Misuse(f"seed in {file} must be an integer from 0 to {2**32 - 1}, got {seed!r}")
    for key in ("common_rows", "common_tensors"):
        if not isinstance(said.get(key, False), bool):
            raise Misuse(f"{key} in {file} must be true or false, got {said[key]!r}")
    for key in ("carry", "skip"):
        globs = said.get(key, [])
        if not isinstance(globs, list) or not all(isinstance(x, str) for x in globs):
            raise Misuse(f"{key} in {file} must be a list of names or globs, got {globs!r}")
    parted = []
    for i, pattern in enumerate(patterns):
        where = f"pattern {i + 1} of {file}"
        if not isinstance(pattern.get("match"), str):
            raise Misuse(f"{where} has no match, a glob on the names of tensors")
        own = {key: value for key, value in pattern.items() if key != "match"}
        parted.append((pattern["match"], checked(method, where, own)))
    return Recipe(
        "merge",
        name,
        tuple(map(Path, models)),
        trees,
        checked(method, f"options of {file}", said.get("options", {})),
        tuple(parted),
        seed,
        common_rows=said.get("common_rows", False),
        choice=Choice(
            tuple(said.get("carry", [])),
            tuple(said.get("skip", [])),
            said.get("common_tensors", False),
        ),
    )


def _refuse_unknown_keys(said: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    for key in said:
        if key not in keys:
            raise Misuse(f"{where} has an unknown key {key!r}{near(str(key), keys)}")


def _yaml(file: Path, text: str) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise Misuse(
            f'{file} is YAML, which needs PyYAML: pip install "wspace[yaml]", or write TOML'
        ) from error
    try:
        said = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise Misuse(f"{file} is no YAML: {error}") from error
    if not isinstance(said, dict):
        raise Misuse(f"{file} is no recipe of mergekit: it has no merge_method")
    return said


def _of_mergekit(file: Path, said: dict[str, Any], seed: int) -> Recipe:
    """The recipe that does what mergekit would do with this one."""
    top = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype")
    for key in ("slices", "modules", "tokenizer", "tokenizer_source", "chat_template"):
        if key in said:
            raise Misuse(
                f"{key} in {file} is not done here: leave it out, so that the models are merged "
                "tensor by tensor with the tokenizer of the first, or run mergekit"
            )
    _refuse_unknown_keys(said, top, f"{file}")
    theirs = str(said.get("merge_method"))
    if theirs not in _YAML:
        raise Misuse(f"merge_method {theirs!r} in {file} is not read here{near(theirs, _YAML)}")
    models = said.get("models")
    if not isinstance(models, list) or not all(
        isinstance(x, dict) and isinstance(x.get("model"), str) for x in models
    ):
        raise Misuse(f"models in {file} must be a list of entries with a model, a path")
    base = said.get("base_model")
    own: list[tuple[str, dict[str, Any]]] = []
    for model in models:
        _refuse_unknown_keys(model, ("model", "parameters"), f"model {model['model']} in {file}")
        if theirs in _WITHOUT or model["model"] != base:
            own.append((model["model"], _parameters(file, model)))
    if theirs == "slerp":
        if base not in [name for name, _ in own]:
            raise Misuse(f"slerp in {file} needs base_model, one of its two models")
        own.sort(key=lambda entry: entry[0] != base)
    if theirs not in _WITHOUT and not isinstance(base, str):
        raise Misuse(f"{theirs} in {file} needs base_model")
    name = _YAML[theirs]
    options = _Parameters(file, theirs, _parameters(file, said), own).options()
    dtypes = {str(said[key]) for key in ("dtype", "out_dtype") if said.get(key) is not None}
    if len(dtypes) > 1 or not dtypes <= {"float32", "float16", "bfloat16", "float64"}:
        raise Misuse(f"dtype and out_dtype in {file} must be one dtype, got {sorted(dtypes)}")
    return Recipe(
        "merge",
        name,
        tuple(Path(model) for model, _ in own),
        {} if theirs in _WITHOUT else {"base": Path(str(base))},
        checked(TABLES["merge"][name], f"{file}", options),
        seed=seed,
        dtype=next(iter(dtypes), None),
    )


def _parameters(file: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    found = said.get("parameters") or {}
    if not isinstance(found, dict):
        raise Misuse(f"parameters in {file} must be a mapping from names, got {found!r}")
    return {key: _as_number(value) for key, value in found.items()}


def _as_number(value: Any) -> Any:
    """A number such as 1e-5, which YAML 1.1 takes for text without a point, as a number."""
    if isinstance(value, list):
        return [_as_number(x) for x in value]
    is_number = isinstance(value, str) and _EXPONENTIAL.fullmatch(value)
    return float(value) if is_number else value


class _Parameters:
    """The parameters of a recipe of mergekit: those of all models, and of each."""

    def __init__(
        self,
        file: Path,
        method: str,
        shared: dict[str, Any],
        own: list[tuple[str, dict[str, Any]]],
    ) -> None:
        self._file, self._method, self._shared, self._own = file, method, shared, own
        for name, values in [("parameters", shared), *own]:
            for key, value in values.items():
                if isinstance(value, list | dict):
                    raise Misuse(
                        f"{key} of {name} in {file} is a gradient or has filters, which are not "
                        "read here: give one number, or write [[patterns]] in a recipe in TOML"
                    )
        shared.pop("int8_mask", None)

    def _shared_of(self, key: str, default: Any = None) -> Any:
        return self._shared.pop(key, default)

    def _each(self, key: str, default: Any = None) -> list[Any]:
        usual = self._shared.pop(key, default)
        values = [own.pop(key, usual) for _, own in self._own]
        if None in values:
            raise Misuse(f"{self._method} in {self._file} needs {key} for every model")
        return values

    def _one(self, key: str, default: Any = None) -> Any:
        values = self._each(key, default)
        if len(set(values)) > 1:
            raise Misuse(
                f"{key} in {self._file} differs between the models, {values}: here a method has "
                "one, so give the same to all"
            )
        return values[0] if values else default

    def options(self) -> dict[str, Any]:
        """The options of our method; raises for a parameter that the method lacks."""
        options = self._mapped()
        for name, values in [("parameters", self._shared), *self._own]:
            for key in values:
                raise Misuse(
                    f"{key} of {name} in {self._file} is no parameter of {self._method} that is "
                    "read here: leave it out"
                )
        return options

    def _mapped(self) -> dict[str, Any]:
        if self._method == "linear":
            self._refuse_unnormalized()
            return {"coefficients": self._each("weight")}
        if self._method == "slerp":
            return {"t": self._shared_of("t"), "preset": _PRESET}
        if self._method == "karcher":
            steps, tol = self._shared_of("max_iter", 10), self._shared_of("tol", 1e-5)
            return {"max_steps": steps, "tol": tol, "preset": _PRESET}
        if self._method == "arcee_fusion":
            return {}
        if self._method == "nearswap":
            return {"threshold": self._shared_of("t")}
        if self._method == "model_stock":
            by_row = self._shared_of("filter_wise", False)
            return {"preset": _PRESET, "scope": "row" if by_row else "leaf"}
        options = {"preset": _PRESET, "scale": self._shared_of("lambda", 1.0)}
        options["coefficients"] = self._each("weight")
        if self._method == "task_arithmetic":
            return options | {"normalize": self._shared_of("normalize", False)}
        densities = self._each("density", 1.0)
        options["density"] = densities if len(set(densities)) > 1 else densities[0]
        if self._method == "breadcrumbs":
            self._refuse_normalized()
            return options | {"outliers": self._one("gamma", 0.01)}
        if self._method.startswith("dare"):
            options["rescale"] = "norm" if self._shared_of("rescale", True) else "none"
        if self._method == "dare_linear":
            self._refuse_normalized()
            return options
        normalize = self._shared_of("normalize", self._method == "ties")
        return options | {"divide": "weight" if normalize else "one"}

    def _refuse_normalized(self) -> None:
        if self._shared_of("normalize", False):
            raise Misuse(
                f"normalize: true in {self._file} is not read here for {self._method}: divide the "
                "weights by their sum yourself"
            )

    def _refuse_unnormalized(self) -> None:
        if not self._shared_of("normalize", True):
            raise Misuse(
                f"normalize: false in {self._file}: a mean divides by the sum of the weights, so "
                "leave it out where they sum to 1, or take task_arithmetic"
            )
