"""What MMMU and CMMMU share: data sets of images and questions by domain and subject, and the parsing of responses."""

import argparse
import logging
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from yivl import command_line
from yivl.errors import YiVLError
from yivl.eval.benchmarks.benchmark import Question
from yivl.eval.report import Chart, Report, Table

logger = logging.getLogger(__name__)

NUM_QUESTIONS: Final = 900
"""Questions of the validation splits of both benchmarks. Source: their READMEs."""

FALLBACK_SEED: Final = 42
"""Of the random answers to responses that name no option; drawn in the order of the rows. Source: the official
evaluation programs of both benchmarks."""

_PUNCTUATION: Final = (",", ".", "!", "?", ";", ":", "'")

ReadImage = Callable[[str], "bytes | Path | None"]
"""Returns the image of a column."""


def add_flags(parser: argparse.ArgumentParser, data: str, splits: Sequence[str]) -> None:
    """Add the shared flags; the first of the splits is the default."""
    command_line.add_model_flags(parser, must_name_model=True)
    where = "folder of parquet files or of save_to_disk, or hub id (default: %(default)s)"
    parser.add_argument("--data", "--data_path", default=data, help=where)
    parser.add_argument("--split", choices=splits, default=splits[0], help="(default: %(default)s)")


def read_questions(
    arguments: argparse.Namespace, make_question: Callable[[Mapping[str, Any], ReadImage, str], Question]
) -> list[Question]:
    """Return the questions of a split, made of a row without its images, a reader of those, and a name for errors.

    Raises:
        YiVLError: If the data set cannot be read, or is another one.
    """
    data, split = arguments.data, arguments.split
    dataset = read_split(data, split)
    images = _image_columns(dataset)
    if "image_1" not in images:
        raise YiVLError(f"{data}: not a data set of {arguments.benchmark.upper()} (no column image_1)")
    return [
        make_question(row, partial(_image_bytes, dataset, number), f"{data} {split} row {number}")
        for number, row in enumerate(dataset.remove_columns(images))
    ]


def report(
    arguments: argparse.Namespace,
    places: Sequence[tuple[str, str]],
    files: Mapping[str, Any],
    score: Callable[[], Mapping[str, Any]],
    published: Mapping[str, Mapping[str, float]],
    published_domains: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
) -> Report:
    """Return scores by subject and domain, beside the published ones.

    Args:
        arguments: Of the command.
        places: Domain and subject of every question.
        files: As in ``Report``.
        score: Returns ``accuracies``; not called for the test split.
        published: Accuracies in percent on the whole benchmark, by model and split.
        published_domains: The same by domain.
    """
    number, split = len(places), arguments.split
    if split == "test":
        return Report(files, {"questions": number}, table=None)
    scores = score()
    domains = {domain: 100 * accuracy for domain, accuracy in scores["domains"].items()}
    overall = 100 * scores["overall"]
    rows: list[list[str | int | float]] = []
    for domain, accuracy in domains.items():
        subjects = Counter(subject for its, subject in places if its == domain)
        rows += [[domain, name, n, 100 * scores["subjects"][name]["acc"]] for name, n in subjects.items()]
        rows.append([domain, "all", subjects.total(), accuracy])
    rows.append(["all", "all", number, overall])
    flags = {name: value for name, value in vars(arguments).items() if name in ("split", "protocol")}
    series: dict[str, Mapping[str, float]] = {"this model": domains | {"all": overall}}
    models: dict[str, Mapping[str, float]] = {}
    is_whole = number == NUM_QUESTIONS
    if is_whole:
        series |= published_domains
        models = {"this model": {split: overall}, **published}
    else:
        logger.warning("%d of %d questions: the published scores do not compare", number, NUM_QUESTIONS)
    return Report(
        files,
        {**flags, "questions": number, "is_whole": is_whole, **scores},
        Table(["domain", "subject", "questions", "accuracy %"], rows),
        Chart(f"{arguments.benchmark.upper()}, {split} split, {number:,} questions", [*domains, "all"], series, models),
    )


