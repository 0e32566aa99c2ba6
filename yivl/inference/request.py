"""One request to the engine: its prompt in tokens, its settings and the answer as it grows."""

import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from yivl.conversation import Turn
from yivl.errors import YiVLError
from yivl.image_processing import ImageSource
from yivl.inference.detokenization import Detokenizer
from yivl.inference.sampling import AnswerText, Sampler

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class EncodedImage:
    """Projected features of an image; conversations with the same model can share it."""

    features: torch.Tensor
    """``(num_patches, hidden)``."""
    serial: int = field(default_factory=lambda: secrets.randbits(62) + 1)
    """Identifies the image in key-value caches; random, so that images of different chats differ."""


ImageInput = ImageSource | torch.Tensor | EncodedImage
"""An image to load, its ``pixel_values`` ``(3, image_size, image_size)``, or its features."""


@dataclass(frozen=True)
class Answer:
    """A finished answer, its lengths in tokens and its times in seconds."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    """Sequence length of the prompt, image patches included."""
    cached_tokens: int
    """Those of them whose keys and values an earlier request had computed."""
    new_tokens: int
    seconds_to_first_token: float
    """From the call, image preprocessing included."""
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Rate after the first token; 0 for a single token."""
        decoding = self.seconds - self.seconds_to_first_token
        return (self.new_tokens - 1) / decoding if self.new_tokens > 1 and decoding > 0 else 0.0


@dataclass(eq=False)
class GenerationState:
    """One request; ``Chat.begin`` builds it."""

    turn: Turn
    images: Sequence[EncodedImage]
    """Images of this turn."""
    history: int
    """Number of turns before this one."""
    input_ids: list[int]
    """Prompt, ``-200`` at image slots."""
    features: torch.Tensor | None
    """Of the images of all turns, ``(num_images, num_patches, hidden)``."""
    keys: list[int]
    """What each position of the fused prompt holds: a token id, or the negative serial of its image."""
    sampler: Sampler
    max_new_tokens: int
    """Limited by the rest of the context."""
    stop_id: int
    """Token that ends the answer and has no text."""
    detokenizer: Detokenizer
    answer: AnswerText
    stop_event: threading.Event
    start: float
    """``time.perf_counter()`` of the call, in seconds."""
    new_ids: list[int] = field(default_factory=list)
    num_cached: int = 0
    """Positions of the prompt whose keys and values were reused."""
    first_token_at: float = 0.0
    finish_reason: FinishReason | None = None
    """``None`` while the request runs."""
    error: YiVLError | None = None
    """The reason of ``error``; the caller that decodes the request raises it."""

    @property
    def text(self) -> str:
        """The answer, once it is finished."""
        return self.answer.text

    def take(self, token: int) -> str:
        """Append a token and return the text that became final."""
        self.first_token_at = self.first_token_at or time.perf_counter()
        self.new_ids.append(token)
        piece = "" if token == self.stop_id else self.answer.add(self.detokenizer.add(token))
        if token == self.stop_id or self.answer.is_stopped:
            return piece + self.finish("stop")
        if self.stop_event.is_set():
            return piece + self.finish("cancelled")
        return piece + self.finish("length") if len(self.new_ids) >= self.max_new_tokens else piece

    def fail(self, error: YiVLError) -> str:
        """End the request with an error and return the rest of its text."""
        self.error = error
        return self.finish("error")

    def finish(self, reason: FinishReason) -> str:
        """End the request and return the rest of its text."""
        self.finish_reason = reason
        return self.answer.end(self.detokenizer.flush())

    def result(self) -> Answer:
        """Return the finished answer."""
        end = time.perf_counter()
        assert self.finish_reason is not None
        return Answer(
            text=self.text,
            finish_reason=self.finish_reason,
            prompt_tokens=len(self.keys),
            cached_tokens=self.num_cached,
            new_tokens=len(self.new_ids),
            seconds_to_first_token=(self.first_token_at or end) - self.start,
            seconds=end - self.start,
        )
