"""Scenes to pixels, and to what lies under each patch of them."""

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from yivl.tiny.world.scenes import Scene, Sign, Thing
from yivl.tiny.world.words import (
    COLOURS,
    EATING,
    FIRST,
    FLOOR,
    KIND,
    KINDS,
    PLAYING,
    READING,
    SECOND,
    SIGN,
    SLEEPING,
    WALL,
    Kind,
    Word,
)

ASSETS: Final = Path(__file__).parents[1] / "assets" / "world"
SPRITE_SIDE: Final = 128
SPRITE_COLUMNS: Final = 8
# A patch belongs to the thing that covers most of it, if that is at least this much of the patch: little enough that
# a small thing on the corner of four patches is not lost.
_MIN_COVER: Final = 0.12

_WALL_ID, _FLOOR_ID = 0, 1


@dataclass(frozen=True)
class Part:
    """One sprite of a picture."""

    kind: Kind
    x: float
    y: float
    size: float
    angle: float
    flipped: bool
    words: tuple[Word, ...]
    """What there is to say of it."""


@dataclass(frozen=True)
class Picture:
    """Pixels, and whose they are."""

    image: Image.Image
    owners: np.ndarray
    """``(side, side)`` int: index into ``words`` of what is seen at each pixel."""
    words: tuple[tuple[Word, ...], ...]

    def patches(self, grid: int) -> list[tuple[Word, ...]]:
        """Return what lies under each of ``grid * grid`` patches, in raster order."""
        side = len(self.owners)
        cells = np.arange(side) * grid // side
        patch_of_pixel = cells[:, None] * grid + cells
        number = len(self.words)
        counts = np.bincount((patch_of_pixel * number + self.owners).ravel(), minlength=grid * grid * number)
        counts = counts.reshape(grid * grid, number)
        owners = counts[:, :2].argmax(1)
        if number > 2:
            covered = counts[:, 2:].max(1) >= _MIN_COVER * counts.sum(1)
            owners = np.where(covered, 2 + counts[:, 2:].argmax(1), owners)
        return [self.words[owner] for owner in owners]


def draw(scene: Scene, side: int) -> Picture:
    """Return the picture of a scene, ``side`` by ``side`` pixels."""
    rng = random.Random(scene.seed)
    image, owners = _background(scene, side, rng)
    words: list[tuple[Word, ...]] = [(WALL, scene.wall), (FLOOR, scene.floor)]
    for thing in sorted(scene.things, key=lambda thing: thing.y):  # what is nearer covers what is farther
        for part in _parts(thing):
            sprite = _sprite(part, side)
            corner = round(part.x * side - sprite.width / 2), round(part.y * side - sprite.height / 2)
            _paste(image, owners, sprite, corner, len(words))
            words.append(part.words)
    if scene.sign:
        _put_up(image, owners, scene.sign, words)
    return Picture(image, owners, tuple(words))


def _parts(thing: Thing) -> list[Part]:
    """Return the sprites of a thing and of what it is doing something with, in the order of drawing."""
    x, y, size, activity = thing.x, thing.y, thing.size, thing.activity
    side = -1 if thing.flipped else 1

    def part(kind: Kind, dx: float, dy: float, scale: float, angle: float, *words: Word) -> Part:
        return Part(kind, x + dx * size, y + dy * size, scale * size, angle, thing.flipped, (kind, *words, thing.place))

    if activity is None:
        return [part(thing.kind, 0, 0, 1, thing.angle)]
    prop = KIND[activity.prop]
    if activity is EATING:
        assert thing.food is not None
        return [
            part(thing.kind, 0, -0.1, 1, thing.angle, activity),
            part(thing.food, -0.45 * side, 0.08, 0.58, 0, activity),
            # A bowl is also what is in it: at few patches nothing else of it is left.
            part(prop, -0.45 * side, 0.4, 0.55, 0, activity, thing.food),
        ]
    if activity is PLAYING:
        return [
            part(thing.kind, 0, -0.05, 1, thing.angle, activity),
            part(prop, -0.5 * side, 0.32, 0.5, 0, activity),
        ]
    if activity is SLEEPING:
        return [
            part(prop, 0, 0.18, 1.35, 0, activity),
            part(thing.kind, 0, -0.08, 0.9, 80 * side + thing.angle, activity),
        ]
    assert activity is READING
    return [part(thing.kind, 0, -0.1, 1, thing.angle, activity), part(prop, 0, 0.36, 0.65, 0, activity)]