def accuracies(marks: Sequence[tuple[str, str, bool]], domains: Iterable[str]) -> dict[str, Any]:
    """Return ``{"subjects": {name: {"num", "acc"}}, "domains": {name: acc}, "overall": acc}``.

    ``marks`` are domain, subject, and whether the response is correct; the result is in the order of ``domains``.
    """
    by_subject: dict[str, list[bool]] = defaultdict(list)
    by_domain: dict[str, list[bool]] = defaultdict(list)
    for domain, subject, mark in marks:
        by_subject[subject].append(mark)
        by_domain[domain].append(mark)
    return {
        "subjects": {name: {"num": len(right), "acc": sum(right) / len(right)} for name, right in by_subject.items()},
        "domains": {name: sum(by_domain[name]) / len(by_domain[name]) for name in domains if name in by_domain},
        "overall": sum(mark for _, _, mark in marks) / len(marks),
    }


def strip_punctuation(response: str) -> str:
    """Return a response without outer punctuation, one mark after the other as officially."""
    for mark in _PUNCTUATION:
        response = response.strip(mark)
    return response


def key_phrases(sentences: Sequence[str], indicators: Sequence[str], in_last: Sequence[str] = ()) -> list[str]:
    """Return the shortest text after an indicator word of each sentence; ``in_last`` holds more for the last one."""
    phrases = []
    for number, sentence in enumerate(sentences):
        words = (*indicators, *in_last) if number == len(sentences) - 1 else indicators
        shortest = ""
        for phrase in (sentence.split(word)[-1].strip() for word in words if word in sentence):
            if not shortest or len(phrase) < len(shortest):
                shortest = phrase
        if shortest and shortest not in _PUNCTUATION:
            phrases.append(shortest)
    return phrases


def read_split(data: str, split: str) -> Any:
    """Return a split as a ``datasets.Dataset`` in the order of its files' paths, images not decoded.

    Args:
        data: A folder with ``.parquet`` files as the hub has them (``Accounting/validation-00000-of-00001.parquet``,
            ``data/val-*.parquet``), a folder of ``save_to_disk`` (one, or one for each subject), or a hub id.
        split: The names of the parquet files begin with it.

    Raises:
        YiVLError: If there is no such folder or data set, it has no such split, or a file is damaged.
    """
    import datasets  # slow to import

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    folder = Path(data).expanduser()
    if not folder.is_dir():
        folder = _download(data, split)
    saved = sorted(os.fspath(path.parent) for path in folder.rglob("dataset_dict.json"))
    files = [os.fspath(path) for path in sorted(folder.rglob(f"{split}[-.]*parquet"))]
    try:
        if saved:
            parts = [part[split] for part in map(datasets.load_from_disk, saved) if split in part]
        else:
            parts = [datasets.load_dataset("parquet", data_files={split: files}, split=split)] if files else []
        dataset = datasets.concatenate_datasets(parts) if parts else None
    except (datasets.exceptions.DatasetsError, OSError, ValueError, TypeError) as error:
        raise YiVLError(f"{data}: split {split!r} cannot be read ({' '.join(str(error).split())})") from error
    if dataset is None:
        raise YiVLError(f"{data}: no split {split!r}; expected {split}-*.parquet files or folders of save_to_disk")
    if not len(dataset):
        raise YiVLError(f"{data}: split {split!r} has no rows")
    for column in _image_columns(dataset):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def _image_columns(dataset: Any) -> list[str]:
    return [name for name in dataset.column_names if re.fullmatch(r"image_\d+", name)]


def _image_bytes(dataset: Any, row: int, column: str) -> bytes | Path | None:
    cell = dataset[column][row]
    if cell is None:
        return None
    data: bytes | None = cell["bytes"]
    return Path(cell["path"]) if data is None else data


def _download(data: str, split: str) -> Path:
    """Return the local folder of the parquet files of a split on the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from yivl.checkpoint.download import reason_of

    try:
        patterns = [f"{split}-*.parquet", f"*/{split}-*.parquet"]
        return Path(snapshot_download(data, repo_type="dataset", allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise YiVLError(
            f"{data}: no such folder, and no data set of that name could be downloaded; give a folder with its parquet "
            f"files or a hub id such as MMMU/MMMU ({reason_of(error)})"
        ) from error
