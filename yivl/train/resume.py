"""Checkpoints of a run: which one to resume from, whether the flags are those of the same run, and their weights."""

import dataclasses
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from peft import PeftModel
from torch import nn

import yivl
from yivl.checkpoint.adapters import restore_adapter
from yivl.checkpoint.atomic import REMOVED, move_entries, remove_dir, replace_dir, settle
from yivl.checkpoint.folder import read_all_weights, read_config
from yivl.checkpoint.format import (
    ADAPTER_CONFIG,
    ARGUMENTS,
    LOG,
    check_keys,
    check_utf8,
    read_json,
)
from yivl.checkpoint.manifest import MANIFEST
from yivl.errors import CheckpointError
from yivl.train.arguments import ModelArguments
from yivl.train.hashing import record_files
from yivl.train.nodes import PROBE
from yivl.train.ranks import rank

logger = logging.getLogger(__name__)

UNFINISHED: Final = ".unfinished"
"""Folder in which a checkpoint or the final model is written before it is moved."""
READY: Final = ".final"
"""Folder of the complete final model while its files are moved into the output folder."""
STATE: Final = "trainer_state.json"
"""File of transformers with the step and the log of a run."""
GLOBAL_BATCH_FLAGS: Final = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
"""Flags whose product is the global batch size."""
# Paths may have changed, and kernels differ between machines.
_PATHS: Final = ("model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter", "attn_implementation")
# Flags that decide which parameters are trainable, how, and on which samples of a step.
_MUST_AGREE: Final = (
    *(field.name for field in dataclasses.fields(ModelArguments) if field.name not in _PATHS),
    *("max_rows_per_source", "group_by_length", "group_by_modality_length", "seed", "optim", "global batch size"),
)
# Defaults of flags of a new model until they followed its ViT; without a flag they are the same choice.
_FORMER_DEFAULTS: Final = {
    "mm_projector_type": "mlp2x_gelu_Norm",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
}
# Schedules that cannot take a new learning rate, since their state depends on the losses so far.
_ADAPTIVE: Final = ("reduce_lr_on_plateau", "greedy")
_RATES: Final = ("lr_scheduler_type", "learning_rate", "mm_projector_lr", "mm_vision_tower_lr", "weight_decay")
_MAY_DIFFER: Final = (
    *("output_dir", "image_folder", "run_name", "resume", "allow_changed_data", "dry_run", "local_rank"),
    *("save_steps", "save_total_limit", "logging_steps", "report_to", "disable_tqdm"),
    *("global_batch_size", "gradient_checkpointing", "vision_gradient_checkpointing", "accelerator_config"),
)
_CONFIGURATIONS: Final = ("config.json", ADAPTER_CONFIG)


def finished_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Return the checkpoints of a run, oldest first.

    A folder has this name only while it is complete; one that lacks files is damaged, which
    ``yivl.train.damage`` reports.
    """
    found: dict[int, Path] = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return [path for _, path in sorted(found.items())]


def describe_resume(output_dir: str | os.PathLike[str]) -> str:
    """Return how to continue a run that has ended before its last step."""
    newest = finished_checkpoints(output_dir)[-1:]
    return f"add --resume auto, which continues from {newest[0].name}" if newest else "run the command again"


def remove_leftovers(output_dir: Path) -> None:
    """Complete the move of a final model that a kill interrupted, and remove what else interrupted runs left."""
    if (output_dir / READY).is_dir():
        move_entries(output_dir / READY, output_dir, last=_CONFIGURATIONS)
    for folder in (output_dir / UNFINISHED, *output_dir.glob(f".checkpoint-*{REMOVED}")):
        shutil.rmtree(folder, ignore_errors=True)
    for file in (output_dir / f".{LOG}.partial", *output_dir.glob(f"{PROBE}*")):
        file.unlink(missing_ok=True)


def describe_origin(model_name_or_path: str, sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of ``RECORD``; a local folder is not recorded, since it means nothing on other machines."""
    is_folder = Path(model_name_or_path).exists()
    versions = {"yivl": yivl.__version__}
    for name in ("accelerate", "bitsandbytes", "deepspeed", "peft", "torch", "transformers"):
        with suppress(PackageNotFoundError):  # some are optional
            versions[name] = version(name)
    base_model = None if is_folder else model_name_or_path
    return {"base_model": base_model, "sources": list(sources), "versions": versions}


def find_checkpoint(output_dir: str | os.PathLike[str], resume: str | None) -> Path | None:
    """Return the checkpoint that ``--resume`` means, or ``None`` for a new run.

    Raises:
        CheckpointError: If there is no such checkpoint, or ``output_dir`` is not UTF-8 or holds what would be lost:
            another run, a model, or later checkpoints.
    """
    check_utf8(Path(output_dir))
    finished = finished_checkpoints(output_dir)
    if resume == "auto" and finished:
        return finished[-1]
    if resume is not None and resume != "auto":
        checkpoint = Path(resume)
        if not any((checkpoint / name).is_file() for name in (STATE, MANIFEST)):
            raise CheckpointError(f"{resume}: no checkpoint of a run; give one of its checkpoint-N folders, or auto")
        if finished and finished[-1].resolve() == checkpoint.resolve():
            return checkpoint
        if checkpoint.resolve() in [path.resolve() for path in finished]:
            raise CheckpointError(
                f"{output_dir}: {finished[-1].name} is later than {checkpoint.name}; move the later ones away, or give "
                "another --output_dir"
            )
        if not finished and not _holds_model(output_dir):
            return checkpoint
    if finished:
        raise CheckpointError(
            f"{output_dir}: holds {finished[-1].name} of a run; add --resume auto to continue it, or give another "
            "--output_dir"
        )
    if _holds_model(output_dir):
        raise CheckpointError(f"{output_dir}: holds a model; give another --output_dir")
    return None


