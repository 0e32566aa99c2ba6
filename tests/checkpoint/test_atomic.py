"""Kills between any two operations on files while folders are replaced, moved and removed."""

import fcntl
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from yivl.checkpoint.atomic import MAX_AGE, atomic_dir, atomic_file
from yivl.train.damage import check_files
from yivl.train.resume import UNFINISHED, find_checkpoint, finished_checkpoints, publish, publish_checkpoint
from yivl.train.resume import remove_leftovers as tidy

# Every change of names that Path and shutil make goes through one of these.
OPERATIONS = ("mkdir", "rename", "replace", "rmdir", "unlink")
KILLED = 9


@pytest.fixture(autouse=True)
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # only matters to a machine that loses power


def kill_at(number: int, work: Callable[[], object]) -> bool:
    """Do ``work`` in a process that ends at its n-th operation, without any cleanup; return whether it did."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of other threads: the child only changes files
        process = os.fork()
    if process == 0:
        remaining = number

        def counted(operation: Callable[..., object]) -> Callable[..., object]:
            def run(*args: object, **kwargs: object) -> object:
                nonlocal remaining
                if remaining == 0:
                    os._exit(KILLED)
                remaining -= 1
                return operation(*args, **kwargs)

            return run

        try:
            for name in OPERATIONS:
                setattr(os, name, counted(getattr(os, name)))
            work()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


def write(folder: Path, text: str, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def killed(folder: Path, set_up: Callable[[Path], object], work: Callable[[Path], object]) -> Iterator[Path]:
    """Yield a folder for every operation at which ``work`` can be killed, and one where it is not."""
    for number in count():
        place = folder / str(number)
        place.mkdir()
        set_up(place)
        was_killed = kill_at(number, lambda place=place: work(place))  # type: ignore[misc]
        yield place
        shutil.rmtree(place)
        if not was_killed:
            assert number > 3
            return


def test_a_replaced_folder_is_the_former_or_the_new_one_and_leftovers_go(tmp_path: Path) -> None:
    def replace(place: Path) -> None:
        with atomic_dir(place / "model") as folder:
            write(folder, "new", "config.json", "vit/config.json")

    contents = []
    for place in killed(
        tmp_path, lambda place: write(place / "model", "old", "config.json", "vit/config.json"), replace
    ):
        with pytest.raises(ZeroDivisionError), atomic_dir(place / "model"):
            raise ZeroDivisionError
        assert [path.name for path in place.iterdir()] == ["model"]
        contents.append({path.read_text() for path in place.rglob("*.json")})
    assert all(content in ({"old"}, {"new"}) for content in contents)
    assert {"old"} in contents
    assert {"new"} in contents


WRITER = """
import sys
from pathlib import Path
from yivl.checkpoint.atomic import atomic_dir
with atomic_dir(sys.argv[1]) as folder:
    (folder / "a").write_text("slow")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_the_folder_of_a_writer_that_lives_is_left_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "model")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        with atomic_dir(tmp_path / "model") as folder:
            write(folder, "quick", "a")
        assert (theirs / "a").is_file()
        process.communicate()
    assert process.returncode == 0
    assert (tmp_path / "model/a").read_text() == "slow"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_without_locks_no_temporary_folder_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no locks")

    other = left_by(tmp_path, socket.gethostname())
    monkeypatch.setattr(fcntl, "flock", refuse)
    with atomic_dir(tmp_path / "model") as folder:
        write(folder, "new", "a")
    assert {path.name for path in tmp_path.iterdir()} == {other.name, "model"}


def left_by(place: Path, host: str) -> Path:
    """Write what a killed writer of ``place / "model"`` leaves on a host."""
    mark = hashlib.sha256(host.encode()).hexdigest()[:8]
    return write(place / f".model.yivl-partial-{mark}-abcdefgh", "partial", "a")


def test_folders_of_other_names_and_of_other_hosts_are_not_removed(tmp_path: Path) -> None:
    names = (".model.20260101", ".model.abcdefgh", ".model.abcdefgh.old", ".model.yivl-partial-notes", ".model2")
    for name in names:
        write(tmp_path / name, "kept", "a")
    here, elsewhere = left_by(tmp_path, socket.gethostname()), left_by(tmp_path, "another host")
    with atomic_dir(tmp_path / "model") as folder:
        write(folder, "new", "a")
    assert {path.name for path in tmp_path.iterdir()} == {*names, "model", elsewhere.name}
    assert not here.exists()
    os.utime(elsewhere, (0, time.time() - MAX_AGE - 60))
    with atomic_dir(tmp_path / "model"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*names, "model"}


