"""LoRA adapters in folders, as PEFT keeps them, read as edits and written."""

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from wspace import _checks
from wspace.checkpoint.folder import refuse_suffix
from wspace.checkpoint.header import nearest, shown
from wspace.checkpoint.tensors import flat, named, packed, read, write_all, writing
from wspace.checkpoint.trees import load
from wspace.lowrank import LowRank, from_lora, to_lora
from wspace.lowrank.factors import factors_of, matrix_shape
from wspace.typing import Leaf

__all__ = ["load_adapter", "save_adapter"]

Task: TypeAlias = Literal[
    "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"
]
"""What PEFT knows a model to be for."""

_CONFIG, _FACTORS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_LINEAR = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)((?:\.[^.]+)??)((?:\.weight)?)",
    re.DOTALL,
)
"""A layer, a factor, perhaps the name of an adapter, and the end of a linear factor."""

_NOTHING = (None, False, "", [], {})
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "use_rslora": (None, False, True),
    "fan_in_fan_out": (None, False, True),
    # Whichever leave the base as it was; others move it, or are of a later version.
    "init_lora_weights": (None, False, True, "gaussian", "eva", "orthogonal", "mica"),
}
"""The values of a field with which an adapter is a sum; of a field not named, `_NOTHING`."""

_SETTINGS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_TRAINING = ("lora_dropout", "eva_config", "megatron_core", "qalora_group_size", "runtime_config")
_ORIGIN = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision")
_ANY = frozenset((*_SETTINGS, *_TARGETS, *_TRAINING, *_ORIGIN, "task_type"))
"""The fields that are checked for each layer, or say nothing about the sum."""


def load_adapter(
    folder: str | os.PathLike[str], base: Mapping[str, Leaf | jax.ShapeDtypeStruct]
) -> dict[str, LowRank]:
    r"""Reads a LoRA adapter of PEFT as an edit of the weights it was trained on.

    $$
    \theta'_\ell = \theta_\ell + s_\ell B_\ell A_\ell, \qquad
    s_\ell = \alpha_\ell / r_\ell \quad\text{or, rank-stabilized,}\quad
    s_\ell = \alpha_\ell / \sqrt{r_\ell}
    $$

    [`lowrank.apply(base, edit)`][wspace.lowrank.apply] gives the weights that `merge_and_unload`
    of PEFT gives, to rounding: transposed where `fan_in_fan_out` says so and for embeddings, with
    the ranks and alphas of the patterns. The layers are those that the file has factors of,
    whatever `target_modules` says, with the name of an adapter in theirs or not, as in
    `lora_A.default.weight`. Copies of weights of the base, as PEFT saves of embeddings and heads,
    are compared with `base`, and left out if they are equal. An adapter that is more than such a
    sum, or whose training moved the base, is refused by what says so.

    Args:
        folder: A folder with `adapter_config.json` and `adapter_model.safetensors`.
        base: The weights the adapter was trained on, by the names and in the layout of torch, as
            [`load`][wspace.checkpoint.load] gives them; only names and shapes are used, but where
            the adapter has copies of weights.

    Returns:
        An edit with the names of `base`, a `LowRank` of the leaf's matrix in at least float32, of
            rank 0 where the adapter has nothing.

    Raises:
        FileNotFoundError: If one of the two files is missing.
        ValueError: If a file cannot be read, is truncated or corrupt, or pickled; if the adapter
            is more than LoRA of matrices; if configuration, factors and `base` disagree in a
            layer, a rank or a shape.
        TypeError: If `base` is not a flat mapping from strings to floating-point arrays.

    Examples:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from wspace import checkpoint, lowrank
        >>> base = {"query.weight": jnp.eye(2), "query.bias": jnp.zeros(2)}
        >>> edit = {"query.weight": lowrank.LowRank(jnp.ones((2, 1)), jnp.ones((2, 1)))}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint.save_adapter(folder, edit)
        ...     loaded = checkpoint.load_adapter(folder, base)
        >>> lowrank.apply(base, loaded)["query.weight"]
        Array([[2., 1.],
               [1., 2.]], dtype=float32)

    References:
        E. Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, ICLR 2022,
        [arXiv:2106.09685](https://arxiv.org/abs/2106.09685); the
        [format](https://huggingface.co/docs/peft/developer_guides/checkpoint) of PEFT.
    """
    flat(base=base)
    config, file = _config(Path(folder, _CONFIG)), Path(folder, _FACTORS)
    pickle = Path(folder, _PICKLE)
    if pickle.exists() and not file.exists():
        raise ValueError(
            f"{pickle} is a pickle, which can run code and is never read: convert it where you "
            "trust it, by PeftModel.from_pretrained(model, folder).save_pretrained(folder) of PEFT"
        )
    edit = {name: _zero(leaf.shape) for name, leaf in base.items()}
    for layer, is_embedding, a, b in _layers(file, base):
        name = f"{layer}.weight"
        _refuse_unknown_name(
            name,
            base,
            f"{file} has factors of layer {shown(layer)}, whose {shown(name)} base lacks",
        )
        rank = _setting(config, layer, "r", "rank_pattern")
        if a.ndim != 2 or b.ndim != 2 or (a.shape[0], b.shape[1]) != (rank, rank):
            raise ValueError(
                f"the factors of layer {shown(layer)} in {file} have shapes {a.shape} and "
                f"{b.shape}, but {_CONFIG} says rank {rank}, so (rank, in) and (out, rank): "
                "restore the two files as they were saved together; factors of convolutions are "
                "not read"
            )
        transposed = is_embedding or config.get("fan_in_fan_out")
        edit[name] = from_lora(
            a,
            b,
            alpha=_setting(config, layer, "lora_alpha", "alpha_pattern"),
            rank_stabilized=bool(config.get("use_rslora")),
            layout="in_out" if transposed else "out_in",
        )
        if edit[name].shape != base[name].shape:
            raise ValueError(
                f"the factors of layer {shown(layer)} in {file} are an edit of shape "
                f"{edit[name].shape}, but base has {shown(name)} of shape {base[name].shape}: give "
                f"the base that the adapter was trained on; fan_in_fan_out of {_CONFIG}, one value "
                "for all layers but embeddings, must say whether it stores weights as (in, out)"
            )
    return edit


