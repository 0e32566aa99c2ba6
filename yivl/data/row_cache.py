"""The cache of rows, in the folder of ``datasets``: written once per node, read by all processes and later runs."""

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar

import datasets
import torch
from filelock import FileLock
from torch.utils.data import DataLoader
from tqdm import tqdm

from yivl.checkpoint.atomic import atomic_dir, write_text
from yivl.errors import YiVLError

logger = logging.getLogger(__name__)

T = TypeVar("T")

BLOCK: Final = 4096
"""Rows that a process inspects at once. Source: ours."""

_SETTLED: Final = 2.0
"""Seconds after which a file counts as no longer being written: time stamps of file systems are as coarse as that.
Source: FAT, whose time stamps have two seconds."""


def cache_folder() -> Path:
    """Return the folder of the cache: ``yivl-rows`` in ``HF_DATASETS_CACHE``."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "yivl-rows"


def content_hash(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file, which is read again only if its size, modification time or inode changed.

    Raises:
        OSError: If the file cannot be read.
    """
    place = os.path.abspath(path).encode("utf-8", "surrogateescape")
    record = cache_folder() / "files" / f"{hashlib.sha256(place).hexdigest()}.json"
    if (known := _known_hash(record, _identity(path))) is not None:
        return known
    with cache_lock(record.stem):  # the ranks of a node would read the file at once
        identity = _identity(path)
        if (known := _known_hash(record, identity)) is not None:
            return known
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if _identity(path) == identity and time.time() - identity[1] / 1e9 > _SETTLED:
            with suppress(OSError):  # it is read again the next time
                write_text(record, json.dumps({"identity": identity, "sha256": found}))
        return found


def _known_hash(record: Path, identity: list[int]) -> str | None:
    with suppress(OSError, ValueError):
        known = json.loads(record.read_text(encoding="utf-8"))
        if known["identity"] == identity:
            return str(known["sha256"])
    return None


@contextmanager
def cache_lock(name: str) -> Iterator[None]:
    """Hold a lock of the cache; without one if the cache cannot be written, which ``build_once`` reports."""
    with ExitStack() as stack:
        with suppress(OSError):
            folder = cache_folder() / "files"
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / f"{name}.lock"))
        yield


def _identity(path: str | os.PathLike[str]) -> list[int]:
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def build_once(key: str, build: Callable[[Path], None]) -> Path:
    """Return the folder of a key, which ``build`` fills unless it exists; other processes wait.

    An interrupted build leaves no folder of the key, and the next one starts again.

    Raises:
        OSError: If the disk is full; its file name begins with ``HF_DATASETS_CACHE``.
        YiVLError: If the folder cannot be written.
    """
    target = cache_folder() / key
    if target.is_dir():
        return target
    with _name_the_cache():
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if not target.is_dir():
                with atomic_dir(target) as folder:
                    build(folder)
    return target


@contextmanager
def _name_the_cache() -> Iterator[None]:
    """Name the cache in an error of writing it."""
    place = f"HF_DATASETS_CACHE={datasets.config.HF_DATASETS_CACHE}"
    try:
        yield
    except OSError as error:
        if error.errno in (None, errno.ENOSPC, errno.EDQUOT):  # NumPy's error of a full disk has no number
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place) from error
        raise YiVLError(f"{place}: cannot be written ({error.strerror}); set it to a folder of yours") from error


def map_blocks(function: Callable[[range], T], num_rows: int, description: str) -> Iterator[T]:
    """Yield the results of a function for blocks of rows, in order, computed on all cores, with a progress bar."""
    blocks = [range(start, min(start + BLOCK, num_rows)) for start in range(0, num_rows, BLOCK)]
    # A data-loading worker must not start processes.
    alone = len(blocks) < 2 or multiprocessing.current_process().daemon
    loader: DataLoader[Any] = DataLoader(
        blocks,  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=function,  # type: ignore[arg-type]  # without batches, it takes one element
        num_workers=0 if alone else min(available_cores(), len(blocks)),
        generator=torch.Generator(),  # not the global one, whose state is that of training
    )
    with tqdm(total=num_rows, desc=description, unit="row", disable=True if alone else None) as progress:
        for block, result in zip(blocks, loader, strict=True):
            yield result
            progress.update(len(block))


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
