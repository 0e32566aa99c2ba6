"""The flags of ``python -m yivl.train``: those of the LLaVA lineage, and all of transformers' ``TrainingArguments``."""

import argparse
import dataclasses
import difflib
import importlib.util
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments

from yivl.errors import YiVLError
from yivl.train.stages import STAGES


def _flag(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text} | metadata)


@dataclass
class ModelArguments:
    """Which weights to start from, and which of them train.

    Raises:
        YiVLError: If flags contradict each other.
    """

    model_name_or_path: str = _flag(
        "", "Yi-VL checkpoint (folder or hub id), or the folder of a Yi language model to start stage 1 from"
    )
    stage: int | None = _flag(None, "published stage 1, 2 or 3; sets the defaults of other flags (docs/training.md)")
    vision_tower: str | None = _flag(
        None, "ViT folder: CLIP of transformers, or open_clip with open_clip_config.json; default: the checkpoint's"
    )
    image_size: int | None = _flag(None, "pixels on a side of the ViT input; default: the checkpoint's, or the ViT's")
    image_aspect_ratio: str | None = _flag(None, "pad or square; default: the checkpoint's, or pad")
    mm_projector_type: str = _flag("mlp2x_gelu_Norm", "projector of a fresh start from a language model")
    mm_vision_select_layer: int = _flag(-2, "ViT layer of a fresh start that feeds the projector")
    mm_vision_select_feature: str = _flag("patch", "patch or cls_patch, of a fresh start")
    attn_implementation: str = _flag(
        "sdpa", "sdpa, eager or flash_attention_2", choices=["sdpa", "eager", "flash_attention_2"]
    )
    freeze_backbone: bool = _flag(False, "freeze the language model")
    tune_mm_mlp_adapter: bool = _flag(False, "train the projector and nothing else")
    freeze_mm_mlp_adapter: bool = _flag(False, "freeze the projector")
    unfreeze_mm_vision_tower: bool = _flag(False, "train the ViT")
    lora_enable: bool = _flag(False, "train LoRA adapters on all linear layers of the language model instead of it")
    lora_r: int = _flag(8, "rank")
    lora_alpha: int = _flag(16, "scale, times 1 / rank")
    lora_dropout: float = _flag(0.0, "dropout in front of the adapters")
    lora_vision_tower: bool = _flag(False, "put adapters on the linear layers of the ViT too")
    bits: int = _flag(16, "16, or 8 or 4 for a quantized language model under LoRA (QLoRA)", choices=[16, 8, 4])

    def __post_init__(self) -> None:
        if not self.model_name_or_path:
            raise YiVLError("--model_name_or_path is missing; give a Yi-VL checkpoint or, for stage 1, a Yi model")
        if self.stage is not None and self.stage not in STAGES:
            raise YiVLError(f"--stage {self.stage}: expected one of {', '.join(map(str, STAGES))}")
        if self.tune_mm_mlp_adapter and (
            self.freeze_mm_mlp_adapter or self.unfreeze_mm_vision_tower or self.lora_enable
        ):
            raise YiVLError("--tune_mm_mlp_adapter trains the projector alone; drop the flags that say otherwise")
        if self.bits != 16 and not self.lora_enable:
            raise YiVLError(f"--bits {self.bits}: quantized weights cannot be trained; add --lora_enable")
        if self.lora_enable and self.freeze_backbone:
            raise YiVLError("--lora_enable puts adapters on the language model, --freeze_backbone freezes it; drop one")
        if self.lora_r < 1:
            raise YiVLError(f"--lora_r {self.lora_r} is not positive")
        typed = [
            name
            for name in ("lora_r", "lora_alpha", "lora_dropout")
            if getattr(self, name) != getattr(type(self), name)
        ]
        if typed and not self.lora_enable:
            raise YiVLError(f"--{typed[0]} says how adapters are made; add --lora_enable True, or drop it")
        if self.lora_vision_tower and (not self.lora_enable or self.unfreeze_mm_vision_tower):
            raise YiVLError("--lora_vision_tower goes with --lora_enable and without --unfreeze_mm_vision_tower")

    @property
    def trains_language_model(self) -> bool:
        """Whether the language model itself trains (and not adapters on it)."""
        return not (self.freeze_backbone or self.tune_mm_mlp_adapter or self.lora_enable)


@dataclass
class DataArguments:
    """What to learn from.

    Raises:
        YiVLError: If a flag is missing or out of range.
    """

    data_path: str = _flag("", "rows (.json, .jsonl), tar shards ({00000..00099}.tar) or a mixture of them (.yaml)")
    image_folder: str = _flag(".", "where relative picture paths start")
    eval_data_path: str | None = _flag(None, "rows whose loss is measured; goes with --eval_strategy")
    model_max_length: int = _flag(2048, "positions of a row, pictures expanded; longer rows are cut on the right")
    max_rows_per_source: int | None = _flag(
        None, "rows of one file at most, drawn at random, unless a mixture sets its own"
    )
    on_bad_row: str = _flag("error", "error stops at a bad row, skip leaves it out", choices=["error", "skip"])
    packing: bool = _flag(False, "put the rows of a batch into one sequence without padding")
    group_by_length: bool = _flag(False, "batches of rows of similar length")
    group_by_modality_length: bool = _flag(False, "the same, and rows with and without pictures apart")
    shuffle_buffer: int = _flag(1000, "rows of a stream that are shuffled at a time")

    def __post_init__(self) -> None:
        if not self.data_path:
            raise YiVLError("--data_path is missing; docs/data.md says what it can be")
        for name in ("model_max_length", "shuffle_buffer"):
            if getattr(self, name) < 1:
                raise YiVLError(f"--{name} {getattr(self, name)} is not positive")


