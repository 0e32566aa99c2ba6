"""What a model card and the citation say beside what a run recorded (tests/checkpoint/test_hub.py)."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from support.golden import CHECKPOINT, ROOT

import yivl
from yivl.export.hf import to_hf
from yivl.export.model_card import make_card


def test_a_card_says_limitations_hardware_and_the_license_of_the_weights() -> None:
    card = make_card(CHECKPOINT, base_model="01-ai/Yi-VL-6B")
    for said in (
        "not in the image",
        "56 × 56 pixels",
        "one image per conversation",
        "RTX 3090, RTX 4090, A10 or A30",
        "[Yi Series Models Community License Agreement 2.1](https://huggingface.co/01-ai/Yi-VL-6B/blob/main/LICENSE)",
        "a derivative of Yi-VL-6B by 01.AI",
        "github.com/haotian-liu/LLaVA",
        "github.com/mlfoundations/open_clip",
        "eprint        = {2403.04652}",
    ):
        assert said in card
    assert card.count("{") == card.count("}")
    assert "A800" in make_card(CHECKPOINT, base_model="01-ai/Yi-VL-34B")
    card = make_card(CHECKPOINT)  # of unknown size, and not known to derive from a released model
    assert "## Limitations" in card
    assert "## Hardware" not in card
    assert "Community License" not in card


@pytest.mark.parametrize(
    ("recorded", "base", "released"),
    [
        ("BUAADreamer/Yi-VL-6B-hf", "BUAADreamer/Yi-VL-6B-hf", "01-ai/Yi-VL-6B"),
        ("BUAADreamer/Yi-VL-34B-hf", "BUAADreamer/Yi-VL-34B-hf", "01-ai/Yi-VL-34B"),
        ("modelscope:01ai/Yi-VL-6B", "01-ai/Yi-VL-6B", "01-ai/Yi-VL-6B"),
    ],
)
def test_a_released_model_of_another_name_has_its_hardware_and_license(
    recorded: str, base: str, released: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(CHECKPOINT, tmp_path / "trained"))
    (folder / "training_run.json").write_text(json.dumps({"base_model": recorded}))
    card = make_card(folder)
    assert f"\nbase_model: {base}\n" in card
    assert f"The weights derive from `{base}`" in card
    assert f"https://huggingface.co/{released}/blob/main/LICENSE" in card
    assert f"a derivative of {released.removeprefix('01-ai/')} by 01.AI" in card
    assert ("RTX 3090, RTX 4090, A10 or A30" if "6B" in released else "A800") in card


def test_the_card_of_an_hf_folder_names_its_format(tmp_path: Path) -> None:
    to_hf(CHECKPOINT, tmp_path / "hf")
    card = make_card(tmp_path / "hf")
    assert "The files are in the `-hf` format of transformers' LLaVA, with the projector of Yi-VL." in card
    assert "Yi-VL (LLaVA) checkpoint format" not in card


def test_the_citation_is_valid_and_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == yivl.__version__
    assert citation["license"] == "Apache-2.0"
    assert citation["references"][0]["url"] == "https://arxiv.org/abs/2403.04652"


def test_the_readme_says_the_same_as_a_card() -> None:
    readme, card = (ROOT / "README.md").read_text(encoding="utf-8"), make_card(CHECKPOINT, base_model="01-ai/Yi-VL-34B")
    for said in (
        "Yi Series Models Community License Agreement 2.1](https://huggingface.co/01-ai/Yi-VL-34B/blob/main/LICENSE)",
        "github.com/haotian-liu/LLaVA",
        "github.com/mlfoundations/open_clip",
        "one image per conversation",
        "not in the image",
        card.split("```bibtex")[1].split("```")[0],
    ):
        assert said in card
        assert said in readme
    for said in ("RTX 3090", "4 x RTX 4090", "A800", "CITATION.cff", "modelscope:01ai/Yi-VL-6B"):
        assert said in readme
