"""A checkpoint folder, hub id or LoRA adapter to a model ready to answer: device, dtype, quantization."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available

from yivl.checkpoint.format import StateDict, find_weights, read_weights
from yivl.errors import CheckpointError, YiVLError
from yivl.image_processing import ImageProcessor, load_clip_processor
from yivl.model.configuration import YiVLConfig, read_json, vit_folder
from yivl.model.modeling import YiVLForCausalLM
from yivl.tokenization import YiTokenizer, load_tokenizer

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]

NON_LORA_TRAINABLES: Final = "non_lora_trainables.safetensors"
"""What was trained beside an adapter. Source: haotian-liu/LLaVA, llava/train/train.py (there ``.bin``)."""

UNUSED_FILES: Final = ("*/open_clip_*", "*.png", ".gitattributes")
"""What no load reads. The ViT folder of the release carries a second copy at 224 pixels of 3.9 GB."""

UNQUANTIZED_MODULES: Final = ["model.vision_tower", "model.mm_projector", "lm_head"]
"""Kept in full precision under 4 and 8 bits: small, and the features are sensitive. Source: ours."""


@dataclass(frozen=True)
class LoadedModel:
    """Everything a checkpoint folder holds."""

    model: YiVLForCausalLM
    tokenizer: YiTokenizer
    image_processor: ImageProcessor
    name: str
    """Last part of the path or hub id, for people to read."""


def load_model(
    model_path: str | os.PathLike[str],
    *,
    model_base: str | os.PathLike[str] | None = None,
    device: str | dict[str, Any] = "auto",
    dtype: Dtype | torch.dtype = "auto",
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    attn_implementation: Attention = "sdpa",
) -> LoadedModel:
    """Return model, tokenizer and image processor of a checkpoint, in eval mode.

    Args:
        model_path: Folder in the published layout, hub id, or LoRA adapter folder.
        model_base: The checkpoint an adapter was trained on; by default the one its ``adapter_config.json`` names.
        device: ``auto`` (all GPUs, else MPS, else CPU), a torch device such as ``cpu``, ``mps``, ``cuda:1``, or a
            map of module names to devices.
        dtype: ``auto`` keeps the dtype the checkpoint was published in.
        load_in_4bit: nf4 with double quantization (bitsandbytes).
        load_in_8bit: int8 (bitsandbytes).
        attn_implementation: Attention of the decoder and the ViT.

    Raises:
        CheckpointError: If a folder or file is missing, no hub id matches, or the weights do not fit.
        YiVLError: If the device or the attention kernels are not to be had here, or arguments contradict each other.
    """
    if load_in_4bit and load_in_8bit:
        raise YiVLError("load_in_4bit and load_in_8bit exclude each other")
    if isinstance(dtype, str) and dtype not in get_args(Dtype):
        raise YiVLError(f"dtype={dtype!r}; expected one of {', '.join(get_args(Dtype))}")
    folder, adapter = resolve_model(model_path, model_base)
    if attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
        raise YiVLError("flash_attention_2 needs the flash-attn package and a GPU; use --attn-implementation sdpa")
    # The small files first: what is wrong with them is known before minutes of loading.
    config, tokenizer, image_processor = read_small_files(folder)
    if load_in_4bit and _device_map(device) == {"": "cpu"}:
        check_widths(config)
    kwargs: dict[str, Any] = {"dtype": dtype, "device_map": _device_map(device)}
    if load_in_4bit or load_in_8bit:
        kwargs["quantization_config"] = quantization_config(four_bits=load_in_4bit, dtype=dtype, folder=folder)
    model = YiVLForCausalLM.from_pretrained(folder, config=config, attn_implementation=attn_implementation, **kwargs)
    if adapter is not None:
        model = load_adapter(model, adapter)
    return LoadedModel(model.eval(), tokenizer, image_processor, _name(model_path))


def load_processors(
    model_path: str | os.PathLike[str], model_base: str | os.PathLike[str] | None = None
) -> tuple[YiVLConfig, YiTokenizer, ImageProcessor]:
    """Return configuration, tokenizer and image processor as ``load_model`` does, without loading weights.

    Raises:
        CheckpointError: If a folder or file is missing, or no hub id matches.
    """
    folder, _ = resolve_model(model_path, model_base)
    return read_small_files(folder)


def resolve_model(
    model_path: str | os.PathLike[str], model_base: str | os.PathLike[str] | None
) -> tuple[Path, Path | None]:
    """Return the local folders of the checkpoint and, if ``model_path`` is a LoRA adapter, of the adapter.

    Raises:
        CheckpointError: If a folder or hub id does not exist, or ``model_base`` is given without an adapter.
    """
    folder = resolve_checkpoint(model_path)
    if (folder / "adapter_config.json").is_file():
        return resolve_checkpoint(model_base or _adapter_base(folder)), folder
    if model_base is not None:
        raise CheckpointError(f"{model_path}: no adapter_config.json; --model-base goes with a LoRA adapter folder")
    return folder, None


def read_small_files(folder: Path) -> tuple[YiVLConfig, YiTokenizer, ImageProcessor]:
    """Return what a checkpoint folder holds beside its weights.

    Raises:
        CheckpointError: If a file is missing or damaged.
    """
    config, tokenizer = YiVLConfig.from_folder(folder), load_tokenizer(folder)
    clip_processor = load_clip_processor(vit_folder(folder, config.mm_vision_tower))
    return config, tokenizer, ImageProcessor(clip_processor, config.image_aspect_ratio)


def resolve_checkpoint(model_path: str | os.PathLike[str]) -> Path:
    """Return the local folder of a checkpoint, downloading a hub id.

    Raises:
        CheckpointError: If there is no such folder and no such repository can be reached.
    """
    if not os.fspath(model_path):
        raise CheckpointError("the model path is empty; give a checkpoint folder or a hub id")
    folder = Path(model_path)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(os.fspath(model_path), ignore_patterns=[*UNUSED_FILES]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{model_path}: no such folder, and no model of that name could be downloaded; give a checkpoint folder in "
            f"the published layout or a hub id such as 01-ai/Yi-VL-6B ({reason_of(error)})"
        ) from error


def reason_of(error: BaseException) -> str:
    """Return why a download failed: the first error of the chain, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no further word'}"


