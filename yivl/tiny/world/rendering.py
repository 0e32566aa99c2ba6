"""Rendering of scenes to pixels, and to labels for every patch of them."""

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from yivl.tiny.world import words
from yivl.tiny.world.scenes import Scene, Sign, Thing
from yivl.tiny.world.words import Kind, Word

ASSETS: Final = Path(__file__).parents[1] / "assets" / "world"
SPRITE_SIDE: Final = 128
SPRITE_COLUMNS: Final = 8
# A patch gets the label of the object that covers most of it, if that is at least this share: low enough to keep a
# small object on the corner of four patches.
_MIN_COVER: Final = 0.12
# Sprites of an object by its activity, in the order of drawing: role, offset to the right and down, and size in units
# of the object's size, rotation in degrees. A flipped object mirrors all of them.
_LAYOUTS: Final = {
    None: (("actor", 0.0, 0.0, 1.0, 0),),
    words.EATING: (("actor", 0.0, -0.1, 1.0, 0), ("food", -0.45, 0.08, 0.58, 0), ("prop", -0.45, 0.4, 0.55, 0)),
    words.PLAYING: (("actor", 0.0, -0.05, 1.0, 0), ("prop", -0.5, 0.32, 0.5, 0)),
    words.SLEEPING: (("prop", 0.0, 0.18, 1.35, 0), ("actor", 0.0, -0.08, 0.9, 80)),
    words.READING: (("actor", 0.0, -0.1, 1.0, 0), ("prop", 0.0, 0.36, 0.65, 0)),
}


@dataclass(frozen=True)
class RenderedScene:
    """An image and its segmentation."""

    image: Image.Image
    segments: np.ndarray
    """``(side, side)`` int64: index into ``labels`` of what is visible at each pixel; 0 is the wall, 1 the floor."""
    labels: tuple[tuple[Word, ...], ...]

    def patch_labels(self, grid: int) -> list[tuple[Word, ...]]:
        """Return the labels of ``grid * grid`` patches, in raster order."""
        side, number = len(self.segments), len(self.labels)
        cells = np.arange(side) * grid // side
        patch_of_pixel = cells[:, None] * grid + cells
        counts = np.bincount((patch_of_pixel * number + self.segments).ravel(), minlength=grid * grid * number)
        counts = counts.reshape(grid * grid, number)
        segments = counts[:, :2].argmax(1)
        if number > 2:
            covered = counts[:, 2:].max(1) >= _MIN_COVER * counts.sum(1)
            segments = np.where(covered, 2 + counts[:, 2:].argmax(1), segments)
        return [self.labels[segment] for segment in segments]


def render(scene: Scene, side: int) -> RenderedScene:
    """Return the image of a scene, ``side`` by ``side`` pixels."""
    image, segments = _background(scene, side, random.Random(scene.seed))
    labels: list[tuple[Word, ...]] = [(words.WALL, scene.wall), (words.FLOOR, scene.floor)]
    for thing in sorted(scene.things, key=lambda thing: thing.y):  # near objects cover far ones
        _draw_thing(image, segments, thing, labels)
    if scene.sign:
        _draw_sign(image, segments, scene.sign, labels)
    return RenderedScene(image, segments, tuple(labels))


def _draw_thing(image: Image.Image, segments: np.ndarray, thing: Thing, labels: list[tuple[Word, ...]]) -> None:
    side, mirror, activity = len(segments), -1 if thing.flipped else 1, thing.activity
    kinds = {"actor": thing.kind, "food": thing.food, "prop": activity.prop if activity else None}
    for role, dx, dy, scale, angle in _LAYOUTS[activity]:
        kind = kinds[role]
        assert kind is not None
        tilt = angle * mirror + (thing.angle if role == "actor" else 0)
        sprite = _sprite(kind, max(2, round(scale * thing.size * side)), tilt, flipped=thing.flipped)
        x, y = thing.x + dx * mirror * thing.size, thing.y + dy * thing.size
        corner = round(x * side - sprite.width / 2), round(y * side - sprite.height / 2)
        image.paste(sprite, corner, sprite)
        left, top = max(corner[0], 0), max(corner[1], 0)
        alpha = np.asarray(sprite.getchannel("A"))[top - corner[1] :, left - corner[0] :]
        region = segments[top : top + alpha.shape[0], left : left + alpha.shape[1]]
        region[alpha[: region.shape[0], : region.shape[1]] > 127] = len(labels)
        # A bowl is labeled with its food too: in a coarse grid no patch of the food itself may be left.
        food = thing.food if role == "prop" else None
        labels.append(tuple(word for word in (kind, activity, food, thing.place) if word is not None))


