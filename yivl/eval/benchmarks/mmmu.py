"""MMMU: 30 subjects in English.

Scores follow the official evaluation, quirks included, so that they compare. Source: MMMU-Benchmark/MMMU,
mmmu/utils/eval_utils.py, as recorded in tests/eval/mmmu.
"""

import argparse
import ast
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from yivl.errors import YiVLError
from yivl.eval.benchmarks import subjects
from yivl.eval.benchmarks.benchmark import Question
from yivl.eval.benchmarks.subjects import FALLBACK_SEED, ReadImage, accuracies, key_phrases, strip_punctuation
from yivl.eval.report import Report

_MAX_NEW_TOKENS: Final = {"yi": 64, "official": 128}
"""Source: 01-ai/Yi at 526ec7a, VL/llava/eval/01_eval_mmmu.py; MMMU-Benchmark/MMMU, mmmu/utils/model_utils.py."""

# The instructions after the question. Both configurations are YAML, in whose quoted text a blank line is one line
# break. Source: 01-ai/Yi at 526ec7a, VL/llava/eval/mmmu_configs/yi.yaml, and MMMU-Benchmark/MMMU,
# mmmu/configs/llava1.5.yaml, which are the same.
_CHOICE_INSTRUCTION: Final = "Answer with the option's letter from the given choices directly."
_OPEN_INSTRUCTION: Final = "Answer the question using a single word or phrase."
_TAG: Final = re.compile(r"<image \d+>")

Parsed = str | float
"""Text in lower case, or a number rounded to two decimals."""

DOMAINS: Final = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
"""Subjects by domain. Source: as above."""

PUBLISHED: Final = {
    model: {"validation": validation, "test": test}
    for model, validation, test in (
        ("GPT-4V", 56.8, 55.7),
        ("InternVL-Chat-V1-2, published", 51.6, 46.2),
        ("InternVL-Chat-V1-2-Plus, published", 50.3, 45.6),
        ("Yi-VL-34B, published", 45.9, 41.6),
        ("Qwen-VL-Plus", 45.2, 40.8),
        ("Marco-VL", 41.2, 40.4),
        ("Yi-VL-6B, published", 39.1, 37.8),
        ("InfiMM-Zephyr-7B", 39.4, 35.5),
        ("SVIT", 38.0, 34.1),
        ("Emu2-Chat", 36.3, 34.1),
        ("LLaVA-1.5-13B", 36.4, 33.6),
        ("Qwen-VL-7B-Chat", 35.9, 32.9),
        ("frequent choice", 26.8, 25.8),
    )
}
"""In percent. Source: README of MMMU-Benchmark/MMMU at 00fc28a, January 2024. The last row: arXiv 2311.16502,
since that README exchanges frequent and random choice. Of InternVL-Chat: model cards of
OpenGVLab/InternVL-Chat-V1-2 and OpenGVLab/InternVL-Chat-V1-2-Plus."""

PUBLISHED_DOMAINS: Final = {
    f"Yi-VL-{size}, published (test split)": dict(zip(DOMAINS, scores, strict=True)) | {"all": overall}
    for size, scores, overall in (
        ("34B", (56.1, 33.3, 32.9, 45.9, 66.5, 36.0), 41.6),
        ("6B", (53.4, 30.3, 30.0, 39.3, 58.5, 34.1), 37.8),
    )
}
"""In percent. Source: arXiv 2403.04652, table 7."""

# Words that announce the result in a sentence.
_INDICATORS: Final = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS: Final = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234,567
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.5e-3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # 12, 1.5, .5
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    subjects.add_flags(parser, "MMMU/MMMU", ("validation", "test"))
    text = "prompts, images and response length of the authors of Yi-VL, or of MMMU's example (default: %(default)s)"
    parser.add_argument("--protocol", choices=_MAX_NEW_TOKENS, default="yi", help=text)


def max_new_tokens(arguments: argparse.Namespace) -> int:
    """Return the maximum length of a response in tokens."""
    return _MAX_NEW_TOKENS[arguments.protocol]


def read_questions(arguments: argparse.Namespace) -> list[Question]:
    """Return the questions of a split, sorted by the names of their subjects as officially."""
    questions = subjects.read_questions(arguments, partial(_question, arguments.protocol))
    return sorted(questions, key=lambda question: _subject(question.id))


def report(arguments: argparse.Namespace, questions: Sequence[Question], responses: Mapping[str, str]) -> Report:
    """Return scores, and predictions: the letter that is parsed, or the response to an open question."""
    rng = random.Random(FALLBACK_SEED)
    predictions, rows = {}, []
    for question in questions:
        fields, response = question.fields, responses[question.id]
        rows.append({**fields, "response": response})
        if fields["question_type"] == "multiple-choice":
            response = parse_multiple_choice(response, fields["all_choices"], fields["index2ans"], rng)
        predictions[question.id] = response
    files = {"responses.json": responses, "submission.json": predictions}
    return subjects.report(
        arguments, [*map(place, rows)], files, partial(score_rows, rows), PUBLISHED, PUBLISHED_DOMAINS
    )


