"""MMMU and CMMMU from data set to table: prompts and images, and that no response is lost, repeated or stale."""

import argparse
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pytest
import torch
from PIL import Image
from support.golden import CHECKPOINT
from support.models import ARCHITECTURES
from support.training import ROOT

from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.constants import DEFAULT_IMAGE_TOKEN
from yivl.conversation import conv_templates
from yivl.errors import YiVLError
from yivl.eval.__main__ import main
from yivl.eval.benchmarks import cmmmu, mmmu
from yivl.eval.benchmarks.benchmark import Question
from yivl.eval.runner import answer_questions, fingerprint
from yivl.image_processing import load_image
from yivl.inference.chat import Chat
from yivl.tokenization import tokenizer_image_token

COLORS = ["red", "green", "blue", "white", "black", "orange", "purple"]


def colored(number: int) -> Image.Image:
    return Image.new("RGB", (40 + 10 * number, 60), COLORS[number % len(COLORS)])


def mmmu_row(number: int, subject: str, split: str, question: str, options: list[str], answer: str) -> dict[str, Any]:
    """A row in the schema of the hub: lists are Python literals, images are in seven columns."""
    images = {f"image_{place}": colored(number + place) if place < 4 else None for place in range(1, 8)}
    return {
        "id": f"{split}_{subject}_{number}",
        "question": question,
        "options": repr(options),
        "explanation": "",
        "img_type": "['Diagrams']",
        "answer": answer if split == "validation" else "?",
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice" if options else "open",
        "subfield": "",
    } | images


def mmmu_dataset(subject: str, split: str) -> datasets.Dataset:
    rows = [
        mmmu_row(1, subject, split, "<image 1> What is this?", ["It's $5", 'a "dog"'], "B"),
        mmmu_row(2, subject, split, "Compare <image 1> with <image 2>.", ["x", "y", "z", "none"], "A"),
        mmmu_row(3, subject, split, "Which one is a cell?", ["<image 1>", "<image 2>", "<image 3>"], "C"),
        mmmu_row(4, subject, split, "Which one fits <image 1>?", ["<image 2>", "<image 3>"], "A"),
        mmmu_row(5, subject, split, "Is it <image 1>?", ["<image 2>", "no"], "A"),
        mmmu_row(6, subject, split, "Which is it?", ["<image 1>", "neither"], "A"),
        mmmu_row(7, subject, split, "How much is it in <image 1>?", [], "12.5"),
        mmmu_row(8, subject, split, "Which city? <image 1>", [], "['Tampa', 'Florida']"),
        mmmu_row(9, subject, split, "Which interval is it? <image 1>", [], "[0, 1)"),
        mmmu_row(10, subject, split, "And which is it here? <image 1>", [], "[0, 1]"),
    ]
    features = datasets.Features(
        {name: datasets.Image() if name.startswith("image_") else datasets.Value("string") for name in rows[0]}
    )
    return datasets.Dataset.from_list(rows, features=features)


def cmmmu_dataset(category: str, start: int) -> datasets.Dataset:
    def row(number: int, kind: str, question: str, options: list[str], answer: str, names: list[str]) -> dict[str, Any]:
        files = {f"image_{place}_filename": name for place, name in enumerate(names, 1)}
        images = {f"image_{place}": colored(number + place) for place in range(1, len(names) + 1)}
        return {
            **{f"option{place}": option for place, option in enumerate(options or [None] * 4, 1)},
            **{f"image_{place}": images.get(f"image_{place}") for place in range(1, 6)},
            **{f"image_{place}_filename": files.get(f"image_{place}_filename") for place in range(1, 6)},
            "id": start + number,
            "type": kind,
            "question": question,
            "answer": answer,
            "category": category,
            "subcategory": "会计" if number < 3 else "金融",
        }

    rows = [
        row(1, "选择", '如图<img="q_1_1.png">所示，（）。', ["红", "蓝", "绿", "黄"], "AC", ["q_1_1.png"]),
        row(2, "判断", '图<img="q_2_1.png">中为无弹性。', [], "对", ["q_2_1.png"]),
        row(3, "填空", '表<img="q_3_1.png">的保本量为__', [], "26", ["q_3_1.png"]),
        row(
            4,
            "选择",
            '哪个与<img="q_4_1.png">相同？',
            [f'<img="a_4_{place}.png">' for place in range(1, 5)],
            "B",
            ["a_4_1.png", "q_4_1.png", "a_4_2.png", "a_4_3.png", "a_4_4.png"],
        ),
        row(
            5, "选择", '先看<img="q_5_1.png">', ["一", "二", '<img="a_5_1.png">', "四"], "C", ["a_5_1.png", "q_5_1.png"]
        ),
        row(6, "选择", "哪一个是图？", ["一", '<img="a_6_1.png">', "三", "四"], "B", ["a_6_1.png"]),
    ]
    features = datasets.Features(
        {
            name: datasets.Image()
            if name[:6] == "image_" and name[6:].isdigit()
            else datasets.Value("int64" if name == "id" else "string")
            for name in rows[0]
        }
    )
    return datasets.Dataset.from_list(rows, features=features)


