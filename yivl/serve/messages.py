"""Messages of a request to what ``Chat`` knows: turns, pictures, a question."""

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from yivl.constants import SYSTEM_PROMPT
from yivl.conversation import Turn
from yivl.errors import ImageError, YiVLError
from yivl.image_processing import ImageProcessor, load_image
from yivl.serve.limits import Limits
from yivl.serve.remote import Fetcher
from yivl.serve.scheduler import SentImage
from yivl.serve.schema import ImagePart, Message, Part, SystemMessage, TextPart

_DATA_URL: Final = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Asked:
    """A conversation whose last question waits for its answer."""

    system: str
    turns: list[Turn]
    """Answered, oldest first."""
    images: list[list[SentImage]]
    """Of each of these turns, and of the question."""
    question: str


def read_messages(
    messages: Sequence[Message], limits: Limits, fetcher: Fetcher, image_processor: ImageProcessor
) -> Asked:
    """Return what the messages ask; fetches, decodes and resizes their pictures.

    Raises:
        ImageError: If a picture cannot be used.
        YiVLError: If they are no conversation: questions and answers in turn, a question last.
    """
    system = SYSTEM_PROMPT
    if isinstance(messages[0], SystemMessage):
        system, messages = _text(messages[0].content), messages[1:]
    roles = [message.role for message in messages]
    if len(roles) % 2 == 0 or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        raise YiVLError("after at most one system message, messages of user and assistant must alternate, user last")
    sources = [
        [part.image_url.url for part in message.content if isinstance(part, ImagePart)]
        if isinstance(message.content, list)
        else []
        for message in messages[::2]
    ]
    if sum(map(len, sources)) > limits.max_images:
        raise YiVLError(f"a request may hold at most {limits.max_images} pictures")
    images = [[_read_image(_data(url, limits, fetcher), limits, image_processor) for url in group] for group in sources]
    texts = [_text(message.content) for message in messages]
    turns = [
        Turn(question, answer, num_images=len(group))
        for question, answer, group in zip(texts[:-1:2], texts[1::2], images, strict=False)
    ]
    return Asked(system, turns, images, texts[-1])


def _text(content: str | Sequence[Part]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.text for part in content if isinstance(part, TextPart))


def _read_image(data: bytes, limits: Limits, image_processor: ImageProcessor) -> SentImage:
    image = load_image(data, max_pixels=limits.max_image_pixels)
    return SentImage(image_processor([image])[0], hashlib.sha256(data).digest())


def _data(url: str, limits: Limits, fetcher: Fetcher) -> bytes:
    """Return the bytes of a ``data:`` URL or of an allowed address; no other scheme is looked at."""
    if header := _DATA_URL.match(url):
        if len(url) - header.end() > limits.max_image_bytes * 4 / 3 + 4:
            raise ImageError(f"a picture may have at most {limits.max_image_bytes:,} bytes")
        try:
            return base64.b64decode(url[header.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise ImageError("the picture is no valid base64") from error
    if not fetcher.hosts:
        raise ImageError("the url of a picture must be a data: URL, data:image/...;base64,...")
    return fetcher.fetch(url)
