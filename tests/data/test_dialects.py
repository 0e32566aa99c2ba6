"""Rows of other programs: each is the row that it says, or an error with the reason; all of them train."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden import ROOT
from support.training import FACTS, IMAGES, conversation, losses, train, write_rows

from yivl.checkpoint.loading import LoadedModel
from yivl.conversation import HERMES_2, YI_VL, Turn, place_images, prompt_text
from yivl.data.encoding import Encoder
from yivl.data.rows import Row, RowError, parse_row
from yivl.data.streaming import parse_shard_sample
from yivl.data.tar_samples import TarSample
from yivl.serve.images import ImageReader
from yivl.serve.limits import Limits
from yivl.serve.messages import read_messages
from yivl.serve.remote import Fetcher
from yivl.serve.schema import UserMessage

YI = "<image_placeholder>"
LLAVA = "<image>"


def said(question: Any, answer: Any = "A.", **fields: Any) -> dict[str, Any]:
    """Return a row as LLaVA, Yi-VL and ShareGPT write it."""
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]} | fields


def openai(question: Any, answer: Any = "A.", **fields: Any) -> dict[str, Any]:
    """Return a row as OpenAI and LLaMA-Factory write it."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]} | fields


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


@pytest.mark.parametrize(
    "fields",
    [
        said(f"{YI}\nQ?", image="a.jpg"),
        said(f"{LLAVA}\nQ?", image="a.jpg"),
        said(f"Q?\n{LLAVA}", images=["a.jpg"]),
        said("Q?", images="a.jpg"),
        said(f"{LLAVA}\nQ?", image="a.jpg", image_url="http://x/a.jpg", image_id=7),
        said(f"{LLAVA}\nQ?", image=["a.jpg"], images=[], video=None, tools="[]", img=""),
        said(f"{LLAVA}\nQ?", image="a.jpg", image_list=["a.jpg"], original_image="b.jpg", file_name="a.jpg"),
        said(
            f"{LLAVA}\nQ?", image="a.jpg", images="", model="", width=[4], width_list=[4], image_size=[4, 4], label=True
        ),
        openai(f"{LLAVA}Q?", images=["a.jpg"]),
        openai(f"{LLAVA}Q?", image={"path": "a.jpg", "bytes": None}, conversations=None),
        openai([{"type": "image"}, text("Q?")], [text("A.")], images=["a.jpg"]),
        openai([{"type": "image", "image": "file://a.jpg"}, text("Q?")]),
        openai([text("Q?"), {"type": "image", "path": "a.jpg"}], conversations=[]),
        openai([text("Q?"), {"type": "image_url", "image_url": {"url": "a.jpg"}}], images=None),
        openai([text(f"{LLAVA}Q?")], images=["a.jpg"]),
        {"messages": [{"role": "user", "content": "Q?", "loss": False}, openai("")["messages"][1]], "image": "a.jpg"},
    ],
)
def test_every_dialect_is_the_same_row(fields: dict[str, Any]) -> None:
    row = parse_row(fields, "row", "folder")
    assert replace(row, questions=()) == Row((Turn("Q?", "A.", num_images=1),), (Path("folder/a.jpg"),), "row")


@pytest.mark.parametrize(
    "fields",
    [
        said("Q?", id="wgByO4Y_0", model=""),  # LLaVA, llava_v1_5_mix665k.json
        said("Q?", id="000000033471.jpg", source="https://x.org/wiki/File:A.jpg", data_source="sharegpt"),
        said("Q?", image="", images=None),  # a table that is written as JSON has a value in every column
        said("Q?", image_id="33471", num_images=0, has_image=False, image_caption="A cat.", label="cat", weight=2),
        openai("Q?", url="https://x.org/a.jpg", file="a.txt", topics=["cats", "dogs"], meta={"image": None}, text="T."),
        {
            "messages": [
                {"role": "user", "content": "Q?", "images": None},
                {"role": "assistant", "content": "A.", "loss": 1},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "Q?"},
                {"role": "assistant", "content": "A.", "train": True, "id": "2"},
            ]
        },
    ],
)
def test_metadata_of_a_row_without_images_is_no_image(fields: dict[str, Any]) -> None:
    assert parse_row(fields, "row") == Row((Turn("Q?", "A."),), (), "row", questions=(("Q?",),))