@pytest.fixture(scope="module")
def mmmu_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("MMMU")
    for subject in ("Math", "Accounting"):
        for split in ("validation", "test"):
            (folder / subject).mkdir(exist_ok=True)
            mmmu_dataset(subject, split).to_parquet(folder / subject / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def cmmmu_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("CMMMU")
    for name, category, start in (("business", "商业", 0), ("art_and_design", "艺术与设计", 100)):
        (folder / name).mkdir()
        cmmmu_dataset(category, start).to_parquet(folder / name / "val-00000-of-00001.parquet")
    return folder


def flags(data: Path, output: Path, *more: str) -> list[str]:
    paths = ["--model-path", str(CHECKPOINT), "--data", str(data), "--output", str(output)]
    return [*paths, "--device", "cpu", "--batch-size", "3", *more]


def run(benchmark: str, data: Path, output: Path, *more: str) -> str:
    """Run the program in this process and return what it prints."""
    argv = ["yivl.eval", benchmark, *flags(data, output, *more)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(io.StringIO()) as printed:
        main()
    return printed.getvalue()


def run_ranks(benchmark: str, data: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run the script with two ranks; it prints the command first."""
    command = [f"scripts/eval_{benchmark}.sh", *flags(data, output, *more)]
    settings = os.environ | {"PYTHON": sys.executable, "GPUS": "0", "PROCESSES": "2"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    shown, done.stdout = done.stdout.split("\n", 1)
    assert "--nproc-per-node 2" in shown
    return done


def mmmu_questions(data: Path | str, protocol: str = "yi") -> list[Question]:
    flags = argparse.Namespace(benchmark="mmmu", data=str(data), split="validation", protocol=protocol)
    return mmmu.read_questions(flags)


def cmmmu_questions(data: Path) -> list[Question]:
    return cmmmu.read_questions(argparse.Namespace(benchmark="cmmmu", data=str(data), split="val"))


def test_questions_of_cmmmu_need_an_answer_except_those_of_the_test_split(tmp_path: Path) -> None:
    """Found before the model is loaded, not when the answers are scored."""
    rows = cmmmu_dataset("商业", 0)
    for split in ("val", "test"):
        without = rows.map(lambda row: {"answer": None}, features=rows.features)
        without.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    with pytest.raises(YiVLError, match=f"^{tmp_path}: question 1 has no answer$"):
        cmmmu_questions(tmp_path)
    test = cmmmu.read_questions(argparse.Namespace(benchmark="cmmmu", data=str(tmp_path), split="test"))
    assert len(test) == 6


def by_id(questions: list[Question]) -> dict[str, Question]:
    return {question.id: question for question in questions}


def test_mmmu_prompts_are_those_of_the_authors_of_yi_vl(mmmu_folder: Path) -> None:
    questions = by_id(mmmu_questions(mmmu_folder))
    assert questions["validation_Math_1"].prompt == (
        " What is this?\nA. It's $5\nB. a \"dog\"\n\nAnswer with the option's letter from the given choices directly."
    )
    assert questions["validation_Math_7"].prompt == (
        "How much is it in ?\nAnswer the question using a single word or phrase."
    )
    assert questions["validation_Math_5"].prompt.startswith("Is it ?\nA. <image 2>\nB. no\n")
    assert questions["validation_Math_1"].fields == {
        "id": "validation_Math_1",
        "question_type": "multiple-choice",
        "answer": "B",
        "all_choices": ["A", "B"],
        "index2ans": {"A": "It's $5", "B": 'a "dog"'},
    }
    answers = [questions[f"validation_Math_{number}"].fields["answer"] for number in (7, 8, 9, 10)]
    assert answers == ["12.5", ["Tampa", "Florida"], "[0, 1)", "[0, 1]"]


def test_mmmu_prompts_of_the_official_protocol_are_those_of_its_example(mmmu_folder: Path) -> None:
    questions = by_id(mmmu_questions(mmmu_folder, "official"))
    assert questions["validation_Math_1"].prompt == (
        '<image 1> What is this?\n(A) It\'s $5\n(B) a "dog"\n\n'
        "Answer with the option's letter from the given choices directly."
    )
    assert not any(question.is_blank for question in questions.values())


def test_the_first_image_is_shown_and_a_blank_one_if_options_have_several(mmmu_folder: Path) -> None:
    questions = by_id(mmmu_questions(mmmu_folder))
    blank = [id for id, question in questions.items() if question.is_blank and "_Math_" in id]
    assert blank == [f"validation_Math_{number}" for number in (3, 4, 6)]
    shown = questions["validation_Math_2"].image()
    assert isinstance(shown, bytes)
    assert load_image(shown).tobytes() == colored(3).tobytes()


def test_subjects_are_in_the_official_order(mmmu_folder: Path) -> None:
    ids = [question.id for question in mmmu_questions(mmmu_folder)]
    assert ids == [f"validation_{subject}_{number}" for subject in ("Accounting", "Math") for number in range(1, 11)]


def test_cmmmu_prompts_are_those_of_the_authors_of_yi_vl(cmmmu_folder: Path) -> None:
    questions = by_id(cmmmu_questions(cmmmu_folder))
    assert [*questions] == [str(start + number) for start in (100, 0) for number in range(1, 7)]  # art before business
    assert questions["1"].prompt == (
        "请回答以下多项选择题，并选出正确选项。这些题目可能包括单选和多选题型。如果所提供的信息不足以确定一个明确的答案，"
        "那么请根据可用的数据和你的判断来选择最可能正确的选项。\n\n"
        "问题：如图所示，（）。\n选项：\n(A) 红\n(B) 蓝\n(C) 绿\n(D) 黄\n\n正确答案：\n"
    )
    assert questions["2"].prompt.startswith("请回答以下判断题，并根据题目描述")
    assert questions["2"].prompt.endswith("做出最可能的判断。\n\n问题：图中为无弹性。\n正确答案：\n")
    assert questions["3"].prompt.startswith("请回答以下填空题，并根据题目的要求")
    assert questions["3"].prompt.endswith("来填写最合理的答案。\n\n问题：表的保本量为__\n正确答案：\n")
    assert questions["4"].is_blank
    assert not questions["5"].is_blank
    shown = questions["5"].image()  # of the question, although it is the second image
    assert isinstance(shown, bytes)
    assert load_image(shown).tobytes() == colored(7).tobytes()


def test_the_only_image_of_an_option_is_shown(cmmmu_folder: Path) -> None:
    questions = by_id(cmmmu_questions(cmmmu_folder))
    assert not questions["6"].is_blank
    assert "(B) \n" in questions["6"].prompt
    shown = questions["6"].image()
    assert isinstance(shown, bytes)
    assert load_image(shown).tobytes() == colored(7).tobytes()


def test_prompts_have_the_ids_of_the_reference(chat: Chat, cmmmu_folder: Path) -> None:
    for question in cmmmu_questions(cmmmu_folder):
        conversation = conv_templates["mm_default"].copy()
        conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{question.prompt}")
        conversation.append_message(conversation.roles[1], None)
        wanted = tokenizer_image_token(conversation.get_prompt(), chat.loaded.tokenizer)
        assert chat.begin(question.prompt, torch.zeros(3, 56, 56)).input_ids == wanted


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_responses_equal_those_of_a_chat(architecture: str, mmmu_folder: Path, tmp_path: Path) -> None:
    questions, chat = mmmu_questions(mmmu_folder), Chat(load_model(ARCHITECTURES[architecture], device="cpu"))
    size = chat.loaded.model.config.vision_config.image_size
    responses = answer_questions(lambda: chat.loaded, questions, tmp_path, {}, batch_size=5, max_new_tokens=8)
    assert [*responses] == [question.id for question in questions]
    for question in questions:
        chat.reset()
        shown = torch.zeros(3, size, size) if question.is_blank else question.image()
        assert chat.ask(question.prompt, shown, temperature=0, max_new_tokens=8).strip() == responses[question.id]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_run_writes_responses_submission_table_and_chart(
    architecture: str, mmmu_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = str(ARCHITECTURES[architecture])
    printed = run("mmmu", mmmu_folder, tmp_path / "out", "--model-path", model)
    out = tmp_path / "out"
    responses = json.loads((out / "responses.json").read_text(encoding="utf-8"))
    questions = mmmu_questions(mmmu_folder)
    assert [*responses] == [question.id for question in questions]
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    official = mmmu.score_rows([{**one.fields, "response": responses[one.id]} for one in questions])
    about = {"benchmark": "mmmu", "data": str(mmmu_folder), "split": "validation", "protocol": "yi"}
    about |= {"questions": 20, "is_whole": False}
    assert "20 of 900 questions: the published scores do not compare" in caplog.messages
    assert scores == about | {"model": model} | official
    assert printed == (out / "scores.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()]
    assert lines[0] == ["domain", "subject", "questions", "accuracy %"]
    assert [line[:3] for line in lines[2:]] == [
        ["Business", "Accounting", "10"],
        ["Business", "all", "10"],
        ["Science", "Math", "10"],
        ["Science", "all", "10"],
        ["all", "all", "20"],
    ]
    assert lines[-1][3] == f"{100 * scores['overall']:.1f}"
    assert (out / "scores.csv").read_text(encoding="utf-8").startswith("domain,subject,questions,accuracy %\nBusiness,")
    with Image.open(out / "scores.png") as chart:
        assert chart.width > 400
    submission = json.loads((out / "submission.json").read_text(encoding="utf-8"))
    assert [*submission] == [*responses]
    assert submission["validation_Math_7"] == responses["validation_Math_7"]
    assert submission["validation_Math_1"] in ("A", "B")
    # Predictions and responses have the same scores.
    again = mmmu.score_rows([{**one.fields, "response": submission[one.id]} for one in questions])
    assert again == official


def test_a_test_split_has_predictions_and_no_scores(mmmu_folder: Path, tmp_path: Path) -> None:
    printed = run("mmmu", mmmu_folder, tmp_path / "out", "--split", "test", "--protocol", "official")
    assert printed == f"{tmp_path}/out/submission.json: 20 predictions to submit; the answers are not published\n"
    assert not (tmp_path / "out/scores.json").exists()
    assert json.loads((tmp_path / "out/settings.json").read_text(encoding="utf-8"))["max_new_tokens"] == 128


@pytest.mark.slow
def test_two_ranks_write_the_same_files_as_one(cmmmu_folder: Path, tmp_path: Path) -> None:
    one, two = run("cmmmu", cmmmu_folder, tmp_path / "1"), run_ranks("cmmmu", cmmmu_folder, tmp_path / "2")
    assert two.returncode == 0, two.stderr
    assert one == two.stdout
    assert "| Art & Design | 会计    |         2 |" in one
    for name in ("responses.json", "submission.jsonl", "scores.json", "scores.csv"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "1/submission.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["id"], line["type"]) for line in lines[:3]] == [(101, "选择"), (102, "判断"), (103, "填空")]
    shares = [len((tmp_path / f"2/responses-0000{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert shares == [6, 6]


def kept(folder: Path) -> list[str]:
    files = folder.glob("responses-*.jsonl")
    lines = [line for file in files for line in file.read_text(encoding="utf-8").split("\n") if line]
    return [json.loads(line)["id"] for line in lines]


@pytest.mark.slow
def test_a_killed_run_resumes(mmmu_folder: Path, tmp_path: Path) -> None:
    whole = run("mmmu", mmmu_folder, tmp_path / "whole")
    command = [sys.executable, "-m", "yivl.eval", "mmmu"]
    command += flags(mmmu_folder, tmp_path / "out", "--batch-size", "1")
    state = tmp_path / "out/responses-00000.jsonl"
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while not state.is_file() or state.read_text(encoding="utf-8").count("\n") < 2:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    before = state.read_text(encoding="utf-8")
    assert before.count("\n") < 20
    with state.open("a", encoding="utf-8") as file:
        file.write('{"id": "validation_Acc')  # killed inside a line
    rest = run_ranks("mmmu", mmmu_folder, tmp_path / "out")
    assert rest.returncode == 0, rest.stderr
    assert state.read_text(encoding="utf-8").startswith(before)
    assert sorted(kept(tmp_path / "out")) == sorted(kept(tmp_path / "whole"))
    assert rest.stdout == whole
    again = run("mmmu", mmmu_folder, tmp_path / "out")
    assert again == whole
    assert len(kept(tmp_path / "out")) == 20  # nothing was generated again


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for name, said in (("notes", "holds other files"), ("file", "is a file")):
        with pytest.raises(YiVLError, match=f"{name}: {said}"):
            answer_questions(pytest.fail, [], tmp_path / name, {}, batch_size=1, max_new_tokens=1)


def test_a_run_that_was_killed_while_it_began_is_repeated(chat: Chat, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.settings.json.partial").write_text("{")
    answer_questions(lambda: chat.loaded, [], tmp_path / "out", {"a": 1}, batch_size=1, max_new_tokens=1)
    assert json.loads((tmp_path / "out/settings.json").read_text()) == {"a": 1}


def test_changed_questions_data_and_weights_have_other_fingerprints(tmp_path: Path) -> None:
    def prints(**changes: Any) -> dict[str, str]:
        fields = {"id": "1", "prompt": "?", "image": lambda: None, "fields": {}, "image_key": "a.jpg"} | changes
        return fingerprint([Question(**fields)], str(tmp_path / "data"), [str(tmp_path / "model"), None, "some/hub-id"])

    (tmp_path / "data").mkdir()
    (tmp_path / "model/vit/clip").mkdir(parents=True)
    for name in ("model/model.safetensors", "model/vit/clip/model.safetensors", "data/val-0.parquet"):
        (tmp_path / name).write_bytes(b"first")
    before = prints()
    assert prints() == before
    for changes in ({"prompt": "!"}, {"image_key": "b.jpg"}, {"is_blank": True}, {"id": "2"}):
        assert prints(**changes)["questions"] != before["questions"]
    for name in ("README.md", "log.jsonl", "mmmu/scores.json", "checkpoint-5/model.safetensors"):
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_bytes(b"loading does not read this")
    assert prints() == before
    for name, key in (("data/val-0.parquet", "data_files"), ("model/vit/clip/model.safetensors", "model_files")):
        now = prints()
        (tmp_path / name).write_bytes(b"other contents")
        assert {changed for changed in now if prints()[changed] != now[changed]} == {key}


def test_a_run_that_failed_before_its_first_response_may_start_with_other_settings(chat: Chat, tmp_path: Path) -> None:
    asked = [Question("1", "?", lambda: None, {})]

    def fail() -> LoadedModel:
        raise YiVLError("no such model")

    with pytest.raises(YiVLError, match="no such model"):
        answer_questions(fail, asked, tmp_path, {"model_path": "typo"}, batch_size=1, max_new_tokens=2)
    answer_questions(lambda: chat.loaded, asked, tmp_path, {"model_path": "m"}, batch_size=1, max_new_tokens=2)
    with pytest.raises(YiVLError, match="holds responses with model_path='m', now 'n'"):
        answer_questions(lambda: chat.loaded, asked, tmp_path, {"model_path": "n"}, batch_size=1, max_new_tokens=2)


def test_responses_with_line_separators_are_kept_and_an_incomplete_one_is_generated_again(
    chat: Chat, tmp_path: Path
) -> None:
    asked = [Question(str(number), "?", lambda: None, {}) for number in range(3)]
    whole = json.dumps({"id": "0", "response": "a\u2028b\x85猫"}, ensure_ascii=False) + "\n"
    cut = json.dumps({"id": "1", "response": "猫"}, ensure_ascii=False).encode()[:-4]  # inside the character
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "responses-00000.jsonl").write_bytes(whole.encode() + cut)
    answers = answer_questions(lambda: chat.loaded, asked, tmp_path, {}, batch_size=1, max_new_tokens=2)
    assert answers["0"] == "a\u2028b\x85猫"
    assert sorted(kept(tmp_path)) == ["0", "1", "2"]


def test_a_question_that_is_too_long_is_an_error_before_the_others_are_asked(chat: Chat, tmp_path: Path) -> None:
    asked = [Question("short", "?", lambda: None, {}), Question("long", "word " * 5000, lambda: None, {})]
    with pytest.raises(YiVLError, match=r"question long: the conversation takes \d+ positions"):
        answer_questions(lambda: chat.loaded, asked, tmp_path, {}, batch_size=1, max_new_tokens=2)
    assert kept(tmp_path) == []


@pytest.mark.parametrize("error", [pytest.param("another protocol", marks=pytest.mark.slow), "no such split"])
def test_an_error_on_two_ranks_is_one_line(error: str, mmmu_folder: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", mmmu_folder
    if error == "another protocol":
        run("mmmu", data, out)
        said = f"error: {out}: holds responses with protocol='yi', now 'official'; set another --output"
    else:
        data = tmp_path
        said = (
            f"error: {tmp_path}: no split 'validation'; expected validation-*.parquet files or folders of save_to_disk"
        )
    done = run_ranks("mmmu", data, out, "--protocol", "official")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("error: ") == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


ONE_RANK_FAILS = """
import sys, time
from pathlib import Path
from yivl import command_line
from yivl.errors import YiVLError
from yivl.eval import runner
from yivl.eval.benchmarks.benchmark import Question

def main():
    command_line.log_to_stderr()
    questions = [Question(str(number), "?", lambda: None, {}) for number in range(2000)]
    with runner.join_ranks() as ranks:
        assert ranks.gather(ranks.rank) == [0, 1]

        def begin(loaded, question, max_new_tokens):
            if ranks.rank == 1 and int(question.id) > 10:
                raise YiVLError(f"question {question.id}: damaged")

        def finish(loaded, states):
            time.sleep(0.1)  # all questions of rank 0 would take 100 seconds
            return [""]

        runner._begin, runner.finish_together = begin, finish
        start = time.monotonic()
        try:
            folder = Path(sys.argv[1], "out")
            runner.answer_questions(object, questions, folder, {}, batch_size=1, max_new_tokens=1, ranks=ranks)
        finally:
            Path(sys.argv[1], str(ranks.rank)).write_text(str(time.monotonic() - start))

command_line.run(main)
"""


def test_an_error_of_one_rank_ends_all_ranks_at_once_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(ONE_RANK_FAILS, encoding="utf-8")
    command = [sys.executable, "-m", "yivl.train.launch", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "program.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert [line for line in done.stderr.splitlines() if "damaged" in line] == ["error: question 11: damaged"]
    assert "Traceback" not in done.stderr
    assert all(float((tmp_path / rank).read_text()) < 50 for rank in "01")
    assert kept(tmp_path / "out").count("0") == 1  # earlier responses are kept


@pytest.fixture(params=["one DatasetDict", "a DatasetDict for each subject", "merged parquet files"])
def other_form(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The validation split in each other form that is read, one subject after the other."""
    parts = {subject: mmmu_dataset(subject, "validation") for subject in ("Accounting", "Math")}
    if request.param == "one DatasetDict":
        both = datasets.concatenate_datasets([*parts.values()])
        datasets.DatasetDict(validation=both, test=both).save_to_disk(tmp_path)
    elif request.param == "merged parquet files":
        for number, part in enumerate(parts.values()):
            (tmp_path / "data").mkdir(exist_ok=True)
            part.to_parquet(tmp_path / f"data/validation-0000{number}-of-00002.parquet")
    else:
        for subject, part in parts.items():
            datasets.DatasetDict(validation=part).save_to_disk(tmp_path / subject)
    return tmp_path


def test_every_form_of_the_data_set_has_the_same_questions(other_form: Path, mmmu_folder: Path) -> None:
    ours = mmmu_questions(other_form)
    theirs = mmmu_questions(mmmu_folder)
    assert [(one.id, one.prompt, one.fields) for one in ours] == [(one.id, one.prompt, one.fields) for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        first, second = one.image(), other.image()
        assert isinstance(first, bytes)
        assert isinstance(second, bytes)
        assert load_image(first).tobytes() == load_image(second).tobytes()


def broken(folder: Path, what: str) -> str:
    """A data set with one defect."""
    rows = mmmu_dataset("Math", "validation")
    if what == "code in options":
        code = f"[__import__('pathlib').Path({str(folder / 'ran')!r}).touch()]"
        rows = rows.map(lambda row: {"options": code})
    elif what == "no question type":
        rows = rows.remove_columns("question_type")
    elif what == "no subject":
        rows = rows.map(lambda row: {"id": row["id"].replace("Math", "Astronomy")})
    elif what == "no options":
        rows = rows.map(lambda row: {"options": "[]"})
    elif what == "a number as id":
        rows = rows.remove_columns("id").add_column("id", list(range(len(rows))))
    elif what == "no literal":
        rows = rows.map(lambda row: {"options": "[{[]: 1}]"})
    elif what == "no rows":
        rows = rows.select([])
    elif what == "same ids":
        rows = datasets.concatenate_datasets([rows, rows])
    name = "test" if what == "no such split" else "validation"
    rows.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    if what == "damaged file":
        (folder / "validation-00000-of-00001.parquet").write_bytes(b"PAR1 and nothing else")
    return "no-one/no-such-data-set" if what == "no such data set" else str(folder)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("code in options", "row 0: not a row of MMMU"),
        ("no question type", "row 0: not a row of MMMU"),
        ("no subject", "row 0: not a row of MMMU .*'validation_Astronomy_1' names no subject"),
        ("no options", "row 0: not a row of MMMU .*a multiple-choice question without options"),
        ("a number as id", "row 0: not a row of MMMU .*id, question and answer are not text"),
        ("no literal", "row 0: not a row of MMMU .*TypeError"),
        ("no rows", "split 'validation' cannot be read .*no data"),
        ("no such split", "no split 'validation'"),
        ("damaged file", "split 'validation' cannot be read"),
        ("no such data set", "no-one/no-such-data-set: no such folder, and no data set"),
        ("same ids", "two questions have the same id"),
    ],
)
def test_an_invalid_data_set_is_one_error_line(what: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(YiVLError, match=said):
        answer_questions(
            lambda: pytest.fail("loaded"),
            mmmu_questions(broken(tmp_path, what)),
            tmp_path / "out",
            {},
            batch_size=1,
            max_new_tokens=1,
        )
    assert not (tmp_path / "ran").exists()


def test_a_damaged_image_is_reported_with_its_question_and_earlier_responses_are_kept(
    chat: Chat, tmp_path: Path
) -> None:
    asked = [Question("first", "????", lambda: None, {}), Question("second", "?", lambda: b"not an image", {})]
    with pytest.raises(YiVLError, match="question second: image bytes: not a"):
        answer_questions(lambda: chat.loaded, asked, tmp_path, {}, batch_size=1, max_new_tokens=2)
    assert kept(tmp_path) == ["first"]
