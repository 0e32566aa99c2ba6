"""Conversion of training data to and from LLaMA-Factory, which declares its datasets in ``dataset_info.json``.

Image paths are not changed: relative ones start at ``--image_folder`` here and at ``media_dir`` there, by default the
folder of ``dataset_info.json``.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from yivl.checkpoint.atomic import write_json, write_text
from yivl.constants import DEFAULT_IMAGE_TOKEN, LLAVA_IMAGE_TOKEN, SYSTEM_PROMPT
from yivl.conversation import Turn
from yivl.data.dialects import read_dialogue
from yivl.data.json_texts import check_regular
from yivl.data.rows import Row, RowError, log_notices, parse_row, read_rows
from yivl.files.json_files import MAX_JSON_BYTES

_MEDIA: Final = (LLAVA_IMAGE_TOKEN, "<video>", "<audio>", "{{image}}")
"""Placeholders of media anywhere in a text. Source: hiyouga/LLaMA-Factory, src/llamafactory/data/mm_plugin.py."""

_DEFAULT_COLUMNS: Final = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
}
"""Columns of a dataset that declares none.
Source: hiyouga/LLaMA-Factory, src/llamafactory/data/parser.py."""

_DEFAULT_TAGS: Final = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
}
"""Source: hiyouga/LLaMA-Factory, data/README.md."""

_OPENAI_TAGS: Final = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
"""Of its image datasets. Source: hiyouga/LLaMA-Factory, data/dataset_info.json, ``mllm_demo``."""

_OWN_KEYS: Final = ("conversations", "messages", "image", "images", "system")
"""Keys that training reads."""

_REMOTE: Final = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_PREFERENCES: Final = ("chosen", "rejected", "kto_tag")
_UNSUPPORTED: Final = ("tools", "videos", "audios")


def to_llamafactory(source: Path, folder: Path, *, name: str) -> int:
    """Write training data as the dataset ``<name>.json`` and declare it in ``dataset_info.json``.

    Other datasets in that file are kept, and so are keys of a row that neither program reads.

    Args:
        source: ``.json`` or ``.jsonl`` rows.
        folder: The ``dataset_dir`` of LLaMA-Factory.
        name: Of the dataset; replaced if this function wrote it.

    Returns:
        Number of rows.

    Raises:
        RowError: If a row is invalid or cannot be expressed there, or another dataset has that name.
    """
    if not re.fullmatch(r"[\w.-]+", name) or name == "dataset_info":
        raise RowError(f"{name!r}: not a name for a dataset; use letters, digits, '.', '-' and '_'")
    parsed = [(parse_row(fields, origin), fields) for origin, fields in read_rows(source)]
    log_notices(row for row, _ in parsed)
    rows = [_to_row(row, fields) for row, fields in parsed]
    info_path, data_path = folder / "dataset_info.json", folder / f"{name}.json"
    if source.resolve() == data_path.resolve():
        raise RowError(f"{source}: would be overwritten; give another name")
    info = _read_info(info_path) if info_path.exists() else {}
    declared = {
        "file_name": data_path.name,
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "images": "images"},
        "tags": _OPENAI_TAGS,
    }
    if info.get(name, declared) != declared or (name not in info and data_path.exists()):
        raise RowError(f"{folder}: holds another dataset {name!r}; give another name")
    folder.mkdir(parents=True, exist_ok=True)
    # The rows first: a declared dataset must exist.
    write_text(data_path, _json_list(rows))
    write_json(info_path, info | {name: declared}, sort_keys=False)
    return len(rows)


def _to_row(row: Row, fields: Mapping[str, Any]) -> dict[str, Any]:
    dialogue = read_dialogue(fields)
    if any(isinstance(image, bytes) for image in dialogue.images):
        raise RowError(f"{row.origin}: a data: URL; save the image as a file and give its path")
    # The line breaks belong to the system message there. Source: as above, src/llamafactory/data/template.py, yi_vl.
    messages = [] if row.system is None else [{"role": "system", "content": f"{row.system}\n\n"}]
    for turn, question in zip(row.turns, dialogue.messages[::2], strict=True):
        texts = (*question.pieces, turn.answer or "", row.system or "")
        if found := next((token for token in _MEDIA for text in texts if token in text), None):
            raise RowError(f"{row.origin}: LLaMA-Factory would read the text {found!r} as a placeholder; reword it")
        messages.append({"role": "user", "content": _to_question(turn, question.pieces)})
        messages.append({"role": "assistant", "content": turn.answer or ""})
    is_caption = not fields.keys() & {"conversations", "messages"}
    others = _other_keys(fields, (*_OWN_KEYS, *["text"] * is_caption), (), row.origin)
    return others | {"messages": messages, "images": list(dialogue.images)}


def _to_question(turn: Turn, pieces: Sequence[str]) -> str:
    """Return a question with its placeholders in place; those before the text as in the prompt."""
    if any(piece.strip() for piece in pieces[:-1]):
        return LLAVA_IMAGE_TOKEN.join(pieces).strip()
    return f"{LLAVA_IMAGE_TOKEN * turn.num_images}\n{turn.question}" if turn.num_images else turn.question


def from_llamafactory(dataset_info: Path, name: str, target: Path) -> int:
    """Write a dataset of LLaMA-Factory, ``alpaca`` or ``sharegpt``, as training data of this package.

    Keys of a row that neither program reads are kept.

    Args:
        dataset_info: The ``dataset_info.json`` that declares it, in the folder of its rows.
        name: Of the dataset.
        target: ``.json`` file, replaced if it exists.

    Returns:
        Number of rows.

    Raises:
        RowError: If the dataset is not declared, not in a ``.json`` or ``.jsonl`` file, or not supervised; if a row
            is invalid, or has what is not supported here (tools, video, audio).
    """
    source, columns, tags = _read_declaration(dataset_info, name)
    if target.suffix != ".json":
        raise RowError(f"{target}: the rows are a JSON list; give a name that ends in .json")
    if target.resolve() in (source.resolve(), dataset_info.resolve()):
        raise RowError(f"{target}: would overwrite its source; give another file")
    rows = [_from_row(fields, columns, tags, origin) for origin, fields in read_rows(source)]
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, _json_list(rows))
    return len(rows)


def _read_declaration(dataset_info: Path, name: str) -> tuple[Path, Mapping[str, str], Mapping[str, str] | None]:
    """Return the file of a dataset, the columns by their role, and the tags of ``sharegpt`` messages."""
    declared = _read_info(dataset_info).get(name)
    origin = f"{dataset_info} {name!r}"
    if not isinstance(declared, dict):
        raise RowError(f"{origin}: no such dataset")
    remote = next((key for key in _REMOTE if key in declared), None)
    file = declared.get("file_name")
    if remote is not None or not isinstance(file, str):
        raise RowError(f"{origin}: no local file ({remote or 'no file_name'}); download it and declare a file_name")
    if not file.endswith((".json", ".jsonl")):
        raise RowError(f"{origin}: {file} is not a .json or .jsonl file")
    formatting = declared.get("formatting", "alpaca")
    if not isinstance(formatting, str) or formatting not in _DEFAULT_COLUMNS:
        raise RowError(f"{origin}: formatting {formatting!r}; expected alpaca or sharegpt")
    columns, tags = declared.get("columns", _DEFAULT_COLUMNS[formatting]), declared.get("tags", {})
    for names in (columns, tags):
        if not isinstance(names, dict) or not all(isinstance(value, str | None) for value in names.values()):
            raise RowError(f"{origin}: 'columns' and 'tags' must map strings to strings")
    columns = {key: column for key, column in columns.items() if column}
    preferences = [key for key in _PREFERENCES if key in columns] + ["ranking"] * bool(declared.get("ranking"))
    if preferences:
        raise RowError(f"{origin}: preference data ({preferences[0]}); only supervised data is supported")
    needed = "messages" if formatting == "sharegpt" else "response"
    if needed not in columns:
        raise RowError(f"{origin}: the columns do not name {needed!r}")
    return dataset_info.parent / file, columns, _DEFAULT_TAGS | tags if formatting == "sharegpt" else None


def _from_row(fields: Any, columns: Mapping[str, str], tags: Mapping[str, str] | None, origin: str) -> dict[str, Any]:
    if not isinstance(fields, Mapping):
        raise RowError(f"{origin}: {fields if isinstance(fields, RowError) else 'expected a JSON object'}")
    values = {key: fields.get(column) for key, column in columns.items()}
    try:
        messages = list(_alpaca(values) if tags is None else _sharegpt(values["messages"], tags))
        system = messages.pop(0)[1] if messages and messages[0][0] == "system" else values.get("system")
        if found := next((key for key in _UNSUPPORTED if values.get(key) not in (None, "", "[]", [])), None):
            raise RowError(f"{found} are not supported; remove them")
        conversations = []
        if system and str(system).strip() != SYSTEM_PROMPT:
            conversations.append({"from": "system", "value": str(system).strip()})
        for role, text in messages:
            if DEFAULT_IMAGE_TOKEN in text:
                raise RowError(f"the text {DEFAULT_IMAGE_TOKEN!r} would be read as an image; reword it")
            conversations.append({"from": role, "value": text.replace(LLAVA_IMAGE_TOKEN, DEFAULT_IMAGE_TOKEN)})
        images = values.get("images") or []
        images = images if isinstance(images, list) else [images]
    except RowError as error:
        raise RowError(f"{origin}: {error}") from error
    row = _other_keys(fields, columns.values(), _OWN_KEYS, origin)
    if images:
        row["image"] = images[0] if len(images) == 1 else images
    row["conversations"] = conversations
    parse_row(row, origin)
    # LLaMA-Factory keeps blanks around a question whose images all precede it. parse_row strips them if there is a
    # placeholder; without one it puts the images in the same place.
    first = conversations[int(conversations[0]["from"] == "system")]
    question = first["value"].removeprefix(f"{DEFAULT_IMAGE_TOKEN * len(images)}\n")
    if images and question != question.strip():
        first["value"] = question
    return row


def _sharegpt(messages: Any, tags: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield role and text of every message."""
    if not isinstance(messages, list):
        raise RowError("the messages are not a list")
    roles = {tags["user_tag"]: "human", tags["assistant_tag"]: "assistant"}
    for index, message in enumerate(messages):
        role, text = (
            message.get(tags[key]) if isinstance(message, dict) else None for key in ("role_tag", "content_tag")
        )
        if not isinstance(role, str) or not isinstance(text, str):
            raise RowError(f"message {index} without a text in {tags['role_tag']!r} and {tags['content_tag']!r}")
        if index == 0 and role == tags["system_tag"]:
            yield "system", text
        elif role in roles:
            yield roles[role], text
        else:
            raise RowError(f"role {role!r} is not supported; expected {' or '.join(roles)}")


