"""Facts about the tar shards of a source: their numbers of samples, a random subset of these, and a fingerprint."""

import hashlib
import json
import logging
import os
from array import array
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from accelerate.utils import gather_object

from yivl.checkpoint.atomic import write_text
from yivl.data.orders import index_type
from yivl.data.rows import RowError
from yivl.data.shard_file import ShardFile, ShardMissingError, ShardUnavailableError, is_remote
from yivl.data.sources import DataSource
from yivl.data.tar_samples import count_samples

logger = logging.getLogger(__name__)

_VERSION: Final = 1
"""Of the cached counts: raised when ``count_samples`` counts otherwise."""
_FIRST_BYTES, _LAST_BYTES = 4096, 16384
"""Of a shard, in its fingerprint: a header and some content at the beginning; at the end more, since ``tarfile`` fills
the last 10,240 bytes up with zeros."""
_MAX_LOOKUPS: Final = 100
"""Shards behind URLs whose size is in the fingerprint, evenly spread: each is a request. Source: ours."""
_MISSING: Final = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Errors of a local shard that another try does not change."""
_THREADS: Final = 16
"""Files that are read at the same time for a fingerprint; on a network file system each waits. Source: ours."""


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
    paths = source.shards()
    counts = _cached_counts(source.name, paths)
    chosen = source.subset(sum(number for number, _ in counts), seed)
    kept: dict[str, Sequence[int]] = {}
    start = 0
    for path, (number, is_damaged) in zip(paths, counts, strict=True):
        indices = chosen[bisect_left(chosen, start) : bisect_left(chosen, start + number)]
        if indices or is_damaged:  # reading it reports the damage, after the samples before it
            is_whole = len(indices) == number
            kept[path] = range(number) if is_whole else array(index_type(number), (index - start for index in indices))
        start += number
    return ShardSubset(start, kept)


def _cached_counts(name: str, paths: Sequence[str]) -> list[tuple[int, bool]]:
    """Return the number of samples of every shard and whether it is damaged; counted once for all ranks and runs."""
    import datasets
    from filelock import FileLock

    identities = [(os.path.abspath(path), *_identity(path)) for path in paths]
    key = hashlib.sha256(json.dumps([_VERSION, identities]).encode()).hexdigest()[:32]
    path = Path(datasets.config.HF_DATASETS_CACHE) / "yivl-shards" / f"{key}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                write_text(path, json.dumps(_count(name, paths)))
            return [(int(number), bool(is_damaged)) for number, is_damaged in json.loads(path.read_text())]
    except OSError as error:
        logger.warning("%s: the numbers of samples are not cached (%s); see HF_DATASETS_CACHE", path.parent, error)
        return _count(name, paths)


def _count(name: str, paths: Sequence[str]) -> list[tuple[int, bool]]:
    logger.info("counting the samples of %s, for its max_rows", name)
    try:
        return [count_samples(ShardFile(path)) for path in paths]
    except ShardUnavailableError as error:
        raise RowError(str(error)) from error


def _identity(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise RowError(f"{path}: cannot be read ({error.strerror or error})") from error
    return status.st_size, status.st_mtime_ns


def shared_fingerprint(source: DataSource, rank: int, local_rank: int) -> str | None:
    """Return the ``fingerprint`` of a source on all ranks, which must all call this.

    The first rank of each node computes it, since every rank would open all shards; of URLs only rank 0, so that an
    error of the network does not look like other data on some nodes.
    """
    reader = 0 if any(map(is_remote, source.paths)) else rank - local_rank
    found: list[str | None] = gather_object([fingerprint(source) if rank == reader else None])
    return found[reader]


def fingerprint(source: DataSource) -> str | None:
    """Return a hash that changes with the names, sizes, first or last bytes of the shards, but not with their folder.

    It notices other and rewritten shards; a byte that was changed in the middle of one is not noticed. Of URLs, it has
    the names, and of at most 100 of them the size and the ETag. ``None`` if one is unavailable for now, which says
    nothing about its content.
    """
    paths = source.shards()
    remote = [path for path in paths if is_remote(path)]
    looked_up = {*remote[:: max(-(-len(remote) // _MAX_LOOKUPS), 1)]}
    folder = os.path.dirname(os.path.commonprefix(paths))  # noqa: RUF071 (URLs too)
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            contents = pool.map(lambda path: _summary(path, path in looked_up), paths)
            lines = [f"{path[len(folder) :]} {content}\n" for path, content in zip(paths, contents, strict=True)]
    except ShardUnavailableError as error:
        logger.warning("%s; the content of %s is not compared with that of other runs", error, source.name)
        return None
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _summary(path: str, is_looked_up: bool) -> str:
    if is_remote(path):
        try:
            return ShardFile(path).identity() if is_looked_up else ""
        except ShardMissingError:
            return "unavailable"  # reading it reports it
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            first = file.read(_FIRST_BYTES)
            file.seek(max(size - _LAST_BYTES, 0))
            return f"{size} {hashlib.sha256(first + file.read(_LAST_BYTES)).hexdigest()}"
    except _MISSING:
        return "unavailable"
    except OSError as error:
        raise ShardUnavailableError(f"{path}: cannot be read ({error.strerror or error})") from error
