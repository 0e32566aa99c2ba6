"""Scenes as data: which things, where, how large, doing what. Deterministic by split and number."""

import random
import zlib
from dataclasses import dataclass
from typing import Final, Literal, get_args

from yivl.tiny.world.words import (
    ACTIVITIES,
    ANIMALS,
    BOTTOM,
    COLOURS,
    EATING,
    FOODS,
    KINDS,
    LEFT,
    MIDDLE,
    PLACES,
    RIGHT,
    SIGN_WORDS,
    TOP,
    Activity,
    Kind,
    Word,
)

Split = Literal["train", "scenes", "combinations", "sizes"]
"""What is trained on, and three held-out splits: new scenes; kinds, activities and counts that were never trained
together; sizes that were never trained."""
SPLITS: Final[tuple[Split, ...]] = get_args(Split)

MAX_THINGS: Final = 4
FLOOR_STYLES: Final = ("plain", "gradient", "tiles", "planks", "stones")

# Fractions of the side of the picture, as all lengths here.
_CENTRES: Final = {TOP: (0.5, 0.17), LEFT: (0.18, 0.5), MIDDLE: (0.5, 0.5), RIGHT: (0.82, 0.5), BOTTOM: (0.5, 0.83)}
_ALONG, _ACROSS = 0.13, 0.03  # how far a thing lies off these centres: along the edge of the picture, and across
_SIZES: Final = (0.21, 0.36)
_ACTOR_SIZES: Final = (0.21, 0.28)
_NEW_SIZES: Final = ((0.16, 0.19), (0.38, 0.44))
_NEW_ACTOR_SIZES: Final = ((0.16, 0.19), (0.30, 0.34))


@dataclass(frozen=True)
class Thing:
    """One thing of a scene."""

    kind: Kind
    place: Word
    x: float
    y: float
    """Centre, from the upper left corner."""
    size: float
    """Side of the sprite."""
    angle: float
    """Degrees, counter-clockwise."""
    flipped: bool
    activity: Activity | None = None
    food: Kind | None = None
    """What it eats, from a bowl of its own."""


@dataclass(frozen=True)
class Sign:
    """A board with something written on it."""

    text: str
    place: Word
    x: float
    y: float
    height: float
    """Of the letters."""


