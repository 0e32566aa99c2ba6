"""The decoder layer computes what that of transformers computes, and saves less for the backward pass."""

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from yivl.model.decoder import DecoderLayer
from yivl.model.loss import BLOCK_SIZE, cross_entropy_sum
from yivl.model.packed_linear import Linear8

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": "sdpa",
}


def layers(**changes: Any) -> tuple[LlamaDecoderLayer, DecoderLayer]:
    """Return a layer of transformers and ours, with the same weights, in training mode."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE | changes)
    theirs, ours = LlamaDecoderLayer(config, 0), DecoderLayer(config, 0)
    for name, weight in theirs.named_parameters():
        torch.nn.init.normal_(weight, std=0.2) if "norm" not in name else torch.nn.init.uniform_(weight, 0.5, 1.5)
    assert ours.load_state_dict(theirs.state_dict()) == ([], [])
    return theirs.train(), ours.train()


def autocast(enabled: bool = True) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def results(layer: LlamaDecoderLayer, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Return the output, and the gradients of the input and of the trainable parameters."""
    torch.manual_seed(1)
    hidden = torch.randn(2, 9, 64, dtype=dtype, requires_grad=True)
    positions = LlamaRotaryEmbedding(LlamaConfig(**SHAPE))(hidden, torch.arange(9)[None])
    output = layer(hidden, position_embeddings=positions)
    inputs = [hidden, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    return [output, *torch.autograd.grad(output, inputs, torch.randn_like(output))]


@pytest.mark.parametrize("frozen", ["", "norm", "proj"])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_output_and_gradients_are_those_of_transformers(frozen: str, activation: str) -> None:
    theirs, ours = layers(hidden_act=activation)
    for layer in (theirs, ours):
        for name, parameter in layer.named_parameters():
            parameter.requires_grad = not frozen or frozen not in name
    expected, found = results(theirs), results(ours)
    torch.testing.assert_close(found[0], expected[0], atol=0, rtol=0)
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_is_as_near_to_float32_as_that_of_transformers(dtype: torch.dtype) -> None:
    theirs, ours = layers()
    exact = results(theirs)
    with autocast(dtype == torch.float32):  # mixed precision, or weights in bfloat16
        found, others = results(ours.to(dtype), dtype), results(theirs.to(dtype), dtype)
    for gradient, other, expected in zip(found, others, exact, strict=True):
        error, their_error = (torch.dist(value.float(), expected) for value in (gradient, other))
        assert error <= 1.2 * their_error + 1e-3 * expected.norm()


def test_without_gradients_the_norm_is_that_of_transformers() -> None:
    theirs, ours = layers()
    hidden = torch.randn(1, 5, 64)
    with torch.no_grad(), autocast():
        assert torch.equal(ours.input_layernorm(hidden), theirs.input_layernorm(hidden))
        assert ours.input_layernorm(hidden).dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_the_mlp_is_that_of_transformers_and_keeps_its_input(
    activation: str, dtype: torch.dtype
) -> None:
    theirs, ours = (layer.to(dtype) for layer in layers(hidden_act=activation))
    hidden = torch.randn(2, 5, 64, dtype=dtype)
    before = hidden.clone()
    torch.testing.assert_close(ours.mlp(hidden), theirs.mlp(hidden))
    assert torch.equal(hidden, before)


def test_the_weight_of_a_quantized_layer_is_not_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = layers()
    ours.mlp.down_proj = Linear8(ours.mlp.down_proj, torch.float32)
    hidden = torch.randn(1, 5, 64)
    with torch.no_grad():
        expected = ours.mlp(hidden)
    monkeypatch.setattr(Linear8, "_dequantized", lambda *_: pytest.fail("dequantized"))
    torch.testing.assert_close(ours.mlp(hidden), expected)


def test_a_second_derivative_is_refused() -> None:
    _, ours = layers()
    for module in (ours.input_layernorm, ours.mlp):
        hidden = torch.randn(1, 5, 64, requires_grad=True)
        (gradient,) = torch.autograd.grad(module(hidden).square().sum(), hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def saved_bytes(layer: LlamaDecoderLayer) -> int:
    """Return the bytes of the activations that a forward pass saves."""
    weights = {weight.untyped_storage().data_ptr() for weight in layer.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hidden = torch.randn(1, 2000, 64, requires_grad=True)
    positions = LlamaRotaryEmbedding(LlamaConfig(**SHAPE))(hidden, torch.arange(2000)[None])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast():
        layer(hidden, position_embeddings=positions)
    return sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in weights)


def test_less_is_saved_for_the_backward_pass() -> None:
    theirs, ours = layers()
    assert saved_bytes(ours) < 0.65 * saved_bytes(theirs)


@pytest.mark.parametrize("count", [0, 1, BLOCK_SIZE, 2 * BLOCK_SIZE + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_in_blocks_is_that_of_pytorch(count: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(count, 50)).to(dtype).requires_grad_()
    targets = torch.randint(50, (count,))
    found = cross_entropy_sum(logits, targets)
    expected = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    (gradient,), (other,) = (torch.autograd.grad(loss / 7, logits) for loss in (found, expected))
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, other)
