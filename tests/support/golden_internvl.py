"""The golden vectors of InternVL-Chat-V1-2."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file

from support.golden import ROOT
from support.golden import golden_arrays as read_arrays
from support.golden import golden_json as read_json
from yivl.model.internvl import InternVLChatModel
from yivl.model.internvl_configuration import InternVLConfig

GOLDEN = ROOT / "tests/golden_internvl"
CHECKPOINT = GOLDEN / "checkpoint"
PREFIXES: Final = (
    ("model.vision_tower.vision_tower.vision_model.", "vision_model."),
    ("model.mm_projector.", "mlp1."),
)
"""Of parameters in memory and in the published layout."""


def golden_json(name: str) -> Any:
    return read_json(name, GOLDEN)


def golden_arrays(name: str) -> dict[str, torch.Tensor]:
    return read_arrays(name, GOLDEN)


def published_name(name: str) -> str:
    """Return the published name of a parameter in memory."""
    for ours, published in PREFIXES:
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    return f"language_model.{name}"


def golden_model(folder: Path = CHECKPOINT, **changes: Any) -> InternVLChatModel:
    """Return the golden model, its weights read without the loader.

    Args:
        folder: In the published layout.
        **changes: Fields of ``config.json`` with other values.
    """
    config = InternVLConfig.from_published(json.loads((folder / "config.json").read_text()) | changes)
    model = InternVLChatModel(config).eval()
    weights = {key: value for path in sorted(folder.glob("*.safetensors")) for key, value in load_file(path).items()}
    model.load_state_dict({name: weights.pop(published_name(name)) for name in model.state_dict()})
    assert not weights
    model.img_context_token_id = golden_json("prompts")["special_ids"]["<IMG_CONTEXT>"]
    return model


def pixels_of(images: Sequence[str]) -> torch.Tensor | None:
    """Return the recorded pixels of images by file name; ``None`` without images."""
    keys = {image["name"]: image["squash_key"] for image in golden_json("image_preprocess")["images"]}
    arrays = golden_arrays("image_pixels")
    return torch.stack([arrays[keys[name]] for name in images]) if images else None
