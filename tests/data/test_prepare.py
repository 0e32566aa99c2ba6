"""Official annotation files, a few records of each in its schema, to rows that training accepts."""

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from support.golden import ROOT
from support.published import write_files
from support.training import write_shards

from yivl.data.patterns import expand_braces
from yivl.data.prepare.__main__ import random_subset, valid_rows, write_rows
from yivl.data.prepare.catalog import SOURCES
from yivl.data.prepare.records import BadRecords, OfficialFolder
from yivl.data.prepare.shards import mixture_of
from yivl.data.sources import load_rows, read_sources
from yivl.errors import YiVLError

SHORT = "\nAnswer the question using a single word or phrase."


def prepared(name: str, folder: Path, files: Mapping[str, Any]) -> tuple[list[Any], BadRecords]:
    """Return rows as ``(image, texts)``, and the bad records."""
    bad = BadRecords()
    rows = list(valid_rows(SOURCES[name], write_files(folder, files), None, bad))
    found = []
    for row in rows:
        messages = [message["value"] for message in row.get("conversations", [])]
        if messages and "image" in row:
            assert messages[0].startswith("<image_placeholder>\n")
            messages[0] = messages[0].removeprefix("<image_placeholder>\n")
        found.append((row.get("image"), *(messages or [row["text"]])))
    return found, bad


def test_vqav2_answers_are_those_of_the_majority(tmp_path: Path) -> None:
    questions = [
        {"image_id": 458752, "question": "What is this photo taken looking through?", "question_id": 458752000},
        {"image_id": 9, "question": "Is it red?", "question_id": 9000},
    ]
    answers = [
        {
            "question_id": 458752000,
            "image_id": 458752,
            "question_type": "what is this",
            "answer_type": "other",
            "multiple_choice_answer": "net",
            "answers": [{"answer": "net", "answer_confidence": "maybe", "answer_id": 1}],
        }
    ]
    files = {
        "v2_OpenEnded_mscoco_train2014_questions.json": {"info": {}, "questions": questions},
        "v2_mscoco_train2014_annotations.json": {"info": {}, "annotations": answers},
    }
    rows, bad = prepared("vqav2", tmp_path, files)
    image = "coco/train2014/COCO_train2014_000000458752.jpg"
    assert rows == [(image, f"What is this photo taken looking through?{SHORT}", "net")]
    assert (bad.count, bad.reasons) == (1, ["question 1: no 9000"])


def test_gqa_gives_the_short_answer(tmp_path: Path) -> None:
    record = {
        "semantic": [],
        "isBalanced": True,
        "question": "Is the sky dark?",
        "imageId": "2354786",
        "answer": "yes",
        "fullAnswer": "Yes, the sky is dark.",
    }
    rows, bad = prepared("gqa", tmp_path, {"train_balanced_questions.json": {"02930152": record, "1": {"answer": "x"}}})
    assert rows == [("gqa/2354786.jpg", f"Is the sky dark?{SHORT}", "yes")]
    assert bad.reasons == ["question 1: no 'imageId'"]


def test_vizwiz_takes_the_majority_and_may_be_unanswerable(tmp_path: Path) -> None:
    def record(image: str, answers: list[str]) -> dict[str, Any]:
        listed = [{"answer_confidence": "yes", "answer": answer} for answer in answers]
        return {"image": image, "question": "What is it?", "answers": listed, "answer_type": "other", "answerable": 1}

    records = [
        record("VizWiz_train_00000000.jpg", ["basil leaves", "basil", "basil"]),
        record("VizWiz_train_00000001.jpg", ["unanswerable", "unanswerable", "bottle"]),
        {"image": "VizWiz_train_00000002.jpg", "question": "No answers?"},
    ]
    rows, bad = prepared("vizwiz", tmp_path, {"train.json": records})
    question = f"What is it?\nWhen the provided information is insufficient, respond with 'Unanswerable'.{SHORT}"
    assert rows == [
        ("vizwiz/train/VizWiz_train_00000000.jpg", question, "basil"),
        ("vizwiz/train/VizWiz_train_00000001.jpg", question, "Unanswerable"),
    ]
    assert bad.count == 1


