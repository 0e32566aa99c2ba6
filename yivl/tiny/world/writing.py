"""The world as files for training: tar shards of captions, rows of conversations, examinations."""

import io
import json
import multiprocessing
import random
import tarfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from yivl.checkpoint.atomic import atomic_file, write_text
from yivl.constants import DEFAULT_IMAGE_TOKEN
from yivl.tiny.world.drawing import draw
from yivl.tiny.world.exam import EXAM_KINDS, Task, examine
from yivl.tiny.world.language import caption, casually, conversation, detail, json_answer
from yivl.tiny.world.scenes import Scene, Split, sample_scene
from yivl.tiny.world.words import LANGUAGES

_ROWS_OF_SHARD: Final = 1000
_QUESTIONS: Final = 8


def captions(folder: Path, numbers: range, side: int) -> None:
    """Write tar shards in the form of img2dataset: ``jpg``, ``txt`` and ``json`` of each scene."""
    starts = range(0, len(numbers), _ROWS_OF_SHARD)
    shards = [(folder / f"{i:05d}.tar", numbers[start : start + _ROWS_OF_SHARD]) for i, start in enumerate(starts)]
    _work(partial(_write_shard, side=side), shards, "shards")


def dialogues(folder: Path, numbers: range, side: int, *, as_json: bool) -> None:
    """Write ``rows.json`` in the published form, and its pictures beside it."""
    (folder / "images").mkdir(exist_ok=True)
    rows = _work(partial(_write_dialogue, folder=folder, side=side, as_json=as_json), numbers, "dialogues")
    _write_json(folder / "rows.json", rows)


def examination(folder: Path, split: Split, number: int, side: int) -> None:
    """Write ``rows.json`` of single questions, ``number`` of each kind in each language."""
    (folder / "images").mkdir(exist_ok=True)
    groups = [(split, kind, language, number) for kind in EXAM_KINDS for language in LANGUAGES]
    rows = _work(partial(_write_exam, folder=folder, side=side), groups, "kinds")
    _write_json(folder / "rows.json", [row for group in rows for row in group])


def _write_shard(shard: tuple[Path, range], side: int) -> None:
    path, numbers = shard
    with atomic_file(path) as partial_path, tarfile.open(partial_path, "w") as tar:
        for number in numbers:
            rng = random.Random(f"captions {number}")
            scene = sample_scene("train", number)
            language = rng.choice(LANGUAGES)
            text = (detail if rng.random() < 0.5 else caption)(scene, language)
            files = {
                "jpg": _jpeg(scene, side),
                "txt": text.encode(),
                "json": json.dumps({"caption": text, "language": language}, ensure_ascii=False).encode(),
            }
            for suffix, content in files.items():
                entry_of = tarfile.TarInfo(f"{number:09d}.{suffix}")
                entry_of.size = len(content)
                tar.addfile(entry_of, io.BytesIO(content))


def _write_dialogue(number: int, folder: Path, side: int, *, as_json: bool) -> dict[str, Any]:
    rng = random.Random(f"dialogues {number}")
    scene = sample_scene("train", number)
    language = rng.choice(LANGUAGES)
    if as_json:
        pairs = [json_answer(scene, language)]
    else:
        asked = conversation(scene, language, rng, _QUESTIONS)
        pairs = [(casually(one.text, rng), one.answer) for one in asked]
    name = f"images/{number:09d}.jpg"
    (folder / name).write_bytes(_jpeg(scene, side))
    return {"id": f"{number:09d}", "image": name, "conversations": _messages(pairs)}


def _write_exam(group: tuple[Any, ...], folder: Path, side: int) -> list[dict[str, Any]]:
    split, kind, language, number = group
    rows = []
    for index, task in enumerate(examine(split, kind, language, number)):
        name = f"{split}-{kind}-{language}-{index:04d}"
        (folder / "images" / f"{name}.jpg").write_bytes(_jpeg(task.scene, side))
        rows.append(exam_row(task, name, f"images/{name}.jpg") | {"split": split, "kind": kind, "language": language})
    return rows


def exam_row(task: Task, name: str, image: str) -> dict[str, Any]:
    """Return one question in the published form."""
    pairs = [(task.question.text, task.question.answer)]
    return {"id": name, "image": image, "conversations": _messages(pairs)}


def _messages(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    messages = []
    for index, (question, answer) in enumerate(pairs):
        text = question if index else f"{DEFAULT_IMAGE_TOKEN}\n{question}"
        messages += [{"from": "human", "value": text}, {"from": "assistant", "value": answer}]
    return messages


def _jpeg(scene: Scene, side: int) -> bytes:
    buffer = io.BytesIO()
    draw(scene, side).image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def _work(task: Any, items: Iterable[Any], unit: str) -> list[Any]:
    """Return the results of a task for all items, in order, with progress; one process per core."""
    items = list(items)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        results = pool.map(task, items, chunksize=max(1, min(64, len(items) // 64)))
        return list(tqdm(results, total=len(items), unit=f" {unit}", disable=None))


def _write_json(path: Path, rows: Sequence[Any]) -> None:
    write_text(path, "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")
