"""Captions: Flickr30k, TextCaps, LAION-GPT4V.

Flickr30k: the lines of the official ``results_20130124.token`` (``IMAGE#NUMBER``, tab, caption), or of ``results.csv``
of the Kaggle copy that the card links (columns image, number and caption, separated by ``|``; one line is broken).
TextCaps: ``TextCaps_0.1_train.json``, fields ``image_id`` and ``caption_str`` of each entry of ``data`` (one per
caption), as facebookresearch/mmf reads it.
LAION-GPT4V: the official file holds addresses of images only (``link``, ``caption``). Read are the ``.json`` files that
img2dataset writes beside the images it downloads (``key``, ``status``, ``caption``), as its README documents.
"""

import json
from collections.abc import Iterator
from typing import Any

from yivl.data.prepare.records import DESCRIBE, ONE_SENTENCE, BadRecords, OfficialFolder, ask, caption
from yivl.errors import YiVLError


def flickr30k(folder: OfficialFolder, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yield all captions, five per image; the official files have no split."""
    is_kaggle = folder.has("results.csv") and not folder.has("results_20130124.token")
    name = "results.csv" if is_kaggle else "results_20130124.token"
    for number, line in enumerate(folder.lines(name), 1):
        if is_kaggle and number == 1:  # column names
            continue
        with bad.skip(f"{name} line {number}"):
            if is_kaggle:
                image, _, text = line.split("|")
            else:
                image, text = line.split("\t")
            yield caption(f"flickr30k/{image.split('#')[0].strip()}", text)


def textcaps(folder: OfficialFolder, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yield the training captions as answers to a question, since stage 3 trains conversations."""
    for index, record in enumerate(folder.json("TextCaps_0.1_train.json")["data"]):
        with bad.skip(f"caption {index}"):
            yield ask(f"textcaps/train_images/{record['image_id']}.jpg", ONE_SENTENCE, record["caption_str"])


def laion_gpt4v(folder: OfficialFolder, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yield the captions of the downloaded images as answers to a question.

    Raises:
        YiVLError: If there is no folder of img2dataset.
    """
    paths = sorted(folder.path.glob("[0-9]*/*.json"))
    if not paths:
        raise YiVLError(
            f"{folder.path}: no 00000/*.json; download {folder.address} with img2dataset (docs/pretraining-data.md)"
        )
    for path in paths:
        place = f"{path.parent.name}/{path.name}"
        with bad.skip(place):
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["status"] != "success":
                bad.add(place, f"not downloaded ({record['status']})")
                continue
            yield ask(f"laion-gpt4v/{path.parent.name}/{record['key']}.jpg", DESCRIBE, record["caption"])
