"""MMMU: its questions as they are asked, what a response says, and whether that is right.

The scoring rules are those of the benchmark's own evaluation, with all their quirks: else scores would compare to none.
Source: MMMU-Benchmark/MMMU, mmmu/utils/eval_utils.py, as recorded in tests/mmmu.
"""

import ast
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal

from yivl.errors import YiVLError
from yivl.eval.benchmarks.questions import Question, picture_bytes, picture_columns, read_split

Protocol = Literal["yi", "official"]
"""How questions are asked: as the authors of Yi-VL did, or as the benchmark's own example program does."""

MAX_NEW_TOKENS: Final[dict[Protocol, int]] = {"yi": 64, "official": 128}
"""Source: 01-ai/Yi at 526ec7a, VL/llava/eval/01_eval_mmmu.py; MMMU-Benchmark/MMMU, mmmu/utils/model_utils.py."""

# What is asked for behind the question. Both configurations are YAML whose quoted text has blank lines, each of which
# is one line break. Source: 01-ai/Yi at 526ec7a, VL/llava/eval/mmmu_configs/yi.yaml, and MMMU-Benchmark/MMMU,
# mmmu/configs/llava1.5.yaml, which say the same.
_CHOOSE: Final = "Answer with the option's letter from the given choices directly."
_SAY: Final = "Answer the question using a single word or phrase."
_TAG: Final = re.compile(r"<image \d+>")

PUBLISHED: Final[dict[str, dict[str, float]]] = {
    "Yi-VL-34B, published (domains: of the test split)": {
        "validation": 45.9,
        "test": 41.6,
        "Art and Design": 56.1,
        "Business": 33.3,
        "Science": 32.9,
        "Health and Medicine": 45.9,
        "Humanities and Social Science": 66.5,
        "Tech and Engineering": 36.0,
    },
    "Yi-VL-6B, published (domains: of the test split)": {
        "validation": 39.1,
        "test": 37.8,
        "Art and Design": 53.4,
        "Business": 30.3,
        "Science": 30.0,
        "Health and Medicine": 39.3,
        "Humanities and Social Science": 58.5,
        "Tech and Engineering": 34.1,
    },
}
"""In percent: of both splits, and of the test split's domains. Source: MMMU's README; arXiv 2403.04652, table 7."""

Parsed = str | float
"""A piece of text in lower case, or a number rounded to two decimals."""

DOMAINS: Final[dict[str, tuple[str, ...]]] = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
FALLBACK_SEED: Final = 42
"""Of the random answers to responses that name no option; drawn in the order of the rows. Source: as above."""

_ENDS: Final = (",", ".", "!", "?", ";", ":", "'")
# What announces the result in a sentence; in the last one an equals sign does so too.
_ANNOUNCING: Final = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS: Final = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,234,567
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.5e-3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # 12, 1.5, .5
)


def read_questions(data: str, split: str, protocol: Protocol) -> list[Question]:
    """Return the questions of a split, subject by subject in the order of their names, as officially.

    Args:
        data: As in ``read_split``.
        split: ``validation`` or ``test``.
        protocol: How they are asked.

    Raises:
        YiVLError: If the data set cannot be read, or a row is none of MMMU.
    """
    dataset = read_split(data, split)
    pictures = picture_columns(dataset)
    if "image_1" not in pictures:
        raise YiVLError(f"{data}: no data set of MMMU: it has no column image_1")
    questions = [
        _question(row, partial(picture_bytes, dataset, number, "image_1"), protocol, f"{data} {split} row {number}")
        for number, row in enumerate(dataset.remove_columns(pictures))
    ]
    return sorted(questions, key=lambda question: _subject(question.id))


def _question(row: Mapping[str, Any], picture: Any, protocol: Protocol, origin: str) -> Question:
    try:
        id, text, kind = row["id"], row["question"], row["question_type"]
        options, answer = _as_list(row["options"]), row["answer"]
        if not isinstance(text, str) or not isinstance(answer, str):
            raise ValueError("question and answer are texts")
        if kind == "multiple-choice" and not options:
            raise ValueError("a choice without options")
        place({"id": id})
    except (KeyError, ValueError, SyntaxError) as error:
        raise YiVLError(f"{origin}: not a row of MMMU ({type(error).__name__}: {error})") from error
    letters = [chr(ord("A") + place) for place in range(len(options))]
    fields = {"id": id, "question_type": kind, "answer": answer}
    if kind == "multiple-choice":
        fields |= {"all_choices": letters, "index2ans": dict(zip(letters, options, strict=True))}
    else:
        fields["answer"] = _answers(answer)
    is_blank = False
    if protocol == "yi":
        in_options = sum(len(_TAG.findall(option)) for option in options)
        # None is shown where options hold more than one; without one in the question, theirs count twice.
        is_blank = in_options * (1 if _TAG.search(text) else 2) > 1
        text = _TAG.sub("", text)
    form = "{}. {}\n" if protocol == "yi" else "({}) {}\n"
    listed = "".join(form.format(letter, option) for letter, option in zip(letters, options, strict=True))
    prompt = f"{text}\n{listed}\n{_CHOOSE}" if kind == "multiple-choice" else f"{text}\n{_SAY}"
    return Question(id, prompt, picture, fields, is_blank=is_blank)


def _as_list(text: str) -> list[str]:
    """Return the texts of a Python list in writing, which is how the data set holds lists; nothing is run."""
    texts = ast.literal_eval(text)
    if not isinstance(texts, list):
        raise ValueError(f"{text!r} is no list")
    return [str(one) for one in texts]


