"""Rows to LLaMA-Factory's datasets and back: the same training examples, and one error line for unsupported rows."""

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden import GOLDEN

from yivl.checkpoint.loading import LoadedModel
from yivl.constants import DEFAULT_IMAGE_TOKEN, SYSTEM_PROMPT
from yivl.conversation import YI_VL
from yivl.data.encoding import Encoder
from yivl.data.rows import Row, RowError, parse_row, read_rows
from yivl.export.llamafactory import from_llamafactory, to_llamafactory

IMAGES = GOLDEN / "images"

# What the demo of LLaMA-Factory with images declares.
OPENAI = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages", "images": "images"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
}
SHAREGPT = {"formatting": "sharegpt", "columns": {"messages": "conversations", "images": "images", "tools": "tools"}}


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def declare(folder: Path, declared: dict[str, Any], rows: list[Any], file_name: str = "rows.json") -> Path:
    """Write a dataset as LLaMA-Factory keeps it; return its ``dataset_info.json``."""
    lines = "\n".join(json.dumps(row) for row in rows)
    (folder / file_name).write_text(lines if file_name.endswith("l") else json.dumps(rows), encoding="utf-8")
    return write(folder / "dataset_info.json", {"mine": {"file_name": file_name} | declared})


def parsed(path: Path) -> list[Row]:
    return [parse_row(fields, "row", IMAGES) for _, fields in read_rows(path)]


def there_and_back(rows: list[Any], folder: Path) -> tuple[list[Any], list[Any]]:
    """Return the rows in the form of LLaMA-Factory, and what they are after the way back."""
    to_llamafactory(write(folder / "source.json", rows), folder / "data", name="mine")
    from_llamafactory(folder / "data/dataset_info.json", "mine", folder / "back.json")
    return read(folder / "data/mine.json"), read(folder / "back.json")


def usable_rows() -> list[Any]:
    """The recorded rows that can be trained on, and forms they do not have."""
    rows = []
    for record in read(GOLDEN / "training/data.json"):
        try:
            parse_row(record, "row")
        except RowError:
            continue
        rows.append(record)
    pair = [{"from": "human", "value": "  Which? "}, {"from": "gpt", "value": " The left.\n"}]
    slots = f"{DEFAULT_IMAGE_TOKEN} {DEFAULT_IMAGE_TOKEN}\n Which? "
    return [
        *rows,
        {"image": "photo_rgb.jpg", "text": " A caption.\n"},
        {"image": ["photo_rgb.jpg", "wide_rgb.png"], "conversations": pair},
        {"image": ["photo_rgb.jpg", "wide_rgb.png"], "conversations": [{"from": "user", "value": slots}, pair[1]]},
    ]


def test_the_way_there_and_back_gives_the_same_examples(tmp_path: Path, loaded: LoadedModel) -> None:
    rows = usable_rows()
    there_and_back(rows, tmp_path)
    encoder = Encoder(loaded.tokenizer, loaded.image_processor, loaded.model.config.num_patches, 2048, YI_VL)
    before, after = parsed(tmp_path / "source.json"), parsed(tmp_path / "back.json")
    assert len(before) == len(after) == len(rows) > 10
    for one, other in zip(before, after, strict=True):
        expected, example = encoder(one), encoder(other)
        assert torch.equal(example.input_ids, expected.input_ids)
        assert torch.equal(example.labels, expected.labels)
        assert torch.equal(example.pixels, expected.pixels)


def test_a_row_in_both_forms(tmp_path: Path) -> None:
    row = {
        "id": 7,
        "image": ["a/1.jpg", "b 2.png"],
        "conversations": [
            {"from": "human", "value": f"{DEFAULT_IMAGE_TOKEN}\n图里有什么？"},
            {"from": "assistant", "value": "猫。"},
            {"from": "human", "value": f"And in {DEFAULT_IMAGE_TOKEN}, is it one too?"},
            {"from": "assistant", "value": "No."},
        ],
    }
    (there,), (back,) = there_and_back([row], tmp_path)
    assert there == {
        "id": 7,
        "messages": [
            {"role": "user", "content": "<image>\n图里有什么？"},
            {"role": "assistant", "content": "猫。"},
            {"role": "user", "content": "And in <image>, is it one too?"},
            {"role": "assistant", "content": "No."},
        ],
        "images": ["a/1.jpg", "b 2.png"],
    }
    assert back == row


