"""The error of a run whose disk is full."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from yivl.checkpoint.full_disk import ERRORS, NO_SPACE, is_full_disk
from yivl.train.resume import finished_checkpoints


@contextmanager
def explain_full_disk(output_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Raise the errors of a full disk as one that names the output folder and says how to continue.

    Raises:
        OSError: If the disk is full; earlier checkpoints and the log are intact.
    """
    try:
        yield
    except ERRORS as error:
        if not is_full_disk(error):
            raise
        newest = finished_checkpoints(output_dir)[-1:]
        how = f"add --resume auto, which continues from {newest[0].name}" if newest else "start the run again"
        raise OSError(errno.ENOSPC, f"{NO_SPACE}; free some and {how}", os.fspath(output_dir)) from error
