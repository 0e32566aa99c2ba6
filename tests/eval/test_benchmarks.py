"""MMMU and CMMMU from data set to table: what is asked and shown, and that no answer is lost, asked twice or stale."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from support.golden import CHECKPOINT
from support.training import ROOT

from yivl.checkpoint.loading import LoadedModel
from yivl.constants import DEFAULT_IMAGE_TOKEN
from yivl.conversation import conv_templates
from yivl.errors import YiVLError
from yivl.eval.benchmarks import cmmmu, mmmu
from yivl.eval.benchmarks.questions import Question
from yivl.eval.runner import answer_questions, fingerprint
from yivl.image_processing import load_image
from yivl.inference.chat import Chat
from yivl.tokenization import tokenizer_image_token

COLOURS = ["red", "green", "blue", "white", "black", "orange", "purple"]


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (40 + 10 * number, 60), COLOURS[number % len(COLOURS)])


def mmmu_row(number: int, subject: str, split: str, question: str, options: list[str], answer: str) -> dict[str, Any]:
    """A row in the schema of the hub: lists are Python lists in writing, pictures sit in seven columns."""
    images = {f"image_{place}": picture(number + place) if place < 4 else None for place in range(1, 8)}
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
        images = {f"image_{place}": picture(number + place) for place in range(1, len(names) + 1)}
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


def run(benchmark: str, data: Path, output: Path, *flags: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run the module, or for several processes the script, whose first line is the command."""
    command = [sys.executable, "-m", "yivl.eval", benchmark] if processes == 1 else [f"scripts/eval_{benchmark}.sh"]
    command += ["--model-path", str(CHECKPOINT), "--data", str(data), "--output", str(output)]
    command += ["--device", "cpu", "--batch-size", "3", *flags]
    settings = os.environ | {"PYTHON": sys.executable, "GPUS": "0", "PROCESSES": str(processes)}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    if processes > 1:
        shown, done.stdout = done.stdout.split("\n", 1)
        assert f"--nproc-per-node {processes}" in shown
    return done


def by_id(questions: list[Question]) -> dict[str, Question]:
    return {question.id: question for question in questions}


def test_mmmu_is_asked_as_the_authors_of_yi_vl_did(mmmu_folder: Path) -> None:
    questions = by_id(mmmu.read_questions(str(mmmu_folder), "validation", "yi"))
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


def test_mmmu_is_asked_as_its_own_example_does(mmmu_folder: Path) -> None:
    questions = by_id(mmmu.read_questions(str(mmmu_folder), "validation", "official"))
    assert questions["validation_Math_1"].prompt == (
        '<image 1> What is this?\n(A) It\'s $5\n(B) a "dog"\n\n'
        "Answer with the option's letter from the given choices directly."
    )
    assert not any(question.is_blank for question in questions.values())


def test_the_first_picture_is_shown_and_none_where_options_have_several(mmmu_folder: Path) -> None:
    questions = by_id(mmmu.read_questions(str(mmmu_folder), "validation", "yi"))
    blank = [id for id, question in questions.items() if question.is_blank and "_Math_" in id]
    assert blank == [f"validation_Math_{number}" for number in (3, 4, 6)]
    shown = questions["validation_Math_2"].picture()
    assert isinstance(shown, bytes)
    assert load_image(shown).tobytes() == picture(3).tobytes()


def test_subjects_come_in_the_official_order(mmmu_folder: Path) -> None:
    ids = [question.id for question in mmmu.read_questions(str(mmmu_folder), "validation", "yi")]
    assert ids == [f"validation_{subject}_{number}" for subject in ("Accounting", "Math") for number in range(1, 11)]


def test_cmmmu_is_asked_as_the_authors_of_yi_vl_did(cmmmu_folder: Path) -> None:
    questions = by_id(cmmmu.read_questions(str(cmmmu_folder), "val"))
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
    shown = questions["5"].picture()  # that of the question, although it comes second
    assert isinstance(shown, bytes)
    assert load_image(shown).tobytes() == picture(7).tobytes()


