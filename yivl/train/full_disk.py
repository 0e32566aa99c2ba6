"""The error of a run whose disk is full, which libraries report in several ways."""

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from safetensors import SafetensorError

from yivl.train.resume import finished_checkpoints

_CODES: Final = (errno.ENOSPC, errno.EDQUOT)
# safetensors passes on the text of the system; torch.save reports a refused write without its reason.
_TEXTS: Final = ("No space left", "quota exceeded", "PytorchStreamWriter", "unexpected pos", "iostream error")


@contextmanager
def explain_full_disk(output_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Raise the errors of a full disk as one that names the output folder and says how to continue.

    Raises:
        OSError: If the disk is full; earlier checkpoints and the log are intact.
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
        newest = finished_checkpoints(output_dir)[-1:]
        how = f"add --resume auto, which continues from {newest[0].name}" if newest else "start the run again"
        reason = f"No space left on device, or the quota is exceeded; free some and {how}"
        raise OSError(errno.ENOSPC, reason, os.fspath(output_dir)) from error
    finally:
        threading.excepthook = show_thread_error
