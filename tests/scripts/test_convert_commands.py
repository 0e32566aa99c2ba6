"""The commands of the bridges as they are typed: each writes what its function does, and mistakes are one line."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.golden import CHECKPOINT
from support.training import ROOT, conversation, write_rows

from yivl.checkpoint.loading import LoadedModel, load_model


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run a script of ``scripts/`` in this process, which has the libraries at hand, and return what it printed."""

    def run(script: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_to_hf_and_from_hf(run, loaded: LoadedModel, tmp_path: Path) -> None:
    run("convert.py", "to-hf", CHECKPOINT, tmp_path / "hf")
    run("convert.py", "from-hf", tmp_path / "hf", tmp_path / "back")
    again = load_model(tmp_path / "back", device="cpu").model.state_dict()
    assert all(torch.equal(again[key], value) for key, value in loaded.model.state_dict().items())


def test_from_hf_like_another_folder(run, loaded: LoadedModel, tmp_path: Path) -> None:
    run("convert.py", "to-hf", CHECKPOINT, tmp_path / "hf")
    for name in ("tokenizer.model", "published.json"):
        (tmp_path / "hf" / name).unlink()
    run("convert.py", "from-hf", tmp_path / "hf", tmp_path / "back", "--like", CHECKPOINT)
    files = load_model(tmp_path / "back", device="cpu").tokenizer.files
    assert {name: content.strip() for name, content in files.items()} == {
        name: content.strip() for name, content in loaded.tokenizer.files.items()
    }


def test_to_sglang(run, tmp_path: Path) -> None:
    run("convert.py", "to-sglang", CHECKPOINT, tmp_path / "sglang")
    config = json.loads((tmp_path / "sglang/config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["YiVLForCausalLM"]
    assert "lm_head.weight" in load_file(tmp_path / "sglang/model.safetensors")


def test_to_gguf(run, tmp_path: Path) -> None:
    printed = run("convert.py", "to-gguf", CHECKPOINT, tmp_path, "--dtype", "float32")
    names = ("checkpoint-float32.gguf", "mmproj-checkpoint-float32.gguf")
    assert printed == "".join(f"{tmp_path / name}\n" for name in names)
    assert all((tmp_path / name).read_bytes()[:4] == b"GGUF" for name in names)


def test_to_llamafactory_and_back(run, tmp_path: Path) -> None:
    rows = [conversation("cat.jpg", "What is it?", "A cat."), conversation(None, "And now?", "A dog.")]
    write_rows(tmp_path / "rows.json", rows)
    printed = run("convert.py", "to-llamafactory", tmp_path / "rows.json", tmp_path / "data")
    recipes = [tmp_path / f"data/rows_{kind}.yaml" for kind in ("full", "lora")]
    assert printed == "".join(f"{line}\n" for line in ("2 rows", *recipes))
    assert yaml.safe_load(recipes[0].read_text())["model_name_or_path"] == "BUAADreamer/Yi-VL-6B-hf"
    info = tmp_path / "data/dataset_info.json"
    assert [*json.loads(info.read_text(encoding="utf-8"))] == ["rows"]
    assert run("convert.py", "from-llamafactory", info, "rows", tmp_path / "again.json") == "2 rows\n"
    again = json.loads((tmp_path / "again.json").read_text(encoding="utf-8"))
    said = [[message["value"] for message in row["conversations"]] for row in again]
    assert said == [["<image_placeholder>\nWhat is it?", "A cat."], ["And now?", "A dog."]]


def test_the_card_of_a_folder(run) -> None:
    card = run("hub.py", "card", CHECKPOINT, "--licence", "apache-2.0")
    assert card.startswith("---\n")
    assert "license: apache-2.0" in card
    assert "## Training\n\nNot recorded in this folder." in card


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["convert.py", "to-hf", "nowhere", "out"], "nowhere: no such folder, and no model of that name"),
        (["convert.py", "from-hf", str(CHECKPOINT), "out"], "config.json: not the -hf format of a Yi-VL model"),
        (["hub.py", "upload", "nowhere", "me/model"], "nowhere: no such folder; give a checkpoint or an adapter"),
    ],
    ids=["no source", "another layout", "nothing to upload"],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments: list[str], said: str, tmp_path: Path) -> None:
    script, *rest = arguments
    command = [sys.executable, str(ROOT / "scripts" / script), *rest]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert not [*tmp_path.iterdir()]
