"""Measure the bytes that two ranks exchange per optimizer step, and print them beside the formulas of docs/scaling.md.

python scripts/measure_communication.py

The ranks are processes without a GPU in a network namespace of their own (`unshare --net`, which needs root), whose
loopback interface carries nothing else. What a step exchanges is the difference between runs of 2 and of 6 steps.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS = (2, 6)
STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    "DDP": {},
    "ZeRO-2": {"deepspeed": ROOT / "scripts/zero2.json"},
    "ZeRO-3": {"deepspeed": ROOT / "scripts/zero3.json"},
    "FSDP2": {"fsdp": True},
}


def parse_args() -> argparse.Namespace:
    """Return the parsed flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "tests/golden/checkpoint", help="(default: %(default)s)")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), help="(default: all)")
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    arguments = parse_args()
    print("| strategy | trained | sent per rank and step | formula |")
    print("|---|---|---|---|")
    for strategy in arguments.strategies:
        for kind, flags in (("language model, projector", {}), ("projector", {"tune_mm_mlp_adapter": True})):
            few, many = (measure(arguments.model, STRATEGIES[strategy] | flags, steps) for steps in STEPS)
            measured = (many["bytes"] - few["bytes"]) / (STEPS[1] - STEPS[0]) / 2
            expected = bytes_per_step(strategy, few["parameters"], few["trainable"], 2, 4, 4)
            print(f"| {strategy} | {kind} | {measured / 1e6:.2f} MB | {expected / 1e6:.2f} MB |", flush=True)


def bytes_per_step(
    strategy: str, parameters: float, trainable: float, num_ranks: int, width: int, gradient_width: int
) -> float:
    """Return the bytes that a rank sends per micro-batch and optimizer step, with ring collectives.

    Of ``n`` bytes a reduce-scatter or all-gather sends ``n * (num_ranks - 1) / num_ranks``; an all-reduce twice that.

    Args:
        strategy: A key of ``STRATEGIES``.
        parameters: Number of all parameters of the model.
        trainable: Number of the trainable ones.
        num_ranks: Number of GPUs.
        width: Bytes of a weight that is gathered.
        gradient_width: Bytes of a gradient that is reduced.
    """
    share = (num_ranks - 1) / num_ranks
    gathered = {"DDP": 0, "ZeRO-2": trainable, "ZeRO-3": 2 * parameters, "FSDP2": 2 * parameters}[strategy]
    reduced = {"DDP": 2 * trainable, "ZeRO-2": trainable, "ZeRO-3": trainable, "FSDP2": trainable}[strategy]
    return (gathered * width + reduced * gradient_width) * share


def measure(model: Path, flags: Mapping[str, Any], steps: int) -> dict[str, int]:
    """Return the bytes on the loopback interface in a run, and the numbers of parameters."""
    with tempfile.TemporaryDirectory() as folder:
        turns = [{"from": "human", "value": "Say one."}, {"from": "gpt", "value": "one"}]
        Path(folder, "rows.json").write_text(json.dumps([{"conversations": turns}] * 2), encoding="utf-8")
        values = {"model_name_or_path": model, "data_path": f"{folder}/rows.json", "output_dir": f"{folder}/out"}
        values |= {"max_steps": steps, "save_strategy": "no", "report_to": "none", "dataloader_num_workers": 0}
        given = [text for name, value in (values | flags).items() for text in (f"--{name}", str(value))]
        launch = [
            sys.executable,
            "-m",
            "yivl.train.launch",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "yivl.train",
        ]
        shell = 'ip link set lo up && "$@" && cat /proc/net/dev'
        command = ["unshare", "--net", "bash", "-c", shell, "bash", *launch, *given]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(result.stderr[-2000:] or result.stdout[-2000:])
    table = [line.split() for line in result.stderr.splitlines()]
    sizes = [line for line in table if line and line[0] in ("vision_tower", "mm_projector", "language_model")]
    loopback = next(line.split() for line in result.stdout.splitlines() if line.strip().startswith("lo:"))
    columns = [[int(line[i].replace(",", "")) for line in sizes] for i in (1, 2)]
    return {"bytes": int(loopback[1]), "parameters": sum(columns[0]), "trainable": sum(columns[1])}


if __name__ == "__main__":
    main()