def _holds_model(folder: str | os.PathLike[str]) -> bool:
    return any((Path(folder) / name).is_file() for name in _CONFIGURATIONS)


def is_finished(checkpoint: Path, output_dir: str | os.PathLike[str], total_steps: int) -> bool:
    """Return whether a checkpoint is of the last step and the final model is saved."""
    return _global_step(checkpoint) == total_steps and _holds_model(output_dir)


def check_same_run(checkpoint: Path, flags: Mapping[str, Any], total_steps: int) -> None:
    """Warn of flags that changed since a checkpoint was written.

    Args:
        checkpoint: To resume from.
        flags: As ``as_dict`` returns them.
        total_steps: Optimizer steps of the whole run.

    Raises:
        CheckpointError: If the checkpoint is of a later step, lacks an optimizer state that fits ``--deepspeed``, or
            flags changed that decide what is trained, how, and on which samples.
    """
    before, now = read_json(checkpoint / ARGUMENTS), json.loads(json.dumps(flags, default=str))
    if unknown := [name for name in (*GLOBAL_BATCH_FLAGS, "optim", "lr_scheduler_type") if name not in before]:
        raise CheckpointError(f"{checkpoint / ARGUMENTS}: {unknown[0]} is missing; the checkpoint is damaged")
    must_agree = _MUST_AGREE
    for values in (before, now):
        values["global batch size"] = math.prod(values[name] for name in GLOBAL_BATCH_FLAGS)
        values["optim"] = values["optim"].removesuffix("_fused")  # the same optimizer, another kernel
        if values["lr_scheduler_type"] in _ADAPTIVE:
            must_agree += _RATES
    for name, value in now.items():
        # A flag that did not exist when the checkpoint was written is not compared.
        if name in _MAY_DIFFER or before.get(name, value) == value:
            continue
        if value is None and before[name] == _FORMER_DEFAULTS.get(name):
            continue
        change = f"{name} was {before[name]} when {checkpoint.name} was written, and is {value} now"
        if name in must_agree:
            raise CheckpointError(f"{change}: not the same run; use the former value, or start a new run")
        logger.warning("%s", change)
    if now["deepspeed"] and before["world_size"] != now["world_size"]:
        raise CheckpointError(
            f"{checkpoint}: DeepSpeed saved optimizer states of {before['world_size']} processes, which "
            f"{now['world_size']} cannot load; use as many processes, or start a new run from its weights"
        )
    if (step := _global_step(checkpoint)) > total_steps:
        raise CheckpointError(f"{checkpoint}: is of step {step}, after the last step of this run ({total_steps})")
    pattern, state = "optimizer.pt", "to resume without DeepSpeed and FSDP2"
    if now["deepspeed"]:
        pattern, state = "global_step*", "of DeepSpeed"
    elif now["fsdp"]:
        pattern, state = "optimizer.bin", "of FSDP2"
    if not any(checkpoint.glob(pattern)):
        raise CheckpointError(
            f"{checkpoint}: holds no optimizer state {state}; use the --deepspeed and --fsdp of the run that wrote it"
        )


def _global_step(checkpoint: Path) -> int:
    step = read_json(checkpoint / STATE).get("global_step")
    if not isinstance(step, int):
        raise CheckpointError(f"{checkpoint / STATE}: global_step is {step}; the checkpoint is damaged")
    return step


def publish_checkpoint(folder: Path, output_dir: Path, save_total_limit: int | None) -> None:
    """Write the manifest of a complete checkpoint, move it into ``output_dir``, and remove those beyond the limit.

    All ranks call it after all of them have written; rank 0 moves and removes.
    """
    record_files(folder)
    if rank():
        return
    replace_dir(folder, output_dir / folder.name)
    if save_total_limit is not None:
        for old in finished_checkpoints(output_dir)[: -max(save_total_limit, 1)]:
            remove_dir(old)


def publish(folder: Path, output_dir: Path) -> None:
    """Move the final model into ``output_dir``, which also holds the checkpoints and logs.

    The configuration of an older model is removed first and the new one moved last: with it, a folder is complete. A
    move that a crash interrupts is completed by ``remove_leftovers``.
    """
    settle(folder)
    # The old model may have had more shards.
    stale = [*output_dir.glob("model*.safetensors"), *output_dir.glob("model*.safetensors.index.json")]
    for path in [*(output_dir / name for name in _CONFIGURATIONS), *stale]:
        path.unlink(missing_ok=True)
    ready = folder.rename(output_dir / READY)
    move_entries(ready, output_dir, last=_CONFIGURATIONS)


def load_trained(model: nn.Module, folder: Path) -> None:
    """Load the parameters of a checkpoint into the model that wrote it, in place.

    Raises:
        CheckpointError: If they are missing or do not fit.
    """
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if is_adapter != isinstance(model, PeftModel):
        kinds = ("an adapter", "the full model") if is_adapter else ("the full model", "an adapter")
        raise CheckpointError(f"{folder}: a checkpoint of {kinds[0]}, and this run trains {kinds[1]}")
    if is_adapter:
        restore_adapter(model, folder)
    else:
        weights = read_all_weights(folder, read_config(folder))
        check_keys(folder, model.state_dict(), weights, fit="the model of this run")
        model.load_state_dict(weights)
