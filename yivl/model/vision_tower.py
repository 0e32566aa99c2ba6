"""The CLIP ViT: ``pixel_values`` to patch features."""

from typing import cast

import torch
from torch import nn
from transformers import CLIPVisionModel

from yivl.model.configuration import YiVLConfig


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
