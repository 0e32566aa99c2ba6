"""Tar shards as img2dataset writes them: their samples by header, and subsets of them."""

import logging
import os
import tarfile
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from yivl.data.rows import RowError
from yivl.data.sources import DataSource

logger = logging.getLogger(__name__)


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
        RowError: If a shard does not exist or cannot be read: ranks must not draw from different numbers of samples.
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
        except (tarfile.TarError, EOFError):
            damaged.add(path)  # reading it reports the damage, after the samples before it
        except OSError as error:
            raise RowError(f"{path}: cannot be read ({error.strerror or error})") from error
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
