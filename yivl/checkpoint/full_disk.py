"""The error of a full disk, which libraries report in several ways."""

import errno
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from safetensors import SafetensorError

from yivl.checkpoint.atomic import temporary_prefix

_CODES: Final = (errno.ENOSPC, errno.EDQUOT)
# safetensors passes on the text of the system; torch.save and NumPy report a refused write without its reason.
_TEXT: Final = re.compile(
    r"No space left|quota exceeded|PytorchStreamWriter|unexpected pos|iostream error|\d+ requested and \d+ written"
)
_NAMED: Final = re.compile(r"(?:No space left on device|quota exceeded): '([^']+)'")
"""A file in the text of an error that a library passes on with another type."""
_SHARED_MEMORY: Final = "/torch_"
"""Beginning of the name of a file by which a data-loading worker passes a batch. Source: PyTorch,
NewProcessWideShmHandle."""


@contextmanager
def explain_full_disk(
    folder: str | os.PathLike[str], how_to_continue: Callable[[], str] = lambda: "run the command again"
) -> Iterator[None]:
    """Raise the errors of a full disk as one that names what was written and says how to continue.

    Args:
        folder: That the block writes; it is named unless the error names a file elsewhere.
        how_to_continue: Returns what to do when there is space.

    Raises:
        OSError: If a disk is full.
    """
    show_thread_error = threading.excepthook

    def hook(error: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread, whose error it raises again in ours.
        is_tensorboard = type(error.thread).__module__.startswith("tensorboard.")
        if not (is_tensorboard and getattr(error.exc_value, "errno", None) in _CODES):
            show_thread_error(error)

    threading.excepthook = hook
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if getattr(error, "errno", None) not in _CODES and not _TEXT.search(str(error)):
            raise
        place, fix = _name_place(error, folder), "free some"
        if f"<{_SHARED_MEMORY}" in str(error):
            place = "/dev/shm"
            fix = "data-loading workers pass batches through it: enlarge it (docker run --shm-size 16g) or free some"
        reason = f"No space left on device, or the quota is exceeded; {fix} and {how_to_continue()}"
        raise OSError(errno.ENOSPC, reason, place) from error
    finally:
        threading.excepthook = show_thread_error


def _name_place(error: Exception, folder: str | os.PathLike[str]) -> str:
    """Return the file that an error names, or the folder if it names none, or one in the folder."""
    named = getattr(error, "filename", None)
    if not isinstance(named, str | os.PathLike):
        match = _NAMED.search(str(error))
        named = match[1] if match else folder
    target = Path(folder).resolve()
    is_inside = os.path.realpath(named).startswith((f"{target}{os.sep}", temporary_prefix(target)))
    return os.fspath(folder if is_inside else named)