@dataclass(frozen=True)
class Scene:
    """Everything there is to know about one picture."""

    seed: str
    """Also of the small variations of the drawing."""
    wall: Word
    floor: Word
    floor_style: str
    horizon: float
    things: tuple[Thing, ...]
    """In reading order."""
    sign: Sign | None

    def of_kind(self, kind: Kind) -> list[Thing]:
        """Return the things of a kind, in reading order."""
        return [thing for thing in self.things if thing.kind == kind]

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of its things, each once, in reading order."""
        return list(dict.fromkeys(thing.kind for thing in self.things))

    @property
    def shown(self) -> set[Kind]:
        """All kinds to be seen, what things are done with included."""
        props = {kind for kind in KINDS for thing in self.things if thing.activity and kind.en == thing.activity.prop}
        return {*self.kinds, *props, *(thing.food for thing in self.things if thing.food)}

    @property
    def combinations(self) -> set[tuple[Kind, Activity | None, int]]:
        """Kind, what it does and how many, of all its things."""
        return {(thing.kind, thing.activity, len(self.of_kind(thing.kind))) for thing in self.things}


def is_held_out(kind: Kind, activity: Activity | None, count: int) -> bool:
    """Return whether so many of a kind doing this are kept out of training; about one combination in eight."""
    if activity is None and count == 1:
        return False  # every kind must be seen somewhere
    key = f"{kind.en} {activity.en if activity else 'nothing'} {count}"
    return zlib.crc32(key.encode()) % 8 == 0


def sample_scene(split: Split, number: int) -> Scene:
    """Return scene ``number`` of a split; the same on every machine."""
    attempt = 0
    while True:
        seed = f"{split} {number} {attempt}"
        scene = _draw(seed, new_sizes=split == "sizes")
        held_out = any(is_held_out(*combination) for combination in scene.combinations)
        if held_out == (split == "combinations"):
            return scene
        attempt += 1


def _draw(seed: str, *, new_sizes: bool) -> Scene:
    rng = random.Random(seed)
    colours = list(COLOURS)
    wall, floor = rng.sample(colours, 2)
    free = list(PLACES)
    sort = rng.random()
    sign = _draw_sign(rng, free) if sort < 0.35 else None
    things: list[Thing] = []
    if 0.25 < sort < 0.7:
        things += _draw_actors(rng, free, new_sizes)
    # Some scenes have single things of several kinds; the others one kind or more, with all counts alike.
    single = rng.random() < 0.4
    while len(things) < MAX_THINGS and free and (not things or rng.random() < 0.6):
        kind = rng.choice(KINDS)
        if any(kind in {thing.kind, thing.food} for thing in things):
            continue
        if any(thing.activity and thing.activity.prop == kind.en for thing in things):
            continue
        most = min(MAX_THINGS - len(things), len(free))
        for _ in range(1 if single else min(rng.randint(1, MAX_THINGS), most)):
            size = _size(rng, _NEW_SIZES if new_sizes else (_SIZES,))
            things.append(_put(rng, kind, _take(rng, free), size, rng.uniform(-22, 22)))
    things.sort(key=lambda thing: PLACES.index(thing.place))
    return Scene(seed, wall, floor, rng.choice(FLOOR_STYLES), rng.uniform(0.3, 0.6), tuple(things), sign)


def _draw_sign(rng: random.Random, free: list[Word]) -> Sign:
    text = str(rng.randint(10, 99)) if rng.random() < 0.35 else rng.choice(SIGN_WORDS)
    height = rng.uniform(0.12, 0.16)
    # Words of Latin letters are too long for the sides, and in the middle they would cover both.
    place = rng.choice([TOP, BOTTOM] if len(text) > 2 else PLACES)
    free.remove(place)
    x, y = _CENTRES[place]
    along = 0.0 if len(text) > 2 else _ALONG
    return Sign(text, place, *_jitter(rng, place, x, y, along), height)


def _draw_actors(rng: random.Random, free: list[Word], new_sizes: bool) -> list[Thing]:
    kind, activity = rng.choice(ANIMALS), rng.choice((EATING, EATING, *ACTIVITIES))
    food = rng.choice(FOODS) if activity is EATING else None
    count = min(rng.randint(1, MAX_THINGS), len(free))
    ranges = _NEW_ACTOR_SIZES if new_sizes else (_ACTOR_SIZES,)
    return [
        _put(rng, kind, _take(rng, free), _size(rng, ranges), rng.uniform(-8, 8), activity, food) for _ in range(count)
    ]


def _take(rng: random.Random, free: list[Word]) -> Word:
    return free.pop(rng.randrange(len(free)))


def _size(rng: random.Random, ranges: tuple[tuple[float, float], ...]) -> float:
    return rng.uniform(*rng.choice(ranges))


def _put(
    rng: random.Random,
    kind: Kind,
    place: Word,
    size: float,
    angle: float,
    activity: Activity | None = None,
    food: Kind | None = None,
) -> Thing:
    x, y = _jitter(rng, place, *_CENTRES[place], _ALONG)
    return Thing(kind, place, x, y, size, angle, rng.random() < 0.5, activity, food)


def _jitter(rng: random.Random, place: Word, x: float, y: float, along: float) -> tuple[float, float]:
    dx, dy = rng.uniform(-1, 1), rng.uniform(-1, 1)
    if place is MIDDLE:
        return x + dx * _ACROSS, y + dy * _ACROSS
    if place in (LEFT, RIGHT):
        return x + dx * _ACROSS, y + dy * along
    return x + dx * along, y + dy * _ACROSS