def save_adapter(
    folder: str | os.PathLike[str],
    edit: Mapping[str, LowRank | Leaf],
    *,
    fan_in_fan_out: bool = False,
    embeddings: Collection[str] = (),
    base: str | os.PathLike[str] | None = None,
    task_type: Task | None = None,
) -> None:
    """Writes an edit as a LoRA adapter that PEFT loads.

    Merged by PEFT into the weights that the edit is of, it gives what
    [`lowrank.apply`][wspace.lowrank.apply] gives, to rounding;
    [`load_adapter`][wspace.checkpoint.load_adapter] gives every factor back bit for bit. All
    scalings are 1: the rank that most layers have is `r` and `lora_alpha`, others are in
    `rank_pattern` and `alpha_pattern`, each for its layer alone. Leaves of rank 0 and dense
    leaves of zeros are left out.

    Both files are on disk before either is put in place, the configuration last: where they
    cannot be written, the folder stays as it was.

    Args:
        folder: Where to write; made if it does not exist, its files replaced if it does.
        edit: A flat mapping from the names of torch, such as `"model.layers.0.mlp.weight"`, to
            edits of matrices, as [`load_adapter`][wspace.checkpoint.load_adapter] gives it.
        fan_in_fan_out: Whether the layers that are no embeddings store weights as `(in, out)`, as
            layers of GPT-2 do, and not as `(out, in)`.
        embeddings: The names in `edit` that belong to layers of `torch.nn.Embedding`, whose
            factors PEFT stores by other names. A name left out here is not loaded by PEFT.
        base: The name on the hub, or the folder, of the model that the edit is of:
            `base_model_name_or_path`, by which `AutoPeftModel` of PEFT finds it.
        task_type: What the model is for: `"CAUSAL_LM"`, `"SEQ_2_SEQ_LM"`, `"SEQ_CLS"`,
            `"TOKEN_CLS"`, `"QUESTION_ANS"` or `"FEATURE_EXTRACTION"`, by which `AutoPeftModel`
            tells the class of the model.

    Raises:
        TypeError: If `edit` is not a flat mapping from strings to `LowRank` or floating-point
            leaves, or `base` is no name or path.
        ValueError: If `task_type` is none of the above or `base` is empty; if a dense leaf is not
            zero, an edit is of a stack of matrices, a name is not the weight of a layer,
            `embeddings` has a name that `edit` lacks, or there is nothing to save; if the folder's
            name ends in the suffix of a file.
        OSError: If the folder cannot be written.

    Examples:
        >>> import pathlib, tempfile
        >>> import jax.numpy as jnp
        >>> from wspace import checkpoint, lowrank
        >>> edit = {"query.weight": lowrank.LowRank(jnp.ones((2, 1)), jnp.ones((3, 1)))}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     checkpoint.save_adapter(folder, edit)
        ...     sorted(checkpoint.load(pathlib.Path(folder, "adapter_model.safetensors")))
        ['base_model.model.query.lora_A.weight', 'base_model.model.query.lora_B.weight']

    References:
        As of [`load_adapter`][wspace.checkpoint.load_adapter].
    """
    leaves, origin = named("edit", edit), _origin(base, task_type)
    for name in embeddings:
        _refuse_unknown_name(name, leaves, f"embeddings has a name {shown(name)} that edit lacks")
    tensors: dict[str, Array] = {}
    ranks: dict[str, int] = {}
    for name, leaf in leaves.items():
        factored = _factored(name, leaf)
        if factored is None:
            continue
        layer, is_embedding = _layer_of(name), name in embeddings
        factors = to_lora(factored, layout="in_out" if is_embedding or fan_in_fan_out else "out_in")
        for kind, factor in zip(_EMBEDDING if is_embedding else _LINEAR, factors, strict=True):
            tensors[f"base_model.model.{layer}.{kind}"] = factor
        ranks[layer] = factored.rank
    if not ranks:
        raise ValueError("edit is zero at every leaf: leave it unsaved, PEFT has no empty adapters")
    data, config = packed(tensors, {"format": "pt"}), _config_of(ranks, fan_in_fan_out) | origin
    folder = Path(folder)
    refuse_suffix(folder, is_folder=True)
    is_new = not folder.exists()
    if is_new:
        with writing(folder):
            folder.mkdir()
    try:
        write_all(
            {folder / _FACTORS: data, folder / _CONFIG: json.dumps(config, indent=2).encode()}
        )
    except BaseException:
        if is_new:
            folder.rmdir()
        raise


