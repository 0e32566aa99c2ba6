"""Rows in the dialects of Yi-VL, LLaVA, ShareGPT, OpenAI and LLaMA-Factory, read into one form (docs/data.md)."""

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from yivl.constants import DEFAULT_IMAGE_TOKEN, LLAVA_IMAGE_TOKEN
from yivl.errors import YiVLError

_ROLES: Final = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",  # Source: 01-ai/Yi, VL: the code expects "gpt", the README documents "assistant".
    "assistant": "assistant",
    "system": "system",
}
_IMAGE_SLOT: Final = re.compile("|".join(map(re.escape, (DEFAULT_IMAGE_TOKEN, LLAVA_IMAGE_TOKEN))))
_IMAGE_KEYS: Final = ("image", "images")
_LIKE_IMAGES: Final = re.compile(
    r"(?:.*[ _-])?(?:image|img|pic|picture|photo)s?"
    r"(?:[ _-]?(?:file|path|url|name|file_?name|file_?path|list|data|base64|b64|bytes)s?"
    r"|(?P<another>[ _-]?\d+|[ _-][a-z]))?",
    re.IGNORECASE,
)
_IMAGE_FILE: Final = re.compile(r"[^\n]{1,250}\.(jpe?g|png|webp|gif|bmp|tiff?|heic|avif)", re.IGNORECASE)
_READ: Final = ("conversations", "messages", "system", "text", *_IMAGE_KEYS)
_READ_OF_MESSAGES: Final = ("from", "value", "role", "content")
# Which answers are trained: OpenAI (weight), ms-swift (loss), axolotl (train, training); by LLaMA-Factory, which rows.
_ANSWER_WEIGHTS: Final = ("weight", "loss", "loss_weight", "loss_scale", "train", "training")
_ROW_WEIGHTS: Final = ("label", "kto_tag", "loss", "train")
_UNSUPPORTED: Final = ("tools", "video", "videos", "audio", "audios")
_DATA_URL: Final = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
_SCHEME: Final = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


@dataclass(frozen=True)
class Message:
    """A question or an answer."""

    role: str
    """``user`` or ``assistant``."""
    pieces: tuple[str, ...]
    """Text with one image slot between neighbors."""


@dataclass(frozen=True)
class Dialogue:
    """The content of a row, whatever its dialect."""

    messages: tuple[Message, ...]
    """Without the system message and without an answer at the start."""
    images: tuple[str | bytes, ...]
    """Paths as the row has them, or the contents of image files."""
    system: str | None
    """System message; ``None`` is that of the model."""
    drops_answer: bool = False
    """Whether there was an answer at the start."""


def read_dialogue(fields: Mapping[str, Any], images: Sequence[bytes] | None = None) -> Dialogue:
    """Return the content of a JSON object.

    Args:
        fields: The object.
        images: Replace its images.

    Raises:
        YiVLError: If it is in none of the dialects, or an image could get lost.
    """
    listed = _listed_images(fields) if images is None else list(images)
    key = _only_key(fields, ("conversations", "messages"))
    drops_answer, told = False, None
    if key is not None:
        messages, embedded, told = _read_messages(fields[key], key)
        if listed and embedded:
            raise YiVLError("images both in the messages and beside them; keep one")
        listed = listed or embedded
        if messages and messages[0].role == "assistant":
            if len(messages[0].pieces) > 1:
                raise YiVLError("an image placeholder in an answer")
            drops_answer, messages = True, messages[1:]
    elif isinstance(fields.get("text"), str) and listed:
        messages = [Message("user", ("",)), Message("assistant", (fields["text"].strip(),))]
    else:
        hint = "; for instructions see scripts/convert.py from-llamafactory" if "instruction" in fields else ""
        raise YiVLError(f"neither 'conversations' nor 'messages' nor 'image' with 'text'{hint}")
    if images is None:
        _check_other_keys(fields, num_images=len(listed))
    return Dialogue(tuple(messages), tuple(listed), _system(fields, told), drops_answer)


