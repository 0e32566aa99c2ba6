"""Attention in blocks computes what SDPA computes in float32, and leaves to SDPA what it cannot compute."""

import dataclasses
from typing import Any

import pytest
import torch
from PIL import Image
from support.golden import CHECKPOINT
from torch import nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel, StaticCache

from yivl.checkpoint.loading import load_model
from yivl.checkpoint.support import Dtype
from yivl.inference.chat import Chat
from yivl.inference.kv_cache import make_cache
from yivl.model.block_attention import QUERIES, block_attention, block_sdpa, is_faster, register_block_sdpa


@pytest.fixture(autouse=True)
def _in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in blocks on any CPU and in any dtype, which is how they are compared; the choice has a test."""
    monkeypatch.setattr("yivl.model.block_attention.is_faster", lambda dtype: True)


class Module(nn.Module):
    def __init__(self, is_causal: bool, num_key_value_groups: int) -> None:
        super().__init__()
        self.is_causal, self.num_key_value_groups = is_causal, num_key_value_groups


def states(
    heads: int, key_value_heads: int, seq: int, past: int = 0, head_dim: int = 16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query, key and value of two rows in the memory layout of the model: heads after positions."""
    torch.manual_seed(0)
    shapes = ((heads, seq), (key_value_heads, past + seq), (key_value_heads, past + seq))
    return tuple(torch.randn(2, length, number, head_dim).mul_(2).transpose(1, 2) for number, length in shapes)  # type: ignore[return-value]


def expected(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """Return attention in float64 with an explicit mask, ``(batch, seq, heads, head_dim)``."""
    seq, total = query.shape[2], key.shape[2]
    visible = torch.ones(seq, total, dtype=torch.bool)
    mask = visible.tril(total - seq) if is_causal else visible
    groups = query.shape[1] // key.shape[1]
    key, value = (states.double().repeat_interleave(groups, dim=1) for states in (key, value))
    return functional.scaled_dot_product_attention(query.double(), key, value, attn_mask=mask).transpose(1, 2)


SHAPES = [
    (4, 2, 2 * QUERIES + 7, 0),
    (4, 4, QUERIES, 0),
    (6, 2, QUERIES + 1, 50),
    (2, 1, 5, 3 * QUERIES),
]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_equal_attention_in_float64(shape: tuple[int, int, int, int], is_causal: bool) -> None:
    query, key, value = states(*shape)
    with torch.no_grad():
        output, _ = block_sdpa(Module(is_causal, shape[0] // shape[1]), query, key, value, None)
    torch.testing.assert_close(output.double(), expected(query, key, value, is_causal), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_causal", [True, False])
def test_blocks_in_16_bits_are_as_close_to_float64_as_eager_attention(is_causal: bool, dtype: torch.dtype) -> None:
    query, key, value = (tensor.to(dtype) for tensor in states(4, 4, 2 * QUERIES + 7))
    exact = expected(query, key, value, is_causal)
    scores = query @ key.transpose(2, 3) * 16**-0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool).triu(1), -torch.inf)
    eager = (scores.softmax(-1, dtype=torch.float32).to(dtype) @ value).transpose(1, 2)
    with torch.no_grad():
        blocks, _ = block_sdpa(Module(is_causal, 1), query, key, value, None)
    assert (blocks - exact).norm() <= 1.1 * (eager - exact).norm()


@pytest.mark.parametrize(
    ("dtype", "is_native", "found", "expected"),
    [
        ("bfloat16", True, {}, True),
        ("bfloat16", True, {"amx_bf16": True}, False),
        ("bfloat16", False, {}, False),
        ("float32", True, {}, False),
    ],
)
def test_a_cpu_with_bfloat16_products_computes_prompts_in_blocks(
    dtype: Dtype, is_native: bool, found: dict[str, bool], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[bool]()
    monkeypatch.setattr("yivl.model.block_attention.is_faster", is_faster)
    monkeypatch.setattr("yivl.model.block_attention.has_native_bfloat16", lambda: is_native)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(
        "yivl.model.block_attention.block_attention",
        lambda *states, is_causal: (calls.append(is_causal), block_attention(*states, is_causal=is_causal))[1],
    )
    loaded = load_model(CHECKPOINT, device="cpu", dtype="float32")
    # Callers cast the loaded model.
    Chat(dataclasses.replace(loaded, model=loaded.model.to(getattr(torch, dtype)))).ask(
        "What is this?", Image.new("RGB", (64, 64)), temperature=0, max_new_tokens=1
    )
    assert set(calls) == ({True, False} if expected else set())
    eager = load_model(CHECKPOINT, device="cpu", dtype=dtype, attn_implementation="eager").model
    assert eager.config._attn_implementation == "eager"


def test_gradients_masks_and_single_queries_are_left_to_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yivl.model.block_attention.block_attention", None)  # a call would raise
    query, key, value = states(4, 2, 6)
    block_sdpa(Module(True, 2), query, key, value, None)
    with torch.no_grad():
        block_sdpa(Module(True, 2), query, key, value, torch.ones(2, 1, 6, 6, dtype=torch.bool))
        block_sdpa(Module(True, 2), query[:, :, -1:], key, value, None)
        with pytest.raises(TypeError):
            block_sdpa(Module(True, 2), query, key, value, None)


def decoders() -> tuple[LlamaModel, LlamaModel]:
    """Return two Llama decoders with the same weights, with SDPA and with attention in blocks."""
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    torch.manual_seed(0)
    config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5)
    plain = LlamaModel._from_config(config, attn_implementation="sdpa")
    blocks = LlamaModel._from_config(config, attn_implementation=register_block_sdpa())
    blocks.load_state_dict(plain.state_dict())
    return plain.eval(), blocks.eval()


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("padding", [0, 3])
def test_a_decoder_gives_the_states_of_sdpa_for_whole_prompts_parts_and_padding(padding: int, gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        check_parts(padding)


def check_parts(padding: int) -> None:
    plain, blocks = decoders()
    ids = torch.randint(50, (2, QUERIES + 20))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    ours, theirs = make_cache(), make_cache()
    for start, stop in ((0, 60), (60, QUERIES + 19), (QUERIES + 19, QUERIES + 20)):
        given = {"attention_mask": mask[:, :stop] if padding else None}
        expected = plain(ids[:, start:stop], past_key_values=theirs, use_cache=True, **given).last_hidden_state
        output = blocks(ids[:, start:stop], past_key_values=ours, use_cache=True, **given).last_hidden_state
        visible = mask[:, start:stop].bool()
        torch.testing.assert_close(output[visible], expected[visible], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_static_cache_is_not_attended_to_beyond_its_filled_part() -> None:
    plain, blocks = decoders()
    ids = torch.randint(50, (1, 20))
    caches = [StaticCache(config=model.config, max_cache_len=40) for model in (plain, blocks)]
    for start, stop in ((0, 12), (12, 20)):
        expected, output = (
            model(ids[:, start:stop], past_key_values=cache).last_hidden_state
            for model, cache in zip((plain, blocks), caches, strict=True)
        )
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