def _origin(base: Any, task_type: Any) -> dict[str, str | None]:
    """The fields that say what an adapter is of, which are no part of the sum."""
    if task_type is not None:
        _checks.one_of("task_type", task_type, get_args(Task))
    if base is not None:
        if not isinstance(base, str | os.PathLike):
            raise TypeError(
                "base must be the name or the folder of the model that the edit is of, such as "
                f"'org/model', got {type(base)}: the weights themselves are not needed"
            )
        base = os.fspath(base)
        if not base:
            raise ValueError("base is empty: give the name or the folder of a model, or None")
    return {"task_type": task_type, "base_model_name_or_path": base}


def _config(file: Path) -> dict[str, Any]:
    """The configuration of an adapter that is a sum of the base and its factors."""
    data = read(file)
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({error}): copy or download it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config)}, but a configuration maps from fields")
    for field, value in {"peft_type": None, **config}.items():
        if field not in _ANY and value not in _PLAIN.get(field, _NOTHING):
            raise ValueError(
                f"{file} has {field} {shown(value)}, with which an adapter may be more than the "
                "factors of LoRA added to its base: merge it by merge_and_unload of PEFT, and take "
                "the edit from the base that it was made for by lowrank.extract"
            )
    return config


def _layers(file: Path, base: Mapping[str, Any]) -> Iterator[tuple[str, bool, Array, Array]]:
    """The factors of each layer: its name, whether it is an embedding, and A and B."""
    layers: dict[str, dict[str, Array]] = {}
    adapters: set[str] = set()
    for name, tensor in sorted(load(file).items()):
        parts = _FACTOR.fullmatch(name)
        if parts is None or bool(parts[4]) == parts[2].startswith("lora_embedding"):
            _refuse_no_copy(file, name, tensor, base)
            continue
        kind = parts[2] + parts[4]
        layer = _layer_in(base, parts[1])
        adapters.add(parts[3][1:])
        if kind in layers.setdefault(layer, {}):
            raise ValueError(f"{file} has {kind} of layer {shown(layer)} twice: {_ONE}")
        layers[layer][kind] = tensor
    if len(adapters) > 1:
        names = ", ".join(shown(x) for x in sorted(adapters)[:8])
        raise ValueError(f"{file} has factors of several adapters, {names}: {_ONE}")
    if not layers:
        raise ValueError(f"{file} has no factors: save the adapter again where it was trained")
    for layer, factors in layers.items():
        kinds = tuple(sorted(factors))
        if kinds not in (_LINEAR, _EMBEDDING):
            raise ValueError(
                f"{file} has {' and '.join(kinds)} of layer {shown(layer)}, but a layer has either "
                f"{' and '.join(_LINEAR)} or {' and '.join(_EMBEDDING)}: save the adapter again "
                "where it was trained"
            )
        a, b = (factors[kind] for kind in kinds)
        yield layer, kinds == _EMBEDDING, a, b


