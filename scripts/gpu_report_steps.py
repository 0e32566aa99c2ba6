"""Quantization of random weights, batches in memory and the times of a step, for ``gpu_report_training.py``."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from yivl.data.collator import Collator


def quantize(model: Any, device: str) -> None:
    """Quantize the linear layers of the decoder to 4 bits as ``yivl.checkpoint.loading`` does, in place."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for module in [*model.model.layers.modules()]:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                with torch.device("meta"):
                    linear = Linear4bit(
                        child.in_features,
                        child.out_features,
                        bias=False,
                        compute_dtype=torch.bfloat16,
                        quant_type="nf4",
                    )
                weight = Params4bit(child.weight.data.cpu(), requires_grad=False, quant_type="nf4")
                linear.weight = weight.to(device)  # quantizes
                setattr(module, name, linear)
    model.is_loaded_in_4bit = True  # peft then adapts these layers


class _Loader(DataLoader[Any]):
    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the order is of no interest."""


@dataclass(frozen=True)
class InMemoryBatches:
    """As ``yivl.train.dataloaders.Batches``, without reading rows, which needs more packages."""

    loader: DataLoader[Any]
    sources: tuple[()] = ()
    stream: None = None

    @classmethod
    def of(cls, samples: Sequence[Any], size: int) -> "InMemoryBatches":
        """Return batches of ``size`` samples."""
        indices = [list(range(start, start + size)) for start in range(0, len(samples), size)]
        return cls(_Loader(samples, batch_sampler=indices, collate_fn=Collator(0)))  # type: ignore[arg-type]


@dataclass
class StepTimes(TrainerCallback):  # type: ignore[misc]
    """Takes the time of steps and their phases, and stops training when it is late, after at least one step.

    ``other`` is the time between steps: the next batch, the log, the learning rate.
    """

    model: nn.Module
    synchronize: Callable[[], None] | None
    """Waits for the device."""
    warm_up: int
    is_late: Callable[[], bool]
    """Whether to stop training."""
    report: Callable[[], None]
    """Called after every measured step."""
    marks: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.register_forward_pre_hook(lambda *_: self._mark("forward"))
        self.model.register_forward_hook(lambda *_: self._mark("backward"))

    def _mark(self, name: str) -> None:
        if self.synchronize is not None:
            self.synchronize()
        if self.marks:
            self.marks[-1][name] = time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Begin a step."""
        self.marks.append({})
        self._mark("begin")

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """End the backward pass, and the clipping of gradients."""
        self._mark("optimizer")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End a step."""
        self._mark("end")
        if state.global_step > self.warm_up:
            self.report()
            control.should_training_stop |= self.is_late()

    def seconds(self) -> list[dict[str, float]]:
        """Return the seconds of each step after the warm-up, from the end of the step before, and of its phases."""
        return [
            {
                "step": now["end"] - before["end"],
                "forward": now["backward"] - now["forward"],
                "backward": now["optimizer"] - now["backward"],
                "optimizer": now["end"] - now["optimizer"],
                "other": now["forward"] - before["end"],
            }
            for before, now in zip(self.marks[self.warm_up - 1 :], self.marks[self.warm_up :], strict=False)
        ]
