"""Sampling of scenes: which objects, where, how large, doing what. Deterministic by split and number."""

import random
import zlib
from dataclasses import dataclass
from itertools import count
from typing import Final, Literal, get_args

from yivl.tiny.world import words
from yivl.tiny.world.words import BOTTOM, EATING, LEFT, MIDDLE, PLACES, RIGHT, TOP, Activity, Kind, Word

Split = Literal["train", "scenes", "combinations", "sizes"]
"""The training split and three held-out splits: new scenes; combinations of kind, activity and count that the training
split never shows; object sizes outside its range."""
SPLITS: Final[tuple[Split, ...]] = get_args(Split)

MAX_THINGS: Final = 4
FLOOR_STYLES: Final = ("plain", "gradient", "tiles", "planks", "stones")

# Lengths are fractions of the image side.
_CENTERS: Final = {TOP: (0.5, 0.17), LEFT: (0.18, 0.5), MIDDLE: (0.5, 0.5), RIGHT: (0.82, 0.5), BOTTOM: (0.5, 0.83)}
_ALONG, _ACROSS = 0.13, 0.03  # largest offset from these centers: along the image border, and across
_SIZES: Final = ((0.21, 0.36),)
_ACTOR_SIZES: Final = ((0.21, 0.28),)
_NEW_SIZES: Final = ((0.16, 0.19), (0.38, 0.44))
_NEW_ACTOR_SIZES: Final = ((0.16, 0.19), (0.30, 0.34))


@dataclass(frozen=True)
class Thing:
    """One object of a scene."""

    kind: Kind
    place: Word
    x: float
    y: float
    """Center, from the upper left corner."""
    size: float
    """Side of the sprite."""
    angle: float
    """Degrees, counter-clockwise."""
    flipped: bool
    activity: Activity | None = None
    food: Kind | None = None
    """Set where the activity is eating."""


@dataclass(frozen=True)
class Sign:
    """A board with a text."""

    text: str
    place: Word
    x: float
    y: float
    height: float
    """Font size."""


@dataclass(frozen=True)
class Scene:
    """The content of one image."""

    seed: str
    """Also seeds the color and texture noise of the renderer."""
    wall: Word
    floor: Word
    floor_style: str
    horizon: float
    things: tuple[Thing, ...]
    """In reading order."""
    sign: Sign | None

    def of_kind(self, kind: Kind) -> list[Thing]:
        """Return the objects of a kind, in reading order."""
        return [thing for thing in self.things if thing.kind == kind]

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of its objects without props and food, each once, in reading order."""
        return list(dict.fromkeys(thing.kind for thing in self.things))

    @property
    def shown(self) -> set[Kind]:
        """All visible kinds, props and food included."""
        used = {kind for thing in self.things if thing.activity for kind in (thing.activity.prop, thing.food) if kind}
        return {*self.kinds, *used}

    @property
    def combinations(self) -> set[tuple[Kind, Activity | None, int]]:
        """Kind, activity and count of every group of objects."""
        return {(thing.kind, thing.activity, len(self.of_kind(thing.kind))) for thing in self.things}


def is_held_out(kind: Kind, activity: Activity | None, number: int) -> bool:
    """Return whether a combination is excluded from the training split; about one in eight is."""
    if activity is None and number == 1:
        return False  # the training split must show every kind
    key = f"{kind.en} {activity.en if activity else 'nothing'} {number}"
    return zlib.crc32(key.encode()) % 8 == 0


def sample_scene(split: Split, number: int) -> Scene:
    """Return scene ``number`` of a split; the same on every machine."""
    attempts = (_sample(f"{split} {number} {attempt}", new_sizes=split == "sizes") for attempt in count())
    wanted = split == "combinations"
    return next(scene for scene in attempts if any(is_held_out(*one) for one in scene.combinations) == wanted)


def _sample(seed: str, *, new_sizes: bool) -> Scene:
    # The order of the random draws defines the scenes: a change to it changes every split.
    rng = random.Random(seed)
    wall, floor = rng.sample(list(words.COLORS), 2)
    free = list(PLACES)
    composition = rng.random()
    sign = _sample_sign(rng, free) if composition < 0.35 else None
    things = _sample_actors(rng, free, new_sizes) if 0.25 < composition < 0.7 else []
    # Either single objects of several kinds, or groups of equal kinds with all counts equally likely.
    single = rng.random() < 0.4
    while len(things) < MAX_THINGS and free and (not things or rng.random() < 0.6):
        kind = rng.choice(words.KINDS)
        if any(kind in (thing.kind, thing.food, thing.activity and thing.activity.prop) for thing in things):
            continue
        most = min(MAX_THINGS - len(things), len(free))
        for _ in range(1 if single else min(rng.randint(1, MAX_THINGS), most)):
            size = rng.uniform(*rng.choice(_NEW_SIZES if new_sizes else _SIZES))
            place, angle = free.pop(rng.randrange(len(free))), rng.uniform(-22, 22)
            things.append(Thing(kind, place, *_jitter(rng, place, _ALONG), size, angle, rng.random() < 0.5))
    things.sort(key=lambda thing: PLACES.index(thing.place))
    return Scene(seed, wall, floor, rng.choice(FLOOR_STYLES), rng.uniform(0.3, 0.6), tuple(things), sign)


def _sample_sign(rng: random.Random, free: list[Word]) -> Sign:
    text = str(rng.randint(10, 99)) if rng.random() < 0.35 else rng.choice(words.SIGN_WORDS)
    height = rng.uniform(0.12, 0.16)
    # Words in Latin letters are too wide for the left and right places, and in the middle they would cover both.
    is_wide = len(text) > 2
    place = rng.choice([TOP, BOTTOM] if is_wide else PLACES)
    free.remove(place)
    return Sign(text, place, *_jitter(rng, place, 0.0 if is_wide else _ALONG), height)


def _sample_actors(rng: random.Random, free: list[Word], new_sizes: bool) -> list[Thing]:
    kind, activity = rng.choice(words.ANIMALS), rng.choice((EATING, EATING, *words.ACTIVITIES))
    food = rng.choice(words.FOODS) if activity is EATING else None
    things = []
    for _ in range(min(rng.randint(1, MAX_THINGS), len(free))):
        place = free.pop(rng.randrange(len(free)))
        size = rng.uniform(*rng.choice(_NEW_ACTOR_SIZES if new_sizes else _ACTOR_SIZES))
        angle, (x, y) = rng.uniform(-8, 8), _jitter(rng, place, _ALONG)
        things.append(Thing(kind, place, x, y, size, angle, rng.random() < 0.5, activity, food))
    return things


def _jitter(rng: random.Random, place: Word, along: float) -> tuple[float, float]:
    """Return a random position near the center of a place."""
    (x, y), dx, dy = _CENTERS[place], rng.uniform(-1, 1), rng.uniform(-1, 1)
    if place in (LEFT, RIGHT):
        return x + dx * _ACROSS, y + dy * along
    return x + dx * (_ACROSS if place is MIDDLE else along), y + dy * _ACROSS
