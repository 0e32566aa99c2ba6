"""Evaluation on rows: images, scores by group, files."""

import argparse
import base64
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from support.golden import CHECKPOINT
from support.training import ROOT

from yivl.data.rows import RowError
from yivl.errors import YiVLError
from yivl.eval.__main__ import main
from yivl.eval.benchmarks.benchmark import Question
from yivl.eval.benchmarks.rows import read_questions, report, select_images
from yivl.eval.runner import answer_questions, fingerprint
from yivl.inference.chat import Chat

IMAGES = ROOT / "images"
FILES = ("cat.jpg", "coffee.jpg", "astronaut.jpg")


def write(folder: Path, answers: list[str]) -> Path:
    rows = [
        {
            "id": f"q{index}",
            "image": FILES[index % 3],
            "conversations": [
                {"from": "human", "value": "<image_placeholder>\nWhat is this?"},
                {"from": "gpt", "value": answer},
            ],
            "kind": "animal" if index % 3 == 0 else "other",
        }
        for index, answer in enumerate(answers)
    ]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "rows.json"


def flags(data: Path, **changes: Any) -> argparse.Namespace:
    values = {"data": str(data), "image_folder": str(IMAGES), "group_by": [], "images": "own"}
    return argparse.Namespace(**values | changes)


def test_responses_equal_those_of_a_chat(chat: Chat, tmp_path: Path) -> None:
    questions = read_questions(flags(write(tmp_path, ["cat", "cup", "woman", "cat"])))
    answers = answer_questions(lambda: chat.loaded, questions, tmp_path / "out", {}, batch_size=3, max_new_tokens=6)
    assert [*answers] == ["0", "1", "2", "3"]
    for question, answer in zip(questions, answers.values(), strict=True):
        chat.reset()
        assert answer == chat.ask(question.prompt, question.image(), temperature=0, max_new_tokens=6).strip()


def test_rows_of_another_dialect_are_asked_as_they_are_trained(chat: Chat, tmp_path: Path) -> None:
    url = {"url": f"data:image/jpeg;base64,{base64.b64encode((IMAGES / 'cat.jpg').read_bytes()).decode()}"}
    parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "What is this?"}]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": "cat"}]
    rows = [{"messages": said}, {"messages": [{"role": "system", "content": "Be brief."}, *said]}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plain, brief = read_questions(flags(tmp_path / "rows.jsonl"))
    assert (plain.prompt, plain.system, brief.system) == ("What is this?", None, "Be brief.")
    assert plain.image() == (IMAGES / "cat.jpg").read_bytes()
    settings = [fingerprint([replace(one, id="0")], "rows.jsonl", [])["questions"] for one in (plain, brief)]
    assert settings[0] != settings[1]
    answers = answer_questions(
        lambda: chat.loaded, [plain, brief], tmp_path / "out", {}, batch_size=2, max_new_tokens=6
    )
    for question, answer in zip((plain, brief), answers.values(), strict=True):
        alone = Chat(chat.loaded, system=question.system)
        assert answer == alone.ask("What is this?", IMAGES / "cat.jpg", temperature=0, max_new_tokens=6).strip()
    assert answers["0"] != answers["1"]


def test_scores_are_grouped() -> None:
    answers = ["yes", "yes", "yes", "no", "no", "no"]
    questions = [
        Question(str(index), "?", lambda: None, {"id": str(index), "answer": answer, "group": (f"g{index % 2}",)})
        for index, answer in enumerate(answers)
    ]
    responses = dict(zip("012345", ["yes", "Yes, it is", "yes", "no", "yes", "no"], strict=True))
    result = report(flags(Path("rows.json"), group_by=["kind"]), questions, responses)
    assert result.scores["scores"][0] == {
        "group": ("g0",),
        "number": 3,
        "accuracy": 200 / 3,
        "contains": 200 / 3,
        "constant": 200 / 3,
    }
    assert result.table is not None
    assert result.table.markdown().splitlines() == [
        "| kind | questions | exact % | contains % | best constant answer % |",
        "| ---- | --------: | ------: | ---------: | ---------------------: |",
        "| g0   |         3 |    66.7 |       66.7 |                   66.7 |",
        "| g1   |         3 |    66.7 |      100.0 |                   66.7 |",
    ]


def test_controls_show_another_image_or_none() -> None:
    images = [Path(f"{index}.jpg") for index in range(10)]
    groups = [(f"g{index % 2}",) for index in range(10)]
    assert select_images(images, groups, "none") == [None] * 10
    others = select_images(images, groups, "another")
    assert all(other != image for image, other in zip(images, others, strict=True))
    assert all(other and int(other.stem) % 2 == index % 2 for index, other in enumerate(others))
    assert others == select_images(images, groups, "another")


def test_a_row_with_two_images_in_its_question_is_an_error(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "<image_placeholder><image_placeholder>Same?"}, {"from": "gpt", "value": "No."}]
    (tmp_path / "rows.json").write_text(json.dumps([{"image": ["cat.jpg", "coffee.jpg"], "conversations": said}]))
    with pytest.raises(RowError, match="row 0: 2 images in the first question"):
        read_questions(flags(tmp_path / "rows.json"))


def test_a_row_without_a_field_to_group_by_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="row 0: no field 'split'"):
        read_questions(flags(write(tmp_path, ["cat"]), group_by=["split"]))


def test_the_command_writes_answers_and_scores(tmp_path: Path) -> None:
    data = write(tmp_path, ["cat", "cup", "woman"])
    command = [sys.executable, "-m", "yivl.eval", "rows", "--model-path", str(CHECKPOINT), "--data", str(data)]
    command += ["--image-folder", str(IMAGES), "--group-by", "kind", "--max-new-tokens", "4", "--device", "cpu"]
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| kind   | questions | exact % | contains % |")
    assert done.stdout == (tmp_path / "out/scores.md").read_text(encoding="utf-8")
    scores = json.loads((tmp_path / "out/scores.json").read_text(encoding="utf-8"))
    assert [(one["group"], one["number"]) for one in scores["scores"]] == [(["animal"], 1), (["other"], 2)]
    lines = (tmp_path / "out/answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["q0", "q1", "q2"]


def test_a_batch_of_no_questions_is_an_error(tmp_path: Path) -> None:
    argv = [
        "eval",
        "rows",
        "--data",
        str(tmp_path / "rows.json"),
        "--batch-size",
        "0",
        "--output",
        str(tmp_path / "out"),
    ]
    with mock.patch.object(sys, "argv", argv), pytest.raises(YiVLError, match="--batch-size 0: must be at least 1"):
        main()