def test_the_only_picture_of_an_option_is_shown(cmmmu_folder: Path) -> None:
    questions = by_id(cmmmu.read_questions(str(cmmmu_folder), "val"))
    assert not questions["6"].is_blank
    assert "(B) \n" in questions["6"].prompt
    shown = questions["6"].picture()
    assert isinstance(shown, bytes)
    assert load_image(shown).tobytes() == picture(7).tobytes()


def test_a_prompt_becomes_the_ids_of_the_reference(chat: Chat, cmmmu_folder: Path) -> None:
    for question in cmmmu.read_questions(str(cmmmu_folder), "val"):
        conversation = conv_templates["mm_default"].copy()
        conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{question.prompt}")
        conversation.append_message(conversation.roles[1], None)
        wanted = tokenizer_image_token(conversation.get_prompt(), chat.loaded.tokenizer)
        assert chat.begin(question.prompt, torch.zeros(3, 56, 56)).input_ids == wanted


def test_answers_are_those_of_a_chat(chat: Chat, mmmu_folder: Path, tmp_path: Path) -> None:
    questions = mmmu.read_questions(str(mmmu_folder), "validation", "yi")
    responses = answer_questions(lambda: chat.loaded, questions, tmp_path, {}, batch_size=5, max_new_tokens=8)
    assert responses is not None
    assert [*responses] == [question.id for question in questions]
    for question in questions:
        chat.reset()
        shown = torch.zeros(3, 56, 56) if question.is_blank else question.picture()
        assert chat.ask(question.prompt, shown, temperature=0, max_new_tokens=8).strip() == responses[question.id]


