"""The JSON texts of rows: ``.json`` lists and ``.jsonl`` files, read in parts, not parsed into rows."""

import codecs
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final

from yivl.errors import RowError

# A string, which is kept, or a comma before a closing bracket or the end, with the "..." of a printed example.
_TRAILING: Final = re.compile(r'("(?:[^"\\]|\\.)*")|,(?:\s*\.\.\.)?(?=\s*(?:[\]}]|\Z))', re.DOTALL)
# A string, which may be cut off at the end, or a bracket.
_BRACKET: Final = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
_SPACE: Final = re.compile(r"[ \t\n\r]*")
_DECODER: Final = json.JSONDecoder()

_PART: Final = 2**20
"""Characters that are read at once; a longer row is read in doubled parts. Source: ours."""

_DECLARATIONS: Final = {"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name"}
"""Keys of a dataset in ``dataset_info.json``. Source: hiyouga/LLaMA-Factory, data/README.md."""


def row_unit(path: str | os.PathLike[str]) -> str:
    """Return what the rows of a file are called in messages: lines count from 1, rows from 0."""
    return "line" if Path(path).suffix == ".jsonl" else "row"


def check_regular(path: str | os.PathLike[str]) -> None:
    """Check that a path is a file on a disk: reading a device or a pipe may never end.

    Raises:
        RowError: If it is a device, a pipe or a socket.
        OSError: If there is no such path.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise RowError(f"{os.fspath(path)}: not a regular file; copy the data into one")


def read_texts(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """Yield number and JSON text of every row of a ``.json`` list (from row 0) or ``.jsonl`` file (from line 1).

    Raises:
        RowError: If the file is missing or empty, is not UTF-8 text, or a ``.json`` file is not a list in JSON. Rows
            before the error may have been yielded.
    """
    name, number = os.fspath(path), None
    texts: Iterator[tuple[int, str]]
    try:
        check_regular(path)
        with open(path, encoding="utf-8-sig") as file:
            if row_unit(path) == "line":
                # The file splits only at line breaks, not at characters that JSON strings may contain, such as U+2028.
                texts = ((line, text.removesuffix("\n")) for line, text in enumerate(file, 1) if text.strip())
            else:
                texts = _read_list(file, name)
            for number, text in texts:
                yield number, text
    except OSError as error:
        raise RowError(f"{name}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RowError(f"{name}: not UTF-8 text (byte {_first_invalid_byte(path)})") from error
    if number is None:
        raise RowError(f"{name}: no rows")


def parse_text(text: str) -> Any:
    """Return the value of the JSON text of a row, if need be without its trailing commas; for other text the error."""
    try:
        return _parse(text)
    except json.JSONDecodeError as error:
        hint = "; a JSON list is named .json" if text.strip() in ("[", "{") else ""
        return RowError(f"not valid JSON ({error.msg} at character {error.pos}){hint}")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of nested lists
        return RowError(f"JSON that cannot be read ({error}); remove the row")


class _Parts:
    """A text file that is read in parts: what is left of them, and the place of the next character."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._text, self.place = file, "", 0

    def next_character(self) -> str:
        """Return the next character that is not whitespace; an empty string at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self.place)
            assert match is not None
            self.place = match.end()
            if self.place < len(self._text) or not self._read():
                return self._text[self.place : self.place + 1]

    def next_value(self) -> str | None:
        """Return the text of the JSON value that begins here, or ``None`` if there is none."""
        while True:
            start, is_valid = self.place, True
            try:
                _, end = _DECODER.raw_decode(self._text, start)
            except (ValueError, RecursionError):  # cut off, with trailing commas, nested too deeply, or not JSON
                end, is_valid = _closing_bracket(self._text, start), False
            if end < len(self._text):  # at the end of a part, a number may continue
                text = self._text[start:end]
                if not is_valid and not _is_row(text):
                    return None
                self.place = end
                return text
            if not self._read():
                return None

    def _read(self) -> bool:
        kept = self._text[self.place :]
        part = self._file.read(max(_PART, len(kept)))
        self._text, self.place = kept + part, 0
        return bool(part)


def _closing_bracket(text: str, start: int) -> int:
    """Return the place after the bracket that closes the first one, or the length of the text."""
    depth = 0
    for match in _BRACKET.finditer(text, start):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth <= 0:
            return match.end()
    return len(text)


def _is_row(text: str) -> bool:
    """Return whether a text in brackets is a row, valid or not, as opposed to the reason why a file is not JSON."""
    try:
        _parse(text)
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):
        pass
    return True


def _read_list(file: IO[str], name: str) -> Iterator[tuple[int, str]]:
    """Yield index and text of every element of a JSON list.

    Raises:
        RowError: If the file holds another value, or is not JSON.
    """
    parts, index = _Parts(file), 0
    character = parts.next_character()
    is_list = character == "["
    while character == ("," if index else "["):
        parts.place += 1
        if parts.next_character() == "]":
            break
        text = parts.next_value()
        if text is None:
            break
        yield index, text
        index += 1
        character = parts.next_character()
    if is_list and parts.next_character() == "]":
        parts.place += 1
        if not parts.next_character():
            return
    # Not a list, or not as expected: the error of the whole file says why. A printed example may still be a list.
    for number, value in enumerate(_parse_list(Path(name).read_text(encoding="utf-8-sig"), name)):
        if number >= index:
            yield number, json.dumps(value)


def _parse_list(text: str, name: str) -> list[Any]:
    if not text.strip():
        return []
    try:
        listed = _parse(text)
    except json.JSONDecodeError as error:
        hint = "; a file with one object per line is named .jsonl" if "Extra data" in str(error) else ""
        raise RowError(f"{name}: not valid JSON ({error}){hint}") from error
    except (ValueError, RecursionError) as error:
        raise RowError(f"{name}: JSON that cannot be read ({error}); expected a list of rows") from error
    if isinstance(listed, list):
        return listed
    declared = listed.values() if isinstance(listed, dict) else []
    if any(isinstance(entry, dict) and entry.keys() & _DECLARATIONS for entry in declared):
        raise RowError(
            f"{name}: declares datasets of LLaMA-Factory and has no rows; give the file of rows that it names, or "
            "see scripts/convert.py from-llamafactory"
        )
    raise RowError(f"{name}: expected a JSON list of rows; a file with one object per line is named .jsonl")


def _parse(text: str) -> Any:
    """Return the value of JSON text, if need be without its trailing commas."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        lenient = _TRAILING.sub(lambda match: match[1] or "", text)
        if lenient == text:
            raise
        try:
            return json.loads(lenient)
        except json.JSONDecodeError:
            pass
        raise  # about the text as it is


def _first_invalid_byte(path: str | os.PathLike[str]) -> int:
    """Return the place of the first byte that is not UTF-8, after the byte order mark."""
    place = 0
    with open(path, "rb") as file:
        for line in file:  # no character contains the byte of a line break
            content = line.removeprefix(codecs.BOM_UTF8) if not place else line
            try:
                content.decode("utf-8")
            except UnicodeDecodeError as error:
                return place + error.start
            place += len(content)
    return place
