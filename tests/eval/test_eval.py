"""Evaluation on rows: which picture is shown, how answers are compared and grouped, what is written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.golden import CHECKPOINT
from support.training import ROOT

from yivl.data.rows import RowError
from yivl.eval.benchmarks.rows import Item, questions, read_items, score, show, table
from yivl.eval.runner import answer_questions
from yivl.inference.chat import Chat

IMAGES = ROOT / "images"
PICTURES = ("cat.jpg", "coffee.jpg", "astronaut.jpg")


def write(folder: Path, answers: list[str]) -> Path:
    rows = [
        {
            "id": f"q{index}",
            "image": PICTURES[index % 3],
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


def test_answers_are_those_of_a_chat(chat: Chat, tmp_path: Path) -> None:
    items = read_items(write(tmp_path, ["cat", "cup", "woman", "cat"]), IMAGES, ["kind"])
    asked = questions(items, "own")
    answers = answer_questions(lambda: chat.loaded, asked, tmp_path / "out", {}, batch_size=3, max_new_tokens=6)
    assert answers is not None
    for item, answer in zip(items, answers.values(), strict=True):
        chat.reset()
        assert answer == chat.ask(item.question, item.image, temperature=0, max_new_tokens=6).strip()


def test_scores_are_by_group() -> None:
    items = [Item(str(index), "?", None, "yes" if index < 3 else "no", (f"g{index % 2}",)) for index in range(6)]
    scores = score(items, ["yes", "Yes, it is", "yes", "no", "yes", "no"])
    assert [
        (one.group, one.number, round(one.accuracy), round(one.contains), round(one.constant)) for one in scores
    ] == [
        (("g0",), 3, 67, 67, 67),
        (("g1",), 3, 67, 100, 67),
    ]
    assert table(scores, ["kind"]).markdown().splitlines() == [
        "| kind | questions | exact % | contains % | best constant answer % |",
        "| ---- | --------: | ------: | ---------: | ---------------------: |",
        "| g0   |         3 |    66.7 |       66.7 |                   66.7 |",
        "| g1   |         3 |    66.7 |      100.0 |                   66.7 |",
    ]


def test_controls_show_another_picture_or_none() -> None:
    items = [Item(str(index), "?", Path(f"{index}.jpg"), str(index), (f"g{index % 2}",)) for index in range(10)]
    assert show(items, "none") == [None] * 10
    others = show(items, "another")
    assert all(other != item.image for item, other in zip(items, others, strict=True))
    assert all(int(other.stem) % 2 == int(item.id) % 2 for item, other in zip(items, others, strict=True) if other)
    assert others == show(items, "another")


def test_a_row_with_two_pictures_in_its_question_is_refused(tmp_path: Path) -> None:
    said = [{"from": "human", "value": "<image_placeholder><image_placeholder>Same?"}, {"from": "gpt", "value": "No."}]
    (tmp_path / "rows.json").write_text(json.dumps([{"image": ["cat.jpg", "coffee.jpg"], "conversations": said}]))
    with pytest.raises(RowError, match="row 0: 2 pictures in the first question"):
        read_items(tmp_path / "rows.json", IMAGES, [])


def test_a_row_without_a_field_to_group_by_is_named(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="row 0: no field 'split'"):
        read_items(write(tmp_path, ["cat"]), IMAGES, ["split"])


def test_the_command_writes_answers_and_scores(tmp_path: Path) -> None:
    data = write(tmp_path, ["cat", "cup", "woman"])
    command = [sys.executable, "-m", "yivl.eval", "rows", "--model-path", str(CHECKPOINT), "--data", str(data)]
    command += ["--image-folder", str(IMAGES), "--group-by", "kind", "--max-new-tokens", "4", "--device", "cpu"]
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| kind   | questions | exact % | contains % |")
    assert done.stdout == (tmp_path / "out/scores.md").read_text(encoding="utf-8")
    report = json.loads((tmp_path / "out/scores.json").read_text(encoding="utf-8"))
    assert [(one["group"], one["number"]) for one in report["scores"]] == [(["animal"], 1), (["other"], 2)]
    lines = (tmp_path / "out/answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["q0", "q1", "q2"]
    broken = subprocess.run(
        [*command, "--batch-size", "0", "--output", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True
    )
    assert (broken.returncode, broken.stderr) == (2, "error: --batch-size is at least 1\n")
