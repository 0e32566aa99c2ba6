"""Pictures to ``pixel_values``: load, upright, RGB, pad or crop to a square, CLIP preprocessing.

The pixels are those of the release's ``single_inference.py`` for RGB pictures. Where the release crashes or corrupts
(other modes, EXIF, one-pixel sides) this module does the obviously right thing; docs/fidelity.md has a row for each.
"""

import http.client
import io
import math
import os
import time
import urllib.request
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from yivl.errors import CheckpointError, ImageError

AspectRatio = Literal["pad", "square"]
"""``pad``: centre on a square of the mean colour. ``square``: resize the short side and crop the centre."""

ImageSource = str | os.PathLike[str] | bytes | Image.Image
"""A path, an http(s) address (only where allowed), the bytes of an image file, or a PIL image."""

MAX_IMAGE_PIXELS: Final = 89_478_485
"""Size of the square around a picture above which it is refused before it is decoded: 9,459 pixels on a side. The
square counts because padding fills it, however thin the picture. Source: Pillow's own warning threshold."""

FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""What is read. Pillow knows more, among them EPS, for which it starts another program. Source: ours."""

MAX_DOWNLOAD_BYTES: Final = 50 * 2**20
"""Largest picture fetched from an address, in bytes. Source: ours."""

DOWNLOAD_TIMEOUT: Final = 20.0
"""Seconds after which a fetch is given up, in all and without an answer. Source: ours."""


def load_image(source: ImageSource, *, allow_remote: bool = False, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Return the picture upright (EXIF applied), decoded in full, in its own mode.

    Args:
        source: Where it is.
        allow_remote: Whether it may be an address.
        max_pixels: Of the square around it, at most ``MAX_IMAGE_PIXELS``.

    Raises:
        ImageError: If it is missing, not an image, truncated, animated, empty, larger than ``max_pixels``, or an
            address while ``allow_remote`` is false.
    """
    max_pixels = min(max_pixels, MAX_IMAGE_PIXELS)
    if isinstance(source, Image.Image):
        return _upright(source, "image", max_pixels)
    name, data = ("image bytes", source) if isinstance(source, bytes) else _read(os.fspath(source), allow_remote)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: more than {MAX_IMAGE_PIXELS:,} pixels; shrink the picture first") from error
    except Exception as error:  # Pillow's decoders raise whatever their formats come upon
        raise ImageError(f"{name}: not a picture that can be read; use JPEG, PNG, WebP, BMP or TIFF") from error
    return _upright(image, name, max_pixels)


def _read(name: str, allow_remote: bool) -> tuple[str, bytes]:
    """Return the name and the bytes of a local file or, where allowed, of an http(s) address."""
    if name.lower().startswith(("http://", "https://")):
        if not allow_remote:
            raise ImageError(f"{name}: remote pictures are off; download the file or pass --allow-remote")
        try:
            return name, _fetch(name)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ImageError(f"{name}: cannot be fetched ({' '.join(str(error).split())})") from error
    if not name:
        raise ImageError("the path of the picture is empty")
    try:
        return name, Path(name).read_bytes()
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{name}: cannot be read ({getattr(error, 'strerror', error)})") from error


def _fetch(address: str) -> bytes:
    """Return what an http(s) address holds, within the limits of size and time."""
    deadline = time.monotonic() + DOWNLOAD_TIMEOUT
    data = bytearray()
    with urllib.request.urlopen(address, timeout=DOWNLOAD_TIMEOUT) as response:
        while block := response.read1(2**16):
            data += block
            if len(data) > MAX_DOWNLOAD_BYTES:
                raise ValueError(f"more than {MAX_DOWNLOAD_BYTES:,} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not done after {DOWNLOAD_TIMEOUT:.0f} seconds")
    return bytes(data)


