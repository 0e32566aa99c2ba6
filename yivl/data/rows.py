"""Training data as people write it: JSON or JSONL rows of conversations, captions or text, checked one by one."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from yivl.constants import DEFAULT_IMAGE_TOKEN
from yivl.conversation import Turn
from yivl.errors import YiVLError

# Both spellings of the answering role are published: the code of the release knows "gpt", its README says "assistant".
_QUESTION_ROLES: Final = ("human", "user")
_ANSWER_ROLES: Final = ("gpt", "assistant")


class RowError(YiVLError):
    """A row that cannot be trained on; the message names file, row and reason."""


@dataclass(frozen=True)
class Row:
    """One conversation with its pictures, in the order of their slots."""

    turns: tuple[Turn, ...]
    images: tuple[Path | bytes, ...]
    """Files, or the bytes of files."""
    origin: str
    """File and row, for messages."""


def parse_row(
    fields: Mapping[str, Any],
    origin: str,
    image_folder: str | os.PathLike[str] = ".",
    images: Sequence[Path | bytes] | None = None,
) -> Row:
    """Return a row from its JSON object.

    Known forms: ``conversations`` (a list of ``{"from": "human" | "gpt" | "assistant", "value": text}``) with an
    optional ``image`` (a path or a list of them, relative to ``image_folder``), and captions (``image`` and ``text``).
    A picture belongs where ``<image_placeholder>`` stands; in the prompt it comes first in its turn, as in the release.
    A row with one picture and no placeholder shows it in the first turn.

    Args:
        fields: The JSON object.
        origin: File and row, for messages.
        image_folder: Where relative picture paths start.
        images: The pictures, where they do not come from ``image``.

    Raises:
        RowError: If a role is unknown or out of turn, something is missing, or placeholders and pictures differ in
            number.
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
        slots = sum(turn.num_images for turn in turns)
        if slots != len(images):
            raise RowError(f"{slots} image placeholders but {len(images)} images")
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
    """Pair questions and answers; they must alternate, beginning with a question and ending with an answer."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RowError("'conversations' is not a list of messages")
    turns: list[Turn] = []
    question: Turn | None = None
    for message in messages:
        role, text = (message.get(key) if isinstance(message, Mapping) else None for key in ("from", "value"))
        if not isinstance(role, str) or not isinstance(text, str):
            raise RowError("a message without 'from' and 'value'")
        if role not in _QUESTION_ROLES + _ANSWER_ROLES:
            raise RowError(f"unknown role {role!r}; known are {', '.join(_QUESTION_ROLES + _ANSWER_ROLES)}")
        if (role in _QUESTION_ROLES) != (question is None):
            raise RowError(f"role {role!r} out of turn: questions and answers alternate")
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
    """Yield ``(origin, JSON object)`` of every row of a ``.json`` list (from row 0) or a ``.jsonl`` file (from line 1).

    Raises:
        RowError: If the file is missing or is not JSON; the message gives the line.
    """
    name = os.fspath(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RowError(f"{name}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RowError(f"{name}: not UTF-8 text (byte {error.start})") from error
    if Path(path).suffix == ".jsonl":
        # Not splitlines(), which parts at characters that JSON holds as they are, such as U+2028.
        numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        places = [f"line {number}" for number, _ in numbered]
        rows = [_parse(line, f"{name} {place}") for place, (_, line) in zip(places, numbered, strict=True)]
    else:
        rows = _parse(text, name)
        if not isinstance(rows, list):
            raise RowError(f"{name}: expected a JSON list of rows; a file with one object per line is named .jsonl")
        places = [f"row {index}" for index in range(len(rows))]
    for place, row in zip(places, rows, strict=True):
        if not isinstance(row, Mapping):
            raise RowError(f"{name} {place}: expected a JSON object")
        yield f"{name} {place}", row


def _parse(text: str, origin: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        hint = "; a file with one object per line is named .jsonl" if "Extra data" in str(error) else ""
        raise RowError(f"{origin}: not valid JSON ({error}){hint}") from error
