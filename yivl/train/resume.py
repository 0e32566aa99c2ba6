"""Checkpoints of a run: whole or not there, and which one to go on from."""

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

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

import yivl
from yivl.checkpoint.atomic import move_entries
from yivl.checkpoint.format import StateDict, check_checkpoint_files, read_weights
from yivl.checkpoint.loading import NON_LORA_TRAINABLES
from yivl.checkpoint.saving import METADATA, write_checkpoint
from yivl.data.sources import read_sources
from yivl.errors import CheckpointError
from yivl.image_processing import ImageProcessor
from yivl.model.configuration import read_json
from yivl.tokenization import YiTokenizer
from yivl.train.arguments import Arguments, ModelArguments, as_dict
from yivl.train.parameters import ADAPTER, published_name

logger = logging.getLogger(__name__)

UNFINISHED: Final = ".unfinished"
"""Folder in which a checkpoint or the final model is written before it is moved to its place."""
_STATE: Final = "trainer_state.json"
ARGUMENTS: Final = "training_arguments.json"
RECORD: Final = "training_run.json"
"""Lies beside the arguments: ``base_model`` (a hub id, or null), ``sources`` of the data, ``versions`` of software."""
ROWS_OF_A_STEP: Final = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")
"""Flags whose product they are."""
# Files may have moved, and kernels differ from machine to machine.
_NAMES_OF_FILES: Final = ("model_name_or_path", "vision_tower", "attn_implementation")
# What decides which parameters train, and on which rows a step does.
_MUST_AGREE: Final = (
    *(field.name for field in dataclasses.fields(ModelArguments) if field.name not in _NAMES_OF_FILES),
    *("max_rows_per_source", "group_by_length", "group_by_modality_length", "seed", "rows of a step"),
)
_STREAMS_MUST_AGREE: Final = (*ROWS_OF_A_STEP, "dataloader_num_workers", "shuffle_buffer")
_MAY_DIFFER: Final = frozenset(
    [
        "output_dir",
        "resume",
        "dry_run",
        "save_steps",
        "save_total_limit",
        "logging_steps",
        "report_to",
        "disable_tqdm",
        "local_rank",
        "global_batch_size",
        "run_name",
        "image_folder",
    ]
)
_CONFIGURATIONS: Final = ("config.json", "adapter_config.json")


def finished_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Return the checkpoints of a run, the oldest first."""
    found: dict[int, Path] = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / _STATE).is_file():
            found[int(match[1])] = path
    return [path for _, path in sorted(found.items())]


def describe_origin(model_name_or_path: str, sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what ``RECORD`` holds; of the model only a hub id, since a folder of this machine says nothing elsewhere.

    Args:
        model_name_or_path: What the run starts from.
        sources: Of its data, as in ``Batches``.
    """
    is_folder = Path(model_name_or_path).expanduser().exists()
    versions = {"yivl": yivl.__version__}
    for name in ("accelerate", "bitsandbytes", "deepspeed", "peft", "torch", "transformers"):
        with suppress(PackageNotFoundError):  # not every run needs, or every machine has, all of them
            versions[name] = version(name)
    return {
        "base_model": None if is_folder else model_name_or_path,
        "sources": list(sources),
        "versions": versions,
    }


def find_checkpoint(output_dir: str | os.PathLike[str], resume: str | None) -> Path | None:
    """Return the checkpoint ``--resume`` means, or ``None`` for a run from the start.

    Raises:
        CheckpointError: If the one that is named is none, or ``output_dir`` holds what would be overwritten: another
            run, a model, or later checkpoints than the one to go on from.
    """
    finished = finished_checkpoints(output_dir)
    if resume == "auto" and finished:
        return finished[-1]
    if resume is not None and resume != "auto":
        checkpoint = Path(resume)
        if not (checkpoint / _STATE).is_file():
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
            f"{output_dir}: holds {finished[-1].name} of a run; add --resume auto to go on with it, or give another "
            "--output_dir"
        )
    if _holds_model(output_dir):
        raise CheckpointError(f"{output_dir}: holds a model; give another --output_dir for what is trained now")
    return None


def _holds_model(folder: str | os.PathLike[str]) -> bool:
    return any((Path(folder) / name).is_file() for name in _CONFIGURATIONS)