_ONE = "save one adapter to a folder, by save_pretrained(folder, selected_adapters=[name]) of PEFT"


def _layer_in(base: Mapping[str, Any], layer: str) -> str:
    """The name that a layer has in the base, without the prefixes of PEFT.

    Some files have none, and some that were wrapped again have two.
    """
    found = layer.removeprefix(_PREFIX)
    while f"{found}.weight" not in base and found.startswith(_PREFIX):
        found = found.removeprefix(_PREFIX)
    return found


def _refuse_no_copy(file: Path, name: str, tensor: Array, base: Mapping[str, Any]) -> None:
    """Raises unless a tensor is a weight of the base, which PEFT saves where it may have moved."""
    layer, dot, parameter = name.rpartition(".")
    own = f"{_layer_in(base, layer.removesuffix('.base_layer'))}{dot}{parameter}"
    like = base.get(own)
    if like is None and layer.startswith(_PREFIX):  # of a head that is tied to another leaf
        tied = (x for x in base.values() if x.shape == tensor.shape)
        if any(_is_copy(tensor, x) for x in tied):
            return
    if like is None:
        raise ValueError(
            f"{file} has a tensor {shown(name)} that is no factor of LoRA, nor a copy of a weight "
            "of the base, so the adapter is more than the factors added to its base: merge it by "
            "merge_and_unload of PEFT, and take the edit from the base by lowrank.extract"
        )
    if isinstance(like, jax.ShapeDtypeStruct):
        raise ValueError(
            f"{file} has a tensor {shown(name)} that is no factor of LoRA, but a copy of "
            f"{shown(own)} if that did not move: give base with its values, not shapes alone"
        )
    if tensor.shape != like.shape or not _is_copy(tensor, like):
        raise ValueError(
            f"{file} has a tensor {shown(name)} that is no factor of LoRA, and differs from "
            f"{shown(own)} of base, so it was trained or resized: give the base that the adapter "
            "was trained on, or merge it by merge_and_unload of PEFT and take the edit from the "
            "base by lowrank.extract"
        )


def _is_copy(tensor: Array, like: Any) -> bool:
    """Whether a tensor has the values of a leaf, rounded to the narrower of their dtypes."""
    if isinstance(like, jax.ShapeDtypeStruct):
        return False
    x, y = np.asarray(tensor), np.asarray(like)
    narrow = min(x.dtype, y.dtype, key=lambda dtype: dtype.itemsize)
    return bool(np.array_equal(x.astype(narrow), y.astype(narrow), equal_nan=True))


