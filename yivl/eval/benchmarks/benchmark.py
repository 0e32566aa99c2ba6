"""What a benchmark is: a module with these functions, which asks questions and reports on the responses."""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from yivl.eval.report import Report

if TYPE_CHECKING:
    from yivl.inference.chat import ImageInput


@dataclass(frozen=True)
class Question:
    """One question, asked in a conversation of its own."""

    id: str
    prompt: str
    image: "Callable[[], ImageInput | None]"
    """Reads the image."""
    fields: Mapping[str, Any]
    """What the response is scored with."""
    image_key: str = ""
    """Identifies the image when a run is resumed."""
    is_blank: bool = False
    """Whether the image is replaced by pixel values of zero, the mean color."""
    system: str | None = None
    """The system message; ``None`` is that of the model."""


class Benchmark(Protocol):
    """A module of this package; ``arguments`` are the parsed flags of its command."""

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        """Add the flags of the model, ``--data``, and those of this benchmark."""

    def max_new_tokens(self, arguments: argparse.Namespace) -> int:
        """Return the maximum length of a response in tokens."""

    def read_questions(self, arguments: argparse.Namespace) -> list[Question]:
        """Return the questions; raise ``YiVLError`` if the data cannot be read."""

    def report(
        self, arguments: argparse.Namespace, questions: Sequence[Question], responses: Mapping[str, str]
    ) -> Report:
        """Return the report on the responses, which are given by the ids of the questions."""


def file_key(path: Path) -> str:
    """Return path, size and modification time, which tell a file from another version of it."""
    if not path.is_file():
        return os.fspath(path)
    about = path.stat()
    return f"{path.resolve()} {about.st_size} {about.st_mtime_ns}"
