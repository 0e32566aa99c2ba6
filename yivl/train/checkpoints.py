"""Checkpoints of a run: whole or not there, and which one to go on from."""

import os
import re
import shutil
from pathlib import Path
from typing import Final

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from yivl.errors import CheckpointError
from yivl.image_processing import ImageProcessor
from yivl.model.loading import NON_LORA_TRAINABLES
from yivl.model.saving import METADATA, save_checkpoint, settle, sync
from yivl.model.weight_files import StateDict, check_checkpoint_files, read_weights
from yivl.tokenization import YiTokenizer
from yivl.train.modules import ADAPTER, published_name

UNFINISHED: Final = ".unfinished"
"""Folder in which a checkpoint or the final model is written before it is moved to its place."""
_STATE: Final = "trainer_state.json"
_CONFIGURATIONS: Final = ("config.json", "adapter_config.json")


def finished_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Return the checkpoints of a run, the oldest first."""
    found: dict[int, Path] = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / _STATE).is_file():
            found[int(match[1])] = path
    return [path for _, path in sorted(found.items())]


def find_checkpoint(output_dir: str | os.PathLike[str], resume: str | None) -> Path | None:
    """Return the checkpoint ``--resume`` means, or ``None`` for a run from the start.

    Raises:
        CheckpointError: If the one that is named is none, or ``output_dir`` holds a run that would be overwritten.
    """
    finished = finished_checkpoints(output_dir)
    if resume == "auto" and finished:
        return finished[-1]
    if resume is not None and resume != "auto":
        if not (Path(resume) / _STATE).is_file():
            raise CheckpointError(f"{resume}: no checkpoint of a run; give one of its checkpoint-N folders, or auto")
        return Path(resume)
    if finished:
        raise CheckpointError(
            f"{output_dir}: holds {finished[-1].name} of a run; add --resume auto to go on with it, or give another "
            "--output_dir"
        )
    if any((Path(output_dir) / name).exists() for name in _CONFIGURATIONS):
        raise CheckpointError(f"{output_dir}: holds a model; give another --output_dir for what is trained now")
    return None


def move_into_place(folder: Path, target: Path) -> None:
    """Rename a finished folder to its place, in one step, after all of it is on the disk."""
    settle(folder)
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
    sync(target.parent)


def publish(folder: Path, output_dir: Path) -> None:
    """Move the final model into ``output_dir``, beside its checkpoints and logs.

    The configuration goes first when an old model is there and comes last: a folder with a configuration is whole.
    """
    settle(folder)
    for name in _CONFIGURATIONS:
        (output_dir / name).unlink(missing_ok=True)
    for old in [*output_dir.glob("model*.safetensors"), *output_dir.glob("model*.safetensors.index.json")]:
        old.unlink()  # there may be more shards of it than of the new one
    for path in sorted(folder.iterdir(), key=lambda path: path.name in _CONFIGURATIONS):
        target = output_dir / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    folder.rmdir()
    sync(output_dir)


def remove_old_checkpoints(output_dir: str | os.PathLike[str], limit: int | None) -> None:
    """Keep the newest ``limit`` checkpoints; ``None`` keeps all."""
    for path in finished_checkpoints(output_dir)[: -max(limit, 1)] if limit is not None else ():
        shutil.rmtree(path, ignore_errors=True)


def save_trained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    tokenizer: YiTokenizer,
    image_processor: ImageProcessor,
    state_dict: StateDict | None = None,
) -> None:
    """Write what a run trained: a checkpoint in the published layout, or an adapter and all that trained beside it.

    Args:
        model: A ``YiVLForCausalLM``, or peft around one.
        folder: Empty or new.
        tokenizer: Saved beside a whole model.
        image_processor: Saved beside a whole model.
        state_dict: The weights, where they were gathered from several processes.
    """
    if not isinstance(model, PeftModel):
        save_checkpoint(
            model,
            folder,
            tokenizer=tokenizer,
            image_processor=image_processor.clip_processor,
            state_dict=state_dict,
        )
        return
    model.save_pretrained(os.fspath(folder), state_dict=state_dict, save_embedding_layers=False)
    beside = [name for name, parameter in model.named_parameters() if parameter.requires_grad and ADAPTER not in name]
    if beside:
        weights = model.state_dict() if state_dict is None else state_dict
        tensors = {published_name(name): weights[name].detach().cpu().contiguous() for name in beside}
        save_file(tensors, Path(folder) / NON_LORA_TRAINABLES, metadata=METADATA)


def load_trained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Read the weights that ``save_trained`` wrote back into the same model, in place.

    Raises:
        CheckpointError: If they are missing or do not fit.
    """
    try:
        if not isinstance(model, PeftModel):
            weights = {
                key: value for path in check_checkpoint_files(folder) for key, value in read_weights(path).items()
            }
            model.load_state_dict(weights)
            return
        set_peft_model_state_dict(model, read_weights(Path(folder) / "adapter_model.safetensors"))
        own = {published_name(name): parameter for name, parameter in model.named_parameters()}
        if (Path(folder) / NON_LORA_TRAINABLES).is_file():
            with torch.no_grad():
                for name, value in read_weights(Path(folder) / NON_LORA_TRAINABLES).items():
                    own[name].copy_(value)
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{folder}: these weights are not of this run ({error})") from error
