"""Answers to many questions: in batches, shared among processes, kept as they come so that a killed run goes on."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
from torch import distributed
from tqdm import tqdm

from yivl.batching import answer_batch
from yivl.errors import ImageError, YiVLError
from yivl.eval.questions import Question
from yivl.generation import Picture
from yivl.image_processing import load_image
from yivl.model.loading import LoadedModel

_SETTINGS: Final = "settings.json"
_PATIENCE: Final = timedelta(days=7)  # the fastest process waits for the slowest, for as long as its share takes


def answer_questions(
    load: Callable[[], LoadedModel],
    questions: Sequence[Question],
    folder: Path,
    settings: Mapping[str, Any],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, str] | None:
    """Return the greedy answer to each question, by its id; those that ``folder`` holds are not asked again.

    Under torchrun every process answers its share and the first one gets them all; ``folder`` is the same for all.

    Args:
        load: Loads the model, if anything is left to be asked.
        questions: With ids of their own.
        folder: Keeps ``settings.json``, and ``responses-*.jsonl`` of each process.
        settings: What the answers depend on; a folder with answers of others is refused.
        batch_size: Questions that are answered together.
        max_new_tokens: Length of an answer.

    Returns:
        Answers without outer whitespace, in the order of the questions; ``None`` in other processes than the first.

    Raises:
        YiVLError: If ids are not unique, or the folder holds answers of other settings.
    """
    if len({question.id for question in questions}) < len(questions):
        raise YiVLError("two questions have one id; ids tell them apart")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        distributed.init_process_group("gloo", timeout=_PATIENCE)
    known: list[Any] = [_start(folder, settings)] if rank == 0 else [None]
    if world > 1:
        distributed.broadcast_object_list(known)  # all share out the same rest
    left = [question for question in questions if question.id not in known[0]]
    left.sort(key=lambda question: len(question.prompt))  # little padding
    new = _answer(load, left[rank::world], folder / f"responses-{rank:05d}.jsonl", rank, batch_size, max_new_tokens)
    parts: list[Any] = [new]
    if world > 1:
        parts = [None] * world
        distributed.gather_object(new, parts if rank == 0 else None)
        distributed.destroy_process_group()
        if rank > 0:
            return None
    answers = {id: text for part in [*known, *parts] for id, text in part.items()}
    return {question.id: answers[question.id] for question in questions}


def _answer(
    load: Callable[[], LoadedModel],
    questions: Sequence[Question],
    file: Path,
    rank: int,
    batch_size: int,
    max_new_tokens: int,
) -> dict[str, str]:
    """Answer one process's share, adding each batch to the file at once."""
    answers: dict[str, str] = {}
    if not questions:
        return answers
    loaded = load()
    image_size = loaded.model.config.vision_config.image_size
    every = 0.1 if sys.stderr.isatty() else 60  # seconds between two looks at the bar; a log has a line of each
    with (
        file.open("a", encoding="utf-8") as out,
        tqdm(total=len(questions), desc="questions", disable=rank > 0, mininterval=every) as bar,
    ):
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            texts = answer_batch(
                loaded,
                [question.prompt for question in batch],
                [_picture(question, image_size) for question in batch],
                temperature=0,
                max_new_tokens=max_new_tokens,
            )
            for question, text in zip(batch, texts, strict=True):
                answers[question.id] = text.strip()
                out.write(json.dumps({"id": question.id, "response": text.strip()}, ensure_ascii=False) + "\n")
            out.flush()
            bar.update(len(batch))
    return answers


def _picture(question: Question, image_size: int) -> Picture | None:
    """Return the picture of a question; one that cannot be used is named by the question."""
    if question.is_blank:
        return torch.zeros(3, image_size, image_size)
    picture = question.picture()
    try:
        # A path is named by its own error.
        return load_image(picture) if isinstance(picture, bytes) else picture
    except ImageError as error:
        raise ImageError(f"question {question.id}: {error}") from error


def _start(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the answers of an earlier run, or begin a new one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _SETTINGS
    if not path.is_file():
        if any(folder.iterdir()):
            raise YiVLError(f"{folder}: holds something else; give an empty or new folder to --output")
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    for key, value in settings.items():
        if earlier.get(key) != value:
            raise YiVLError(
                f"{folder}: holds answers with {key}={earlier.get(key)!r}, now {value!r}; give another --output"
            )
    answers: dict[str, str] = {}
    for file in sorted(folder.glob("responses-*.jsonl")):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        if len(whole) < len(lines):  # cut off in the middle of its last line: asked again
            file.write_text("".join(whole), encoding="utf-8")
        answers |= {fields["id"]: fields["response"] for fields in map(json.loads, whole)}
    return answers


def fingerprint(questions: Sequence[Question], models: Sequence[str | None]) -> dict[str, str]:
    """Return what tells other questions, or files of another model at the same place, from these.

    Args:
        questions: By their ids and prompts.
        models: Checkpoint folders, by the names, sizes and times of their files; a hub id stands for itself.
    """
    asked = [[question.id, question.prompt, question.is_blank] for question in questions]
    files = [
        [os.fspath(path.relative_to(model)), path.stat().st_size, path.stat().st_mtime_ns]
        for model in models
        if model
        for path in sorted(Path(model).expanduser().rglob("*"))
        if path.is_file()
    ]
    return {
        name: hashlib.sha256(json.dumps(things).encode()).hexdigest()[:16]
        for name, things in (("questions", asked), ("model_files", files))
    }
