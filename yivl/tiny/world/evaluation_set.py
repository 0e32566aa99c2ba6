"""Held-out questions, each asked alone, with a balanced distribution of answers for every kind of question."""

import random
from collections import Counter
from collections.abc import Iterator
from typing import Final

from yivl.tiny.world.language import ASK, QuestionKind, SceneQuestion
from yivl.tiny.world.scenes import Scene, Split, sample_scene
from yivl.tiny.world.words import COLORS, FOODS, KINDS, Language

_PATIENCE: Final = 3_000  # consecutive scenes without a usable question before the quota of every answer grows by one

EVALUATED_KINDS: Final[dict[QuestionKind, int | None]] = {
    "presence": 2,
    "count": 5,
    "kind": len(KINDS),
    "kinds": None,
    "activity": 5,
    "food": len(FOODS),
    "colour": len(COLORS),
    "place": 5,
    "sign": None,
    "caption": None,
}
"""Number of different answers by kind of question; ``None`` where the answers are not balanced."""


def balanced_questions(
    split: Split, kind: QuestionKind, language: Language, number: int, *, first: int = 0
) -> Iterator[tuple[Scene, SceneQuestion]]:
    """Yield ``number`` scenes with one question each; the same on every machine.

    No answer exceeds its equal share, unless the split lacks the others.

    Args:
        split: Split of the scenes.
        kind: Kind of the questions.
        language: Language of questions and answers.
        number: Number of questions.
        first: Number of the first candidate scene.
    """
    rng = random.Random(f"{split} {kind} {language} {first}")
    quota = -(-number // (EVALUATED_KINDS[kind] or 1))
    used: Counter[str] = Counter()
    last = first
    ask = ASK["kinds" if kind == "kind" else kind]
    while used.total() < number:
        scene = sample_scene(split, first)
        question = ask(scene, language, rng)
        first += 1
        if first - last > _PATIENCE:  # few kinds have a combination that is held out
            quota, last = quota + 1, first
        if question is None or question.kind != kind or used[question.value] >= quota:
            continue
        if kind == "sign" and question.value == "none":
            continue
        used[question.value] += 1
        last = first
        yield scene, question
