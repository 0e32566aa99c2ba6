"""Atomic writes: a file or a folder is complete or absent, also after a crash.

Every rename and ``fsync`` of the package is here.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which replaces ``path`` on success and is removed on failure."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder, which replaces the folder ``path`` on success and is removed on failure."""
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        replace_dir(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace_dir(folder: Path, target: Path) -> None:
    """Flush a finished folder, on the file system of ``target``, and rename it to ``target``, which it replaces.

    If the rename fails, ``target`` is left as it was.
    """
    _settle(folder)
    aside = folder.with_name(f"{folder.name}.old")
    if target.exists():
        target.rename(aside)  # no portable call swaps two folders in one step
    try:
        folder.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def move_entries(folder: Path, target: Path, *, stale: Iterable[Path], last: Collection[str]) -> None:
    """Move what a finished folder holds into an existing one and remove the folder.

    Args:
        folder: On the file system of ``target``; flushed to disk first.
        target: Entries of the same name are replaced.
        stale: Files that are removed first.
        last: Names that are moved after all others, so that their presence marks a complete move.
    """
    _settle(folder)
    for path in stale:
        path.unlink(missing_ok=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name in last):
        if (target / path.name).is_dir():
            shutil.rmtree(target / path.name)
        path.replace(target / path.name)
    folder.rmdir()
    _sync(target)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; lone surrogates, which JSON can hold and UTF-8 cannot, are written escaped."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any, *, sort_keys: bool = True) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n")


def _settle(folder: Path) -> None:
    """Flush a folder to disk and give its files the permissions of the umask."""
    umask = os.umask(0)  # the only way to read it is to set it
    os.umask(umask)
    for path in [*folder.rglob("*"), folder]:
        # mkdtemp and safetensors grant access to the owner alone.
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
