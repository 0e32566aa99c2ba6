"""Examinations: questions of one kind, each asked alone, with every answer about equally often."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from yivl.tiny.world.language import ASK, Question, QuestionKind
from yivl.tiny.world.scenes import Scene, Split, sample_scene
from yivl.tiny.world.words import COLOURS, FOODS, KINDS, Language

_PATIENCE: Final = 3_000  # scenes in a row that may have nothing to ask for before a value may exceed its share

# Of how many values the answers are: no value is asked for more often than its share, unless the split lacks others.
_VALUES: Final[dict[QuestionKind, int]] = {
    "presence": 2,
    "count": 5,
    "kind": len(KINDS),
    "activity": 5,
    "food": len(FOODS),
    "colour": len(COLOURS),
    "place": 5,
}
EXAM_KINDS: Final[tuple[QuestionKind, ...]] = (
    "presence",
    "count",
    "kind",
    "kinds",
    "activity",
    "food",
    "colour",
    "place",
    "sign",
    "caption",
)


@dataclass(frozen=True)
class Task:
    """One question about one scene."""

    scene: Scene
    question: Question


def examine(split: Split, kind: QuestionKind, language: Language, number: int, *, first: int = 0) -> Iterator[Task]:
    """Yield ``number`` tasks; the same on every machine.

    Args:
        split: Where the scenes are from.
        kind: Of the questions.
        language: Of question and answer.
        number: How many tasks.
        first: Number of the first scene that is tried.
    """
    rng = random.Random(f"{split} {kind} {language} {first}")
    quota = -(-number // _VALUES[kind]) if kind in _VALUES else number
    used: Counter[str] = Counter()
    last = first
    ask = ASK["kinds" if kind == "kind" else kind]
    while used.total() < number:
        scene = sample_scene(split, first)
        question = ask(scene, language, rng)
        first += 1
        if first - last > _PATIENCE:  # few kinds of things have a combination that was never trained
            quota, last = quota + 1, first
        if question is None or question.kind != kind or used[question.value] >= quota:
            continue
        if kind == "sign" and question.value == "none":
            continue
        used[question.value] += 1
        last = first
        yield Task(scene, question)
