"""CMMMU: its questions as they are asked, what a response says, and whether that is right.

The scoring rules are those of the benchmark's own evaluation of responses, with all their quirks. Source:
CMMMU-Benchmark/CMMMU, eval/eval_script.py and eval/utils/eval_utils.py, as recorded in tests/cmmmu.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final

from yivl.errors import YiVLError
from yivl.eval.benchmarks.questions import Question, picture_bytes, picture_columns, read_split

DOMAINS: Final[dict[str, str]] = {
    "艺术与设计": "Art & Design",
    "商业": "Business",
    "科学": "Science",
    "健康与医学": "Health & Medicine",
    "人文社会科学": "Humanities & Social Sciences",
    "技术与工程": "Technology & Engineering",
}
"""By ``category``, in the order in which they are scored, on which random answers depend. Source: as above."""

FALLBACK_SEED: Final = 42
"""Of the random answers to responses that say nothing. Source: as above."""

MAX_NEW_TOKENS: Final = 64
"""Source: 01-ai/Yi at 526ec7a, VL/llava/eval/01_eval_cmmmu.py."""

PUBLISHED: Final[dict[str, dict[str, float]]] = {
    "Yi-VL-34B, published": {"val": 36.2, "test": 36.5},
    "Yi-VL-6B, published": {"val": 35.8, "test": 35.0},
}
"""In percent. Source: CMMMU's README."""

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

_ENDS: Final = (",", ".", "!", "?", ";", ":", "'")
# What announces the result in a sentence.
_ANNOUNCING_VALUE: Final = ("是", "为", "所以", "等于", "方案", "选择", "正确答案", "因此", "最后", "答案", "结果")
_ANNOUNCING_JUDGEMENT: Final = ("是", "为", "所以", "判断", "陈述", "说法", "表达", "答案", "结果")
# A phrase with one of the first says nothing, then the second are looked for, then the third.
_UNCLEAR: Final = ("对错", "是否正确", "否正确", "或者", "是否", "正确性", "对不")
_RIGHT: Final = ("正确", "对", "准确", "肯定", "对的")
_WRONG: Final = ("不对", "错误", "不正确", "不准确", "不合适", "否定", "错的", "错")
_NUMBERS: Final = (
    re.compile(r"-?\d{1,3}(?:，\d{3})+"),  # 1，234，567
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1.5e-3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+)(?![eE][+-]?\d+)(?!，\d)"),  # 12, 1.5, .5
)
_LONGER: Final = 20, 2  # an answer may have so many more characters, and so many more Latin letters, than the right one


def read_questions(data: str, split: str) -> list[Question]:
    """Return the questions of a split as the authors of Yi-VL asked them, domain by domain in the official order.

    Args:
        data: As in ``read_split``.
        split: ``val`` or ``test``.

    Raises:
        YiVLError: If the data set cannot be read, or a row is none of CMMMU.
    """
    dataset = read_split(data, split)
    questions = [
        _question(row, dataset, number, f"{data} {split} row {number}")
        for number, row in enumerate(dataset.remove_columns(picture_columns(dataset)))
    ]
    order = [*DOMAINS]
    return sorted(questions, key=lambda question: order.index(question.fields["category"]))


def _question(row: Mapping[str, Any], dataset: Any, number: int, origin: str) -> Question:
    try:
        kind, text, category = row["type"], row["question"], row["category"]
        fields = {key: row[key] for key in ("id", "type", "answer", "category", "subcategory")}
        options = [row[f"option{place}"] or "" for place in range(1, 5)]
        names = [row[name] or "" for name in sorted(row) if re.fullmatch(r"image_\d+_filename", name)]
    except KeyError as error:
        raise YiVLError(f"{origin}: not a row of CMMMU (no {error})") from error
    if not isinstance(text, str) or "image_1" not in dataset.column_names:
        raise YiVLError(f"{origin}: not a row of CMMMU (no question, or no column image_1)")
    if kind not in _TASKS or category not in DOMAINS:
        raise YiVLError(f"{origin}: type {kind!r} of category {category!r} is none of CMMMU's")
    if kind == CHOICE:
        fields["index2ans"] = dict(zip(_LETTERS, options, strict=True))
    asked = f"问题：{text}\n"
    if kind == CHOICE:
        asked += "选项：\n" + "".join(f"({letter}) {option}\n" for letter, option in fields["index2ans"].items()) + "\n"
    # Files are named q_... in questions and a_... in options. The first of the question is shown, none where options
    # have more than one.
    of_question = [place for place, name in enumerate(names, 1) if name.startswith("q_")]
    of_options = [name for name in names if name.startswith("a_")]
    column = f"image_{of_question[0] if of_question else 1}"
    picture = partial(picture_bytes, dataset, number, column)
    prompt = _TAG.sub("", f"{_TASKS[kind]}\n\n{asked}正确答案：\n")
    return Question(str(row["id"]), prompt, picture, fields, is_blank=len(of_options) > 1)


