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

from yivl.errors import CheckpointError

TOWER: Final = "model.vision_tower.vision_tower."
"""What the names of the ViT begin with in the main files."""
METADATA: Final = {"format": "pt"}  # transformers refuses safetensors files without it
# Weights, and what tells of them; in a folder that another model takes over it would tell of the wrong one.
_OF_THE_MODEL: Final = (
    *("*.safetensors", "*.bin", "*.index.json", "published.json"),
    *("training_*.json", "train_results.json", "log.jsonl", "loss.png"),
)


@contextmanager
def atomic_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of ``folder`` when the block ends well, and vanishes otherwise.

    A reader sees the old folder or the whole new one. Only an empty folder or a checkpoint is replaced, and of a
    checkpoint all but the weights is carried over (a README, a licence, the tokenizer) unless it was written anew.

    Raises:
        CheckpointError: If ``folder`` is a file, or holds something beside a checkpoint.
    """
    target = Path(folder).resolve()
    check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    aside = temporary.with_name(f"{temporary.name}.old")
    try:
        yield temporary
        _carry_over(target, temporary)
        settle(temporary)
        if target.exists():
            # Two folders cannot be swapped in one step everywhere; the old one steps aside for an instant.
            target.rename(aside)
        try:
            temporary.rename(target)
        except OSError:
            if aside.exists():
                aside.rename(target)
            raise
        sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def check_replaceable(folder: str | os.PathLike[str]) -> None:
    """Refuse to replace what is no checkpoint, or holds more than one (``checkpoint-100/`` of a training run).

    Raises:
        CheckpointError: If ``folder`` is a file, or holds something beside a checkpoint.
    """
    target = Path(folder)
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target}: is a file; give a folder to write")
    others = [path.name for path in target.iterdir() if path.is_dir() and path.name != "vit"]
    if any(target.iterdir()) and (others or not (target / "config.json").is_file()):
        raise CheckpointError(f"{target}: holds more than a checkpoint; give an empty or new folder to write")


def check_apart(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Refuse to replace what is read.

    Raises:
        CheckpointError: If ``target`` is ``source``, or contains it.
    """
    read, written = Path(source).resolve(), Path(target).resolve()
    if read == written or written in read.parents:
        raise CheckpointError(f"{target}: is or contains {source}; give another folder to write")


def _carry_over(old: Path, new: Path) -> None:
    """Copy the files of ``old`` that do not speak of its weights and have no successor in ``new``."""
    for path in old.rglob("*") if old.is_dir() else ():
        place = new / path.relative_to(old)
        is_stale = any(path.match(pattern) for pattern in _OF_THE_MODEL)
        if path.is_file() and not is_stale and not place.exists() and place.parent.is_dir():
            shutil.copy2(path, place)


def settle(folder: Path) -> None:
    """Have all of a folder on the disk, readable by whom its owner's settings say."""
    umask = os.umask(0)  # the only way to read it is to set it
    os.umask(umask)
    for path in [*folder.rglob("*"), folder]:
        # mkdtemp and safetensors write for the owner alone; a checkpoint is shared as any other file.
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        sync(path)


def sync(path: Path) -> None:
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
        CheckpointError: If the model is quantized or carries an adapter: its weights are not those of the published
            layout; or if ``folder`` may not be replaced.
    """
    if getattr(model, "is_quantized", False):
        raise CheckpointError("a quantized model cannot be saved in the published layout; save the unquantized one")
    weights = {
        key: value.contiguous() for key, value in (model.state_dict() if state_dict is None else state_dict).items()
    }
    if any(".lora_" in key for key in weights):
        raise CheckpointError("a model that carries an adapter cannot be saved; merge the adapter first")
    config = model.config
    with atomic_folder(folder) as target:
        fields = config.to_published_dict() | {"torch_dtype": str(weights["lm_head.weight"].dtype).split(".")[-1]}
        write_json(target / "config.json", fields)
        generation = model.generation_config.to_diff_dict() | {"max_length": config.max_position_embeddings}
        write_json(target / "generation_config.json", generation)
        save_shards(weights, target, max_shard_size)
        vit = target / "vit" / config.vit_name
        vit.mkdir(parents=True)
        vision = config.vision_config.to_dict() | {"architectures": ["CLIPVisionModel"]}
        vision.pop("_name_or_path", None)  # a folder of this machine
        write_json(vit / "config.json", vision)
        vit_weights = {key.removeprefix(TOWER): value for key, value in weights.items() if key.startswith(TOWER)}
        save_file(vit_weights, vit / "model.safetensors", metadata=METADATA)
        if image_processor is not None:
            image_processor.save_pretrained(vit)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)


def save_shards(weights: dict[str, torch.Tensor], folder: Path, max_shard_size: int | str) -> None:
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
