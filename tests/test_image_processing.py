"""Images that cannot be used are refused with an error of one line."""

import http.server
import io
import os
import resource
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.golden import GOLDEN
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from yivl import image_processing
from yivl.errors import CheckpointError, ImageError
from yivl.image_processing import ImageProcessor, expand2square, load_image, to_rgb
from yivl.serve.limits import Limits

PHOTO = GOLDEN / "images/photo_rgb.jpg"


def png_header(width: int, height: int) -> bytes:
    """A PNG with a header and no pixels."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT", b"IEND")
    parts = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def animated_gif() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def many_scans() -> bytes:
    """A progressive JPEG that repeats its last scan."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 100 + data[-2:]


def tiled_tiff(side: int) -> bytes:
    """A TIFF with a tile for every pixel."""
    tiles, after = side * side, 8 + 2 + 10 * 12 + 4
    fields = [(256, 1, side), (257, 1, side), (258, 1, 8), (259, 1, 1), (262, 1, 1), (277, 1, 1)]
    fields += [(322, 1, 1), (323, 1, 1), (324, tiles, after), (325, tiles, after + 4 * tiles)]
    directory = b"".join(struct.pack("<HHII", tag, 4, count, value) for tag, count, value in fields)
    head = b"II*\0" + struct.pack("<IH", 8, len(fields)) + directory + bytes(4)
    return head + bytes(4 * tiles) + struct.pack("<I", 1) * tiles


