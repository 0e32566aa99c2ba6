"""CMMMU: 30 subjects in Chinese.

Scores follow the official evaluation, quirks included, so that they compare. Source: CMMMU-Benchmark/CMMMU,
eval/eval_script.py and eval/utils/eval_utils.py, as recorded in tests/eval/cmmmu.
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from yivl.errors import YiVLError
from yivl.eval.benchmarks import subjects
from yivl.eval.benchmarks.benchmark import Question
from yivl.eval.benchmarks.subjects import FALLBACK_SEED, ReadImage, accuracies, key_phrases, strip_punctuation
from yivl.eval.report import Report

DOMAINS: Final[dict[str, str]] = {
    "艺术与设计": "Art & Design",
    "商业": "Business",
    "科学": "Science",
    "健康与医学": "Health & Medicine",
    "人文社会科学": "Humanities & Social Sciences",
    "技术与工程": "Technology & Engineering",
}
"""By ``category``, in the order of scoring, which determines the random answers. Source: as above."""

MAX_NEW_TOKENS: Final = 64
"""Source: 01-ai/Yi at 526ec7a, VL/llava/eval/01_eval_cmmmu.py."""

PUBLISHED: Final = {
    model: {"val": val, "test": test}
    for model, val, test in (
        ("GPT-4V", 42.5, 43.7),
        ("Qwen-VL-Plus", 39.5, 36.8),
        ("Yi-VL-34B, published", 36.2, 36.5),
        ("Yi-VL-6B, published", 35.8, 35.0),
        ("Qwen-VL-7B-Chat", 30.7, 31.3),
        ("InternVL-Chat-Vicuna-7B", 26.4, 26.7),
        ("CogAgent-Chat", 24.6, 23.6),
        ("Emu2-Chat", 23.8, 24.5),
        ("frequent choice", 24.1, 26.0),
    )
}
"""In percent. Source: README of CMMMU-Benchmark/CMMMU at 3719018, January 2024."""

CHOICE, JUDGEMENT, BLANK = "选择", "判断", "填空"

# Source: 01-ai/Yi at 526ec7a, VL/llava/eval/cmmmu_configs/yi.yaml.
_TASKS: Final = {
    CHOICE: "请回答以下多项选择题，并选出正确选项。这些题目可能包括单选和多选题型。"
    "如果所提供的信息不足以确定一个明确的答案，那么请根据可用的数据和你的判断来选择最可能正确的选项。",
    JUDGEMENT: "请回答以下判断题，并根据题目描述和所给的信息来判断问题中陈述的对错。"
    "如果信息不完整或不足以作出绝对判断，请运用你的逻辑推理和现有信息来做出最可能的判断。",
    BLANK: "请回答以下填空题，并根据题目的要求和所提供的信息来给出最恰当的答案。"
    "如果信息不足以确切回答，那么请依据现有的数据和你的推理能力来填写最合理的答案。",
}
_LETTERS: Final = "ABCD"
_TAG: Final = re.compile(r'<img="([^"]*)">')

# Words that announce the result in a sentence.
_VALUE_INDICATORS: Final = ("是", "为", "所以", "等于", "方案", "选择", "正确答案", "因此", "最后", "答案", "结果")
_JUDGEMENT_INDICATORS: Final = ("是", "为", "所以", "判断", "陈述", "说法", "表达", "答案", "结果")
# A phrase with one of the first is ambiguous; the second take precedence over the third.
_UNCLEAR: Final = ("对错", "是否正确", "否正确", "或者", "是否", "正确性", "对不")
_RIGHT: Final = ("正确", "对", "准确", "肯定", "对的")
_WRONG: Final = ("不对", "错误", "不正确", "不准确", "不合适", "否定", "错的", "错")
_NUMBERS: Final = (
    re.compile(r"-?\d{1,3}(?:，\d{3})+"),  # 1，234，567
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.5e-3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+)(?![eE][+-]?\d+)(?!，\d)"),  # 12, 1.5, .5
)
_EXTRA_CHARACTERS, _EXTRA_LETTERS = 20, 2  # a candidate has at most so many more, Latin letters too, than the answer


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    subjects.add_flags(parser, "m-a-p/CMMMU", ("val", "test"))


def max_new_tokens(_: argparse.Namespace) -> int:
    """Return the maximum length of a response in tokens."""
    return MAX_NEW_TOKENS


def read_questions(arguments: argparse.Namespace) -> list[Question]:
    """Return the questions of a split as the authors of Yi-VL asked them, in the official order of the domains."""
    questions = subjects.read_questions(arguments, _question)
    for question in questions if arguments.split != "test" else ():  # whose answers are not published
        if not isinstance(question.fields["answer"], str):
            raise YiVLError(f"{arguments.data}: question {question.id} has no answer")
    return sorted(questions, key=lambda question: [*DOMAINS].index(question.fields["category"]))


def report(arguments: argparse.Namespace, questions: Sequence[Question], responses: Mapping[str, str]) -> Report:
    """Return scores, and the responses in the form of the official evaluation: a line for each."""
    rows = [{**question.fields, "response": responses[question.id]} for question in questions]
    lines = [
        json.dumps({key: row[key] for key in ("id", "type", "response")}, ensure_ascii=False) + "\n" for row in rows
    ]
    files = {"responses.json": responses, "submission.jsonl": "".join(lines)}
    return subjects.report(arguments, [*map(_place, rows)], files, partial(score_rows, rows), PUBLISHED)


def score_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the official accuracies, as ``accuracies`` does.

    Args:
        rows: With ``type``, ``category``, ``subcategory``, ``answer``, ``response``, and for 选择 ``index2ans``. Their
            order within a domain determines the random answers.
    """
    rng = random.Random(FALLBACK_SEED)
    ordered = [row for category in DOMAINS for row in rows if row["category"] == category]
    return accuracies([(*_place(row), is_correct(row, rng)) for row in ordered], DOMAINS.values())