def _only_key(fields: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """Return which of two keys a row has; null and "" are as good as none, as is an empty list beside the other key."""
    first, second = keys
    present = [key for key in keys if fields.get(key) not in (None, "")]
    if len(present) > 1 and fields[first] != fields[second]:
        present = [key for key in keys if fields[key] != []] or present
        if len(present) > 1:
            raise YiVLError(f"both {first!r} and {second!r}; keep one")
    return present[0] if present else None


def _listed_images(fields: Mapping[str, Any]) -> list[str | bytes]:
    key = _only_key(fields, _IMAGE_KEYS)
    if key is None:
        return []
    value = fields[key]
    return [_image(item, key) for item in (value if isinstance(value, list) else [value])]


def _image(value: Any, key: str) -> str | bytes:
    """Return the path of an image, or its contents: of a ``data:`` URL, or as bytes, which Parquet can hold."""
    if isinstance(value, Mapping):
        content = value.get("bytes")
        value = content if isinstance(content, bytes) and content else value.get("url") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value:
        raise YiVLError(f"{key!r} is not a path or a list of paths")
    if header := _DATA_URL.match(value):
        try:
            return base64.b64decode(value[header.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise YiVLError("an image is not valid base64") from error
    path = str(value).removeprefix("file://")
    if _SCHEME.match(path):
        raise YiVLError(f"the image {path} is a URL; training reads local files, so download it and give its path")
    return path


def _read_messages(listed: Any, key: str) -> tuple[list[Message], list[str | bytes], str | None]:
    """Return the messages, their own images, and the text of a system message at the start."""
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        raise YiVLError(f"{key!r} is not a list of messages")
    messages: list[Message] = []
    images: list[str | bytes] = []
    system = None
    for index, message in enumerate(listed):
        name, content = _name_and_content(message)
        if name not in _ROLES:
            raise YiVLError(f"unknown role {name!r}; expected one of {', '.join(_ROLES)}")
        if _ROLES[name] == "assistant":
            for weight in _ANSWER_WEIGHTS:
                if message.get(weight) not in (None, 1):  # True is 1
                    raise YiVLError(
                        f"an answer with {weight!r} {message[weight]!r}; the loss is computed on every answer with "
                        "weight 1, remove the row"
                    )
        for other, value in message.items():
            if other not in _READ_OF_MESSAGES and _is_like_image(other, value):
                raise YiVLError(f"a message with the key {other!r}; list all images in 'images', beside the messages")
        pieces, own = _read_content(content)
        images += own
        if _ROLES[name] != "system":
            messages.append(Message(_ROLES[name], pieces))
        elif index:
            raise YiVLError(f"role {name!r} out of order: a system message comes first")
        elif len(pieces) > 1:
            raise YiVLError("an image placeholder in a system message")
        else:
            system = pieces[0]
    return messages, images, system


def _name_and_content(message: Any) -> tuple[str, Any]:
    for name_key, content_key in (("from", "value"), ("role", "content")):
        if isinstance(message, Mapping) and name_key in message:
            name, content = message[name_key], message.get(content_key)
            if isinstance(name, str) and isinstance(content, str | list):
                return name, content
    raise YiVLError("a message without 'from' and 'value', or 'role' and 'content'")


def _read_content(content: str | list[Any]) -> tuple[tuple[str, ...], list[str | bytes]]:
    """Return the pieces of a text or of a list of parts, and the images in the parts.

    As in the API, the images of a list come first, and its texts are joined by line breaks.
    """
    if isinstance(content, str):
        return tuple(_IMAGE_SLOT.split(content)), []
    texts: list[str] = []
    images: list[str | bytes] = []
    slots = 0
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            slots += 1
            value = part.get(kind) or part.get("url") or part.get("path")
            images += [] if value is None else [_image(value, kind)]  # without a value it is one of `images`
        else:
            raise YiVLError(f"a part of type {kind!r}; expected text, image or image_url")
    return images_first(slots, tuple(_IMAGE_SLOT.split("\n".join(texts)))), images


def images_first(number: int, pieces: tuple[str, ...]) -> tuple[str, ...]:
    r"""Return the pieces of a text after image slots, each of which is on a line of its own.

    >>> images_first(2, ("Which one?",))
    ('', '\n', '\nWhich one?')
    """
    return ("", *["\n"] * (number - 1), f"\n{pieces[0]}", *pieces[1:]) if number else pieces


def _system(fields: Mapping[str, Any], told: str | None) -> str | None:
    """Return the system message among the messages or beside them, without outer whitespace; none if it is empty."""
    beside = fields.get("system")
    if beside is not None and not isinstance(beside, str):
        raise YiVLError("'system' is not a text")
    # LLaMA-Factory keeps the line breaks that follow a system message in its text.
    told, beside = (told or "").strip(), (beside or "").strip()
    if told and beside and told != beside:
        raise YiVLError("two system messages, in 'system' and in the messages; keep one")
    return told or beside or None


def _check_other_keys(fields: Mapping[str, Any], *, num_images: int) -> None:
    """Raise an error for a key that may hold an image, or what this package does not train on."""
    for key, value in fields.items():
        if key not in _READ and value and _may_be_lost(key, value, num_images):
            raise YiVLError(f"unknown key {key!r}; name the key of images 'image' or 'images', or remove it")
        if key in _UNSUPPORTED and value not in (None, "", "[]", []):
            raise YiVLError(f"{key!r} is not supported; remove it")
        if key in _ROW_WEIGHTS and value is False:
            raise YiVLError(f"{key!r} is false; every row is trained, remove it")


def _may_be_lost(key: str, value: Any, num_images: int) -> bool:
    """Return whether a key may hold an image that the row does not have.

    Beside the images of a row, an address or a file name is where they come from; another number or letter is another
    image, and so are more of them.
    """
    if not num_images:
        return _is_like_image(key, value)
    match = _match_image_key(key, value)
    return match is not None and (match["another"] is not None or (isinstance(value, list) and len(value) > num_images))


def _is_like_image(key: str, value: Any) -> bool:
    """Return whether a key is named like one of images, or its value, or a value in it, is the path of an image."""
    if value and _match_image_key(key, value):
        return True
    if isinstance(value, Mapping):
        return any(_is_like_image(name, item) for name, item in value.items())
    if isinstance(value, list):
        return any(_is_like_image("", item) for item in value)
    # An address is where a text comes from.
    return isinstance(value, str) and key != "id" and bool(_IMAGE_FILE.fullmatch(value)) and not _SCHEME.match(value)


def _match_image_key(key: str, value: Any) -> re.Match[str] | None:
    snake_case = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key)
    return _LIKE_IMAGES.fullmatch(snake_case) if isinstance(value, str | bytes | list | Mapping) else None