BAD = {
    "text": (b"this is no image", "not a readable image"),
    "empty file": (b"", "not a readable image"),
    "truncated": (PHOTO.read_bytes()[:9000], "damaged or truncated"),
    "zero width": (png_header(0, 5), "not a readable image|empty"),
    "thin bomb": (png_header(65_000, 1), "more than 20,000 pixels on a side"),
    "damaged animation": (animated_gif()[:-12] + b"\x2c" * 12, "damaged|animated|not a readable"),
    "bomb": (png_header(60_000, 60_000), "more than 89,478,485 pixels"),
    "smaller bomb": (png_header(10_000, 10_000), "more than 89,478,485 pixels"),
    "scans": (many_scans(), "more than 100 scans"),
    "segments": (
        PHOTO.read_bytes()[:2] + b"\xff\xe1\0\2" * 70_000 + PHOTO.read_bytes()[2:],
        "more than 65,536 segments",
    ),
    "chunks": (png_header(8, 8)[:33] + b"\0\0\0\0prVt\0\0\0\0" * 70_000, "more than 65,536 segments, chunks"),
    "tiles": (tiled_tiff(260), "more than 65,536 segments, chunks or tiles"),
    "animated": (animated_gif(), "animated, or of several pages"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_unusable_image_is_named_in_one_line(case: str, tmp_path: Path) -> None:
    data, message = BAD[case]
    path = tmp_path / "image.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=message) as caught:
        load_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match=r"^image bytes: "):
        load_image(data)


def test_scans_are_counted_in_the_image_only() -> None:
    """Not in a thumbnail, nor in the video that some phones append; both may hold the bytes of a scan by chance."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG", progressive=True)
    thumbnail = b"\xff\xe1" + struct.pack(">H", 602) + b"\xff\xda\x00\x02" * 150
    data = buffer.getvalue()
    assert load_image(data[:2] + thumbnail + data[2:] + b"\xff\xda\x00\x02" * 500).size == (16, 16)


@pytest.mark.parametrize("size", [(8000, 1), (1, 8000)])
def test_a_narrow_image_needs_no_memory_for_the_square_around_it(size: tuple[int, int]) -> None:
    """Pillow has 4 bytes a pixel: 256 MB for the square, and without padding 6.4 GB for the resized image."""
    clip = CLIPImageProcessorPil(size={"shortest_edge": 448}, crop_size={"height": 448, "width": 448})
    padding, cropping, image = ImageProcessor(clip, "pad"), ImageProcessor(clip, "square"), Image.new("LA", size)
    limit, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20, hard))
    try:
        assert padding.resize([image]).shape == (1, 448, 448, 3)
        with pytest.raises(ImageError, match="more than 100 times as long as wide"):
            cropping.resize([image])
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


@pytest.mark.parametrize("size", [(8064, 6048), (1080, 12_000), (20_000, 1)])
def test_large_photographs_and_long_screenshots_are_accepted(size: tuple[int, int]) -> None:
    """They are padded in strips: the square around them limits nothing."""
    file = io.BytesIO()
    Image.new("1", size).save(file, "PNG")
    assert load_image(file.getvalue(), max_pixels=Limits().max_image_pixels).size == size
    with pytest.raises(ImageError, match=f"more than {size[0] * size[1] - 1:,} pixels; shrink"):
        load_image(file.getvalue(), max_pixels=size[0] * size[1] - 1)


def test_devices_pipes_and_huge_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**40)  # without blocks on the disk
    for name, reason in (("/dev/zero", "not a regular file"), (str(tmp_path / "pipe"), "not a regular file")):
        with pytest.raises(ImageError, match=f"^{name}: {reason}"):
            load_image(name)
    with pytest.raises(ImageError, match="huge: more than 1,073,741,824 bytes"):
        load_image(tmp_path / "huge")


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(ImageError, match="cannot be read"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="cannot be read"):
        load_image("nul\0byte.png")
    with pytest.raises(ImageError, match="the image path is empty"):
        load_image("")


def test_pil_images_are_checked_too() -> None:
    with pytest.raises(ImageError, match=r"empty \(0x4 pixels\)"):
        load_image(Image.new("RGB", (0, 4)))
    with Image.open(io.BytesIO(animated_gif())) as image, pytest.raises(ImageError, match="animated"):
        load_image(image)


def test_path_bytes_and_pil_give_the_same_image() -> None:
    with Image.open(PHOTO) as image:
        images = [load_image(PHOTO), load_image(str(PHOTO)), load_image(PHOTO.read_bytes()), load_image(image)]
    assert len({image.tobytes() for image in images}) == 1


def test_a_photograph_with_embedded_previews_is_not_animated(tmp_path: Path) -> None:
    still, preview = Image.new("RGB", (32, 24), "red"), Image.new("RGB", (8, 6), "red")
    still.save(tmp_path / "camera.jpg", "MPO", save_all=True, append_images=[preview])
    assert load_image(tmp_path / "camera.jpg").size == (32, 24)


@pytest.fixture
def address() -> Iterator[str]:
    """A local web server with one image."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404 if self.path == "/nothing.jpg" else 200)
            self.end_headers()
            for _ in range(50 if self.path == "/trickle.jpg" else 0):
                self.wfile.write(b"x")
                time.sleep(0.1)
            if self.path == "/photo.jpg":
                self.wfile.write(PHOTO.read_bytes())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_urls_work_only_where_allowed(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match="--allow-remote"):
        load_image(f"{address}/photo.jpg")
    assert load_image(f"{address}/photo.jpg", allow_remote=True).tobytes() == load_image(PHOTO).tobytes()
    with pytest.raises(ImageError, match="cannot be fetched"):
        load_image(f"{address}/nothing.jpg", allow_remote=True)
    with pytest.raises(ImageError, match="cannot be fetched"):
        load_image(f"{address}/a b.jpg", allow_remote=True)
    monkeypatch.setattr(image_processing, "DOWNLOAD_TIMEOUT", 0.5)
    with pytest.raises(ImageError, match="cannot be fetched"):
        load_image(f"{address}/trickle.jpg", allow_remote=True)
    monkeypatch.setattr(image_processing, "MAX_DOWNLOAD_BYTES", 100)
    with pytest.raises(ImageError, match="more than 100 bytes"):
        load_image(f"{address}/photo.jpg", allow_remote=True)


@pytest.mark.parametrize("source", ["file:///etc/hostname", "ftp://127.0.0.1/x"])
def test_other_schemes_are_file_names_that_do_not_exist(source: str) -> None:
    with pytest.raises(ImageError, match="no such file"):
        load_image(source, allow_remote=True)


def test_padding_is_centered_and_rounds_down_at_the_top() -> None:
    square = expand2square(Image.new("RGB", (2, 5), "white"), (1, 2, 3))
    assert square.size == (5, 5)
    assert [square.getpixel((x, 0)) for x in range(5)] == [(1, 2, 3), *[(255, 255, 255)] * 2, *[(1, 2, 3)] * 2]


def test_float_images_are_clipped_not_wrapped() -> None:
    image = Image.new("F", (2, 1))
    image.putdata([-5.0, 300.0])
    assert [to_rgb(image, (0, 0, 0)).getpixel((x, 0))[0] for x in range(2)] == [0, 255]


def test_an_unknown_aspect_ratio_is_refused() -> None:
    with pytest.raises(CheckpointError, match="image_aspect_ratio='anyres'"):
        ImageProcessor(None, "anyres")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {"shortest_edge": 64}}, "size .* and crop_size .* differ"),
        ({"do_normalize": False}, "expected do_resize, do_center_crop, do_rescale, do_normalize to be true"),
    ],
)
def test_a_processor_with_other_steps_than_clips_is_refused(changes: dict[str, Any], message: str) -> None:
    fields = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}} | changes
    with pytest.raises(CheckpointError, match=message):
        ImageProcessor(CLIPImageProcessorPil(**fields))


@pytest.mark.parametrize("mode", ["pad", "square"])
@pytest.mark.parametrize("size", [(56, 56), (1, 90), (131, 57), (40, 300), (333, 32)])
@pytest.mark.parametrize("strip_pixels", [2**20, 700])
def test_pixels_equal_those_of_transformers_bit_for_bit(
    mode: str, size: tuple[int, int], strip_pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_processing, "_STRIP_PIXELS", strip_pixels)
    clip = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = ImageProcessor(clip, mode)
    levels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(levels)
    expected = expand2square(image, processor.background) if mode == "pad" else image
    batch = clip.preprocess(expected, return_tensors="pt", input_data_format="channels_last")
    assert torch.equal(processor([image])[0], batch["pixel_values"][0])
