"""The training loop of the phases before stage 1: numbered batches, Muon and AdamW, a cosine, exact resuming."""

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

from yivl.train.run_log import read_log

logger = logging.getLogger(__name__)

_LOG_EVERY = 50


@dataclass(frozen=True)
class Settings:
    """How a phase trains."""

    steps: int
    batch_size: int
    learning_rate: float
    """Of what AdamW trains: embeddings, norms, biases, convolutions."""
    matrix_rate: float
    """Of what Muon trains: all other matrices."""
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
    optimizers = _optimizers(module, settings)
    first = 0
    if state_path.is_file():
        state = torch.load(state_path, weights_only=True)
        first = state["step"]
        module.load_state_dict(state["module"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        logger.info("going on at step %d of %d", first, settings.steps)
    kept = [line for line in read_log(log_path) if line["step"] <= first]
    log_path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    examples = Subset(dataset, range(first * settings.batch_size, settings.steps * settings.batch_size))
    loader = DataLoader(
        examples, settings.batch_size, collate_fn=collate, num_workers=1, persistent_workers=False, prefetch_factor=4
    )
    module.train()
    losses: list[torch.Tensor] = []
    device = next(module.parameters()).device
    progress = tqdm(loader, initial=first, total=settings.steps, desc=folder.name, disable=None)
    for step, batch in enumerate(progress, first):
        scale = _scale(step, settings)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = scale * group["initial_lr"]
        torch.manual_seed(step)  # the noise of a step does not depend on where the run was resumed
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of({name: value.to(device) for name, value in batch.items()})
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        module.zero_grad()
        losses.append(loss.detach())
        if (step + 1) % _LOG_EVERY == 0:
            mean = float(torch.stack(losses).mean())
            with log_path.open("a") as log:
                log.write(json.dumps({"step": step + 1, "loss": mean, "scale": scale}) + "\n")
            losses.clear()
            logger.info("%s: step %d of %d, loss %.3f", folder.name, step + 1, settings.steps, mean)
        if (step + 1) % save_every == 0 or step + 1 == settings.steps:
            state = {
                "step": step + 1,
                "module": module.state_dict(),
                "optimizers": [one.state_dict() for one in optimizers],
            }
            torch.save(state, f"{state_path}.tmp")
            os.replace(f"{state_path}.tmp", state_path)
    module.eval()


def _optimizers(module: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices between layers, and AdamW for all else that trains.

    On written pictures Muon needed about half of the steps of AdamW alone (docs/tiny.md).
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
            (matrices if is_matrix else others).append(parameter)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    ]
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices,
                settings.matrix_rate,
                weight_decay=settings.weight_decay,
                momentum=0.95,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _scale(step: int, settings: Settings) -> float:
    """Return what the learning rates of a step are multiplied with: linear warmup, then a cosine down to 3 %."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.03 + 0.97 * (1 + math.cos(math.pi * progress)) / 2