# Flags of transformers that would be read but change nothing here, and what does the same.
_REFUSED: Final = {
    "activation_checkpointing": "use --gradient_checkpointing and --vision_gradient_checkpointing",
    "resume_from_checkpoint": "use --resume",
    "dataloader_drop_last": "all rows are used",
    "auto_find_batch_size": "--dry_run says what fits",
    "load_best_model_at_end": "checkpoints stay in --output_dir",
    "metric_for_best_model": "compare the evaluation losses in log.jsonl",
    "save_only_model": "a checkpoint without its optimizer cannot be gone on from",
    "ignore_data_skip": "a resumed run goes on where it stopped",
    "label_smoothing_factor": "it needs the logits of every position",
    "data_seed": "use --seed",
    "push_to_hub": "upload the finished folder",
    "fsdp": "use --deepspeed scripts/zero3.json",
}


@dataclass
class YiVLTrainingArguments(TrainingArguments):  # type: ignore[misc]
    """The flags of transformers, with our defaults, and a few more.

    Raises:
        YiVLError: If flags contradict each other, or one would not be read.
    """

    output_dir: str = _flag("", "folder of the trained model, its checkpoints and logs")
    learning_rate: float = _flag(2e-5, "of the language model, and of all that has no rate of its own")
    mm_projector_lr: float | None = _flag(None, "learning rate of the projector")
    mm_vision_tower_lr: float | None = _flag(None, "learning rate of the ViT")
    per_device_train_batch_size: int = _flag(1, "rows of one process at a time")
    global_batch_size: int | None = _flag(None, "rows of one optimizer step over all processes; sets the accumulation")
    lr_scheduler_type: str = _flag("cosine", "schedule of the learning rate")
    warmup_ratio: float | None = _flag(None, "share of the steps that warm up; instead of --warmup_steps")
    warmup_steps: float = _flag(0.03, "steps that warm up; below 1 it is a share of all")
    gradient_checkpointing: bool | None = _flag(
        False, "recompute the layers of the language model in the backward pass"
    )
    vision_gradient_checkpointing: bool = _flag(False, "recompute the ViT's layers in the backward pass")
    disable_tqdm: bool | None = _flag(False, "no progress bar in a terminal, but lines as elsewhere")
    dataloader_persistent_workers: bool = _flag(True, "keep the processes that read data from epoch to epoch")
    logging_nan_inf_filter: bool = _flag(False, "show the last good loss in place of one that is no number")
    logging_steps: float = _flag(1, "steps between two lines of the log")
    save_steps: float = _flag(200, "steps between two checkpoints")
    save_total_limit: int | None = _flag(3, "checkpoints that are kept")
    report_to: None | str | list[str] = _flag(  # noqa: RUF036 (the parser of transformers wants this order)
        "tensorboard", "tensorboard, wandb or none"
    )
    dataloader_num_workers: int = _flag(2, "processes that read data for one training process")
    ddp_find_unused_parameters: bool | None = _flag(False, "every parameter that trains is used in every step")
    resume: str | None = _flag(None, "a checkpoint folder to go on from, or auto: the newest in --output_dir")
    dry_run: bool = _flag(False, "print the plan (parameters, data, steps, memory) and stop")

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise YiVLError("--output_dir is missing; give a folder for the trained model")
        for name, instead in _REFUSED.items():
            if getattr(self, name, None):
                raise YiVLError(f"--{name} is not supported: {instead}")
        for name in ("per_device_train_batch_size", "global_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise YiVLError(f"--{name} {getattr(self, name)} is not positive")
        accumulated: int = getattr(self, "gradient_accumulation_steps")  # noqa: B009 (untyped in transformers)
        if self.global_batch_size is not None and accumulated != 1:
            raise YiVLError("--global_batch_size sets --gradient_accumulation_steps; drop one of them")
        if not self.average_tokens_across_devices:
            raise YiVLError("--average_tokens_across_devices False is not supported: a step is the mean of its tokens")
        if str(self.save_strategy) in ("best", "SaveStrategy.BEST"):
            raise YiVLError("--save_strategy best is not supported: compare the evaluation losses in log.jsonl")
        if self.train_sampling_strategy != "random":
            raise YiVLError("--train_sampling_strategy is not supported: use --group_by_length")
        if self.report_to and "wandb" in self.report_to and importlib.util.find_spec("wandb") is None:
            raise YiVLError(f"--report_to wandb needs a package: {sys.executable} -m pip install wandb")
        if self.warmup_ratio is not None:
            if not 0 <= self.warmup_ratio < 1:
                raise YiVLError(f"--warmup_ratio {self.warmup_ratio} is not between 0 and 1")
            self.warmup_steps = self.warmup_ratio
        # The layers that recompute are chosen one by one (modules.py); transformers knows only all or none.
        self.recompute_language_model = self.gradient_checkpointing
        self.gradient_checkpointing = None
        self.remove_unused_columns = False
        # Without this, processes on CPUs would not find each other.
        if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
            self.use_cpu = True
        if self.global_batch_size is not None:
            # Read from the launcher's environment, because DeepSpeed's settings are filled in with the result below.
            world_size = int(os.environ.get("WORLD_SIZE", "1"))
            rows = self.per_device_train_batch_size * world_size
            if self.global_batch_size % rows:
                raise YiVLError(
                    f"--global_batch_size {self.global_batch_size} is no multiple of {rows} "
                    f"(--per_device_train_batch_size {self.per_device_train_batch_size} x {world_size} processes)"
                )
            self.gradient_accumulation_steps = self.global_batch_size // rows
        super().__post_init__()
        if self.n_gpu > 1:
            raise YiVLError(
                f"{self.n_gpu} GPUs in one process: start one process each with a script of scripts/ or torchrun, or "
                "choose one GPU by CUDA_VISIBLE_DEVICES"
            )


@dataclass(frozen=True)
class Zero:
    """How DeepSpeed spreads a run over GPUs."""

    stage: int = 0
    """0 without DeepSpeed."""
    offloads_optimizer: bool = False
    offloads_weights: bool = False

    @classmethod
    def of(cls, training: YiVLTrainingArguments) -> "Zero":
        """Read it from the DeepSpeed configuration of a run."""
        config = getattr(training, "hf_deepspeed_config", None)
        if config is None:
            return cls()
        fields: dict[str, Any] = config.config.get("zero_optimization", {})
        return cls(
            int(fields.get("stage", 0)),
            fields.get("offload_optimizer", {}).get("device", "none") != "none",
            fields.get("offload_param", {}).get("device", "none") != "none",
        )


class Arguments(NamedTuple):
    """All flags of a run."""

    model: ModelArguments
    data: DataArguments
    training: YiVLTrainingArguments


class _Parser(HfArgumentParser):  # type: ignore[misc]
    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line; the usage of 150 flags would hide it."""
        raise YiVLError(f"{message}; --help lists the flags")


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Return the checked flags of a command line; ``--stage`` sets the defaults of others first.

    Raises:
        YiVLError: If a flag is missing, out of range or contradicts another.
    """
    parser = _Parser(tuple(Arguments.__annotations__.values()), prog="python -m yivl.train", allow_abbrev=False)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--stage")
    stages = {str(number): stage for number, stage in STAGES.items()}
    stage = stages.get(first.parse_known_args(argv)[0].stage)
    if stage is not None:
        parser.set_defaults(**stage.flag_defaults())
    try:
        *groups, unknown = parser.parse_args_into_dataclasses(list(argv), return_remaining_strings=True)
        arguments = Arguments(*groups)
    except YiVLError:
        raise
    except (ValueError, ImportError, OSError) as error:  # what TrainingArguments finds wrong
        raise YiVLError(" ".join(str(error).split())) from error
    if unknown:
        raise YiVLError(_unknown(unknown[0], parser))
    if arguments.model.bits != 16 and Zero.of(arguments.training).stage == 3:
        raise YiVLError(
            "--bits goes without ZeRO-3: quantized weights cannot be spread; use scripts/zero2.json or none"
        )
    if (arguments.data.eval_data_path is None) != (arguments.training.eval_strategy == "no"):
        raise YiVLError("--eval_data_path and --eval_strategy (steps or epoch) go together")
    return arguments


def _unknown(word: str, parser: argparse.ArgumentParser) -> str:
    """Return what to say of a word of the command line that is not understood."""
    if not word.startswith("-"):
        return f"{word}: which flag is it for? A pattern such as '{{00000..00099}}.tar' needs quotes"
    flags = [option for action in parser._actions for option in action.option_strings]
    close = difflib.get_close_matches(word, flags, n=1)
    return f"unknown flag {word}; {f'did you mean {close[0]}?' if close else '--help lists the flags'}"


def as_dict(arguments: Arguments) -> dict[str, Any]:
    """Return all flags and the number of processes, to be saved beside the model."""
    groups = (dataclasses.asdict(arguments.model), dataclasses.asdict(arguments.data), arguments.training.to_dict())
    flags = {name: value for group in groups for name, value in group.items()}
    return flags | {"world_size": arguments.training.world_size}


def prepare_environment(argv: Sequence[str]) -> None:
    """Make a plain ``python -m yivl.train --deepspeed ...`` a run of one process, as a launcher would.

    Without a GPU, DeepSpeed is told so, or it would look for accelerators and warn that there is none.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if any(argument.split("=")[0] == "--deepspeed" for argument in argv) and "RANK" not in os.environ:
        single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            os.environ.update(single | {"MASTER_PORT": str(listener.getsockname()[1])})
