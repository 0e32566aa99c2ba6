"""Linear layers for inference on a CPU whose weights are stored in 16, 8 or 4 bits.

Activations are not quantized: those of language models have outliers, which a common scale would drown. Layers for
training, and for other devices, are those of bitsandbytes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Final

import torch
from torch import nn
from torch.nn import functional

from yivl.errors import YiVLError

GROUP: Final = 32
"""Weights of a row that share scale and zero in 4 bits, as in the q4_0 format of llama.cpp."""

_BLOCK: Final = 64
"""Rows are padded to a multiple of it in 4 bits: the blocks of the packed format are 32 or 64 rows, by CPU kind."""

_SLAB: Final = 1 << 22
"""Weights converted at a time, 16 MiB in float32: the memory is allocated once and reused. Source: ours, measured."""

_FEW_ROWS_16: Final = 4
_FEW_ROWS_8: Final = {torch.bfloat16: 8, torch.float32: 32}
_FEW_ROWS_4: Final = 128
"""Most rows of activations for which the kernels of the packed formats are faster than converting the weights; in 8
bits by the dtype of the products of many rows. Source: ours, measured on CPUs with AVX2 and with AVX512-BF16."""


class Linear16(nn.Linear):
    """A linear layer with float16 or bfloat16 weights, float32 activations, and float32 products.

    For a CPU without instructions for products in the dtype of the weights. Few rows are rounded to that dtype where
    nothing is compiled: the time is that of reading the weights, in float32 twice that. The state dict is that of
    ``nn.Linear``.
    """

    @classmethod
    def pack(cls, linear: nn.Linear) -> "Linear16":
        """Return the layer with the same parameters."""
        packed = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        packed.weight, packed.bias = linear.weight, linear.bias
        return packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``(..., out_features)`` in the dtype of ``x``, ``(..., in_features)``."""
        rows = x.reshape(-1, self.in_features)
        if len(rows) == 1 and torch.compiler.is_compiling():
            product = (rows.float() * self.weight.float()).sum(-1, keepdim=True).T
        elif len(rows) <= _FEW_ROWS_16:
            product = self._rounded(rows)
        else:
            product = _in_slabs(rows.float(), self.out_features, lambda part: self.weight[part].float().T)
        if self.bias is not None:
            product = product + self.bias
        return product.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _rounded(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the float32 product of few rows, rounded to the dtype of the weights."""
        if self.weight.dtype != torch.float16:
            return functional.linear(rows.to(self.weight.dtype), self.weight).float()
        # The range of float16 ends at 65,504, which activations reach.
        largest = rows.float().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return functional.linear((rows / largest).half(), self.weight).float() * largest


class Embedding16(nn.Embedding):
    """Embeddings in float16 or bfloat16 whose output is float32; the state dict is that of ``nn.Embedding``."""

    @classmethod
    def pack(cls, embedding: nn.Embedding) -> "Embedding16":
        """Return the embeddings with the same parameters."""
        packed = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, device="meta")
        packed.weight = embedding.weight
        return packed

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return ``(..., embedding_dim)`` in float32."""
        return super().forward(input_ids).float()


class PackedLinear(nn.Module, ABC):
    """A linear layer with quantized weights and no bias. Its buffers stay on the CPU, and in their dtypes.

    Args:
        linear: The layer whose weights are quantized; it stays as it is.
        product_dtype: Dtype of the products of many rows: float32, or bfloat16 where the CPU has instructions for it.
    """

    def __init__(self, linear: nn.Linear, product_dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.product_dtype = product_dtype
        self._padding = -self.in_features % GROUP  # the int8 kernel reads 16 inputs at a time, past the end of a row

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weights, ``(out_features, in_features)`` in float32; computed at each access."""
        return torch.cat([self._dequantized(part, torch.float32).T for part in self._slabs()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``(..., out_features)`` in the dtype of ``x``, ``(..., in_features)``."""
        rows = x.reshape(-1, self.in_features)
        if len(rows) <= self._few_rows():
            product = self._product_of_few(rows)
        else:
            product = self._product_of_many(rows.to(self.product_dtype))
        return product.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PackedLinear":
        if fn(torch.empty(0)).device.type != "cpu":
            raise YiVLError("a model in 8 or 4 bits on the CPU cannot be moved; load it with the other device")
        return self  # the kernels need these dtypes, whatever the model is cast to

    def extra_repr(self) -> str:
        """Return the shape, as ``nn.Linear`` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}"

    @abstractmethod
    def _few_rows(self) -> int: ...

    @abstractmethod
    def _product_of_few(self, rows: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _product_of_many(self, rows: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _dequantized(self, part: slice, dtype: torch.dtype) -> torch.Tensor:
        """Return the weights of some outputs, ``(in_features, outputs)``."""

    def _padded(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.bfloat16()
        return functional.pad(rows, (0, self._padding)) if self._padding else rows

    def _slabs(self) -> Iterator[slice]:
        return _slabs(self.out_features, self.in_features)


class Linear8(PackedLinear):
    """int8 weights and one scale per output, which leaves the weights exact in bfloat16."""

    def __init__(self, linear: nn.Linear, product_dtype: torch.dtype) -> None:
        super().__init__(linear, product_dtype)
        parts, scales = [], []
        for part in self._slabs():
            weight = linear.weight.detach()[part].float()
            scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
            quantized = (weight / scale[:, None]).round_().to(torch.int8)
            parts.append(functional.pad(quantized, (0, self._padding)))
            scales.append(scale)
        self.packed: torch.Tensor
        self.scales: torch.Tensor
        self.ones: torch.Tensor
        self.register_buffer("packed", torch.cat(parts))
        self.register_buffer("scales", torch.cat(scales))
        # The kernel multiplies its bfloat16 scales in bfloat16; torch.compile needs them in a buffer.
        self.register_buffer("ones", torch.ones(self.out_features, dtype=torch.bfloat16))

    def _few_rows(self) -> int:
        return _FEW_ROWS_8[self.product_dtype]

    def _product_of_few(self, rows: torch.Tensor) -> torch.Tensor:
        # With AVX2 the loop that is generated takes three times as long as the kernel.
        if len(rows) == 1 and torch.compiler.is_compiling() and self.product_dtype == torch.bfloat16:
            packed = self.packed[:, : self.in_features]
            return (rows.float() * packed.float()).sum(-1) * self.scales
        # Its kernel for float32 activations is six times slower.
        return torch._weight_int8pack_mm(self._padded(rows), self.packed, self.ones).float() * self.scales

    def _product_of_many(self, rows: torch.Tensor) -> torch.Tensor:
        packed = self.packed[:, : self.in_features]
        return _in_slabs(rows, self.out_features, lambda part: packed[part].to(rows.dtype).T) * self.scales

    def _dequantized(self, part: slice, dtype: torch.dtype) -> torch.Tensor:
        packed = self.packed[part, : self.in_features]
        return (packed.float() * self.scales[part, None]).to(dtype).T


class Linear4(PackedLinear):
    """4-bit weights in the packed format of PyTorch, with a bfloat16 scale and zero per ``GROUP`` weights of an output.

    A weight is ``(q - 8) * scale + zero``, ``q`` from 0 to 15. Outputs and inputs are padded to whole blocks.
    """

    def __init__(self, linear: nn.Linear, product_dtype: torch.dtype) -> None:
        super().__init__(linear, product_dtype)
        self.num_rows_in_block = _rows_in_block()
        parts, constants = [], []
        for part in self._slabs():
            weight = linear.weight.detach()[part].float()
            weight = functional.pad(weight, (0, self._padding, 0, -len(weight) % _BLOCK))
            quantized, scales, zeros = quantize_4bit(weight)
            parts.append(torch._convert_weight_to_int4pack_for_cpu(quantized, 1))
            constants.append(torch.stack([scales.T, zeros.T], dim=-1))
        self.packed: torch.Tensor
        self.constants: torch.Tensor
        self.register_buffer("packed", torch.cat(parts))
        self.register_buffer("constants", torch.cat(constants, dim=1))

    def _few_rows(self) -> int:
        return _FEW_ROWS_4

    def _product_of_few(self, rows: torch.Tensor) -> torch.Tensor:
        rows = self._padded(rows).contiguous()  # the product takes no views
        return torch._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP, self.constants)[:, : self.out_features]

    def _product_of_many(self, rows: torch.Tensor) -> torch.Tensor:
        return _in_slabs(rows, self.out_features, lambda part: self._dequantized(part, rows.dtype))

    def _dequantized(self, part: slice, dtype: torch.dtype) -> torch.Tensor:
        constants = self.constants[:, part.start : part.start + -(-(part.stop - part.start) // _BLOCK) * _BLOCK]
        num_groups, num_outputs, _ = constants.shape
        # Within a block the bytes are ordered by input; a byte holds an output in each half.
        pairs = self.packed[part.start : part.start + num_outputs]
        pairs = pairs.view(-1, num_groups * GROUP, self.num_rows_in_block // 2).transpose(0, 1)
        weights = torch.empty(*pairs.shape[:2], 2, pairs.shape[2], dtype=dtype)
        weights[:, :, 0] = pairs & 15
        weights[:, :, 1] = pairs >> 4
        weights = weights.view(num_groups, GROUP, num_outputs)
        scales, zeros = constants.to(dtype).unsqueeze(1).unbind(-1)
        torch.addcmul(zeros - 8 * scales, weights, scales, out=weights)
        return weights.view(-1, num_outputs)[: self.in_features, : part.stop - part.start]


def quantize_4bit(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize ``(outputs, inputs)`` float32 weights to 4 bits.

    Returns:
        Integers from 0 to 15, int32 in the shape of ``weight``; scales and zeros in bfloat16, ``(outputs, groups)``.
    """
    groups = weight.view(len(weight), -1, GROUP)
    low, high = groups.aminmax(dim=-1)
    scales = ((high - low) / 15).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
    zeros = (low + 8 * scales.float()).bfloat16()
    shifted = (groups - zeros.float().unsqueeze(-1)) / scales.float().unsqueeze(-1)
    return shifted.round_().add_(8).clamp_(0, 15).to(torch.int32).view(weight.shape), scales, zeros


def _rows_in_block() -> int:
    """Return the number of outputs in a block of the packed 4-bit format, which depends on the CPU.

    Raises:
        RuntimeError: If the format is another one.
    """
    weight = torch.arange(_BLOCK).div(16, rounding_mode="floor").to(torch.int32)[:, None].expand(-1, GROUP)
    first = int(torch._convert_weight_to_int4pack_for_cpu(weight.contiguous(), 1).flatten()[0])
    if first not in (0x10, 0x20):  # the output that shares the first byte with output 0 is 16 or 32
        raise RuntimeError(f"PyTorch {torch.__version__} packs 4-bit weights in an unknown format on this CPU")
    return first >> 4 << 5


def _slabs(num_outputs: int, num_inputs: int) -> Iterator[slice]:
    step = max(_SLAB // num_inputs // _BLOCK, 1) * _BLOCK
    return (slice(start, min(start + step, num_outputs)) for start in range(0, num_outputs, step))


def _in_slabs(rows: torch.Tensor, num_outputs: int, weights: Callable[[slice], torch.Tensor]) -> torch.Tensor:
    """Return the product of ``(n, in)`` rows with weights ``(in, outputs)`` that are computed a slab at a time."""
    product = rows.new_empty(len(rows), num_outputs)
    for part in _slabs(num_outputs, rows.shape[1]):
        product[:, part] = rows @ weights(part)
    return product
