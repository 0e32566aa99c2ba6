"""A folder in the format of InternVL-Chat-V1-2: one nested ``config.json``, its own names of weights, no ViT folder.

The programs that ``auto_map`` names are never run, nor asked for. Source: OpenGVLab/InternVL-Chat-V1-2.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import GenerationConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from yivl.checkpoint.atomic import write_json
from yivl.checkpoint.format import PROJECTOR, VIT, StateDict, read_json, read_main_shapes, read_main_weights
from yivl.errors import CheckpointError
from yivl.files.validation import library_errors
from yivl.image_processing import ImageProcessor, load_clip_processor, set_image_size
from yivl.model.configuration import YiVLConfig
from yivl.model.internvl_configuration import InternVLConfig

# Prefixes of InternVL and in memory.
_NAMES: Final = (("vision_model.", VIT), ("mlp1.", PROJECTOR), ("language_model.", ""))
_WRAPPED: Final = "base_model.model."
_LORA: Final = (".lora_A.default.weight", ".lora_B.default.weight")
_SCALE: Final = 2
"""Of an adapter: alpha over rank. Source: OpenGVLab/InternVL, internvl_chat/internvl/model/internvl_chat/
modeling_internvl_chat.py, ``lora_alpha=2 * r``."""


def is_internvl(fields: Mapping[str, Any]) -> bool:
    """Whether the fields of a ``config.json`` are of this format."""
    architectures = fields.get("architectures")
    return fields.get("model_type") == "internvl_chat" or (
        isinstance(architectures, list) and "InternVLChatModel" in architectures
    )


def to_internvl_key(key: str) -> str:
    """Return the published name of a checkpoint key."""
    published, own = next((published, own) for published, own in _NAMES if key.startswith(own))
    return published + key.removeprefix(own)


def read_internvl_config(folder: Path) -> InternVLConfig:
    """Return the configuration; what ``auto_map`` names is not read.

    Raises:
        CheckpointError: If ``config.json`` does not describe an InternVL-Chat that is supported.
    """
    path = folder / "config.json"
    with library_errors(path):
        return InternVLConfig.from_published(read_json(path))


def load_internvl_clip_processor(folder: Path, config: YiVLConfig) -> CLIPImageProcessorPil:
    """Return the CLIP preprocessing, which by itself squashes an image; as published it would crop the center.

    Raises:
        CheckpointError: If the file is missing or damaged, or has other steps.
    """
    processor = load_clip_processor(folder)
    with library_errors(folder):
        image_size = ImageProcessor(processor, config.image_aspect_ratio).image_size
    set_image_size(processor, image_size, config.image_aspect_ratio)
    return processor


def read_internvl_shapes(folder: Path, config: YiVLConfig) -> StateDict:
    """Return all tensors on the meta device, without adapters.

    Raises:
        CheckpointError: If a file is missing or damaged, or a name is of no part of the model.
    """
    return _with_own_names(folder, read_main_shapes(folder))[0]


def read_internvl_weights(folder: Path, config: YiVLConfig) -> StateDict:
    """Return all tensors; adapters in the LLM or the ViT, as training with LoRA saves them, are merged.

    Raises:
        CheckpointError: If a file is missing or damaged, or a name is of no part of the model.
    """
    return _merged(folder, *_with_own_names(folder, read_main_weights(folder)))


def _merged(folder: Path, weights: StateDict, adapters: StateDict) -> StateDict:
    """Return the weights with the adapters merged into them, which takes memory for each merged matrix."""
    for name in sorted({key.rpartition(".lora_")[0] for key in adapters}):
        try:
            down, up = (adapters[name + part].float() for part in _LORA)
            weight = weights[f"{name}.weight"]
            merged = weight.float().addmm(up, down, alpha=_SCALE)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder}: the adapter of {to_internvl_key(name)} is incomplete or does not fit; merge it with "
                "tools/merge_lora.py of InternVL, or download the folder again"
            ) from error
        weights[f"{name}.weight"] = merged.to(weight.dtype)
    return weights


def read_internvl_vit(folder: Path, config: YiVLConfig) -> StateDict:
    """Return the ViT under the keys of ``yivl.checkpoint.vit``; adapters in it are merged.

    Raises:
        CheckpointError: As ``read_internvl_weights``.
    """
    weights, adapters = (
        {key: value for key, value in part.items() if key.startswith(VIT)}
        for part in _with_own_names(folder, read_main_weights(folder))
    )
    return {key.removeprefix(VIT): value for key, value in _merged(folder, weights, adapters).items()}


def read_internvl_generation_config(folder: Path, config: YiVLConfig) -> GenerationConfig:
    """Return the generation settings: the ids of the LLM, and greedy; the original never reads the file."""
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    return GenerationConfig(**ids, pad_token_id=config.pad_token_id)


def write_preprocessor(
    folder: Path,
    config: YiVLConfig,
    weights: Mapping[str, torch.Tensor],
    image_processor: BaseImageProcessor | None,
) -> None:
    """Write the CLIP preprocessing as published, beside ``config.json``; the ViT is in the main files only.

    Args:
        folder: Of the checkpoint.
        config: Of the model.
        weights: Of the model.
        image_processor: The CLIP processor.
    """
    if image_processor is None:
        return
    fields = {
        "crop_size": config.vision_config.image_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": list(image_processor.image_mean),
        "image_std": list(image_processor.image_std),
        "resample": int(image_processor.resample),
        "size": config.vision_config.image_size,
    }
    write_json(folder / "preprocessor_config.json", fields)


def _with_own_names(folder: Path, published: Mapping[str, torch.Tensor]) -> tuple[StateDict, StateDict]:
    """Return the weights by checkpoint key, and those of adapters.

    Raises:
        CheckpointError: If a name is of no part of the model, or two stand for the same weight.
    """
    weights: StateDict = {}
    adapters: StateDict = {}
    for key, value in published.items():
        prefix, own = next(((prefix, own) for prefix, own in _NAMES if key.startswith(prefix)), (None, ""))
        if prefix is None:
            names = ", ".join(name for name, _ in _NAMES)
            raise CheckpointError(
                f"{folder}: unexpected weight {key}; the names of an InternVL-Chat start with {names}"
            )
        name = own + key.removeprefix(prefix).removeprefix(_WRAPPED).replace(".base_layer.", ".")
        target = adapters if name.endswith(_LORA) else weights
        if name in target:
            raise CheckpointError(f"{folder}: {key} and another name stand for the same weight; download it again")
        target[name] = value
    return weights, adapters
