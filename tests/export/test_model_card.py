"""What a model card and the citation say beside what a run recorded (tests/checkpoint/test_hub.py)."""

import yaml
from support.golden import CHECKPOINT, ROOT

import yivl
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
