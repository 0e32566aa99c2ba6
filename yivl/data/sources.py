"""Data sources: files or tar shards, or a YAML mixture of both with names, weights and limits."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from yivl.data.json_texts import check_regular
from yivl.data.meta_files import read_meta
from yivl.data.orders import subsample
from yivl.data.patterns import expand_braces, matching_paths
from yivl.data.records import HUB, is_dataset
from yivl.data.row_file import open_rows
from yivl.data.row_table import RowTable
from yivl.data.rows import RowError
from yivl.data.shard_file import check_urls, is_remote
from yivl.errors import YiVLError
from yivl.files.yaml_files import read_yaml

logger = logging.getLogger(__name__)

_KEYS: Final = ("data_path", "image_folder", "weight", "max_rows", "name")
"""Fields of ``DataSource`` that a YAML mixture may set."""


@dataclass(frozen=True)
class DataSource:
    """One named source of a mixture: files of rows, or tar shards.

    Raises:
        RowError: If ``weight`` is not positive or ``max_rows`` not a positive integer, there is no path, or files and
            tar shards are mixed.
    """

    data_path: str | tuple[str, ...]
    """``.json``, ``.jsonl`` or ``.parquet`` rows, a folder of ``Dataset.save_to_disk``, ``hub:owner/name`` (see
    ``open_records``), or ``.tar`` shards, which may be URLs. Each path of files may have ``*``, URLs may not, and
    ``{00000..00099}`` patterns."""
    image_folder: str | tuple[str, ...] = "."
    """Base folder of relative image paths, or one for each path of ``data_path``."""
    weight: float = 1.0
    """Mixture weight. Samples per row and epoch: 0.5 is a random half of the rows, drawn for each epoch; 2 is all of
    them twice. In a mixture with tar shards: the sampling probability relative to the other sources."""
    max_rows: int | None = None
    """Maximum number of rows of all files together, a random subset that is drawn once and the same in every epoch,
    and maximum number of samples per epoch, whatever the weight."""
    name: str = ""
    """For tables and messages; by default the paths."""
    allow_outside_images: bool = False
    """Whether images may be outside of the image folder; a flag, which a mixture cannot set."""
    first_part: float = 1.0
    """Fraction of the rows that is used, those at the beginning: a ``repeat_time`` below 1 of a meta file."""
    stated_length: int | None = None
    """Number of rows that a meta file states; a warning if the files have another."""

    def __post_init__(self) -> None:
        if not self.name:
            first, *others = self.paths or ("",)
            object.__setattr__(self, "name", f"{first} and {len(others)} more" if others else first)
        if not 0 < self.weight < math.inf:
            raise RowError(f"{self.name}: weight {self.weight} is not a positive finite number")
        if self.max_rows is not None and type(self.max_rows) is not int:  # YAML reads 5e4 as text and yes as true
            raise RowError(f"{self.name}: max_rows {self.max_rows!r} is not an integer")
        if self.max_rows is not None and self.max_rows < 1:
            raise RowError(f"{self.name}: max_rows {self.max_rows} is not positive")
        if not self.paths:
            raise RowError(f"{self.name}: no data_path")
        if len({path.endswith(".tar") for path in self.paths}) > 1:
            raise RowError(f"{self.name}: both tar shards and files; give them different names")

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths and patterns of ``data_path``."""
        return (self.data_path,) if isinstance(self.data_path, str) else tuple(self.data_path)

    @property
    def folders(self) -> tuple[str, ...]:
        """The image folder of every path."""
        return (self.image_folder,) * len(self.paths) if isinstance(self.image_folder, str) else self.image_folder

    @property
    def is_streamed(self) -> bool:
        """Whether the source consists of tar shards."""
        return self.paths[0].endswith(".tar")

    def files(self) -> list[tuple[str, str]]:
        """Return the path and the image folder of every file or tar shard, in order.

        Raises:
            RowError: If a path does not exist, or a file is named twice.
        """
        files: dict[str, tuple[str, str]] = {}
        for path, folder in zip(self.paths, self.folders, strict=True):
            if is_dataset(path):
                files[path] = (path, folder)
                continue
            if not path.endswith((".json", ".jsonl", ".parquet", ".tar")):
                raise RowError(f"{path}: expected a .json, .jsonl, .parquet, .tar or .yaml file, or {HUB}owner/name")
            for pattern in expand_braces(path):
                # What a URL names is found when it is read: looking up 10,000 shards takes minutes.
                found = [pattern] if is_remote(pattern) else matching_paths(pattern)
                if not found:
                    problem = "no such tar shard" if self.is_streamed else "cannot be read (No such file or directory)"
                    raise RowError(f"{pattern}: {problem}")
                for file in found:
                    place = file if is_remote(file) else os.path.abspath(file)
                    if place in files:
                        raise RowError(f"{self.name}: names {file} twice; to train on it more often, give it a weight")
                    files[place] = (file, folder)
        return list(files.values())

    def shards(self) -> list[str]:
        """Return the paths of the tar shards, in order.

        Raises:
            RowError: If a shard does not exist.
        """
        return [path for path, _ in self.files()]

    def subset(self, number: int, seed: int) -> Sequence[int]:
        """Return the indices of the first part of ``number`` rows, or of the ``max_rows`` of them that ``seed`` draws.

        Raises:
            RowError: If the first part has no row.
        """
        first = int(number * self.first_part)  # Source: OpenGVLab/InternVL, LazySupervisedDataset
        if number and not first:
            raise RowError(f"{self.name}: a repeat_time of {self.first_part} keeps none of {number:,} rows; raise it")
        return (
            range(first) if self.max_rows is None or first <= self.max_rows else subsample(first, self.max_rows, seed)
        )

    def samples_per_epoch(self, num_rows: int) -> int:
        """Return how many samples an epoch has of ``num_rows`` rows, which ``max_rows`` has already limited."""
        samples = max(round(num_rows * self.weight), min(num_rows, 1))
        return samples if self.max_rows is None else min(samples, self.max_rows)