@pytest.mark.parametrize(
    ("fields", "pieces"),
    [
        (said(f" {LLAVA} \n Q? ", image="a.jpg"), (" ", " \n Q? ")),
        (said(f"Q?\n{LLAVA}", image="a.jpg"), ("Q?\n", "")),
        (said("Q?", image=["a.jpg", "b.jpg"]), ("", "\n", "\nQ?")),
        (said(f"{LLAVA}{LLAVA}Q?", image=["a.jpg", "b.jpg"]), ("", "", "Q?")),
        (openai([text("Q?"), {"type": "image", "image": "a.jpg"}]), ("", "\nQ?")),
        ({"image": "a.jpg", "text": "A."}, ("", "\n")),
    ],
)
def test_an_image_is_first_or_in_place(fields: dict[str, Any], pieces: tuple[str, ...]) -> None:
    row = parse_row(fields, "row")
    (_, first), (_, answer) = YI_VL.messages(row.turns, row.questions)
    assert prompt_text(first or []) == YI * len(row.images) + f"\n{row.turns[0].question}"
    (_, in_place), (_, same) = HERMES_2.messages(row.turns, row.questions)
    assert (in_place, same) == (place_images(pieces), answer)
    assert answer == ["A."]


def test_placeholders_of_both_spellings_count_together() -> None:
    row = parse_row(said(f"{YI} and {LLAVA}?", image=["a.jpg", "b.jpg"]), "row")
    assert (row.turns[0].num_images, row.turns[0].question) == (2, "and ?")


def test_parts_of_a_message_are_the_prompt_of_the_api(loaded: LoadedModel) -> None:
    url = f"data:image/png;base64,{base64.b64encode((IMAGES / 'square_rgb.png').read_bytes()).decode()}"
    parts = [text("One"), {"type": "image_url", "image_url": {"url": url}}, text("two?")]
    row = parse_row(openai(parts), "row")
    request = [UserMessage(role="user", content=parts)]
    _, (turn,), _ = read_messages(request, Limits(), Fetcher((), 1), ImageReader(Limits(), loaded.image_processor))
    assert (row.turns[0].question, row.turns[0].num_images) == (turn.question, turn.num_images) == ("One\ntwo?", 1)
    encode = Encoder(loaded.tokenizer, loaded.image_processor, loaded.model.config.num_patches, 2048, YI_VL)
    from_file = parse_row({"image": "square_rgb.png", "text": "A."}, "row", IMAGES)
    assert torch.equal(encode(row).pixels, encode(from_file).pixels)


@pytest.mark.parametrize(
    ("fields", "notices"),
    [
        (said("Q?", "", image="a.jpg"), ("have an empty answer",)),
        (said("Q?", " \n"), ("have an empty answer",)),
        (said("Q?", image="../a.jpg"), ("have an image outside the image folder",)),
        (said("Q?", image="b/../../a.jpg"), ("have an image outside the image folder",)),
        (said("Q?", image="/somewhere/a.jpg"), ("have an image outside the image folder",)),
        (said("Q?", image="/base/folder/a.jpg"), ()),
        (said("Q?", image="../folder/a..b.jpg"), ()),
        (said("Q?", image="data:image/png;base64,AAAA"), ()),
    ],
)
def test_what_is_unusual_about_a_row_is_noticed(fields: Any, notices: tuple[str, ...]) -> None:
    assert parse_row(fields, "row", "/base/folder").notices == notices


