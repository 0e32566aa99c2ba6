"""The Yi-VL checkpoint format, written atomically, read back by us and by transformers' own readers."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.golden import CHECKPOINT
from transformers import CLIPImageProcessor, CLIPVisionModel, LlamaConfig

from yivl.checkpoint.folder import read_config
from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.checkpoint.saving import checkpoint_dir, save_checkpoint
from yivl.errors import CheckpointError

VIT = "vit/clip-vit-tiny-random-yi-vl-56"
PROMPT = torch.tensor([[294, 332, 725, -200, 19, 748]])
IMAGE = torch.linspace(-1, 1, 3 * 56 * 56).reshape(1, 3, 56, 56)


@pytest.fixture
def saved(loaded: LoadedModel, tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    save_checkpoint(
        loaded.model,
        folder,
        tokenizer=loaded.tokenizer,
        image_processor=loaded.image_processor.clip_processor,
        max_shard_size="500KB",
    )
    return folder


def test_a_saved_model_gives_the_same_logits_and_answers(saved: Path, loaded: LoadedModel) -> None:
    again = load_model(saved, device="cpu")
    with torch.no_grad():
        expected = loaded.model(PROMPT, images=IMAGE).logits
        torch.testing.assert_close(again.model(PROMPT, images=IMAGE).logits, expected, atol=0, rtol=0)
    assert again.tokenizer("Human: 你好 ###").input_ids == loaded.tokenizer("Human: 你好 ###").input_ids
    assert again.image_processor.background == loaded.image_processor.background


def test_the_layout_is_the_published_one_in_safetensors(saved: Path, loaded: LoadedModel) -> None:
    names = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    shards = {name for name in names if name.startswith("model-")}
    assert len(shards) > 2
    tokenizer_files = {"tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    assert names == shards | tokenizer_files | {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        f"{VIT}/config.json",
        f"{VIT}/preprocessor_config.json",
        f"{VIT}/model.safetensors",
    }
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    published = json.loads((CHECKPOINT / "pytorch_model.bin.index.json").read_text())
    assert index["weight_map"].keys() == published["weight_map"].keys()
    assert index["metadata"]["total_size"] == published["metadata"]["total_size"]
    for name in tokenizer_files:
        assert (saved / name).read_bytes() == (CHECKPOINT / name).read_bytes()
    generation, published = (
        json.loads((folder / "generation_config.json").read_text()) for folder in (saved, CHECKPOINT)
    )
    assert {**generation, "transformers_version": ""} == {**published, "transformers_version": ""}


def test_a_saved_config_names_no_folder(saved: Path) -> None:
    for path in saved.rglob("*.json"):
        assert "_name_or_path" not in path.read_text(encoding="utf-8")
        assert str(CHECKPOINT.parent) not in path.read_text(encoding="utf-8")


def test_both_copies_of_the_vit_are_the_models_own(saved: Path, loaded: LoadedModel) -> None:
    own = loaded.model.get_vision_tower().vit.state_dict()
    vit = load_file(saved / VIT / "model.safetensors")
    prefix = "model.vision_tower.vision_tower."
    index = json.loads((saved / "model.safetensors.index.json").read_text())["weight_map"]
    for key, expected in own.items():
        with safe_open(saved / index[f"{prefix}vision_model.{key}"], "pt") as shard:
            assert torch.equal(shard.get_tensor(f"{prefix}vision_model.{key}"), expected)
        assert torch.equal(vit[f"vision_model.{key}"], expected)
    assert len(vit) == len(own)


def test_readers_that_know_only_the_published_layout_read_it(saved: Path, loaded: LoadedModel) -> None:
    """The reference reads a Llama configuration, then ``vit/`` with ``CLIPVisionModel`` and ``CLIPImageProcessor``."""
    config = LlamaConfig.from_dict(json.loads((saved / "config.json").read_text()))
    assert config.rope_parameters["rope_theta"] == 5e6
    assert json.loads((saved / "config.json").read_text())["rope_theta"] == 5e6
    vit = CLIPVisionModel.from_pretrained(saved / VIT)
    with torch.no_grad():
        hidden = vit(IMAGE, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(hidden, loaded.model.get_vision_tower()(IMAGE))
    processor = CLIPImageProcessor.from_pretrained(saved / VIT)
    assert processor.crop_size["height"] == 56


def test_save_pretrained_is_the_same_writer(loaded: LoadedModel, tmp_path: Path) -> None:
    loaded.model.save_pretrained(tmp_path / "m", tokenizer=loaded.tokenizer)
    assert (tmp_path / "m" / VIT / "model.safetensors").is_file()
    assert json.loads((tmp_path / "m/config.json").read_text())["mm_vision_tower"] == f"./{VIT}"


def test_a_failed_save_leaves_the_old_folder_and_no_rubbish(
    saved: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in saved.rglob("*")}

    def no_space(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(type(loaded.tokenizer), "save_pretrained", no_space)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(loaded.model, saved, tokenizer=loaded.tokenizer)
    assert {path: path.stat().st_mtime_ns for path in saved.rglob("*")} == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    for text in ("old", "new"):
        with checkpoint_dir(target) as folder:
            (folder / text).write_text(text)
            (folder / "config.json").write_text("{}")
    # What is no weight file is carried over; weights are replaced as a whole.
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "new", "old"]
    assert list(target.parent.iterdir()) == [target]


def test_old_weights_go_and_other_files_stay(saved: Path, loaded: LoadedModel) -> None:
    (saved / "README.md").write_text("mine")
    told = (
        "training_arguments.json",
        "training_run.json",
        "log.jsonl",
        "published.json",
    )  # of the model that was there
    for name in told:
        (saved / name).write_text("{}")
    loaded.model.save_pretrained(saved)  # no tokenizer and no image processor are given this time
    assert (saved / "README.md").read_text() == "mine"
    assert not [name for name in told if (saved / name).exists()]
    assert [path.name for path in saved.glob("model*")] == ["model.safetensors"]
    again = load_model(saved, device="cpu")
    with torch.no_grad():
        expected = loaded.model(PROMPT, images=IMAGE).logits
        torch.testing.assert_close(again.model(PROMPT, images=IMAGE).logits, expected, atol=0, rtol=0)


def test_a_new_tokenizer_replaces_all_of_the_old_one(saved: Path, loaded: LoadedModel) -> None:
    """Files of another format would be read by other programs in its place."""
    old = ("tokenizer.json", "chat_template.jinja", "processor_config.json")
    for name in old:
        (saved / name).write_text("{}")
    processor = loaded.image_processor.clip_processor
    save_checkpoint(loaded.model, saved, tokenizer=loaded.tokenizer, image_processor=processor)
    assert not [name for name in old if (saved / name).exists()]
    load_model(saved, device="cpu")


def test_a_new_tokenizer_leaves_the_image_processor(saved: Path, loaded: LoadedModel) -> None:
    (kept,) = saved.glob("vit/*/preprocessor_config.json")
    before = kept.read_bytes()
    loaded.model.save_pretrained(saved, tokenizer=loaded.tokenizer)
    assert kept.read_bytes() == before
    load_model(saved, device="cpu")


@pytest.mark.parametrize("unrelated", ["thesis.txt", "checkpoint-1/config.json"])
def test_a_folder_that_holds_more_than_a_checkpoint_is_left_alone(
    unrelated: str, loaded: LoadedModel, tmp_path: Path
) -> None:
    target = tmp_path / "run"
    (target / unrelated).parent.mkdir(parents=True)
    (target / unrelated).write_text("precious")
    with pytest.raises(CheckpointError, match="holds more than a checkpoint"):
        loaded.model.save_pretrained(target)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [target / unrelated]


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    with checkpoint_dir(target) as folder:
        (folder / "config.json").write_text("old")
    rename = Path.rename

    def fail(self: Path, to: Path) -> Path:
        if self.name.startswith(".target.") and not self.name.endswith(".old"):
            raise OSError("cannot rename")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="cannot rename"), checkpoint_dir(target) as folder:
        (folder / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with checkpoint_dir(tmp_path / "link") as folder:
        (folder / "config.json").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/config.json").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 2


def test_other_processes_of_a_distributed_run_write_nothing(loaded: LoadedModel, tmp_path: Path) -> None:
    loaded.model.save_pretrained(tmp_path / "out", is_main_process=False, state_dict={})
    assert not (tmp_path / "out").exists()


def test_rope_scaling_survives(tmp_path: Path) -> None:
    fields = json.loads((CHECKPOINT / "config.json").read_text()) | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    source = Path(shutil.copytree(CHECKPOINT, tmp_path / "scaled"))
    (source / "config.json").write_text(json.dumps(fields))
    assert read_config(source).to_published_dict()["rope_scaling"] == fields["rope_scaling"]


def test_what_is_saved_has_the_permissions_of_other_files(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for path in [saved, *saved.rglob("*")]:
        expected = tmp_path / ("folder" if path.is_dir() else "file")
        assert path.stat().st_mode == expected.stat().st_mode, path


WRITER = """
import sys, time
from yivl.checkpoint.saving import checkpoint_dir
with checkpoint_dir(sys.argv[1]) as folder:
    (folder / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_killed_writer_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with checkpoint_dir(target) as folder:
        (folder / "config.json").write_text("whole")
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [path.name for path in target.iterdir()] == ["config.json"]
