"""Official annotation files, rows from their records, and the count of bad records."""

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from yivl.constants import DEFAULT_IMAGE_TOKEN, LLAVA_IMAGE_TOKEN
from yivl.errors import YiVLError

SHORT_ANSWER: Final = "\nAnswer the question using a single word or phrase."
OPTION_LETTER: Final = "\nAnswer with the option's letter from the given choices directly."
OPTION_LETTER_ZH: Final = "\n请直接回答选项字母。"
UNANSWERABLE: Final = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
"""Ends of questions. Source: LLaVA-1.5 (arXiv 2310.03744), response format prompts, and OpenGVLab/InternVL,
internvl_chat/eval/mmbench, for the Chinese one; Yi-VL's are not published."""
DESCRIBE: Final = "Describe this image in detail."
DESCRIBE_ZH: Final = "请详细描述这张图片。"
ONE_SENTENCE: Final = "Provide a one-sentence caption for the provided image."
"""Questions for captions in a conversation. Source: ours, and LLaVA-1.5 for ``ONE_SENTENCE``."""

_WRONG_TYPES: Final = (TypeError, AttributeError)


@dataclass(frozen=True)
class OfficialFolder:
    """A folder with the official files of a source."""

    path: Path
    address: str
    """Where the files are published, for messages."""

    def find(self, name: str) -> Path:
        """Return the path of a file.

        Raises:
            YiVLError: If it is missing.
        """
        path = self.path / name
        if not path.is_file():
            raise YiVLError(f"{path}: no such file; download and unpack {name} of {self.address}")
        return path

    def has(self, name: str) -> bool:
        """Return whether a file exists."""
        return (self.path / name).is_file()

    def json(self, name: str) -> Any:
        """Return the content of a JSON file.

        Raises:
            YiVLError: If it is missing or not JSON.
        """
        path = self.find(name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise YiVLError(f"{path}: not valid JSON ({error}); download it again from {self.address}") from error

    def lines(self, name: str) -> list[str]:
        """Return the lines of a text file.

        Raises:
            YiVLError: If it is missing or not UTF-8.
        """
        path = self.find(name)
        try:
            return path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        except UnicodeDecodeError as error:
            raise YiVLError(f"{path}: not UTF-8 text; download it again from {self.address}") from error

    def pickle(self, name: str) -> Any:
        """Return the content of a pickle of plain lists, dicts, text and numbers; nothing in it is executed.

        Arrays of numpy are skipped: a ``SkippedArray`` stands for each.

        Raises:
            YiVLError: If it is missing, damaged, or names a class or function.
        """
        path = self.find(name)
        try:
            with path.open("rb") as file:
                return _PlainUnpickler(file, encoding="utf-8").load()  # of Python 2
        except (pickle.UnpicklingError, EOFError, ValueError, ArithmeticError, LookupError, *_WRONG_TYPES) as error:
            raise YiVLError(f"{path}: not a pickle of plain values ({error}); get it from {self.address}") from error


class SkippedArray:
    """Stands for an array of numpy in a pickle, and for what it is made of; its content is dropped."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _PlainUnpickler(pickle.Unpickler):
    """Refuses classes and functions, or replaces them, so that loading a pickle cannot execute code."""

    def find_class(self, module: str, name: str) -> type[SkippedArray]:
        if module.split(".")[0] == "numpy" or (module, name) == ("_codecs", "encode"):  # the bytes of an array
            return SkippedArray
        raise pickle.UnpicklingError(f"it names {module}.{name}")


@dataclass
class BadRecords:
    """Counts the records that are left out."""

    count: int = 0
    reasons: list[str] = field(default_factory=list)
    """The first five."""

    def add(self, place: str, reason: str) -> None:
        """Count one record."""
        self.count += 1
        if len(self.reasons) < 5:
            self.reasons.append(f"{place}: {reason}")

    @contextmanager
    def skip(self, place: object) -> Iterator[None]:
        """Count a record whose fields are missing or of another type, instead of raising."""
        try:
            yield
        except KeyError as error:
            self.add(str(place), f"no {error}")
        except (ValueError, IndexError, RecursionError, *_WRONG_TYPES) as error:
            self.add(str(place), str(error))


def ask(image: str, question: str, answer: str, *others: tuple[str, str]) -> dict[str, Any]:
    """Return the row of a question about an image, and of other questions with their answers.

    Raises:
        ValueError: If a text is empty.
    """
    messages: list[Mapping[str, Any]] = []
    for asked, answered in ((question, answer), *others):
        messages += [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}]
    return dialogue(image, messages)


def with_options(question: str, options: Sequence[str], correct: int) -> tuple[str, str]:
    """Return a question with its four options on lines of their own, and the letter of the correct one.

    Raises:
        ValueError: If there are not four options, or the correct one is not one of them.
    """
    lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True)]
    if not 0 <= correct < len(lines):
        raise ValueError(f"no option {correct}")
    return "\n".join([question, *lines]), "ABCD"[correct]


def caption(image: str, text: str) -> dict[str, Any]:
    """Return the row of a caption, the answer to an empty question.

    Raises:
        ValueError: If a text is empty.
    """
    return {"image": _text(image, "image"), "text": _text(text, "caption")}


def dialogue(image: str | None, messages: list[Mapping[str, Any]], *, empty_question: str = "") -> dict[str, Any]:
    """Return the row of a conversation, about an image if there is one, from messages as LLaVA writes them.

    ``<image>`` of LLaVA is removed; our placeholder begins the first question. ``empty_question`` replaces questions
    without text.

    Raises:
        ValueError: If a text is empty, or names an image and there is none.
    """
    turns = []
    for index, message in enumerate(messages):
        if image is None and LLAVA_IMAGE_TOKEN in message["value"]:
            raise ValueError(f"{LLAVA_IMAGE_TOKEN} in the text, and no image")
        text = message["value"].replace(LLAVA_IMAGE_TOKEN, "").strip()
        if index % 2 == 0:
            text = text or empty_question
        text = _text(text, "answer" if index % 2 else "question")
        start = f"{DEFAULT_IMAGE_TOKEN}\n" if index == 0 and image is not None else ""
        turns.append({"from": message["from"], "value": start + text})
    return ({} if image is None else {"image": _text(image, "image")}) | {"conversations": turns}


def box_text(box: tuple[float, float, float, float], width: float, height: float) -> str:
    """Return a box ``(x, y, width, height)`` in pixels as ``[x1, y1, x2, y2]``, in fractions of the image size.

    Three decimals, from 0 at the left and the top to 1, of the image before padding. Source: ours, as in Shikra (arXiv
    2306.15195); Yi-VL's convention is not published.

    >>> box_text((10, 20, 30, 40), 100, 200)
    '[0.100, 0.100, 0.400, 0.300]'
    """
    if not (width > 0 and height > 0 and box[2] > 0 and box[3] > 0):
        raise ValueError(f"a box of {box[2]} x {box[3]} in an image of {width} x {height} pixels")
    corners = (box[0] / width, box[1] / height, (box[0] + box[2]) / width, (box[1] + box[3]) / height)
    return f"[{', '.join(f'{min(max(value, 0), 1):.3f}' for value in corners)}]"


def majority(answers: list[str]) -> str:
    """Return the most frequent answer; of equally frequent ones the first.

    >>> majority(["red", "blue", "blue"])
    'blue'
    """
    return max(answers, key=answers.count)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the {what} is empty" if isinstance(value, str) else f"the {what} is not text")
    return value.strip()
