"""A small CLIP, trained with open_clip on pictures and captions of the world: what the ViT of stage 1 starts from."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import open_clip
import torch
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from yivl.image_processing import ImageProcessor
from yivl.tiny.recipe.tokenizer import VOCAB_SIZE
from yivl.tiny.world.drawing import draw
from yivl.tiny.world.language import caption, detail
from yivl.tiny.world.scenes import Split, sample_scene
from yivl.tiny.world.words import LANGUAGES

PATCH_SIZE: Final = 16
IMAGE_SIZE: Final = 96
"""Pixels on a side in stage 1; stages 2 and 3 double it."""
_CONTEXT: Final = 80  # tokens of a caption

MODEL: Final[dict[str, Any]] = {
    "embed_dim": 192,
    "vision_cfg": {
        "image_size": IMAGE_SIZE,
        "layers": 8,
        "width": 192,
        "head_width": 64,
        "patch_size": PATCH_SIZE,
    },
    "text_cfg": {
        "context_length": _CONTEXT,
        "vocab_size": VOCAB_SIZE,
        "width": 192,
        "heads": 3,
        "layers": 3,
        # Ours has the end of text at id 2, not at the highest id.
        "pool_type": "eos",
        "eos_id": 2,
    },
}
"""Shape of the CLIP, as open_clip writes it."""


def build_clip() -> open_clip.CLIP:
    """Return the CLIP with fresh weights."""
    return open_clip.CLIP(**MODEL)


@dataclass(frozen=True)
class CaptionedScenes(Dataset[dict[str, torch.Tensor]]):
    """Pictures and captions; number ``i`` is the same on every machine."""

    tokenizer: Any
    image_processor: ImageProcessor
    split: Split
    number: int

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return ``pixel_values`` ``(3, side, side)`` and the ids of the caption."""
        rng = random.Random(f"clip {index}")
        scene = sample_scene(self.split, index)
        say = detail if rng.random() < 0.5 else caption
        ids = self.tokenizer.sp_model.encode(say(scene, rng.choice(LANGUAGES)))[: _CONTEXT - 1]
        picture = draw(scene, self.image_processor.image_size).image
        return {"pixel_values": self.image_processor([picture])[0], "ids": torch.tensor([*ids, 2])}


def collate(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return a batch, captions padded to the length of the text tower."""
    ids = pad_sequence([row["ids"] for row in rows], batch_first=True)
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "ids": torch.nn.functional.pad(ids, (0, _CONTEXT - ids.shape[1])),
    }


def contrastive_loss(clip: open_clip.CLIP, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return open_clip's loss: which caption belongs to which picture of the batch."""
    image_features, text_features, scale = clip(batch["pixel_values"], batch["ids"])
    return open_clip.ClipLoss()(image_features.float(), text_features.float(), scale)  # type: ignore[no-any-return]


def save_clip(clip: open_clip.CLIP, folder: Path) -> None:
    """Write the folder that ``scripts/convert.py vit`` and ``--vision_tower`` read."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous() for name, value in clip.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    config = {"model_cfg": MODEL, "preprocess_cfg": {name: list(values) for name, values in preprocess.items()}}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
