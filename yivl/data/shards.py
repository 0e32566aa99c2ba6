"""Tar shards as img2dataset writes them: their samples, rows of samples, and subsets by header."""

import json
import logging
import os
import tarfile
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

from yivl.data.rows import Row, RowError, parse_row
from yivl.data.sources import DataSource

logger = logging.getLogger(__name__)

_IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


def iterate_samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yield the name of every sample of a tar shard and its files by suffix: consecutive files of one name.

    Raises:
        tarfile.TarError: If the shard is damaged.
    """
    named = ((*_split(entry.name), entry) for entry in tar if entry.isreg())
    for name, group in groupby(named, itemgetter(0)):
        yield name, {suffix: entry for _, suffix, entry in group}


def _split(name: str) -> tuple[str, str]:
    """Return the path of a file without suffixes, and all its suffixes."""
    folder, name = os.path.split(name)
    stem, _, suffix = name.partition(".")
    return os.path.join(folder, stem), suffix.lower()


@dataclass(frozen=True)
class ShardSubset:
    """Which samples of the tar shards of one source are read."""

    num_samples: int
    """Samples of all shards."""
    kept: Mapping[str, Sequence[int]]
    """Path of a shard to the indices of its samples; a shard without any is absent, unless it is damaged."""


def select_samples(source: DataSource, seed: int) -> ShardSubset:
    """Return the random subset of ``max_rows`` samples, by shard and index, from the headers of all shards.

    Raises:
        RowError: If a shard does not exist.
    """
    logger.info("counting the samples of %s, for its limit of %s", source.name, f"{source.max_rows:,}")
    counts: dict[str, int] = {}
    damaged: set[str] = set()
    for path in source.shards():
        counts[path] = 0
        try:
            with tarfile.open(path) as tar:
                for _ in iterate_samples(tar):
                    counts[path] += 1
        except (OSError, tarfile.TarError):
            damaged.add(path)  # reading it reports the damage, after the samples before it
    chosen = source.subset(range(sum(counts.values())), seed)
    kept: dict[str, Sequence[int]] = {}
    start = 0
    for path, number in counts.items():
        indices = chosen[bisect_left(chosen, start) : bisect_left(chosen, start + number)]
        if indices or path in damaged:
            is_whole = len(indices) == number
            kept[path] = range(number) if is_whole else [index - start for index in indices]
        start += number
    return ShardSubset(start, kept)


def parse_shard_sample(sample: Mapping[str, Any]) -> Row:
    """Return the row of one sample of a tar shard: an image, and a caption or a conversation.

    The image is ``jpg``, ``jpeg``, ``png`` or ``webp``; the caption is ``txt``, or ``caption`` or ``text`` in ``json``.
    A ``json`` with ``conversations`` is a row as ``parse_row`` documents it.

    Raises:
        RowError: If there is no image or no text, or the conversation is invalid.
    """
    origin, files = sample["origin"], sample["files"]
    if sample["error"]:
        raise RowError(f"{origin}: {sample['error']}")
    image = next((files[suffix] for suffix in _IMAGE_SUFFIXES if files.get(suffix)), None)
    if image is None:
        raise RowError(f"{origin}: no image; expected one of {', '.join(_IMAGE_SUFFIXES)}")
    try:
        text = files.get("txt", b"").decode("utf-8")
        fields = json.loads(files.get("json") or b"{}")
    except ValueError as error:  # invalid UTF-8 and invalid JSON
        raise RowError(f"{origin}: txt or json cannot be read ({error})") from error
    if not isinstance(fields, dict):
        raise RowError(f"{origin}: json is not an object")
    if "conversations" in fields:
        return parse_row({"conversations": fields["conversations"]}, origin, images=[image])
    text = text.strip() or fields.get("caption") or fields.get("text")
    if not isinstance(text, str) or not text.strip():
        raise RowError(f"{origin}: no caption; expected txt, or caption in json")
    return parse_row({"text": text}, origin, images=[image])
