"""The module paths of the reference implementation, with names from ``yivl``. Source: 01-ai/Yi, VL/llava."""
