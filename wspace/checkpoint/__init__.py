"""Weights in files, and adapters of other systems.

A safetensors file holds a flat mapping from names to tensors, and such a mapping is a tree of
weights. An adapter is a folder with such a file of LoRA factors, and is an edit of the weights
it was trained on. Both are data only: reading one runs no code.
"""

from wspace.checkpoint.adapter import load_adapter, save_adapter
from wspace.checkpoint.tensors import load, save

__all__ = ["load", "load_adapter", "save", "save_adapter"]
