"""The decoder layer of Llama with norms and MLP that save less for the backward pass.

Without gradients they compute what those of transformers do. Parameter names are those of transformers.
"""

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm


class DecoderLayer(LlamaDecoderLayer):
    """A Llama decoder layer with the norms and the MLP of this module."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super(LlamaDecoderLayer, self).__init__()  # not its own __init__, which would build another MLP and norms
        self.hidden_size = config.hidden_size
        self.self_attn = LlamaAttention(config, layer_idx)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class RMSNorm(LlamaRMSNorm):
    """RMSNorm that saves its input, which the residual connection holds anyway, and no intermediate result.

    Under autocast, the output has the dtype of autocast: the linear layers that read it would each save a copy of that
    dtype, beside the float32 output.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the normalized states, of the shape of ``hidden_states``."""
        if not torch.is_grad_enabled():
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        device, dtype = hidden_states.device.type, torch.promote_types(hidden_states.dtype, self.weight.dtype)
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        output: torch.Tensor = _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, dtype)
        return output


class MLP(LlamaMLP):
    """SwiGLU that saves the gate and up projections, and neither the activated gate nor their product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the MLP, of the shape of ``x``."""
        if not isinstance(self.act_fn, SiLUActivation):
            return super().forward(x)  # type: ignore[no-any-return]
        if not torch.is_grad_enabled():
            activated = nn.functional.silu(self.gate_proj(x), inplace=True)
            return self.down_proj(activated.mul_(self.up_proj(x)))  # type: ignore[no-any-return]
        gate, up = self.gate_proj(x), self.up_proj(x)
        # The product is not saved for a frozen weight. A quantized layer would dequantize at an access of its weight.
        if not any(parameter.requires_grad for parameter in self.down_proj.parameters(recurse=False)):
            return self._down(gate, up)
        # The product is re-computed. The matrix product is not: re-computation ends at the last saved tensor.
        output: torch.Tensor = checkpoint(self._down, gate, up, use_reentrant=False, preserve_rng_state=False)
        return output

    def _down(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down_proj(_SwiGLU.apply(gate, up))
        return output


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float, dtype: torch.dtype) -> torch.Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, scale)
        return (weight * (x.float() * scale).to(x.dtype)).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        grad, normalized = grads[0].float(), x.float() * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normalized).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight
        mean = (grad * normalized).mean(-1, keepdim=True)
        return ((grad - normalized.mul_(mean)) * scale).to(x.dtype), grad_weight, None, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad_up = nn.functional.silu(gate).mul_(grads[0])
        return torch.ops.aten.silu_backward(grads[0] * up, gate), grad_up