BAD_ROWS: list[tuple[Any, str]] = [
    (3, "expected a JSON object"),
    (said(f"{LLAVA} is a tag of SVG?"), "1 image placeholders but 0 images; name each image in 'image', or spell '<im"),
    (said(f"{LLAVA}?", image=["a.jpg", "b.jpg"]), "1 image placeholders but 2 images; place each image, or none"),
    (said("Q?", f"{LLAVA}", image="a.jpg"), "an image placeholder in an answer; if '<image>' is text, spell it"),
    (openai("Q?", [{"type": "image"}], image="a.jpg"), "an image placeholder in an answer"),
    ({"conversations": [{"from": "gpt", "value": LLAVA}, *said("Q?")["conversations"]]}, "placeholder in an answer"),
    ({"conversations": [{"from": "gpt", "value": "A."}]}, "no question"),
    ({"conversations": [{"from": "system", "value": "S."}]}, "no question"),
    ({"conversations": [{"from": "system", "value": LLAVA}, *said("Q?")["conversations"]]}, "in a system message"),
    ({"conversations": [*said("Q?")["conversations"], {"from": "system", "value": "S."}]}, "'system' out of order"),
    (openai("Q?", system=3), "'system' is not a text"),
    ({"messages": [{"role": "system", "content": "S."}, *openai("Q?")["messages"]], "system": "T."}, "two system mess"),
    (said("Q?", img="a.jpg"), "unknown key 'img'; name the key of images 'image' or 'images'"),
    (said("Q?", Image="a.jpg"), "unknown key 'Image'"),
    (said("Q?", image_path=["a.jpg"]), "unknown key 'image_path'"),
    (said("Q?", image_url={"url": "a.jpg"}), "unknown key 'image_url'"),
    (said("Q?") | {"pictures": ["a.jpg"]}, "unknown key 'pic"),
    (said("Q?", image="a.jpg", image_2="b.jpg"), "unknown key 'image_2'"),
    (said("Q?", image="a.jpg", image_b="b.jpg"), "unknown key 'image_b'"),
    (said("Q?", image="a.jpg", imageB="b.jpg"), "unknown key 'imageB'"),
    (said("Q?", image="a.jpg", image_list=["a.jpg", "b.jpg"]), "unknown key 'image_list'"),
    (said("Q?", image_a="0001", image_b="0002"), "unknown key 'image_a'"),
    (said("Q?", input_image="0001"), "unknown key 'input_image'"),
    (said("Q?", file_name="cat.jpg"), "unknown key 'file_name'; name the key of images 'image' or 'images'"),
    (said("Q?", files=["a cat.PNG"]), "unknown key 'files'"),
    (said("Q?", data={"image": "0001"}), "unknown key 'data'"),
    (said("Q?", image="", photo="a.jpg"), "unknown key 'photo'"),
    ({"image": "", "text": "a"}, "neither 'conversations' nor"),
    (said(f"{LLAVA}Q?", image=""), "1 image placeholders but 0 images"),
    (
        {"conversations": [{"from": "human", "value": "Q?", "image": "a.jpg"}]},
        "a message with the key 'image'; list all",
    ),
    (
        {"messages": [{"role": "user", "content": "Q?", "images": ["0001"]}]},
        "a message with the key 'images'; list all",
    ),
    ({"messages": [{"role": "user", "content": "Q?", "file": "a.jpg"}]}, "a message with the key 'file'"),
    (said("Q?", label=False), "'label' is false; every row is trained"),
    (said("Q?", kto_tag=False), "'kto_tag' is false"),
    (said("Q?", train=False), "'train' is false"),
    *(
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", key: value}]}, message)
        for key, value, message in (
            ("weight", 0, "an answer with 'weight' 0; the loss is computed on every answer with weight 1"),
            ("loss", False, "an answer with 'loss' False"),
            ("loss_weight", 0.5, "an answer with 'loss_weight' 0.5"),
            ("train", False, "an answer with 'train' False"),
        )
    ),
    (said("Q?", video="a.mp4"), "'video' is not supported"),
    (said("Q?", tools='[{"name": "f"}]'), "'tools' is not supported"),
    (said("Q?", image="a.jpg", images=["b.jpg"]), "both 'image' and 'images'; keep one"),
    (said("Q?") | openai("Another?"), "both 'conversations' and 'messages'; keep one"),
    (openai([text("Q?"), {"type": "image_url", "image_url": "a.jpg"}], image="b.jpg"), "both in the messages and besi"),
    (openai([text("Q?"), {"type": "image"}]), "1 image placeholders but 0 images"),
    (openai([{"type": "input_audio"}]), "a part of type 'input_audio'; expected text, image or image_url"),
    (openai(["Q?"]), "a part of type None"),
    (openai("Q?", None), "a message without 'from' and 'value', or 'role' and 'content'"),
    (said("Q?", image="https://x.org/a.jpg"), "the image https://x.org/a.jpg is a URL; training reads local files"),
    (openai([{"type": "image_url", "image_url": {"url": "s3://a/b.jpg"}}]), "the image s3://a/b.jpg is a URL"),
    (said("Q?", image="data:image/png;base64,!"), "an image is not valid base64"),
    ({"instruction": "Q?", "output": "A."}, "for instructions see scripts/convert.py from-llamafactory"),
    ({}, "neither 'conversations' nor"),
    ({"text": "no image"}, "neither 'conversations' nor"),
    ({"image": 3, "text": "a"}, "'image' is not a path"),
    ({"image": [""], "text": "a"}, "'image' is not a path"),
    ({"conversations": []}, "'conversations' is not a list"),
    ({"conversations": "hello"}, "'conversations' is not a list"),
    ({"conversations": ["hello"]}, "without 'from' and 'value'"),
    ({"conversations": [{"from": "human"}]}, "without 'from' and 'value'"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]}, "out of order"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_ROWS)
