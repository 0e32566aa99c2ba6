"""The sources that the Yi-VL model card and the technical report name, in the order of the card.

Addresses are those of the card where it links the official place. Licenses are those stated there; read them, and those
of the images, before use. Sizes are those of the training split, in rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from yivl.data.prepare.captions import flickr30k, laion_gpt4v, textcaps
from yivl.data.prepare.dialogues import cllava, llavar, sharegpt4v
from yivl.data.prepare.questions import gqa, ocrvqa, visual7w, vizwiz, vqav2
from yivl.data.prepare.records import BadRecords, OfficialFolder
from yivl.data.prepare.regions import refcoco, visual_genome


@dataclass(frozen=True)
class PublishedSource:
    """A published data set."""

    title: str
    stages: str
    address: str
    license: str
    size: str
    files: str
    """What ``--source`` must hold."""
    images: str
    """Where its images belong below the image folder."""
    rows: Callable[[OfficialFolder, BadRecords], Iterator[dict[str, Any]]] | None
    """Yields the rows; ``None`` for tar shards."""


_COCO_2014: Final = "coco/train2014/COCO_train2014_*.jpg"
_LLAVA_IMAGES: Final = "cc3m/GCC_train_*.jpg, coco/train2017/*.jpg"

SOURCES: Final = {
    "laion400m": PublishedSource(
        "LAION-400M",
        "1, 2",
        "https://laion.ai/blog/laion-400-open-dataset/",
        "CC BY 4.0 (metadata)",
        "400 M pairs",
        "00000.tar and 00000_stats.json of img2dataset",
        "in the shards",
        None,
    ),
    "cllava": PublishedSource(
        "CLLaVA",
        "2",
        "https://huggingface.co/datasets/LinkSoul/Chinese-LLaVA-Vision-Instructions",
        "Apache 2.0",
        "about 750,000",
        "LLaVA-CC3M-Pretrain-595K/chat-translated.json, LLaVA-Instruct-150K/translated/llava_instruct_150k.json",
        _LLAVA_IMAGES,
        cllava,
    ),
    "llavar": PublishedSource(
        "LLaVAR",
        "2",
        "https://huggingface.co/datasets/SALT-NLP/LLaVAR",
        "CC BY-NC 4.0",
        "about 1.2 M",
        "chat_llavar.json, llava_instruct_150k_llavar_20k.json",
        _LLAVA_IMAGES,
        llavar,
    ),
    "flickr30k": PublishedSource(
        "Flickr30k",
        "2",
        "https://shannon.cs.illinois.edu/DenotationGraph/",
        "non-commercial research; images: terms of Flickr",
        "158,915",
        "results_20130124.token, or results.csv of https://www.kaggle.com/datasets/hsankesara/flickr-image-dataset",
        "flickr30k/*.jpg",
        flickr30k,
    ),
    "vqav2": PublishedSource(
        "VQAv2",
        "2",
        "https://visualqa.org/download.html",
        "CC BY 4.0 (annotations)",
        "443,757",
        "v2_OpenEnded_mscoco_train2014_questions.json, v2_mscoco_train2014_annotations.json",
        _COCO_2014,
        vqav2,
    ),
    "refcoco": PublishedSource(
        "RefCOCO",
        "2",
        "https://github.com/lichengunc/refer",
        "not stated (code: Apache 2.0)",
        "120,624",
        "refs(unc).p (or the same list as refs(unc).json), instances.json",
        _COCO_2014,
        refcoco,
    ),
    "visual7w": PublishedSource(
        "Visual7W, telling",
        "2",
        "https://ai.stanford.edu/~yukez/visual7w/",
        "not stated (toolkit: MIT)",
        "69,817",
        "dataset_v7w_telling.json",
        "visual7w/v7w_*.jpg",
        visual7w,
    ),
    "gqa": PublishedSource(
        "GQA, balanced",
        "3",
        "https://cs.stanford.edu/people/dorarad/gqa/download.html",
        "CC BY 4.0",
        "943,000",
        "train_balanced_questions.json",
        "gqa/*.jpg",
        gqa,
    ),
    "vizwiz": PublishedSource(
        "VizWiz-VQA",
        "3",
        "https://vizwiz.org/tasks-and-datasets/vqa/",
        "CC BY 4.0",
        "20,523",
        "train.json",
        "vizwiz/train/VizWiz_train_*.jpg",
        vizwiz,
    ),
    "textcaps": PublishedSource(
        "TextCaps",
        "3",
        "https://textvqa.org/textcaps/dataset/",
        "CC BY 4.0",
        "109,765",
        "TextCaps_0.1_train.json",
        "textcaps/train_images/*.jpg",
        textcaps,
    ),
    "ocrvqa": PublishedSource(
        "OCR-VQA",
        "3",
        "https://ocr-vqa.github.io/",
        "not stated",
        "about 800,000",
        "dataset.json",
        "ocrvqa/*.jpg",
        ocrvqa,
    ),
    "visual-genome": PublishedSource(
        "Visual Genome 1.2",
        "3",
        "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html",
        "CC BY 4.0",
        "about 7 M",
        "question_answers.json, region_descriptions.json, image_data.json",
        "visual-genome/VG_100K/*.jpg, visual-genome/VG_100K_2/*.jpg",
        visual_genome,
    ),
    "laion-gpt4v": PublishedSource(
        "LAION-GPT4V (model card)",
        "3",
        "https://huggingface.co/datasets/laion/gpt4v-dataset",
        "CC0 1.0 (captions)",
        "about 12,000",
        "00000/*.json of img2dataset",
        "laion-gpt4v/00000/*.jpg",
        laion_gpt4v,
    ),
    "sharegpt4v": PublishedSource(
        "ShareGPT4V (technical report)",
        "3",
        "https://huggingface.co/datasets/Lin-Chen/ShareGPT4V",
        "CC BY-NC 4.0",
        "102,025",
        "sharegpt4v_instruct_gpt4-vision_cap100k.json",
        "coco, sam, llava, web-celebrity, web-landmark, wikiart, share_textvqa, as the file names them",
        sharegpt4v,
    ),
}
