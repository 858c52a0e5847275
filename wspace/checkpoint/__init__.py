"""Weights in files, and adapters of other systems.

A safetensors file holds a flat mapping from names to tensors, and such a mapping is a tree of
weights; a nested tree is written by its joined names. One that is larger than memory is read and
written tensor by tensor. An adapter is a folder with such a file of LoRA factors, and is an edit of
the weights it was trained on. All of them are data only: reading one runs no code.
"""

from wspace.checkpoint.adapter import load_adapter, save_adapter
from wspace.checkpoint.orbax import load_orbax, save_orbax
from wspace.checkpoint.stored import Checkpoint, Stored, open
from wspace.checkpoint.streaming import Nonfinite, stream
from wspace.checkpoint.trees import load, save
from wspace.checkpoint.writer import Layout, Writer, create

__all__ = [
    "Checkpoint",
    "Layout",
    "Nonfinite",
    "Stored",
    "Writer",
    "create",
    "load",
    "load_adapter",
    "load_orbax",
    "open",
    "save",
    "save_adapter",
    "save_orbax",
    "stream",
]
