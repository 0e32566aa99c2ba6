"""Local folders of models that are named by a folder or a hub id."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from yivl.checkpoint.format import UNUSED_FILES
from yivl.errors import CheckpointError


def resolve_checkpoint(model_path: str | os.PathLike[str]) -> Path:
    """Return the local folder of a checkpoint, after downloading a hub id.

    Raises:
        CheckpointError: If there is no such folder and no such repository can be reached.
    """
    if not os.fspath(model_path):
        raise CheckpointError("the model path is empty; give a checkpoint folder or a hub id")
    folder = Path(model_path)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(os.fspath(model_path), ignore_patterns=[*UNUSED_FILES]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model_path}: no such folder, and no model of that name could be downloaded; give a Yi-VL checkpoint "
            f"folder or a hub id such as 01-ai/Yi-VL-6B ({reason_of(error)})"
        ) from error


def reason_of(error: BaseException) -> str:
    """Return the root cause of a failed download in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}"
