"""Rehearse a run on several nodes and its failures, with network namespaces of this machine as the nodes.

python scripts/rehearse_nodes.py

Every node has an address and a host name of its own, and starts scripts/finetune.sh with one process on the random
model of the tests; gloo and torchrun talk over the network between them. Needs Linux, root, iproute2, and g++ for
DeepSpeed. Scenarios:

  same        DDP, ZeRO-2 and ZeRO-3: the losses of all nodes are those of as many processes on one node
  killed      ZeRO-2: all processes of a node are killed in a step; the run is started again with --resume auto
  unplugged   ZeRO-3: the network of a node is disconnected in a step; the run is started again with --resume auto
  elastic     a node is killed; the others restart without it (NNODES=3:4, MAX_RESTARTS=3)
  preempted   the launchers receive SIGTERM: a checkpoint, and a run that resumes from it
  unshared    a node has an output folder of its own: refused before the first step
  other_data  a node has other data: refused before the first step
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from network_namespaces import Network, unavailable

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
IMAGES = ("photo_rgb.jpg", "square_rgb.png", "tall_rgb.png", "wide_rgb.png")
NODE_TIMEOUT = 15
"""Seconds without an answer after which a node is lost here; the default of the launcher is longer."""
ROUNDING = 1e-5
"""Relative difference of losses whose gradients were added up in another order: on fewer ranks, or on more than two by
DDP, which orders its buckets again after the first step of a process."""
LONGEST = 400
"""Seconds until a run is given up; the first one with DeepSpeed compiles."""


class Rehearsal:
    """Runs of ``num_steps`` steps on nodes that share a folder, except where a scenario says otherwise."""

    def __init__(self, network: Network, folder: Path, *, num_steps: int = 16) -> None:
        self.network, self.folder, self.num_steps = network, folder, num_steps
        self.rows = folder / "rows.json"
        write_rows(self.rows, 24)
        self._number = 0
        self._expected: dict[str, list[float]] = {}

    @property
    def last(self) -> int:
        """The node that fails."""
        return self.network.nodes[-1]

    def run(
        self,
        output: Path,
        *,
        at_step: int = 0,
        failure: Callable[[], Any] | None = None,
        nodes: Sequence[int] | None = None,
        before: str = "",
        resume: bool = False,
        deepspeed: str = "",
        **environment: str,
    ) -> "Result":
        """Run on some nodes, and cause a failure in a step.

        Args:
            output: ``--output_dir``.
            at_step: Step at which ``failure`` is called.
            failure: What happens then.
            nodes: By default all.
            before: Shell commands that the last node runs first.
            resume: Whether to add ``--resume auto``.
            deepspeed: Configuration of DeepSpeed.
            environment: Variables of ``scripts/launch.sh``.
        """
        self._number += 1
        nodes = nodes or self.network.nodes
        logs = [self.folder / f"{self._number}-{output.name}-node{node}.log" for node in nodes]
        variables = self._environment(deepspeed) | {"NNODES": str(len(nodes)), "MASTER_ADDR": "node0"} | environment
        processes = []
        for node, log in zip(nodes, logs, strict=True):
            with log.open("w", encoding="utf-8") as file:
                command = self._command(output, resume)
                own = before if node == self.last else ""
                processes.append(
                    self.network.start(node, command, variables | {"NODE_RANK": str(node)}, file, before=own)
                )
        codes, seconds = _wait(processes, output, at_step, failure)
        for node in self.network.nodes:
            self.network.kill(node)
        return Result(codes, seconds, [log.read_text(encoding="utf-8", errors="replace") for log in logs])

    def losses_of_one_node(self, deepspeed: str = "") -> list[float]:
        """Return the losses of as many processes on the first node, without a failure, which run only once."""
        if deepspeed not in self._expected:
            output = self.folder / f"one-node-{Path(deepspeed).stem or 'ddp'}"
            log = output.with_suffix(".log")
            variables = self._environment(deepspeed) | {"PROCESSES": str(len(self.network.nodes))}
            with log.open("w", encoding="utf-8") as file:
                process = self.network.start(0, self._command(output, False), variables, file)
            codes, _ = _wait([process], output)
            self.network.kill(0)
            if codes != [0]:
                raise RuntimeError(f"exit code {codes[0]}: {log.read_text(encoding='utf-8')[-2000:]}")
            self._expected[deepspeed] = read_losses(output)
        return self._expected[deepspeed]

    def _command(self, output: Path, resume: bool) -> list[str]:
        flags = {
            "model_name_or_path": GOLDEN / "checkpoint",
            "data_path": self.rows,
            "image_folder": GOLDEN / "images",
            "output_dir": output,
            "max_steps": self.num_steps,
            "save_steps": 5,
            "learning_rate": 1e-3,
            "adam_epsilon": 1e-2,  # a small one turns rounding errors of small gradients into large steps
            "dataloader_num_workers": 0,
            "report_to": "none",
        } | ({"resume": "auto"} if resume else {})
        return ["scripts/finetune.sh", *(text for name, value in flags.items() for text in (f"--{name}", str(value)))]

    def _environment(self, deepspeed: str) -> dict[str, str]:
        return os.environ | {
            "PYTHON": sys.executable,
            "GPUS": "0",
            "PROCESSES": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "GLOBAL_BATCH": "12",
            "NODE_TIMEOUT": str(NODE_TIMEOUT),
            "DEEPSPEED": deepspeed,
        }


class Result:
    """How the nodes of a run ended."""

    def __init__(self, codes: Sequence[int | None], seconds: float, logs: Sequence[str]) -> None:
        self.codes, self.seconds, self.logs = list(codes), seconds, list(logs)

    def errors(self, node: int) -> list[str]:
        """Return the error lines of a node, which include those of tracebacks."""
        words = ("error:", "Error", "Traceback", "terminate called")
        return [line for line in self.logs[node].splitlines() if any(word in line for word in words)]


def write_rows(path: Path, number: int) -> None:
    """Write conversations, every second one about an image."""
    rows: list[dict[str, Any]] = []
    for index in range(number):
        image = IMAGES[index // 2 % len(IMAGES)] if index % 2 == 0 else None
        question = ("<image_placeholder>\n" if image else "") + f"Question {index}?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "answer " * (1 + index % 3)}]
        rows.append({"conversations": turns} | ({"image": image} if image else {}))
    path.write_text(json.dumps(rows), encoding="utf-8")


def read_losses(output: Path) -> list[float]:
    """Return the logged losses, one per step."""
    log = output / "log.jsonl"
    lines = []
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        with suppress(ValueError):  # it is being written
            lines.append(json.loads(line))
    return [line["loss"] for line in lines if "loss" in line]


def difference(losses: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative difference; infinity if the numbers of steps differ."""
    if len(losses) != len(expected):
        return float("inf")
    return max(abs(one - other) / abs(other) for one, other in zip(losses, expected, strict=True))


