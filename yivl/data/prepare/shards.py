"""LAION-400M: which of the tar shards of img2dataset are complete. They are streamed as they are."""

import json
import os
from pathlib import Path

import yaml

from yivl.data.prepare.records import BadRecords, OfficialFolder
from yivl.errors import YiVLError

_END = bytes(1024)
"""A complete tar ends in two empty blocks of 512 bytes. Source: POSIX, ``pax``."""


def complete_shards(folder: OfficialFolder, bad: BadRecords) -> dict[Path, int]:
    """Return the complete shards and their samples: those with ``successes`` in their ``_stats.json``, and an end.

    img2dataset writes ``00000_stats.json`` after ``00000.tar``. Nothing else is read, so that the 400 million samples
    need minutes.

    Raises:
        YiVLError: If there is no shard.
    """
    shards = sorted(folder.path.glob("*.tar"))
    if not shards:
        raise YiVLError(f"{folder.path}: no *.tar; download {folder.address} with img2dataset")
    found: dict[Path, int] = {}
    for shard in shards:
        statistics = shard.with_name(f"{shard.stem}_stats.json")
        with bad.skip(shard.name):
            if not statistics.is_file():
                raise ValueError(f"no {statistics.name}: img2dataset has not finished it")
            with shard.open("rb") as file:
                file.seek(-min(len(_END), shard.stat().st_size), os.SEEK_END)
                if file.read() != _END:
                    raise ValueError("truncated; download it again")
            found[shard] = int(json.loads(statistics.read_text(encoding="utf-8"))["successes"])
    return found


def mixture_of(name: str, shards: list[Path], folder: Path) -> str:
    """Return the mixture of one source, with paths relative to the folder of its file.

    Runs of numbers are one pattern, ``{00000..00123}.tar``: the 41,408 paths of LAION-400M would be megabytes of YAML.
    """
    runs: list[list[Path]] = []
    for shard in shards:
        if runs and _follows(shard, runs[-1][-1]):
            runs[-1].append(shard)
        else:
            runs.append([shard])
    patterns = [run[0] if len(run) == 1 else _pattern(run[0], run[-1]) for run in runs]
    paths = [os.path.relpath(path, folder) for path in patterns]
    text: str = yaml.safe_dump([{"name": name, "data_path": paths}], sort_keys=False)
    return text


def _follows(shard: Path, other: Path) -> bool:
    """Whether the names of two shards of a folder are successive numbers of the same width."""
    name, before = shard.stem, other.stem
    is_number = name.isascii() and name.isdecimal() and before.isascii() and before.isdecimal()
    return is_number and len(name) == len(before) and int(name) == int(before) + 1


def _pattern(first: Path, last: Path) -> Path:
    return first.with_name(f"{{{first.stem}..{last.stem}}}.tar")
