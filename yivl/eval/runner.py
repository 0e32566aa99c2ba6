"""Greedy responses to questions: batched, sharded across ranks, saved at once so that an interrupted run resumes."""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import distributed
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from yivl.checkpoint.atomic import atomic_file, write_json
from yivl.checkpoint.format import read_json
from yivl.checkpoint.loading import LoadedModel
from yivl.errors import ContextLengthError, ImageError, YiVLError
from yivl.eval.benchmarks.benchmark import Question, file_key
from yivl.files.validation import library_errors
from yivl.inference.chat import Chat, GenerationState
from yivl.inference.engine import finish_together

logger = logging.getLogger(__name__)
T = TypeVar("T")

_SETTINGS: Final = "settings.json"
_CHANGED: Final = {
    "questions": "to other questions or about other images",
    "data_files": "to questions of other files",
    "model_files": "of other files of the model",
}
# The files that loading reads, not logs, cards and reports beside them.
_MODEL_FILES: Final = ("*.safetensors", "*.bin", "tokenizer*", "*_tokens*.json", "*config.json")
_TIMEOUT: Final = timedelta(days=7)  # the fastest rank waits for the slowest
_FAILED: Final = "yivl.eval failed"


@dataclass(frozen=True)
class Ranks:
    """The processes of a run; a single process is rank 0 of 1."""

    rank: int = 0
    world_size: int = 1
    store: Store | None = None
    """Shared by the ranks; holds ``_FAILED`` after an error of one of them."""

    def have_failed(self) -> bool:
        """Return whether a rank raised a ``YiVLError``."""
        return self.store is not None and self.store.check([_FAILED])

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            distributed.all_gather_object(values, value)
        return values

    @contextmanager
    def agree(self) -> Iterator[None]:
        """Wait for all ranks at the end of the block; if one of them raises a ``YiVLError``, all do."""
        own: YiVLError | None = None
        try:
            yield
        except YiVLError as error:
            own = error
            if self.store is not None:
                self.store.set(_FAILED, "")
        if errors := [error for error in self.gather(own) if error is not None]:
            raise errors[0]


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the ranks that torchrun started; if all raise the same ``YiVLError``, rank 0 logs it and all exit with 2."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Ranks()
        return
    store, rank, world_size = next(rendezvous("env://", timeout=_TIMEOUT))
    ranks = Ranks(rank, world_size, store)
    # Gloo and not NCCL: only Python objects are exchanged, and ranks may share a GPU or have none.
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
    try:
        yield ranks
    except YiVLError as error:
        if rank == 0:
            logger.error("error: %s", " ".join(str(error).split()))
        distributed.barrier()  # the launcher kills all ranks when the first exits, which must not precede the message
        sys.exit(2)
    finally:
        distributed.destroy_process_group()


def answer_questions(
    load: Callable[[], LoadedModel],
    questions: Sequence[Question],
    folder: Path,
    settings: Mapping[str, Any],
    *,
    batch_size: int,
    max_new_tokens: int,
    ranks: Ranks = Ranks(),
) -> dict[str, str]:
    """Return the response to each question by its id; those that ``folder`` holds are not generated again.

    Responses are without outer whitespace, in the order of the questions, and the same on every rank.

    Args:
        load: Loads the model; called if anything is left to answer.
        questions: With unique ids.
        folder: The same for all ranks; holds ``settings.json``, and ``responses-*.jsonl`` of each rank.
        settings: What the responses depend on; a folder with other settings is refused.
        batch_size: Questions that are answered together.
        max_new_tokens: Of a response.
        ranks: Each answers its shard.

    Raises:
        YiVLError: If ids are not unique, the folder holds responses of other settings, or a question cannot be asked.
    """
    known: dict[str, str] = {}
    with ranks.agree():
        if len({question.id for question in questions}) < len(questions):
            raise YiVLError("two questions have the same id; ids must be unique")
        if ranks.rank == 0:
            known = _resume(folder, settings)
    known = ranks.gather(known)[0]
    left = [question for question in questions if question.id not in known]
    left.sort(key=lambda question: -len(question.prompt))  # little padding, and errors of length come first
    new: dict[str, str] = {}
    with ranks.agree():
        new = _answer(load, left[ranks.rank :: ranks.world_size], folder, batch_size, max_new_tokens, ranks)
    responses = {id: text for part in [known, *ranks.gather(new)] for id, text in part.items()}
    return {question.id: responses[question.id] for question in questions}


