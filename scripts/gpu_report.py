"""Measure everything that this package promises on a GPU, in one run: scripts/gpu_report.sh.

scripts/gpu_report.sh
scripts/gpu_report.sh --minutes 9 --only lora full     a share of it; the report keeps the parts of other runs
scripts/gpu_report.sh --rehearsal     the same code on a CPU with small shapes, in some minutes

Parts are ordered by worth. Each is a process of its own with a time limit; what fails is reported and the rest is
measured. The report, JSON and Markdown in --output, is written after every figure, so that a run that is interrupted
loses none; a report of the same machine in this folder is continued. Exit code 1 if a part failed in a rehearsal, 2 if
there is no GPU.
"""

import json
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from gpu_report_page import markdown_report
from gpu_report_runner import Job, list_parts, run_jobs

from yivl import command_line
from yivl.checkpoint.atomic import write_json, write_text
from yivl.errors import YiVLError
from yivl.parser import Parser

FOLDER = Path(__file__).resolve().parent
SCRIPTS = tuple(f"gpu_report_{name}.py" for name in ("checks", "inference", "training", "programs"))
FIRST = ("environment", "golden", "small_model", "bf16", "compiled", "gpu_tests")
"""Parts in order of worth; the others follow in the order of their scripts."""
PATIENCE = 3.0
"""Time limit of a part, as a multiple of the time that it is expected to take."""


