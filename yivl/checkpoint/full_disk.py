"""The error of a full disk, which libraries report in several ways."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from safetensors import SafetensorError

_CODES: Final = (errno.ENOSPC, errno.EDQUOT)
# safetensors passes on the text of the system; torch.save and NumPy report a refused write without its reason.
_TEXTS: Final = (
    *("No space left", "quota exceeded", "PytorchStreamWriter", "unexpected pos", "iostream error"),
    "requested and",
)


@contextmanager
def explain_full_disk(
    folder: str | os.PathLike[str], how_to_continue: Callable[[], str] = lambda: "run the command again"
) -> Iterator[None]:
    """Raise the errors of a full disk as one that names the written folder and says how to continue.

    Args:
        folder: To name.
        how_to_continue: Returns what to do when there is space.

    Raises:
        OSError: If the disk is full.
    """
    show_thread_error = threading.excepthook

    def hook(error: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread, whose error it raises again in ours.
        if getattr(error.exc_value, "errno", None) not in _CODES:
            show_thread_error(error)

    threading.excepthook = hook
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if getattr(error, "errno", None) not in _CODES and not any(text in str(error) for text in _TEXTS):
            raise
        reason = f"No space left on device, or the quota is exceeded; free some and {how_to_continue()}"
        raise OSError(errno.ENOSPC, reason, os.fspath(folder)) from error
    finally:
        threading.excepthook = show_thread_error
