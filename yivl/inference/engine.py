"""Prefill and decode: requests in, tokens out. The only decoding loop; chats, servers and evaluation use it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache

from yivl.checkpoint.loading import LoadedModel
from yivl.command_line import is_out_of_memory
from yivl.errors import NonFiniteError, YiVLError
from yivl.inference.cuda_graphs import DecodingGraphs, GraphStep
from yivl.inference.decoding import DecodingStep, supports
from yivl.inference.kv_cache import Layers, PrefixStore
from yivl.inference.request import GenerationState
from yivl.inference.sampling import NOT_FINITE


@dataclass(eq=False)
class Prefill:
    """A prompt that is computed part by part; ``Engine.start`` builds it."""

    state: GenerationState
    cache: Cache
    """Keys and values of the positions that were computed or reused."""
    inputs_embeds: torch.Tensor
    """Of the whole prompt, ``(1, positions, hidden)``."""

    @property
    def num_remaining(self) -> int:
        """Positions to be computed."""
        past: int = self.cache.get_seq_length()
        return self.inputs_embeds.shape[1] - past


class Engine:
    """Decodes requests together: each step of the model gives every one of them its next token.

    Requests join and leave between two steps. Each prompt is computed alone, which needs no padding and lets every
    request reuse another prefix; in the batch rows are padded on the left to the longest one.

    Args:
        loaded: The model.
        prefixes: Keys and values of earlier requests; by default none are kept.
    """

    def __init__(self, loaded: LoadedModel, prefixes: PrefixStore | None = None) -> None:
        self.loaded = loaded
        self.prefixes = prefixes or PrefixStore(0)
        self._states: list[GenerationState] = []
        self._lengths: list[int] = []  # cached positions of each row, without padding
        self._cache: Cache | None = None
        self._is_supported = supports(loaded.model)
        self._decode: DecodingStep | GraphStep | None = None  # of the present rows

    def __len__(self) -> int:
        return len(self._states)

    def clear(self) -> None:
        """Drop all requests and their keys and values, after an error for example."""
        self._states, self._lengths, self._cache, self._decode = [], [], None, None

    def free_memory(self) -> bool:
        """Drop stored prefixes and, while no request runs, CUDA graphs; return whether there was anything to drop."""
        graphs, num_bytes = self.loaded.decoding_graphs, self.prefixes.num_bytes
        self.prefixes.clear()
        if isinstance(graphs, DecodingGraphs) and not self._states:
            num_bytes += graphs.num_bytes
            graphs.clear()
        return num_bytes > 0

    def add(self, state: GenerationState) -> str:
        """Compute the prompt of a request and return the text of its first token, which may be empty.

        Raises:
            YiVLError: If the request asks for beam search. After any error the request has not joined.
        """
        prefill = self.start(state)
        text = self.advance(prefill, prefill.num_remaining)
        assert text is not None
        return text

    @torch.inference_mode()
    def start(self, state: GenerationState) -> Prefill:
        """Return the prompt of a request, of which the longest stored prefix is computed already.

        Raises:
            YiVLError: If the request asks for beam search.
        """
        if state.sampler.settings.num_beams > 1:
            raise YiVLError("beam search decodes one request at a time; use num_beams=1 in a batch")
        model = self.loaded.model
        cache, state.num_cached = self.prefixes.take(state.keys)
        fused = model.fuse(torch.tensor([state.input_ids], device=model.device), image_features=state.features)
        return Prefill(state, cache, fused.inputs_embeds)

    @torch.inference_mode()
    def advance(self, prefill: Prefill, max_positions: int) -> str | None:
        """Compute the next positions of a prompt; with the last one the request joins the batch.

        Returns:
            ``None`` until the last position is computed, then the text of the first token, which may be empty. After
            any error the request has not joined.

        Raises:
            NonFiniteError: If the logits of the last position are not finite.
        """
        state, cache, past = prefill.state, prefill.cache, prefill.cache.get_seq_length()
        logits = self.loaded.model(
            inputs_embeds=prefill.inputs_embeds[:, past : past + max_positions],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        if prefill.num_remaining:
            return None
        text = state.take(self._checked(state.sampler.propose(logits[:, -1]).tolist()))
        self._store(state.keys, [(layer.keys, layer.values) for layer in cache.layers])
        if state.finish_reason is None:
            self._join(state, cache)
        return text

    @torch.inference_mode()
    def step(self) -> list[tuple[GenerationState, str]]:
        """Return every request with the text of its next token; after an error only ``clear`` is left.

        A request whose logits are not finite ends, with the error in its state; the others continue.
        """
        if not self._states:
            return []
        rows = self._decode_logits()[:, None]
        proposals = [state.sampler.propose(row) for state, row in zip(self._states, rows, strict=True)]
        pieces = []
        # One transfer for all: on a GPU each one waits for all kernels.
        for state, proposal in zip(self._states, torch.stack(proposals).tolist(), strict=True):
            try:
                pieces.append((state, state.take(self._checked(proposal))))
            except NonFiniteError as error:
                pieces.append((state, state.fail(error)))
        self.remove([state for state in self._states if state.finish_reason])
        return pieces

    def _checked(self, proposal: Sequence[int]) -> int:
        """Return the token that a sampler proposes.

        Raises:
            NonFiniteError: If its logits are not finite.
        """
        is_finite, token = proposal
        if not is_finite:
            raise NonFiniteError(f"{self.loaded.name}: {NOT_FINITE}")
        return token

    def _decode_logits(self) -> torch.Tensor:
        """Append the last token of every request to the cache; return ``(rows, vocabulary)`` logits."""
        assert self._cache is not None
        model, token_ids = self.loaded.model, [state.new_ids[-1] for state in self._states]
        if self._is_supported:
            if self._decode is None:
                kind = DecodingStep if self.loaded.decoding_graphs is None else GraphStep
                self._decode = kind(self.loaded, self._lengths)
            logits = self._decode(token_ids, self._cache)
            self._lengths = [length + 1 for length in self._lengths]
            return logits
        self._lengths = [length + 1 for length in self._lengths]
        lengths = torch.tensor(self._lengths, device=model.device).unsqueeze(1)
        is_padded = len(set(self._lengths)) > 1
        mask = torch.arange(max(self._lengths) - 1, -1, -1, device=model.device) < lengths
        outputs = model(
            input_ids=torch.tensor(token_ids, device=model.device).unsqueeze(1),
            attention_mask=mask if is_padded else None,
            position_ids=lengths - 1 if is_padded else None,
            past_key_values=self._cache,
            use_cache=True,
        )
        last: torch.Tensor = outputs.logits[:, -1]
        return last

    @torch.inference_mode()
    def remove(self, leaving: Sequence[GenerationState]) -> None:
        """Let requests leave, finished or not; their keys and values are stored for later ones."""
        if not leaving or self._cache is None:
            return
        for row, (state, length) in enumerate(zip(self._states, self._lengths, strict=True)):
            if state in leaving and state.error is None:
                rows = (slice(row, row + 1), slice(None), slice(-length, None))
                self._store(
                    (state.keys + state.new_ids)[:length],
                    [(layer.keys[rows], layer.values[rows]) for layer in self._cache.layers],
                )
        self._keep([row for row, state in enumerate(self._states) if state not in leaving])

    def _store(self, keys: Sequence[int], layers: Layers) -> None:
        """Keep a prefix; if memory runs out, the stored prefixes are dropped and the requests continue."""
        try:
            self.prefixes.put(keys, layers)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.free_memory()

    def _join(self, state: GenerationState, cache: Cache) -> None:
        """Add a row of keys and values to the batch; the first one is adopted without a copy."""
        self._decode = None
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
        self._decode = None
        self._states = [self._states[row] for row in rows]
        self._lengths = [self._lengths[row] for row in rows]
        for layer in self._cache.layers:
            layer.keys = layer.keys[list(rows), :, -max(self._lengths) :]
            layer.values = layer.values[list(rows), :, -max(self._lengths) :]


def _pad_left(states: torch.Tensor, length: int) -> torch.Tensor:
    """Return ``(batch, kv_heads, length, head_dim)`` with zeros before the states."""
    return functional.pad(states, (0, 0, length - states.shape[-2], 0))


def decode(loaded: LoadedModel, state: GenerationState, prefixes: PrefixStore | None = None) -> Iterator[str]:
    """Yield the answer to one request piece by piece; a token is computed when its piece is asked for."""
    if state.sampler.settings.num_beams > 1:
        yield from _beam_search(loaded, state)
        return
    engine = Engine(loaded, prefixes)
    text = engine.add(state)
    try:
        while True:
            if text:
                yield text
            if state.error is not None:
                raise state.error
            if state.finish_reason:
                return
            ((_, text),) = engine.step()
    except GeneratorExit:
        engine.remove([state])
        raise


def finish_together(loaded: LoadedModel, states: Sequence[GenerationState]) -> list[str]:
    """Decode requests to their ends in one batch and return the answers.

    Raises:
        NonFiniteError: If logits of any of them are not finite.
    """
    engine = Engine(loaded)
    for state in states:
        engine.add(state)
    while len(engine):
        for state, _ in engine.step():
            if state.error is not None:
                raise state.error
    return [state.text for state in states]


def _beam_search(loaded: LoadedModel, state: GenerationState) -> Iterator[str]:
    """Yield the answer of a beam search; its tokens are known only at the end."""
    tokenizer, model, length = loaded.tokenizer, loaded.model, len(state.input_ids)
    settings, stops = state.sampler.settings, model.config.prompt_template.stop_strings

    class Stop(StoppingCriteria):
        """Ends a beam that contains a stop string of the template, and all of them once the event is set."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
            texts = tokenizer.batch_decode(input_ids[:, length:].tolist(), skip_special_tokens=True)
            is_stopped = [state.stop_event.is_set() or any(stop in text for stop in stops) for text in texts]
            return torch.tensor(is_stopped, device=input_ids.device)

    class Check(LogitsProcessor):
        """Refuses scores that are not finite, for which the library would return any tokens."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if not scores.amax().isfinite():
                raise NonFiniteError(f"{loaded.name}: {NOT_FINITE}")
            return scores

    with torch.inference_mode(), torch.random.fork_rng(enabled=settings.seed is not None):
        if settings.seed is not None:
            torch.manual_seed(settings.seed)
        output = model.generate(
            torch.tensor([state.input_ids], device=model.device),
            image_features=state.features,
            generation_config=settings.generation_config(tokenizer, state.max_new_tokens, state.stop_id),
            logits_processor=LogitsProcessorList([Check()]),
            stopping_criteria=StoppingCriteriaList([Stop()]),
        )
    for token in output[0, length:].tolist():
        yield state.take(token)
        if state.finish_reason:
            return
