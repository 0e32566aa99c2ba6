"""Kill training runs at random moments, resume them, and compare them with uninterrupted ones.

The model is the small random one of the tests. A kill ends all processes of a command at once, by SIGKILL.
"""

import json
import random
import shutil
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from endurance_processes import MODEL, Program, file_hashes
from endurance_report import Outcome
from endurance_writes import try_writes
from PIL import Image

STEPS = 16
SAVE_STEPS = 2
CHECKPOINTS = 2
"""``--save_total_limit``."""
MAX_KILLS = 4
"""Of one run, before it may end."""
SAVING_SECONDS = 0.25
"""Longer than a checkpoint of this model takes; a kill at the start of a save comes up to this much later."""


@dataclass(frozen=True)
class Kind:
    """A kind of training run, started by a script of ``scripts/``."""

    name: str
    script: str
    kills: int
    data: str = "rows.json"
    flags: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


# Those that take longest first.
KINDS = (
    Kind("ZeRO-2 on two ranks", "finetune.sh", 10, environment={"PROCESSES": "2", "DEEPSPEED": "scripts/zero2.json"}),
    Kind(
        "stream of tar shards",
        "finetune.sh",
        13,
        data="{0..2}.tar",
        flags={"shuffle_buffer": 4, "dataloader_num_workers": 2},
    ),
    Kind(
        "full fine-tuning", "finetune.sh", 13, flags={"freeze_mm_mlp_adapter": False, "unfreeze_mm_vision_tower": True}
    ),
    Kind("LoRA", "finetune_lora.sh", 14, flags={"lora_dropout": 0.1}),
)
SHORT_KILLS = {"LoRA": 2, "stream of tar shards": 2}


@dataclass
class Tally:
    """What was tried on one kind of run, or on one command."""

    name: str
    kills: int = 0
    held: int = 0
    runs: int = 0
    tidy: int = 0
    failures: list[str] = field(default_factory=list)


def run(budget_seconds: float, short: bool) -> list[Outcome]:
    """Run the campaign and return its outcomes.

    Args:
        budget_seconds: No kill starts after this time; what was killed is still resumed and compared.
        short: Four kills of training runs.
    """
    deadline = time.monotonic() + budget_seconds
    work = Path(mkdtemp(prefix="yivl-kills-"))
    write_data(work / "data")
    wanted = SHORT_KILLS if short else {kind.name: kind.kills for kind in KINDS}
    kinds = [kind for kind in KINDS if kind.name in wanted]
    with ThreadPoolExecutor(2) as pool:
        until = deadline if short else deadline - budget_seconds / 4  # the rest is for the commands that write
        runs = list(pool.map(lambda kind: try_runs(kind, wanted[kind.name], work, until), kinds))
    promise = "{}: an interrupted run resumes; losses and weights are bit-identical to those of an uninterrupted one"
    outcomes = [
        Outcome(promise.format(tally.name), tally.kills, tally.held, "; ".join(tally.failures[:3])) for tally in runs
    ]
    promise = f"resumed runs leave the files of an uninterrupted one, with {CHECKPOINTS} checkpoints"
    outcomes.append(Outcome(promise, sum(tally.runs for tally in runs), sum(tally.tidy for tally in runs)))
    if not short:
        outcomes += try_writes(work / "LoRA/whole", work, deadline)
    if any(outcome.held < outcome.tried for outcome in outcomes):
        outcomes[-1] = replace(outcomes[-1], notes=f"kept in {work}")
    else:
        shutil.rmtree(work)
    return outcomes


def write_data(folder: Path) -> None:
    """Write 24 rows, a third of them with images, and as many samples in tar shards: a run takes more than an epoch."""
    folder.mkdir()
    rows: list[dict[str, Any]] = []
    for number in range(24):
        image = folder / f"{number}.png"
        Image.new("RGB", (40 + number, 40), (number * 10, 90, 30)).save(image)
        slot = {} if number % 3 else {"image": image.name}
        question = ("" if number % 3 else "<image_placeholder>\n") + f"Say {number}."
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"{number} " * (1 + number % 5)}]
        rows.append({"conversations": turns, **slot})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for place in range(8):
                caption = folder / "caption.txt"
                caption.write_text(f"caption {shard} {place}", encoding="utf-8")
                tar.add(folder / f"{place}.png", f"{place:04d}.png")
                tar.add(caption, f"{place:04d}.txt")


