"""What a run starts from: a Yi-VL checkpoint, or a Yi language model and a ViT with a fresh projector between them."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import is_flash_attn_2_available

from yivl.checkpoint.loading import check_widths, quantization_config, read_small_files, resolve_checkpoint
from yivl.checkpoint.vit import is_open_clip, read_clip_weights, read_vit_config
from yivl.errors import CheckpointError, YiVLError
from yivl.image_processing import ImageProcessor, load_clip_processor
from yivl.model.attention import register_packed_sdpa
from yivl.model.configuration import YiVLConfig, read_json
from yivl.model.modeling import YiVLForCausalLM
from yivl.tokenization import YiTokenizer, load_tokenizer
from yivl.train.arguments import ModelArguments

# Fields of a language model's config.json that are not those of the vision-language model made of it.
_OF_THE_LANGUAGE_MODEL = ("model_type", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version")


@dataclass(frozen=True)
class Start:
    """All that is known before weights are read."""

    folder: Path
    config: YiVLConfig
    """With the picture size of the weights; ``image_size`` is that of the run."""
    image_size: int
    """Pixels on a side."""
    is_language_model: bool
    """Whether ``folder`` holds no projector and no ViT."""
    vit: Path | None
    """Folder of a ViT that is not the checkpoint's own."""
    tokenizer: YiTokenizer
    image_processor: ImageProcessor


def read_start(arguments: ModelArguments) -> Start:
    """Read the small files of what ``--model_name_or_path`` and ``--vision_tower`` name.

    Raises:
        CheckpointError: If something is missing, damaged or does not fit.
    """
    folder = resolve_checkpoint(os.path.expanduser(arguments.model_name_or_path))
    is_language_model = "mm_vision_tower" not in read_json(folder / "config.json")
    vit = None if arguments.vision_tower is None else Path(os.path.expanduser(arguments.vision_tower))
    fresh = ("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature")
    if not is_language_model:
        if typed := [name for name in fresh if getattr(arguments, name) != getattr(ModelArguments, name)]:
            raise YiVLError(f"--{typed[0]} is for a fresh start from a language model; {folder} has its own")
        config, tokenizer, image_processor = read_small_files(folder)
        clip_processor = image_processor.clip_processor
        if vit is not None and not _have_same_shapes(read_vit_config(vit), config.vision_config):
            raise CheckpointError(f"{vit}: another ViT than that of {folder}; a new one starts from a language model")
    elif vit is None:
        raise CheckpointError(f"{folder}: a language model alone; name the ViT to start with by --vision_tower")
    else:
        config, tokenizer = _fresh_config(folder, vit, arguments), load_tokenizer(folder)
        # open_clip keeps its preprocessing elsewhere; that of its ViTs is CLIP's.
        clip_processor = CLIPImageProcessorPil() if is_open_clip(vit) else load_clip_processor(vit)
    if arguments.image_aspect_ratio is not None:
        config.image_aspect_ratio = arguments.image_aspect_ratio
    if arguments.bits == 4 and not torch.cuda.is_available():
        check_widths(config)
    image_size = arguments.image_size or config.vision_config.image_size
    if image_size % config.vision_config.patch_size:
        raise YiVLError(f"--image_size {image_size} is no multiple of the patch size {config.vision_config.patch_size}")
    clip_processor.size = {"shortest_edge": image_size}
    clip_processor.crop_size = {"height": image_size, "width": image_size}
    image_processor = ImageProcessor(clip_processor, config.image_aspect_ratio)
    return Start(folder, config, image_size, is_language_model, vit, tokenizer, image_processor)


def load_start(start: Start, arguments: ModelArguments, *, dtype: torch.dtype, packing: bool) -> YiVLForCausalLM:
    """Return the model with its weights, reading pictures of the size of the run.

    Raises:
        CheckpointError: If weights are missing or do not fit.
    """
    attention = arguments.attn_implementation
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise YiVLError("flash_attention_2 needs the flash-attn package and a GPU; use --attn_implementation sdpa")
    kwargs: dict[str, Any] = {}
    if arguments.bits != 16:
        kwargs["quantization_config"] = quantization_config(
            four_bits=arguments.bits == 4, dtype=dtype, folder=start.folder
        )
        # The place of this process; quantized weights cannot be moved there later.
        kwargs["device_map"] = {"": int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else "cpu"}
    model = YiVLForCausalLM.from_pretrained(
        start.folder,
        config=start.config,
        vit_weights=None if start.vit is None else read_clip_weights(start.vit),
        fresh_projector=start.is_language_model,
        dtype=dtype,
        attn_implementation=register_packed_sdpa() if packing and attention == "sdpa" else attention,
        **kwargs,
    )
    model.resize_images(start.image_size)
    model.config.use_cache = False
    return model


def empty_start(start: Start) -> YiVLForCausalLM:
    """Return the model without weights, on the meta device: what a dry run counts."""
    with torch.device("meta"):
        model = YiVLForCausalLM(start.config)
    model.resize_images(start.image_size)
    return model


def _have_same_shapes(one: CLIPVisionConfig, other: CLIPVisionConfig) -> bool:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size", "image_size")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _fresh_config(folder: Path, vit: Path, arguments: ModelArguments) -> YiVLConfig:
    fields = {
        key: value for key, value in read_json(folder / "config.json").items() if key not in _OF_THE_LANGUAGE_MODEL
    }
    vision_config = read_vit_config(vit)
    return YiVLConfig(
        **fields,
        vision_config=vision_config,
        mm_vision_tower=f"./vit/{vit.resolve().name}",
        mm_hidden_size=vision_config.hidden_size,
        mm_projector_type=arguments.mm_projector_type,
        mm_vision_select_layer=arguments.mm_vision_select_layer,
        mm_vision_select_feature=arguments.mm_vision_select_feature,
    )
