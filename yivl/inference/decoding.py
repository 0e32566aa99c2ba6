"""One decoding step: the next logits of a batch whose keys and values are cached.

Only for one new token per row; prompts go through the forward method of the model, as do all steps of models that
``supports`` excludes.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Final, cast

import torch
from torch import nn
from torch.nn import functional
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, rotate_half
from transformers.utils import output_capturing

from yivl.checkpoint.loading import LoadedModel
from yivl.inference.kv_cache import ROOM, GrowingLayer
from yivl.model.architectures import model_class
from yivl.model.block_attention import BLOCK_SDPA
from yivl.model.decoder import MLP, DecoderLayer
from yivl.model.modeling import YiVLForCausalLM, YiVLModel

DecodingFunctions = tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]
"""``decode_layer`` and ``decode_head``, as they are or compiled."""


def supports(model: YiVLForCausalLM) -> bool:
    """Return whether the step computes what the forward method of the model does.

    The step replaces the forward methods of the decoder, its layers, and their attention and MLP, so these must be
    those of ``YiVLModel``, with SDPA, and without hooks: accelerate moves activations between devices in hooks. All
    other modules are called, so that LoRA and quantized layers are supported.
    """
    replaced: list[tuple[nn.Module, type[nn.Module]]] = [(model, model_class(model.config)), (model.model, YiVLModel)]
    for layer in cast(Iterable[DecoderLayer], model.model.layers):
        replaced += [(layer, DecoderLayer), (layer.self_attn, LlamaAttention), (layer.mlp, MLP)]
    return (
        model.config._attn_implementation in ("sdpa", BLOCK_SDPA)
        and not model.training
        and all(type(module) is kind and _is_unmodified(module) for module, kind in replaced)
    )


def _is_unmodified(module: nn.Module) -> bool:
    # accelerate, peft and transformers' kernels replace the method of single modules.
    # Hooks that record hidden states stay in a model that was asked for them once, and do nothing without a request.
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return "forward" not in vars(module) and all(hook.__module__ == output_capturing.__name__ for hook in hooks)


def decode_layer(
    layer: DecoderLayer,
    hidden: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    slot: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the output of a decoder layer for one token per row, ``(rows, hidden)``.

    Args:
        layer: The layer.
        hidden: Its input, ``(rows, hidden)``.
        cos: Of the rotary position embeddings, ``(rows, 1, head_dim)``.
        sin: As ``cos``.
        keys: ``(rows, kv_heads, positions, head_dim)``; one position is written.
        values: As ``keys``.
        mask: ``(rows, 1, 1, positions)``, false at padding; ``None`` if there is none.
        slot: The position that is written, ``(1,)``; ``None``: the last one.
    """
    attention, mlp, (rows, kv_heads, _, head_dim) = layer.self_attn, layer.mlp, keys.shape
    states = layer.input_layernorm(hidden)
    # Queries and keys are rotated together: calls take most of the time of an operation on so few numbers.
    heads = torch.cat([_project(attention.q_proj, states), _project(attention.k_proj, states)], dim=-1)
    heads = heads.view(rows, -1, head_dim)
    heads = heads * cos + rotate_half(heads) * sin
    query, key = heads[:, :-kv_heads], heads[:, -kv_heads:]
    value = _project(attention.v_proj, states).view(rows, kv_heads, head_dim)
    if slot is None:
        keys[:, :, -1], values[:, :, -1] = key, value
    else:
        keys.index_copy_(2, slot, key.unsqueeze(2))
        values.index_copy_(2, slot, value.unsqueeze(2))
    # The query heads that share keys become rows of one matrix, so that each key is read once.
    states = _attend(query.reshape(rows, kv_heads, -1, head_dim), keys, values, mask, attention.scaling)
    hidden = hidden + _project(attention.o_proj, states.reshape(rows, -1))
    states = layer.post_attention_layernorm(hidden)
    states = mlp.act_fn(_project(mlp.gate_proj, states)) * _project(mlp.up_proj, states)
    return hidden + _project(mlp.down_proj, states)


def decode_head(norm: LlamaRMSNorm, head: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Return ``(rows, vocabulary)`` logits of ``(rows, hidden)`` outputs of the last layer."""
    return _project(head, norm(hidden))


def _project(linear: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Return the output of a linear layer of any class for ``(rows, in)`` states."""
    if (
        torch.compiler.is_compiling()
        and type(linear) is nn.Linear
        and _is_unmodified(linear)
        and linear.bias is None
        and len(states) == 1
        and (states.device.type, states.dtype) == ("cpu", torch.float32)
    ):
        # The loop that is generated for it reads 1.5 times the bytes per second of MKL's product.
        return (states * linear.weight).sum(-1)[None]
    output: torch.Tensor = linear(states)
    return output


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Return the attention outputs of ``(rows, kv_heads, heads per key, head_dim)`` queries, in the same shape."""
    if not torch.compiler.is_compiling() or (query.device.type != "cpu" and len(query) > 1):
        return functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    # The loops that are generated for it are faster than the kernel for a few queries. On a GPU, the kernel has one
    # thread block per row and key head.
    scores = (query.float().unsqueeze(3) * keys.float().unsqueeze(2)).sum(-1) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1)
    return (weights.unsqueeze(-1) * values.float().unsqueeze(2)).sum(3).to(query.dtype)


class DecodingStep:
    """The decoding steps of one batch; another batch needs another one.

    Args:
        loaded: A model that ``supports`` accepts.
        lengths: Cached positions of each row, without the padding on the left.
    """

    def __init__(self, loaded: LoadedModel, lengths: Sequence[int]) -> None:
        self._model, self._functions = loaded.model, loaded.decoding_functions or (decode_layer, decode_head)
        device, num_positions = loaded.model.device, max(lengths)
        self._position_ids = torch.tensor(lengths, device=device).unsqueeze(1) - 1
        self._padding = num_positions - torch.tensor(lengths, device=device).view(-1, 1, 1, 1)
        # Compiled code has a mask for several rows, padded or not: each case takes time to compile.
        is_masked = min(lengths) < num_positions or (loaded.decoding_functions is not None and len(lengths) > 1)
        self._mask = self._padding[..., :0] < 0 if is_masked else None

    def __call__(self, token_ids: Sequence[int], cache: Cache) -> torch.Tensor:
        """Append one token per row to the cache and return ``(rows, vocabulary)`` logits."""
        decoder, (run_layer, run_head) = self._model.model, self._functions
        hidden = decoder.embed_tokens(torch.tensor(token_ids, device=self._position_ids.device))
        self._position_ids += 1
        cos, sin = decoder.rotary_emb(hidden, self._position_ids)
        mask = self._visible(cache.get_seq_length() + 1)
        is_matrix_vector = len(token_ids) == 1 and hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu"
        with native_matrix_vector if is_matrix_vector else nullcontext():
            for layer, cached in zip(decoder.layers, cache.layers, strict=True):
                assert isinstance(layer, DecoderLayer)
                assert isinstance(cached, GrowingLayer)
                cached.extend()
                hidden = run_layer(layer, hidden, cos, sin, cached.keys, cached.values, mask)
            logits: torch.Tensor = run_head(decoder.norm, self._model.lm_head, hidden)
        return logits

    def _visible(self, num_positions: int) -> torch.Tensor | None:
        """Return the mask of the first positions; it is computed for ``ROOM`` more than needed at a time."""
        if self._mask is None:
            return None
        if self._mask.shape[-1] < num_positions:
            self._mask = torch.arange(num_positions + ROOM, device=self._mask.device) >= self._padding
        return self._mask[..., :num_positions]


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
