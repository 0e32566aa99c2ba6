"""How the next token is chosen, and where the text of an answer ends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

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

NOT_FINITE: Final = "the logits are NaN or infinite; download the damaged weights again, or use --dtype float32"
"""Of a model whose weights are damaged, or exceed the range of the dtype."""


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. The defaults are those of the reference implementation's ``single_inference.py``.

    Raises:
        YiVLError: If a value is out of range.
    """

    temperature: float = 0.2
    """0 is greedy decoding; below 0.001 float32 overflows. Source: 01-ai/Yi, VL/single_inference.py."""
    top_p: float = 1.0
    """Probability mass that is sampled from; 1 means all."""
    top_k: int = 50
    """Number of tokens that are sampled from; 0 means all. Source: default of transformers in the reference."""
    num_beams: int = 1
    repetition_penalty: float = 1.0
    max_new_tokens: int = 1024
    """Length of an answer, in tokens; shorter where the context ends. Source: 01-ai/Yi, VL/single_inference.py."""
    seed: int | None = None
    """Makes sampling reproducible; ``None`` uses PyTorch's global generator."""

    def __post_init__(self) -> None:
        is_temperature = self.temperature == 0 or 1e-3 <= self.temperature < math.inf
        is_seed = self.seed is None or (type(self.seed) is int and 0 <= self.seed < 2**63)
        is_length = isinstance(self.max_new_tokens, int) and self.max_new_tokens >= 1
        for name, is_valid, expected in (
            ("temperature", is_temperature, "0 (greedy) or at least 0.001"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("seed", is_seed, "an integer, 0 to 2**63 - 1"),
            ("max_new_tokens", is_length, "an integer of at least 1"),
        ):
            if not is_valid:
                raise YiVLError(f"{name}={getattr(self, name)!r}; expected {expected}")

    def logits_processors(self) -> LogitsProcessorList:
        """Return the processors and warpers of these settings, in the order of transformers."""
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

    def generation_config(self, tokenizer: YiTokenizer, max_new_tokens: int, stop_id: int) -> GenerationConfig:
        """Return the same for ``generate``; every field is set, so none comes from ``generation_config.json``."""
        do_sample = self.temperature > 0
        return GenerationConfig(
            do_sample=do_sample,
            temperature=float(self.temperature) if do_sample else 1.0,
            top_p=self.top_p if do_sample else 1.0,
            top_k=self.top_k if do_sample else 50,
            num_beams=self.num_beams,
            repetition_penalty=float(self.repetition_penalty),
            max_new_tokens=max_new_tokens,
            eos_token_id=stop_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )


class Sampler:
    """Chooses the tokens of one answer.

    Args:
        settings: Sampling settings.
        prompt_ids: Token ids of the prompt, ``-200`` at image slots.
        device: Device of the logits.
    """

    def __init__(self, settings: Sampling, prompt_ids: Sequence[int], device: torch.device) -> None:
        self.settings = settings
        self._processors = settings.logits_processors()
        self._generator = None if settings.seed is None else torch.Generator(device).manual_seed(settings.seed)
        # Only the repetition penalty reads the ids. It indexes the vocabulary with them, so -200 cannot stay in them.
        seen = [max(token, 0) for token in prompt_ids] if settings.repetition_penalty != 1 else []
        self._seen = torch.tensor([seen], dtype=torch.int64, device=device)

    @torch.inference_mode()
    def propose(self, logits: torch.Tensor) -> torch.Tensor:
        """Return whether ``(1, vocabulary)`` logits are finite, and the next token: int64, ``(2,)``, on their device.

        Without a transfer, so that those of several answers can be one. NaN and positive infinity are not finite.
        """
        # In float32, which rounds no logits, the maximum is found faster on a CPU, too.
        scores = self._processors(self._seen, logits.float())
        if self.settings.temperature > 0:
            probabilities = scores.softmax(-1)
            checked = probabilities[0, :1]  # one logit that is not finite makes all probabilities NaN
            # multinomial refuses NaN, on a GPU with an assertion after which the process cannot use the device.
            token = torch.multinomial(probabilities.nan_to_num(1.0), 1, generator=self._generator)
        else:
            checked, token = (value[0] for value in scores.max(-1, keepdim=True))  # NaN counts as the largest
        token = token.view(1, 1)
        if self.settings.repetition_penalty != 1:
            self._seen = torch.cat([self._seen, token], dim=1)
        return torch.cat([checked.isfinite().to(token.dtype), token[0]])


class AnswerText:
    """The text of an answer as it grows: it ends before the first stop string and has no outer whitespace.

    Text is returned once no later text can remove it: the possible beginning of a stop string and whitespace that may
    turn out to be trailing are held back. The work of a piece does not depend on the length of the answer.

    Args:
        stops: Stop strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.is_stopped = False
        self._stops = stops
        self._pieces: list[str] = []
        self._held = ""

    @property
    def text(self) -> str:
        """Everything that was returned so far; after ``end`` the whole answer."""
        return "".join(self._pieces)

    def add(self, text: str) -> str:
        """Append text and return what became final."""
        held = self._held + text
        places = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if places:
            self.is_stopped = True
            return self._release(held[: min(places)].rstrip(), "")
        safe = held[: len(held) - max((_overlap(held, stop) for stop in self._stops), default=0)].rstrip()
        return self._release(safe, held[len(safe) :])

    def end(self, text: str = "") -> str:
        """Append the last text and return the rest of the answer; a stop string discards what follows it."""
        return "" if self.is_stopped else self.add(text) + self._release(self._held.rstrip(), "")

    def _release(self, final: str, held: str) -> str:
        final = final if self._pieces else final.lstrip()
        self._held = held
        if final:
            self._pieces.append(final)
        return final


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest beginning of a stop string that ends the text."""
    return next((length for length in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:length])), 0)