def _setting(config: Mapping[str, Any], layer: str, field: str, patterns: str) -> Any:
    """A number of a layer, by the first pattern that matches its name, else the one for all."""
    given = config.get(patterns) or {}
    if not isinstance(given, dict):
        raise ValueError(f"{patterns} of {_CONFIG} must map from patterns to numbers, got {given}")
    # A key that matches no layer as a pattern may still be the name of one.
    key = next((key for key in given if _matches(key, layer)), layer)
    value = given.get(key, config.get(field))
    if not (_is_rank(value) if field == "r" else _is_number(value)):
        wanted = "a positive integer" if field == "r" else "a finite number"
        raise ValueError(
            f"{_CONFIG} has {shown(value)} in {field} or {patterns} for layer {shown(layer)}: "
            f"it must be {wanted}, as it was when the adapter was trained"
        )
    return value


def _matches(key: str, layer: str) -> bool:
    """Whether PEFT matches a pattern to a layer: to its name's end, from a dot or the start."""
    try:
        return re.match(rf"(.*\.)?({key})$", layer) is not None
    except re.error as error:
        raise ValueError(
            f"pattern {shown(key)} of {_CONFIG} is no regular expression ({error}): mend it there"
        ) from error


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= float(jnp.finfo(jnp.float32).max)


def _zero(shape: tuple[int, ...]) -> LowRank:
    *stack, m, n = matrix_shape(shape)
    return LowRank(*(jnp.zeros((*stack, size, 0), jnp.float32) for size in (m, n)))


def _refuse_unknown_name(name: str, names: Iterable[str], message: str) -> None:
    """Raises with this message, and the nearest of the names, unless the name is one of them."""
    names = list(names)
    if name not in names:
        near = nearest(name, names, 0.0)
        hint = f"the nearest that it has is {shown(near[0])}" if near else "it has none like it"
        raise ValueError(f"{message}: {hint}")


def _factored(name: str, leaf: LowRank | Leaf) -> LowRank | None:
    """A leaf of an edit as the factors of a layer, or `None` if it is zero."""
    if not isinstance(leaf, LowRank):
        flat(edit={name: leaf})
        if np.any(np.asarray(leaf)):
            mend = (
                "cut it to a rank by lowrank.truncate"
                if np.ndim(leaf) > 1
                else "leave vectors out by vectors=False of lowrank.extract or lowrank.truncate"
            )
            raise ValueError(
                f"edit[{shown(name)}] is dense and not zero, which LoRA cannot hold: {mend}"
            )
        return None
    try:
        left, right = factors_of(leaf)
    except (TypeError, ValueError) as error:
        raise type(error)(f"edit[{shown(name)}]: {error}") from error
    if left.shape[-1] and left.ndim > 2:
        raise ValueError(
            f"edit[{shown(name)}] is of a stack of matrices {leaf.shape}, but a layer of PEFT has "
            "one: give each matrix a name of its own"
        )
    return LowRank(left, right) if left.shape[-1] else None


def _layer_of(name: str) -> str:
    layer, _, parameter = name.rpartition(".")
    if not layer or parameter != "weight":
        raise ValueError(
            f"edit has {shown(name)}, but LoRA edits the weights of layers, named as in "
            "'model.layers.0.mlp.weight': rename it as torch does, or leave it out"
        )
    return layer


def _config_of(ranks: Mapping[str, int], fan_in_fan_out: bool) -> dict[str, Any]:
    """The configuration of layers of these ranks, each with scaling 1."""
    ((usual, _),) = Counter(ranks.values()).most_common(1)
    # PEFT closes a pattern by "$"; one that "^" does not open also speaks of the ends of names.
    others = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "target_modules": "|".join(map(re.escape, ranks)),
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": others,
        "use_rslora": False,
        "fan_in_fan_out": fan_in_fan_out,
        "lora_dropout": 0.0,
        "bias": "none",
    }
