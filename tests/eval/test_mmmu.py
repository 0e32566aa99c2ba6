"""MMMU scores are the official ones, row by row."""

import json
import random
from pathlib import Path
from typing import Any

from yivl.eval.benchmarks.mmmu import (
    DOMAINS,
    is_correct,
    is_open_correct,
    parse_multiple_choice,
    parse_open,
    score_rows,
)
from yivl.eval.benchmarks.subjects import FALLBACK_SEED

RECORDED = Path(__file__).parent / "mmmu"


def recorded(name: str) -> Any:
    return json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))


def test_the_scores_of_the_published_example_are_the_official_ones() -> None:
    rows = recorded("llava1.5_13b_val_responses")
    assert score_rows(rows) == recorded("llava1.5_13b_val_official_scores")
    rng = random.Random(FALLBACK_SEED)
    assert [is_correct(row, rng) for row in rows] == [row["official_correct"] for row in rows]


def test_the_random_answers_depend_on_the_order_of_the_rows() -> None:
    rows = recorded("llava1.5_13b_val_responses")
    silent = [{**row, "response": ""} for row in rows]
    assert score_rows(silent) == score_rows(silent) != score_rows(silent[::-1])


def test_parsed_choices_are_the_official_ones() -> None:
    rng = random.Random(FALLBACK_SEED)
    cases = recorded("parser_cases")["multiple_choice"]
    assert len(cases) == 400
    for case in cases:
        parsed = parse_multiple_choice(case["response"], case["all_choices"], case["index2ans"], rng)
        assert parsed == case["official_prediction"], case


def test_parsed_open_responses_are_the_official_ones() -> None:
    cases = recorded("parser_cases")["open"]
    assert len(cases) == 200
    for case in cases:
        parsed = parse_open(case["response"])
        assert parsed == sorted(case["official_prediction"], key=str), case
        assert is_open_correct(case["answer"], parsed) == case["official_correct"], case


def test_every_subject_belongs_to_one_domain() -> None:
    subjects = [subject for names in DOMAINS.values() for subject in names.split()]
    assert len(subjects) == len(set(subjects)) == 30
    assert set(subjects) == set(recorded("llava1.5_13b_val_official_scores")["subjects"])
