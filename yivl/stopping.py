"""Where an answer ends, and which part of a growing one can be shown."""

import threading
from typing import Any, Final

import torch
from transformers import StoppingCriteria

from yivl.constants import STOP_STRING
from yivl.tokenization import YiTokenizer

_INCOMPLETE: Final = "\N{REPLACEMENT CHARACTER}"


def cut_answer(text: str) -> str:
    """Return what is shown of generated text: up to the stop string, outer whitespace removed."""
    return text.split(STOP_STRING, 1)[0].strip()


def stable_prefix(text: str) -> str:
    """Return the part of unfinished text that no later token can change or remove."""
    if STOP_STRING in text:
        return cut_answer(text)
    text = text.rstrip(_INCOMPLETE)  # bytes of a character that is still incomplete
    for length in range(len(STOP_STRING) - 1, 0, -1):
        if text.endswith(STOP_STRING[:length]):
            text = text[:-length]
            break
    return text.strip()  # whitespace at the end may turn out to be outer


class StopOnText(StoppingCriteria):  # type: ignore[misc]
    """Ends a row once its new text contains the stop string, however many tokens spell it."""

    def __init__(self, tokenizer: YiTokenizer, prompt_length: int) -> None:
        self.tokenizer = tokenizer
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return ``(batch,)`` bool."""
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :].tolist(), skip_special_tokens=True)
        return torch.tensor([STOP_STRING in text for text in texts], device=input_ids.device)


class StopOnEvent(StoppingCriteria):  # type: ignore[misc]
    """Ends every row once the event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """Return ``(batch,)`` bool."""
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)