def read_sources(
    data_path: str,
    image_folder: str = ".",
    max_rows: int | None = None,
    *,
    allow_outside_images: bool = False,
    allow_remote_data: bool = False,
) -> list[DataSource]:
    """Return the data sources of ``--data_path``: the files themselves, or the entries of a mixture.

    A ``.yaml`` mixture is a list of the fields of ``DataSource``; its relative paths start at the folder of the file.
    Entries of the same name are one source. ``image_folder`` and ``max_rows`` are the defaults of all entries. A
    mixture is also a ``.json`` meta file of InternVL, see ``read_meta``.

    Raises:
        RowError: If the mixture cannot be read, an entry is invalid, or entries of the same name contradict each other.
        YiVLError: If a path is a URL, without ``allow_remote_data`` or the package that reads it.
    """
    sources = _read_mixture(data_path, image_folder, max_rows, allow_outside_images)
    check_urls((path for source in sources for path in source.paths), is_allowed=allow_remote_data)
    for source in sources:
        if source.max_rows is not None and any(map(is_remote, source.paths)):
            raise RowError(
                f"{source.name}: max_rows needs the headers of all shards, which would download them; drop max_rows "
                "(or --max_rows_per_source), or name fewer shards"
            )
    return sources


def _read_mixture(
    data_path: str, image_folder: str, max_rows: int | None, allow_outside_images: bool
) -> list[DataSource]:
    defaults: dict[str, Any] = {"image_folder": image_folder, "max_rows": max_rows}
    defaults["allow_outside_images"] = allow_outside_images
    if (sets := read_meta(data_path)) is not None:
        return [DataSource(**defaults | fields) for fields in sets]
    if not data_path.endswith((".yaml", ".yml")) or is_remote(data_path):
        return [DataSource(data_path, **defaults)]
    try:
        check_regular(data_path)
        entries = read_yaml(Path(data_path))
    except RowError:
        raise
    except OSError as error:
        raise RowError(f"{data_path}: cannot be read ({error.strerror})") from error
    except YiVLError as error:
        hint = "; quote a path that begins with a brace" if error.__cause__ else ""  # not if it exceeds the limits
        raise RowError(f"{error}{hint}") from error
    if not isinstance(entries, list) or not entries:
        raise RowError(f"{data_path}: expected a list of sources with the keys {', '.join(_KEYS)}")
    sources: dict[str | int, DataSource] = {}
    for index, entry in enumerate(entries):
        place = f"{data_path} entry {index}"
        if not isinstance(entry, dict) or not entry.get("data_path"):
            raise RowError(f"{place}: no data_path")
        if unknown := entry.keys() - set(_KEYS):
            raise RowError(f"{place}: unknown key {sorted(map(str, unknown))[0]!r}; expected one of {', '.join(_KEYS)}")
        if not isinstance(entry.get("weight", 1), int | float):
            raise RowError(f"{place}: weight {entry['weight']!r} is not a number")
        try:
            source = DataSource(**defaults | entry | _resolve_paths(entry, os.path.dirname(data_path)))
            key = source.name if entry.get("name") else index
            sources[key] = _merge(sources[key], source) if key in sources else source
        except (TypeError, RowError) as error:
            raise RowError(f"{place}: {error}") from error
    return list(sources.values())


