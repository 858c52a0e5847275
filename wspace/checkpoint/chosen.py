"""Which tensors of several models are combined, and which are carried over or left out.

Weights that all models have, in one shape, are points of one weight space. Everything else in a
file is no coordinate of it: buffers of integers, tables of complex numbers, factors of adapters,
codes of quantized weights, and whatever a single model has.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from wspace import _checks
from wspace._checks import is_weight, matches
from wspace.checkpoint.folder import files_with
from wspace.checkpoint.header import nearest, shown
from wspace.checkpoint.stored import Checkpoint, Stored

WAYS = (
    "take that of the first model by --carry NAME, or leave it out by --skip NAME (carry and skip "
    "in Python; globs are names, too)"
)

_FACTOR = re.compile(
    r"(^|[._])"
    r"(lora_(A|B|embedding_A|embedding_B|magnitude_vector|up|down|mid)|lora\.(up|down)"
    r"|\w*lora_linear_layer\.(up|down)|\w*_lora\.(up|down)|dora_scale"
    r"|hada_[wt][12](_[ab])?|lokr_[wt][12](_[ab])?|oft_(blocks|diag|r)|boft_\w+"
    r"|ia3_l|vera_lambda_[bd]|randlora_\w+|fourierft_spectrum|hra_u|vblora_\w+)"
    r"([._]|$)",
    re.IGNORECASE,
)

_QUANTIZED: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (r"(.+)\.qweight", (r"{0}.g_idx",), "GPTQ"),
    (r"(.+)\.qweight", (r"{0}.qzeros", r"{0}.scales"), "AWQ or GPTQ"),
    (r"(.+)\.weight", (r"{0}.SCB",), "bitsandbytes (8 bits)"),
    (r"(.+)", (r"{0}.absmax", r"{0}.quant_map"), "bitsandbytes (4 bits)"),
    (r"(.+)\.weight_packed", (r"{0}.weight_scale",), "compressed-tensors"),
    (r"(.+)_blocks", (r"{0}_scales",), "MXFP4"),
    (r"(.+)\.weight", (r"{0}.scales", r"{0}.biases"), "MLX"),
    (r"(.+)\.W_q", (r"{0}.scale", r"{0}.zero"), "HQQ"),
    (r"(.+)\.codes", (r"{0}.codebooks",), "AQLM"),
    (r"(.+)\._data", (r"{0}._scale",), "quanto"),
    (
        r"(.+)",
        (r"{0}_scale_inv", r"{0}_scale", r"{0}_scales", r"{0}.scale", r"{0}_quantizer._scale"),
        "scales",
    ),
)
"""Names of tensors of codes, the companions of which one tells them, and who writes them so."""


_MOST = 64
"""Tensors of one model alone up to which copies of others are looked for: more are no heads."""


class Chosen(NamedTuple):
    """Models without what is skipped.

    Attributes:
        sources: The models, in order.
        combined: The names of the weights that all of them have; all else is carried over.
        told: What was decided without being asked for, as sentences.
    """

    sources: list[Checkpoint]
    combined: tuple[str, ...]
    told: tuple[str, ...] = ()

    def of_weights(self, index: int) -> list[Stored]:
        """The tensors of a model that are combined."""
        return [self.sources[index][name] for name in self.combined]


def chosen(
    sources: Sequence[Checkpoint],
    *,
    carry: Sequence[str] = (),
    skip: Sequence[str] = (),
    common_tensors: bool = False,
    outputs: int = 1,
) -> Chosen:
    """What is combined of models, the first of which, `outputs`, have an output like them.

    Raises unless they agree in what is no weight, or it is said what becomes of it.
    """
    sources = _checks.listed("sources", sources)
    for source in sources:
        if source.path in source.files and files_with(source.path.name) > 1:
            raise ValueError(
                f"{source.path} is one of the {files_with(source.path.name)} files of a model: "
                "give their folder, or rename it if it is whole"
            )
    for what, globs in (("carry", carry), ("skip", skip)):
        _refuse_unmatched(what, globs, sources)
    left = [source.without(skip) for source in sources]
    rest = [source.without(carry) for source in left]
    for source in rest:
        refuse_factors(source)
        _refuse_codes(source)
    lone = _lone(rest)
    if lone and not common_tensors:
        raise ValueError(_told_lone(lone))
    names = [name for name in rest[0] if all(name in source for source in rest)]
    for source in rest[:outputs]:
        _refuse_tied(source, {name for name, _, _ in lone}, names)
    combined = tuple(name for name in names if _is_combined(name, rest))
    if not combined and (carry or skip):
        raise ValueError(
            "carry and skip name all weights, so nothing is left to combine: name fewer"
        )
    told = [_told_carried(name, rest) for name in names if not is_weight(rest[0][name])]
    return Chosen(left, combined, tuple(filter(None, told)))


def _refuse_unmatched(what: str, globs: Sequence[str], sources: Sequence[Checkpoint]) -> None:
    if isinstance(globs, str):
        raise TypeError(
            f"{what} must be a list of names or globs, got one string: put it in a list"
        )
    for glob in globs:
        if not any(matches(name, [glob]) for source in sources for name in source):
            paths = ", ".join(str(source.path) for source in sources[:8])
            raise ValueError(f"{what} has {shown(glob)}, which is the name of no tensor of {paths}")


def refuse_factors(tensors: Checkpoint) -> None:
    """Raises if a tensor is a factor of an adapter: means of factors are no factors of the mean."""
    name = next(filter(_FACTOR.search, tensors), None)
    configured = [
        file
        for file in tensors.files
        if file.name.startswith("adapter_model") and (file.parent / "adapter_config.json").exists()
    ]
    if name is None and tensors and configured:
        raise ValueError(
            f"{configured[0]} is of an adapter, as the adapter_config.json beside it says, and no "
            "model: put it into its base with PEFT (merge_and_unload, where there is one), and "
            "give the result"
        )
    if name is not None:
        is_peft = re.search(r"lora_(A|B|embedding_A|embedding_B)\b", name) is not None
        how = (
            "read it by checkpoint.load_adapter(folder, base), and put it into its base by "
            "lowrank.apply, or combine several by lowrank.combine and checkpoint.save_adapter"
            if is_peft
            else "merge it into its base with the program that made it; wspace extract BASE TUNED "
            "makes an adapter of the result"
        )
        raise ValueError(
            f"tensor {shown(name)} of {tensors.path} is a factor of an adapter (LoRA or like it), "
            f"and combinations of factors are not those of the edits: {how}"
        )


def quantized(tensors: Mapping[str, Stored]) -> tuple[str, str, str] | None:
    """A tensor of codes of quantized weights, a companion that tells it, and of which system."""
    for name, tensor in tensors.items():
        if is_weight(tensor) or not tensor.size:
            continue
        for pattern, companions, system in _QUANTIZED:
            if parts := re.fullmatch(pattern, name):
                for companion in (text.format(parts[1]) for text in companions):
                    if companion in tensors:
                        return name, companion, system
    return None


def codes(tensors: Mapping[str, Stored]) -> tuple[str, str] | None:
    """The name of a tensor of codes, and what is wrong with it; `None` if there is none."""
    how = (
        "convert it to bfloat16 or float32 where the file is written, such as by "
        "model.dequantize().save_pretrained(folder) of transformers"
    )
    if found := quantized(tensors):
        name, companion, system = found
        dtype = tensors[name].dtype
        by = f"by its {system}" if system == "scales" else f"as {system} does it"
        return name, (
            f"is {dtype}, quantized {by} ({shown(companion)} beside it says so), and nothing "
            f"is computed of codes: {how}"
        )
    for name, tensor in tensors.items():
        if not is_weight(tensor) and tensor.dtype.kind not in "iubc":
            return name, f"is {tensor.dtype}, in which nothing is computed: {how}"
    return None


def _refuse_codes(source: Checkpoint) -> None:
    if (wrong := codes(source)) is not None:
        name, what = wrong
        raise TypeError(f"tensor {shown(name)} of {source.path} {what}; or {WAYS}")


def _lone(sources: Sequence[Checkpoint]) -> list[tuple[str, Checkpoint, Checkpoint]]:
    """Names that not all models have, with one that has it and one that lacks it."""
    first, *rest = sources
    return [
        (name, one, two)
        for other in rest
        for one, two in ((first, other), (other, first))
        for name in one
        if name not in two
    ]


def _told_lone(lone: Sequence[tuple[str, Checkpoint, Checkpoint]]) -> str:
    name, one, two = lone[0]
    near = nearest(name, two)
    hint = f"; the nearest name there is {shown(near[0])}" if near else ""
    twin = _twin(one, name)
    if twin is not None:
        hint = f"; it has the values of {shown(twin)}, as a tied head has"
    more = len({name for name, _, _ in lone}) - 1
    count = f" (and there are {more} more such tensors)" if more else ""
    return (
        f"{one.path} has a tensor {shown(name)} that {two.path} lacks{hint}{count}: {WAYS}; "
        "--common-tensors combines the tensors that all have, and keeps the others of the first"
    )


def _twin(source: Checkpoint, name: str, among: Iterable[str] | None = None) -> str | None:
    """Another tensor with the same values."""
    tensor = source[name]
    for other in source if among is None else among:
        found = source[other]
        alike = other != name and found.dtype == tensor.dtype and found.shape == tensor.shape
        few = min(tensor.size, 64)
        if (
            alike
            and tensor.size > 1
            and is_weight(tensor)
            and len(tensor.shape) > 1
            and _same(tensor.rows(0, few), found.rows(0, few))
            and _same(tensor.read(), found.read())
        ):
            return other
    return None


def _refuse_tied(model: Checkpoint, lone: Iterable[str], names: Sequence[str]) -> None:
    """Raises if what would be kept of a model is a copy of what is combined."""
    for name in sorted(set(lone) & set(model))[:_MOST]:
        if (twin := _twin(model, name, names)) is not None:
            raise ValueError(
                f"tensor {shown(name)}, which {model.path} has and another model lacks, has the "
                f"values of {shown(twin)}, as a tied head has, and would keep them while "
                f"{shown(twin)} changes: leave it out by --skip {name}, or keep it by --carry "
                f"{name} (skip and carry in Python)"
            )


def _is_combined(name: str, sources: Sequence[Checkpoint]) -> bool:
    """Whether a tensor that all models have is of weights; raises unless all agree in that."""
    first = sources[0]
    for source in sources[1:]:
        one, two = first[name], source[name]
        if is_weight(one) != is_weight(two):
            raise ValueError(
                f"tensor {shown(name)} is {one.dtype} in {first.path} and {two.dtype} in "
                f"{source.path}: only weights are merged; {WAYS}"
            )
        if is_weight(one) and one.shape != two.shape:
            raise ValueError(
                f"tensor {shown(name)} has shape {one.shape} in {first.path} and {two.shape} in "
                f"{source.path}: both must be points of one weight space; {WAYS}"
            )
    return is_weight(first[name])


def _told_carried(name: str, sources: Sequence[Checkpoint]) -> str:
    """What is to be told of a tensor that is no weight; raises if it differs, but for a counter."""
    first, *rest = sources
    for source in rest:
        one, two = first[name], source[name]
        if one.shape == two.shape and _same(one.read(), two.read()):
            continue
        if one.size == two.size == 1 and one.dtype.kind in "iu":
            return (
                f"{shown(name)}, one integer, differs between the models, as a counter of steps "
                "does: it is not combined, and an output keeps that of the model that it is like"
            )
        raise ValueError(
            f"tensor {shown(name)} is of {one.dtype}, so it is carried over, but differs between "
            f"{first.path} and {source.path}: {WAYS}"
        )
    return ""


def _same(one: np.ndarray, two: np.ndarray) -> bool:
    if one.dtype != two.dtype:
        return np.array_equal(one, two)
    first, second = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (one, two))
    return np.array_equal(first, second)
