"""Scenes made by hand for ``images/``: what a new user asks about first. None is in any split."""

from pathlib import Path
from typing import Final

from yivl.tiny.world.drawing import draw
from yivl.tiny.world.scenes import Scene, Sign, Thing
from yivl.tiny.world.words import (
    BOTTOM,
    COLOURS,
    EATING,
    KIND,
    LEFT,
    MIDDLE,
    PLAYING,
    RIGHT,
    SLEEPING,
    TOP,
    Activity,
    Kind,
    Word,
)

SIDE: Final = 672
"""Pixels on a side of the example pictures; the model reads them at its own size."""
_COLOUR: Final = {colour.en: colour for colour in COLOURS}


def _thing(name: str, place: Word, x: float, y: float, size: float, **more: Activity | Kind | bool) -> Thing:
    activity, food = more.get("activity"), more.get("food")
    assert activity is None or isinstance(activity, Activity)
    assert food is None or isinstance(food, Kind)
    return Thing(KIND[name], place, x, y, size, 0.0, bool(more.get("flipped", False)), activity, food)


def _scene(name: str, wall: str, floor: str, style: str, *things: Thing, sign: Sign | None = None) -> Scene:
    return Scene(name, _COLOUR[wall], _COLOUR[floor], style, 0.36, things, sign)


_FISH: Final = KIND["fish"]
EXAMPLES: Final = {
    "cats.jpg": _scene(
        "cats",
        "blue",
        "grey",
        "stones",
        _thing("cat", LEFT, 0.22, 0.47, 0.26, activity=EATING, food=_FISH),
        _thing("cat", RIGHT, 0.8, 0.52, 0.27, activity=EATING, food=_FISH),
        _thing("cat", BOTTOM, 0.52, 0.81, 0.28, activity=EATING, food=_FISH, flipped=True),
    ),
    "exit.jpg": _scene(
        "exit",
        "yellow",
        "blue",
        "tiles",
        _thing("dog", LEFT, 0.22, 0.55, 0.27, activity=PLAYING),
        _thing("umbrella", BOTTOM, 0.45, 0.83, 0.3),
        sign=Sign("出口", TOP, 0.5, 0.18, 0.15),
    ),
    "bus.jpg": _scene(
        "bus",
        "green",
        "red",
        "planks",
        _thing("bus", LEFT, 0.19, 0.45, 0.33),
        _thing("bicycle", RIGHT, 0.8, 0.56, 0.32),
        sign=Sign("42", TOP, 0.55, 0.17, 0.15),
    ),
    "owls.jpg": _scene(
        "owls",
        "purple",
        "green",
        "gradient",
        _thing("owl", TOP, 0.44, 0.18, 0.27, activity=SLEEPING),
        _thing("tree", MIDDLE, 0.51, 0.5, 0.33),
        _thing("owl", BOTTOM, 0.58, 0.82, 0.26, activity=SLEEPING, flipped=True),
    ),
}
"""By file name."""


def write_examples(folder: Path) -> None:
    """Write the example pictures."""
    for name, scene in EXAMPLES.items():
        draw(scene, SIDE).image.save(folder / name, quality=92)
