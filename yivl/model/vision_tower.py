"""The vision tower: ``pixel_values`` to patch features."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import torch
from torch import nn

from yivl.model.clip_vit import ClipViT
from yivl.model.configuration import YiVLConfig
from yivl.model.intern_vit import InternViT

logger = logging.getLogger(__name__)

Images = torch.Tensor | Sequence[torch.Tensor]
"""One image per placeholder, in order: ``(num_images, 3, image_size, image_size)``, or a list whose items are
``(3, image_size, image_size)`` or ``(n, 3, image_size, image_size)``."""

ViT = ClipViT | InternViT
"""Both have ``embed``, ``layers``, which take the same arguments, ``resize`` and ``embeddings.class_embedding``."""
_VITS: Final[Mapping[str, Callable[[Any], ViT]]] = {
    "clip_vision_model": ClipViT,
    "intern_vit_6b": InternViT,
}


class VisionTower(nn.Module):
    """The ViT up to ``mm_vision_select_layer``.

    The published checkpoints hold all layers, so the module does too; those after the selected one never run.
    """

    def __init__(self, config: YiVLConfig) -> None:
        super().__init__()
        self.num_layers = config.num_vision_layers
        self.keeps_class_token = config.mm_vision_select_feature == "cls_patch"
        vision = config.vision_config
        # Checkpoint keys: model.vision_tower.vision_tower.vision_model.*
        self.vision_tower = nn.ModuleDict({"vision_model": _VITS[vision.model_type](vision)})

    @property
    def vit(self) -> ViT:
        """The vision model."""
        return cast(ViT, self.vision_tower["vision_model"])

    def resize(self, image_size: int) -> None:
        """Set the input resolution to ``image_size`` pixels and interpolate the position embeddings, in place.

        Raises:
            ValueError: If ``image_size`` is not a multiple of the patch size.
        """
        config = self.vit.config
        if image_size % config.patch_size:
            raise ValueError(f"image_size={image_size} is not a multiple of the patch size {config.patch_size}")
        if image_size != config.image_size:
            logger.info("position embeddings interpolated from %d to %d pixels", config.image_size, image_size)
            self.vit.resize(image_size)
            config.image_size = image_size

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return patch features, ``(num_images, num_patches, vision_hidden)``.

        Args:
            pixel_values: ``(num_images, 3, image_size, image_size)``, normalized.
        """
        vit = self.vit
        hidden_states = vit.embed(pixel_values)
        for layer in vit.layers[: self.num_layers]:
            hidden_states = layer(hidden_states, attention_mask=None)
        return hidden_states if self.keeps_class_token else hidden_states[:, 1:]


def stack_images(images: Images) -> torch.Tensor:
    """Return images in one of the forms of ``Images`` as ``(num_images, 3, image_size, image_size)``."""
    if not isinstance(images, torch.Tensor):
        images = torch.cat([image.unsqueeze(0) if image.ndim == 3 else image for image in images])
    return images.unsqueeze(0) if images.ndim == 3 else images.flatten(0, -4)
