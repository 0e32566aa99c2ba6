"""The manifest of a training checkpoint: sizes and hashes of its files, by which a damaged checkpoint is recognized."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from yivl.checkpoint.atomic import write_json
from yivl.checkpoint.format import read_json
from yivl.errors import CheckpointError
from yivl.files.json_files import is_file

MANIFEST: Final = "checkpoint_manifest.json"
"""Of every checkpoint of a run: ``files``, from the path in the folder to ``size`` in bytes and ``sha256``."""

# Of the hashes of the standard library, SHA-256 is the fastest that is also proof against intent: 1.06 GiB/s per core
# of an EPYC (Zen 4), blake2b 0.57, crc32 1.36. Source: ours.
_HASH: Final = "sha256"
# The rank in the name of a file. Source: DeepSpeed, runtime/engine.py, _get_zero_ckpt_name.
_WRITER: Final = re.compile(r"zero_pp_rank_(\d+)_")


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file, by its path in the folder."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def write_manifest(folder: Path, sizes: Mapping[str, int], hashes: Mapping[str, str]) -> None:
    """Write the manifest of the files whose sizes and hashes are given."""
    write_json(folder / MANIFEST, {"files": {name: {"size": sizes[name], _HASH: hashes[name]} for name in sizes}})


def share_files(sizes: Mapping[str, int], num_ranks: int) -> list[list[str]]:
    """Return for each rank the files that it hashes: those of DeepSpeed that it has written, others by their size.

    What a rank has written is in the memory of its node.
    """
    shares: list[list[str]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    writers = {name: int(match[1]) for name in sizes if (match := _WRITER.search(name))}
    # Then the largest file first, each to the rank that has the least to do.
    for name in sorted(sizes, key=lambda name: (name not in writers, -sizes[name], name)):
        writer = writers.get(name, num_ranks)
        number = writer if writer < num_ranks else loads.index(min(loads))
        shares[number].append(name)
        loads[number] += sizes[name]
    return shares


def read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size and hash of every file.

    Raises:
        CheckpointError: If the manifest is damaged.
    """
    manifest = folder / MANIFEST
    files: dict[str, tuple[int, str]] = {}
    entries: Any = read_json(manifest).get("files")
    for name, entry in entries.items() if isinstance(entries, dict) else ():
        match entry:
            case {"size": int(size), "sha256": str(digest)}:
                files[name] = (size, digest)
            case _:
                break
    if not files or len(files) != len(entries):
        raise CheckpointError(f"{manifest}: expected the size and the {_HASH} of every file; the manifest is damaged")
    return files


def check_size(path: Path, size: int) -> str | None:
    """Return what is wrong with the size of a file, such as ``is missing``, or ``None``."""
    if not is_file(path):  # a damaged manifest may have names that no file can have
        return "is missing"
    found = path.stat().st_size
    return None if found == size else f"has {found:,} bytes instead of {size:,}"


def hash_files(folder: Path, names: Sequence[str], num_threads: int) -> dict[str, str]:
    """Return the hash of every file, computed by threads: hashlib releases the interpreter lock.

    Raises:
        CheckpointError: If a file cannot be read.
    """

    def hash_file(name: str) -> str:
        try:
            with (folder / name).open("rb") as file:
                return hashlib.file_digest(file, _HASH).hexdigest()
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read ({error.strerror})") from error

    with ThreadPoolExecutor(num_threads) as threads:
        return dict(zip(names, threads.map(hash_file, names), strict=True))
