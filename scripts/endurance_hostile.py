"""Campaign of hostile files: seeded mutations of every format that is read, opened by the entry points that users use.

A promise holds for a file if it is opened, or refused by one line that names it; without another exception, a crash,
unlimited time or memory, the execution of code, or a file written elsewhere than to the output.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import resource
import select
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parent))  # also when imported

from endurance_report import Outcome
from hostile_formats import FORMATS, Format, write_samples

SECONDS: Final = 60.0
"""After which a file counts as a hang."""
MEMORY: Final = 2 * 2**30
"""Bytes of resident memory that opening a small file may add."""
ADDRESS_SPACE: Final = 8 * 2**30
"""Bytes of address space that a worker may add, so that a failure does not exhaust the machine."""
SHORT: Final = 60
"""Files of the short campaign."""
WORKERS: Final = 2


@dataclass(frozen=True)
class Verdict:
    """What happened to one file."""

    format: str
    number: int
    status: str
    """``opened`` or ``refused`` if the promise holds, else how it does not."""
    detail: str


class Worker:
    """A process that opens files one after the other; a new one replaces it after a crash or a hang."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._folder.mkdir(parents=True)
        self._process: subprocess.Popen[bytes] | None = None

    def open(self, request: dict[str, Any], seconds: float = SECONDS) -> dict[str, Any]:
        """Return the answer of the process, or the status of its end."""
        if self._process is None:
            environment = os.environ | {
                "HF_HUB_OFFLINE": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
                "HF_DATASETS_CACHE": str(self._folder.parent / "cache"),
            }
            command = [sys.executable, __file__, "--worker"]
            pipe = subprocess.PIPE
            errors = (self._folder.parent / f"{self._folder.name}.log").open("wb")
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=errors, cwd=self._folder, env=environment
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        line = process.stdout.readline() if ready else b""
        if line:
            return dict(json.loads(line))
        self.close()
        return {"status": "crash" if ready else "hang", "detail": f"exit code {process.returncode}" if ready else ""}

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def run(budget_seconds: float, short: bool) -> list[Outcome]:
    """Return an outcome for each format; files that do not fit into the time are not tried."""
    verdicts = list(campaign(budget_seconds, SHORT if short else None))
    outcomes = []
    for name in dict.fromkeys(format_.name.partition(",")[0] for format_ in FORMATS):
        of_format = [verdict for verdict in verdicts if verdict.format.partition(",")[0] == name]
        failed = [verdict for verdict in of_format if verdict.status not in ("opened", "refused")]
        opened = sum(verdict.status == "opened" for verdict in of_format)
        notes = f"{opened} opened, {len(of_format) - opened - len(failed)} refused"
        notes += "".join(f"; {verdict.status}: {verdict.number} {verdict.detail[:200]}" for verdict in failed[:3])
        promise = f"hostile {name}: opened, or refused by one line that names the file"
        outcomes.append(Outcome(promise, len(of_format), len(of_format) - len(failed), notes))
    return outcomes


def campaign(budget_seconds: float, num_files: int | None, only: str = "", seed: int = 0) -> Iterator[Verdict]:
    """Yield the verdict of every file.

    Args:
        budget_seconds: After which no other file is tried.
        num_files: Of the short campaign, spread over the formats; by default the share of every format.
        only: Part of the names of the formats to try; ``NAME:NUMBER`` is one file.
        seed: Of the mutations and their order.
    """
    wanted, _, number = only.partition(":")
    formats = [format_ for format_ in FORMATS if wanted in format_.name]
    total = sum(format_.share for format_ in formats)
    scale = 1.0 if num_files is None else num_files / total
    cases = [(format_, index) for format_ in formats for index in range(max(1, round(format_.share * scale)))]
    if number:
        cases = [(formats[0], int(number))]
    random.Random(seed).shuffle(cases)  # a time that runs out hits all formats alike
    deadline = time.monotonic() + budget_seconds
    with tempfile.TemporaryDirectory(prefix="hostile-") as temporary:
        base = Path(temporary)
        workers = [Worker(base / f"worker{index}") for index in range(min(WORKERS, len(cases)))]
        free, lock = list(workers), threading.Lock()
        answer = free[0].open({"samples": str(base / "samples")}, 180)
        assert answer["status"] == "opened", answer
        (base / "outside").mkdir()
        (base / "outside/outside.safetensors").write_bytes((base / "samples/checkpoint/model.safetensors").read_bytes())

        def one(case: tuple[Format, int]) -> Verdict | None:
            if time.monotonic() > deadline:
                return None
            with lock:
                worker = free.pop()
            try:
                return _try(worker, base, *case, seed)
            finally:
                with lock:
                    free.append(worker)

        try:
            with ThreadPoolExecutor(len(workers)) as pool:
                yield from (verdict for verdict in pool.map(one, cases) if verdict is not None)
        finally:
            for worker in workers:
                worker.close()