@cache
def _sheet() -> tuple[Image.Image, ...]:
    sheet = Image.open(ASSETS / "sprites.png").convert("RGBA")
    corners = [divmod(index, SPRITE_COLUMNS) for index in range(len(KINDS))]
    return tuple(
        sheet.crop((column * SPRITE_SIDE, row * SPRITE_SIDE, (column + 1) * SPRITE_SIDE, (row + 1) * SPRITE_SIDE))
        for row, column in corners
    )


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(ASSETS / "signs.otf", size)


def _sprite(part: Part, side: int) -> Image.Image:
    sprite = _sheet()[KINDS.index(part.kind)]
    if part.flipped:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels = max(2, round(part.size * side))
    # Premultiplied alpha: no dark seams from the transparent pixels around a sprite.
    small = sprite.convert("RGBa").resize((pixels, pixels), Image.Resampling.BOX, reducing_gap=1.0)
    if part.angle:
        small = small.rotate(part.angle, Image.Resampling.BILINEAR, expand=True)
    return small.convert("RGBA")


def _paste(image: Image.Image, owners: np.ndarray, sprite: Image.Image, corner: tuple[int, int], owner: int) -> None:
    image.paste(sprite, corner, sprite)
    left, top = max(corner[0], 0), max(corner[1], 0)
    alpha = np.asarray(sprite.getchannel("A"))[top - corner[1] :, left - corner[0] :]
    region = owners[top : top + alpha.shape[0], left : left + alpha.shape[1]]
    region[alpha[: region.shape[0], : region.shape[1]] > 127] = owner


def _background(scene: Scene, side: int, rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    horizon = round(scene.horizon * side)
    pixels = np.empty((side, side, 3), np.float32)
    pixels[:horizon] = _shade(scene.wall, rng)
    pixels[horizon:] = _shade(scene.floor, rng)
    pixels[horizon:] *= _texture(scene.floor_style, side, rng)[horizon:, :, None]
    owners = np.full((side, side), _WALL_ID, np.int64)
    owners[horizon:] = _FLOOR_ID
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), owners


def _shade(colour: Word, rng: random.Random) -> list[float]:
    return [channel + rng.uniform(-8, 8) for channel in COLOURS[colour]]


def _texture(style: str, side: int, rng: random.Random) -> np.ndarray:
    """Return the brightness of the floor, ``(side, side)``, about 1."""
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


def _put_up(image: Image.Image, owners: np.ndarray, sign: Sign, words: list[tuple[Word, ...]]) -> None:
    """Draw the sign; a number's patches say which digit they show, a word's the whole word."""
    side = len(owners)
    height = max(4, round(sign.height * side))
    font = _font(height)
    left, top, right, bottom = font.getbbox(sign.text)
    width = right - left
    center_x, center_y = sign.x * side, sign.y * side
    pad = height * 0.35
    half_width, half_height = width / 2 + pad, height / 2 + pad
    center_x = min(max(center_x, half_width + 1), side - half_width - 1)
    center_y = min(max(center_y, half_height + 1), side - half_height - 1)
    box = (center_x - half_width, center_y - half_height, center_x + half_width, center_y + half_height)
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle(box, radius=pad / 2, fill=(252, 250, 240), outline=(40, 40, 40), width=max(1, side // 100))
    pen.text((center_x - (left + right) / 2, center_y - (top + bottom) / 2), sign.text, font=font, fill=(20, 20, 25))
    x0, y0, x1, y1 = (round(edge) for edge in box)
    if sign.text.isdigit():
        middle = round(center_x)
        for edges, digit, order in zip(((x0, middle), (middle, x1)), sign.text, (FIRST, SECOND), strict=True):
            owners[y0:y1, edges[0] : edges[1]] = len(words)
            words.append((SIGN, Word(digit, digit), order, sign.place))
    else:
        owners[y0:y1, x0:x1] = len(words)
        words.append((SIGN, Word(sign.text, sign.text), sign.place))
