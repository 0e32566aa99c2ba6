"""The short campaign of requests holds all promises, and a memory that grows is noticed."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from support.golden import ROOT


def test_a_plateau_of_the_memory_needs_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    plateau = runpy.run_path(str(ROOT / "scripts/endurance_requests.py"))["plateau"]
    for values, tried, held in (
        ([], 0, 0),
        ([100.0] * 7, 0, 0),
        ([100.0] * 8, 1, 1),
        ([*[100.0] * 9, *[140.0] * 3], 1, 0),
        ([100.0, 200, 300, *[330.0] * 9], 1, 1),
        ([100.0 + 10 * part for part in range(12)], 1, 0),
    ):
        outcome = plateau([(25 * part, value) for part, value in enumerate(values, 1)])
        assert (outcome.tried, outcome.held) == (tried, held), values


@pytest.mark.slow
def test_a_short_campaign_holds_every_promise(tmp_path: Path) -> None:
    figure = tmp_path / "memory.png"
    command = [sys.executable, "scripts/endurance_requests.py", "--short", "--minutes", "3", "--figure", str(figure)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line.split()[0].split("/") for line in result.stdout.splitlines()]
    assert len(lines) == 10
    assert all(int(tried) > 0 for _, tried in lines)
    assert figure.read_bytes().startswith(b"\x89PNG")
