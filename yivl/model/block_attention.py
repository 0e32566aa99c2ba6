"""Attention over a prompt or an image on a CPU, in blocks that are three large operations each."""

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from yivl.model.cpu import has_native_bfloat16

BLOCK_SDPA: Final = "sdpa_block"

QUERIES: Final = 128
"""Queries of a block of causal attention: larger blocks compute more scores that the mask hides. Source: ours."""


def is_faster(dtype: torch.dtype) -> bool:
    """Return whether attention in blocks is faster on this CPU than the fused kernel of PyTorch.

    In bfloat16 it takes half to two thirds of the time, in float32 up to half more (docs/benchmarks.md). On a CPU with
    AMX, for which the fused kernel has other tiles, the two have not been compared.
    """
    has_amx = torch.cpu.get_capabilities().get("amx_bf16")
    return dtype == torch.bfloat16 and has_native_bfloat16() and not has_amx


def register_block_sdpa() -> str:
    """Register attention in blocks in transformers and return its name for ``attn_implementation``.

    The fused CPU kernel of PyTorch multiplies small tiles, in bfloat16 at a third of the rate of a large product. With
    a mask, a single query, gradients, or a dtype that ``is_faster`` excludes, the implementation is that of ``sdpa``.
    """
    AttentionInterface.register(BLOCK_SDPA, block_sdpa)
    AttentionMaskInterface.register(BLOCK_SDPA, _causal_mask)
    return BLOCK_SDPA


def block_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return attention outputs ``(batch, seq, heads, head_dim)``.

    Args:
        module: The attention module, which says whether its attention is causal.
        query: ``(batch, heads, seq, head_dim)``.
        key: ``(batch, key_value_heads, past + seq, head_dim)``.
        value: As ``key``.
        attention_mask: ``None`` if nothing but later positions is hidden.
        scaling: Factor of the scores; by default ``head_dim**-0.5``.
        **kwargs: Of ``sdpa_attention_forward``.
    """
    if attention_mask is not None or query.shape[2] == 1 or not _in_blocks(query.dtype, query.device):
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = zip(query, key, value, strict=True)
    is_causal: bool = module.is_causal  # type: ignore[assignment]
    return torch.stack([block_attention(*row, scaling, is_causal=is_causal) for row in rows]), None


def _in_blocks(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether prompts of a model, which callers may have moved, cast or compiled, are computed in blocks."""
    is_plain = device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return is_plain and is_faster(dtype)  # the CPU cannot be asked inside of compiled code


def block_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, *, is_causal: bool
) -> torch.Tensor:
    """Return the attention outputs of one row, ``(seq, heads, head_dim)``.

    The scores are rounded to the dtype of ``query``, as in the eager attention of the reference implementation, and the
    softmax is computed in float32.

    Args:
        query: ``(heads, seq, head_dim)``.
        key: ``(key_value_heads, past + seq, head_dim)``.
        value: As ``key``.
        scaling: Factor of the scores.
        is_causal: Hide later positions; the last query has the position of the last key.
    """
    heads, length, head_dim = query.shape
    key_value_heads, total, _ = key.shape
    # Query heads that share keys become rows of one product.
    query = query.view(key_value_heads, heads // key_value_heads, length, head_dim)
    output = query.new_empty(length, *query.shape[:2], head_dim)
    hidden = torch.ones(QUERIES, QUERIES, dtype=torch.bool, device=query.device).triu(1) if is_causal else None
    for group, block, end in _blocks(key_value_heads, length, total, is_causal):
        queries = query[group, :, block]
        keys, values = key[group, :end], value[group, :end]
        rows = queries.flatten(1, 2)
        scores = rows.new_empty(*rows.shape[:2], end)
        torch.baddbmm(scores, rows, keys.transpose(1, 2), beta=0, alpha=scaling, out=scores)
        if hidden is not None:
            size = queries.shape[2]
            scores.view(*queries.shape[:3], end)[..., -size:].masked_fill_(hidden[:size, :size], -torch.inf)
        outputs = torch.bmm(scores.softmax(-1), values)
        output[block, group] = outputs.view(queries.shape).permute(2, 0, 1, 3)
    return output.flatten(1, 2)


def _blocks(key_value_heads: int, length: int, total: int, is_causal: bool) -> Iterator[tuple[slice, slice, int]]:
    """Yield key-value heads, queries, and the number of keys they attend to, of blocks of about a million scores."""
    if not is_causal:
        for head in range(key_value_heads):
            yield slice(head, head + 1), slice(length), total
        return
    for start in range(0, length, QUERIES):
        stop = min(start + QUERIES, length)
        yield slice(key_value_heads), slice(start, stop), total - length + stop


def _causal_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Return no mask where nothing but later positions is hidden, else that of ``sdpa``."""
    in_blocks = _in_blocks(dtype, device)
    is_filled = q_offset + q_length == kv_offset + kv_length  # false for a static cache
    is_padded = attention_mask is not None and not attention_mask.all()
    if in_blocks and allow_is_causal_skip and is_filled and not is_padded:
        return None
    mask: torch.Tensor = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip and not in_blocks,
        dtype=dtype,
        device=device,
        **kwargs,
    )
    return mask
