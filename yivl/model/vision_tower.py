"""The CLIP ViT: ``pixel_values`` to patch features."""

import logging
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import nn
from transformers import CLIPVisionModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import deepspeed_config

from yivl.model.configuration import YiVLConfig

logger = logging.getLogger(__name__)

Images = torch.Tensor | Sequence[torch.Tensor]
"""One image per placeholder, in order: ``(num_images, 3, image_size, image_size)``, or a list whose items are
``(3, image_size, image_size)`` or ``(n, 3, image_size, image_size)``."""


class ViT(CLIPVisionModel):
    """``CLIPVisionModel`` under another class name, for which transformers has no renaming of checkpoint keys."""


class VisionTower(nn.Module):
    """The ViT up to ``mm_vision_select_layer``.

    The published checkpoints hold all layers, so the module does too; those after the selected one never run.
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
        """Interpolate the position embeddings, in place, for an input resolution of ``image_size`` pixels.

        Raises:
            ValueError: If ``image_size`` is not a multiple of the patch size.
        """
        embeddings = self.vit.embeddings
        old, side = embeddings.position_embedding, image_size // embeddings.patch_size
        if image_size % embeddings.patch_size:
            raise ValueError(f"image_size={image_size} is not a multiple of the patch size {embeddings.patch_size}")
        if image_size == embeddings.image_size:
            return
        logger.info("position embeddings interpolated from %d to %d pixels", embeddings.image_size, image_size)
        with gathered([old.weight]):
            weight = resize_position_embeddings(old.weight.detach(), side)
        with nullcontext() if weight.is_meta else partitioned():  # a dry run has nothing to partition
            new = nn.Embedding(len(weight), weight.shape[1], dtype=weight.dtype, device=weight.device)
        with gathered([new.weight]), torch.no_grad():
            new.weight.copy_(weight)
        embeddings.position_embedding = new
        embeddings.image_size, embeddings.num_patches, embeddings.num_positions = image_size, side**2, side**2 + 1
        embeddings.position_ids = torch.arange(side**2 + 1, device=weight.device).expand(1, -1)

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


def stack_images(images: Images) -> torch.Tensor:
    """Return images in one of the forms of ``Images`` as ``(num_images, 3, image_size, image_size)``."""
    if not isinstance(images, torch.Tensor):
        images = torch.cat([image.unsqueeze(0) if image.ndim == 3 else image for image in images])
    return images.unsqueeze(0) if images.ndim == 3 else images.flatten(0, -4)


def resize_position_embeddings(weight: torch.Tensor, side: int) -> torch.Tensor:
    """Return the position embeddings of a grid of ``side`` by ``side`` patches, ``(1 + side**2, vision_hidden)``.

    Bicubic interpolation in float32; the class token keeps its embedding. How Yi-VL went from 224 to 448 pixels is not
    published; this is the usual way (docs/training.md).

    Args:
        weight: ``(1 + old_side**2, vision_hidden)``.
        side: Patches per side of the new grid.
    """
    class_embedding, grid = weight[:1], weight[1:]
    old_side = math.isqrt(len(grid))
    grid = grid.float().T.reshape(1, -1, old_side, old_side)
    grid = nn.functional.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([class_embedding, grid.flatten(2)[0].T.to(weight.dtype)])


def gathered(parameters: Iterable[torch.Tensor]) -> AbstractContextManager[None]:
    """Gather parameters that ZeRO-3 partitions; writes of rank 0 inside the block are kept."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed  # slow to import, and only ZeRO-3 needs it

    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)
    return context


def partitioned() -> AbstractContextManager[None]:
    """Partition the parameters of modules built inside the block where ZeRO-3 is on."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed  # as above

    context: AbstractContextManager[None] = deepspeed.zero.Init(config_dict_or_path=deepspeed_config())
    return context