def is_finished(checkpoint: Path, arguments: Arguments, total_steps: int) -> bool:
    """Whether nothing is left to do after a checkpoint.

    Flags that are others than those of the checkpoint are named.

    Raises:
        CheckpointError: If it has gone further than the run is to go, or flags differ that decide what trains and on
            which rows.
    """
    step = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))["global_step"]
    output_dir = Path(arguments.training.output_dir)
    if step == total_steps and _holds_model(output_dir):
        logger.info("this run is finished (%d of %d steps); the model is in %s", step, total_steps, output_dir)
        return True
    before, now = read_json(checkpoint / ARGUMENTS), json.loads(json.dumps(as_dict(arguments), default=str))
    for flags in (before, now):
        flags["rows of a step"] = math.prod(flags[name] for name in ROWS_OF_A_STEP)
    is_streamed = any(source.is_streamed for source in read_sources(arguments.data.data_path, "."))
    must_agree = _MUST_AGREE + (_STREAMS_MUST_AGREE if is_streamed else ())
    for name, value in now.items():
        if name in _MAY_DIFFER or before.get(name, value) == value:
            continue
        change = f"{name} was {before[name]} when {checkpoint.name} was written, and is {value} now"
        if name in must_agree:
            raise CheckpointError(f"{change}: this would be another run; go on as before, or start a new one")
        logger.warning("%s", change)
    if step > total_steps:
        raise CheckpointError(f"{checkpoint}: has taken {step} steps, and the run is to take {total_steps} in all")
    return False


def publish(folder: Path, output_dir: Path) -> None:
    """Move the final model into ``output_dir``, beside its checkpoints and logs.

    The configuration goes first when an old model is there and comes last: a folder with a configuration is whole.
    """
    stale = [output_dir / name for name in _CONFIGURATIONS]
    # The old model may have had more shards.
    stale += [*output_dir.glob("model*.safetensors"), *output_dir.glob("model*.safetensors.index.json")]
    move_entries(folder, output_dir, stale=stale, last=_CONFIGURATIONS)


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
        write_checkpoint(
            model,
            Path(folder),
            tokenizer=tokenizer,
            image_processor=image_processor.clip_processor,
            state_dict=state_dict,
        )
        return
    model.save_pretrained(os.fspath(folder), state_dict=state_dict, save_embedding_layers=False)
    (Path(folder) / "README.md").unlink(missing_ok=True)  # an empty form of peft's
    beside = [name for name, parameter in model.named_parameters() if parameter.requires_grad and ADAPTER not in name]
    if beside:
        weights = model.state_dict() if state_dict is None else state_dict
        tensors = {published_name(name): weights[name].detach().cpu().contiguous() for name in beside}
        save_file(tensors, Path(folder) / NON_LORA_TRAINABLES, metadata=METADATA)


def _first_line(error: Exception) -> str:
    """Return the first mismatch: a model of another shape has hundreds."""
    return " ".join(str(error).strip().splitlines()[:2])


def load_trained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Read the weights that ``save_trained`` wrote back into the same model, in place.

    Raises:
        CheckpointError: If they are missing or do not fit.
    """
    try:
        if not isinstance(model, PeftModel):
            if (Path(folder) / "adapter_model.safetensors").is_file():
                raise CheckpointError(f"{folder}: a checkpoint of adapters, and this run trains the model itself")
            weights = {
                key: value for path in check_checkpoint_files(folder) for key, value in read_weights(path).items()
            }
            model.load_state_dict(weights)
            return
        if not (Path(folder) / "adapter_model.safetensors").is_file():
            raise CheckpointError(f"{folder}: a checkpoint of a whole model, and this run trains adapters")
        set_peft_model_state_dict(model, read_weights(Path(folder) / "adapter_model.safetensors"))
        own = {published_name(name): parameter for name, parameter in model.named_parameters()}
        if (Path(folder) / NON_LORA_TRAINABLES).is_file():
            with torch.no_grad():
                for name, value in read_weights(Path(folder) / NON_LORA_TRAINABLES).items():
                    own[name].copy_(value)
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(f"{folder}: these weights are not of this run ({_first_line(error)})") from error