def _wait(
    processes: "Sequence[subprocess.Popen[str]]",
    output: Path,
    at_step: int = 0,
    failure: Callable[[], Any] | None = None,
) -> tuple[list[int | None], float]:
    """Return the exit codes, and the seconds from the failure, or the start, to the end of the last process."""
    started, deadline, pending = time.monotonic(), time.monotonic() + LONGEST, failure
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        if pending is not None and len(read_losses(output)) >= at_step:
            pending()
            pending, started = None, time.monotonic()
        time.sleep(0.05)
    return [process.poll() for process in processes], time.monotonic() - started


class Table:
    """Prints a line per check, and counts those that failed."""

    def __init__(self) -> None:
        self.failed = 0

    def add(self, scenario: str, check: str, holds: bool, measured: str) -> None:
        """Print a line."""
        self.failed += not holds
        sys.stdout.write(f"{'holds' if holds else 'FAILS'}  {scenario:11}  {check}: {measured}\n")
        sys.stdout.flush()


def rehearse_same(rehearsal: Rehearsal, table: Table) -> None:
    """Compare the losses of all nodes with those of as many processes on one node."""
    for name, deepspeed in (("DDP", ""), ("ZeRO-2", "scripts/zero2.json"), ("ZeRO-3", "scripts/zero3.json")):
        one = rehearsal.losses_of_one_node(deepspeed)
        result = rehearsal.run(rehearsal.folder / f"many-{name}", deepspeed=deepspeed)
        worst = difference(read_losses(rehearsal.folder / f"many-{name}"), one)
        holds = result.codes == [0] * len(result.codes) and worst == 0
        table.add("same", f"{name}, {len(one)} steps", holds, f"largest relative difference of a loss {worst:.1e}")


def rehearse_failure(rehearsal: Rehearsal, table: Table, scenario: str, deepspeed: str = "") -> None:
    """Lose a node in a step, and start the run again."""
    expected = rehearsal.losses_of_one_node(deepspeed)
    output, last = rehearsal.folder / scenario, rehearsal.last
    fail = (lambda: rehearsal.network.kill(last)) if scenario == "killed" else (lambda: unplug(rehearsal.network, last))
    result = rehearsal.run(output, at_step=7, failure=fail, deepspeed=deepspeed)
    others = [node for node in rehearsal.network.nodes if node != last or scenario == "unplugged"]
    clean = all(result.codes[node] == 1 and len(result.errors(node)) == 1 for node in others)
    table.add(scenario, "the other nodes exit with code 1 and one line", clean, f"{result.seconds:.1f} s")
    for line in dict.fromkeys(line for node in others for line in result.errors(node)):
        sys.stdout.write(f"       {line}\n")
    rehearsal.network.set_link(last, up=True)
    if deepspeed:
        fewer = rehearsal.run(output, nodes=rehearsal.network.nodes[:-1], resume=True, deepspeed=deepspeed)
        _add_refusal(table, scenario, "DeepSpeed, resumed without the node", fewer)
    again = rehearsal.run(output, resume=True, deepspeed=deepspeed)
    worst = difference(read_losses(output), expected)
    holds = again.codes == [0] * len(again.codes) and worst == 0
    table.add(scenario, "started again", holds, f"largest relative difference of a loss {worst:.1e}")


