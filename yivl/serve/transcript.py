"""A conversation as the text of a file."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from yivl.inference.chat import Chat


def as_json(chat: Chat, sampling: Mapping[str, Any]) -> str:
    """Return model, system message, sampling parameters and turns as JSON."""
    conversation = {
        "model": chat.loaded.name,
        "system": chat.system,
        "sampling": dict(sampling),
        "turns": [dataclasses.asdict(turn) for turn in chat.turns],
    }
    return json.dumps(conversation, ensure_ascii=False, indent=2) + "\n"


def as_markdown(chat: Chat, sampling: Mapping[str, Any]) -> str:
    """Return model, sampling parameters and turns as Markdown, the texts indented so that nothing in them is markup."""
    template = chat.loaded.model.config.prompt_template
    lines = [f"# {chat.loaded.name}", "", ", ".join(f"{name} {value}" for name, value in sampling.items()), ""]
    for turn in chat.turns:
        images = f" ({turn.num_images} images)" if turn.num_images else ""
        for role, text in ((f"{template.user}{images}", turn.question), (template.assistant, turn.answer or "")):
            lines += [f"**{role}**", "", *(f"    {line}" for line in text.split("\n")), ""]
    return "\n".join(lines)
