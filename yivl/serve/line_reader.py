"""The source of the lines of a chat: a line editor in a terminal, or a pipe."""

import sys
from collections.abc import Callable, Iterable
from typing import Final

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.shortcuts import CompleteStyle

_COMMANDS_WITH_PATH: Final = ("/image", "/save")


class CommandCompleter(Completer):
    """Completes the path after a command that takes one."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Yield what can follow the cursor; a path may contain spaces and begin with a quote."""
        command, space, path = document.text_before_cursor.partition(" ")
        if space and command in _COMMANDS_WITH_PATH:
            for found in self._paths.get_completions(Document(path.lstrip(" \"'")), complete_event):
                slash = "/" if found.display_text.endswith("/") else ""  # of a folder: the next Tab completes inside it
                yield Completion(f"{found.text}{slash}", found.start_position, display=found.display)


def make_reader() -> Callable[[str], str]:
    """Return a line editor with history and completion in a terminal, or in a pipe a reader that echoes its lines."""
    if all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout)):
        session: PromptSession[str] = PromptSession(
            history=InMemoryHistory(),
            completer=CommandCompleter(),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
        )
        return session.prompt
    return _read_from_pipe


def _read_from_pipe(prompt: str) -> str:
    if sys.stdin is None:
        raise EOFError
    if sys.stdin.isatty():  # only the output is redirected: the user still needs a prompt
        sys.stderr.write(prompt)
        sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    line = line.rstrip("\n")
    print(f"{prompt}{line}", flush=True)  # noqa: T201 (part of the dialogue)
    return line
