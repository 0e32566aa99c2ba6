"""The hashes of the files of a checkpoint, which all ranks compute together."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from yivl.checkpoint.manifest import file_sizes, hash_files, share_files, write_manifest
from yivl.errors import CheckpointError
from yivl.train.ranks import end_all_ranks, of_all_ranks, on_rank_0, rank, world_size

_MAX_THREADS: Final = 8
"""Of all ranks, if there are not more of these: a disk rarely delivers more than eight cores hash. Source: ours."""


def record_files(folder: Path) -> None:
    """Write the manifest of a complete folder; all ranks call it after all other files are written.

    Raises:
        CheckpointError: If a file cannot be read.
    """
    sizes = on_rank_0(lambda: file_sizes(folder))
    hashes = hash_on_all_ranks(folder, sizes)
    on_rank_0(lambda: write_manifest(folder, sizes, hashes))


def hash_on_all_ranks(folder: Path, sizes: Mapping[str, int]) -> dict[str, str]:
    """Return the hashes of files, given with their sizes; all ranks call it, and each reads a part of them.

    Raises:
        CheckpointError: If a file cannot be read.
        SystemExit: On ranks that do not report the error.
    """
    num_threads = max(1, min(_MAX_THREADS // world_size(), os.cpu_count() or 1))
    found: dict[str, str] | CheckpointError
    try:
        found = hash_files(folder, share_files(sizes, world_size())[rank()], num_threads)
    except CheckpointError as error:  # the other ranks wait for the hashes
        found = error
    hashes: dict[str, str] = {}
    for part in of_all_ranks(found):
        if isinstance(part, CheckpointError):
            end_all_ranks(part)
        hashes |= part
    return hashes
