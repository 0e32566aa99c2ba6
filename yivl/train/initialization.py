"""Initialization of a run: from a Yi-VL checkpoint, or from a language model, a ViT and a random projector."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from yivl.checkpoint.download import resolve_checkpoint
from yivl.checkpoint.folder import read_vit_weights
from yivl.checkpoint.format import StateDict, check_weight_file, read_json
from yivl.checkpoint.hf_format import is_hf
from yivl.checkpoint.loading import check_support, empty_model, read_small_files, set_images
from yivl.checkpoint.projector import load_projector
from yivl.checkpoint.vit_source import ViTSource, resolve_vit
from yivl.errors import CheckpointError, YiVLError
from yivl.files.validation import library_errors
from yivl.image_processing import ImageProcessor
from yivl.model.attention import register_packed_sdpa
from yivl.model.configuration import YiVLConfig, fields_for
from yivl.model.modeling import YiVLForCausalLM
from yivl.tokenization import YiTokenizer, check_vocabulary, load_tokenizer
from yivl.train.arguments import ModelArguments

# Fields of a language model's config.json that do not hold for the vision-language model.
_OF_THE_LANGUAGE_MODEL = ("model_type", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version")
_SHAPE_OF_A_VIT = (
    *("hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "patch_size", "image_size"),
)


@dataclass(frozen=True)
class Start:
    """Everything about an initialization that is known before weights are read."""

    folder: Path
    config: YiVLConfig
    """With the image size of the weights; ``image_size`` is that of the run."""
    image_size: int
    """Side of the ViT input in pixels."""
    is_language_model: bool
    """Whether ``folder`` holds no projector and no ViT."""
    vit: ViTSource | None
    """A ViT that replaces the checkpoint's own."""
    tokenizer: YiTokenizer
    image_processor: ImageProcessor


def read_start(arguments: ModelArguments, *, weights: bool = True) -> Start:
    """Read the small files of ``--model_name_or_path`` and ``--vision_tower``, then download weights if all flags fit.

    Args:
        arguments: Of the run.
        weights: Whether to download weights that are not on this machine; a dry run needs none.

    Raises:
        CheckpointError: If something is missing, damaged or does not fit.
        YiVLError: If flags do not fit the checkpoint, or an adapter could not be used after training.
    """
    folder = resolve_checkpoint(arguments.model_name_or_path, weights=False)
    is_language_model = not is_hf(folder) and "mm_vision_tower" not in read_json(folder / "config.json")
    if not is_language_model:
        config, tokenizer, image_processor = read_small_files(folder)
        clip_processor = image_processor.clip_processor
        vit = _replacing_vit(folder, config, arguments)
    elif arguments.vision_tower is None:
        raise CheckpointError(f"{folder}: a language model without a ViT; give one with --vision_tower")
    elif arguments.lora_enable:
        raise YiVLError(f"--lora_enable: {folder} is a language model without a projector; give a Yi-VL checkpoint")
    else:
        vit = resolve_vit(arguments.vision_tower, weights=False)
        config, tokenizer = _config_of_parts(folder, vit, arguments), load_tokenizer(folder)
        check_vocabulary(folder, tokenizer, config.vocab_size)
        clip_processor = vit.clip_processor
    if arguments.pretrain_mm_mlp_adapter is not None:
        check_weight_file(Path(arguments.pretrain_mm_mlp_adapter))
    image_size = config.vision_config.image_size if arguments.image_size is None else arguments.image_size
    image_processor = set_images(
        config, clip_processor, image_size=image_size, image_aspect_ratio=arguments.image_aspect_ratio
    )
    bits_on_cpu = 16 if torch.cuda.is_available() else arguments.bits
    check_support(config, arguments.attn_implementation, bnb_bits_on_cpu=bits_on_cpu)
    compares_vits = vit is not None and arguments.lora_enable and not arguments.unfreeze_mm_vision_tower
    if weights or compares_vits:
        folder = resolve_checkpoint(arguments.model_name_or_path)
        vit = None if arguments.vision_tower is None else resolve_vit(arguments.vision_tower)
    if vit is not None and compares_vits:
        _check_same_vit(vit, read_vit_weights(folder, config))
    return Start(folder, config, image_size, is_language_model, vit, tokenizer, image_processor)


