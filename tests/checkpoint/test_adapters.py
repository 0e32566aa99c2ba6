"""Adapter folders hold everything an answer needs: the image settings and the ViT of training."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.golden import CHECKPOINT
from support.training import IMAGES, VIT, train, write_language_model, write_rows

from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.errors import CheckpointError, YiVLError
from yivl.image_processing import ImageProcessor
from yivl.train import merge, trainer

PROMPT = torch.tensor([[294, 332, 725, -200, 19, 748]])
SETTINGS = "yivl_adapter_config.json"


@pytest.fixture
def other_vit(tmp_path: Path) -> Path:
    """A ViT of the same shapes with other weights."""
    folder = Path(shutil.copytree(VIT, tmp_path / "other-vit"))
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save(
        {key: value + 0.1 * torch.randn_like(value) for key, value in weights.items()}, folder / "pytorch_model.bin"
    )
    return folder


def logits(model: Any, image_processor: ImageProcessor) -> torch.Tensor:
    pixels = image_processor([Image.open(IMAGES / "wide_rgb.png")])
    with torch.no_grad():
        return model.eval()(PROMPT, images=pixels).logits


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 28, "image_aspect_ratio": "square"},
        {"image_size": 84, "unfreeze_mm_vision_tower": True},
        {"image_aspect_ratio": "square", "lora_vision_tower": True},
        {"vision_tower": "other", "unfreeze_mm_vision_tower": True},
        {"vision_tower": VIT},
    ],
    ids=[
        "smaller and square",
        "larger, ViT trained",
        "square, adapters on the ViT",
        "another ViT, trained",
        "same ViT",
    ],
)
def test_a_loaded_and_a_merged_adapter_give_the_logits_of_training(
    changes: dict[str, Any], other_vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if changes.get("vision_tower") == "other":
        changes = changes | {"vision_tower": other_vit}
    save_adapter, saved = trainer.save_adapter, {}

    def save(model: Any, folder: Path, *, image_processor: ImageProcessor, **kwargs: Any) -> None:
        saved["logits"] = logits(model, image_processor)
        save_adapter(model, folder, image_processor=image_processor, **kwargs)

    monkeypatch.setattr(trainer, "save_adapter", save)
    rows = write_rows(tmp_path / "rows.json")
    train(tmp_path / "out", rows, lora_enable=True, lora_r=4, max_steps=2, learning_rate=1e-2, **changes)
    loaded = load_model(tmp_path / "out", device="cpu")
    torch.testing.assert_close(logits(loaded.model, loaded.image_processor), saved["logits"])
    flags = ["--model-path", CHECKPOINT, "--lora-path", tmp_path / "out", "--save-model-path", tmp_path / "merged"]
    monkeypatch.setattr(sys, "argv", ["merge", *map(str, flags)])
    merge.main()
    merged = load_model(tmp_path / "merged", device="cpu")
    torch.testing.assert_close(logits(merged.model, merged.image_processor), saved["logits"], atol=1e-4, rtol=1e-4)
    base = load_model(CHECKPOINT, device="cpu")
    assert (logits(base.model, base.image_processor).shape != saved["logits"].shape) == ("image_size" in changes)


def test_a_frozen_vit_that_an_adapter_cannot_store_is_refused(other_vit: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.json")
    with pytest.raises(YiVLError, match="other-vit: not the ViT of the base model, and an adapter does not store"):
        train(tmp_path / "out", rows, lora_enable=True, vision_tower=other_vit)
    assert not (tmp_path / "out/adapter_config.json").exists()


def test_an_adapter_on_a_language_model_without_a_projector_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    language_model = write_language_model(tmp_path / "llm", loaded.model)
    rows = write_rows(tmp_path / "rows.json")
    with pytest.raises(YiVLError, match="llm is a language model without a projector; give a checkpoint"):
        train(tmp_path / "out", rows, lora_enable=True, vision_tower=VIT, model_name_or_path=language_model)


def test_an_adapter_without_image_settings_takes_those_of_its_base_and_damaged_ones_are_named(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.json")
    train(tmp_path / "out", rows, lora_enable=True, max_steps=1, image_size=28, freeze_mm_mlp_adapter=True)
    settings = tmp_path / "out" / SETTINGS
    assert json.loads(settings.read_text()) == {"model_type": "llava", "image_aspect_ratio": "pad", "image_size": 28}
    settings.write_text('{"image_size": "28"}')
    with pytest.raises(CheckpointError, match=f"{SETTINGS}: image_size is '28'; expected an integer"):
        load_model(tmp_path / "out", device="cpu")
    for size in (30, 0, -28):
        settings.write_text(json.dumps({"image_size": size, "image_aspect_ratio": "pad"}))
        with pytest.raises(CheckpointError, match=rf"image_size (is )?{size}(; expected| is not)"):
            load_model(tmp_path / "out", device="cpu")
        with pytest.raises(CheckpointError, match=f"image_size {size} is not a multiple of the patch size 14"):
            train(tmp_path / "new", rows, image_size=size)
    settings.unlink()
    assert load_model(tmp_path / "out", device="cpu").image_processor.image_size == 56


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that was trained with the projector."""
    folder = tmp_path_factory.mktemp("adapter")
    rows = write_rows(folder / "rows.json")
    train(folder / "out", rows, lora_enable=True, max_steps=1, save_strategy="no", freeze_mm_mlp_adapter=False)
    return folder / "out"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("peft_type", "PREFIX_TUNING", "adapter_config.json: peft_type is 'PREFIX_TUNING'; expected 'LORA'"),
        ("r", 10**9, "adapter_config.json: r is 1000000000; expected an integer, 1 to 131,072"),
        ("r", 100_000, "adapter_config.json: r is 100000; the weights have at most"),
        ("r", "8", "adapter_config.json: r is '8'; expected an integer"),
        ("target_modules", "((", "not an adapter of this base model (missing ), unterminated subpattern"),
        ("rank_pattern", [1], "adapter_config.json: rank_pattern is [1]; expected an object"),
    ],
)
def test_an_adapter_with_a_wrong_field_is_refused_by_name(
    field: str, value: Any, said: str, adapter: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=re.escape(said)):
        load_model(folder, model_base=CHECKPOINT, device="cpu")


def test_null_fields_of_an_adapter_stand_for_absent_ones(adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    path = folder / "adapter_config.json"
    null = dict.fromkeys(("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out"))
    path.write_text(json.dumps(json.loads(path.read_text()) | null))
    before, after = (load_model(path, model_base=CHECKPOINT, device="cpu") for path in (adapter, folder))
    expected = logits(before.model, before.image_processor)
    torch.testing.assert_close(logits(after.model, after.image_processor), expected, rtol=0, atol=0)


@pytest.mark.parametrize("damage", ["missing", "incomplete"])
def test_an_adapter_without_what_was_trained_with_it_is_refused(damage: str, adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    path = folder / "non_lora_trainables.safetensors"
    trained = load_file(path)
    path.unlink()
    if damage == "incomplete":
        save_file(dict(list(trained.items())[1:]), path)
    held = len(trained) - 1 if damage == "incomplete" else 0
    with pytest.raises(CheckpointError, match=f"{path.name}: holds {held} of the {len(trained)} tensors trained with"):
        load_model(folder, model_base=CHECKPOINT, device="cpu")
    (folder / SETTINGS).unlink()  # as in adapters of LLaVA, which do not record it
    assert load_model(folder, model_base=CHECKPOINT, device="cpu")
