"""The LoRA adapter that keeps 0.9 of the energy of a fine-tuning, in a folder that PEFT reads."""

import pathlib
import tempfile

import jax

from wspace import checkpoint, geometry, lowrank

keys = jax.random.split(jax.random.key(0))
base, tuned = ({"model.up.weight": jax.random.normal(key, (12, 8))} for key in keys)
edit = lowrank.extract(base, tuned, energy=0.9)
folder = pathlib.Path(tempfile.mkdtemp(), "adapter")
checkpoint.save_adapter(folder, edit.factors, base="org/base", task_type="CAUSAL_LM")
landed = lowrank.apply(base, checkpoint.load_adapter(folder, base))
assert abs(geometry.distance(landed, tuned) - edit.tail) < 1e-4 * edit.tail