def test_ocrvqa_takes_the_training_split_with_the_suffix_of_the_address(tmp_path: Path) -> None:
    def book(split: int, **changes: Any) -> dict[str, Any]:
        fields = {"imageURL": "http://x/images/I/51.gif", "genre": "Crafts", "title": "T", "authorName": "A"}
        return (
            fields | {"questions": ["Who wrote this?", "Genre?"], "answers": ["A", "Crafts"], "split": split} | changes
        )

    files = {"dataset.json": {"0761183272": book(1), "2": book(2), "3": book(3), "4": book(1, answers=["A"])}}
    rows, bad = prepared("ocrvqa", tmp_path, files)
    assert rows[:2] == [
        ("ocrvqa/0761183272.gif", f"Who wrote this?{SHORT}", "A"),
        ("ocrvqa/0761183272.gif", f"Genre?{SHORT}", "Crafts"),
    ]
    assert {row[0] for row in rows[2:]} <= {"ocrvqa/4.gif"}
    assert bad.count == 1  # fewer answers than questions


def test_visual7w_asks_for_the_letter_of_the_right_option(tmp_path: Path) -> None:
    def pair(number: int) -> dict[str, Any]:
        wrong = ["At night.", "At noon.", "In winter."]
        fields = {"image_id": 2, "qa_id": number, "type": "when", "question": "When was it?"}
        return fields | {"answer": "In daytime.", "multiple_choices": wrong}

    images = [
        {"image_id": 2, "split": "train", "filename": "v7w_2.jpg", "qa_pairs": [pair(n) for n in range(40)]},
        {"image_id": 3, "split": "val", "filename": "v7w_3.jpg", "qa_pairs": [pair(99)]},
    ]
    files = {"dataset_v7w_telling.json": {"dataset": "visual7w-telling", "images": images}}
    rows, bad = prepared("visual7w", tmp_path, files)
    assert (len(rows), bad.count) == (40, 0)
    letters = set()
    for image, question, letter in rows:
        assert image == "visual7w/v7w_2.jpg"
        assert f"\n{letter}. In daytime.\n" in question
        assert question.endswith("\nAnswer with the option's letter from the given choices directly.")
        letters.add(letter)
    assert letters == set("ABCD")
    assert prepared("visual7w", tmp_path, {})[0] == rows  # always the same order


