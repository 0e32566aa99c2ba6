"""Bounds on the structure of image files: small files that would take a decoder minutes. Not a parser of any format."""

import re
import struct
from collections.abc import Iterator
from itertools import islice
from typing import Final

from yivl.errors import ImageError

MAX_JPEG_SCANS: Final = 100
"""Largest number of scans of a JPEG; each passes over the whole image, so that a small file can take hours.
Source: libtiff, which allows as many to a JPEG in a TIFF."""

MAX_PARTS: Final = 2**16
"""Largest number of segments of a JPEG, chunks of a PNG, or tiles of a TIFF: about a second in Pillow. Source: ours."""

_JPEG_MARKER: Final = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)
"""Start of a segment, or the end of the image. The bytes left out are data, restarts and padding."""
_JPEG: Final = b"\xff\xd8"
_PNG: Final = b"\x89PNG\r\n\x1a\n"
_TIFF_ORDERS: Final = {b"II": "<", b"MM": ">"}
_TIFF_VERSION: Final = 42  # the other one has fields of 64 bits
_TIFF_OFFSETS: Final = (273, 324)  # tags of the places of strips and of tiles
_SCAN: Final = b"\xda"
_END: Final = b"\xd9"


def check_parts(data: bytes, name: str) -> None:
    """Check the number of parts of an image file, before it is opened.

    Raises:
        ImageError: If a JPEG has too many scans or segments, a PNG too many chunks, or a TIFF too many tiles or strips.
    """
    num_parts = 0
    if data.startswith(_JPEG):
        markers = list(islice(_segments(data), MAX_PARTS + 1))
        num_parts = len(markers)
        if markers.count(_SCAN) > MAX_JPEG_SCANS:
            raise ImageError(f"{name}: more than {MAX_JPEG_SCANS} scans; save the image again")
    elif data.startswith(_PNG):
        num_parts = sum(1 for _ in islice(_chunks(data), MAX_PARTS + 1))
    elif data[:2] in _TIFF_ORDERS:
        num_parts = max(_tile_counts(data), default=0)
    if num_parts > MAX_PARTS:
        raise ImageError(f"{name}: more than {MAX_PARTS:,} segments, chunks or tiles; save the image again")


def _segments(data: bytes) -> Iterator[bytes]:
    """Yield the markers of a JPEG, without those in its thumbnail and in what follows its end."""
    position = len(_JPEG)
    while (marker := _JPEG_MARKER.search(data, position)) and marker[1] != _END:
        yield marker[1]
        length = int.from_bytes(data[marker.end() : marker.end() + 2], "big")
        position = marker.end() + max(length, 2)


def _chunks(data: bytes) -> Iterator[bytes]:
    """Yield the types of the chunks of a PNG."""
    position = len(_PNG)
    while position < len(data):
        yield data[position + 4 : position + 8]
        position += 12 + int.from_bytes(data[position : position + 4], "big")


def _tile_counts(data: bytes) -> Iterator[int]:
    """Yield the numbers of tiles and strips in the first directory of a TIFF; none if it is damaged."""
    order = _TIFF_ORDERS[data[:2]]
    try:
        (version,) = struct.unpack_from(f"{order}H", data, 2)
        first, number, entry = ("4xI", "H", "HxxI4x") if version == _TIFF_VERSION else ("8xQ", "Q", "HxxQ8x")
        (directory,) = struct.unpack_from(order + first, data)
        (num_entries,) = struct.unpack_from(order + number, data, directory)
        start = directory + struct.calcsize(order + number)
        for index in range(min(num_entries, MAX_PARTS)):
            tag, count = struct.unpack_from(order + entry, data, start + index * struct.calcsize(order + entry))
            if tag in _TIFF_OFFSETS:
                yield count
    except struct.error:
        return
