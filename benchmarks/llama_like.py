"""Folders that look like a base of the Llama family and two models tuned from it, for benchmarks.

They are written by the package safetensors alone, as other programs write them: shards of 1 GB
with an index, tensors in the order of their names, a config.json. Weights are Gaussian, those of
a tuned model the base's plus a tenth of their size.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy

MODELS = ("base", "a", "c")
SHARD = 10**9
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
_SPREAD, _TUNED = 0.02, 0.1
_WIDTHS, _LEAST_LAYERS = (4096, 2048, 1024, 512, 256, 128), 8


def config(gib: float, dtype: str) -> dict[str, Any]:
    """The configuration of a model of this size: the widest that has eight layers."""
    count = gib * 2**30 / DTYPES[dtype].itemsize
    for width in _WIDTHS:  # 16 squares of the width are embeddings, 10.75 are a layer
        layers = round((count / width**2 - 16) / 10.75)
        if layers >= _LEAST_LAYERS:
            break
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": width * 11 // 4,
        "num_attention_heads": width // 64,
        "num_key_value_heads": max(width // 256, 1),
        "num_hidden_layers": max(layers, 1),
        "vocab_size": 8 * width,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": dtype,
    }


def shapes(sizes: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a configuration, in the order in which they are stored."""
    width, wide = sizes["hidden_size"], sizes["intermediate_size"]
    words, narrow = sizes["vocab_size"], 64 * sizes["num_key_value_heads"]
    layer = {
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (narrow, width),
        "self_attn.v_proj": (narrow, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (wide, width),
        "mlp.up_proj": (wide, width),
        "mlp.down_proj": (width, wide),
    }
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (words, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (words, width),
    }
    for i in range(sizes["num_hidden_layers"]):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return dict(sorted(found.items()))


def write(home: Path, gib: float, dtype: str) -> dict[str, Path]:
    """The folders of the models in `home`; those that are there from before are kept."""
    folders = {}
    for seed, model in enumerate(MODELS):
        folders[model] = folder = home / f"{model}-{gib:g}-{dtype}"
        if (folder / "config.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        sizes = config(gib, dtype)
        shards, where = list(_shards(shapes(sizes), DTYPES[dtype].itemsize)), {}
        for i, shard in enumerate(shards):
            part = f"-{i + 1:05}-of-{len(shards):05}" if len(shards) > 1 else ""
            file = f"model{part}.safetensors"
            tensors = {
                name: _drawn(name, shape, seed).astype(DTYPES[dtype])
                for name, shape in shard.items()
            }
            safetensors.numpy.save_file(tensors, folder / file, {"format": "pt"})
            where |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            total = DTYPES[dtype].itemsize * sum(map(math.prod, shapes(sizes).values()))
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps(sizes, indent=2))
    return folders


def size(folder: Path) -> int:
    """Bytes of the tensors in a folder, headers included."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _shards(
    tensors: dict[str, tuple[int, ...]], itemsize: int
) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    for name, shape in tensors.items():
        if shard and sum(map(math.prod, [*shard.values(), shape])) * itemsize > SHARD:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def _drawn(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A tensor of the base, or of the model tuned from it with a seed."""
    norm = len(shape) == 1
    x = _SPREAD * _gaussian(name, shape, 0) + np.float32(norm)
    return x + _TUNED * _SPREAD * _gaussian(name, shape, seed) if seed else x


def _gaussian(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng([seed, *name.encode()])
    return rng.standard_normal(shape, dtype=np.float32)
