"""Files of the world for training and evaluation: caption shards, dialogue rows, evaluation sets."""

import io
import json
import multiprocessing
import random
import tarfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from yivl.checkpoint.atomic import atomic_file, write_text
from yivl.constants import DEFAULT_IMAGE_TOKEN
from yivl.tiny.world.evaluation_set import EVALUATED_KINDS, balanced_questions
from yivl.tiny.world.language import caption, detail, dialogue, json_answer, paraphrase
from yivl.tiny.world.rendering import render
from yivl.tiny.world.scenes import Scene, Split, sample_scene
from yivl.tiny.world.words import LANGUAGES, Language

_SHARD_SIZE: Final = 1000  # samples per tar file


def write_captions(folder: Path, numbers: range, side: int) -> None:
    """Write tar shards in the format of img2dataset: ``jpg``, ``txt`` and ``json`` of each scene."""
    starts = range(0, len(numbers), _SHARD_SIZE)
    shards = [(folder / f"{i:05d}.tar", numbers[start : start + _SHARD_SIZE]) for i, start in enumerate(starts)]
    _map(partial(_write_shard, side=side), shards, "shards")


def write_dialogues(folder: Path, numbers: range, side: int, *, as_json: bool) -> None:
    """Write ``rows.json`` in the format of LLaVA, and its images."""
    (folder / "images").mkdir(exist_ok=True)
    rows = _map(partial(_write_dialogue, folder=folder, side=side, as_json=as_json), numbers, "dialogues")
    _write_rows(folder, rows)


def write_evaluation_set(folder: Path, split: Split, number: int, side: int) -> None:
    """Write ``rows.json`` of single questions, ``number`` of each kind in each language, and its images."""
    (folder / "images").mkdir(exist_ok=True)
    groups = [(kind, language) for kind in EVALUATED_KINDS for language in LANGUAGES]
    write = partial(_write_group, folder=folder, split=split, number=number, side=side)
    _write_rows(folder, [row for rows in _map(write, groups, "groups") for row in rows])


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
                entry = tarfile.TarInfo(f"{number:09d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def _write_dialogue(number: int, folder: Path, side: int, *, as_json: bool) -> dict[str, Any]:
    rng = random.Random(f"dialogues {number}")
    scene = sample_scene("train", number)
    language = rng.choice(LANGUAGES)
    if as_json:
        pairs = [json_answer(scene, language)]
    else:
        pairs = [(paraphrase(one.text, rng), one.answer) for one in dialogue(scene, language, rng)]
    return _write_row(folder, f"{number:09d}", scene, side, pairs)


def _write_group(group: tuple[Any, Language], folder: Path, split: Split, number: int, side: int) -> list[Any]:
    kind, language = group
    rows = []
    for index, (scene, question) in enumerate(balanced_questions(split, kind, language, number)):
        name = f"{split}-{kind}-{language}-{index:04d}"
        row = _write_row(folder, name, scene, side, [(question.text, question.answer)])
        rows.append(row | {"split": split, "kind": kind, "language": language})
    return rows


def _write_row(folder: Path, name: str, scene: Scene, side: int, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Write the image and return the row of questions and answers about it."""
    image = f"images/{name}.jpg"
    (folder / image).write_bytes(_jpeg(scene, side))
    messages = []
    for index, (question, answer) in enumerate(pairs):
        text = question if index else f"{DEFAULT_IMAGE_TOKEN}\n{question}"
        messages += [{"from": "human", "value": text}, {"from": "assistant", "value": answer}]
    return {"id": name, "image": image, "conversations": messages}


def _jpeg(scene: Scene, side: int) -> bytes:
    buffer = io.BytesIO()
    render(scene, side).image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def _map(function: Callable[[Any], Any], items: Iterable[Any], unit: str) -> list[Any]:
    """Return the results in order; one process per core, with a progress bar."""
    items = list(items)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        results = pool.map(function, items, chunksize=max(1, min(64, len(items) // 64)))
        return list(tqdm(results, total=len(items), unit=f" {unit}", disable=None))


def _write_rows(folder: Path, rows: Sequence[Any]) -> None:
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write_text(folder / "rows.json", f"[\n{lines}\n]\n")
