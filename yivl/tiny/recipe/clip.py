"""A small CLIP trained with open_clip on images and captions of the world; its ViT initializes the vision tower."""

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import open_clip
import torch
from safetensors.torch import save_file
from torch.nn import functional
from torch.utils.data import Dataset, default_collate
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from yivl.image_processing import ImageProcessor
from yivl.tiny.recipe.loop import HeldOutScore, fit, training_folder
from yivl.tiny.recipe.tokenizer import VOCAB_SIZE
from yivl.tiny.world.language import caption, detail
from yivl.tiny.world.rendering import render
from yivl.tiny.world.scenes import Split, sample_scene
from yivl.tiny.world.words import LANGUAGES
from yivl.tokenization import load_tokenizer

IMAGE_SIZE: Final = 96
"""Pixels on a side, also in stage 1; stages 2 and 3 double it."""
_CONTEXT_LENGTH: Final = 80  # tokens of a caption
_BATCH_SIZE: Final = 128

_END_OF_TEXT: Final = {"pool_type": "eos", "eos_id": 2}  # open_clip expects the highest id by default
MODEL: Final[dict[str, Any]] = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 8, "width": 192, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": _CONTEXT_LENGTH, "vocab_size": VOCAB_SIZE, "width": 192, "heads": 3, "layers": 3}
    | _END_OF_TEXT,
}
"""Configuration in the format of open_clip."""


@cache
def make_processor(side: int) -> ImageProcessor:
    """Return CLIP preprocessing to ``side`` pixels."""
    clip_processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return ImageProcessor(clip_processor, "pad")


@dataclass(frozen=True)
class CaptionedScenes(Dataset[dict[str, torch.Tensor]]):
    """Images and captions; the same on every machine."""

    tokenizer: Any
    split: Split

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return ``pixel_values`` (3, side, side) and the padded ``ids`` (context,) of the caption."""
        rng = random.Random(f"clip {index}")
        scene = sample_scene(self.split, index)
        describe = detail if rng.random() < 0.5 else caption
        ids = self.tokenizer.sp_model.encode(describe(scene, rng.choice(LANGUAGES)))[: _CONTEXT_LENGTH - 1]
        padded = functional.pad(torch.tensor([*ids, 2]), (0, _CONTEXT_LENGTH - 1 - len(ids)))
        return {"pixel_values": make_processor(IMAGE_SIZE)([render(scene, IMAGE_SIZE).image])[0], "ids": padded}


def contrastive_loss(clip: open_clip.CLIP, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the contrastive loss of open_clip between the images and captions of a batch."""
    image_features, text_features, scale = clip(batch["pixel_values"], batch["ids"])
    return open_clip.ClipLoss()(image_features.float(), text_features.float(), scale)  # type: ignore[no-any-return]


def save_clip(clip: open_clip.CLIP, folder: Path) -> None:
    """Write an open_clip checkpoint, which ``scripts/convert.py open-clip`` and ``--vision_tower`` read."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in clip.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    preprocess = {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)}
    config = {"model_cfg": MODEL, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


def train(language_model: Path, folder: Path, steps: int, pairs: int) -> list[HeldOutScore]:
    """Train a CLIP with the tokenizer of the language model, save it, and return its retrieval accuracy."""
    tokenizer = load_tokenizer(language_model)
    torch.manual_seed(0)
    clip = open_clip.CLIP(**MODEL)
    scenes = CaptionedScenes(tokenizer, "train")
    state = training_folder(folder)
    fit(clip, scenes, lambda batch: contrastive_loss(clip, batch), state, steps=steps, batch_size=_BATCH_SIZE)
    save_clip(clip, folder)
    held_out = CaptionedScenes(tokenizer, "scenes")
    batch = default_collate([held_out[index] for index in range(pairs)])
    with torch.inference_mode():
        image_features, text_features, _ = clip(batch["pixel_values"], batch["ids"])
    correct = (image_features @ text_features.T).argmax(1) == torch.arange(pairs)
    return [HeldOutScore(f"caption among {pairs}", 100 * float(correct.float().mean()), None)]
