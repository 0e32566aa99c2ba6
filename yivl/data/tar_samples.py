"""Samples of one tar shard from any offset, read forward only; hostile and damaged archives are errors by name."""

import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from yivl.data.shard_file import ShardFile, ShardUnavailableError
from yivl.image_processing import MAX_IMAGE_PIXELS

MAX_MEMBER_BYTES: Final = 3 * MAX_IMAGE_PIXELS
"""Size above which a member is not read, 256 MiB. Source: an uncompressed RGB image of the largest supported size."""


class DamagedShardError(Exception):
    """The content of a shard is no tar archive from some byte on."""


@dataclass(frozen=True)
class TarSample:
    """One sample of a tar shard: consecutive files of one name."""

    origin: str
    """Shard and sample, for error messages."""
    files: Mapping[str, bytes]
    """Contents by suffix."""
    error: str = ""
    """Why a file of the sample cannot be used."""
    offset: int = 0
    """Of its first header, in bytes."""
    index: int = 0
    """In the shard."""
    end: int = 0
    """Offset of the next sample."""


def read_samples(file: ShardFile, offset: int, index: int, is_wanted: Callable[[int], bool]) -> Iterator[TarSample]:
    """Yield the samples of a shard, from the sample ``index`` at ``offset`` on.

    Args:
        file: The shard.
        offset: Of the first header of a sample, in bytes.
        index: Of that sample.
        is_wanted: Called with the index of each sample; the others are skipped, their files are not read.

    Raises:
        DamagedShardError: Where the archive is damaged, after the samples before it except the last, of which files may
            be missing.
        ShardUnavailableError: If it cannot be read.
    """
    sample: _Collected | None = None
    for header, read in _members(file, offset):
        if header.isdir():
            continue
        stem, suffix = _split(header.name)
        if sample is None or stem != sample.name:
            if sample is not None:
                if sample.is_wanted:
                    yield sample.finish(file.path, header.offset)
                index += 1
            sample = _Collected(stem, header.offset, index, is_wanted(index))
        if sample.is_wanted:
            sample.add(header, suffix, read)
    if sample is not None and sample.is_wanted:
        yield sample.finish(file.path, file.tell())


def count_samples(file: ShardFile) -> tuple[int, bool]:
    """Return how many samples the headers of a shard have before its end or its damage, and whether it is damaged.

    Raises:
        ShardUnavailableError: If it cannot be read.
    """
    count, name = 0, None
    try:
        for header, _ in _members(file, 0):
            if not header.isdir() and (stem := _split(header.name)[0]) != name:
                count, name = count + 1, stem
    except DamagedShardError:
        return count, True
    return count, False


class _Collected:
    """A sample whose files are being read."""

    def __init__(self, name: str, offset: int, index: int, is_wanted: bool) -> None:
        self.name, self.offset, self.index, self.is_wanted = name, offset, index, is_wanted
        self.files: dict[str, bytes] = {}
        self.error = ""

    def add(self, header: tarfile.TarInfo, suffix: str, read: Callable[[], bytes]) -> None:
        if not header.isreg() or header.issparse():
            self.error = f"{_printable(header.name)} is a link, a device or a sparse file; expected regular files"
        elif header.size > MAX_MEMBER_BYTES:
            self.error = f"{_printable(header.name)} has {header.size:,} bytes; at most {MAX_MEMBER_BYTES:,} are read"
        else:
            self.files[suffix] = read()

    def finish(self, path: str, end: int) -> TarSample:
        return TarSample(f"{path} sample {_printable(self.name)}", self.files, self.error, self.offset, self.index, end)


def _printable(name: str) -> str:
    """Return a name for one line of UTF-8 text: archives may have any bytes in names."""
    return name if name.isprintable() else repr(name)[1:-1]


def _split(name: str) -> tuple[str, str]:
    """Return the path of a file without suffixes, and all its suffixes."""
    folder, name = os.path.split(name)
    stem, _, suffix = name.partition(".")
    return os.path.join(folder, stem), suffix.lower()


def _members(file: ShardFile, offset: int) -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]:
    """Yield the header of each member and the function that reads its content, which is called before the next."""
    limited = _Limited(file)
    file.seek(offset)
    try:
        with tarfile.open(fileobj=limited, mode="r:") as tar:
            place = -1
            while (header := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # would grow by 1 kB per member
                if header.offset <= place:
                    raise DamagedShardError(f"invalid header at byte {header.offset}")
                place = header.offset

                def read(header: tarfile.TarInfo = header) -> bytes:
                    file.seek(header.offset_data)
                    content = limited.read(header.size)
                    if len(content) < header.size:
                        raise DamagedShardError("unexpected end of data")
                    return content

                yield header, read
            # tarfile takes an invalid header after the first one for the end, and so the end of a file that was cut.
            file.seek(tar.offset)
            block = file.read(tarfile.BLOCKSIZE)
            if len(block) < tarfile.BLOCKSIZE:
                raise DamagedShardError("unexpected end of data")
            if block.strip(b"\0"):
                raise DamagedShardError(f"invalid header at byte {tar.offset}")
            file.seek(tar.offset)
    except ShardUnavailableError:  # also a ValueError
        raise
    except (tarfile.TarError, EOFError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        # Headers that contradict each other end in more kinds of errors than TarError.
        raise DamagedShardError(" ".join(str(error).split()) or type(error).__name__) from error


class _Limited:
    """A shard whose headers cannot ask for more memory than the largest member."""

    def __init__(self, file: ShardFile) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, size: int) -> bytes:
        if size > MAX_MEMBER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)
