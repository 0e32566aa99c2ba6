"""Meta files of InternVL as mixtures, and the rows that they name against what the original trains on."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from support.golden import ROOT
from support.golden_internvl import CHECKPOINT, GOLDEN, golden_json
from support.training import conversation, write_rows

from yivl.data.rows import Row, RowError, parse_row, read_rows
from yivl.data.sources import DataSource, load_rows, read_sources

BEGIN, END, IMAGE_BEGIN, IMAGE_END, CONTEXT = 6, 7, 640, 641, 642
"""``<|im_start|>``, ``<|im_end|>``, ``<img>``, ``</img>``, ``<IMG_CONTEXT>`` in the golden checkpoint."""


def write_meta(folder: Path, **fields: Any) -> str:
    """Write a meta file with one set of ten rows beside it, and return its path."""
    folder.mkdir(exist_ok=True)
    rows = [conversation(None, f"q{index}", f"a{index}") for index in range(10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fields = {"root": "images", "annotation": str(folder / "rows.jsonl"), "data_augment": False} | fields
    path = folder / "meta.json"
    path.write_text(json.dumps({"numbers": fields}))
    return str(path)


def questions(source: DataSource) -> list[str]:
    return [row.turns[0].question for row in load_rows(source, 0, pytest.fail)]


def test_the_golden_meta_file_is_one_source(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.chdir(GOLDEN)
    (source,) = read_sources("training/meta.json", "ignored")
    assert (source.name, source.weight, source.first_part) == ("golden", 1, 1)
    assert source.files() == [("training/data.jsonl", "images/")]
    errors: list[RowError] = []
    rows = load_rows(source, 0, errors.append)
    assert len(rows) + len(errors) == 30
    assert rows[0].images == (Path("images/photo_rgb.jpg"),)
    assert not [record for record in caplog.records if "length" in record.message]


def test_paths_start_at_the_working_directory_or_else_at_the_meta_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    meta = write_meta(there, annotation="rows.jsonl")
    here.mkdir()
    monkeypatch.chdir(here)
    (source,) = read_sources(meta)
    assert source.files() == [(str(there / "rows.jsonl"), str(there / "images"))]
    meta = write_meta(there, annotation="row?.jsonl")
    (source,) = read_sources(meta)
    assert source.files() == [(str(there / "rows.jsonl"), str(there / "images"))]
    write_meta(here)
    (source,) = read_sources(meta)
    assert source.files() == [("rows.jsonl", "images")]


@pytest.mark.parametrize(("repeat_time", "used"), [(0.25, 2), (0.99, 9), (1, 10), (2, 10), (3.0, 10)])
def test_a_fraction_keeps_the_first_rows_and_an_integer_repeats_all(
    repeat_time: float, used: int, tmp_path: Path
) -> None:
    (source,) = read_sources(write_meta(tmp_path, repeat_time=repeat_time))
    assert questions(source) == [f"q{index}" for index in range(used)]
    assert source.samples_per_epoch(used) == used * max(int(repeat_time), 1)


def test_an_empty_root_is_for_absolute_paths_and_for_text(tmp_path: Path) -> None:
    meta = write_meta(tmp_path, root="")
    (source,) = read_sources(meta, "ignored")
    assert source.files() == [(str(tmp_path / "rows.jsonl"), "")]
    assert len(questions(source)) == 10
    image = str(GOLDEN / "images/photo_rgb.jpg")
    (tmp_path / "rows.jsonl").write_text(json.dumps(conversation(image, "q", "a")))
    (row,) = load_rows(source, 0, pytest.fail)
    assert row.images == (Path(image),)


def test_a_limit_draws_from_the_first_part(tmp_path: Path) -> None:
    (source,) = read_sources(write_meta(tmp_path, repeat_time=0.6), max_rows=3)
    assert len(questions(source)) == 3
    assert set(questions(source)) <= {f"q{index}" for index in range(6)}


def test_a_wrong_length_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (source,) = read_sources(write_meta(tmp_path, length=1234))
    assert len(questions(source)) == 10
    assert [record.message for record in caplog.records] == [
        "numbers: its meta file states a length of 1,234, and it has 10 rows"
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"repeat_time": 1.5}, "'repeat_time' 1.5 is not an integer; above 1 it repeats the whole set"),
        ({"repeat_time": 0}, "'repeat_time' 0 is not a positive number; to leave the set out, remove it"),
        ({"repeat_time": "2"}, "'repeat_time' '2' is not a positive number"),
        ({"repeat_time": True}, "'repeat_time' True is not a positive number"),
        ({"repeat_time": float("inf")}, "'repeat_time' inf is not a positive number"),
        ({"data_augment": True}, r"'data_augment' \(random JPEG compression\) is not supported; set it to false"),
        ({"annotation": ""}, "'annotation' is not a path"),
        ({"annotation": "s3://bucket/rows.jsonl"}, "'annotation' s3://bucket/rows.jsonl is a URL; download it"),
        ({"annotation": "a.tar"}, r"'annotation' is a tar shard; list tar shards in a \.yaml mixture"),
        ({"root": None}, "'root' is not a path"),
        ({"length": "10"}, "'length' '10' is not an integer"),
        ({"max_dynamic_patch": 12}, "unknown key 'max_dynamic_patch'; expected one of root, annotation, data_augment"),
    ],
)
def test_an_invalid_set_is_one_line_with_its_name(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RowError, match=rf"meta\.json set 'numbers': {message}"):
        read_sources(write_meta(tmp_path, **fields))


def test_a_part_without_rows_is_an_error(tmp_path: Path) -> None:
    (source,) = read_sources(write_meta(tmp_path, repeat_time=0.05))
    with pytest.raises(RowError, match=r"numbers: a repeat_time of 0\.05 keeps none of 10 rows; raise it"):
        questions(source)


def test_other_json_files_are_rows(tmp_path: Path) -> None:
    rows = str(write_rows(tmp_path / "rows.json"))
    assert read_sources(rows) == [DataSource(rows)]
    (tmp_path / "object.json").write_text('{"rows": {"columns": {}}}')
    with pytest.raises(RowError, match=r"object\.json: expected a JSON list of rows"):
        load_rows(read_sources(str(tmp_path / "object.json"))[0], 0, print)
    other = write_meta(tmp_path)
    (tmp_path / "meta.json").write_text(Path(other).read_text()[:-1] + ', "more": 3}')
    with pytest.raises(RowError, match="set 'more': expected an object with the keys root, annotation"):
        read_sources(other)


# Rows.

DIFFERENT = {
    "image_tag_in_second_turn": "the tag places the image; the original adds another and keeps the tag as text",
    "literal_im_end_in_answer": "typed control tokens stay text",
    "literal_role_in_answer": "typed control tokens stay text",
    "literal_unk": "typed control tokens stay text",
    "literal_context_token_in_text": "typed control tokens stay text",
    "empty_question_text": "closed turns",
    "empty_answer": "closed turns",
    "empty_answer_then_turn": "closed turns",
}
REFUSED = {
    "ends_with_human": "the last question has no answer",
    "text_with_literal_tag": "1 image placeholders but 0 images",
    "two_human_turns": "role 'user' out of order",
    "fewer_tags_than_images": "1 image placeholders but 2 images",
}
READ_ALTHOUGH_THE_ORIGINAL_CANNOT = {"system_role", "literal_img_end", "missing_image_file"}
"""The last is an error when its image is read."""


def expected_texts(input_ids: Sequence[int]) -> list[list[str]]:
    """Return the texts of all messages after the system message, with an image slot between neighbors, from ids."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(CHECKPOINT / "tokenizer.model"))
    messages: list[list[list[int]]] = []
    inside = False
    for token in input_ids:
        if token == BEGIN:
            messages.append([[]])
        elif token in (IMAGE_BEGIN, IMAGE_END):
            inside = token == IMAGE_BEGIN
            messages[-1] += [[]] if inside else []
        elif token != END and not inside:
            messages[-1][-1].append(token)
    texts = [[tokenizer.decode(piece) for piece in message] for message in messages[1:]]
    for message in texts:
        message[0] = message[0].partition("\n")[2]  # the role
    return texts


