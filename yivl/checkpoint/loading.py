"""Loading of checkpoints, hub ids and LoRA adapters: device, dtype, quantization, image settings."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from transformers import BitsAndBytesConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from yivl.checkpoint.cpu_precision import fit_to_cpu
from yivl.checkpoint.download import resolve_checkpoint
from yivl.checkpoint.folder import format_of, read_config, read_processors
from yivl.checkpoint.format import (
    ADAPTER_CONFIG,
    PROJECTOR,
    WEIGHTS,
    StateDict,
    check_keys,
    read_image_settings,
    read_json,
    without_tower,
)
from yivl.checkpoint.support import (
    Device,
    Dtype,
    check_arguments,
    check_support,
    own_device_map,
    parse_device,
    torch_dtype,
)
from yivl.checkpoint.vit import copy_vit_weights
from yivl.command_line import require
from yivl.errors import CheckpointError, YiVLError
from yivl.files.validation import library_errors
from yivl.image_processing import ImageProcessor, set_image_size
from yivl.model.architectures import check_class, model_class
from yivl.model.block_attention import register_block_sdpa
from yivl.model.configuration import YiVLConfig
from yivl.model.modeling import YiVLForCausalLM
from yivl.tokenization import YiTokenizer, check_control_tokens, check_vocabulary

logger = logging.getLogger(__name__)

Attention = Literal["sdpa", "eager", "flash_attention_2"]

UNQUANTIZED_MODULES: Final = ["model.vision_tower", "model.mm_projector", "lm_head"]
"""Kept in full precision under 4 and 8 bits: small, and the features are sensitive. Source: ours."""


@dataclass(frozen=True)
class LoadedModel:
    """Model, tokenizer and image processor of a checkpoint."""

    model: YiVLForCausalLM
    tokenizer: YiTokenizer
    image_processor: ImageProcessor
    name: str
    """Last part of the path or hub id, for display."""
    decoding_functions: tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]] | None = None
    """Compiled functions of a layer and of the head, see ``yivl.inference.compilation``; ``None``: not compiled."""
    decoding_graphs: object | None = None
    """``DecodingGraphs`` of ``yivl.inference.cuda_graphs``; ``None``: kernels are launched one by one."""


def load_model(
    model_path: str | os.PathLike[str],
    *,
    model_base: str | os.PathLike[str] | None = None,
    device: Device = "auto",
    dtype: Dtype | torch.dtype = "auto",
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    attn_implementation: Attention = "sdpa",
    merge_adapter: bool = False,
) -> LoadedModel:
    """Return model, tokenizer and image processor of a checkpoint, in eval mode.

    Args:
        model_path: Checkpoint folder, hub id, or LoRA adapter folder.
        model_base: The base model of an adapter; by default the one its ``adapter_config.json`` names.
        device: ``auto`` (all GPUs, else MPS, else CPU), a torch device such as ``cpu``, ``mps``, ``cuda:1``, or a
            map of module names to devices.
        dtype: ``auto`` keeps the dtype of the checkpoint. On a CPU without instructions for products in that dtype the
            weights keep it, and activations and products are float32.
        load_in_4bit: Quantize the decoder layers: on a CPU with a scale and a zero for 32 weights, elsewhere nf4 with
            double quantization (bitsandbytes).
        load_in_8bit: int8: on a CPU with a scale for each output, elsewhere LLM.int8() (bitsandbytes).
        attn_implementation: Attention of the decoder and the ViT. On a CPU, ``sdpa`` computes prompts in bfloat16
            in blocks (``yivl.model.block_attention``).
        merge_adapter: Merge the adapter into the weights, so that the model can be saved as a checkpoint.

    Raises:
        CheckpointError: If a folder or file is missing, no hub id matches, or the weights do not fit.
        YiVLError: If the device or the attention kernels are not available, or arguments contradict each other.
    """
    if load_in_4bit and load_in_8bit:
        raise YiVLError("load_in_4bit and load_in_8bit exclude each other")
    if isinstance(dtype, str) and dtype not in get_args(Dtype):
        raise YiVLError(f"dtype={dtype!r}; expected one of {', '.join(get_args(Dtype))}")
    # The small files first: their errors show before minutes of loading.
    folder, adapter, image_settings = _resolve_model(model_path, model_base)
    config, tokenizer, image_processor = read_small_files(folder, **image_settings)
    device_map, bits = parse_device(device), 4 if load_in_4bit else 8 if load_in_8bit else 16
    if bits != 16 and merge_adapter:
        raise YiVLError("merge_adapter: an adapter is merged into unquantized weights; leave out load_in_4bit or 8bit")
    is_on_cpu = device_map == {"": "cpu"}
    if bits != 16 and not is_on_cpu:
        require("bitsandbytes")
    check_support(config, attn_implementation, is_on_cpu=is_on_cpu, dtype=torch_dtype(dtype) or config.dtype)
    model = model_class(config).from_pretrained(
        folder,
        config=config,
        bits=16 if is_on_cpu else bits,
        image_size=image_settings.get("image_size"),
        dtype="auto" if is_on_cpu and bits != 16 else dtype,  # a cast would read all weights at once
        device_map=device_map,
        attn_implementation=attn_implementation,
    )
    if is_on_cpu and attn_implementation == "sdpa":
        model.set_attn_implementation(register_block_sdpa())
    if adapter is not None:
        from yivl.checkpoint.adapters import load_adapter  # imports peft, which is slow

        model = load_adapter(model, adapter, merge=merge_adapter)
    if is_on_cpu and not merge_adapter:  # a merged model is saved, in the dtype of the checkpoint
        fit_to_cpu(model, torch_dtype(dtype), bits=bits)
    path = Path(model_path)
    return LoadedModel(model.eval(), tokenizer, image_processor, (path.resolve() if path.exists() else path).name)


def load_processors(
    model_path: str | os.PathLike[str], model_base: str | os.PathLike[str] | None = None
) -> tuple[YiVLConfig, YiTokenizer, ImageProcessor]:
    """Return configuration, tokenizer and image processor as ``load_model`` does, without weights, nor their download.

    Raises:
        CheckpointError: If a folder or file is missing, or no hub id matches.
    """
    folder, _, image_settings = _resolve_model(model_path, model_base, weights=False)
    return read_small_files(folder, **image_settings)


def _resolve_model(
    model_path: str | os.PathLike[str], model_base: str | os.PathLike[str] | None, *, weights: bool = True
) -> tuple[Path, Path | None, dict[str, Any]]:
    """Return the folder of the checkpoint, and of a LoRA adapter its folder and image settings."""
    folder = resolve_checkpoint(model_path, weights=weights)
    if (folder / ADAPTER_CONFIG).is_file():
        base = model_base or read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        if not base:
            raise CheckpointError(f"{folder}: the adapter does not name its base model; give it with --model-base")
        return resolve_checkpoint(base, weights=weights), folder, read_image_settings(folder)
    if model_base is not None:
        raise CheckpointError(f"{model_path}: no {ADAPTER_CONFIG}; --model-base goes with a LoRA adapter folder")
    return folder, None, {}


def read_small_files(folder: Path, **image_settings: Any) -> tuple[YiVLConfig, YiTokenizer, ImageProcessor]:
    """Return configuration, tokenizer and image processor of a checkpoint; the settings are those of ``set_images``.

    Raises:
        CheckpointError: If a file is missing or damaged, or a setting is not possible.
    """
    config = read_config(folder)
    tokenizer, clip_processor = read_processors(folder, config)
    check_vocabulary(folder, tokenizer, config.vocab_size)
    check_control_tokens(folder, tokenizer, config.prompt_template)
    with library_errors(folder):
        return config, tokenizer, set_images(config, clip_processor, **image_settings)


def set_images(
    config: YiVLConfig,
    clip_processor: CLIPImageProcessorPil,
    *,
    image_size: int | None = None,
    image_aspect_ratio: str | None = None,
) -> ImageProcessor:
    """Return the image processor of a checkpoint, with other settings where given.

    Args:
        config: Its aspect ratio is set in place; its image size stays that of the weights until they are resized.
        clip_processor: Its size is set in place.
        image_size: Side of the ViT input in pixels; ``None`` keeps that of ``clip_processor``.
        image_aspect_ratio: ``pad``, ``square`` or ``squash``; ``None`` keeps that of ``config``.

    Raises:
        CheckpointError: If a value is not possible, or the size of ``clip_processor`` is not that of the ViT.
    """
    is_changed = image_aspect_ratio not in (None, config.image_aspect_ratio)
    if image_size is None:
        # The size of the file is that of its own aspect ratio.
        found = ImageProcessor(clip_processor, config.image_aspect_ratio).image_size
        expected = config.vision_config.image_size
        if found != expected:
            raise CheckpointError(
                f"preprocessor_config.json: size is {found}; expected image_size of the ViT, {expected}"
            )
    else:
        patch_size = config.vision_config.patch_size
        if image_size < 1 or image_size % patch_size:
            raise CheckpointError(f"image_size {image_size} is not a multiple of the patch size {patch_size}")
        config.num_patches_at(image_size)
    if image_aspect_ratio is not None:
        config.image_aspect_ratio = image_aspect_ratio
    if image_size is not None or is_changed:
        set_image_size(clip_processor, image_size or config.vision_config.image_size, config.image_aspect_ratio)
    return ImageProcessor(clip_processor, config.image_aspect_ratio)


def load_pretrained(
    kind: type[YiVLForCausalLM],
    load: Callable[..., YiVLForCausalLM],
    folder: str | os.PathLike[str],
    *,
    config: YiVLConfig | None = None,
    bits: int = 16,
    image_size: int | None = None,
    vit_weights: StateDict | None = None,
    fresh_projector: bool = False,
    **kwargs: Any,
) -> YiVLForCausalLM:
    """Return a model with its weights: ``YiVLForCausalLM.from_pretrained``, where the arguments are documented.

    Keys and shapes are compared with the configuration before any weight is read.

    Args:
        kind: The class that is asked for.
        load: Its ``from_pretrained`` of transformers.

    Raises:
        CheckpointError: If a file is missing or damaged, or keys are missing, unexpected or of a wrong shape, or the
            checkpoint is of another architecture.
        YiVLError: If an argument is one of another loader, or a device map names no module of the model.
        MemoryError: If a quantized model, which cannot be offloaded, does not fit on the GPUs.
    """
    check_arguments(folder, kwargs)
    config = read_config(folder) if config is None else config
    check_class(kind, config, folder)
    source, path = format_of(folder), Path(folder)
    with library_errors(path / "config.json"):
        expected = empty_model(config).state_dict()
    if isinstance(kwargs.get("device_map"), dict):
        kwargs["device_map"] = own_device_map(kwargs["device_map"], expected, source.to_published_key)
    found = source.read_shapes(path, config)
    if source.has_vit_folder or vit_weights is not None:  # compared with that ViT below
        expected, found = without_tower(expected), without_tower(found)
    if fresh_projector:
        expected = {key: value for key, value in expected.items() if key in found or not key.startswith(PROJECTOR)}
    check_keys(folder, expected, found, rename=source.to_published_key)
    vit = source.read_vit(path, config) if source.has_vit_folder and vit_weights is None else vit_weights
    generation = source.read_generation_config(path, config)
    kwargs = ({} if generation is None else {"generation_config": generation}) | kwargs
    if not source.has_vit_folder:  # memory-mapped, with other names than in the files
        weights = source.read_weights(path, config)
        config.dtype = weights["lm_head.weight"].dtype
        kwargs = {"state_dict": weights} | kwargs
    if bits != 16:
        kwargs["quantization_config"] = _quantization_config(config, bits, kwargs.get("dtype", "auto"))
    if source.has_vit_folder:
        _check_index(path)
    # The copy of the ViT in the main files may be of any shape: it is replaced.
    read_from = os.fspath(folder) if source.has_vit_folder else None
    try:
        model = load(read_from, config=config, ignore_mismatched_sizes=True, **kwargs)
    except ValueError as error:
        if "enough GPU RAM" not in str(error):
            raise
        raise MemoryError(f"{folder}: the GPUs are too small for the quantized model") from error
    model.name_or_path = os.fspath(folder)
    # The published 4,096 is the context length, which generate() takes from config.json.
    model.generation_config.max_length = None
    num_different = 0 if vit is None else copy_vit_weights(model.get_vision_tower().vit, vit, source=str(folder))
    if num_different and vit_weights is None:
        logger.info(
            "%d ViT tensors in %s differ from those in the main files and are used, as in the reference implementation",
            num_different,
            config.mm_vision_tower,
        )
    if image_size is not None:
        model.resize_images(image_size)
    return model


def _check_index(folder: Path) -> None:
    """Check the field of a weight index that transformers alone needs.

    Raises:
        CheckpointError: If it is missing.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return
        index = folder / f"{name}.index.json"
        if index.is_file():
            if "metadata" not in read_json(index):
                raise CheckpointError(f'{index}: no metadata, which transformers needs; add "metadata": {{}}')
            return


def empty_model(config: YiVLConfig) -> YiVLForCausalLM:
    """Return a model on the meta device, without memory for its weights."""
    with torch.device("meta"):
        return model_class(config)(config)


def _quantization_config(config: YiVLConfig, bits: int, dtype: Dtype | torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=(config.dtype or torch.float32) if dtype == "auto" else dtype,
        llm_int8_skip_modules=UNQUANTIZED_MODULES,
    )