@cache
def _sprite_sheet() -> Image.Image:
    return Image.open(ASSETS / "sprites.png").convert("RGBA")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(ASSETS / "signs.otf", size)


def _sprite(kind: Kind, pixels: int, angle: float, *, flipped: bool) -> Image.Image:
    row, column = divmod(words.KINDS.index(kind), SPRITE_COLUMNS)
    left, top = column * SPRITE_SIDE, row * SPRITE_SIDE
    sprite = _sprite_sheet().crop((left, top, left + SPRITE_SIDE, top + SPRITE_SIDE))
    if flipped:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # Premultiplied alpha: no dark seams from the transparent pixels around a sprite.
    sprite = sprite.convert("RGBa").resize((pixels, pixels), Image.Resampling.BOX, reducing_gap=1.0)
    if angle:
        sprite = sprite.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    return sprite.convert("RGBA")


def _background(scene: Scene, side: int, rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    horizon = round(scene.horizon * side)
    pixels = np.empty((side, side, 3), np.float32)
    for rows, color in ((slice(horizon), scene.wall), (slice(horizon, None), scene.floor)):
        pixels[rows] = [channel + rng.uniform(-8, 8) for channel in words.COLORS[color]]
    pixels[horizon:] *= _texture(scene.floor_style, side, rng)[horizon:, :, None]
    segments = np.zeros((side, side), np.int64)
    segments[horizon:] = 1
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), segments


def _texture(style: str, side: int, rng: random.Random) -> np.ndarray:
    """Return the relative brightness of the floor, ``(side, side)``, about 1."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    seed = rng.randrange(1 << 30)
    brightness = np.ones((side, side), np.float32)
    if style == "gradient":
        brightness = 0.85 + 0.25 * y
    elif style == "tiles":
        brightness = 1 - 0.12 * ((x * 8).astype(int) + (y * 8).astype(int) & 1)
    elif style == "planks":
        row = (y * 14).astype(int)
        brightness = (1 - 0.04 * (row % 3)) * np.where(y * 14 - row < 0.12, 0.8, 1)
    elif style == "stones":
        row = (y * 10).astype(int)
        shifted = x * 7 + row % 2 * 0.5
        column = shifted.astype(int)
        tone = np.random.default_rng(seed).uniform(0.86, 1.08, (11, 9))[row, column]
        brightness = np.where((y * 10 - row < 0.12) | (shifted - column < 0.1), 0.72, tone)
    return brightness


def _draw_sign(image: Image.Image, segments: np.ndarray, sign: Sign, labels: list[tuple[Word, ...]]) -> None:
    """Draw the sign; patches of a number are labeled with their digit, patches of a word with the whole word."""
    side = len(segments)
    height = max(4, round(sign.height * side))
    font, pad = _font(height), height * 0.35
    left, top, right, bottom = font.getbbox(sign.text)
    half_width, half_height = (right - left) / 2 + pad, height / 2 + pad
    x = min(max(sign.x * side, half_width + 1), side - half_width - 1)
    y = min(max(sign.y * side, half_height + 1), side - half_height - 1)
    box = (x - half_width, y - half_height, x + half_width, y + half_height)
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle(box, radius=pad / 2, fill=(252, 250, 240), outline=(40, 40, 40), width=max(1, side // 100))
    pen.text((x - (left + right) / 2, y - (top + bottom) / 2), sign.text, font=font, fill=(20, 20, 25))
    x0, y0, x1, y1 = (round(edge) for edge in box)
    if sign.text.isdigit():
        halves = ((x0, round(x)), (round(x), x1))
        for (start, end), digit, order in zip(halves, sign.text, (words.FIRST, words.SECOND), strict=True):
            segments[y0:y1, start:end] = len(labels)
            labels.append((words.SIGN, Word(digit, digit), order, sign.place))
    else:
        segments[y0:y1, x0:x1] = len(labels)
        labels.append((words.SIGN, Word(sign.text, sign.text), sign.place))