def _alpaca(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield role and text of every message of an instruction and its history."""
    asked = [text for key in ("prompt", "query") if (text := values.get(key))]
    question = "\n".join(asked) if all(isinstance(text, str) for text in asked) else None
    history = values.get("history")
    for pair in [*(history if isinstance(history, list) else []), [question, values["response"]]]:
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise RowError("a turn that is not a question and an answer, both text")
        yield "human", pair[0]
        yield "assistant", pair[1]


def _other_keys(fields: Mapping[str, Any], read: Iterable[str], written: Sequence[str], origin: str) -> dict[str, Any]:
    """Return the keys of a row that were not read; none may be a key that is written."""
    read = set(read)
    others = {key: value for key, value in fields.items() if key not in read}
    if clash := next((key for key in written if key in others), None):
        raise RowError(f"{origin}: the key {clash!r} has another meaning in the target format; rename or remove it")
    return others


def _read_info(path: Path) -> dict[str, Any]:
    try:
        check_regular(path)
        if path.stat().st_size > MAX_JSON_BYTES:
            raise RowError(f"{path}: larger than {MAX_JSON_BYTES:,} bytes; give the file that declares the datasets")
        info = json.loads(path.read_text(encoding="utf-8"))
    except RowError:
        raise
    except OSError as error:
        raise RowError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise RowError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(info, dict):
        raise RowError(f"{path}: expected a JSON object of datasets")
    return info


def _json_list(rows: Sequence[Mapping[str, Any]]) -> str:
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"
