"""Messages of an API request to turns and images."""

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Final

from yivl.conversation import Turn
from yivl.errors import ImageError, YiVLError
from yivl.serve.images import ImageReader, SentImage
from yivl.serve.limits import Limits
from yivl.serve.remote import Fetcher
from yivl.serve.schema import ImagePart, Message, SystemMessage, TextPart

_DATA_URL: Final = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII | re.IGNORECASE)


def read_messages(
    messages: Sequence[Message], limits: Limits, fetcher: Fetcher, reader: ImageReader
) -> tuple[str | None, list[Turn], list[list[SentImage]]]:
    """Return the system message or ``None``, the turns, and the images of each turn; the last turn has no answer.

    Raises:
        ImageError: If an image cannot be used.
        YiVLError: If user and assistant messages do not alternate, or the last one is not a question.
    """
    system = None
    if isinstance(messages[0], SystemMessage):
        system, messages = text_of(messages[0]), messages[1:]
    roles = [message.role for message in messages]
    if len(roles) % 2 == 0 or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        raise YiVLError("after at most one system message, messages of user and assistant must alternate, user last")
    urls = [_urls(message) for message in messages[::2]]
    if sum(map(len, urls)) > limits.max_images:
        raise YiVLError(f"a request may hold at most {limits.max_images} images")
    images = [[reader.read(_data(url, limits, fetcher)) for url in group] for group in urls]
    texts = [text_of(message) for message in messages]
    turns = [
        Turn(question, answer, num_images=len(group))
        for question, answer, group in zip(texts[::2], [*texts[1::2], None], images, strict=True)
    ]
    return system, turns, images


def has_remote_images(messages: Sequence[Message]) -> bool:
    """Return whether a message has an image that is to be fetched."""
    return any(not _DATA_URL.match(url) for message in messages for url in _urls(message))


def _urls(message: Message) -> list[str]:
    if isinstance(message.content, str):
        return []
    return [part.image_url.url for part in message.content if isinstance(part, ImagePart)]


def text_of(message: Message) -> str:
    """Return the text of a message, the parts on lines of their own."""
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content if isinstance(part, TextPart))


def _data(url: str, limits: Limits, fetcher: Fetcher) -> bytes:
    """Return the bytes of a ``data:`` URL or of an allowed http(s) address; other schemes are refused."""
    if header := _DATA_URL.match(url):
        if len(url) - header.end() > limits.max_image_bytes * 4 / 3 + 4:
            raise ImageError(f"an image may have at most {limits.max_image_bytes:,} bytes")
        try:
            return base64.b64decode(url[header.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise ImageError("the image is not valid base64") from error
    if not fetcher.hosts:
        raise ImageError("the url of an image must be a data: URL, data:image/...;base64,...")
    return fetcher.fetch(url)
