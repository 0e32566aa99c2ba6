"""What follows from the flags of a run: the ``RunPlan``, and the arguments that the Trainer of transformers takes."""

import dataclasses
import json
import math
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yivl.errors import YiVLError
from yivl.train.arguments import Arguments, YiVLTrainingArguments
from yivl.train.batch_size import split_batch
from yivl.train.cpu_threads import local_world_size, share_cores

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True)
class Zero:
    """What the ranks of a run shard, by the settings of DeepSpeed or FSDP2."""

    stage: int = 0
    """Of ZeRO: 1 shards optimizer states, 2 gradients too, 3 weights too; 0 with neither DeepSpeed nor FSDP2."""
    offloads_optimizer: bool = False
    offloads_weights: bool = False
    is_fsdp: bool = False

    @classmethod
    def read(cls, training: YiVLTrainingArguments) -> "Zero":
        """Return the settings of ``--deepspeed`` or ``--fsdp``.

        Raises:
            YiVLError: If a configuration cannot be read, or flags contradict each other.
        """
        if training.fsdp:
            return cls._read_fsdp(training)
        if training.fsdp_config:
            raise YiVLError("--fsdp_config has no effect without --fsdp True; add it, or drop --fsdp_config")
        if not training.deepspeed:
            return cls()
        fields = _read_json("deepspeed", training.deepspeed).get("zero_optimization", {})
        try:
            return cls(
                int(fields.get("stage", 0)),
                fields.get("offload_optimizer", {}).get("device", "none") != "none",
                fields.get("offload_param", {}).get("device", "none") != "none",
            )
        except (ValueError, TypeError, AttributeError) as error:  # objects of another form
            raise YiVLError(
                f"--deepspeed {training.deepspeed}: zero_optimization cannot be read ({error}); see scripts/zero2.json"
            ) from error

    def __str__(self) -> str:
        return f"FSDP2 as ZeRO stage {self.stage}" if self.is_fsdp else f"ZeRO stage {self.stage}"

    @classmethod
    def _read_fsdp(cls, training: YiVLTrainingArguments) -> "Zero":
        if training.deepspeed:
            raise YiVLError(
                f"--fsdp True, --deepspeed {training.deepspeed}: drop one of them (the scripts set no --deepspeed with "
                "DEEPSPEED=)"
            )
        if training.fp16:
            raise YiVLError("--fp16 True: not supported with --fsdp True; use --bf16 True")
        given = {} if training.fsdp_config is None else _read_json("fsdp_config", training.fsdp_config)
        fields = {name.removeprefix("fsdp_"): value for name, value in given.items()}
        if fields.pop("version", 2) != 2:
            raise YiVLError("--fsdp_config: only version 2 is supported; drop version")
        reshards = fields.pop("reshard_after_forward", True)
        if fields or not isinstance(reshards, bool):
            names = ", ".join(fields) or "reshard_after_forward"
            raise YiVLError(
                f"--fsdp_config: {names}: not supported; the one setting is reshard_after_forward, true or false"
            )
        return cls(3 if reshards else 2, is_fsdp=True)


def _read_json(flag: str, value: str) -> dict[str, Any]:
    """Return the object in a file, or in JSON text, that a flag gives."""
    try:
        text = value if value.startswith("{") else Path(value).read_text(encoding="utf-8")
        fields: dict[str, Any] = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise YiVLError(f"--{flag} {value}: cannot be read ({error}); give a JSON file") from error
    if not isinstance(fields, dict):
        raise YiVLError(f"--{flag} {value}: not an object; give a JSON file")
    return fields


