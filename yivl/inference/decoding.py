"""One decoding step: the next logits of a batch whose keys and values are cached.

Only for one new token per row; prompts go through the forward method of the model, as do all steps of models that
``supports`` excludes.
"""

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Final

import torch
from torch.nn import functional
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    rotate_half,
)

from yivl.inference.kv_cache import ROOM, GrowingLayer
from yivl.model.modeling import YiVLForCausalLM, YiVLModel


def supports(model: YiVLForCausalLM) -> bool:
    """Return whether the step computes what the forward method of the model does.

    The step replaces the forward methods of the decoder, its layers and their attention, so these must be those of
    transformers, with SDPA, and without hooks: accelerate moves activations between devices in hooks. All other
    modules are called, so that LoRA and quantized layers are supported.
    """
    layers = model.model.layers
    replaced: list[tuple[torch.nn.Module, type]] = [(model, YiVLForCausalLM), (model.model, YiVLModel)]
    replaced += [(layer, LlamaDecoderLayer) for layer in layers]
    replaced += [(layer.self_attn, LlamaAttention) for layer in layers]
    return (
        model.config._attn_implementation == "sdpa"
        and not model.training
        and all(type(module) is kind and _is_unmodified(module) for module, kind in replaced)
    )


def _is_unmodified(module: torch.nn.Module) -> bool:
    # accelerate, peft and transformers' kernels replace the method of single modules.
    return "forward" not in vars(module) and not module._forward_hooks and not module._forward_pre_hooks


def decode_layer(
    layer: LlamaDecoderLayer,
    hidden: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Return the output of a decoder layer for one token per row, ``(rows, hidden)``.

    Args:
        layer: The layer.
        hidden: Its input, ``(rows, hidden)``.
        cos: Of the rotary position embeddings, ``(rows, 1, head_dim)``.
        sin: As ``cos``.
        keys: ``(rows, kv_heads, positions, head_dim)``; the last position is written.
        values: As ``keys``.
        mask: ``(rows, 1, 1, positions)``, false at padding; ``None`` if there is none.
    """
    attention, (rows, kv_heads, _, head_dim) = layer.self_attn, keys.shape
    states = layer.input_layernorm(hidden)
    query = attention.q_proj(states).view(rows, -1, head_dim)
    key = attention.k_proj(states).view(rows, kv_heads, head_dim)
    keys[:, :, -1] = key * cos + rotate_half(key) * sin
    values[:, :, -1] = attention.v_proj(states).view(rows, kv_heads, head_dim)
    query = query * cos + rotate_half(query) * sin
    # The query heads that share keys become rows of one matrix, so that each key is read once.
    query = query.view(rows, kv_heads, -1, head_dim)
    states = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=attention.scaling)
    hidden = hidden + attention.o_proj(states.reshape(rows, -1))
    output: torch.Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return output


class DecodingStep:
    """The decoding steps of one batch; another batch needs another one.

    Args:
        model: A model that ``supports`` accepts.
        lengths: Cached positions of each row, without the padding on the left.
    """

    def __init__(self, model: YiVLForCausalLM, lengths: Sequence[int]) -> None:
        self._model = model
        self._position_ids = torch.tensor(lengths, device=model.device).unsqueeze(1) - 1
        self._num_positions = max(lengths)
        self._padding = self._num_positions - torch.tensor(lengths, device=model.device).view(-1, 1, 1, 1)
        self._mask = self._padding[..., :0] < 0 if min(lengths) < self._num_positions else None

    def __call__(self, token_ids: Sequence[int], cache: Cache) -> torch.Tensor:
        """Append one token per row to the cache and return ``(rows, vocabulary)`` logits."""
        decoder, num_rows = self._model.model, len(token_ids)
        self._num_positions += 1
        hidden = decoder.embed_tokens(torch.tensor(token_ids, device=self._position_ids.device))
        self._position_ids += 1
        cos, sin = decoder.rotary_emb(hidden, self._position_ids)
        mask = self._visible()
        is_matrix_vector = num_rows == 1 and hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu"
        with native_matrix_vector if is_matrix_vector else nullcontext():
            for layer, cached in zip(decoder.layers, cache.layers, strict=True):
                assert isinstance(cached, GrowingLayer)
                cached.extend()
                hidden = decode_layer(layer, hidden, cos, sin, cached.keys, cached.values, mask)
            logits: torch.Tensor = self._model.lm_head(decoder.norm(hidden))
        return logits

    def _visible(self) -> torch.Tensor | None:
        """Return the mask of all positions, which is computed for the next ``ROOM`` ones at a time."""
        if self._mask is None:
            return None
        if self._mask.shape[-1] < self._num_positions:
            self._mask = torch.arange(self._num_positions + ROOM, device=self._mask.device) >= self._padding
        return self._mask[..., : self._num_positions]


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