def _answers(text: str) -> str | list[str]:
    """Return the right answer to an open question, or several if the text is a list of texts; ``[0, 1]`` is none."""
    try:
        several = ast.literal_eval(text) if text.startswith("[") else text
    except (ValueError, SyntaxError):
        return text
    return several if isinstance(several, list) and all(isinstance(one, str) for one in several) else text


def _subject(id: str) -> str:
    """Return the subject in ``validation_Accounting_1``."""
    return id.partition("_")[2].rpartition("_")[0]


def submission(questions: Sequence[Question], responses: Mapping[str, str]) -> tuple[str, str]:
    """Return name and text of the predictions in the form that the official evaluation takes.

    It is a JSON object with a letter for each question, the one that ``score_rows`` reads in the response, or with the
    response itself for an open question.
    """
    rng = random.Random(FALLBACK_SEED)
    predictions = {}
    for question in questions:
        response, fields = responses[question.id], question.fields
        if fields["question_type"] == "multiple-choice":
            response = parse_multiple_choice(response, fields["all_choices"], fields["index2ans"], rng)
        predictions[question.id] = response
    return "submission.json", json.dumps(predictions, indent=2, ensure_ascii=False) + "\n"


def place(fields: Mapping[str, Any]) -> tuple[str, str]:
    """Return domain and subject of a question.

    Raises:
        ValueError: If its id names none.
    """
    subject = _subject(fields["id"])
    for domain, subjects in DOMAINS.items():
        if subject in subjects:
            return domain, subject
    raise ValueError(f"id {fields['id']!r} names no subject of MMMU")


def parse_multiple_choice(
    response: str, all_choices: Sequence[str], index2ans: Mapping[str, str], rng: random.Random
) -> str:
    """Return the letter that a response chooses: in brackets, else alone, else by the words of the option.

    Args:
        response: What the model said.
        all_choices: The letters.
        index2ans: The words of each option.
        rng: Draws a letter where the response names none.
    """
    for mark in _ENDS:
        response = response.strip(mark)
    text = f" {response} "
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
    """Return what a response may mean: its key phrases and the numbers in them, in order of their spelling."""
    phrases = _key_phrases(response)
    numbers = [number for phrase in phrases for pattern in _NUMBERS for number in pattern.findall(phrase)]
    return sorted({value for text in phrases + numbers for value in _normalized(text)}, key=str)


def is_open_correct(answer: str | Sequence[str], parsed: Iterable[Parsed]) -> bool:
    """Return whether one of the parsed values is the answer, or is text that contains it.

    Args:
        answer: The right answer, or several.
        parsed: From ``parse_open``.
    """
    answers = [value for text in ([answer] if isinstance(answer, str) else answer) for value in _normalized(text)]
    words = [value for value in answers if isinstance(value, str)]
    return any(any(word in value for word in words) if isinstance(value, str) else value in answers for value in parsed)


def score_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return accuracies of responses, each question counting the same.

    Args:
        rows: With ``id`` (``validation_Accounting_1``), ``question_type``, ``answer``, ``response``, and for multiple
            choice ``all_choices`` and ``index2ans``. Their order decides the random answers.

    Returns:
        ``{"subjects": {name: {"num", "acc"}}, "domains": {name: acc}, "overall": acc}``.
    """
    rng = random.Random(FALLBACK_SEED)
    marks: dict[str, list[bool]] = {}
    for row in rows:
        marks.setdefault(_subject(row["id"]), []).append(is_correct(row, rng))
    by_domain = {
        domain: [mark for subject in subjects for mark in marks.get(subject, ())]
        for domain, subjects in DOMAINS.items()
    }
    return {
        "subjects": {subject: {"num": len(right), "acc": _mean(right)} for subject, right in marks.items()},
        "domains": {domain: _mean(right) for domain, right in by_domain.items() if right},
        "overall": _mean([mark for right in marks.values() for mark in right]),
    }


def is_correct(row: Mapping[str, Any], rng: random.Random) -> bool:
    """Return whether the response of a row is right."""
    if row["question_type"] == "multiple-choice":
        chosen = parse_multiple_choice(row["response"], row["all_choices"], row["index2ans"], rng)
        return chosen in ([row["answer"]] if isinstance(row["answer"], str) else row["answer"])
    return is_open_correct(row["answer"], parse_open(row["response"]))


def _key_phrases(response: str) -> list[str]:
    """Return of each sentence the shortest text behind an announcing word, or the whole response if none has one."""
    text = response.strip().strip(".").lower()
    # The official pattern asks for a capital behind the full stop, and the text is in lower case by then: only line
    # breaks part it.
    sentences = text.split("\n")
    phrases = []
    for number, sentence in enumerate(sentences):
        announcing = (*_ANNOUNCING, "=") if number == len(sentences) - 1 else _ANNOUNCING
        behind = [sentence.split(word)[-1].strip() for word in announcing if word in sentence]
        shortest = ""
        for phrase in behind:
            if not shortest or len(phrase) < len(shortest):
                shortest = phrase
        if shortest and shortest not in _ENDS:
            phrases.append(shortest)
    return phrases or [text]


def _normalized(text: str) -> list[Parsed]:
    """Return a number rounded to two decimals, or text in lower case; a single letter must stand at a blank."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _mean(marks: Sequence[bool]) -> float:
    return sum(marks) / len(marks)
