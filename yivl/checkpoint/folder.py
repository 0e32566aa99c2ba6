"""What a local checkpoint folder holds, in the Yi-VL or the ``-hf`` format: configuration, processors, weights."""

import os
from pathlib import Path

from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from yivl.checkpoint.format import VIT, StateDict, read_json, read_main_weights, without_tower
from yivl.checkpoint.hf_format import (
    is_hf,
    load_hf_clip_processor,
    load_hf_tokenizer,
    read_hf_config,
    read_hf_vit,
    read_hf_weights,
)
from yivl.checkpoint.vit import read_clip_weights, read_vision_config
from yivl.errors import CheckpointError
from yivl.files.validation import library_errors
from yivl.image_processing import load_clip_processor
from yivl.model.configuration import YiVLConfig, fields_for
from yivl.tokenization import YiTokenizer, load_tokenizer


def read_config(folder: str | os.PathLike[str]) -> YiVLConfig:
    """Return the configuration of a checkpoint: its ``config.json``, and that of the ViT it names.

    Raises:
        CheckpointError: If a file is missing, is not valid JSON or describes another kind of model.
    """
    if is_hf(folder):
        return read_hf_config(folder)
    path = Path(folder) / "config.json"
    fields = read_json(path)
    if not isinstance(fields.get("mm_vision_tower"), str):
        raise CheckpointError(f"{path}: no mm_vision_tower; this is not a Yi-VL checkpoint")
    vision = read_vision_config(path.parent / fields["mm_vision_tower"] / "config.json")
    for name in ("model_type", "text_config", "vision_config"):  # the last two are for SGLang
        fields.pop(name, None)
    with library_errors(path):
        return YiVLConfig(**fields_for(YiVLConfig, fields), vision_config=vision)


def read_processors(folder: str | os.PathLike[str], config: YiVLConfig) -> tuple[YiTokenizer, CLIPImageProcessorPil]:
    """Return the tokenizer and the CLIP preprocessing of a checkpoint.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    if is_hf(folder):
        return load_hf_tokenizer(folder, config), load_hf_clip_processor(folder)
    return load_tokenizer(folder), load_clip_processor(Path(folder) / config.mm_vision_tower)


def read_vit_weights(folder: str | os.PathLike[str], config: YiVLConfig) -> StateDict:
    """Return the ViT of a checkpoint under the keys of ``yivl.checkpoint.vit``: that of ``vit/`` if there is one.

    Raises:
        CheckpointError: If there is none, or a file is damaged.
    """
    return read_hf_vit(folder) if is_hf(folder) else read_clip_weights(Path(folder) / config.mm_vision_tower)


def read_all_weights(folder: str | os.PathLike[str], config: YiVLConfig) -> StateDict:
    """Return all tensors by checkpoint key; the ViT is that of ``vit/``, as in a loaded model. Files are memory-mapped.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    if is_hf(folder):
        return read_hf_weights(folder, config)
    vit = read_clip_weights(Path(folder) / config.mm_vision_tower)
    return without_tower(read_main_weights(folder)) | {f"{VIT}{key}": value for key, value in vit.items()}