def test_a_run_writes_responses_submission_table_and_chart(mmmu_folder: Path, tmp_path: Path) -> None:
    done = run("mmmu", mmmu_folder, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    responses = json.loads((out / "responses.json").read_text(encoding="utf-8"))
    questions = mmmu.read_questions(str(mmmu_folder), "validation", "yi")
    assert [*responses] == [question.id for question in questions]
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    official = mmmu.score_rows([{**one.fields, "response": responses[one.id]} for one in questions])
    about = {"benchmark": "mmmu", "data": str(mmmu_folder), "split": "validation", "protocol": "yi"}
    about |= {"questions": 20, "is_whole": False}
    assert "20 of 900 questions are not the whole split, and no figure to compare\n" in done.stderr
    assert scores == about | {"model": str(CHECKPOINT)} | official
    assert done.stdout == (out / "scores.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()]
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
    # The predictions of a run score as its responses do.
    again = mmmu.score_rows([{**one.fields, "response": submission[one.id]} for one in questions])
    assert again == official


def test_a_test_split_gives_predictions_and_no_scores(mmmu_folder: Path, tmp_path: Path) -> None:
    done = run("mmmu", mmmu_folder, tmp_path / "out", "--split", "test", "--protocol", "official")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path}/out/submission.json: 20 predictions to submit; the answers are not published\n"
    assert not (tmp_path / "out/scores.json").exists()
    assert json.loads((tmp_path / "out/settings.json").read_text(encoding="utf-8"))["max_new_tokens"] == 128


def test_cmmmu_runs_shared_by_two_processes_as_by_one(cmmmu_folder: Path, tmp_path: Path) -> None:
    one, two = run("cmmmu", cmmmu_folder, tmp_path / "1"), run("cmmmu", cmmmu_folder, tmp_path / "2", processes=2)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert one.stdout == two.stdout
    assert "| Art & Design | 会计    |         2 |" in one.stdout
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


def test_a_killed_run_goes_on(mmmu_folder: Path, tmp_path: Path) -> None:
    whole = run("mmmu", mmmu_folder, tmp_path / "whole")
    command = [sys.executable, "-m", "yivl.eval", "mmmu", "--model-path", str(CHECKPOINT), "--data", str(mmmu_folder)]
    command += ["--output", str(tmp_path / "out"), "--device", "cpu", "--batch-size", "1"]
    state = tmp_path / "out/responses-00000.jsonl"
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while not state.is_file() or state.read_text(encoding="utf-8").count("\n") < 2:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    before = state.read_text(encoding="utf-8")
    assert before.count("\n") < 20
    with state.open("a", encoding="utf-8") as file:
        file.write('{"id": "validation_Acc')  # a kill in the middle of a line
    rest = run("mmmu", mmmu_folder, tmp_path / "out", processes=2)
    assert rest.returncode == 0, rest.stderr
    assert state.read_text(encoding="utf-8").startswith(before)
    assert sorted(kept(tmp_path / "out")) == sorted(kept(tmp_path / "whole"))
    assert rest.stdout == whole.stdout
    again = run("mmmu", mmmu_folder, tmp_path / "out")
    assert again.stdout == whole.stdout
    assert len(kept(tmp_path / "out")) == 20  # nothing was asked again


def test_other_peoples_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for name, said in (("notes", "holds something else"), ("file", "is a file")):
        with pytest.raises(YiVLError, match=f"{name}: {said}"):
            answer_questions(pytest.fail, [], tmp_path / name, {}, batch_size=1, max_new_tokens=1)


def test_what_changed_in_its_place_is_told_apart(tmp_path: Path) -> None:
    def told(**changes: Any) -> dict[str, str]:
        fields = {"id": "1", "prompt": "?", "picture": lambda: None, "fields": {}, "picture_key": "a.jpg"} | changes
        return fingerprint([Question(**fields)], str(tmp_path / "data"), [str(tmp_path / "model"), None, "some/hub-id"])

    (tmp_path / "data").mkdir()
    (tmp_path / "model/vit/clip").mkdir(parents=True)
    for name in ("model/model.safetensors", "model/vit/clip/model.safetensors", "data/val-0.parquet"):
        (tmp_path / name).write_bytes(b"first")
    before = told()
    assert told() == before
    for changes in ({"prompt": "!"}, {"picture_key": "b.jpg"}, {"is_blank": True}, {"id": "2"}):
        assert told(**changes)["questions"] != before["questions"]
    for name in ("README.md", "log.jsonl", "mmmu/scores.json", "checkpoint-5/model.safetensors"):
        (tmp_path / "model" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_bytes(b"is not read when the model is loaded")
    assert told() == before
    for name, key in (("data/val-0.parquet", "data_files"), ("model/vit/clip/model.safetensors", "model_files")):
        now = told()
        (tmp_path / name).write_bytes(b"other contents")
        assert {changed for changed in now if told()[changed] != now[changed]} == {key}


def test_a_run_that_failed_before_its_first_answer_binds_nobody(chat: Chat, tmp_path: Path) -> None:
    asked = [Question("1", "?", lambda: None, {})]

    def fail() -> LoadedModel:
        raise YiVLError("no such model")

    with pytest.raises(YiVLError, match="no such model"):
        answer_questions(fail, asked, tmp_path, {"model_path": "typo"}, batch_size=1, max_new_tokens=2)
    again = answer_questions(lambda: chat.loaded, asked, tmp_path, {"model_path": "m"}, batch_size=1, max_new_tokens=2)
    assert again is not None
    with pytest.raises(YiVLError, match="holds answers with model_path='m', now 'n'"):
        answer_questions(lambda: chat.loaded, asked, tmp_path, {"model_path": "n"}, batch_size=1, max_new_tokens=2)


def test_answers_with_odd_characters_are_kept_and_a_cut_one_is_asked_again(chat: Chat, tmp_path: Path) -> None:
    asked = [Question(str(number), "?", lambda: None, {}) for number in range(3)]
    whole = json.dumps({"id": "0", "response": "a\u2028b\x85猫"}, ensure_ascii=False) + "\n"
    cut = json.dumps({"id": "1", "response": "猫"}, ensure_ascii=False).encode()[:-4]  # in the middle of the character
    (tmp_path / "settings.json").write_text("{}")
    (tmp_path / "responses-00000.jsonl").write_bytes(whole.encode() + cut)
    answers = answer_questions(lambda: chat.loaded, asked, tmp_path, {}, batch_size=1, max_new_tokens=2)
    assert answers is not None
    assert answers["0"] == "a\u2028b\x85猫"
    assert sorted(kept(tmp_path)) == ["0", "1", "2"]


def test_a_question_that_is_too_long_is_named_before_the_others_are_asked(chat: Chat, tmp_path: Path) -> None:
    asked = [Question("short", "?", lambda: None, {}), Question("long", "word " * 5000, lambda: None, {})]
    with pytest.raises(YiVLError, match=r"question long: the conversation takes \d+ positions"):
        answer_questions(lambda: chat.loaded, asked, tmp_path, {}, batch_size=1, max_new_tokens=2)
    assert kept(tmp_path) == []


@pytest.mark.parametrize("mistake", ["another protocol", "no such split"])
def test_a_mistake_is_one_line_of_several_processes_too(mistake: str, mmmu_folder: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", mmmu_folder
    if mistake == "another protocol":
        assert run("mmmu", data, out).returncode == 0
        said = f"error: {out}: holds answers with protocol='yi', now 'official'; give another --output"
    else:
        data = tmp_path
        said = (
            f"error: {tmp_path}: no split 'validation'; expected validation-*.parquet files or folders of save_to_disk"
        )
    done = run("mmmu", data, out, "--protocol", "official", processes=2)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("error: ") == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


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


def test_every_form_of_the_data_set_gives_the_same_questions(other_form: Path, mmmu_folder: Path) -> None:
    ours = mmmu.read_questions(str(other_form), "validation", "yi")
    theirs = mmmu.read_questions(str(mmmu_folder), "validation", "yi")
    assert [(one.id, one.prompt, one.fields) for one in ours] == [(one.id, one.prompt, one.fields) for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        first, second = one.picture(), other.picture()
        assert isinstance(first, bytes)
        assert isinstance(second, bytes)
        assert load_image(first).tobytes() == load_image(second).tobytes()


def broken(folder: Path, what: str) -> str:
    """A data set with one mistake."""
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
    elif what == "no rows":
        rows = rows.select([])
    elif what == "same ids":
        rows = datasets.concatenate_datasets([rows, rows])
    name = "test" if what == "no such split" else "validation"
    rows.to_parquet(folder / f"{name}-00000-of-00001.parquet")
    if what == "damaged file":
        (folder / "validation-00000-of-00001.parquet").write_bytes(b"PAR1 and nothing else")
    return "nobody/no-such-data-set" if what == "no such data set" else str(folder)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("code in options", "row 0: not a row of MMMU"),
        ("no question type", "row 0: not a row of MMMU"),
        ("no subject", "row 0: not a row of MMMU .*'validation_Astronomy_1' names no subject"),
        ("no options", "row 0: not a row of MMMU .*a choice without options"),
        ("no rows", "split 'validation' cannot be read .*no data"),
        ("no such split", "no split 'validation'"),
        ("damaged file", "split 'validation' cannot be read"),
        ("no such data set", "nobody/no-such-data-set: no such folder, and no data set"),
        ("same ids", "two questions have one id"),
    ],
)
def test_a_bad_data_set_is_one_clear_line(what: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(YiVLError, match=said):
        answer_questions(
            lambda: pytest.fail("loaded"),
            mmmu.read_questions(broken(tmp_path, what), "validation", "yi"),
            tmp_path / "out",
            {},
            batch_size=1,
            max_new_tokens=1,
        )
    assert not (tmp_path / "ran").exists()


def test_a_damaged_picture_is_named_by_its_question_and_what_came_before_is_kept(chat: Chat, tmp_path: Path) -> None:
    asked = [Question("first", "????", lambda: None, {}), Question("second", "?", lambda: b"not a picture", {})]
    with pytest.raises(YiVLError, match="question second: image bytes: not a picture"):
        answer_questions(lambda: chat.loaded, asked, tmp_path, {}, batch_size=1, max_new_tokens=2)
    assert kept(tmp_path) == ["first"]
