"""Position embeddings of a ViT for another grid of patches."""

import math

import torch
from torch import nn

from yivl.model.sharding import gathered, new_parameter


def resize_position_embeddings(weight: torch.Tensor, side: int) -> torch.Tensor:
    """Return the position embeddings of a grid of ``side`` by ``side`` patches, ``(1 + side**2, vision_hidden)``.

    Bicubic interpolation in float32; the class token keeps its embedding. How Yi-VL went from 224 to 448 pixels is not
    published; this is the usual way (docs/training.md), and that of InternVL.

    Args:
        weight: ``(1 + old_side**2, vision_hidden)``.
        side: Patches per side of the new grid.
    """
    class_embedding, grid = weight[:1], weight[1:]
    old_side = math.isqrt(len(grid))
    grid = grid.float().T.reshape(1, -1, old_side, old_side)
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([class_embedding, grid.flatten(2)[0].T.to(weight.dtype)])


def resized_parameter(old: nn.Parameter, side: int) -> nn.Parameter:
    """Return the parameter that replaces ``old`` in a ViT for ``side`` by ``side`` patches, partitioned under ZeRO-3.

    Args:
        old: Position embeddings, ``(..., 1 + old_side**2, vision_hidden)``.
        side: Patches per side of the new grid.
    """
    with gathered([old]):
        weight = resize_position_embeddings(old.detach().flatten(0, -2), side)
        weight = weight.reshape(*old.shape[:-2], *weight.shape)
    return new_parameter(weight)
