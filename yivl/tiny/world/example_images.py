"""Hand-made scenes for ``images/``; none of them is in a split."""

from pathlib import Path
from typing import Any, Final

from yivl.tiny.world.rendering import render
from yivl.tiny.world.scenes import Scene, Sign, Thing
from yivl.tiny.world.words import BOTTOM, COLORS, EATING, KIND, LEFT, MIDDLE, PLAYING, RIGHT, SLEEPING, TOP, Word

SIDE: Final = 672
"""Pixels on a side; the image processor resizes to the input of the model."""
_COLOR: Final = {color.en: color for color in COLORS}


def _thing(name: str, place: Word, x: float, y: float, size: float, *, flipped: bool = False, **activity: Any) -> Thing:
    return Thing(KIND[name], place, x, y, size, 0.0, flipped, **activity)


def _scene(name: str, wall: str, floor: str, style: str, *things: Thing, sign: Sign | None = None) -> Scene:
    return Scene(name, _COLOR[wall], _COLOR[floor], style, 0.36, things, sign)


_EATING: Final[dict[str, Any]] = {"activity": EATING, "food": KIND["fish"]}
_SCENES: Final = (
    _scene(
        *("cats", "blue", "grey", "stones"),
        _thing("cat", LEFT, 0.22, 0.47, 0.26, **_EATING),
        _thing("cat", RIGHT, 0.8, 0.52, 0.27, **_EATING),
        _thing("cat", BOTTOM, 0.52, 0.81, 0.28, flipped=True, **_EATING),
    ),
    _scene(
        *("exit", "yellow", "blue", "tiles"),
        _thing("dog", LEFT, 0.22, 0.55, 0.27, activity=PLAYING),
        _thing("umbrella", BOTTOM, 0.45, 0.83, 0.3),
        sign=Sign("出口", TOP, 0.5, 0.18, 0.15),
    ),
    _scene(
        *("bus", "green", "red", "planks"),
        _thing("bus", LEFT, 0.19, 0.45, 0.33),
        _thing("bicycle", RIGHT, 0.8, 0.56, 0.32),
        sign=Sign("42", TOP, 0.55, 0.17, 0.15),
    ),
    _scene(
        *("owls", "purple", "green", "gradient"),
        _thing("owl", TOP, 0.44, 0.18, 0.27, activity=SLEEPING),
        _thing("tree", MIDDLE, 0.51, 0.5, 0.33),
        _thing("owl", BOTTOM, 0.58, 0.82, 0.26, activity=SLEEPING, flipped=True),
    ),
)
EXAMPLE_SCENES: Final = {f"{scene.seed}.jpg": scene for scene in _SCENES}
"""By file name."""


def write_example_images(folder: Path) -> None:
    """Write the example images as JPEG."""
    for name, scene in EXAMPLE_SCENES.items():
        render(scene, SIDE).image.save(folder / name, quality=92)
