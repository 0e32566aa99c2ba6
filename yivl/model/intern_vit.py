"""The ViT of InternVL-Chat: InternViT.

Parameter names are those of the published checkpoints. Source of the architecture and of the initialization:
OpenGVLab/InternVL, internvl_chat/internvl/model/internvl_chat/modeling_intern_vit.py.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward

from yivl.model.decoder import RMSNorm
from yivl.model.internvl_configuration import InternVisionConfig
from yivl.model.position_embeddings import resize_position_embeddings, resized_parameter


class InternViT(PreTrainedModel):
    """InternViT. It has no norm after the last layer."""

    config: InternVisionConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        rates = torch.linspace(0, config.drop_path_rate, config.num_hidden_layers, device="cpu").tolist()
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(InternVisionLayer(config, rate) for rate in rates)})
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize as the original: PyTorch's defaults, embeddings from a normal distribution, constant layer scale.

        Unlike ``reset_parameters``, the functions of transformers skip loaded parameters, and no shape is read, which
        is empty under ZeRO-3.
        """
        if isinstance(module, nn.Linear):
            _init_uniformly(module, module.in_features)
        elif isinstance(module, nn.Conv2d):
            _init_uniformly(module, self.config.num_channels * self.config.patch_size**2)
        elif isinstance(module, RMSNorm):
            super()._init_weights(module)
        elif isinstance(module, Embeddings):
            initialization.normal_(module.class_embedding)
            initialization.normal_(module.position_embedding)
        elif isinstance(module, InternVisionLayer):
            initialization.constant_(module.ls1, self.config.initializer_factor)
            initialization.constant_(module.ls2, self.config.initializer_factor)

    @property
    def layers(self) -> nn.ModuleList:
        """All layers."""
        return cast(nn.ModuleList, self.encoder["layers"])

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the input of the first layer, class token first, ``(num_images, 1 + num_patches, vision_hidden)``.

        Args:
            pixel_values: ``(num_images, 3, size, size)``, normalized; ``size`` may differ from ``image_size``.

        Raises:
            ValueError: If the images are not square, or of no whole number of patches.
        """
        states: torch.Tensor = self.embeddings(pixel_values)
        return states

    def resize(self, image_size: int) -> None:
        """Interpolate the position embeddings, in place, for images of ``image_size`` pixels, a multiple of a patch."""
        side = image_size // self.config.patch_size
        self.embeddings.position_embedding = resized_parameter(self.embeddings.position_embedding, side)


def _init_uniformly(module: nn.Module, num_inputs: int) -> None:
    """Initialize weight and bias as PyTorch does by default."""
    bound = num_inputs**-0.5
    for parameter in module.parameters(recurse=False):
        initialization.uniform_(parameter, -bound, bound)


class Embeddings(nn.Module):
    """Class token, patches, and position embeddings, which are interpolated for images of another size."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        width, self.patch_size = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, config.patch_size, stride=config.patch_size)
        num_patches = (config.image_size // config.patch_size) ** 2
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + num_patches, width))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return ``InternViT.embed``."""
        height, width = pixel_values.shape[-2:]
        if height != width or height % self.patch_size:
            raise ValueError(
                f"pixel_values of {height} x {width} pixels; expected a square of a multiple of {self.patch_size}"
            )
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        states = torch.cat([self.class_embedding.expand(len(patches), -1, -1).to(patches.dtype), patches], dim=1)
        positions: torch.Tensor = self.position_embedding
        if positions.shape[1] != states.shape[1]:
            positions = resize_position_embeddings(positions[0], height // self.patch_size)
        return states + positions.to(states.dtype)


class InternVisionLayer(GradientCheckpointingLayer):
    """Attention and MLP, each after a norm and scaled, with stochastic depth in training."""

    def __init__(self, config: InternVisionConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = Attention(config)
        self.norm2 = RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.ls1 = nn.Parameter(torch.empty(config.hidden_size))
        self.ls2 = nn.Parameter(torch.empty(config.hidden_size))
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the states after the layer, of the shape of ``hidden_states``.

        Args:
            hidden_states: ``(num_images, 1 + num_patches, vision_hidden)``.
            attention_mask: Of the attention implementation; ``None`` as all patches attend to all.
        """
        attended = self.attn(self.norm1(hidden_states), attention_mask) * self.ls1
        hidden_states = hidden_states + self.drop_path(attended)
        output: torch.Tensor = hidden_states + self.drop_path(self.mlp(self.norm2(hidden_states)) * self.ls2)
        return output


class DropPath(nn.Module):
    """Stochastic depth in training: a branch is dropped for some images and scaled for the others.

    Source: timm, ``DropPath``, which the original uses. torchvision has the same, and inference does not require it.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        """Return the branch, ``(num_images, ...)``, with the same expectation."""
        if not (self.training and self.rate):
            return branch
        kept = branch.new_empty(len(branch), *[1] * (branch.ndim - 1)).bernoulli_(1 - self.rate)
        return branch * kept.div_(1 - self.rate)


class Attention(nn.Module):
    """Multi-head attention with fused projections; queries and keys are normalized over the whole width."""

    is_causal = False
    """Read by the attention implementation."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.config, self.dropout = config, config.attention_dropout
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.k_norm = RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.proj_drop = nn.Dropout(config.dropout)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Return the projected outputs; arguments and shapes are those of the layer."""
        query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
        query, key = self.q_norm(query), self.k_norm(key)
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, _ = attend(
            self,
            *(states.reshape(heads).transpose(1, 2) for states in (query, key, value)),
            attention_mask,
            scaling=self.head_dim**-0.5,
            dropout=self.dropout if self.training else 0.0,
        )
        output: torch.Tensor = self.proj_drop(self.proj(attended.reshape(hidden_states.shape)))
        return output


class MLP(nn.Module):
    """Two linear layers with the activation function of the configuration between them: exact GELU."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the output, of the shape of ``hidden_states``."""
        output: torch.Tensor = self.fc2(self.act(self.fc1(hidden_states)))
        return output
