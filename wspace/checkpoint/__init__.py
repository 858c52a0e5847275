"""Weights in files, and adapters of other systems.

A safetensors file holds a flat mapping from names to tensors, and such a mapping is a tree of
weights. It is data only: reading one runs no code.
"""

from wspace.checkpoint.tensors import load, save

__all__ = ["load", "save"]
