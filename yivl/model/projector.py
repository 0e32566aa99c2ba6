"""The projector from ViT patch features to the embedding space of the language model."""

import math
import re

import torch
from torch import nn

from yivl.errors import CheckpointError


def build_projector(projector_type: str, vision_hidden: int, text_hidden: int) -> nn.Module:
    """Return the projector of type ``mm_projector_type``; Yi-VL uses ``mlp2x_gelu_Norm``.

    The types are ``linear``, ``identity``, ``mlpNx_gelu`` (N linear layers with exact GELU between them) and
    ``mlpNx_gelu_Norm``, with a LayerNorm (eps 1e-5) after every linear layer. The indices of the layers are part of
    the checkpoint format: ``mm_projector.{0,1,3,4}`` for Yi-VL.
    Source: 01-ai/Yi, VL/llava/model/multimodal_projector/builder.py.

    Shape: ``(num_images, num_patches, vision_hidden)`` to ``(num_images, num_patches, text_hidden)``.

    Raises:
        CheckpointError: If the type is unknown.
    """
    if projector_type == "linear":
        return nn.Linear(vision_hidden, text_hidden)
    if projector_type == "identity":
        return nn.Identity()
    match = re.fullmatch(r"mlp([1-9]\d*)x_gelu(_Norm)?", projector_type)
    if match is None:
        raise CheckpointError(
            f"mm_projector_type={projector_type!r}; expected 'linear', 'identity', 'mlpNx_gelu' or 'mlpNx_gelu_Norm'"
        )
    depth, has_norm = int(match[1]), match[2] is not None
    layers: list[nn.Module] = []
    for index in range(depth):
        if index:
            layers.append(nn.GELU())
        layers.append(nn.Linear(text_hidden if index else vision_hidden, text_hidden))
        if has_norm:
            layers.append(nn.LayerNorm(text_hidden))
    return nn.Sequential(*layers)


class PixelShuffleProjector(nn.Sequential):
    """``mlp1`` of InternVL-Chat, with pixel shuffle before it: a square block of patches becomes one image token.

    LayerNorm (eps 1e-5), Linear, exact GELU, Linear; the indices of the layers are part of the checkpoint format.
    Source: OpenGVLab/InternVL, internvl_chat/internvl/model/internvl_chat/modeling_internvl_chat.py.

    Args:
        vision_hidden: Width of the ViT.
        text_hidden: Width of the language model.
        block_size: Patches per side of a block, one over ``downsample_ratio``.
        transposed: Transpose the grid of image tokens: ``ps_version`` v1.
    """

    def __init__(self, vision_hidden: int, text_hidden: int, block_size: int, *, transposed: bool) -> None:
        width = vision_hidden * block_size**2
        super().__init__(
            nn.LayerNorm(width), nn.Linear(width, text_hidden), nn.GELU(), nn.Linear(text_hidden, text_hidden)
        )
        self.block_size, self.transposed = block_size, transposed

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return image tokens, ``(num_images, num_tokens, text_hidden)``.

        Args:
            features: ``(num_images, num_patches, vision_hidden)``, without class token; the grid is square.

        Raises:
            ValueError: If the patches are no square grid that divides into blocks.
        """
        side = math.isqrt(features.shape[1])
        if side**2 != features.shape[1]:
            raise ValueError(f"{features.shape[1]} patches are no square grid")
        grid = features.reshape(len(features), side, side, -1)
        tokens: torch.Tensor = pixel_shuffle(grid, self.block_size, transposed=self.transposed).flatten(1, 2)
        for layer in self:
            tokens = layer(tokens)
        return tokens


def pixel_shuffle(grid: torch.Tensor, block_size: int, *, transposed: bool) -> torch.Tensor:
    """Return the grid with each square block of patches as one token.

    The channels of a token are ordered by row in the block, column in the block, channel.

    Args:
        grid: ``(num_images, rows, columns, channels)``.
        block_size: Patches per side of a block.
        transposed: Return ``(num_images, columns / block_size, rows / block_size, ...)``: the token at row i and
            column j is the block at row j and column i. ``ps_version`` v1, the one of InternVL-Chat-V1-2.

    Returns:
        ``(num_images, rows / block_size, columns / block_size, channels * block_size**2)``.

    Raises:
        ValueError: If the grid does not divide into blocks.
    """
    rows, columns, channels = grid.shape[1:]
    if rows % block_size or columns % block_size:
        raise ValueError(f"a grid of {rows} x {columns} patches does not divide into blocks of {block_size} per side")
    blocks = grid.reshape(-1, rows // block_size, block_size, columns // block_size, block_size, channels)
    blocks = blocks.permute(0, 3, 1, 2, 4, 5) if transposed else blocks.permute(0, 1, 3, 2, 4, 5)
    return blocks.flatten(3)