def test_every_question_is_written_as_it_is_trained(tmp_path: Path) -> None:
    slot = DEFAULT_IMAGE_TOKEN
    forms = [
        (["1.png", "2.png"], " What? ", "<image><image>\n What? "),
        ([], " What? ", " What? "),
        (["1.png", "2.png"], f" {slot} {slot}\n\n What? ", "<image><image>\nWhat?"),
        (["1.png"], f"  What is {slot} ? ", "What is <image> ?"),
    ]
    rows: list[Any] = [
        {"image": images, "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": " A. "}]}
        for images, text, _ in forms
    ]
    there, _ = there_and_back([*rows, {"image": "3.png", "text": " B. "}], tmp_path)
    said = [([message["content"] for message in row["messages"]], row["images"]) for row in there]
    assert said == [*(([text, " A. "], images) for images, _, text in forms), (["<image>\n", "B."], ["3.png"])]


BLANK = st.sampled_from(["", " ", "\n", "  \n"])
WORDS = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda text: "<" not in text and "{" not in text)
TEXT = st.tuples(BLANK, WORDS, BLANK).map("".join)
PIECES = st.lists(TEXT, min_size=1, max_size=3)
TURNS = st.lists(st.tuples(PIECES, TEXT), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(turns=TURNS, is_marked=st.booleans())
def test_any_row_is_trained_as_before_after_the_way_there_and_back(turns: list[Any], is_marked: bool) -> None:
    mark = DEFAULT_IMAGE_TOKEN if is_marked else ""
    messages, images = [], [f"{index}.png" for index in range(sum(len(pieces) - 1 for pieces, _ in turns))]
    for pieces, answer in turns:
        messages += [{"from": "human", "value": mark.join(pieces)}, {"from": "gpt", "value": answer}]
    row = {"image": images, "conversations": messages}
    with tempfile.TemporaryDirectory() as folder:
        (there,), (back,) = there_and_back([row], Path(folder))
    # The rules of LLaMA-Factory: roles in turn, as many placeholders as images.
    assert [message["role"] for message in there["messages"]] == ["user", "assistant"] * len(turns)
    assert sum(message["content"].count("<image>") for message in there["messages"]) == len(there["images"])
    assert there["images"] == images
    # Yi-VL's prompt has images first, so that the place and the white space of a placeholder may change.
    assert replace(parse_row(back, "row"), questions=()) == replace(parse_row(row, "row"), questions=())


@settings(max_examples=100, deadline=None)
@given(turns=TURNS)
def test_any_row_of_theirs_is_the_same_after_the_way_here_and_back(turns: list[Any]) -> None:
    messages, images = [], [f"{index}.png" for index in range(sum(len(pieces) - 1 for pieces, _ in turns))]
    for pieces, answer in turns:
        question = "\n".join(["<image>" * (len(pieces) - 1), "".join(pieces).strip()]) if pieces[1:] else pieces[0]
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    row = {"messages": messages, "images": images}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        from_llamafactory(declare(folder, OPENAI, [row]), "mine", folder / "here.json")
        to_llamafactory(folder / "here.json", folder / "data", name="mine")
        assert read(folder / "data/mine.json") == [row]


def test_blanks_around_a_question_are_trained_here_as_there(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "<image>\n  a \n"}, {"role": "assistant", "content": "b"}]}
    info = declare(tmp_path, OPENAI, [row | {"images": "1.png"}])
    from_llamafactory(info, "mine", tmp_path / "here.json")
    (turn,) = parsed(tmp_path / "here.json")[0].turns
    assert (turn.question, turn.num_images) == ("  a \n", 1)


