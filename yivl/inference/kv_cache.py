"""Key-value caches: buffers with spare room for decoding, and what a conversation keeps between its requests."""

from collections.abc import Sequence
from typing import Any, Final

import torch
from transformers.cache_utils import Cache, DynamicLayer

ROOM: Final = 256
"""Spare positions of a new buffer: 0.5 MB per layer for Yi-VL-6B in bfloat16. Source: ours."""


class GrowingLayer(DynamicLayer):
    """Keys and values of one layer, exposed as views of the filled part of larger buffers.

    A decoding step writes one position instead of copying all of them. Crop, reorder and select of transformers stay
    valid: the remaining room is read off the view, and a tensor without room is moved to a new buffer. For inference
    only: positions are written in place.
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
    # The stride gives the room of a buffer only for views that start at its beginning.
    capacity = filled.stride(1) // head_dim if past and not filled.storage_offset() else 0
    if total <= capacity:
        buffer = filled.as_strided((batch, heads, capacity, head_dim), filled.stride())
    else:
        buffer = new.new_empty(batch, heads, total + max(ROOM, total // 4), head_dim)
        if past:
            buffer[:, :, :past] = filled
    buffer[:, :, past:total] = new
    return buffer[:, :, :total]


def make_cache() -> Cache:
    """Return an empty cache; layers are added as the decoder fills them."""
    return Cache(layer_class_to_replicate=GrowingLayer)


def copy_row(cache: Cache, row: int, length: int) -> Cache:
    """Return a cache that holds the last ``length`` positions of one row of a batch."""
    copy = make_cache()
    for index, layer in enumerate(cache.layers):
        copy.update(layer.keys[row : row + 1, :, -length:], layer.values[row : row + 1, :, -length:], index)
    return copy


class PrefixCache:
    """Keys and values of the latest request of a conversation, for the prefix that its next request shares with it.

    The request that takes the cache owns it until it puts it back, so one that fails leaves no invalid entries.
    """

    def __init__(self) -> None:
        self._cache: Cache | None = None
        self._keys: list[int] = []

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values, spare room included."""
        layers = self._cache.layers if self._cache is not None else []
        return sum(states.untyped_storage().nbytes() for layer in layers for states in (layer.keys, layer.values))

    def take(self, keys: Sequence[int]) -> tuple[Cache, int]:
        """Return a cache that holds the longest common prefix, and the length of it; nothing is kept here.

        Args:
            keys: What each position of the prompt holds. The last one is always left to be computed: its logits
                choose the first token.
        """
        cache, cached_keys = self._cache, self._keys
        self._cache, self._keys = None, []
        shared = 0
        for cached, wanted in zip(cached_keys, keys[:-1], strict=False):
            if cached != wanted:
                break
            shared += 1
        if cache is None or not shared:
            return make_cache(), 0
        if surplus := cache.get_seq_length() - shared:
            cache.crop(-surplus)
        return cache, shared

    def put(self, cache: Cache, keys: list[int]) -> None:
        """Keep a cache of one row whose positions hold ``keys``."""
        self._cache, self._keys = cache, keys
