"""CMMMU scores are the official ones, random answers included."""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.golden import ROOT

from yivl.eval.benchmarks import cmmmu, mmmu, subjects
from yivl.eval.benchmarks.cmmmu import (
    BLANK,
    CHOICE,
    DOMAINS,
    JUDGEMENT,
    PUBLISHED,
    is_correct,
    parse_blank,
    parse_choice,
    parse_judgement,
    score_rows,
)
from yivl.eval.benchmarks.subjects import FALLBACK_SEED

# Responses written for this test, with the results of eval/utils/eval_utils.py of CMMMU-Benchmark/CMMMU in this order
# after random.seed(42).
CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "cmmmu/parser_cases.json").read_text(encoding="utf-8")
)


# The responses of Yi-VL-34B that CMMMU-Benchmark/CMMMU publishes (eval/example) with options and answers of the
# validation split, domain by domain, and the verdicts of its evaluation.
PUBLISHED_RESPONSES: list[dict[str, Any]] = [
    json.loads(line)
    for line in (Path(__file__).parent / "cmmmu/yi_vl_34b_val.jsonl").read_text(encoding="utf-8").split("\n")
    if line
]


def test_the_published_responses_of_yi_vl_34b_have_the_published_score() -> None:
    rows = [
        {**row, "index2ans": dict(zip("ABCD", row.get("options", ()), strict=False))} for row in PUBLISHED_RESPONSES
    ]
    scores = score_rows(rows)
    assert len(rows) == 900
    assert len(scores["subjects"]) == 30
    assert [
        round(100 * figure, 1) for figure in (scores["overall"], PUBLISHED["Yi-VL-34B, published"]["val"] / 100)
    ] == [36.2, 36.2]
    rng = random.Random(FALLBACK_SEED)
    assert [is_correct(row, rng) for row in rows] == [row["official_correct"] for row in rows]


@pytest.mark.parametrize(
    ("benchmark", "split", "expected"),
    [
        (cmmmu, "val", {"val": 42.5, "test": 43.7}),
        (mmmu, "validation", {"validation": 56.8, "test": 55.7}),
    ],
)
def test_the_whole_benchmark_is_charted_beside_the_published_models(
    tmp_path: Path, benchmark: Any, split: str, expected: dict[str, float]
) -> None:
    domains = [*(DOMAINS.values() if benchmark is cmmmu else mmmu.DOMAINS)]
    scores = {
        "subjects": {"one": {"num": 1, "acc": 0.3}},
        "domains": dict.fromkeys(domains, 0.3),
        "overall": 0.3,
    }
    report = subjects.report(
        argparse.Namespace(split=split, benchmark="it"),
        [(domain, "one") for domain in (domains * 150)[:900]],
        {},
        lambda: scores,
        benchmark.PUBLISHED,
    )
    assert report.chart is not None
    models = report.chart.models
    assert models["GPT-4V"] == expected
    assert models["this model"] == {split: 30.0}
    assert {"Yi-VL-34B, published", "Yi-VL-6B, published"} < models.keys()
    table = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    assert all(f"{values[split]:.1f} / {values['test']:.1f}" in table for values in benchmark.PUBLISHED.values())
    report.chart.draw(tmp_path / "whole.png")
    replace(report.chart, models={}).draw(tmp_path / "part.png")
    with Image.open(tmp_path / "whole.png") as whole, Image.open(tmp_path / "part.png") as part:
        assert whole.width > part.width + 500


def test_verdicts_are_the_official_ones() -> None:
    assert {case["type"] for case in CASES} == {CHOICE, JUDGEMENT, BLANK}
    assert len(CASES) == 600
    rng = random.Random(FALLBACK_SEED)
    for case in CASES:
        assert is_correct(case, rng) == case["official_correct"], case


def test_parsed_responses_are_the_official_ones() -> None:
    rng = random.Random(FALLBACK_SEED)
    for case in CASES:
        if case["type"] == CHOICE and case["response"]:
            assert parse_choice(case["response"], case["index2ans"], rng) == case["official_prediction"], case
        elif case["type"] == JUDGEMENT:
            assert parse_judgement(case["response"], rng) == case["official_prediction"], case
        elif case["type"] == BLANK:
            parsed = parse_blank(case["response"], case["answer"])
            assert str(parsed) == str(case["official_prediction"]), case  # as text: NaN equals nothing


@pytest.mark.parametrize("reverse", [False, True])
def test_domains_are_scored_in_the_official_order_for_any_order_of_the_rows(reverse: bool) -> None:
    rows = [
        {"type": CHOICE, "category": category, "subcategory": f"{category}{place}", "answer": "A", "response": "嗯"}
        | {"index2ans": dict.fromkeys("ABCD", "没有")}
        for category in DOMAINS
        for place in range(10)
    ]
    rng = random.Random(FALLBACK_SEED)
    marks = [rng.choice("ABCD") == "A" for _ in rows]
    if reverse:  # of the domains; inside each the order is that of the rows
        rows = sorted(rows, key=lambda row: -[*DOMAINS].index(row["category"]))
    scores = score_rows(rows)
    assert scores["overall"] == sum(marks) / 60
    assert [*scores["domains"].values()] == [sum(marks[start : start + 10]) / 10 for start in range(0, 60, 10)]
    assert scores["subjects"]["商业3"] == {"num": 1, "acc": float(marks[13])}
