"""The training loop of the phases before stage 1: numbered batches, AdamW, a cosine, exact resuming."""

import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

logger = logging.getLogger(__name__)

_LOG_EVERY = 50


@dataclass(frozen=True)
class Settings:
    """How a phase trains."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int = 100
    weight_decay: float = 0.05


def fit(
    module: nn.Module,
    dataset: Dataset[Any],
    loss_of: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    settings: Settings,
    folder: Path,
    *,
    collate: Callable[[Sequence[Any]], Any] | None = None,
    save_every: int = 500,
) -> None:
    """Train a module in place, and go on where an earlier call stopped.

    Example ``n`` of the data set is used once, in step ``n // batch_size``.

    Args:
        module: What trains; in float32, computed in bfloat16, on the device it is on.
        dataset: With at least ``steps * batch_size`` examples.
        loss_of: From a batch, whose tensors are on that device.
        settings: Steps, batch and rate.
        folder: Of the state and of ``log.jsonl``.
        collate: Of the batches.
        save_every: Steps between two saved states.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_path, log_path = folder / "state.pt", folder / "log.jsonl"
    decayed = [parameter for parameter in module.parameters() if parameter.requires_grad and parameter.ndim > 1]
    others = [parameter for parameter in module.parameters() if parameter.requires_grad and parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, settings.learning_rate, betas=(0.9, 0.98), fused=True)
    first = 0
    if state_path.is_file():
        state = torch.load(state_path, weights_only=True)
        first = state["step"]
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        logger.info("going on at step %d of %d", first, settings.steps)
    lines = log_path.read_text().splitlines(keepends=True) if log_path.is_file() else []
    log_path.write_text("".join(line for line in lines if json.loads(line)["step"] <= first))
    examples = Subset(dataset, range(first * settings.batch_size, settings.steps * settings.batch_size))
    loader = DataLoader(
        examples, settings.batch_size, collate_fn=collate, num_workers=1, persistent_workers=False, prefetch_factor=4
    )
    module.train()
    losses: list[torch.Tensor] = []
    device = next(module.parameters()).device
    progress = tqdm(loader, initial=first, total=settings.steps, desc=folder.name, disable=None)
    for step, batch in enumerate(progress, first):
        rate = _rate(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(step)  # the noise of a step does not depend on where the run was resumed
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of({name: value.to(device) for name, value in batch.items()})
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if (step + 1) % _LOG_EVERY == 0:
            mean = float(torch.stack(losses).mean())
            with log_path.open("a") as log:
                log.write(json.dumps({"step": step + 1, "loss": mean, "learning_rate": rate}) + "\n")
            losses.clear()
            logger.info("%s: step %d of %d, loss %.3f", folder.name, step + 1, settings.steps, mean)
        if (step + 1) % save_every == 0 or step + 1 == settings.steps:
            state = {"step": step + 1, "module": module.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, f"{state_path}.tmp")
            os.replace(f"{state_path}.tmp", state_path)
    module.eval()


def _rate(step: int, settings: Settings) -> float:
    """Return the learning rate of a step: linear warmup, then a cosine down to 3 %."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * (0.03 + 0.97 * (1 + math.cos(math.pi * progress)) / 2)