def submission(questions: Sequence[Question], responses: Mapping[str, str]) -> tuple[str, str]:
    """Return name and text of the responses in the form that the official evaluation takes, a line for each."""
    lines = [
        {"id": question.fields["id"], "type": question.fields["type"], "response": responses[question.id]}
        for question in questions
    ]
    return "submission.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def place(fields: Mapping[str, Any]) -> tuple[str, str]:
    """Return domain and subject of a question."""
    return DOMAINS[fields["category"]], fields["subcategory"]


def score_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return accuracies of responses, each question counting the same.

    Args:
        rows: With ``type``, ``category``, ``subcategory``, ``answer``, ``response``, and for 选择 ``index2ans``. Their
            order decides the random answers.

    Returns:
        ``{"subjects": {name: {"num", "acc"}}, "domains": {name: acc}, "overall": acc}``.
    """
    rng = random.Random(FALLBACK_SEED)
    subjects: dict[str, list[bool]] = {}
    domains: dict[str, list[bool]] = {}
    for category, domain in DOMAINS.items():
        for row in rows:
            if row["category"] == category:
                mark = is_correct(row, rng)
                domains.setdefault(domain, []).append(mark)
                subjects.setdefault(row["subcategory"], []).append(mark)
    marks = [mark for right in domains.values() for mark in right]
    return {
        "subjects": {name: {"num": len(right), "acc": sum(right) / len(right)} for name, right in subjects.items()},
        "domains": {name: sum(right) / len(right) for name, right in domains.items()},
        "overall": sum(marks) / len(marks),
    }


def is_correct(row: Mapping[str, Any], rng: random.Random) -> bool:
    """Return whether the response of a row is right."""
    answer: str = row["answer"]
    response: str = row["response"]
    if row["type"] == CHOICE:
        return bool(response) and parse_choice(response, row["index2ans"], rng) == answer
    if row["type"] == JUDGEMENT:
        return parse_judgement(response, rng) == answer
    return is_blank_correct(answer, parse_blank(response, answer))


def parse_choice(response: str, index2ans: Mapping[str, str], rng: random.Random) -> str:
    """Return the letters that a response names most often, in their order: ``AC``.

    Args:
        response: What the model said.
        index2ans: The words of each option, A to D.
        rng: Draws a letter where the response names none.
    """
    for mark in _ENDS:
        response = response.strip(mark)
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
    """Return 对 or 错, whichever more phrases of a response say; drawn if as many say the one as the other."""
    phrases = [
        phrase
        for phrase in set(_key_phrases(response, _ANNOUNCING_JUDGEMENT, in_last=()))
        if not any(word in phrase for word in _UNCLEAR)
    ]
    said = Counter(
        # 不正确 holds 正确 and counts as right, in the official evaluation too.
        "对" if any(word in phrase for word in _RIGHT) else "错"
        for phrase in phrases
        if any(word in phrase for word in _RIGHT + _WRONG)
    )
    if said["对"] == said["错"]:
        return rng.choice("对错")
    return "对" if said["对"] > said["错"] else "错"


def parse_blank(response: str, answer: str) -> list[str | float]:
    """Return what a response may fill in: its key phrases and the numbers in them, none much longer than the answer."""
    phrases = _key_phrases(response, _ANNOUNCING_VALUE, in_last=("=",))
    numbers = [number for phrase in phrases for pattern in _NUMBERS for number in pattern.findall(phrase)]
    return sorted({value for text in phrases + numbers for value in _normalized(text, answer)}, key=str)


def is_blank_correct(answer: str, parsed: Iterable[str | float]) -> bool:
    """Return whether one of the parsed values is the answer, or is text that contains it."""
    [wanted] = _normalized(answer, answer)
    return any(
        isinstance(wanted, str) and wanted in value if isinstance(value, str) else value == wanted for value in parsed
    )


def _key_phrases(response: str, announcing: Sequence[str], in_last: Sequence[str]) -> list[str]:
    """Return of each sentence the shortest text behind an announcing word, or the whole response if none has one.

    Args:
        response: What the model said.
        announcing: The words.
        in_last: More of them, in the last sentence.
    """
    text = response.strip("。").strip()
    sentences = re.split("[。\n]", text)
    phrases = []
    for number, sentence in enumerate(sentences):
        words = (*announcing, *in_last) if number == len(sentences) - 1 else announcing
        shortest = ""
        for phrase in (sentence.split(word)[-1].strip() for word in words if word in sentence):
            if not shortest or len(phrase) < len(shortest):
                shortest = phrase
        if shortest and shortest not in _ENDS:
            phrases.append(shortest)
    return phrases or [text]


def _normalized(text: str, answer: str) -> list[str | float]:
    """Return a number rounded to two decimals, or text; nothing if it is much longer than the answer."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        more_characters, more_letters = _LONGER
        if len(text) > len(answer) + more_characters or _letters(text) > _letters(answer) + more_letters:
            return []
        return [text]


def _letters(text: str) -> int:
    return sum(letter.isascii() and letter.isalpha() for letter in text)