@dataclass(frozen=True)
class RunPlan:
    """What is derived from the flags and the number of processes."""

    world_size: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    zero: Zero

    @classmethod
    def of(cls, arguments: Arguments, *, world_size: int | None = None) -> "RunPlan":
        """Return the plan of a run on ``world_size`` processes; by default ``WORLD_SIZE``, which launchers set.

        Raises:
            YiVLError: If the batch sizes contradict each other, or weights cannot be sharded.
        """
        training = arguments.training
        if world_size is None:
            world_size = int(os.environ.get("WORLD_SIZE", "1"))
        micro_batch, accumulation = split_batch(training, world_size)
        zero = Zero.read(training)
        if arguments.model.bits != 16 and (zero.stage == 3 or zero.is_fsdp):
            raise YiVLError(
                f"--bits {arguments.model.bits}: {'FSDP2' if zero.is_fsdp else 'ZeRO-3'} cannot partition quantized "
                "weights; use scripts/zero2.json or no --deepspeed"
            )
        if zero.is_fsdp and world_size == 1 and not training.dry_run:
            raise YiVLError("--fsdp True: one process has nothing to shard; start several, or drop --fsdp")
        return cls(world_size, micro_batch, accumulation, zero)

    def total_steps(self, training: YiVLTrainingArguments, num_batches: int) -> int:
        """Return the optimizer steps of a run with ``num_batches`` batches per epoch and rank, as the Trainer does."""
        if training.max_steps > 0:
            return training.max_steps
        return math.ceil(-(-num_batches // self.gradient_accumulation_steps) * training.num_train_epochs)


def trainer_arguments(arguments: Arguments, plan: RunPlan) -> "TrainingArguments":
    """Return the arguments of the Trainer, which transformers completes and changes as it runs.

    Raises:
        YiVLError: If transformers refuses a value, the GPU has no bfloat16, or a process sees several GPUs.
    """
    import torch
    from transformers import TrainingArguments

    training = arguments.training
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    given = {name: value for name, value in vars(training).items() if name in names}
    derived: dict[str, Any] = {
        "per_device_train_batch_size": plan.per_device_train_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "warmup_steps": training.warmup_steps if training.warmup_ratio is None else training.warmup_ratio,
        "gradient_checkpointing": False,  # enabled per part in parameters.py; transformers knows all or none
        "remove_unused_columns": False,
    }
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        derived["use_cpu"] = True  # ranks without an accelerator would not find each other otherwise
    elif training.bf16 and not (training.dry_run or _uses_cpu(training)):
        _check_bfloat16()
    if plan.zero.is_fsdp:
        # Else each rank would keep the whole gradients until the last micro-batch of a step.
        derived["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    if training.dry_run:
        # Nothing is trained. DeepSpeed would compile its operators.
        derived |= {"deepspeed": None, "fsdp": None, "fsdp_config": None}
    try:
        args = TrainingArguments(**given | dict(training.others) | derived)
    except (ValueError, ImportError, OSError) as error:
        raise YiVLError(" ".join(str(error).split())) from error
    if args.tf32 is not None:
        # transformers sets the precision of all backends, which PyTorch 2.10 to 2.12 does not apply to convolutions.
        torch.backends.cudnn.allow_tf32 = args.tf32
    if args.n_gpu > 1:
        raise YiVLError(
            f"{args.n_gpu} GPUs in one process: start one process each with a script of scripts/ or torchrun, or "
            "choose one GPU by CUDA_VISIBLE_DEVICES"
        )
    if args.world_size != plan.world_size:
        raise YiVLError(f"WORLD_SIZE={plan.world_size}, but there are {args.world_size} processes; use torchrun")
    return args


def _uses_cpu(training: YiVLTrainingArguments) -> bool:
    return bool(training.others.get("use_cpu"))


def _check_bfloat16() -> None:
    """Check that the GPU has instructions for bfloat16; PyTorch would emulate them.

    Raises:
        YiVLError: If it does not.
    """
    import torch

    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        version = ".".join(map(str, torch.cuda.get_device_capability()))
        raise YiVLError(
            f"--bf16 True: this GPU (compute capability {version}) has no bfloat16; give --bf16 False --fp16 True, and "
            "--tf32 False to the scripts"
        )


def as_dict(arguments: Arguments, args: "TrainingArguments") -> dict[str, Any]:
    """Return what is saved with the model: the flags as given, those of transformers completed, and the world size."""
    model, data, training = (vars(group) for group in arguments)
    flags: dict[str, Any] = model | data | training | args.to_dict()
    for name in ("others", "origins"):
        del flags[name]
    total = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return flags | {
        "gradient_checkpointing": training["gradient_checkpointing"],
        "global_batch_size": total,
        "world_size": args.world_size,
    }


def as_config(arguments: Arguments, args: "TrainingArguments") -> dict[str, Any]:
    """Return the flags that repeat a run when they are given to ``--config``, on any number of processes."""
    model, data, training = (dict(vars(group)) for group in arguments)
    flags = model | data | training | training.pop("others")
    flags |= {name: as_dict(arguments, args)[name] for name in ("per_device_train_batch_size", "global_batch_size")}
    left_out = {"others", "origins", "gradient_accumulation_steps", "resume", "allow_changed_data", "dry_run"}
    left_out.add("warmup_ratio" if training["warmup_ratio"] is None else "warmup_steps")
    return {name: value for name, value in flags.items() if name not in left_out}


def prepare_environment(training: YiVLTrainingArguments) -> None:
    """Share the cores among the processes, and let DeepSpeed find ninja and, without a launcher, one process."""
    import torch

    share_cores(local_world_size())
    if _uses_cpu(training) or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it finds no accelerator
    if not training.deepspeed or training.dry_run:
        return
    # DeepSpeed compiles with the first ninja on the path. This environment has one, but may not be activated. Another
    # version than that of the last run would compile everything again.
    folder, path = sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != folder:
        os.environ["PATH"] = f"{folder}{os.pathsep}{path}"
    if "RANK" not in os.environ:
        # Port 0: the store listens on a free port. One that is chosen here could be taken before the store listens.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
