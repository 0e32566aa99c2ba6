"""MMMU's scores: what a response says, and whether that is right.

The rules are those of the benchmark's own evaluation, with all their quirks: scores are comparable only if they are the
same. Source: MMMU-Benchmark/MMMU, mmmu/utils/eval_utils.py, as recorded in tests/mmmu.
"""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

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
        subject = row["id"].split("_", 1)[1].rsplit("_", 1)[0]
        marks.setdefault(subject, []).append(is_correct(row, rng))
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
