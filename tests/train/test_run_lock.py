"""The lock of an output folder: held by one run, dropped with its process, and never in the way of a restart."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.golden import ROOT
from support.training import flags, train, write_rows

from yivl.errors import YiVLError
from yivl.train.run_lock import LOCK, run_lock

HOLDER = """
import os, socket, sys, time
from pathlib import Path
from yivl.train.run_lock import run_lock
if sys.argv[2]:
    socket.gethostname = lambda: sys.argv[2]
with run_lock(Path(sys.argv[1])):
    if os.fork() == 0:  # a data-loading worker, which inherits the open file
        time.sleep(20)
        os._exit(0)
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path, host: str = "") -> Iterator[subprocess.Popen[str]]:
    """Yield a process that holds the lock, with a child; it releases the lock when its input ends."""
    command = [sys.executable, "-c", HOLDER, str(folder), host]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_second_run_is_refused_by_one_line_that_names_the_first(tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = write_rows(tmp_path / "rows.json")
    with holder(out) as process:
        with pytest.raises(YiVLError) as refused:
            train(out, data)
        message = str(refused.value)
        started = json.loads((out / LOCK).read_text())["started"]
        who = f"process {process.pid} on {socket.gethostname()} since {started}"
        assert message == (f"{out}: another run writes to it ({who}); wait for its end, or give another --output_dir")
        assert [path.name for path in out.iterdir()] == [LOCK]  # nothing was written
        train(out, data, dry_run=True)


def test_the_lock_of_a_killed_run_is_free_at_once_and_the_file_goes_with_the_run(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        process.kill()
        process.wait()  # its child lives on, with the open file
        assert (tmp_path / LOCK).is_file()
        with run_lock(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_run_on_another_host_is_waited_for_as_long_as_a_server_may_keep_its_lock(tmp_path: Path) -> None:
    with holder(tmp_path, "node7") as process:
        message = rf"on node7 since .*; if that process has ended, delete {tmp_path / LOCK}$"
        with pytest.raises(YiVLError, match=message), run_lock(tmp_path, lease=0):
            pass
        assert process.stdin is not None
        process.stdin.close()  # it removes the file and drops the lock while we wait
        with run_lock(tmp_path, lease=30):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with run_lock(tmp_path):
        pass
    assert caplog.messages == [
        f"{tmp_path}: the file system has no locks (No locks available); do not start two runs in one folder"
    ]


@pytest.mark.slow
def test_all_ranks_end_if_the_folder_is_locked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = write_rows(tmp_path / "rows.json")
    command = [sys.executable, "-m", "yivl.train.launch", "--standalone", "--nproc-per-node", "2", "-m", "yivl.train"]
    with holder(out) as process:
        result = subprocess.run(
            [*command, *flags(out, data)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert process.poll() is None
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, result.stderr
    assert f"{out}: another run writes to it (process {process.pid} on" in errors[0]
    assert "Traceback" not in result.stderr
    assert result.returncode == 2