def score_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the official accuracies, as ``accuracies`` does.

    Args:
        rows: With ``id`` (``validation_Accounting_1``), ``question_type``, ``answer``, ``response``, and for multiple
            choice ``all_choices`` and ``index2ans``. Their order determines the random answers.
    """
    rng = random.Random(FALLBACK_SEED)
    return accuracies([(*place(row), is_correct(row, rng)) for row in rows], DOMAINS)


def place(fields: Mapping[str, Any]) -> tuple[str, str]:
    """Return domain and subject of a question.

    Raises:
        ValueError: If its id names none.
    """
    subject = _subject(fields["id"])
    for domain, names in DOMAINS.items():
        if subject in names.split():
            return domain, subject
    raise ValueError(f"id {fields['id']!r} names no subject of MMMU")


def _question(protocol: str, row: Mapping[str, Any], read_image: ReadImage, origin: str) -> Question:
    try:
        id, text, kind = row["id"], row["question"], row["question_type"]
        options, answer = _as_list(row["options"]), row["answer"]
        if not all(isinstance(value, str) for value in (id, text, answer)):
            raise ValueError("id, question and answer are not text")
        if kind == "multiple-choice" and not options:
            raise ValueError("a multiple-choice question without options")
        place({"id": id})
    except (KeyError, ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise YiVLError(f"{origin}: not a row of MMMU ({type(error).__name__}: {error})") from error
    is_blank = False
    if protocol == "yi":
        in_options = sum(len(_TAG.findall(option)) for option in options)
        # No image is shown if options have several; without one in the question, those of options count twice.
        is_blank = in_options * (1 if _TAG.search(text) else 2) > 1
        text = _TAG.sub("", text)
    image, fields = partial(read_image, "image_1"), {"id": id, "question_type": kind}
    if kind != "multiple-choice":
        fields |= {"answer": _answers(answer)}
        return Question(id, f"{text}\n{_OPEN_INSTRUCTION}", image, fields, is_blank=is_blank)
    letters = [chr(ord("A") + number) for number in range(len(options))]
    fields |= {"answer": answer, "all_choices": letters, "index2ans": dict(zip(letters, options, strict=True))}
    form = "{}. {}\n" if protocol == "yi" else "({}) {}\n"
    listed = "".join(form.format(letter, option) for letter, option in zip(letters, options, strict=True))
    return Question(id, f"{text}\n{listed}\n{_CHOICE_INSTRUCTION}", image, fields, is_blank=is_blank)


def _as_list(text: str) -> list[str]:
    """Return the strings of a Python list literal, in which the data set stores lists; no code is run."""
    texts = ast.literal_eval(text)
    if not isinstance(texts, list):
        raise ValueError(f"{text!r} is not a list")
    return [str(one) for one in texts]


def _answers(text: str) -> str | list[str]:
    """Return the correct answer to an open question, or several if the text is a list of strings; ``[0, 1]`` is not."""
    try:
        several = ast.literal_eval(text) if text.startswith("[") else text
    except (ValueError, SyntaxError):
        return text
    return several if isinstance(several, list) and all(isinstance(one, str) for one in several) else text


def _subject(id: str) -> str:
    """Return the subject in ``validation_Accounting_1``."""
    return id.partition("_")[2].rpartition("_")[0]


def is_correct(row: Mapping[str, Any], rng: random.Random) -> bool:
    """Return whether the response of a row is correct."""
    if row["question_type"] == "multiple-choice":
        chosen = parse_multiple_choice(row["response"], row["all_choices"], row["index2ans"], rng)
        return chosen in ([row["answer"]] if isinstance(row["answer"], str) else row["answer"])
    return is_open_correct(row["answer"], parse_open(row["response"]))


def parse_multiple_choice(
    response: str, all_choices: Sequence[str], index2ans: Mapping[str, str], rng: random.Random
) -> str:
    """Return the letter that a response chooses: in parentheses, else alone, else by the option's text, else random."""
    text = f" {strip_punctuation(response)} "
    last = {choice: text.rfind(f"({choice})") for choice in all_choices}
    if max(last.values()) < 0:
        last = {choice: text.rfind(f" {choice} ") for choice in all_choices}
    if max(last.values()) < 0 and len(text.split()) > 5:
        lower = text.lower()
        last = {choice: lower.rfind(words.lower()) for choice, words in index2ans.items()}
    if max(last.values()) < 0:
        return rng.choice(all_choices)
    return max(last, key=lambda choice: last[choice])


def parse_open(response: str) -> list[Parsed]:
    """Return the candidate answers in a response: its key phrases and the numbers in them, sorted as text."""
    text = response.strip().strip(".").lower()
    # Only line breaks: the official pattern also wants a capital after a full stop, but the text is in lower case.
    phrases = key_phrases(text.split("\n"), _INDICATORS, in_last=("=",)) or [text]
    numbers = [number for phrase in phrases for pattern in _NUMBERS for number in pattern.findall(phrase)]
    return sorted({value for text in phrases + numbers for value in _normalized(text)}, key=str)


def is_open_correct(answer: str | Sequence[str], parsed: Iterable[Parsed]) -> bool:
    """Return whether one of the candidates of ``parse_open`` equals a correct answer, or is text that contains it."""
    answers = [value for text in ([answer] if isinstance(answer, str) else answer) for value in _normalized(text)]
    words = [value for value in answers if isinstance(value, str)]
    return any(any(word in value for word in words) if isinstance(value, str) else value in answers for value in parsed)


def _normalized(text: str) -> list[Parsed]:
    """Return a number rounded to two decimals, or text in lower case; a single letter must be next to a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]
