"""The GPU report: parts that fail, hang or print something else, the time limit, the page, and a rehearsal."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support.golden import ROOT
from support.serving import wait_until

FAKE = """
import json, os, subprocess, sys, time
part = sys.argv[-1] if sys.argv[1] == "--list" else sys.argv[2]
if sys.argv[1] == "--list":
    for name in ("good", "fails", "hangs", "garbage", "last"):
        print(json.dumps({"part": name, "seconds": 2, "title": name.title()}))
elif part == "all":
    print(json.dumps({"part": "good", "speed_per_s": 5}), flush=True)
    print(json.dumps({"part": "fails", "figure": {"error": "no"}}), flush=True)
    sys.exit("broken")
elif part == "good" or part == "last":
    print("a library prints this")
    print(json.dumps({"part": part, "speed_per_s": 1}))
    print(json.dumps({"part": part, "speed_per_s": 2, "peak_bytes": 3e9}))
elif part == "fails":
    print(json.dumps({"part": part, "first": {"seconds": 1.5}}), flush=True)
    raise RuntimeError("out of memory")
elif part == "hangs":
    print(json.dumps({"part": part, "first": 1}), flush=True)
    for name in ("TMPDIR", "GPU_REPORT_MEMORY_FOLDER"):
        open(os.environ[name] + "/left", "w").write("much")
    open(__file__ + ".folders", "w").write(os.environ["TMPDIR"] + ":" + os.environ["GPU_REPORT_MEMORY_FOLDER"])
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    open(__file__ + ".pid", "w").write(str(child.pid))
    time.sleep(600)
elif part == "garbage":
    print("[1, 2]\\n{not json\\n{}")
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script with parts of every kind."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    return script


@pytest.fixture
def jobs(fake: Path) -> dict[str, Any]:
    from gpu_report_runner import list_parts

    return {job.part: job for job in list_parts(fake)}


def run(jobs: list[Any], limit: float, log: Path) -> dict[str, Any]:
    from gpu_report_runner import run_jobs

    found: dict[str, Any] = {}
    run_jobs(jobs, ["--device", "cpu"], limit, log, found.__setitem__)
    return found


def test_the_last_figures_of_a_part_count(jobs: dict[str, Any], tmp_path: Path) -> None:
    assert [(job.title, job.seconds) for job in jobs.values()][:2] == [("Good", 2.0), ("Fails", 2.0)]
    log = tmp_path / "log.txt"
    assert run([jobs["good"]], 60, log) == {"good": {"speed_per_s": 2, "peak_bytes": 3e9}}
    assert log.read_text() == "=== good\na library prints this\n"


def test_a_part_that_fails_keeps_its_figures(jobs: dict[str, Any], tmp_path: Path) -> None:
    error = "exit code 1: RuntimeError: out of memory"
    assert run([jobs["fails"]], 60, tmp_path / "log") == {"fails": {"error": error, "first": {"seconds": 1.5}}}


def test_parts_share_a_log(jobs: dict[str, Any], tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    run([jobs["fails"]], 60, log)
    assert run([jobs["garbage"]], 60, log)["garbage"]["error"].startswith("no figures; exit code 0: {}")
    assert "RuntimeError: out of memory\n=== garbage\n" in log.read_text()


def test_a_part_that_prints_something_else_has_failed(jobs: dict[str, Any], tmp_path: Path) -> None:
    assert run([jobs["garbage"]], 60, tmp_path / "log")["garbage"]["error"].startswith("no figures; exit code 0")


def test_a_part_that_hangs_is_stopped_with_all_its_processes(fake: Path, jobs: dict[str, Any], tmp_path: Path) -> None:
    found = run([jobs["hangs"]], 2, tmp_path / "log")["hangs"]
    assert found == {"error": "stopped after 2 s", "first": 1}
    child = int(Path(f"{fake}.pid").read_text())
    wait_until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)
    folders = Path(f"{fake}.folders").read_text().split(":")
    assert len(set(folders)) == 2
    assert not any(map(os.path.exists, folders))


