"""Official files of every published source, with a few records each in its schema, and their images."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from support.training import write_shards

URL = "https://cs.stanford.edu/people/rak248"


def _llava(image: str, question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": image, "image": image, "conversations": turns}


def official_files(number: int) -> dict[str, Mapping[str, Any]]:
    """Return the files of every source with ``number`` records: name to text, or to a value that is written as JSON."""
    numbers = range(1, number + 1)
    coco = [f"COCO_train2014_{n:012d}.jpg" for n in numbers]
    chat = [_llava(f"GCC_train_{n:09d}.jpg", "What is it?", f"Sign {n}.") for n in numbers]
    instruct = [_llava(f"{n:012d}.jpg", "图里有什么？", f"{n}只猫。") for n in numbers]
    return {
        "cllava": {
            "LLaVA-CC3M-Pretrain-595K/chat-translated.json": chat,
            "LLaVA-Instruct-150K/translated/llava_instruct_150k.json": instruct,
        },
        "llavar": {"chat_llavar.json": chat, "llava_instruct_150k_llavar_20k.json": instruct},
        "flickr30k": {"results_20130124.token": "".join(f"{n}.jpg#0\tA dog {n} .\n" for n in numbers)},
        "vqav2": {
            "v2_OpenEnded_mscoco_train2014_questions.json": {
                "questions": [{"image_id": n, "question": "Red?", "question_id": n * 1000} for n in numbers]
            },
            "v2_mscoco_train2014_annotations.json": {
                "annotations": [{"question_id": n * 1000, "multiple_choice_answer": "no"} for n in numbers]
            },
        },
        "refcoco": {
            "refs(unc).json": [{"ann_id": n, "split": "train", "sentences": [{"sent": f"cat {n}"}]} for n in numbers],
            "instances.json": {
                "images": [{"id": n, "file_name": coco[n - 1], "width": 40, "height": 30} for n in numbers],
                "annotations": [{"id": n, "image_id": n, "bbox": [4.0, 3.0, 20.0, 15.0]} for n in numbers],
            },
        },
        "visual7w": {
            "dataset_v7w_telling.json": {
                "images": [
                    {
                        "split": "train",
                        "filename": f"v7w_{n}.jpg",
                        "qa_pairs": [
                            {"qa_id": n, "question": "When?", "answer": "Now.", "multiple_choices": ["1", "2", "3"]}
                        ],
                    }
                    for n in numbers
                ]
            }
        },
        "gqa": {
            "train_balanced_questions.json": {
                str(n): {"imageId": str(n), "question": "Dark?", "answer": "yes"} for n in numbers
            }
        },
        "vizwiz": {
            "train.json": [
                {"image": f"VizWiz_train_{n:08d}.jpg", "question": "What?", "answers": [{"answer": "tea"}]}
                for n in numbers
            ]
        },
        "textcaps": {
            "TextCaps_0.1_train.json": {"data": [{"image_id": f"{n:016x}", "caption_str": "A shelf"} for n in numbers]}
        },
        "ocrvqa": {
            "dataset.json": {
                str(n): {"imageURL": "http://x/1.jpg", "split": 1, "questions": ["Who?"], "answers": ["A"]}
                for n in numbers
            }
        },
        "visual-genome": {
            "image_data.json": [
                {"image_id": n, "url": f"{URL}/VG_100K/{n}.jpg", "width": 40, "height": 30} for n in numbers
            ],
            "question_answers.json": [
                {"id": n, "qas": [{"image_id": n, "question": "Color?", "answer": "Red."}]} for n in numbers
            ],
            "region_descriptions.json": [
                {"id": n, "regions": [{"image_id": n, "x": 1, "y": 2, "width": 3, "height": 4, "phrase": "a clock"}]}
                for n in numbers
            ],
        },
        "laion-gpt4v": {
            f"00000/{n:09d}.json": {"key": f"{n:09d}", "status": "success", "caption": "A long text."} for n in numbers
        },
        "sharegpt4v": {
            "sharegpt4v_instruct_gpt4-vision_cap100k.json": [
                _llava(f"coco/train2017/{n:012d}.jpg", "What do you see?", "A meal.") for n in numbers
            ]
        },
    }


def official_sft_files(number: int) -> dict[str, Mapping[str, Any]]:
    """Return the files of the sources of InternVL-Chat-V1-2's fine-tuning that are not in ``official_files``."""
    numbers = range(1, number + 1)
    text_only = {"id": "t", "conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]}
    pictured = [_llava(f"coco/train2017/{n:012d}.jpg", "What is it?", "A sign.") for n in numbers]
    return {
        "llava-zh": {"llava_instruct_150k_zh.json": [_llava(f"{n:012d}.jpg", "图里有什么？", "猫。") for n in numbers]},
        "mix665k": {"sharegpt4v_mix665k_cap23k_coco-ap9k_lcs3k_sam9k_div2k.json": [text_only, *pictured[1:]]},
        "dvqa": {
            "train_qa.json": [
                {"image": f"bar_train_{n:08d}.png", "question": "How many bars?", "answer": "two", "question_id": n}
                for n in numbers
            ]
        },
        "chartqa": {
            "train/train_human.json": [{"imgname": f"{n}.png", "query": "Value?", "label": "5"} for n in numbers],
            "train/train_augmented.json": [{"imgname": f"{n}.png", "query": "Year?", "label": "2019"} for n in numbers],
        },
        "ai2d": {"ai2d_test_ids.csv": "9\n"}
        | {
            f"questions/{n}.png.json": {
                "imageName": f"{n}.png",
                "questions": {
                    "What eats?": {"abcLabel": False, "answerTexts": ["a", "b", "c", "d"], "correctAnswer": 3}
                },
            }
            for n in numbers
        },
        "docvqa": {
            "train_v1.0.json": {
                "data": [
                    {"image": f"documents/x_{n}.png", "question": "Date?", "answers": ["1 May", "May 1"]}
                    for n in numbers
                ]
            }
        },
        "synthdog-en": {
            "metadata.jsonl": "".join(
                json.dumps(
                    {"file_name": f"{n}.jpg", "ground_truth": json.dumps({"gt_parse": {"text_sequence": "A B"}})}
                )
                + "\n"
                for n in numbers
            )
        },
    }


def write_files(folder: Path, files: Mapping[str, Any]) -> Path:
    """Write files: text, or values as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), "utf-8")
    return folder


def write_published(folder: Path, number: int) -> None:
    """Write ``official/NAME`` of every source, ``data/images`` with their images, and the shards of LAION-400M."""
    for name, files in (official_files(number) | official_sft_files(number)).items():
        write_files(folder / "official" / name, files)
    problem = {"id": 1, "subject": "求角", "choices": ["1", "2", "3", "4"], "label": 0}
    problems = [problem | {"id": n} for n in range(1, number + 1)]
    (folder / "official/geoqa-plus").mkdir(parents=True)
    (folder / "official/geoqa-plus/Backtrans-train.pk").write_bytes(pickle.dumps(problems))
    write_shards(folder / "data/laion400m", num_shards=2, per_shard=number)
    write_files(folder / "data/laion400m", {f"{shard:05d}_stats.json": {"successes": number} for shard in range(2)})
    for n in range(1, number + 1):
        for name in (
            f"cc3m/GCC_train_{n:09d}.jpg",
            f"coco/train2017/{n:012d}.jpg",
            f"coco/train2014/COCO_train2014_{n:012d}.jpg",
            f"flickr30k/{n}.jpg",
            f"visual7w/v7w_{n}.jpg",
            f"gqa/{n}.jpg",
            f"vizwiz/train/VizWiz_train_{n:08d}.jpg",
            f"textcaps/train_images/{n:016x}.jpg",
            f"ocrvqa/{n}.jpg",
            f"visual-genome/VG_100K/{n}.jpg",
            f"laion-gpt4v/00000/{n:09d}.jpg",
            f"dvqa/images/bar_train_{n:08d}.png",
            f"chartqa/train/png/{n}.png",
            f"ai2d/images/{n}.png",
            f"docvqa/train/documents/x_{n}.png",
            f"geoqa+/images/{n}.png",
            f"synthdog-en/images/{n}.jpg",
        ):
            path = folder / "data/images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), (n * 40 % 256, 90, 30)).save(path)
