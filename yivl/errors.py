"""User-facing errors: the message is one line, ``<file or flag>: <reason>; <fix>``.

Entry scripts print the message and exit with code 2. Any other exception is a bug and keeps its traceback.
"""


class YiVLError(ValueError):
    """Base class of user-facing errors."""


class ImageError(YiVLError):
    """An image that cannot be used."""


class RowError(YiVLError):
    """An invalid row; the message names file, row and reason."""


class CheckpointError(YiVLError):
    """A checkpoint, adapter or tensor that cannot be used."""


class NonFiniteError(CheckpointError):
    """Logits that are NaN or infinite: the weights are damaged, or exceed the range of the dtype."""


class ContextLengthError(YiVLError):
    """A conversation that exceeds the context length."""


class Stopped(SystemExit):
    """The end of all ranks of a run after the same step, because of a signal; the code is 128 and its number."""