def test_parts_of_one_process_are_told_apart(jobs: dict[str, Any], tmp_path: Path) -> None:
    found = run([jobs["good"], jobs["fails"], jobs["last"]], 60, tmp_path / "log")
    assert found["good"] == {"speed_per_s": 5}
    assert found["fails"] == {"error": "exit code 1: broken", "figure": {"error": "no"}}
    assert found["last"] == {"error": "exit code 1: broken"}


def test_a_script_that_cannot_list_its_parts_is_named(fake: Path) -> None:
    from gpu_report_runner import list_parts

    fake.write_text("raise SystemExit('broken')")
    with pytest.raises(ValueError, match=r"fake\.py --list: broken"):
        list_parts(fake)
    fake.write_text("print('no JSON')")
    with pytest.raises(ValueError, match=r"fake\.py --list: JSONDecodeError"):
        list_parts(fake)


def test_a_script_that_does_not_list_its_parts_is_stopped(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_report_runner

    monkeypatch.setattr(gpu_report_runner, "LIST_SECONDS", 0.5)
    fake.write_text("import time; time.sleep(60)")
    with pytest.raises(ValueError, match=r"fake\.py --list: stopped after 0\.5 s"):
        gpu_report_runner.list_parts(fake)


@pytest.mark.usefixtures("fake")
def test_the_default_time_limit_is_enough_for_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu_report import FIRST, list_jobs, parse_args

    jobs, errors = list_jobs()
    monkeypatch.setattr(sys, "argv", ["gpu_report.py"])
    assert not errors
    assert sum(job.seconds for job in jobs) <= 60 * parse_args().minutes
    assert tuple(job.part for job in jobs[: len(FIRST)]) == FIRST


@pytest.mark.usefixtures("fake")
def test_the_documented_commands_measure_all_parts_in_their_time() -> None:
    from gpu_report import list_jobs

    seconds = {job.part: job.seconds for job in list_jobs()[0]}
    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    commands = re.findall(r"^scripts/gpu_report.sh --minutes (\S+) --only (.*)$", text, re.MULTILINE)
    assert sorted(name for _, names in commands for name in names.split()) == sorted(seconds)
    for minutes, names in commands:
        assert sum(seconds[name] for name in names.split()) <= 60 * float(minutes)
    assert f"{sum(seconds.values()) / 60:.0f} minutes" in text


def make_report(jobs: list[Any], folder: Path, *, rehearsal: bool = False, order: Sequence[str] = ()) -> Any:
    from gpu_report import Report

    arguments = Namespace(output=folder, minutes=1.0, rehearsal=rehearsal, only=["one by one"])
    return Report(arguments, jobs, {}, order=order)


def test_a_report_is_continued(jobs: dict[str, Any], tmp_path: Path) -> None:
    from gpu_report import measure

    out, order = tmp_path / "out", list(jobs)
    chosen = [jobs["fails"], jobs["last"]]
    measure(make_report(chosen, out, order=order), chosen, 60)
    first = json.loads((out / "report.json").read_text())["parts"]
    chosen = [jobs["good"], jobs["last"]]
    report = make_report(chosen, out, order=order)
    assert report.values["parts"]["last"] == first["last"]  # until there is another figure
    report.leave_out([jobs["last"]], "late")
    assert report.values["parts"]["last"] == first["last"]
    report.record("last", {"speed_per_s": 7})
    measure(report, chosen[:1], 60)
    values = json.loads((out / "report.json").read_text())
    assert list(values["parts"]) == ["good", "fails", "last"]
    assert values["parts"]["fails"] == first["fails"]
    assert values["parts"]["last"]["figures"] == {"speed_per_s": 7}
    assert (values["minutes"], report.has_failed) == (2, False)
    assert "| Fails, " in (out / "report.md").read_text()
    assert [line for line in report.log.read_text().splitlines() if line.startswith("===")] == [
        "=== fails",
        "=== last",
        "=== good",
    ]
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "report.json", "report.md"]


