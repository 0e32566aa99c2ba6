"""The flags of ``python -m yivl.train``: those of LLaVA, and all of transformers' ``TrainingArguments``.

Only the standard library is imported, so that ``--help`` and wrong flags answer at once.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from yivl.command_line import Parser
from yivl.errors import YiVLError
from yivl.train.flags import add_flag, checked, dataclass_flags, transformers_flags
from yivl.train.layers import ADAPTER_FLAGS, TYPED, Layer, Origin, merge_layers
from yivl.train.refused import HIDDEN, internvl_checks, llava_checks, transformers_checks
from yivl.train.run_config import read_run_config
from yivl.train.stages import STAGES

# Flags that may name a file or folder. A shell expands "~" neither in a configuration nor after an equals sign.
_PATHS: Final = (
    *("model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter", "data_path", "image_folder", "eval_data_path"),
    *("output_dir", "deepspeed", "fsdp_config", "resume"),
)


def _flag(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text} | metadata)


def _check_positive(arguments: object, *names: str) -> None:
    for name in names:
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise YiVLError(f"--{name} {value} is not positive")


@dataclass(frozen=True)
class ModelArguments:
    """The initialization of a run, and which parameters are trainable.

    Raises:
        YiVLError: If flags contradict each other.
    """

    model_name_or_path: str = _flag(
        "",
        "Yi-VL or InternVL-Chat checkpoint (folder or hub id), or a language model to initialize from with a ViT",
        aliases=("--model_path",),
    )
    stage: int | None = _flag(None, "published stage 1, 2 or 3; sets the defaults of other flags (docs/training.md)")
    vision_tower: str | None = _flag(
        None,
        "ViT: folder or hub id of a CLIP (transformers, open_clip) or an InternViT, or open_clip:MODEL/TAG; it decides "
        "the architecture of a new model; default: the checkpoint's",
    )
    image_size: int | None = _flag(
        None, "height and width of the ViT input in pixels; default: the checkpoint's, or the ViT's"
    )
    image_aspect_ratio: str | None = _flag(
        None, "pad, square or squash; default: the checkpoint's, or pad for a CLIP and squash for an InternViT"
    )
    mm_projector_type: str | None = _flag(
        None, "type of a new projector, for a language model and a CLIP; default: mlp2x_gelu_Norm"
    )
    pretrain_mm_mlp_adapter: str | None = _flag(
        None, "weights of the projector (.bin of LLaVA, .pth of InternVL, safetensors), instead of the checkpoint's"
    )
    mm_vision_select_layer: int | None = _flag(
        None, "ViT layer whose output feeds a new projector; default: -2 of a CLIP, -1 of an InternViT"
    )
    mm_vision_select_feature: str | None = _flag(
        None, "patch or cls_patch: tokens of a CLIP that feed a new projector; default: patch"
    )
    ps_version: str | None = _flag(
        None,
        "pixel shuffle before a new projector of an InternViT: v1 transposes the grid of image tokens, v2 does not; "
        "default: v1, that of the published projectors",
        choices=["v1", "v2"],
    )
    drop_path_rate: float = _flag(
        0.0, "stochastic depth of a trained InternViT: the rate of its last layer, growing linearly from 0 at the first"
    )
    attn_implementation: str = _flag("sdpa", "attention kernels", choices=["sdpa", "eager", "flash_attention_2"])
    freeze_backbone: bool = _flag(False, "freeze the language model")
    tune_mm_mlp_adapter: bool = _flag(False, "train the projector only")
    freeze_mm_mlp_adapter: bool = _flag(False, "freeze the projector")
    unfreeze_mm_vision_tower: bool = _flag(False, "train the ViT")
    lora_enable: bool = _flag(False, "train LoRA adapters on all linear layers of the language model instead of it")
    lora_r: int = _flag(8, "rank")
    lora_alpha: int = _flag(16, "the adapters are scaled by lora_alpha / lora_r")
    lora_dropout: float = _flag(0.0, "dropout before the adapters")
    lora_vision_tower: bool = _flag(False, "add adapters to the linear layers of the ViT too")
    use_dora: bool = _flag(False, "DoRA: train the magnitude of the adapted weights apart from their direction")
    use_rslora: bool = _flag(False, "rsLoRA: scale the adapters by lora_alpha / sqrt(lora_r)")
    bits: int = _flag(16, "16, or 8 or 4 for a quantized language model under LoRA (QLoRA)", choices=[16, 8, 4])

    def __post_init__(self) -> None:
        if not self.model_name_or_path:
            raise YiVLError("--model_name_or_path is missing; give a checkpoint or, for stage 1, a language model")
        if self.stage is not None and self.stage not in STAGES:
            raise YiVLError(f"--stage {self.stage}: expected one of {', '.join(map(str, STAGES))}")
        if self.tune_mm_mlp_adapter and (
            self.freeze_mm_mlp_adapter or self.unfreeze_mm_vision_tower or self.lora_enable
        ):
            raise YiVLError("--tune_mm_mlp_adapter trains the projector only; drop the flags that contradict it")
        if self.bits != 16 and not self.lora_enable:
            raise YiVLError(f"--bits {self.bits}: quantized weights cannot be trained; add --lora_enable")
        if self.lora_enable and self.freeze_backbone:
            raise YiVLError("--lora_enable adds adapters to the language model, --freeze_backbone freezes it; drop one")
        if self.pretrain_mm_mlp_adapter is not None and self.lora_enable and self.freeze_mm_mlp_adapter:
            raise YiVLError(
                "--pretrain_mm_mlp_adapter: an adapter does not store a frozen projector; add "
                "--freeze_mm_mlp_adapter False to train it"
            )
        _check_positive(self, "lora_r")
        for name in ADAPTER_FLAGS:
            if not self.lora_enable and getattr(self, name) != getattr(type(self), name):
                raise YiVLError(f"--{name} has no effect without adapters; add --lora_enable True, or drop it")
        if not 0 <= self.drop_path_rate < 1:
            raise YiVLError(f"--drop_path_rate {self.drop_path_rate}: expected at least 0 and less than 1")
        if self.drop_path_rate and not (self.unfreeze_mm_vision_tower or self.lora_vision_tower):
            raise YiVLError(
                f"--drop_path_rate {self.drop_path_rate} has no effect on a frozen ViT; add "
                "--unfreeze_mm_vision_tower True, or drop it"
            )
        if self.lora_vision_tower and self.unfreeze_mm_vision_tower:
            raise YiVLError("--lora_vision_tower adds adapters, --unfreeze_mm_vision_tower trains the ViT; drop one")

    @property
    def of_a_new_model(self) -> dict[str, Any]:
        """The flags of a new model that were given; a checkpoint records its own values."""
        flags = {
            "mm_projector_type": self.mm_projector_type,
            "mm_vision_select_layer": self.mm_vision_select_layer,
            "mm_vision_select_feature": self.mm_vision_select_feature,
            "ps_version": self.ps_version,
        }
        return {name: value for name, value in flags.items() if value is not None}

    @property
    def trains_language_model(self) -> bool:
        """Whether the weights of the language model are trainable, as opposed to adapters on it."""
        return not (self.freeze_backbone or self.tune_mm_mlp_adapter or self.lora_enable)


@dataclass(frozen=True)
class DataArguments:
    """The training data.

    Raises:
        YiVLError: If a flag is missing or out of range.
    """

    data_path: str = _flag(
        "",
        "rows (.json, .jsonl, .parquet, hub:owner/name), tar shards ({00000..00099}.tar) or a mixture of them (.yaml)",
        aliases=("--data",),
    )
    image_folder: str = _flag(".", "folder that relative image paths start from")
    allow_outside_images: bool = _flag(False, "allow rows to name images outside of --image_folder")
    eval_data_path: str | None = _flag(None, "rows to compute the evaluation loss on; needs --eval_strategy")
    model_max_length: int = _flag(2048, "sequence length, image patches included; longer samples are truncated")
    max_rows_per_source: int | None = _flag(
        None, "maximum rows of each named source, a random subset, unless a mixture sets its own"
    )
    on_bad_row: str = _flag("error", "error stops at a bad row, skip leaves it out", choices=["error", "skip"])
    packing: bool = _flag(False, "pack the samples of a batch into one sequence without padding")
    group_by_length: bool = _flag(False, "batch samples of similar length")
    group_by_modality_length: bool = _flag(False, "the same, and samples with and without images apart")
    shuffle_buffer: int = _flag(1000, "shuffle buffer of streamed data, in samples")
    allow_remote_data: bool = _flag(False, "allow URLs of tar shards in data_path, such as https:// and s3://")

    def __post_init__(self) -> None:
        if not self.data_path:
            raise YiVLError("--data_path is missing; see docs/data.md")
        _check_positive(self, "model_max_length", "shuffle_buffer")


@dataclass(frozen=True)
class YiVLTrainingArguments:
    """Flags of training that yivl adds, that have other defaults than in transformers, or that yivl reads.

    Raises:
        YiVLError: If flags contradict each other, or one would have no effect.
    """

    output_dir: str = _flag("", "folder of the trained model, its checkpoints and logs", aliases=("--output",))
    learning_rate: float = _flag(2e-5, "peak learning rate of the language model, and of parts without their own")
    mm_projector_lr: float | None = _flag(None, "peak learning rate of the projector")
    mm_vision_tower_lr: float | None = _flag(None, "peak learning rate of the ViT")
    num_train_epochs: float = _flag(3.0, "number of epochs")
    max_steps: int = _flag(-1, "number of optimizer steps; positive values override --num_train_epochs")
    per_device_train_batch_size: int = _flag(1, "micro-batch size of a process, in samples")
    global_batch_size: int | None = _flag(
        None,
        "samples per optimizer step over all processes; sets what the other two leave open",
    )
    gradient_accumulation_steps: int = _flag(1, "micro-batches per optimizer step")
    weight_decay: float = _flag(0.0, "weight decay; biases and norms have none")
    lr_scheduler_type: str = _flag("cosine", "learning rate schedule")
    warmup_ratio: float | None = _flag(None, "warmup as a fraction of all steps; replaces --warmup_steps")
    warmup_steps: float = _flag(0.03, "warmup steps; below 1 a fraction of all steps")
    bf16: bool = _flag(False, "bf16 mixed precision")
    fp16: bool = _flag(False, "fp16 mixed precision with loss scaling")
    gradient_checkpointing: bool = _flag(False, "gradient checkpointing of the language model's layers")
    vision_gradient_checkpointing: bool = _flag(False, "gradient checkpointing of the ViT's layers")
    deepspeed: str | None = _flag(None, "DeepSpeed configuration, such as scripts/zero2.json")
    fsdp: bool = _flag(False, "FSDP2 instead of DeepSpeed: shard weights, gradients and optimizer states across GPUs")
    fsdp_config: str | None = _flag(
        None, 'FSDP2 settings, a JSON file or text such as {"reshard_after_forward": false}'
    )
    seed: int = _flag(42, "seed of the initialization, the dropout and the order of the data")
    disable_tqdm: bool = _flag(False, "log lines instead of a progress bar, also in a terminal")
    dataloader_num_workers: int = _flag(2, "data loading workers of a process")
    dataloader_persistent_workers: bool = _flag(True, "keep data loading workers between epochs")
    logging_steps: float = _flag(1, "steps between log lines")
    logging_nan_inf_filter: bool = _flag(False, "log the last finite loss instead of NaN or infinity")
    eval_strategy: str = _flag("no", "when to evaluate; needs --eval_data_path", aliases=("--evaluation_strategy",))
    save_strategy: str = _flag("steps", "when to save checkpoints")
    save_steps: float = _flag(200, "steps between checkpoints")
    save_total_limit: int | None = _flag(3, "number of checkpoints to keep")
    report_to: str = _flag("tensorboard", "tensorboard, wandb or none")
    ddp_find_unused_parameters: bool = _flag(False, "search for parameters without gradients in every step")
    resume: str | None = _flag(None, "checkpoint folder to resume from, or auto: the newest in --output_dir")
    allow_changed_data: bool = _flag(False, "resume although the content of the data has changed")
    dry_run: bool = _flag(False, "print the run's parameters, data, steps and estimated memory, and stop")
    others: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Flags of transformers that were given and are not listed above."""
    origins: Mapping[str, Origin] = field(default_factory=lambda: MappingProxyType({}))
    """Of every flag that was given."""

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise YiVLError("--output_dir is missing; give a folder for the trained model")
        _check_positive(self, "per_device_train_batch_size", "global_batch_size", "gradient_accumulation_steps")
        if self.dataloader_num_workers < 0:
            raise YiVLError(f"--dataloader_num_workers {self.dataloader_num_workers} is negative; 0 is none")
        if self.warmup_ratio is not None and not 0 <= self.warmup_ratio < 1:
            raise YiVLError(f"--warmup_ratio {self.warmup_ratio} is not between 0 and 1")


