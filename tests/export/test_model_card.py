"""What a model card and the citation say beside what a run recorded (tests/checkpoint/test_hub.py)."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from support.golden import CHECKPOINT, ROOT
from support.golden_internvl import CHECKPOINT as INTERNVL

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


def test_a_card_of_another_architecture_has_its_own_credits_citation_and_limitation() -> None:
    card = make_card(INTERNVL)
    for said in (
        "# checkpoint\n\nA model of the architecture of InternVL-Chat-V1-2: it answers",
        "- internvl\n",
        "\n- InternVL-Chat-V1-2 was fine-tuned on conversations with at most one image.\n- Training adds",
        "github.com/OpenGVLab/InternVL",
        "eprint        = {2312.14238}",
    ):
        assert said in card
    for said in ("Yi-VL", "yi-vl", "- llava", "2403.04652", "open_clip"):
        assert said not in card
    card = make_card(CHECKPOINT)
    for said in ("InternVL", "internvl", "2312.14238"):
        assert said not in card


@pytest.mark.parametrize(
    ("model_type", "said", "tags"),
    [
        ("llava", "A LoRA adapter for a Yi-VL model, which", ["yi-vl", "llava", "lora"]),
        ("internvl_chat", "A LoRA adapter for a model of the architecture of InternVL-Chat-V1-2, which", None),
        (None, "A LoRA adapter for a vision-language model, which", ["lora"]),
    ],
)
def test_an_adapter_has_the_card_of_the_architecture_it_records(
    model_type: str | None, said: str, tags: list[str] | None, tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    settings = {"image_size": 56, "image_aspect_ratio": "pad"}
    if model_type is not None:
        (tmp_path / "yivl_adapter_config.json").write_text(json.dumps(settings | {"model_type": model_type}))
    card = make_card(tmp_path)
    assert said in card
    assert ModelCard(card).data.tags == (tags or ["internvl", "lora"])
    assert card.count("Yi-VL is by") == (model_type == "llava")
    assert card.count("InternVL-Chat-V1-2 is by") == (model_type == "internvl_chat")
    assert ("## Credits and citation" in card) == (model_type is not None)
    assert "\n\n\n" not in card


def test_a_card_shows_the_flags_of_an_intern_vit(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(INTERNVL, tmp_path / "trained"))
    flags = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "world_size": 1,
        "data_path": "rows.json",
    }
    for rate, version in ((0.4, "v2"), (0.0, None)):
        shown = flags | {"drop_path_rate": rate, "ps_version": version}
        (folder / "training_arguments.json").write_text(json.dumps(shown))
        card = make_card(folder)
        assert ("| drop_path_rate | 0.4 |" in card, "drop_path_rate" in card) == (bool(rate),) * 2
        assert ("| ps_version | `v2` |" in card, "ps_version" in card) == (bool(rate),) * 2


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