def parse_args() -> Namespace:
    """Return the flags."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=30, help="time limit of this run (default: what all parts need, 30)"
    )
    parser.add_argument("--rehearsal", action="store_true", help="on a CPU, with small shapes, each figure once")
    parser.add_argument("--output", type=Path, default=Path("out/gpu-report"), help="folder (default: %(default)s)")
    parser.add_argument("--markdown", type=Path, help="also replace the section gpu of this page, docs/benchmarks.md")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts to measure (default: all)")
    return parser.parse_args()


def main() -> None:
    """Measure the parts and write the report."""
    arguments = parse_args()
    if arguments.minutes <= 0:
        raise YiVLError("--minutes: must be above 0")
    jobs, errors = list_jobs()
    names = [job.part for job in jobs]
    if unknown := sorted(set(arguments.only or ()) - set(names)):
        raise YiVLError(f"--only {unknown[0]}: no such part; expected some of {', '.join(names)}")
    if arguments.rehearsal:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # on so small tensors more threads only wait for each other
    else:
        require_gpu()
    jobs = [job for job in jobs if not arguments.only or job.part in arguments.only]
    report = Report(arguments, jobs, errors, order=names)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))  # ends the part that runs
    try:
        measure(report, jobs, 60 * arguments.minutes)
    finally:
        report.save()
    print(report.markdown())
    print(f"\n{arguments.output}/report.json, report.md and log.txt", file=sys.stderr)
    if arguments.markdown is not None:
        from benchmark_report import replace_section

        replace_section(arguments.markdown, "gpu", report.markdown())
    if arguments.rehearsal and report.has_failed:
        sys.exit(1)


def require_gpu() -> None:
    """Check that PyTorch finds a GPU.

    Raises:
        YiVLError: If it finds none.
    """
    import torch

    if not torch.cuda.is_available():
        raise YiVLError("PyTorch finds no CUDA GPU on this machine; use --rehearsal for the same code on a CPU")


def list_jobs() -> tuple[list[Job], dict[str, str]]:
    """Return the parts of all scripts in order of worth, and why a script has none."""
    jobs, errors = [], {}
    for name in SCRIPTS:
        try:
            jobs += list_parts(FOLDER / name)
        except ValueError as error:
            errors[name] = str(error)
    jobs.sort(key=lambda job: FIRST.index(job.part) if job.part in FIRST else len(FIRST))
    return jobs, errors


def measure(report: "Report", jobs: list[Job], seconds: float) -> None:
    """Run the parts in order while time is left: one process each, in a whole rehearsal one for each script."""
    end = time.monotonic() + seconds
    flags = ["--device", "cpu", "--rehearsal"] if report.arguments.rehearsal else ["--device", "cuda"]
    groups = [[job] for job in jobs]
    if report.arguments.rehearsal and not report.arguments.only:
        scripts = dict.fromkeys(job.script for job in jobs)
        groups = [[job for job in jobs if job.script == script] for script in scripts]
    for group in groups:
        left = end - time.monotonic()
        expected = 0.0 if report.arguments.rehearsal else sum(job.seconds for job in group)
        if left < max(expected, 1):
            report.leave_out(group, f"needs about {expected:.0f} s, {max(left, 0):.0f} s were left")
            continue
        limit = left if report.arguments.rehearsal else min(left, PATIENCE * expected)
        report.start(group)
        run_jobs(group, flags, limit, report.log, report.record)


class Report:
    """The figures so far; they are saved whenever one is added.

    Args:
        arguments: The flags.
        jobs: The parts of this run. The others of a report of the same machine in the folder stay as they are.
        errors: Why a script has no parts.
        order: All parts, in order of worth.
    """

    def __init__(
        self, arguments: Namespace, jobs: list[Job], errors: dict[str, str], *, order: Sequence[str] = ()
    ) -> None:
        self.arguments = arguments
        self._folder = Path(arguments.output)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._start = time.monotonic()
        self._names = [*(job.part for job in jobs), *errors]
        self._measured = ""  # the part that is measured, since when, and the time of its last figure
        self._since = self._last = self._start
        before = self._read_former(arguments.rehearsal)
        self._seconds_before = before.get("seconds", 0.0)
        parts = {name: part for name, part in before.get("parts", {}).items() if name not in SCRIPTS}
        for job in jobs:  # figures of another run are kept until there are new ones
            parts[job.part] = {"figures": {"no_time": "not reached"}} | parts.get(job.part, {}) | {"title": job.title}
        parts = {name: parts[name] for name in dict.fromkeys((*order, *parts)) if name in parts}
        self.values: dict[str, Any] = {
            "date": now(),
            "rehearsal": arguments.rehearsal,
            "machine": machine_name(),
            "minutes": before.get("minutes", 0) + arguments.minutes,
            "seconds": 0.0,
            "parts": parts | {name: {"title": name, "figures": {"error": error}} for name, error in errors.items()},
        }
        self.save()

    def _read_former(self, rehearsal: bool) -> dict[str, Any]:
        """Return the report that this one continues; one of another machine, or none that can be read, is renamed."""
        path = self._folder / "report.json"
        if not path.is_file():
            return {}
        try:
            former = json.loads(path.read_text(encoding="utf-8"))
            if (former["machine"], former["rehearsal"]) == (machine_name(), rehearsal):
                return dict(former)
            reason = f"of {former['machine']}{', a rehearsal' * former['rehearsal']}"
        except (ValueError, KeyError, TypeError) as error:
            reason = f"cannot be continued: {error!r}"
        path.replace(path.with_name("report.former.json"))
        print(f"{path}: {reason}; renamed to report.former.json", file=sys.stderr)
        return {}

    @property
    def log(self) -> Path:
        """The file for the output of all parts."""
        return self._folder / "log.txt"

    @property
    def has_failed(self) -> bool:
        """Whether a part of this run failed or was not reached."""
        return any(_has(self.values["parts"][name]["figures"], {"error", "no_time"}) for name in self._names)

    def start(self, jobs: list[Job]) -> None:
        """Note that parts run now."""
        self._last = time.monotonic()
        print(f"{', '.join(job.part for job in jobs)} ...", file=sys.stderr, flush=True)

    def record(self, name: str, figures: dict[str, Any]) -> None:
        """Set the figures of a part."""
        if name != self._measured:
            self._measured, self._since = name, self._last
        self._last = time.monotonic()
        seconds = round(self._last - self._since, 1)
        self.values["parts"][name] |= {"figures": figures, "seconds": seconds, "date": now()}
        self.save()

    def leave_out(self, jobs: list[Job], reason: str) -> None:
        """Report that there is no time for parts, unless another run has measured them."""
        for job in jobs:
            part = self.values["parts"][job.part]
            if "date" not in part:
                part["figures"] = {"no_time": reason}
        self.save()

    def markdown(self) -> str:
        """Return the report as Markdown."""
        return markdown_report(self.values)

    def save(self) -> None:
        """Write the report."""
        self.values["seconds"] = round(self._seconds_before + time.monotonic() - self._start, 1)
        write_json(self._folder / "report.json", self.values, sort_keys=False)
        write_text(self._folder / "report.md", self.markdown() + "\n")


def now() -> str:
    """Return the date and the time."""
    return datetime.now(UTC).isoformat(timespec="minutes")


@cache
def machine_name() -> str:
    """Return the name of the GPU, or of the CPU without one."""
    import torch
    from benchmark_inference import machine

    facts = machine("cuda" if torch.cuda.is_available() else "cpu")
    return str(facts.get("gpu", facts["cpu"]))


def _has(figures: Any, keys: set[str]) -> bool:
    """Return whether one of the keys is anywhere in nested figures."""
    if not isinstance(figures, dict):
        return False
    return bool(keys & figures.keys()) or any(_has(value, keys) for value in figures.values())


if __name__ == "__main__":
    command_line.run(main)
