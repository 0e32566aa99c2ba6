"""Turns to prompt text. Pure strings: nothing here knows about tokens, tensors or pictures.

An image sits *between* two pieces of text, so a prompt is a list of chunks with one image slot between neighbours.
Text that happens to contain the placeholder spelling can therefore never become an image by accident.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from yivl.constants import ASSISTANT, DEFAULT_IMAGE_TOKEN, HUMAN, STOP_STRING, SYSTEM_PROMPT

Message = tuple[str, Sequence[str] | None]
"""Role and text pieces with one image slot between neighbours; ``None`` is the answer to be generated."""


@dataclass(frozen=True)
class Turn:
    """One question and, once it is known, its answer."""

    question: str
    answer: str | None = None
    num_images: int = 0
    """Pictures shown before the question, in order."""

    def messages(self) -> tuple[Message, Message]:
        """Return the human and the assistant message, images first and on a line of their own as in the release."""
        pieces = [""] * self.num_images + [f"\n{self.question}" if self.num_images else self.question]
        return (HUMAN, pieces), (ASSISTANT, None if self.answer is None else [self.answer])


def render_chunks(messages: Iterable[Message], system: str = SYSTEM_PROMPT) -> list[str]:
    """Return the text chunks of the prompt, one image slot between neighbours.

    A finished message ends with the stop string that opens the next turn; an open one ends right after its colon.
    Source: 01-ai/Yi, VL/llava/conversation.py.
    """
    chunks = [f"{system}\n\n{STOP_STRING} "]
    for role, pieces in messages:
        if pieces is None:
            chunks[-1] += f"{role}:"
        else:
            chunks[-1] += f"{role}: {pieces[0]}"
            chunks.extend(pieces[1:])
            chunks[-1] += f"\n{STOP_STRING} "
    return chunks


@dataclass
class Conversation:
    """A conversation as code written against the release builds it; the package itself uses ``Turn``.

    Here text is control: a placeholder in a message is an image slot. An empty message counts as unanswered and a
    tuple message ``(text, image, mode)`` puts its image first, as in the release (docs/fidelity.md).
    """

    system: str = SYSTEM_PROMPT
    roles: tuple[str, str] = (HUMAN, ASSISTANT)
    messages: list[list[object]] = field(default_factory=list)
    sep: str = STOP_STRING

    def append_message(self, role: str, message: str | tuple[object, ...] | None) -> None:
        """Add a message; ``None`` leaves the turn open for the model."""
        self.messages.append([role, message])

    def copy(self) -> "Conversation":
        """Return an independent copy."""
        return replace(self, messages=[list(message) for message in self.messages])

    def get_prompt(self) -> str:
        """Return the prompt with ``<image_placeholder>`` at every image slot."""
        rendered: list[Message] = []
        for index, (role, content) in enumerate(self.messages):
            text = content[0] if isinstance(content, tuple) else content
            if index == 0 and isinstance(content, tuple):
                text = f"{DEFAULT_IMAGE_TOKEN}\n{str(text).replace(DEFAULT_IMAGE_TOKEN, '').strip()}"
            rendered.append((str(role), str(text).split(DEFAULT_IMAGE_TOKEN) if text else None))
        return DEFAULT_IMAGE_TOKEN.join(render_chunks(rendered, self.system))


conv_templates: Final = {"mm_default": Conversation()}
"""Lineage lookup; always ``.copy()`` before adding messages. Source: 01-ai/Yi, VL/llava/conversation.py."""
