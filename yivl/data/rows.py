"""Rows: conversations, captions or text in JSON or JSONL, validated one by one."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from yivl.conversation import Turn
from yivl.data.dialects import Dialogue, Message, images_first, read_dialogue
from yivl.data.json_texts import parse_text, read_texts, row_unit
from yivl.errors import RowError as RowError
from yivl.errors import YiVLError

logger = logging.getLogger(__name__)

# Notices, as predicates of a sentence about rows.
OPENING_ANSWER: Final = "start with an answer, which is dropped"
EMPTY_ANSWER: Final = "have an empty answer"
OUTSIDE_IMAGE: Final = "have an image outside the image folder"


@dataclass(frozen=True)
class Row:
    """One conversation with its images, in the order of their placeholders."""

    turns: tuple[Turn, ...]
    images: tuple[Path | bytes, ...]
    """Paths, or the contents of image files."""
    origin: str
    """File and row, for error messages."""
    notices: tuple[str, ...] = ()
    """What is unusual about the row, as the predicate of a sentence about rows."""
    system: str | None = None
    """System message; ``None`` is that of the model."""
    questions: tuple[tuple[str, ...], ...] = ()
    """The question of every turn as it is written, with an image slot between neighbors."""


def parse_row(
    fields: Any,
    origin: str,
    image_folder: str | os.PathLike[str] = ".",
    images: Sequence[bytes] | None = None,
) -> Row:
    """Return the row of a JSON object.

    A conversation is ``conversations`` or ``messages``, a list of ``{"from": ..., "value": ...}`` or ``{"role": ...,
    "content": ...}``, with optional ``image`` or ``images`` (paths relative to ``image_folder``); a caption is
    ``image`` and ``text``. ``<image_placeholder>``, ``<image>`` or a part of ``content`` marks the place of an image.
    Images without any placeholder come first in the first turn. ``images``, the contents of image files, replaces the
    images of the row. docs/data.md lists the dialects.

    Raises:
        RowError: If a role is unknown or out of order, a field is missing, or the numbers of placeholders and images
            differ.
    """
    try:
        if not isinstance(fields, Mapping):
            raise fields if isinstance(fields, RowError) else RowError("expected a JSON object")
        dialogue = read_dialogue(fields, images)
        turns = _turns(dialogue.messages)
        questions = [message.pieces for message in dialogue.messages if message.role == "user"]
        if dialogue.images and not any(turn.num_images for turn in turns):
            turns[0] = replace(turns[0], num_images=len(dialogue.images))
            questions[0] = images_first(len(dialogue.images), questions[0])
        placeholders = sum(turn.num_images for turn in turns)
        if placeholders != len(dialogue.images):
            fix = "name each image in 'image', or spell '<image>' otherwise if it is text"
            if placeholders < len(dialogue.images):
                fix = "place each image, or none to show all in the first turn"
            raise RowError(f"{placeholders} image placeholders but {len(dialogue.images)} images; {fix}")
    except YiVLError as error:
        raise RowError(f"{origin}: {error}") from error
    except RecursionError as error:
        raise RowError(f"{origin}: nested too deeply; remove the row") from error
    folder = Path(image_folder)
    paths = [image if isinstance(image, bytes) else folder / image for image in dialogue.images]
    notices = tuple(_notices(dialogue, turns, folder))
    return Row(tuple(turns), tuple(paths), origin, notices, dialogue.system, tuple(questions))


def _turns(messages: Sequence[Message]) -> list[Turn]:
    """Return the turns of messages, in which questions and answers alternate."""
    turns: list[Turn] = []
    question: Turn | None = None
    for message in messages:
        if (message.role == "user") != (question is None):
            raise RowError(f"role {message.role!r} out of order: questions and answers alternate")
        text, num_images = "".join(message.pieces), len(message.pieces) - 1
        if question is None:
            question = Turn(text.strip() if num_images else text, None, num_images)
        elif num_images:
            raise RowError("an image placeholder in an answer; if '<image>' is text, spell it otherwise")
        else:
            turns.append(replace(question, answer=text))
            question = None
    if question is not None:
        raise RowError("the last question has no answer")
    if not turns:
        raise RowError("no question")
    return turns


def _notices(dialogue: Dialogue, turns: Sequence[Turn], folder: Path) -> Iterator[str]:
    if dialogue.drops_answer:
        yield OPENING_ANSWER
    if not all((turn.answer or "").strip() for turn in turns):
        yield EMPTY_ANSWER
    if any(isinstance(image, str) and _is_outside(image, folder) for image in dialogue.images):
        yield OUTSIDE_IMAGE


def _is_outside(image: str, folder: Path) -> bool:
    if not os.path.isabs(image) and ".." not in image:
        return False
    return not Path(os.path.abspath(folder / image)).is_relative_to(os.path.abspath(folder))


def count_notices(notices: Iterable[tuple[str, str]]) -> list[str]:
    """Return one line for each kind of notice, with the number of rows and the first of them.

    Args:
        notices: Of rows, each with the origin of its row.
    """
    origins: dict[str, list[str]] = {}
    for notice, origin in notices:
        origins.setdefault(notice, []).append(origin)
    return [summarize_notice(notice, len(found), found[:5]) for notice, found in origins.items()]


def summarize_notice(notice: str, count: int, first: Sequence[str]) -> str:
    """Return one line about the rows that have a notice: their number, and the origins of the first of them."""
    more = f" and {count - len(first):,} more" if count > len(first) else ""
    return f"{count:,} rows {notice}: {', '.join(first)}{more}"


def log_notices(rows: Iterable[Row]) -> None:
    """Log one line for each kind of notice."""
    for line in count_notices((notice, row.origin) for row in rows for notice in row.notices):
        logger.warning("%s", line)


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Yield origin and JSON value of every row of a ``.json`` list (from row 0) or ``.jsonl`` file (from line 1).

    The value is what ``parse_row`` takes; for text that is not JSON it is the error. Commas before a closing bracket
    are ignored, as is the ``...`` of a printed example.

    Raises:
        RowError: If the file is missing or empty, or is not JSON.
    """
    for number, text in read_texts(path):
        yield f"{os.fspath(path)} {row_unit(path)} {number}", parse_text(text)
