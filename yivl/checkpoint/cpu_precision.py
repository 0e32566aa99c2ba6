"""Precision of a loaded model on a CPU: the dtype that the CPU multiplies well, and quantized layers.

Training, and other devices, do not come here: they keep the dtype they ask for, and quantize with bitsandbytes.
"""

import logging

import torch
from torch import nn

from yivl.checkpoint.format import ADAPTER
from yivl.model.cpu import has_native_bfloat16
from yivl.model.modeling import YiVLForCausalLM
from yivl.model.packed_linear import Embedding16, Linear4, Linear8, Linear16

logger = logging.getLogger(__name__)


def fit_to_cpu(model: YiVLForCausalLM, dtype: torch.dtype | None, *, bits: int) -> None:
    """Choose the dtype of activations and products, and quantize the decoder layers, in place.

    The weights of a checkpoint are memory-mapped until here, and read a layer at a time: the peak is the memory of the
    result and of one layer.

    Args:
        model: In the dtype of its checkpoint, with its adapter if it has one.
        dtype: Of all that is not quantized. ``None``: that of the checkpoint, but float32 activations and products over
            16-bit weights where the CPU has no instructions for products in their dtype.
        bits: 16 leaves the decoder layers unquantized; 8 and 4 quantize them.
    """
    stored = model.lm_head.weight.dtype
    has_bfloat16 = has_native_bfloat16()
    is_emulated = stored == torch.float16 or (stored == torch.bfloat16 and not has_bfloat16)
    if bits != 16:
        is_bfloat16 = (stored if dtype is None else dtype) == torch.bfloat16
        _quantize(model.model.layers, bits, torch.bfloat16 if is_bfloat16 and has_bfloat16 else torch.float32)
        model.is_quantized = True
    if dtype is not None:
        model.to(dtype)
    elif is_emulated:
        compute_in_float32(model)
    name = str(stored).removeprefix("torch.")
    if dtype is None and is_emulated:
        logger.info("%s weights, computed in float32: this CPU has no instructions for %s products", name, name)
    elif dtype is None and stored == torch.bfloat16:
        logger.info("bfloat16, the dtype of the checkpoint: this CPU has instructions for bfloat16 products")
    if bits != 16:
        _leave_mapped_files(model)


def _quantize(layers: nn.Module, bits: int, product_dtype: torch.dtype) -> None:
    kind = {8: Linear8, 4: Linear4}[bits]
    for name, module in list(layers.named_modules()):
        if type(module) is nn.Linear and ADAPTER not in f".{name}":
            layers.set_submodule(name, kind(module, product_dtype))


def compute_in_float32(model: YiVLForCausalLM) -> None:
    """Keep matrices in 16 bits, and cast everything else, which is small, to float32."""
    for name, module in list(model.named_modules()):
        is_16_bit = isinstance(module, nn.Linear | nn.Embedding) and module.weight.element_size() == 2
        if is_16_bit and type(module) is nn.Linear:
            model.set_submodule(name, Linear16.pack(module))
        elif is_16_bit and module is model.get_input_embeddings():
            model.set_submodule(name, Embedding16.pack(module))
    packed = {id(module.weight) for module in model.modules() if isinstance(module, Linear16 | Embedding16)}
    for parameter in model.parameters():
        if id(parameter) not in packed:
            parameter.data = parameter.data.float()


def _leave_mapped_files(model: nn.Module) -> None:
    """Copy what is still memory-mapped, so that the pages of the unquantized weights leave the memory."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
