"""One request: from turns, images and settings to a prompt in tokens, and the answer as it grows."""

import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from yivl.checkpoint.loading import LoadedModel
from yivl.constants import IMAGE_TOKEN_INDEX, STOP_STRING, SYSTEM_PROMPT
from yivl.conversation import Turn, render_chunks
from yivl.errors import ContextLengthError
from yivl.image_processing import ImageSource, load_image
from yivl.inference.kv_cache import PrefixCache
from yivl.inference.sampling import AnswerText, Sampler, Sampling
from yivl.tokenization import Detokenizer, tokenize_chunks

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class EncodedImage:
    """Projected features of an image; conversations with the same model can share it."""

    features: torch.Tensor
    """``(num_patches, hidden)``."""
    serial: int = field(default_factory=lambda: secrets.randbits(62) + 1)
    """Identifies the image in key-value caches; random, so that images of different chats differ."""


ImageInput = ImageSource | torch.Tensor | EncodedImage
"""An image to load, its ``pixel_values`` ``(3, image_size, image_size)``, or its features."""


def encode_image(loaded: LoadedModel, image: ImageInput, *, allow_remote: bool = False) -> EncodedImage:
    """Return the features of an image; an encoded one is returned as it is.

    Raises:
        ImageError: If the image cannot be used.
    """
    if isinstance(image, EncodedImage):
        return image
    if not isinstance(image, torch.Tensor):
        image = loaded.image_processor([load_image(image, allow_remote=allow_remote)])
    with torch.inference_mode():
        return EncodedImage(loaded.model.encode_images(image)[0])


@dataclass(eq=False)
class GenerationState:
    """One request: its prompt, its settings and the answer so far."""

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
    eos_token_id: int
    detokenizer: Detokenizer
    answer: AnswerText
    stop_event: threading.Event
    prefix_cache: PrefixCache | None
    """Source and destination of keys and values; ``None`` computes all of them and keeps none."""
    start: float
    """``time.perf_counter()`` of the call, in seconds."""
    new_ids: list[int] = field(default_factory=list)
    num_cached: int = 0
    """Positions of the prompt whose keys and values were reused."""
    first_token_at: float = 0.0
    finish_reason: FinishReason | None = None
    """``None`` while the request runs."""

    @property
    def text(self) -> str:
        """The answer, once it is finished."""
        return self.answer.text

    def take(self, token: int) -> str:
        """Append a token and return the text that became final."""
        self.first_token_at = self.first_token_at or time.perf_counter()
        self.new_ids.append(token)
        piece = self.answer.add(self.detokenizer.add(token))
        if token == self.eos_token_id or self.answer.is_stopped:
            return piece + self.finish("stop")
        if self.stop_event.is_set():
            return piece + self.finish("cancelled")
        return piece + self.finish("length") if len(self.new_ids) >= self.max_new_tokens else piece

    def finish(self, reason: FinishReason) -> str:
        """End the request and return the rest of its text."""
        self.finish_reason = reason
        return self.answer.end(self.detokenizer.flush())


def prepare(
    loaded: LoadedModel,
    turns: Sequence[Turn],
    images: Sequence[Sequence[EncodedImage]],
    settings: Sampling,
    *,
    system: str = SYSTEM_PROMPT,
    stops: Sequence[str] = (),
    stop_event: threading.Event | None = None,
    prefix_cache: PrefixCache | None = None,
    start: float | None = None,
) -> GenerationState:
    """Return the request for the answer to the last of ``turns``; ``images`` are those of each turn.

    Raises:
        ContextLengthError: If the prompt leaves no room for an answer.
    """
    start = time.perf_counter() if start is None else start
    tokenizer, context = loaded.tokenizer, loaded.model.config.max_position_embeddings
    num_characters = len(system) + sum(len(turn.question) + len(turn.answer or "") + 1 for turn in turns)
    if num_characters > context * tokenizer.longest_piece:  # too long however it is tokenized, which takes time
        raise ContextLengthError(f"the conversation has {num_characters} characters, too many for the context")
    messages = [message for turn in turns for message in turn.messages()]
    input_ids = tokenize_chunks(render_chunks(messages, system), tokenizer)
    encoded = [image for group in images for image in group]
    remaining, keys = iter(encoded), []
    for token in input_ids:
        if token == IMAGE_TOKEN_INDEX:
            image = next(remaining)
            keys += [-image.serial] * len(image.features)
        else:
            keys.append(token)
    if len(keys) >= context:
        raise ContextLengthError(
            f"the conversation takes {len(keys)} positions and the context has {context}; "
            "start a new one, or ask with fewer or shorter turns"
        )
    return GenerationState(
        turn=turns[-1],
        images=images[-1],
        history=len(turns) - 1,
        input_ids=input_ids,
        features=torch.stack([image.features for image in encoded]) if encoded else None,
        keys=keys,
        sampler=Sampler(settings, input_ids, loaded.model.device),
        max_new_tokens=min(settings.max_new_tokens, context - len(keys)),
        eos_token_id=tokenizer.eos_token_id,
        detokenizer=Detokenizer(tokenizer),
        answer=AnswerText((STOP_STRING, *stops)),
        stop_event=stop_event or threading.Event(),
        prefix_cache=prefix_cache,
        start=start,
    )
