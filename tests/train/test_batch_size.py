"""Micro-batch, accumulation and global batch size: any two give the third, and what is typed wins."""

import re

import pytest
from support.training import ROOT

from yivl.errors import YiVLError
from yivl.train.arguments import parse_arguments
from yivl.train.plan import RunPlan

NEEDED = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o"]
LORA = ("--config", str(ROOT / "configs/finetune_lora.yaml"))  # 1 sample x 8
STAGE = ("--config", "{stage: 1, per_device_train_batch_size: 32}")  # 4,096 samples
MICRO, STEPS, TOTAL = "--per_device_train_batch_size", "--gradient_accumulation_steps", "--global_batch_size"


def split(monkeypatch: pytest.MonkeyPatch, world_size: int, *words: str) -> tuple[int, int]:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    plan = RunPlan.of(parse_arguments([*NEEDED, *words]))
    return plan.per_device_train_batch_size, plan.gradient_accumulation_steps


@pytest.mark.parametrize(
    ("world_size", "words", "expected"),
    [
        (1, (), (1, 1)),
        (2, LORA, (1, 8)),
        (2, (*LORA, MICRO, "4"), (4, 8)),
        (2, (*LORA, STEPS, "3"), (1, 3)),
        (2, (*LORA, TOTAL, "8"), (1, 4)),
        (2, (*LORA, MICRO, "4", STEPS, "8"), (4, 8)),
        (2, (*LORA, MICRO, "4", TOTAL, "32"), (4, 4)),
        (2, (*LORA, STEPS, "4", TOTAL, "32"), (4, 4)),
        (2, (*LORA, MICRO, "4", STEPS, "4", TOTAL, "32"), (4, 4)),
        (2, (*LORA, TOTAL, "64", TOTAL, "8"), (1, 4)),  # GLOBAL_BATCH=64, and a flag
        (8, STAGE, (32, 16)),
        (8, (*STAGE, MICRO, "16"), (16, 32)),
        (8, (*STAGE, STEPS, "2"), (32, 2)),
        (1, (*STAGE, TOTAL, "12"), (12, 1)),  # the default micro-batch shrinks
        (2, (*STAGE, TOTAL, "140"), (14, 5)),
        (1, ("--config", "{global_batch_size: 8, per_device_train_batch_size: 4}", STEPS, "3"), (4, 3)),
        (1, ("--config", "{global_batch_size: 8, gradient_accumulation_steps: 4}", MICRO, "2"), (2, 4)),
        (1, (*LORA, "--config", "{global_batch_size: 16}"), (1, 16)),
        # The micro-batch gives way if it ranks below the other two.
        (1, ("--stage", "3", STEPS, "8"), (32, 8)),
        (4, ("--config", "{global_batch_size: 64}", STEPS, "8"), (2, 8)),
        (1, ("--config", "{gradient_accumulation_steps: 8}", TOTAL, "64"), (8, 8)),
        (2, (*LORA, "--config", "{global_batch_size: 64}", STEPS, "8"), (4, 8)),
        (2, (*LORA, "--config", "{gradient_accumulation_steps: 4}", TOTAL, "64"), (8, 4)),
        (1, ("--config", "{global_batch_size: 64}", STEPS, "8", MICRO, "2"), (2, 8)),
    ],
)
def test_any_two_give_the_third(
    world_size: int, words: tuple[str, ...], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert split(monkeypatch, world_size, *words) == expected


@pytest.mark.parametrize(
    ("world_size", "words", "message"),
    [
        (
            2,
            (*LORA, MICRO, "4", STEPS, "4", TOTAL, "16"),
            f"{TOTAL} 16 is not 32, {MICRO} 4 x {STEPS} 4 x 2 processes; drop one of the three",
        ),
        (
            7,
            STAGE,
            f"{TOTAL} 4096 (from --stage 1) is no multiple of 224, {MICRO} 32 (from the script) x 7 processes",
        ),
        (2, (*LORA, TOTAL, "3"), f"{TOTAL} 3 is no multiple of 2, {MICRO} 1 (from {LORA[1]}) x 2 processes"),
        (1, (*STAGE, MICRO, "3"), f"{TOTAL} 4096 (from --stage 1) is no multiple of 3, {MICRO} 3 x 1 process"),
        (1, ("--stage", "3", STEPS, "3"), f"{TOTAL} 256 (from --stage 3) is no multiple of 3, {STEPS} 3 x 1 process"),
        (1, (*STAGE, TOTAL, "4", STEPS, "8"), f"{TOTAL} 4 is no multiple of 8, {STEPS} 8 x 1 process"),
    ],
)
def test_a_contradiction_names_what_was_typed_and_what_was_not(
    world_size: int, words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(YiVLError, match=f"^{re.escape(message)}$"):
        split(monkeypatch, world_size, *words)
