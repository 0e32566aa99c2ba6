"""The chat in a terminal or a pipe: it reads lines and prints the dialogue."""

import os
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Final, TextIO

from PIL import Image

from yivl.errors import YiVLError
from yivl.image_processing import load_image
from yivl.inference.chat import Chat
from yivl.inference.sampling import Sampling
from yivl.serve.line_reader import make_reader
from yivl.serve.transcript import as_json

HELP = """\
/image PATH   add an image to the next question
/clear        start a new conversation without images
/retry        answer the last question again
/save FILE    write the conversation as JSON
/system TEXT  start a new conversation with this system message; without TEXT, print it
/params       print the sampling parameters; /params temperature=0.7 seed=1 sets some, seed=none unsets the seed
/help         print this text
/exit         exit (as Ctrl-D does)
A line that ends with \\ continues in the next one. Lines between \""" and \""" are one question, as they are.
Tab completes the path of /image and /save. Ctrl-C stops an answer, not the program."""
_QUOTES: Final = '"""'
_CONTINUED: Final = "... "


class Terminal:
    """A chat that reads lines and prints the dialogue.

    ``sampling`` are the initial fields of ``Sampling``, ``image`` is that of the first question. ``read_line`` returns
    the next line for a prompt and raises ``EOFError`` at the end.
    """

    def __init__(
        self,
        chat: Chat,
        sampling: Mapping[str, Any],
        *,
        image: Image.Image | None = None,
        read_line: Callable[[str], str] | None = None,
        output: TextIO | None = None,
    ) -> None:
        self.chat = chat
        self._template = chat.loaded.model.config.prompt_template
        self.sampling = dict(sampling)
        self.pending_images = [] if image is None else [image]
        self.read_line = read_line or make_reader()
        self.output = output or sys.stdout

    def run(self) -> None:
        """Answer questions until ``/exit`` or the end of the input."""
        while True:
            try:
                line = self._read()
                if line.startswith(_QUOTES):
                    self._ask(self._read_block(line))
                elif line.split(maxsplit=1)[:1] == ["/exit"]:
                    break
                elif line.startswith("/"):
                    self._command(*line.split(maxsplit=1))
                else:
                    self._ask(line)
            except KeyboardInterrupt:  # at the prompt, or while an image is encoded
                self._print()
            except EOFError:
                break
            except YiVLError as error:
                self._print(f"error: {error}")
        self._print("exit...")

    def _read(self) -> str:
        """Return one line; lines that end with a backslash are joined, except those of a block."""
        lines = [self.read_line(f"{self._template.user}: ")]
        while lines[-1].endswith("\\") and not lines[0].lstrip().startswith(_QUOTES):
            lines[-1] = lines[-1][:-1]
            lines.append(self.read_line(_CONTINUED))
        return "\n".join(lines).strip()

    def _read_block(self, first: str) -> str:
        """Return the text between quotes; ``first`` is its first line, or the whole block if it was pasted."""
        text = first.removeprefix(_QUOTES)
        while not text.rstrip().endswith(_QUOTES):
            try:
                text += f"\n{self.read_line(_CONTINUED)}"
            except EOFError as error:
                raise YiVLError(f"the question has no closing {_QUOTES}") from error
        return text.rstrip().removesuffix(_QUOTES).strip()

    def _ask(self, question: str) -> None:
        if not question:
            return
        pieces = self.chat.stream(question, self.pending_images, **self.sampling)
        self.pending_images = []  # not before: a question that fails keeps its images
        self._show(pieces)

    def _show(self, pieces: Generator[str, None, None]) -> None:
        self._print(f"{self._template.assistant}: ", end="")
        try:
            with closing(pieces):
                for piece in pieces:
                    self._print(piece, end="")
        except KeyboardInterrupt:
            self._print(" [stopped]", end="")
        finally:
            self._print()

    def _command(self, name: str, argument: str = "") -> None:
        actions: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/clear": self._clear,
            "/retry": lambda _: self._show(self.chat.retry(**self.sampling)),
            "/save": self._save,
            "/system": self._system,
            "/params": self._params,
            "/help": lambda _: self._print(HELP),
        }
        if name not in actions:
            raise YiVLError(f"unknown command {name}; /help lists them")
        actions[name](argument.strip())

    def _image(self, path: str) -> None:
        if not path:
            raise YiVLError("/image needs a path")
        path = path.strip("\"'")  # terminals quote what is dragged into them
        image = load_image(os.path.expanduser(path), allow_remote=self.chat.allow_remote)
        self.pending_images.append(image)
        self._print(f"{path} ({image.width}x{image.height} pixels) goes with the next question")

    def _clear(self, _: str) -> None:
        self.chat.reset()
        self.pending_images = []
        self._print("a new conversation, without images")

    def _save(self, path: str) -> None:
        if not path:
            raise YiVLError("/save needs a file name")
        try:
            text = as_json(self.chat, self.sampling)
            Path(os.path.expanduser(path)).write_text(text, encoding="utf-8", errors="replace")
        except (OSError, ValueError) as error:  # ValueError: no name of a file
            reason = getattr(error, "strerror", None) or error
            raise YiVLError(f"{path}: cannot be written ({reason})") from error
        self._print(f"saved {len(self.chat.turns)} turns to {path}")

    def _system(self, text: str) -> None:
        if text:
            self._clear("")
            self.chat.system = text
        else:
            self._print(self.chat.system)

    def _params(self, assignments: str) -> None:
        changed = dict(self.sampling)
        for assignment in assignments.split():
            name, _, value = assignment.partition("=")
            kind = {"temperature": float, "top_p": float, "repetition_penalty": float}.get(name, int)
            if name not in changed:
                raise YiVLError(f"unknown parameter {name}; known are {', '.join(changed)}")
            try:
                changed[name] = None if (name, value) == ("seed", "none") else kind(value)
            except ValueError as error:
                raise YiVLError(f"{name}={value}: expected a number") from error
        Sampling(**changed)
        self.sampling = changed
        self._print(" ".join(f"{name}={value}" for name, value in changed.items()))

    def _print(self, text: str = "", end: str = "\n") -> None:
        print(text, end=end, file=self.output, flush=True)
