"""Programs that the endurance campaigns start and kill, with all processes that they start."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType

import psutil

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests/golden/checkpoint"
ATTEMPT_SECONDS = 300
"""After this time a program counts as one that hangs: fifty times what it takes on an idle machine."""


class Program:
    """A running command; leaving the ``with`` block kills what is left of it."""

    def __init__(self, command: Sequence[str | Path], **environment: str) -> None:
        self._output = TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        set_here = {"GPUS": "0", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = psutil.Popen(
            [os.fspath(word) for word in command],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path} | set_here | environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        self.started = time.monotonic()

    def __enter__(self) -> "Program":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._output.close()

    @property
    def code(self) -> int | None:
        """The exit code, or ``None`` while it runs."""
        code: int | None = self._process.poll()
        return code

    @property
    def seconds(self) -> float:
        """The time since the start."""
        return time.monotonic() - self.started

    def last_line(self) -> str:
        """Return the last line of stdout and stderr."""
        self._output.seek(0)
        lines = self._output.read().decode("utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def wait_until(self, reached: Callable[[], bool]) -> bool:
        """Return whether a condition came true before the program ended; it is polled every half millisecond.

        Raises:
            TimeoutError: If the program hangs.
        """
        while self.code is None:
            if reached():
                return True
            if self.seconds > ATTEMPT_SECONDS:
                raise TimeoutError(f"hangs; last line: {self.last_line()}")
            time.sleep(0.0005)
        return False

    def finish(self) -> str | None:
        """Wait for the end and return what went wrong, if anything."""
        try:
            code = self._process.wait(ATTEMPT_SECONDS)
        except psutil.TimeoutExpired:
            return f"hangs; last line: {self.last_line()}"
        return None if code == 0 else f"exit code {code}: {self.last_line()}"

    def kill(self) -> bool:
        """End all of its processes by SIGKILL, as a crash of the machine does; return whether it was running.

        The process group is not enough: torchrun starts each rank in a session of its own.
        """
        if self.code is not None:
            return False
        tree = [self._process]
        with suppress(psutil.NoSuchProcess):
            tree += self._process.children(recursive=True)
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for process in tree:
            while _is_alive(process):
                time.sleep(0.001)
        return self._process.wait() < 0


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def file_hashes(folder: Path, pattern: str) -> dict[str, str]:
    """Return the SHA-256 of the files of a folder, without those of its checkpoints, by relative path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob(pattern))
        if path.is_file() and not path.relative_to(folder).parts[0].startswith("checkpoint-")
    }
