"""How the next token is chosen: the fields, and what the library makes of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from yivl.errors import YiVLError
from yivl.tokenization import YiTokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults are those of the release's ``single_inference.py``.

    Raises:
        YiVLError: If a value is out of range.
    """

    temperature: float = 0.2
    """0 means greedy; below 0.001 float32 overflows. Source: 01-ai/Yi, VL/single_inference.py."""
    top_p: float = 1.0
    """Probability mass that is sampled from; 1 means all."""
    top_k: int = 50
    """Number of tokens that are sampled from; 0 means all. Source: default of transformers, which the release used."""
    num_beams: int = 1
    repetition_penalty: float = 1.0
    max_new_tokens: int = 1024
    """Length of an answer, in tokens; shorter where the context ends. Source: 01-ai/Yi, VL/single_inference.py."""
    seed: int | None = None
    """Makes sampling repeatable; ``None`` draws anew each time."""

    def __post_init__(self) -> None:
        is_temperature = self.temperature == 0 or 1e-3 <= self.temperature < math.inf
        is_length = isinstance(self.max_new_tokens, int) and self.max_new_tokens >= 1
        for name, is_valid, expected in (
            ("temperature", is_temperature, "0 (greedy) or 0.001 and more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("num_beams", self.num_beams >= 1, "1 or more"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "0 to 2**63 - 1"),
            ("max_new_tokens", is_length, "a whole number from 1"),
        ):
            if not is_valid:
                raise YiVLError(f"{name}={getattr(self, name)!r}; expected {expected}")

    def logits_processors(self) -> LogitsProcessorList:
        """Return what turns logits into those that are sampled from, in the order of the library."""
        processors = LogitsProcessorList()
        if self.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.temperature not in (0, 1):
            processors.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.temperature > 0 and self.top_k > 0:
            processors.append(TopKLogitsWarper(self.top_k))
        if self.temperature > 0 and self.top_p < 1:
            processors.append(TopPLogitsWarper(self.top_p))
        return processors

    def generation_config(self, tokenizer: YiTokenizer, max_new_tokens: int) -> GenerationConfig:
        """Return the same for ``generate``; every field is given, so none is filled from ``generation_config.json``."""
        samples = self.temperature > 0
        return GenerationConfig(
            do_sample=samples,
            temperature=float(self.temperature) if samples else 1.0,
            top_p=self.top_p if samples else 1.0,
            top_k=self.top_k if samples else 50,
            num_beams=self.num_beams,
            repetition_penalty=float(self.repetition_penalty),
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        settings: How.
        prompt_ids: Ids of the prompt, ``-200`` at image slots.
        device: Of the logits.
    """

    def __init__(self, settings: Sampling, prompt_ids: Sequence[int], device: torch.device) -> None:
        self.settings = settings
        self._processors = settings.logits_processors()
        self._generator = None if settings.seed is None else torch.Generator(device).manual_seed(settings.seed)
        # Logits processors index the vocabulary with the ids, so -200 cannot stay in them.
        self._seen = torch.tensor([[max(token, 0) for token in prompt_ids]], device=device)

    @torch.inference_mode()
    def choose(self, logits: torch.Tensor) -> int:
        """Return the next token after ``(1, vocabulary)`` logits of float32."""
        scores = self._processors(self._seen, logits)
        if self.settings.temperature > 0:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self._generator)
        else:
            token = scores.argmax(-1, keepdim=True)
        self._seen = torch.cat([self._seen, token], dim=1)
        return int(token)