def _upright(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Return the decoded picture with its EXIF orientation applied, after the checks that need only the header."""
    if not image.width or not image.height:
        raise ImageError(f"{name}: the picture is empty ({image.width}x{image.height} pixels)")
    if max(image.size) ** 2 > max_pixels:
        longest = math.isqrt(max_pixels)
        raise ImageError(f"{name}: more than {longest:,} pixels on a side; shrink the picture first")
    try:
        frames = getattr(image, "n_frames", 1)
        # An MPO file is a still photograph followed by previews or a stereo partner; its first frame is the picture.
        if frames > 1 and image.format != "MPO":
            raise ImageError(
                f"{name}: animated or multi-page ({frames} frames); save the frame you mean as its own file"
            )
        image.load()
        return ImageOps.exif_transpose(image)
    except ImageError:
        raise
    except Exception as error:  # as above
        raise ImageError(f"{name}: damaged or truncated picture; save or download it again") from error


def to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Return the picture in RGB, transparency composited on ``background``, 16-bit grey scaled to 8 bits."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow clips instead of scaling: 16-bit grey would turn plain white. 65535 / 255 = 257.
        grey = np.asarray(image, dtype=np.float64) / (1 if image.mode == "F" else 257)
        image = Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*background, 255))
        canvas.alpha_composite(rgba)
        image = canvas
    return image.convert("RGB")


def expand2square(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Return the RGB picture centred on a square of the background colour; odd differences round down at the top left.

    Source: 01-ai/Yi, VL/llava/mm_utils.py.
    """
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


class ImageProcessor:
    """The one pixel pipeline, shared by inference, training and evaluation.

    Args:
        clip_processor: CLIP resize, crop and normalization of the checkpoint (Pillow back end, as the release used).
        aspect_ratio: What happens to pictures that are not square; read from the checkpoint's ``config.json``.

    Raises:
        CheckpointError: If ``aspect_ratio`` is unknown, or the processor is set to do something else than CLIP's.
    """

    def __init__(self, clip_processor: CLIPImageProcessorPil, aspect_ratio: str = "pad") -> None:
        if aspect_ratio not in get_args(AspectRatio):
            raise CheckpointError(f"image_aspect_ratio={aspect_ratio!r}; expected 'pad' or 'square'")
        crop, steps = clip_processor.crop_size, ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
        if not clip_processor.size.get("shortest_edge") == crop["height"] == crop["width"]:
            raise CheckpointError(f"preprocessor_config.json: size {clip_processor.size} and crop_size {crop} differ")
        if not all(getattr(clip_processor, step) for step in steps):
            raise CheckpointError(
                f"preprocessor_config.json: expected {', '.join(steps)} to be true, as in the release"
            )
        self.clip_processor = clip_processor
        self.aspect_ratio = aspect_ratio
        self._levels = _normalized_levels(clip_processor)

    @property
    def image_size(self) -> int:
        """Pixels on a side of what it returns."""
        return int(self.clip_processor.crop_size["height"])

    @property
    def background(self) -> tuple[int, int, int]:
        """Padding colour: the CLIP mean in 8 bits, (122, 116, 104). Source: 01-ai/Yi, VL/single_inference.py."""
        red, green, blue = (int(mean * 255) for mean in self.clip_processor.image_mean)
        return red, green, blue

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return ``pixel_values``, ``(num_images, 3, image_size, image_size)`` float32, normalized."""
        pixels = np.empty((len(images), 3, self.image_size, self.image_size), dtype=np.float32)
        for image, channels in zip(images, pixels, strict=True):
            self._write_pixels(image, channels)
        return torch.from_numpy(pixels)

    def _write_pixels(self, image: Image.Image, pixels: np.ndarray) -> None:
        """Write the picture into ``pixels``, ``(3, image_size, image_size)``."""
        rgb = to_rgb(image, self.background)
        if self.aspect_ratio == "pad":
            rgb = expand2square(rgb, self.background)
        resized = resize_and_crop(rgb, self.image_size, self.clip_processor.resample)
        for channel, levels, values in zip(resized.split(), self._levels, pixels, strict=True):
            np.take(levels, np.asarray(channel), out=values, mode="clip")


def resize_and_crop(image: Image.Image, image_size: int, resample: int) -> Image.Image:
    """Return the picture with its shorter side at ``image_size`` pixels, and of its longer side the middle.

    Source: transformers, CLIPImageProcessorPil, which does the same by way of arrays.
    """
    shorter, longer = sorted(image.size)
    longer = int(image_size * longer / shorter)
    width, height = (image_size, longer) if image.width <= image.height else (longer, image_size)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    resized = image.resize((width, height), Image.Resampling(resample))
    return resized.crop((left, top, left + image_size, top + image_size))


def _normalized_levels(clip_processor: CLIPImageProcessorPil) -> np.ndarray:
    """Return what CLIP's rescaling and normalization make of each of the 256 levels of a channel, ``(3, 256)``.

    Computed by the library itself: pixels have 8 bits, so a table gives the very same numbers in a quarter of the time.
    """
    ramp = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2))
    batch = clip_processor.preprocess(ramp, do_resize=False, do_center_crop=False, return_tensors="np")
    return np.asarray(batch["pixel_values"][0], dtype=np.float32).reshape(3, 256)


def load_clip_processor(folder: str | os.PathLike[str]) -> CLIPImageProcessorPil:
    """Return the CLIP preprocessing described by the ``preprocessor_config.json`` of a ViT folder.

    Raises:
        CheckpointError: If the folder has none.
    """
    if not (Path(folder) / "preprocessor_config.json").is_file():
        raise CheckpointError(f"{folder}: no preprocessor_config.json; download the whole ViT folder")
    return CLIPImageProcessorPil.from_pretrained(os.fspath(folder))
