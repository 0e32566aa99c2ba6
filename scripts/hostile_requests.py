"""Images and bodies that a server must refuse, and images that it must accept, for ``endurance_requests.py``."""

import base64
import io
import json
import struct
import zlib
from typing import Any, Final

from PIL import Image, PngImagePlugin


def data_url(data: bytes) -> str:
    """Return an image file as the URL of a request."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def image_file(form: str, size: tuple[int, int], mode: str = "RGB", **options: Any) -> bytes:
    """Return the file of a plain image."""
    buffer = io.BytesIO()
    Image.new(mode, size, 1).save(buffer, form, **options)
    return buffer.getvalue()


def _png_header(width: int, height: int) -> bytes:
    """Return a PNG that declares a size and has no pixels."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT", b"IEND")
    parts = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _animation(form: str, num_frames: int) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), (40 * index % 256, index, 255 - index)) for index in range(num_frames)]
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def _png_with_text(num_bytes: int) -> bytes:
    """Return a PNG with a compressed text chunk that expands to ``num_bytes``."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * num_bytes, zip=True)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _jpeg_of_many_scans(side: int, num_scans: int) -> bytes:
    """Return a progressive JPEG whose last scan is repeated."""
    data = image_file("JPEG", (side, side), progressive=True, quality=30)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * num_scans + data[-2:]


_JPEG: Final = image_file("JPEG", (640, 480))

GOOD_IMAGES: Final = (
    image_file("PNG", (64, 64)),
    image_file("PNG", (7000, 1), "1"),
    image_file("JPEG", (300, 40)),
    image_file("WEBP", (40, 300)),
    image_file("PNG", (1000, 1000), "P"),
    image_file("TIFF", (100, 100), "I;16"),
    image_file("PNG", (1, 7000), "LA"),
    image_file("GIF", (50, 60), "P"),
)
"""Small, narrow, large and odd images that are answered."""

BAD_IMAGES: Final = (
    ("text", b"this is no image"),
    ("empty", b""),
    ("cut", _JPEG[: len(_JPEG) // 2]),
    ("noise", bytes(range(256)) * 40),
    ("header only", _png_header(6000, 6000)),
    ("bomb", _png_header(60_000, 60_000)),
    ("line", _png_header(2**31 - 1, 1)),
    ("long line", image_file("PNG", (40_000, 1), "1")),
    ("large", image_file("PNG", (8000, 8000), "1")),
    ("long WebP", image_file("WEBP", (16_000, 8), lossless=True)[:-8]),
    ("cut large PNG", image_file("PNG", (6900, 6900), "L")[:-2000]),
    ("GIF animation", _animation("GIF", 50)),
    ("WebP animation", _animation("WEBP", 5)),
    ("PNG animation", _animation("PNG", 5)),
    ("TIFF pages", _animation("TIFF", 5)),
    ("text chunk", _png_with_text(60_000_000)),
    ("EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    ("PPM", b"P6 4 4 255\n" + b"x" * 48),
    ("segments", _JPEG[:2] + b"\xff\xe1\0\2" * 70_000 + _JPEG[2:]),
    ("scans", _jpeg_of_many_scans(2000, 2000)),
)
"""Images that are refused, by name."""

BAD_BODIES: Final = tuple(
    value if isinstance(value, bytes) else json.dumps(value).encode()
    for value in (
        b"",
        b"{",
        b"\xff\xfe{}",
        b"[" * 50_000,
        b'{"model": NaN}',
        b'{"a":' * 5_000,
        [],
        None,
        1,
        {},
        {"model": "checkpoint"},
        {"model": "checkpoint", "messages": []},
        {"model": "checkpoint", "messages": "hello"},
        {"model": "checkpoint", "messages": [{"role": "user"}]},
        {"model": "checkpoint", "messages": [{"role": "user", "content": 1}]},
        {"model": "checkpoint", "messages": [{"role": "tool", "content": "x"}]},
        {"model": "checkpoint", "messages": [{"role": "assistant", "content": "x"}]},
        {"model": "checkpoint", "messages": [{"role": "user", "content": "x"}], "max_tokens": -1},
        {"model": "checkpoint", "messages": [{"role": "user", "content": "x"}], "max_tokens": 10**30},
        {"model": "checkpoint", "messages": [{"role": "user", "content": "x"}], "temperature": "hot"},
        {"model": "checkpoint", "messages": [{"role": "user", "content": "x"}], "n": 10**9},
        {"model": "checkpoint", "messages": [{"role": "user", "content": "x"}], "stop": ["x"] * 1000},
        {"model": "checkpoint", "messages": [{"role": "user", "content": "x"}], "tools": []},
        {"model": "other", "messages": [{"role": "user", "content": "x"}]},
    )
)
"""Bodies that are refused."""
