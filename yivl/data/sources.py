"""Data sources: one file, tar shards, or a YAML mixture of both with weights and limits."""

import glob
import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import yaml

from yivl.data.rows import Row, RowError, parse_row, read_rows

T = TypeVar("T")


@dataclass(frozen=True)
class DataSource:
    """One entry of a mixture.

    Raises:
        RowError: If ``weight`` or ``max_rows`` is not positive, or tar shards, which are streamed, have ``max_rows``.
    """

    data_path: str
    """``.json`` or ``.jsonl`` rows, or ``.tar`` shards with ``*`` and ``{00000..00099}`` patterns."""
    image_folder: str = "."
    weight: float = 1.0
    """Mixture weight. Samples per row and epoch: 0.5 is a random half of the rows, drawn for each epoch; 2 is all of
    them twice. In a mixture with tar shards: the sampling probability relative to the other sources."""
    max_rows: int | None = None
    """Maximum number of rows: a random subset, drawn once and the same in every epoch."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise RowError(f"{self.data_path}: weight {self.weight} is not positive")
        if self.max_rows is not None and self.max_rows < 1:
            raise RowError(f"{self.data_path}: max_rows {self.max_rows} is not positive")
        if self.max_rows is not None and self.is_streamed:
            raise RowError(f"{self.data_path}: tar shards take no max_rows; list fewer shards")

    @property
    def is_streamed(self) -> bool:
        """Whether the source consists of tar shards."""
        return self.data_path.endswith(".tar")

    def shards(self) -> list[str]:
        """Return the paths of the tar shards, in order.

        Raises:
            RowError: If a shard does not exist.
        """
        paths: list[str] = []
        for pattern in expand_braces(self.data_path):
            found = sorted(glob.glob(pattern))
            if not found:
                raise RowError(f"{pattern}: no such tar shard")
            paths += found
        return paths


def read_sources(data_path: str, image_folder: str = ".", max_rows: int | None = None) -> list[DataSource]:
    """Return the data sources of ``--data_path``: the file itself, or the entries of a ``.yaml`` mixture.

    A mixture is a list of the fields of ``DataSource``; its relative paths start at the folder of the YAML file.
    ``image_folder`` and ``max_rows`` are its defaults; tar shards have no ``max_rows``.

    Raises:
        RowError: If the mixture cannot be read, or an entry is invalid.
    """
    if not data_path.endswith((".yaml", ".yml")):
        return [DataSource(data_path, image_folder, max_rows=None if data_path.endswith(".tar") else max_rows)]
    try:
        entries = yaml.safe_load(Path(data_path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise RowError(f"{data_path}: not readable YAML; quote a path that begins with a brace ({reason})") from error
    known = [field.name for field in fields(DataSource)]
    if not isinstance(entries, list) or not entries:
        raise RowError(f"{data_path}: expected a list of sources with the keys {', '.join(known)}")
    folder = os.path.dirname(data_path)
    sources = []
    for index, entry in enumerate(entries):
        place = f"{data_path} entry {index}"
        if not isinstance(entry, dict) or "data_path" not in entry:
            raise RowError(f"{place}: no data_path")
        if unknown := entry.keys() - set(known):
            raise RowError(f"{place}: unknown key {sorted(unknown)[0]!r}; expected one of {', '.join(known)}")
        if not isinstance(entry.get("weight", 1), int | float):
            raise RowError(f"{place}: weight {entry['weight']!r} is not a number")
        for key in entry.keys() & {"data_path", "image_folder"}:
            entry[key] = os.path.join(folder, os.path.expanduser(str(entry[key])))
        is_streamed = entry["data_path"].endswith(".tar")
        defaults: dict[str, Any] = {"image_folder": image_folder, "max_rows": None if is_streamed else max_rows}
        try:
            sources.append(DataSource(**defaults | entry))
        except (TypeError, RowError) as error:
            raise RowError(f"{place}: {error}") from error
    return sources


def expand_braces(pattern: str) -> list[str]:
    """Return the paths of a pattern with ``{00000..00099}`` ranges, the naming of img2dataset shards.

    >>> expand_braces("{08..10}.tar")
    ['08.tar', '09.tar', '10.tar']
    """
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)
    ranges = [
        [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        for first, last in zip(parts[1::3], parts[2::3], strict=True)
    ]
    texts = parts[0::3]
    return ["".join(a + b for a, b in zip(texts, [*numbers, ""], strict=True)) for numbers in product(*ranges)]


def load_rows(source: DataSource, seed: int, on_bad_row: Callable[[RowError], None]) -> list[Row]:
    """Return the valid rows of a file in its order, or the subset of ``max_rows`` that ``seed`` determines.

    Raises:
        RowError: If the file cannot be read, or by ``on_bad_row``, which is called with every invalid row.
    """
    if not source.data_path.endswith((".json", ".jsonl")):
        raise RowError(f"{source.data_path}: expected a .json, .jsonl, .tar or .yaml file")
    rows: list[Row] = []
    for origin, entry in read_rows(source.data_path):
        try:
            rows.append(parse_row(entry, origin, source.image_folder))
        except RowError as error:
            on_bad_row(error)
    if source.max_rows is not None and len(rows) > source.max_rows:
        rows = subsample(rows, source.max_rows, seed)
    return rows


def subsample(items: Sequence[T], count: int, seed: int | str) -> list[T]:
    """Return a random subset of ``count`` items, in their order."""
    return [items[index] for index in sorted(random.Random(seed).sample(range(len(items)), count))]
