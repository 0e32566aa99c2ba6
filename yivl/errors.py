"""Mistakes in what the user gave. Their message is one line that names the culprit and the fix.

Entry scripts show the message and leave with exit code 2; anything else is a bug and keeps its traceback.
"""


class YiVLError(ValueError):
    """Base of the errors below."""


class ImageError(YiVLError):
    """A picture that cannot be used."""


class CheckpointError(YiVLError):
    """A model folder, hub id, adapter or key that cannot be used."""


class ContextLengthError(YiVLError):
    """A conversation that no longer fits the context."""