def test_an_invalid_row_is_reported_with_its_reason(fields: Any, message: str) -> None:
    with pytest.raises(RowError, match=f"^file.json row 7: .*{message}"):
        parse_row(fields, "file.json row 7")


def test_a_conversation_in_a_tar_shard_may_be_in_any_dialect() -> None:
    system = {"role": "system", "content": "Be brief."}
    fields = openai([{"type": "image"}, text("Q?")], image="of-another-folder.jpg", url="http://x/a.jpg")
    fields["messages"].insert(0, system)
    for one in (fields, said(f"{LLAVA}Q?", system="Be brief.", images=["a.jpg", "b.jpg"])):
        sample = TarSample("shard", {"jpg": b"image", "json": json.dumps(one).encode()})
        expected = Row((Turn("Q?", "A.", num_images=1),), (b"image",), "shard", system="Be brief.")
        row = parse_shard_sample(sample)
        assert isinstance(row, Row)
        assert replace(row, questions=()) == expected


def as_llava(row: Mapping[str, Any]) -> dict[str, Any]:
    messages = [{**one, "value": one["value"].replace(YI, LLAVA)} for one in row["conversations"]]
    return {**row, "conversations": messages}


def as_sharegpt(row: Mapping[str, Any]) -> dict[str, Any]:
    opening = {"from": "gpt", "value": "Welcome!"}
    fields = as_llava(row)
    return {"conversations": [opening, *fields["conversations"]], "images": [fields["image"]] if "image" in row else []}


def as_openai(row: Mapping[str, Any]) -> dict[str, Any]:
    question, answer = (one["value"] for one in row["conversations"])
    image = [{"type": "image_url", "image_url": {"url": row["image"]}}] if "image" in row else []
    content = [*image, text(question.removeprefix(f"{YI}\n"))]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def test_every_dialect_trains_with_the_losses_of_the_same_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(name: str, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        return losses(train(tmp_path / name, write_rows(tmp_path / f"{name}.json", rows), max_steps=1, **batch))

    batch = {"per_device_train_batch_size": 8}
    rows = [conversation(*fact) for fact in FACTS]
    expected = run("rows", rows)
    assert len(expected) == 1
    for convert in (as_llava, as_sharegpt, as_openai):
        assert run(convert.__name__, [convert(row) for row in rows]) == expected
    (notice,) = (line for line in caplog.messages if "start with an answer" in line)
    assert notice.startswith(f"8 rows start with an answer, which is dropped: {tmp_path}/as_sharegpt.json row 0, ")


# As the README of 01-ai/Yi's pull request 368 prints its example, with another answer.
PUBLISHED = """[
  {
    "image": "images/cat.jpg",
    "conversations": [
      {
        "from": "human",
        "value": "<image_placeholder>\\nDescribe the cats and what they are doing in detail."
      },
      {
        "from": "assistant",
        "value": "A cat, which is orange, looks up."
      },
    ]
  },
  ...
]
"""


def test_the_published_example_trains_as_it_is_printed(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(PUBLISHED, encoding="utf-8")
    log = train(tmp_path / "out", tmp_path / "rows.json", image_folder=ROOT, max_steps=1, per_device_train_batch_size=1)
    assert losses(log)[0] > 0
