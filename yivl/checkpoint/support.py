"""What this machine and this package support of the form a model is asked for in: device, dtype, attention kernels."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
from transformers.utils import is_flash_attn_2_available

from yivl.errors import CheckpointError, YiVLError
from yivl.model.configuration import YiVLConfig

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Device = str | dict[str, Any]

_OF_OTHER_LOADERS: Final = ("load_in_8bit", "load_in_4bit", "use_flash_attn")
_ROTARY: Final = "model.rotary_emb"


def check_support(
    config: YiVLConfig,
    attn_implementation: str,
    *,
    is_on_cpu: bool = False,
    dtype: torch.dtype | None = None,
    bnb_bits_on_cpu: int = 16,
) -> None:
    """Check that this machine can run a model in the given form.

    Args:
        config: Of the model.
        attn_implementation: Attention of the decoder and the ViT.
        is_on_cpu: Whether the model runs on a CPU.
        dtype: Of queries and keys; ``None`` if autocast chooses it.
        bnb_bits_on_cpu: 8 or 4 if bitsandbytes quantizes the model on a CPU.

    Raises:
        YiVLError: If FlashAttention is not installed, or does not support the device or the dtype.
        CheckpointError: If bitsandbytes cannot pack the layers on a CPU with AVX512-BF16.
    """
    if attn_implementation == "flash_attention_2":
        if is_on_cpu or not is_flash_attn_2_available():
            raise YiVLError("flash_attention_2 needs the flash-attn package and a GPU; use --attn-implementation sdpa")
        if dtype == torch.float32:
            raise YiVLError(
                "flash_attention_2 has no kernels for float32; use --dtype bfloat16 or --attn-implementation sdpa"
            )
    widths = (config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim)
    odd = next((width for width in widths if width % 64), None)
    if bnb_bits_on_cpu == 4 and odd:
        raise CheckpointError(
            f"training in 4 bits on a CPU needs layer widths that are multiples of 64, this model has {odd}; use 8 bits"
        )


def torch_dtype(dtype: Dtype | torch.dtype) -> torch.dtype | None:
    """Return the dtype that is asked for; ``None`` for that of the checkpoint."""
    if isinstance(dtype, torch.dtype):
        return dtype
    found: torch.dtype | None = None if dtype == "auto" else getattr(torch, dtype)
    return found


def parse_device(device: Device) -> Device:
    """Return the device map of ``load_model``'s ``device``.

    Raises:
        YiVLError: If it is not the name of a device, or PyTorch finds no such device.
    """
    if isinstance(device, dict):
        return device
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return "auto" if available["cuda"] else {"": "mps" if available["mps"] else "cpu"}
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise YiVLError(f"device={device!r}; expected auto, cpu, mps, cuda or cuda:N") from error
    kind, index = parsed.type, parsed.index or 0
    if not available.get(kind, True) or (kind == "cuda" and index >= torch.cuda.device_count()):
        raise YiVLError(f"device={device!r}: PyTorch finds no such device on this machine; use --device cpu")
    return {"": "cpu" if kind == "cpu" else device}  # cpu:0 is the CPU


def check_arguments(folder: str | os.PathLike[str], arguments: Iterable[str]) -> None:
    """Check the arguments of ``from_pretrained`` of a model for those of the calls on model cards.

    Args:
        folder: The checkpoint.
        arguments: Names of the others.

    Raises:
        CheckpointError: If the folder is missing.
        YiVLError: If an argument is that of another loader.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(
            f"{os.fspath(folder)}: no such folder; for a hub id, use yivl.mm_utils.load_pretrained_model"
        )
    if wrong := [name for name in _OF_OTHER_LOADERS if name in arguments]:
        raise YiVLError(
            f"{', '.join(wrong)}: no argument of from_pretrained; use yivl.mm_utils.load_pretrained_model, which has "
            "load_8bit and load_4bit, or attn_implementation"
        )


def own_device_map(
    device_map: Mapping[str, Any], keys: Iterable[str], to_published_key: Callable[[str], str]
) -> dict[str, Any]:
    """Return a device map with the names of modules in memory.

    Args:
        device_map: Its names are those in memory, or all those of the files.
        keys: Of the weights in memory.
        to_published_key: Returns the name of a weight in the files.

    Raises:
        YiVLError: If a module has no device, or the weights of a layer or of the vision tower have several.
    """
    keys = list(keys)
    if all(_device_of(key, device_map) for key in keys):
        return dict(device_map)
    blocks: dict[str, Any] = {}
    for key in keys:
        published, block = to_published_key(key), _block_of(key)
        found = _device_of(published, device_map)
        if not found:
            raise YiVLError(f"device_map: no device for {published.rpartition('.')[0]}; name all modules of the model")
        if blocks.setdefault(block, found[0]) != found[0]:
            module = published.rpartition(".")[0]
            raise YiVLError(f"device_map: {module} is on another device than the rest of {block}; give them one")
    rotary = _device_of(to_published_key(_ROTARY), device_map)
    return blocks | {_ROTARY: rotary[0] if rotary else blocks["model.embed_tokens"]}


def _device_of(name: str, device_map: Mapping[str, Any]) -> list[Any]:
    """Return the device of the longest name that a module or one around it has; nothing if none has."""
    parts = name.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
    return [device_map[name] for name in names if name in device_map][:1]


def _block_of(key: str) -> str:
    """Return the module of a weight that stays on one device."""
    parts = key.split(".")
    if parts[:2] == ["model", "layers"]:
        return ".".join(parts[:3])
    return ".".join(parts[:2]) if parts[0] == "model" else parts[0]
