"""Decoding steps as CUDA graphs: the kernels of a step are captured once and launched together.

Without them a GPU waits for the launches of its kernels. Prompts and beam search are not captured.
"""

import logging
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from transformers.cache_utils import Cache

from yivl.checkpoint.loading import LoadedModel
from yivl.command_line import is_out_of_memory
from yivl.inference.decoding import DecodingFunctions, DecodingStep, supports
from yivl.model.modeling import YiVLForCausalLM

logger = logging.getLogger(__name__)

BUCKET: Final = 512
"""Graphs read keys and values up to a multiple of this many positions. On average a row of Yi-VL-6B reads 16 MiB more
than it needs, 0.15 % of the weights in bfloat16. Source: ours."""

MAX_GRAPHS: Final = 32
"""Graphs that are kept: a whole context of 4,096 positions for 1, 2, 4 and 8 rows. Source: ours."""

Replay = Callable[[], torch.Tensor]
"""Computes a captured step again, from what its input tensors hold by then. The next call overwrites the output."""

Capture = Callable[[Replay], Replay]
"""Captures a step, which has run before. It may run it again, or only record it."""


class CudaCapture:
    """Captures steps as CUDA graphs, which share one memory pool: only one of them runs at a time.

    Args:
        device: The device of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graphs = weakref.WeakSet[torch.cuda.CUDAGraph]()

    def __call__(self, step: Callable[[], torch.Tensor]) -> Replay:
        """Return a replay of the step, which must have run before: the first run loads kernels.

        Raises:
            RuntimeError: If CUDA refuses an operation of the step, or memory runs out.
        """
        # A pool is freed with its last graph and cannot be shared after that.
        pool = next((graph.pool() for graph in self._graphs), None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            current, refused = torch.cuda.current_stream(), None
            try:
                # Other threads may allocate memory meanwhile.
                with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                    try:
                        output = step()
                    except RuntimeError as error:
                        refused = error
                        raise
            except RuntimeError as error:
                # A capture that cannot be ended leaves the thread on its stream, and hides the error of the step.
                torch.cuda.set_stream(current)
                raise (refused or error) from None
        self._graphs.add(graph)

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay


@dataclass(frozen=True)
class Buffers:
    """Tensors that a captured step reads and updates; their addresses never change."""

    token_ids: torch.Tensor
    """Input, ``(rows,)``."""
    position_ids: torch.Tensor
    """Positions of the previous tokens, ``(rows, 1)``; the step adds one."""
    slot: torch.Tensor
    """Index of the previous tokens in keys and values, ``(1,)``, which is that of all rows; the step adds one."""
    padding: torch.Tensor
    """Positions without a token on the left of each row, ``(rows, 1, 1, 1)``."""
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]]
    """Keys and values, ``(rows, kv_heads, capacity, head_dim)``."""

    @property
    def capacity(self) -> int:
        """Positions of keys and values."""
        return self.layers[0][0].shape[2]

    @classmethod
    def allocate(cls, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> "Buffers":
        """Return the buffers of rows without a token, whose keys and values are given."""
        rows, device = len(layers[0][0]), layers[0][0].device

        def integers(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        return cls(integers(rows), integers(rows, 1) - 1, integers(1) - 1, integers(rows, 1, 1, 1), layers)

    def start(self, lengths: Sequence[int]) -> None:
        """Prepare steps of rows with so many cached positions. Rows beyond them have none, and repeat token 0."""
        unused = [0] * (len(self.token_ids) - len(lengths))
        num_tokens = torch.tensor([*lengths, *unused])
        self.token_ids.zero_()
        self.position_ids.copy_(num_tokens.unsqueeze(1) - 1)
        self.slot.fill_(max(lengths) - 1)
        self.padding.copy_(max(lengths) - num_tokens.view(-1, 1, 1, 1))


def static_step(model: YiVLForCausalLM, functions: DecodingFunctions, buffers: Buffers) -> torch.Tensor:
    """Return ``(rows, vocabulary)`` logits of one token per row, whose keys and values are written.

    All shapes are those of the buffers, and nothing is read by the host, so that the step can be captured.
    """
    decoder, (run_layer, run_head) = model.model, functions
    hidden = decoder.embed_tokens(buffers.token_ids)
    buffers.position_ids.add_(1)
    buffers.slot.add_(1)
    cos, sin = decoder.rotary_emb(hidden, buffers.position_ids)
    positions = torch.arange(buffers.capacity, device=hidden.device)
    mask = (positions >= buffers.padding) & (positions <= buffers.slot)
    for layer, (keys, values) in zip(decoder.layers, buffers.layers, strict=True):
        hidden = run_layer(layer, hidden, cos, sin, keys, values, mask, buffers.slot)
    return run_head(decoder.norm, model.lm_head, hidden)


def graph_size(num_rows: int, num_positions: int) -> tuple[int, int]:
    """Return rows and capacity of the graph for so many rows and positions."""
    # Rows are rounded up to a power of two: requests join and leave all the time.
    return 1 << (num_rows - 1).bit_length(), -(-num_positions // BUCKET) * BUCKET


def warm_up(model: YiVLForCausalLM, functions: DecodingFunctions, rows: int, capacity: int) -> None:
    """Run a step before it is captured, which loads its kernels, on buffers of its own; all layers share them."""
    shape, weight = _cache_shape(model, rows, capacity), model.model.embed_tokens.weight
    layers = [(weight.new_zeros(shape), weight.new_zeros(shape))] * model.config.num_hidden_layers
    buffers = Buffers.allocate(layers)
    for _ in range(2):
        static_step(model, functions, buffers)


def _cache_shape(model: YiVLForCausalLM, rows: int, capacity: int) -> tuple[int, int, int, int]:
    """Return the shape of the keys of a layer."""
    return rows, model.config.num_key_value_heads, capacity, model.config.head_dim


def can_capture(model: YiVLForCausalLM) -> bool:
    """Return whether the decoding steps of a model can be captured: they must not wait for a result of the device."""
    # LLM.int8() looks for outliers in each input; these position embeddings are re-computed at some lengths.
    reads_results = getattr(model, "is_loaded_in_8bit", False) or model.model.rotary_emb.rope_type in (
        "dynamic",
        "longrope",
    )
    return supports(model) and not reads_results


@dataclass(frozen=True)
class _Graph:
    buffers: Buffers
    replay: Replay


class DecodingGraphs:
    """The captured decoding steps of a model, by number of rows and capacity, and the memory of their cache.

    The steps of one batch at a time have their keys and values in this memory; those of another move there before its
    next step. For one thread at a time. The model must not be changed afterwards.

    Args:
        model: A model that ``can_capture`` accepts.
        functions: Functions of a layer and of the head.
        capture: Captures a step.
    """

    def __init__(self, model: YiVLForCausalLM, functions: DecodingFunctions, capture: Capture) -> None:
        self._model, self._functions, self._capture = model, functions, capture
        self.is_refused = False
        """Whether CUDA refused to capture a step; no other one is tried then."""
        self.num_left = 0
        """Batches that were continued without graphs."""
        self.clear()

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values."""
        return sum(keys.nbytes + values.nbytes for keys, values in self._storage)

    def clear(self) -> None:
        """Drop all graphs and their memory, apart from what a cache refers to."""
        self._graphs = OrderedDict[tuple[int, int], _Graph]()
        self._storage: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._owner: Callable[[], Cache | None] = lambda: None

    def owns(self, cache: Cache) -> bool:
        """Return whether the keys and values in the memory of the graphs are those of this cache."""
        return self._owner() is cache

    def adopt(self, cache: Cache, lengths: Sequence[int]) -> _Graph:
        """Move a cache to the memory of the graphs and return the graph of its next steps.

        Args:
            cache: Keys and values, padded on the left.
            lengths: Cached positions of each row, without padding.
        """
        if not self.owns(cache):
            self._release()
        graph = self.prepare(len(lengths), max(lengths) + 1)
        for cached, (keys, values) in zip(cache.layers, graph.buffers.layers, strict=True):
            cached.keys = _move(cached.keys, keys)  # one by one: memory may run out in between
            cached.values = _move(cached.values, values)
        graph.buffers.start(lengths)
        self._owner = weakref.ref(cache)
        return graph

    def prepare(self, num_rows: int, num_positions: int) -> _Graph:
        """Return the graph for so many rows and positions; it is captured if there is none."""
        size = rows, capacity = graph_size(num_rows, num_positions)
        self._reserve(rows * capacity)
        graph = self._graphs.pop(size, None)
        if graph is None:
            if len(self._graphs) >= MAX_GRAPHS:
                self._graphs.popitem(last=False)
            warm_up(self._model, self._functions, *size)
            graph = self._capture_step(*size)
        self._graphs[size] = graph
        return graph

    def _capture_step(self, rows: int, capacity: int) -> _Graph:
        shape = _cache_shape(self._model, rows, capacity)
        layers = [
            (keys[: math.prod(shape)].view(shape), values[: math.prod(shape)].view(shape))
            for keys, values in self._storage
        ]
        buffers = Buffers.allocate(layers)
        return _Graph(buffers, self._capture(lambda: static_step(self._model, self._functions, buffers)))

    def _reserve(self, num_positions: int) -> None:
        """Have memory for so many positions in all rows together; graphs of smaller memory are dropped."""
        config = self._model.config
        if self._storage and math.prod(_cache_shape(self._model, 1, num_positions)) <= self._storage[0][0].numel():
            return
        # At least the whole context of one row, and more than needed, so that it does not grow in each bucket.
        context = graph_size(1, config.max_position_embeddings)[1]
        num_positions = max(context, num_positions + num_positions // 4)
        self.clear()
        size, weight = math.prod(_cache_shape(self._model, 1, num_positions)), self._model.model.embed_tokens.weight
        self._storage = [(weight.new_zeros(size), weight.new_zeros(size)) for _ in range(config.num_hidden_layers)]

    def _release(self) -> None:
        """Give the cache that is in the memory of the graphs memory of its own."""
        cache = self._owner()
        if cache is None:
            return
        for cached, flats in zip(cache.layers, self._storage, strict=False):
            cached.keys, cached.values = (
                states.clone() if _share_memory(states, flat) else states
                for states, flat in zip((cached.keys, cached.values), flats, strict=True)
            )
        self._owner = lambda: None


def _share_memory(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def _move(states: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Return the view of a buffer that holds the states."""
    rows, length = len(states), states.shape[2]
    if _share_memory(states, buffer):
        states = states.clone()
    buffer.zero_()  # masked positions must be finite, too: their weight 0 times NaN is NaN
    filled = buffer[:rows, :, :length]
    filled.copy_(states)
    return filled


class GraphStep:
    """The decoding steps of one batch as ``DecodingStep``, which takes over if memory or a capture fails.

    Args:
        loaded: A model with ``decoding_graphs``.
        lengths: Cached positions of each row, without the padding on the left.
    """

    def __init__(self, loaded: LoadedModel, lengths: Sequence[int]) -> None:
        assert isinstance(loaded.decoding_graphs, DecodingGraphs)
        self._loaded, self._graphs, self._lengths = loaded, loaded.decoding_graphs, list(lengths)
        self._graph: _Graph | None = None
        self._eager: DecodingStep | None = None

    def __call__(self, token_ids: Sequence[int], cache: Cache) -> torch.Tensor:
        """Append one token per row to the cache and return ``(rows, vocabulary)`` logits."""
        graph = self._prepare(cache)
        if graph is None:
            self._eager = self._eager or DecodingStep(self._loaded, self._lengths)
            return self._eager(token_ids, cache)
        rows, length = len(token_ids), max(self._lengths) + 1
        graph.buffers.token_ids[:rows].copy_(torch.tensor(token_ids))
        logits = graph.replay()[:rows].clone()  # the next replay of any graph overwrites it
        for cached, (keys, values) in zip(cache.layers, graph.buffers.layers, strict=True):
            cached.keys, cached.values = keys[:rows, :, :length], values[:rows, :, :length]
        self._lengths = [past + 1 for past in self._lengths]
        return logits

    def _prepare(self, cache: Cache) -> _Graph | None:
        """Return the graph of the next step, whose memory the cache is in; ``None`` if there is none."""
        if self._eager is not None or self._graphs.is_refused:
            return None
        graph = self._graph
        if graph is None or not self._graphs.owns(cache) or max(self._lengths) == graph.buffers.capacity:
            try:
                self._graph = self._graphs.adopt(cache, self._lengths)
            except (RuntimeError, MemoryError) as error:  # of CUDA; an error of the model itself is raised again below
                self._graphs.is_refused = not is_out_of_memory(error)
                self._graphs.num_left += 1
                logger.warning("decoding without CUDA graphs: %s", next(iter(str(error).splitlines()), ""))
                self._graph = None
                self._graphs.clear()
        return self._graph
