"""A model to a checkpoint folder in the published layout, written beside its place and moved there in one step."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

_TOWER: Final = "model.vision_tower.vision_tower."
METADATA: Final = {"format": "pt"}  # transformers refuses safetensors files without it


@contextmanager
def atomic_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of ``folder`` when the block ends well, and vanishes otherwise.

    A reader sees the old folder or the whole new one. Files that are only in the old folder are gone afterwards.
    """
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _fsync(path)
        if target.exists():
            # Two folders cannot be swapped in one step everywhere; the old one steps aside for an instant.
            aside = temporary.with_name(f"{temporary.name}.old")
            target.rename(aside)
            temporary.rename(target)
            shutil.rmtree(aside)
        else:
            temporary.rename(target)
        _fsync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _fsync(path: Path) -> None:
    """Have the system write a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    image_processor: BaseImageProcessor | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write ``folder`` in the published layout, atomically: sharded safetensors, configs, tokenizer and ``vit/``.

    Both copies of the ViT, in the main shards and in ``vit/``, are the model's own, so a trained ViT survives every
    reader. Published key names; ``config.json`` carries ``rope_theta``, so old transformers read it too.

    Args:
        model: A ``YiVLForCausalLM``, not quantized.
        folder: Replaced if it exists.
        tokenizer: Saved beside the weights.
        image_processor: The CLIP processor, saved in ``vit/``.
        state_dict: The weights, where the caller gathered them (ZeRO-3); by default those of ``model``.
        max_shard_size: Bytes, or text such as ``"5GB"``.

    Raises:
        ValueError: If the model is quantized: its weights are not those of the published layout.
    """
    if getattr(model, "is_quantized", False):
        raise ValueError("a quantized model cannot be saved in the published layout; save the unquantized one")
    config = model.config
    weights = {
        key: value.contiguous() for key, value in (model.state_dict() if state_dict is None else state_dict).items()
    }
    with atomic_folder(folder) as target:
        fields = config.to_published_dict() | {"torch_dtype": str(weights["lm_head.weight"].dtype).split(".")[-1]}
        write_json(target / "config.json", fields)
        generation = model.generation_config.to_diff_dict() | {"max_length": config.max_position_embeddings}
        write_json(target / "generation_config.json", generation)
        _save_shards(weights, target, max_shard_size)
        vit = target / "vit" / config.vit_name
        vit.mkdir(parents=True)
        write_json(vit / "config.json", config.vision_config.to_dict() | {"architectures": ["CLIPVisionModel"]})
        vit_weights = {key.removeprefix(_TOWER): value for key, value in weights.items() if key.startswith(_TOWER)}
        save_file(vit_weights, vit / "model.safetensors", metadata=METADATA)
        if image_processor is not None:
            image_processor.save_pretrained(vit)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)


def _save_shards(weights: dict[str, torch.Tensor], folder: Path, max_shard_size: int | str) -> None:
    """Write ``model.safetensors``, or numbered shards and their index."""
    split = split_torch_state_dict_into_shards(weights, max_shard_size=max_shard_size)
    for name, keys in split.filename_to_tensors.items():
        save_file({key: weights[key] for key in keys}, folder / name, metadata=METADATA)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Write readable JSON with sorted keys."""
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
