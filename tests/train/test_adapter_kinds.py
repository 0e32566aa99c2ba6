"""DoRA and rsLoRA: trained, resumed, merged, refused where peft has none."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden import CHECKPOINT
from support.models import wide_checkpoint
from support.training import train, weights, write_rows

from yivl.checkpoint.loading import load_model
from yivl.train import merge

KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_r": 16},
    "both": {"use_dora": True, "use_rslora": True, "lora_vision_tower": True},
}
LORA: dict[str, Any] = {"lora_enable": True, "learning_rate": 1e-2, "freeze_mm_mlp_adapter": True}


def logits(folder: Path) -> torch.Tensor:
    ids, images = torch.tensor([[294, 332, -200, 19, 748]]), torch.ones(1, 3, 56, 56)
    with torch.no_grad():
        result: torch.Tensor = load_model(folder, device="cpu", dtype="float32").model(ids, images=images).logits
    return result


def merge_into_base(adapter: Path, target: Path, monkeypatch: pytest.MonkeyPatch, base: Path = CHECKPOINT) -> None:
    paths = ["--model-path", adapter, "--model-base", base, "--output", target]
    monkeypatch.setattr(sys, "argv", ["merge", *map(str, paths)])
    merge.main()


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_trained_resumed_and_merged(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, merged, rows = tmp_path / "out", tmp_path / "merged", write_rows(tmp_path / "rows.json")
    changes = {**LORA, **KINDS[kind], "num_train_epochs": 1, "save_steps": 2}
    curve = [line["loss"] for line in train(out, rows, **changes) if "loss" in line]
    merge_into_base(out, merged, monkeypatch)
    adapted = logits(out)
    assert (adapted - logits(CHECKPOINT)).abs().max() > 1e-2
    torch.testing.assert_close(logits(merged), adapted, atol=2e-5, rtol=1e-5)
    if kind != "rslora":
        assert any("lora_magnitude_vector" in key for key in weights(out))
    trained = weights(out)
    for path in (out / "checkpoint-4", *out.glob("*.json"), *out.glob("*.safetensors")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = [line["loss"] for line in train(out, rows, resume="auto", **changes) if "loss" in line]
    assert again[-2:] == curve[-2:]
    for key, value in weights(out).items():
        torch.testing.assert_close(value, trained[key], atol=0, rtol=0)


def test_rslora_scales_by_the_square_root_of_the_rank(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.json")
    for name, is_rs in (("plain", False), ("rs", True)):
        changes = {**LORA, "lora_r": 16, "use_rslora": is_rs, "max_steps": 1, "learning_rate": 1e-3}
        train(tmp_path / name, rows, **changes, warmup_steps=0)
    from peft import PeftConfig

    assert [PeftConfig.from_pretrained(str(tmp_path / name)).use_rslora for name in ("plain", "rs")] == [False, True]
    # One step of Adam from B = 0 depends on the sign of the gradient only, so that outputs differ by the scale.
    plain, scaled = ((logits(tmp_path / name) - logits(CHECKPOINT)).norm() for name in ("plain", "rs"))
    assert scaled / plain == pytest.approx(4, rel=0.2)


@pytest.mark.slow
def test_dora_on_a_quantized_model_is_merged_into_the_unquantized_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, out, merged = wide_checkpoint(tmp_path / "wide"), tmp_path / "out", tmp_path / "merged"
    log = train(out, write_rows(tmp_path / "rows.json"), **LORA, model_name_or_path=wide, bits=4, use_dora=True)
    assert log[-2]["loss"] < log[0]["loss"]
    merge_into_base(out, merged, monkeypatch, wide)
    assert not torch.equal(logits(merged), logits(wide))
