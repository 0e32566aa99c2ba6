"""Conversion of ``.bin`` and open_clip checkpoints; ``scripts/convert.py`` is the command."""

import hashlib
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from yivl.checkpoint.atomic import write_json
from yivl.checkpoint.format import METADATA, StateDict, read_json, read_weights
from yivl.checkpoint.saving import check_apart, checkpoint_dir
from yivl.checkpoint.vit import open_clip_to_vit_weights, read_open_clip_config, read_open_clip_processor
from yivl.errors import CheckpointError

# An unused ViT at 224 pixels in the ViT folder of the released checkpoints.
_LEFT_OUT = ("open_clip_pytorch_model.bin", "open_clip_config.json")
# Of transformers' Trainer: no weights.
_OF_A_RUN = ("training_args.bin", "optimizer.bin", "scheduler.bin")


def bin_to_safetensors(source: Path, target: Path) -> dict[str, str]:
    """Convert every ``.bin`` file of a checkpoint to safetensors, one at a time and with the same shards and values.

    Returns:
        SHA-256 of every weight file read and written, by its path.

    Raises:
        CheckpointError: If ``source`` holds no ``.bin`` weights, a file is damaged, or ``target`` would replace
            ``source`` or something other than a checkpoint.
    """
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder")
    check_apart(source, target)
    files = [path for path in sorted(source.rglob("*")) if path.is_file() and path.name not in _LEFT_OUT + _OF_A_RUN]
    if not any(path.suffix == ".bin" for path in files):
        raise CheckpointError(f"{source}: no .bin weights to convert")
    hashes: dict[str, str] = {}
    with checkpoint_dir(target) as folder:
        for path in files:
            place = folder / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".bin":
                place = place.with_name(_safetensors_name(path.name))
                hashes[str(path)] = sha256(path)
                save_file(_without_shared_memory(read_weights(path)), place, metadata=METADATA)
                hashes[str(target / place.relative_to(folder))] = sha256(place)
            elif path.name.endswith(".bin.index.json"):
                index = read_json(path)
                index["weight_map"] = {key: _safetensors_name(name) for key, name in index["weight_map"].items()}
                write_json(place.with_name(_safetensors_name(path.name)), index)
            else:
                shutil.copyfile(path, place)
    return hashes


def _without_shared_memory(weights: StateDict) -> StateDict:
    """Return the tensors, copies of those that share memory, such as tied embeddings: safetensors refuses them."""
    seen: set[int] = set()
    separate = {}
    for key, value in weights.items():
        place = value.untyped_storage().data_ptr()
        separate[key] = value.clone(memory_format=torch.contiguous_format) if place in seen else value.contiguous()
        seen.add(place)
    return separate


def open_clip_to_vit(weights: Path, config: Path, target: Path) -> None:
    """Convert the visual tower of an open_clip checkpoint to a ViT folder for ``--vision_tower``.

    Args:
        weights: ``open_clip_pytorch_model.bin`` or ``open_clip_model.safetensors``.
        config: The ``open_clip_config.json`` of the same model.
        target: Replaced if it exists.

    Raises:
        CheckpointError: If a file cannot be read, the tower is not a plain CLIP ViT, or ``target`` holds a source.
    """
    for source in (weights, config):
        check_apart(source, target)
    state_dict = read_weights(weights)
    vision, processor = read_open_clip_config(config), read_open_clip_processor(config)
    size = vision.image_size
    processor.size, processor.crop_size = {"shortest_edge": size}, {"height": size, "width": size}
    with checkpoint_dir(target) as folder:
        write_json(folder / "config.json", vision.to_dict() | {"architectures": ["CLIPVisionModel"]})
        vit = {f"vision_model.{key}": value for key, value in open_clip_to_vit_weights(state_dict).items()}
        save_file({key: value.contiguous() for key, value in vit.items()}, folder / "model.safetensors", METADATA)
        processor.save_pretrained(folder)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _safetensors_name(name: str) -> str:
    """Return the name transformers looks for: ``pytorch_model-1-of-8.bin`` is ``model-1-of-8.safetensors``."""
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
