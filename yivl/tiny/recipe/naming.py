"""Patch naming: ViT and projector learn to say what lies under each patch, in the language model's own words.

The counterpart of starting from a CLIP that has seen two billion pictures: a small ViT sees too few for anything but
colours to come through a frozen language model. The language model takes no part but for its table of words.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from yivl.image_processing import ImageProcessor
from yivl.model.vision_tower import VisionTower
from yivl.tiny.recipe.language_model import Vocabulary, written_features
from yivl.tiny.world.drawing import draw
from yivl.tiny.world.scenes import sample_scene
from yivl.tiny.world.words import FLOOR, SIGN, WALL

_BLOCK: Final = 16  # examples in a row of one size
_SHARPNESS: Final = 24.0  # of the choice between words, by cosine
_WEIGHTS: Final = {WALL: 0.15, FLOOR: 0.15, SIGN: 2.0}  # of a patch in the loss, by what it is; a thing's is 1


@dataclass(frozen=True)
class NamedPatches(Dataset[dict[str, torch.Tensor]]):
    """Pictures and what lies under their patches; number ``i`` is the same on every machine."""

    vocabulary: Vocabulary
    processors: Mapping[int, ImageProcessor]
    """By the side of the picture."""
    patch_size: int
    number: int
    small_until: int
    """Before this example all pictures are small; behind it one block in five."""

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return ``pixel_values`` (3, side, side), ``bags`` (patches, words) and ``weights`` (patches,)."""
        small, large = sorted(self.processors)
        side = small if index < self.small_until or index // _BLOCK % 5 == 0 else large
        scene = sample_scene("train", index)
        # Some are drawn larger, as pictures of users are: sharper edges after the resize.
        picture = draw(scene, side * (2 if random.Random(index).random() < 0.15 else 1))
        patches = picture.patches(side // self.patch_size)
        weights = [next((_WEIGHTS[word] for word in words if word in _WEIGHTS), 1.0) for words in patches]
        return {
            "pixel_values": self.processors[side]([picture.image])[0],
            "bags": self.vocabulary.bags(patches),
            "weights": torch.tensor(weights),
        }


def encode(tower: VisionTower, projector: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return projected features of pictures of any size, ``(num_images, patches, hidden)``.

    The position table is interpolated as ``resize_position_table`` does, and learns through it.
    """
    vit = tower.vit
    hidden = vit.pre_layrnorm(vit.embeddings(pixel_values, interpolate_pos_encoding=True))
    for layer in vit.encoder.layers[: tower.num_layers]:
        hidden = layer(hidden, attention_mask=None)
    return projector(hidden[:, 1:])  # type: ignore[no-any-return]


def naming_loss(
    features: torch.Tensor, batch: Mapping[str, torch.Tensor], table: torch.Tensor, vocabulary: Vocabulary
) -> torch.Tensor:
    """Return how far features are from the words of their patches: as a choice of words, and as a sum of them.

    Args:
        features: ``(num_images, patches, hidden)``.
        batch: ``bags`` and ``weights`` of ``NamedPatches``.
        table: Token embeddings of the language model, frozen.
        vocabulary: Of the patches.
    """
    features, bags, weights = features.float(), batch["bags"], batch["weights"]
    words = vocabulary.embed(table)
    logits = _SHARPNESS * functional.normalize(features, dim=-1) @ functional.normalize(words, dim=-1).T
    choice = -(functional.log_softmax(logits, -1) * bags).sum(-1) / bags.sum(-1)
    target = written_features(bags, table, vocabulary)
    distance = (features - target).pow(2).mean(-1) / target.pow(2).mean()
    return ((choice + distance) * weights).sum() / weights.sum()


def processor_for(side: int) -> ImageProcessor:
    """Return CLIP's own preprocessing to pictures of ``side`` pixels."""
    clip_processor = CLIPImageProcessorPil()
    clip_processor.size = {"shortest_edge": side}
    clip_processor.crop_size = {"height": side, "width": side}
    return ImageProcessor(clip_processor, "pad")


def start_projector(projector: nn.Module, table: torch.Tensor) -> None:
    """Draw a fresh projector by fan-in and let its features be as large as words, in place."""
    layers = list(projector.modules())
    for linear in (layer for layer in layers if isinstance(layer, nn.Linear)):
        nn.init.trunc_normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(linear.bias)
    last = [layer for layer in layers if isinstance(layer, nn.LayerNorm)][-1]
    nn.init.constant_(last.weight, float(table.pow(2).mean().sqrt()))