@pytest.mark.parametrize("error", [PermissionError, FileNotFoundError])
def test_a_leftover_that_cannot_be_opened_is_no_obstacle(
    error: type[OSError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, opened = left_by(tmp_path, socket.gethostname()), os.open

    def refuse(path: Path, *arguments: int) -> int:
        if path == left:
            raise error
        return opened(path, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    with atomic_dir(tmp_path / "model") as folder:
        write(folder, "new", "a")
    assert (tmp_path / "model/a").read_text() == "new"


def test_a_folder_that_another_writer_removes_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, removed = fcntl.flock, []

    def late(handle: int, operation: int) -> None:
        if not removed:
            removed.extend(tmp_path.iterdir())
            with atomic_dir(tmp_path / "model") as folder:
                write(folder, "quick", "a")
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with atomic_dir(tmp_path / "model") as folder:
        assert len(removed) == 1
        assert not removed[0].exists()
        assert (tmp_path / "model/a").read_text() == "quick"
        write(folder, "slow", "a")
    assert (tmp_path / "model/a").read_text() == "slow"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_leftover_is_locked_while_it_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, remove = left_by(tmp_path, socket.gethostname()), shutil.rmtree
    held = []

    def watched(folder: Path, **options: bool) -> None:
        if folder == left:
            handle = os.open(folder, os.O_RDONLY)
            with pytest.raises(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.close(handle)
            held.append(folder)
        remove(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    with atomic_dir(tmp_path / "model"):
        pass
    assert held == [left]
    assert not left.exists()


def test_an_interrupt_while_a_folder_is_replaced_restores_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "model", "old", "a")
    rename = Path.rename

    def interrupted(self: Path, to: Path) -> Path:
        if to.name == "model" and not self.name.endswith(".old"):
            raise KeyboardInterrupt
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_dir(tmp_path / "model") as folder:
        write(folder, "new", "a")
    assert (tmp_path / "model/a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_error_of_writing_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left.*log\.jsonl"), atomic_file(tmp_path / "log.jsonl"):
        raise OSError(28, "No space left on device")


# What a run does in its output folder.


def checkpoint(folder: Path) -> Path:
    return write(folder, "state", "trainer_state.json", "optimizer.pt", "global_step1/rank_0.pt")


def test_a_killed_save_leaves_complete_checkpoints_only(tmp_path: Path) -> None:
    def set_up(place: Path) -> None:
        for step in (1, 2):
            publish_checkpoint(checkpoint(place / UNFINISHED / f"checkpoint-{step}"), place, None)
        checkpoint(place / UNFINISHED / "checkpoint-3")

    newest = set()
    for place in killed(
        tmp_path, set_up, lambda place: publish_checkpoint(place / UNFINISHED / "checkpoint-3", place, 2)
    ):
        tidy(place)
        found = find_checkpoint(place, "auto")
        assert found is not None
        for path in finished_checkpoints(place):
            check_files(path)
        assert {path.name for path in place.iterdir()} <= {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
        newest.add(found.name)
    assert newest == {"checkpoint-2", "checkpoint-3"}


def test_a_killed_move_of_the_final_model_is_completed_or_repeated(tmp_path: Path) -> None:
    new = ("config.json", "model.safetensors", "vit/clip/config.json")
    old = (
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "vit/clip/config.json",
    )

    def set_up(place: Path) -> None:
        write(place, "old", *old)
        write(place / UNFINISHED / "model", "new", *new)

    complete = 0
    for number, place in enumerate(
        killed(tmp_path, set_up, lambda place: publish(place / UNFINISHED / "model", place))
    ):
        # A kill of the run that tidies up, too.
        kill_at(number % 7, lambda place=place: tidy(place))  # type: ignore[misc]
        tidy(place)
        files = {path.relative_to(place).as_posix(): path.read_text() for path in place.rglob("*") if path.is_file()}
        assert not [name for name in files if name.startswith(".")]
        if "config.json" in files:
            assert files in (dict.fromkeys(old, "old"), dict.fromkeys(new, "new"))
            complete += files["config.json"] == "new"
    assert complete > 3
