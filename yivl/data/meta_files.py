"""Lists of training data in the format of InternVL: name to ``root``, ``annotation``, ``repeat_time``, ``length``."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from yivl.data.json_texts import check_regular, parse_text
from yivl.data.patterns import expand_braces, matching_paths
from yivl.data.shard_file import is_remote
from yivl.errors import RowError

_KEYS: Final = ("root", "annotation", "data_augment", "repeat_time", "length")
"""Source: OpenGVLab/InternVL, internvl_chat/internvl/train/internvl_chat_finetune.py, build_datasets."""
_MAX_BYTES: Final = 2**24
"""Larger files are rows, not lists of data. Source: ours."""


def read_meta(path: str) -> list[dict[str, Any]] | None:
    """Return the fields of the ``DataSource`` of every set of a meta file, or ``None`` if the file is something else.

    Relative paths of a set start at the working directory, as in the original, or at the folder of the meta file if
    only there its annotation exists.

    Raises:
        RowError: If a set is invalid, or asks for something that is not supported.
    """
    sets = _read_object(path)
    if sets is None or not any(isinstance(fields, Mapping) and "annotation" in fields for fields in sets.values()):
        return None
    sources = []
    for name, fields in sets.items():
        try:
            sources.append(_source_fields(name, fields, os.path.dirname(path)))
        except RowError as error:
            raise RowError(f"{path} set {name!r}: {error}") from error
    return sources


def _read_object(path: str) -> dict[str, Any] | None:
    if not path.endswith(".json") or is_remote(path):
        return None
    try:
        check_regular(path)
        if os.path.getsize(path) > _MAX_BYTES:
            return None
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):  # reported where rows are read
        return None
    value = parse_text(text) if text.lstrip().startswith("{") else None
    return value if isinstance(value, dict) else None


def _source_fields(name: str, fields: Any, folder: str) -> dict[str, Any]:
    if not isinstance(fields, Mapping):
        raise RowError(f"expected an object with the keys {', '.join(_KEYS)}")
    if unknown := sorted(fields.keys() - set(_KEYS)):
        raise RowError(f"unknown key {unknown[0]!r}; expected one of {', '.join(_KEYS)}")
    for key in ("root", "annotation"):
        # The root is empty where images have absolute paths or there are none.
        if not isinstance(fields.get(key), str) or not (fields[key] or key == "root"):
            raise RowError(f"{key!r} is not a path")
        if is_remote(fields[key]):
            raise RowError(f"{key!r} {fields[key]} is a URL; download it and give the local path")
    if fields["annotation"].endswith(".tar"):
        raise RowError("'annotation' is a tar shard; list tar shards in a .yaml mixture")
    if fields.get("data_augment") not in (None, False):
        raise RowError("'data_augment' (random JPEG compression) is not supported; set it to false")
    repeat_time, length = fields.get("repeat_time", 1), fields.get("length")
    if type(repeat_time) not in (int, float) or not 0 < repeat_time < math.inf:
        raise RowError(f"'repeat_time' {repeat_time!r} is not a positive number; to leave the set out, remove it")
    if repeat_time > 1 and repeat_time != int(repeat_time):
        raise RowError(f"'repeat_time' {repeat_time} is not an integer; above 1 it repeats the whole set")
    if length is not None and type(length) is not int:
        raise RowError(f"'length' {length!r} is not an integer")
    annotation, root = (os.path.expanduser(fields[key]) for key in ("annotation", "root"))
    if not _names_files(annotation) and _names_files(os.path.join(folder, annotation)):
        annotation, root = os.path.join(folder, annotation), os.path.join(folder, root)
    return {
        "name": name,
        "data_path": annotation,
        "image_folder": root,
        "weight": max(repeat_time, 1),
        "first_part": min(repeat_time, 1),
        "stated_length": length,
    }


def _names_files(pattern: str) -> bool:
    return any(matching_paths(path) for path in expand_braces(pattern))
