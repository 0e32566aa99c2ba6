"""Training loop of the phases before stage 1: Muon and AdamW, bf16 autocast, cosine schedule, exact resume.

The transformers ``Trainer`` takes one optimizer and writes checkpoints that are not atomic; both would cost more code.
"""

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from yivl.checkpoint.atomic import atomic_file, write_text
from yivl.train.run_log import read_log

logger = logging.getLogger(__name__)

_LOG_EVERY: Final = 50  # steps


class HeldOutScore(NamedTuple):
    """A held-out score at the end of a phase, in percent."""

    name: str
    reached: float
    target: float | None


def training_folder(folder: Path) -> Path:
    """Return the folder of the training state and log of a phase, beside the checkpoint it writes."""
    return folder.with_name(f"{folder.name}.training")


def fit(
    module: nn.Module,
    dataset: Dataset[Any],
    loss_of: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    folder: Path,
    *,
    steps: int,
    batch_size: int,
    collate: Callable[[Sequence[Any]], Any] | None = None,
    learning_rate: float = 1e-3,
    warmup: int = 100,
    save_every: int = 500,
) -> None:
    """Train a module in place, resuming from ``folder``; sample ``n`` is used once, in step ``n // batch_size``.

    Args:
        module: Module with float32 weights; trained on a GPU if there is one, returned to the CPU in evaluation mode.
        dataset: Samples by number; needs no length.
        loss_of: Loss of a batch; runs under bfloat16 autocast.
        folder: Folder of ``state.pt`` and ``log.jsonl``.
        steps: Number of optimizer steps.
        batch_size: Samples per optimizer step.
        collate: ``collate_fn`` of the ``DataLoader``.
        learning_rate: Peak learning rate of both optimizers.
        warmup: Steps of linear warmup.
        save_every: Steps between two saved states.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_path, log_path = folder / "state.pt", folder / "log.jsonl"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module.to(device).train()
    optimizers = _optimizers(module, learning_rate)
    first = _load_state(state_path, module, optimizers) if state_path.is_file() else 0
    lines = [line for line in read_log(log_path) if line["step"] <= first]
    numbers = range(first * batch_size, steps * batch_size)
    loader = DataLoader(dataset, batch_size, sampler=numbers, collate_fn=collate, num_workers=1, prefetch_factor=4)
    losses: list[torch.Tensor] = []
    for step, batch in enumerate(tqdm(loader, initial=first, total=steps, desc=folder.name, disable=None), first):
        scale = _schedule(step, steps, warmup)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = scale * learning_rate
        torch.manual_seed(step)  # the noise of a step must not depend on where the run was resumed
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of({name: value.to(device) for name, value in batch.items()})
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        module.zero_grad()
        losses.append(loss.detach())
        if (step + 1) % _LOG_EVERY == 0:
            lines.append({"step": step + 1, "loss": float(torch.stack(losses).mean()), "scale": scale})
            losses.clear()
            write_text(log_path, "".join(json.dumps(line) + "\n" for line in lines))
            logger.info("%s: step %d of %d, loss %.3f", folder.name, step + 1, steps, lines[-1]["loss"])
        if (step + 1) % save_every == 0 or step + 1 == steps:
            states = [optimizer.state_dict() for optimizer in optimizers]
            with atomic_file(state_path) as partial:
                torch.save({"step": step + 1, "module": module.state_dict(), "optimizers": states}, partial)
    module.cpu().eval()


def _load_state(path: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Load module and optimizers, and return the number of steps done."""
    state = torch.load(path, weights_only=True)
    module.load_state_dict(state["module"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    logger.info("%s: resuming after step %d", path, state["step"])
    return int(state["step"])


def _schedule(step: int, steps: int, warmup: int) -> float:
    """Return the factor of the learning rate: linear warmup, then cosine decay to 3%."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.03 + 0.97 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def _optimizers(module: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Return AdamW for embeddings, the head, norms, biases and convolutions, and Muon for all other matrices."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
            (matrices if is_matrix else others).append(parameter)
    adamw = torch.optim.AdamW(others, learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    muon = torch.optim.Muon(matrices, learning_rate, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]
