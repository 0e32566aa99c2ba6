"""LLaVA's published commands: they run, or one message explains every flag that does not fit."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.training import IMAGES, ROOT, VIT, train, weights, write_language_model, write_rows

from yivl.checkpoint.loading import LoadedModel
from yivl.errors import CheckpointError, YiVLError
from yivl.train.__main__ import main
from yivl.train.arguments import _make_parser, parse_arguments
from yivl.train.refused import llava_checks

# The flags that scripts/v1_5/{pretrain,finetune,finetune_lora}.sh of haotian-liu/LLaVA have in common, in this order.
COMMON = """--model_name_or_path MODEL --version VERSION --data_path ROWS --image_folder IMAGES --vision_tower VIT
 --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False --bf16 True --output_dir OUT
 --num_train_epochs 1 --per_device_train_batch_size 2 --per_device_eval_batch_size 4 --gradient_accumulation_steps 2
 --evaluation_strategy no --save_strategy steps --save_steps 50000 --save_total_limit 1 --learning_rate 2e-5
 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --model_max_length 2048
 --gradient_checkpointing True --dataloader_num_workers 0 --lazy_preprocess True --report_to REPORT"""
TUNING = "--mm_projector_type mlp2x_gelu --image_aspect_ratio pad --group_by_modality_length True"


def command(template: str, **places: Any) -> list[str]:
    values = {"IMAGES": IMAGES, "VIT": VIT, "VERSION": "mm_default", "REPORT": "none"} | places
    return [str(values.get(word, word)) for word in shlex.split(template)]


def write_projector(path: Path, prefix: str = "model.mm_projector.", width: int = 64) -> dict[str, torch.Tensor]:
    """Write the projector of type mlp2x_gelu that LLaVA's pretraining leaves, and return it."""
    shapes = {"0.weight": (width, 48), "0.bias": (width,), "2.weight": (width, width), "2.bias": (width,)}
    found = {name: torch.randn(shape) / 8 for name, shape in shapes.items()}
    save = save_file if path.suffix == ".safetensors" else torch.save
    save({prefix + name: value for name, value in found.items()}, path)
    return found


def test_the_published_commands_are_explained_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    words = command(f"--lora_enable True {TUNING} {COMMON} --tf32 True", VERSION="v1", REPORT="wandb")
    words += ["--image_grid_pinpoints", "[]", "--lora_bias", "all", "--cache_dir", "x", "--overwrite_output_dir"]
    with pytest.raises(YiVLError) as error:
        parse_arguments(words)
    message = str(error.value)
    assert "\n" not in message
    for part in (
        "--version: v1 is not supported: Yi-VL has one prompt, mm_default",
        "--report_to: wandb is not supported: it needs a package",
        "--image_grid_pinpoints: [] is not supported: an image is one square, without tiles",
        "--lora_bias: all is not supported: biases are not trained",
        "--cache_dir: x is not supported: set the environment variable HF_HUB_CACHE",
        "--overwrite_output_dir: True is not supported: give another --output_dir, or --resume auto",
    ):
        assert part in message
    assert message.count("is not supported") == 6


def test_every_flag_of_llava_is_accepted_with_the_value_that_is_always_so() -> None:
    accepted = "--version mm_default --conv-mode mm_default --mm_use_im_start_end False --mm_use_im_patch_token False "
    accepted += "--lazy_preprocess --is_multimodal True --double_quant True --quant_type nf4 --lora_weight_path= "
    accepted += "--lora_bias none --evaluation_strategy no --save_safetensors True --no_cuda True"
    training = parse_arguments(["--model_path", "m", "--data", "d", "--output", "o", *accepted.split()]).training
    assert not set(llava_checks()) & training.others.keys()
    assert training.others == {"use_cpu": True}


def test_the_fine_tuning_command_trains(loaded: LoadedModel, tmp_path: Path) -> None:
    language_model = write_language_model(tmp_path / "llm", loaded.model)
    write_projector(tmp_path / "mm_projector.bin")
    places = {"MODEL": language_model, "ROWS": write_rows(tmp_path / "rows.json"), "OUT": tmp_path / "out"}
    main(command(f"{TUNING} --pretrain_mm_mlp_adapter {tmp_path}/mm_projector.bin {COMMON}", **places))
    assert {"model.mm_projector.2.weight", "lm_head.weight"} <= weights(tmp_path / "out").keys()


@pytest.mark.parametrize("name", ["mm_projector.bin", "mm_projector.safetensors"])
def test_a_projector_is_loaded(name: str, loaded: LoadedModel, tmp_path: Path) -> None:
    language_model = write_language_model(tmp_path / "llm", loaded.model)
    prefix = "model.mm_projector." if name.endswith(".bin") else "base_model.model.model.mm_projector."
    expected = write_projector(tmp_path / name, prefix)
    start: dict[str, Any] = {"model_name_or_path": language_model, "vision_tower": VIT, "max_steps": 1}
    start |= {"mm_projector_type": "mlp2x_gelu", "pretrain_mm_mlp_adapter": tmp_path / name}
    train(tmp_path / "out", write_rows(tmp_path / "rows.json"), **start, freeze_mm_mlp_adapter=True)
    found = weights(tmp_path / "out")
    for key, value in expected.items():
        assert torch.equal(found[f"model.mm_projector.{key}"], value)


def test_a_projector_that_does_not_fit_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    rows, path = write_rows(tmp_path / "rows.json"), tmp_path / "mm_projector.bin"
    write_projector(path, width=32)
    language_model = write_language_model(tmp_path / "llm", loaded.model)
    start: dict[str, Any] = {"pretrain_mm_mlp_adapter": path, "model_name_or_path": language_model, "vision_tower": VIT}
    with pytest.raises(CheckpointError, match=r"\.bin: the weights do not fit a projector of type mlp2x_gelu_Norm"):
        train(tmp_path / "out", rows, **start)
    with pytest.raises(CheckpointError, match=r"0\.bias is \[32\], expected \[64\]"):
        train(tmp_path / "out", rows, **start, mm_projector_type="mlp2x_gelu")
    with pytest.raises(CheckpointError, match=r"nothing\.bin: no such file"):
        train(tmp_path / "out", rows, **start | {"pretrain_mm_mlp_adapter": "nothing.bin"})
    adapters: dict[str, Any] = {"pretrain_mm_mlp_adapter": path, "lora_enable": True, "freeze_mm_mlp_adapter": True}
    with pytest.raises(YiVLError, match="not store a frozen projector; add --freeze_mm_mlp_adapter False to train it"):
        train(tmp_path / "out", rows, **adapters)
    assert not (tmp_path / "out/config.json").exists()


def test_the_documentation_lists_every_flag_of_llava() -> None:
    text = (ROOT / "docs/migrating-from-llava.md").read_text(encoding="utf-8").split("## Commands")[0]
    listed = set(re.findall(r"`(?:--)?(\w+)[^`]*`", text))
    assert set(llava_checks()) <= listed
    known = {option.removeprefix("--") for option in _make_parser()._option_string_actions}
    left = [row.split("|")[1] for row in text.splitlines() if row.startswith("| `")]
    named = {name for cell in left for name in re.findall(r"`(\w+)`", cell)}
    assert len(named) > 45
    assert named <= known
