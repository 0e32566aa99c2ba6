"""The log of a run: ``log.jsonl``, the loss curve ``loss.png``, and a progress bar or log lines."""

import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerState, TrainingArguments

from yivl.checkpoint.atomic import atomic_file, write_text
from yivl.checkpoint.format import LOG

logger = logging.getLogger(__name__)


class RunLog(TrainerCallback):
    """Writes ``log.jsonl`` and ``loss.png``; shows a progress bar in a terminal, log lines elsewhere."""

    def __init__(self, output_dir: str) -> None:
        self.path, self.plot = Path(output_dir) / LOG, Path(output_dir) / "loss.png"
        self.bar: tqdm[Any] | None = None
        self.started, self.first_step = time.monotonic(), 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Open the bar, and drop the log lines after the checkpoint that is resumed from."""
        if not state.is_world_process_zero:
            return
        lines = read_log(self.path)
        kept = [line for line in lines if line["step"] <= state.global_step and "train_runtime" not in line]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.started, self.first_step = time.monotonic(), state.global_step
        if sys.stderr.isatty() and not args.disable_tqdm:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Update the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        """Write and show one line."""
        if not state.is_world_process_zero:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        if "eval_loss" in logs:
            self.say(f"step {state.global_step}/{state.max_steps}  evaluation loss {logs['eval_loss']:.4f}")
        if "loss" not in logs:
            return
        shown = {
            "loss": f"{logs['loss']:.4f}",
            "lr": f"{logs.get('learning_rate', 0):.2e}",
            "rows/s": f"{logs.get('rows_per_second', 0):,.1f}",
            "tokens/s": f"{logs.get('tokens_per_second', 0):,.0f}",
        }
        if self.bar is not None:
            self.bar.set_postfix(shown)
        else:
            done = max(state.global_step - self.first_step, 1)
            left = (time.monotonic() - self.started) / done * (state.max_steps - state.global_step)
            shown["left"] = str(timedelta(seconds=round(left)))
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            self.say(f"step {state.global_step}/{state.max_steps}  {text}")

    def say(self, text: str) -> None:
        """Show a line, above the bar if one is open."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            logger.info("%s", text)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Close the bar and plot the loss."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if state.is_world_process_zero:
            self.draw()

    def draw(self) -> None:
        """Plot the loss so far."""
        draw_losses({"": self.path}, self.plot)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log, without a last line that an interrupted run left incomplete."""
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def draw_losses(logs: Mapping[str, Path], plot: Path) -> None:
    """Plot the losses of log files, by title, three in a row, with a moving average of long ones."""
    from matplotlib.figure import Figure  # slow to import

    columns = min(len(logs), 3)
    rows = -(-len(logs) // columns)
    figure = Figure(figsize=(8, 4.5) if columns == 1 else (5 * columns, 3.2 * rows), layout="constrained")
    for place, (title, log) in enumerate(logs.items(), 1):
        axes = figure.add_subplot(rows, columns, place, title=title, xlabel="step", ylabel="loss")
        _plot(axes, read_log(log))
    with atomic_file(plot) as partial:
        figure.savefig(partial, dpi=120, format=plot.suffix.removeprefix("."))


def _plot(axes: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
        if not (points := [(line["step"], line[key]) for line in lines if key in line]):
            continue
        steps, losses = zip(*points, strict=True)
        window = max(len(losses) // 50, 1)
        axes.plot(steps, losses, alpha=0.35 if window > 1 else 1, label=label, marker="." if len(losses) < 20 else None)
        if window > 1:
            means = [sum(losses[max(i - window + 1, 0) : i + 1]) / min(i + 1, window) for i in range(len(losses))]
            axes.plot(steps, means, label=f"{label}, mean of {window}")
    axes.grid(alpha=0.3)
    if axes.has_data():
        axes.legend()
