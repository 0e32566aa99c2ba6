"""Kill commands that write a checkpoint or an export, at a random moment of writing, and repeat them."""

import random
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from endurance_processes import MODEL, Program, file_hashes
from endurance_report import Outcome

KILLS = 4
"""Of each command; every other one replaces a target that exists, where the command does so."""

Files = dict[str, str]
"""Hashes by relative path."""


def commands(adapter: Path) -> dict[str, list[str | Path]]:
    """Return the commands by name, each without its last word, the target."""
    convert = [sys.executable, "scripts/convert.py"]
    merge = ["scripts/merge_lora.sh", "--model-path", MODEL, "--lora-path", adapter, "--save-model-path"]
    return {"merge_lora.sh": merge} | {
        f"convert.py {name}": [*convert, name, MODEL] for name in ("to-hf", "safetensors", "to-sglang", "to-gguf")
    }


def try_writes(adapter: Path, work: Path, deadline: float) -> list[Outcome]:
    """Kill each command several times and return the outcomes; no kill starts after ``deadline``."""
    with ThreadPoolExecutor(2) as pool:
        started = [
            pool.submit(try_command, name, command, work / f"write-{number}", deadline)
            for number, (name, command) in enumerate(commands(adapter).items())
        ]
        return [future.result() for future in started]


def try_command(name: str, command: list[str | Path], folder: Path, deadline: float) -> Outcome:
    """Kill one command several times; it must leave no target or a complete one, and must run when it is repeated."""
    promise = f"`{name}`, killed: its target is complete or as before; repeated, it leaves nothing else"
    target, chance, failures, tried = folder / "target", random.Random(name), [], 0
    folder.mkdir()
    try:
        with Program([*command, target]) as program:
            program.wait_until(lambda: any(folder.iterdir()))
            first = time.time()
            if failure := program.finish():
                return Outcome(promise, 1, 0, failure)
        # From the first file until the last rename, which changes the ctime.
        window = max(path.stat().st_ctime for path in (target, *target.rglob("*"))) - first
        expected = file_hashes(target, "*")
        for number in range(KILLS):
            if time.monotonic() > deadline:
                break
            old = dict(expected) if number % 2 and (target / "config.json").exists() else {}
            if not old:
                shutil.rmtree(target)
            tried += 1
            _kill_writing(command, target, delay=chance.uniform(0, window))
            if failure := _check_killed(target, old, expected) or _check_repeated(command, target, expected):
                failures.append(failure)
                break  # what it left would change the next try
    except TimeoutError as error:
        tried, failures = tried + 1, [*failures, str(error)]
    return Outcome(promise, tried, tried - len(failures), "; ".join(failures))


def _kill_writing(command: list[str | Path], target: Path, *, delay: float) -> None:
    """Kill the command ``delay`` seconds after it began to write."""
    before = _names(target.parent)
    with Program([*command, target]) as program:
        program.wait_until(lambda: _names(target.parent) != before)
        time.sleep(delay)
        program.kill()


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _check_killed(target: Path, old: Files, expected: Files) -> str | None:
    """Return what is wrong with a target after the kill."""
    if not target.exists():
        return "the old target is gone" if old else None
    found = file_hashes(target, "*")
    finished = {name: value for name, value in found.items() if not name.endswith(".partial")}
    if finished.items() <= expected.items() and all(name.endswith(".gguf") for name in finished):
        return None  # of the two GGUF files each is complete or absent
    return None if found in (old, expected) else "the target is incomplete"


def _check_repeated(command: list[str | Path], target: Path, expected: Files) -> str | None:
    """Run the command again and return what is wrong with what it leaves."""
    for path in target.glob("*.gguf"):
        path.unlink()  # the command does not replace them
    with Program([*command, target]) as program:
        if failure := program.finish():
            return f"repeated: {failure}"
    if file_hashes(target, "*") != expected:
        return "repeated: other files"
    beside = sorted(_names(target.parent) - {target.name})
    return f"left over: {', '.join(beside)}" if beside else None
