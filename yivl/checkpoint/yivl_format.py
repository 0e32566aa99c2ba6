"""A folder in the Yi-VL (LLaVA) format: main files under the names in memory, and the ViT again in ``vit/``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from yivl.checkpoint.atomic import write_json
from yivl.checkpoint.format import (
    METADATA,
    TOWER,
    VIT,
    StateDict,
    read_json,
    read_main_shapes,
    read_main_weights,
    without_tower,
)
from yivl.checkpoint.vit import read_clip_weights, read_vision_config
from yivl.errors import CheckpointError
from yivl.files.validation import library_errors
from yivl.image_processing import load_clip_processor
from yivl.model.configuration import YiVLConfig, fields_for, generation_config


def is_yivl(fields: Mapping[str, Any]) -> bool:
    """Whether the fields of a ``config.json`` are of this format; exports for SGLang are, too."""
    return "mm_vision_tower" in fields


def read_yivl_config(folder: Path) -> YiVLConfig:
    """Return the configuration: ``config.json``, and that of the ViT it names.

    Raises:
        CheckpointError: If a file is missing, is not valid JSON or describes another kind of model.
    """
    path = folder / "config.json"
    fields = read_json(path)
    if not isinstance(fields.get("mm_vision_tower"), str):
        raise CheckpointError(f"{path}: no mm_vision_tower; this is not a Yi-VL checkpoint")
    vision = read_vision_config(folder / fields["mm_vision_tower"] / "config.json")
    for name in ("model_type", "text_config", "vision_config"):  # the last two are for SGLang
        fields.pop(name, None)
    with library_errors(path):
        return YiVLConfig(**fields_for(YiVLConfig, fields), vision_config=vision)


def load_yivl_clip_processor(folder: Path, config: YiVLConfig) -> CLIPImageProcessorPil:
    """Return the CLIP preprocessing of the ViT folder.

    Raises:
        CheckpointError: If its file is missing or damaged.
    """
    return load_clip_processor(folder / config.mm_vision_tower)


def read_yivl_vit(folder: Path, config: YiVLConfig) -> StateDict:
    """Return the ViT of ``vit/`` under the keys of ``yivl.checkpoint.vit``.

    Raises:
        CheckpointError: If there is none, or a file is damaged.
    """
    return read_clip_weights(folder / config.mm_vision_tower)


def read_yivl_shapes(folder: Path, config: YiVLConfig) -> StateDict:
    """Return the tensors of the main files on the meta device, without their copy of the ViT.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    return without_tower(read_main_shapes(folder))


def read_yivl_weights(folder: Path, config: YiVLConfig) -> StateDict:
    """Return all tensors, with the ViT of ``vit/``.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    vit = {f"{VIT}{key}": value for key, value in read_yivl_vit(folder, config).items()}
    return without_tower(read_main_weights(folder)) | vit


def read_yivl_generation_config(folder: Path, config: YiVLConfig) -> GenerationConfig | None:
    """Return the generation settings, if the folder has any.

    Raises:
        CheckpointError: If the file is damaged.
    """
    path = folder / "generation_config.json"
    return generation_config(read_json(path), path) if path.is_file() else None


def write_vit(
    folder: Path,
    config: YiVLConfig,
    weights: Mapping[str, torch.Tensor],
    image_processor: BaseImageProcessor | None,
) -> None:
    """Write the ViT and the CLIP preprocessing to ``vit/``.

    Args:
        folder: Of the checkpoint.
        config: Of the model.
        weights: All of the model, by the names in memory.
        image_processor: The CLIP processor.
    """
    vit = folder / "vit" / config.vit_name
    vit.mkdir(parents=True)
    vision = config.vision_config.to_dict() | {"architectures": ["CLIPVisionModel"]}
    vision.pop("_name_or_path", None)  # a local path
    write_json(vit / "config.json", vision)
    vit_weights = {key.removeprefix(TOWER): value for key, value in weights.items() if key.startswith(TOWER)}
    save_file(vit_weights, vit / "model.safetensors", metadata=METADATA)
    if image_processor is not None:
        image_processor.save_pretrained(vit)
