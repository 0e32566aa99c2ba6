"""Bytes of tar shards, on disk or behind a URL that fsspec opens; reads that fail are tried again."""

import logging
import os
import re
import stat
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from yivl.errors import YiVLError

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_PAUSES: Final = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each new try of a read that failed: five tries more, exponential backoff. Source: ours, after the
legacy retries of the AWS SDK (five attempts); together half a minute, the time in which an object store or a file
server usually returns."""
_PERMANENT: Final = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ImportError)
_RETRIED_STATUS: Final = (408, 425, 429)
"""HTTP status codes of clients' errors that pass: timeout, too early, too many requests. Source: RFC 9110 and 6585."""
_SKIPPED_BYTES: Final = 2**16
"""Gaps up to this are read, not skipped, in a file that cannot seek. Source: ours."""


class ShardUnavailableError(YiVLError):
    """A shard cannot be read, although nothing is known to be wrong with its content."""


def is_remote(path: str) -> bool:
    """Return whether a path is a URL, such as ``https://`` or ``s3://``."""
    return re.match(r"[a-z][a-z0-9+.-]+://", path) is not None


class ShardFile:
    """A shard opened for reading at any offset, as ``tarfile`` needs it.

    Local files and servers that support range requests continue at an offset; others are read from the first byte.

    Raises:
        ShardUnavailableError: By ``read``, if the shard is missing or the last try fails.
    """

    def __init__(self, path: str, pauses: tuple[float, ...] = RETRY_PAUSES) -> None:
        self.path, self.pauses = path, pauses
        self._file: Any = None
        self._offset = 0

    def tell(self) -> int:
        """Return the offset of the next byte."""
        return self._offset

    def seek(self, offset: int) -> None:
        """Continue at an offset; nothing is read yet."""
        self._offset = offset

    def read(self, size: int) -> bytes:
        """Return the next ``size`` bytes, fewer only at the end of the shard."""
        parts: list[bytes] = []
        while size > 0:
            data = self._retried(lambda size=size: self._read(size))  # type: ignore[misc]
            if not data:
                break
            parts.append(data)
            self._offset += len(data)
            size -= len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Close the file; another read opens it again."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _read(self, size: int) -> bytes:
        if self._file is None:
            self._file = _open(self.path)
        if (place := self._file.tell()) != self._offset:
            if self._file.seekable():
                self._file.seek(self._offset)
            else:
                self._skip(place)
        data: bytes = self._file.read(size)
        return data

    def _skip(self, place: int) -> None:
        """Read up to the offset, from the first byte if it is before ``place``."""
        if place > self._offset:
            self.close()
            self._file, place = _open(self.path), 0
        while place < self._offset:
            data = self._file.read(min(self._offset - place, _SKIPPED_BYTES))
            if not data:
                return
            place += len(data)

    def _retried(self, read: Callable[[], T]) -> T:
        for number, pause in enumerate([*self.pauses, None], 1):
            try:
                return read()
            except Exception as error:  # each driver of fsspec raises its own
                self._forget()
                reason = " ".join(str(error).split()) or type(error).__name__
                if _is_permanent(error):
                    raise ShardUnavailableError(f"{self.path}: cannot be read ({reason})") from error
                if pause is None:
                    raise ShardUnavailableError(
                        f"{self.path}: cannot be read at byte {self._offset}, {number} times ({reason})"
                    ) from error
                logger.warning(
                    "%s: read at byte %d failed (%s); trying again in %g s", self.path, self._offset, reason, pause
                )
                time.sleep(pause)
        raise AssertionError  # the last try returns or raises

    def _forget(self) -> None:
        try:
            self.close()
        except Exception as error:
            logger.debug("%s: closing failed (%s)", self.path, error)


def _open(path: str) -> Any:
    if is_remote(path):
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]

        files, name = url_to_fs(path)
        return files.open(name, "rb")
    # A FIFO would wait for a writer, and a device may have no end.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise PermissionError("not a regular file")
    return open(path, "rb")


def _is_permanent(error: Exception) -> bool:
    """Return whether another try cannot help."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _RETRIED_STATUS
    return isinstance(error, _PERMANENT)
