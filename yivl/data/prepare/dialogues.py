"""Conversations that LLaVA's code reads: CLLaVA, LLaVAR, ShareGPT4V and its mix665k, LLaVA-ZH.

The fields are ``image`` and ``conversations`` (``from``, ``value``), as in haotian-liu/LLaVA, ``llava/train/train.py``.
The files name images of CC3M (``GCC_train_*.jpg``) and COCO (``000000*.jpg``) without a folder; the images that LLaVAR
adds have names of the same form and belong into the same folders, as its README says.
"""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from yivl.data.prepare.records import DESCRIBE, DESCRIBE_ZH, BadRecords, OfficialFolder, dialogue


def cllava(folder: OfficialFolder, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yield the Chinese captions of LLaVA-CC3M-Pretrain-595K and conversations of LLaVA-Instruct-150K.

    The file ``llava_instruct_80k.json`` beside the second repeats a part of it and is not read.
    """
    yield from _dialogues(folder, "LLaVA-CC3M-Pretrain-595K/chat-translated.json", "cc3m", bad, DESCRIBE_ZH)
    instruct = "LLaVA-Instruct-150K/translated/llava_instruct_150k.json"
    yield from _dialogues(folder, instruct, "coco/train2017", bad, DESCRIBE_ZH)


def llavar(folder: OfficialFolder, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yield the pretraining and the fine-tuning instructions; both contain those of LLaVA."""
    yield from _dialogues(folder, "chat_llavar.json", "cc3m", bad, DESCRIBE)
    yield from _dialogues(folder, "llava_instruct_150k_llavar_20k.json", "coco/train2017", bad, DESCRIBE)


def sharegpt4v(folder: OfficialFolder, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yield the captions by GPT-4V; their paths (``coco/train2017/...``, ``sam/images/...``) are kept."""
    yield from _dialogues(folder, "sharegpt4v_instruct_gpt4-vision_cap100k.json", "", bad, DESCRIBE)


def mix665k(folder: OfficialFolder, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yield LLaVA-1.5's mixture with the captions of ShareGPT4V; its paths are kept, and rows without an image too."""
    name = "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json"
    yield from _dialogues(folder, name, "", bad, DESCRIBE, needs_image=False)


def llava_zh(folder: OfficialFolder, bad: BadRecords) -> Iterator[dict[str, Any]]:
    """Yield LLaVA-Instruct-150K in the Chinese translation of OpenBMB."""
    yield from _dialogues(folder, "llava_instruct_150k_zh.json", "coco/train2017", bad, DESCRIBE_ZH)


def _dialogues(
    folder: OfficialFolder,
    name: str,
    image_folder: str,
    bad: BadRecords,
    empty_question: str,
    *,
    needs_image: bool = True,
) -> Iterator[dict[str, Any]]:
    for index, record in enumerate(folder.json(name)):
        with bad.skip(f"{name} record {index}"):
            is_text = not needs_image and "image" not in record
            image = None if is_text else str(PurePosixPath(image_folder, record["image"]))
            yield dialogue(image, record["conversations"], empty_question=empty_question)
