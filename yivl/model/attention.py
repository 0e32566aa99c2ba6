"""Attention over packed rows: several rows in one sequence, without padding or attention between them."""

from typing import Any, Final

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PACKED_SDPA: Final = "sdpa_packed"


def register_packed_sdpa() -> str:
    """Register SDPA over packed rows in transformers and return its name for ``attn_implementation``.

    FlashAttention supports packed rows. SDPA would need a mask of all positions by all positions and compute what it
    hides; calling it once per row is less work, and no row can attend to another.
    """
    AttentionInterface.register(PACKED_SDPA, packed_sdpa)
    AttentionMaskInterface.register(PACKED_SDPA, _no_mask)
    return PACKED_SDPA


def packed_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed_lengths: list[int] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return attention outputs ``(1, seq, heads, head_dim)`` of packed rows, or those of plain ``sdpa``.

    Args:
        module: The attention module of the decoder layer.
        query: ``(1, heads, seq, head_dim)``.
        key: ``(1, key_value_heads, seq, head_dim)``.
        value: As ``key``.
        attention_mask: ``None`` for packed rows.
        packed_lengths: Sequence length of each row; ``None`` where nothing is packed (the ViT).
        **kwargs: Of ``sdpa_attention_forward``.
    """
    if packed_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    rows = zip(*(torch.split(tensor, packed_lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [sdpa_attention_forward(module, *row, None, **kwargs)[0] for row in rows]
    return torch.cat(outputs, dim=1), None


def _no_mask(*_: Any, **__: Any) -> None:
    return None