def quantization_config(*, four_bits: bool, dtype: Dtype | torch.dtype, folder: Path) -> BitsAndBytesConfig:
    """Return the bitsandbytes settings; vision tower, projector and ``lm_head`` stay unquantized."""
    if not four_bits:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=UNQUANTIZED_MODULES)
    published = read_json(folder / "config.json").get("torch_dtype", "float32")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=published if dtype == "auto" else dtype,
        llm_int8_skip_modules=UNQUANTIZED_MODULES,
    )


def check_widths(config: YiVLConfig) -> None:
    """Refuse what bitsandbytes cannot pack on a CPU with AVX512-BF16: widths that are no multiples of 64."""
    key_value = config.num_key_value_heads * config.head_dim
    for width in (config.hidden_size, config.intermediate_size, key_value):
        if width % 64:
            raise CheckpointError(
                f"4 bits on a CPU need layer widths that are multiples of 64, this model has {width}; use 8 bits"
            )


def load_adapter(model: YiVLForCausalLM, folder: str | os.PathLike[str], *, merge: bool = False) -> YiVLForCausalLM:
    """Put a LoRA adapter on the model, in place, with whatever else was trained beside it.

    The folder holds peft's files and, if more than the adapter was trained, ``non_lora_trainables.safetensors`` (or
    the lineage's ``.bin``) with published key names.

    Args:
        model: The base, unquantized if the adapter is to be merged.
        folder: The adapter.
        merge: Add the adapter to the weights, so that the model is a plain one again.

    Raises:
        CheckpointError: If the folder holds no adapter of this model, or a trained tensor has no place in it.
    """
    from peft import PeftConfig, PeftModel  # slow to import, and few loads need it

    weights = read_weights(find_weights(folder, ("adapter_model.safetensors", "adapter_model.bin")))
    try:
        config = PeftConfig.from_pretrained(os.fspath(folder))
        if not any("vision_tower" in key for key in weights):
            # The lineage names targets by their last part, which the ViT shares; its adapters never held the ViT.
            config.exclude_modules = r".*vision_tower.*"
        adapted = PeftModel.from_pretrained(model, os.fspath(folder), config=config)
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{folder}: not an adapter of this model ({error})") from error
    wanted = {key.replace(".default.", ".") for key, _ in adapted.named_parameters() if ".lora_" in key}
    if wanted != weights.keys():
        strange = sorted(wanted ^ weights.keys())
        raise CheckpointError(
            f"{folder}: not an adapter of this model: {len(strange)} keys differ, such as {strange[0]}"
        )
    model = adapted.merge_and_unload() if merge else adapted.get_base_model()
    trained = _non_lora_trainables(Path(folder))
    own = dict(model.named_parameters())
    # peft wraps a module that carries an adapter; its own weight then sits one level deeper.
    own |= {key.replace(".base_layer.", "."): value for key, value in own.items() if ".base_layer." in key}
    for key, value in trained.items():
        key = key.removeprefix("base_model.model.")
        if key not in own or own[key].shape != value.shape:
            raise CheckpointError(f"{folder}: {key} {list(value.shape)} has no place in the base model")
        with torch.no_grad():
            own[key].copy_(value)
    return model


def _non_lora_trainables(folder: Path) -> StateDict:
    for path in (folder / NON_LORA_TRAINABLES, (folder / NON_LORA_TRAINABLES).with_suffix(".bin")):
        if path.is_file():
            return read_weights(path)
    return {}


def _adapter_base(folder: Path) -> str:
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{folder}: the adapter does not name its base model; give it with --model-base")
    return str(base)


def _device_map(device: str | dict[str, Any]) -> str | dict[str, Any]:
    if isinstance(device, dict):
        return device
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return "auto" if has["cuda"] else {"": "mps" if has["mps"] else "cpu"}
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise YiVLError(f"device={device!r}; expected auto, cpu, mps, cuda or cuda:N") from error
    if not has.get(kind, True):
        raise YiVLError(f"device={device!r}: PyTorch finds no such device here; use --device cpu")
    return {"": device}


def _name(model_path: str | os.PathLike[str]) -> str:
    return Path(model_path).resolve().name if Path(model_path).exists() else os.fspath(model_path).split("/")[-1]