@pytest.mark.parametrize("file_name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("with_defaults", [True, False])
def test_both_spellings_of_messages_are_read(file_name: str, with_defaults: bool, tmp_path: Path) -> None:
    ours = [{"from": "human", "value": f"{DEFAULT_IMAGE_TOKEN}\nWho?"}, {"from": "assistant", "value": "I."}]
    if with_defaults:
        theirs = {"conversations": [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "I."}]}
        declared = SHAREGPT
    else:
        system = {"role": "system", "content": f"{SYSTEM_PROMPT}\n\n"}
        said = [{"role": "user", "content": "<image>\nWho?"}, {"role": "assistant", "content": "I."}]
        theirs, declared = {"messages": [system, *said]}, OPENAI
    info = declare(tmp_path, declared, [theirs | {"images": "x/1.png", "tools": "", "id": "a"}], file_name)
    assert from_llamafactory(info, "mine", tmp_path / "out/here.json") == 1
    (row,) = read(tmp_path / "out/here.json")
    assert row.pop("tools", "") == ""  # declared in one of them, and kept as any other key in the other
    assert row == {"id": "a", "image": "x/1.png", "conversations": ours}


def test_every_dialect_is_written_as_it_is_trained(tmp_path: Path) -> None:
    url = {"type": "image_url", "image_url": {"url": "1.png"}}
    listed = [
        {"image": "1.png", "conversations": [ASKED | {"value": "<image>\nWho?"}, SAID]},
        {"images": ["1.png"], "messages": [USER | {"content": f"{DEFAULT_IMAGE_TOKEN}\nWho?"}, ANSWER]},
        {"messages": [USER | {"content": [{"type": "text", "text": "Who?"}, url]}, ANSWER], "conversations": []},
        {
            "conversations": [{"from": "gpt", "value": "Hello."}, ASKED | {"value": "<image>\nWho?"}, SAID],
            "image": "1.png",
        },
    ]
    rows = [row | {"system": "Be brief."} for row in listed]
    there, _ = there_and_back(rows, tmp_path)
    system = {"role": "system", "content": "Be brief.\n\n"}
    assert there == [{"messages": [system, USER | {"content": "<image>\nWho?"}, ANSWER], "images": ["1.png"]}] * 4
    expected = {(row.turns, row.images, row.system) for row in parsed(tmp_path / "source.json")}
    assert len(expected) == 1
    for name in ("back.json", "data/mine.json"):
        assert {(row.turns, row.images, row.system) for row in parsed(tmp_path / name)} == expected


def test_a_dataset_that_declares_nothing_has_the_default_columns(tmp_path: Path) -> None:
    sharegpt = {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}]}
    alpaca = {"instruction": "Who?", "input": "", "output": "I."}
    for declared, row in (({"formatting": "sharegpt"}, sharegpt), ({}, alpaca)):
        from_llamafactory(declare(tmp_path, declared, [row]), "mine", tmp_path / "here.json")
        (here,) = read(tmp_path / "here.json")
        assert here == {"conversations": [{"from": "human", "value": "Who?"}, {"from": "assistant", "value": "I."}]}


def test_instructions_with_a_history_and_images_are_read(tmp_path: Path) -> None:
    columns = {"prompt": "ask", "query": "more", "response": "say", "history": "past", "images": "photos"}
    row = {"ask": "And", "more": "<image>?", "say": "B.", "past": [["<image>What?", "A."]], "photos": ["1", "2"]}
    alone = {"ask": "Who?", "say": "I.", "past": 1}  # which LLaMA-Factory passes over
    from_llamafactory(declare(tmp_path, {"columns": columns}, [row, alone]), "mine", tmp_path / "here.json")
    here, other = read(tmp_path / "here.json")
    assert [message["value"] for message in other["conversations"]] == ["Who?", "I."]
    assert here["image"] == ["1", "2"]
    assert [message["value"] for message in here["conversations"]] == [
        f"{DEFAULT_IMAGE_TOKEN}What?",
        "A.",
        f"And\n{DEFAULT_IMAGE_TOKEN}?",
        "B.",
    ]


