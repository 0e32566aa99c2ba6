"""Rows: JSON or JSONL conversations, captions or text, validated one by one."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from yivl.constants import DEFAULT_IMAGE_TOKEN
from yivl.conversation import Turn
from yivl.errors import YiVLError

_QUESTION_ROLES: Final = ("human", "user")
# Source: 01-ai/Yi, VL: the code expects "gpt", the README documents "assistant".
_ANSWER_ROLES: Final = ("gpt", "assistant")


class RowError(YiVLError):
    """An invalid row; the message names file, row and reason."""


@dataclass(frozen=True)
class Row:
    """One conversation with its images, in the order of their placeholders."""

    turns: tuple[Turn, ...]
    images: tuple[Path | bytes, ...]
    """Paths, or the contents of image files."""
    origin: str
    """File and row, for error messages."""


def parse_row(
    fields: Mapping[str, Any],
    origin: str,
    image_folder: str | os.PathLike[str] = ".",
    images: Sequence[Path | bytes] | None = None,
) -> Row:
    """Return the row of a JSON object.

    A conversation is ``conversations`` (a list of ``{"from": "human" | "gpt" | "assistant", "value": text}``) with an
    optional ``image`` (a path or a list of paths, relative to ``image_folder``); a caption is ``image`` and ``text``.
    ``<image_placeholder>`` marks the turn of an image; in the prompt the image comes first in its turn. An image
    without a placeholder belongs to the first turn. ``images`` replaces the images of ``image``.

    Raises:
        RowError: If a role is unknown or out of order, a field is missing, or the numbers of placeholders and images
            differ.
    """
    try:
        images = _images(fields, Path(image_folder)) if images is None else images
        if "conversations" in fields:
            turns = _turns(fields["conversations"])
        elif isinstance(fields.get("text"), str) and images:
            turns = [Turn("", fields["text"].strip(), num_images=len(images))]
        else:
            raise RowError("neither 'conversations' nor 'image' with 'text'")
        if images and not any(turn.num_images for turn in turns):
            turns[0] = Turn(turns[0].question, turns[0].answer, num_images=len(images))
        placeholders = sum(turn.num_images for turn in turns)
        if placeholders != len(images):
            raise RowError(f"{placeholders} image placeholders but {len(images)} images")
    except RowError as error:
        raise RowError(f"{origin}: {error}") from error
    return Row(tuple(turns), tuple(images), origin)


def _images(fields: Mapping[str, Any], folder: Path) -> Sequence[Path | bytes]:
    value = fields.get("image")
    images = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(image, str) and image for image in images):
        raise RowError("'image' is not a path or a list of paths")
    return [folder / image for image in images]


def _turns(messages: Any) -> list[Turn]:
    """Return the turns of a list of messages, in which questions and answers alternate."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RowError("'conversations' is not a list of messages")
    turns: list[Turn] = []
    question: Turn | None = None
    for message in messages:
        role, text = (message.get(key) if isinstance(message, Mapping) else None for key in ("from", "value"))
        if not isinstance(role, str) or not isinstance(text, str):
            raise RowError("a message without 'from' and 'value'")
        if role not in _QUESTION_ROLES + _ANSWER_ROLES:
            raise RowError(f"unknown role {role!r}; expected one of {', '.join(_QUESTION_ROLES + _ANSWER_ROLES)}")
        if (role in _QUESTION_ROLES) != (question is None):
            raise RowError(f"role {role!r} out of order: questions and answers alternate")
        if question is None:
            num_images = text.count(DEFAULT_IMAGE_TOKEN)
            question = Turn(text.replace(DEFAULT_IMAGE_TOKEN, "").strip() if num_images else text, None, num_images)
        elif DEFAULT_IMAGE_TOKEN in text:
            raise RowError("an image placeholder in an answer")
        else:
            turns.append(Turn(question.question, text, question.num_images))
            question = None
    if question is not None:
        raise RowError("the last question has no answer")
    return turns


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield ``(origin, JSON object)`` for every row of a ``.json`` list (from row 0) or ``.jsonl`` file (from line 1).

    Raises:
        RowError: If the file is missing or is not JSON; the message names the line.
    """
    name = os.fspath(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RowError(f"{name}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RowError(f"{name}: not UTF-8 text (byte {error.start})") from error
    if Path(path).suffix == ".jsonl":
        # Not splitlines(): it also splits at characters that JSON strings may contain, such as U+2028.
        lines = {f"{name} line {number}": line for number, line in enumerate(text.split("\n"), 1) if line.strip()}
        rows = {origin: _parse(line, origin) for origin, line in lines.items()}
    else:
        listed = _parse(text, name)
        if not isinstance(listed, list):
            raise RowError(f"{name}: expected a JSON list of rows; a file with one object per line is named .jsonl")
        rows = {f"{name} row {index}": row for index, row in enumerate(listed)}
    for origin, row in rows.items():
        if not isinstance(row, Mapping):
            raise RowError(f"{origin}: expected a JSON object")
        yield origin, row


def _parse(text: str, origin: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        hint = "; a file with one object per line is named .jsonl" if "Extra data" in str(error) else ""
        raise RowError(f"{origin}: not valid JSON ({error}){hint}") from error
