"""Where an answer ends, and which part of a growing one can be shown."""

import threading
from collections.abc import Sequence
from typing import Any, Final

import torch
from transformers import StoppingCriteria

from yivl.constants import STOP_STRING
from yivl.tokenization import YiTokenizer

_INCOMPLETE: Final = "\N{REPLACEMENT CHARACTER}"


def find_stop(text: str, stops: Sequence[str]) -> int:
    """Return where the first of the stop strings begins, or -1."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=-1)


def cut_answer(text: str, stops: Sequence[str] = (STOP_STRING,)) -> str:
    """Return what is shown of generated text: up to the first stop string, outer whitespace removed."""
    place = find_stop(text, stops)
    return (text if place < 0 else text[:place]).strip()


def stable_prefix(text: str, stops: Sequence[str] = (STOP_STRING,)) -> str:
    """Return the part of unfinished text that no later token can change or remove."""
    if find_stop(text, stops) >= 0:
        return cut_answer(text, stops)
    text = text.rstrip(_INCOMPLETE)  # bytes of a character that is still incomplete
    begun = max(
        (
            length
            for stop in stops
            for length in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:length])
        ),
        default=0,
    )
    return text[: len(text) - begun].strip()  # whitespace at the end may turn out to be outer


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
