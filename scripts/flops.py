"""FLOPs of the matrix products of a model, and model FLOPs utilization (MFU) by the peak rate of a GPU.

A matrix product takes 2 FLOPs per weight and token. Norms, activation functions and the optimizer are left out, as is
usual for MFU (PaLM, arXiv 2204.02311, appendix B).
"""

from dataclasses import dataclass
from typing import Any, Final

PEAK_FLOPS: Final = {
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H800": 989.4e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}
"""Dense products in bfloat16 with float32 accumulation, in FLOP/s, by a part of the GPU's name; the first match counts.
Sources: NVIDIA datasheets of H200, H100, A100, A800 and L40S (half of the figures "with sparsity"), and the whitepapers
of the Ada and GA102 architectures."""


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of the forward pass of one sample with one image.

    The ViT attends to all pairs of positions; so does the decoder unless ``causal``, as ``torch.utils.flop_counter``
    counts.
    """

    patch_embedding: float
    vision_layers: float
    projector: tuple[float, float]
    """The first linear layer, and the others."""
    decoder: float
    """The linear layers of the decoder layers."""
    first_queries: float
    """Query, key and value projections of the first decoder layer, which ``decoder`` includes."""
    attention: float
    """Of the decoder."""
    head: float

    @classmethod
    def of(cls, config: Any, tokens: int, targets: int, *, causal: bool = True) -> "ForwardFlops":
        """Return the FLOPs of a sequence length (image patches included) with logits at ``targets`` positions."""
        vision, width, patches = config.vision_config, config.hidden_size, config.num_patches
        queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        vision_width, positions = vision.hidden_size, config.num_vision_positions
        first, *others = (2.0 * patches * weights for weights in _projector_weights(config))
        vision_weights = 4 * vision_width**2 + 2 * vision_width * vision.intermediate_size
        layer = 2 * width * (queries + keys) + 3 * width * config.intermediate_size
        return cls(
            patch_embedding=2.0 * (positions - 1) * 3 * vision.patch_size**2 * vision_width,
            vision_layers=config.num_vision_layers
            * (2.0 * positions * vision_weights + 4.0 * positions**2 * vision_width),
            projector=(first, sum(others)),
            decoder=config.num_hidden_layers * 2.0 * tokens * layer,
            first_queries=2.0 * tokens * width * (queries + 2 * keys),
            attention=config.num_hidden_layers * (2.0 if causal else 4.0) * tokens**2 * queries,
            head=2.0 * targets * width * config.vocab_size,
        )


@dataclass(frozen=True)
class Trained:
    """The trained parts of a model."""

    vision_tower: bool = False
    projector: bool = False
    language_model: bool = False
    lora_rank: int = 0
    """Of adapters on all linear layers of the decoder; 0 without adapters."""


def _projector_weights(config: Any) -> list[int]:
    """Return the weights of each linear layer of the projector."""
    import torch

    with torch.device("meta"):
        modules = config.build_projector().modules()
    return [module.weight.numel() for module in modules if isinstance(module, torch.nn.Linear)]


def vision_flops(config: Any) -> float:
    """Return the FLOPs of ViT and projector for one image."""
    forward = ForwardFlops.of(config, 0, 0)
    return forward.patch_embedding + forward.vision_layers + sum(forward.projector)


def language_flops(config: Any, prompt_tokens: int) -> float:
    """Return the FLOPs of the decoder for a prompt (causal attention), and of ``lm_head`` for one position."""
    forward = ForwardFlops.of(config, prompt_tokens, 1)
    return forward.decoder + forward.attention + forward.head


def training_flops(
    config: Any, tokens: int, targets: int, trained: Trained, *, causal: bool = True, recomputes: bool = False
) -> float:
    """Return the FLOPs of the forward and backward pass of one sample with one image.

    A product counts once in the forward pass, once for the gradient of its input where a module before it is trained,
    and once for the gradient of its weight where that is trained: 3 forward passes of a trained model, 2 of a frozen
    decoder under LoRA and 1 of a frozen ViT. Attention, which has no weights, counts twice in the backward pass.

    Args:
        config: ``YiVLConfig``.
        tokens: Sequence length, image patches included.
        targets: Positions whose logits are computed.
        trained: The trained parts.
        causal: Count the pairs of positions that a causal mask leaves (half of them), as kernels compute, or all.
        recomputes: Count the second forward pass of the layers under gradient checkpointing, whole. MFU leaves it out.
    """
    forward = ForwardFlops.of(config, tokens, targets, causal=causal)
    first, second = forward.projector
    total = forward.patch_embedding + forward.vision_layers + first + second
    if trained.vision_tower:  # pixels need no gradient
        total += forward.patch_embedding + (2 + recomputes) * forward.vision_layers
    total += (trained.vision_tower + trained.projector) * first
    total += ((trained.vision_tower or trained.projector) + trained.projector) * second
    total += (2 + trained.language_model) * (forward.decoder + forward.head) + 3 * forward.attention
    if not (trained.vision_tower or trained.projector or trained.language_model):  # nothing trained before the decoder
        total -= forward.first_queries
    if recomputes:
        total += forward.decoder + forward.attention
    return total + (3 + recomputes) * _adapter_flops(config, tokens, trained.lora_rank)


def utilization(flops: float, seconds: float, rate: float | None) -> float | None:
    """Return the share of a rate in FLOP/s that ``flops`` in ``seconds`` reach; ``None`` without a rate."""
    return None if rate is None else flops / (seconds * rate)


def peak_rate(gpu: str) -> float | None:
    """Return the peak dense bfloat16 rate of a GPU in FLOP/s by its name, or ``None`` if it is not in the table."""
    return next((rate for name, rate in PEAK_FLOPS.items() if name in gpu), None)


def _adapter_flops(config: Any, tokens: int, rank: int) -> float:
    """Return the FLOPs of the forward pass of LoRA adapters on the linear layers of the decoder."""
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    sides = 2 * (width + queries) + 2 * (width + keys) + 3 * (width + inner)
    return 2.0 * tokens * rank * sides * config.num_hidden_layers