def unplug(network: Network, node: int) -> None:
    """Disconnect a node from the network."""
    network.set_link(node, up=False)


def rehearse_elastic(rehearsal: Rehearsal, table: Table) -> None:
    """Kill a node of a run that may continue without it."""
    expected = rehearsal.losses_of_one_node()
    output, last, total = rehearsal.folder / "elastic", rehearsal.last, len(rehearsal.network.nodes)
    result = rehearsal.run(
        output,
        at_step=7,
        failure=lambda: rehearsal.network.kill(last),
        resume=True,
        NNODES=f"{total - 1}:{total}",
        MAX_RESTARTS="3",
    )
    worst = difference(read_losses(output), expected)
    holds = result.codes[:-1] == [0] * (total - 1) and worst < ROUNDING
    measured = f"largest relative difference of a loss {worst:.1e}; {result.seconds:.1f} s to the end of the run"
    table.add("elastic", f"continues on {total - 1} nodes", holds, measured)


def rehearse_preempted(rehearsal: Rehearsal, table: Table) -> None:
    """Send SIGTERM to the launchers."""
    expected = rehearsal.losses_of_one_node()
    output = rehearsal.folder / "preempted"
    result = rehearsal.run(output, at_step=7, failure=lambda: rehearsal.network.signal_launchers(signal.SIGTERM))
    saved = sorted(int(path.name.partition("-")[2]) for path in output.glob("checkpoint-*"))
    holds = result.codes == [128 + signal.SIGTERM] * len(result.codes) and len(saved) > 0 and saved[-1] >= 7
    table.add("preempted", "a checkpoint of the current step", holds, f"{saved[-1:]}, {result.seconds:.1f} s")
    again = rehearsal.run(output, resume=True)
    worst = difference(read_losses(output), expected)
    holds = again.codes == [0] * len(again.codes) and worst < ROUNDING
    table.add("preempted", "started again", holds, f"largest relative difference of a loss {worst:.1e}")


def rehearse_unshared(rehearsal: Rehearsal, table: Table) -> None:
    """Give the last node an output folder of its own."""
    output = rehearsal.folder / "unshared"
    output.mkdir()
    result = rehearsal.run(output, before=f"mount -t tmpfs none {output}")
    _add_refusal(table, "unshared", "before the first step", result)


def rehearse_other_data(rehearsal: Rehearsal, table: Table) -> None:
    """Give the last node other data."""
    other = rehearsal.folder / "other.json"
    write_rows(other, 23)
    output = rehearsal.folder / "other_data"
    result = rehearsal.run(output, before=f"mount --bind {other} {rehearsal.rows}")
    _add_refusal(table, "other_data", "before the first step", result)


def _add_refusal(table: Table, scenario: str, check: str, result: Result) -> None:
    lines = list(dict.fromkeys(line for node in range(len(result.codes)) for line in result.errors(node)))
    trained = any("\nstep " in log for log in result.logs)
    holds = set(result.codes) == {2} and len(lines) == 1 and not trained
    table.add(scenario, f"{check}: refused with one line", holds, " | ".join(lines))


def main() -> None:
    """Rehearse the chosen scenarios, and exit with code 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scenarios: dict[str, Callable[[Rehearsal, Table], None]] = {
        "same": rehearse_same,
        "killed": lambda rehearsal, table: rehearse_failure(rehearsal, table, "killed", "scripts/zero2.json"),
        "unplugged": lambda rehearsal, table: rehearse_failure(rehearsal, table, "unplugged", "scripts/zero3.json"),
        "elastic": rehearse_elastic,
        "preempted": rehearse_preempted,
        "unshared": rehearse_unshared,
        "other_data": rehearse_other_data,
    }
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(scenarios)} (default: all)")
    parser.add_argument("--nodes", type=int, default=4, help="(default: %(default)s)")
    arguments = parser.parse_args()
    if unknown := set(arguments.scenarios) - scenarios.keys():
        parser.error(f"unknown scenario: {', '.join(sorted(unknown))}")
    if arguments.nodes < 2:
        parser.error(f"--nodes {arguments.nodes}: at least 2")
    if reason := unavailable():
        sys.exit(f"error: {reason}")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # namespaces outlive this process
    table, folder = Table(), Path(tempfile.mkdtemp(prefix="yivl-nodes-"))
    try:
        with Network(arguments.nodes) as network:
            rehearsal = Rehearsal(network, folder)
            for name in arguments.scenarios or scenarios:
                scenarios[name](rehearsal, table)
    finally:
        if table.failed:
            sys.stdout.write(f"the logs are in {folder}\n")
        else:
            shutil.rmtree(folder)
    sys.exit(1 if table.failed else 0)


if __name__ == "__main__":
    main()
