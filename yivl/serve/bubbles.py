"""A conversation as the messages of ``gr.Chatbot``."""

import html
import re
from typing import Final

from yivl.inference.chat import Chat

# gradio sends plain text to the browser as HTML; this is where markup would begin.
_MARKUP: Final = re.compile(r"<|&(?=[#\w])")

Bubble = dict[str, str]
"""A message of ``gr.Chatbot``."""


def bubble(role: str, text: str) -> Bubble:
    """Return a message that shows ``text`` literally, without markup."""
    return {"role": role, "content": _MARKUP.sub(lambda found: html.escape(found[0]), text)}


def as_bubbles(chat: Chat) -> list[Bubble]:
    """Return the messages of a conversation."""
    return [
        bubble(role, text or "")
        for turn in chat.turns
        for role, text in (("user", turn.question), ("assistant", turn.answer))
    ]


def bubbles_up_to(chat: Chat, index: int, question: str) -> list[Bubble]:
    """Return the turns before ``index``, and a question in place of the later ones."""
    return [*as_bubbles(chat)[: 2 * index], bubble("user", question)]
