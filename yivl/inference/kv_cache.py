"""A key-value cache with room to grow, so that a step writes one position instead of copying them all."""

from typing import Any, Final

import torch
from transformers.cache_utils import Cache, DynamicLayer

ROOM: Final = 256
"""Positions of spare room when a buffer is allocated: 0.5 MB per layer for Yi-VL-6B in bfloat16. Source: ours."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer; what the library sees are views of the filled part of larger buffers.

    Everything the library does to ``keys`` and ``values`` (crop, reorder, select) stays valid: how much room is left
    is read off the view itself, and a tensor without room is moved to a new buffer. For inference only: positions are
    written in place.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append ``(batch, kv_heads, new, head_dim)`` states and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = _append(self.keys, key_states)
        self.values = _append(self.values, value_states)
        return self.keys, self.values


def _append(filled: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return ``filled`` followed by ``new`` along the positions, in place where the buffer has room."""
    past = filled.shape[-2] if filled.numel() else 0
    batch, heads, added, head_dim = new.shape
    total = past + added
    # Room can follow a view only if it starts where its buffer does.
    capacity = filled.stride(1) // head_dim if past and not filled.storage_offset() else 0
    if total <= capacity:
        buffer = filled.as_strided((batch, heads, capacity, head_dim), filled.stride())
    else:
        buffer = new.new_empty(batch, heads, total + max(ROOM, total // 4), head_dim)
        if past:
            buffer[:, :, :past] = filled
    buffer[:, :, past:total] = new
    return buffer[:, :, :total]


def make_cache(num_layers: int) -> Cache:
    """Return an empty cache for a decoder of ``num_layers`` layers."""
    return Cache(layers=[GrowingLayer() for _ in range(num_layers)])
