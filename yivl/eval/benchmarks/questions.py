"""Questions to be answered alone, and the data sets that benchmarks keep them in."""

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from yivl.checkpoint.loading import reason_of
from yivl.errors import YiVLError
from yivl.inference.chat import ImageInput


@dataclass(frozen=True)
class Question:
    """One question, asked in a conversation of its own."""

    id: str
    prompt: str
    picture: Callable[[], ImageInput | None]
    """Reads the picture that is shown with it, once it is wanted."""
    fields: Mapping[str, Any]
    """What a response is scored by."""
    picture_key: str = ""
    """Tells its picture from another."""
    is_blank: bool = False
    """Whether pixel values of zero, the mean colour, are shown in place of the picture."""


def read_split(data: str, split: str) -> Any:
    """Return a split of a benchmark as a ``datasets.Dataset`` in the order of its files' paths, pictures not decoded.

    Args:
        data: A folder with ``.parquet`` files as the hub has them (``Accounting/validation-00000-of-00001.parquet``,
            ``data/val-*.parquet``), a folder of ``save_to_disk`` (one, or one for each subject), or a hub id.
        split: Its name, with which the names of the parquet files begin.

    Raises:
        YiVLError: If there is no such folder or data set, it has no such split, or a file is damaged.
    """
    import datasets  # slow to import

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    folder = Path(data).expanduser()
    if not folder.is_dir():
        folder = _download(data, split)
    saved = sorted(path.parent for path in folder.rglob("dataset_dict.json"))
    files = sorted(path for path in folder.rglob("*.parquet") if path.name.startswith((f"{split}-", f"{split}.")))
    try:
        if saved:
            parts = [datasets.load_from_disk(os.fspath(path)) for path in saved]
            found = [part[split] for part in parts if split in part]
        else:
            paths = [os.fspath(path) for path in files]
            found = [datasets.load_dataset("parquet", data_files={split: paths}, split=split)] if files else []
        if not found:
            raise YiVLError(f"{data}: no split {split!r}; expected {split}-*.parquet files or folders of save_to_disk")
        dataset = datasets.concatenate_datasets(found)
        for column in picture_columns(dataset):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    except YiVLError:
        raise
    except (datasets.exceptions.DatasetsError, OSError, ValueError, TypeError) as error:
        raise YiVLError(f"{data}: split {split!r} cannot be read ({' '.join(str(error).split())})") from error
    if not len(dataset):
        raise YiVLError(f"{data}: split {split!r} has no rows")
    return dataset


def picture_columns(dataset: Any) -> list[str]:
    """Return the columns that hold pictures."""
    return [name for name in dataset.column_names if re.fullmatch(r"image_\d+", name)]


def file_key(path: Path) -> str:
    """Return what tells a file from another one, or from an earlier one in its place: path, size and time."""
    if not path.is_file():
        return os.fspath(path)
    about = path.stat()
    return f"{path.resolve()} {about.st_size} {about.st_mtime_ns}"


def picture_bytes(dataset: Any, row: int, column: str) -> bytes | Path | None:
    """Return the picture in a cell, ``None`` if the cell is empty."""
    cell = dataset[column][row]
    if cell is None:
        return None
    data: bytes | None = cell["bytes"]
    return Path(cell["path"]) if data is None else data


def _download(data: str, split: str) -> Path:
    """Return the local folder of the parquet files of a split on the hub."""
    try:
        patterns = [f"{split}-*.parquet", f"*/{split}-*.parquet"]
        return Path(snapshot_download(data, repo_type="dataset", allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise YiVLError(
            f"{data}: no such folder, and no data set of that name could be downloaded; give a folder with its parquet "
            f"files or a hub id such as MMMU/MMMU ({reason_of(error)})"
        ) from error
