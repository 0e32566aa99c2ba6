"""Atomic writes: a file or a folder is complete or absent, also after a crash.

Every rename and ``fsync`` of the package is here.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

REMOVED: Final = ".removed"
"""Suffix of a folder that ``remove_dir`` has renamed and not removed yet."""
MAX_AGE: Final = 86_400.0
"""Seconds after which a temporary folder of another host counts as abandoned: a day, longer than a checkpoint is
written. Source: ours."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which replaces ``path`` on success and is removed on failure.

    Raises:
        OSError: As writing does; one about a full disk names ``path``.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder, which replaces the folder ``path`` on success and is removed on failure.

    First, what killed writers of the same folder left is removed; if one was killed while it replaced the folder, the
    former one is restored.
    """
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    temporary, handle = _make_temporary(target)
    try:
        yield temporary
        replace_dir(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def temporary_prefix(target: Path) -> str:
    """Return how the paths of the temporary folders of ``target``, which is resolved, begin."""
    return f"{target.parent / f'.{target.name}'}.yivl-partial-"


def _make_temporary(target: Path) -> tuple[Path, int]:
    """Return a new folder and the descriptor that holds its lock, where the file system has locks."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{temporary_prefix(target)}{_host()}-"))
        # Before it is locked, another writer may take it for one that a killed writer left.
        with suppress(FileNotFoundError):
            handle = os.open(folder, os.O_RDONLY)
            if _lock(handle) is not False and _is_at(handle, folder):
                return folder, handle
            os.close(handle)


def _remove_leftovers(target: Path) -> None:
    """Remove the temporary folders of killed writers of ``target``; writers that live hold a lock on theirs."""
    name = re.escape(Path(temporary_prefix(target)).name)
    pattern = re.compile(rf"({name}([0-9a-f]{{8}})-[a-z0-9_]{{8}})(\.old)?")  # the end is that of tempfile.mkdtemp
    hosts = {match[1]: match[2] for path in target.parent.iterdir() if (match := pattern.fullmatch(path.name))}
    for temporary, host in sorted((target.with_name(stem), host) for stem, host in hosts.items()):
        with _claim(temporary, host) as is_abandoned:
            if not is_abandoned:
                continue
            aside = _aside(temporary)
            if aside.is_dir() and not target.exists():
                with suppress(OSError):  # another writer restores it, or this user may not
                    aside.rename(target)
                    flush(target.parent)
            for folder in (temporary, aside) if target.exists() else (temporary,):
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _claim(folder: Path, host: str) -> Iterator[bool]:
    """Lock a temporary folder for its removal; yield whether its writer has ended, which without locks is not known."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # only the former folder is left
        yield True
        return
    except OSError:  # of another user
        yield False
        return
    try:
        # A lock of another host may not be visible here.
        is_old = time.time() - os.fstat(handle).st_mtime > MAX_AGE
        yield (host == _host() or is_old) and _lock(handle) is True and _is_at(handle, folder)
    finally:
        os.close(handle)


def _lock(handle: int) -> bool | None:
    """Lock a folder; return ``False`` if another process holds the lock, ``None`` if the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(handle: int, folder: Path) -> bool:
    """Return whether a path is still the open folder."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), folder.stat())
    return False


def _host() -> str:
    """Return what the temporary folders of this host are marked with."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def replace_dir(folder: Path, target: Path) -> None:
    """Flush a finished folder, on the file system of ``target``, and rename it to ``target``, which it replaces.

    If the rename fails, ``target`` is left as it was.
    """
    settle(folder)
    aside = _aside(folder)
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)  # no portable call swaps two folders in one step
    try:
        folder.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise
    flush(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(folder: Path) -> Path:
    """Return where the former folder is while ``folder`` takes its place."""
    return folder.with_name(f"{folder.name}.old")


def remove_dir(folder: Path) -> None:
    """Rename a folder so that it is not taken for a complete one, and remove it."""
    removed = folder.with_name(f".{folder.name}{REMOVED}")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    flush(folder.parent)
    shutil.rmtree(removed, ignore_errors=True)


def move_entries(folder: Path, target: Path, *, last: Collection[str]) -> None:
    """Move what a finished folder holds into an existing one and remove the folder; can be repeated after a crash.

    Args:
        folder: On the file system of ``target``; flushed to disk before.
        target: Entries of the same name are replaced.
        last: Names that are moved after all others, so that their presence marks a complete move.
    """
    for path in sorted(folder.iterdir(), key=lambda path: path.name in last):
        if (target / path.name).is_dir():
            shutil.rmtree(target / path.name)
        path.replace(target / path.name)
    flush(target)
    folder.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; lone surrogates, which JSON can hold and UTF-8 cannot, are written escaped."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, value: Any, *, sort_keys: bool = True) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n")


def settle(folder: Path) -> None:
    """Flush a folder to disk and give its files the permissions of the umask."""
    umask = os.umask(0)  # the only way to read it is to set it
    os.umask(umask)
    for path in [*folder.rglob("*"), folder]:
        # mkdtemp and safetensors grant access to the owner alone.
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        flush(path)


def flush(path: Path) -> None:
    """Write what the system holds of a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
