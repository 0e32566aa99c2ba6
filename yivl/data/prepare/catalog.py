"""The sources of Yi-VL's stages, in the order of its model card, and of InternVL-Chat-V1-2's fine-tuning (``SFT``).

Addresses are those of the card where it links the official place. Licenses are those stated there; read them, and those
of the images, before use. Sizes are those of the training split, in rows. "In InternVL's list" counts a file that was
made of the official ones: the converter may write another number, of DocVQA one row per page.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from yivl.data.prepare.captions import flickr30k, laion_gpt4v, textcaps
from yivl.data.prepare.dialogues import cllava, llava_zh, llavar, mix665k, sharegpt4v
from yivl.data.prepare.documents import ai2d, chartqa, docvqa, dvqa, geoqa_plus, synthdog_en
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
        "3, SFT",
        "https://huggingface.co/datasets/Lin-Chen/ShareGPT4V",
        "CC BY-NC 4.0",
        "102,025",
        "sharegpt4v_instruct_gpt4-vision_cap100k.json",
        "coco, sam, llava, web-celebrity, web-landmark, wikiart, share_textvqa, as the file names them",
        sharegpt4v,
    ),
    "llava-zh": PublishedSource(
        "LLaVA-ZH",
        "SFT",
        "https://huggingface.co/datasets/openbmb/llava_zh",
        "not stated",
        "157,712",
        "llava_instruct_150k_zh.json",
        "coco/train2017/*.jpg",
        llava_zh,
    ),
    "mix665k": PublishedSource(
        "ShareGPT4V mix665k",
        "SFT",
        "https://huggingface.co/datasets/Lin-Chen/ShareGPT4V",
        "CC BY-NC 4.0",
        "665,058",
        "sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json",
        "coco, gqa, ocr_vqa, textvqa, vg, llava, sam, share_textvqa, wikiart, web-*, as the file names them",
        mix665k,
    ),
    "dvqa": PublishedSource(
        "DVQA",
        "SFT",
        "https://github.com/kushalkafle/DVQA_dataset",
        "not looked up",
        "200,000",
        "train_qa.json",
        "dvqa/images/bar_train_*.png",
        dvqa,
    ),
    "chartqa": PublishedSource(
        "ChartQA",
        "SFT",
        "https://huggingface.co/datasets/ahmed-masry/ChartQA",
        "not looked up",
        "18,317",
        "train/train_human.json, train/train_augmented.json",
        "chartqa/train/png/*.png",
        chartqa,
    ),
    "ai2d": PublishedSource(
        "AI2D",
        "SFT",
        "https://allenai.org/data/diagrams",
        "not looked up",
        "12,413",
        "questions/*.json, ai2d_test_ids.csv",
        "ai2d/images/*.png, ai2d/abc_images/*.png",
        ai2d,
    ),
    "docvqa": PublishedSource(
        "DocVQA",
        "SFT",
        "https://www.docvqa.org/datasets",
        "not looked up",
        "10,211 in InternVL's list",
        "train_v1.0.json or train_v1.0_withQT.json",
        "docvqa/train/documents/*.png",
        docvqa,
    ),
    "geoqa-plus": PublishedSource(
        "GeoQA+",
        "SFT",
        "https://github.com/SCNU203/GeoQA-Plus",
        "not stated",
        "72,318 in InternVL's list",
        "Backtrans-train.pk",
        "geoqa+/images/ID.png",
        geoqa_plus,
    ),
    "synthdog-en": PublishedSource(
        "SynthDoG-EN",
        "SFT",
        "https://huggingface.co/datasets/naver-clova-ix/synthdog-en",
        "MIT (generator)",
        "29,765 in InternVL's list",
        "data/train-0000[0-4]-of-00084-*.parquet, or metadata.jsonl of the generator",
        "synthdog-en/images/*, written from Parquet if --source is data/images/synthdog-en",
        synthdog_en,
    ),
}
