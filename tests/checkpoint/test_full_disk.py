"""A full disk is one line that names what was to be written, and leaves what was there."""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import SafetensorError
from support.golden import CHECKPOINT

from yivl.checkpoint.full_disk import explain_full_disk
from yivl.errors import CheckpointError
from yivl.export.gguf import export_gguf
from yivl.export.hf import to_hf


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system smaller than the golden checkpoint."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root on Linux")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError("65536 requested and 43184 written"),  # NumPy
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:783] PytorchStreamWriter failed writing file data/3"),
    ],
    ids=lambda error: str(error)[:30],
)
def test_the_errors_of_libraries_name_the_target(error: Exception) -> None:
    said = "No space left on device, or the quota is exceeded; free some"
    with pytest.raises(OSError, match=said) as raised, explain_full_disk("out/model"):
        raise error
    assert raised.value.filename == "out/model"


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/model/log.jsonl"), "out/model"),
        (OSError(errno.ENOSPC, "No space left on device", "out/.model.yivl-partial-0-a/log.jsonl"), "out/model"),
        (OSError(errno.ENOSPC, "No space left on device", "out/other"), "out/other"),
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/torchinductor_root/a"), "/tmp/torchinductor_root/a"),
        (RuntimeError("OSError: [Errno 28] No space left on device: '/tmp/torchinductor_root/a'"), None),
    ],
    ids=str,
)
def test_a_file_elsewhere_is_named(error: Exception, named: str | None) -> None:
    with pytest.raises(OSError, match="free some and run") as raised, explain_full_disk("out/model"):
        raise error
    assert raised.value.filename == (named or "/tmp/torchinductor_root/a")


def test_full_shared_memory_is_named_with_its_fix() -> None:
    said = r"the quota is exceeded; .*--shm-size 16g\) or free some and run the command again: '/dev/shm'"
    with pytest.raises(OSError, match=said), explain_full_disk("out"):
        raise RuntimeError("unable to write to file </torch_310_2_0>: No space left on device (28)")


def test_only_the_thread_of_tensorboard_is_silent() -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    kinds = [threading.Thread, type("Writer", (threading.Thread,), {"__module__": "tensorboard.summary.writer"})]
    said = []
    for kind in kinds:
        shown: list[object] = []
        former, threading.excepthook = threading.excepthook, shown.append
        try:
            with explain_full_disk("out"):
                thread = kind(target=fail)
                thread.start()
                thread.join()
        finally:
            threading.excepthook = former
        said.append(len(shown))
    assert said == [1, 0]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EACCES, "Permission denied"),
        RuntimeError("mat1 and mat2"),
        RuntimeError("8 devices requested and 4 found"),
    ],
    ids=str,
)
def test_other_errors_are_not_changed(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, explain_full_disk("out"):
        raise error
    assert raised.value is error


def test_an_export_to_a_full_disk_leaves_nothing(small_disk: Path) -> None:
    for export in (to_hf, lambda source, target: export_gguf(source, target, dtype="float16")):
        with pytest.raises(OSError, match="No space left on device, or the quota is exceeded") as raised:
            export(CHECKPOINT, small_disk / "out")
        assert Path(raised.value.filename) == small_disk / "out"
        assert not [path for path in small_disk.rglob("*") if path.is_file()]


def test_a_path_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    target = tmp_path / os.fsdecode(b"caf\xe9")
    with pytest.raises(CheckpointError, match="is not a UTF-8 path in this locale; rename it"):
        to_hf(CHECKPOINT, target)
    try:
        target.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    with pytest.raises(CheckpointError, match="is not a UTF-8 path in this locale; rename it"):
        to_hf(target, tmp_path / "out")
