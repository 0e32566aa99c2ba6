"""Pixels of the reference for every mode and shape, and the images that it crashes on or corrupts."""

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.golden import CHECKPOINT, GOLDEN, golden_arrays, golden_json

from yivl.image_processing import ImageProcessor, load_clip_processor, load_image

CASES = golden_json("image_preprocess")
PIXELS = golden_arrays("image_pixels")
ASPECT = {"single_inference": "pad", "cli": "square"}

# Rows of docs/fidelity.md: the reference ignores EXIF and transparency, loses palettes, whitens 16-bit gray, pads
# CMYK in black, takes a height of 1 or 3 for the channels, and crashes on gray images that it has to pad.
DIFFERENT = {
    "single_inference": {
        "cmyk_nonsquare.jpg",
        "exif_rotated.jpg",
        "gray16_square_I16.png",
        "palette_nonsquare_P.png",
        "palette_square_P_transparency.png",
        "rgba_nonsquare.png",
        "rgba_square.png",
    },
    "cli": {
        "exif_rotated.jpg",
        "gray16_square_I16.png",
        "la_nonsquare.png",
        "palette_square_P_transparency.png",
        "rgba_nonsquare.png",
        "rgba_square.png",
        "threepx_high_rgb.png",
    },
}
RECORDED = [(image, mode) for image in CASES["images"] for mode in ASPECT]


def name_case(value: Any) -> str:
    return str(value["file"] if isinstance(value, dict) else value)


def processor(mode: str = "single_inference") -> ImageProcessor:
    return ImageProcessor(load_clip_processor(next(CHECKPOINT.glob("vit/*"))), ASPECT[mode])


def pixels_of(name: str, mode: str = "single_inference") -> torch.Tensor:
    return processor(mode)([load_image(GOLDEN / "images" / name)])[0]


def test_preprocessing_settings_are_those_of_the_reference() -> None:
    clip = processor().clip_processor
    assert processor().background == tuple(CASES["pad_colour_rgb"])
    assert list(clip.image_mean) == CASES["image_mean"]
    assert list(clip.image_std) == CASES["image_std"]
    assert clip.resample == CASES["resample"]
    assert clip.rescale_factor == CASES["rescale_factor"]


@pytest.mark.parametrize("case", CASES["images"], ids=name_case)
def test_the_decoder_gives_the_recorded_image(case: dict[str, Any]) -> None:
    with Image.open(GOLDEN / "images" / case["file"]) as image:
        array = np.ascontiguousarray(np.asarray(image).astype(case["decoded_dtype"]))
    assert hashlib.sha256(array.tobytes()).hexdigest() == case["decoded_sha256"]


@pytest.mark.parametrize(("case", "mode"), RECORDED, ids=name_case)
def test_pixels_equal_the_reference_or_are_a_row_of_the_ledger(case: dict[str, Any], mode: str) -> None:
    pixels = pixels_of(case["file"], mode)
    assert pixels.shape == (3, 56, 56)
    assert pixels.isfinite().all()
    if not case[mode]["ok"]:
        return  # the reference crashes; our pixels have a test below
    difference = (pixels - PIXELS[case[mode]["key"]]).abs().max()
    if case["file"] in DIFFERENT[mode]:
        assert difference > 0.1, "equal to the reference: remove it from DIFFERENT and docs/fidelity.md"
    else:
        assert difference <= 1e-5


def as_png(image: Image.Image) -> torch.Tensor:
    return processor()([image])[0]


def test_a_rotated_photograph_is_turned_upright() -> None:
    with Image.open(GOLDEN / "images/exif_rotated.jpg") as image:
        assert image.getexif()[0x0112] == 6  # rotate by 90 degrees clockwise
        upright = image.convert("RGB").transpose(Image.Transpose.ROTATE_270)
    torch.testing.assert_close(pixels_of("exif_rotated.jpg"), as_png(upright))


@pytest.mark.parametrize("name", ["rgba_nonsquare.png", "palette_square_P_transparency.png", "la_nonsquare.png"])
def test_transparency_is_composited_on_the_padding_color(name: str) -> None:
    with Image.open(GOLDEN / "images" / name) as image:
        rgba = np.asarray(image.convert("RGBA"), dtype=np.float64)
    alpha = rgba[..., 3:] / 255
    assert alpha.min() < 1
    flat = rgba[..., :3] * alpha + np.array(processor().background) * (1 - alpha)
    expected = as_png(Image.fromarray(np.rint(flat).astype(np.uint8)))
    torch.testing.assert_close(pixels_of(name), expected, atol=1.5 / 255 / 0.26, rtol=0)  # one gray level of rounding


@pytest.mark.parametrize("name", ["gray_nonsquare_L.png", "bilevel_nonsquare_1.png", "palette_nonsquare_P.png"])
def test_other_modes_equal_their_rgb_version(name: str) -> None:
    with Image.open(GOLDEN / "images" / name) as image:
        torch.testing.assert_close(pixels_of(name), as_png(image.convert("RGB")))


def test_cmyk_is_padded_with_the_mean_color_not_with_black() -> None:
    with Image.open(GOLDEN / "images/cmyk_nonsquare.jpg") as image:
        torch.testing.assert_close(pixels_of("cmyk_nonsquare.jpg"), as_png(image.convert("RGB")))


def test_sixteen_bit_gray_keeps_its_levels() -> None:
    with Image.open(GOLDEN / "images/gray16_square_I16.png") as image:
        gray = np.rint(np.asarray(image) / 257).astype(np.uint8)
    assert gray.std() > 10
    torch.testing.assert_close(pixels_of("gray16_square_I16.png"), as_png(Image.fromarray(gray)))


@pytest.mark.parametrize("mode", ASPECT)
@pytest.mark.parametrize("height", [1, 3])
def test_a_height_of_one_or_three_pixels_is_not_taken_for_the_channels(mode: str, height: int) -> None:
    red = Image.new("RGB", (height, height), (255, 0, 0))
    pixels = processor(mode)([red])[0]
    expected = processor(mode)([red.resize((8, 8))])[0]
    torch.testing.assert_close(pixels, expected)
