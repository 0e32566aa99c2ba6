"""Evaluation on rows of questions: each asked alone, greedily, and compared with its answer."""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from yivl.checkpoint.atomic import write_text
from yivl.data.rows import RowError, parse_row, read_rows
from yivl.eval.benchmarks.questions import Question, file_key
from yivl.eval.report import Table

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
    contains: float
    """Percentage of answers that hold the right one, in upper or lower case."""
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
        turn = row.turns[0]
        if turn.num_images > 1:
            raise RowError(f"{origin}: {turn.num_images} pictures in the first question; it is asked with one at most")
        image = row.images[0] if turn.num_images else None
        assert turn.answer is not None
        assert not isinstance(image, bytes)
        group = tuple(str(fields[name]) for name in group_by)
        items.append(Item(str(fields.get("id", origin)), turn.question, image, turn.answer.strip(), group))
    if not items:
        raise RowError(f"{data}: no rows")
    return items


def show(items: Sequence[Item], pictures: Pictures) -> list[Path | None]:
    """Return the picture to be shown with each question.

    ``another`` is that of another row of the same group, drawn at random; its answer may happen to be the same.
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


def questions(items: Sequence[Item], pictures: Pictures) -> list[Question]:
    """Return what is asked; rows may share an id, so their places tell the questions apart."""
    shown = show(items, pictures)
    return [
        Question(str(place), item.question, partial(_as_it_is, path), {}, "" if path is None else file_key(path))
        for place, (item, path) in enumerate(zip(items, shown, strict=True))
    ]


def _as_it_is(path: Path | None) -> Path | None:
    return path


def score(items: Sequence[Item], answers: Sequence[str]) -> list[Score]:
    """Return the scores of all groups, in the order in which they first occur."""
    by_group: dict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
    for item, answer in zip(items, answers, strict=True):
        by_group[item.group].append((item.answer, answer))
    scores = []
    for group, pairs in by_group.items():
        exact = sum(answer == wanted for wanted, answer in pairs)
        contains = sum(wanted.casefold() in answer.casefold() for wanted, answer in pairs)
        [(_, most)] = Counter(wanted for wanted, _ in pairs).most_common(1)
        scores.append(Score(group, len(pairs), *(100 * number / len(pairs) for number in (exact, contains, most))))
    return scores


def write_answers(folder: Path, items: Sequence[Item], answers: Sequence[str]) -> None:
    """Write ``answers.jsonl``: every question with its answer and the response."""
    lines = [
        {"id": item.id, "question": item.question, "answer": item.answer, "response": answer}
        for item, answer in zip(items, answers, strict=True)
    ]
    write_text(folder / "answers.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def table(scores: Sequence[Score], group_by: Sequence[str]) -> Table:
    """Return the scores as a table."""
    columns = [*group_by, "questions", "exact %", "contains %", "best constant answer %"]
    return Table(columns, [[*one.group, one.number, one.accuracy, one.contains, one.constant] for one in scores])
