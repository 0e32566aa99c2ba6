"""A full disk: one line, exit code 1, and a run that continues when there is space."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.training import flags, losses, train, write_rows

from yivl import command_line
from yivl.train.__main__ import main
from yivl.train.damage import check_files
from yivl.train.resume import finished_checkpoints
from yivl.train.run_log import read_log

RUN: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "report_to": "tensorboard"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Yield the mount point of a small file system."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


# A checkpoint of the full model has 4.8 MB, and the final model 2 MB.
@pytest.mark.parametrize(
    ("size", "checkpoints"),
    [("0k", []), ("300k", []), ("4m", []), ("6500k", ["checkpoint-2"]), ("11m", ["checkpoint-2", "checkpoint-4"])],
)
def test_a_run_ends_by_one_line_and_continues_when_there_is_space(
    size: str, checkpoints: list[str], disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.json")
    out = disk / "out"
    out.mkdir()
    limit = f"remount,size={size}" if size != "0k" else f"remount,size={os.sysconf('SC_PAGE_SIZE')}"
    subprocess.run(["mount", "-o", limit, str(disk)], check=True)
    with pytest.raises(SystemExit) as ended:
        command_line.run(lambda: main(flags(out, data, **RUN)))
    assert ended.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    how = f"add --resume auto, which continues from {checkpoints[-1]}" if checkpoints else "run the command again"
    assert error == f"error: {out}: No space left on device, or the quota is exceeded; free some and {how}"
    assert [path.name for path in finished_checkpoints(out)] == checkpoints
    for path in finished_checkpoints(out):
        check_files(path)
    assert not (out / "config.json").exists()
    # Nothing of an incomplete checkpoint is in the way of those who free space.
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    reached = losses(read_log(out / "log.jsonl"))

    subprocess.run(["mount", "-o", "remount,size=40m", str(disk)], check=True)
    log = train(out, data, **RUN, resume="auto")
    assert losses(log)[: len(reached)] == reached
    assert len(losses(log)) == 4
    assert (out / "config.json").is_file()
