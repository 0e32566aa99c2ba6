"""A stand-in for the flash-attn package: its functions with the checks of its kernels, computed by SDPA.

transformers calls it as it would call the package, on any device.
"""

import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import modeling_flash_attention_utils as library

MAX_HEAD_DIM = 256
"""Source: Dao-AILab/flash-attention, README.md, FlashAttention-2."""


@dataclass(frozen=True)
class Call:
    """One call of a kernel."""

    query: torch.Size
    key: torch.Size
    is_causal: bool
    ends: list[int] | None
    """``cu_seqlens_q``; ``None`` for rows of one length."""
    key_ends: list[int] | None
    longest: tuple[int, int] | None
    """``max_seqlen_q`` and ``max_seqlen_k``."""


def install(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Let transformers find the stand-in; return the list that its calls are appended to."""
    calls: list[Call] = []

    def flash_attn_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        deterministic: bool = False,
    ) -> torch.Tensor:
        _check(q, k, v, dropout_p)
        calls.append(Call(q.shape, k.shape, causal, None, None, None))
        return torch.stack([_attend(*row, softmax_scale, causal) for row in zip(q, k, v, strict=True)])

    def flash_attn_varlen_func(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        deterministic: bool = False,
    ) -> torch.Tensor:
        _check(q, k, v, dropout_p)
        for ends, states, longest in ((cu_seqlens_q, q, max_seqlen_q), (cu_seqlens_k, k, max_seqlen_k)):
            assert (ends.dtype, ends.device, ends.is_contiguous()) == (torch.int32, q.device, True)
            assert (int(ends[0]), int(ends[-1])) == (0, len(states))
            assert int(ends.diff().max()) <= longest  # the kernel does not compute what exceeds it
        assert len(cu_seqlens_q) == len(cu_seqlens_k)
        calls.append(
            Call(q.shape, k.shape, causal, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), (max_seqlen_q, max_seqlen_k))
        )
        lengths, key_lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        rows = zip(q.split(lengths), k.split(key_lengths), v.split(key_lengths), strict=True)
        return torch.cat([_attend(*row, softmax_scale, causal) for row in rows])

    def flash_attn_with_kvcache(*_: Any, **__: Any) -> torch.Tensor:
        raise AssertionError("nothing here uses a paged cache")

    package, padding = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    package.__spec__ = ModuleSpec("flash_attn", None)  # transformers looks for the package, once in a process
    vars(package).update(
        flash_attn_func=flash_attn_func,
        flash_attn_varlen_func=flash_attn_varlen_func,
        flash_attn_with_kvcache=flash_attn_with_kvcache,
    )
    vars(padding).update(pad_input=library._pad_input, unpad_input=library._unpad_input)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(library, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(library, "is_flash_attn_4_available", lambda: False)
    monkeypatch.setitem(library.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2], "general_availability_check", lambda: True)
    monkeypatch.setattr(library, "_loaded_implementation", None)
    return calls


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float) -> None:
    """Check what the kernels of the package check."""
    assert query.dtype in (torch.float16, torch.bfloat16)
    assert query.dtype == key.dtype == value.dtype
    assert query.device == key.device == value.device
    assert key.shape == value.shape
    assert query.shape[-1] == key.shape[-1] <= MAX_HEAD_DIM
    assert query.shape[-2] % key.shape[-2] == 0
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert not dropout


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None, causal: bool
) -> torch.Tensor:
    """Return the attention outputs of one row, ``(length, heads, head_dim)``; the last query has the last position."""
    length, total = len(query), len(key)
    is_filled = length == total
    mask = None
    if causal and not is_filled:
        mask = torch.ones(length, total, dtype=torch.bool, device=query.device).tril(total - length)
    output = functional.scaled_dot_product_attention(
        *(states.transpose(0, 1)[None] for states in (query, key, value)),
        attn_mask=mask,
        is_causal=causal and is_filled,
        scale=scale,
        enable_gqa=True,
    )
    return output[0].transpose(0, 1)
