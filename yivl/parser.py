"""The argparse parser of all programs: dashes or underscores, and all wrong flags in one error."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from yivl.errors import YiVLError


class Parser(argparse.ArgumentParser):
    """A parser that takes ``-`` and ``_`` alike in every flag, knows no abbreviations, and raises ``YiVLError``."""

    def __init__(self, **options: Any) -> None:
        defaults = {"formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**(defaults | options | {"allow_abbrev": False, "exit_on_error": False}))
        self._wrong: list[str] = []

    def refuse(self, flag: str, reason: str) -> None:
        """Add a flag of LLaVA or the reference implementation that is an error, and the reason."""

        def refuse(_: str) -> None:
            raise argparse.ArgumentTypeError(f"not supported: {reason}")

        self.add_argument(flag, type=refuse, nargs="?", const="", default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        """Raise a ``YiVLError`` about the message and all wrong flags found before it."""
        # What is missing may be what an unknown flag was to be.
        is_missing = message.startswith("the following arguments")
        found = self._wrong if self._wrong and is_missing else [*self._wrong, message]
        raise YiVLError("; ".join([*found, "--help lists the flags"]))

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """Return the parsed flags.

        Raises:
            YiVLError: If flags are unknown or have a wrong value, or a value belongs to no flag.
        """
        parsed, rest = self.parse_known_args(args, namespace)
        if rest and rest[0].startswith("-"):
            self.error(self._describe_unknown(rest[0].partition("=")[0]))
        if rest:
            self.error(f"{rest[0]}: no flag takes this value; quote patterns such as '{{00000..00099}}.tar'")
        return parsed

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Return the parsed flags, and the values that belong to none; argparse calls this for each subcommand.

        Raises:
            YiVLError: If flags are unknown or have a wrong value.
        """
        words = [self.as_declared(word) for word in (sys.argv[1:] if args is None else args)]
        self._wrong, kept = self._without_unknown(words)
        try:
            result = super().parse_known_args(kept, namespace)
        except argparse.ArgumentError as error:
            self.error(str(error).removeprefix("argument "))
        if self._wrong:
            self.error(self._wrong.pop())
        return result

    def as_declared(self, word: str) -> str:
        """Return ``--top-p=1`` as ``--top_p=1`` if that is how the flag was declared."""
        name, equals, value = word.partition("=")
        if not word.startswith("--") or name in self._option_string_actions:
            return word
        declared = {option.replace("_", "-"): option for option in self._option_string_actions}
        return declared.get(name.replace("_", "-"), name) + equals + value

    def _without_unknown(self, words: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return the errors about unknown flags, and the other words."""
        if any(action.nargs == argparse.REMAINDER for action in self._actions):
            return [], list(words)  # the flags of another program
        has_commands = any(action.nargs == argparse.PARSER for action in self._actions)
        wrong: list[str] = []
        kept: list[str] = []
        follows_unknown = False
        for index, word in enumerate(words):
            is_flag = bool(re.match(r"--?[A-Za-z]", word)) and " " not in word
            if word == "--" or (has_commands and not is_flag):  # a command checks its own flags
                return wrong, [*kept, *words[index:]]
            name = word.partition("=")[0]
            if is_flag and name not in self._option_string_actions:
                wrong.append(self._describe_unknown(name))
            elif is_flag or not follows_unknown:
                kept.append(word)
                follows_unknown = False
                continue
            follows_unknown = True
        return wrong, kept

    def _describe_unknown(self, name: str) -> str:
        """Return the error about an unknown flag, with the only flag that it may be a misspelling of."""
        meant = {
            action.option_strings[0]
            for option, action in self._option_string_actions.items()
            if action.help != argparse.SUPPRESS and _misspells(name, option)
        }
        return f"unknown flag {name}" + (f" (did you mean {meant.pop()}?)" if len(meant) == 1 else "")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Convert a value; errors are collected, so that one message names all."""
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            self._collect(action, error)
            return None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            if value is not None:
                super()._check_value(action, value)
        except argparse.ArgumentError as error:
            self._collect(action, error)

    def _collect(self, action: argparse.Action, error: argparse.ArgumentError) -> None:
        if not action.option_strings:
            raise error  # without a subcommand there is nothing more to check
        self._wrong.append(f"{action.option_strings[0]}: {error.message}")


def _misspells(typed: str, flag: str) -> bool:
    """Return whether two names have the same words up to a typo; min and max, or eval and train, are not typos."""
    one, other = (re.split("[-_]", name.strip("-").lower()) for name in (typed, flag))
    if "".join(one) == "".join(other) or sorted(one) == sorted(other):
        return True
    return len(one) == len(other) and all(map(_is_typo, one, other))


def _is_typo(word: str, other: str) -> bool:
    """Return whether two words are equal, or have at least 4 letters and one begins the other or one letter differs."""
    if word == other:
        return True
    shortened = [{text[:index] + text[index + 1 :] for index in range(len(text) + 1)} for text in (word, other)]
    is_close = word.startswith(other) or other.startswith(word) or not shortened[0].isdisjoint(shortened[1])
    same_digits = re.sub(r"\D", "", word) == re.sub(r"\D", "", other)  # 4bit is not a typo of 8bit
    return min(len(word), len(other)) >= 4 and same_digits and is_close
