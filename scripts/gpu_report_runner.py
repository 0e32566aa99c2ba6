"""Run parts of the GPU report: each in a process of its own, which is killed at its time limit."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

Record = Callable[[str, dict[str, Any]], None]
LIST_SECONDS = 60.0
"""Time limit of ``--list``."""
MEMORY_FOLDER = "GPU_REPORT_MEMORY_FOLDER"
"""Variable of the environment that names the temporary folder of a part in memory."""


@dataclass(frozen=True)
class Job:
    """A part, as ``--list`` of its script describes it."""

    script: Path
    part: str
    seconds: float
    """Expected time."""
    title: str


def list_parts(script: Path) -> list[Job]:
    """Return the parts of a script in order of worth.

    Raises:
        ValueError: If the script cannot be run, or prints something else.
    """
    command = [sys.executable, str(script), "--list"]
    try:
        listed = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=LIST_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{script.name} --list: stopped after {LIST_SECONDS:g} s") from error
    jobs = []
    try:
        for line in listed.stdout.splitlines():
            fields = json.loads(line)
            jobs.append(Job(script, fields["part"], float(fields["seconds"]), fields["title"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{script.name} --list: {error!r}") from error
    if listed.returncode != 0 or not jobs:
        raise ValueError(f"{script.name} --list: {_last_line(listed.stderr) or 'no parts'}")
    return jobs


def run_jobs(jobs: Sequence[Job], flags: Sequence[str], limit: float, log: Path, record: Record) -> None:
    """Measure parts of one script in one process, and record the figures of each as they are printed.

    A part that the process did not report gets an ``error``: the exit code and the last line of its output, or that it
    was stopped. What it had printed before is kept; its temporary files are removed.

    Args:
        jobs: One part, or all parts of the script in a rehearsal.
        flags: Passed to the script.
        limit: Seconds after which all processes of the part are killed.
        log: Appended to: stderr, and stdout but for the figures.
        record: Takes the name of a part and its figures so far.
    """
    what = jobs[0].part if len(jobs) == 1 else "all"
    command = [sys.executable, str(jobs[0].script), "--part", what, *flags, "--seconds", str(round(limit))]
    found: dict[str, dict[str, Any]] = {}

    def take(line: str) -> None:
        name, figures = parse_figures(line)
        if name in [job.part for job in jobs]:
            found[name] = figures
            record(name, figures)
        else:
            errors.write(line)
            errors.flush()

    with temporary_folders() as folders, log.open("a", encoding="utf-8", errors="replace") as errors:
        errors.write(f"=== {', '.join(job.part for job in jobs)}\n")
        errors.flush()
        before = errors.tell()
        # Not a session of its own: what ends the session of the report ends its parts.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            env=os.environ | folders,
            process_group=0,
        )
        try:
            finished = _read_lines(process, time.monotonic() + limit, take)
        finally:
            kill_tree(process)
    code = process.returncode
    last = _last_line(log.read_bytes()[before:].decode("utf-8", "replace"))
    reason = f"stopped after {limit:.0f} s" if not finished else f"exit code {code}"
    reason += f": {last}" if last else ""
    failed = {job.part for job in jobs if job.part not in found}
    if not finished or (code != 0 and not any("error" in figures for figures in found.values())):
        failed |= set(list(found)[-1:])  # the part that was measured when the process ended
    for name in failed:
        record(name, {"error": reason if not finished or code else f"no figures; {reason}"} | found.get(name, {}))


@contextlib.contextmanager
def temporary_folders() -> Iterator[dict[str, str]]:
    """Yield the variables of the environment that name the temporary folders of a part, which are removed afterwards.

    ``TMPDIR`` and a folder in memory where there is one. A part that is killed cannot remove its own.
    """
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None, ignore_cleanup_errors=True) as fast,
    ):
        yield {"TMPDIR": folder, MEMORY_FOLDER: fast}


def parse_figures(line: str) -> tuple[str, dict[str, Any]]:
    """Return the part that a line of output is about, and its figures; no part if it is not a JSON object with one."""
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not isinstance(name := value.pop("part", None), str):
        return "", {}
    return name, value


def _read_lines(process: "subprocess.Popen[str]", deadline: float, take: Callable[[str], None]) -> bool:
    """Pass on the lines of a process until it ends; return whether it ended before the deadline."""
    assert process.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()

    def read(stream: IO[str]) -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
    try:
        while (line := lines.get(timeout=max(0, deadline - time.monotonic()))) is not None:
            take(line)
        process.wait(max(0.1, deadline - time.monotonic()))
    except (queue.Empty, subprocess.TimeoutExpired):
        return False
    return True


def kill_tree(process: "subprocess.Popen[str]") -> None:
    """Kill a process, its process group and its descendants: launchers start each rank in a session of its own."""
    tree = []
    with contextlib.suppress(psutil.NoSuchProcess):
        tree = psutil.Process(process.pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