def test_columns_that_are_not_declared_are_not_read(tmp_path: Path) -> None:
    columns = {"prompt": "input", "response": "target", "query": None, "kto_tag": ""}
    row = {"input": "Who?", "target": "I.", "instruction": "no", "output": "no"}
    from_llamafactory(declare(tmp_path, {"columns": columns}, [row]), "mine", tmp_path / "here.json")
    (here,) = read(tmp_path / "here.json")
    assert [message["value"] for message in here["conversations"]] == ["Who?", "I."]


def test_the_declaration_joins_those_that_are_there(tmp_path: Path) -> None:
    others = {"b": {"file_name": "b.json", "ranking": True}, "中文": {"hf_hub_url": "x/y"}}
    write(tmp_path / "dataset_info.json", others)
    source = write(tmp_path / "source.json", usable_rows())
    for _ in range(2):  # written again, it is replaced
        assert to_llamafactory(source, tmp_path, name="a-1.5_x") == len(usable_rows())
    info = read(tmp_path / "dataset_info.json")
    assert list(info) == [*others, "a-1.5_x"]
    assert info == others | {"a-1.5_x": {"file_name": "a-1.5_x.json"} | OPENAI}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-1.5_x.json", "dataset_info.json", "source.json"]


def test_the_library_that_llamafactory_reads_with_reads_it(tmp_path: Path) -> None:
    rows = usable_rows()
    there, _ = there_and_back(rows, tmp_path)
    cache = str(tmp_path / "cache")
    table = load_dataset("json", data_files=str(tmp_path / "data/mine.json"), split="train", cache_dir=cache)
    assert [{key: row[key] for key in ("messages", "images")} for row in table] == [
        {key: row[key] for key in ("messages", "images")} for row in there
    ]


def test_half_of_a_character_survives(tmp_path: Path) -> None:
    row = {"conversations": [{"from": "human", "value": "\ud83d 猫"}, {"from": "assistant", "value": "\udc31"}]}
    _, (back,) = there_and_back([row], tmp_path)
    assert back == row
    assert "猫" in (tmp_path / "back.json").read_text(encoding="utf-8")


