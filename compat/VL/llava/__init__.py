"""The module paths of the release's ``VL/llava``, each name of it from ``yivl``. Source: 01-ai/Yi, VL/llava."""
