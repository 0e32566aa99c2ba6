"""Exact-match evaluation on rows of questions: each asked alone, greedily, and compared with its answer."""

import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from yivl.batching import answer_batch
from yivl.data.rows import RowError, parse_row, read_rows
from yivl.model.loading import LoadedModel

Pictures = Literal["own", "another", "none"]
"""Which picture is shown with a question: its own, that of another row, or none. The others are controls: a model that
does as well with them does not look."""


@dataclass(frozen=True)
class Item:
    """One question."""

    id: str
    question: str
    image: Path | None
    answer: str
    group: tuple[str, ...]
    """Values of the fields that scores are grouped by."""


@dataclass(frozen=True)
class Score:
    """How a group of questions was answered."""

    group: tuple[str, ...]
    number: int
    accuracy: float
    """Percentage of answers that equal the right one."""
    constant: float
    """Percentage that the best single answer to all of them would reach."""


def read_items(data: Path, image_folder: Path, group_by: Sequence[str]) -> list[Item]:
    """Return the first question of every row, with its picture.

    Raises:
        RowError: If a row is not as it should be, or lacks a field that scores are grouped by.
    """
    items = []
    for origin, fields in read_rows(data):
        row = parse_row(fields, origin, image_folder)
        if missing := [name for name in group_by if name not in fields]:
            raise RowError(f"{origin}: no field {missing[0]!r} to group by")
        turn, image = row.turns[0], row.images[0] if row.images else None
        assert turn.answer is not None
        assert not isinstance(image, bytes)
        group = tuple(str(fields[name]) for name in group_by)
        items.append(Item(str(fields.get("id", origin)), turn.question, image, turn.answer.strip(), group))
    if not items:
        raise RowError(f"{data}: no rows")
    return items


def show(items: Sequence[Item], pictures: Pictures) -> list[Path | None]:
    """Return the picture to be shown with each question.

    ``another`` is that of a row whose answer in the same group is another, so that it is never right by chance of both
    being the same; where all answers are the same, any other row's.
    """
    if pictures == "own":
        return [item.image for item in items]
    if pictures == "none":
        return [None for _ in items]
    rng = random.Random(0)
    by_group: dict[tuple[str, ...], list[Item]] = defaultdict(list)
    for item in items:
        by_group[item.group].append(item)
    shown: list[Path | None] = []
    for item in items:
        others = [other for other in by_group[item.group] if other.image != item.image]
        shown.append(rng.choice(others).image if others else None)
    return shown


def answer_items(
    loaded: LoadedModel, items: Sequence[Item], pictures: Pictures, *, batch_size: int, max_new_tokens: int
) -> list[str]:
    """Return the greedy answer to each question."""
    images = show(items, pictures)
    order = sorted(range(len(items)), key=lambda index: len(items[index].answer))  # answers of a length end together
    answers = [""] * len(items)
    for start in tqdm(range(0, len(order), batch_size), desc=f"pictures: {pictures}", disable=None):
        batch = order[start : start + batch_size]
        texts = answer_batch(
            loaded,
            [items[index].question for index in batch],
            [images[index] for index in batch],
            temperature=0,
            max_new_tokens=max_new_tokens,
        )
        for index, text in zip(batch, texts, strict=True):
            answers[index] = text.strip()
    return answers


def score(items: Sequence[Item], answers: Sequence[str]) -> list[Score]:
    """Return the scores of all groups, in the order in which they first occur."""
    right: dict[tuple[str, ...], list[bool]] = defaultdict(list)
    wanted: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for item, answer in zip(items, answers, strict=True):
        right[item.group].append(answer == item.answer)
        wanted[item.group][item.answer] += 1
    return [
        Score(group, len(marks), 100 * sum(marks) / len(marks), 100 * wanted[group].most_common(1)[0][1] / len(marks))
        for group, marks in right.items()
    ]


def write_report(
    folder: Path, items: Sequence[Item], answers: Sequence[str], scores: Sequence[Score], about: Mapping[str, Any]
) -> None:
    """Write ``answers.jsonl`` and ``scores.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "answers.jsonl").open("w", encoding="utf-8") as file:
        for item, answer in zip(items, answers, strict=True):
            fields = {"id": item.id, "question": item.question, "answer": item.answer, "response": answer}
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")
    report = {**about, "scores": [asdict(one) for one in scores]}
    partial = folder / "scores.json.partial"
    partial.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, folder / "scores.json")


def table(scores: Sequence[Score], group_by: Sequence[str]) -> str:
    """Return the scores as a Markdown table."""
    lines = [
        f"| {' | '.join(group_by)} | questions | exact % | best constant answer % |",
        "|---" * (len(group_by) + 3) + "|",
    ]
    for one in scores:
        lines.append(f"| {' | '.join(one.group)} | {one.number} | {one.accuracy:.1f} | {one.constant:.1f} |")
    return "\n".join(lines)
