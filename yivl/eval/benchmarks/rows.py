"""Rows of training data: the first question of each, compared with its answer."""

import argparse
import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from yivl import command_line
from yivl.data.rows import Row, RowError, log_notices, parse_row, read_rows
from yivl.eval.benchmarks.benchmark import Question, file_key
from yivl.eval.report import Report, Table

_Image = Path | bytes | None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    command_line.add_model_flags(parser)
    parser.add_argument("--data", "--data_path", required=True, help="rows, .json or .jsonl (docs/data.md)")
    parser.add_argument(
        "--image-folder", default=".", help="base folder of relative image paths (default: %(default)s)"
    )
    parser.add_argument("--group-by", nargs="*", default=[], help="fields of the rows by which scores are grouped")
    about = "image of each question; another and none are controls, with which a model that looks scores lower"
    parser.add_argument("--images", "--pictures", choices=("own", "another", "none"), default="own", help=about)
    parser.add_argument("--max-new-tokens", type=int, default=64, help="length of a response (default: %(default)s)")


def max_new_tokens(arguments: argparse.Namespace) -> int:
    """Return the maximum length of a response in tokens."""
    return int(arguments.max_new_tokens)


def read_questions(arguments: argparse.Namespace) -> list[Question]:
    """Return the questions; their ids are indices, because rows may share an id.

    Raises:
        RowError: If a row is invalid or lacks a field of ``--group-by``, or its first question has several images.
    """
    found: list[tuple[Row, dict[str, Any]]] = []
    for origin, fields in read_rows(Path(arguments.data).expanduser()):
        row = parse_row(fields, origin, Path(arguments.image_folder).expanduser())
        if missing := [name for name in arguments.group_by if name not in fields]:
            raise RowError(f"{origin}: no field {missing[0]!r} to group by")
        turn = row.turns[0]
        if turn.num_images > 1:
            raise RowError(f"{origin}: {turn.num_images} images in the first question; expected at most one")
        group = tuple(str(fields[name]) for name in arguments.group_by)
        scored_by = {"id": str(fields.get("id", origin)), "answer": str(turn.answer).strip(), "group": group}
        found.append((row, scored_by))
    log_notices(row for row, _ in found)
    images = [row.images[0] if row.turns[0].num_images else None for row, _ in found]
    shown = select_images(images, [scored_by["group"] for _, scored_by in found], arguments.images)
    return [
        Question(
            str(index),
            row.turns[0].question,
            partial(_shown, image),
            scored_by,
            _image_key(image),
            system=row.system,
        )
        for index, ((row, scored_by), image) in enumerate(zip(found, shown, strict=True))
    ]


def _shown(image: _Image) -> _Image:
    return image


def _image_key(image: _Image) -> str:
    if image is None:
        return ""
    return hashlib.sha256(image).hexdigest() if isinstance(image, bytes) else file_key(image)


def report(arguments: argparse.Namespace, questions: Sequence[Question], responses: Mapping[str, str]) -> Report:
    """Return the scores by group, and every question with its answer and response."""
    lines = []
    for question in questions:
        fields = {"id": question.fields["id"], "question": question.prompt, "answer": question.fields["answer"]}
        lines.append(json.dumps(fields | {"response": responses[question.id]}, ensure_ascii=False) + "\n")
    scores = score(questions, responses)
    columns = [*arguments.group_by, "questions", "exact %", "contains %", "best constant answer %"]
    return Report(
        {"answers.jsonl": "".join(lines)},
        {"images": arguments.images, "group_by": arguments.group_by, "scores": scores},  # keys of published files
        Table(columns, [[*group, *numbers] for group, *numbers in (one.values() for one in scores)]),
    )


def select_images(images: Sequence[_Image], groups: Sequence[tuple[str, ...]], which: str) -> list[_Image]:
    """Return the image of each question: its ``own``, ``another`` at random of the same group, or ``none``.

    The answer to another image may happen to be the same.
    """
    if which != "another":
        return [image if which == "own" else None for image in images]
    rng = random.Random(0)
    by_group: dict[tuple[str, ...], list[_Image]] = defaultdict(list)
    for group, image in zip(groups, images, strict=True):
        by_group[group].append(image)
    selected: list[_Image] = []
    for group, image in zip(groups, images, strict=True):
        others = [other for other in by_group[group] if other != image]
        selected.append(rng.choice(others) if others else None)
    return selected


def score(questions: Sequence[Question], responses: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the scores of all groups, in the order of their first questions.

    Returns:
        ``group``, ``number`` of questions, and in percent: ``accuracy`` (responses that equal the answer), ``contains``
        (that contain it, in upper or lower case), and ``constant``, what the most frequent answer would reach.
    """
    by_group: dict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
    for question in questions:
        by_group[question.fields["group"]].append((question.fields["answer"], responses[question.id]))
    scores = []
    for group, pairs in by_group.items():
        counts = {
            "accuracy": sum(response == answer for answer, response in pairs),
            "contains": sum(answer.casefold() in response.casefold() for answer, response in pairs),
            "constant": max(Counter(answer for answer, _ in pairs).values()),
        }
        percent = {name: 100 * count / len(pairs) for name, count in counts.items()}
        scores.append({"group": group, "number": len(pairs), **percent})
    return scores
