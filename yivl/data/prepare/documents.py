"""Charts, diagrams, documents and geometry: DVQA, ChartQA, AI2D, DocVQA, GeoQA+, SynthDoG-EN.

Field names are those that public loaders read: DVQA ``train_qa.json`` (``image``, ``question``, ``answer``) by its
README; ChartQA ``train_human.json`` and ``train_augmented.json`` (``imgname``, ``query``, ``label``) by
vis-nlp/ChartQA; AI2D ``questions/*.json`` by google-research/pix2struct; DocVQA ``train_v1.0.json`` (``data``) by
facebookresearch/mmf; GeoQA+ pickles by SCNU203/GeoQA-Plus; SynthDoG ``ground_truth`` by clovaai/donut.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from yivl.checkpoint.atomic import atomic_file
from yivl.data.prepare.records import (
    OPTION_LETTER,
    OPTION_LETTER_ZH,
    SHORT_ANSWER,
    BadRecords,
    OfficialFolder,
    ask,
    with_options,
)
from yivl.errors import YiVLError

READ_TEXT: Final = "Read all text in this image."
"""Question about a synthetic document. Source: ours."""

Pair = tuple[str, str, str]
"""Image, question and answer."""


def dvqa(folder: OfficialFolder, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yield one row per bar chart of the training split, with all its questions."""
    yield from _by_image(_dvqa_pairs(folder, bad), bad)


def _dvqa_pairs(folder: OfficialFolder, bad: BadRecords) -> Iterator[Pair]:
    for index, record in enumerate(folder.json("train_qa.json")):
        with bad.skip(f"question {index}"):
            yield f"dvqa/images/{record['image']}", record["question"], record["answer"]


def chartqa(folder: OfficialFolder, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yield one row per chart of the training split: the questions of people, then those of a model."""
    yield from _by_image(_chartqa_pairs(folder, bad), bad)


def _chartqa_pairs(folder: OfficialFolder, bad: BadRecords) -> Iterator[Pair]:
    for name in ("train/train_human.json", "train/train_augmented.json"):
        for index, record in enumerate(folder.json(name)):
            with bad.skip(f"{name} question {index}"):
                yield f"chartqa/train/png/{record['imgname']}", record["query"], record["label"]


def docvqa(folder: OfficialFolder, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yield one row per page of the training split, with the first of the answers to each question."""
    yield from _by_image(_docvqa_pairs(folder, bad), bad)


def _docvqa_pairs(folder: OfficialFolder, bad: BadRecords) -> Iterator[Pair]:
    name = "train_v1.0_withQT.json" if folder.has("train_v1.0_withQT.json") else "train_v1.0.json"
    for index, record in enumerate(folder.json(name)["data"]):
        with bad.skip(f"question {index}"):
            yield f"docvqa/train/{record['image']}", record["question"], record["answers"][0]


def ai2d(folder: OfficialFolder, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yield one row per question about a diagram that is not one of the test images.

    Questions about the letters of a diagram (``abcLabel``) belong to the image with letters, in ``abc_images``.
    """
    test_images = {line.strip() for line in folder.lines("ai2d_test_ids.csv")}
    for path in sorted(folder.path.glob("questions/*.json"), key=lambda path: (len(path.name), path.name)):
        if path.name.split(".")[0] in test_images:
            continue
        record = folder.json(f"questions/{path.name}")
        with bad.skip(path.name):
            for question, fields in record["questions"].items():
                with bad.skip(path.name):
                    image = f"ai2d/{'abc_images' if fields['abcLabel'] else 'images'}/{record['imageName']}"
                    text, letter = with_options(question, fields["answerTexts"], fields["correctAnswer"])
                    yield ask(image, text + OPTION_LETTER, letter)


def geoqa_plus(folder: OfficialFolder, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yield one row per problem of the augmented training set, in Chinese; the images in the pickle are not read."""
    for index, record in enumerate(folder.pickle("Backtrans-train.pk")):
        with bad.skip(f"problem {index}"):
            text, letter = with_options(record["subject"], record["choices"], record["label"])
            yield ask(f"geoqa+/images/{record['id']}.png", text + OPTION_LETTER_ZH, letter)


def synthdog_en(folder: OfficialFolder, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yield one row per synthetic document, with its text as the answer.

    The images of Parquet files are written to ``images`` below the folder.
    """
    for name, place, text in _synthdog_records(folder, bad):
        with bad.skip(place):
            yield ask(f"synthdog-en/images/{name}", READ_TEXT, json.loads(text)["gt_parse"]["text_sequence"])


def _synthdog_records(folder: OfficialFolder, bad: BadRecords) -> Iterator[Pair]:
    """Yield the name of the image, the place of the record and its ground truth."""
    paths = sorted(folder.path.glob("data/train-*.parquet"))
    if not paths:
        for number, line in enumerate(folder.lines("metadata.jsonl"), 1):
            with bad.skip(f"metadata.jsonl line {number}"):
                record = json.loads(line)
                yield record["file_name"], f"metadata.jsonl line {number}", record["ground_truth"]
        return
    for path in paths:
        for index, record in enumerate(_parquet_rows(path)):
            place = f"{path.name} row {index}"
            with bad.skip(place):
                content = record["image"]["bytes"]
                suffix = "png" if content.startswith(b"\x89PNG") else "jpg"
                name = f"{path.name.split('-')[1]}_{index:05d}.{suffix}"
                target = folder.path / "images" / name
                if not target.is_file():
                    target.parent.mkdir(exist_ok=True)
                    with atomic_file(target) as partial:
                        partial.write_bytes(content)
                yield name, place, record["ground_truth"]


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64, columns=["image", "ground_truth"]):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise YiVLError(f"{path}: not a readable Parquet file ({reason}); download it again") from error


def _by_image(pairs: Iterable[Pair], bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yield one row per image with all questions about it; the first one asks for short answers."""
    grouped: dict[str, list[tuple[str, str]]] = {}
    for image, question, answer in pairs:
        grouped.setdefault(image, []).append((question, answer))
    for image, found in grouped.items():
        with bad.skip(image):
            (question, answer), *others = found
            yield ask(image, question + SHORT_ANSWER, answer, *others)
