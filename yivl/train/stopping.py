"""A checkpoint before a job ends: the signal that announces the end, on whichever rank it arrives."""

import signal
import threading
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from yivl.train.ranks import world_size


class StopOnSignal(TrainerCallback):
    """At SIGUSR1, saves a checkpoint after the current step and stops; a single rank does so also at SIGTERM.

    Launchers, also that of DeepSpeed, send SIGTERM when a rank failed, and then no other rank can finish its step.
    ``yivl.train.launch`` turns the SIGTERM that it receives into SIGUSR1; that of DeepSpeed does not.
    """

    def __init__(self) -> None:
        self.received = 0
        """Number of the signal, on all ranks after the step in which one rank received it; 0 before."""
        self._pending = 0
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Handle the signals from now on; before the first step, there is nothing to save."""
        if args.save_strategy == "no" or threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGUSR1,) if args.world_size > 1 else (signal.SIGUSR1, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Let the signals end the process again, which may still write the final model."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Save and stop if any rank has received a signal; all ranks have to do so after the same step."""
        received = self._pending
        if world_size() > 1:
            largest = torch.tensor(received, device=args.device)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            received = int(largest)
        if received:
            self.received = received
            control.should_save = control.should_training_stop = True
        return control

    def _receive(self, number: int, _: Any) -> None:
        self._pending = number
