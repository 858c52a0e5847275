"""Task arithmetic of models in .safetensors files."""

import pathlib
import tempfile

import jax.numpy as jnp
from safetensors import safe_open

from wspace import checkpoint, merge

folder = pathlib.Path(tempfile.mkdtemp())
for name, value in {"base": 1.0, "a": 2.0, "c": 4.0}.items():
    checkpoint.save(folder / f"{name}.safetensors", {"layer": {"weight": jnp.full(2, value)}})
base, a, c = (checkpoint.load(folder / f"{name}.safetensors") for name in ("base", "a", "c"))
checkpoint.save(folder / "merged", merge.task_arithmetic(base, [a, c], (1, -0.5)))
with safe_open(folder / "merged" / "model.safetensors", "numpy") as file:
    assert file.get_tensor("layer.weight").tolist() == [0.5, 0.5]
    assert file.metadata()["format"] == "pt"