def training_command(kind: Kind, data: Path, output_dir: Path) -> list[str]:
    """Return the command that starts a run, or resumes it."""
    flags = {
        "model_name_or_path": MODEL,
        "data_path": data / kind.data,
        "image_folder": data,
        "output_dir": output_dir,
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "save_total_limit": CHECKPOINTS,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "dataloader_num_workers": 0,
        "report_to": "none",
        "resume": "auto",
    } | kind.flags
    return [f"scripts/{kind.script}", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


def try_runs(kind: Kind, kills: int, work: Path, deadline: float) -> Tally:
    """Kill runs until ``kills`` is reached or the time is over; each is resumed until it ends, and then compared."""
    tally, folder, chance = Tally(kind.name), work / kind.name.replace(" ", "-"), random.Random(kind.name)
    folder.mkdir()
    environment = {"GLOBAL_BATCH": "2", "MICRO_BATCH": "1", **kind.environment}

    def start(out: Path) -> Program:
        return Program(training_command(kind, work / "data", out), **environment)

    with start(folder / "whole") as program:
        if failure := program.finish():
            tally.kills, tally.failures = 1, [f"not killed: {failure}"]
            return tally
        seconds = program.seconds
    expected, expected_names = describe_run(folder / "whole"), names_in(folder / "whole")
    for number in count():
        if tally.kills >= kills or time.monotonic() > deadline:
            break
        out, killed, failure = folder / f"killed-{number}", 0, None
        while failure is None and killed < min(MAX_KILLS, kills - tally.kills) and time.monotonic() < deadline:
            with start(out) as program:
                try:
                    if not kill_run(program, out, chance, seconds):
                        break
                except TimeoutError as error:
                    failure = str(error)
            killed += 1
        tally.kills += killed
        if failure is None:
            with start(out) as program:
                failure = program.finish()
        if failure is None:
            tally.runs += 1
            found = describe_run(out)
            failure = next((f"other {key}" for key, value in found.items() if value != expected[key]), None)
            tally.held += killed * (failure is None)
            changed = names_in(out) ^ expected_names
            tally.tidy += not changed
            failure = failure or (f"other files: {sorted(changed)[:4]}" if changed else None)
        if failure is None:
            shutil.rmtree(out)
        else:
            tally.failures.append(f"{out.name}: {failure}")
    return tally


def kill_run(program: Program, out: Path, chance: random.Random, seconds: float) -> bool:
    """Kill a run at a random moment, and return whether it had not ended before.

    Args:
        program: The run.
        out: Its output folder.
        chance: Draws the moment: any time, a step, in the middle of saving a checkpoint or the final model.
        seconds: How long an uninterrupted run takes.
    """
    log, unfinished, newest = out / "log.jsonl", out / ".unfinished", _newest_step(out)
    step, any_time = chance.randint(min(newest + 1, STEPS), STEPS), chance.uniform(0, seconds)
    started = time.time() - program.seconds

    def is_saving() -> bool:
        with suppress(FileNotFoundError):
            return any(unfinished.iterdir())
        return False

    def at_step() -> bool:
        with suppress(FileNotFoundError):
            is_of_this_run = log.stat().st_mtime > started  # a resumed run cuts the log of the one before
            return is_of_this_run and log.read_bytes().count(b"\n") >= step
        return False

    moments: tuple[tuple[float, Sequence[Callable[[], bool]]], ...] = (
        (0, [lambda: program.seconds > any_time]),
        (0.1, [at_step]),
        (SAVING_SECONDS, [at_step, is_saving]),
        (SAVING_SECONDS, [(out / "train_results.json").exists]),
    )
    (latest, conditions), *_ = chance.choices(moments, weights=(25, 25, 40, 10))
    delay = chance.uniform(0, latest)
    if not all(program.wait_until(condition) for condition in conditions):
        return False
    time.sleep(delay)
    return program.kill()


def _newest_step(out: Path) -> int:
    return max((int(path.name.rpartition("-")[2]) for path in out.glob("checkpoint-*[0-9]")), default=0)


def describe_run(out: Path) -> dict[str, Any]:
    """Return what must not depend on kills: the log line of each step without speeds, and the final weights."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = ("step", "loss", "grad_norm", "learning_rate")
    return {
        "losses": [[line.get(name) for name in kept] for line in lines if "loss" in line],
        "weights": file_hashes(out, "*.safetensors"),
    }


def names_in(out: Path) -> set[str]:
    """Return the paths of all files of an output folder, and of what lies beside it under a similar name."""
    beside = {path.name for path in out.parent.iterdir() if out.name in path.name and path != out}
    return {path.relative_to(out).as_posix() for path in out.rglob("*")} | beside
