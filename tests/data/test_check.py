"""``python -m yivl.data.check``: what is said of a data set before a run."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from support.golden import CHECKPOINT, GOLDEN
from support.training import IMAGES, ROOT, conversation, write_rows, write_shards

from yivl.data.check import Finding, describe, histogram


def check(data: Path | str, *flags: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "yivl.data.check", str(data), "--model-path", str(CHECKPOINT), "--workers", "0"]
    command += ["--image-folder", str(IMAGES), *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not result.stderr, result.stderr
    return result.returncode, result.stdout


def test_a_good_mixture_is_described_source_by_source_and_drawn(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.json")
    shards = write_shards(tmp_path / "shards", 2, 3)
    (tmp_path / "mix.yaml").write_text(
        f"- {{data_path: rows.json, image_folder: {IMAGES}}}\n- {{data_path: '{shards}'}}\n"
    )
    code, text = check(tmp_path / "mix.yaml", "--plot", str(tmp_path / "lengths.png"))
    assert code == 0
    assert f"{tmp_path}/rows.json: 8 good rows (4 with pictures, 0 captions, 4 text alone), 0 bad" in text
    assert f"{shards}: 6 good rows (0 with pictures, 6 captions, 0 text alone), 0 bad" in text
    assert "0 rows are cut at 2,048" in text
    with Image.open(tmp_path / "lengths.png") as picture:
        assert len(picture.convert("RGB").getcolors(100_000)) > 10


def test_every_bad_row_is_named_with_its_reason_and_the_exit_code_says_so(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = [
        conversation(None, "q", "a"),
        conversation(str(tmp_path / "bad.png"), "q", "a"),
        conversation(None, "q", "a", role="wizard"),
        conversation(None, "long " * 3000, "a"),
    ]
    path = write_rows(tmp_path / "rows.json", rows)
    code, text = check(path)
    assert code == 1
    assert "1 good rows" in text
    assert "3 rows would be left out:" in text
    for number, reason in ((1, "not a picture"), (2, "unknown role 'wizard'"), (3, "no answer left within 2048")):
        assert any(f"{path} row {number}: " in line and reason in line for line in text.splitlines())


def test_cut_rows_are_counted_and_lengths_are_those_before_the_cut() -> None:
    findings = [Finding("text", length, 5, "") for length in (90, 100, 110)] + [Finding("text", 50, 0, "bad")]
    assert describe("x", findings, 100).splitlines() == [
        "x: 3 good rows (0 with pictures, 0 captions, 3 text alone), 1 bad",
        "  positions: 90 to 110, median 100; 1 rows are cut at 100; targets: 15",
    ]


@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], list(range(1, 400)), [10, 10_000]])
def test_the_histogram_holds_every_row(lengths: list[int]) -> None:
    counts = [int(line.split()[-1].replace(",", "")) for line in histogram(lengths).splitlines()]
    assert sum(counts) == len(lengths)


def test_a_missing_file_is_one_line_and_exit_code_2() -> None:
    command = [sys.executable, "-m", "yivl.data.check", "nowhere.json", "--model-path", str(GOLDEN / "checkpoint")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: nowhere.json: cannot be read (No such file or directory)\n"
