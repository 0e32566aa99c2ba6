"""Checkpoints and adapters: format, loading, saving, conversion, hub."""
