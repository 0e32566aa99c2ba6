"""Training on GPUs by the scripts: bfloat16, TF32, paged optimizers, DeepSpeed on NCCL, FlashAttention, all GPUs."""

import importlib.util
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
ALL_GPUS = pytest.param(
    torch.cuda.device_count(), marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
)


def skip_without(script: str, settings: str, changes: dict[str, Any]) -> None:
    """Skip a case whose packages are missing; all need ``datasets`` to read rows and ``matplotlib`` to plot losses."""
    packages = ["datasets", "matplotlib", *(["deepspeed"] if settings else [])]
    packages += ["bitsandbytes"] if "qlora" in script else []
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if "flash_attention_2" in changes.values() and not is_flash_attn_2_available():
        missing.append("flash-attn")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


def flags(model: Path, rows: Path, out: Path, **changes: Any) -> list[str]:
    values = {"model_name_or_path": model, "data_path": rows, "image_folder": IMAGES, "output_dir": out}
    values |= {"num_train_epochs": 20, "learning_rate": 5e-3, "save_steps": 10, "report_to": "none"} | changes
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


# In the order of what they would teach: a report may have no time for all of them.
@pytest.mark.parametrize("gpus", [1, ALL_GPUS])
@pytest.mark.parametrize(
    ("script", "settings", "changes"),
    [
        ("finetune.sh", "", {"packing": True}),
        ("finetune_qlora.sh", "", {}),
        ("finetune_lora.sh", "scripts/zero2.json", {"freeze_mm_mlp_adapter": False}),
        ("finetune.sh", "", {"packing": True, "attn_implementation": "flash_attention_2"}),
        ("train_stage3.sh", "scripts/zero3.json", {"image_size": 56}),
        ("finetune.sh", "scripts/zero3_offload.json", {}),
        ("finetune.sh", "scripts/zero2_offload.json", {}),
        ("finetune.sh", "", {}),
        ("finetune.sh", "scripts/zero2.json", {}),
        ("finetune.sh", "scripts/zero3.json", {}),
    ],
)
def test_a_script_trains_on_gpus_in_bf16_and_resumes(
    script: str, settings: str, changes: dict[str, Any], gpus: int, tmp_path: Path
) -> None:
    skip_without(script, settings, changes)
    check_script(script, settings, changes, gpus, tmp_path)


def check_script(script: str, settings: str, changes: dict[str, Any], gpus: int, folder: Path) -> None:
    """Train twenty steps, and the last ten of them again from a checkpoint; 0 GPUs are a CPU."""
    model, rows = wide_checkpoint(folder / "wide"), write_rows(folder / "rows.json")
    environment = {"GPUS": gpus, "GLOBAL_BATCH": 8, "MICRO_BATCH": 1, "DEEPSPEED": settings}
    curves = []
    for name in ("whole", "resumed"):
        out = folder / name
        if name == "resumed":
            out.mkdir()
            shutil.copytree(folder / "whole/checkpoint-10", out / "checkpoint-10")
        run_script(script, *flags(model, rows, out, **changes, resume="auto"), **environment)
        curves.append(losses(read_log(out / "log.jsonl")))
    whole, resumed = curves
    assert whole[-1] < whole[0] - 0.5
    assert resumed == pytest.approx(whole[10:], rel=0.05)  # GPU kernels sum in varying order
    load_model(folder / "whole", model_base=model if "lora" in script else None)
