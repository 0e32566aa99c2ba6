"""Short questions and answers: VQAv2, GQA, VizWiz, OCR-VQA, Visual7W. One row per question, as the card counts pairs.

Field names are those of the official files, described at their addresses (``catalog``) and read alike by public
loaders: VQAv2 by GT-Vision-Lab/VQA, VizWiz by its fork of it, GQA by salesforce/LAVIS and open-mmlab/mmpretrain,
OCR-VQA by its own ``loadDataset.py``, Visual7W by yukezhu/visual7w-toolkit.
"""

import os
import random
from collections.abc import Iterator
from typing import Any

from yivl.data.prepare.records import (
    OPTION_LETTER,
    SHORT_ANSWER,
    UNANSWERABLE,
    BadRecords,
    OfficialFolder,
    ask,
    majority,
    with_options,
)


def vqav2(folder: OfficialFolder, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yield the training questions with ``multiple_choice_answer``, the most frequent of the ten answers."""
    annotations = folder.json("v2_mscoco_train2014_annotations.json")["annotations"]
    answers = {annotation["question_id"]: annotation["multiple_choice_answer"] for annotation in annotations}
    for index, record in enumerate(folder.json("v2_OpenEnded_mscoco_train2014_questions.json")["questions"]):
        with bad.skip(f"question {index}"):
            image = f"coco/train2014/COCO_train2014_{record['image_id']:012d}.jpg"
            yield ask(image, record["question"] + SHORT_ANSWER, answers[record["question_id"]])


def gqa(folder: OfficialFolder, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yield the balanced training questions with ``answer``, the short one."""
    for name, record in folder.json("train_balanced_questions.json").items():
        with bad.skip(f"question {name}"):
            yield ask(f"gqa/{record['imageId']}.jpg", record["question"] + SHORT_ANSWER, record["answer"])


def vizwiz(folder: OfficialFolder, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yield the training questions with the most frequent of the ten answers, which may be ``Unanswerable``."""
    for index, record in enumerate(folder.json("train.json")):
        with bad.skip(f"question {index}"):
            answer = majority([answer["answer"] for answer in record["answers"]])
            if answer.lower() in ("unanswerable", "unsuitable", "unsuitable image"):
                answer = "Unanswerable"
            question = record["question"] + UNANSWERABLE + SHORT_ANSWER
            yield ask(f"vizwiz/train/{record['image']}", question, answer)


def ocrvqa(folder: OfficialFolder, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yield the training questions (``split`` 1) about book covers.

    The official downloader names an image by the key of its record and the suffix of ``imageURL``.
    """
    for name, record in folder.json("dataset.json").items():
        with bad.skip(f"book {name}"):
            if record["split"] != 1:
                continue
            image = f"ocrvqa/{name}{os.path.splitext(record['imageURL'])[1]}"
            for question, answer in zip(record["questions"], record["answers"], strict=True):
                with bad.skip(f"book {name}"):
                    yield ask(image, question + SHORT_ANSWER, answer)


def visual7w(folder: OfficialFolder, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yield the training questions of the telling task; ``qa_id`` determines the order of the four options."""
    for index, record in enumerate(folder.json("dataset_v7w_telling.json")["images"]):
        with bad.skip(f"image {index}"):
            if record["split"] != "train":
                continue
            for pair in record["qa_pairs"]:
                with bad.skip(f"image {index}"):
                    options = [pair["answer"], *pair["multiple_choices"]]
                    random.Random(pair["qa_id"]).shuffle(options)
                    question, letter = with_options(pair["question"], options, options.index(pair["answer"]))
                    yield ask(f"visual7w/{record['filename']}", question + OPTION_LETTER, letter)
