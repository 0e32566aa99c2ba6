"""The training runs of the GPU report: flags of ``yivl.train``, and sizes from large to small."""

from dataclasses import dataclass
from typing import Final

from hardware_table import BOTH, LANGUAGE_MODEL, ROOT


@dataclass(frozen=True)
class Size:
    """What a run is tried with."""

    micro_batch: int
    flags: str = ""
    layers: int = 32
    """Of the decoder."""


@dataclass(frozen=True)
class TrainingRun:
    """A training run; of its sizes, the first that fits by the estimate of the dry run is measured."""

    name: str
    seconds: int
    """Expected on one H100, start of the process included. Not measured so far."""
    title: str
    flags: str
    sizes: tuple[Size, ...]
    answer: int = 200
    """Tokens that the loss is computed on."""
    packages: tuple[str, ...] = ()
    """That must be installed, apart from those of all runs."""


LORA: Final = "--lora_enable True --freeze_mm_mlp_adapter True"
FULL: Final = "--freeze_mm_mlp_adapter True"
RUNS: Final = (
    TrainingRun(
        "lora",
        50,
        "LoRA (rank 8), 448 pixels, AdamW",
        LORA,
        (Size(8), Size(4), Size(2), Size(1, LANGUAGE_MODEL)),
    ),
    TrainingRun(
        "full",
        60,
        "full fine-tuning of the language model, AdamW with FP32 master weights, as many layers of the 6B as fit",
        FULL,
        (Size(4), Size(8, "", 16), Size(4, "", 16), Size(8, "", 12), Size(1, LANGUAGE_MODEL, 4)),
    ),
    TrainingRun(
        "full_adafactor",
        60,
        "full fine-tuning of the whole language model, Adafactor with FP32 master weights",
        f"{FULL} --optim adafactor",
        (Size(4), Size(2), Size(4, LANGUAGE_MODEL), Size(1, LANGUAGE_MODEL)),
    ),
    TrainingRun(
        "lora_recipe",
        40,
        "LoRA (rank 8), 448 pixels, micro-batch and gradient checkpointing of scripts/finetune_lora.sh",
        f"{LORA} {LANGUAGE_MODEL}",
        (Size(1),),
    ),
    TrainingRun(
        "stage2",
        60,
        "stage 2: ViT and projector on captions, 448 pixels, gradient checkpointing",
        f"--stage 2 {BOTH}",
        (Size(8), Size(2)),
        answer=40,
    ),
    TrainingRun(
        "stage1",
        60,
        "stage 1: ViT and projector on captions, 224 pixels, gradient checkpointing",
        f"--stage 1 {BOTH}",
        (Size(32), Size(8)),
        answer=40,
    ),
    TrainingRun(
        "qlora",
        70,
        "QLoRA (4 bits, rank 8), 448 pixels, 8-bit AdamW",
        f"{LORA} --bits 4 {LANGUAGE_MODEL}",
        (Size(4), Size(1)),
        packages=("bitsandbytes",),
    ),
    TrainingRun(
        "full_8bit",
        70,
        "full fine-tuning of the whole language model, 8-bit AdamW with FP32 master weights",
        f"{FULL} {LANGUAGE_MODEL} --optim adamw_bnb_8bit",
        (Size(4), Size(2), Size(1)),
        packages=("bitsandbytes",),
    ),
    TrainingRun(
        "full_offload",
        150,
        "full fine-tuning of the whole language model, ZeRO-2 with the optimizer states on the CPU",
        f"{FULL} {LANGUAGE_MODEL} --deepspeed {ROOT / 'scripts/zero2_offload.json'}",
        (Size(8), Size(2), Size(2, "", 16), Size(1, "", 8)),
        packages=("deepspeed",),
    ),
)
"""By worth."""
