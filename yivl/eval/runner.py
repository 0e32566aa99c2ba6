"""Answers to many questions: in batches, shared among processes, kept as they come so that a killed run goes on."""

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from torch import distributed
from tqdm import tqdm

from yivl.checkpoint.atomic import atomic_file, write_json
from yivl.checkpoint.loading import LoadedModel
from yivl.errors import ContextLengthError, ImageError, YiVLError
from yivl.eval.benchmarks.questions import Question, file_key
from yivl.inference.chat import Chat, GenerationState, ImageInput
from yivl.inference.engine import finish_together

logger = logging.getLogger(__name__)

_SETTINGS: Final = "settings.json"
_CHANGED: Final = {
    "questions": "to other questions or about other pictures",
    "data_files": "to questions of other files",
    "model_files": "of other files of the model",
}
# What loading reads; not logs, cards and answers, which may lie beside it.
_READ: Final = ("*.safetensors", "*.bin", "tokenizer*", "*_tokens*.json", "*config.json")
_MOMENT: Final = 30  # seconds, in which the first process ends and its launcher ends the others
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
    begun: list[Any] = [_start(folder, settings) if rank == 0 else None]
    if world > 1:
        try:
            distributed.broadcast_object_list(begun)  # all share out the same rest
            distributed.barrier()
        except RuntimeError:
            if rank == 0:
                raise
            leave_after_the_first()  # which has left already
    known, problem = begun[0]
    _stop_at(problem, rank)
    left = [question for question in questions if question.id not in known]
    left.sort(key=lambda question: -len(question.prompt))  # little padding, and what is too long comes first
    new, problem = _answer(load, left[rank::world], folder / f"responses-{rank:05d}.jsonl", batch_size, max_new_tokens)
    parts: list[Any] = [(new, problem)]
    if world > 1:
        parts = [None] * world
        distributed.gather_object((new, problem), parts if rank == 0 else None)
        distributed.destroy_process_group()
        if rank > 0:
            return None
    _stop_at(next((problem for _, problem in parts if problem), None), rank)
    answers = {id: text for part in [known, *(new for new, _ in parts)] for id, text in part.items()}
    return {question.id: answers[question.id] for question in questions}


def _stop_at(problem: str | None, rank: int) -> None:
    """Raise a problem in the first process, which says it; the others leave without a word."""
    if problem is not None:
        if rank > 0:
            leave_after_the_first()
        raise YiVLError(problem)


def leave_after_the_first() -> NoReturn:
    """End this process with code 2, late: a launcher ends all at the first that fails, which is to say why."""
    time.sleep(_MOMENT)
    sys.exit(2)


def _answer(
    load: Callable[[], LoadedModel], questions: Sequence[Question], file: Path, batch_size: int, max_new_tokens: int
) -> tuple[dict[str, str], str | None]:
    """Answer one process's share, adding each batch to the file at once, up to a problem if there is one.

    The other processes go on then: what they answer need not be asked again.
    """
    answers: dict[str, str] = {}
    if not questions:
        return answers, None
    loaded = load()
    every = 0.1 if sys.stderr.isatty() else 60  # seconds between two looks at the bar; a log has a line of each
    is_first, is_alone = os.environ.get("RANK", "0") == "0", os.environ.get("WORLD_SIZE", "1") == "1"
    with (
        file.open("a", encoding="utf-8") as out,
        tqdm(total=len(questions), desc="questions", disable=not is_first, mininterval=every) as bar,
    ):
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            try:
                replies = [_begin(loaded, question, max_new_tokens) for question in batch]
            except YiVLError as error:
                if not is_alone:
                    logger.warning("%s; the other processes go on", error)
                return answers, str(error)
            for question, text in zip(batch, finish_together(loaded, replies), strict=True):
                answers[question.id] = text.strip()
                out.write(json.dumps({"id": question.id, "response": text.strip()}, ensure_ascii=False) + "\n")
            out.flush()
            bar.update(len(batch))
    return answers, None


def _begin(loaded: LoadedModel, question: Question, max_new_tokens: int) -> GenerationState:
    """Return the reply to a question; one that cannot be asked is named."""
    try:
        if question.is_blank:
            size = loaded.model.config.vision_config.image_size
            picture: ImageInput | None = torch.zeros(3, size, size)
        else:
            picture = question.picture()
        return Chat(loaded).begin(question.prompt, picture, temperature=0, max_new_tokens=max_new_tokens)
    except (ImageError, ContextLengthError) as error:
        raise YiVLError(f"question {question.id}: {error}") from error


def _start(folder: Path, settings: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    """Return the answers of an earlier run, or begin a new one; or what speaks against both."""
    if folder.exists() and not folder.is_dir():
        return {}, f"{folder}: is a file; give a folder to --output"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _SETTINGS
    if not path.is_file() and any(folder.iterdir()):
        return {}, f"{folder}: holds something else; give an empty or new folder to --output"
    answers = _kept(folder)
    if not answers:  # what failed before its first answer binds nobody
        write_json(path, settings, sort_keys=False)
        return {}, None
    earlier = json.loads(path.read_text(encoding="utf-8"))
    for key, value in settings.items():
        if earlier.get(key) != value:
            changed = _CHANGED.get(key, f"with {key}={earlier.get(key)!r}, now {value!r}")
            return {}, f"{folder}: holds answers {changed}; give another --output"
    return answers, None


def _kept(folder: Path) -> dict[str, str]:
    answers: dict[str, str] = {}
    for file in sorted(folder.glob("responses-*.jsonl")):
        data = file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:  # cut off in the middle of its last line, perhaps of a character: asked again
            with atomic_file(file) as partial:
                partial.write_bytes(whole)
        answers |= {fields["id"]: fields["response"] for fields in map(json.loads, whole.split(b"\n")[:-1])}
    return answers


def fingerprint(questions: Sequence[Question], data: str, models: Sequence[str | None]) -> dict[str, str]:
    """Return what tells other questions, pictures or weights from these.

    Args:
        questions: By their ids, prompts and pictures.
        data: File or folder they come from; a hub id stands for itself.
        models: Checkpoint and adapter folders, by the files that loading reads; a hub id stands for itself.
    """
    asked = [[question.id, question.prompt, question.is_blank, question.picture_key] for question in questions]
    place = Path(data).expanduser()
    of_data = [place] if place.is_file() else [*place.rglob("*.parquet"), *place.rglob("*.arrow")]
    of_models = [
        path
        for model in models
        if model
        for folder in (Path(model).expanduser(), *Path(model).expanduser().glob("vit/*"))
        for path in folder.glob("*")
        if any(path.match(pattern) for pattern in _READ)
    ]
    facts = {
        "questions": asked,
        "data_files": sorted(map(file_key, of_data)),
        "model_files": sorted(map(file_key, of_models)),
    }
    return {name: hashlib.sha256(json.dumps(fact).encode()).hexdigest()[:16] for name, fact in facts.items()}
