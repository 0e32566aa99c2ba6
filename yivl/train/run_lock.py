"""The lock of an output folder: one run at a time writes to it."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from yivl.errors import YiVLError

logger = logging.getLogger(__name__)

LOCK: Final = ".run.lock"
"""Locked file in the output folder. Its content names the holder for the message; the lock itself is the kernel's."""
LEASE: Final = 120.0
"""Seconds to wait for the lock of another host, which an NFSv4 server keeps for a crashed one until its lease ends.

Source: Linux, fs/nfsd/nfs4state.c, a lease of 90 seconds."""


@contextmanager
def run_lock(folder: Path, *, lease: float = LEASE) -> Iterator[None]:
    """Hold the lock of an output folder, which is created.

    The kernel drops the lock when the process ends, however it ends, so an interrupted run never blocks the next one.
    POSIX locks are not inherited, so data-loading workers that outlive the run do not hold it. On a file system
    without locks, a warning is logged and nothing is locked.

    Args:
        folder: Of one run.
        lease: Seconds to wait if the holder is on another host.

    Raises:
        YiVLError: If another run holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    handle = _acquire(path, lease)
    try:
        yield
    finally:
        if handle is not None:
            path.unlink(missing_ok=True)  # before the lock is dropped: who waits for it checks that the file is there
            os.close(handle)


def _acquire(path: Path, lease: float) -> int | None:
    """Return the descriptor of the locked file; ``None`` on a file system without locks."""
    deadline = time.monotonic() + lease
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _read_holder(handle)
            os.close(handle)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                logger.warning(
                    "%s: the file system has no locks (%s); do not start two runs in one folder",
                    *(path.parent, error.strerror),
                )
                return None
            is_elsewhere = holder.get("host") not in (None, socket.gethostname())
            if not is_elsewhere or time.monotonic() >= deadline:
                raise YiVLError(_describe(path, holder, is_elsewhere=is_elsewhere)) from error
            time.sleep(min(1.0, lease))
            continue
        if _is_current(handle, path):
            break
        os.close(handle)  # the run that held it has removed the file
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    with suppress(OSError):  # a full disk: the lock holds without its content
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(holder).encode() + b"\n", 0)
    return handle


def _is_current(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _read_holder(handle: int) -> dict[str, Any]:
    """Return host, process and start time; nothing if the holder is about to write them."""
    try:
        holder = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _describe(path: Path, holder: dict[str, Any], *, is_elsewhere: bool) -> str:
    who = f" (process {holder.get('pid')} on {holder.get('host')} since {holder.get('started')})" if holder else ""
    fix = f"; if that process has ended, delete {path}" if is_elsewhere else ""
    return f"{path.parent}: another run writes to it{who}; wait for its end, or give another --output_dir{fix}"
