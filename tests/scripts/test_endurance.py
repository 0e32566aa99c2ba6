"""The endurance campaigns: their table and exit code, what they notice, and the short form of the kills."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.golden import ROOT


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the names that a script defines."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return lambda name: runpy.run_path(str(ROOT / f"scripts/{name}.py"))


@pytest.mark.parametrize(("tried", "held", "code"), [(3, 3, 0), (3, 2, 1), (0, 0, 0)])
def test_the_exit_code_says_whether_all_promises_held(
    tried: int,
    held: int,
    code: int,
    scripts: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    outcome = scripts("endurance_report")["Outcome"]
    campaign = ModuleType("endurance_kills")
    campaign.run = lambda seconds, short: [outcome(f"after {seconds} s | {short}", tried, held, "a note")]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "endurance_kills", campaign)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- kills -->\nold\n<!-- /kills -->\nafter\n")
    flags = ["kills", "--short", "--minutes", "2", "--output", tmp_path / "out", "--markdown", page]
    monkeypatch.setattr(sys, "argv", ["endurance.py", *map(str, flags)])
    main = scripts("endurance")["main"]
    if code:
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
    else:
        main()
    row = f"| after 120.0 s / True | {tried} | {held} | a note |"
    assert row in capsys.readouterr().out.splitlines()
    assert row in page.read_text().splitlines()
    assert "old" not in page.read_text()
    written = json.loads((tmp_path / "out/kills.json").read_text())
    assert written["outcomes"] == [{"promise": "after 120.0 s | True", "tried": tried, "held": held, "notes": "a note"}]


@pytest.mark.parametrize(("tried", "code"), [(3, None), (0, 1)])
def test_a_whole_campaign_tries_every_promise_and_draws_the_memory(
    tried: int, code: int | None, scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome, figures = scripts("endurance_report")["Outcome"], []

    def run(_: float, short: bool, figure: Path | None = None) -> list[Any]:
        figures.append(figure)
        assert not short
        return [outcome("a promise", tried, tried)]

    campaign = ModuleType("endurance_requests")
    campaign.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "endurance_requests", campaign)
    page = tmp_path / "page.md"
    page.write_text("<!-- requests -->\n<!-- /requests -->\n")
    main = scripts("endurance")["main"]
    for flags in ([], ["--markdown", str(page)]):
        monkeypatch.setattr(sys, "argv", ["endurance.py", "requests", *flags])
        if code:
            with pytest.raises(SystemExit, match=str(code)):
                main()
        else:
            main()
    assert figures == [None, tmp_path / "endurance-memory.png"]


def write_run(folder: Path) -> None:
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "checkpoint-2/model.safetensors").write_bytes(b"of the step")
    (folder / "model.safetensors").write_bytes(b"final")
    lines = [{"step": 1, "loss": 2.5, "rows_per_second": 3}, {"step": 2, "loss": 2.25}, {"step": 2, "train_runtime": 1}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("file", "content", "differs"),
    [
        ("log.jsonl", '{"step": 1, "loss": 2.5, "rows_per_second": 9}\n{"step": 2, "loss": 2.25}\n', None),
        ("log.jsonl", '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.2500000000000004}\n', "losses"),
        ("log.jsonl", '{"step": 1, "loss": 2.5}\n{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n', "losses"),
        ("model.safetensors", "fina1", "weights"),
    ],
)
def test_one_bit_is_another_run(file: str, content: str, differs: str | None, scripts: Any, tmp_path: Path) -> None:
    kills = scripts("endurance_kills")
    for name in ("whole", "killed"):
        write_run(tmp_path / name)
    (tmp_path / "killed" / file).write_text(content)
    whole, killed = (kills["describe_run"](tmp_path / name) for name in ("whole", "killed"))
    assert [name for name in whole if whole[name] != killed[name]] == ([differs] if differs else [])


def test_leftovers_in_and_beside_the_output_folder_are_noticed(scripts: Any, tmp_path: Path) -> None:
    names_in = scripts("endurance_kills")["names_in"]
    for name in ("whole", "killed"):
        write_run(tmp_path / name)
    assert names_in(tmp_path / "killed") == names_in(tmp_path / "whole")
    (tmp_path / "killed/.unfinished").mkdir()
    (tmp_path / ".killed.ab12").mkdir()
    assert names_in(tmp_path / "killed") - names_in(tmp_path / "whole") == {".unfinished", ".killed.ab12"}


def test_a_kill_ends_processes_in_other_sessions_too(scripts: Any, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    child = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    with scripts("endurance_processes")["Program"]([sys.executable, "-c", code]) as program:
        assert program.wait_until(lambda: file.exists() and file.read_text())
        pid = file.read_text()
        assert program.kill()
        assert not program.kill()
    status = Path(f"/proc/{pid}/stat")
    assert not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


@pytest.mark.slow
def test_killed_runs_resume_bit_exactly(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/endurance.py", "kills", "--short", "--minutes", "9", "--output", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr[-2000:]}"
    tried = [outcome["tried"] for outcome in json.loads((tmp_path / "kills.json").read_text())["outcomes"]]
    assert sum(tried) >= 4
