"""``python -m yivl.data.check``: the report on training data."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.golden import CHECKPOINT, GOLDEN
from support.training import IMAGES, ROOT, conversation, write_rows, write_shards

from yivl.data import check
from yivl.data.check import Finding, Summary, histogram, natural_order, parse_args, plot_histogram
from yivl.data.rows import RowError
from yivl.errors import YiVLError


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run the program and return its exit code and what it prints."""

    def run(data: Path, *flags: str) -> tuple[int, str]:
        command = ["check", str(data), "--model-path", str(CHECKPOINT), "--workers", "0", "--image-folder", str(IMAGES)]
        monkeypatch.setattr(sys, "argv", [*command, *flags])
        code = 0
        try:
            check.main()
        except SystemExit as leave:
            code = int(leave.code or 0)
        printed = capsys.readouterr()
        assert not printed.err
        return code, printed.out

    return run


def test_a_valid_mixture_is_summarized_by_source_and_plotted(
    report: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.json")
    shards = write_shards(tmp_path / "shards", 2, 3)
    (tmp_path / "mix.yaml").write_text(
        f"- {{data_path: rows.json, image_folder: {IMAGES}}}\n- {{data_path: '{shards}'}}\n"
    )
    code, text = report(tmp_path / "mix.yaml", "--plot", str(tmp_path / "lengths.png"))
    assert code == 0
    assert f"{tmp_path}/rows.json: 8 valid rows (4 with images, 0 captions, 4 text only), 0 invalid" in text
    assert f"{shards}: 6 valid rows (0 with images, 6 captions, 0 text only), 0 invalid" in text
    assert "0 rows are truncated to 2,048" in text
    with Image.open(tmp_path / "lengths.png") as image:
        assert len(image.convert("RGB").getcolors(100_000)) > 10


def test_a_limit_is_reported_with_the_number_of_all_rows(
    report: Callable[..., tuple[int, str]], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.json")
    shards = write_shards(tmp_path / "shards", 2, 3)
    (tmp_path / "mix.yaml").write_text(
        f"- {{name: files, data_path: rows.json, max_rows: 5}}\n"
        f"- {{name: shards, data_path: '{shards}', max_rows: 4}}\n"
    )
    caplog.set_level("INFO")
    _, text = report(tmp_path / "mix.yaml")
    assert "files: 5 valid rows" in text
    assert "shards: 4 valid rows" in text
    assert [line for line in caplog.messages if "keeps" in line] == [
        "files: max_rows keeps 5 of 8 rows",
        "shards: max_rows keeps 4 of 6 rows",
    ]


def test_every_invalid_row_is_reported_with_its_reason_and_the_exit_code_is_one(
    report: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows: list[Any] = [
        conversation(None, "q", "a"),
        conversation(str(tmp_path / "bad.png"), "q", "a"),
        3,
        conversation(None, "q", "a", role="wizard"),
        conversation(None, "long " * 3000, "a"),
        *[conversation(None, "q", "a")] * 5,
        conversation("https://example.com/a.png", "q", "a"),
        conversation("missing.png", "q", "a"),
    ]
    path = write_rows(tmp_path / "rows.json", rows)
    code, text = report(path, "--allow-outside-images")
    assert code == 1
    assert "6 valid rows" in text
    listed = text[text.index("6 invalid rows:") :].splitlines()[1:]
    for line, (number, reason) in zip(
        listed,
        (
            (1, "not a"),
            (2, "expected a JSON object"),
            (3, "unknown role 'wizard'"),
            (4, "no answer within the maximum sequence length of 2048"),
            (10, "the image https://example.com/a.png is a URL; training reads local files"),
            (11, "no such file"),
        ),
        strict=True,
    ):
        assert line.startswith(f"  {path} row {number}: ")
        assert reason in line


def test_what_is_unusual_but_valid_is_counted_with_its_rows(
    report: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    shutil.copy(IMAGES / "photo_rgb.jpg", tmp_path)
    rows = [conversation(None, "q", "a"), *[conversation(None, "q", " ")] * 7, conversation(None, "q", "a")]
    rows[-1]["conversations"].insert(0, {"from": "gpt", "value": "Hello."})
    path = write_rows(tmp_path / "rows.json", [*rows, conversation("../photo_rgb.jpg", "q", "a")])
    (tmp_path / "images").mkdir()
    code, text = report(path, "--image-folder", str(tmp_path / "images"))
    assert code == 1
    assert "row 9: the image " in text
    code, text = report(path, "--image-folder", str(tmp_path / "images"), "--allow-outside-images")
    assert code == 0
    first = ", ".join(f"{path} row {number}" for number in range(1, 6))
    assert f"\n  7 rows have an empty answer: {first} and 2 more\n" in text
    assert f"\n  1 rows start with an answer, which is dropped: {path} row 8\n" in text
    assert f"\n  1 rows have an image outside the image folder: {path} row 9\n" in text


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_file_without_rows_is_an_error(name: str, report: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    (tmp_path / name).write_text("[]" if name == "rows.json" else "")
    with pytest.raises(RowError, match=f"{name}: no rows"):
        report(tmp_path / name)


def test_truncated_rows_are_counted_and_lengths_are_those_before_truncation() -> None:
    findings = [Finding("text", length, 5, "") for length in (90, 100, 110)] + [Finding("text", 50, 0, "bad")]
    summary = Summary()
    for finding in findings:
        summary.add(finding)
    assert summary.describe("x", 100).splitlines() == [
        "x: 3 valid rows (0 with images, 0 captions, 3 text only), 1 invalid",
        "  sequence length: 90 to 110, median 100; 1 rows are truncated to 100; targets: 15 tokens",
    ]


@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], list(range(1, 400)), [10, 10_000], [*range(1, 400), 50_000]])
def test_the_histogram_counts_every_row(lengths: list[int], tmp_path: Path) -> None:
    counts = [int(re.split("█+", line)[1].split("(")[0].replace(",", "")) for line in histogram(lengths).splitlines()]
    assert sum(counts) == len(lengths)
    plot_histogram(lengths, 2048, tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").is_file()


def test_one_outlier_leaves_the_histogram_readable() -> None:
    lines = histogram([*range(100, 300), 50_000]).splitlines()
    assert len(lines) == 21
    assert lines[-1].split() == [">", "299", "█", "1", "(up", "to", "50,000)"]


def test_a_missing_file_is_one_error_line_with_exit_code_2() -> None:
    command = [sys.executable, "-m", "yivl.data.check", "nowhere.json", "--model-path", str(GOLDEN / "checkpoint")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: nowhere.json: cannot be read (No such file or directory)\n"


def test_reasons_are_sorted_by_the_numbers_in_them() -> None:
    texts = ["row 10", "row 2", "row", f"row {'1' * 5000}", "row 002", "a"]
    assert sorted(texts, key=natural_order) == ["a", "row", "row 2", "row 002", "row 10", f"row {'1' * 5000}"]


def test_a_negative_number_of_workers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["check", "rows.json", "--workers", "-1"])
    with pytest.raises(YiVLError, match=r"^--workers -1 is negative; 0 is none;"):
        parse_args()
