"""Images to ``pixel_values``: load, apply EXIF, convert to RGB, pad, crop or squash to a square, CLIP preprocessing.

RGB images get the pixels of the reference implementations. docs/fidelity.md lists the images
that the references corrupt or crash on: other modes, EXIF orientation, sides of one pixel.
"""

import http.client
import io
import os
import stat
import time
import urllib.request
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from yivl.errors import CheckpointError, ImageError
from yivl.files.image_files import check_parts
from yivl.files.json_files import read_json
from yivl.files.schema import PreprocessorFields, without_null
from yivl.files.validation import library_errors

AspectRatio = Literal["pad", "square", "squash"]
"""``pad``: center on a square of the mean color. ``square``: resize the short side and center-crop. ``squash``: resize
to the square without keeping the ratio. Source: OpenGVLab/InternVL, internvl_chat/internvl/train/dataset.py."""

ImageSource = str | os.PathLike[str] | bytes | Image.Image
"""A path, an http(s) URL (only where allowed), the bytes of an image file, or a PIL image."""

MAX_IMAGE_PIXELS: Final = 89_478_485
"""Largest image that is decoded: width times height. Its pixels are in memory, its padding is not. Source: the warning
threshold of Pillow."""

MAX_SIDE: Final = 20_000
"""Longest side of an image, in pixels. The rows of a padded image are resized at the width of the square around it, so
the time grows with the area of the square: 2 seconds of a core at this limit. Source: ours."""

FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""Supported formats. Pillow supports more, among them EPS, which starts another program. Source: ours."""

MAX_FILE_BYTES: Final = 2**30
"""Largest image file, in bytes: more than ``MAX_IMAGE_PIXELS`` need without compression. Source: ours."""

MAX_DOWNLOAD_BYTES: Final = 50 * 2**20
"""Largest download, in bytes. Source: ours."""

_MAX_RATIO: Final = 100
"""Largest ratio of the sides of an image that is cropped instead of padded. Source: ours."""

_STRIP_PIXELS: Final = 2**20
"""Pixels that are converted and resized at a time. Source: ours."""

DOWNLOAD_TIMEOUT: Final = 20.0
"""Timeout of a download, in seconds: of the whole and of each read. Source: ours."""


def load_image(source: ImageSource, *, allow_remote: bool = False, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Load an image: decoded in full, EXIF orientation applied, mode unchanged.

    Args:
        source: The image.
        allow_remote: Accept http(s) URLs.
        max_pixels: Limit of width times height, at most ``MAX_IMAGE_PIXELS``.

    Raises:
        ImageError: If the image is missing, unreadable, truncated, animated, empty, larger than ``max_pixels`` or
            than ``MAX_SIDE`` on a side, or a URL while ``allow_remote`` is false.
    """
    max_pixels = min(max_pixels, MAX_IMAGE_PIXELS)
    if isinstance(source, Image.Image):
        return _upright(source, "image", max_pixels)
    name, data = ("image bytes", source) if isinstance(source, bytes) else _read(os.fspath(source), allow_remote)
    check_parts(data, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: more than {MAX_IMAGE_PIXELS:,} pixels; shrink the image first") from error
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise ImageError(f"{name}: not a readable image; use JPEG, PNG, WebP, BMP or TIFF") from error
    return _upright(image, name, max_pixels)


def _read(name: str, allow_remote: bool) -> tuple[str, bytes]:
    """Return the name and the bytes of a local file or, where allowed, of an http(s) URL."""
    if name.lower().startswith(("http://", "https://")):
        if not allow_remote:
            raise ImageError(f"{name}: remote images are disabled; download the file or pass --allow-remote")
        try:
            return name, _fetch(name)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ImageError(f"{name}: cannot be fetched ({' '.join(str(error).split())})") from error
    if not name:
        raise ImageError("the image path is empty; give a file")
    try:
        status = os.stat(name)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise ImageError(f"{name}: not a regular file; give a file")  # reading a device or a pipe may never end
        if status.st_size > MAX_FILE_BYTES:
            raise ImageError(f"{name}: more than {MAX_FILE_BYTES:,} bytes; give an image file")
        return name, Path(name).read_bytes()
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{name}: cannot be read ({getattr(error, 'strerror', error)})") from error


def _fetch(address: str) -> bytes:
    """Download a URL within the limits of size and time."""
    deadline = time.monotonic() + DOWNLOAD_TIMEOUT
    data = bytearray()
    with urllib.request.urlopen(address, timeout=DOWNLOAD_TIMEOUT) as response:
        while block := response.read1(2**16):
            data += block
            if len(data) > MAX_DOWNLOAD_BYTES:
                raise ValueError(f"more than {MAX_DOWNLOAD_BYTES:,} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"timed out after {DOWNLOAD_TIMEOUT:.0f} seconds")
    return bytes(data)


def _upright(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Decode an image and apply its EXIF orientation, after the checks that need only the header."""
    if not image.width or not image.height:
        raise ImageError(f"{name}: the image is empty ({image.width}x{image.height} pixels); use another one")
    if image.width * image.height > max_pixels:
        raise ImageError(f"{name}: more than {max_pixels:,} pixels; shrink the image first")
    if max(image.size) > MAX_SIDE:
        raise ImageError(f"{name}: more than {MAX_SIDE:,} pixels on a side; shrink the image first")
    try:
        # Not n_frames: Pillow reads a file of many frames to its end for it. An MPO file is a photograph followed by
        # previews or a stereo partner; its first frame is the image.
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise ImageError(f"{name}: animated, or of several pages; save one frame as a file of its own")
        image.load()
        # Without an orientation to apply, exif_transpose returns a copy.
        has_orientation = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if has_orientation else image
    except ImageError:
        raise
    except Exception as error:  # as above
        raise ImageError(f"{name}: damaged or truncated image; save or download it again") from error


def to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Return the image in RGB: transparency composited on ``background``, 16-bit gray scaled to 8 bits."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        # Pillow clips instead of scaling: 16-bit gray would become white. 65535 / 255 = 257.
        gray = np.asarray(image, dtype=np.float64) / (1 if image.mode == "F" else 257)
        image = Image.fromarray(np.clip(np.rint(gray), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*background, 255))
        canvas.alpha_composite(rgba)
        image = canvas
    return image.convert("RGB")


def expand2square(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Return the RGB image centered on a square of the background color; odd margins round down at the top left.

    Source: 01-ai/Yi, VL/llava/mm_utils.py.
    """
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


class ImageProcessor:
    """The image transform shared by inference, training and evaluation.

    Args:
        clip_processor: CLIP resize, crop and normalization of the checkpoint (Pillow backend, as in the reference).
        aspect_ratio: Treatment of images that are not square; ``image_aspect_ratio`` of ``config.json``.

    Raises:
        CheckpointError: If ``aspect_ratio`` is unknown, or the settings of the processor are not CLIP's.
    """

    image_size: int
    """Pixels per side of ``pixel_values``."""

    def __init__(self, clip_processor: CLIPImageProcessorPil, aspect_ratio: str = "pad") -> None:
        if aspect_ratio not in get_args(AspectRatio):
            names = " or ".join(map(repr, get_args(AspectRatio)))
            raise CheckpointError(f"image_aspect_ratio={aspect_ratio!r}; expected {names}")
        size, crop, is_squashed = clip_processor.size, clip_processor.crop_size, aspect_ratio == "squash"
        sides = {size.get("shortest_edge")}
        if is_squashed and None in sides:
            sides = {size.get("height"), size.get("width")}
        if clip_processor.do_center_crop:  # of what is squashed, all is left
            sides |= {crop.get("height"), crop.get("width")}
        if len(sides) != 1 or None in sides:
            raise CheckpointError(f"preprocessor_config.json: size {size} and crop_size {crop} differ")
        steps = ["do_resize", *([] if is_squashed else ["do_center_crop"]), "do_rescale", "do_normalize"]
        if not all(getattr(clip_processor, step) for step in steps):
            raise CheckpointError(f"preprocessor_config.json: expected {', '.join(steps)} to be true, as in CLIP")
        [self.image_size] = sides
        self.clip_processor = clip_processor
        self.aspect_ratio = aspect_ratio
        self._levels = torch.from_numpy(_normalized_levels(clip_processor))

    @property
    def background(self) -> tuple[int, int, int]:
        """Padding color: the mean in 8 bits, (122, 116, 104) of CLIP, (123, 116, 103) of InternVL.

        Source: 01-ai/Yi, VL/single_inference.py; OpenGVLab/InternVL, internvl_chat/internvl/train/dataset.py.
        """
        red, green, blue = (int(mean * 255) for mean in self.clip_processor.image_mean)
        return red, green, blue

    def __call__(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return ``pixel_values``, ``(num_images, 3, image_size, image_size)`` float32, normalized."""
        return self.normalize(self.resize(images))

    def resize(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return the pixels of the transformed images, ``(num_images, image_size, image_size, 3)`` uint8."""
        pixels = np.empty((len(images), self.image_size, self.image_size, 3), dtype=np.uint8)
        settings = (self.image_size, self.background, self.clip_processor.resample, self.aspect_ratio)
        for image, values in zip(images, pixels, strict=True):
            values[:] = np.asarray(resize_to_square(image, *settings))
        return torch.from_numpy(pixels)

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return ``pixel_values``, ``(num_images, 3, image_size, image_size)`` float32, of pixels that are resized.

        Args:
            pixels: What ``resize`` returns, on any device. Training keeps them until the step: they need a quarter of
                the memory of ``pixel_values`` in the data-loading workers and on the way to the device.
        """
        channels = zip(pixels.unbind(-1), self._levels.to(pixels.device), strict=True)
        looked_up = [
            levels.index_select(0, channel.flatten().int()).view(channel.shape) for channel, levels in channels
        ]
        return torch.stack(looked_up, dim=1)


def resize_to_square(
    image: Image.Image, image_size: int, background: tuple[int, int, int], resample: int, aspect_ratio: str
) -> Image.Image:
    """Return the RGB image resized to a square.

    Rows are converted, padded and resized in strips, then columns: Pillow resizes in the same two passes, so the pixels
    are those of the whole image. Pillow 13 takes columns first if that is less work, which rounds differently; here the
    order is that of Pillow 10 to 12, and of both references, with any Pillow. The memory is that of the image, not of
    the square around it, nor of its resized form.

    Args:
        image: An image of any mode.
        image_size: Pixels per side of the result.
        background: Color of the padding, and behind transparency.
        resample: Filter of Pillow.
        aspect_ratio: One of ``AspectRatio``; ``pad`` centers the image on a square as ``expand2square`` does.

    Raises:
        ImageError: If the image is too narrow for ``square``.

    Source: transformers, CLIPImageProcessorPil, which computes the same with arrays.
    """
    full_width, full_height = (max(image.size),) * 2 if aspect_ratio == "pad" else image.size
    width, height = image_size, image_size
    if aspect_ratio == "square":
        width, height = _covering_size(image, image_size)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    x, y = (full_width - image.width) // 2, (full_height - image.height) // 2

    # Resized, a row or column of the background has its color; so only rows of the image are computed.
    narrow = Image.new("RGB", (image_size, full_height), background)
    for first, last in _strips(image.height, max(full_width, width)):
        strip = to_rgb(image.crop((0, first, image.width, last)), background)
        if strip.width < full_width:
            padded = Image.new("RGB", (full_width, strip.height), background)
            padded.paste(strip, (x, 0))
            strip = padded
        strip = strip.resize((width, strip.height), Image.Resampling(resample))
        narrow.paste(strip.crop((left, 0, left + image_size, strip.height)), (0, y + first))

    result = Image.new("RGB", (image_size, image_size))
    for first, last in _strips(image_size, max(full_height, height)):
        strip = narrow.crop((first, 0, last, full_height))
        strip = strip.resize((strip.width, height), Image.Resampling(resample))
        result.paste(strip.crop((0, top, strip.width, top + image_size)), (first, 0))
    return result


def _covering_size(image: Image.Image, image_size: int) -> tuple[int, int]:
    """Return the size of the image once its shorter side has ``image_size`` pixels.

    Raises:
        ImageError: If the image is so narrow that it would have billions of pixels.
    """
    shorter, longer = sorted(image.size)
    if longer > _MAX_RATIO * shorter:
        raise ImageError(
            f"image: {image.width}x{image.height} pixels, more than {_MAX_RATIO} times as long as wide; crop it first"
        )
    longer = int(image_size * longer / shorter)
    return (image_size, longer) if image.width <= image.height else (longer, image_size)


def _strips(length: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges that divide ``length`` rows of ``width`` pixels into strips of bounded size."""
    step = max(1, _STRIP_PIXELS // width)
    for first in range(0, length, step):
        yield first, min(first + step, length)


def _normalized_levels(clip_processor: CLIPImageProcessorPil) -> np.ndarray:
    """Return the normalized value of each of the 256 levels of each channel, ``(3, 256)``.

    The library computes the table; looking 8-bit pixels up gives the same numbers in less time.
    """
    ramp = Image.fromarray(np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2))
    batch = clip_processor.preprocess(ramp, do_resize=False, do_center_crop=False, return_tensors="np")
    return np.asarray(batch["pixel_values"][0], dtype=np.float32).reshape(3, 256)


def set_image_size(clip_processor: CLIPImageProcessorPil, image_size: int, aspect_ratio: str) -> None:
    """Set the size of ``pixel_values``, in place; by itself the processor then squashes or crops an image."""
    square = {"height": image_size, "width": image_size}
    is_squashed = aspect_ratio == "squash"
    clip_processor.size = square if is_squashed else {"shortest_edge": image_size}
    clip_processor.crop_size = square
    clip_processor.do_center_crop = not is_squashed


def load_clip_processor(folder: str | os.PathLike[str]) -> CLIPImageProcessorPil:
    """Load the CLIP preprocessing from the ``preprocessor_config.json`` of a ViT folder.

    Raises:
        CheckpointError: If the folder has none, or a damaged one.
    """
    path = Path(folder) / "preprocessor_config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no preprocessor_config.json; download the whole ViT folder")
    return clip_processor(read_json(path), path)


def clip_processor(fields: Mapping[str, Any], source: str | os.PathLike[str]) -> CLIPImageProcessorPil:
    """Return the CLIP preprocessing of the fields of a ``preprocessor_config.json``.

    Args:
        fields: Checked; those that CLIP does not know are left out.
        source: Of the fields, for the error.

    Raises:
        CheckpointError: If transformers refuses them.
    """
    known = PreprocessorFields.__annotations__.keys() & fields.keys()
    given = without_null({name: fields[name] for name in known})
    sides = {name: without_null(side) for name, side in given.items() if isinstance(side, dict)}
    with library_errors(source):
        return CLIPImageProcessorPil(**given | sides)
