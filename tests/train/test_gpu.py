"""Training on GPUs: bfloat16, paged optimizers, DeepSpeed on NCCL, FlashAttention, all GPUs of the machine."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import wide_checkpoint
from support.training import IMAGES, losses, run_script, write_rows
from transformers.utils import is_flash_attn_2_available

from yivl.checkpoint.loading import load_model
from yivl.train.run_log import read_log

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def flags(model: Path, rows: Path, out: Path, **changes: Any) -> list[str]:
    values = {"model_name_or_path": model, "data_path": rows, "image_folder": IMAGES, "output_dir": out}
    values |= {"num_train_epochs": 20, "learning_rate": 5e-3, "save_steps": 10} | changes
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


@pytest.mark.parametrize(
    ("script", "settings", "changes"),
    [
        ("finetune.sh", "", {}),
        ("finetune.sh", "scripts/zero2.json", {}),
        ("finetune.sh", "scripts/zero3.json", {}),
        ("finetune.sh", "scripts/zero2_offload.json", {}),
        ("finetune.sh", "scripts/zero3_offload.json", {}),
        ("finetune.sh", "", {"packing": True}),
        ("finetune.sh", "", {"packing": True, "attn_implementation": "flash_attention_2"}),
        ("finetune_lora.sh", "scripts/zero2.json", {"freeze_mm_mlp_adapter": False}),
        ("finetune_qlora.sh", "", {}),
        ("train_stage3.sh", "scripts/zero3.json", {"image_size": 56}),
    ],
)
@pytest.mark.parametrize("gpus", [1, torch.cuda.device_count()])
def test_a_script_trains_on_gpus_in_bf16_and_resumes(
    script: str, settings: str, changes: dict[str, Any], gpus: int, tmp_path: Path
) -> None:
    if "flash_attention_2" in changes.values() and not is_flash_attn_2_available():
        pytest.skip("needs the flash-attn package")
    model, rows = wide_checkpoint(tmp_path / "wide"), write_rows(tmp_path / "rows.json")
    environment = {"GPUS": gpus, "GLOBAL_BATCH": 8, "MICRO_BATCH": 1, "DEEPSPEED": settings}
    curves = []
    for name in ("whole", "resumed"):
        out = tmp_path / name
        if name == "resumed":
            out.mkdir()
            shutil.copytree(tmp_path / "whole/checkpoint-10", out / "checkpoint-10")
        run_script(script, *flags(model, rows, out, **changes, resume="auto"), **environment)
        curves.append(losses(read_log(out / "log.jsonl")))
    whole, resumed = curves
    assert whole[-1] < whole[0] - 0.5
    assert resumed == pytest.approx(whole[10:], rel=0.05)  # GPU kernels sum in varying order
    load_model(tmp_path / "whole", model_base=model if "lora" in script else None)
