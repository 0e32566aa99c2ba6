"""JSON files that are data from elsewhere: an object within limits, whose known fields are checked."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, Final

from yivl.errors import CheckpointError
from yivl.files.schema import check_file

MAX_JSON_BYTES: Final = 2**27
"""Largest JSON file that is read. Source: ours; the index of the released 34B has 68 kB, a ``tokenizer.json`` 4 MB."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; the known fields of the files of a checkpoint are checked.

    Raises:
        CheckpointError: If the file is missing, larger than ``MAX_JSON_BYTES``, holds no JSON object or one with
            repeated keys, or has a known field of a wrong type or value.
    """
    if not is_file(path):
        raise CheckpointError(f"{path}: no such file; a checkpoint has one")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_JSON_BYTES:,} bytes; download it again")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        if not isinstance(fields, dict):
            raise CheckpointError(f"{path}: expected a JSON object")
        check_file(path, fields)
    except CheckpointError:  # also a ValueError
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: nested too deeply; download it again") from error
    return fields


def is_file(path: Path) -> bool:
    """Whether a path is a regular file; a name that no file can have is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r} is given more than once")
    return fields
