"""Errors of a full disk, which libraries report in several ways."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from safetensors import SafetensorError

NO_SPACE: Final = "No space left on device, or the quota is exceeded"
_CODES: Final = (errno.ENOSPC, errno.EDQUOT)
# safetensors passes on the text of the system; torch.save and NumPy report a refused write without its reason.
_TEXTS: Final = (
    *("No space left", "quota exceeded", "PytorchStreamWriter", "unexpected pos", "iostream error"),
    " requested and ",  # the end of NumPy's message: "65536 requested and 43184 written"
)


ERRORS: Final = (OSError, RuntimeError, SafetensorError)
"""Types of these errors."""


def is_full_disk(error: BaseException) -> bool:
    """Return whether a disk is full, or a quota exceeded."""
    return isinstance(error, ERRORS) and (
        getattr(error, "errno", None) in _CODES or any(text in str(error) for text in _TEXTS)
    )


@contextmanager
def explain_full_disk(target: str | os.PathLike[str]) -> Iterator[None]:
    """Raise the errors of a full disk as one that names the file or folder that was to be written.

    Raises:
        OSError: If the disk is full.
    """
    try:
        yield
    except ERRORS as error:
        if not is_full_disk(error):
            raise
        raise OSError(errno.ENOSPC, f"{NO_SPACE}; free some and start again", os.fspath(target)) from error
