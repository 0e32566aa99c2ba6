"""Saving of checkpoints in the published format of their architecture."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import save_torch_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from yivl.checkpoint.atomic import atomic_dir, write_json
from yivl.checkpoint.folder import find_format
from yivl.checkpoint.format import ADAPTER, check_utf8
from yivl.checkpoint.full_disk import explain_full_disk
from yivl.errors import CheckpointError
from yivl.model.packed_linear import Linear16

# Weights and records about them, which a replaced checkpoint must not pass on to the next model.
_OF_THE_MODEL: Final = (
    *("*.safetensors", "*.bin", "*.index.json", "published.json"),
    *("training_*.json", "checkpoint_manifest.json", "train_results.json", "log.jsonl", "loss.png"),
    "generation_config.json",
)
# What belongs together: if the new checkpoint has one of them, it replaces all.
_GROUPS: Final = (
    ("tokenizer*", "added_tokens.json", "special_tokens_map.json", "chat_template*"),
    ("preprocessor_config.json", "processor_config.json"),
)


@contextmanager
def checkpoint_dir(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder that replaces the checkpoint ``folder`` on success.

    Files of the old checkpoint that do not describe its weights (a README, a license, the tokenizer) are copied over
    unless the block wrote them, or others of their kind.

    Raises:
        CheckpointError: If ``folder`` is a file, or holds something other than one checkpoint.
        OSError: If the disk is full; ``folder`` is as it was.
    """
    check_replaceable(folder)
    with explain_full_disk(folder), atomic_dir(folder) as new:
        yield new
        old = Path(folder).resolve()
        stale = list(_OF_THE_MODEL)
        for group in _GROUPS:
            stale += group if any(next(new.rglob(pattern), None) for pattern in group) else ()
        for path in old.rglob("*"):
            place = new / path.relative_to(old)
            is_stale = any(path.match(pattern) for pattern in stale)
            if path.is_file() and not is_stale and not place.exists() and place.parent.is_dir():
                shutil.copy2(path, place)


def check_replaceable(folder: str | os.PathLike[str]) -> None:
    """Refuse to replace a folder that is not one checkpoint; the output folder of a run holds several.

    Raises:
        CheckpointError: If ``folder`` is a file, holds something other than one checkpoint, or is not UTF-8.
    """
    target = Path(folder)
    check_utf8(target)
    if target.is_file():
        raise CheckpointError(f"{target}: is a file; give a folder to write")
    held = list(target.iterdir()) if target.exists() else []
    others = any(path.is_dir() and path.name != "vit" for path in held)
    if held and (others or not (target / "config.json").is_file()):
        raise CheckpointError(f"{target}: holds more than a checkpoint; give an empty or new folder to write")


def check_apart(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Refuse a target that would overwrite the source.

    Raises:
        CheckpointError: If ``target`` is ``source``, or contains it.
    """
    read, written = Path(source).resolve(), Path(target).resolve()
    if read == written or written in read.parents:
        raise CheckpointError(f"{target}: is or contains {source}; give another folder to write")


def save_checkpoint(model: PreTrainedModel, folder: str | os.PathLike[str], **kwargs: Any) -> None:
    """Replace the checkpoint ``folder`` atomically; the arguments are those of ``write_checkpoint``.

    Raises:
        CheckpointError: As ``write_checkpoint``, or if ``folder`` holds something other than one checkpoint.
    """
    with checkpoint_dir(folder) as new:
        write_checkpoint(model, new, **kwargs)


def write_checkpoint(
    model: PreTrainedModel,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    image_processor: BaseImageProcessor | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a checkpoint in the published format of its architecture: sharded safetensors, configurations, tokenizer.

    Of Yi-VL both copies of the ViT, in the main shards and in ``vit/``, hold the weights of the model, so every reader
    gets a fine-tuned ViT. ``config.json`` carries ``rope_theta``, which old versions of transformers read.

    Args:
        model: A ``YiVLForCausalLM``.
        folder: Empty or new.
        tokenizer: Saved with the weights.
        image_processor: The CLIP processor, saved with the weights, of Yi-VL in ``vit/``.
        state_dict: Weights gathered by the caller (ZeRO-3); those of ``model`` by default.
        max_shard_size: Bytes, or text such as ``"5GB"``.

    Raises:
        CheckpointError: If the model is quantized or carries an adapter.
    """
    if getattr(model, "is_quantized", False):
        raise CheckpointError("a quantized model cannot be saved as a checkpoint; save the unquantized model")
    weights = {
        key: value.contiguous() for key, value in (model.state_dict() if state_dict is None else state_dict).items()
    }
    if any(isinstance(module, Linear16) for module in model.modules()):
        # Its other weights were cast from 16 bits to float32, which the CPU computes; in the checkpoint they were not.
        weights = {key: value.to(weights["lm_head.weight"].dtype) for key, value in weights.items()}
    if any(ADAPTER in key for key in weights):
        raise CheckpointError("a model with an adapter cannot be saved as a checkpoint; merge the adapter first")
    config = model.config
    fields = config.to_published_dict() | {"torch_dtype": str(weights["lm_head.weight"].dtype).split(".")[-1]}
    target = find_format(fields)
    assert target is not None and target.write_image_files is not None  # noqa: PT018 (of our own configurations)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", fields)
    generation = model.generation_config.to_diff_dict() | {"max_length": config.max_position_embeddings}
    write_json(folder / "generation_config.json", generation)
    published = {target.to_published_key(key): value for key, value in weights.items()}
    save_torch_state_dict(published, folder, max_shard_size=max_shard_size)
    target.write_image_files(folder, config, weights, image_processor)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
