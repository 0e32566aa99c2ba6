"""Bytes of tar shards, on disk or behind a URL that fsspec opens; reads that fail are tried again."""

import logging
import os
import re
import stat
import time
from collections.abc import Callable, Iterable
from functools import partial
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
_CONNECT_SECONDS, _READ_SECONDS = 30.0, 60.0
"""Of an http(s) server: until a connection, and between two reads. A shard that is read slowly has no limit in total,
where aiohttp would end a request after five minutes. Source: ours."""
_SKIPPED_BYTES: Final = 2**16
"""Read at once to skip bytes of a file that cannot seek. Source: ours."""


class ShardUnavailableError(YiVLError):
    """A shard cannot be read, although nothing is known to be wrong with its content."""


class ShardMissingError(ShardUnavailableError):
    """A shard cannot be read, and another try would not help: it does not exist, or access is denied."""


def is_remote(path: str) -> bool:
    """Return whether a path is a URL, such as ``https://`` or ``s3://``."""
    return re.match(r"[a-z][a-z0-9+.-]+://", path) is not None


class ShardFile:
    """A shard opened for reading at any offset, as ``tarfile`` needs it.

    Local files and servers that support range requests continue at an offset; others are read from the first byte.

    Raises:
        ShardUnavailableError: By ``read``, if the shard is missing or the last try fails.
    """

    def __init__(self, path: str, pauses: tuple[float, ...] | None = None) -> None:
        self.path, self._pauses = path, RETRY_PAUSES if pauses is None else pauses
        self._file: Any = None
        self._offset = 0
        self._is_whole = False  # read from the first byte: the server has no range requests

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
            data: bytes = self._retried(partial(self._read, size))
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

    def identity(self) -> str:
        """Return size and ETag of a shard behind a URL, as far as the server gives them."""

        def look_up() -> str:
            files, name = _locate(self.path)
            found = files.info(name)
            return f"{found.get('size')} {found.get('ETag', '')}"

        return self._retried(look_up)

    def _read(self, size: int) -> bytes:
        if self._file is None:
            self._file = _open(self.path, self._is_whole)
        place = self._file.tell()
        if place != self._offset:
            try:
                self._file.seek(self._offset)
            except ValueError:
                self._skip(place)
        data: bytes = self._file.read(size)
        return data

    def _skip(self, place: int) -> None:
        """Read up to the offset in a file that cannot seek, from the first byte if it is before ``place``."""
        if place > self._offset:
            self.close()
            self._file, place = _open(self.path, self._is_whole), 0
        while place < self._offset:
            data = self._file.read(min(self._offset - place, _SKIPPED_BYTES))
            if not data:
                return
            place += len(data)

    def _retried(self, read: Callable[[], T]) -> T:
        pauses = iter(self._pauses)
        while True:
            try:
                return read()
            except Exception as error:  # each driver of fsspec raises its own
                self._forget()
                if isinstance(error, ValueError) and is_remote(self.path) and not self._is_whole:
                    self._is_whole = True  # the error of fsspec where a server ignores range requests
                    continue
                cause = _cause(error)
                reason = " ".join(str(cause).split()) or type(cause).__name__
                if _is_permanent(cause):
                    raise ShardMissingError(f"{self.path}: cannot be read ({reason})") from error
                pause = next(pauses, None)
                if pause is None:
                    raise ShardUnavailableError(
                        f"{self.path}: cannot be read at byte {self._offset}, tried {len(self._pauses) + 1} times "
                        f"({reason})"
                    ) from error
                logger.warning(
                    "%s: read at byte %d failed (%s); trying again in %g s", self.path, self._offset, reason, pause
                )
                time.sleep(pause)

    def _forget(self) -> None:
        try:
            self.close()
        except Exception as error:
            logger.debug("%s: closing failed (%s)", self.path, error)


def _open(path: str, is_whole: bool) -> Any:
    if is_remote(path):
        files, name = _locate(path)
        return files.open(name, "rb", **({"block_size": 0} if is_whole else {}))
    # A FIFO would wait for a writer, and a device may have no end.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise PermissionError("not a regular file")
    return open(path, "rb")


def _locate(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the name of the file there."""
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    options = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
        options = {"client_kwargs": {"timeout": timeout}}
    files, name = url_to_fs(url, **options)
    return files, name


def check_urls(urls: Iterable[str], *, is_allowed: bool) -> None:
    """Check that tar shards behind URLs may be read, and that the package for them is installed.

    Raises:
        YiVLError: If not.
    """
    for scheme, url in {url.partition("://")[0]: url for url in urls if is_remote(url)}.items():
        if not is_allowed:
            raise YiVLError(f"{url}: a URL; add --allow_remote_data to read tar shards from other machines")
        if not url.endswith(".tar"):
            raise YiVLError(f"{url}: only tar shards are read from URLs; download the file")
        if "*" in url:
            raise YiVLError(f"{url}: a URL cannot have *; number the shards as in {{00000..00099}}.tar")
        from fsspec.registry import get_filesystem_class, known_implementations  # type: ignore[import-untyped]

        try:
            get_filesystem_class(scheme)
        except ImportError as error:
            package = known_implementations[scheme]["class"].partition(".")[0]
            package = "aiohttp" if package == "fsspec" else package
            raise YiVLError(f"{url}: needs a package that is not installed; pip install {package}") from error
        except ValueError as error:
            raise YiVLError(f"{url}: fsspec has no driver for {scheme}://; download the shards") from error


def _cause(error: Exception) -> BaseException:
    """Return why a file was not found: fsspec takes any answer of an http server without the file for that."""
    return error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error


def _is_permanent(error: BaseException) -> bool:
    """Return whether another try cannot help."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in _RETRIED_STATUS
    return isinstance(error, _PERMANENT)