def golden_row(name: str) -> Row:
    found = {fields["id"]: (origin, fields) for origin, fields in read_rows(GOLDEN / "training/data.jsonl")}
    origin, fields = found[name]
    return parse_row(fields, origin, "images")


RECORDS = {record["id"]: record for record in golden_json("train_preprocess")["max_length_2048"]}


@pytest.mark.parametrize("name", [name for name in RECORDS if "error" not in RECORDS[name] and name not in REFUSED])
def test_turns_and_images_are_those_of_the_original(name: str) -> None:
    record, row = RECORDS[name], golden_row(name)
    images = [] if record["image_flags"] == [0] else [key.removesuffix("__squash") for key in record["pixel_keys"]]
    assert [Path(str(image)).stem for image in row.images] == images
    texts = [
        part for turn, question in zip(row.turns, row.questions, strict=True) for part in (question, [turn.answer])
    ]
    if name not in DIFFERENT:
        assert [list(text) for text in texts] == expected_texts(record["input_ids"])
        assert [f"{turn.answer}<|im_end|>" for turn in row.turns] == [span["text"] for span in record["supervised"]]
    elif name == "image_tag_in_second_turn":
        assert expected_texts(record["input_ids"])[0::2] == [["", "\nHello."], ["<image>\nAnd here?"]]
        assert texts[0::2] == [("Hello.",), ("", "\nAnd here?")]
    elif name == "literal_context_token_in_text":
        assert CONTEXT in record["input_ids"]  # an image slot without an image: the step crashes
    else:
        assert record["all_labels_masked"]  # the original trains nothing of it


@pytest.mark.parametrize("name", [name for name in RECORDS if "error" in RECORDS[name]] + list(REFUSED))
def test_what_the_original_replaces_by_a_random_record_is_read_or_refused_by_name(name: str) -> None:
    if name in REFUSED:
        with pytest.raises(RowError, match=rf"data\.jsonl line \d+: {REFUSED[name]}"):
            golden_row(name)
    else:
        assert name in READ_ALTHOUGH_THE_ORIGINAL_CANNOT
        assert golden_row(name).turns


def test_check_and_show_read_the_golden_data(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "yivl.data.check", "training/meta.json", "--workers", "0"]
    environment = {"PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=GOLDEN, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    assert "golden: 25 valid rows (15 with images, 0 captions, 10 text only), 5 invalid" in result.stdout
    assert "training/data.jsonl line 26: images/not_there.jpg: " in result.stdout
    assert "training/data.jsonl line 20: role 'user' out of order" in result.stdout
    command = [sys.executable, "-m", "yivl.data.show", "training/data.jsonl", "0"]
    result = subprocess.run(command, cwd=GOLDEN, env=environment, capture_output=True, text=True, check=True)
    assert "The image shows a small boat" in result.stdout