@pytest.mark.parametrize("former", ['{"machine": "another", "rehearsal": false}', "{}", "[]", "{"])
def test_a_report_of_another_machine_is_kept(former: str, jobs: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(former)
    report = make_report([jobs["good"]], tmp_path)
    assert list(report.values["parts"]) == ["good"]
    assert (tmp_path / "report.former.json").read_text() == former


def test_a_part_starts_only_if_its_time_is_left(jobs: dict[str, Any], tmp_path: Path) -> None:
    from dataclasses import replace

    from gpu_report import measure

    chosen = [replace(jobs["good"], seconds=600.0), jobs["last"]]
    report = make_report(chosen, tmp_path / "out")
    measure(report, chosen, 30)
    parts = json.loads((tmp_path / "out/report.json").read_text())["parts"]
    assert parts["good"]["figures"]["no_time"] == "needs about 600 s, 30 s were left"
    assert parts["last"]["figures"] == {"speed_per_s": 2, "peak_bytes": 3e9}
    assert report.has_failed
    assert "| Good |  | no time left: needs about 600 s, 30 s were left |  |" in report.markdown()


def driver(fake: Path, out: Path) -> list[str]:
    """Return the command of a report whose only script is the fake one."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'scripts'); import gpu_report; "
        "from yivl import command_line; "
        f"gpu_report.FOLDER, gpu_report.SCRIPTS = Path({str(fake.parent)!r}), ('fake.py', 'absent.py'); "
        "command_line.run(gpu_report.main)"
    )
    return [sys.executable, "-c", code, "--rehearsal", "--output", str(out)]


def test_a_rehearsal_fails_with_a_part_and_replaces_the_section(fake: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- gpu -->\nold\n<!-- /gpu -->\nafter\n")
    command = [*driver(fake, tmp_path / "out"), "--markdown", str(page)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["parts"]["absent.py"]["figures"]["error"].startswith("absent.py --list:")
    text = page.read_text()
    assert text.startswith("before\n<!-- gpu -->\n")
    assert "old" not in text
    assert (tmp_path / "out/report.md").read_text().strip() in text
    alone = subprocess.run([*driver(fake, tmp_path / "out"), "--only", "good"], cwd=ROOT, check=False)
    assert alone.returncode == 1  # absent.py
    wrong = [*driver(fake, tmp_path / "out"), "--only", "god"]
    refused = subprocess.run(wrong, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "--only god: no such part; expected some of good, fails" in refused.stderr


def test_sigterm_stops_the_part_and_keeps_the_report(fake: Path, tmp_path: Path) -> None:
    command = [*driver(fake, tmp_path / "out"), "--only", "good", "hangs", "last"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pid_file = Path(f"{fake}.pid")
    wait_until(lambda: pid_file.is_file() and pid_file.read_text() != "")
    time.sleep(0.2)  # the figure printed before is read
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    child = int(pid_file.read_text())
    wait_until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)
    parts = json.loads((tmp_path / "out/report.json").read_text())["parts"]
    assert parts["good"]["figures"]["speed_per_s"] == 2
    assert parts["hangs"]["figures"] == {"first": 1}
    assert parts["last"]["figures"] == {"no_time": "not reached"}


@pytest.mark.usefixtures("fake")
def test_the_page_compares_with_targets() -> None:
    from gpu_report_page import markdown_report

    def part(**figures: Any) -> dict[str, Any]:
        return {"title": "some part", "figures": figures, "seconds": 12.3}

    answer = {"first_token": {"times_the_bound": 2.5}, "decode": {"times_the_bound": 1.2, "tokens_per_s": 250.0}}
    report: dict[str, Any] = {
        "machine": "NVIDIA H100",
        "date": "2030-01-01T00:00",
        "seconds": 90,
        "minutes": 20,
        "rehearsal": False,
        "parts": {
            "environment": part(
                machine={"gpu": "NVIDIA H100", "gpu_bytes": 85e9, "driver": "580"}, rates={"memory_bytes_per_s": 3e12}
            ),
            "bf16": part(answer=answer, peak_bytes=12.5e9, flash_attention_2={"skipped": "needs flash_attn"}),
            "golden": part(float32_without_tf32={"equal_answers": 1.0}, error="exit | code 1"),
            "lora": part(mfu=0.3, estimate_over_peak=1.2, step_seconds=[0.1, 0.2], losses=[5.0], skipped=[]),
        },
    }
    lines = markdown_report(report).splitlines()
    assert lines[0] == "**NVIDIA H100**, 2030-01-01T00:00, 1.5 of 20 minutes; gpu 85 GB, driver 580."
    assert lines[4:] == [
        "| some part, 12 s | rates | memory 3,000 GB/s |  |",
        "| some part, 12 s |  | peak 12.5 GB |  |",
        "|  | answer | first token times the bound 2.5, decode times the bound 1.2, decode 250 tokens/s | "
        "first token times the bound at most 2: **missed**, 1.25 × as much; decode times the bound at most 1.3: met |",
        "|  | flash attention 2 | skipped: needs flash_attn |  |",
        "| some part, 12 s |  | **failed**: exit / code 1 |  |",
        "|  | float32 without tf32 | equal answers 1 | equal answers at least 1: met |",
        "| some part, 12 s |  | mfu 0.3, estimate over peak 1.2, step 0.1 / 0.2 s | mfu at least 0.4: "
        "**missed**, 0.75 × as much; estimate over peak 0.9 to 1.1: **missed**, 1.20 |",
    ]
    assert "missed" not in markdown_report(report | {"rehearsal": True})


def test_without_a_gpu_it_says_so_in_one_line(tmp_path: Path) -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    command = ["scripts/gpu_report.sh", "--output", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    expected = "error: PyTorch finds no CUDA GPU on this machine; use --rehearsal for the same code on a CPU\n"
    assert (result.returncode, result.stderr) == (2, expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("fake")
def test_transformers_llava_has_the_weights_of_the_model() -> None:
    from gpu_report_inference import transformers_llava
    from random_models import random_model

    loaded = random_model("tiny", "float32")
    llava, config = transformers_llava(loaded), loaded.model.config
    text, pixels = torch.randint(3, 900, (1, 12)), torch.randn(1, 3, 112, 112)
    slots = torch.full((1, config.num_patches), llava.config.image_token_id)
    with torch.inference_mode():
        theirs = llava(input_ids=torch.cat([text[:, :4], slots, text[:, 4:]], dim=1), pixel_values=pixels).logits
        ours = loaded.model(torch.cat([text[:, :4], torch.tensor([[-200]]), text[:, 4:]], dim=1), images=pixels).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert {value.data_ptr() for value in llava.parameters()} <= {
        value.data_ptr() for value in loaded.model.parameters()
    }


@pytest.mark.usefixtures("fake")
def test_a_figure_that_fails_does_not_end_its_part(capsys: pytest.CaptureFixture[str]) -> None:
    from gpu_report_parts import Figures, require_packages

    figures = Figures("part", "cpu", rehearsal=True, seconds=60)
    figures.add("first", lambda: 1 / 0)
    figures.add("second", lambda: require_packages("json", "no_such_package"))
    figures.add("third", lambda: {"value": 1.23456})
    output = capsys.readouterr()
    assert output.err.count("Traceback") == 1
    assert "lambda: 1 / 0" in output.err
    *_, last = (json.loads(line) for line in output.out.splitlines())
    assert last == {
        "part": "part",
        "first": {"error": "ZeroDivisionError: division by zero"},
        "second": {"skipped": "needs no_such_package, which is not installed"},
        "third": {"value": 1.235},
    }


@pytest.mark.usefixtures("fake")
def test_a_part_that_fails_logs_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    from gpu_report_parts import Figures, Part, measure_part

    def fail(figures: Figures) -> None:
        figures.values["first"] = 1
        raise KeyError("absent")

    measure_part(Part("part", 1, "Part", fail), Figures("part", "cpu", rehearsal=True, seconds=60))
    output = capsys.readouterr()
    assert json.loads(output.out) == {"part": "part", "first": 1, "error": "KeyError: 'absent'"}
    assert "Traceback" in output.err


@pytest.mark.usefixtures("fake")
def test_the_peak_is_read_before_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    import benchmark_inference
    from gpu_report_inference import Setting, answer_figures, batch_figures
    from random_models import random_model

    peak = 1

    def rates(*_: Any) -> tuple[float, float]:
        nonlocal peak
        peak = 4 * 10**9
        return 1e9, 1e9

    monkeypatch.setattr(benchmark_inference, "machine_rates", rates)
    monkeypatch.setattr(benchmark_inference, "peak_bytes", lambda _: peak)
    loaded = random_model("tiny", "float32")
    assert answer_figures(loaded, Setting("cpu", "tiny", 4, 1, (1,), None))["peak_bytes"] == 1
    peak = 1
    assert batch_figures(loaded, Setting("cpu", "tiny", 4, 1, (1,), None), 2)["peak_bytes"] == 1


@pytest.mark.usefixtures("fake")
def test_the_peak_of_a_figure_has_nothing_that_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_report_parts

    events: list[str] = []
    monkeypatch.setattr(gpu_report_parts, "free_memory", lambda: events.append("reset"))
    gpu_report_parts.Figures("part", "cpu", rehearsal=True, seconds=60).add("x", lambda: events.append("measured"))
    assert events[:2] == ["reset", "measured"]


@pytest.mark.usefixtures("fake")
def test_batches_without_graphs_are_reported() -> None:
    from gpu_report_inference import graph_figures

    graphs = [None, Namespace(num_left=1), Namespace(num_left=0)]
    found = [graph_figures(Namespace(decoding_graphs=value))["cuda_graphs"] for value in graphs]
    assert found == [False, False, True]


def test_the_log_of_a_part_has_what_the_package_reports(fake: Path) -> None:
    fake.write_text(
        "import logging\nfrom gpu_report_parts import Part, run_part\n"
        "report = lambda figures: logging.getLogger('yivl.inference').info('decoding without CUDA graphs')\n"
        "run_part([Part('part', 1, 'Part', report)], '')\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"}
    command = [sys.executable, str(fake), "--part", "part", "--device", "cpu"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "decoding without CUDA graphs\n" in result.stderr


@pytest.mark.usefixtures("fake")
def test_a_training_without_a_loss_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_report_programs
    from gpu_report_parts import Figures

    script = tmp_path / "scripts/train_stage3.sh"
    script.parent.mkdir()
    script.write_text("#!/bin/sh\necho waiting for a GPU\nsleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(gpu_report_programs, "ROOT", tmp_path)
    with pytest.raises(TimeoutError, match="no loss after 2 s: waiting for a GPU"):
        gpu_report_programs.train_for(tmp_path, 1.0, Figures("part", "cpu", rehearsal=True, seconds=5))


@pytest.mark.usefixtures("fake")
def test_the_image_is_decoded_once() -> None:
    from gpu_report_inference import open_photo

    assert open_photo() is open_photo()
    assert (open_photo().mode, getattr(open_photo(), "fp", None)) == ("RGB", None)


@pytest.mark.slow
def test_a_rehearsal_measures_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_report_training

    environment = os.environ | {"PYTHON": sys.executable}
    command = ["scripts/gpu_report.sh", "--rehearsal", "--output", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout  # no part has failed
    parts = json.loads((tmp_path / "out/report.json").read_text())["parts"]
    for part in gpu_report_training.PARTS:
        figures = parts[part.name]["figures"]
        assert "step_seconds" in figures or "compiles" in figures["skipped"]
    assert parts["golden"]["figures"]["float32_without_tf32"]["equal_answers"] == 1
    assert parts["small_model"]["figures"]["float32"]["equal_answers"] == 1
    assert parts["bf16"]["figures"]["transformers"]["tokens_per_s"] > 0
    assert parts["load_34b"]["figures"]["4_bits"]["loads"] == 1
    assert parts["small_training"]["figures"]["steps"] >= 1