class Arguments(NamedTuple):
    """All flags of a run, as given."""

    model: ModelArguments
    data: DataArguments
    training: YiVLTrainingArguments


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Return the checked flags: those typed win over those of ``--config``, and both over the defaults of ``--stage``.

    Raises:
        YiVLError: If a flag is missing, unknown, out of range or contradicts another.
    """
    parser = _make_parser()
    typed = vars(parser.parse_args(argv))
    layers = [read_run_config(source, parser) for source in typed.pop("config", ())] + [Layer(TYPED, typed)]
    stage = next((layer.flags["stage"] for layer in reversed(layers) if "stage" in layer.flags), 0)
    layers.insert(0, Layer(f"--stage {stage}", STAGES.get(stage, {})))
    given, origins = merge_layers(layers)
    for name in (llava_checks() | internvl_checks()).keys() & given.keys():
        del given[name]  # accepted with the only value it can have
    given |= {name: os.path.expanduser(given[name]) for name in _PATHS if name in given}

    kinds: tuple[type, ...] = (ModelArguments, DataArguments, YiVLTrainingArguments)
    fields = [{name: given.pop(name) for name in dataclass_flags(kind) if name in given} for kind in kinds]
    fields[-1] |= {"others": MappingProxyType(given), "origins": MappingProxyType(origins)}
    groups, wrong = [], []
    for kind, values in zip(kinds, fields, strict=True):
        try:
            groups.append(kind(**values))
        except YiVLError as error:
            wrong.append(str(error))
    if wrong:
        raise YiVLError("; ".join(wrong))
    arguments = Arguments(*groups)
    if arguments.model.attn_implementation == "flash_attention_2" and not (
        arguments.training.bf16 or arguments.training.fp16
    ):
        raise YiVLError("--attn_implementation flash_attention_2: has no kernels for float32; add --bf16 True")
    if (arguments.data.eval_data_path is None) != (arguments.training.eval_strategy == "no"):
        raise YiVLError("--eval_data_path and --eval_strategy (steps or epoch) need each other")
    return arguments


def _make_parser() -> Parser:
    """Return the parser, with our flags first."""
    parser = Parser(
        prog="python -m yivl.train",
        usage="python -m yivl.train --model_name_or_path CHECKPOINT --data_path rows.json --output_dir OUT [flags]",
        description="Train Yi-VL or InternVL-Chat: pretraining, full fine-tuning, LoRA, QLoRA (docs/training.md).",
    )
    parser.add_argument(
        "--config",
        action="append",
        default=argparse.SUPPRESS,
        metavar="YAML",
        help="file with flags and their values, such as learning_rate: 1e-5; flags that are typed win, and of several "
        "files the last one",
    )
    theirs, checks = transformers_flags(), transformers_checks()
    for title, group in zip(("model", "data", "training"), Arguments.__annotations__.values(), strict=True):
        titled = parser.add_argument_group(title)
        for name, flag in dataclass_flags(group).items():
            choices = theirs.pop(name, flag).options
            add_flag(titled, name, flag._replace(options=choices | flag.options), checks.get(name))
    titled = parser.add_argument_group("transformers.TrainingArguments")
    for name, flag in theirs.items():
        hidden = {"help": argparse.SUPPRESS} if name in HIDDEN else {}
        aliases = {"aliases": ("--no_cuda",)} if name == "use_cpu" else {}
        add_flag(titled, name, flag._replace(options=flag.options | hidden | aliases), checks.get(name))
    for name, check in (llava_checks() | internvl_checks()).items():
        parser.add_argument(
            f"--{name}",
            type=partial(checked, str, check),
            nargs="?",
            const="True",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
    return parser