def _place(fields: Mapping[str, Any]) -> tuple[str, str]:
    return DOMAINS[fields["category"]], fields["subcategory"]


def _question(row: Mapping[str, Any], read_image: ReadImage, origin: str) -> Question:
    try:
        kind, text, category = row["type"], row["question"], row["category"]
        fields = {key: row[key] for key in ("id", "type", "answer", "category", "subcategory")}
        options = [row[f"option{number}"] or "" for number in range(1, 5)]
        names = [row[name] or "" for name in sorted(row) if re.fullmatch(r"image_\d+_filename", name)]
    except KeyError as error:
        raise YiVLError(f"{origin}: not a row of CMMMU (no {error})") from error
    if not isinstance(text, str) or kind not in _TASKS or category not in DOMAINS:
        raise YiVLError(f"{origin}: not a row of CMMMU (question {text!r}, type {kind!r}, category {category!r})")
    asked = f"问题：{text}\n"
    if kind == CHOICE:
        fields["index2ans"] = dict(zip(_LETTERS, options, strict=True))
        asked += "选项：\n" + "".join(f"({letter}) {option}\n" for letter, option in fields["index2ans"].items()) + "\n"
    # Image files are named q_... in questions and a_... in options. The first of the question is shown, and none if the
    # options have several.
    in_question = [number for number, name in enumerate(names, 1) if name.startswith("q_")]
    is_blank = sum(name.startswith("a_") for name in names) > 1
    image = partial(read_image, f"image_{in_question[0] if in_question else 1}")
    prompt = _TAG.sub("", f"{_TASKS[kind]}\n\n{asked}正确答案：\n")
    return Question(str(row["id"]), prompt, image, fields, is_blank=is_blank)


def is_correct(row: Mapping[str, Any], rng: random.Random) -> bool:
    """Return whether the response of a row is correct."""
    answer, response = row["answer"], row["response"]
    if row["type"] == CHOICE:
        return response != "" and bool(parse_choice(response, row["index2ans"], rng) == answer)
    if row["type"] == JUDGEMENT:
        return bool(parse_judgement(response, rng) == answer)
    return is_blank_correct(answer, parse_blank(response, answer))


def parse_choice(response: str, index2ans: Mapping[str, str], rng: random.Random) -> str:
    """Return the letters that a response names most often, by the options' text if it names none, else a random one."""
    response = strip_punctuation(response)
    text = f" {response} "
    counts = {letter: text.count(f"({letter})") for letter in _LETTERS}
    if not any(counts.values()):
        counts = {letter: text.count(letter) for letter in _LETTERS}
    if not any(counts.values()) and response.split():
        counts = {letter: text.count(words) for letter, words in index2ans.items()}
    if not any(counts.values()):
        return rng.choice(_LETTERS)
    most = max(counts.values())
    return "".join(letter for letter in _LETTERS if counts.get(letter) == most)


def parse_judgement(response: str, rng: random.Random) -> str:
    """Return 对 or 错 by majority of the key phrases of a response; a tie is broken at random."""
    votes = Counter(
        # 不正确 contains 正确 and counts as 对, as officially.
        "对" if any(word in phrase for word in _RIGHT) else "错"
        for phrase in set(_key_phrases(response, _JUDGEMENT_INDICATORS))
        if not any(word in phrase for word in _UNCLEAR) and any(word in phrase for word in _RIGHT + _WRONG)
    )
    if votes["对"] == votes["错"]:
        return rng.choice("对错")
    return "对" if votes["对"] > votes["错"] else "错"


def parse_blank(response: str, answer: str) -> list[str | float]:
    """Return the candidate answers in a response: its key phrases and the numbers in them, unless much longer."""
    phrases = _key_phrases(response, _VALUE_INDICATORS, in_last=("=",))
    numbers = [number for phrase in phrases for pattern in _NUMBERS for number in pattern.findall(phrase)]
    return sorted({value for text in phrases + numbers for value in _normalized(text, answer)}, key=str)


def is_blank_correct(answer: str, parsed: Iterable[str | float]) -> bool:
    """Return whether one of the candidates equals the answer, or is text that contains it."""
    [wanted] = _normalized(answer, answer)
    return any(
        isinstance(wanted, str) and wanted in value if isinstance(value, str) else value == wanted for value in parsed
    )


def _key_phrases(response: str, indicators: Sequence[str], in_last: Sequence[str] = ()) -> list[str]:
    text = response.strip("。").strip()
    return key_phrases(re.split("[。\n]", text), indicators, in_last) or [text]


def _normalized(text: str, answer: str) -> list[str | float]:
    """Return a number rounded to two decimals, or text; nothing if it is much longer than the answer."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        if len(text) > len(answer) + _EXTRA_CHARACTERS or _letters(text) > _letters(answer) + _EXTRA_LETTERS:
            return []
        return [text]


def _letters(text: str) -> int:
    return sum(letter.isascii() and letter.isalpha() for letter in text)
