"""What a local checkpoint folder holds, in any of the formats: configuration, processors, weights."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from transformers import GenerationConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from yivl.checkpoint import hf_format, internvl_format, yivl_format
from yivl.checkpoint.format import StateDict, read_json
from yivl.model.configuration import YiVLConfig
from yivl.tokenization import YiTokenizer, load_tokenizer


@dataclass(frozen=True)
class Format:
    """How a folder holds a model. Weights have checkpoint keys, the names in memory, which are those of Yi-VL."""

    name: str
    """For model cards and messages."""
    matches: Callable[[Mapping[str, Any]], bool]
    """Whether the fields of a ``config.json`` are of this format."""
    read_config: Callable[[Path], YiVLConfig]
    load_tokenizer: Callable[[Path, YiVLConfig], YiTokenizer]
    load_clip_processor: Callable[[Path, YiVLConfig], CLIPImageProcessorPil]
    read_generation_config: Callable[[Path, YiVLConfig], GenerationConfig | None]
    read_shapes: Callable[[Path, YiVLConfig], StateDict]
    """All tensors on the meta device, of the ViT only where ``has_vit_folder`` is false."""
    read_weights: Callable[[Path, YiVLConfig], StateDict]
    """All tensors. Files are memory-mapped."""
    read_vit: Callable[[Path, YiVLConfig], StateDict]
    """The ViT under the keys of ``yivl.checkpoint.vit``."""
    to_published_key: Callable[[str], str]
    """The name of a checkpoint key in the files."""
    write_image_files: Callable[..., None] | None
    """Writes the CLIP preprocessing, and ``vit/`` if it has one; ``None``: no checkpoint is saved in this format."""
    has_vit_folder: bool
    """Whether the ViT is that of ``vit/``, and the names in the main files are those in memory."""


def _load_tokenizer(folder: Path, config: YiVLConfig) -> YiTokenizer:
    return load_tokenizer(folder)


YI_VL: Final = Format(
    name="Yi-VL (LLaVA) checkpoint format",
    matches=yivl_format.is_yivl,
    read_config=yivl_format.read_yivl_config,
    load_tokenizer=_load_tokenizer,
    load_clip_processor=yivl_format.load_yivl_clip_processor,
    read_generation_config=yivl_format.read_yivl_generation_config,
    read_shapes=yivl_format.read_yivl_shapes,
    read_weights=yivl_format.read_yivl_weights,
    read_vit=yivl_format.read_yivl_vit,
    to_published_key=str,
    write_image_files=yivl_format.write_vit,
    has_vit_folder=True,
)
HF: Final = Format(
    name="`-hf` format of transformers' LLaVA, with the projector of Yi-VL",
    matches=hf_format.is_hf,
    read_config=hf_format.read_hf_config,
    load_tokenizer=hf_format.load_hf_tokenizer,
    load_clip_processor=hf_format.load_hf_clip_processor,
    read_generation_config=hf_format.read_hf_generation_config,
    read_shapes=hf_format.read_hf_shapes,
    read_weights=hf_format.read_hf_weights,
    read_vit=hf_format.read_hf_vit,
    to_published_key=hf_format.to_hf_key,
    write_image_files=None,
    has_vit_folder=False,
)
INTERNVL: Final = Format(
    name="checkpoint format of InternVL-Chat-V1-2",
    matches=internvl_format.is_internvl,
    read_config=internvl_format.read_internvl_config,
    load_tokenizer=_load_tokenizer,
    load_clip_processor=internvl_format.load_internvl_clip_processor,
    read_generation_config=internvl_format.read_internvl_generation_config,
    read_shapes=internvl_format.read_internvl_shapes,
    read_weights=internvl_format.read_internvl_weights,
    read_vit=internvl_format.read_internvl_vit,
    to_published_key=internvl_format.to_internvl_key,
    write_image_files=internvl_format.write_preprocessor,
    has_vit_folder=False,
)


def find_format(fields: Mapping[str, Any]) -> Format | None:
    """Return the format of the fields of a ``config.json``; ``None`` for a model of another kind."""
    return next((known for known in (HF, INTERNVL, YI_VL) if known.matches(fields)), None)


def format_of(folder: str | os.PathLike[str]) -> Format:
    """Return the format of a checkpoint folder; of another model that of Yi-VL, which then tells what it lacks.

    Raises:
        CheckpointError: If its ``config.json`` is missing or damaged.
    """
    return find_format(read_json(Path(folder) / "config.json")) or YI_VL


def read_config(folder: str | os.PathLike[str]) -> YiVLConfig:
    """Return the configuration of a checkpoint.

    Raises:
        CheckpointError: If a file is missing, is not valid JSON or describes another kind of model.
    """
    return format_of(folder).read_config(Path(folder))


def read_processors(folder: str | os.PathLike[str], config: YiVLConfig) -> tuple[YiTokenizer, CLIPImageProcessorPil]:
    """Return the tokenizer and the CLIP preprocessing of a checkpoint.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    found, path = format_of(folder), Path(folder)
    return found.load_tokenizer(path, config), found.load_clip_processor(path, config)


def read_vit_weights(folder: str | os.PathLike[str], config: YiVLConfig) -> StateDict:
    """Return the ViT of a checkpoint under the keys of ``yivl.checkpoint.vit``: that of ``vit/`` if there is one.

    Raises:
        CheckpointError: If there is none, or a file is damaged.
    """
    return format_of(folder).read_vit(Path(folder), config)


def read_all_weights(folder: str | os.PathLike[str], config: YiVLConfig) -> StateDict:
    """Return all tensors by checkpoint key, as in a loaded model. Files are memory-mapped.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    return format_of(folder).read_weights(Path(folder), config)
