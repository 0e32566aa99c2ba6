"""The recipes for LLaMA-Factory 0.9.5: the published values, and only keys it knows."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.golden import ROOT
from transformers import TrainingArguments

from yivl.export.llamafactory_recipes import write_recipes

ZERO3 = ROOT / "scripts/zero3.json"
# Of its own argument classes. Source: hiyouga/LLaMA-Factory v0.9.5, src/llamafactory/hparams/.
OWN_KEYS = {"model_name_or_path", "stage", "finetuning_type", "plot_loss"}
OWN_KEYS |= {"freeze_vision_tower", "freeze_multi_modal_projector", "lora_rank", "lora_target"}
OWN_KEYS |= {"dataset", "dataset_dir", "media_dir", "template", "cutoff_len", "val_size"}
OWN_KEYS |= {"overwrite_cache", "preprocessing_num_workers"}
OWN_KEYS |= {"warmup_ratio"}  # of transformers up to 5.6, the last version that LLaMA-Factory 0.9.5 takes

SHARED = {"stage": "sft", "do_train": True, "template": "yi_vl", "cutoff_len": 2048, "bf16": True, "val_size": 0.01}
SHARED |= {"lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "per_device_train_batch_size": 1}
FULL = {"finetuning_type": "full", "freeze_vision_tower": True, "freeze_multi_modal_projector": True}
FULL |= {"learning_rate": 1e-5, "num_train_epochs": 10.0, "gradient_accumulation_steps": 2}
LORA = {"finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"}
LORA |= {"learning_rate": 1e-4, "num_train_epochs": 3.0, "gradient_accumulation_steps": 8}


@pytest.mark.parametrize(("kind", "values"), [("full", FULL), ("lora", LORA)])
def test_a_recipe_has_the_published_values_and_only_known_keys(
    kind: str, values: dict[str, Any], tmp_path: Path
) -> None:
    paths = write_recipes(tmp_path, name="mine", model="BUAADreamer/Yi-VL-6B-hf", deepspeed=ZERO3)
    assert [path.name for path in paths] == ["mine_full.yaml", "mine_lora.yaml"]
    recipe = yaml.safe_load((tmp_path / f"mine_{kind}.yaml").read_text(encoding="utf-8"))
    assert recipe | SHARED | values == recipe
    assert {type(recipe[name]) for name in ("learning_rate", "warmup_ratio")} == {float}  # YAML reads 1e-5 as text
    assert recipe.keys() <= OWN_KEYS | {field.name for field in fields(TrainingArguments)}
    assert (recipe["dataset"], recipe["dataset_dir"]) == ("mine", str(tmp_path))
    assert recipe["media_dir"] == str(tmp_path)
    assert ("deepspeed" in recipe) == (kind == "full")
    assert (tmp_path / "zero3.json").read_bytes() == ZERO3.read_bytes()


def test_paths_are_absolute_and_an_edited_recipe_is_kept_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "model-hf", "images"):
        Path(folder).mkdir()
    Path("data/mine_full.yaml").write_text("learning_rate: 3.0e-6\n")
    for _ in range(2):  # again with the same settings
        written = write_recipes(
            Path("data"), name="mine", model="model-hf", deepspeed=ZERO3, image_folder=Path("images")
        )
        assert written == (Path("data/mine_lora.yaml"),)
        assert caplog.messages == ["data/mine_full.yaml: kept; delete it for new settings"]
        caplog.clear()
    assert Path("data/mine_full.yaml").read_text() == "learning_rate: 3.0e-6\n"
    recipe = yaml.safe_load(Path("data/mine_lora.yaml").read_text(encoding="utf-8"))
    assert recipe["model_name_or_path"] == str(tmp_path / "model-hf")
    assert recipe["media_dir"] == str(tmp_path / "images")