def load_start(start: Start, arguments: ModelArguments, *, dtype: torch.dtype, packing: bool) -> YiVLForCausalLM:
    """Return the model with its weights and the image size of the run.

    Raises:
        CheckpointError: If weights are missing or do not fit.
    """
    attention = arguments.attn_implementation
    # Quantized weights are placed while they are loaded; they cannot be moved later.
    device = {"": int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else "cpu"}
    model = YiVLForCausalLM.from_pretrained(
        start.folder,
        config=start.config,
        attn_implementation=register_packed_sdpa() if packing and attention == "sdpa" else attention,
        dtype=dtype,
        device_map=None if arguments.bits == 16 else device,
        bits=arguments.bits,
        image_size=start.image_size,
        vit_weights=None if start.vit is None else start.vit.read_weights(),
        fresh_projector=start.is_language_model,
    )
    if arguments.pretrain_mm_mlp_adapter is not None:
        load_projector(model, Path(arguments.pretrain_mm_mlp_adapter))
    model.config.use_cache = False
    return model


def empty_start(start: Start) -> YiVLForCausalLM:
    """Return the model of a dry run, on the meta device."""
    model = empty_model(start.config)
    model.resize_images(start.image_size)
    return model


def _replacing_vit(folder: Path, config: YiVLConfig, arguments: ModelArguments) -> ViTSource | None:
    """Return the ViT of ``--vision_tower`` for a checkpoint, which has a projector and a ViT.

    Raises:
        CheckpointError: If flags are for another projector or ViT; names all of them.
    """
    names = ("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature")
    wrong = [name for name in names if getattr(arguments, name) != getattr(ModelArguments, name)]
    vit, problems = None, []
    if arguments.vision_tower is not None:
        try:
            vit = resolve_vit(arguments.vision_tower, weights=False)
        except CheckpointError as error:
            problems.append(f"--vision_tower {error}")
        else:
            if any(getattr(vit.config, name) != getattr(config.vision_config, name) for name in _SHAPE_OF_A_VIT):
                wrong.append("vision_tower")
    if wrong:
        flags = ", ".join(f"--{name} {getattr(arguments, name)}" for name in wrong)
        problems.insert(
            0, f"{flags}: {folder} has another projector or ViT; drop them, or initialize from a language model"
        )
    if problems:
        raise CheckpointError("; ".join(problems))
    return vit


def _check_same_vit(vit: ViTSource, own: StateDict) -> None:
    """Refuse a frozen ViT other than the base model's under LoRA: an adapter folder does not hold it."""
    other = vit.read_weights()
    if own.keys() != other.keys() or any(not torch.equal(value, other[key]) for key, value in own.items()):
        raise YiVLError(
            f"--vision_tower {vit.path}: not the ViT of the base model, and an adapter does not store a frozen ViT; "
            "add --unfreeze_mm_vision_tower True, or drop --vision_tower"
        )


def _config_of_parts(folder: Path, vit: ViTSource, arguments: ModelArguments) -> YiVLConfig:
    path = folder / "config.json"
    fields = {key: value for key, value in read_json(path).items() if key not in _OF_THE_LANGUAGE_MODEL}
    fields |= {
        "vision_config": vit.config,
        "mm_vision_tower": f"./vit/{vit.name}",
        "mm_hidden_size": vit.config.hidden_size,
        "mm_projector_type": arguments.mm_projector_type,
        "mm_vision_select_layer": arguments.mm_vision_select_layer,
        "mm_vision_select_feature": arguments.mm_vision_select_feature,
    }
    with library_errors(path):
        return YiVLConfig(**fields_for(YiVLConfig, fields))
