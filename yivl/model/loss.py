"""Next-token cross-entropy loss that computes logits only at supervised positions."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations import is_deepspeed_zero3_enabled

from yivl.constants import IGNORE_INDEX

CHUNK_SIZE = 1024
"""Supervised positions whose logits are in memory at once: 1,024 x 64,000 float32 logits are 0.26 GB. Source: ours."""


def supervised_loss(
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    lm_head: nn.Module,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Return the cross-entropy of the next tokens, a float32 scalar.

    Args:
        hidden_states: ``(batch, seq, hidden)``, after the final norm.
        labels: ``(batch, seq)`` int64 aligned with the positions (not shifted); no loss at ``IGNORE_INDEX``.
        lm_head: Maps ``(n, hidden)`` to ``(n, vocabulary)``, one chunk at a time.
        num_items_in_batch: Supervised tokens of the optimizer step, the divisor of the summed loss; ``None`` divides
            by the supervised tokens of ``labels``.
    """
    targets = labels[:, 1:].to(hidden_states.device)  # layers may be spread over devices
    is_supervised = targets != IGNORE_INDEX
    hidden_states, targets = hidden_states[:, :-1][is_supervised], targets[is_supervised]

    def chunk_loss(chunk: torch.Tensor, chunk_targets: torch.Tensor) -> torch.Tensor:
        logits = lm_head(chunk).float()
        return nn.functional.cross_entropy(logits, chunk_targets.to(logits.device), reduction="sum")

    # At least one (possibly empty) chunk keeps the loss in the autograd graph. The last chunk is not checkpointed: the
    # backward pass starts with it and re-computes the others only afterwards.
    *recomputed, kept = range(0, _num_chunks(len(targets), hidden_states.device) * CHUNK_SIZE, CHUNK_SIZE)
    losses = [
        checkpoint(chunk_loss, hidden_states[i : i + CHUNK_SIZE], targets[i : i + CHUNK_SIZE], use_reentrant=False)
        for i in recomputed
    ]
    total = torch.stack([*losses, chunk_loss(hidden_states[kept:], targets[kept:])]).sum()
    return total / (max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch)


def _num_chunks(num_targets: int, device: torch.device) -> int:
    """Return the number of calls of ``lm_head``; under ZeRO-3 all ranks must gather its weights equally often."""
    count = torch.tensor(max(-(-num_targets // CHUNK_SIZE), 1), device=device)
    if is_deepspeed_zero3_enabled():
        torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX)
    return int(count)
