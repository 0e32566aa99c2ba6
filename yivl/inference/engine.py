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
from yivl.errors import YiVLError
from yivl.inference.kv_cache import PrefixCache, copy_row
from yivl.inference.request import GenerationState
from yivl.model.block_attention import BLOCK_SDPA


class Engine:
    """Decodes requests together: each step of the model gives every one of them its next token.

    Requests join and leave between two steps. Each prompt is computed alone, which needs no padding and lets every
    chat reuse its own prefix; in the batch rows are padded on the left to the longest one.
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
    def add(self, state: GenerationState) -> str:
        """Compute the prompt of a request and return the text of its first token, which may be empty.

        Raises:
            YiVLError: If the request asks for beam search. After any error the request has not joined.
        """
        if state.sampler.settings.num_beams > 1:
            raise YiVLError("beam search decodes one request at a time; use num_beams=1 in a batch")
        model = self.loaded.model
        cache, state.num_cached = (state.prefix_cache or PrefixCache()).take(state.keys)
        fused = model.fuse(torch.tensor([state.input_ids], device=model.device), image_features=state.features)
        logits = model(
            inputs_embeds=fused.inputs_embeds[:, state.num_cached :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        text = state.take(state.sampler.choose(logits[:, -1].float()))
        if state.finish_reason is None:
            self._join(state, cache)
        elif state.prefix_cache is not None:
            state.prefix_cache.put(cache, state.keys)
        return text

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
        if is_cpu and model.config._attn_implementation in ("sdpa", BLOCK_SDPA):
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
        rows = zip(self._states, logits[:, -1:].float(), strict=True)
        pieces = [(state, state.take(state.sampler.choose(row))) for state, row in rows]
        self.remove([state for state in self._states if state.finish_reason])
        return pieces

    @torch.inference_mode()
    def remove(self, leaving: Sequence[GenerationState]) -> None:
        """Let requests leave, finished or not; their keys and values go to their prefix caches."""
        if not leaving or self._cache is None:
            return
        for row, (state, length) in enumerate(zip(self._states, self._lengths, strict=True)):
            if state in leaving and state.prefix_cache is not None:
                cache = self._cache if len(self) == 1 else copy_row(self._cache, row, length)
                state.prefix_cache.put(cache, (state.keys + state.new_ids)[:length])
        self._keep([row for row, state in enumerate(self._states) if state not in leaving])

    def _join(self, state: GenerationState, cache: Cache) -> None:
        """Add a row of keys and values to the batch; the first one is adopted without a copy."""
        if self._cache is None:
            self._states, self._lengths, self._cache = [state], [len(state.keys)], cache
            return
        lengths = [*self._lengths, len(state.keys)]
        try:
            for layer, row in zip(self._cache.layers, cache.layers, strict=True):
                layer.keys = torch.cat([_pad_left(states, max(lengths)) for states in (layer.keys, row.keys)])
                layer.values = torch.cat([_pad_left(states, max(lengths)) for states in (layer.values, row.values)])
        except BaseException:
            self._keep(range(len(self)))  # memory may run out between two layers
            raise
        self._states, self._lengths = [*self._states, state], lengths

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
    text = engine.add(state)
    try:
        while True:
            if text:
                yield text
            if state.finish_reason:
                return
            ((_, text),) = engine.step()
    except GeneratorExit:
        engine.remove([state])
        raise


def finish_together(loaded: LoadedModel, states: Sequence[GenerationState]) -> list[str]:
    """Decode requests to their ends in one batch and return the answers."""
    engine = Engine(loaded)
    for state in states:
        engine.add(state)
    while len(engine):
        engine.step()
    return [state.text for state in states]


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
