"""The ViT of Yi-VL: that of CLIP."""

import torch
from torch import nn
from transformers import CLIPVisionModel

from yivl.model.position_embeddings import resized_parameter


class ClipViT(CLIPVisionModel):
    """``CLIPVisionModel`` under another class name, for which transformers has no renaming of checkpoint keys."""

    @property
    def layers(self) -> nn.ModuleList:
        """All layers."""
        layers: nn.ModuleList = self.encoder.layers
        return layers

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the input of the first layer, class token first, ``(num_images, 1 + num_patches, vision_hidden)``.

        Args:
            pixel_values: ``(num_images, 3, image_size, image_size)``, normalized.

        Raises:
            ValueError: If the size of the images is not that of the position embeddings.
        """
        states: torch.Tensor = self.pre_layrnorm(self.embeddings(pixel_values))
        return states

    def resize(self, image_size: int) -> None:
        """Interpolate the position embeddings, in place, for images of ``image_size`` pixels, a multiple of a patch."""
        embeddings, side = self.embeddings, image_size // self.config.patch_size
        positions = embeddings.position_embedding
        positions.weight, positions.num_embeddings = resized_parameter(positions.weight, side), side**2 + 1
        embeddings.image_size, embeddings.num_patches, embeddings.num_positions = image_size, side**2, side**2 + 1
        embeddings.position_ids = torch.arange(side**2 + 1, device=positions.weight.device).expand(1, -1)
