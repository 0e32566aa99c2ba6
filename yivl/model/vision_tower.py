"""The CLIP ViT: ``pixel_values`` to patch features."""

import math
from contextlib import nullcontext
from typing import cast

import torch
from torch import nn
from transformers import CLIPVisionModel

from yivl.model.configuration import YiVLConfig
from yivl.model.zero import gathered, partitioned


class ViT(CLIPVisionModel):  # type: ignore[misc]
    """``CLIPVisionModel`` under a name of its own, so that transformers renames none of its checkpoint keys."""


class VisionTower(nn.Module):
    """Runs the ViT up to ``mm_vision_select_layer`` and no further.

    All layers are kept because the published checkpoints hold them all; those beyond the selected one never run.
    """

    def __init__(self, config: YiVLConfig) -> None:
        super().__init__()
        self.num_layers = config.num_vision_layers
        self.keeps_class_token = config.mm_vision_select_feature == "cls_patch"
        # Checkpoint keys: model.vision_tower.vision_tower.vision_model.*
        self.vision_tower = nn.ModuleDict({"vision_model": ViT(config.vision_config)})

    @property
    def vit(self) -> ViT:
        """The CLIP vision model."""
        return cast(ViT, self.vision_tower["vision_model"])

    def resize(self, image_size: int) -> None:
        """Make the ViT read pictures of ``image_size`` pixels a side: its position table is interpolated, in place."""
        embeddings = self.vit.embeddings
        old = embeddings.position_embedding
        side = image_size // embeddings.patch_size
        with gathered([old.weight]):
            table = resize_position_table(old.weight.detach(), side)
        with nullcontext() if table.is_meta else partitioned():  # a dry run has nothing to partition
            new = nn.Embedding(len(table), table.shape[1], dtype=table.dtype, device=table.device)
        with gathered([new.weight]), torch.no_grad():
            new.weight.copy_(table)
        embeddings.position_embedding = new
        embeddings.image_size, embeddings.num_patches, embeddings.num_positions = image_size, side**2, side**2 + 1
        embeddings.position_ids = torch.arange(side**2 + 1, device=table.device).expand(1, -1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return patch features, ``(num_images, num_patches, vision_hidden)``.

        Args:
            pixel_values: ``(num_images, 3, image_size, image_size)``, normalized.
        """
        vit = self.vit
        hidden_states: torch.Tensor = vit.pre_layrnorm(vit.embeddings(pixel_values))
        for layer in vit.encoder.layers[: self.num_layers]:
            hidden_states = layer(hidden_states, attention_mask=None)
        return hidden_states if self.keeps_class_token else hidden_states[:, 1:]


def resize_position_table(table: torch.Tensor, side: int) -> torch.Tensor:
    """Return the position table of a grid of ``side`` by ``side`` patches, ``(1 + side**2, vision_hidden)``.

    Bicubic, in float32; the class token keeps its position. The sources do not say how Yi-VL went from 224 to 448
    pixels; this is the usual way (docs/training.md).

    Args:
        table: ``(1 + old_side**2, vision_hidden)``.
        side: Patches on a side of the new grid.
    """
    class_position, grid = table[:1], table[1:]
    old_side = math.isqrt(len(grid))
    grid = grid.float().T.reshape(1, -1, old_side, old_side)
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([class_position, grid.flatten(2)[0].T.to(table.dtype)])
