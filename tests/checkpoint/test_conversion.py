"""``.bin`` to safetensors, and the open_clip tower: files, commands, numbers."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from safetensors.torch import load_file
from support.golden import CHECKPOINT, ROOT
from support.models import OPEN_CLIP_VISION

from yivl.checkpoint.conversion import bin_to_safetensors, open_clip_to_vit
from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.checkpoint.vit import copy_vit_weights, open_clip_to_vit_weights, read_clip_weights
from yivl.errors import CheckpointError
from yivl.model.configuration import YiVLConfig
from yivl.model.vision_tower import VisionTower


def test_the_command_converts_a_checkpoint_and_prints_hashes(tmp_path: Path, loaded: LoadedModel) -> None:
    target = tmp_path / "converted"
    command = [sys.executable, "scripts/convert.py", "safetensors", str(CHECKPOINT), str(target)]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 6
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256(Path(name).read_bytes()).hexdigest() == digest
    assert not list(target.rglob("*.bin*"))
    converted = load_model(target, device="cpu").model.state_dict()
    for key, value in loaded.model.state_dict().items():
        assert torch.equal(converted[key], value)
    # The copy of the ViT in the main shards is kept too, although no reader uses it.
    shards = {key: value for path in target.glob("model-*") for key, value in load_file(path).items()}
    key = "model.vision_tower.vision_tower.vision_model.post_layernorm.weight"
    main = {k: v for p in CHECKPOINT.glob("*.bin") for k, v in torch.load(p, weights_only=True).items()}
    assert torch.equal(shards[key], main[key])
    assert shards.keys() == main.keys()


def test_nothing_to_convert_is_one_clear_line(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/convert.py", "safetensors", str(tmp_path), str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path}: no .bin weights to convert\n"
    assert not (tmp_path / "out").exists()


def test_a_conversion_replaces_neither_its_source_nor_unrelated_files(tmp_path: Path) -> None:
    source = shutil.copytree(CHECKPOINT, tmp_path / "models/yi")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/precious.txt").write_text("precious")
    (tmp_path / "file").write_text("a file")
    before = sorted(tmp_path.rglob("*"))
    for target, message in (
        (source, "is or contains"),
        (tmp_path / "models", "is or contains"),
        (tmp_path / "home", "holds more than a checkpoint"),
        (tmp_path / "file", "is a file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            bin_to_safetensors(Path(source), target)
    with pytest.raises(CheckpointError, match="no such folder"):
        bin_to_safetensors(tmp_path / "nothing", tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_file_leaves_no_target(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/pytorch_model.bin").write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="damaged, truncated"):
        bin_to_safetensors(tmp_path / "source", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


"""Head width 80 as in ViT-H-14."""
VIT_H_14: dict[str, Any] = {"width": 1280, "layers": 32, "head_width": 80, "patch_size": 14, "image_size": 224}
"""Source: open_clip, model_configs/ViT-H-14.json."""


def check_open_clip_parity(vision_cfg: dict[str, Any], folder: Path, atol: float, dtype: torch.dtype) -> None:
    """Compare our tower, through files of a dtype, with open_clip's own penultimate features in float32."""
    visual = _build_vision_tower(64, CLIPVisionCfg(**vision_cfg)).eval().to(dtype)
    state_dict = {f"visual.{key}": value for key, value in visual.state_dict().items()}
    torch.save(state_dict | {"logit_scale": torch.ones(())}, folder / "open_clip_pytorch_model.bin")
    config_file = folder / "open_clip_config.json"
    preprocess_cfg = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    model_cfg = {"embed_dim": 64, "vision_cfg": vision_cfg}
    config_file.write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}))
    open_clip_to_vit(folder / "open_clip_pytorch_model.bin", config_file, folder / "vit")

    vision = json.loads((folder / "vit/config.json").read_text())
    tower = VisionTower(YiVLConfig(vision_config=vision, mm_hidden_size=vision["hidden_size"])).eval()
    copy_vit_weights(tower.vit, read_clip_weights(folder / "vit"), source="test")
    pixels = torch.randn(2, 3, vision_cfg["image_size"], vision_cfg["image_size"])
    with torch.no_grad():
        features = visual.float().forward_intermediates(
            pixels,
            indices=[vision_cfg["layers"] - 2],
            intermediates_only=True,
            normalize_intermediates=False,
            output_fmt="NLC",
        )
        expected = features["image_intermediates"][0]
        torch.testing.assert_close(tower(pixels), expected, atol=atol, rtol=1e-4)
    processor = json.loads((folder / "vit/preprocessor_config.json").read_text())
    assert processor["crop_size"]["height"] == pixels.shape[2]
    assert (processor["image_mean"], processor["image_std"]) == ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])


def test_an_open_clip_folder_is_not_replaced_by_its_own_vit(tmp_path: Path) -> None:
    """A folder of the hub also holds the CLIP of transformers, and thus a config.json."""
    for name in ("config.json", "open_clip_config.json", "open_clip_pytorch_model.bin", "pytorch_model.bin"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match="is or contains"):
        open_clip_to_vit(tmp_path / "open_clip_pytorch_model.bin", tmp_path / "open_clip_config.json", tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_tensors_that_share_memory_are_converted_and_files_of_a_run_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    tied = torch.arange(12.0).view(3, 4)
    torch.save({"a": tied, "b": tied, "c": tied.T}, tmp_path / "source/pytorch_model.bin")
    torch.save(Path("of a Trainer"), tmp_path / "source/training_args.bin")
    bin_to_safetensors(tmp_path / "source", tmp_path / "target")
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "target/model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in (("a", tied), ("b", tied), ("c", tied.T)))


def test_the_tower_from_open_clip_gives_its_penultimate_features(tmp_path: Path) -> None:
    check_open_clip_parity(OPEN_CLIP_VISION, tmp_path, atol=1e-5, dtype=torch.float32)


@pytest.mark.slow
def test_the_real_vit_h_14_from_open_clip_gives_its_penultimate_features(tmp_path: Path) -> None:
    assert open_clip.get_model_config("ViT-H-14")["vision_cfg"].items() <= VIT_H_14.items()
    check_open_clip_parity(VIT_H_14, tmp_path, atol=1e-4, dtype=torch.float16)  # half of the disk space


def test_a_tower_that_is_no_plain_vit_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"visual\.attn_pool\.query"):
        open_clip_to_vit_weights({"visual.attn_pool.query": torch.zeros(1)})


def test_a_wrong_open_clip_config_is_named(tmp_path: Path) -> None:
    torch.save({"visual.class_embedding": torch.zeros(1)}, tmp_path / "weights.bin")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json: not the configuration of an open_clip ViT"):
        open_clip_to_vit(tmp_path / "weights.bin", tmp_path / "config.json", tmp_path / "out")
