"""Where rows come from: one file, tar shards, or a YAML mixture of both with weights and limits."""

import glob
import os
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from yivl.data.rows import Row, RowError, parse_row, read_rows


@dataclass(frozen=True)
class Source:
    """One part of the data.

    Raises:
        RowError: If the weight is not positive, or ``max_rows`` is not, or limits tar shards, whose rows nobody counts.
    """

    data_path: str
    """``.json`` or ``.jsonl`` rows, or ``.tar`` shards with ``*`` and ``{00000..00099}`` patterns."""
    image_folder: str = "."
    weight: float = 1.0
    """How often a row is seen per epoch: 0.5 is half the rows, 2 is all of them twice. In a stream with tar shards:
    how often the source is drawn from, relative to the others."""
    max_rows: int | None = None
    """At most so many rows, drawn at random once."""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise RowError(f"{self.data_path}: weight {self.weight} is not positive")
        if self.max_rows is not None and self.max_rows < 1:
            raise RowError(f"{self.data_path}: max_rows {self.max_rows} is not positive")
        if self.max_rows is not None and self.is_stream:
            raise RowError(f"{self.data_path}: tar shards take no max_rows; name fewer shards")

    @property
    def is_stream(self) -> bool:
        """Whether rows are read from tar shards as they come."""
        return self.data_path.endswith(".tar")

    def shards(self) -> list[str]:
        """Return the paths of the tar shards, in order.

        Raises:
            RowError: If one that is named does not exist.
        """
        paths: list[str] = []
        for pattern in expand_braces(self.data_path):
            found = sorted(glob.glob(pattern))
            if not found:
                raise RowError(f"{pattern}: no such tar shard")
            paths += found
        return paths


def read_sources(data_path: str, image_folder: str = ".", max_rows: int | None = None) -> list[Source]:
    """Return the sources of a data path: itself, or those a ``.yaml`` mixture lists.

    A mixture is a list of the fields of ``Source``; its relative paths start at the folder of the YAML file.

    Args:
        data_path: ``.json``, ``.jsonl``, ``.tar`` or ``.yaml``.
        image_folder: For sources that do not name their own.
        max_rows: For sources that do not name their own; tar shards have no limit.

    Raises:
        RowError: If the mixture cannot be read or names what is not known.
    """
    if not data_path.endswith((".yaml", ".yml")):
        source = Source(data_path, image_folder)
        return [source if source.is_stream else replace(source, max_rows=max_rows)]
    try:
        entries = yaml.safe_load(Path(data_path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise RowError(
            f"{data_path}: not a readable YAML file; a path that begins with a brace needs quotes ({reason})"
        ) from error
    known = [field.name for field in fields(Source)]
    if not isinstance(entries, list) or not entries:
        raise RowError(f"{data_path}: expected a list of sources with the keys {', '.join(known)}")
    folder = os.path.dirname(data_path)
    sources = []
    for index, entry in enumerate(entries):
        place = f"{data_path} entry {index}"
        if not isinstance(entry, dict) or "data_path" not in entry:
            raise RowError(f"{place}: no data_path")
        if unknown := entry.keys() - set(known):
            raise RowError(f"{place}: unknown key {sorted(unknown)[0]!r}; known are {', '.join(known)}")
        if not isinstance(entry.get("weight", 1), int | float):
            raise RowError(f"{place}: weight {entry['weight']!r} is no number")
        for key in ("data_path", "image_folder"):
            if key in entry:
                entry[key] = os.path.join(folder, os.path.expanduser(str(entry[key])))
        try:
            source = replace(Source(entry["data_path"], image_folder), **entry)
        except (TypeError, RowError) as error:
            raise RowError(f"{place}: {error}") from error
        sources.append(source if source.is_stream or "max_rows" in entry else replace(source, max_rows=max_rows))
    return sources


def expand_braces(pattern: str) -> list[str]:
    """Return the paths of a pattern with ``{00000..00099}`` ranges, as img2dataset shards are named.

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


def load_rows(source: Source, seed: int, on_bad_row: Callable[[RowError], None]) -> list[Row]:
    """Return the rows of a file that can be parsed, at most ``max_rows`` of them, in the order of the file.

    Args:
        source: A ``.json`` or ``.jsonl`` file.
        seed: Of the draw where there are more than ``max_rows``.
        on_bad_row: Called with every row that cannot be parsed; may raise.

    Raises:
        RowError: If the file cannot be read.
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
        rows = draw(rows, source.max_rows, seed)
    return rows


def weigh_rows(rows: Sequence[Row], weight: float, seed: int) -> list[Row]:
    """Return the rows of one epoch: whole repeats, and a random draw for the rest of ``weight``."""
    total = max(round(len(rows) * weight), 1) if rows else 0
    repeats, rest = divmod(total, len(rows)) if rows else (0, 0)
    return [*rows] * repeats + draw(rows, rest, seed)


def draw(rows: Sequence[Any], count: int, seed: int) -> list[Any]:
    """Return ``count`` different rows drawn at random, in their order."""
    chosen = random.Random(seed).sample(range(len(rows)), count)
    return [rows[index] for index in sorted(chosen)]
