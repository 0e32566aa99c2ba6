"""Third-party tools give the answers of ``Chat``: ``pytest -m peers``, which needs a package registry."""

import re
import runpy
import subprocess
import sys
import tomllib

import pytest
from support.golden import ROOT

RUN = ROOT / "tests/peers/run.py"
NAMES = runpy.run_path(str(RUN))


@pytest.mark.peers
@pytest.mark.parametrize("peer", NAMES["PEERS"])
def test_a_peer_gives_the_answers_of_chat(peer: str) -> None:
    subprocess.run([sys.executable, RUN, ROOT / "out/peers", peer], check=True)


def test_only_their_marker_runs_them() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert settings["addopts"].endswith("-m 'not slow and not peers'")


def test_the_documented_table_is_of_the_versions_that_run() -> None:
    text = (ROOT / "docs/interop.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if re.search(r"\d+ of \d+ answers equal", line)]
    pinned = " ".join([*(word for words in NAMES["PACKAGES"].values() for word in words), NAMES["VLMEVALKIT"]])
    for version in re.findall(r"(?:transformers|llamafactory|vlmeval|openai|litellm)==([\d.]+)", pinned):
        assert any(f"{version} |" in line or f"{version}," in line for line in table), version
    for line in table:
        equal, asked = re.findall(r"(\d+) of (\d+) answers", line)[0]
        assert equal == asked, line
    assert len(table) == 10


def test_an_unknown_peer_is_named() -> None:
    result = subprocess.run([sys.executable, RUN, "work", "vllm"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("unknown peer vllm; usage: run.py WORK [transformers|")
