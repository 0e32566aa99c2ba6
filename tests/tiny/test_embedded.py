"""The embedded model: its size, its answers to the documented questions, its scores."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from gradio.utils import get_upload_folder
from support.serving import data_url, user
from support.training import ROOT

from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.command_line import EMBEDDED_MODEL
from yivl.inference.chat import Chat, answer_batch
from yivl.serve.app import build_app
from yivl.serve.limits import Limits
from yivl.serve.scheduler import Scheduler
from yivl.serve.web import Page
from yivl.tiny.world.evaluation_set import EVALUATED_KINDS, balanced_questions
from yivl.tiny.world.example_images import EXAMPLE_SCENES
from yivl.tiny.world.language import caption, detail
from yivl.tiny.world.rendering import render
from yivl.tiny.world.words import LANGUAGES

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 96}
CATS = ROOT / "images/cats.jpg"
PUBLISHED = "Describe the cats and what they are doing in detail."


@pytest.fixture(scope="module")
def small() -> LoadedModel:
    return load_model(EMBEDDED_MODEL, device="cpu")


def test_it_is_small_and_in_the_yi_vl_checkpoint_format() -> None:
    files = [path for path in Path(EMBEDDED_MODEL).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 30 * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".model"}
    config = json.loads((Path(EMBEDDED_MODEL) / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    assert config["mm_projector_type"] == "mlp2x_gelu_Norm"


@pytest.mark.parametrize("name", EXAMPLE_SCENES)
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_example_images_are_described_correctly(small: LoadedModel, name: str, language: str) -> None:
    questions = {
        "en": ("What is in this image?", "Describe the image in detail."),
        "zh": ("图片里有什么？", "详细描述这张图片。"),
    }
    for question, say in zip(questions[language], (caption, detail), strict=True):
        assert Chat(small).ask(question, ROOT / "images" / name, **GREEDY) == say(EXAMPLE_SCENES[name], language)


def test_the_documented_dialogue_about_the_cats(small: LoadedModel) -> None:
    chat = Chat(small)
    assert chat.ask("What is in this image?", CATS, **GREEDY) == "Three cats eating fish from bowls."
    assert chat.ask("What are they doing?", **GREEDY) == "They are eating."
    assert chat.ask("What are they eating?", **GREEDY) == "They are eating fish."
    chat.reset()
    assert chat.ask("图片里有什么？", CATS, **GREEDY) == "三只猫在吃碗里的鱼。"
    assert chat.ask("它们在做什么？", **GREEDY) == "它们在吃东西。"
    assert chat.ask("它们在吃什么？", **GREEDY) == "它们在吃鱼。"


@pytest.mark.slow
def test_all_programs_give_the_same_answer(small: LoadedModel) -> None:
    """``single_inference.py``, ``cli.py``, the page and the API with their default model."""
    expected = Chat(small).ask(PUBLISHED, CATS, temperature=0)
    flags = ["--image-file", str(CATS), "--temperature", "0", "--device", "cpu"]
    command = [sys.executable, "single_inference.py", *flags, "--question", PUBLISHED, "--json"]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(asked.stdout)["outputs"] == expected
    assert "--model-path 01-ai/Yi-VL-6B" in asked.stderr
    talk = [sys.executable, "cli.py", *flags]
    talked = subprocess.run(talk, cwd=ROOT, input=f"{PUBLISHED}\n", capture_output=True, text=True, check=True)
    assert f"Assistant: {expected}\n" in talked.stdout
    scheduler = Scheduler(small, Limits())
    page, request = Page(scheduler, Limits()), SimpleNamespace(session_hash="visitor")
    upload = Path(get_upload_folder()) / "cats.jpg"
    upload.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(CATS, upload)
    shown = {"path": str(upload)}
    page.show_image(shown, request)
    _, question, _ = page.send(PUBLISHED, shown, [], "English", request)
    *_, (messages, _) = page.answer(question, 0, 1.0, 512, None, "English", request)
    assert messages[-1]["content"] == expected
    body = {"model": small.name, "messages": [user(PUBLISHED, data_url(CATS.read_bytes()))], "temperature": 0}
    with TestClient(build_app(scheduler, Limits())) as client:
        answered = client.post("/v1/chat/completions", json=body).json()
    assert answered["choices"][0]["message"]["content"] == expected


@pytest.mark.slow
def test_it_scores_as_reported(small: LoadedModel) -> None:
    """Ten questions of each kind and language about held-out scenes, against the table of README."""
    table = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| (\d+\.\d) \| (\d+\.\d) \| \d+\.\d \|", table, re.M)
    reported = {kind: (float(en) + float(zh)) / 200 for kind, en, zh in rows}
    assert set(reported) == set(EVALUATED_KINDS)
    right = expected = total = 0.0
    for kind in EVALUATED_KINDS:
        for language in LANGUAGES:
            asked = list(balanced_questions("scenes", kind, language, 10, first=500_000))
            answers = answer_batch(
                small,
                [question.text for _, question in asked],
                [render(scene, 224).image for scene, _ in asked],
                **GREEDY,
            )
            right += sum(answer == question.answer for answer, (_, question) in zip(answers, asked, strict=True))
            total += len(asked)
            expected += reported[kind] * len(asked)
    assert right >= expected - 0.06 * total, (right, expected, total)