def _answer(
    load: Callable[[], LoadedModel],
    questions: Sequence[Question],
    folder: Path,
    batch_size: int,
    max_new_tokens: int,
    ranks: Ranks,
) -> dict[str, str]:
    """Return the responses of one rank; each batch is appended to its file at once."""
    responses: dict[str, str] = {}
    if not questions:
        return responses
    loaded = load()
    interval = 0.1 if sys.stderr.isatty() else 60  # seconds; a log gets a line for each update
    with (
        (folder / f"responses-{ranks.rank:05d}.jsonl").open("a", encoding="utf-8") as out,
        tqdm(total=len(questions), desc="questions", disable=ranks.rank > 0, mininterval=interval) as bar,
    ):
        for start in range(0, len(questions), batch_size):
            if ranks.have_failed():
                break
            batch = questions[start : start + batch_size]
            states = [_begin(loaded, question, max_new_tokens) for question in batch]
            for question, text in zip(batch, finish_together(loaded, states), strict=True):
                responses[question.id] = text.strip()
                out.write(json.dumps({"id": question.id, "response": text.strip()}, ensure_ascii=False) + "\n")
            out.flush()
            bar.update(len(batch))
    return responses


def _begin(loaded: LoadedModel, question: Question, max_new_tokens: int) -> GenerationState:
    size = loaded.model.config.vision_config.image_size
    try:
        image = torch.zeros(3, size, size) if question.is_blank else question.image()
        return Chat(loaded, system=question.system).begin(
            question.prompt, image, temperature=0, max_new_tokens=max_new_tokens
        )
    except (ImageError, ContextLengthError) as error:
        raise YiVLError(f"question {question.id}: {error}") from error


def _resume(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the responses of an interrupted run, or start a new one."""
    if folder.exists() and not folder.is_dir():
        raise YiVLError(f"{folder}: is a file; set --output to a folder")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _SETTINGS
    held = [file for file in folder.iterdir() if file.name != f".{_SETTINGS}.partial"]  # of a run that was killed
    if not path.is_file() and held:
        raise YiVLError(f"{folder}: holds other files; set --output to an empty or new folder")
    responses = _read_responses(folder)
    if not responses:  # a run that failed before its first response may start with other settings
        write_json(path, settings, sort_keys=False)
        return {}
    earlier = read_json(path)
    for key, value in settings.items():
        if earlier.get(key) != value:
            changed = _CHANGED.get(key, f"with {key}={earlier.get(key)!r}, now {value!r}")
            raise YiVLError(f"{folder}: holds responses {changed}; set another --output")
    return responses


def _read_responses(folder: Path) -> dict[str, str]:
    responses: dict[str, str] = {}
    for file in sorted(folder.glob("responses-*.jsonl")):
        data = file.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        if complete != data:  # the run was killed while it wrote the last line, perhaps inside a character
            with atomic_file(file) as partial:
                partial.write_bytes(complete)
        with library_errors(file):
            responses |= {fields["id"]: fields["response"] for fields in map(json.loads, complete.split(b"\n")[:-1])}
    return responses


def fingerprint(questions: Sequence[Question], data: str, models: Sequence[str | None]) -> dict[str, str]:
    """Return hashes that change with the questions and images, the files of ``data``, and the files of ``models``."""
    asked = [
        [question.id, question.prompt, question.is_blank, question.image_key]
        + [question.system] * (question.system is not None)
        for question in questions
    ]
    folder = Path(data).expanduser()
    data_files = [folder] if folder.is_file() else [*folder.rglob("*.parquet"), *folder.rglob("*.arrow")]
    folders = [Path(model).expanduser() for model in models if model]
    folders += [tower for folder in folders for tower in folder.glob("vit/*")]
    model_files = {path for folder in folders for pattern in _MODEL_FILES for path in folder.glob(pattern)}
    facts: dict[str, list[Any]] = {"questions": asked}
    facts |= {"data_files": sorted(map(file_key, data_files)), "model_files": sorted(map(file_key, model_files))}
    return {name: hashlib.sha256(json.dumps(fact).encode()).hexdigest()[:16] for name, fact in facts.items()}
