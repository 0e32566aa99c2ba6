"""The short campaign of requests holds all promises."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.golden import ROOT


@pytest.mark.slow
def test_a_short_campaign_holds_every_promise(tmp_path: Path) -> None:
    figure = tmp_path / "memory.png"
    command = [sys.executable, "scripts/endurance_requests.py", "--short", "--minutes", "1", "--figure", str(figure)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line.split()[0].split("/") for line in result.stdout.splitlines()]
    assert len(lines) == 10
    assert all(int(tried) > 0 for _, tried in lines)
    assert figure.read_bytes().startswith(b"\x89PNG")
