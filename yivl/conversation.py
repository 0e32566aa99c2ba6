"""Turns to prompt text. Pure strings; tokens, tensors and images come later.

A prompt is a list of text chunks with one image slot between neighbors, so that text which contains the placeholder
cannot become an image.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from yivl.constants import ASSISTANT, DEFAULT_IMAGE_TOKEN, HUMAN, STOP_STRING, SYSTEM_PROMPT

_MARKERS: Final = re.compile(r"##(?=#)|<(?=\||(?:image_placeholder|image|/?s|unk|pad)>)")

RoleText = tuple[str, Sequence[str] | None]
"""Role and text pieces with one image slot between neighbors; ``None`` is the answer to generate."""


@dataclass(frozen=True)
class Turn:
    """One question and its answer; ``None`` if it has not been generated yet."""

    question: str
    answer: str | None = None
    num_images: int = 0
    """Number of images before the question."""

    def messages(self) -> tuple[RoleText, RoleText]:
        """Return the user's and the assistant's message; images are on a line of their own, as in the reference."""
        pieces = [""] * self.num_images + [f"\n{self.question}" if self.num_images else self.question]
        return (HUMAN, pieces), (ASSISTANT, None if self.answer is None else [self.answer])


def render_chunks(messages: Iterable[RoleText], system: str = SYSTEM_PROMPT) -> list[str]:
    """Return the text chunks of the prompt, one image slot between neighbors.

    A finished message ends with the stop string that starts the next turn, an open one with its colon.
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


def escape_markers(text: str) -> str:
    """Return text that cannot start a turn, an image slot or a control token, for text that the user did not write.

    A question is part of the prompt as it is, as in the reference: ``### Assistant: ...`` on a line of its own gets the
    ids of an answer. Escape documents, web pages and the output of OCR before they become part of a question. A space
    is put between three ``#`` and after the ``<`` of ``<image_placeholder>``, ``<image>``, ``<|...|>``, ``<s>``,
    ``</s>``, ``<unk>`` and ``<pad>``; all other text is unchanged, and escaping again changes nothing.
    """
    return _MARKERS.sub(lambda found: f"{found[0]} ", text)


@dataclass
class Conversation:
    """A conversation for code written against the reference implementation; the package itself uses ``Turn``.

    A placeholder in a message is an image slot. An empty message counts as unanswered, and a tuple message
    ``(text, image, mode)`` puts its image first, as in the reference (docs/fidelity.md).
    """

    system: str = SYSTEM_PROMPT
    roles: tuple[str, str] = (HUMAN, ASSISTANT)
    messages: list[list[object]] = field(default_factory=list)
    sep: str = STOP_STRING

    def append_message(self, role: str, message: str | tuple[object, ...] | None) -> None:
        """Add a message; ``None`` leaves the turn to the model."""
        self.messages.append([role, message])

    def copy(self) -> "Conversation":
        """Return an independent copy."""
        return replace(self, messages=[list(message) for message in self.messages])

    def get_prompt(self) -> str:
        """Return the prompt with ``<image_placeholder>`` at every image slot."""
        rendered: list[RoleText] = []
        for index, (role, content) in enumerate(self.messages):
            text = content[0] if isinstance(content, tuple) else content
            if index == 0 and isinstance(content, tuple):
                text = f"{DEFAULT_IMAGE_TOKEN}\n{str(text).replace(DEFAULT_IMAGE_TOKEN, '').strip()}"
            rendered.append((str(role), str(text).split(DEFAULT_IMAGE_TOKEN) if text else None))
        return DEFAULT_IMAGE_TOKEN.join(render_chunks(rendered, self.system))


conv_templates: Final = {"mm_default": Conversation()}
"""Templates by LLaVA's names; call ``.copy()`` before adding messages. Source: 01-ai/Yi, VL/llava/conversation.py."""
