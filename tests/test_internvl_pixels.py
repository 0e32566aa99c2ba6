"""Pixels of InternVL-Chat-V1-2 for every mode and shape, and the images that the original corrupts."""

import hashlib
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL import __version__ as pillow_version
from support.golden_internvl import CHECKPOINT, GOLDEN, golden_arrays, golden_json
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from yivl import image_processing
from yivl.errors import CheckpointError
from yivl.image_processing import ImageProcessor, load_clip_processor, load_image, set_image_size

CASES = golden_json("image_preprocess")
PIXELS = golden_arrays("image_pixels")
KEYS = {"squash": "squash_key", "pad": "pad2square_key"}

# Rows of docs/fidelity.md: the original ignores EXIF, drops alpha and clips 16-bit gray to white.
DIFFERENT = {
    "exif_rotated.jpg",
    "gray16_square_I16.png",
    "la_nonsquare.png",
    "palette_square_P_transparency.png",
    "rgba_nonsquare.png",
}


def name_case(value: Any) -> str:
    return str(value["name"] if isinstance(value, dict) else value)


def processor(aspect_ratio: str = "squash") -> ImageProcessor:
    return ImageProcessor(load_clip_processor(CHECKPOINT), aspect_ratio)


def pixels_of(name: str, aspect_ratio: str = "squash") -> torch.Tensor:
    return processor(aspect_ratio)([load_image(GOLDEN / "images" / name)])[0]


def test_preprocessing_settings_are_those_of_the_original() -> None:
    clip = processor().clip_processor
    assert processor().background == tuple(CASES["pad_colour_rgb"])
    assert (list(clip.image_mean), list(clip.image_std)) == (CASES["mean"], CASES["std"])
    assert processor().image_size == CASES["image_size"]


@pytest.mark.parametrize("case", CASES["images"], ids=name_case)
def test_the_decoder_gives_the_recorded_image(case: dict[str, Any]) -> None:
    with Image.open(GOLDEN / "images" / case["name"]) as image:
        rgb = np.ascontiguousarray(np.asarray(image.convert("RGB")))
    assert hashlib.sha256(rgb.tobytes()).hexdigest() == case["rgb_sha256"]


@pytest.mark.parametrize("aspect_ratio", KEYS)
@pytest.mark.parametrize("case", CASES["images"], ids=name_case)
def test_pixels_equal_the_original_or_are_a_row_of_the_ledger(case: dict[str, Any], aspect_ratio: str) -> None:
    """With any Pillow: 13 rounds differently between its two passes (``squash_key_newer_pillow``)."""
    pixels = pixels_of(case["name"], aspect_ratio)
    assert pixels.shape == (3, 84, 84)
    difference = (pixels - PIXELS[case[KEYS[aspect_ratio]]]).abs().max()
    if case["name"] in DIFFERENT:
        assert difference > 0.1, "equal to the original: remove it from DIFFERENT and docs/fidelity.md"
    else:
        assert difference <= 1e-5


def test_a_portrait_has_the_rounding_of_pillow_10_to_12() -> None:
    """The recorded pixels of Pillow 13 are another rounding, which the tolerance above would not let pass."""
    for name in ("tall_large_rgb", "tall_rgb"):
        newer = PIXELS[f"{name}__squash_newer_pillow"]
        assert (pixels_of(f"{name}.png") - newer).abs().max() > 1e-2


def test_a_rotated_photograph_is_turned_upright_before_it_is_squashed() -> None:
    with Image.open(GOLDEN / "images/exif_rotated.jpg") as image:
        upright = image.convert("RGB").transpose(Image.Transpose.ROTATE_270)
    torch.testing.assert_close(pixels_of("exif_rotated.jpg"), processor()([upright])[0])


@pytest.mark.parametrize("name", ["rgba_nonsquare.png", "palette_square_P_transparency.png", "la_nonsquare.png"])
def test_transparency_is_composited_on_the_mean_color(name: str) -> None:
    with Image.open(GOLDEN / "images" / name) as image:
        rgba = np.asarray(image.convert("RGBA"), dtype=np.float64)
    alpha = rgba[..., 3:] / 255
    flat = rgba[..., :3] * alpha + np.array(processor().background) * (1 - alpha)
    expected = processor()([Image.fromarray(np.rint(flat).astype(np.uint8))])[0]
    torch.testing.assert_close(pixels_of(name), expected, atol=2.5 / 255 / 0.224, rtol=0)  # rounding, twice