ASKED = {"from": "human", "value": "Who?"}
SAID = {"from": "gpt", "value": "I."}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [ASKED, SAID | {"value": "an <image> tag"}]}, "an image placeholder in an answer"),
        ({"conversations": [ASKED | {"value": "<video>"}, SAID]}, "read the text '<video>' as"),
        ({"conversations": [ASKED | {"value": "{{image}}"}, SAID]}, "read the text '{{image}}' as"),
        ({"image": "1.png", "text": "<audio>"}, "read the text '<audio>' as"),
        ({"image": "1.png", "text": "an <image> tag"}, "read the text '<image>' as"),
        ({"conversations": [ASKED, SAID], "system": "<video>"}, "read the text '<video>' as"),
        ({"conversations": [ASKED, SAID], "image": "data:image/png;base64,AAAA"}, "a data: URL; save the image"),
        ({"conversations": [ASKED]}, "the last question has no answer"),
        ({"conversations": [ASKED, SAID], "messages": [ASKED]}, "both 'conversations' and 'messages'; keep one"),
    ],
)
def test_a_row_that_llamafactory_cannot_express_is_one_line_and_nothing_is_written(
    row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "source.json", [{"conversations": [ASKED, SAID]}, row])
    with pytest.raises(RowError) as caught:
        to_llamafactory(source, tmp_path / "data", name="mine")
    assert str(caught.value).startswith(f"{source} row 1: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [source]


USER = {"role": "user", "content": "Who?"}
ANSWER = {"role": "assistant", "content": "I."}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"messages": [USER, {"role": "function_call", "content": "{}"}]},
            "role 'function_call' is not supported",
        ),
        (
            {"messages": [USER, ANSWER, {"role": "observation", "content": ""}, ANSWER]},
            "role 'observation' is not supported",
        ),
        ({"messages": [USER, ANSWER, {"role": "system", "content": ""}]}, "role 'system' is not supported"),
        ({"messages": [USER, ANSWER, USER]}, "the last question has no answer"),
        ({"messages": [USER, USER]}, "role 'user' out of order"),
        ({"messages": []}, "'conversations' is not a list of messages"),
        ({"messages": "Who?"}, "the messages are not a list"),
        ({}, "the messages are not a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "message 0 without a text in 'role' and 'cont",
        ),
        ({"messages": ["Who?"]}, "message 0 without a text"),
        ({"messages": [USER, ANSWER], "system": "Be brief."}, "the key 'system' has another meaning"),
        ({"messages": [{"role": "system", "content": "<image>"}, USER, ANSWER]}, "placeholder in a system message"),
        (1, "expected a JSON object"),
        (
            {"messages": [USER | {"content": DEFAULT_IMAGE_TOKEN}, ANSWER]},
            "'<image_placeholder>' would be read as an image",
        ),
        ({"messages": [USER | {"content": "<image>"}, ANSWER]}, "1 image placeholders but 0 images"),
        (
            {"messages": [USER | {"content": "<image>"}, ANSWER], "images": ["1", "2"]},
            "1 image placeholders but 2 images",
        ),
        ({"messages": [USER, ANSWER | {"content": "<image>"}], "images": ["1"]}, "an image placeholder in an answer"),
        ({"messages": [USER, ANSWER], "images": [{"bytes": ""}]}, "'image' is not a path or a list of paths"),
        ({"messages": [USER, ANSWER], "videos": ["1.mp4"]}, "videos are not supported"),
        ({"messages": [USER, ANSWER], "audios": ["1.wav"]}, "audios are not supported"),
        ({"messages": [USER, ANSWER], "tools": "[{}]"}, "tools are not supported"),
        ({"messages": [USER, ANSWER], "image": "1.png"}, "the key 'image' has another meaning"),
        ({"messages": [USER, ANSWER], "conversations": 1}, "the key 'conversations' has another meaning"),
    ],
)
@pytest.mark.parametrize("file_name", ["rows.json", "rows.jsonl"])
def test_a_row_that_is_not_supported_here_is_one_line_and_nothing_is_written(
    fields: dict[str, Any], message: str, file_name: str, tmp_path: Path
) -> None:
    columns = OPENAI["columns"] | {key: key for key in ("videos", "audios", "tools")} | {"system": "sys"}
    good = {"messages": [USER, ANSWER], "tools": "[]", "videos": [], "audios": None, "sys": ""}
    info = declare(tmp_path, OPENAI | {"columns": columns}, [good, fields], file_name)
    with pytest.raises(RowError) as caught:
        from_llamafactory(info, "mine", tmp_path / "out/here.json")
    place = "row 1" if file_name == "rows.json" else "line 2"
    assert str(caught.value).startswith(f"{tmp_path / file_name} {place}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset_info.json", file_name]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Who?"},
        {"instruction": ["Who?"], "output": "I."},
        {"instruction": "Who?", "output": "I.", "history": [["Who?"]]},
        {"instruction": "Who?", "output": "I.", "history": [["Who?", None]]},
    ],
)
def test_an_instruction_that_is_no_text_is_one_line(row: dict[str, Any], tmp_path: Path) -> None:
    columns = {"prompt": "instruction", "response": "output", "history": "history"}
    with pytest.raises(RowError, match=r"rows\.json row 0: a turn that is not a question and an answer, both text"):
        from_llamafactory(declare(tmp_path, {"columns": columns}, [row]), "mine", tmp_path / "here.json")


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        *(
            ({key: "x/y"}, rf"no local file \({key}\); download it")
            for key in ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
        ),
        ({"file_name": None}, r"no local file \(no file_name\)"),
        ({"file_name": "folder"}, r"folder is not a \.json or \.jsonl file"),
        ({"file_name": "gone.json"}, r"gone\.json: cannot be read"),
        ({"formatting": "openai"}, "formatting 'openai'; expected alpaca or sharegpt"),
        ({"formatting": ["alpaca"]}, r"formatting \['alpaca'\]; expected alpaca or sharegpt"),
        ({"ranking": True}, r"preference data \(ranking\)"),
        (OPENAI | {"columns": {"messages": "messages", "kto_tag": "label"}}, r"preference data \(kto_tag\)"),
        ({"formatting": "sharegpt", "columns": {"images": "images"}}, "the columns do not name 'messages'"),
        ({"columns": {"prompt": "text"}}, "the columns do not name 'response'"),
        ({"columns": ["text"]}, "'columns' and 'tags' must map strings"),
        ({"formatting": "sharegpt", "tags": {"role_tag": 1}}, "'columns' and 'tags' must map strings"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_one_line(declared: dict[str, Any], message: str, tmp_path: Path) -> None:
    info = declare(tmp_path, declared, [])
    with pytest.raises(RowError, match=message):
        from_llamafactory(info, "mine", tmp_path / "here.json")
    assert not (tmp_path / "here.json").exists()


def test_a_missing_or_broken_declaration_is_one_line(tmp_path: Path) -> None:
    target = tmp_path / "here.json"
    info = tmp_path / "dataset_info.json"
    with pytest.raises(RowError, match=r"dataset_info\.json: cannot be read \(No such file or directory\)"):
        from_llamafactory(info, "mine", target)
    write(info, {"mine": 1})
    for name in ("mine", "yours"):
        with pytest.raises(RowError, match=rf"dataset_info\.json '{name}': no such dataset"):
            from_llamafactory(info, name, target)
    for text, message in (("[]", "expected a JSON object of datasets"), ("{", "not valid JSON")):
        info.write_text(text)
        with pytest.raises(RowError, match=message):
            from_llamafactory(info, "mine", target)
        source = write(tmp_path / "source.json", [{"conversations": [ASKED, SAID]}])
        with pytest.raises(RowError, match=message):
            to_llamafactory(source, tmp_path, name="mine")
        assert info.read_text() == text
        assert not (tmp_path / "mine.json").exists()
    os.truncate(info, 2**40)  # sparse: it needs no disk
    with pytest.raises(RowError, match=r"dataset_info\.json: larger than 134,217,728 bytes"):
        from_llamafactory(info, "mine", target)
    info.unlink()
    os.mkfifo(info)
    with pytest.raises(RowError, match=r"dataset_info\.json: not a regular file"):
        from_llamafactory(info, "mine", target)


def test_nothing_that_is_there_is_replaced(tmp_path: Path) -> None:
    source = write(tmp_path / "source.json", [{"conversations": [ASKED, SAID]}])
    write(tmp_path / "dataset_info.json", {"mine": {"file_name": "other.json"}})
    write(tmp_path / "yours.json", [])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for name, message in (
        ("mine", "holds another dataset 'mine'; give another name"),
        ("yours", "holds another dataset 'yours'; give another name"),
        ("source", r"source\.json: would be overwritten; give another name"),
        ("dataset_info", "not a name for a dataset"),
        ("a,b", "not a name for a dataset"),
        ("../a", "not a name for a dataset"),
        ("", "not a name for a dataset"),
    ):
        with pytest.raises(RowError, match=message):
            to_llamafactory(source, tmp_path, name=name)
    to_llamafactory(source, tmp_path / "data", name="mine")
    info = tmp_path / "data/dataset_info.json"
    for target in (tmp_path / "data/mine.json", info):
        with pytest.raises(RowError, match="would overwrite its source"):
            from_llamafactory(info, "mine", target)
    with pytest.raises(RowError, match=r"a name that ends in \.json"):
        from_llamafactory(info, "mine", tmp_path / "rows.jsonl")
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "source.json", [{"conversations": [ASKED, SAID]}])
    to_llamafactory(source, tmp_path / "data", name="mine")
    write(source, [{"conversations": [ASKED, SAID, ASKED, SAID]}])
    before = {path: path.read_bytes() for path in (tmp_path / "data").iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        to_llamafactory(source, tmp_path / "data", name="mine")
    assert {path: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before


def test_no_rows_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "source.json", [])
    with pytest.raises(RowError, match=r"source\.json: no rows"):
        to_llamafactory(source, tmp_path / "data", name="mine")
    with pytest.raises(RowError, match=r"rows\.json: no rows"):
        from_llamafactory(declare(tmp_path, OPENAI, []), "mine", tmp_path / "here.json")
