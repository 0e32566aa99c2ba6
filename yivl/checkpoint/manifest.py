"""The manifest of a training checkpoint: sizes and hashes of its files, by which a damaged checkpoint is recognized."""

import hashlib
import os
from collections.abc import Iterable
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
# A disk rarely delivers more than eight cores hash. Source: ours.
_MAX_THREADS: Final = 8


def write_manifest(folder: Path) -> None:
    """Write the manifest of a complete folder; call it after all other files are written."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    hashes = _hash_files(folder, names)
    files = {name: {"size": (folder / name).stat().st_size, _HASH: hashes[name]} for name in names}
    write_json(folder / MANIFEST, {"files": files})


def find_damage(folder: Path) -> list[str]:
    """Return what is wrong with the files of a manifest, such as ``optimizer.pt is missing``; other files are ignored.

    Raises:
        CheckpointError: If the manifest itself is damaged.
    """
    files = _read_files(folder / MANIFEST)
    damage = {name: reason for name, (size, _) in files.items() if (reason := _check_size(folder / name, size))}
    if not damage:  # a hash takes longer
        hashes = _hash_files(folder, files)
        damage = {name: "is damaged" for name, (_, expected) in files.items() if hashes[name] != expected}
    return [f"{name} {reason}" for name, reason in sorted(damage.items())]


def _read_files(manifest: Path) -> dict[str, tuple[int, str]]:
    """Return size and hash of every file."""
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


def _check_size(path: Path, size: int) -> str | None:
    if not is_file(path):  # a damaged manifest may have names that no file can have
        return "is missing"
    found = path.stat().st_size
    return None if found == size else f"has {found:,} bytes instead of {size:,}"


def _hash_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the hash of every file, computed by threads: hashlib releases the interpreter lock."""

    def hash_file(name: str) -> str:
        try:
            with (folder / name).open("rb") as file:
                return hashlib.file_digest(file, _HASH).hexdigest()
        except OSError as error:
            raise CheckpointError(f"{folder / name}: cannot be read ({error.strerror})") from error

    # The largest file first: it takes longest.
    ordered = sorted(names, key=lambda name: -(folder / name).stat().st_size)
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as threads:
        return dict(zip(ordered, threads.map(hash_file, ordered), strict=True))