def test_sixteen_bit_gray_keeps_its_levels() -> None:
    with Image.open(GOLDEN / "images/gray16_square_I16.png") as image:
        gray = np.rint(np.asarray(image) / 257).astype(np.uint8)
    assert gray.std() > 10
    torch.testing.assert_close(pixels_of("gray16_square_I16.png"), processor()([Image.fromarray(gray)])[0])


@pytest.mark.parametrize("size", [(56, 56), (1, 90), (131, 57), (300, 40)])
@pytest.mark.parametrize("strip_pixels", [2**20, 700])
def test_strips_do_not_show(size: tuple[int, int], strip_pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_processing, "_STRIP_PIXELS", strip_pixels)
    levels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(levels)
    expected = image.resize((84, size[1]), Image.Resampling.BICUBIC).resize((84, 84), Image.Resampling.BICUBIC)
    assert np.array_equal(processor().resize([image])[0].numpy(), np.asarray(expected))


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000)])
def test_a_narrow_image_is_squashed_without_memory_for_the_square_around_it(size: tuple[int, int]) -> None:
    clip = load_clip_processor(CHECKPOINT)
    set_image_size(clip, 448, "squash")
    squashing, image = ImageProcessor(clip, "squash"), Image.new("LA", size)
    limit, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 100 * 2**20, hard))
    try:
        assert squashing.resize([image]).shape == (1, 448, 448, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


@pytest.mark.parametrize("name", ["wide_rgb", "tall_small_rgb", "photo_rgb", "tall_rgb", "tall_large_rgb"])
def test_both_commands_of_the_model_card_give_the_recorded_pixels(name: str) -> None:
    """``image.resize((448, 448))`` before the processor, or the processor alone, which would crop as published.

    Pillow itself resizes: the pixels are those of its version.
    """
    with Image.open(next((GOLDEN / "images").glob(f"{name}.*"))) as file:
        image = file.convert("RGB")
    [case] = [case for case in CASES["images"] if Path(case["name"]).stem == name]
    is_newer = int(pillow_version.split(".")[0]) >= 13
    expected = PIXELS[case.get("squash_key_newer_pillow", case["squash_key"]) if is_newer else case["squash_key"]]
    published = load_clip_processor(CHECKPOINT)
    batch = published(images=image.resize((84, 84)), return_tensors="pt")
    torch.testing.assert_close(batch.pixel_values[0], expected, atol=1e-5, rtol=0)
    assert (published.preprocess(image, return_tensors="pt")["pixel_values"][0] - expected).abs().max() > 0.1
    set_image_size(published, 84, "squash")
    batch = published(images=image.resize((84, 84)), return_tensors="pt")
    torch.testing.assert_close(batch.pixel_values[0], expected, atol=1e-5, rtol=0)
    pixels = published.preprocess(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


SQUARE = {"height": 84, "width": 84}


@pytest.mark.parametrize(
    "fields",
    [
        {"size": {"shortest_edge": 84}, "crop_size": SQUARE},
        {"size": SQUARE, "crop_size": SQUARE},
        {"size": SQUARE, "do_center_crop": False},
    ],
)
def test_a_size_is_an_integer_or_a_square(fields: dict[str, Any]) -> None:
    clip = CLIPImageProcessorPil(image_mean=CASES["mean"], image_std=CASES["std"], **fields)
    pixels = ImageProcessor(clip, "squash")([load_image(GOLDEN / "images/wide_rgb.png")])[0]
    torch.testing.assert_close(pixels, PIXELS["wide_rgb__squash"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": {"height": 84, "width": 56}, "do_center_crop": False}, "size .* and crop_size .* differ"),
        ({"size": SQUARE, "crop_size": {"height": 56, "width": 56}}, "size .* and crop_size .* differ"),
        ({"size": SQUARE, "crop_size": SQUARE, "do_rescale": False}, "expected do_resize, do_rescale, do_normalize"),
    ],
)
def test_a_size_that_is_no_square_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ImageProcessor(CLIPImageProcessorPil(**fields), "squash")
