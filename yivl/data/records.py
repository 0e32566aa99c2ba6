"""Records: the rows of a file or data set as they are stored, memory-mapped, before they are validated."""

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import datasets
import pyarrow
import pyarrow.parquet
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

from yivl.data.json_texts import check_regular, parse_text, read_texts, row_unit
from yivl.data.row_cache import build_once, cache_lock, content_hash
from yivl.errors import RowError

HUB: Final = "hub:"
"""Prefix of the name of a data set that ``datasets.load_dataset`` loads."""

_VERSION: Final = 1
"""Of the stored records; raise it when the same file yields others."""

_BATCH: Final = 2**22
"""Characters or bytes that are written at once. Source: ours."""


@dataclass(frozen=True)
class Records:
    """The rows of one file or data set."""

    path: str
    """As given, for messages."""
    dataset: Any
    """``datasets.Dataset`` with the columns of the rows, or with their ``number`` and JSON ``text``."""
    holds_json: bool
    fingerprint: str
    """Hash of the content, whatever its name."""

    def __len__(self) -> int:
        return len(self.dataset)

    def origin(self, place: int) -> str:
        """Return the origin of a row, for messages."""
        number = self.dataset.data.column("number")[place].as_py() if self.holds_json else place
        return f"{self.path} {row_unit(self.path)} {number}"

    def __getitem__(self, place: int) -> Any:
        """Return what ``parse_row`` takes."""
        if self.holds_json:
            return parse_text(self.dataset.data.column("text")[place].as_py())
        # From the Arrow table: the data set itself would decode images.
        return self.dataset.data.slice(place, 1).to_pylist()[0]


def is_dataset(path: str) -> bool:
    """Return whether a path is one of ``datasets``: a name on the hub, or a folder of ``Dataset.save_to_disk``."""
    return path.startswith(HUB) or os.path.isfile(os.path.join(path, "state.json"))


def open_records(path: str) -> Records:
    """Return the records of a file or data set, from the cache if one of the same content was read before.

    Raises:
        RowError: If it cannot be read, is not of its type, or has no rows.
        OSError: If the disk of the cache is full.
    """
    if path.startswith(HUB):
        return _load_hub(path)
    try:
        if is_dataset(path):
            return _load_folder(path)
        check_regular(path)
        content = content_hash(path)
    except OSError as error:
        raise RowError(f"{path}: cannot be read ({error.strerror or error})") from error
    is_parquet = path.endswith(".parquet")
    write: Callable[[str, Path], None] = _write_parquet if is_parquet else _write_json
    kind = "parquet" if is_parquet else row_unit(path)

    def build(folder: Path) -> None:
        write(path, folder / "rows.arrow")
        if content_hash(path) != content:
            raise RowError(f"{path}: changed while it was read; start again when it is complete")

    folder = build_once(f"{content}-{kind}-{_VERSION}", build)
    return Records(path, datasets.Dataset.from_file(str(folder / "rows.arrow")), not is_parquet, f"{content}-{kind}")


def _write_json(path: str, target: Path) -> None:
    """Write number and text of every row of a JSON file."""
    features = datasets.Features({"number": datasets.Value("int64"), "text": datasets.Value("large_string")})
    numbers: list[int] = []
    texts: list[str] = []
    size = 0
    with ArrowWriter(path=str(target), features=features) as writer:
        for number, text in tqdm(read_texts(path), desc=f"reading {path}", unit="row", disable=None, delay=2):
            numbers.append(number)
            texts.append(text)
            size += len(text)
            if size > _BATCH:
                writer.write_batch({"number": numbers, "text": texts})
                numbers, texts, size = [], [], 0
        writer.write_batch({"number": numbers, "text": texts})
        writer.finalize()


def _write_parquet(path: str, target: Path) -> None:
    """Write the rows of a Parquet file without its compression."""
    with ArrowWriter(path=str(target)) as writer:
        for table in _read_parquet(path):
            try:
                writer.write_table(table.replace_schema_metadata(None))  # of another program, and not needed
            except (ValueError, TypeError, NotImplementedError, KeyError) as error:
                reason = " ".join(str(error).split())
                raise RowError(f"{path}: a column has a type that datasets cannot store ({reason}); drop it") from error
        writer.finalize()


def _read_parquet(path: str) -> Iterator[Any]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
            if not file.metadata.num_rows:
                raise RowError(f"{path}: no rows")
            size = sum(group.total_byte_size for group in groups) // file.metadata.num_rows
            for batch in file.iter_batches(batch_size=max(_BATCH // max(size, 1), 1)):
                yield pyarrow.Table.from_batches([batch])
    except (OSError, pyarrow.ArrowException) as error:
        raise RowError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())})") from error


def _load_folder(path: str) -> Records:
    """Return the records of a folder of ``Dataset.save_to_disk``."""
    try:
        dataset = datasets.load_from_disk(path, keep_in_memory=False)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError, pyarrow.ArrowException) as error:
        raise RowError(f"{path}: not a folder of Dataset.save_to_disk ({' '.join(str(error).split())})") from error
    return Records(path, dataset, False, _hash_files(dataset, ""))


def _hash_files(dataset: Any, split: str) -> str:
    """Return a hash of the content of the files of a data set, whatever their names, and of the split of them."""
    contents = [content_hash(file["filename"]) for file in dataset.cache_files]
    return hashlib.sha256("".join([split, *contents]).encode()).hexdigest()


def _load_hub(path: str) -> Records:
    """Return the split of a data set on the hub, ``hub:owner/name[@revision][:split]``; by default ``train``.

    No code of the data set is executed: ``datasets`` reads data files only.
    """
    name, _, split = path.removeprefix(HUB).partition(":")
    name, _, revision = name.partition("@")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    split = split or "train"
    try:
        with cache_lock(f"hub-{hashlib.sha256(name.encode()).hexdigest()}"):
            dataset = datasets.load_dataset(name, split=split, revision=revision or None, keep_in_memory=False)
        # Not the fingerprint of the data set, which depends on the path and time stamps of its files.
        return Records(path, dataset, False, _hash_files(dataset, split))
    except Exception as error:  # of the network, the hub, the readers of files: there is no common type
        if "No space left on device" in str(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RowError(f"{path}: cannot be loaded ({reason}); expected {HUB}owner/name[@revision][:split]") from error
