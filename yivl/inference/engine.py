"""Prefill and decode: requests in, tokens out. The only decoding loop; chats, servers and evaluation use it."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Final

import torch
from torch.nn import functional
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache

from yivl.checkpoint.loading import LoadedModel
from yivl.constants import STOP_STRING
from yivl.conversation import Turn
from yivl.errors import YiVLError
from yivl.inference.kv_cache import PrefixCache, copy_row
from yivl.inference.request import GenerationState, ImageInput, encode_image, prepare
from yivl.inference.sampling import Sampling

__all__ = ["Engine", "GenerationState", "answer_batch", "decode", "finish_together"]


class Engine:
    """Decodes requests together: each step of the model gives every one of them its next token.

    Requests join and leave between two steps. Prompts are computed one by one; in the batch rows are padded on the
    left to the longest one.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self._states: list[GenerationState] = []
        self._lengths: list[int] = []  # cached positions of each row, without padding
        self._cache: Cache | None = None

    def __len__(self) -> int:
        return len(self._states)

    def clear(self) -> None:
        """Drop all requests and their keys and values, after an error for example."""
        self._states, self._lengths, self._cache = [], [], None

    @torch.inference_mode()
    def add(self, states: Sequence[GenerationState]) -> list[tuple[GenerationState, str]]:
        """Compute the prompts of new requests and return each with the text of its first token, which may be empty.

        Raises:
            YiVLError: If a request asks for beam search. After any error none of the requests has joined.
        """
        if any(state.sampler.settings.num_beams > 1 for state in states):
            raise YiVLError("beam search decodes one request at a time; use num_beams=1 in a batch")
        prefilled = [self._prefill(state) for state in states]
        pieces = self._advance(states, [logits for _, logits in prefilled])
        joining = []
        for state, (cache, _) in zip(states, prefilled, strict=True):
            if state.finish_reason is None:
                joining.append((state, cache))
            elif state.prefix_cache is not None:
                state.prefix_cache.put(cache, state.keys)
        if joining:
            self._join(*zip(*joining, strict=True))
        return pieces

    @torch.inference_mode()
    def step(self) -> list[tuple[GenerationState, str]]:
        """Return every request with the text of its next token; after an error only ``clear`` is left."""
        if not self._states:
            return []
        model, num_rows = self.loaded.model, len(self._states)
        self._lengths = [length + 1 for length in self._lengths]
        lengths = torch.tensor(self._lengths, device=model.device).unsqueeze(1)
        mask = torch.arange(max(self._lengths) - 1, -1, -1, device=model.device) < lengths
        is_padded, is_cpu = len(set(self._lengths)) > 1, model.device.type == "cpu"
        if is_cpu and model.config._attn_implementation == "sdpa":
            # Given a mask, even one that hides nothing, transformers passes the query heads of a group to attention as
            # rows of one matrix, so that each key is read once; without it attention is ten times slower on a CPU.
            mask, is_padded = mask[:, None, None, :], True
        is_matrix_vector = is_cpu and num_rows == 1 and model.dtype == torch.bfloat16
        with native_matrix_vector if is_matrix_vector else nullcontext():
            logits = model(
                input_ids=torch.tensor([state.new_ids[-1:] for state in self._states], device=model.device),
                attention_mask=mask if is_padded else None,
                position_ids=lengths - 1 if is_padded else None,
                past_key_values=self._cache,
                use_cache=True,
            ).logits
        pieces = self._advance(self._states, logits[:, -1:].float())
        self._leave([state for state in self._states if state.finish_reason])
        return pieces

    @torch.inference_mode()
    def remove(self, state: GenerationState) -> None:
        """Let a request leave before it is finished; its keys and values go to its prefix cache."""
        self._leave([state] if state in self._states else [])

    def _prefill(self, state: GenerationState) -> tuple[Cache, torch.Tensor]:
        """Return the cache of a prompt and ``(1, vocabulary)`` float32 logits of its last position."""
        model = self.loaded.model
        cache, state.num_cached = (state.prefix_cache or PrefixCache()).take(state.keys)
        fused = model.fuse(torch.tensor([state.input_ids], device=model.device), image_features=state.features)
        logits: torch.Tensor = model(
            inputs_embeds=fused.inputs_embeds[:, state.num_cached :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return cache, logits[:, -1].float()

    def _advance(
        self, states: Sequence[GenerationState], logits: Sequence[torch.Tensor] | torch.Tensor
    ) -> list[tuple[GenerationState, str]]:
        """Choose a token for each state from its ``(1, vocabulary)`` logits."""
        return [(state, state.take(state.sampler.choose(row))) for state, row in zip(states, logits, strict=True)]

    def _join(self, states: Sequence[GenerationState], caches: Sequence[Cache]) -> None:
        """Add rows of keys and values to the batch; a single row is adopted without a copy."""
        num_before, lengths = len(self._states), [*self._lengths, *(len(state.keys) for state in states)]
        first, *others = caches if self._cache is None else (self._cache, *caches)
        try:
            for layer, *rows in zip(first.layers, *(cache.layers for cache in others), strict=True):
                if rows:
                    layer.keys = torch.cat([_pad_left(row.keys, max(lengths)) for row in (layer, *rows)])
                    layer.values = torch.cat([_pad_left(row.values, max(lengths)) for row in (layer, *rows)])
        except BaseException:
            self._keep(range(num_before))  # memory may run out between two layers
            raise
        self._states, self._lengths, self._cache = [*self._states, *states], lengths, first

    def _leave(self, leaving: Sequence[GenerationState]) -> None:
        """Remove rows from the batch and give their keys and values to their prefix caches."""
        if not leaving:
            return
        for row, (state, length) in enumerate(zip(self._states, self._lengths, strict=True)):
            if state in leaving and state.prefix_cache is not None and self._cache is not None:
                cache = self._cache if len(self._states) == 1 else copy_row(self._cache, row, length)
                state.prefix_cache.put(cache, (state.keys + state.new_ids)[:length])
        self._keep([row for row, state in enumerate(self._states) if state not in leaving])

    def _keep(self, rows: Sequence[int]) -> None:
        """Select rows of the batch and drop padding that none of them needs."""
        if not rows or self._cache is None:
            self.clear()
            return
        self._states = [self._states[row] for row in rows]
        self._lengths = [self._lengths[row] for row in rows]
        for layer in self._cache.layers:
            layer.keys = layer.keys[list(rows), :, -max(self._lengths) :]
            layer.values = layer.values[list(rows), :, -max(self._lengths) :]


def _pad_left(states: torch.Tensor, length: int) -> torch.Tensor:
    """Return ``(batch, kv_heads, length, head_dim)`` with zeros before the states."""
    return functional.pad(states, (0, 0, length - states.shape[-2], 0))


def decode(loaded: LoadedModel, state: GenerationState) -> Iterator[str]:
    """Yield the answer to one request piece by piece; a token is computed when its piece is asked for."""
    if state.sampler.settings.num_beams > 1:
        yield from _beam_search(loaded, state)
        return
    engine = Engine(loaded)
    pieces = engine.add([state])
    try:
        while True:
            yield from (text for _, text in pieces if text)
            if state.finish_reason:
                return
            pieces = engine.step()
    except GeneratorExit:
        engine.remove(state)
        raise


def _beam_search(loaded: LoadedModel, state: GenerationState) -> Iterator[str]:
    """Yield the answer of a beam search; its tokens are known only at the end."""
    tokenizer, model, length = loaded.tokenizer, loaded.model, len(state.input_ids)
    settings = state.sampler.settings

    class Stop(StoppingCriteria):
        """Ends a beam that contains the stop string, and all of them once the event is set."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            texts = tokenizer.batch_decode(input_ids[:, length:].tolist(), skip_special_tokens=True)
            is_stopped = [STOP_STRING in text or state.stop_event.is_set() for text in texts]
            return torch.tensor(is_stopped, device=input_ids.device)

    with torch.inference_mode(), torch.random.fork_rng(enabled=settings.seed is not None):
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
        output = model.generate(
            torch.tensor([state.input_ids], device=model.device),
            image_features=state.features,
            generation_config=settings.generation_config(tokenizer, state.max_new_tokens),
            stopping_criteria=StoppingCriteriaList([Stop()]),
        )
    for token in output[0, length:].tolist():
        yield state.take(token)
        if state.finish_reason:
            return
    yield state.finish("length")


def answer_batch(
    loaded: LoadedModel,
    questions: Sequence[str],
    images: Sequence[ImageInput | None] | None = None,
    **sampling: Any,
) -> list[str]:
    """Return the answers to independent questions, each with one image or ``None``, decoded together.

    ``sampling`` are fields of ``Sampling``, for all questions.

    Raises:
        ImageError: If an image cannot be used.
        YiVLError: If a sampling value is out of range, or beam search is requested.
        ValueError: If the numbers of questions and images differ.
    """
    images = [None] * len(questions) if images is None else images
    if len(images) != len(questions):
        raise ValueError(f"{len(questions)} questions but {len(images)} images")
    settings = Sampling(**sampling)
    encoded = [[] if image is None else [encode_image(loaded, image)] for image in images]
    states = [
        prepare(loaded, [Turn(question, num_images=len(group))], [group], settings)
        for question, group in zip(questions, encoded, strict=True)
    ]
    return finish_together(loaded, states)


def finish_together(loaded: LoadedModel, states: Sequence[GenerationState]) -> list[str]:
    """Decode requests to their ends in one batch and return the answers."""
    engine = Engine(loaded)
    engine.add(states)
    while len(engine):
        engine.step()
    return [state.text for state in states]


class _NativeKernels:
    """Switches oneDNN off while any thread is inside; the switch is process-wide, so the users are counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_users = 0
        self._before = True

    def __enter__(self) -> None:
        with self._lock:
            if self._num_users == 0:
                self._before = bool(torch.backends.mkldnn.enabled)
                torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
            self._num_users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_users -= 1
            if self._num_users == 0:
                torch.backends.mkldnn.enabled = self._before  # type: ignore[assignment]


native_matrix_vector: Final = _NativeKernels()
"""Multiplies matrix and vector with PyTorch's own kernels instead of oneDNN's.

With a single bfloat16 row oneDNN reaches two thirds of the memory bandwidth, the native kernels nearly all of it
(docs/benchmarks.md). PyTorch has no switch per call or thread; another thread gets the same numbers, only slower.
"""