def _try(worker: Worker, base: Path, format_: Format, number: int, seed: int) -> Verdict:
    """Mutate a file of a format, open it and judge what happened."""
    draw = random.Random(f"{seed} {format_.name} {number}")
    name = re.sub(r"\W+", "-", format_.name)
    place = base / f"case-{name}-{number}"
    folder, output = place / format_.sample, place / "output"
    output.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        stack.callback(_remove, place)
        _link_tree(base / "samples" / format_.sample, folder)
        file = folder / draw.choice(format_.files)
        content = format_.mutate(file.read_bytes(), draw)
        file.unlink()
        file.write_bytes(content)
        before = _listing(base / "outside"), _listing(folder), _listing(worker._folder)
        answer = worker.open({"format": format_.name, "folder": str(folder), "output": str(output)})
        status, detail = answer["status"], answer["detail"]
        if (_listing(base / "outside"), _listing(folder), _listing(worker._folder)) != before:
            status, detail = "outside", f"files were written or executed; {detail}"
        elif status == "refused" and (
            "\n" in detail or not any(name in detail for name in _names(format_, folder, file))
        ):
            status = "unnamed"
        return Verdict(format_.name, number, status, detail)


def _names(format_: Format, folder: Path, file: Path) -> list[str]:
    """Return what a message may name: the file, its folder, the model, the checkpoint of a run, the log of bad rows."""
    others = {"run": [file.parent.name], "tar": ["bad_rows.jsonl"], "rows-json": ["bad_rows.jsonl"]}
    return [str(folder), file.name, f"{folder.name}: ", *others.get(format_.sample, [])]


def _link_tree(source: Path, target: Path) -> None:
    """Copy a folder; its files are links of the same content, and the one that is mutated is replaced."""
    for path in source.rglob("*"):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, place)


def _remove(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.rmdir()


def _listing(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size and digest of every file of a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_size, hashlib.md5(path.read_bytes()).hexdigest()) for path in files}


def serve() -> None:
    """Open the files that the campaign names, in this process."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what programs print is no answer
    formats = {format_.name: format_ for format_ in FORMATS}
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if "samples" in request:
            Path(request["samples"]).mkdir()
            write_samples(Path(request["samples"]))
            answer = {"status": "opened", "detail": ""}
        else:
            answer = _answer(formats[request["format"]], Path(request["folder"]), Path(request["output"]))
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _answer(format_: Format, folder: Path, output: Path) -> dict[str, str]:
    """Open a folder and return the status."""
    import gc

    from yivl.command_line import is_out_of_memory
    from yivl.errors import YiVLError

    gc.collect()
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the next file alone
    limit = _memory("VmSize") + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    status, detail = "opened", ""
    try:
        format_.open(folder, output)
    except YiVLError as error:
        status, detail = "refused", str(error)
    except BaseException as error:
        is_memory = is_out_of_memory(error) and isinstance(error, Exception)
        where = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in where if "/yivl/" in frame.filename] or where
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {Path(where[-1].filename).name}:{where[-1].lineno}"
        status, detail = "memory" if is_memory else "error", f"{type(error).__name__} at {place}: {str(error)[:300]}"
        traceback.print_exc()
    if (peak := _memory("VmHWM") - before) > MEMORY:
        status, detail = "memory", f"{peak / 2**30:.1f} GiB; {detail}"
    return {"status": status, "detail": detail}


def _memory(name: str) -> int:
    """Return a field of /proc/self/status, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    """Run the campaign, or a part of it, and print what did not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--short", action="store_true", help=f"{SHORT} files")
    parser.add_argument("--minutes", type=float, default=10, help="limit of the campaign (default: %(default)s)")
    parser.add_argument("--only", default="", help="part of the name of a format, or NAME:NUMBER for one file")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations (default: %(default)s)")
    parser.add_argument("--verbose", action="store_true", help="print every verdict")
    arguments = parser.parse_args()
    if arguments.worker:
        serve()
        return
    counts: Counter[str] = Counter()
    for verdict in campaign(arguments.minutes * 60, SHORT if arguments.short else None, arguments.only, arguments.seed):
        counts[verdict.status] += 1
        if arguments.verbose or verdict.status not in ("opened", "refused"):
            print(f"{verdict.format}:{verdict.number} {verdict.status} {verdict.detail}", flush=True)
    print(dict(counts))
    sys.exit(any(status not in ("opened", "refused") for status in counts))


if __name__ == "__main__":
    main()
