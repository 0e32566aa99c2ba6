"""Packed linear layers: every kernel against float32 products of the dequantized weights."""

import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional

from yivl.model import packed_linear
from yivl.model.packed_linear import GROUP, Linear4, Linear8, Linear16, PackedLinear, quantize_4bit

SHAPES = [(64, 128), (176, 64), (72, 176), (1000, 1408)]
"""``(in, out)``; with the small slab below, several slabs and widths that are no multiples of a block."""


@pytest.fixture(autouse=True)
def _small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "_SLAB", 1 << 14)
    torch.manual_seed(0)


def rows_of(num_rows: int, width: int) -> torch.Tensor:
    """Random activations with an outlier, as language models have."""
    rows = torch.randn(num_rows, width)
    rows[:, 3] = 60.0
    return rows


@pytest.mark.parametrize("product_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Linear8, Linear4])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_float32(shape: tuple[int, int], kind: type[PackedLinear], product_dtype: torch.dtype) -> None:
    layer = kind(nn.Linear(*shape, bias=False), product_dtype)
    for num_rows in (1, 2, 5, 9, 40, 150):
        rows = rows_of(num_rows, shape[0])
        # Few rows are always rounded to bfloat16.
        is_exact = product_dtype == torch.float32 and num_rows > layer._few_rows()
        expected = functional.linear(rows, layer.weight)
        tolerance = 1e-5 if is_exact else 1e-2
        for dtype in (torch.float32, torch.bfloat16):
            found = layer(rows.to(dtype)[None])
            assert (found.shape, found.dtype) == ((1, num_rows, shape[1]), dtype)
            limit = (tolerance if dtype == torch.float32 else 1e-2) * expected.abs().max()
            assert (found[0].float() - expected).abs().max() <= limit


@pytest.mark.parametrize(("kind", "limit"), [(Linear8, 0.005), (Linear4, 0.07)])
def test_weights_are_within_half_a_step(kind: type[PackedLinear], limit: float) -> None:
    linear = nn.Linear(176, 200, bias=False)
    weight = kind(linear, torch.float32).weight
    error = (weight - linear.weight).abs().max() / linear.weight.abs().max()
    assert weight.shape == linear.weight.shape
    assert 0 < error <= limit


def test_an_outlier_costs_only_its_group_in_4_bits() -> None:
    linear = nn.Linear(4 * GROUP, 64, bias=False)
    nn.init.uniform_(linear.weight, -1, 1)
    with torch.no_grad():
        linear.weight[:, 0] = 50.0
    error = (Linear4(linear, torch.float32).weight - linear.weight).abs()
    assert error[:, 1:GROUP].max() > 1
    assert error[:, GROUP:].max() < 0.09


def test_constant_weights_are_kept() -> None:
    quantized, scales, zeros = quantize_4bit(torch.full((64, GROUP), 0.5))
    assert torch.equal((quantized - 8) * scales.float() + zeros.float(), torch.full((64, GROUP), 0.5))
    linear = nn.Linear(32, 64, bias=False)
    nn.init.zeros_(linear.weight)
    for kind in (Linear4, Linear8):
        assert torch.equal(kind(linear, torch.float32)(torch.ones(1, 32)), torch.zeros(1, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_16_bits_equal_float32(dtype: torch.dtype, bias: bool) -> None:
    linear = nn.Linear(176, 200, bias=bias).to(dtype)
    layer = Linear16.pack(linear)
    assert layer.state_dict().keys() == linear.state_dict().keys()
    for num_rows in (1, 3, 4, 5, 40):
        rows = rows_of(num_rows, 176) * 2000  # more than float16 holds
        expected = functional.linear(rows, linear.weight.float(), linear.bias.float() if bias else None)
        found = layer(rows)
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() <= (1e-5 if num_rows > 4 else 1e-2) * expected.abs().max()


@pytest.mark.parametrize("block", ["0x00", "0x31"])
def test_an_unknown_format_is_refused(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = torch.tensor([int(block, 16)], dtype=torch.uint8)
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack_for_cpu", lambda *_: first)
    with pytest.raises(RuntimeError, match="unknown format"):
        Linear4(nn.Linear(32, 64, bias=False), torch.float32)


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("kind", [Linear16, Linear8, Linear4])
def test_compiled_products_equal_float32(kind: type[nn.Module], num_rows: int) -> None:
    linear, rows = nn.Linear(72, 176, bias=False), rows_of(num_rows, 72)
    layer = Linear16.pack(linear.bfloat16()) if kind is Linear16 else kind(linear, torch.bfloat16)
    expected = functional.linear(rows, layer.weight.float())
    with torch.inference_mode():
        found = torch.compile(layer, backend="eager", fullgraph=True)(rows)
    # One row is multiplied in float32, except in 4 bits, and in 8 bits on a CPU without bfloat16 products.
    is_exact = num_rows == 1 and kind is not Linear4
    assert (found - expected).abs().max() <= (1e-5 if is_exact else 1e-2) * expected.abs().max()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("kind", [Linear8, Linear4])
def test_inductor_compiles_several_rows(kind: type[PackedLinear]) -> None:
    layer, rows = kind(nn.Linear(72, 64, bias=False), torch.float32), torch.randn(3, 72)
    with torch.inference_mode():
        # The operation before the layer is fused with whatever is not in memory.
        found = torch.compile(lambda x: layer(functional.silu(x)))(rows)
        assert torch.allclose(found, layer(functional.silu(rows)), atol=0.02)
