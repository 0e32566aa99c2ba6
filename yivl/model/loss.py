"""Next-token loss that computes logits only where a label asks for one."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations import is_deepspeed_zero3_enabled

from yivl.constants import IGNORE_INDEX

CHUNK_SIZE = 1024
"""Supervised positions whose logits exist at once: 1,024 x 64,000 float32 logits are 0.26 GB. Source: ours."""


def supervised_loss(
    hidden_states: torch.Tensor,
    labels: torch.Tensor,
    lm_head: nn.Module,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Return the cross-entropy of the next tokens, a float32 scalar.

    Args:
        hidden_states: ``(batch, seq, hidden)``, after the final norm.
        labels: ``(batch, seq)`` int64 aligned with the positions (not shifted); ``IGNORE_INDEX`` takes no loss.
        lm_head: Maps ``(n, hidden)`` to ``(n, vocabulary)``; the logits of one chunk exist at a time.
        num_items_in_batch: Supervised tokens of the whole optimizer step; the sum is divided by it. ``None`` divides
            by the supervised tokens at hand.
    """
    targets = labels[:, 1:].to(hidden_states.device)  # layers may be spread over devices
    is_supervised = targets != IGNORE_INDEX
    hidden_states, targets = hidden_states[:, :-1][is_supervised], targets[is_supervised]

    def chunk_loss(chunk: torch.Tensor, chunk_targets: torch.Tensor) -> torch.Tensor:
        logits = lm_head(chunk).float()
        return nn.functional.cross_entropy(logits, chunk_targets.to(logits.device), reduction="sum")

    # One (possibly empty) chunk at least, so that the loss is always part of the graph. The last one keeps its logits:
    # the backward pass begins with them, and only then comes to the others, which it computes again.
    *recomputed, kept = range(0, _num_chunks(len(targets), hidden_states.device) * CHUNK_SIZE, CHUNK_SIZE)
    losses = [
        checkpoint(chunk_loss, hidden_states[i : i + CHUNK_SIZE], targets[i : i + CHUNK_SIZE], use_reentrant=False)
        for i in recomputed
    ]
    total = torch.stack([*losses, chunk_loss(hidden_states[kept:], targets[kept:])]).sum()
    return total / (max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch)


def _num_chunks(num_targets: int, device: torch.device) -> int:
    """Return how often ``lm_head`` runs; under ZeRO-3 every process must gather its weights equally often."""
    count = torch.tensor(max(-(-num_targets // CHUNK_SIZE), 1), device=device)
    if is_deepspeed_zero3_enabled():
        torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX)
    return int(count)
