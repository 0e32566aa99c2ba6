"""Norms and MLP of the decoder layer compute without gradients what those of transformers compute."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from yivl.model.decoder import MLP, RMSNorm


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_norm_is_that_of_transformers(dtype: torch.dtype, tolerance: float, scale: float) -> None:
    torch.manual_seed(0)
    ours, theirs = (kind(96, eps=1e-5).to(dtype) for kind in (RMSNorm, LlamaRMSNorm))
    theirs.weight.copy_(torch.rand(96) + 0.5)
    ours.load_state_dict(theirs.state_dict())
    hidden = (torch.randn(2, 7, 96) * scale).to(dtype)
    before = hidden.clone()
    torch.testing.assert_close(ours(hidden), theirs(hidden), rtol=tolerance, atol=tolerance)
    assert torch.equal(hidden, before)


@torch.no_grad()
def test_a_float32_norm_of_bfloat16_states_returns_float32() -> None:
    hidden = torch.randn(3, 96).bfloat16()
    assert RMSNorm(96)(hidden).dtype == LlamaRMSNorm(96)(hidden).dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mlp_is_that_of_transformers_and_keeps_its_input(activation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, hidden_act=activation)
    ours, theirs = MLP(config).to(dtype), LlamaMLP(config).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    hidden = torch.randn(2, 5, 32, dtype=dtype)
    before = hidden.clone()
    torch.testing.assert_close(ours(hidden), theirs(hidden))
    assert torch.equal(hidden, before)
