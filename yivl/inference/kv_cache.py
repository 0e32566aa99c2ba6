"""Key-value caches: buffers with spare room for decoding, and the prefixes that requests share."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from transformers.cache_utils import Cache, DynamicLayer

from yivl.model.configuration import YiVLConfig

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

    def extend(self) -> None:
        """Append one position to a filled layer, which the caller writes."""
        shape = (*self.keys.shape[:2], 1, self.keys.shape[-1])
        self.keys, self.values = _extend(self.keys, self.keys, shape), _extend(self.values, self.values, shape)


def _append(filled: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Return ``filled`` followed by ``new`` along the positions, in place where the buffer has room."""
    total = _extend(filled, new, new.shape)
    total[:, :, -new.shape[-2] :] = new
    return total


def _extend(filled: torch.Tensor, like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return ``filled`` followed by positions of ``shape`` without values, in place where the buffer has room."""
    past = filled.shape[-2] if filled.numel() else 0
    batch, heads, added, head_dim = shape
    total = past + added
    # The stride gives the room of a buffer only for views that start at its beginning.
    capacity = filled.stride(1) // head_dim if past and not filled.storage_offset() else 0
    # Not up to the last position: a full buffer is contiguous, for which compiled code does not hold.
    if total < capacity:
        return filled.as_strided((batch, heads, total, head_dim), filled.stride())
    buffer = like.new_empty(batch, heads, total + max(ROOM, total // 4), head_dim)
    if past:
        buffer[:, :, :past] = filled
    return buffer[:, :, :total]


def make_cache() -> Cache:
    """Return an empty cache; layers are added as the decoder fills them."""
    return Cache(layer_class_to_replicate=GrowingLayer)


def context_bytes(config: YiVLConfig) -> int:
    """Return the memory of the keys and values of a whole context, in bytes, in float32."""
    num_values: int = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return 4 * num_values * int(config.max_position_embeddings)


Layers = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, ``(1, kv_heads, positions, head_dim)``."""


@dataclass(eq=False)
class _Node:
    """Positions that follow those of the parent; the children begin with different keys.

    It does not refer to its parent: a reference cycle would keep the memory until Python looks for cycles.
    """

    keys: list[int]
    layers: Layers
    children: dict[int, "_Node"] = field(default_factory=dict)
    """By their first key."""

    @property
    def num_bytes(self) -> int:
        return sum(states.nbytes for pair in self.layers for states in pair)


class PrefixStore:
    """Keys and values of recent requests, for the prefixes that later requests share with them.

    A tree of key sequences, so that what several requests share is stored once. A request gets a copy: one prefix
    serves many requests at a time, and a failed one leaves no invalid entries. The least recently used positions are
    dropped first. For one thread at a time.

    Args:
        max_bytes: Limit of the memory; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.clear()

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values."""
        return self._num_bytes

    def clear(self) -> None:
        """Drop everything."""
        self._root = _Node([], [])
        # The parent of each node, from the least to the most recently used node. A parent comes after its children,
        # so the first node is a leaf.
        self._parents: OrderedDict[_Node, _Node] = OrderedDict()
        self._num_bytes = 0

    def take(self, keys: Sequence[int]) -> tuple[Cache, int]:
        """Return a new cache that holds the longest stored prefix, and the length of it.

        Args:
            keys: What each position of the prompt holds. The last one is always left to be computed: its logits
                choose the first token.
        """
        cache, length = make_cache(), 0
        path = self._find(keys[:-1])
        for node, shared in path:
            for index, states in enumerate(node.layers):
                cache.update(*(part[:, :, :shared] for part in states), index)
            length += shared
        self._touch(path[-1][0] if path else self._root)
        return cache, length

    def put(self, keys: Sequence[int], layers: Layers) -> None:
        """Store copies of the positions that are not stored yet.

        Args:
            keys: What each position holds.
            layers: Keys and values of these positions.
        """
        num_bytes = sum(states.nbytes for pair in layers for states in pair)
        if num_bytes > self._max_bytes:
            return
        path = self._find(keys)
        node, length = self._root, 0
        for found, shared in path:
            node, length = found, length + shared
        if length == len(keys):
            self._touch(node)
            return
        if path and path[-1][1] < len(node.keys):
            node = self._split(node, path[-1][1])
        self._touch(node)  # the nodes on the path are dropped last
        added = num_bytes // len(keys) * (len(keys) - length)
        while self._num_bytes + added > self._max_bytes:
            self._drop(next(iter(self._parents)))
        leaf = _Node(list(keys[length:]), _copy(layers, length, len(keys)))
        node.children[keys[length]], self._parents[leaf] = leaf, node
        self._num_bytes += leaf.num_bytes
        self._touch(leaf)

    def _find(self, keys: Sequence[int]) -> list[tuple[_Node, int]]:
        """Return the nodes that hold the longest common prefix, and how many positions of each belong to it."""
        path, node, length = [], self._root, 0
        while length < len(keys) and (child := node.children.get(keys[length])):
            shared = 0
            for stored, wanted in zip(child.keys, keys[length:], strict=False):
                if stored != wanted:
                    break
                shared += 1
            path.append((child, shared))
            node, length = child, length + shared
            if shared < len(child.keys):
                break
        return path

    def _split(self, node: _Node, length: int) -> _Node:
        """Move the first positions of a node to a new parent and return it."""
        # Copies, not views, which would keep the memory of both alive until both are dropped.
        first, rest = _copy(node.layers, 0, length), _copy(node.layers, length, len(node.keys))
        head, parent = _Node(node.keys[:length], first), self._parents[node]
        node.keys, node.layers = node.keys[length:], rest
        head.children[node.keys[0]], self._parents[node] = node, head
        parent.children[head.keys[0]], self._parents[head] = head, parent
        return head

    def _touch(self, node: _Node) -> None:
        """Mark a node and its ancestors as the most recently used."""
        while node is not self._root:
            self._parents.move_to_end(node)
            node = self._parents[node]

    def _drop(self, leaf: _Node) -> None:
        del self._parents.pop(leaf).children[leaf.keys[0]]
        self._num_bytes -= leaf.num_bytes


def _copy(layers: Layers, start: int, end: int) -> Layers:
    """Return copies of some positions."""
    return [
        (
            keys[:, :, start:end].clone(memory_format=torch.contiguous_format),
            values[:, :, start:end].clone(memory_format=torch.contiguous_format),
        )
        for keys, values in layers
    ]