def _resolve_paths(entry: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the fields of an entry that are paths, relative to the folder of the mixture, and its name as text."""
    listed = entry["data_path"] if isinstance(entry["data_path"], list) else [entry["data_path"]]
    if not all(isinstance(path, str) for path in listed):
        raise RowError("'data_path' is not a path or a list of paths")
    paths = [
        path if is_remote(path) or path.startswith(HUB) else os.path.join(folder, os.path.expanduser(path))
        for path in listed
    ]
    resolved: dict[str, Any] = {"data_path": paths[0] if len(paths) == 1 else tuple(paths)}
    if "image_folder" in entry:
        resolved["image_folder"] = os.path.join(folder, os.path.expanduser(str(entry["image_folder"])))
    return resolved | {"name": str(entry.get("name") or "")}


def _merge(first: DataSource, second: DataSource) -> DataSource:
    """Return two entries of one name as one source."""
    for what in ("max_rows", "weight"):
        before, now = getattr(first, what), getattr(second, what)
        if before != now:
            raise RowError(
                f"{what} of {second.name} is {now}, and {before} in an entry before; give one value, or other names"
            )
    return replace(first, data_path=first.paths + second.paths, image_folder=first.folders + second.folders)


def load_rows(source: DataSource, seed: int, on_bad_row: Callable[[RowError], None]) -> RowTable:
    """Return the valid rows of the files in their order, or the subset of ``max_rows`` that ``seed`` determines.

    Raises:
        RowError: If a file cannot be read, or by ``on_bad_row``, which is called with every invalid row.
    """
    return select_rows(source, load_all_rows(source, on_bad_row), seed)


def select_rows(source: DataSource, rows: RowTable, seed: int) -> RowTable:
    """Return all rows of a source, or the subset of ``max_rows`` that ``seed`` determines."""
    chosen = source.subset(len(rows), seed)
    return rows if len(chosen) == len(rows) else rows.select(chosen)


def load_all_rows(source: DataSource, on_bad_row: Callable[[RowError], None]) -> RowTable:
    """Return the valid rows of the files in their order; ``max_rows`` does not apply.

    Raises:
        RowError: As in ``load_rows``.
    """
    parts = []
    for path, image_folder in source.files():
        file = open_rows(path, image_folder)
        for error in file.errors(allow_outside=source.allow_outside_images):
            on_bad_row(error)
        parts.append((file, None if source.allow_outside_images else file.inside()))
    number = sum(len(file.records) for file, _ in parts)
    if source.stated_length not in (None, number):
        logger.warning(
            "%s: its meta file states a length of %s, and it has %s rows",
            source.name,
            f"{source.stated_length:,}",
            f"{number:,}",
        )
    return RowTable(parts)