REFERENCES = [
    {
        "ref_id": 0,
        "ann_id": 1719310,
        "category_id": 1,
        "image_id": 581857,
        "file_name": "COCO_train2014_000000581857_16.jpg",
        "split": "train",
        "sent_ids": [0, 1],
        "sentences": [
            {"tokens": ["the", "lady"], "raw": "THE LADY", "sent_id": 0, "sent": "the lady"},
            {"tokens": ["左"], "raw": "左", "sent_id": 1, "sent": "左边"},
        ],
    },
    {"ann_id": 1719310, "split": "testA", "sentences": [{"sent": "not for training"}]},
    {"ann_id": 5, "split": "train", "sentences": [{"sent": "no such box"}]},
]
INSTANCES = {
    "images": [{"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "width": 640, "height": 400}],
    "annotations": [{"id": 1719310, "image_id": 581857, "bbox": [64.0, 40.0, 320.0, 400.0], "category_id": 1}],
}


def pickled_by_python_2(value: Any) -> bytes:
    """Return a value as Python 2 pickles it, with text as bytes in UTF-8."""
    if isinstance(value, dict):
        return b"(d" + b"".join(pickled_by_python_2(k) + pickled_by_python_2(v) + b"s" for k, v in value.items())
    if isinstance(value, list):
        return b"(l" + b"".join(pickled_by_python_2(item) + b"a" for item in value)
    return f"S{repr(value.encode())[1:]}\n".encode() if isinstance(value, str) else f"I{value}\n".encode()


@pytest.mark.parametrize("kind", ["json", "pickle of Python 2", "pickle"])
def test_refcoco_boxes_are_fractions_of_the_image(kind: str, tmp_path: Path) -> None:
    files: dict[str, Any] = {"instances.json": INSTANCES}
    if kind == "json":
        files["refs(unc).json"] = REFERENCES
    else:
        content = pickle.dumps(REFERENCES) if kind == "pickle" else pickled_by_python_2(REFERENCES) + b"."
        (tmp_path / "refs(unc).p").write_bytes(content)
    rows, bad = prepared("refcoco", tmp_path, files)
    image, question = "coco/train2014/COCO_train2014_000000581857.jpg", "Provide the bounding box coordinate of the "
    question += "region this sentence describes: "
    box = "[0.100, 0.100, 0.600, 1.000]"
    assert rows == [(image, f"{question}the lady", box), (image, f"{question}左边", box)]
    assert bad.reasons == ["reference 2: no 5"]


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("content", [None, b"", b"no pickle", b"cos\nsystem\n(S'true'\ntR.", b"\x8c\xff", b"r\xff" * 9])
def test_a_pickle_executes_nothing_and_a_damaged_one_is_one_error_line(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps(Attack(tmp_path / "executed")) if content is None else content)
    with pytest.raises(YiVLError, match=r"refs\(unc\)\.p: not a pickle of plain values .*lichengunc/refer"):
        prepared("refcoco", tmp_path, {"instances.json": INSTANCES})
    assert not (tmp_path / "executed").exists()


def test_visual_genome_has_questions_and_regions(tmp_path: Path) -> None:
    url = "https://cs.stanford.edu/people/rak248"
    pair = {
        "a_objects": [],
        "q_objects": [],
        "qa_id": 986768,
        "image_id": 1,
        "question": "What color?",
        "answer": "Green.",
    }
    region = {"region_id": 1382, "image_id": 2, "x": 40, "y": 30, "width": 80, "height": 60, "phrase": "a clock"}
    files = {
        "image_data.json": [
            {"image_id": 1, "url": f"{url}/VG_100K_2/1.jpg", "width": 800, "height": 600, "coco_id": None},
            {"image_id": 2, "url": f"{url}/VG_100K/2.jpg", "width": 400, "height": 300, "coco_id": None},
        ],
        "question_answers.json": [{"id": 1, "qas": [pair, pair | {"answer": ""}]}],
        "region_descriptions.json": [{"id": 2, "regions": [region, region | {"width": 0}]}],
    }
    rows, bad = prepared("visual-genome", tmp_path, files)
    assert rows == [
        ("visual-genome/VG_100K_2/1.jpg", f"What color?{SHORT}", "Green"),
        (
            "visual-genome/VG_100K/2.jpg",
            "Provide a short description for this region: [0.100, 0.100, 0.300, 0.300]",
            "a clock",
        ),
    ]
    assert bad.reasons == [
        "questions 0: the answer is empty",
        "regions 0: a box of 0 x 60 in an image of 400 x 300 pixels",
    ]


def test_flickr30k_is_read_from_the_official_file_or_the_copy_that_the_card_links(tmp_path: Path) -> None:
    official = "1000092795.jpg#0\tTwo young guys .\n1000092795.jpg#1\tTwo men\u2028outside .\nbroken line\n"
    copy = "image_name| comment_number| comment\n1000092795.jpg| 0| Two young guys .\n2199200615.jpg| 4   A dog\n"
    rows, bad = prepared("flickr30k", tmp_path / "official", {"results_20130124.token": official})
    image = "flickr30k/1000092795.jpg"
    assert rows == [(image, "Two young guys ."), (image, "Two men\u2028outside .")]
    assert bad.count == 1
    rows, bad = prepared("flickr30k", tmp_path / "copy", {"results.csv": copy})
    assert rows == [(image, "Two young guys .")]
    assert bad.count == 1


def test_textcaps_has_one_row_per_caption(tmp_path: Path) -> None:
    record = {
        "image_id": "011e7e629fb9ae7b",
        "image_name": "011e7e629fb9ae7b",
        "image_path": "train/011e7e629fb9ae7b.jpg",
        "caption_id": 100000000,
        "caption_str": "Five Listerine Zero mouthwash bottles on a store shelf",
        "reference_strs": ["other"],
    }
    rows, bad = prepared("textcaps", tmp_path, {"TextCaps_0.1_train.json": {"data": [record, {"image_id": "x"}]}})
    question = "Provide a one-sentence caption for the provided image."
    assert rows == [("textcaps/train_images/011e7e629fb9ae7b.jpg", question, record["caption_str"])]
    assert bad.reasons == ["caption 1: no 'caption_str'"]


def test_laion_gpt4v_takes_what_img2dataset_could_download(tmp_path: Path) -> None:
    def record(key: str, status: str) -> dict[str, Any]:
        return {"url": "http://x/1.png", "caption": "A long description.", "key": key, "status": status}

    files = {
        "00000/000000000.json": record("000000000", "success"),
        "00001/000010003.json": record("000010003", "failed_to_download"),
        "00000_stats.json": {"successes": 1},
    }
    rows, bad = prepared("laion-gpt4v", tmp_path, files)
    assert rows == [("laion-gpt4v/00000/000000000.jpg", "Describe this image in detail.", "A long description.")]
    assert bad.reasons == ["00001/000010003.json: not downloaded (failed_to_download)"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(YiVLError, match=r"no 00000/\*\.json; download .* with img2dataset"):
        prepared("laion-gpt4v", tmp_path / "empty", {})


def llava(image: str, question: str, *others: str) -> dict[str, Any]:
    texts = [question, *others]
    turns = [{"from": "gpt" if index % 2 else "human", "value": text} for index, text in enumerate(texts)]
    return {"id": "GCC", "image": image, "conversations": turns}


def without_image(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "image"}


def test_cllava_keeps_chinese_questions_and_asks_in_chinese_where_one_is_missing(tmp_path: Path) -> None:
    files = {
        "LLaVA-CC3M-Pretrain-595K/chat-translated.json": [
            llava("GCC_train_000000001.jpg", "图里有什么？\n<image>", "一只猫。"),
            llava("GCC_train_000000002.jpg", "<image>", "一只狗。"),
            llava("GCC_train_000000003.jpg", "<image>\n图里有什么？"),
        ],
        "LLaVA-Instruct-150K/translated/llava_instruct_150k.json": [
            llava("000000033471.jpg", "<image>\n公交车是什么颜色？", "白色和红色。", "背景里有什么？", "行人。")
        ],
    }
    rows, bad = prepared("cllava", tmp_path, files)
    assert rows == [
        ("cc3m/GCC_train_000000001.jpg", "图里有什么？", "一只猫。"),
        ("cc3m/GCC_train_000000002.jpg", "请详细描述这张图片。", "一只狗。"),
        ("coco/train2017/000000033471.jpg", "公交车是什么颜色？", "白色和红色。", "背景里有什么？", "行人。"),
    ]
    assert (bad.count, "the last question has no answer" in bad.reasons[0]) == (1, True)


def test_llavar_and_sharegpt4v_are_conversations_of_llava(tmp_path: Path) -> None:
    files = {
        "chat_llavar.json": [llava("GCC_train_000000001.jpg", "What text?\n<image>", "SALE")],
        "llava_instruct_150k_llavar_20k.json": [llava("000000033471.jpg", "<image>\nWhat colors?", "White.")],
        "sharegpt4v_instruct_gpt4-vision_cap100k.json": [
            llava("coco/train2017/000000000009.jpg", "What do you see?\n<image>", "A meal.")
        ],
    }
    rows, _ = prepared("llavar", tmp_path, files)
    assert rows == [
        ("cc3m/GCC_train_000000001.jpg", "What text?", "SALE"),
        ("coco/train2017/000000033471.jpg", "What colors?", "White."),
    ]
    rows, _ = prepared("sharegpt4v", tmp_path, {})
    assert rows == [("coco/train2017/000000000009.jpg", "What do you see?", "A meal.")]


def test_llava_zh_and_mix665k_are_conversations_and_rows_without_an_image_stay(tmp_path: Path) -> None:
    text_only = without_image(llava("", "Write code.", "print()")) | {"model": ""}
    files = {
        "llava_instruct_150k_zh.json": [llava("000000033471.jpg", "<image>\n公交车是什么颜色？", "白色。")],
        "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json": [
            llava("ocr_vqa/images/1.jpg", "Who wrote this?\n<image>", "A."),
            text_only,
            llava("vg/VG_100K/1.jpg", "<image>\nWhere?"),
            without_image(llava("", "<image>\nWhat?", "A cat.")),
        ],
    }
    rows, _ = prepared("llava-zh", tmp_path, files)
    assert rows == [("coco/train2017/000000033471.jpg", "公交车是什么颜色？", "白色。")]
    rows, bad = prepared("mix665k", tmp_path, {})
    assert rows == [("ocr_vqa/images/1.jpg", "Who wrote this?", "A."), (None, "Write code.", "print()")]
    assert bad.reasons == [
        "ShareGPT4V mix665k: vg/VG_100K/1.jpg: the last question has no answer",
        "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json record 3: <image> in the text, and no image",
    ]


@pytest.mark.parametrize("source", ["cllava", "llavar", "sharegpt4v", "llava-zh"])
def test_a_record_of_image_data_without_an_image_is_bad(source: str, tmp_path: Path) -> None:
    records = [llava("1.jpg", "<image>\nWhat?", "A cat."), without_image(llava("", "Write code.", "print()"))]
    names = [name for name in SOURCES[source].files.split(", ") if name.endswith(".json")]
    rows, bad = prepared(source, tmp_path, dict.fromkeys(names, records))
    assert [row[1:] for row in rows] == [("What?", "A cat.")] * len(names)
    assert bad.reasons == [f"{name} record 1: no 'image'" for name in names]


def test_dvqa_chartqa_and_docvqa_have_one_row_per_image_that_asks_for_short_answers_first(tmp_path: Path) -> None:
    def bar(image: str, question: str, **changes: Any) -> dict[str, Any]:
        fields = {"question": question, "answer": "two", "question_id": 1, "template_id": "structure", "image": image}
        return {key: value for key, value in (fields | changes).items() if value is not None}

    first, second = "bar_train_00000000.png", "bar_train_00000001.png"
    bars = [bar(first, "How many bars?"), bar(second, "Colors?"), bar(first, "Is it red?", answer="no")]
    rows, bad = prepared("dvqa", tmp_path, {"train_qa.json": [*bars, bar(first, "Q?", answer=None)]})
    assert rows == [
        (f"dvqa/images/{first}", f"How many bars?{SHORT}", "two", "Is it red?", "no"),
        (f"dvqa/images/{second}", f"Colors?{SHORT}", "two"),
    ]
    assert bad.reasons == ["question 3: no 'answer'"]
    files = {
        "train/train_human.json": [{"imgname": "10.png", "query": "Largest?", "label": "57.2"}],
        "train/train_augmented.json": [{"imgname": "10.png", "query": "Year?", "label": "2019"}, {"imgname": "1.png"}],
    }
    rows, bad = prepared("chartqa", tmp_path, files)
    assert rows == [("chartqa/train/png/10.png", f"Largest?{SHORT}", "57.2", "Year?", "2019")]
    assert bad.reasons == ["train/train_augmented.json question 1: no 'query'"]
    pages = [
        {
            "image": "documents/xnbl0037_1.png",
            "question": "Date?",
            "answers": ["1/8/93", "1993"],
            "data_split": "train",
        },
        {"image": "documents/xnbl0037_1.png", "question": "Who?", "answers": ["Lee"]},
        {"image": "documents/x.png", "question": "Who?", "answers": []},
    ]
    rows, bad = prepared("docvqa", tmp_path, {"train_v1.0.json": {"dataset_name": "docvqa", "data": pages}})
    assert rows == [("docvqa/train/documents/xnbl0037_1.png", f"Date?{SHORT}", "1/8/93", "Who?", "Lee")]
    assert bad.count == 1
    files = {"train_v1.0_withQT.json": {"data": pages[1:2]}}
    assert len(prepared("docvqa", tmp_path, files)[0]) == 1


LETTER = "\nAnswer with the option's letter from the given choices directly."


def test_ai2d_leaves_out_test_images_and_shows_letters_where_a_question_needs_them(tmp_path: Path) -> None:
    def diagram(name: str, **questions: Any) -> dict[str, Any]:
        return {"imageName": name, "questions": questions}

    options = ["ears", "nose", "mouth", "face"]
    asked = {"abcLabel": True, "answerTexts": options, "correctAnswer": 3, "questionId": "0.png-0"}
    files = {
        "ai2d_test_ids.csv": "2\n100\n",
        "questions/0.png.json": diagram("0.png", **{"What is A?": asked, "Bad?": asked | {"correctAnswer": 4}}),
        "questions/2.png.json": diagram("2.png", **{"For testing?": asked}),
        "questions/10.png.json": diagram("10.png", **{"Which?": asked | {"abcLabel": False, "correctAnswer": 0}}),
    }
    rows, bad = prepared("ai2d", tmp_path, files)
    listed = "\nA. ears\nB. nose\nC. mouth\nD. face"
    assert rows == [
        ("ai2d/abc_images/0.png", f"What is A?{listed}{LETTER}", "D"),
        ("ai2d/images/10.png", f"Which?{listed}{LETTER}", "A"),
    ]
    assert bad.reasons == ["0.png.json: no option 4"]
    (tmp_path / "ai2d_test_ids.csv").unlink()
    with pytest.raises(YiVLError, match=r"ai2d_test_ids\.csv: no such file"):  # otherwise test images are trained on
        prepared("ai2d", tmp_path, {})


@pytest.mark.parametrize("protocol", [2, 4])
def test_geoqa_plus_reads_the_texts_of_a_pickle_without_its_arrays(protocol: int, tmp_path: Path) -> None:
    image = numpy.full((40, 60), 255, dtype=numpy.uint8)
    problem = {"id": 7, "image": image, "subject": "如图,求角度", "choices": ["20°", "25°", "30°", "35°"], "label": 2}
    (tmp_path / "Backtrans-train.pk").write_bytes(pickle.dumps([problem, problem | {"label": 5}], protocol))
    rows, bad = prepared("geoqa-plus", tmp_path, {})
    question = "如图,求角度\nA. 20°\nB. 25°\nC. 30°\nD. 35°\n请直接回答选项字母。"
    assert rows == [("geoqa+/images/7.png", question, "C")]
    assert bad.reasons == ["problem 1: no option 5"]
    (tmp_path / "Backtrans-train.pk").write_bytes(pickle.dumps([Attack(tmp_path / "executed")]))
    with pytest.raises(YiVLError, match="not a pickle of plain values"):
        prepared("geoqa-plus", tmp_path, {})
    assert not (tmp_path / "executed").exists()


def test_synthdog_reads_metadata_or_parquet_whose_images_it_writes(tmp_path: Path) -> None:
    truth = json.dumps({"gt_parse": {"text_sequence": "Hello world"}})
    metadata = json.dumps({"file_name": "image_0.jpg", "ground_truth": truth})
    rows, bad = prepared(
        "synthdog-en", tmp_path / "generated", {"metadata.jsonl": f'{metadata}\n{{"file_name": "x"}}\n'}
    )
    assert rows == [("synthdog-en/images/image_0.jpg", "Read all text in this image.", "Hello world")]
    assert bad.reasons == ["metadata.jsonl line 2: no 'ground_truth'"]
    table = [{"image": {"bytes": b"\xff\xd8jpeg", "path": None}, "ground_truth": truth}]
    table += [{"image": {"bytes": b"\x89PNG", "path": "x.png"}, "ground_truth": "{}"}]
    (tmp_path / "hub/data").mkdir(parents=True)
    name = "train-00003-of-00084-45e260eca2cd125f.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "hub/data" / name)
    rows, bad = prepared("synthdog-en", tmp_path / "hub", {})
    assert rows == [("synthdog-en/images/00003_00000.jpg", "Read all text in this image.", "Hello world")]
    assert bad.reasons == [f"{name} row 1: no 'gt_parse'"]
    assert (tmp_path / "hub/images/00003_00000.jpg").read_bytes() == b"\xff\xd8jpeg"
    (tmp_path / "hub/data" / name).write_bytes((tmp_path / "hub/data" / name).read_bytes()[:-50])
    with pytest.raises(YiVLError, match=rf"{name}: not a readable Parquet file \(.*\); download it again$"):
        prepared("synthdog-en", tmp_path / "hub", {})


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "yivl.data.prepare", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_records_nested_too_deeply_are_counted(tmp_path: Path) -> None:
    files = {"metadata.jsonl": json.dumps({"file_name": "a.jpg", "ground_truth": "[" * 100_000})}
    rows, bad = prepared("synthdog-en", tmp_path, files)
    assert (rows, bad.count) == ([], 1)


def test_text_that_is_no_unicode_is_written_as_json_escapes_it(tmp_path: Path) -> None:
    content = json.dumps({"1": GQA["1"] | {"answer": "\ud83d"}})
    write_files(tmp_path / "gqa", {"train_balanced_questions.json": content})
    write_rows(valid_rows(SOURCES["gqa"], tmp_path / "gqa", None, BadRecords()), tmp_path / "rows.jsonl", BadRecords())
    row = json.loads((tmp_path / "rows.jsonl").read_text(encoding="utf-8"))
    assert row["conversations"][1]["value"] == "\ud83d"


GQA = {str(n): {"imageId": str(n), "question": f"Question {n}?", "answer": "yes"} for n in range(30)}


def test_the_program_writes_rows_and_reports_bad_records_and_missing_images(tmp_path: Path) -> None:
    write_files(tmp_path / "gqa", {"train_balanced_questions.json": GQA | {"x": {}}})
    write_files(tmp_path / "images/gqa", {f"{n}.jpg": "" for n in range(28)})
    output = tmp_path / "new/gqa.jsonl"
    result = run("gqa", "--source", tmp_path / "gqa", "--output", output, "--image-folder", tmp_path / "images")
    assert result.returncode == 0, result.stderr
    first, second, *reasons = result.stdout.splitlines()
    assert first == f"{output}: 28 rows of GQA, balanced"
    assert second == "3 bad records were left out; the first:"
    assert len(reasons) == 3
    assert f"{tmp_path / 'images/gqa/28.jpg'}: no such image" in reasons[0]
    (source,) = read_sources(str(output), str(tmp_path / "images"))
    assert len(load_rows(source, 0, pytest.fail)) == 28
    assert [path.name for path in output.parent.iterdir()] == ["gqa.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gqa", "--source", "nowhere", "--output", "x.jsonl"), r"--source nowhere: no such folder; .*gqa/download"),
        (("gqa", "--source", "empty", "--output", "x.jsonl"), r"train_balanced_questions\.json: no such file; .*gqa"),
        (("gqa", "--source", "empty", "--output", "x.json"), r"--output .*: gqa is written to a \.jsonl file"),
        (("laion400m", "--source", "empty", "--output", "x.yaml"), r"no \*\.tar; download https://laion\.ai"),
        (("laion400m", "--source", "empty", "--output", "x.jsonl"), r"laion400m is written to a \.yaml file"),
        (("gqa", "--source", "list", "--output", "x.jsonl"), "not the format of train_balanced_questions.json"),
        (("gqa", "--source", "text", "--output", "x.jsonl"), "not valid JSON"),
        (("gqa", "--source", "deep", "--output", "x.jsonl"), "not valid JSON .maximum recursion"),
        (("gqa", "--source", "bad", "--output", "x.jsonl"), "no valid row to write; bad records: 1, question 0: no"),
    ],
)
def test_wrong_input_is_one_error_line_and_writes_nothing(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    for folder, content in (("list", "[1]"), ("text", "x"), ("bad", '{"0": {}}'), ("deep", "[" * 100_000)):
        write_files(tmp_path / folder, {"train_balanced_questions.json": content})
    is_path = {"empty", "list", "text", "bad", "deep", "x.json", "x.jsonl", "x.yaml"}
    result = run(*(tmp_path / word if word in is_path else word for word in arguments))
    assert result.returncode == 2
    assert re.search(message, result.stderr), result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_a_random_subset_is_always_the_same_and_in_order() -> None:
    rows = [{"index": index} for index in range(1000)]
    chosen = [row["index"] for row in random_subset(rows, 100)]
    assert chosen == sorted(set(chosen)) == [row["index"] for row in random_subset(iter(rows), 100)]
    assert len(chosen) == 100
    assert 350 < sum(chosen) / 100 < 650
    assert random_subset(rows[:5], 100) == rows[:5]


def test_complete_shards_of_laion_become_a_mixture(tmp_path: Path) -> None:
    write_shards(tmp_path / "laion", num_shards=4, per_shard=3)
    for shard in (0, 1, 3):
        write_files(
            tmp_path / "laion", {f"{shard:05d}_stats.json": {"count": 4, "successes": 3, "failed_to_download": 1}}
        )
    cut = tmp_path / "laion/00001.tar"
    cut.write_bytes(cut.read_bytes().rstrip(b"\0"))
    output = tmp_path / "laion400m.yaml"
    result = run("laion400m", "--source", tmp_path / "laion", "--output", output)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{output}: 6 samples of LAION-400M\n2 bad records were left out")
    assert "00001.tar: truncated" in result.stdout
    assert "00002.tar: no 00002_stats.json" in result.stdout
    (source,) = read_sources(str(output))
    assert source.name == "laion400m"
    assert [Path(path).name for path in source.shards()] == ["00000.tar", "00003.tar"]


def test_the_mixture_of_all_of_laion_is_short(tmp_path: Path) -> None:
    """Paths would take more than a YAML file of a mixture may have."""
    names = [f"{number:05d}" for number in range(41_408) if number not in (7, 9, 20_000)]
    names += ["99999", "100000", "100001", "a", "٣", "٤"]
    folder = tmp_path / ("a folder" * 10)
    text = mixture_of("laion400m", [folder / f"{name}.tar" for name in names], tmp_path)
    (source,) = yaml.safe_load(text)
    assert len(source["data_path"]) == 9
    paths = [path for pattern in source["data_path"] for path in expand_braces(str(tmp_path / pattern))]
    assert paths == [str(folder / f"{name}.tar") for name in names]


def test_every_source_names_its_files_address_license_and_size() -> None:
    for source in SOURCES.values():
        assert source.address.startswith("https://")
        assert all((source.license, source.size, source.files, source.images, source.stages))
    folder = OfficialFolder(Path("nowhere"), "https://example.org")
    with pytest.raises(YiVLError, match=r"^nowhere/x\.json: no such file; download and unpack x\.json of https"):
        folder.json("x.json")


def test_the_documentation_lists_every_source_as_the_catalog_does() -> None:
    text = (ROOT / "docs/pretraining-data.md").read_text(encoding="utf-8")
    for name, source in SOURCES.items():
        cells = [source.stages, f"[{source.title}]({source.address})", source.license, source.size, f"`{name}`"]
        assert f"| {' | '.join([*cells, source.files, source.images])} |" in text
